//! The settings of a storage: the server, the table and the connections. Imports: as of this module, see [`super`].

use std::fmt;
use std::sync::Arc;

use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::{Config, Socket};
use r2d2_postgres::PostgresConnectionManager;

use super::check_identifier;
use super::dsn::{self, Dsn, HIDDEN};
use crate::db::server::{Connect, Lend, Server, Source, connect_with, lend_from};
use crate::db::tls::connect_as;
use crate::error::{Result, invalid};
use crate::events::{Event, Events};

const MAX_CONNECTIONS: u32 = 1_000;

/// Where and how locks are kept: the server, the table, the connections.
///
/// Nothing is checked or opened before [`PostgresStorage::new`](crate::PostgresStorage::new).
///
/// # Roles
///
/// Three roles are enough: `owner` creates the table, `locker` uses the locks, and `viewer` reads the table.
///
/// ```sql
/// -- As a superuser. How each role logs in is yours to add: a password, for example.
/// CREATE ROLE owner LOGIN;
/// CREATE ROLE locker LOGIN;
/// CREATE ROLE viewer LOGIN;
/// CREATE SCHEMA locks AUTHORIZATION owner;
/// GRANT USAGE ON SCHEMA locks TO locker, viewer;
/// ```
///
/// `owner` creates the table: it opens a storage, or a migration runs
/// [`table_ddl`](crate::PostgresStorage::table_ddl).
///
/// ```sql
/// -- As `owner`, when the table exists.
/// GRANT SELECT, INSERT, UPDATE ON locks.storage_lock TO locker;
/// GRANT SELECT ON locks.storage_lock TO viewer;
/// ```
///
/// `locker` can do everything with locks, but can't create or drop the table. A role whose transactions are fenced
/// needs `USAGE`, `SELECT` and `UPDATE`. A privilege on each column of the table counts as one on the table.
///
/// [`PostgresStorage::new`](crate::PostgresStorage::new) checks the rights of its role. If some are missing,
/// [`Error::Table`](crate::Error::Table) names them all, with the `GRANT` to run. A storage is for locking, so `viewer`
/// can't open one. It reads the table by SQL:
///
/// ```sql
/// -- As `viewer`: the locks that are held, as `PostgresStorage::list` returns them.
/// SELECT lock_id, owner_id, version, lock_begin_time, lease_expire_time,
///        coalesce(cardinality(waiters), 0) AS waiters
/// FROM locks.storage_lock
/// WHERE released_at IS NULL AND lease_expire_time > clock_timestamp()
/// ORDER BY lock_id;
/// ```
#[derive(Clone)]
pub struct PostgresStorageOptions {
    server: ServerOptions,
    pub(crate) schema: String,
    pub(crate) table_name: String,
    pub(crate) create_table: bool,
    pub(crate) max_connections: u32,
    pub(crate) events: Events,
}

/// How the server was named.
#[derive(Clone)]
enum ServerOptions {
    /// The parsed DSN, or a text that says what a valid one looks like.
    Dsn(Result<Box<Dsn>, String>),
    Config(Box<Config>, Connect),
    Source(Source, Connect),
    /// The pool, and what opens the connection that listens.
    Pool(Lend, Option<Box<PostgresStorageOptions>>),
}

impl PostgresStorageOptions {
    /// The server, as anything that [`postgres::Config`] parses: `host=db user=app password=secret dbname=app` or
    /// `postgresql://app:secret@db/app`. Several hosts are allowed.
    ///
    /// Defaults for what the DSN leaves out: `connect_timeout` is 5 s for each address, `tcp_user_timeout` is 15 s, and
    /// keep-alives start after 15 s. So a connection whose other side has gone is given up.
    ///
    /// Of several hosts, the first one that can be written to is used. A standby is recognised, and the next host is
    /// tried. `target_session_attrs=read-only` is refused.
    ///
    /// # TLS
    ///
    /// With the Cargo feature `tls`, these options mean what they mean to libpq: `sslmode` (`disable`, `allow`,
    /// `prefer`, which is the default, `require`, `verify-ca`, `verify-full`), `sslrootcert` (a file, or `system`),
    /// `sslcert`, `sslkey`, `sslsni`, `sslnegotiation`, `channel_binding`; and so do the files `root.crt`,
    /// `postgresql.crt` and `postgresql.key` in `~/.postgresql`. The files are read again for each connection.
    /// **Only `verify-full` keeps out somebody between you and the server.** Without the feature there is no TLS: then
    /// `prefer` and `allow` connect without, and the others are refused.
    ///
    /// Environment variables (`PGHOST` and so on), service files and password files are not read.
    pub fn from_dsn(dsn: &str) -> Self {
        Self::new(ServerOptions::Dsn(dsn::parse(dsn).map(Box::new)))
    }

