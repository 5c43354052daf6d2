//! Events: what happens to locks, sent to the callback that the user set.
//!
//! Invariant: no mutex is held while an event is sent. Imports: `error` and `user_code`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::user_code::{self, Callback, log_at};

/// Something that happened to a lock of a storage, for
/// [`PostgresStorageOptions::on_event`](crate::PostgresStorageOptions::on_event).
///
/// Every hold that a caller got has a first event, [`Acquired`](Event::Acquired), and one event for its end: either
/// [`Released`](Event::Released) or [`Lost`](Event::Lost). So the number of held locks is acquired minus released minus
/// lost.
///
/// If an owner takes its lock once more on the same thread, that is no `Acquired`, and the inner guards send no
/// `Released`. A hold that nobody got, because its caller had given up meanwhile, has no events at all.
///
/// Events that happen simultaneously on several threads are sent simultaneously. So the `Acquired` of the next hold may
/// come just before the `Released` that it follows, and the last `Refreshed` of a hold just after its end.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A lock was acquired: a new hold began. Another thread of this process may have handed the lock over.
    #[non_exhaustive]
    Acquired {
        /// The lock.
        lock_id: &'a str,
        /// The owner that holds it now.
        owner_id: &'a str,
        /// The version of the new hold.
        version: i64,
        /// How long the call took that acquired the lock.
        waited: Duration,
        /// Whether the lease of the previous hold had run out without a release.
        is_takeover: bool,
    },

    /// The database was asked for a lock that somebody else held, or that just changed hands. A waiter asks again
    /// later. Of the threads of a process that wait for one lock, only the first asks, and none while another thread of
    /// the process has the lock.
    #[non_exhaustive]
    Busy {
        /// The lock.
        lock_id: &'a str,
        /// The owner that asked.
        owner_id: &'a str,
        /// The version of the hold that is in the way, if it is known.
        version: Option<i64>,
    },

    /// A lease was refreshed.
    #[non_exhaustive]
    Refreshed {
        /// The lock.
        lock_id: &'a str,
        /// The owner that holds it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
        /// The time from sending the refresh to its answer.
        latency: Duration,
    },

    /// A refresh failed, or had no answer in time. It is repeated until the deadline of the hold. An answer that comes
    /// later still counts, as [`Refreshed`](Event::Refreshed).
    #[non_exhaustive]
    RefreshFailed {
        /// The lock.
        lock_id: &'a str,
        /// The owner that holds it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
        /// Why.
        error: &'a Error,
    },

    /// A hold was lost: its deadline came, or a refresh or the end of its last guard found that the hold was gone.
    #[non_exhaustive]
    Lost {
        /// The lock.
        lock_id: &'a str,
        /// The owner that held it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
    },

    /// A hold was released in the database, or handed over to the next thread of this process, or released by a
    /// transaction that [`unlock_in`](crate::LockGuard::unlock_in) was given.
    #[non_exhaustive]
    Released {
        /// The lock.
        lock_id: &'a str,
        /// The owner that held it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
        /// How long the hold lasted: from the request for it, without the time in the wait queue, to its release.
        held: Duration,
        /// Whether the release is known to have happened. If not, because the database was out of reach, it is repeated
        /// in the background. If that fails too, the lease has to run out.
        is_confirmed: bool,
    },

    /// A connection was opened after one or more had broken: of the connections for calls, or the one that listens for
    /// releases.
    #[non_exhaustive]
    Reconnected {},
}

type OnEvent = dyn Fn(&Event<'_>) + Send + Sync;

/// The callback for events, if the user set one.
#[derive(Clone, Default)]
pub(crate) struct Events(Callback<OnEvent>);

impl Events {
    pub(crate) fn to(on_event: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Events {
        Events(Callback::to(Arc::new(on_event)))
    }

    /// Sends an event. The caller must hold no mutex, because the callback is user code.
    pub(crate) fn send<'a>(&self, event: impl FnOnce() -> Event<'a>) {
        let Some(on_event) = self.0.get() else { return };
        if user_code::call(|| on_event(&event())).is_none() {
            log_at!(warn, "on_event panicked");
        }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_nobody_no_event_is_made() {
        Events::default().send(|| unreachable!("made"));
    }
}
