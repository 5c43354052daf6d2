//! The release of a lock as a part of the caller's transaction.

use std::fmt;
use std::ops::{Deref, DerefMut};

use postgres::Transaction;

use crate::error::{Result, is_connection_fault};
use crate::guard::LockGuard;
use crate::hold::Unlocking;
use crate::sync::Instant;

/// What is wrong with a second transaction that would release a hold.
const RELEASED_ALREADY: &str = "another transaction releases the lock already";

/// What is wrong with a transaction whose commit would not release the hold.
const NOT_RELEASED: &str = "its release was rolled back, to a savepoint or by a statement that ended the transaction";

/// A transaction that releases a lock when it is committed, and keeps it when it is rolled back or dropped. From
/// [`LockGuard::unlock_in`].
///
/// It is the transaction that was given to `unlock_in`, and more can be done in it.
#[must_use = "dropping it rolls the transaction back, and keeps the lock"]
pub struct UnlockTransaction<'a> {
    // Dropped in this order: rolled back first.
    transaction: Transaction<'a>,
    pending: Pending<'a>,
}

/// A release that waits for a commit. Dropped before that, the lock is held as before.
struct Pending<'a> {
    guard: &'a LockGuard,
    /// It is not for another guard to release the lock.
    releases: bool,
    /// It was released in no savepoint: after its commit nothing can be rolled back any more.
    is_whole: bool,
}

impl LockGuard {
    /// Makes the release of the lock a part of your transaction: when it is committed, what it wrote and the release become visible
    /// together; if it is rolled back, the lock is held as before.
    ///
    /// ```no_run
    /// # fn doc(guard: &storage_lock::LockGuard, client: &mut postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut transaction = client.transaction()?;
    /// transaction.execute("UPDATE jobs SET is_done = true", &[])?;
    /// guard.unlock_in(transaction)?.commit()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// It takes the transaction, so that the library hears how it ends: until then [`is_held`](Self::is_held) is false, because it may be committed at
    /// any time. It is fenced as by [`fence`](Self::fence). Keep it short from here on: the lease isn't refreshed until it ends, and when
    /// it is open at the hold's deadline, the hold is lost, although nobody can take the lock before it ends.
    ///
    /// After the commit the guard is of no more use; dropping it does nothing. An inner guard of a lock that was taken more than once
    /// releases nothing, and only fences.
    ///
    /// Give it the whole transaction. The commit of one within another one only releases a savepoint: it waits for 2 s for the end of the
    /// whole, and leaves it to the next refresh to find out whether the lock was released.
    ///
    /// At `REPEATABLE READ` and `SERIALIZABLE` it fails with SQLSTATE 40001 if the lease was refreshed after the transaction began, and at
    /// `SERIALIZABLE` perhaps for other transactions that release other locks: repeat it, or use `fence`, and unlock after the commit. Where
    /// others wait, it notifies them, which `PREPARE TRANSACTION` doesn't allow.
    ///
    /// # Errors
    /// As [`fence`](Self::fence); and [`Error::Fence`](crate::Error::Fence) if another transaction releases the lock already. The transaction is
    /// rolled back, and the lock is held as before.
    pub fn unlock_in<'a>(&'a self, mut transaction: Transaction<'a>) -> Result<UnlockTransaction<'a>> {
        if !self.hold.is_before_deadline() {
            return Err(self.hold.lost());
        }
        let releases = match self.hold.begin_unlocking() {
            Ok(releases) => releases,
            Err(Unlocking::Done) => return Err(self.hold.lost()),
            Err(_) => return Err(self.unfit(RELEASED_ALREADY)),
        };
        let mut pending = Pending { guard: self, releases, is_whole: false };
        if !releases {
            self.fence(&mut transaction)?;
            return Ok(UnlockTransaction { transaction, pending });
        }
        let result = self.query(&mut transaction, &self.storage.sql().unlock_in);
        if let Some(is_whole) = result.as_ref().ok().and_then(|rows| rows.first()?.try_get(0).ok()?) {
            pending.is_whole = is_whole;
            return Ok(UnlockTransaction { transaction, pending });
        }
        drop((transaction, pending));
        Err(self.why_not(result.err()))
    }

    /// The transaction that releases the hold has been committed.
    pub(crate) fn unlocked(&self) {
        self.hold.set_unlocking(Unlocking::Done);
        self.storage.lines().lose_hold(&self.hold);
        self.tell_release(true);
    }

    /// Whether the hold was released is not known: asks, and says whether it was.
    pub(crate) fn settle(&self) -> bool {
        self.hold.set_unlocking(Unlocking::Unknown(Instant::now()));
        let is_there = self.look_for();
        match is_there {
            Some(false) => self.unlocked(),
            Some(true) => self.hold.set_unlocking(Unlocking::No),
            // The next refresh will tell, or nothing.
            None => {}
        }
        is_there == Some(false)
    }
}

impl UnlockTransaction<'_> {
    /// Commits what the transaction did, and releases the lock with it. After that, others have the lock as soon as they hear of it.
    ///
    /// It asks the transaction for the release first, one statement more: the server answers the commit of a transaction in which a statement has
    /// failed as any other, and rolls it back.
    ///
    /// # Errors
    /// [`Error::Database`](crate::Error::Database) if a statement of the transaction had failed, or the server refused to commit;
    /// [`Error::Fence`](crate::Error::Fence) if the release was rolled back with a part of it: then nothing is committed, and the lock is held as
    /// before. If the connection broke in the commit, up to 2 s are used to find out what became of it: a commit that happened is `Ok`. If that
    /// can't be found out, because the database doesn't answer, or the hold's deadline has passed, it is `Error::Database` too, and
    /// [`is_held`](LockGuard::is_held) is false: whether it was committed isn't known.
    pub fn commit(self) -> Result<()> {
        // Dropped in the opposite order: rolled back first.
        let UnlockTransaction { mut pending, mut transaction } = self;
        let guard = pending.guard;
        if pending.releases {
            let rows = guard.query(&mut transaction, &guard.storage.sql().is_unlocked_in);
            if rows.map_err(|source| guard.failed("commit", source))?.is_empty() {
                return Err(guard.unfit(NOT_RELEASED));
            }
        } else {
            guard.fence_past_deadline(&mut transaction)?;
        }
        let result = transaction.commit();
        // If the server refused, the lock is held as before.
        let may_be_committed = result.as_ref().err().is_none_or(is_connection_fault);
        if may_be_committed && std::mem::take(&mut pending.releases) {
            if result.is_ok() && pending.is_whole {
                guard.unlocked();
            } else if guard.settle() {
                return Ok(());
            }
        }
        result.map_err(|source| guard.failed("commit", source))
    }

    /// Rolls the transaction back, and keeps the lock.
    ///
    /// # Errors
    /// [`Error::Database`](crate::Error::Database) if the connection broke: then the server does so.
    pub fn rollback(self) -> Result<()> {
        let UnlockTransaction { transaction, pending } = self;
        transaction.rollback().map_err(|source| pending.guard.failed("roll back", source))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.releases {
            self.guard.hold.set_unlocking(Unlocking::No);
        }
    }
}

impl<'a> Deref for UnlockTransaction<'a> {
    type Target = Transaction<'a>;

    fn deref(&self) -> &Transaction<'a> {
        &self.transaction
    }
}

impl<'a> DerefMut for UnlockTransaction<'a> {
    fn deref_mut(&mut self) -> &mut Transaction<'a> {
        &mut self.transaction
    }
}

impl fmt::Debug for UnlockTransaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnlockTransaction").field("guard", self.pending.guard).finish_non_exhaustive()
    }
}
