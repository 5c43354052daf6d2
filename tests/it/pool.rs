//! A pool of the caller's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use postgres::{Config, NoTls};
use r2d2_postgres::PostgresConnectionManager;
use storage_lock::{Error, PostgresStorage, PostgresStorageOptions, StorageLock};

use crate::support::proxy::Proxy;
use crate::support::{Table, chain, client, dsn, eventually, is_refreshed, ms, short_lock, takes_at_most, waits_for};

type Pool = r2d2::Pool<PostgresConnectionManager<NoTls>>;

fn pool(dsn: &str, size: u32) -> Pool {
    let config: Config = dsn.parse().unwrap();
    let manager = PostgresConnectionManager::new(config, NoTls);
    r2d2::Pool::builder().max_size(size).connection_timeout(ms(2_000)).build(manager).unwrap()
}

fn storage(table: &Table, pool: &Pool) -> PostgresStorage {
    PostgresStorage::new(PostgresStorageOptions::from_pool(pool.clone()).table_name(&table.name)).unwrap()
}

#[test]
fn a_pool_lends_a_connection_for_each_call_and_gets_it_back_as_it_was() {
    let table = Table::new();
    let pool = pool(&dsn(), 1);
    let storage = storage(&table, &pool);
    let settings = |pool: &Pool| -> (String, i64) {
        let sql = "SELECT string_agg(name || setting, ',' ORDER BY name), \
                   (SELECT count(*) FROM pg_prepared_statements) \
                   FROM pg_settings WHERE source = 'session'";
        let row = pool.get().unwrap().query_typed_one(sql, &[]).unwrap();
        (row.get::<_, Option<String>>(0).unwrap_or_default(), row.get(1))
    };
    let before = settings(&pool);
    let lock = short_lock(&storage, "l", ms(20_000), ms(100));
    for version in 1..=5 {
        let guard = lock.lock("worker").unwrap();
        assert_eq!(guard.version(), version);
        is_refreshed(&guard);
        // Between two calls it is the caller's.
        assert_eq!(settings(&pool), before);
        assert!(lock.try_lock("other").unwrap().is_none());
        assert_eq!(storage.list().unwrap().len(), 1);
        guard.unlock().unwrap();
    }
    eventually("the connection is back", || pool.state().idle_connections == 1);
}

#[test]
fn a_call_on_a_pool_is_one_round_trip() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let manager = PostgresConnectionManager::new(proxy.dsn.parse().unwrap(), NoTls);
    let pool = r2d2::Pool::builder().max_size(2).test_on_check_out(false).build(manager).unwrap();
    let storage = storage(&table, &pool);
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    proxy.becomes_quiet();
    let before = proxy.requests();
    let guard = lock.lock("worker").unwrap();
    assert!(lock.try_lock("other").unwrap().is_none());
    guard.unlock().unwrap();
    assert_eq!(proxy.requests() - before, 3, "an acquire, a busy attempt, and a release");
}

#[test]
fn who_waits_on_a_pool_polls_or_listens_where_that_is_given() {
    let table = Table::new();
    let pool = pool(&dsn(), 4);
    let options = || PostgresStorageOptions::from_pool(pool.clone()).table_name(&table.name);
    let listens = PostgresStorage::new(options().listen_with(PostgresStorageOptions::from_dsn(&dsn()))).unwrap();
    for (storage, hears) in [(PostgresStorage::new(options()).unwrap(), false), (listens, true)] {
        let guard = table.lock("l").lock("holder").unwrap();
        let waiting = waits_for(&StorageLock::new(&storage, "l").unwrap());
        if hears {
            table.hears("l", 1);
        }
        thread::sleep(ms(300));
        guard.unlock().unwrap();
        takes_at_most(ms(5_000), "the waiting one", || waiting.join().unwrap());
    }
}

