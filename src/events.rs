//! What happens to locks, told to whoever counts it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::user_code::{self, Callback, note};

/// Something that happened to a lock of a storage, as
/// [`PostgresStorageOptions::on_event`](crate::PostgresStorageOptions::on_event) is told of it.
///
/// Every hold that a caller got is told of twice: [`Acquired`](Event::Acquired), before anything else of it, and when it ends either
/// [`Released`](Event::Released) or [`Lost`](Event::Lost). So acquired, less released and lost, is held. A lock that its owner takes
/// once more on the same thread is not acquired, and not released by the inner guards; a hold that nobody got, because its caller had
/// given up meanwhile, is not told of at all.
///
/// What happens at the same time on several threads is told at the same time. So the next hold may be told of just before the release that
/// it follows, and the last refresh of a hold just after its end.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A lock was acquired: a new hold began. It may have been handed over by another thread of this process.
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

    /// The database was asked for a lock, which was somebody else's, or just changed hands. Whoever waits asks again. Of the threads of a
    /// process that wait for one lock only the first asks, and none while another thread of the process has it.
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

    /// An attempt to renew a lease failed, or had no answer in time (one that comes later still counts, as
    /// [`Refreshed`](Event::Refreshed)). It is repeated until the deadline of the hold.
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

    /// A hold was lost: its deadline came, or a refresh or the end of its last guard found that it was not there any more.
    #[non_exhaustive]
    Lost {
        /// The lock.
        lock_id: &'a str,
        /// Who held it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
    },

    /// A hold was given back, to the database or to the next thread of this process, or by a transaction that
    /// [`unlock_in`](crate::LockGuard::unlock_in) was given.
    #[non_exhaustive]
    Released {
        /// The lock.
        lock_id: &'a str,
        /// Who held it.
        owner_id: &'a str,
        /// The version of the hold.
        version: i64,
        /// How long the hold was: from when it was asked for, without the time in the line, until it was given back.
        held: Duration,
        /// Whether it is known to be given back. If not, because the database was out of reach, that is repeated in the background; if that
        /// fails too, the lease has to run out.
        is_confirmed: bool,
    },

    /// A connection was opened after one or more had broken, of those that are kept for calls or the one that listens for releases.
    #[non_exhaustive]
    Reconnected {},
}

type OnEvent = dyn Fn(&Event<'_>) + Send + Sync;

/// Whom to tell, if anybody.
#[derive(Clone, Default)]
pub(crate) struct Events(Callback<OnEvent>);

impl Events {
    pub(crate) fn to(on_event: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Events {
        Events(Callback::to(Arc::new(on_event)))
    }

    /// Tells of an event. No mutex may be held: what is called is not ours.
    pub(crate) fn tell<'a>(&self, event: impl FnOnce() -> Event<'a>) {
        let Some(on_event) = self.0.get() else { return };
        if user_code::call(|| on_event(&event())).is_none() {
            note!(warn, "on_event panicked");
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
        Events::default().tell(|| unreachable!("made"));
    }
}
