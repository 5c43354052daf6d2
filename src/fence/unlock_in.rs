//! `unlock_in`: the release of a lock as a part of the caller's transaction.
//!
//! Invariant: the library never guesses how such a transaction ended. While it is open, the hold isn't trusted, and its
//! lease isn't refreshed. Only a commit that the server acknowledged counts as a release by itself. After any other
//! end, the hold is trusted again only when the database says that it is there.
//!
//! Imports: as of this module, see [`super`].

use std::fmt;
use std::ops::{Deref, DerefMut};

use postgres::Transaction;

use crate::error::{Result, is_connection_fault};
use crate::guard::LockGuard;
use crate::hold::Unlocking;
use crate::sync::Instant;

/// The owner took the lock more than once, so that this guard may not be the last one.
const TAKEN_AGAIN: &str = "the lock was taken more than once, and is for its last guard to release";
/// Another transaction is open that releases the hold.
const RELEASED_ALREADY: &str = "another transaction releases the lock already";
/// Another transaction has ended, and may have released the hold.
const NOT_KNOWN_YET: &str = "it is not known yet whether an earlier transaction has released the lock";
/// The commit of this transaction may not be the last word.
const NESTED: &str = "it is within another one, or another one was rolled back within it, so that it can't release \
                      the lock: fence it, and unlock after the commit";
/// The transaction lacks its release before the commit, and the database says that the hold is there.
const ROLLED_BACK: &str = "its release was rolled back, to a savepoint or by a statement that ended the transaction";
/// The same, and the database says that the hold isn't there.
const COMMITTED: &str = "a statement ended it before its commit, and the lock is released";
/// The same, and the database says nothing.
const ENDED: &str = "its release was not found in it, and whether the lock is released is not known yet: a statement \
                     has ended the transaction, or prepared it";

/// A transaction that releases a lock when it is committed, and keeps it when it is rolled back or dropped. From
/// [`LockGuard::unlock_in`].
///
/// It is the transaction that was given to `unlock_in`, and more can be done in it.
#[must_use = "dropping it rolls the transaction back, and keeps the lock"]
pub struct UnlockTransaction<'a> {
    // Fields drop in this order: the rollback comes first.
    transaction: Transaction<'a>,
    pending: Pending<'a>,
}

/// A release that waits for the end of its transaction. Whatever that end is, the database is asked for the hold.
struct Pending<'a> {
    guard: &'a LockGuard,
    is_settled: bool,
}

impl LockGuard {
    /// Makes the release of the lock a part of your transaction.
    ///
    /// If the transaction is committed, the release and what it wrote become visible together. If it is rolled back,
    /// the lock is held as before.
    ///
    /// ```no_run
    /// # fn doc(
    /// #     guard: &storage_lock::LockGuard,
    /// #     client: &mut postgres::Client,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut transaction = client.transaction()?;
    /// transaction.execute("UPDATE jobs SET is_done = true", &[])?;
    /// guard.unlock_in(transaction)?.commit()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// `unlock_in` takes the transaction, so that the library learns how it ends. Until then [`is_held`](Self::is_held)
    /// is false, because the transaction may be committed at any time. It is fenced as by [`fence`](Self::fence). Keep
    /// it short from here on: the lease isn't refreshed until it ends. If it is still open at the hold's deadline, the
    /// hold is lost, although nobody can take the lock before the transaction ends.
    ///
    /// After the commit the guard has no more use, and dropping it does nothing. The transaction may end in another
    /// way: rolled back, dropped, with an error, or by a `COMMIT`, `ROLLBACK` or `PREPARE TRANSACTION` that was sent as
    /// text. Then the library asks the database for the hold, for 2 s at most, and trusts it again only if it is found.
    /// If there is no answer, `is_held` stays false, and the refreshes find out later. A transaction that is forgotten
    /// (`mem::forget`) counts as open.
    ///
    /// Give it the whole transaction, and the only guard. These are refused:
    /// - a transaction within another one, because its commit only releases a savepoint;
    /// - a transaction in which another one was rolled back before, because the driver leaves its savepoint open;
    /// - a lock that was taken more than once.
    ///
    /// In the first two cases, `fence` the transaction, and unlock after the commit.
    ///
    /// At `REPEATABLE READ` and `SERIALIZABLE` it fails with SQLSTATE 40001 if the lease was refreshed after the
    /// transaction began (or just then, where this is its first statement). At `SERIALIZABLE` it may also fail because
    /// of other transactions that release other locks. Repeat the transaction, or use `fence`, and unlock after the
    /// commit. Where others wait, `unlock_in` notifies them, which `PREPARE TRANSACTION` doesn't allow.
    ///
    /// # Errors
    /// As [`fence`](Self::fence). Also [`Error::Fence`](crate::Error::Fence) if another transaction releases the lock,
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
            Err(Unlocking::No) => return Err(self.fence_error(TAKEN_AGAIN)),
            Err(Unlocking::Pending) => return Err(self.fence_error(RELEASED_ALREADY)),
            Err(Unlocking::Unknown { .. }) => return Err(self.fence_error(NOT_KNOWN_YET)),
        }
        let pending = Pending { guard: self, is_settled: false };
        let result = self.query(&mut transaction, &self.storage.sql().unlock_in);
        let is_whole: Option<bool> = result.as_ref().ok().and_then(|rows| rows.first()?.try_get(0).ok()?);
        if is_whole == Some(true) {
            return Ok(UnlockTransaction { transaction, pending });
        }
        drop(transaction);
        Err(match (pending.settle(false), is_whole) {
            (None | Some(true), Some(_)) => self.fence_error(NESTED),
            (is_there, _) => self.missing_hold_error(is_there, result.err()),
        })
    }

    /// Marks the hold as released: the transaction that releases it has been committed.
    pub(crate) fn unlocked(&self) {
        self.hold.set_unlocking(Unlocking::Done);
        self.storage.queues().lose_hold(&self.hold);
        self.send_released(true);
    }

    /// Asks the database for the hold after the transaction has ended, as far as this process knows. Returns whether
    /// the hold is there; `None` if that isn't known.
    pub(crate) fn settle(&self, may_be_released: bool) -> Option<bool> {
        let since = Instant::now();
        self.hold.set_unlocking(Unlocking::Unknown { since, may_be_released });
        match self.find_hold() {
            Some(true) => self.hold.confirm_present(since),
            Some(false) => self.hold.mark_missing(),
            None => {}
        }
        // Read from the state, because the refresh thread may have been the one that found out.
        let (unlocking, is_gone) = {
            let state = self.hold.state();
            (state.unlocking, state.is_gone)
        };
        match unlocking {
            Unlocking::Done => {
                self.unlocked();
                Some(false)
            }
            // If nothing can have been released, a hold that is gone is a loss. Otherwise, after the deadline, it may
            // be a loss or a release.
            Unlocking::Unknown { may_be_released, .. } => (is_gone && !may_be_released).then_some(false),
            Unlocking::No | Unlocking::Pending => Some(true),
        }
    }
}