#[test]
fn a_pool_that_the_caller_keeps_empty_delays_and_loses_no_hold_silently() {
    let table = Table::new();
    let pool = pool(&dsn(), 2);
    let storage = storage(&table, &pool);
    let guard = short_lock(&storage, "l", ms(20_000), ms(200)).lock("worker").unwrap();
    // For a while, of which the hold survives.
    let kept = [pool.get().unwrap(), pool.get().unwrap()];
    let other = StorageLock::new(&storage, "other").unwrap();
    let error = takes_at_most(Duration::from_secs(11), "an error", || other.try_lock("worker").unwrap_err());
    assert!(matches!(error, Error::Connect { .. } | Error::Timeout { .. }), "{}", chain(&error));
    assert!(guard.is_held());
    drop(kept);
    is_refreshed(&guard);
    drop(other.lock("worker").unwrap());
    // For longer than the lease.
    let short = short_lock(&storage, "short", ms(2_000), ms(200)).lock("worker").unwrap();
    let signal = short.lost();
    let kept = [pool.get().unwrap(), pool.get().unwrap()];
    assert!(signal.wait_for(ms(10_000)), "the loss is told");
    drop(kept);
    assert!(short.unlock().unwrap_err().is_lease_lost());
    is_refreshed(&guard);
}

#[test]
fn connections_of_a_pool_that_break_are_replaced() {
    let table = Table::new();
    let pool = pool(&format!("{} application_name={}", dsn(), table.name), 3);
    let storage = storage(&table, &pool);
    let guard = short_lock(&storage, "l", ms(20_000), ms(200)).lock("worker").unwrap();
    for _ in 0..3 {
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1";
        client().query_one(sql, &[&table.name]).unwrap();
        is_refreshed(&guard);
    }
    guard.unlock().unwrap();
}

/// Its connections panic where such a thread drops them.
#[test]
fn a_storage_that_owns_its_pool_may_be_dropped_on_a_thread_of_an_async_runtime() {
    let table = Table::new();
    let owned = pool(&dsn(), 2);
    let both = [owned.get().unwrap(), owned.get().unwrap()];
    drop(both);
    let storage = PostgresStorage::new(PostgresStorageOptions::from_pool(owned).table_name(&table.name)).unwrap();
    drop(StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap());
    let options = PostgresStorageOptions::from_pool(pool(&dsn(), 2));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    runtime
        .block_on(runtime.spawn(async move {
            drop(storage);
            drop(options);
        }))
        .expect("nothing panics");
}

#[test]
fn a_call_on_a_pool_whose_server_is_silent_comes_back_in_its_time() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let pool = pool(&proxy.dsn, 3);
    let storage = storage(&table, &pool);
    drop(StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap());
    proxy.swallow();
    let get = || storage.get("l").unwrap_err();
    let try_lock = || StorageLock::new(&storage, "other").unwrap().try_lock("worker").unwrap_err();
    thread::scope(|scope| {
        scope.spawn(|| takes_at_most(Duration::from_secs(12), "get", get));
        scope.spawn(|| takes_at_most(Duration::from_secs(12), "try_lock", try_lock));
    });
}

#[test]
fn a_locked_table_takes_no_more_of_a_pool_than_it_may() {
    let table = Table::new();
    let pool = pool(&dsn(), 8);
    let options = PostgresStorageOptions::from_pool(pool.clone()).table_name(&table.name).max_connections(2);
    let storage = PostgresStorage::new(options).unwrap();
    let guards = [0, 1, 2].map(|n| short_lock(&storage, &format!("l{n}"), ms(30_000), ms(500)).lock("worker").unwrap());
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table.name)).unwrap();
    thread::scope(|scope| {
        for n in 0..4 {
            let (storage, name) = (&storage, format!("other{n}"));
            scope.spawn(move || {
                let lock = StorageLock::new(storage, &*name).unwrap();
                (0..6).for_each(|_| drop(lock.try_lock_for("worker", ms(500))));
            });
        }
        for _ in 0..40 {
            thread::sleep(ms(100));
            let state = pool.state();
            assert!(state.connections - state.idle_connections <= 2, "{state:?}");
        }
    });
    transaction.rollback().unwrap();
    guards.iter().for_each(is_refreshed);
}

#[test]
fn the_caller_gets_its_connection_while_the_library_is_busy_with_it() {
    let table = Table::new();
    let pool = pool(&dsn(), 1);
    let storage = storage(&table, &pool);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for n in 0..8 {
            let (storage, is_over) = (&storage, &is_over);
            scope.spawn(move || {
                while !is_over.load(Ordering::SeqCst) {
                    storage.get(&format!("l{n}")).unwrap();
                }
            });
        }
        let turns = (0..5).map(|_| {
            thread::sleep(ms(100));
            pool.get().map(drop)
        });
        let turns: Result<Vec<()>, _> = turns.collect();
        is_over.store(true, Ordering::SeqCst);
        turns.expect("a connection within the time that the pool gives it");
    });
}
