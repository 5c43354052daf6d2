//! An open storage: the table on its server, and every operation on it, each with a deadline.

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::connections::Connections;
use crate::error::{Error, Result};
use crate::follow_up::{FollowUps, Outcome, Unfinished};
use crate::hold::{Hold, Holds};
use crate::options::{PostgresStorageOptions, check_id};
use crate::session::{Acquired, Claim, Fault, Found, LockInformation, Session};
use crate::sql::{COLUMNS, Sql};
use crate::term::{Term, backoff};
use crate::workers::{Urgency, Workers};

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
    holds: Holds,
    follow_ups: FollowUps,
}

/// What came of an attempt to take a lock.
pub(crate) enum Attempt {
    Taken {
        version: i64,
        term: Term,
    },
    /// Somebody else's; for how long, if that is known.
    Busy {
        left: Option<Duration>,
    },
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
        let max_connections = options.max_connections;
        // On a thread of its own, because the pool starts threads and panics where it can't.
        let connections = thread::Builder::new()
            .name("lock-open".to_owned())
            .spawn(move || Connections::new(config, max_connections))
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
                holds: Holds::default(),
                follow_ups: FollowUps::default(),
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
                log::info!(target: "storage_lock", "created table {}", sql.table);
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

    pub(crate) fn holds(&self) -> &Holds {
        &self.inner.holds
    }

    /// Tries to take the lock once, repeating after `misses` at most. No claim may be made twice: one whose outcome its
    /// caller can't know is released behind its back.
    pub(crate) fn acquire(&self, claim: &Claim, misses: u32, deadline: Instant) -> Result<Attempt> {
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let describe = claim.lock_id.clone();
        let mut is_repetition = false;
        let call = move |session: &mut Session| {
            // The try before this one may yet come through. If this one finds its hold, it is ours; if not, it is a stray.
            let may_be_followed_by_a_stray = std::mem::replace(&mut is_repetition, true);
            let attempt = acquire_on(session, &sql, &owned, misses, deadline)?;
            if may_be_followed_by_a_stray && matches!(attempt, Attempt::Busy { .. }) {
                storage.follow_up(Unfinished::new(owned.clone(), None, Instant::now()));
            }
            Ok(attempt)
        };
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let unfinished = move |late: Option<(&mut Session, Attempt)>| match late {
            Some((session, Attempt::Taken { version, .. })) => {
                log::debug!(target: "storage_lock", "lock {:?} was taken too late, and is released", owned.lock_id);
                if session.release(&sql, &owned, Some(version)).is_err() {
                    storage.follow_up(Unfinished::new(owned, Some(version), Instant::now()));
                }
            }
            Some((_, Attempt::Busy { .. })) => {}
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
            deadline,
            move || format!("refresh lock {:?}", described.claim.lock_id),
            move || wanted.is_to_be_refreshed(),
            move |session| {
                let sent = Instant::now();
                Ok((sent, session.refresh(&sql, &called.claim, called.version)?))
            },
            move |result: Result<(Instant, bool)>| match result {
                Ok((sent, is_there)) => answered.refreshed(number, sent, Ok(is_there)),
                Err(error) => answered.refreshed(number, Instant::now(), Err(error)),
            },
        );
    }

    /// Releases a hold, within [`RELEASE_TIME`]. If that fails it is followed up until the lease has run out.
    pub(crate) fn release(&self, hold: &Hold) -> Result<()> {
        let deadline = Instant::now() + RELEASE_TIME;
        let mut failures = 0;
        loop {
            match self.release_claim(Urgency::Urgent, deadline, &hold.claim, Some(hold.version)) {
                Ok((true, _)) => return Ok(()),
                // The answer to an earlier try was lost, and the hold has gone since, while nobody but ourselves could
                // end it: it was that try.
                Ok((false, is_repetition)) if (is_repetition || failures > 0) && hold.is_held() => return Ok(()),
                Ok((false, _)) => return Err(hold.lost()),
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

    /// Whether there was something to release, and whether it took more than one try.
    fn release_claim(
        &self,
        urgency: Urgency,
        deadline: Instant,
        claim: &Claim,
        version: Option<i64>,
    ) -> Result<(bool, bool)> {
        let (sql, claim) = (Arc::clone(&self.inner.sql), claim.clone());
        let describe = claim.lock_id.clone();
        let mut is_repetition = false;
        let call = move |session: &mut Session| {
            let was_tried = std::mem::replace(&mut is_repetition, true);
            Ok((session.release(&sql, &claim, version)?, was_tried))
        };
        self.inner.workers.call(urgency, deadline, move || format!("release lock {describe:?}"), call, |_| ())
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
                match storage.release_claim(Urgency::Ordinary, deadline, &unfinished.claim, unfinished.version) {
                    Ok((true, _)) => Outcome::Released,
                    Ok((false, _)) => Outcome::NotThere,
                    Err(error) if error.is_transient() => Outcome::Failed,
                    Err(_) => Outcome::Hopeless,
                }
            });
        };
        if let Err(error) = thread::Builder::new().name("lock-follow-up".to_owned()).spawn(run) {
            self.inner.follow_ups.give_up();
            log::debug!(target: "storage_lock", "cannot start a thread: {error}");
        }
    }
}

/// Acquires, or creates the lock's first hold, on the worker's thread.
fn acquire_on(
    session: &mut Session,
    sql: &Sql,
    claim: &Claim,
    misses: u32,
    deadline: Instant,
) -> Result<Attempt, Fault> {
    let mut missed = 0;
    loop {
        let outcome = match session.acquire(sql, claim)? {
            Acquired::Absent => session.create(sql, claim)?,
            outcome => outcome,
        };
        match outcome {
            Acquired::Taken { version, sent, left, taken_over_from } => {
                if let Some(before) = taken_over_from {
                    let lock_id = &claim.lock_id;
                    log::info!(
                        target: "storage_lock",
                        "lock {lock_id:?} was taken over from {before:?}, whose lease had run out"
                    );
                }
                let term = Term::new(sent, left, claim.lease);
                if term.is_held(Instant::now()) {
                    return Ok(Attempt::Taken { version, term });
                }
                // The answer took longer than the lease: nothing to trust.
                session.release(sql, claim, Some(version))?;
                return Ok(Attempt::Busy { left: None });
            }
            Acquired::Busy { version, owner_id, left } => {
                let lock_id = &claim.lock_id;
                log::debug!(
                    target: "storage_lock",
                    "lock {lock_id:?} is busy: held by {owner_id:?} as version {version}, {left:?} left on the lease"
                );
                return Ok(Attempt::Busy { left: Some(left) });
            }
            Acquired::Missed | Acquired::Absent if missed < misses && Instant::now() < deadline => missed += 1,
            Acquired::Missed | Acquired::Absent => return Ok(Attempt::Busy { left: None }),
        }
    }
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
