//! Taking, keeping and releasing a lock when nothing goes wrong.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use storage_lock::{Event, LockGuard, PostgresStorage, StorageLock};

use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::{Table, client, dsn, eventually, ms, within};

#[test]
fn the_version_grows_with_every_hold() {
    let table = Table::new();
    let lock = table.lock("l");
    for version in 1..=20 {
        let guard = lock.lock("worker-1").unwrap();
        assert_eq!((guard.version(), guard.lock_id(), guard.owner_id()), (version, "l", "worker-1"));
        if version % 2 == 0 { drop(guard) } else { guard.unlock().unwrap() }
    }
    table.expire("l");
    assert_eq!(lock.lock("worker-1").unwrap().version(), 21);
}

#[test]
fn one_line_is_enough() {
    let lock = StorageLock::connect(format!("one-line-{}", uuid::Uuid::new_v4()), &dsn()).unwrap();
    let guard = lock.lock("worker-1").unwrap();
    assert!(guard.is_held());
    assert_eq!(lock.info().unwrap().unwrap().version, 1);
}

#[test]
fn a_busy_lock_is_none_and_not_an_error() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let guard = ours.lock("worker-1").unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_none());
    assert!(theirs.try_lock_for("worker-2", Duration::ZERO).unwrap().is_none());
    assert!(theirs.try_lock_until("worker-2", Instant::now()).unwrap().is_none());
    guard.unlock().unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_some());
    assert!(theirs.try_lock_for("worker-2", Duration::ZERO).unwrap().is_some());
    assert!(theirs.try_lock_until("worker-2", Instant::now()).unwrap().is_some());
}

#[test]
fn different_locks_do_not_exclude_each_other() {
    let table = Table::new();
    let storage = table.storage();
    let guards: Vec<LockGuard> =
        (0..10).map(|n| StorageLock::new(&storage, format!("l{n}")).unwrap().lock("worker").unwrap()).collect();
    assert_eq!(storage.list().unwrap().len(), guards.len());
}

#[test]
fn two_tables_do_not_disturb_each_other() {
    let (one, other) = (Table::new(), Table::new());
    let _guard = one.lock("l").lock("worker-1").unwrap();
    assert!(other.lock("l").try_lock("worker-1").unwrap().is_some());
}

#[test]
fn the_same_owner_on_the_same_thread_enters_again_without_a_statement() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    let outer = lock.lock("worker-1").unwrap();
    let before = proxy.requests();
    let inner = StorageLock::new(&storage, "l").unwrap().lock("worker-1").unwrap();
    let innermost = lock.clone().try_lock("worker-1").unwrap().unwrap();
    assert_eq!((inner.version(), innermost.version()), (outer.version(), outer.version()));
    innermost.unlock().unwrap();
    drop(inner);
    assert_eq!(proxy.requests(), before, "an inner guard asked the database something");
    // The lock is still held after all inner guards have gone, in any order.
    assert!(outer.is_held());
    let theirs = table.lock("l");
    assert!(theirs.try_lock("worker-2").unwrap().is_none());
    let last = lock.lock("worker-1").unwrap();
    drop(outer);
    assert!(last.is_held());
    assert!(theirs.try_lock("worker-2").unwrap().is_none());
    last.unlock().unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_some());
}

#[test]
fn the_same_owner_elsewhere_is_excluded() {
    let table = Table::new();
    let lock = table.lock("l");
    let guard = lock.lock("worker-1").unwrap();
    // Another owner on this thread, the same owner on another thread, and the same owner in another process.
    assert!(lock.try_lock("worker-2").unwrap().is_none());
    thread::scope(|scope| scope.spawn(|| assert!(lock.try_lock("worker-1").unwrap().is_none())).join().unwrap());
    assert!(table.lock("l").try_lock("worker-1").unwrap().is_none());
    let mut other = Process::start("hold", &table, &["l", "worker-1", "30000", "5000"]);
    let version = guard.version();
    drop(guard);
    assert_eq!(other.expect_line().parse::<i64>().unwrap(), version + 1);
    assert!(lock.try_lock("worker-1").unwrap().is_none());
}

