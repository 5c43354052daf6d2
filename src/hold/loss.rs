//! The loss of a hold, as users see it: a signal to read and to wait for, and a callback.
//!
//! Uses the rest of this module, `sync` and `user_code`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::hold::Hold;
use crate::sync::{Instant, wait_until};
use crate::user_code::{self, Callback, log_at};

/// Says whether a hold is lost. A loop of work can read it, or sleep until the loss.
/// [`LockGuard::lost`](crate::LockGuard::lost) returns it.
///
/// It owns what it needs, can be cloned and sent to other threads, keeps no lock held, and does no I/O.
///
/// ```no_run
/// # use std::time::Duration;
/// # use storage_lock::StorageLock;
/// # fn work(lock: &StorageLock) -> storage_lock::Result<()> {
/// let guard = lock.lock("worker-1")?;
/// let lost = guard.lost();
/// // Once a minute, while the lock is held.
/// while !lost.wait_for(Duration::from_secs(60)) {
///     // …
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct LostSignal {
    hold: Arc<Hold>,
}

impl LostSignal {
    pub(crate) fn new(hold: Arc<Hold>) -> LostSignal {
        LostSignal { hold }
    }

    /// The lock.
    pub fn lock_id(&self) -> &str {
        &self.hold.claim.lock_id
    }

    /// The owner of the hold.
    pub fn owner_id(&self) -> &str {
        &self.hold.claim.owner_id
    }

    /// The version of the hold.
    pub fn version(&self) -> i64 {
        self.hold.version
    }

    /// Whether the hold is lost. True for ever from the hold's deadline on, or from when the database said that the
    /// hold is gone. A hold that was released in time is never lost.
    pub fn is_lost(&self) -> bool {
        self.hold.state().is_lost(Instant::now())
    }

    /// Waits until the hold is lost, for at most `timeout`, and says whether it is lost.
    ///
    /// Returns false immediately when the hold's last guard goes, because nobody relies on the hold any more. A
    /// `timeout` that is too long for the clock lasts for ever.
    pub fn wait_for(&self, timeout: Duration) -> bool {
        let end = Instant::now().checked_add(timeout);
        let mut state = self.hold.state();
        loop {
            let now = Instant::now();
            if state.is_lost(now) {
                return true;
            }
            if state.is_over() || end.is_some_and(|end| end <= now) {
                return false;
            }
            let deadline = state.lease.deadline();
            let wake = end.map_or(deadline, |end| end.min(deadline));
            state = wait_until(&self.hold.changed, state, wake);
        }
    }
}

impl fmt::Debug for LostSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LostSignal")
            .field("lock_id", &self.lock_id())
            .field("owner_id", &self.owner_id())
            .field("version", &self.version())
            .field("is_lost", &self.is_lost())
            .finish()
    }
}

/// The callback for the loss of a hold, if the user set one.
#[derive(Clone, Default)]
pub(crate) struct OnLost(Callback<dyn Fn(&LostSignal) + Send + Sync>);

impl OnLost {
    pub(crate) fn calling(callback: impl Fn(&LostSignal) + Send + Sync + 'static) -> OnLost {
        OnLost(Callback::to(Arc::new(callback)))
    }

    pub(crate) fn call(&self, hold: &Arc<Hold>) {
        let Some(callback) = self.0.get() else { return };
        let lost = LostSignal::new(Arc::clone(hold));
        if user_code::call(|| callback(&lost)).is_none() {
            log_at!(warn, "on_lost of lock {:?} panicked", lost.lock_id());
        }
    }
}

impl fmt::Debug for OnLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