impl UnlockTransaction<'_> {
    /// Commits what the transaction did, and releases the lock with it. After that, others get the lock as soon as they
    /// learn that it is free.
    ///
    /// Before the commit, one more statement checks that the release is in the transaction. That is needed because the
    /// server answers the commit of a transaction in which a statement failed like any other, and rolls it back.
    ///
    /// # Errors
    /// [`Error::Database`](crate::Error::Database) if a statement of the transaction had failed, or the server refused
    /// to commit: then the transaction is rolled back. [`Error::Fence`](crate::Error::Fence) if the release is no
    /// longer in the transaction, because a savepoint was rolled back, or a statement had committed, rolled back or
    /// prepared the transaction. What is in it now is rolled back, and the error says what became of the lock. After
    /// each of these errors [`is_held`](LockGuard::is_held) is true again if the database finds the hold.
    ///
    /// If the connection broke in the commit, up to 2 s are used to find out what became of it: a commit that happened
    /// is `Ok`. That can't be found out if the database doesn't answer, or the hold's deadline has passed. Then the
    /// result is `Error::Database` too, and `is_held` is false: nobody knows whether the transaction was committed.
    pub fn commit(self) -> Result<()> {
        // Locals drop in the opposite order: the rollback comes first.
        let UnlockTransaction { mut pending, mut transaction } = self;
        let guard = pending.guard;
        let rows = guard.query(&mut transaction, &guard.storage.sql().is_unlocked_in);
        if rows.map_err(|source| guard.failed("commit", source))?.is_empty() {
            drop(transaction);
            return Err(guard.fence_error(match pending.settle(true) {
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
    /// It asks the database for the hold afterwards, for 2 s at most. If there is no answer,
    /// [`is_held`](LockGuard::is_held) is false until there is one.
    ///
    /// # Errors
    /// [`Error::Database`](crate::Error::Database) if the connection broke: then the server rolls back.
    /// [`Error::Fence`](crate::Error::Fence) if a statement had committed the transaction before: the lock is released.
    pub fn rollback(self) -> Result<()> {
        let UnlockTransaction { transaction, pending } = self;
        let guard = pending.guard;
        let result = transaction.rollback();
        let is_there = pending.settle(true);
        result.map_err(|source| guard.failed("roll back", source))?;
        if is_there == Some(false) { Err(guard.fence_error(COMMITTED)) } else { Ok(()) }
    }
}

impl Pending<'_> {
    /// Settles the release once: its drop then does nothing.
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
