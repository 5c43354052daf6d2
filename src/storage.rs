//! An open storage: the table on its server, and every operation on it, each with a deadline.

use std::fmt;
use std::io;
use std::process;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::answer::{Acquired, Busy, Claim, Fault, Found, Granted, LockInformation, Ticket};
use crate::connections::Connections;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::follow_up::{FollowUps, Outcome, Unfinished, Work};
use crate::hold::Hold;
use crate::line::{Lines, Successor, Waiter};
use crate::listener::Listener;
use crate::options::{PostgresStorageOptions, check_id};
use crate::session::Session;
use crate::sql::{COLUMNS, GRACE, STEP, Sql};
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};
use crate::term::{Term, backoff};
use crate::trouble::Trouble;
use crate::user_code::{self, note};
use crate::workers::{Answer, Failed, MAX_TRIES, Tries, Urgency, Workers};

/// How long a call waits for its answer at most, where its caller sets no limit; opening a connection comes on top.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// The same for a list of all locks.
const LIST_TIME: Duration = Duration::from_secs(60);
/// The same for a list on a connection that others need.
const SHORT_LIST_TIME: Duration = Duration::from_secs(1);
/// How many lists may be stuck.
const MOST_LISTS: usize = 8;
/// How often in a row a lock is taken with an answer that takes too much of its lease.
const MOST_SLOW: u32 = 2;
const FAST_ANSWER: &str =
    "an answer within two fifths of the lease: the network, the server or this machine is too slow for such a lease";
/// How long an unlock, or the drop of a guard, may take at most.
pub(crate) const RELEASE_TIME: Duration = Duration::from_secs(2);

/// An open storage for locks: a table on a PostgreSQL server, and a few connections to it.
///
/// Cheap to clone; all clones share the connections, and the knowledge of which thread holds which lock.
#[derive(Clone)]
pub struct PostgresStorage {
    inner: Arc<Inner>,
}

struct Inner {
    /// Who opened it.
    process: u32,
    sql: Arc<Sql>,
    schema: String,
    table_name: String,
    workers: Workers,
    trouble: Arc<Trouble>,
    lines: Arc<Lines>,
    listener: Arc<Listener>,
    lists: Arc<Lists>,
    follow_ups: FollowUps,
    events: Events,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // In a fork a thread that is no more may have its mutex.
        if self.process == process::id() {
            self.listener.close();
        }
    }
}

/// How a hold is given back.
#[derive(Clone)]
struct Release {
    claim: Claim,
    /// None of one that may never have come to be.
    version: Option<i64>,
    /// This process in the line of those who wait: afterwards it stands behind them, or not at all.
    waiter: Option<Uuid>,
    waits_again: bool,
}

/// What came of an attempt to take a lock.
pub(crate) enum Attempt {
    Taken {
        claim: Claim,
        granted: Granted,
        /// The holder whose lease had run out.
        taken_over_from: Option<String>,
    },
    /// With what is known of it.
    Busy(Option<Busy>),
}

/// An attempt; or it was taken with an answer that took too long, and was given back.
type InTime = Result<Attempt, Slow>;

struct Slow {
    took: Duration,
    /// The database has confirmed that it was given back.
    is_released: bool,
}

impl PostgresStorage {
    /// Opens a storage: connects, creates the table if it is missing (unless
    /// [`create_table(false)`](PostgresStorageOptions::create_table)), and checks that it is ours.
    ///
    /// Blocks for at most the connect timeout, for each look-up of a name and each address, and 5 s.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] before anything is opened, [`Error::Connect`], [`Error::Timeout`], [`Error::Table`] if the
    /// schema or the table is missing or the table isn't ours, [`Error::Database`] if it can't be created.
    pub fn new(options: PostgresStorageOptions) -> Result<PostgresStorage> {
        let config = options.checked_config()?;
        let sql = Arc::new(Sql::new(&options.schema, &options.table_name));
        let connections = Connections::new(&config, options.events.clone());
        let trouble = Arc::new(Trouble::new("refreshes succeed again"));
        let storage = PostgresStorage {
            inner: Arc::new(Inner {
                process: process::id(),
                sql,
                schema: options.schema,
                table_name: options.table_name,
                workers: Workers::new(connections, options.max_connections, Arc::clone(&trouble)),
                lines: Arc::new(Lines::new(Arc::clone(&trouble))),
                trouble,
                listener: Arc::new(Listener::new()),
                lists: Arc::default(),
                follow_ups: FollowUps::default(),
                events: options.events,
            }),
        };
        storage.prepare_table(options.create_table)?;
        Ok(storage)
    }

