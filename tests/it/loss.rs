//! How a hold is lost, when its holder hears of it, and what it can't do any more.

use std::thread;
use std::time::{Duration, Instant};

use storage_lock::{PostgresStorage, StorageLock};

use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::{Table, dsn, eventually, is_refreshed, ms, takes_at_most};

#[test]
fn a_hold_that_was_taken_over_is_lost_and_touches_its_successor_no_more() {
    let table = Table::new();
    let (ours, theirs) = (table.short_lock("l", ms(1_000), ms(20)), table.lock("l"));
    let old = ours.lock("worker-1").unwrap();
    // Takes over in the same moment as the lease ends, or finds it renewed: until it works.
    let new = loop {
        table.expire("l");
        // The same owner's name: a hold is a version and a lease, not a name.
        if let Some(guard) = theirs.try_lock("worker-1").unwrap() {
            break guard;
        }
    };
    assert!(new.version() > old.version());
    eventually("the old hold hears of it", || !old.is_held());
    assert_eq!(old.remaining(), Duration::ZERO);
    let before = theirs.info().unwrap().unwrap();
    let error = old.unlock().unwrap_err();
    assert!(error.is_lease_lost(), "{error:?}");
    assert!(error.to_string().contains("lock \"l\"") && error.to_string().contains("worker-1"), "{error}");
    assert_eq!(theirs.info().unwrap().unwrap(), before, "the old guard changed the new hold's row");
    assert!(new.is_held());
    new.unlock().unwrap();
}

#[test]
fn dropping_a_lost_guard_leaves_its_successor_alone() {
    let table = Table::new();
    // Refreshes too rarely to hear of it.
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let old = ours.lock("worker-1").unwrap();
    table.expire("l");
    let new = theirs.lock("worker-1").unwrap();
    let before = theirs.info().unwrap().unwrap();
    drop(old);
    assert_eq!(theirs.info().unwrap().unwrap(), before);
    assert!(new.is_held());
}

#[test]
fn unlock_says_that_the_lease_was_lost_even_when_nobody_had_noticed() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let old = ours.lock("worker-1").unwrap();
    table.expire("l");
    drop(theirs.lock("worker-2").unwrap());
    assert!(old.is_held(), "its next refresh is 5 s away");
    assert!(old.unlock().unwrap_err().is_lease_lost());
}

#[test]
fn a_row_that_was_purged_is_a_lost_lease() {
    let table = Table::new();
    let guard = table.short_lock("l", ms(1_000), ms(20)).lock("worker-1").unwrap();
    table.execute("DELETE FROM $T");
    let mut client = table.client();
    assert!(guard.fence_past_deadline(&mut client.transaction().unwrap()).unwrap_err().is_lease_lost());
    eventually("the hold is lost", || !guard.is_held());
    assert!(guard.unlock().unwrap_err().is_lease_lost());
}

#[test]
fn a_refresh_does_not_bring_an_expired_lease_back() {
    let table = Table::new();
    let guard = table.short_lock("l", ms(1_000), ms(300)).lock("worker-1").unwrap();
    table.expire("l");
    eventually("the hold is lost", || !guard.is_held());
    assert!(!table.storage().get("l").unwrap().unwrap().is_held);
}

#[test]
fn a_hold_survives_refreshes_that_fail_for_a_while() {
    let table = Table::new();
    let storage = table.storage();
    let lock = crate::support::short_lock(&storage, "l", ms(3_000), ms(50));
    let guard = lock.lock("worker-1").unwrap();
    // Every refresh fails with an error of the server.
    table.execute("ALTER TABLE $T RENAME TO $T_away");
    let before = guard.remaining();
    eventually("the lease runs down", || guard.remaining() < before.saturating_sub(ms(900)));
    table.execute("ALTER TABLE $T_away RENAME TO $T");
    eventually("the lease is refreshed again", || guard.remaining() > before.saturating_sub(ms(300)));
    assert!(guard.is_held());
    guard.unlock().unwrap();
}

#[test]
fn a_hold_is_lost_at_its_deadline_while_its_refresh_is_stuck() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    let lock = crate::support::short_lock(&storage, "l", ms(2_000), ms(100));
    let (guard, outer) = (lock.lock("worker-1").unwrap(), lock.lock("worker-1").unwrap());
    proxy.swallow();
    let start = Instant::now();
    eventually("the hold is lost", || !guard.is_held());
    assert!(start.elapsed() < ms(2_000), "trusted until {:?} after the last answer", start.elapsed());
    assert_eq!(guard.remaining(), Duration::ZERO);
    assert!(takes_at_most(ms(100), "unlock of a lost hold", || outer.unlock()).unwrap_err().is_lease_lost());
    takes_at_most(ms(100), "drop of a lost hold", || drop(guard));
    // The server's clock ends the lease later than ours ends the trust.
    let taken = takes_at_most(ms(3_000), "the takeover", || table.lock("l").lock("worker-2").unwrap());
    assert_eq!(taken.version(), 2);
}

