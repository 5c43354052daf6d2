//! What all sessions of a storage know of the way to the server. Uses `events` and `user_code`.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Instant, SystemTime};

use crate::events::Events;
use crate::sync::lock;
use crate::user_code::log_at;

/// What all sessions of a storage know of the way to the server.
#[derive(Debug, Default)]
pub(crate) struct Route {
    /// A pooler shares server sessions between clients: nothing may depend on a session.
    pub(crate) is_pooled: AtomicBool,
    /// Goes up when a connection breaks or is silent. The connections that were open then may be dead too: each of them
    /// has to answer before it is used.
    pub(crate) generation: AtomicUsize,
    /// A connection broke, and none has been opened since then.
    pub(super) is_interrupted: AtomicBool,
    pub(crate) events: Events,
    /// What the server's clock said last, and when this process read that.
    clock: Mutex<Option<(SystemTime, Instant)>>,
}

impl Route {
    pub(crate) fn new(events: Events) -> Route {
        Route { events, ..Route::default() }
    }

    /// Notes that a connection was opened. True if one had broken before.
    pub(super) fn end_interruption(&self) -> bool {
        self.is_interrupted.swap(false, Ordering::Relaxed)
    }

    pub(super) fn clock(&self) -> Option<(SystemTime, Instant)> {
        *lock(&self.clock)
    }

    pub(super) fn set_clock(&self, clock: (SystemTime, Instant)) {
        *lock(&self.clock) = Some(clock);
    }

    /// Notes that a connection is silent.
    pub(crate) fn suspect(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn recognise_pooler(&self, why: &str) {
        if !self.is_pooled.swap(true, Ordering::Relaxed) {
            log_at!(info, "a pooler in transaction mode is in the way ({why}): using unnamed statements");
        }
    }
}
