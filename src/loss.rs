//! How the loss of a hold is told: a signal to look at and to wait for, and a callback.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::hold::Hold;
use crate::sync::{Instant, wait_until};
use crate::user_code::{self, Callback, note};
use crate::wait::Patience;

/// Tells whether a hold is lost: to look at in a loop of work, or to sleep on. From [`LockGuard::lost`](crate::LockGuard::lost).
///
/// It owns what it needs, can be cloned and sent to other threads, keeps no lock, and does no I/O.
///
/// ```no_run
/// # use std::time::Duration;
/// # use storage_lock::StorageLock;
/// # fn work(lock: &StorageLock) -> storage_lock::Result<()> {
/// let guard = lock.lock("worker-1")?;
/// let lost = guard.lost();
/// // Once a minute, for as long as the lock is ours.
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

    /// Whether the hold is lost: true from its deadline on, or from when the database said so, for ever. A hold that was released
    /// in time is never lost.
    pub fn is_lost(&self) -> bool {
        self.hold.state().is_lost(Instant::now())
    }

    /// Waits until the hold is lost, for at most `timeout`, and says whether it is. Comes back at once, with false, when its last guard goes:
    /// nobody counts on it any more. One that is too long for the clock is for ever.
    pub fn wait_for(&self, timeout: Duration) -> bool {
        let patience = Patience::lasting(timeout);
        let mut state = self.hold.state();
        loop {
            let now = Instant::now();
            if state.is_lost(now) {
                return true;
            }
            if state.is_over() || patience.is_over(now) {
                return false;
            }
            let wake = patience.end(now).min(state.term.deadline());
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

/// Whom to call when a hold is lost, if anybody.
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
            note!(warn, "on_lost of lock {:?} panicked", lost.lock_id());
        }
    }
}

impl fmt::Debug for OnLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
