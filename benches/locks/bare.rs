//! The yardstick: the library's own acquire and release, prepared on one bare client, and nothing around them.

use std::time::{Duration, SystemTime};

use postgres::types::{ToSql, Type};
use postgres::{Client, Config, NoTls, Row, Statement};
use storage_lock::{PostgresStorage, StorageLock};
use uuid::Uuid;

use crate::server::{Table, lock_and_unlock};
use crate::sql::{self, Sql};

/// As long as the library's default.
const LEASE_MICROS: i64 = 30_000_000;
/// The check of the session is for poolers, and NULL passes it.
const NO_PLACE: Option<String> = None;
/// Nobody else is there.
const WAITS_AGAIN: bool = false;
const NO_TURN: Option<i64> = None;
/// Longer than any benchmark takes.
const CLAIM_TIME: Duration = Duration::from_secs(24 * 60 * 60);

type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// What the parameters are made of.
struct Claim {
    lock_id: String,
    owner_id: String,
    lease_id: Uuid,
    version: Option<i64>,
    waiter: Uuid,
    expires: SystemTime,
}

impl Claim {
    // The parameters in the order of `src/db/sql/`, and with the types that stand there.

    fn acquire_parameters(&self) -> [Parameter<'_>; 8] {
        [
            (&self.lock_id, Type::TEXT),
            (&self.owner_id, Type::TEXT),
            (&self.lease_id, Type::UUID),
            (&LEASE_MICROS, Type::INT8),
            (&NO_PLACE, Type::TEXT),
            (&self.waiter, Type::UUID),
            (&NO_TURN, Type::INT8),
            (&self.expires, Type::TIMESTAMPTZ),
        ]
    }

    fn release_parameters(&self) -> [Parameter<'_>; 6] {
        [
            (&self.lock_id, Type::TEXT),
            (&self.version, Type::INT8),
            (&self.lease_id, Type::UUID),
            (&NO_PLACE, Type::TEXT),
            (&self.waiter, Type::UUID),
            (&WAITS_AGAIN, Type::BOOL),
        ]
    }
}

/// A client that takes one lock and releases it, again and again.
pub struct Bare {
    client: Client,
    acquire: Statement,
    release: Statement,
    claim: Claim,
}

impl Bare {
    /// The lock has its row already when this returns: the library made it.
    pub fn new(table: &Table, storage: &PostgresStorage, lock_id: &str) -> Bare {
        lock_and_unlock(&StorageLock::new(storage, lock_id).expect("make a lock"), "creator");
        let sql = Sql::new("public", &table.name);
        let mut client = connect(table);
        let claim = Claim {
            lock_id: lock_id.to_owned(),
            owner_id: "bare".to_owned(),
            lease_id: Uuid::new_v4(),
            version: None,
            waiter: Uuid::new_v4(),
            expires: storage.server_time().expect("read the server's time") + CLAIM_TIME,
        };
        let acquire = prepare(&mut client, &sql.acquire.text, &claim.acquire_parameters());
        let release = prepare(&mut client, &sql.release.text, &claim.release_parameters());
        Bare { client, acquire, release, claim }
    }

    pub fn acquire(&mut self) {
        // A claim is made once.
        self.claim.lease_id = Uuid::new_v4();
        let row = run(&mut self.client, &self.acquire, &self.claim.acquire_parameters());
        self.claim.version = row.get(1);
        assert!(self.claim.version.is_some(), "a bare client found its own lock busy");
    }

    pub fn release(&mut self) {
        let row = run(&mut self.client, &self.release, &self.claim.release_parameters());
        assert!(row.get::<_, Option<i32>>(1).is_some(), "a bare client's hold was lost");
    }

    pub fn acquire_and_release(&mut self) {
        self.acquire();
        self.release();
    }
}

/// A connection with the options that the library's own have.
pub fn connect(table: &Table) -> Client {
    let mut config: Config = table.dsn.parse().expect("a DSN");
    let options = [config.get_options().unwrap_or_default(), sql::SESSION_OPTIONS].join(" ");
    config.options(&options).connect(NoTls).expect("connect to the server")
}

fn prepare(client: &mut Client, text: &str, parameters: &[Parameter<'_>]) -> Statement {
    let types: Vec<Type> = parameters.iter().map(|(_, type_)| type_.clone()).collect();
    client.prepare_typed(text, &types).expect("prepare")
}

fn run(client: &mut Client, statement: &Statement, parameters: &[Parameter<'_>]) -> Row {
    let values: Vec<&(dyn ToSql + Sync)> = parameters.iter().map(|(value, _)| *value).collect();
    client.query_one(statement, &values).expect("run a statement")
}