    /// The server, as a configuration of the driver's, and a TLS connector of your own: `postgres_openssl`,
    /// `postgres_native_tls`, one for rustls, or `postgres::NoTls`.
    ///
    /// The defaults of [`from_dsn`](Self::from_dsn) are filled in where the configuration has none.
    pub fn from_config<T>(config: Config, tls: T) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        Self::new(ServerOptions::Config(Box::new(config), connect_with(tls)))
    }

    /// The same with credentials that change: `config` is asked before each connection, for example for a password
    /// that is a token of fifteen minutes.
    ///
    /// It runs on a thread of the library, and should not take longer than a second or two: what needs a connection
    /// waits for it. If it fails, so does the attempt to connect, with its error as the cause, and the attempt is
    /// repeated as any other. So is one with a configuration that can't be used. A lock that is held survives that for
    /// as long as its lease.
    ///
    /// ```no_run
    /// # fn token() -> std::io::Result<String> { Ok(String::new()) }
    /// use postgres::{Config, NoTls};
    /// use storage_lock::{PostgresStorage, PostgresStorageOptions};
    ///
    /// let options = PostgresStorageOptions::from_config_with(
    ///     || {
    ///         let mut config = Config::new();
    ///         config.host("db.example").user("app").dbname("app").password(token()?);
    ///         Ok::<_, std::io::Error>(config)
    ///     },
    ///     NoTls,
    /// );
    /// let storage = PostgresStorage::new(options)?;
    /// # Ok::<_, storage_lock::Error>(())
    /// ```
    pub fn from_config_with<T, E>(config: impl Fn() -> Result<Config, E> + Send + Sync + 'static, tls: T) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        let source: Source = Arc::new(move || Ok(dsn::checked("config", config().map_err(Into::into)?)?));
        Self::new(ServerOptions::Source(source, connect_with(tls)))
    }

    /// A pool of yours, from which each call takes one connection, for as long as the call lasts.
    ///
    /// No statement is prepared on a connection, and none of its settings are changed, so that it may go through a
    /// pooler as well. What the library asks of you:
    /// - Give connections back outside of a transaction: a call on one that is within a transaction is a part of it.
    /// - Let no schema come before `pg_catalog` in their search path, and leave the default isolation level at
    ///   `READ COMMITTED`.
    /// - Leave r2d2's `test_on_check_out` on, or expect an error after the server ended idle connections. It costs one
    ///   round trip a call.
    /// - Keep a connection free while you call [`unlock_in`](crate::LockGuard::unlock_in) on one of the pool's: after
    ///   a rollback the library asks the database for the hold.
    ///
    /// `max_connections` is how many connections are taken from the pool simultaneously, those of calls that are late
    /// included: let the pool have more. A pool that stays empty delays a call for 5 s, and then fails it. A hold whose
    /// refreshes find no connection is lost at its deadline, which is told as any loss. A connection that is silent
    /// counts for as long as it is: set `tcp_user_timeout` where you configure the pool.
    ///
    /// A call costs several times as much as on a connection of the library's own, because a thread takes it from the
    /// pool.
    ///
    /// Processes that wait for each other poll, because listening needs a connection of its own; with
    /// [`listen_with`](Self::listen_with) they are notified.
    ///
    /// ```no_run
    /// use postgres::NoTls;
    /// use r2d2_postgres::PostgresConnectionManager;
    /// use storage_lock::{PostgresStorage, PostgresStorageOptions};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let manager = PostgresConnectionManager::new("host=db user=app".parse()?, NoTls);
    /// let pool = r2d2::Pool::new(manager)?;
    /// let storage = PostgresStorage::new(PostgresStorageOptions::from_pool(pool))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_pool<T>(pool: r2d2::Pool<PostgresConnectionManager<T>>) -> Self
    where
        T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
        T::TlsConnect: Send,
        T::Stream: Send,
        <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
    {
        Self::new(ServerOptions::Pool(lend_from(pool), None))
    }

    /// With [`from_pool`](Self::from_pool): the server, as these other options have it, for one more connection, which
    /// listens for releases while threads wait. Default: none, and waiting polls. Of the other options only the server
    /// counts. Without a pool it is ignored.
    #[must_use]
    pub fn listen_with(mut self, server: PostgresStorageOptions) -> Self {
        if let ServerOptions::Pool(_, listening) = &mut self.server {
            *listening = Some(Box::new(server));
        }
        self
    }

    fn new(server: ServerOptions) -> Self {
        PostgresStorageOptions {
            server,
            schema: "public".to_owned(),
            table_name: "storage_lock".to_owned(),
            create_table: true,
            max_connections: 4,
            events: Events::default(),
        }
    }

    /// The schema of the table. Default `public`. It must exist; 1 to 63 bytes, any characters but NUL.
    #[must_use]
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }

    /// The table. Default `storage_lock`. 1 to 63 bytes, any characters but NUL.
    #[must_use]
    pub fn table_name(mut self, table_name: impl Into<String>) -> Self {
        self.table_name = table_name.into();
        self
    }

    /// Whether to create the table if it is missing. Default true. With false, the library runs no DDL: use
    /// [`PostgresStorage::table_ddl`](crate::PostgresStorage::table_ddl) in a migration.
    #[must_use]
    pub fn create_table(mut self, create_table: bool) -> Self {
        self.create_table = create_table;
        self
    }

    /// How many connections there may be. Default 4, from 1 to 1,000. Each is opened when it is first needed, and
    /// closed when its thread had nothing to do for a minute. With two or more, one is kept free for refreshes and
    /// releases. One more listens for releases while threads wait for other processes, and another one is open while
    /// [`list`](crate::PostgresStorage::list) reads.
    ///
    /// If the server lets fewer in, the connections that are open do the work, and a warning says so.
    ///
    /// A connection whose call gets no answer in time no longer counts, and is replaced. Without any answer in between,
    /// that happens up to eight times immediately, and then once in half a minute, up to 64 times. Beyond 64 in all, it
    /// happens once in half a minute. If the connection answers after all, it is used again.
    #[must_use]
    pub fn max_connections(mut self, max_connections: u32) -> Self {
        self.max_connections = max_connections;
        self
    }

    /// The callback for everything that happens to a lock of this storage: see [`Event`]. Default: nothing, at no cost.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicU64, Ordering};
    /// use storage_lock::{Event, PostgresStorageOptions};
    ///
    /// let takeovers = Arc::new(AtomicU64::new(0));
    /// let counter = Arc::clone(&takeovers);
    /// let options = PostgresStorageOptions::from_dsn("host=db user=app").on_event(move |event| match event {
    ///     Event::Acquired { is_takeover: true, .. } => drop(counter.fetch_add(1, Ordering::Relaxed)),
    ///     Event::Lost { lock_id, version, .. } => eprintln!("lost {lock_id} as version {version}"),
    ///     _ => {}
    /// });
    /// ```
    ///
    /// Example `prometheus` turns all of them into metrics.
    ///
    /// The callback runs on the thread on which the event happens, and on several threads simultaneously. That thread
    /// is a caller's, before its call returns; or one that refreshes a lease; or one that has opened a connection.
    ///
    /// So the callback has to be quick: count, or send the event elsewhere. A slow callback delays its thread, and the
    /// threads of the process that wait for the same lock. If it delays a refresh for too long, the hold is lost.
    ///
    /// The library holds no mutex during the call, and the callback may use the storage. It must not wait for a lock,
    /// because its thread may be the one to release that lock. What it does to locks causes events, too. If it panics,
    /// the library logs a warning, and everything goes on. If it keeps a clone of the storage, or one of its locks or
    /// guards, the storage is never closed.
    #[must_use]
    pub fn on_event(mut self, on_event: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        self.events = Events::to(on_event);
        self
    }

    /// Checks every option. Returns the server, with the defaults of its configuration filled in.
    pub(crate) fn checked_server(&self) -> Result<Server> {
        check_identifier("schema", &self.schema)?;
        check_identifier("table_name", &self.table_name)?;
        if !(1..=MAX_CONNECTIONS).contains(&self.max_connections) {
            return Err(invalid("max_connections", self.max_connections, format!("1 to {MAX_CONNECTIONS}")));
        }
        self.server()
    }

    fn server(&self) -> Result<Server> {
        let (config, connect) = match &self.server {
            ServerOptions::Dsn(Err(expected)) => return Err(invalid("dsn", HIDDEN, expected)),
            ServerOptions::Dsn(Ok(dsn)) => (dsn::checked("dsn", dsn.config.clone())?, connect_as(dsn.tls.clone())),
            ServerOptions::Config(config, connect) => {
                (dsn::checked("config", config.as_ref().clone())?, Arc::clone(connect))
            }
            ServerOptions::Source(source, connect) => {
                // It is asked when there is a connection to be made, and not before.
                let (source, connect, connect_timeout) =
                    (Arc::clone(source), Arc::clone(connect), dsn::DEFAULT_CONNECT_TIMEOUT);
                return Ok(Server { pool: None, listening: None, source, connect, connect_timeout, hosts: 1 });
            }
            ServerOptions::Pool(lend, listening) => {
                let listening = listening.as_ref().map(|options| options.server()).transpose()?;
                return Ok(Server::of_pool(lend, listening));
            }
        };
        let connect_timeout = config.get_connect_timeout().copied().unwrap_or(dsn::DEFAULT_CONNECT_TIMEOUT);
        let hosts = config.get_hosts().len().max(config.get_hostaddrs().len());
        let source: Source = Arc::new(move || Ok(config.clone()));
        Ok(Server { pool: None, listening: None, source, connect, connect_timeout, hosts })
    }

    /// The configuration of the next connection.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn checked_config(&self) -> Result<Config> {
        self.checked_server()?.config()
    }
}

impl fmt::Debug for PostgresStorageOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `postgres::Config` hides its password, but a mistake in the DSN can put the password into another value.
        f.debug_struct("PostgresStorageOptions")
            .field("dsn", &format_args!("{HIDDEN}"))
            .field("schema", &self.schema)
            .field("table_name", &self.table_name)
            .field("create_table", &self.create_table)
            .field("max_connections", &self.max_connections)
            .field("on_event", &self.events)
            .finish()
    }
}
