//! Many processes, some of which die.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::support::child::Process;
use crate::support::{Table, client, eventually, ms, takes_at_most};

#[test]
fn four_processes_with_eight_threads_each_lose_no_addition() {
    const TARGET: i64 = 2_000;
    let table = Table::new();
    table.storage();
    table
        .client()
        .batch_execute(
            &"CREATE TABLE $T_counter (n bigint); INSERT INTO $T_counter VALUES (0);
              CREATE TABLE $T_log (version bigint, n bigint)"
                .replace("$T", &table.name),
        )
        .unwrap();
    let read = |sql: &str| -> i64 { table.client().query_one(&sql.replace("$T", &table.name), &[]).unwrap().get(0) };
    let start = |seed: i64| Process::start("count", &table, &[&TARGET.to_string(), &seed.to_string()]);
    let kills = thread::scope(|scope| {
        let adders: Vec<_> = (0..4)
            .map(|process| {
                scope.spawn(move || {
                    // A process that leaves with a lock in its hand is followed by another one.
                    let mut child = start(process * 100);
                    while child.next_line(Duration::from_secs(600)).as_deref() != Some("done") {
                        child = start(process * 100);
                    }
                })
            })
            .collect();
        // One more is killed again and again, whatever it is doing.
        let mut kills = 0;
        while adders.iter().any(|adder| !adder.is_finished()) {
            let before = read("SELECT n FROM $T_counter");
            let victim = start(50);
            eventually("some additions", || {
                read("SELECT n FROM $T_counter") > (before + 40).min(TARGET - 1)
                    || adders.iter().all(|adder| adder.is_finished())
            });
            victim.signal(Signal::SIGKILL);
            kills += 1;
        }
        adders.into_iter().for_each(|adder| adder.join().unwrap());
        kills
    });
    println!("{kills} kills");
    assert!(kills > 5, "{kills} kills");
    assert_eq!(read("SELECT n FROM $T_counter"), TARGET);
    assert_eq!(read("SELECT count(*) FROM $T_log"), TARGET, "an addition was lost");
    assert_eq!(read("SELECT count(DISTINCT n) FROM $T_log"), TARGET, "two additions read the same");
    let out_of_order = "SELECT count(*) FROM (SELECT version, lag(version) OVER (ORDER BY n) AS before FROM $T_log) s
                        WHERE version <= before";
    assert_eq!(read(out_of_order), 0, "versions strictly grow");
    table.execute("DROP TABLE $T_counter, $T_log");
}

#[test]
fn a_killed_holders_lock_is_free_a_second_after_its_lease_at_the_latest() {
    let table = Table::new();
    let mut holder = Process::start("hold", &table, &["l", "worker-1", "2000", "400"]);
    assert_eq!(holder.expect_line(), "1");
    let theirs = table.lock("l");
    assert!(theirs.try_lock("worker-2").unwrap().is_none());
    holder.signal(Signal::SIGKILL);
    let guard = takes_at_most(ms(3_000), "the takeover", || theirs.lock("worker-2").unwrap());
    assert_eq!(guard.version(), 2);
    guard.unlock().unwrap();
}

#[test]
fn a_holder_stopped_for_longer_than_its_lease_knows_when_it_wakes() {
    let table = Table::new();
    let mut holder = Process::start("hold", &table, &["l", "worker-1", "1000", "200"]);
    assert_eq!(holder.expect_line(), "1");
    holder.signal(Signal::SIGSTOP);
    let theirs = table.lock("l");
    let guard = takes_at_most(ms(3_000), "the takeover", || theirs.lock("worker-1").unwrap());
    holder.signal(Signal::SIGCONT);
    assert_eq!(holder.expect_line(), "woken, is_held false");
    holder.go_on();
    assert_eq!(holder.expect_line(), "is_held false");
    assert_eq!(holder.expect_line(), "lost");
    assert!(holder.wait().success());
    assert!(guard.is_held() && theirs.info().unwrap().unwrap().is_held, "the zombie left the new hold alone");
}

#[test]
fn a_holder_stopped_for_less_than_its_lease_goes_on() {
    let table = Table::new();
    let mut holder = Process::start("hold", &table, &["l", "worker-1", "5000", "200"]);
    assert_eq!(holder.expect_line(), "1");
    holder.signal(Signal::SIGSTOP);
    thread::sleep(ms(1_500));
    holder.signal(Signal::SIGCONT);
    assert_eq!(holder.expect_line(), "woken, is_held true");
    holder.go_on();
    assert_eq!(holder.expect_line(), "is_held true");
    assert_eq!(holder.expect_line(), "unlocked");
}

#[test]
fn what_is_logged_at_which_level_is_a_promise() {
    let table = Table::new();
    let mut child = Process::start_with_stderr("healthy run", &table, &[], Stdio::piped());
    let log = child.stderr();
    assert!(child.wait().success(), "{log}");
    // A takeover is the worst of it.
    for line in log.lines() {
        assert!(line.contains(" storage_lock]") && !line.contains("WARN") && !line.contains("ERROR"), "{line}");
    }
    let mut lines = log.lines();
    for promised in [
        "DEBUG storage_lock] opened a connection",
        "INFO  storage_lock] created table",
        "DEBUG storage_lock] \"worker-1\" acquired lock \"healthy\" as version 1",
        "DEBUG storage_lock] lock \"healthy\" is busy: held by \"worker-1\" as version 1",
        "TRACE storage_lock] refreshed lock \"healthy\"",
        "DEBUG storage_lock] released lock \"healthy\" (version 1)",
        "INFO  storage_lock] lock \"healthy\" was taken over from \"worker-3\", whose lease had run out",
    ] {
        assert!(lines.any(|line| line.contains(promised)), "not logged, or not in this order: {promised}\n{log}");
    }
}

#[test]
fn processes_that_hammer_one_lock_never_hold_it_together() {
    let table = Table::new();
    let storage = table.storage();
    let lock = storage_lock::StorageLock::new(&storage, "hammered").unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    let owner = std::sync::atomic::AtomicUsize::new(0);
    // Each thread as a process: with a storage, and so connections, of its own.
    let holds: Vec<usize> = thread::scope(|scope| {
        let threads: Vec<_> = (1..=8)
            .map(|number| {
                let (table, owner) = (&table, &owner);
                scope.spawn(move || {
                    use std::sync::atomic::Ordering::SeqCst;
                    let (lock, mut holds, mut last) = (table.lock("hammered"), 0, 0);
                    while Instant::now() < end {
                        let Some(guard) = lock.try_lock("worker").unwrap() else { continue };
                        assert_eq!(owner.swap(number, SeqCst), 0, "two hold it");
                        assert!(guard.version() > last);
                        last = guard.version();
                        holds += 1;
                        assert_eq!(owner.swap(0, SeqCst), number, "two hold it");
                    }
                    holds
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let total: usize = holds.iter().sum();
    println!("{total} holds: {holds:?}");
    assert!(total > 50);
    let version = lock.info().unwrap().unwrap().version;
    assert_eq!(usize::try_from(version).unwrap(), total, "each hold has a version of its own");
    drop(client());
}
