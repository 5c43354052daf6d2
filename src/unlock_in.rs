//! The release of a lock as a part of the caller's transaction.

use std::fmt;
use std::ops::{Deref, DerefMut};

use postgres::Transaction;

use crate::error::{Result, is_connection_fault};
use crate::guard::LockGuard;
use crate::hold::Unlocking;
use crate::sync::Instant;

/// What is wrong with a transaction that would release a hold whose owner has taken it once more.
const TAKEN_AGAIN: &str = "the lock was taken more than once, and is for its last guard to release";
/// With one that would release a hold beside another one.
const RELEASED_ALREADY: &str = "another transaction releases the lock already";
/// The same, after the other one.
const NOT_KNOWN_YET: &str = "it is not known yet whether an earlier transaction has released the lock";
/// With one whose commit may not be the last word.
const NESTED: &str = "it is within another one, or another one was rolled back within it, so that it can't release \
                      the lock: fence it, and unlock after the commit";
/// With one that doesn't release the hold any more: as the database says, the hold is there; it isn't; or nothing.
const ROLLED_BACK: &str = "its release was rolled back, to a savepoint or by a statement that ended the transaction";
const COMMITTED: &str = "a statement ended it before its commit, and the lock is released";
const ENDED: &str = "its release was not found in it, and whether the lock is released is not known yet: a statement \
                     has ended the transaction, or prepared it";

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

/// A release that waits for the end of its transaction. However that comes, the database is asked what became of the
/// hold.
struct Pending<'a> {
    guard: &'a LockGuard,
    is_settled: bool,
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
    /// After the commit the guard is of no more use; dropping it does nothing. However else the transaction ends,
    /// rolled back, dropped, with an error, or by a `COMMIT`, `ROLLBACK` or `PREPARE TRANSACTION` that was sent as
    /// text, the library asks the database for the hold, for 2 s at most, and trusts it again only if it is found. If
    /// there is no answer, `is_held` stays false, and the refreshes find out later. A transaction that is forgotten
    /// (`mem::forget`) is an open one.
    ///
    /// Give it the whole transaction, and the only guard. A transaction within another one is refused, because its
    /// commit only releases a savepoint; so is one in which another one was rolled back before, because the driver
    /// leaves its savepoint open. There, `fence` the transaction, and unlock after the commit. A lock that was taken
    /// more than once is refused too.
    ///
    /// At `REPEATABLE READ` and `SERIALIZABLE` it fails with SQLSTATE 40001 if the lease was refreshed after the
    /// transaction began (or just then, where this is its first statement), and at `SERIALIZABLE` perhaps for other
    /// transactions that release other locks: repeat it, or use `fence`, and unlock after the commit. Where others
    /// wait, it notifies them, which `PREPARE TRANSACTION` doesn't allow.
    ///
    /// # Errors
    /// As [`fence`](Self::fence). [`Error::Fence`](crate::Error::Fence) also if another transaction releases the lock,
    /// or may have released it, if the transaction is within another one, or if the lock was taken more than once. The
    /// transaction is rolled back (of one within another one, this part). The lock is held as before, or lost as the
    /// error says.
    pub fn unlock_in<'a>(&'a self, mut transaction: Transaction<'a>) -> Result<UnlockTransaction<'a>> {
        self.storage.check_process()?;
        if !self.hold.is_before_deadline() {
            return Err(self.hold.lost());
        }
        match self.hold.begin_unlocking() {
            Ok(()) => {}
            Err(Unlocking::Done) => return Err(self.hold.lost()),
            Err(Unlocking::No) => return Err(self.unfit(TAKEN_AGAIN)),
            Err(Unlocking::Pending) => return Err(self.unfit(RELEASED_ALREADY)),
            Err(Unlocking::Unknown { .. }) => return Err(self.unfit(NOT_KNOWN_YET)),
        }
        let pending = Pending { guard: self, is_settled: false };
        let result = self.query(&mut transaction, &self.storage.sql().unlock_in);
        let is_whole: Option<bool> = result.as_ref().ok().and_then(|rows| rows.first()?.try_get(0).ok()?);
        if is_whole == Some(true) {
            return Ok(UnlockTransaction { transaction, pending });
        }
        drop(transaction);
        Err(match (pending.settle(false), is_whole) {
            (None | Some(true), Some(_)) => self.unfit(NESTED),
            (is_there, _) => self.why_not_found(is_there, result.err()),
        })
    }

    /// The transaction that releases the hold has been committed.
    pub(crate) fn unlocked(&self) {
        self.hold.set_unlocking(Unlocking::Done);
        self.storage.lines().lose_hold(&self.hold);
        self.tell_release(true);
    }

    /// The transaction has ended, as far as is known here: asks what became of the hold, and says whether it is there;
    /// none if that isn't known.
    pub(crate) fn settle(&self, may_be_released: bool) -> Option<bool> {
        let since = Instant::now();
        self.hold.set_unlocking(Unlocking::Unknown { since, may_be_released });
        match self.look_for() {
            Some(true) => self.hold.is_there(since),
            Some(false) => self.hold.is_not_there(),
            None => {}
        }
        // Also if the refresh thread was the one that found out.
        let (unlocking, is_gone) = {
            let state = self.hold.state();
            (state.unlocking, state.is_gone)
        };
        match unlocking {
            Unlocking::Done => {
                self.unlocked();
                Some(false)
            }
            // A loss, where nothing can have been released; else, after the deadline, one or the other.
            Unlocking::Unknown { may_be_released, .. } => (is_gone && !may_be_released).then_some(false),
            Unlocking::No | Unlocking::Pending => Some(true),
        }
    }
}