#[test]
fn a_lost_hold_is_not_entered_again() {
    let table = Table::new();
    let lock = table.short_lock("l", ms(1_000), ms(20));
    let lost = lock.lock("worker-1").unwrap();
    table.expire("l");
    eventually("the hold is lost", || !lost.is_held());
    let fresh = lock.lock("worker-1").unwrap();
    assert_eq!(fresh.version(), lost.version() + 1);
    drop(lost);
    assert!(fresh.is_held());
    let again = lock.lock("worker-1").unwrap();
    assert_eq!(again.version(), fresh.version());
}

#[test]
fn a_guard_releases_from_another_thread() {
    let table = Table::new();
    let lock = table.lock("l");
    let guard = lock.lock("worker-1").unwrap();
    thread::spawn(move || drop(guard)).join().unwrap();
    assert!(table.lock("l").try_lock("worker-2").unwrap().is_some());
}

#[test]
fn a_panic_releases_the_lock() {
    let table = Table::new();
    let lock = table.lock("l");
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _guard = lock.lock("worker-1").unwrap();
        panic!("on purpose, while holding");
    }));
    assert!(panicked.is_err());
    assert!(table.lock("l").try_lock("worker-2").unwrap().is_some());
}

#[test]
fn a_forgotten_guard_keeps_the_lock() {
    let table = Table::new();
    let lock = table.short_lock("l", ms(1_000), ms(100));
    std::mem::forget(lock.lock("worker-1").unwrap());
    let storage = table.storage();
    let first = storage.get("l").unwrap().unwrap();
    eventually("it is refreshed past its first lease", || {
        let now = storage.get("l").unwrap().unwrap();
        assert!(now.is_held && now.version == first.version, "{now:?}");
        now.lease_expire_time > first.lease_expire_time + ms(500)
    });
}

#[test]
fn guard_and_lock_and_storage_go_anywhere() {
    fn is_send_and_sync<T: Send + Sync + 'static>() {}
    is_send_and_sync::<LockGuard>();
    is_send_and_sync::<StorageLock>();
    is_send_and_sync::<PostgresStorage>();
    is_send_and_sync::<storage_lock::Error>();
}

#[test]
fn information_is_what_the_table_says() {
    let table = Table::new();
    let storage = table.storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    assert_eq!(lock.info().unwrap(), None);
    assert_eq!(storage.list().unwrap(), []);
    let guard = lock.lock("worker-1").unwrap();
    let held = lock.info().unwrap().unwrap();
    assert_eq!((held.lock_id.as_str(), held.owner_id.as_str(), held.version), ("l", "worker-1", guard.version()));
    assert!(held.is_held && held.released_at.is_none());
    let lease = held.lease_expire_time.duration_since(held.lock_begin_time).unwrap();
    assert!(lease.abs_diff(Duration::from_secs(30)) < ms(100), "{lease:?}");
    assert_eq!(storage.list().unwrap(), [held]);
    drop(guard);
    let free = storage.get("l").unwrap().unwrap();
    assert!(!free.is_held && free.released_at.is_some_and(|at| at >= free.lock_begin_time), "{free:?}");
    assert_eq!(storage.list().unwrap(), []);
    table.execute("UPDATE $T SET released_at = NULL, lease_expire_time = clock_timestamp()");
    assert!(!storage.get("l").unwrap().unwrap().is_held);
    assert_eq!(storage.list().unwrap(), []);
}

#[test]
fn a_lease_is_as_long_as_it_was_set_to_the_millisecond() {
    let table = Table::new();
    let lock = table.short_lock("l", ms(1_234), ms(500));
    let _guard = lock.lock("worker").unwrap();
    let held = lock.info().unwrap().unwrap();
    let lease = held.lease_expire_time.duration_since(held.lock_begin_time).unwrap();
    assert!((ms(1_234)..ms(1_300)).contains(&lease), "{lease:?}");
}

#[test]
fn the_servers_time_is_the_servers() {
    let table = Table::new();
    let storage = table.storage();
    let asked: SystemTime = client().query_one("SELECT clock_timestamp()", &[]).unwrap().get(0);
    let told = storage.server_time().unwrap();
    assert!(told >= asked && told.duration_since(asked).unwrap() < Duration::from_secs(10));
}

#[test]
fn remaining_is_less_than_the_lease_and_never_reaches_it() {
    let table = Table::new();
    let guard = table.lock("l").lock("worker-1").unwrap();
    let remaining = guard.remaining();
    assert!(remaining <= Duration::from_secs(29) && remaining > Duration::from_secs(20), "{remaining:?}");
}