#[test]
fn trust_counts_from_the_request_however_slow_the_answer() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let options = Table::of(&proxy.dsn, &table.name).options().max_connections(1);
    let storage = PostgresStorage::new(options).unwrap();
    let lock = crate::support::short_lock(&storage, "l", ms(4_000), ms(200));
    // The one connection is open and has prepared everything when the delay begins.
    let warm_up = lock.lock("warm-up").unwrap();
    is_refreshed(&warm_up);
    warm_up.unlock().unwrap();
    let delay = ms(600);
    proxy.delay_answers(delay);
    let guard = lock.lock("worker").unwrap();
    // Lease, less margin, less the time for which the answer was under way.
    let longest = ms(4_000 - 400) - delay;
    let mut before = guard.remaining();
    assert!(before <= longest, "{before:?} after the acquire");
    let mut refreshes = 0;
    eventually("three refreshes", || {
        let now = guard.remaining();
        assert!(now <= longest, "{now:?} after {refreshes} refreshes");
        refreshes += usize::from(now > before);
        before = now;
        refreshes == 3
    });
    proxy.delay_answers(Duration::ZERO);
    guard.unlock().unwrap();
}

#[test]
fn the_lease_in_the_table_ends_after_the_deadline_of_the_hold() {
    let table = Table::new();
    let lock = table.short_lock("l", ms(1_000), ms(50));
    let guard = lock.lock("worker-1").unwrap();
    let mut client = table.client();
    let sql =
        format!("SELECT (extract(epoch FROM lease_expire_time - clock_timestamp()) * 1e6)::bigint FROM {}", table.name);
    for _ in 0..200 {
        // Asked before and after: what is left by the server's clock lies between, and a refresh only adds.
        let trusted = guard.remaining();
        let left: i64 = client.query_one(&sql, &[]).unwrap().get(0);
        let waited = Duration::from_millis(5);
        assert!(trusted <= Duration::from_micros(left.unsigned_abs()) + waited, "trusted {trusted:?}, left {left} µs");
        thread::sleep(waited);
    }
}

#[test]
fn a_contender_judges_a_lease_by_the_row_and_not_by_its_own_settings() {
    let table = Table::new();
    let ours = table.lock("l");
    let _guard = ours.lock("worker-1").unwrap();
    let theirs = table.short_lock("l", ms(1_000), ms(300));
    assert!(theirs.try_lock_for("worker-2", ms(1_500)).unwrap().is_none(), "30 s are not over after 1 s");
}

#[test]
fn a_wait_behind_a_row_lock_ends_in_time_and_the_refresh_comes_through_afterwards() {
    let table = Table::new();
    let storage = table.storage();
    let lock: StorageLock = crate::support::short_lock(&storage, "l", ms(3_000), ms(100));
    let guard = lock.lock("worker-1").unwrap();
    let mut client = table.client();
    // Somebody locks the row by hand: refreshes queue up behind it in the server.
    let mut transaction = client.transaction().unwrap();
    transaction.execute(&format!("SELECT FROM {} FOR UPDATE", table.name), &[]).unwrap();
    let before = guard.remaining();
    eventually("the lease runs down", || guard.remaining() < before.saturating_sub(ms(1_000)));
    transaction.rollback().unwrap();
    eventually("the lease is refreshed again", || guard.remaining() > before.saturating_sub(ms(300)));
    guard.unlock().unwrap();
}

#[test]
fn a_slow_logger_slows_nobody_else() {
    let table = Table::new();
    let mut child = Process::start("slow logger", &table, &[]);
    assert_eq!(child.expect_line(), "logging");
    assert_eq!(child.expect_line(), "done");
}

/// A worker that waits for the logger would keep the answer from the caller, whose time is shorter than a line takes.
#[test]
fn a_slow_logger_costs_no_call_its_answer_and_writes_in_the_callers_thread() {
    let table = Table::new();
    let mut child = Process::start("log slowly", &table, &[]);
    let lines: Vec<String> =
        std::iter::from_fn(|| Some(child.expect_line()).filter(|line| line != "as expected")).collect();
    for what in ["is busy", "taken over"] {
        assert!(lines.iter().any(|line| line.contains(what)), "{what}: {lines:?}");
    }
    assert!(lines.iter().all(|line| line.starts_with("caller ")), "{lines:?}");
}
