//! Networks that are slow or half dead, and servers and hosts with limits: they cost time, and no hold whose
//! refreshes get through.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use storage_lock::{Error, Event, LockGuard, LockOptions, PostgresStorage, StorageLock};

use crate::support::child::{Process, say, wait_for_parent};
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::{Table, chain, dsn, eventually, is_refreshed, ms, short_lock, takes_at_most, within};

/// A table, a proxy before its server, and a storage that goes through the proxy.
fn proxied(max_connections: u32) -> (Table, Proxy, PostgresStorage) {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let options = Table::of(&proxy.dsn, &table.name).options().max_connections(max_connections);
    let storage = PostgresStorage::new(options).unwrap();
    (table, proxy, storage)
}

#[test]
fn a_network_with_slow_answers_costs_no_hold_and_no_connection() {
    for (delay, lease) in [(50, 1_000), (150, 1_000), (300, 2_000), (700, 3_000)] {
        let (_table, proxy, storage) = proxied(4);
        proxy.delay_answers(ms(delay));
        let lock = short_lock(&storage, "l", ms(lease), ms(lease / 3));
        let guard = lock.lock("worker").unwrap();
        let connections = proxy.connections();
        let end = Instant::now() + 4 * ms(lease);
        while Instant::now() < end {
            assert!(guard.is_held(), "{delay} ms, lease {lease} ms");
            thread::sleep(ms(5));
        }
        guard.unlock().unwrap();
        assert!(proxy.connections() <= connections + 1, "{delay} ms: {} connections", proxy.connections());
    }
}

/// If answers were twice as late, a refresh would come too late: then the lock is not taken.
#[test]
fn what_is_taken_is_kept_however_late_the_answers_are() {
    for (delay, lease) in [(600, 2_000), (750, 2_000), (950, 2_000), (1_100, 3_000), (1_500, 3_000)] {
        let (_table, proxy, storage) = proxied(4);
        let lock = short_lock(&storage, "l", ms(lease), ms(lease / 3));
        drop(lock.lock("warm-up").unwrap());
        proxy.delay_answers(ms(delay));
        match lock.lock("worker") {
            Ok(guard) => {
                thread::sleep(3 * ms(lease));
                assert!(guard.is_held(), "{delay} ms, lease {lease} ms");
            }
            Err(error) => assert!(error.to_string().contains("two fifths of the lease"), "{}", chain(&error)),
        }
    }
}

/// Longer than a try: the next one has more time, and those after it know.
#[test]
fn answers_of_three_seconds_are_waited_for() {
    let (table, proxy, storage) = proxied(4);
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    proxy.delay_answers(ms(3_000));
    drop(takes_at_most(ms(10_500), "the first", || lock.lock("worker")).unwrap());
    let theirs = table.lock("l").lock("other").unwrap();
    thread::scope(|scope| {
        let waiter = scope.spawn(|| lock.lock("waiter").unwrap());
        thread::sleep(ms(5_000));
        theirs.unlock().unwrap();
        drop(takes_at_most(ms(12_000), "its turn", || waiter.join().unwrap()));
    });
}

/// A tunnel that dies, with all that goes through it.
#[test]
fn connections_that_go_silent_together_cost_no_hold_and_no_call() {
    let (table, proxy, storage) = proxied(4);
    let guard = short_lock(&storage, "l", ms(6_000), ms(1_000)).lock("worker").unwrap();
    // All four connections are open: three that read, and one that refreshes.
    let mut client = table.client();
    let mut transaction = client.transaction().unwrap();
    transaction.batch_execute(&format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", table.name)).unwrap();
    thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(|| storage.get("l").unwrap())));
        eventually("all are open", || proxy.connections() >= 4);
        thread::sleep(ms(300));
        transaction.rollback().unwrap();
    });
    for _ in 0..2 {
        thread::sleep(ms(300));
        proxy.swallow_open_connections();
        takes_at_most(ms(5_000), "a read", || storage.server_time()).unwrap();
        is_refreshed(&guard);
    }
    // Nobody calls, but the hold is refreshed.
    proxy.swallow_open_connections();
    (0..3).for_each(|_| is_refreshed(&guard));
    proxy.swallow_open_connections();
    takes_at_most(ms(2_200), "unlock", || guard.unlock()).unwrap();
    assert!(!table.lock("l").info().unwrap().unwrap().is_held);
}

