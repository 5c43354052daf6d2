//! Waiting for a lock that is busy, and its end.

use std::thread;
use std::time::{Duration, Instant};

use storage_lock::{LockOptions, StorageLock};

use crate::support::proxy::Proxy;
use crate::support::{Table, eventually, is_refreshed, ms, takes_at_most};

#[test]
fn a_wait_ends_with_the_release() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let guard = ours.lock("worker-1").unwrap();
    thread::scope(|scope| {
        let waiters = [
            scope.spawn(|| theirs.lock("a").unwrap().version()),
            scope.spawn(|| theirs.try_lock_for("b", Duration::from_secs(20)).unwrap().unwrap().version()),
            scope.spawn(|| {
                theirs.try_lock_until("c", Instant::now() + Duration::from_secs(20)).unwrap().unwrap().version()
            }),
            scope.spawn(|| theirs.try_lock_for("d", Duration::MAX).unwrap().unwrap().version()),
        ];
        thread::sleep(ms(300));
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()), "somebody got in");
        drop(guard);
        let mut versions: Vec<i64> = waiters.into_iter().map(|waiter| waiter.join().unwrap()).collect();
        versions.sort_unstable();
        assert_eq!(versions, [2, 3, 4, 5]);
    });
}

#[test]
fn one_who_waits_until_the_end_of_the_clock_waits_and_does_not_panic() {
    let mut last = Instant::now();
    for bit in (0..64).rev() {
        last = last.checked_add(Duration::from_secs(1 << bit)).unwrap_or(last);
        last = last.checked_add(Duration::from_nanos(1 << bit)).unwrap_or(last);
    }
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let guard = ours.lock("worker-1").unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| theirs.try_lock_until("worker-2", last).unwrap().unwrap().version());
        table.hears("l", 1);
        drop(guard);
        assert_eq!(waiting.join().unwrap(), 2);
    });
}

#[test]
fn a_timeout_ends_the_wait() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let _guard = ours.lock("worker-1").unwrap();
    let start = Instant::now();
    assert!(theirs.try_lock_for("worker-2", ms(400)).unwrap().is_none());
    assert!(start.elapsed() >= ms(400), "{:?}", start.elapsed());
    assert!(start.elapsed() < ms(1_400), "{:?}", start.elapsed());
}

#[test]
fn a_wait_ends_with_the_lease_of_a_dead_holder() {
    let table = Table::new();
    let theirs = table.short_lock("l", ms(30_000), ms(50));
    drop(theirs.lock("worker-1").unwrap());
    // Held by nobody alive for 700 ms more. The waiter's own lease is 30 s, and has no say.
    table.execute("UPDATE $T SET released_at = NULL, lease_expire_time = clock_timestamp() + interval '700 ms'");
    let guard = takes_at_most(ms(1_700), "the takeover", || theirs.lock("worker-2").unwrap());
    assert_eq!(guard.version(), 2);
    let information = theirs.info().unwrap().unwrap();
    assert_eq!(information.owner_id, "worker-2", "a takeover puts the new owner into the row");
    is_refreshed(&guard);
    guard.unlock().expect("the new owner's release matches");
}

#[test]
fn a_locked_row_is_busy_and_not_waited_for() {
    let table = Table::new();
    let lock = table.lock("l");
    drop(lock.lock("worker-1").unwrap());
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    // What a fence is: the lock is free, but nobody may take it until this transaction ends.
    transaction.execute(&format!("SELECT FROM {} FOR KEY SHARE", table.name), &[]).unwrap();
    takes_at_most(ms(1_000), "the attempt", || assert!(lock.try_lock("worker-2").unwrap().is_none()));
    takes_at_most(ms(1_700), "the wait", || assert!(lock.try_lock_for("worker-2", ms(700)).unwrap().is_none()));
    transaction.commit().unwrap();
    assert!(lock.try_lock("worker-2").unwrap().is_some());
}

#[test]
fn misses_without_end_end_with_the_callers_time() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let options = LockOptions::new("l").version_miss_retry_times(u32::MAX);
    let lock = StorageLock::with_options(&storage, options).unwrap();
    drop(lock.lock("worker-1").unwrap());
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.execute(&format!("SELECT FROM {} FOR KEY SHARE", table.name), &[]).unwrap();
    let result = takes_at_most(ms(1_500), "the wait", || lock.try_lock_for("worker-2", ms(300)));
    assert!(!matches!(result, Ok(Some(_))), "{result:?}");
    let mut requests = 0;
    eventually("the statements end", || {
        thread::sleep(ms(50));
        std::mem::replace(&mut requests, proxy.requests()) == requests
    });
}

#[test]
fn a_wait_goes_on_while_connections_break() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let guard = ours.lock("worker-1").unwrap();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| theirs.lock("worker-2").unwrap().version());
        let mut client = table.client();
        for _ in 0..5 {
            thread::sleep(ms(100));
            client
                .execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%' || $1 || '%' \
                AND pid <> pg_backend_pid()",
                    &[&table.name],
                )
                .unwrap();
        }
        assert!(!waiter.is_finished());
        drop(guard);
        assert_eq!(waiter.join().unwrap(), 2);
    });
    eventually("nothing is left held", || theirs.info().unwrap().unwrap().released_at.is_some());
}
