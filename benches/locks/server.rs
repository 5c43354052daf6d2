//! The server: tables and roles of a benchmark's own, and what the server says of them.

use std::collections::BTreeMap;

use postgres::{Client, NoTls};
use storage_lock::{PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

use crate::context::Context;

pub fn connect(dsn: &str) -> Client {
    Client::connect(dsn, NoTls).expect("connect to the server")
}

/// A table of locks of a benchmark's own, dropped at its end.
pub struct Table {
    pub dsn: String,
    pub name: String,
    is_owned: bool,
}

impl Table {
    pub fn new(context: &Context) -> Table {
        Table { dsn: context.dsn.clone(), name: unique_name(), is_owned: true }
    }

    /// Another process's table.
    pub fn of(dsn: &str, name: &str) -> Table {
        Table { dsn: dsn.to_owned(), name: name.to_owned(), is_owned: false }
    }

    pub fn storage(&self) -> PostgresStorage {
        self.open(|options| options)
    }

    pub fn storage_of(&self, max_connections: u32) -> PostgresStorage {
        self.open(|options| options.max_connections(max_connections))
    }

    /// One whose connections have these options.
    pub fn storage_with(&self, options: &str) -> PostgresStorage {
        let options = PostgresStorageOptions::from_dsn(&format!("{} {options}", self.dsn)).table_name(&self.name);
        PostgresStorage::new(options).expect("open the storage")
    }

    fn open(&self, change: impl FnOnce(PostgresStorageOptions) -> PostgresStorageOptions) -> PostgresStorage {
        // Without TLS, as the yardsticks.
        let dsn = format!("{} sslmode=disable", self.dsn);
        let options = PostgresStorageOptions::from_dsn(&dsn).table_name(&self.name);
        PostgresStorage::new(change(options)).expect("open the storage")
    }

    pub fn client(&self) -> Client {
        connect(&self.dsn)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        if self.is_owned
            && let Ok(mut client) = Client::connect(&self.dsn, NoTls)
        {
            client.batch_execute(&format!("DROP TABLE IF EXISTS {}", self.name)).ok();
        }
    }
}

pub fn unique_name() -> String {
    format!("bench_{}", Uuid::new_v4().simple())
}

/// What most benchmarks repeat. An unlock that fails was a lost hold.
pub fn lock_and_unlock(lock: &StorageLock, owner_id: &str) {
    let guard = lock.lock(owner_id).expect("lock");
    guard.unlock().expect("unlock");
}

/// A role of a child's own, so that what it does can be told from all the rest. Dropped at the end, with its sessions.
pub struct Role {
    pub dsn: String,
    name: String,
    client: Client,
}

impl Role {
    pub fn new(table: &Table) -> Role {
        let (name, password) = (unique_name(), Uuid::new_v4().simple().to_string());
        let mut client = table.client();
        client
            .batch_execute(&format!(
                "CREATE ROLE {name} LOGIN PASSWORD '{password}'; GRANT SELECT, INSERT, UPDATE ON {} TO {name}",
                table.name
            ))
            .expect("create a role");
        Role { dsn: with_user(&table.dsn, &name, &password), name, client }
    }

    pub fn connections(&mut self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1";
        self.client.query_one(sql, &[&self.name]).expect("count connections").get(0)
    }

    /// The statements of this role so far; none if the server doesn't count them.
    pub fn statements(&mut self) -> Option<Statements> {
        let sql =
            "SELECT query, calls FROM pg_stat_statements s JOIN pg_roles r ON r.oid = s.userid WHERE rolname = $1";
        let mut calls = BTreeMap::new();
        for row in self.client.query(sql, &[&self.name]).ok()? {
            let text = row.get::<_, String>(0).split_whitespace().collect::<Vec<_>>().join(" ");
            *calls.entry(text.chars().take(60).collect()).or_insert(0) += row.get::<_, i64>(1);
        }
        Some(Statements { calls })
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let name = &self.name;
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1";
        self.client.execute(sql, &[name]).ok();
        self.client.batch_execute(&format!("DROP OWNED BY {name}; DROP ROLE {name}")).ok();
    }
}

/// Calls by the first characters of a statement.
pub struct Statements {
    calls: BTreeMap<String, i64>,
}

pub const NO_STATEMENTS: &str = "not available: needs pg_stat_statements";

impl Statements {
    /// Those that came since.
    pub fn since(mut self, before: &Statements) -> Statements {
        for (text, calls) in &mut self.calls {
            *calls -= before.calls.get(text).copied().unwrap_or(0);
        }
        self.calls.retain(|_, calls| *calls > 0);
        self
    }

    pub fn total(&self) -> i64 {
        self.calls.values().sum()
    }

    pub fn notes(&self) -> impl Iterator<Item = String> {
        self.calls.iter().map(|(text, calls)| format!("{calls} × {text}"))
    }

    pub fn rows(&self) -> impl Iterator<Item = Vec<String>> {
        self.calls.iter().map(|(text, calls)| vec![text.clone(), calls.to_string()])
    }
}

/// The view of `pg_stat_statements`, for as long as it is needed, if the server has it.
pub struct StatementsView {
    client: Client,
    is_ours: bool,
}

impl StatementsView {
    pub fn new(context: &Context) -> StatementsView {
        let mut client = connect(&context.dsn);
        let sql = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_stat_statements')";
        let is_there: bool = client.query_one(sql, &[]).expect("look for the extension").get(0);
        // Without the server's library it fails, here or when it is asked.
        let is_ours = !is_there && client.batch_execute("CREATE EXTENSION pg_stat_statements").is_ok();
        StatementsView { client, is_ours }
    }
}

impl Drop for StatementsView {
    fn drop(&mut self) {
        if self.is_ours {
            self.client.batch_execute("DROP EXTENSION pg_stat_statements").ok();
        }
    }
}

/// The same DSN with another user: of an option that is given twice, the later one counts.
fn with_user(dsn: &str, user: &str, password: &str) -> String {
    if dsn.starts_with("postgres://") || dsn.starts_with("postgresql://") {
        format!("{dsn}{}user={user}&password={password}", if dsn.contains('?') { '&' } else { '?' })
    } else {
        format!("{dsn} user={user} password={password}")
    }
}