/// The server closes what connects, at once.
#[test]
fn callers_of_a_server_that_lets_nobody_in_hear_the_cause_at_once() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let storage = table.storage();
    let port = server.dsn.parse::<postgres::Config>().unwrap().get_ports()[0];
    server.ctl(&["stop", "-m", "immediate"]);
    let closing = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&accepted);
    thread::spawn(move || closing.incoming().for_each(|_| _ = count.fetch_add(1, Ordering::SeqCst)));
    for callers in [1, 2, 4, 8] {
        let before = accepted.load(Ordering::SeqCst);
        thread::scope(|scope| {
            for _ in 0..callers {
                scope.spawn(|| {
                    let error = takes_at_most(ms(2_000), "a read", || storage.server_time()).unwrap_err();
                    assert!(matches!(error, Error::Connect { .. } | Error::Database { .. }), "{}", chain(&error));
                });
            }
        });
        let more = accepted.load(Ordering::SeqCst) - before;
        assert!(more <= 3 * callers + 4, "{more} connections for {callers} callers");
    }
}

#[test]
fn an_unlock_whose_answer_takes_more_than_a_second_is_a_release() {
    let (table, proxy, storage) = proxied(4);
    proxy.delay_answers(ms(1_100));
    let lock = StorageLock::new(&storage, "l").unwrap();
    for _ in 0..3 {
        let guard = lock.lock("worker").unwrap();
        takes_at_most(ms(2_200), "unlock", || guard.unlock()).unwrap();
        assert!(!table.lock("l").info().unwrap().unwrap().is_held);
    }
    // The same with another thread that waits for it.
    let guard = lock.lock("worker").unwrap();
    thread::scope(|scope| {
        let next = scope.spawn(|| lock.lock("next").unwrap());
        thread::sleep(ms(300));
        takes_at_most(ms(2_200), "unlock", || guard.unlock()).unwrap();
        drop(takes_at_most(ms(10_000), "the next hold", || next.join().unwrap()));
    });
}

/// The callers give up, the answers come: nothing is opened instead.
#[test]
fn answers_that_come_too_late_for_their_callers_cost_no_connection() {
    let (_table, proxy, storage) = proxied(2);
    let lock = StorageLock::new(&storage, "l").unwrap();
    drop(lock.lock("warm-up").unwrap());
    proxy.delay_answers(ms(800));
    let mut at_first = 0;
    for round in 0..8 {
        lock.try_lock_for("late", Duration::ZERO).unwrap_err();
        thread::sleep(ms(1_500));
        // Those that the storage may have are opened when they are first needed.
        if round == 1 {
            at_first = proxy.connections();
        }
    }
    proxy.delay_answers(Duration::ZERO);
    drop(lock.lock("worker").unwrap());
    let more = proxy.connections() - at_first;
    assert!(more <= 2, "{more} connections more");
}

#[test]
fn a_lease_too_short_for_the_network_is_an_error_that_says_so() {
    let (_table, proxy, storage) = proxied(4);
    proxy.delay_answers(ms(700));
    let lock = short_lock(&storage, "l", ms(1_000), ms(300));
    let error = takes_at_most(ms(15_000), "lock", || lock.lock("worker")).unwrap_err();
    assert!(error.to_string().contains("two fifths of the lease"), "{}", chain(&error));
    proxy.delay_answers(Duration::ZERO);
    eventually("it is free", || storage.get("l").unwrap().is_none_or(|lock| !lock.is_held));
    drop(lock.lock("worker").unwrap());
}

#[test]
fn a_call_right_after_a_freeze_waits_for_the_server() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let storage = table.storage();
    let lock = |id: &str| short_lock(&storage, id, ms(5_000), ms(500));
    for round in 0..3 {
        let guards = [lock("a").lock("worker").unwrap(), lock("b").lock("worker").unwrap()];
        guards.iter().for_each(is_refreshed);
        server.freeze();
        lock("c").try_lock_for("worker", ms(1_000)).unwrap_err();
        eventually("the holds are lost", || !guards.iter().any(LockGuard::is_held));
        drop(guards);
        server.thaw();
        let guard =
            lock("a").try_lock_for("worker", ms(10_000)).unwrap_or_else(|error| panic!("{round}: {}", chain(&error)));
        guard.expect("its lease is over soon").unlock().unwrap();
    }
}

