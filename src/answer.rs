//! What is asked of the database, and what its answers mean. Pure: no I/O, and no clock.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::error::is_connection_fault;
use crate::sql::{GRACE, LONGEST_STEPS, MAX_WAITERS, STEP};
use crate::sync::Instant;

/// Why an operation has no result.
#[derive(Debug)]
pub(crate) enum Fault {
    /// A pooler was recognised; nothing was done. The same on a new session will work.
    Pooled,
    /// The user's logger panicked within the driver: the connection is in no known state.
    Panicked,
    Postgres(postgres::Error),
}

impl From<postgres::Error> for Fault {
    fn from(error: postgres::Error) -> Fault {
        Fault::Postgres(error)
    }
}

/// Who asks for which lock, and under which lease.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) lock_id: String,
    pub(crate) owner_id: String,
    /// Made before the statement is sent. After a lost answer it isn't sent again: what it took is found by it, and
    /// undone.
    pub(crate) lease_id: Uuid,
    pub(crate) lease: Duration,
    /// After this its statement takes no effect, however late it comes to be sent or served.
    pub(crate) expires: Instant,
}

/// A hold, as the database gave it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Granted {
    pub(crate) version: i64,
    /// When the request was sent.
    pub(crate) sent: Instant,
    /// What the lease had left when it was answered.
    pub(crate) left: Duration,
    /// Other processes wait for it.
    pub(crate) is_wanted: bool,
}

/// Asks as one that waits, and so keeps to the order of the row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    /// What the process is called in the row.
    pub(crate) waiter: Uuid,
    /// Those before it have been notified that the lock is free in this version, and had time to come.
    pub(crate) turn: Option<i64>,
}

/// What the database said to an acquire.
#[derive(Debug)]
pub(crate) enum Acquired {
    /// Ours. The owner before is named if its lease had run out without a release.
    Taken { granted: Granted, taken_over_from: Option<String> },
    /// Another's, or promised to another.
    Busy(Busy),
    /// Somebody's transaction keeps the row locked.
    Locked,
    /// Free, but it changed hands, was locked, or couldn't be serialised while the statement ran.
    Missed,
    /// No such lock id has ever been held.
    Absent,
    /// It came later than a claim's statement may take effect.
    TooLate,
}

/// A lock that can't be had now, as its row says; for a waiter, the row as its own registration wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Busy {
    pub(crate) version: i64,
    pub(crate) owner_id: String,
    /// It is nobody's, and promised to others.
    pub(crate) is_free: bool,
    /// What is left of the lease that is in the way, or of the promise.
    pub(crate) left: Duration,
    /// Those before it in the row were notified by this very statement.
    pub(crate) has_notified: bool,
    /// The place in the row, from 1. None of one that doesn't wait, or for which there was no room.
    pub(crate) place: Option<u32>,
    /// How many stand in the row.
    pub(crate) waiters: u32,
}

/// How long it may take, on a busy machine, until whoever was notified has taken the lock.
const HEARING: Duration = Duration::from_millis(50);
/// After so long a waiter looks at the lock, whatever it knows.
pub(crate) const LOOK: Duration = Duration::from_secs(5);
/// More rarely where many stand in the row: a tenth of a second for each, so that all of them together look ten times a second. But no
/// more rarely than this, as most of them may be dead, and the lock be free.
const LOOK_OF_MANY: Duration = Duration::from_secs(15);

/// How long a waiter in a row of so many sleeps at most.
pub(crate) fn longest_sleep(waiters: u32) -> Duration {
    (Duration::from_millis(100) * waiters).clamp(LOOK, LOOK_OF_MANY)
}

impl Busy {
    /// For how long a waiter sleeps if nobody notifies it: until the lock may be its own, but no longer than for a `fraction`, up to 1, of
    /// [`longest_sleep`]. The end of a lease, too, is for the first in the row, then for the second, and so on.
    pub(crate) fn sleep(&self, fraction: f64) -> Duration {
        let before = self.place.map_or(self.waiters, |place| place.saturating_sub(1));
        let behind_the_first = STEP * before.saturating_sub(1);
        let turn = match (self.is_free, before) {
            (false, 0) => self.left,
            (false, _) => self.left + GRACE + behind_the_first,
            (true, _) if self.has_notified => HEARING + (STEP * before).min(LONGEST_STEPS),
            (true, _) => self.left.min(GRACE) + behind_the_first.min(LONGEST_STEPS),
        };
        // One for which there was no room is notified of nothing.
        let longest = if self.place.is_some() { longest_sleep(self.waiters) } else { LOOK };
        turn.min(longest.mul_f64(fraction))
    }

    /// The version in which the waiter may take the lock when it has slept.
    pub(crate) fn turn(&self) -> Option<i64> {
        (self.is_free && self.has_notified).then_some(self.version)
    }
}

/// One row of the table: the newest hold of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockInformation {
    /// The lock.
    pub lock_id: String,
    /// Who holds it, or held it last.
    pub owner_id: String,
    /// Counts the holds of this lock.
    pub version: i64,
    /// When the hold began, by the database's clock.
    pub lock_begin_time: SystemTime,
    /// From when on the lock is free unless it is refreshed, by the database's clock.
    pub lease_expire_time: SystemTime,
    /// When the hold was released, by the database's clock.
    pub released_at: Option<SystemTime>,
    /// Whether the hold was neither released nor expired when the row was read, by the database's clock.
    pub is_held: bool,
    /// How many processes wait for the lock, as its row says. One that ended without leaving the row counts until another one has taken the
    /// lock from behind it.
    pub waiters: usize,
}

