//! The settings of one lock. Imports: as of this module, see [`super`].

use std::time::Duration;

use super::check_id;
use crate::error::{Result, invalid};
use crate::hold::lease::retry_time;
use crate::hold::loss::{LostSignal, OnLost};

pub(super) const MIN_LEASE: Duration = Duration::from_secs(1);
pub(super) const MAX_LEASE: Duration = Duration::from_secs(365 * 24 * 60 * 60);
pub(super) const MIN_REFRESH_INTERVAL: Duration = Duration::from_millis(10);

/// One lock's settings.
///
/// Nothing is checked before [`StorageLock::with_options`](crate::StorageLock::with_options).
#[derive(Clone, Debug)]
pub struct LockOptions {
    pub(crate) lock_id: String,
    pub(crate) lease_expire_after: Duration,
    pub(super) lease_refresh_interval: Option<Duration>,
    pub(crate) version_miss_retry_times: u32,
    pub(crate) on_lost: OnLost,
}

impl LockOptions {
    /// The default settings, for the lock of this name. A lock id is 1 to 255 bytes of text without NUL.
    pub fn new(lock_id: impl Into<String>) -> Self {
        LockOptions {
            lock_id: lock_id.into(),
            lease_expire_after: Duration::from_secs(30),
            lease_refresh_interval: None,
            version_miss_retry_times: 3,
            on_lost: OnLost::default(),
        }
    }

    /// How long a hold lasts unless it is refreshed. If the holder dies, others wait for this long at most. Default
    /// 30 s, from 1 s to 365 days.
    #[must_use]
    pub fn lease_expire_after(mut self, lease_expire_after: Duration) -> Self {
        self.lease_expire_after = lease_expire_after;
        self
    }

    /// How often the lease is refreshed while the lock is held. Default 5 s, or a third of the lease if that is less.
    /// At least 10 ms. It must leave at least a third of the lease, and at least 300 ms, for repeating a refresh that
    /// failed.
    #[must_use]
    pub fn lease_refresh_interval(mut self, lease_refresh_interval: Duration) -> Self {
        self.lease_refresh_interval = Some(lease_refresh_interval);
        self
    }

    /// How often an acquire is repeated immediately, if the lock changed hands or the database asked for a repetition
    /// (SQLSTATE 40001, 40P01) while it ran. After that the lock counts as busy. Default 3.
    #[must_use]
    pub fn version_miss_retry_times(mut self, version_miss_retry_times: u32) -> Self {
        self.version_miss_retry_times = version_miss_retry_times;
        self
    }

    /// The callback for a lost hold of this lock. Default: nothing.
    ///
    /// The library calls it once, on a thread of its own: as soon as the database says that the hold is lost, or else
    /// just before the hold's deadline. So it is called before anybody else can own the lock, even while the server is
    /// frozen or the network swallows packets. From then on [`is_held`](crate::LockGuard::is_held) is false.
    ///
    /// The call comes late while the process is stopped, or while [`on_event`](crate::PostgresStorageOptions::on_event)
    /// or a logger blocks the thread. The library logs the loss, and sends its event, after the callback has returned.
    /// A callback that ends the process must log by itself.
    ///
    /// The callback isn't called if all guards of the hold had gone before the loss was found: then `unlock` returned
    /// it, or drop logged it. An inner guard of a lock that was taken more than once shares the hold, and the callback
    /// that the first guard set. If the callback panics, the library logs a warning, and nothing else happens.
    #[must_use]
    pub fn on_lost(mut self, on_lost: impl Fn(&LostSignal) + Send + Sync + 'static) -> Self {
        self.on_lost = OnLost::calling(on_lost);
        self
    }

    pub(crate) fn refresh_interval(&self) -> Duration {
        self.lease_refresh_interval.unwrap_or_else(|| Duration::from_secs(5).min(self.lease_expire_after / 3))
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_id("lock_id", &self.lock_id)?;
        let lease = self.lease_expire_after;
        if !(MIN_LEASE..=MAX_LEASE).contains(&lease) {
            return Err(invalid("lease_expire_after", format!("{lease:?}"), "1 s to 365 days"));
        }
        let longest = lease - retry_time(lease);
        if !(MIN_REFRESH_INTERVAL..=longest).contains(&self.refresh_interval()) {
            return Err(invalid(
                "lease_refresh_interval",
                format!("{:?}", self.refresh_interval()),
                format!(
                    "{MIN_REFRESH_INTERVAL:?} to {longest:?}, which leaves {:?} of the lease of {lease:?} for \
                     repeating a refresh that failed",
                    retry_time(lease)
                ),
            ));
        }
        Ok(())
    }
}
