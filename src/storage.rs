//! An open storage: the table on its server, and every operation on it, each with a deadline.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::answer::{Acquired, Claim, Fault, Found, Granted, LockInformation};
use crate::connections::Connections;
use crate::error::{Error, Result};
use crate::events::Events;
use crate::follow_up::{FollowUps, Outcome, Unfinished};
use crate::hold::Hold;
use crate::line::{Busy, Lines, Listening, Successor, Waiter};
use crate::listener::Listener;
use crate::options::{PostgresStorageOptions, check_id};
use crate::session::Session;
use crate::sql::{COLUMNS, GRACE, Sql};
use crate::sync::{Instant, thread};
use crate::term::{Term, backoff};
use crate::user_code::note;
use crate::workers::{Urgency, Workers};

/// How often to try to leave the line of a lock that changes hands at the same moment.
const MAX_WITHDRAWALS: u32 = 3;

/// How long a call waits for its answer at most, where its caller sets no limit; opening a connection comes on top.
const ANSWER_TIME: Duration = Duration::from_secs(5);
/// How long an unlock, or the drop of a guard, may take at most.
pub(crate) const RELEASE_TIME: Duration = Duration::from_secs(2);

/// An open storage for locks: a table on a PostgreSQL server, and a small pool of connections to it.
///
/// Cheap to clone; all clones share the connections, and the knowledge of which thread holds which lock.
#[derive(Clone)]
pub struct PostgresStorage {
    inner: Arc<Inner>,
}

struct Inner {
    sql: Arc<Sql>,
    schema: String,
    table_name: String,
    workers: Workers,
    lines: Arc<Lines>,
    listener: Arc<Listener>,
    follow_ups: FollowUps,
    events: Events,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.listener.close();
    }
}

enum HandedOver {
    Yes,
    No,
    /// An earlier try may yet come through.
    Perhaps,
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
        granted: Granted,
        /// From a holder whose lease had run out.
        is_takeover: bool,
    },
    Busy(Busy),
}

