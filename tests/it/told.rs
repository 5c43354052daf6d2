//! A loss is told: early, once, and to whoever wants to hear of it.

use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use storage_lock::{LockGuard, LockOptions, LostSignal, PostgresStorage, StorageLock};

use crate::roles::PanicsInItsDrop;
use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::{Table, dsn, eventually, is_refreshed, ms, takes_at_most, waiting_thread};

/// What a callback saw.
#[derive(Debug)]
struct Told {
    at: Instant,
    thread: Option<String>,
    signal: LostSignal,
    is_lost: bool,
}

/// A lock that sends what its callback sees.
fn lock_that_tells(storage: &PostgresStorage, lease: Duration, refresh: Duration) -> (StorageLock, Receiver<Told>) {
    let (sender, told) = channel();
    let sender = Mutex::new(sender);
    let options =
        LockOptions::new("l").lease_expire_after(lease).lease_refresh_interval(refresh).on_lost(move |signal| {
            let (at, is_lost) = (Instant::now(), signal.is_lost());
            let thread = thread::current().name().map(str::to_owned);
            sender.lock().unwrap().send(Told { at, thread, signal: signal.clone(), is_lost }).ok();
        });
    (StorageLock::with_options(storage, options).unwrap(), told)
}

/// Watches a hold until it is lost, and returns its last deadline.
fn last_deadline(guard: &LockGuard) -> Instant {
    let mut last = Instant::now();
    eventually("the hold is lost", || {
        // Before: what remains was true then at the latest.
        let before = Instant::now();
        let remaining = guard.remaining();
        if guard.is_held() {
            last = before + remaining;
        }
        !guard.is_held()
    });
    last
}

/// When the lease ends, by the server's clock, as an instant of ours that it doesn't end before.
fn end_of_lease(table: &Table) -> Instant {
    let before = Instant::now();
    let sql =
        format!("SELECT (extract(epoch FROM lease_expire_time - clock_timestamp()) * 1e6)::bigint FROM {}", table.name);
    let micros: i64 = table.client().query_one(&sql, &[]).unwrap().get(0);
    let left = Duration::from_micros(micros.unsigned_abs());
    if micros < 0 { before.checked_sub(left).unwrap() } else { before + left }
}

#[track_caller]
fn was_told_in_time(told: &Receiver<Told>, deadline: Instant) -> Told {
    let told = told.recv_timeout(Duration::from_secs(5)).expect("told");
    assert!(told.at <= deadline, "told {:?} after the deadline", told.at - deadline);
    assert!(deadline - told.at < ms(500), "told {:?} before the deadline", deadline - told.at);
    assert!(told.is_lost);
    assert_eq!(told.thread.as_deref(), Some("lock-refresh"), "a thread of the library's");
    told
}

#[test]
fn a_loss_is_told_by_the_deadline_while_the_network_swallows_packets() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let (lock, told) = lock_that_tells(&Table::of(&proxy.dsn, &table.name).storage(), ms(3_000), ms(200));
    let guard = lock.lock("worker-1").unwrap();
    is_refreshed(&guard);
    let signal = guard.lost();
    let waiting = waiting_thread(move || signal.wait_for(Duration::MAX).then(Instant::now));
    proxy.swallow();
    let deadline = last_deadline(&guard);
    let told_at = was_told_in_time(&told, deadline).at;
    let woken_at = waiting.join().unwrap().expect("it is lost");
    // Before anybody else could have owned the lock.
    let end = end_of_lease(&table);
    assert!(told_at < end && woken_at < end);
    assert!(guard.unlock().unwrap_err().is_lease_lost());
    assert!(told.recv_timeout(ms(500)).is_err(), "told twice");
}

#[test]
fn a_loss_is_told_by_the_deadline_while_the_server_is_frozen() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let (lock, told) = lock_that_tells(&table.storage(), ms(3_000), ms(200));
    let guard = lock.lock("worker-1").unwrap();
    is_refreshed(&guard);
    server.freeze();
    let deadline = last_deadline(&guard);
    let told = was_told_in_time(&told, deadline);
    assert_eq!((told.signal.lock_id(), told.signal.owner_id(), told.signal.version()), ("l", "worker-1", 1));
    server.thaw();
    assert!(told.at < end_of_lease(&table));
    drop(guard);
}

#[test]
fn a_loss_that_the_database_tells_of_is_told_at_once() {
    let table = Table::new();
    let (lock, told) = lock_that_tells(&table.storage(), ms(10_000), ms(50));
    let guard = lock.lock("worker-1").unwrap();
    table.execute("DELETE FROM $T");
    let told = told.recv_timeout(ms(3_000)).expect("told with the next refresh");
    assert!(told.is_lost && !guard.is_held());
}

