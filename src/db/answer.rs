//! The values that the library sends to the database, and what the answers mean.
//!
//! Pure: no I/O, and no clock. Uses [`crate::db::sql`]'s times and limits, [`crate::error`] and [`crate::sync`].

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::db::sql::{GRACE, LONGEST_STEPS, MAX_WAITERS, STEP};
use crate::error::is_connection_fault;
use crate::sync::Instant;

/// Why an operation has no result.
#[derive(Debug)]
pub(crate) enum Fault {
    /// A pooler was recognised, and the statement did nothing. The same on a new session will work.
    Pooled,
    /// The caller's logger panicked within the driver. The state of the connection is unknown.
    Panicked,
    Postgres(postgres::Error),
}

impl From<postgres::Error> for Fault {
    fn from(error: postgres::Error) -> Fault {
        Fault::Postgres(error)
    }
}

/// A request for one hold: which lock, for which owner, and under which lease.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) lock_id: String,
    pub(crate) owner_id: String,
    /// Made before the statement is sent. After a lost answer the claim isn't sent again. Instead, the library finds
    /// what the claim took by this id, and releases it.
    pub(crate) lease_id: Uuid,
    pub(crate) lease: Duration,
    /// From then on the claim's statement takes no effect, however late it is sent or served.
    pub(crate) expires: Instant,
}

/// A hold, as the database granted it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Granted {
    pub(crate) version: i64,
    /// When the request was sent.
    pub(crate) sent: Instant,
    /// What was left of the lease when the database answered.
    pub(crate) left: Duration,
    /// Other processes wait for the lock.
    pub(crate) is_wanted: bool,
}

/// A process that waits in the row, and so keeps to the order of the row when it acquires.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowWaiter {
    /// The name of the process in the row.
    pub(crate) id: Uuid,
    /// The waiters before this one have been notified that the lock is free in this version, and have had time to come.
    pub(crate) notified_version: Option<i64>,
}

/// The database's answer to an acquire.
#[derive(Debug)]
pub(crate) enum Acquired {
    /// The lock is ours. The owner before is named if its lease ran out without a release.
    Taken { granted: Granted, taken_over_from: Option<String> },
    /// Another process holds the lock, or the lock is promised to another one.
    Busy(Busy),
    /// Somebody's transaction keeps the row locked.
    Locked,
    /// A miss: the lock was free, but while the statement ran it changed hands, was locked, or couldn't be serialised.
    Missed,
    /// Nobody has ever held this lock.
    Absent,
    /// The statement came after the claim had expired, and did nothing.
    TooLate,
}

/// A lock that can't be acquired now, as its row says. For a waiter, this is the row as its own registration wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Busy {
    pub(crate) version: i64,
    pub(crate) owner_id: String,
    /// Nobody holds the lock, and it is promised to others.
    pub(crate) is_free: bool,
    /// What is left of the lease that is in the way, or of the promise.
    pub(crate) left: Duration,
    /// This very statement notified the waiters before this one.
    pub(crate) has_notified: bool,
    /// The position in the row, from 1. None without a waiter, or if the row had no room.
    pub(crate) position: Option<u32>,
    /// How many processes are in the row.
    pub(crate) waiters: u32,
}

/// How long it may take on a busy machine until a notified process has taken the lock.
const REACTION_TIME: Duration = Duration::from_millis(50);
/// A waiter looks at the lock at least this often, whatever it knows.
pub(crate) const LONGEST_SLEEP: Duration = Duration::from_secs(5);
/// Where many processes are in the row, a waiter looks more rarely: a tenth of a second for each of them, so that all
/// of them together look ten times a second. But it looks at least this often: most of them may be dead, and the lock
/// free.
const LONGEST_SLEEP_OF_MANY: Duration = Duration::from_secs(15);

/// How long a waiter sleeps at most in a row of `waiters` processes.
pub(crate) fn longest_sleep(waiters: u32) -> Duration {
    (Duration::from_millis(100) * waiters).clamp(LONGEST_SLEEP, LONGEST_SLEEP_OF_MANY)
}

