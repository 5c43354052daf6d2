//! The release as a part of the caller's transaction.

use std::thread;
use std::time::Duration;

use postgres::error::SqlState;
use postgres::{Client, IsolationLevel};
use storage_lock::Error;

use crate::fence::{LEVELS, begin, number, set, with_number, without_number};
use crate::support::{Table, eventually, is_refreshed, ms, short_lock, takes_at_most, waits_for};

/// The number and whether the lock's row says that it is released, as one statement sees them.
fn seen(client: &mut Client, table: &Table) -> (i64, bool) {
    let sql = "SELECT n, released_at IS NOT NULL FROM $T_number, $T".replace("$T", &table.name);
    let row = client.query_one(&sql, &[]).unwrap();
    (row.get(0), row.get(1))
}

#[test]
fn a_commit_publishes_what_was_written_and_the_release_together() {
    for level in LEVELS {
        let table = Table::new();
        with_number(&table);
        let (ours, theirs) = (table.lock("l"), table.lock("l"));
        let guard = ours.lock("worker-1").unwrap();
        let (mut client, mut observer) = (table.client(), table.client());
        let mut transaction = begin(&mut client, level);
        set(&mut transaction, &table, 1).unwrap();
        guard.unlock_in(&mut transaction).unwrap();
        assert!(!guard.is_held() && guard.remaining() == Duration::ZERO, "it may be committed at any time");
        for _ in 0..20 {
            assert_eq!(seen(&mut observer, &table), (0, false));
            assert!(theirs.try_lock("worker-2").unwrap().is_none());
        }
        transaction.commit().unwrap();
        assert_eq!(seen(&mut observer, &table), (1, true));
        let new = theirs.try_lock_for("worker-2", ms(5_000)).unwrap().expect("the lock is free");
        assert_eq!(new.version(), 2);
        // The guard knows, and leaves its successor alone.
        let before = theirs.info().unwrap();
        takes_at_most(ms(100), "unlock", || guard.unlock()).unwrap();
        thread::sleep(ms(50));
        assert_eq!(theirs.info().unwrap(), before);
        assert!(new.is_held());
        without_number(table);
    }
}

#[test]
fn a_rollback_keeps_the_lock_and_its_refresh_going() {
    for level in LEVELS {
        let table = Table::new();
        with_number(&table);
        let theirs = table.lock("l");
        // Its next regular refresh is half a minute away: what it does not learn at once it does not learn in this test.
        let slow = short_lock(&table.storage(), "l", ms(90_000), ms(30_000)).lock("worker-1").unwrap();
        let mut client = table.client();
        let mut transaction = begin(&mut client, level);
        set(&mut transaction, &table, 1).unwrap();
        slow.unlock_in(&mut transaction).unwrap();
        transaction.rollback().unwrap();
        eventually("it is held again", || slow.is_held());
        assert_eq!(number(&table), 0);
        assert!(theirs.try_lock("worker-2").unwrap().is_none());
        // Without waiting for that, it can be fenced, and released, in another one.
        let mut transaction = begin(&mut client, level);
        slow.unlock_in(&mut transaction).unwrap();
        drop(transaction);
        let mut transaction = begin(&mut client, level);
        slow.fence(&mut transaction).unwrap();
        drop(transaction);
        slow.unlock().unwrap();

        let guard = table.short_lock("l", ms(1_000), ms(100)).lock("worker-1").unwrap();
        let mut transaction = begin(&mut client, level);
        guard.unlock_in(&mut transaction).unwrap();
        transaction.rollback().unwrap();
        eventually("it is held again", || guard.is_held());
        is_refreshed(&guard);
        thread::sleep(ms(1_200));
        assert!(guard.is_held(), "it is refreshed on and on");
        assert!(theirs.try_lock("worker-2").unwrap().is_none());
        guard.unlock().unwrap();
        without_number(table);
    }
}

#[test]
fn a_guard_that_is_dropped_before_the_transaction_ends_releases_the_lock_either_way() {
    for commits in [true, false] {
        let table = Table::new();
        let (ours, theirs) = (table.lock("l"), table.lock("l"));
        let (guard, mut client) = (ours.lock("worker-1").unwrap(), table.client());
        let mut transaction = client.transaction().unwrap();
        guard.unlock_in(&mut transaction).unwrap();
        takes_at_most(ms(100), "drop", || drop(guard));
        assert!(theirs.try_lock("worker-2").unwrap().is_none());
        if commits {
            transaction.commit().unwrap()
        } else {
            transaction.rollback().unwrap()
        }
        let new = takes_at_most(ms(5_000), "the next one", || theirs.lock("worker-2").unwrap());
        assert_eq!(new.version(), 2);
    }
}

#[test]
fn a_commit_notifies_who_waits_in_another_process_and_wakes_who_waits_in_this_one() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let (guard, mut client) = (ours.lock("worker-1").unwrap(), table.client());
    let other = waits_for(&theirs);
    table.hears("l", 1);
    let own = waits_for(&ours);
    let mut transaction = client.transaction().unwrap();
    guard.unlock_in(&mut transaction).unwrap();
    transaction.commit().unwrap();
    let versions = takes_at_most(ms(5_000), "both", || {
        drop(guard);
        [other.join().unwrap(), own.join().unwrap()]
    });
    assert_eq!(versions, [2, 3], "the other process stood in line first");
}

/// Nobody drops the guard, and those who wait in its own process go on all the same.
#[test]
fn who_waits_in_this_process_gets_the_lock_after_the_commit_also_while_the_guard_is_kept() {
    let table = Table::new();
    let lock = table.lock("l");
    let (guard, mut client) = (lock.lock("worker-1").unwrap(), table.client());
    let own = waits_for(&lock);
    let mut transaction = client.transaction().unwrap();
    guard.unlock_in(&mut transaction).unwrap();
    transaction.commit().unwrap();
    assert_eq!(takes_at_most(ms(5_000), "the next one", || own.join().unwrap()), 2);
    assert!(!guard.is_held() && !guard.lost().is_lost(), "that was no loss");
    guard.unlock().unwrap();
}

