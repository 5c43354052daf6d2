//! The settings of a storage: the server, the table and the connections. Imports: as of this module, see [`super`].

use std::fmt;

use postgres::Config;

use super::check_identifier;
use super::dsn::{self, HIDDEN};
use crate::error::{Result, invalid};
use crate::events::{Event, Events};

const MAX_CONNECTIONS: u32 = 1_000;

/// Where and how locks are kept: the server, the table, the connections.
///
/// Nothing is checked or opened before [`PostgresStorage::new`](crate::PostgresStorage::new).
#[derive(Clone)]
pub struct PostgresStorageOptions {
    /// The parsed DSN, or a text that says what a valid one looks like.
    config: Result<Config, String>,
    pub(crate) schema: String,
    pub(crate) table_name: String,
    pub(crate) create_table: bool,
    pub(crate) max_connections: u32,
    pub(crate) events: Events,
}

impl PostgresStorageOptions {
    /// The server, as anything that [`postgres::Config`] parses: `host=db user=app password=secret dbname=app` or
    /// `postgresql://app:secret@db/app`. Several hosts are allowed.
    ///
    /// Defaults for what the DSN leaves out: `connect_timeout` is 5 s for each address, `tcp_user_timeout` is 15 s, and
    /// keep-alives start after 15 s. So a connection whose other side has gone is given up. TLS is not supported yet:
    /// `sslmode` must not be `require`.
    pub fn from_dsn(dsn: &str) -> Self {
        PostgresStorageOptions {
            config: dsn::parse(dsn),
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

    /// Checks every option. Returns where to connect, with the defaults filled in.
    pub(crate) fn checked_config(&self) -> Result<Config> {
        check_identifier("schema", &self.schema)?;
        check_identifier("table_name", &self.table_name)?;
        if !(1..=MAX_CONNECTIONS).contains(&self.max_connections) {
            return Err(invalid("max_connections", self.max_connections, format!("1 to {MAX_CONNECTIONS}")));
        }
        dsn::checked(&self.config)
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
