//! A lock, and the ways to acquire it.
//!
//! An acquire makes one attempt without waiting, or it waits with a ticket in the wait queue of this process. However
//! a wait ends, [`Waiting`] leaves nothing of it behind.
//!
//! Uses `guard` and the modules below it, but not fence/.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::db::answer::{Busy, LockInformation, RowWaiter};
use crate::db::workers::Failed;
use crate::error::{Error, Result};
use crate::events::Event;
use crate::guard::LockGuard;
use crate::hold::Hold;
use crate::options::{LockOptions, check_id};
use crate::storage::PostgresStorage;
use crate::storage::acquire::Attempt;
use crate::storage::refresh;
use crate::sync::{Instant, thread};
use crate::user_code::log_at;
use crate::wait::limit::WaitLimit;
use crate::wait::queue;
use crate::wait::ticket::{NextStep, Ticket};

/// One lock: a name that one owner at a time can hold, among all processes that use the same table.
///
/// It is cheap to clone, and many threads can use it simultaneously.
///
/// The owner id given to the methods says who asks. The table keeps it, and shows it to others. It gives nobody
/// access: two hosts that both call themselves `worker-1` exclude each other. The lock is re-entrant only on the
/// thread that holds it, for the same owner id, and through the same [`PostgresStorage`] or its clones. Such an
/// acquire returns immediately, without a statement. The last guard releases the lock.
#[derive(Clone)]
pub struct StorageLock {
    storage: PostgresStorage,
    options: Arc<LockOptions>,
}

impl StorageLock {
    /// Opens a storage with the defaults, and this lock in it. To use several locks, open one [`PostgresStorage`] for
    /// all of them.
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the lock id, and the errors of
    /// [`PostgresStorage::new`].
    pub fn connect(lock_id: impl Into<String>, dsn: &str) -> Result<StorageLock> {
        let options = LockOptions::new(lock_id);
        options.check()?;
        StorageLock::with_options(&PostgresStorage::connect(dsn)?, options)
    }

    /// A lock with the default settings. Makes no call to the database.
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the lock id.
    pub fn new(storage: &PostgresStorage, lock_id: impl Into<String>) -> Result<StorageLock> {
        StorageLock::with_options(storage, LockOptions::new(lock_id))
    }

    /// A lock with its own settings. Makes no call to the database.
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the lock id and the times.
    pub fn with_options(storage: &PostgresStorage, options: LockOptions) -> Result<StorageLock> {
        options.check()?;
        Ok(StorageLock { storage: storage.clone(), options: Arc::new(options) })
    }

