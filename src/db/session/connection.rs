//! Whether a session's connection may be used, and what its end says about other connections.
//!
//! Connections of one storage share a [`Route`](crate::db::route::Route), and its generation. The generation goes up
//! when one of them breaks or is silent. A session that has not answered since is *suspect*: it may be dead, too.

use std::sync::atomic::Ordering;
use std::time::Duration;

use postgres::error::SqlState;
use postgres::fallible_iterator::FallibleIterator;

use super::Session;
use crate::db::answer::Fault;
use crate::error::chain;
use crate::user_code::log_at;

/// The server's errors when it ends sessions for reasons of its own.
const SHUT_DOWN: [SqlState; 3] = [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW];

/// A connection that has been idle for so long is checked before its use. The server, or something on the way, may have
/// closed it.
const CHECKED_AFTER: Duration = Duration::from_millis(100);

impl Session {
    /// Whether the session may be used again.
    pub(crate) fn is_usable(&self) -> bool {
        let is_closed = self.client.is_closed();
        if is_closed && !self.is_broken {
            self.report_break();
        }
        !is_closed && !self.is_broken && (self.backend.is_none() || !self.route.is_pooled.load(Ordering::Relaxed))
    }

    /// Whether the backend belongs to this session alone. Only then can the session listen.
    pub(crate) fn is_direct(&self) -> bool {
        self.backend.is_some()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Whether another connection broke, or was silent, after this one answered last. This one may be dead, too.
    pub(crate) fn is_suspect(&self) -> bool {
        self.generation != self.route_generation()
    }

    /// Records an answer: the session is not suspect until the generation goes up again.
    pub(crate) fn trust(&mut self) {
        self.generation = self.route_generation();
    }

    /// Whether the session answers within `timeout`. If not, it must not be used any more.
    pub(crate) fn answers_within(&mut self, timeout: Duration) -> bool {
        // If it was closed because it was idle, that says nothing about other connections.
        if !self.is_ready(CHECKED_AFTER) {
            return false;
        }
        let is_alive = self.is_alive(timeout);
        if is_alive {
            self.trust();
        } else {
            self.report_break();
            self.is_broken = true;
        }
        is_alive
    }

    /// A number that goes up when any connection of the storage breaks, or is silent.
    pub(crate) fn route_generation(&self) -> usize {
        self.route.generation.load(Ordering::Relaxed)
    }

    /// The session must not be used again. Connections that have not answered since this one did become suspect.
    pub(crate) fn mark_broken(&mut self, fault: &Fault) {
        self.is_broken = true;
        // A connection that turned out to be a pooler's is in order.
        if !matches!(fault, Fault::Pooled) {
            self.report_break();
        }
        self.route.generation.fetch_max(self.generation + 1, Ordering::Relaxed);
    }

    /// Records that this connection broke.
    pub(crate) fn report_break(&self) {
        self.route.is_interrupted.store(true, Ordering::Relaxed);
    }

    /// Whether the session may be used, after it has been `idle` for so long.
    pub(crate) fn is_ready(&mut self, idle: Duration) -> bool {
        if idle >= CHECKED_AFTER && !self.is_broken {
            // Reads what came meanwhile, which may be the end of the connection. No call is under way, so nothing is
            // lost.
            let end = self.client.notifications().timeout_iter(Duration::ZERO).next();
            if end.is_err() || self.client.is_closed() {
                let why = end.err();
                // If the server, or something on the way, closed it because it was idle, that says nothing about
                // others.
                if why.as_ref().and_then(|error| error.code()).is_some_and(|code| SHUT_DOWN.contains(code)) {
                    self.report_break();
                }
                self.is_broken = true;
                log_at!(
                    debug,
                    "an idle connection was closed: {}",
                    why.map_or_else(String::new, |error| chain(&error))
                );
            }
        }
        !self.is_broken && self.is_usable()
    }

    /// Whether the server answers within `timeout`.
    pub(crate) fn is_alive(&mut self, timeout: Duration) -> bool {
        self.client.is_valid(timeout).is_ok()
    }
}
