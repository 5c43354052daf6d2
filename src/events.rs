//! What happens to locks, told to whoever counts it.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;

/// Something that happened to a lock of a storage, as
/// [`PostgresStorageOptions::on_event`](crate::PostgresStorageOptions::on_event) is told of it.
///
/// A lock that its owner takes once more on the same thread is not acquired, and not released by the inner guards.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A lock was acquired: a new hold began.
    #[non_exhaustive]
    Acquired {
        /// The lock.
        lock_id: &'a str,
        /// Who holds it now.
        owner_id: &'a str,
        /// The version of the new hold.
        version: i64,
        /// How long the call took that acquired it.
        waited: Duration,
        /// Whether the lease of the hold before had run out without a release.
        is_takeover: bool,
    },

    /// The database was asked for a lock, which was somebody else's, or just changed hands. Whoever waits asks again.
    #[non_exhaustive]
    Busy {
        /// The lock.
        lock_id: &'a str,
        /// Who asked.
        owner_id: &'a str,
        /// The version of the hold that is in the way, if that is known.
        version: Option<i64>,
    },

    /// A lease was renewed.
    #[non_exhaustive]
    Refreshed {
        /// The lock.
        lock_id: &'a str,
        /// Who holds it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
        /// From when the refresh was sent until it was answered.
        latency: Duration,
    },

    /// An attempt to renew a lease failed. It is repeated until the deadline of the hold.
    #[non_exhaustive]
    RefreshFailed {
        /// The lock.
        lock_id: &'a str,
        /// Who holds it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
        /// Why.
        error: &'a Error,
    },

    /// A hold was lost. Each is told once, by its deadline, or when its last guard finds out.
    #[non_exhaustive]
    Lost {
        /// The lock.
        lock_id: &'a str,
        /// Who held it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
    },

    /// A hold was given back, to the database or to the next thread of this process. One of which that could not be confirmed is
    /// not told.
    #[non_exhaustive]
    Released {
        /// The lock.
        lock_id: &'a str,
        /// Who held it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
        /// How long the hold was.
        held: Duration,
    },

    /// A connection was opened after one or more had broken.
    #[non_exhaustive]
    Reconnected {},
}

type OnEvent = dyn Fn(&Event<'_>) + Send + Sync;

/// Whom to tell, if anybody.
#[derive(Clone, Default)]
pub(crate) struct Events(Option<Arc<OnEvent>>);

impl Events {
    pub(crate) fn to(on_event: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Events {
        Events(Some(Arc::new(on_event)))
    }

    /// Tells of an event. No mutex may be held: what is called is not ours.
    pub(crate) fn tell<'a>(&self, event: impl FnOnce() -> Event<'a>) {
        let Some(on_event) = &self.0 else { return };
        if catch_unwind(AssertUnwindSafe(|| on_event(&event()))).is_err() {
            log::warn!(target: "storage_lock", "on_event panicked");
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "(set)" } else { "(not set)" })
    }
}