impl Busy {
    /// How long a waiter sleeps if nobody notifies it: until it may acquire the lock, but no longer than a `fraction`
    /// (up to 1) of [`longest_sleep`]. After the end of a lease, too, first the first in the row looks, then the
    /// second, and so on.
    pub(crate) fn sleep(&self, fraction: f64) -> Duration {
        let before = self.position.map_or(self.waiters, |position| position.saturating_sub(1));
        let behind_the_first = STEP * before.saturating_sub(1);
        let needed = match (self.is_free, before) {
            (false, 0) => self.left,
            (false, _) => self.left + GRACE + behind_the_first,
            (true, _) if self.has_notified => REACTION_TIME + (STEP * before).min(LONGEST_STEPS),
            (true, _) => self.left.min(GRACE) + behind_the_first.min(LONGEST_STEPS),
        };
        // Nobody notifies a waiter for which the row had no room.
        let longest = if self.position.is_some() { longest_sleep(self.waiters) } else { LONGEST_SLEEP };
        needed.min(longest.mul_f64(fraction))
    }

    /// The version in which the waiter may take the lock after its sleep.
    pub(crate) fn notified_version(&self) -> Option<i64> {
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
    /// How many processes wait for the lock, as its row says. A process that ended without leaving the row counts until
    /// another one has taken the lock from behind it.
    pub waiters: usize,
}

/// What the database has under the name of our table.
#[derive(Debug)]
pub(crate) enum Found {
    NoSchema,
    /// This role, by its quoted name, has no `USAGE` on the schema.
    NoUsage {
        role: String,
    },
    NoTable,
    Table(Box<FoundTable>),
}

/// What is known of the table that was found.
#[derive(Debug)]
pub(crate) struct FoundTable {
    /// The role of this session, quoted.
    pub(crate) role: String,
    /// As in `pg_class.relkind`.
    pub(crate) kind: String,
    pub(crate) is_partition: bool,
    pub(crate) access_method: String,
    /// As in `pg_class.relpersistence`.
    pub(crate) persistence: String,
    /// Each column with its type, and with `NOT NULL` where that applies.
    pub(crate) columns: Vec<String>,
    /// The columns that an insert has to name: `NOT NULL`, and without a default.
    pub(crate) required: Vec<String>,
    /// The collation of `lock_id`, unless it is `"C"`.
    pub(crate) collation: Option<String>,
    pub(crate) has_key: bool,
    /// Row-level security applies to the role.
    pub(crate) hides_rows: bool,
    /// The publications for which the server refuses every update, because the table has no replica identity.
    pub(crate) publications: Vec<String>,
    /// The privileges that the role doesn't have.
    pub(crate) missing_rights: Vec<String>,
}

/// The row that an acquire returns.
#[derive(Clone, Debug)]
pub(crate) struct AcquireRow {
    /// The version that the statement made, if it took the lock.
    pub(crate) taken: Option<i64>,
    /// What is left of the lease that was granted, or of the lease or the promise that is in the way.
    pub(crate) left: Duration,
    /// Processes wait for the lock that was taken.
    pub(crate) is_wanted: bool,
    /// The newest version, apart from the one that the statement made.
    pub(crate) version: i64,
    /// The owner of that version.
    pub(crate) owner_id: String,
    pub(crate) is_released: bool,
    /// The lock is released, or its lease is over.
    pub(crate) is_free: bool,
    /// The lock is free, and not promised to others.
    pub(crate) may_take: bool,
    pub(crate) has_notified: bool,
    /// The acquire had a [`RowWaiter`].
    pub(crate) waits: bool,
    pub(crate) position: Option<u32>,
    pub(crate) waiters: u32,
}

impl AcquireRow {
    /// What the row means for an acquire that was sent at `sent`.
    pub(crate) fn meaning(self, sent: Instant) -> Acquired {
        let AcquireRow { left, is_wanted, version, owner_id, is_free, has_notified, position, waiters, .. } = self;
        if let Some(version) = self.taken {
            let granted = Granted { version, sent, left, is_wanted };
            let taken_over_from = if self.is_released { None } else { Some(owner_id) };
            return Acquired::Taken { granted, taken_over_from };
        }
        // The row changed while the statement ran, or another transaction had it locked.
        if self.may_take || self.waits && position.is_none() && waiters < MAX_WAITERS {
            return Acquired::Missed;
        }
        Acquired::Busy(Busy { version, owner_id, is_free, left, has_notified, position, waiters })
    }
}

impl Fault {
    /// Whether this session can't be used any more, but the same statement may work on a new one.
    pub(crate) fn is_connection_fault(&self) -> bool {
        match self {
            Fault::Pooled | Fault::Panicked => true,
            Fault::Postgres(error) => is_connection_fault(error),
        }
    }

    /// Whether the statement may have taken effect in spite of the fault.
    pub(crate) fn is_outcome_unknown(&self) -> bool {
        !matches!(self, Fault::Pooled) && self.is_connection_fault()
    }
}

#[cfg(test)]
pub(crate) mod tests;
