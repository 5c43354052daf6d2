//! Processes that wait for each other: who stands in the row, who is notified, and what happens without notifications.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use postgres::Client;
use postgres::fallible_iterator::FallibleIterator;
use storage_lock::{LockGuard, PostgresStorage, StorageLock};
use uuid::Uuid;

use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::{
    Table, end_listener, eventually, listeners, listening, ms, short_lock, takes_at_most, waiting_thread, waits_for,
    within,
};

/// What an independent client hears that is for a storage.
struct Ear(Client, Uuid);

impl Ear {
    fn on(table: &Table, waiter: Uuid) -> Ear {
        let mut client = table.client();
        client.batch_execute(&listening(waiter)).unwrap();
        Ear(client, waiter)
    }

    /// Everything that was sent before this call: when to look, and of which lock.
    fn heard(&mut self) -> Vec<String> {
        let Ear(client, waiter) = self;
        // Its own comes last. Others listen on the same channel.
        let (channel, end): (String, _) =
            (client.query_one("SELECT pg_listening_channels()", &[]).unwrap().get(0), Uuid::new_v4().to_string());
        client.execute("SELECT pg_notify($1, $2)", &[&channel, &end]).unwrap();
        let mut heard = Vec::new();
        while let Some(notification) = client.notifications().timeout_iter(Duration::from_secs(10)).next().unwrap() {
            if notification.payload() == end {
                return heard;
            }
            if let Some((_, rest)) = notification.payload().split_once(&format!("{waiter} ")) {
                let [delay, _version, lock_id] = rest.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{rest}") };
                heard.push(format!("{delay} {lock_id}"));
            }
        }
        panic!("its own notification did not come");
    }
}

/// A lock of a storage of its own, and a thread of it that waits for its turn and releases it at once.
fn waiter(table: &Table, lock_id: &str) -> (StorageLock, thread::JoinHandle<i64>) {
    let lock = table.lock(lock_id);
    let waiting = waits_for(&lock);
    (lock, waiting)
}

#[test]
fn only_a_release_for_which_another_process_waits_notifies() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let wait = || waits_for(&theirs);
    let guard = ours.lock("holder").unwrap();
    let waiting = wait();
    let channel = table.hears("l", 1)[0];
    let mut ear = Ear::on(&table, channel);
    guard.unlock().unwrap();
    waiting.join().unwrap();
    assert_eq!(ear.heard(), ["0 l"]);
    assert!(table.waiters("l").is_empty(), "who took the lock waits no more");
    // Nobody waits: threads of one process, and processes that don't want the lock at the same time.
    thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(|| (0..30).for_each(|_| drop(ours.lock("alone").unwrap())))));
    });
    (0..30).for_each(|_| drop(theirs.lock("alone").unwrap()));
    assert!(theirs.try_lock("alone").unwrap().is_some());
    assert_eq!(ear.heard(), [""; 0]);
    // One for each release that is waited for.
    for _ in 0..5 {
        let guard = ours.lock("holder").unwrap();
        let waiting = wait();
        table.hears("l", 1);
        guard.unlock().unwrap();
        waiting.join().unwrap();
    }
    assert_eq!(ear.heard(), ["0 l"; 5]);
}

#[test]
fn without_a_wait_nothing_is_opened_for_waiting() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    for _ in 0..20 {
        lock.lock("worker").unwrap().unlock().unwrap();
        assert!(lock.try_lock("worker").unwrap().is_some());
    }
    let other = table.lock("l").lock("other").unwrap();
    assert!(lock.try_lock("worker").unwrap().is_none(), "this one doesn't wait");
    assert_eq!(proxy.connections(), 1);
    assert!(table.waiters("l").is_empty());
    drop(other);
}

#[test]
fn a_release_notifies_the_first_two_and_the_last_however_many_wait() {
    let table = Table::new();
    let guard = table.lock("l").lock("holder").unwrap();
    let waiters: Vec<Uuid> = (0..10).map(|_| Uuid::new_v4()).collect();
    table.client().execute(&format!("UPDATE {} SET waiters = $1", table.name), &[&waiters]).unwrap();
    let mut ears: Vec<Ear> = waiters.iter().map(|waiter| Ear::on(&table, *waiter)).collect();
    assert_eq!(table.lock("l").info().unwrap().unwrap().waiters, 10);
    guard.unlock().unwrap();
    let heard: Vec<String> = ears.iter_mut().map(|ear| ear.heard().join(",")).collect();
    assert_eq!(heard, ["0 l", "100 l", "", "", "", "", "", "", "", "180 l"]);
}