    /// Acquires the lock. Waits for as long as that takes, in the order in which threads and processes came.
    ///
    /// A wait survives a database that is out of reach for less than the lease. After that it ends with the last
    /// error.
    ///
    /// While somebody has locked the table (`VACUUM FULL`, `ALTER TABLE`), the lock counts as busy, and the wait goes
    /// on. The server notices the locked table after 1.5 s. Behind a pooler it doesn't, because our timeouts don't
    /// reach it: there, such an attempt ends with [`Error::Timeout`](crate::Error::Timeout).
    ///
    /// # Errors
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) for the owner id. The very first attempt returns its
    /// error immediately: [`Error::Connect`](crate::Error::Connect), [`Error::Database`](crate::Error::Database), and
    /// [`Error::Timeout`](crate::Error::Timeout) after at most the connect timeout, for each address, and 5 s. A
    /// later attempt returns its error immediately only if a retry can't help.
    pub fn lock(&self, owner_id: &str) -> Result<LockGuard> {
        loop {
            // `Forever` never returns `None`. If it did, waiting again would be right.
            if let Some(guard) = self.acquire(owner_id, WaitLimit::Forever)? {
                return Ok(guard);
            }
        }
    }

    /// Acquires the lock if it is free. Returns `None` if it is busy, or if the table stays locked for 1.5 s (not
    /// behind a pooler).
    ///
    /// It ignores the order of the waiters: it takes a free lock even if the lock is promised to a process that waits.
    /// Blocks for at most the connect timeout, for each address, and 5 s.
    ///
    /// # Errors
    /// The errors of [`lock`](Self::lock).
    pub fn try_lock(&self, owner_id: &str) -> Result<Option<LockGuard>> {
        self.acquire(owner_id, WaitLimit::NoWait)
    }

    /// Acquires the lock. Waits for at most `timeout`, and returns `None` if the lock was busy all the time.
    ///
    /// A timeout of zero means one attempt. A timeout too long for the clock means for ever. Blocks for at most half a
    /// second longer than `timeout`.
    ///
    /// # Errors
    /// The errors of [`lock`](Self::lock). If the database was out of reach at the end, the last error, or
    /// [`Error::Timeout`](crate::Error::Timeout) for a caller that waited behind another thread. A locked table can
    /// cause the same [`Error::Timeout`](crate::Error::Timeout), if `timeout` ends before the server has waited for
    /// 1.5 s.
    pub fn try_lock_for(&self, owner_id: &str, timeout: Duration) -> Result<Option<LockGuard>> {
        self.acquire(owner_id, WaitLimit::lasting(timeout))
    }

    /// Acquires the lock. Waits until `deadline` at most, and returns `None` if the lock was busy all the time.
    ///
    /// A deadline in the past means one attempt. Blocks for at most half a second longer.
    ///
    /// # Errors
    /// The errors of [`try_lock_for`](Self::try_lock_for).
    pub fn try_lock_until(&self, owner_id: &str, deadline: Instant) -> Result<Option<LockGuard>> {
        self.acquire(owner_id, WaitLimit::Until(deadline))
    }

    /// The newest hold of this lock, even if it is over. `None` if nobody has ever held the lock.
    ///
    /// # Errors
    /// The errors of [`PostgresStorage::get`].
    pub fn info(&self) -> Result<Option<LockInformation>> {
        self.storage.get(&self.options.lock_id)
    }

    fn acquire(&self, owner_id: &str, limit: WaitLimit) -> Result<Option<LockGuard>> {
        check_id("owner_id", owner_id)?;
        self.storage.check_process()?;
        let began = Instant::now();
        if let Some(hold) = self.storage.queues().reenter(&self.options.lock_id, owner_id) {
            return Ok(Some(LockGuard::new(self.storage.clone(), hold)));
        }
        if limit.is_over(began) {
            return self.acquire_without_waiting(owner_id, &limit, began);
        }
        self.acquire_waiting(owner_id, &limit, began)
    }

    fn acquire_waiting(&self, owner_id: &str, limit: &WaitLimit, began: Instant) -> Result<Option<LockGuard>> {
        let mut waiting = self.join(owner_id);
        loop {
            match waiting.ticket.next_step(limit) {
                NextStep::Handed(hold) => {
                    waiting.has_hold = true;
                    let guard = self.guard(hold, began, None)?;
                    if guard.is_held() {
                        return Ok(Some(guard));
                    }
                    // This thread was paused for longer than the lease.
                    drop(guard);
                    waiting = self.join(owner_id);
                }
                NextStep::GiveUp(None) => return Ok(None),
                NextStep::GiveUp(Some(after)) => {
                    let action = format!("acquire lock {:?}", self.options.lock_id);
                    return Err(Error::Timeout { action, waiting_for: "an answer", after });
                }
                NextStep::Ask(notified_version) => {
                    if let Some(guard) = self.ask(&waiting.ticket, owner_id, notified_version, limit, began)? {
                        return Ok(Some(guard));
                    }
                }
            }
        }
    }

    /// One attempt of the queue's head. `None` means that the wait goes on.
    fn ask(
        &self,
        ticket: &Ticket<'_>,
        owner_id: &str,
        notified_version: Option<i64>,
        limit: &WaitLimit,
        began: Instant,
    ) -> Result<Option<LockGuard>> {
        let asked = Instant::now();
        match self.attempt(owner_id, Some(self.storage.row_waiter(notified_version)), limit) {
            Ok(Attempt::Taken { claim, granted, taken_over_from }) => {
                let hold = ticket.waiter().hold(claim, granted, None);
                ticket.acquired(&hold);
                return self.guard(hold, began, taken_over_from).map(Some);
            }
            Ok(Attempt::Busy(busy)) => {
                ticket.busy(busy.as_ref(), self.storage.is_listening(), limit);
                self.storage.listen();
                // Last, because this calls the user's code: the threads behind in the queue don't wait for that.
                self.report_busy(owner_id, busy.as_ref());
            }
            Err(failed) => ticket.failed(failed, asked, limit)?,
        }
        Ok(None)
    }

    fn join(&self, owner_id: &str) -> Waiting<'_> {
        let ticket = self.storage.queues().join(&self.options, owner_id);
        Waiting { storage: &self.storage, ticket, has_hold: false }
    }

    /// One attempt, without a ticket in the wait queue.
    fn acquire_without_waiting(&self, owner_id: &str, limit: &WaitLimit, began: Instant) -> Result<Option<LockGuard>> {
        match self.attempt(owner_id, None, limit)? {
            Attempt::Taken { claim, granted, taken_over_from } => {
                let (interval, on_lost) = (self.options.refresh_interval(), self.options.on_lost.clone());
                let thread = thread::current().id();
                let hold = Arc::new(Hold::new(claim, granted, interval, on_lost, thread, granted.sent));
                self.storage.queues().begin_hold(&hold);
                self.guard(hold, began, taken_over_from).map(Some)
            }
            Attempt::Busy(busy) => {
                self.report_busy(owner_id, busy.as_ref());
                Ok(None)
            }
        }
    }

    fn attempt(&self, owner_id: &str, row_waiter: Option<RowWaiter>, limit: &WaitLimit) -> Result<Attempt, Failed> {
        let deadline = limit.attempt_deadline(Instant::now(), self.storage.longest_call(), row_waiter.is_some());
        let new_claim = |deadline| queue::claim(&self.options, owner_id, deadline);
        self.storage.acquire(new_claim, row_waiter, self.options.version_miss_retry_times, deadline)
    }

    fn report_busy(&self, owner_id: &str, busy: Option<&Busy>) {
        let (lock_id, version) = (self.options.lock_id.as_str(), busy.map(|busy| busy.version));
        if let Some(Busy { owner_id, version, is_free, left, .. }) = busy {
            let whose = if *is_free { "promised to a waiting process after" } else { "held by" };
            log_at!(debug, "lock {lock_id:?} is busy: {whose} {owner_id:?} as version {version}, for {left:?}");
        }
        self.storage.events().send(|| Event::Busy { lock_id, owner_id, version });
    }

    /// The guard of a hold, and the start of its refresh thread. Its caller has asked for the lock since `began`.
    fn guard(&self, hold: Arc<Hold>, began: Instant, taken_over_from: Option<String>) -> Result<LockGuard> {
        let guard = LockGuard::new(self.storage.clone(), Arc::clone(&hold));
        hold.state().owes_end_event = true;
        let (lock_id, owner_id, version) = hold.names();
        // Sent before the refresh thread starts, because that thread may report a refresh or a loss.
        self.storage.events().send(|| Event::Acquired {
            lock_id,
            owner_id,
            version,
            waited: began.elapsed(),
            is_takeover: taken_over_from.is_some(),
        });
        // Without a refresh thread there is no hold: an error here drops the guard.
        refresh::start(&self.storage, &hold)?;
        if let Some(before) = taken_over_from {
            log_at!(info, "lock {lock_id:?} was taken over from {before:?}, whose lease had run out");
        }
        log_at!(debug, "{owner_id:?} acquired lock {lock_id:?} as version {version}");
        Ok(guard)
    }
}

/// A thread that waits. However the wait ends, nothing stays behind: no hold, no ticket in the queue, and no entry in
/// the row that nobody needs.
struct Waiting<'a> {
    storage: &'a PostgresStorage,
    ticket: Ticket<'a>,
    /// A guard takes care of the hold that was handed to this thread.
    has_hold: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let left = self.ticket.leave(self.has_hold);
        if let Some(hold) = left.hold {
            drop(LockGuard::new(self.storage.clone(), hold));
        }
        if left.is_in_row {
            self.storage.leave_row(self.ticket.lock_id());
        }
    }
}

impl fmt::Debug for StorageLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StorageLock").field("storage", &self.storage).field("options", &self.options).finish()
    }
}
