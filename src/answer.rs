//! What is asked of the database, and what its answers mean. Pure: no I/O, and no clock.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::error::is_connection_fault;
use crate::sync::Instant;

/// Why an operation has no result.
#[derive(Debug)]
pub(crate) enum Fault {
    /// A pooler was recognised; nothing was done. The same on a new session will work.
    Pooled,
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
    /// Made before the first statement, so that a repetition after a lost answer recognises its own row.
    pub(crate) lease_id: Uuid,
    pub(crate) lease: Duration,
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
    /// An earlier copy of the statement took it, whose answer was lost. That was another session, which may have ended before
    /// a synchronous standby had its commit (terminated, or with the server, which has then restarted), and reading the row waits
    /// for no standby: only what this session writes and commits does. To be trusted it has to be refreshed.
    pub(crate) is_recognised: bool,
}

/// What the database said to an acquire.
#[derive(Debug)]
pub(crate) enum Acquired {
    /// Ours. The owner before is named if its lease had run out without a release.
    Taken { granted: Granted, taken_over_from: Option<String> },
    /// Another's, for `left` to go unless it is refreshed or released; or free, and promised to another process for `left`. Of a
    /// waiter, whether it stands in line now: it doesn't where the line is full.
    Busy { version: i64, owner_id: String, left: Duration, is_promised: bool, is_queued: bool },
    /// Somebody's transaction keeps the row locked.
    Locked,
    /// Free, but it changed hands, was locked, or couldn't be serialised while the statement ran.
    Missed,
    /// No such lock id has ever been held.
    Absent,
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
    /// How many processes wait for the lock and listen for its release. One that ended without leaving the line counts until the
    /// lock was released to it.
    pub waiters: usize,
}

/// What is in the place of our table.
#[derive(Debug)]
pub(crate) enum Found {
    NoSchema,
    NoTable,
    Table { kind: String, persistence: String, columns: Vec<String>, has_key: bool },
}

/// What the row of an acquire says.
#[derive(Clone, Debug)]
pub(crate) struct AcquireRow {
    /// The version that the statement made, if it took the lock.
    pub(crate) taken: Option<i64>,
    /// The newest version before.
    pub(crate) newest: i64,
    /// Whose that was.
    pub(crate) owner_id: String,
    /// It has the lease of this very claim.
    pub(crate) is_mine: bool,
    pub(crate) is_released: bool,
    /// What is left of the lease that was taken, or of the one that is in the way, or of a promise.
    pub(crate) left: Duration,
    /// Processes wait for the lock that was taken.
    pub(crate) is_wanted: bool,
    /// Of a waiter for whom there is room in the line, whether it stands there now.
    pub(crate) is_queued: Option<bool>,
}

impl AcquireRow {
    /// What this means for who asked at `sent`.
    pub(crate) fn meaning(self, sent: Instant) -> Acquired {
        let AcquireRow { taken, newest, owner_id, is_mine, is_released, left, is_wanted, is_queued } = self;
        match taken {
            _ if left.is_zero() => Acquired::Missed,
            Some(version) => Acquired::Taken {
                granted: Granted { version, sent, left, is_wanted, is_recognised: false },
                taken_over_from: if is_released { None } else { Some(owner_id) },
            },
            // The answer to an earlier copy of this statement was lost: the row is our own.
            None if is_mine && !is_released => {
                let granted = Granted { version: newest, sent, left, is_wanted, is_recognised: true };
                Acquired::Taken { granted, taken_over_from: None }
            }
            // It became free while the statement ran.
            None if is_queued == Some(false) || (is_released && is_queued.is_none()) => Acquired::Missed,
            None => Acquired::Busy {
                version: newest,
                owner_id,
                left,
                is_promised: is_released,
                is_queued: is_queued == Some(true),
            },
        }
    }
}

impl Fault {
    /// Whether the session can't be used any more, while the same on a fresh one may work.
    pub(crate) fn is_connection_fault(&self) -> bool {
        match self {
            Fault::Pooled => true,
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
