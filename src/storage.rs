//! An open storage: the table on its server, and every operation on it, each with a deadline.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::connections::Connections;
use crate::error::{Error, Result};
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
/// How many unfinished acquires and releases are followed up at once; beyond that, their leases run out by themselves.
const MAX_FOLLOW_UPS: usize = 16;

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
    follow_ups: AtomicUsize,
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
                sql: Arc::new(Sql::new(&options)),
                schema: options.schema,
                table_name: options.table_name,
                workers: Workers::new(connections, max_connections),
                holds: Holds::default(),
                follow_ups: AtomicUsize::new(0),
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
            session.create_table(sql)?;
            log::info!(target: "storage_lock", "created table {}", sql.table);
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

    /// Tries to take the lock once, repeating after `misses` at most. No claim may be made twice: one whose outcome is not
    /// known to the caller is released behind its back.
    pub(crate) fn acquire(&self, claim: &Claim, misses: u32, deadline: Instant) -> Result<Attempt> {
        let (sql, owned) = (Arc::clone(&self.inner.sql), claim.clone());
        let describe = claim.lock_id.clone();
        let call = move |session: &mut Session| {
            let mut missed = 0;
            loop {
                let outcome = match session.acquire(&sql, &owned)? {
                    Acquired::Absent => session.create(&sql, &owned)?,
                    outcome => outcome,
                };
                match outcome {
                    Acquired::Taken { version, sent, left, taken_over_from } => {
                        if let Some(before) = taken_over_from {
                            log::info!(
                                target: "storage_lock",
                                "lock {:?} was taken over from {before:?}, whose lease had run out", owned.lock_id
                            );
                        }
                        let term = Term::new(sent, left, owned.lease);
                        if term.is_held(Instant::now()) {
                            return Ok(Attempt::Taken { version, term });
                        }
                        // The answer took longer than the lease: nothing to trust.
                        session.release(&sql, &owned, Some(version))?;
                        return Ok(Attempt::Busy { left: None });
                    }
                    Acquired::Busy { version, owner_id, left } => {
                        log::debug!(
                            target: "storage_lock",
                            "lock {:?} is busy: held by {owner_id:?} as version {version}, {left:?} left on the lease",
                            owned.lock_id
                        );
                        return Ok(Attempt::Busy { left: Some(left) });
                    }
                    Acquired::Missed | Acquired::Absent if missed < misses => missed += 1,
                    Acquired::Missed | Acquired::Absent => return Ok(Attempt::Busy { left: None }),
                }
            }
        };
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let unfinished = move |late: Option<(&mut Session, Attempt)>| match late {
            Some((session, Attempt::Taken { version, .. })) => {
                log::debug!(target: "storage_lock", "lock {:?} was taken too late, and is released", owned.lock_id);
                if session.release(&sql, &owned, Some(version)).is_err() {
                    session.mark_broken();
                    storage.follow_up(owned);
                }
            }
            Some((_, Attempt::Busy { .. })) => {}
            None => storage.follow_up(owned),
        };
        let action = move || format!("acquire lock {describe:?}");
        self.inner.workers.call(Urgency::Ordinary, deadline, action, call, unfinished)
    }

    /// Sends a refresh, and hands `done` the instant at which it was sent and whether the hold was there.
    pub(crate) fn send_refresh(
        &self,
        hold: &Arc<Hold>,
        deadline: Instant,
        done: impl Fn(&Hold, Instant, Result<bool>) + Send + 'static,
    ) {
        let (sql, called, wanted, answered) =
            (Arc::clone(&self.inner.sql), Arc::clone(hold), Arc::clone(hold), Arc::clone(hold));
        let describe = Arc::clone(hold);
        self.inner.workers.send(
            deadline,
            move || format!("refresh lock {:?}", describe.claim.lock_id),
            move || wanted.state().guards > 0,
            move |session| {
                let sent = Instant::now();
                Ok((sent, session.refresh(&sql, &called.claim, called.version)?))
            },
            move |result: Result<(Instant, bool)>| match result {
                Ok((sent, is_there)) => done(&answered, sent, Ok(is_there)),
                Err(error) => done(&answered, Instant::now(), Err(error)),
            },
        );
    }

    /// Releases a hold, within [`RELEASE_TIME`]. If that fails it is followed up until the lease has run out.
    pub(crate) fn release(&self, hold: &Hold) -> Result<()> {
        let deadline = Instant::now() + RELEASE_TIME;
        let mut failures = 0;
        loop {
            let (sql, claim, version) = (Arc::clone(&self.inner.sql), hold.claim.clone(), hold.version);
            let describe = claim.lock_id.clone();
            let result = self.inner.workers.call(
                Urgency::Urgent,
                deadline,
                move || format!("release lock {describe:?}"),
                move |session| session.release(&sql, &claim, Some(version)),
                |_| (),
            );
            failures += 1;
            let pause = backoff(failures);
            match result {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(hold.lost()),
                Err(error) if error.is_transient() && Instant::now() + pause < deadline => thread::sleep(pause),
                Err(error) => {
                    self.follow_up(hold.claim.clone());
                    return Err(error);
                }
            }
        }
    }

    /// Releases in the background what a claim may have taken, or may not have given back, until it is done or the lease
    /// has run out by itself.
    fn follow_up(&self, claim: Claim) {
        if self.inner.follow_ups.fetch_add(1, Ordering::Relaxed) >= MAX_FOLLOW_UPS {
            self.inner.follow_ups.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let storage = self.clone();
        let follow_up = move || {
            let end = Instant::now() + claim.lease;
            let mut failures = 0;
            while Instant::now() < end {
                let (sql, claim) = (Arc::clone(&storage.inner.sql), claim.clone());
                let describe = claim.lock_id.clone();
                let result = storage.inner.workers.call(
                    Urgency::Urgent,
                    end,
                    move || format!("follow up on lock {describe:?}"),
                    move |session| session.release(&sql, &claim, None),
                    |_| (),
                );
                match result {
                    Ok(_) => break,
                    Err(error) => log::debug!(target: "storage_lock", "{error}"),
                }
                failures += 1;
                thread::sleep(backoff(failures));
            }
            storage.inner.follow_ups.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new().name("lock-follow-up".to_owned()).spawn(follow_up) {
            self.inner.follow_ups.fetch_sub(1, Ordering::Relaxed);
            log::debug!(target: "storage_lock", "cannot start a thread: {error}");
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