/// The guard found it out, and its holder has better things to do than to keep it.
#[test]
fn a_loss_that_a_fence_finds_is_told_although_the_guard_goes_at_once() {
    let table = Table::new();
    let (lock, told) = lock_that_tells(&table.storage(), ms(10_000), ms(3_000));
    let mut client = table.client();
    for round in 0..50 {
        let guard = lock.lock("worker-1").unwrap();
        let signal = guard.lost();
        table.expire("l");
        drop(table.lock("l").try_lock("worker-2").unwrap().expect("the lock is free"));
        assert!(guard.is_held(), "it hasn't heard of it");
        let error = match round % 3 {
            0 => guard.fence(&mut client.transaction().unwrap()).unwrap_err(),
            1 => guard.unlock_in(client.transaction().unwrap()).map(drop).unwrap_err(),
            _ => guard.transaction(&mut client, |_| Ok::<_, storage_lock::Error>(())).unwrap_err(),
        };
        assert!(error.is_lease_lost());
        assert!(!guard.is_held() && signal.is_lost());
        drop(guard);
        let told = told.recv_timeout(ms(3_000)).expect("told");
        assert_eq!(told.signal.version(), signal.version());
        assert_eq!(told.thread.as_deref(), Some("lock-refresh"));
    }
    assert!(told.recv_timeout(ms(500)).is_err(), "told twice");
}

#[test]
fn a_loss_that_a_release_finds_is_known_to_the_signal() {
    let table = Table::new();
    let guard = table.short_lock("l", ms(10_000), ms(3_000)).lock("worker-1").unwrap();
    let signal = guard.lost();
    table.expire("l");
    let _new = table.lock("l").try_lock("worker-2").unwrap().expect("the lock is free");
    assert!(!signal.is_lost(), "nobody has heard of it");
    assert!(guard.unlock().unwrap_err().is_lease_lost());
    assert!(signal.is_lost() && signal.wait_for(Duration::ZERO));
}

#[test]
fn a_hold_that_is_given_back_is_not_told_of() {
    let table = Table::new();
    let (lock, told) = lock_that_tells(&table.storage(), ms(1_000), ms(50));
    let guard = lock.lock("worker-1").unwrap();
    is_refreshed(&guard);
    let signal = guard.lost();
    guard.unlock().unwrap();
    drop(lock.lock("worker-1").unwrap());
    let mut client = table.client();
    let guard = lock.lock("worker-1").unwrap();
    guard.unlock_in(client.transaction().unwrap()).unwrap().commit().unwrap();
    // Longer than its lease.
    assert!(told.recv_timeout(ms(1_500)).is_err());
    assert!(!signal.is_lost() && !guard.lost().is_lost());
}

#[test]
fn a_callback_that_panics_harms_nothing() {
    let table = Table::new();
    let storage = table.storage();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let options =
        LockOptions::new("l").lease_expire_after(ms(1_000)).lease_refresh_interval(ms(50)).on_lost(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
            panic!("in the callback");
        });
    let lock = StorageLock::with_options(&storage, options).unwrap();
    for round in 1..=3 {
        let guard = lock.lock("worker-1").unwrap();
        // Who waits in this process is woken all the same.
        let waiter = {
            let lock = lock.clone();
            waiting_thread(move || lock.lock("waiter").unwrap().version())
        };
        table.execute("UPDATE $T SET version = version + 1000, released_at = clock_timestamp()");
        eventually("the callback", || calls.load(Ordering::SeqCst) == round);
        assert!(!guard.is_held());
        takes_at_most(ms(5_000), "the next one", || waiter.join().unwrap());
        assert!(guard.unlock().unwrap_err().is_lease_lost());
    }
}

/// And callbacks that panic with what panics when it is dropped, and own it too.
#[test]
fn a_logger_that_panics_at_every_line_loses_no_hold_and_keeps_no_call_from_coming_back() {
    let table = Table::new();
    let mut child = Process::start_with_stderr("panic at every line", &table, &[], Stdio::null());
    assert_eq!(child.expect_line(), "as expected");
    assert!(child.wait().success());
}

/// The driver's lines come from the middle of a call, which is made again, or of opening a connection. And what it
/// panics with panics when it is dropped.
#[test]
fn a_logger_that_panics_at_a_line_of_the_driver_costs_a_connection_and_no_hold() {
    let table = Table::new();
    let mut child = Process::start_with_stderr("panic within the driver", &table, &[], Stdio::null());
    assert_eq!(child.expect_line(), "as expected");
    assert!(child.wait().success());
}

/// In the threads that call them, which are the caller's too.
#[test]
fn callbacks_that_panic_with_what_panics_when_it_is_dropped_harm_nothing() {
    let table = Table::new();
    let storage = PostgresStorage::new(table.options().on_event(|_| panic_any(PanicsInItsDrop))).unwrap();
    let (sender, told) = channel();
    let (sender, owned) = (Mutex::new(sender), PanicsInItsDrop);
    let options =
        LockOptions::new("l").lease_expire_after(ms(10_000)).lease_refresh_interval(ms(50)).on_lost(move |_| {
            _ = &owned;
            sender.lock().unwrap().send(()).unwrap();
            panic_any(PanicsInItsDrop);
        });
    let lock = StorageLock::with_options(&storage, options).unwrap();
    let guard = lock.lock("worker-1").unwrap();
    let end = Instant::now() + ms(2_000);
    while Instant::now() < end {
        is_refreshed(&guard);
    }
    let waiter = {
        let lock = lock.clone();
        waiting_thread(move || lock.lock("waiter").unwrap().unlock().unwrap())
    };
    guard.unlock().unwrap();
    takes_at_most(ms(5_000), "the hand-over", || waiter.join().unwrap());
    let guard = lock.lock("worker-1").unwrap();
    let unwound = catch_unwind(AssertUnwindSafe(move || {
        let _guard = guard;
        panic!("on purpose, while holding");
    }));
    assert!(unwound.is_err());
    let guard = lock.lock("worker-1").unwrap();
    assert!(told.try_recv().is_err(), "nothing was lost");
    table.execute("UPDATE $T SET version = version + 1000, released_at = clock_timestamp()");
    told.recv_timeout(Duration::from_secs(10)).expect("on_lost is called");
    assert!(guard.unlock().unwrap_err().is_lease_lost());
    drop((lock, storage));
}

