//! An open storage: the table on its server, and every operation on that table.
//!
//! Invariants:
//! - Every operation has a deadline.
//! - In a forked process no operation locks a mutex: a thread that the child doesn't have may hold it.
//!
//! This module may use `wait`, `options`, `hold`, `db`, and the modules below them.

pub(crate) mod acquire;
pub(crate) mod clean_up;
mod list;
pub(crate) mod refresh;
mod release;
mod table;

use std::fmt;
use std::process;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::db::answer::{Fault, LockInformation, RowWaiter};
use crate::db::connections::Connections;
use crate::db::health::Health;
use crate::db::session::Session;
use crate::db::sql::Sql;
use crate::db::workers::{Tries, Urgency, Workers};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::options::{PostgresStorageOptions, check_id};
use crate::storage::clean_up::CleanUps;
use crate::storage::list::Lists;
use crate::sync::Instant;
use crate::wait::listener::Listener;
use crate::wait::queue::WaitQueues;

/// The longest that a call waits for its answer where its caller sets no limit. Opening a connection comes on top.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// An open storage for locks: a table on a PostgreSQL server, and a few connections to it.
///
/// Cloning is cheap. All clones share the connections, and the knowledge of which thread holds which lock.
#[derive(Clone)]
pub struct PostgresStorage {
    inner: Arc<Inner>,
}

struct Inner {
    /// The process that opened the storage.
    process: u32,
    sql: Arc<Sql>,
    schema: String,
    table_name: String,
    workers: Workers,
    health: Arc<Health>,
    queues: Arc<WaitQueues>,
    listener: Arc<Listener>,
    lists: Arc<Lists>,
    clean_ups: CleanUps,
    events: Events,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // In a forked process, a thread that the process doesn't have may hold the listener's mutex.
        if self.process == process::id() {
            self.listener.close();
        }
    }
}

impl PostgresStorage {
    /// Opens a storage: connects, creates the table if it is missing, and checks that the table is ours and that the
    /// role may use it. [`create_table(false)`](PostgresStorageOptions::create_table) skips the creation.
    ///
    /// Blocks for at most the connect timeout, for each look-up of a host name and for each address, plus 5 s.
    ///
    /// # Errors
    /// - [`Error::InvalidOption`], before anything is opened;
    /// - [`Error::Connect`] and [`Error::Timeout`];
    /// - [`Error::Table`] if the schema or the table is missing, or the table isn't ours or can't keep locks, or the
    ///   role has no right to use it: see [`PostgresStorageOptions`] for the roles;
    /// - [`Error::Database`] if the table can't be created, for example without `CREATE` on the schema.
    pub fn new(options: PostgresStorageOptions) -> Result<PostgresStorage> {
        let server = options.checked_server()?;
        let sql = Arc::new(Sql::new(&options.schema, &options.table_name));
        let connections = Connections::new(server, options.events.clone());
        let health = Arc::new(Health::new("refreshes succeed again"));
        let storage = PostgresStorage {
            inner: Arc::new(Inner {
                process: process::id(),
                sql,
                schema: options.schema,
                table_name: options.table_name,
                workers: Workers::new(connections, options.max_connections, Arc::clone(&health)),
                queues: Arc::new(WaitQueues::new(Arc::clone(&health))),
                health,
                listener: Arc::new(Listener::new()),
                lists: Arc::default(),
                clean_ups: CleanUps::default(),
                events: options.events,
            }),
        };
        storage.prepare_table(options.create_table)?;
        Ok(storage)
    }

    /// Opens a storage with the defaults: the table `public.storage_lock` in the database that the DSN names.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn connect(dsn: &str) -> Result<PostgresStorage> {
        PostgresStorage::new(PostgresStorageOptions::from_dsn(dsn))
    }

    /// The newest hold of a lock, even if that hold is over; `None` if nobody has ever held the lock.
    ///
    /// Blocks for at most the connect timeout, for each address, plus 5 s.
    ///
    /// # Errors
    /// [`Error::InvalidOption`], [`Error::Connect`], [`Error::Timeout`], [`Error::Database`], [`Error::Thread`], and
    /// [`Error::Forked`] in a process that was forked.
    pub fn get(&self, lock_id: &str) -> Result<Option<LockInformation>> {
        check_id("lock_id", lock_id)?;
        let (describe, lock_id) = (format!("read lock {lock_id:?}"), lock_id.to_owned());
        self.read(describe, move |session, sql| session.get(sql, &lock_id))
    }

    /// The time by the database's clock. That clock alone decides when a lease runs out.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn server_time(&self) -> Result<SystemTime> {
        self.read("read the server's time".to_owned(), |session, _| session.server_time())
    }

    pub(crate) fn read<T: Send + 'static>(
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

    /// The longest that a call may take where its caller sets no limit.
    pub(crate) fn longest_call(&self) -> Duration {
        self.inner.workers.longest_call(ANSWER_TIME)
    }

    pub(crate) fn schema(&self) -> &str {
        &self.inner.schema
    }

    pub(crate) fn sql(&self) -> &Sql {
        &self.inner.sql
    }

    /// Whether this process is a fork, which has none of the storage's threads.
    pub(crate) fn is_forked(&self) -> bool {
        self.inner.process != process::id()
    }

    /// # Errors
    /// [`Error::Forked`]: then lock no mutex, because a thread that this process doesn't have may hold it.
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.is_forked() { Err(Error::Forked) } else { Ok(()) }
    }

    pub(crate) fn events(&self) -> &Events {
        &self.inner.events
    }

    pub(crate) fn health(&self) -> &Health {
        &self.inner.health
    }

    pub(crate) fn queues(&self) -> &WaitQueues {
        &self.inner.queues
    }

    /// A refresh has had no answer for as long as `silence`: its connection may be stuck.
    pub(crate) fn refresh_was_silent(&self, silence: Duration) {
        self.inner.workers.refresh_was_silent(silence);
    }

    /// Starts workers if they are needed, for a thread that waits for a call that it only sent.
    pub(crate) fn add_workers(&self) {
        self.inner.workers.add_workers();
    }

    /// Whether releases are notified to this process.
    pub(crate) fn is_listening(&self) -> bool {
        self.inner.listener.is_listening()
    }

    /// This process as a waiter in a row. Those before it were notified that the lock is free in `notified_version`.
    pub(crate) fn row_waiter(&self, notified_version: Option<i64>) -> RowWaiter {
        RowWaiter { id: self.inner.listener.waiter, notified_version }
    }

    /// Starts to listen for releases, if that is possible. Called when a thread waits for another process.
    pub(crate) fn listen(&self) {
        let inner = &*self.inner;
        inner.listener.start(&inner.queues, inner.workers.connections(), &inner.health);
    }
}

impl fmt::Debug for PostgresStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStorage").field("table", &self.inner.sql.table).finish_non_exhaustive()
    }
}