#[test]
fn connections_that_are_swallowed_now_and_then_stop_nothing() {
    let (_table, proxy, storage) = proxied(4);
    let held = short_lock(&storage, "held", ms(6_000), ms(1_000)).lock("worker").unwrap();
    for n in 0..40 {
        proxy.swallow_answers_after(format!("owner-{n}").as_bytes());
        let lock = short_lock(&storage, &format!("l{}", n % 3), ms(6_000), ms(1_000));
        let result = lock.try_lock_for(&format!("owner-{n}"), ms(10));
        assert!(matches!(result, Err(Error::Timeout { .. })) && proxy.has_swallowed(), "{n}: {result:?}");
        takes_at_most(ms(1_500), "a healthy call", || storage.server_time()).unwrap();
        assert!(held.is_held(), "after {n} swallowed connections");
    }
    held.unlock().unwrap();
}

#[test]
fn one_swallowed_acquire_fails_no_waiter_of_its_lock() {
    let (_table, proxy, storage) = proxied(4);
    let lock = short_lock(&storage, "l", ms(2_000), ms(300));
    drop(lock.lock("warm-up").unwrap());
    proxy.swallow_answers_after(b"first-to-ask");
    thread::scope(|scope| {
        let waiters = ["first-to-ask", "second", "third"].map(|owner| {
            let waiter = scope.spawn(|| lock.lock(owner).map(|guard| guard.version()));
            thread::sleep(ms(100));
            waiter
        });
        for waiter in waiters {
            waiter.join().unwrap().unwrap();
        }
    });
    assert!(proxy.has_swallowed());
}

#[test]
fn a_swallowed_release_or_hand_over_is_made_on_another_connection() {
    for is_waited_for in [false, true] {
        let (table, proxy, storage) = proxied(4);
        let lock = StorageLock::new(&storage, "l").unwrap();
        let guard = lock.lock("first").unwrap();
        thread::scope(|scope| {
            let waiter = is_waited_for.then(|| scope.spawn(|| lock.lock("second").unwrap()));
            thread::sleep(ms(200));
            proxy.swallow_open_connections();
            takes_at_most(ms(2_200), "unlock", || guard.unlock()).unwrap();
            if let Some(waiter) = waiter {
                drop(takes_at_most(ms(5_000), "the next hold", || waiter.join().unwrap()));
            }
        });
        within(ms(5_000), "free", || table.lock("l").try_lock("other").unwrap().map(drop));
    }
}

/// A role of its own that may have few connections, and the DSN for it.
struct Few {
    table: Table,
    role: String,
    dsn: String,
}

impl Few {
    fn connections(limit: u32) -> Few {
        let table = Table::new();
        table.storage();
        let role = format!("it_role_{}", uuid::Uuid::new_v4().simple());
        table.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'few' CONNECTION LIMIT {limit}"));
        table.execute(&format!("GRANT SELECT, INSERT, UPDATE ON $T TO {role}"));
        let config: postgres::Config = dsn().parse().unwrap();
        let password = String::from_utf8(config.get_password().unwrap().to_vec()).unwrap();
        let dsn = dsn().replace(config.get_user().unwrap(), &role).replace(&password, "few");
        Few { table, role, dsn }
    }
}

impl Drop for Few {
    fn drop(&mut self) {
        let sql = format!("REVOKE ALL ON {} FROM {role}; DROP ROLE {role}", self.table.name, role = self.role);
        eventually("the role is free", || self.table.client().batch_execute(&sql).is_ok());
    }
}

#[test]
fn a_limit_of_connections_costs_no_hold_and_fails_no_call() {
    for limit in [1, 2] {
        let few = Few::connections(limit);
        let storage = Table::of(&few.dsn, &few.table.name).storage();
        let lock = |id: &str| short_lock(&storage, id, ms(3_000), ms(1_000));
        let guards: Vec<LockGuard> = (0..10).map(|n| lock(&format!("held {n}")).lock("worker").unwrap()).collect();
        let end = Instant::now() + ms(6_000);
        thread::scope(|scope| {
            for n in 0..4 {
                let lock = lock(&format!("other {n}"));
                scope.spawn(move || {
                    while Instant::now() < end {
                        drop(lock.lock("other").unwrap());
                    }
                });
            }
        });
        assert!(guards.iter().all(LockGuard::is_held), "limit {limit}");
        storage.list().unwrap();
        drop((guards, storage));
    }
}

