//! A table that somebody has locked for some seconds: waiting for a lock goes on meanwhile.

use std::thread;
use std::time::{Duration, Instant};

use storage_lock::{LockGuard, LockOptions, StorageLock};

use crate::free::side_by_side;
use crate::support::{Table, eventually, ms, takes_at_most};

/// Longer than any of our statements waits.
const LOCKED: Duration = Duration::from_secs(8);

#[test]
fn who_waits_while_the_table_is_locked_gets_the_lock_when_it_is_not() {
    // As ALTER TABLE or VACUUM FULL locks it; as CREATE TRIGGER does; and as REINDEX does, which locks the index too.
    let cases =
        ["LOCK TABLE $T IN ACCESS EXCLUSIVE MODE", "LOCK TABLE $T IN SHARE ROW EXCLUSIVE MODE", "REINDEX TABLE $T"];
    side_by_side(&cases, |sql| {
        let table = Table::new();
        let lock = |lock_id: &str| {
            // A lease that outlives all of it.
            let options = LockOptions::new(lock_id).lease_expire_after(Duration::from_secs(60));
            StorageLock::with_options(&table.storage(), options).unwrap()
        };
        let [free, hurried, new, held, holder] = ["free", "hurried", "new", "held", "held"].map(lock);
        let new_too = lock("new too");
        [&free, &hurried].into_iter().for_each(|lock| drop(lock.lock("warm-up").unwrap()));
        // Each has a connection already.
        [&new, &new_too].into_iter().for_each(|lock| assert!(lock.info().unwrap().is_none()));
        let guard = holder.lock("holder").unwrap();
        let mut client = table.client();
        thread::scope(|scope| {
            let waits = scope.spawn(|| held.lock("waits already").map(drop));
            table.hears("held", 1);
            let mut transaction = client.transaction().unwrap();
            transaction.batch_execute(&sql.replace("$T", &table.name)).unwrap();
            let start = Instant::now();
            let threads = [
                ("lock", scope.spawn(|| free.lock("a").map(drop))),
                ("lock, the first of all", scope.spawn(|| new.lock("b").map(drop))),
                ("try_lock_for", scope.spawn(|| take_patiently(&hurried))),
                ("try_lock_for, the first of all", scope.spawn(|| take_patiently(&new_too))),
                ("lock, waiting before", waits),
            ];
            thread::sleep(LOCKED.saturating_sub(start.elapsed()));
            transaction.rollback().unwrap();
            guard.unlock().unwrap();
            let unlocked = Instant::now();
            for (how, thread) in threads {
                let result = thread.join().unwrap();
                assert!(result.is_ok(), "{sql}: {how}: {result:?}");
            }
            assert!(unlocked.elapsed() < Duration::from_secs(7), "{sql}: {:?} beside free locks", unlocked.elapsed());
        });
    });
}

/// Takes a lock, waiting for 20 s at most, and releases it.
fn take_patiently(lock: &StorageLock) -> storage_lock::Result<()> {
    lock.try_lock_for("hurried", Duration::from_secs(20)).map(|guard| drop(guard.expect("the lock")))
}

/// It is said to be busy, for nothing is known to be wrong.
#[test]
fn who_does_not_wait_finds_the_lock_of_a_locked_table_busy() {
    side_by_side(&["ACCESS EXCLUSIVE", "SHARE ROW EXCLUSIVE"], |mode| {
        let table = Table::new();
        let [free, hurried] = ["free", "hurried"].map(|lock_id| table.lock(lock_id));
        [&free, &hurried].into_iter().for_each(|lock| drop(lock.lock("warm-up").unwrap()));
        let mut client = table.client();
        let mut transaction = client.transaction().unwrap();
        transaction.batch_execute(&format!("LOCK TABLE {} IN {mode} MODE", table.name)).unwrap();
        thread::scope(|scope| {
            let at_once = scope.spawn(|| takes_at_most(ms(5_500), "try_lock", || free.try_lock("a")));
            let hurried = scope.spawn(|| takes_at_most(ms(1_700), "the wait", || hurried.try_lock_for("b", ms(1_000))));
            let is_busy = |result: storage_lock::Result<Option<LockGuard>>| matches!(result, Ok(None));
            assert!(is_busy(at_once.join().unwrap()), "{mode}");
            // It may also have heard nothing in its time.
            assert!(!matches!(hurried.join().unwrap(), Ok(Some(_))), "{mode}");
        });
        transaction.rollback().unwrap();
        eventually("it goes on", || free.try_lock("a").unwrap().is_some() && hurried.try_lock("b").unwrap().is_some());
    });
}
