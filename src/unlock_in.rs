//! The release of a lock as a part of the caller's transaction.

use std::fmt;
use std::ops::{Deref, DerefMut};

use postgres::Transaction;

use crate::error::{Error, Result, is_connection_fault};
use crate::guard::LockGuard;
use crate::hold::Unlocking;
use crate::sync::Instant;

/// What is wrong with a second transaction that would release a hold.
const RELEASED_ALREADY: &str = "another transaction releases the lock already";

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
    /// At `REPEATABLE READ` and `SERIALIZABLE` it fails with SQLSTATE 40001 if the lease was refreshed after the transaction began, and at
    /// `SERIALIZABLE` perhaps for other transactions that release other locks: repeat it, or use `fence`, and unlock after the commit. Where
    /// others wait, it notifies them, which `PREPARE TRANSACTION` doesn't allow.
    ///
    /// # Errors
    /// As [`fence`](Self::fence); and [`Error::Fence`] if another transaction releases the lock already. The transaction is rolled back, and the
    /// lock is held as before.
    pub fn unlock_in<'a>(&'a self, mut transaction: Transaction<'a>) -> Result<UnlockTransaction<'a>> {
        if !self.hold.is_before_deadline() {
            return Err(self.hold.lost());
        }
        let releases = match self.hold.begin_unlocking() {
            Ok(releases) => releases,
            Err(Unlocking::Done) => return Err(self.hold.lost()),
            Err(_) => return Err(Error::Fence { lock_id: self.lock_id().to_owned(), problem: RELEASED_ALREADY }),
        };
        let pending = Pending { guard: self, releases };
        if !releases {
            self.fence(&mut transaction)?;
            return Ok(UnlockTransaction { transaction, pending });
        }
        let result = self.query(&mut transaction, &self.storage.sql().unlock_in);
        if result.as_ref().is_ok_and(|rows| rows.first().is_some_and(|row| row.try_get(0).unwrap_or(false))) {
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

    /// The answer to its commit was lost: asks what became of it.
    pub(crate) fn settle(&self, source: postgres::Error) -> Result<()> {
        let asked = Unlocking::Unknown(Instant::now());
        self.hold.set_unlocking(asked);
        match self.storage.look_for(&self.hold) {
            Some(false) => {
                self.unlocked();
                return Ok(());
            }
            Some(true) => self.hold.set_unlocking(Unlocking::No),
            // The next refresh will tell.
            None => {}
        }
        Err(self.failed("commit", source))
    }
}

impl UnlockTransaction<'_> {
    /// Commits what the transaction did, and releases the lock with it. After that, others have the lock as soon as they hear of it.
    ///
    /// # Errors
    /// [`Error::Database`] if the server refused to commit: then the lock is held as before. If the connection broke, up to 2 s are used to find out
    /// what became of it: a commit that happened is `Ok`; if that can't be found out, the hold isn't trusted until it is.
    pub fn commit(self) -> Result<()> {
        let UnlockTransaction { transaction, mut pending } = self;
        let result = transaction.commit();
        // If the server refused, the lock is held as before.
        let is_over = result.as_ref().err().is_none_or(is_connection_fault);
        let releases = is_over && std::mem::replace(&mut pending.releases, false);
        match result {
            Ok(()) if releases => pending.guard.unlocked(),
            Ok(()) => {}
            Err(source) if releases => return pending.guard.settle(source),
            Err(source) => return Err(pending.guard.failed("commit", source)),
        }
        Ok(())
    }

    /// Rolls the transaction back, and keeps the lock.
    ///
    /// # Errors
    /// [`Error::Database`] if the connection broke: then the server does so.
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
