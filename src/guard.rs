//! The guard of a hold: the release, by [`unlock`](LockGuard::unlock) or by drop, and whether the hold may be trusted.
//!
//! In a forked child, no method here touches a mutex: a thread that doesn't exist there may have locked it.
//!
//! Uses storage/ and the modules below it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::events::Event;
use crate::hold::loss::LostSignal;
use crate::hold::{Hold, Unlocking};
use crate::storage::PostgresStorage;
use crate::storage::clean_up::Unfinished;
use crate::sync::Instant;
use crate::user_code::log_at;

/// A held lock. Dropping the guard releases the lock. If the same owner acquired the lock more than once, the last
/// guard releases it.
///
/// `let _ = lock.lock("worker-1")?;` drops the guard immediately, and so releases the lock. Bind the guard to a name:
/// `let _guard`.
///
/// A guard that is never dropped (`mem::forget`) keeps the lock for as long as the process lives. If the process ends
/// without dropping the guard (`process::exit`, SIGKILL), the lock is free when the lease has run out.
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

    /// The version of this hold. It is the fencing token: a place that is written to under the lock should refuse a
    /// smaller one.
    ///
    /// It stays constant while the hold lasts, and is greater than the version of every earlier hold of this lock. As
    /// long as the database keeps what it has committed, no version is used twice.
    pub fn version(&self) -> i64 {
        self.hold.version
    }

    /// Whether this process may still trust the hold: true only before the deadline, and false for ever after it.
    ///
    /// It is also false while a transaction is open that was given to [`unlock_in`](Self::unlock_in), because that
    /// transaction may release the lock at any time. It reads the clock of this machine, and checks that this process
    /// acquired the lock. It does no I/O.
    ///
    /// The deadline lies before the end of the lease. On Linux, the clock of the deadline stands still while the
    /// machine is suspended. So a hold from before a suspend may be trusted for too long.
    pub fn is_held(&self) -> bool {
        !self.storage.is_forked() && self.hold.is_held()
    }

    /// How long the hold may be trusted if no further refresh succeeds. Zero if it is lost. Does no I/O.
    pub fn remaining(&self) -> Duration {
        if self.storage.is_forked() { Duration::ZERO } else { self.hold.remaining() }
    }

    /// A signal that shows when the hold is lost. This thread or another one can check it, or wait for it.
    pub fn lost(&self) -> LostSignal {
        LostSignal::new(Arc::clone(&self.hold))
    }

    /// Releases the lock, as drop does, and returns the result. If the lock was acquired more than once, an inner
    /// guard keeps it.
    ///
    /// Blocks for at most 2 s. If the database hasn't confirmed the release in that time, the release is repeated in
    /// the background until the lease has run out, for ten minutes at most.
    ///
    /// # Errors
    /// [`Error::LeaseLost`](crate::Error::LeaseLost) if the hold was over before: somebody else may have owned the
    /// lock in the meantime. [`Error::Connect`](crate::Error::Connect), [`Error::Timeout`](crate::Error::Timeout) or
    /// [`Error::Database`](crate::Error::Database) if the database could not be asked.
    pub fn unlock(mut self) -> Result<()> {
        let result = self.leave();
        if let Err(error) = &result {
            self.report_if_new(error);
        }
        result
    }

    fn leave(&mut self) -> Result<()> {
        self.has_left = true;
        // In a forked child, the lock belongs to the parent.
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
            // The commit of a transaction released the lock. Only the refresh thread may know that already.
            self.storage.queues().lose_hold(hold);
            self.send_released(true);
            return Ok(());
        }
        if !hold.is_held() {
            hold.lose();
            self.storage.queues().lose_hold(hold);
            if !is_gone {
                // A stuck refresh may still extend a lease that nobody wants any more.
                self.storage.clean_up(Unfinished::hold(hold.claim.clone(), hold.version, Instant::now()));
            }
            return Err(hold.lost());
        }
        let result = self.storage.release(hold);
        if result.as_ref().is_err_and(Error::is_lease_lost) {
            hold.lose();
        } else {
            self.send_released(result.is_ok());
        }
        result
    }

    pub(crate) fn send_released(&self, is_confirmed: bool) {
        let (lock_id, owner_id, version) = self.hold.names();
        // A hold that a transaction released may have been lost before. The end of a hold is reported once.
        let sends_event = self.hold.state().take_end_event();
        if !sends_event {
            return;
        }
        let held = self.hold.began.elapsed();
        self.storage.events().send(|| Event::Released { lock_id, owner_id, version, held, is_confirmed });
        if is_confirmed {
            log_at!(debug, "released lock {lock_id:?} (version {version})");
        }
    }

    /// Whether the error of this guard's end is for the guard to report: any error but a loss that the refresh thread
    /// reports, or that was reported before. Sends the event of a loss.
    fn report_if_new(&self, error: &Error) -> bool {
        if !error.is_lease_lost() {
            return true;
        }
        let sends_event = {
            let mut state = self.hold.state();
            // The refresh thread reports a loss that was found while there was a guard, and calls `on_lost`.
            state.guards == 0 && !state.is_gone && state.take_end_event()
        };
        if sends_event {
            self.hold.send_lost(self.storage.events());
        }
        sends_event
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        if self.has_left || self.storage.is_forked() {
            return;
        }
        if let Err(error) = self.leave()
            && self.report_if_new(&error)
        {
            log_at!(warn, "a guard was dropped: {}", error.chain());
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