#[test]
fn a_storage_listens_on_one_connection_until_nobody_has_waited_for_a_while() {
    let table = Table::new();
    let storage = table.storage();
    let ours = table.storage();
    let lock = |storage: &PostgresStorage, n: i32| StorageLock::new(storage, format!("l{n}")).unwrap();
    let guards: Vec<LockGuard> = (0..5).map(|n| lock(&ours, n).lock("holder").unwrap()).collect();
    let waiting: Vec<_> = (0..5)
        .map(|n| {
            let lock = lock(&storage, n);
            waiting_thread(move || drop(lock.lock("waiter").unwrap()))
        })
        .collect();
    let mut waiters: Vec<Uuid> = (0..5).map(|n| table.hears(&format!("l{n}"), 1)[0]).collect();
    waiters.dedup();
    assert_eq!(waiters.len(), 1, "one waiter for all locks");
    guards.into_iter().for_each(|guard| guard.unlock().unwrap());
    waiting.into_iter().for_each(|waiting| waiting.join().unwrap());
    let mut client = table.client();
    assert_eq!(listeners(&mut client, waiters[0]), 1);
    eventually("the connection is closed", || listeners(&mut client, waiters[0]) == 0);
    // And opened again when it is needed.
    let guard = lock(&ours, 0).lock("holder").unwrap();
    let again = lock(&storage, 0);
    let waiting = waiting_thread(move || drop(again.lock("waiter").unwrap()));
    assert_eq!(table.hears("l0", 1), waiters);
    guard.unlock().unwrap();
    waiting.join().unwrap();
    drop(storage);
    within(Duration::from_secs(5), "a dropped storage doesn't listen", || {
        (listeners(&mut client, waiters[0]) == 0).then_some(())
    });
}

/// Far sooner than its lease of 30 s would end: only a notification tells so.
#[test]
fn any_lock_id_is_told_in_a_notification() {
    let table = Table::new();
    let long = "x".repeat(255);
    let locks = "🔒".repeat(63);
    for lock_id in ["1 2 3", " ", "a\nb", "'; NOTIFY x; --", "a\\b\"c%d", &long, &locks] {
        let guard = table.lock(lock_id).lock("holder").unwrap();
        let (_lock, waiting) = waiter(&table, lock_id);
        table.hears(lock_id, 1);
        // What it asks when it has begun to listen.
        thread::sleep(ms(100));
        guard.unlock().unwrap();
        takes_at_most(ms(1_000), lock_id, || waiting.join().unwrap());
    }
}

#[test]
fn waiters_of_two_tables_and_of_two_databases_do_not_disturb_each_other() {
    let (here, other_table) = (Table::new(), Table::new());
    let database = format!("it_{}", Uuid::new_v4().simple());
    here.client().batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
    // The same table name, so that they differ in nothing else.
    let there = Table::of(&format!("{} dbname={database}", here.dsn), &here.name);
    let tables = [&here, &other_table, &there];
    let mut guards = tables.map(|table| Some(table.lock("l").lock("holder").unwrap()));
    let mut waiting = tables.map(|table| Some(waiter(table, "l")));
    let mut ears = tables.map(|table| Ear::on(table, table.hears("l", 1)[0]));
    for turn in 0..3 {
        guards[turn].take().unwrap().unlock().unwrap();
        let (_lock, thread) = waiting[turn].take().unwrap();
        assert_eq!(takes_at_most(ms(2_000), "its turn", || thread.join().unwrap()), 2);
        for (n, ear) in ears.iter_mut().enumerate() {
            assert_eq!(ear.heard().len(), usize::from(n == turn), "table {n} in turn {turn}");
        }
        assert!(waiting.iter().flatten().all(|(_, thread)| !thread.is_finished()));
    }
    drop((guards, waiting, ears));
    eventually("the other database is not used any more", || {
        here.client().batch_execute(&format!("DROP DATABASE {database}")).is_ok()
    });
}

