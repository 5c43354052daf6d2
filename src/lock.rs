//! A lock, and the ways to take it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::answer::{Busy, LockInformation, Ticket};
use crate::error::{Error, Result};
use crate::events::Event;
use crate::guard::LockGuard;
use crate::hold::Hold;
use crate::line::{self, Place, Turn};
use crate::options::{LockOptions, check_id};
use crate::refresh;
use crate::storage::{Attempt, PostgresStorage};
use crate::sync::{Instant, thread};
use crate::user_code::note;
use crate::wait::Patience;
use crate::workers::Failed;

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

    /// Takes the lock, waiting for as long as it takes, in the order in which threads and processes came.
    ///
    /// A wait survives a database that is out of reach for less than the lease; after that it ends with the last error.
    ///
    /// While somebody has locked the table (`VACUUM FULL`, `ALTER TABLE`), the lock counts as busy, and the wait goes
    /// on. The server finds that out after 1.5 s. Behind a pooler it doesn't, because our timeouts don't reach it:
    /// there, such an attempt ends with [`Error::Timeout`](crate::Error::Timeout).
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the owner id. An error of the very first attempt
    /// comes back at once: [`Error::Connect`](crate::Error::Connect), [`Error::Database`](crate::Error::Database),
    /// and [`Error::Timeout`](crate::Error::Timeout) after at most the connect timeout, for each address, and 5 s; so
    /// does, later, an error that trying again can't help.
    pub fn lock(&self, owner_id: &str) -> Result<LockGuard> {
        loop {
            // Patience that lasts for ever ends with a guard or an error.
            if let Some(guard) = self.acquire(owner_id, Patience::Forever)? {
                return Ok(guard);
            }
        }
    }

    /// Takes the lock if it is free; `None` if it is busy, or if the table stays locked for 1.5 s (not behind a
    /// pooler).
    ///
    /// It ignores the order of those who wait: it takes a free lock even if the lock is promised to a process that
    /// waits. Blocks for at most the connect timeout, for each address, and 5 s.
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
    /// As [`lock`](Self::lock), and, if the database was out of reach at the end, the last error, or
    /// [`Error::Timeout`](crate::Error::Timeout) for one that waited behind another thread. A locked table can cause
    /// the same [`Error::Timeout`](crate::Error::Timeout), if `timeout` ends before the server has waited for 1.5 s.
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
        self.storage.check_process()?;
        let began = Instant::now();
        if let Some(hold) = self.storage.lines().enter_again(&self.options.lock_id, owner_id) {
            return Ok(Some(LockGuard::new(self.storage.clone(), hold)));
        }
        if patience.is_over(began) {
            return self.acquire_at_once(owner_id, &patience, began);
        }
        let mut waiting = self.join(owner_id);
        loop {
            match waiting.place.turn(&patience) {
                Turn::Handed(hold) => {
                    waiting.has_hold = true;
                    let guard = self.guard(hold, began, None)?;
                    if guard.is_held() {
                        return Ok(Some(guard));
                    }
                    // This thread was stopped for longer than the lease.
                    drop(guard);
                    waiting = self.join(owner_id);
                }
                Turn::Over(None) => return Ok(None),
                Turn::Over(Some(after)) => {
                    let action = format!("acquire lock {:?}", self.options.lock_id);
                    return Err(Error::Timeout { action, waiting_for: "an answer", after });
                }
                Turn::Ask(turn) => {
                    let asked = Instant::now();
                    match self.attempt(owner_id, Some(self.storage.ticket(turn)), &patience) {
                        Ok(Attempt::Taken { claim, granted, taken_over_from }) => {
                            let hold = waiting.place.waiter().hold(claim, granted, None);
                            waiting.place.took(&hold);
                            return self.guard(hold, began, taken_over_from).map(Some);
                        }
                        Ok(Attempt::Busy(busy)) => {
                            waiting.place.busy(busy.as_ref(), self.storage.is_listening(), &patience);
                            self.storage.listen();
                            // Those behind in the line don't wait for whoever is told.
                            self.tell_busy(owner_id, busy.as_ref());
                        }
                        Err(failed) => waiting.place.failed(failed, asked, &patience)?,
                    }
                }
            }
        }
    }

    fn join(&self, owner_id: &str) -> Waiting<'_> {
        let place = self.storage.lines().join(&self.options, owner_id);
        Waiting { storage: &self.storage, place, has_hold: false }
    }

    /// Without waiting, and so without standing in line.
    fn acquire_at_once(&self, owner_id: &str, patience: &Patience, began: Instant) -> Result<Option<LockGuard>> {
        match self.attempt(owner_id, None, patience)? {
            Attempt::Taken { claim, granted, taken_over_from } => {
                let hold = Arc::new(Hold::new(claim, granted, &self.options, thread::current().id(), granted.sent));
                self.storage.lines().begin_hold(&hold);
                self.guard(hold, began, taken_over_from).map(Some)
            }
            Attempt::Busy(busy) => {
                self.tell_busy(owner_id, busy.as_ref());
                Ok(None)
            }
        }
    }

    fn attempt(&self, owner_id: &str, ticket: Option<Ticket>, patience: &Patience) -> Result<Attempt, Failed> {
        let deadline = patience.attempt_deadline(Instant::now(), self.storage.longest_call(), ticket.is_some());
        let new_claim = |deadline| line::claim(&self.options, owner_id, deadline);
        self.storage.acquire(new_claim, ticket, self.options.version_miss_retry_times, deadline)
    }

    fn tell_busy(&self, owner_id: &str, busy: Option<&Busy>) {
        let (lock_id, version) = (self.options.lock_id.as_str(), busy.map(|busy| busy.version));
        if let Some(Busy { owner_id, version, is_free, left, .. }) = busy {
            let whose = if *is_free { "promised to a waiting process after" } else { "held by" };
            note!(debug, "lock {lock_id:?} is busy: {whose} {owner_id:?} as version {version}, for {left:?}");
        }
        self.storage.events().tell(|| Event::Busy { lock_id, owner_id, version });
    }

    /// The guard of a hold that was asked for since `began`.
    fn guard(&self, hold: Arc<Hold>, began: Instant, taken_over_from: Option<String>) -> Result<LockGuard> {
        let guard = LockGuard::new(self.storage.clone(), Arc::clone(&hold));
        hold.state().owes_end = true;
        let (lock_id, owner_id, version) = hold.names();
        // Before there is a thread that could tell of a refresh or a loss.
        self.storage.events().tell(|| Event::Acquired {
            lock_id,
            owner_id,
            version,
            waited: began.elapsed(),
            is_takeover: taken_over_from.is_some(),
        });
        // Without a refresh thread there is no hold: the guard is dropped here.
        refresh::start(&self.storage, &hold)?;
        if let Some(before) = taken_over_from {
            note!(info, "lock {lock_id:?} was taken over from {before:?}, whose lease had run out");
        }
        note!(debug, "{owner_id:?} acquired lock {lock_id:?} as version {version}");
        Ok(guard)
    }
}

/// A thread that waits. When it ends, however it does, nothing of it stays behind: no hold, and no place in a line.
struct Waiting<'a> {
    storage: &'a PostgresStorage,
    place: Place<'a>,
    /// The hold that was handed to it is in a guard's care.
    has_hold: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let left = self.place.leave(self.has_hold);
        if let Some(hold) = left.hold {
            drop(LockGuard::new(self.storage.clone(), hold));
        }
        if left.is_queued {
            self.storage.leave_row(self.place.lock_id());
        }
    }
}

impl fmt::Debug for StorageLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StorageLock").field("storage", &self.storage).field("options", &self.options).finish()
    }
}
