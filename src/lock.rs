//! A lock, and the ways to take it.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::error::Result;
use crate::guard::LockGuard;
use crate::hold::Hold;
use crate::options::{LockOptions, check_id};
use crate::refresh;
use crate::session::{Claim, LockInformation};
use crate::storage::{Attempt, PostgresStorage};
use crate::term::Term;
use crate::wait::Patience;

/// One lock: a name that one owner at a time can hold, in all processes that use the same table.
///
/// Cheap to clone, and one can be used by many threads at once.
///
/// The owner id given to the methods says who asks; it is shown to others and kept in the table. It doesn't let anybody in:
/// two hosts that both call themselves `worker-1` exclude each other. Only on the thread that holds the lock does the same
/// owner id, through the same [`PostgresStorage`] or its clones, get it again, at once and without a statement; the
/// last of its guards releases it.
#[derive(Clone)]
pub struct StorageLock {
    storage: PostgresStorage,
    options: Arc<LockOptions>,
}

impl StorageLock {
    /// Opens a storage with the defaults, and this lock in it. To use several locks, open one [`PostgresStorage`] for all.
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the lock id, and as [`PostgresStorage::new`].
    pub fn connect(lock_id: impl Into<String>, dsn: &str) -> Result<StorageLock> {
        let options = LockOptions::new(lock_id);
        options.check()?;
        StorageLock::with_options(&PostgresStorage::connect(dsn)?, options)
    }

    /// A lock with the default settings. Touches nothing.
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the lock id.
    pub fn new(storage: &PostgresStorage, lock_id: impl Into<String>) -> Result<StorageLock> {
        StorageLock::with_options(storage, LockOptions::new(lock_id))
    }

    /// A lock with settings of its own. Touches nothing.
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the lock id and the times.
    pub fn with_options(storage: &PostgresStorage, options: LockOptions) -> Result<StorageLock> {
        options.check()?;
        Ok(StorageLock { storage: storage.clone(), options: Arc::new(options) })
    }

    /// Takes the lock, waiting for as long as it takes.
    ///
    /// A wait survives a database that is out of reach for less than the lease.
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the owner id. An error of the very first attempt comes back
    /// at once: [`Error::Connect`](crate::Error::Connect), [`Error::Database`](crate::Error::Database), and
    /// [`Error::Timeout`](crate::Error::Timeout) after at most the connect timeout and 5 s; so does, later, an error that
    /// trying again can't help.
    pub fn lock(&self, owner_id: &str) -> Result<LockGuard> {
        loop {
            // Patience that lasts for ever ends with a guard or an error.
            if let Some(guard) = self.acquire(owner_id, Patience::Forever)? {
                return Ok(guard);
            }
        }
    }

    /// Takes the lock if it is free; `None` if it is busy. Blocks for at most the connect timeout and 5 s.
    ///
    /// # Errors
    /// As [`lock`](Self::lock).
    pub fn try_lock(&self, owner_id: &str) -> Result<Option<LockGuard>> {
        self.acquire(owner_id, Patience::None)
    }

    /// Takes the lock, waiting for at most `timeout`; `None` if it was busy all the time. A timeout of zero is one attempt,
    /// one too long for the clock is for ever. Blocks for at most half a second longer than `timeout`.
    ///
    /// # Errors
    /// As [`lock`](Self::lock), and, if the database was out of reach at the end, the last error.
    pub fn try_lock_for(&self, owner_id: &str, timeout: Duration) -> Result<Option<LockGuard>> {
        self.acquire(owner_id, Patience::lasting(timeout))
    }

    /// Takes the lock, waiting until `deadline` at most; `None` if it was busy all the time. A deadline in the past is one
    /// attempt. Blocks for at most half a second longer.
    ///
    /// # Errors
    /// As [`try_lock_for`](Self::try_lock_for).
    pub fn try_lock_until(&self, owner_id: &str, deadline: Instant) -> Result<Option<LockGuard>> {
        self.acquire(owner_id, Patience::Until(deadline))
    }

    /// The newest hold of this lock, also if it is over; none if nobody has ever held it.
    ///
    /// # Errors
    /// As [`PostgresStorage::get`].
    pub fn info(&self) -> Result<Option<LockInformation>> {
        self.storage.get(&self.options.lock_id)
    }

    fn acquire(&self, owner_id: &str, patience: Patience) -> Result<Option<LockGuard>> {
        check_id("owner_id", owner_id)?;
        if let Some(hold) = self.storage.holds().enter_again(&self.options.lock_id, owner_id) {
            return Ok(Some(LockGuard::new(self.storage.clone(), hold)));
        }
        let mut rounds = 0;
        let mut unreachable_since = None;
        loop {
            let started = Instant::now();
            // A lease id of its own for each attempt: what came of one without an answer is undone behind our back.
            let claim = self.claim(owner_id);
            let deadline = patience.attempt_deadline(started, self.storage.longest_call());
            let left = match self.storage.acquire(&claim, self.options.version_miss_retry_times, deadline) {
                Ok(Attempt::Taken { version, term }) => return self.hold(claim, version, term).map(Some),
                Ok(Attempt::Busy { left }) => {
                    unreachable_since = None;
                    if patience.is_over(Instant::now()) {
                        return Ok(None);
                    }
                    left
                }
                Err(error) => {
                    let since = *unreachable_since.get_or_insert(started);
                    let is_hopeless = match patience {
                        Patience::Forever => since.elapsed() >= self.options.lease_expire_after,
                        _ => patience.is_over(Instant::now()),
                    };
                    if rounds == 0 || is_hopeless || !error.is_transient() {
                        return Err(error);
                    }
                    log::debug!(target: "storage_lock", "waiting for lock {:?} goes on: {error}", claim.lock_id);
                    None
                }
            };
            thread::sleep(patience.pause(Instant::now(), rounds, left));
            rounds = rounds.saturating_add(1);
        }
    }

    fn claim(&self, owner_id: &str) -> Claim {
        Claim {
            lock_id: self.options.lock_id.clone(),
            owner_id: owner_id.to_owned(),
            lease_id: Uuid::new_v4(),
            lease: self.options.lease_expire_after,
        }
    }

    fn hold(&self, claim: Claim, version: i64, term: Term) -> Result<LockGuard> {
        let hold = Arc::new(Hold::new(claim, version, term, self.options.refresh_interval()));
        self.storage.holds().insert(&hold);
        let guard = LockGuard::new(self.storage.clone(), Arc::clone(&hold));
        // Without a refresh thread there is no hold: the guard is dropped here.
        refresh::start(&self.storage, &hold)?;
        log::debug!(
            target: "storage_lock",
            "{:?} acquired lock {:?} as version {version}", guard.owner_id(), guard.lock_id()
        );
        Ok(guard)
    }
}

impl fmt::Debug for StorageLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StorageLock").field("storage", &self.storage).field("options", &self.options).finish()
    }
}