#[test]
fn the_same_owner_does_not_enter_again_what_is_being_released() {
    let table = Table::new();
    let lock = table.lock("l");
    let (guard, mut client) = (lock.lock("worker-1").unwrap(), table.client());
    let mut transaction = client.transaction().unwrap();
    guard.unlock_in(&mut transaction).unwrap();
    assert!(lock.try_lock("worker-1").unwrap().is_none());
    transaction.commit().unwrap();
    assert_eq!(lock.lock("worker-1").unwrap().version(), 2);
}

#[test]
fn an_inner_guard_of_a_lock_that_was_taken_twice_releases_nothing() {
    let table = Table::new();
    let (lock, theirs) = (table.lock("l"), table.lock("l"));
    let (outer, mut client) = (lock.lock("worker-1").unwrap(), table.client());
    let inner = lock.lock("worker-1").unwrap();
    let mut transaction = client.transaction().unwrap();
    inner.unlock_in(&mut transaction).unwrap();
    transaction.commit().unwrap();
    inner.unlock().unwrap();
    assert!(outer.is_held() && theirs.try_lock("worker-2").unwrap().is_none());
    let mut transaction = client.transaction().unwrap();
    outer.unlock_in(&mut transaction).unwrap();
    transaction.commit().unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_some());
}

#[test]
fn a_hold_that_was_taken_over_releases_nothing_and_says_so() {
    for level in LEVELS {
        let table = Table::new();
        let (ours, theirs) = (table.lock("l"), table.lock("l"));
        let (old, mut client) = (ours.lock("worker-1").unwrap(), table.client());
        let mut transaction = begin(&mut client, level);
        transaction.query_one("SELECT 1", &[]).unwrap();
        table.expire("l");
        let new = theirs.try_lock("worker-1").unwrap().expect("the lock is free");
        let before = theirs.info().unwrap();
        assert!(old.unlock_in(&mut transaction).unwrap_err().is_lease_lost(), "{level:?}");
        transaction.rollback().unwrap();
        assert_eq!(theirs.info().unwrap(), before);
        assert!(old.unlock().unwrap_err().is_lease_lost());
        assert!(new.is_held());
    }
}

/// A repetition after a commit whose answer was lost must not write twice.
#[test]
fn what_was_committed_is_not_released_a_second_time() {
    let table = Table::new();
    let (guard, mut client) = (table.lock("l").lock("worker-1").unwrap(), table.client());
    let mut transaction = client.transaction().unwrap();
    guard.unlock_in(&mut transaction).unwrap();
    transaction.commit().unwrap();
    assert!(guard.unlock_in(&mut client.transaction().unwrap()).unwrap_err().is_lease_lost());
    assert!(guard.fence(&mut client.transaction().unwrap()).unwrap_err().is_lease_lost());
    guard.unlock().unwrap();
}

#[test]
fn a_snapshot_from_before_a_refresh_asks_for_a_repetition() {
    for level in [IsolationLevel::RepeatableRead, IsolationLevel::Serializable] {
        let table = Table::new();
        let guard = table.short_lock("l", ms(5_000), ms(50)).lock("worker-1").unwrap();
        let mut client = table.client();
        let mut transaction = begin(&mut client, level);
        transaction.query_one("SELECT 1", &[]).unwrap();
        is_refreshed(&guard);
        let error = guard.unlock_in(&mut transaction).unwrap_err();
        let is_repeatable = |error: &Error| {
            matches!(error, Error::Database { source, .. }
            if source.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE))
        };
        assert!(is_repeatable(&error), "{error:?}");
        transaction.rollback().unwrap();
        assert!(guard.is_held(), "as before");
        guard.unlock().unwrap();
    }
}

/// The library's own releases commit without waiting for the disk; a transaction of the caller's is the caller's.
#[test]
fn it_leaves_the_transactions_settings_alone() {
    let table = Table::new();
    let (guard, mut client) = (table.lock("l").lock("worker-1").unwrap(), table.client());
    let settings = "SELECT name || ' ' || setting FROM pg_settings ORDER BY name";
    let mut transaction = client.transaction().unwrap();
    let read = |transaction: &mut postgres::Transaction<'_>| -> Vec<String> {
        transaction.query(settings, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    };
    let before = read(&mut transaction);
    guard.fence(&mut transaction).unwrap();
    guard.unlock_in(&mut transaction).unwrap();
    assert_eq!(read(&mut transaction), before);
    transaction.commit().unwrap();
}

#[test]
fn a_transaction_that_stays_open_for_longer_than_the_lease_loses_the_hold_and_releases_the_lock_all_the_same() {
    let table = Table::new();
    with_number(&table);
    let (theirs, mut client) = (table.lock("l"), table.client());
    let guard = table.short_lock("l", ms(1_000), ms(100)).lock("worker-1").unwrap();
    let mut transaction = client.transaction().unwrap();
    set(&mut transaction, &table, 1).unwrap();
    guard.unlock_in(&mut transaction).unwrap();
    // It can't be refreshed, and nobody else can have it.
    eventually("the hold is lost", || guard.lost().is_lost());
    assert!(theirs.try_lock_for("worker-2", ms(500)).unwrap().is_none());
    transaction.commit().unwrap();
    assert_eq!(number(&table), 1);
    assert!(theirs.try_lock_for("worker-2", ms(2_000)).unwrap().is_some());
    without_number(table);
}