#[test]
fn acquire_refresh_release_and_a_busy_attempt_are_one_round_trip_each() {
    let table = Table::new();
    let proxy = Arc::new(Proxy::to(&dsn()));
    let at_refreshes = Arc::new(Mutex::new(Vec::new()));
    let (counted, asked) = (Arc::clone(&at_refreshes), Arc::clone(&proxy));
    let options = Table::of(&proxy.dsn, &table.name).options().on_event(move |event| {
        if matches!(event, Event::Refreshed { .. }) {
            counted.lock().unwrap().push(asked.requests());
        }
    });
    let storage = PostgresStorage::new(options).unwrap();
    let lock = StorageLock::new(&storage, "l").unwrap();
    // Opens the connection, and makes the first hold of the lock. A statement is prepared after it has run fast enough,
    // which on a busy machine may take several times.
    within(ms(20_000), "the statements are prepared", || {
        let before = proxy.requests();
        drop(lock.lock("warm-up").unwrap());
        proxy.becomes_quiet();
        (proxy.requests() - before == 2).then_some(())
    });
    let (connections, mut before) = (proxy.connections(), proxy.requests());
    let mut trips = |what: &str| {
        let trips = proxy.requests() - before;
        before = proxy.requests();
        println!("{what}: {trips}");
        trips
    };
    let guard = lock.lock("worker-1").unwrap();
    assert_eq!(trips("acquire"), 1);
    assert!(lock.try_lock("worker-2").unwrap().is_none());
    assert_eq!(trips("busy"), 1);
    drop(guard);
    assert_eq!(trips("release"), 1);
    assert_eq!(proxy.connections(), connections, "one connection for all");
    // How many requests there were at each refresh's answer, before the next one is sent.
    let _guard = crate::support::short_lock(&storage, "l", ms(30_000), ms(100)).lock("worker-1").unwrap();
    eventually("each refresh is one request", || {
        let requests = at_refreshes.lock().unwrap();
        let last = &requests[requests.len().saturating_sub(6)..];
        last.len() == 6 && last.windows(2).all(|pair| pair[1] == pair[0] + 1)
    });
}

#[test]
fn a_busy_attempt_writes_nothing() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let _guard = ours.lock("worker-1").unwrap();
    let mut client = table.client();
    // Where the row is, who wrote it, and who locked it.
    let mut row = || -> (String, String, String) {
        let sql = format!("SELECT ctid::text, xmin::text, xmax::text FROM {}", table.name);
        let row = client.query_one(&sql, &[]).unwrap();
        (row.get(0), row.get(1), row.get(2))
    };
    let before = row();
    for _ in 0..20 {
        assert!(theirs.try_lock("worker-2").unwrap().is_none());
    }
    assert_eq!(row(), before);
}

#[test]
fn called_from_a_thread_of_an_async_runtime_it_blocks_and_does_not_panic() {
    let table = Table::new();
    for runtime in [
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap(),
        tokio::runtime::Builder::new_current_thread().build().unwrap(),
    ] {
        runtime.block_on(async {
            let storage = table.storage();
            let lock = crate::support::short_lock(&storage, "async", ms(1_000), ms(50));
            assert!(lock.info().is_ok() && storage.list().is_ok() && storage.server_time().is_ok());
            let guard = lock.lock("worker-1").unwrap();
            assert!(lock.try_lock_for("worker-2", ms(50)).unwrap().is_none());
            guard.unlock().unwrap();
            drop(lock.lock("worker-1").unwrap());
            // The last owner of the connections goes on the runtime's thread too, also while unwinding.
            let unwound = catch_unwind(AssertUnwindSafe(|| {
                let lock = table.lock("async");
                let _guard = lock.lock("worker-1").unwrap();
                panic!("on purpose, in a runtime");
            }));
            assert!(unwound.is_err());
            drop((lock, storage));
        });
    }
    assert!(table.lock("async").try_lock("worker-2").unwrap().is_some());
}

#[test]
fn one_refresh_thread_a_hold_and_none_without() {
    let table = Table::new();
    let mut child = Process::start("threads", &table, &[]);
    assert_eq!(child.expect_line(), "as expected");
    assert!(child.wait().success());
}