impl PostgresStorage {
    /// Opens a storage: connects, creates the table if it is missing (unless
    /// [`create_table(false)`](PostgresStorageOptions::create_table)), and checks that it is ours.
    ///
    /// Blocks for at most the connect timeout (5 s for each host where the DSN has none) and 5 s.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] before anything is opened, [`Error::Connect`], [`Error::Timeout`], [`Error::Table`] if the
    /// schema or the table is missing or the table isn't ours, [`Error::Database`] if it can't be created.
    pub fn new(options: PostgresStorageOptions) -> Result<PostgresStorage> {
        let config = options.checked_config()?;
        let (max_connections, events) = (options.max_connections, options.events.clone());
        // On a thread of its own, because the pool starts threads and panics where it can't.
        let connections = thread::Builder::new()
            .name("lock-open".to_owned())
            .spawn(move || Connections::new(config, max_connections, events))
            .map_err(|source| Error::Thread { source })?
            .join()
            .map_err(|_| Error::Thread {
                source: std::io::Error::other("the connection pool could not start its threads"),
            })?;
        let storage = PostgresStorage {
            inner: Arc::new(Inner {
                sql: Arc::new(Sql::new(&options.schema, &options.table_name)),
                schema: options.schema,
                table_name: options.table_name,
                workers: Workers::new(connections, max_connections),
                lines: Arc::default(),
                listener: Arc::new(Listener::new()),
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
    /// Blocks for at most the connect timeout and 5 s.
    ///
    /// # Errors
    /// [`Error::InvalidOption`], [`Error::Connect`], [`Error::Timeout`], [`Error::Database`].
    pub fn get(&self, lock_id: &str) -> Result<Option<LockInformation>> {
        check_id("lock_id", lock_id)?;
        let (describe, lock_id) = (format!("read lock {lock_id:?}"), lock_id.to_owned());
        self.read(describe, move |session, sql| session.get(sql, &lock_id))
    }

    /// The locks that are held now, by lock id. Reads the whole table.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn list(&self) -> Result<Vec<LockInformation>> {
        self.read("list the locks".to_owned(), |session, sql| session.list(sql))
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
    /// timeout and 5 s.
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
        call: impl Fn(&mut Session, &Sql) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T> {
        let sql = Arc::clone(&self.inner.sql);
        let deadline = Instant::now() + self.longest_call();
        let action = move || describe.clone();
        self.inner.workers.call(Urgency::Ordinary, deadline, action, move |session| call(session, &sql), |_| ())
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

    pub(crate) fn events(&self) -> &Events {
        &self.inner.events
    }

    pub(crate) fn lines(&self) -> &Lines {
        &self.inner.lines
    }

    /// Whether waiters hear of releases.
    pub(crate) fn listening(&self) -> Listening {
        self.inner.listener.listening()
    }

    /// Somebody waits for another process: listens for its release, if that is possible.
    pub(crate) fn listen(&self) {
        self.inner.listener.start(&self.inner.lines, self.inner.workers.connections());
    }

    /// Tries to take the lock once, repeating after `misses` at most; one that waits keeps to the line of the processes. No claim
    /// may be made twice: one whose outcome its caller can't know is released behind its back.
    pub(crate) fn acquire(&self, claim: &Claim, waits: bool, misses: u32, deadline: Instant) -> Result<Attempt> {
        let waiter = waits.then_some(self.inner.listener.waiter);
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let describe = claim.lock_id.clone();
        let mut is_repetition = false;
        let call = move |session: &mut Session| {
            // The try before this one may yet come through. If this one finds its hold, it is ours; if not, it is a stray.
            let may_be_followed_by_a_stray = std::mem::replace(&mut is_repetition, true);
            let attempt = acquire_on(session, &sql, &owned, waiter, misses, deadline)?;
            if may_be_followed_by_a_stray && matches!(attempt, Attempt::Busy(_)) {
                storage.follow_up(Unfinished::new(owned.clone(), None, Instant::now()));
            }
            Ok(attempt)
        };
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let unfinished = move |late: Option<(&mut Session, Attempt)>| match late {
            Some((session, Attempt::Taken { granted, .. })) => storage.undo(session, &sql, owned, granted),
            Some((_, Attempt::Busy(_))) if waits => storage.withdraw(&owned.lock_id),
            Some((_, Attempt::Busy(_))) => {}
            None => storage.follow_up(Unfinished::new(owned, None, Instant::now())),
        };
        let action = move || format!("acquire lock {describe:?}");
        self.inner.workers.call(Urgency::Ordinary, deadline, action, call, unfinished)
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
        let (sql, claim, version) = (Arc::clone(&self.inner.sql), hold.claim.clone(), hold.version);
        let describe = hold.claim.lock_id.clone();
        let action = move || format!("look for lock {describe:?}");
        let call = move |session: &mut Session| session.refresh(&sql, &claim, version);
        let found = self.inner.workers.call(Urgency::Urgent, Instant::now() + RELEASE_TIME, action, call, |_| ());
        found.ok().map(|is_wanted| is_wanted.is_some())
    }

    /// What a call took, but too late for its caller.
    fn undo(&self, session: &mut Session, sql: &Sql, claim: Claim, granted: Granted) {
        note!(debug, "lock {:?} was taken too late, and is released", claim.lock_id);
        if session.release(sql, &claim, Some(granted.version), None, false).is_err() {
            self.follow_up(Unfinished::new(claim, Some(granted.version), Instant::now()));
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
        let mut failures = 0;
        if let Successor::Waiter(next) = &successor {
            match self.hand_over(hold, next, deadline) {
                Ok(HandedOver::Yes) => return Ok(()),
                Ok(HandedOver::No) => {}
                // The release finds out.
                Ok(HandedOver::Perhaps) | Err(_) => failures = 1,
            }
        }
        let waits_again = matches!(successor, Successor::Waiter(_) | Successor::Others);
        let waiter = if matches!(successor, Successor::Unknown) { None } else { own };
        let result = self.give_back(hold, waiter, waits_again, failures, deadline);
        // Those before us come first, unless they don't come. One that doesn't stand in line has to ask.
        let before = result.as_ref().map_or(0, |told| if waits_again { told.saturating_sub(1) } else { 0 });
        if self.lines().release_hold(hold, Instant::now() + GRACE * before, before > 0) {
            self.withdraw(&hold.claim.lock_id);
        } else if before > 0 {
            self.listen();
        }
        result.map(drop)
    }

    /// Hands a hold over, unless it is lost or somebody's transaction has locked its row.
    fn hand_over(&self, hold: &Arc<Hold>, next: &Arc<Waiter>, deadline: Instant) -> Result<HandedOver> {
        let claim = next.claim();
        let (sql, before, owned) = (Arc::clone(&self.inner.sql), Arc::clone(hold), claim.clone());
        let mut is_repetition = false;
        let call = move |session: &mut Session| {
            let was_tried = std::mem::replace(&mut is_repetition, true);
            let granted = session.hand_over(&sql, &before.claim, before.version, &owned)?;
            Ok((granted.map(|granted| confirmed(session, &sql, &owned, granted)).transpose()?.flatten(), was_tried))
        };
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let unfinished = move |late: Option<(&mut Session, (Option<Granted>, bool))>| match late {
            Some((session, (Some(granted), _))) => storage.undo(session, &sql, owned, granted),
            Some((_, (None, false))) => {}
            // The try before may have locked the row, and come through yet.
            Some((_, (None, true))) | None => storage.follow_up(Unfinished::new(owned, None, Instant::now())),
        };
        let describe = claim.lock_id.clone();
        let action = move || format!("hand over lock {describe:?}");
        let granted = match self.inner.workers.call(Urgency::Urgent, deadline, action, call, unfinished)? {
            (Some(granted), _) => granted,
            (None, false) => return Ok(HandedOver::No),
            (None, true) => {
                self.follow_up(Unfinished::new(claim, None, Instant::now()));
                return Ok(HandedOver::Perhaps);
            }
        };
        let handed = next.hold(claim, granted, Some(hold));
        if !self.lines().hand(next, &handed) {
            // It has given up meanwhile. Its hold goes on to the next one, and our own is over.
            if let Err(error) = self.release_until(&handed, deadline) {
                note!(debug, "a hold that nobody took up: {}", error.chain());
            }
        }
        Ok(HandedOver::Yes)
    }

    /// Releases a hold that was tried to be ended `failures` times before, and says how many waiting processes were told.
    fn give_back(
        &self,
        hold: &Hold,
        waiter: Option<Uuid>,
        waits_again: bool,
        mut failures: u32,
        deadline: Instant,
    ) -> Result<u32> {
        let release = Release { claim: hold.claim.clone(), version: Some(hold.version), waiter, waits_again };
        loop {
            match self.run_release(Urgency::Urgent, deadline, &release) {
                Ok((Some(told), _)) => return Ok(told),
                // The answer to an earlier try was lost, and the hold has gone since, while nobody but ourselves could
                // end it: it was that try.
                Ok((None, is_repetition)) if (is_repetition || failures > 0) && hold.is_held() => return Ok(0),
                Ok((None, _)) => return Err(hold.lost()),
                Err(error) => {
                    failures += 1;
                    let pause = backoff(failures);
                    if !error.is_transient() || Instant::now() + pause >= deadline {
                        self.follow_up(Unfinished::new(hold.claim.clone(), Some(hold.version), Instant::now()));
                        return Err(error);
                    }
                    thread::sleep(pause);
                }
            }
        }
    }

    /// How many were told, if there was something to release, and whether it took more than one try.
    fn run_release(&self, urgency: Urgency, deadline: Instant, release: &Release) -> Result<(Option<u32>, bool)> {
        let (sql, release) = (Arc::clone(&self.inner.sql), release.clone());
        let describe = release.claim.lock_id.clone();
        let mut is_repetition = false;
        let call = move |session: &mut Session| {
            let was_tried = std::mem::replace(&mut is_repetition, true);
            let Release { claim, version, waiter, waits_again } = &release;
            Ok((session.release(&sql, claim, *version, *waiter, *waits_again)?, was_tried))
        };
        self.inner.workers.call(urgency, deadline, move || format!("release lock {describe:?}"), call, |_| ())
    }

    /// Takes this process out of the line of a lock, in the background.
    pub(crate) fn withdraw(&self, lock_id: &str) {
        let (sql, lines) = (Arc::clone(&self.inner.sql), Arc::clone(&self.inner.lines));
        let (waiter, described, lock_id) = (self.inner.listener.waiter, lock_id.to_owned(), lock_id.to_owned());
        let withdrawn = lock_id.clone();
        self.inner.workers.send(
            Urgency::Ordinary,
            Instant::now() + ANSWER_TIME,
            move || format!("leave the line of lock {described:?}"),
            || true,
            move |session| {
                let mut tries = 0..MAX_WITHDRAWALS;
                while tries.next().is_some() && !session.withdraw(&sql, &lock_id, waiter)? {}
                Ok(())
            },
            move |_| lines.withdrawn(&withdrawn),
        );
    }

    /// Releases in the background what may be left of a claim.
    pub(crate) fn follow_up(&self, unfinished: Unfinished) {
        if !self.inner.follow_ups.add(unfinished) {
            return;
        }
        let storage = self.clone();
        let run = move || {
            storage.inner.follow_ups.run(|unfinished| {
                let deadline = Instant::now() + RELEASE_TIME;
                // Others of this process may wait: it stays in the line.
                let Unfinished { claim, version, .. } = unfinished.clone();
                let release = Release { claim, version, waiter: None, waits_again: false };
                match storage.run_release(Urgency::Ordinary, deadline, &release) {
                    Ok((Some(_), _)) => Outcome::Released,
                    Ok((None, _)) => Outcome::NotThere,
                    Err(error) if error.is_transient() => Outcome::Failed,
                    Err(_) => Outcome::Hopeless,
                }
            });
        };
        if let Err(error) = thread::Builder::new().name("lock-follow-up".to_owned()).spawn(run) {
            self.inner.follow_ups.give_up();
            note!(debug, "cannot start a thread: {error}");
        }
    }
}

/// Acquires, or creates the lock's first hold, on the worker's thread.
fn acquire_on(
    session: &mut Session,
    sql: &Sql,
    claim: &Claim,
    waiter: Option<Uuid>,
    misses: u32,
    deadline: Instant,
) -> Result<Attempt, Fault> {
    let mut missed = 0;
    loop {
        let outcome = match session.acquire(sql, claim, waiter)? {
            Acquired::Absent => session.create(sql, claim)?,
            Acquired::Taken { granted, taken_over_from } => confirmed(session, sql, claim, granted)?
                .map_or(Acquired::Missed, |granted| Acquired::Taken { granted, taken_over_from }),
            outcome => outcome,
        };
        match outcome {
            Acquired::Taken { granted, taken_over_from } => {
                let is_takeover = taken_over_from.is_some();
                if let Some(before) = taken_over_from {
                    let lock_id = &claim.lock_id;
                    note!(info, "lock {lock_id:?} was taken over from {before:?}, whose lease had run out");
                }
                if Term::new(granted.sent, granted.left, claim.lease).is_held(Instant::now()) {
                    return Ok(Attempt::Taken { granted, is_takeover });
                }
                // The answer took longer than the lease: nothing to trust.
                session.release(sql, claim, Some(granted.version), None, false)?;
                return Ok(Attempt::Busy(Busy::default()));
            }
            Acquired::Busy { version, owner_id, left, is_promised, is_queued } => {
                let lock_id = &claim.lock_id;
                let whose = if is_promised { "promised to a waiting process after" } else { "held by" };
                note!(debug, "lock {lock_id:?} is busy: {whose} {owner_id:?} as version {version}, for {left:?}");
                return Ok(Attempt::Busy(Busy { version: Some(version), left: Some(left), is_queued }));
            }
            Acquired::Missed | Acquired::Absent if missed < misses && Instant::now() < deadline => missed += 1,
            Acquired::Missed | Acquired::Absent | Acquired::Locked => return Ok(Attempt::Busy(Busy::default())),
        }
    }
}

/// What was granted, refreshed if it was only recognised; none if it has gone since.
fn confirmed(session: &mut Session, sql: &Sql, claim: &Claim, granted: Granted) -> Result<Option<Granted>, Fault> {
    if !granted.is_recognised {
        return Ok(Some(granted));
    }
    let sent = Instant::now();
    let is_wanted = session.refresh(sql, claim, granted.version)?;
    Ok(is_wanted.map(|is_wanted| Granted { sent, left: claim.lease, is_wanted, is_recognised: false, ..granted }))
}

impl fmt::Debug for PostgresStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStorage").field("table", &self.inner.sql.table).finish_non_exhaustive()
    }
}

/// Why locks can't be kept in what was found, if so.
fn problem_of(found: &Found) -> Option<String> {
    let (kind, persistence, columns, has_key) = match found {
        Found::NoSchema => return Some("the schema does not exist; create it, or name another one".to_owned()),
        Found::NoTable => return Some("it does not exist, and creating it was not asked for".to_owned()),
        Found::Table { kind, persistence, columns, has_key } => (kind, persistence, columns, has_key),
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
    if persistence != "p" {
        return Some(
            "it is not durable (UNLOGGED or temporary): after a crash two owners could hold a lock".to_owned(),
        );
    }
    None
}