/// Somebody released it by hand, and told nobody.
#[test]
fn a_wait_ends_without_a_notification() {
    let table = Table::new();
    let ours = table.short_lock("l", ms(1_500), ms(500));
    let guard = ours.lock("holder").unwrap();
    let (_lock, waiting) = waiter(&table, "l");
    table.hears("l", 1);
    table.execute("UPDATE $T SET released_at = clock_timestamp()");
    // As soon as the lease that it saw would have ended.
    assert_eq!(takes_at_most(ms(4_000), "its turn", || waiting.join().unwrap()), 2);
    drop(guard);
}

#[test]
fn a_dead_holders_lock_is_taken_within_half_a_second_of_its_expiry() {
    let table = Table::new();
    let mut holder = Process::start("hold", &table, &["l", "worker-1", "2000", "400"]);
    assert_eq!(holder.expect_line(), "1");
    let (lock, waiting) = waiter(&table, "l");
    table.hears("l", 1);
    holder.signal(Signal::SIGKILL);
    // What it has sent arrives.
    holder.wait();
    eventually("its sessions are gone", || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%refreshed%' AND query LIKE '%' || $1 || \
        '%' AND pid <> pg_backend_pid()";
        table.client().query_one(sql, &[&table.name]).unwrap().get::<_, i64>(0) == 0
    });
    let expiry = lock.info().unwrap().unwrap().lease_expire_time;
    assert_eq!(waiting.join().unwrap(), 2);
    let late = lock.info().unwrap().unwrap().lock_begin_time.duration_since(expiry).expect("not before the expiry");
    assert!(late < ms(500), "{late:?}");
}

/// In whatever state the connection that listens is ended, the wait goes on, and ends soon after the release.
#[test]
fn the_end_of_the_listening_connection_in_any_state_ends_no_wait() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    let ours = table.lock("l");
    let wait = || waits_for(&lock);
    let mut client = table.client();
    // While it is opened.
    drop(lock.lock("warm-up").unwrap());
    proxy.swallow_next_connection();
    let guard = ours.lock("holder").unwrap();
    let waiting = wait();
    guard.unlock().unwrap();
    takes_at_most(ms(3_000), "opening got stuck", || waiting.join().unwrap());
    // While nothing happens; just before the release; and just after it.
    for pause in [Some(ms(300)), Some(Duration::ZERO), None] {
        let guard = ours.lock("holder").unwrap();
        let waiting = wait();
        let channel = table.hears("l", 1)[0];
        if let Some(pause) = pause {
            end_listener(&mut client, channel);
            thread::sleep(pause);
            guard.unlock().unwrap();
        } else {
            guard.unlock().unwrap();
            end_listener(&mut client, channel);
        }
        takes_at_most(ms(3_000), &format!("ended {pause:?} before"), || waiting.join().unwrap());
    }
    // Cut in the middle, together with all others.
    let guard = ours.lock("holder").unwrap();
    let waiting = wait();
    table.hears("l", 1);
    proxy.cut();
    guard.unlock().unwrap();
    takes_at_most(ms(3_000), "all were cut", || waiting.join().unwrap());
}

/// Its packets are swallowed, and nobody says so: a poll finds the lock free.
#[test]
fn a_wait_ends_although_the_listening_connection_went_deaf() {
    let table = Table::new();
    let proxy = Proxy::to(&table.dsn);
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = StorageLock::new(&storage, "l").unwrap();
    let ours = table.short_lock("l", ms(2_000), ms(500));
    let guard = ours.lock("holder").unwrap();
    let waiting = waits_for(&lock);
    table.hears("l", 1);
    proxy.swallow_open_connections();
    guard.unlock().unwrap();
    // The lease that it saw, and a call on a connection that hears nothing either.
    assert!(takes_at_most(Duration::from_secs(20), "its turn", || waiting.join().unwrap()) >= 2);
}