impl UnlockTransaction<'_> {
    /// Commits what the transaction did, and releases the lock with it. After that, others have the lock as soon as they hear of it.
    ///
    /// It asks the transaction for the release first, one statement more: the server answers the commit of a transaction in which a statement has
    /// failed as any other, and rolls it back.
    ///
    /// # Errors
    /// [`Error::Database`](crate::Error::Database) if a statement of the transaction had failed, or the server refused
    /// to commit: then it is rolled back. [`Error::Fence`](crate::Error::Fence) if the release is not in the
    /// transaction any more, because a savepoint was rolled back, or a statement had committed, rolled back or prepared
    /// the transaction. What is in it now is rolled back, and the error says what became of the lock. After each of
    /// these errors [`is_held`](LockGuard::is_held) is true again if the database finds the hold.
    ///
    /// If the connection broke in the commit, up to 2 s are used to find out what became of it: a commit that happened
    /// is `Ok`. If that can't be found out, because the database doesn't answer, or the hold's deadline has passed, it
    /// is `Error::Database` too, and `is_held` is false: whether it was committed isn't known.
    pub fn commit(self) -> Result<()> {
        // Dropped in the opposite order: rolled back first.
        let UnlockTransaction { mut pending, mut transaction } = self;
        let guard = pending.guard;
        let rows = guard.query(&mut transaction, &guard.storage.sql().is_unlocked_in);
        if rows.map_err(|source| guard.failed("commit", source))?.is_empty() {
            drop(transaction);
            return Err(guard.unfit(match pending.settle(true) {
                Some(true) => ROLLED_BACK,
                Some(false) => COMMITTED,
                None => ENDED,
            }));
        }
        match transaction.commit() {
            Ok(()) => {
                pending.is_settled = true;
                guard.unlocked();
                Ok(())
            }
            Err(source) if pending.settle(true) == Some(false) && is_connection_fault(&source) => Ok(()),
            Err(source) => Err(guard.failed("commit", source)),
        }
    }

    /// Rolls the transaction back, and keeps the lock.
    ///
    /// It asks the database for the hold afterwards, for 2 s at most; if there is no answer,
    /// [`is_held`](LockGuard::is_held) is false until there is.
    ///
    /// # Errors
    /// [`Error::Database`](crate::Error::Database) if the connection broke: then the server does so.
    /// [`Error::Fence`](crate::Error::Fence) if a statement had committed the transaction before: the lock is released.
    pub fn rollback(self) -> Result<()> {
        let UnlockTransaction { transaction, pending } = self;
        let guard = pending.guard;
        let result = transaction.rollback();
        let is_there = pending.settle(true);
        result.map_err(|source| guard.failed("roll back", source))?;
        if is_there == Some(false) { Err(guard.unfit(COMMITTED)) } else { Ok(()) }
    }
}

impl Pending<'_> {
    /// The transaction has ended.
    fn settle(mut self, may_be_released: bool) -> Option<bool> {
        self.is_settled = true;
        self.guard.settle(may_be_released)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.is_settled {
            self.guard.settle(true);
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