    /// Opens a storage with the defaults: table `public.storage_lock` of the database that the DSN names.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn connect(dsn: &str) -> Result<PostgresStorage> {
        PostgresStorage::new(PostgresStorageOptions::from_dsn(dsn))
    }

    /// The newest hold of a lock, also if it is over; none if nobody has ever held it.
    ///
    /// Blocks for at most the connect timeout, for each address, and 5 s.
    ///
    /// # Errors
    /// [`Error::InvalidOption`], [`Error::Connect`], [`Error::Timeout`], [`Error::Database`], [`Error::Thread`], and
    /// [`Error::Forked`] in a process that was forked.
    pub fn get(&self, lock_id: &str) -> Result<Option<LockInformation>> {
        check_id("lock_id", lock_id)?;
        let (describe, lock_id) = (format!("read lock {lock_id:?}"), lock_id.to_owned());
        self.read(describe, move |session, sql| session.get(sql, &lock_id))
    }

    /// The locks that are held now, by lock id. Reads the whole table, on a connection of its own, one list at a
    /// time. Where no further connection can be opened, it reads on one of the others, for a second at most.
    ///
    /// Blocks for at most the connect timeout, for each address, and 60 s.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn list(&self) -> Result<Vec<LockInformation>> {
        self.check_process()?;
        let (began, action) = (Instant::now(), || "list the locks".to_owned());
        let longest = self.inner.workers.longest_call(LIST_TIME);
        let timeout = |waiting_for| Error::Timeout { action: action(), waiting_for, after: began.elapsed() };
        let Some(turn) = ListTurn::take(&self.inner.lists, began + longest, longest) else {
            return Err(timeout("the list before to end"));
        };
        let (sender, listed) = mpsc::channel();
        let (connections, sql) = (self.inner.workers.connections().clone(), Arc::clone(&self.inner.sql));
        let list = move || {
            let opened = connections.open(|_| Ok(()));
            let listed = opened.map(|mut session| session.list(&sql, LIST_TIME));
            drop(turn);
            drop(sender.send(listed));
        };
        let thread = thread::Builder::new().name("lock-list".to_owned()).spawn(move || user_code::call(list));
        let opened = match thread {
            Ok(_) => listed.recv_timeout((began + longest).saturating_duration_since(Instant::now())),
            Err(source) => Ok(Err(Error::Thread { source })),
        };
        match opened {
            Ok(Ok(listed)) => listed.map_err(|fault| fault.into_error(action)),
            Ok(Err(error)) if error.is_transient() => {
                let deadline = (began + longest).min(Instant::now() + self.longest_call());
                self.read_until(deadline, action(), |session, sql| session.list(sql, SHORT_LIST_TIME)).or(Err(error))
            }
            Ok(Err(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => Err(timeout("an answer")),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::Thread { source: io::Error::other("the client, or the logger, panicked") })
            }
        }
    }

    /// What the database's clock says, which alone judges leases.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn server_time(&self) -> Result<SystemTime> {
        self.read("read the server's time".to_owned(), |session, _| session.server_time())
    }

    /// Creates the table if it is missing, and checks that it is ours. [`new`](Self::new) has done so already, unless
    /// it was told [`create_table(false)`](PostgresStorageOptions::create_table).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn create_table(&self) -> Result<()> {
        self.prepare_table(true)
    }

    /// The statement that creates the table, for a migration.
    pub fn table_ddl(&self) -> &str {
        &self.inner.sql.create_table
    }

    /// Creates what makes tables refuse writes under an older version of their lock: functions `storage_lock_use_version` and
    /// `storage_lock_check_version`, and table `storage_lock_versions`, where they remember the greatest version of each lock
    /// that they have seen. All of it is in the storage's schema, and needs nothing else: for data in another database
    /// run [`version_check_ddl`](Self::version_check_ddl) there. The lock itself doesn't use it.
    ///
    /// A trigger names the lock of its table:
    ///
    /// ```sql
    /// CREATE TRIGGER check_version BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON accounts
    ///     FOR EACH STATEMENT EXECUTE FUNCTION public.storage_lock_check_version('transfers');
    /// ```
    ///
    /// Then each transaction that writes to it has to say first under which version, that is with
    /// [`version`](crate::LockGuard::version) of the guard, it does so. For tables of several locks it says so for each:
    ///
    /// ```sql
    /// BEGIN;
    /// SELECT public.storage_lock_use_version('transfers', 42);
    /// UPDATE accounts SET balance = balance - 10 WHERE id = 7;
    /// COMMIT;
    /// ```
    ///
    /// A version that is smaller than the greatest that was seen is an error with SQLSTATE `SL001`, a write that doesn't say
    /// its version one with `SL002`. Once a transaction under a version is committed, none under an older one is, whatever
    /// rows it wrote and whatever the isolation level.
    ///
    /// The call waits for the end of open transactions under other versions. Those under one version don't wait for each other, but for the first
    /// of them, which made the version known: so call it once in a transaction of its own, after taking the lock, where
    /// several connections write under it. Old ones that overlap without a pause keep a newer one waiting: set `lock_timeout` where that must
    /// end. Who writes under several locks has to name them in one order, or meets deadlocks.
    ///
    /// What is read after it, older holders change no more until the commit; what was read before it, they may have changed. So
    /// call it *before* reading, in a statement of its own. In REPEATABLE READ and SERIALIZABLE a transaction reads what
    /// there was before that wait: there, call it in a transaction of its own too.
    ///
    /// Not checked are: writes that name a partition, if only the partitioned table has the trigger; logical replication and
    /// `session_replication_role = replica`; changes of the table itself. Locks of two tables in one schema are told
    /// apart by their ids alone. If versions begin anew, because the lock's table was, delete its row in `storage_lock_versions`.
    ///
    /// May be called again, also by several processes at once, and replaces the functions. Blocks for at most the connect
    /// timeout, for each address, and 5 s.
    ///
    /// A role that calls this needs `CREATE` on the schema, and has to own what is there already. One that writes needs
    /// `USAGE` on the schema, and `SELECT`, `INSERT` and `UPDATE` on `storage_lock_versions`.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Timeout`], [`Error::Database`], also if there is another table of that name.
    pub fn create_version_check(&self) -> Result<()> {
        let describe = format!("create the version check in schema {:?}", self.inner.schema);
        self.read(describe, |session, sql| session.create_version_check(sql))
    }

    /// The statements that [create the version check](Self::create_version_check), for a migration or another database.
    pub fn version_check_ddl(&self) -> &str {
        &self.inner.sql.version_check
    }

    fn read<T: Send + 'static>(
        &self,
        describe: String,
        call: impl Fn(&mut Session, &Sql) -> Result<T, Fault> + Clone + Send + 'static,
    ) -> Result<T> {
        self.read_until(Instant::now() + self.longest_call(), describe, call)
    }

    fn read_until<T: Send + 'static>(
        &self,
        deadline: Instant,
        describe: String,
        call: impl Fn(&mut Session, &Sql) -> Result<T, Fault> + Clone + Send + 'static,
    ) -> Result<T> {
        self.check_process()?;
        let sql = Arc::clone(&self.inner.sql);
        let action = move || describe.clone();
        let call = move |session: &mut Session| call(session, &sql);
        Ok(self.inner.workers.call(Urgency::Ordinary, deadline, Tries::Several, action, call, |_, _| ())?.value)
    }

    fn prepare_table(&self, create: bool) -> Result<()> {
        let describe = format!("prepare table {}", self.inner.sql.table);
        let (schema, table_name) = (self.inner.schema.clone(), self.inner.table_name.clone());
        let found = self.read(describe, move |session, sql| {
            let found = session.inspect(&schema, &table_name)?;
            if !create || !matches!(found, Found::NoTable) {
                return Ok(found);
            }
            if session.create_table(sql)? {
                note!(info, "created table {}", sql.table);
            }
            session.inspect(&schema, &table_name)
        })?;
        match problem_of(&found) {
            Some(problem) => Err(Error::Table { table: self.inner.sql.table.clone(), problem }),
            None => Ok(()),
        }
    }

    /// How long a call may take at most where its caller sets no limit.
    pub(crate) fn longest_call(&self) -> Duration {
        self.inner.workers.longest_call(ANSWER_TIME)
    }

    pub(crate) fn sql(&self) -> &Sql {
        &self.inner.sql
    }

    /// Whether this process has none of the storage's threads.
    pub(crate) fn is_forked(&self) -> bool {
        self.inner.process != process::id()
    }

    /// # Errors
    /// [`Error::Forked`]: then no mutex may be touched, because a thread that is no more may have it.
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.is_forked() { Err(Error::Forked) } else { Ok(()) }
    }

    pub(crate) fn events(&self) -> &Events {
        &self.inner.events
    }

    pub(crate) fn trouble(&self) -> &Trouble {
        &self.inner.trouble
    }

    pub(crate) fn lines(&self) -> &Lines {
        &self.inner.lines
    }

    /// A refresh has been silent for so long.
    pub(crate) fn refresh_was_silent(&self, silence: Duration) {
        self.inner.workers.refresh_was_silent(silence);
    }

    /// Somebody waits who hasn't called.
    pub(crate) fn add_workers(&self) {
        self.inner.workers.add_workers();
    }

    /// Whether waiters hear of releases.
    pub(crate) fn is_listening(&self) -> bool {
        self.inner.listener.is_listening()
    }

    /// A ticket for one that waits, for the version of which those before it have been notified.
    pub(crate) fn ticket(&self, turn: Option<i64>) -> Ticket {
        Ticket { waiter: self.inner.listener.waiter, turn }
    }

    /// Somebody waits for another process: listens for its release, if that is possible.
    pub(crate) fn listen(&self) {
        let inner = &*self.inner;
        inner.listener.start(&inner.lines, inner.workers.connections(), &inner.trouble);
    }

    /// Tries to take the lock, again after each of up to `misses` misses. With a ticket it keeps to the order of the
    /// row. A claim whose answer was lost is followed up, and not sent again: the next try releases it, and makes a new
    /// one.
    pub(crate) fn acquire(
        &self,
        new_claim: impl Fn(Instant) -> Claim,
        ticket: Option<Ticket>,
        misses: u32,
        deadline: Instant,
    ) -> Result<Attempt, Failed> {
        let began = Instant::now();
        let mut unknown: Vec<Claim> = Vec::new();
        let (mut faults, mut slow) = (0, 0);
        loop {
            let claim = new_claim(deadline);
            let mut failed = match self.acquire_once(&claim, &unknown, ticket, misses, deadline) {
                Err(failed) => failed,
                Ok(Err(Slow { took, is_released })) => {
                    if !is_released {
                        self.follow_up(Unfinished::acquire(claim.clone(), Instant::now()));
                    }
                    slow += 1;
                    // Once may be chance: a process that was stopped for a while.
                    if slow < MOST_SLOW && Instant::now() < deadline {
                        continue;
                    }
                    let (action, waiting_for) = (format!("acquire lock {:?}", claim.lock_id), FAST_ANSWER);
                    return Err(Failed {
                        error: Error::Timeout { action, waiting_for, after: took },
                        is_unknown: false,
                        is_connection_fault: false,
                    });
                }
                Ok(Ok(attempt)) => return Ok(attempt),
            };
            if failed.is_unknown {
                if ticket.is_some() {
                    self.follow_up(Unfinished::place(&claim.lock_id, claim.expires, Instant::now()));
                }
                self.follow_up(Unfinished::acquire(claim.clone(), Instant::now()));
                unknown.push(claim);
            }
            faults += u32::from(failed.is_connection_fault);
            let is_silent = matches!(failed.error, Error::Timeout { .. }) && !failed.is_connection_fault;
            if !failed.is_connection_fault && !is_silent || faults >= MAX_TRIES || Instant::now() >= deadline {
                if let Error::Timeout { after, waiting_for, .. } = &mut failed.error {
                    *after = began.elapsed();
                    if slow > 0 {
                        *waiting_for = FAST_ANSWER;
                    }
                }
                return Err(failed);
            }
        }
    }

    /// Makes a claim, after it has released those before it.
    fn acquire_once(
        &self,
        claim: &Claim,
        unknown: &[Claim],
        ticket: Option<Ticket>,
        misses: u32,
        deadline: Instant,
    ) -> Result<InTime, Failed> {
        let (sql, owned, unknown) = (Arc::clone(&self.inner.sql), claim.clone(), unknown.to_vec());
        let call = move |session: &mut Session| {
            for before in &unknown {
                match session.release(&sql, before, None, None, false) {
                    Err(fault) if fault.is_connection_fault() => return Err(fault),
                    // What else fails is for the clean-up.
                    _ => {}
                }
            }
            acquire_on(session, &sql, &owned, ticket, misses, deadline)
        };
        let (storage, sql) = (self.clone(), Arc::clone(&self.inner.sql));
        // A place in the row is followed up by whoever gave up.
        let late = move |session: &mut Session, attempt: InTime| {
            if let Ok(Attempt::Taken { claim, granted, .. }) = attempt {
                storage.undo(session, &sql, claim, granted);
            }
        };
        let describe = claim.lock_id.clone();
        let action = move || format!("acquire lock {describe:?}");
        let workers = &self.inner.workers;
        let once = Tries::Once { silence: workers.longest_silence() };
        workers.call(Urgency::Ordinary, deadline, once, action, call, late).map(|answer| answer.value)
    }

    /// Sends a refresh. Its answer goes to the hold, also when it comes late.
    pub(crate) fn send_refresh(&self, hold: &Arc<Hold>, number: u64, deadline: Instant) {
        let sql = Arc::clone(&self.inner.sql);
        let (described, wanted, called, answered) =
            (Arc::clone(hold), Arc::clone(hold), Arc::clone(hold), Arc::clone(hold));
        self.inner.workers.send(
            Urgency::Urgent,
            deadline,
            move || format!("refresh lock {:?}", described.claim.lock_id),
            move || wanted.is_to_be_refreshed(),
            move |session| {
                let sent = Instant::now();
                Ok((sent, session.refresh(&sql, &called.claim, called.version)?))
            },
            move |result: Result<(Instant, Option<bool>)>| match result {
                Ok((sent, is_there)) => answered.refreshed(number, sent, Ok(is_there)),
                Err(error) => answered.refreshed(number, Instant::now(), Err(error)),
            },
        );
    }

    /// Whether a hold is there, as the database says within [`RELEASE_TIME`] to a refresh; none if it says nothing.
    pub(crate) fn look_for(&self, hold: &Hold) -> Option<bool> {
        self.check_process().ok()?;
        let deadline = Instant::now() + RELEASE_TIME;
        let mut failures = 0;
        loop {
            let (sql, claim, version) = (Arc::clone(&self.inner.sql), hold.claim.clone(), hold.version);
            let describe = hold.claim.lock_id.clone();
            let action = move || format!("look for lock {describe:?}");
            let call = move |session: &mut Session| session.refresh(&sql, &claim, version);
            match self.inner.workers.call(Urgency::Urgent, deadline, Tries::Several, action, call, |_, _| ()) {
                Ok(is_wanted) => return Some(is_wanted.value.is_some()),
                // Somebody's transaction has the row, perhaps one that is about to end.
                Err(failed) => {
                    failures += 1;
                    let pause = backoff(failures);
                    if !failed.error.is_transient() || Instant::now() + pause >= deadline {
                        return None;
                    }
                    thread::sleep(pause);
                }
            }
        }
    }

    /// What a call took, but too late for its caller.
    fn undo(&self, session: &mut Session, sql: &Sql, claim: Claim, granted: Granted) {
        note!(debug, "lock {:?} was taken too late, and is released", claim.lock_id);
        if session.release(sql, &claim, Some(granted.version), None, false).is_err() {
            self.follow_up(Unfinished::hold(claim, granted.version, Instant::now()));
        }
    }

    /// Ends a hold, within [`RELEASE_TIME`]: hands it to the next thread of this process that waits, or gives it back. If that fails
    /// it is followed up until the lease has run out.
    pub(crate) fn release(&self, hold: &Arc<Hold>) -> Result<()> {
        self.release_until(hold, Instant::now() + RELEASE_TIME)
    }

    fn release_until(&self, hold: &Arc<Hold>, deadline: Instant) -> Result<()> {
        let own = Some(self.inner.listener.waiter);
        let successor = self.lines().successor(hold);
        let (began, mut first) = (Instant::now(), None);
        if let Successor::Waiter(next) = &successor {
            match self.hand_over(hold, next, deadline) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // The release finds out.
                Err(error) => first = Some(error),
            }
        }
        let waits_again = matches!(successor, Successor::Waiter(_) | Successor::Others);
        let waiter = if matches!(successor, Successor::Unknown) { None } else { own };
        let result = self.give_back(hold, waiter, waits_again, first, began, deadline);
        // Those before us come first, unless they don't come. One that doesn't stand in the row has to ask.
        let before = result.as_ref().map_or(0, |waiters| if waits_again { waiters.saturating_sub(1) } else { 0 });
        let pause = if before > 0 { GRACE + STEP * (before - 1) } else { Duration::ZERO };
        if self.lines().release_hold(hold, Instant::now() + pause, before > 0) {
            self.leave_row(&hold.claim.lock_id);
        } else if before > 0 {
            self.listen();
        }
        result.map(drop)
    }

    /// Hands a hold over, unless it is lost or somebody's transaction has locked its row. Where it is silent for half
    /// of the time, and another connection answers, the rest is for a release.
    fn hand_over(&self, hold: &Arc<Hold>, next: &Arc<Waiter>, deadline: Instant) -> Result<bool> {
        let now = Instant::now();
        let once = Tries::Once { silence: deadline.saturating_duration_since(now) / 2 };
        let claim = next.claim(deadline);
        let (sql, before, owned) = (Arc::clone(&self.inner.sql), Arc::clone(hold), claim.clone());
        let call = move |session: &mut Session| session.hand_over(&sql, &before.claim, before.version, &owned);
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let late = move |session: &mut Session, granted: Option<Granted>| {
            if let Some(granted) = granted {
                storage.undo(session, &sql, owned, granted);
            }
        };
        let describe = claim.lock_id.clone();
        let action = move || format!("hand over lock {describe:?}");
        let granted = match self.inner.workers.call(Urgency::Urgent, deadline, once, action, call, late) {
            Ok(Answer { value: Some(granted), .. }) => granted,
            Ok(Answer { value: None, .. }) => return Ok(false),
            Err(failed) => {
                if failed.is_unknown {
                    self.follow_up(Unfinished::acquire(claim, Instant::now()));
                }
                return Err(failed.error);
            }
        };
        let handed = next.hold(claim, granted, Some(hold));
        if !self.lines().hand(next, &handed) {
            // It has given up meanwhile. Its hold goes on to the next one, and our own is over.
            if let Err(error) = self.release_until(&handed, deadline) {
                note!(debug, "a hold that nobody took up: {}", error.chain());
            }
        }
        Ok(true)
    }

    /// Releases a hold, and says how many processes wait. `first` is why the hand-over failed that was tried since
    /// `began`.
    fn give_back(
        &self,
        hold: &Hold,
        waiter: Option<Uuid>,
        waits_again: bool,
        mut first: Option<Error>,
        began: Instant,
        deadline: Instant,
    ) -> Result<u32> {
        let mut failures = 0;
        let release = Release { claim: hold.claim.clone(), version: Some(hold.version), waiter, waits_again };
        loop {
            match self.run_release(Urgency::Urgent, deadline, &release) {
                Ok((Some(waiters), _)) => return Ok(waiters),
                // The answer to an earlier try was lost, and the hold has gone since, while nobody but ourselves could
                // end it: it was that try.
                Ok((None, is_repetition)) if (is_repetition || first.is_some()) && hold.is_held() => return Ok(0),
                Ok((None, _)) => return Err(hold.lost()),
                Err(error) => {
                    failures += 1;
                    let (pause, is_transient) = (backoff(failures), error.is_transient());
                    let mut error = if is_transient { first.take().unwrap_or(error) } else { error };
                    if !is_transient || Instant::now() + pause >= deadline {
                        self.follow_up(Unfinished::hold(hold.claim.clone(), hold.version, Instant::now()));
                        if let Error::Timeout { after, .. } = &mut error {
                            *after = began.elapsed();
                        }
                        return Err(error);
                    }
                    first = Some(error);
                    thread::sleep(pause);
                }
            }
        }
    }

    /// How many wait, if there was something to release, and whether it took more than one try.
    fn run_release(&self, urgency: Urgency, deadline: Instant, release: &Release) -> Result<(Option<u32>, bool)> {
        let (sql, release) = (Arc::clone(&self.inner.sql), release.clone());
        let describe = release.claim.lock_id.clone();
        let call = move |session: &mut Session| {
            let Release { claim, version, waiter, waits_again } = &release;
            session.release(&sql, claim, *version, *waiter, *waits_again)
        };
        let action = move || format!("release lock {describe:?}");
        let answer = self.inner.workers.call(urgency, deadline, Tries::Several, action, call, |_, _| ())?;
        Ok((answer.value, answer.is_repeated))
    }

    /// Takes this process out of the row of a lock, in the background.
    pub(crate) fn leave_row(&self, lock_id: &str) {
        let now = Instant::now();
        self.follow_up(Unfinished::place(lock_id, now, now));
    }

    /// Takes this process out of the row of a lock, unless somebody of it waits for it again.
    fn withdraw(&self, lock_id: &str) -> Result<()> {
        if self.lines().takes_place_over(lock_id) {
            return Ok(());
        }
        let (sql, waiter) = (Arc::clone(&self.inner.sql), self.inner.listener.waiter);
        let (described, owned) = (lock_id.to_owned(), lock_id.to_owned());
        let action = move || format!("leave the row of lock {described:?}");
        let call = move |session: &mut Session| session.withdraw(&sql, &owned, waiter);
        let deadline = Instant::now() + RELEASE_TIME;
        let result = self.inner.workers.call(Urgency::Ordinary, deadline, Tries::Several, action, call, |_, _| ());
        // Somebody may have come meanwhile.
        self.lines().withdrawn(lock_id);
        result?;
        Ok(())
    }

    /// Undoes in the background what may be left.
    pub(crate) fn follow_up(&self, unfinished: Unfinished) {
        if !self.inner.follow_ups.add(unfinished) {
            return;
        }
        let storage = self.clone();
        let run = move || {
            user_code::call(|| storage.inner.follow_ups.run(|work| storage.try_to_undo(work)));
        };
        if let Err(error) = thread::Builder::new().name("lock-follow-up".to_owned()).spawn(run) {
            self.inner.follow_ups.give_up();
            note!(debug, "cannot start a thread: {error}");
        }
    }

    fn try_to_undo(&self, work: &Work) -> Outcome {
        let (claim, version) = match work {
            Work::Place { lock_id, .. } => {
                return self.withdraw(lock_id).map_or(Outcome::Failed, |()| Outcome::NotThere);
            }
            Work::Hold { claim, version } => (claim, Some(*version)),
            Work::Acquire { claim } => (claim, None),
        };
        let (sql, claim) = (Arc::clone(&self.inner.sql), claim.clone());
        let describe = claim.lock_id.clone();
        let call = move |session: &mut Session| {
            if session.release(&sql, &claim, version, None, false)?.is_some() {
                return Ok(Outcome::Undone);
            }
            // When it can't be sent any more, it may yet be about to commit, which the release doesn't see. Asked for at the end only,
            // because looking for that locks the row for a moment.
            let is_last = version.is_none() && claim.expires <= Instant::now();
            let is_settled = !is_last || session.is_settled(&sql, &claim.lock_id)?;
            Ok(if is_settled { Outcome::NotThere } else { Outcome::Failed })
        };
        let action = move || format!("release lock {describe:?}");
        let deadline = Instant::now() + RELEASE_TIME;
        let outcome = self.inner.workers.call(Urgency::Ordinary, deadline, Tries::Several, action, call, |_, _| ());
        outcome.map_or(Outcome::Failed, |answer| answer.value)
    }
}