#[test]
fn a_signal_is_polled_and_waited_for_and_outlives_its_guard() {
    let table = Table::new();
    let guard = table.short_lock("l", ms(5_000), ms(50)).lock("worker-1").unwrap();
    let signal = guard.lost();
    assert!(!signal.is_lost() && !signal.wait_for(Duration::ZERO));
    let start = Instant::now();
    assert!(!signal.wait_for(ms(200)), "held");
    assert!(start.elapsed() >= ms(200));

    // Waiting ends with the loss, however long it would have been.
    let waiting = {
        let signal = signal.clone();
        waiting_thread(move || signal.wait_for(Duration::MAX))
    };
    table.execute("DELETE FROM $T");
    assert!(takes_at_most(ms(3_000), "the wait", || waiting.join().unwrap()));
    assert!(signal.is_lost() && signal.wait_for(Duration::MAX));
    drop(guard);
    assert!(signal.is_lost(), "for ever");

    // And with a release, after which it can't be lost any more.
    let guard = table.short_lock("m", ms(1_000), ms(50)).lock("worker-1").unwrap();
    let signal = guard.lost();
    let waiting = {
        let signal = signal.clone();
        waiting_thread(move || signal.wait_for(Duration::MAX))
    };
    guard.unlock().unwrap();
    assert!(!takes_at_most(ms(3_000), "the wait", || waiting.join().unwrap()));
    thread::sleep(ms(1_200));
    assert!(!signal.is_lost(), "its lease would be over by now");
}

/// It waits for its own signal, drops the guard, takes the lock again, and drops the storage.
#[test]
fn a_callback_may_use_the_library() {
    let table = Table::new();
    let storage = table.storage();
    let kept: Arc<Mutex<Option<(LockGuard, StorageLock)>>> = Arc::default();
    let (sender, told) = channel();
    let (taken, sender) = (Arc::clone(&kept), Mutex::new(sender));
    let options =
        LockOptions::new("l").lease_expire_after(ms(1_000)).lease_refresh_interval(ms(50)).on_lost(move |signal| {
            assert!(signal.wait_for(Duration::MAX));
            let Some((guard, lock)) = taken.lock().unwrap().take() else { return };
            drop(guard);
            let version = lock.lock("worker-1").unwrap().version();
            drop(lock);
            sender.lock().unwrap().send(version).unwrap();
        });
    let lock = StorageLock::with_options(&storage, options).unwrap();
    *kept.lock().unwrap() = Some((lock.lock("worker-1").unwrap(), lock));
    drop(storage);
    table.execute("UPDATE $T SET version = version + 1000, released_at = clock_timestamp()");
    assert_eq!(told.recv_timeout(Duration::from_secs(10)).expect("no deadlock"), 1_002);
    let mut client = table.client();
    let sessions =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%' || $1 || '%' AND pid <> pg_backend_pid()";
    eventually("its connections are closed", || {
        client.query_one(sessions, &[&table.name]).unwrap().get::<_, i64>(0) == 0
    });
}

/// The signal needs no thread that tells it.
#[test]
fn a_signal_tells_of_the_deadline_also_to_a_process_that_was_stopped() {
    let table = Table::new();
    let mut holder = Process::start("poll", &table, &[]);
    assert_eq!(holder.expect_line(), "polling");
    holder.signal(nix::sys::signal::Signal::SIGSTOP);
    let new = takes_at_most(ms(3_000), "the takeover", || table.lock("l").lock("worker-1").unwrap());
    holder.signal(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(holder.expect_line(), "lost");
    assert!(new.is_held());
}

#[test]
fn a_guard_that_is_lost_and_then_dropped_logs_once() {
    let table = Table::new();
    let mut child = Process::start_with_stderr("lose locks", &table, &[], Stdio::piped());
    let log = child.stderr();
    assert!(child.wait().success(), "{log}");
    for lock in ["noticed", "unnoticed", "unlocked"] {
        let lines: Vec<&str> =
            log.lines().filter(|line| line.contains("WARN") && line.contains(&format!("{lock:?}"))).collect();
        // Who unlocks is told by the result.
        let expected = usize::from(lock != "unlocked");
        assert_eq!(lines.len(), expected, "{lock}: {lines:#?}");
        assert!(lines.iter().all(|line| line.contains("lost the lease")), "{lines:?}");
    }
}