/// One of two connections breaks in a call, while the other one is idle.
#[test]
fn a_connection_that_breaks_takes_none_of_the_others_with_it() {
    let few = Few::connections(2);
    let storage = Table::of(&few.dsn, &few.table.name).storage();
    let guard = short_lock(&storage, "l", ms(30_000), ms(20_000)).lock("worker").unwrap();
    let (mut client, mut locking) = (few.table.client(), few.table.client());
    let lock_table = format!("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE", few.table.name);
    let mut pids = |condition: &str| -> Vec<i32> {
        let sql = format!("SELECT pid FROM pg_stat_activity WHERE usename = $1 AND {condition}");
        client.query(&sql, &[&few.role]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let mut all = Vec::new();
    for reads in [2, 1] {
        let mut transaction = locking.transaction().unwrap();
        transaction.batch_execute(&lock_table).unwrap();
        thread::scope(|scope| {
            (0..reads).for_each(|_| drop(scope.spawn(|| assert!(storage.get("l").unwrap().unwrap().is_held))));
            eventually("they wait", || pids("wait_event_type = 'Lock'").len() == reads);
            if reads == 2 {
                all = pids("true");
            } else {
                let broken = pids("wait_event_type = 'Lock'")[0];
                few.table.client().execute("SELECT pg_terminate_backend($1)", &[&broken]).unwrap();
                all.retain(|pid| *pid != broken);
            }
            transaction.rollback().unwrap();
        });
        thread::sleep(ms(300));
    }
    assert_eq!(all.len(), 1);
    assert!(pids("true").contains(&all[0]), "the other one was given up");
    guard.unlock().unwrap();
    drop(storage);
}

/// One call is stuck; the next one waits beside an idle connection that is kept for urgent ones, until the first is
/// late.
#[test]
fn a_place_that_opens_because_a_call_is_late_is_taken_at_once() {
    let (table, proxy, storage) = proxied(2);
    let lock = |id: &str| StorageLock::new(&storage, id).unwrap();
    drop(lock("warm-up").lock("worker").unwrap());
    let guard = lock("urgent").lock("worker").unwrap();
    proxy.swallow_answers_after(b"stuck");
    thread::scope(|scope| {
        let stuck = scope.spawn(|| lock("a").try_lock_for("stuck", Duration::ZERO).unwrap_err());
        eventually("it is stuck", || proxy.has_swallowed());
        // The second connection is opened by an urgent call, and idle afterwards.
        guard.unlock().unwrap();
        takes_at_most(ms(2_000), "the next call", || lock("b").try_lock("worker")).unwrap();
        stuck.join().unwrap();
    });
    drop(table);
}

#[test]
fn each_of_several_hosts_has_its_time_and_its_cause() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config: postgres::Config = dsn().parse().unwrap();
    let (port, good) = (config.get_ports()[0], dsn());
    let several = |ports: &[u16]| {
        let hosts = vec!["127.0.0.1"; ports.len()].join(",");
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        let rest: Vec<&str> =
            good.split(' ').filter(|it| !it.starts_with("host=") && !it.starts_with("port=")).collect();
        format!("host={hosts} port={} connect_timeout=1 {}", ports.join(","), rest.join(" "))
    };
    let silent_port = silent.local_addr().unwrap().port();
    let table = Table::new();
    let open = |ports: &[u16]| PostgresStorage::new(Table::of(&several(ports), &table.name).options());
    takes_at_most(ms(3_500), "after two silent ones", || open(&[silent_port, silent_port, port])).unwrap();
    open(&[closed, port]).unwrap();
    // What was silent is tried last for a while: the second connection is opened at once.
    let storage = open(&[silent_port, port]).unwrap();
    takes_at_most(ms(900), "a list", || storage.list()).unwrap();

    let wrong = several(&[port, closed]).replace("user=", "user=nobody_of_that_name_");
    let error = chain(&PostgresStorage::connect(&wrong).unwrap_err());
    for part in
        [format!("port {port}"), format!("port {closed}"), "refused".to_owned(), "nobody_of_that_name_".to_owned()]
    {
        assert!(error.contains(&part), "{part:?} isn't in {error}");
    }
    let error = chain(&open(&[closed]).unwrap_err());
    assert!(error.contains(&format!("127.0.0.1, port {closed}")) && error.contains("refused"), "{error}");
}

/// A name with three addresses, of which the first two accept, by their kernel, and say nothing.
#[test]
fn a_name_with_dead_addresses_is_connected_to() {
    let table = Table::new();
    let config: postgres::Config = dsn().parse().unwrap();
    let server = config.get_ports()[0];
    let good = TcpListener::bind("127.0.0.9:0").unwrap();
    let port = good.local_addr().unwrap().port();
    let dead = ["127.0.0.2", "127.0.0.3"].map(|ip| TcpListener::bind((ip, port)).unwrap());
    thread::spawn(move || {
        for client in good.incoming().flatten() {
            let server = TcpStream::connect(("127.0.0.1", server)).unwrap();
            for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                thread::spawn(move || io::copy(&mut from, &mut to));
            }
        }
    });
    let hosts = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("hosts-{}", table.name));
    let names = "127.0.0.1 localhost\n127.0.0.2 pg.test\n127.0.0.3 pg.test\n127.0.0.9 pg.test\n";
    std::fs::write(&hosts, names).unwrap();
    let child = Process::start_with_hosts(&hosts, "connect to a name", &table, &[&port.to_string()]);
    if let Some(mut child) = child {
        assert_eq!(child.next_line(Duration::from_secs(30)).as_deref(), Some("as expected"));
        assert!(child.wait().success());
    } else {
        println!("no process with names of its own can be started here");
    }
    std::fs::remove_file(&hosts).unwrap();
    drop(dead);
}