/// Acquires, or creates the lock's first hold, on the worker's thread.
fn acquire_on(
    session: &mut Session,
    sql: &Sql,
    claim: &Claim,
    ticket: Option<Ticket>,
    misses: u32,
    deadline: Instant,
) -> Result<InTime, Fault> {
    let mut missed = 0;
    loop {
        let outcome = match session.acquire(sql, claim, ticket)? {
            Acquired::Absent => session.create(sql, claim)?,
            outcome => outcome,
        };
        match outcome {
            Acquired::Taken { granted, taken_over_from } => {
                // Of two answers as late as this one the second must come before the loss is told, and a little more.
                let (took, term) = (granted.sent.elapsed(), Term::new(granted.sent, granted.left, claim.lease));
                if took.mul_f64(2.2) <= term.loss_time().saturating_duration_since(granted.sent) {
                    return Ok(Ok(Attempt::Taken { claim: claim.clone(), granted, taken_over_from }));
                }
                // With refreshes as slow as that it would be lost.
                let is_released = match session.release(sql, claim, Some(granted.version), None, false) {
                    Err(fault) if fault.is_connection_fault() => return Err(fault),
                    released => released.is_ok(),
                };
                return Ok(Err(Slow { took, is_released }));
            }
            Acquired::Busy(busy) => return Ok(Ok(Attempt::Busy(Some(busy)))),
            Acquired::Missed | Acquired::Absent if missed < misses && Instant::now() < deadline => missed += 1,
            Acquired::Missed | Acquired::Absent | Acquired::Locked | Acquired::TooLate => {
                return Ok(Ok(Attempt::Busy(None)));
            }
        }
    }
}