#[test]
fn a_lost_listening_connection_is_reported_once_and_replaced() {
    let server = Server::start();
    let table = Table::on(&server.dsn);
    let mut client = table.client();
    client.batch_execute("CREATE ROLE waiter LOGIN SUPERUSER PASSWORD 'w'").unwrap();
    let ours = table.lock("l");
    let guard = ours.lock("holder").unwrap();
    let as_waiter = Table::of(&format!("{} user=waiter password=w", table.dsn), &table.name);
    let mut child = Process::start_with_stderr("wait", &as_waiter, &["l"], Stdio::piped());
    assert_eq!(child.expect_line(), "waiting");
    let channel = table.hears("l", 1)[0];
    // What is open stays open; nothing can be opened.
    client.batch_execute("ALTER ROLE waiter NOLOGIN").unwrap();
    end_listener(&mut client, channel);
    thread::sleep(ms(3_000));
    assert_eq!(listeners(&mut client, channel), 0);
    client.batch_execute("ALTER ROLE waiter LOGIN").unwrap();
    eventually("it listens again", || listeners(&mut client, channel) == 1);
    thread::sleep(ms(300));
    guard.unlock().unwrap();
    assert_eq!(takes_at_most(ms(2_000), "its turn", || child.expect_line()), "2");
    assert!(child.wait().success());
    let log = child.stderr();
    let count = |text: &str| log.lines().filter(|line| line.contains(text)).count();
    assert_eq!(count("WARN  storage_lock] cannot listen for releases, waiting polls"), 1, "{log}");
    assert_eq!(count("INFO  storage_lock] listening for releases again"), 1, "{log}");
    assert_eq!(count("WARN"), 1, "{log}");
}

/// The first in the row is dead, or stopped: the next one takes the lock after a moment.
#[test]
fn a_waiting_process_that_is_killed_or_stopped_costs_the_next_one_a_moment() {
    let table = Table::new();
    let ours = table.lock("l");
    for signal in [Signal::SIGKILL, Signal::SIGSTOP] {
        let guard = ours.lock("holder").unwrap();
        let mut first = Process::start("wait", &table, &["l"]);
        assert_eq!(first.expect_line(), "waiting");
        table.hears("l", 1);
        let (_lock, second) = waiter(&table, "l");
        table.hears("l", 2);
        first.signal(signal);
        let version = guard.version();
        thread::sleep(ms(100));
        guard.unlock().unwrap();
        assert_eq!(takes_at_most(ms(2_000), "the second one's turn", || second.join().unwrap()), version + 1);
        assert!(table.waiters("l").is_empty(), "who didn't come is forgotten");
        if signal == Signal::SIGSTOP {
            // It finds the notification when it wakes, and asks.
            first.signal(Signal::SIGCONT);
            assert_eq!(first.expect_line(), (version + 2).to_string());
        }
    }
}

/// A whole deployment that was killed while it waited.
#[test]
fn many_dead_processes_in_the_row_cost_a_moment_each_and_are_forgotten() {
    let table = Table::new();
    let guard = table.lock("l").lock("holder").unwrap();
    table.execute("UPDATE $T SET waiters = ARRAY(SELECT gen_random_uuid() FROM generate_series(1, 20))");
    let (_lock, waiting) = waiter(&table, "l");
    eventually("it stands behind them", || table.waiters("l").len() == 21);
    thread::sleep(ms(100));
    guard.unlock().unwrap();
    // A tenth of a second for each, and not the rest of the lease of 30 s.
    takes_at_most(ms(5_000), "its turn", || waiting.join().unwrap());
    assert!(table.waiters("l").is_empty());
}

/// Its role has no way to open another connection, as behind a pooler.
#[test]
fn a_process_that_cannot_listen_neither_starves_nor_stops_the_others() {
    let server = Server::start();
    let table = Table::on(&server.dsn);
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    drop(ours.lock("warm-up").unwrap());
    let mut client = server.client();
    client.batch_execute("CREATE ROLE deaf LOGIN SUPERUSER PASSWORD 'w'").unwrap();
    let deaf = Table::of(&format!("{} user=deaf password=w", table.dsn), &table.name).lock("l");
    drop(deaf.lock("warm-up").unwrap());
    client.batch_execute("ALTER ROLE deaf NOLOGIN").unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    let take = |lock: &StorageLock| {
        let mut holds = 0_u32;
        while Instant::now() < end {
            drop(lock.lock("worker").unwrap());
            holds += 1;
        }
        holds
    };
    let holds = thread::scope(|scope| {
        [&ours, &theirs, &deaf].map(|lock| scope.spawn(move || take(lock))).map(|thread| thread.join().unwrap())
    });
    println!("{holds:?}");
    assert!(holds.iter().all(|holds| *holds >= 10), "{holds:?}");
}