pub fn connect_to_a_name(table: &Table, port: u16) {
    let parts = table.dsn.split(' ').filter(|it| !it.starts_with("host=") && !it.starts_with("port="));
    let dsn = format!("host=pg.test port={port} connect_timeout=1 {}", parts.collect::<Vec<_>>().join(" "));
    let open = || PostgresStorage::new(Table::of(&dsn, &table.name).options()).unwrap();
    let storage = takes_at_most(ms(3_500), "each address has its time", open);
    let lock = short_lock(&storage, "l", ms(3_000), ms(500));
    let guard = lock.lock("worker").unwrap();
    table.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%$T%' AND pid <> pg_backend_pid()",
    );
    // It is connected to again at once: the dead ones are tried last.
    (0..3).for_each(|_| is_refreshed(&guard));
    guard.unlock().unwrap();
    say("as expected");
}

#[test]
fn without_a_free_descriptor_a_call_fails_with_the_cause_and_the_next_one_works() {
    let table = Table::new();
    table.storage();
    let mut child = Process::start_with_stderr("no descriptor", &table, &[], Stdio::piped());
    assert_eq!(child.next_line(Duration::from_secs(30)).as_deref(), Some("refused"));
    assert_eq!(child.expect_line(), "held");
    assert!(child.wait().success());
    assert!(!child.stderr().contains("panicked"), "{}", child.stderr());
}

pub fn no_descriptor(table: &Table) {
    let storage = table.storage();
    let guard = short_lock(&storage, "l", ms(6_000), ms(300)).lock("worker").unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64.min(soft), hard).unwrap();
    let files: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    for result in [table_of(table).map(drop), storage.list().map(drop)] {
        // The list goes on where a connection is open already.
        if let Err(error) = result {
            assert!(chain(&error).contains("Too many open files"), "{}", chain(&error));
        }
    }
    assert!(chain(&table_of(table).unwrap_err()).contains("Too many open files"));
    say("refused");
    drop(files);
    is_refreshed(&guard);
    drop(table_of(table).unwrap());
    say(if guard.is_held() { "held" } else { "lost" });
}

fn table_of(table: &Table) -> storage_lock::Result<PostgresStorage> {
    PostgresStorage::new(table.options())
}

