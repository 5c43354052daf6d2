//! What the tests share. Helpers are named after the fact that they check or the thing that they are.

pub mod child;
pub mod proxy;
pub mod server;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
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

    /// A connection that doesn't wait for ever for a lock, which the same thread may hold.
    pub fn impatient_client(&self) -> Client {
        let mut client = self.client();
        client.batch_execute("SET lock_timeout = '20s'").expect("set a limit");
        client
    }

    /// Runs a statement in which `$T` stands for the table.
    pub fn execute(&self, sql: &str) -> u64 {
        self.impatient_client().execute(&sql.replace("$T", &self.name), &[]).expect(sql)
    }

    /// Who waits for a lock according to its row, in their order.
    pub fn waiters(&self, lock_id: &str) -> Vec<Uuid> {
        let sql = format!("SELECT coalesce(waiters, '{{}}') FROM {} WHERE lock_id = $1", self.name);
        self.client().query_opt(&sql, &[&lock_id]).expect("read the row").map(|row| row.get(0)).unwrap_or_default()
    }

    /// Waits until so many storages stand in the row of a lock and listen, and returns them in their order.
    #[track_caller]
    pub fn hears(&self, lock_id: &str, storages: usize) -> Vec<Uuid> {
        let mut client = self.client();
        within(Duration::from_secs(20), "they stand in the row and listen", || {
            let waiters = self.waiters(lock_id);
            let is_on = waiters.iter().all(|waiter| listeners(&mut client, *waiter) == 1);
            (waiters.len() == storages && is_on).then_some(waiters)
        })
    }

    /// Lets a lease run out now.
    pub fn expire(&self, lock_id: &str) {
        let sql = format!("UPDATE {} SET lease_expire_time = clock_timestamp() WHERE lock_id = $1", self.name);
        assert_eq!(self.impatient_client().execute(&sql, &[&lock_id]).expect("expire"), 1);
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

/// Starts a thread that waits for a lock, and returns when it sleeps. Behind a hold of its own process it does so
/// only in the line.
#[track_caller]
pub fn waiting_thread<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    // A thread's name has at most 15 bytes in /proc.
    let name = format!("waiter-{}", COUNT.fetch_add(1, Ordering::SeqCst));
    let thread = std::thread::Builder::new().name(name.clone()).spawn(run).expect("start a thread");
    let is_asleep = || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
        // pid (comm) state ...
        let mut stats = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("stat")).ok());
        stats.any(|stat| stat.contains(&format!("({name}) S")))
    };
    let mut looks = 0;
    eventually("the thread sleeps", || {
        looks = if is_asleep() { looks + 1 } else { 0 };
        looks == 5
    });
    thread
}

/// A thread that waits for a lock, releases it at once, and returns the version of its hold.
#[track_caller]
pub fn waits_for(lock: &StorageLock) -> JoinHandle<i64> {
    let lock = lock.clone();
    waiting_thread(move || lock.lock("waiter").expect("lock").version())
}

/// What a session that listens for a storage did last.
pub fn listening(waiter: Uuid) -> String {
    let channel = waiter.to_string().split_off(35);
    format!("LISTEN \"storage_lock_{channel}\"; SELECT 'waiter {waiter}'")
}

/// How many sessions listen for a storage, and are ready.
pub fn listeners(client: &mut Client, waiter: Uuid) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle' AND query = $1";
    client.query_one(sql, &[&listening(waiter)]).expect("read the sessions").get(0)
}

/// Ends the session that listens for a storage.
pub fn end_listener(client: &mut Client, waiter: Uuid) {
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query = $1";
    let ended: i64 = client.query_one(sql, &[&listening(waiter)]).expect("end a session").get(0);
    assert_eq!(ended, 1, "nobody listened");
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