#[test]
fn a_row_that_somebody_keeps_locked_is_busy_and_no_error() {
    let table = Table::new();
    let lock = table.lock("l");
    let _holder = table.lock("l").lock("holder").unwrap();
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.execute(&format!("SELECT FROM {} FOR UPDATE", table.name), &[]).unwrap();
    takes_at_most(ms(1_500), "the wait", || assert!(lock.try_lock_for("waiter", ms(300)).unwrap().is_none()));
    transaction.rollback().unwrap();
}

#[test]
fn two_processes_of_eight_threads_each_share_a_lock() {
    let table = Table::new();
    table.storage();
    let mut processes = [0, 1].map(|_| Process::start("take turns", &table, &["8", "4"]));
    processes.iter_mut().for_each(|process| assert_eq!(process.expect_line(), "ready"));
    processes.iter_mut().for_each(Process::go_on);
    let holds = processes
        .each_mut()
        .map(|process| -> Vec<u64> { process.expect_line().split(' ').map(|holds| holds.parse().unwrap()).collect() });
    println!("{holds:?}");
    let all: u64 = holds.iter().flatten().sum();
    for of_process in &holds {
        let sum: u64 = of_process.iter().sum();
        assert!(4 * sum >= all, "a process had less than a quarter: {holds:?}");
        let (least, most) = (of_process.iter().min().unwrap(), of_process.iter().max().unwrap());
        assert!(*most <= 3 * least, "a thread had more than three times as much as another one: {holds:?}");
    }
}

/// One that comes again and again, sooner than a notification travels, doesn't get ahead of the one that waits.
#[test]
fn who_comes_back_at_once_does_not_starve_who_waits() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    thread::scope(|scope| {
        let end = Instant::now() + ms(3_000);
        let take = move |lock: &StorageLock| {
            let mut holds = 0_u32;
            while Instant::now() < end {
                drop(lock.lock("worker").unwrap());
                holds += 1;
            }
            holds
        };
        let (ours, theirs) = (scope.spawn(move || take(&ours)), scope.spawn(move || take(&theirs)));
        let (ours, theirs) = (ours.join().unwrap(), theirs.join().unwrap());
        println!("{ours} and {theirs}");
        assert!(ours * 4 >= ours + theirs && theirs * 4 >= ours + theirs, "{ours} and {theirs}");
    });
}

#[test]
fn a_lock_that_was_promised_to_nobody_alive_is_free_for_one_that_does_not_wait() {
    let table = Table::new();
    let guard = table.lock("l").lock("holder").unwrap();
    table.client().execute(&format!("UPDATE {} SET waiters = $1", table.name), &[&vec![Uuid::new_v4()]]).unwrap();
    let theirs = table.lock("l");
    let released = Instant::now();
    guard.unlock().unwrap();
    let guard = theirs.try_lock("at once").unwrap().expect("free");
    // Unless this thread was slow.
    if released.elapsed() < ms(80) {
        assert_eq!(table.waiters("l").len(), 1, "whoever it was promised to keeps its place");
    }
    guard.unlock().unwrap();
    thread::sleep(ms(100));
    assert!(table.lock("l").try_lock("later").unwrap().is_some());
    assert!(table.waiters("l").is_empty(), "it had its time");
}

#[test]
fn a_wait_goes_on_while_its_row_is_purged() {
    let table = Table::new();
    let storage = table.storage();
    let lock = short_lock(&storage, "l", ms(2_000), ms(300));
    let guard = lock.lock("holder").unwrap();
    let (_lock, waiting) = waiter(&table, "l");
    table.hears("l", 1);
    table.execute("DELETE FROM $T");
    assert_eq!(takes_at_most(ms(6_000), "its turn", || waiting.join().unwrap()), 1);
    drop(guard);
}