/// What is in the place of our table.
#[derive(Debug)]
pub(crate) enum Found {
    NoSchema,
    NoTable,
    Table { kind: String, persistence: String, columns: Vec<String>, has_key: bool, hides_rows: bool },
}

/// What the row of an acquire says.
#[derive(Clone, Debug)]
pub(crate) struct AcquireRow {
    /// The version that the statement made, if it took the lock.
    pub(crate) taken: Option<i64>,
    /// What is left of the lease that was taken, or of the one that is in the way, or of a promise.
    pub(crate) left: Duration,
    /// Processes wait for the lock that was taken.
    pub(crate) is_wanted: bool,
    /// The newest version, but for the one that was taken.
    pub(crate) version: i64,
    /// Whose that is.
    pub(crate) owner_id: String,
    pub(crate) is_released: bool,
    /// Released, or its lease is over.
    pub(crate) is_free: bool,
    /// Free, and not promised to others.
    pub(crate) may_take: bool,
    pub(crate) has_notified: bool,
    /// It was asked with a ticket.
    pub(crate) waits: bool,
    pub(crate) place: Option<u32>,
    pub(crate) waiters: u32,
}

impl AcquireRow {
    /// What this means for who asked at `sent`.
    pub(crate) fn meaning(self, sent: Instant) -> Acquired {
        let AcquireRow { left, is_wanted, version, owner_id, is_free, has_notified, place, waiters, .. } = self;
        if let Some(version) = self.taken {
            let granted = Granted { version, sent, left, is_wanted };
            let taken_over_from = if self.is_released { None } else { Some(owner_id) };
            return Acquired::Taken { granted, taken_over_from };
        }
        // It changed while the statement ran, or somebody had locked the row.
        if self.may_take || self.waits && place.is_none() && waiters < MAX_WAITERS {
            return Acquired::Missed;
        }
        Acquired::Busy(Busy { version, owner_id, is_free, left, has_notified, place, waiters })
    }
}

impl Fault {
    /// Whether the session can't be used any more, while the same on a fresh one may work.
    pub(crate) fn is_connection_fault(&self) -> bool {
        match self {
            Fault::Pooled | Fault::Panicked => true,
            Fault::Postgres(error) => is_connection_fault(error),
        }
    }

    /// Whether what was asked may have happened all the same.
    pub(crate) fn is_outcome_unknown(&self) -> bool {
        !matches!(self, Fault::Pooled) && self.is_connection_fault()
    }
}

#[cfg(test)]
// Named, because the fuzzer takes this file in from another folder.
#[path = "answer/properties.rs"]
pub(crate) mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);
    const BUSY: Busy = Busy {
        version: 7,
        owner_id: String::new(),
        is_free: false,
        left: LONG,
        has_notified: false,
        place: Some(1),
        waiters: 1,
    };

    #[test]
    fn a_waiter_looks_when_the_lease_ends_that_is_in_the_way() {
        let left = Duration::from_millis(700);
        assert_eq!(Busy { left, ..BUSY }.sleep(1.0), left);
        let second = Busy { left, place: Some(2), waiters: 2, ..BUSY };
        assert!(second.sleep(1.0) > left && second.sleep(1.0) <= left + 2 * GRACE, "{:?}", second.sleep(1.0));
    }

    #[test]
    fn a_waiter_looks_from_time_to_time_whatever_it_was_told() {
        for (place, waiters, longest) in [(Some(1), 1, LOOK), (Some(50), 50, LOOK), (Some(9), 1_000, LOOK_OF_MANY)] {
            let busy = Busy { place, waiters, ..BUSY };
            assert!(busy.sleep(1.0) <= longest, "{busy:?} sleeps for {:?}", busy.sleep(1.0));
        }
        let without_a_place = Busy { place: None, waiters: MAX_WAITERS, ..BUSY };
        assert!(without_a_place.sleep(1.0) <= LOOK, "nobody notifies it");
    }

    #[test]
    fn a_free_lock_is_looked_at_soon_however_many_stand_before() {
        for place in [1, 2, 10, 300, MAX_WAITERS] {
            for has_notified in [false, true] {
                let busy = Busy { is_free: true, has_notified, place: Some(place), waiters: place, ..BUSY };
                let longest = GRACE + HEARING + LONGEST_STEPS;
                assert!(busy.sleep(1.0) <= longest, "{busy:?} sleeps for {:?}", busy.sleep(1.0));
            }
        }
    }

    #[test]
    fn who_has_notified_those_before_it_may_take_that_version() {
        let free = Busy { is_free: true, place: Some(2), waiters: 2, ..BUSY };
        assert_eq!(free.turn(), None);
        assert_eq!(Busy { has_notified: true, ..free }.turn(), Some(7));
        assert_eq!(Busy { has_notified: true, ..BUSY }.turn(), None, "it is held");
    }
}