/// The lists that are being made, by when they began.
#[derive(Default)]
struct Lists {
    began: Mutex<Vec<Instant>>,
    ended: Condvar,
}

/// The turn of one of them, from when it began.
struct ListTurn(Arc<Lists>, Instant);

impl ListTurn {
    /// Waits until nobody else makes one, or only those that are stuck, for longer than a list takes.
    fn take(lists: &Arc<Lists>, deadline: Instant, longest: Duration) -> Option<ListTurn> {
        let mut began = lock(&lists.began);
        loop {
            let now = Instant::now();
            if began.len() < MOST_LISTS && began.iter().all(|began| now.duration_since(*began) >= longest) {
                began.push(now);
                return Some(ListTurn(Arc::clone(lists), now));
            }
            if now >= deadline {
                return None;
            }
            let stuck_at = began.iter().max().and_then(|newest| newest.checked_add(longest));
            began = wait_until(&lists.ended, began, stuck_at.map_or(deadline, |at| at.min(deadline)));
        }
    }
}

impl Drop for ListTurn {
    fn drop(&mut self) {
        let mut began = lock(&self.0.began);
        if let Some(own) = began.iter().position(|began| *began == self.1) {
            began.swap_remove(own);
        }
        self.0.ended.notify_all();
    }
}

impl fmt::Debug for PostgresStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStorage").field("table", &self.inner.sql.table).finish_non_exhaustive()
    }
}

