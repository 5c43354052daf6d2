//! The guard of a hold.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::events::Event;
use crate::follow_up::Unfinished;
use crate::hold::{Hold, Unlocking};
use crate::loss::LostSignal;
use crate::storage::PostgresStorage;
use crate::sync::Instant;
use crate::user_code::note;

/// A held lock. Dropping it releases the lock; the last guard of a hold does, where the same owner took it more than once.
///
/// `let _ = lock.lock("worker-1")?;` drops the guard, and so releases the lock, at once. Bind it to a name: `let _guard`.
///
/// A guard that is never dropped (`mem::forget`) keeps the lock for as long as the process lives. When the process
/// ends without dropping it (`process::exit`, SIGKILL), the lock is free when the lease has run out.
#[must_use = "dropping the guard releases the lock at once: bind it, as in `let _guard = lock.lock(..)?`"]
pub struct LockGuard {
    pub(crate) storage: PostgresStorage,
    pub(crate) hold: Arc<Hold>,
    has_left: bool,
}

impl LockGuard {
    pub(crate) fn new(storage: PostgresStorage, hold: Arc<Hold>) -> LockGuard {
        LockGuard { storage, hold, has_left: false }
    }

    /// The lock.
    pub fn lock_id(&self) -> &str {
        &self.hold.claim.lock_id
    }

    /// The owner, as given to `lock`.
    pub fn owner_id(&self) -> &str {
        &self.hold.claim.owner_id
    }

    /// The version of this hold: constant while it lasts, greater than that of every earlier hold of this lock, and never used
    /// again, as long as the database keeps what it has committed. It is the fencing token: whatever is written under the lock
    /// should refuse a smaller one.
    pub fn version(&self) -> i64 {
        self.hold.version
    }

    /// Whether this process may still trust the hold: true only before its deadline, false for ever after. Reads the
    /// clock of this machine, and asks whether this is the process that took the lock; no I/O. Also false while a
    /// transaction that [`unlock_in`](Self::unlock_in) was given is open: it may release the lock at any time.
    ///
    /// The deadline lies before the end of the lease. On Linux its clock stands still while the machine is suspended, so
    /// a hold from before a suspend may be trusted for too long.
    pub fn is_held(&self) -> bool {
        !self.storage.is_forked() && self.hold.is_held()
    }

    /// How long the hold may be trusted if no further refresh succeeds; zero if it is lost. No I/O.
    pub fn remaining(&self) -> Duration {
        if self.storage.is_forked() { Duration::ZERO } else { self.hold.remaining() }
    }

    /// A signal that tells when the hold is lost, to look at or to wait for, on this thread or another one.
    pub fn lost(&self) -> LostSignal {
        LostSignal::new(Arc::clone(&self.hold))
    }

    /// Releases the lock, as drop does, and says what came of it. An inner guard of a lock that was taken more than once
    /// keeps the lock.
    ///
    /// Blocks for at most 2 s. If the release could not be confirmed within them, it is repeated in the background until
    /// the lease has run out, for ten minutes at most.
    ///
    /// # Errors
    /// [`Error::LeaseLost`](crate::Error::LeaseLost) if the hold was over before: somebody else may have owned the lock
    /// meanwhile. [`Error::Connect`](crate::Error::Connect), [`Error::Timeout`](crate::Error::Timeout) or
    /// [`Error::Database`](crate::Error::Database) if the database could not be asked.
    pub fn unlock(mut self) -> Result<()> {
        let result = self.leave();
        if let Err(error) = &result {
            self.tells(error);
        }
        result
    }

    fn leave(&mut self) -> Result<()> {
        self.has_left = true;
        // The lock is the other process's.
        self.storage.check_process()?;
        let hold = &self.hold;
        if !hold.leave() {
            return if hold.is_held() { Ok(()) } else { Err(hold.lost()) };
        }
        let (is_done, is_gone) = {
            let state = hold.state();
            (state.unlocking == Unlocking::Done, state.is_gone)
        };
        if is_done {
            // By the commit of a transaction, of which the refresh thread may have heard, and nobody else.
            self.storage.lines().lose_hold(hold);
            self.tell_release(true);
            return Ok(());
        }
        if !hold.is_held() {
            hold.lose();
            self.storage.lines().lose_hold(hold);
            if !is_gone {
                // A refresh that is stuck may yet renew a lease that nobody wants any more.
                self.storage.follow_up(Unfinished::hold(hold.claim.clone(), hold.version, Instant::now()));
            }
            return Err(hold.lost());
        }
        let result = self.storage.release(hold);
        if result.as_ref().is_err_and(Error::is_lease_lost) {
            hold.lose();
        } else {
            self.tell_release(result.is_ok());
        }
        result
    }

    pub(crate) fn tell_release(&self, is_confirmed: bool) {
        let (lock_id, owner_id, version) = self.hold.names();
        // One that a transaction released may have been lost before, and is told once.
        let is_mine_to_tell = self.hold.state().tell_end();
        if !is_mine_to_tell {
            return;
        }
        let held = self.hold.began.elapsed();
        self.storage.events().tell(|| Event::Released { lock_id, owner_id, version, held, is_confirmed });
        if is_confirmed {
            note!(debug, "released lock {lock_id:?} (version {version})");
        }
    }

    /// Whether a loss that ended this guard is for it to tell, and not told yet.
    fn tells(&self, error: &Error) -> bool {
        if !error.is_lease_lost() {
            return true;
        }
        let is_mine_to_tell = {
            let mut state = self.hold.state();
            // What was found while there was a guard is told by the refresh thread, which calls who wants to hear of it.
            state.guards == 0 && !state.is_gone && state.tell_end()
        };
        if is_mine_to_tell {
            self.hold.tell_loss(self.storage.events());
        }
        is_mine_to_tell
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        if self.has_left || self.storage.is_forked() {
            return;
        }
        if let Err(error) = self.leave()
            && self.tells(&error)
        {
            note!(warn, "a guard was dropped: {}", error.chain());
        }
    }
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("lock_id", &self.lock_id())
            .field("owner_id", &self.owner_id())
            .field("version", &self.version())
            .field("is_held", &self.is_held())
            .finish_non_exhaustive()
    }
}
