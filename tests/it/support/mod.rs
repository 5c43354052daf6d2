//! What the tests share. Helpers are named after the fact that they check or the thing that they are.

pub mod child;
pub mod proxy;
pub mod server;

use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use storage_lock::{LockGuard, LockOptions, PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

/// The server that the tests run against.
pub fn dsn() -> String {
    std::env::var("STORAGE_LOCK_POSTGRESQL_DSN")
        .expect("STORAGE_LOCK_POSTGRESQL_DSN is not set: run scripts/with-postgres.sh cargo test")
}

/// A connection of the test's own.
pub fn client() -> Client {
    Client::connect(&dsn(), NoTls).expect("connect to the test server")
}

pub const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A table of the test's own, dropped at its end.
pub struct Table {
    pub dsn: String,
    pub name: String,
    is_owned: bool,
}

impl Table {
    pub fn new() -> Table {
        Table::on(&dsn())
    }

    pub fn on(dsn: &str) -> Table {
        // RUST_LOG=storage_lock=debug shows what the library did.
        env_logger::try_init().ok();
        Table { dsn: dsn.to_owned(), name: format!("it_{}", Uuid::new_v4().simple()), is_owned: true }
    }

    /// Another process's table.
    pub fn of(dsn: &str, name: &str) -> Table {
        Table { dsn: dsn.to_owned(), name: name.to_owned(), is_owned: false }
    }

    pub fn options(&self) -> PostgresStorageOptions {
        PostgresStorageOptions::from_dsn(&self.dsn).table_name(&self.name)
    }

    pub fn storage(&self) -> PostgresStorage {
        PostgresStorage::new(self.options()).expect("open the storage")
    }

    /// A lock of a storage of its own, as another process would have it.
    pub fn lock(&self, lock_id: &str) -> StorageLock {
        StorageLock::new(&self.storage(), lock_id).expect("make a lock")
    }

    /// The same with a short lease.
    pub fn short_lock(&self, lock_id: &str, lease: Duration, refresh: Duration) -> StorageLock {
        short_lock(&self.storage(), lock_id, lease, refresh)
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.dsn, NoTls).expect("connect to the test server")
    }

    /// Runs a statement in which `$T` stands for the table.
    pub fn execute(&self, sql: &str) -> u64 {
        self.client().execute(&sql.replace("$T", &self.name), &[]).expect(sql)
    }

    /// Lets a lease run out now.
    pub fn expire(&self, lock_id: &str) {
        let sql = format!("UPDATE {} SET lease_expire_time = clock_timestamp() WHERE lock_id = $1", self.name);
        assert_eq!(self.client().execute(&sql, &[&lock_id]).expect("expire"), 1);
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // After a failure the server may be frozen, and there may be something to look at.
        if self.is_owned
            && !std::thread::panicking()
            && let Ok(mut client) = Client::connect(&self.dsn, NoTls)
        {
            client.batch_execute(&format!("DROP TABLE IF EXISTS {}", self.name)).ok();
        }
    }
}

pub fn short_lock(storage: &PostgresStorage, lock_id: &str, lease: Duration, refresh: Duration) -> StorageLock {
    let options = LockOptions::new(lock_id).lease_expire_after(lease).lease_refresh_interval(refresh);
    StorageLock::with_options(storage, options).expect("make a lock")
}

/// Waits until something is so, and fails the test if it isn't within a generous time.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    within(Duration::from_secs(20), what, || is_so().then_some(()));
}

/// Waits until there is a value, and returns it.
#[track_caller]
pub fn within<T>(bound: Duration, what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(start.elapsed() < bound, "not within {bound:?}: {what}");
        std::thread::sleep(ms(2));
    }
}

/// Waits until the lease of a hold is refreshed: what remains only grows by that.
#[track_caller]
pub fn is_refreshed(guard: &LockGuard) {
    let mut before = guard.remaining();
    eventually("the lease is refreshed", || guard.remaining() > std::mem::replace(&mut before, guard.remaining()));
}

/// Runs something and checks that it took no longer than `bound`.
#[track_caller]
pub fn takes_at_most<T>(bound: Duration, what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = run();
    assert!(start.elapsed() <= bound, "{what} took {:?}, more than {bound:?}", start.elapsed());
    value
}

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