/// Why locks can't be kept in what was found, if so.
fn problem_of(found: &Found) -> Option<String> {
    let (kind, persistence, columns, has_key, hides_rows) = match found {
        Found::NoSchema => return Some("the schema does not exist; create it, or name another one".to_owned()),
        Found::NoTable => return Some("it does not exist, and creating it was not asked for".to_owned()),
        Found::Table { kind, persistence, columns, has_key, hides_rows } => {
            (kind, persistence, columns, has_key, hides_rows)
        }
    };
    if kind != "r" {
        return Some("it is not an ordinary table".to_owned());
    }
    let missing: Vec<String> = COLUMNS
        .iter()
        .map(|(name, type_, is_required)| format!("{name} {type_}{}", if *is_required { " NOT NULL" } else { "" }))
        .filter(|column| !columns.contains(column))
        .collect();
    if !missing.is_empty() {
        return Some(format!("it is not ours: there is no column {}; name another table", missing.join(", ")));
    }
    if !has_key {
        return Some("it has no primary key (lock_id, version)".to_owned());
    }
    if *hides_rows {
        return Some(
            "row-level security applies to this role, and may hide rows: two owners could hold a lock; use a role that it \
             doesn't apply to, or disable it for the table"
                .to_owned(),
        );
    }
    if persistence != "p" {
        return Some(
            "it is not durable (UNLOGGED or temporary): after a crash two owners could hold a lock".to_owned(),
        );
    }
    None
}
