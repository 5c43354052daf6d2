//! Servers that freeze, restart and crash. Each test has one of its own.

use std::thread;
use std::time::{Duration, Instant};

use storage_lock::{Error, PostgresStorage, StorageLock};

use crate::support::server::Server;
use crate::support::{Table, chain, eventually, is_refreshed, ms, short_lock, takes_at_most, within};

#[test]
fn with_every_process_of_the_server_stopped_every_call_comes_back() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let storage = table.storage();
    let lock = short_lock(&storage, "held", ms(3_000), ms(500));
    let free = StorageLock::new(&storage, "free").unwrap();
    let other = StorageLock::new(&storage, "other").unwrap();
    drop(free.lock("warm-up").unwrap());
    let (guard, dropped) = (lock.lock("worker").unwrap(), free.lock("other").unwrap());
    let taken = Instant::now();
    server.freeze();
    thread::scope(|scope| {
        scope.spawn(|| {
            let result = takes_at_most(ms(3_000), "try_lock_for(2 s)", || other.try_lock_for("late", ms(2_000)));
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
        });
        scope.spawn(|| takes_at_most(ms(2_500), "drop", || drop(dropped)));
        scope.spawn(|| {
            // Connecting gets stuck after the socket: the kernel accepts.
            let result = takes_at_most(ms(2_000), "connect", || {
                PostgresStorage::connect(&format!("{} connect_timeout=1", server.dsn))
            });
            assert!(chain(&result.unwrap_err()).contains("connect_timeout"));
        });
        eventually("the hold is lost", || !guard.is_held());
        // The last refresh may have come just before the freeze.
        assert!(taken.elapsed() < ms(3_500), "{:?}", taken.elapsed());
    });
    assert!(takes_at_most(ms(100), "unlock", || guard.unlock()).unwrap_err().is_lease_lost());
    // Many more calls than workers, and than workers may be stuck.
    thread::scope(|scope| {
        for _ in 0..40 {
            scope
                .spawn(|| takes_at_most(ms(1_000), "try_lock_for", || free.try_lock_for("late", ms(100)).unwrap_err()));
        }
    });
    server.thaw();
    // Everything that was stuck has been undone: nobody holds the lock, and it is not waited for a lease of 30 s.
    let guard = takes_at_most(Duration::from_secs(10), "lock", || {
        loop {
            if let Ok(Some(guard)) = free.try_lock("worker") {
                break guard;
            }
            thread::sleep(ms(20));
        }
    });
    assert!(guard.is_held());
    guard.unlock().unwrap();
    drop((lock, free, other, storage));
    // What was given up without an answer is cleaned up for about half a minute.
    within(ms(60_000), "all connections are closed", || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'storage_lock'";
        (server.client().query_one(sql, &[]).unwrap().get::<_, i64>(0) == 0).then_some(())
    });
}

#[test]
fn a_hold_survives_a_restart_and_a_crash_of_the_server() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let storage = table.storage();
    let guard = short_lock(&storage, "l", Duration::from_secs(20), ms(200)).lock("worker").unwrap();
    for arguments in [["restart", "-m", "fast"], ["restart", "-m", "immediate"]] {
        server.ctl(&arguments);
        is_refreshed(&guard);
        assert!(guard.is_held());
        let theirs = table.lock("l");
        assert!(theirs.try_lock("other").unwrap().is_none(), "the granted lease survived");
        let row = theirs.info().unwrap().unwrap();
        assert_eq!((row.version, row.owner_id.as_str()), (guard.version(), "worker"));
    }
    // Idle connections died with the server: the release finds that out, and goes on.
    guard.unlock().unwrap();
    assert_eq!(table.lock("l").lock("other").unwrap().version(), 2);
}

#[test]
fn a_wait_outlives_a_restart_of_the_server() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let guard = ours.lock("worker-1").unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| theirs.lock("worker-2").unwrap().version());
        // Its first attempt is over: an error of that one would end the wait.
        table.hears("l", 1);
        server.ctl(&["restart", "-m", "fast"]);
        assert!(!waiting.is_finished());
        guard.unlock().unwrap();
        assert_eq!(waiting.join().unwrap(), 2);
    });
}

#[test]
fn a_wait_without_end_gives_up_when_the_server_is_away_for_a_lease() {
    let mut server = Server::start();
    let table = Table::on(&server.dsn);
    let holder = table.lock("l").lock("worker-1").unwrap();
    let theirs = table.short_lock("l", ms(1_000), ms(300));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| theirs.lock("worker-2").unwrap_err());
        thread::sleep(ms(300));
        server.ctl(&["stop", "-m", "immediate"]);
        let error = takes_at_most(Duration::from_secs(10), "giving up", || waiting.join().unwrap());
        assert!(matches!(error, Error::Connect { .. }), "{}", chain(&error));
        // With a timeout the wait goes on to its end, and then says why.
        let start = Instant::now();
        theirs.try_lock("worker-3").unwrap_err();
        assert!(start.elapsed() < ms(1_000), "the first attempt's error comes back at once");
    });
    server.ctl(&["start"]);
    drop(holder);
}

/// A refresh that waits for a synchronous standby when the hold is lost and dropped: it must not keep the lock when it
/// commits in the end.
#[test]
fn a_refresh_that_commits_after_the_hold_was_lost_keeps_nothing() {
    let server = Server::start();
    let table = Table::on(&server.dsn);
    let storage = table.storage();
    let guard = short_lock(&storage, "l", ms(10_000), ms(3_000)).lock("worker").unwrap();
    server.set("synchronous_standby_names", "nobody");
    eventually("the hold is lost", || !guard.is_held());
    assert!(guard.unlock().unwrap_err().is_lease_lost());
    server.set("synchronous_standby_names", "");
    // The last refresh was sent shortly before the end, and would have kept the lock for up to 10 s.
    let start = Instant::now();
    eventually("the lock is free", || !storage.get("l").unwrap().unwrap().is_held);
    assert!(start.elapsed() < ms(5_000), "{:?}", start.elapsed());
}