/// The server, or a proxy, closes what is idle: that is noticed before a call is made on it.
#[test]
fn a_connection_that_is_closed_while_it_is_idle_troubles_nobody() {
    let server = Server::start();
    server.set("idle_session_timeout", "500");
    let table = Table::on(&server.dsn);
    let (failures, reconnects) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (failed, reconnected) = (Arc::clone(&failures), Arc::clone(&reconnects));
    let options = table.options().on_event(move |event| match event {
        Event::RefreshFailed { .. } => _ = failed.fetch_add(1, Ordering::SeqCst),
        Event::Reconnected { .. } => _ = reconnected.fetch_add(1, Ordering::SeqCst),
        _ => {}
    });
    let storage = PostgresStorage::new(options).unwrap();
    let guard = short_lock(&storage, "l", ms(6_000), ms(1_500)).lock("worker").unwrap();
    (0..4).for_each(|_| is_refreshed(&guard));
    guard.unlock().unwrap();
    assert_eq!((failures.load(Ordering::SeqCst), reconnects.load(Ordering::SeqCst)), (0, 0));
    // The one that listens is closed, too: about twice a second. Each time the waiter asks for the lock itself, on a
    // connection that is then about to be closed, so that one call or other may meet its end.
    let theirs = table.lock("other").lock("holder").unwrap();
    thread::scope(|scope| {
        let lock = StorageLock::new(&storage, "other").unwrap();
        let waiter = scope.spawn(move || lock.try_lock_for("waiter", ms(10_000)).unwrap());
        thread::sleep(ms(3_000));
        theirs.unlock().unwrap();
        drop(takes_at_most(ms(6_000), "its turn", || waiter.join().unwrap()).expect("its turn"));
    });
    assert_eq!(failures.load(Ordering::SeqCst), 0);
    assert!(reconnects.load(Ordering::SeqCst) <= 2, "{reconnects:?}");
}

#[test]
fn a_server_that_goes_away_is_told_once_and_so_is_its_return() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    table.storage();
    let mut child = Process::start_with_stderr("hold twenty", &table, &[], Stdio::piped());
    assert_eq!(child.expect_line(), "held");
    server.ctl(&["stop", "-m", "immediate"]);
    thread::sleep(Duration::from_secs(5));
    server.ctl(&["start"]);
    thread::sleep(ms(2_500));
    child.go_on();
    assert_eq!(child.expect_line(), "held 20");
    assert!(child.wait().success());
    let stderr = child.stderr();
    let lines: Vec<&str> = stderr.lines().filter(|line| line.contains("storage_lock")).collect();
    let mut counts = HashMap::new();
    for line in &lines {
        *counts.entry(line.contains("succeed again")).or_insert(0) += 1;
    }
    assert_eq!(counts.get(&true), Some(&1), "{lines:#?}");
    assert!(counts[&false] <= 1, "{lines:#?}");
    assert!(lines.iter().all(|line| !line.ends_with("db error")), "{lines:#?}");
}

pub fn hold_twenty(table: &Table) {
    env_logger::Builder::new().filter_module("storage_lock", log::LevelFilter::Info).init();
    let storage = table.storage();
    let guards: Vec<LockGuard> =
        (0..20).map(|n| short_lock(&storage, &format!("l{n}"), ms(20_000), ms(300)).lock("worker").unwrap()).collect();
    say("held");
    wait_for_parent();
    say(format!("held {}", guards.iter().filter(|guard| guard.is_held()).count()));
    // Their releases are not what this is about.
    std::process::exit(0);
}

#[test]
fn a_list_reads_the_table_in_its_order_and_keeps_no_call_waiting() {
    let table = Table::new();
    let storage = PostgresStorage::new(table.options().max_connections(1)).unwrap();
    let lock = StorageLock::with_options(&storage, LockOptions::new("held")).unwrap();
    let guard = lock.lock("worker").unwrap();
    table.execute(
        "INSERT INTO $T (lock_id, version, owner_id, lease_id, lock_begin_time, lease_expire_time, released_at)
         SELECT 'l' || n, 1, 'o', gen_random_uuid(), now(), now(), now() FROM generate_series(1, 200000) AS n",
    );
    let scans = || -> i64 {
        let sql = "SELECT pg_stat_clear_snapshot(), seq_tup_read FROM pg_stat_user_tables WHERE relname = $1";
        table.client().query_one(sql, &[&table.name]).unwrap().get(1)
    };
    let before = scans();
    let listed = storage.list().unwrap();
    assert_eq!(listed.iter().map(|lock| lock.lock_id.as_str()).collect::<Vec<_>>(), ["held"]);
    eventually("a sequential scan", || scans() >= before + 200_000);
    guard.unlock().unwrap();
}

#[test]
fn a_release_that_could_not_be_made_is_made_when_the_server_is_back() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let guard = table.short_lock("l", ms(90_000), ms(30_000)).lock("worker").unwrap();
    server.ctl(&["stop", "-m", "immediate"]);
    let error = takes_at_most(ms(2_500), "unlock", || guard.unlock()).unwrap_err();
    assert!(!error.is_lease_lost(), "{}", chain(&error));
    server.ctl(&["start"]);
    let theirs = table.lock("l");
    within(ms(10_000), "the lock is free", || theirs.try_lock("other").unwrap().map(drop));
}
