//! However a transaction ends that releases a lock, the hold is trusted again only if the database says that it is
//! there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use postgres::Client;
use postgres::error::SqlState;
use storage_lock::{Error, LockGuard, Result, UnlockTransaction};

use crate::fence::{LEVELS, number, set, with_number, without_number};
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::support::{Table, dsn, eventually, is_refreshed, ms, takes_at_most};
use crate::unlock_in::releasing;

/// How the caller ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Commit,
    Rollback,
    Drop,
    Panic,
}

const ENDS: [End; 4] = [End::Commit, End::Rollback, End::Drop, End::Panic];

/// Ends a transaction, and checks that this blocks for no longer than it may.
#[track_caller]
fn end(transaction: UnlockTransaction<'_>, how: End) -> Result<()> {
    takes_at_most(ms(2_700), "the end", || match how {
        End::Commit => transaction.commit(),
        End::Rollback => transaction.rollback(),
        End::Drop => {
            drop(transaction);
            Ok(())
        }
        End::Panic => {
            let unwound = catch_unwind(AssertUnwindSafe(move || {
                let _transaction = transaction;
                panic!("on purpose, with a transaction that releases");
            }));
            assert!(unwound.is_err());
            Ok(())
        }
    })
}

/// Looks at a guard all the time while something else is done: it is not held.
fn untrusted<T>(guard: &LockGuard, run: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                assert!(!guard.is_held() && guard.remaining() == Duration::ZERO, "trusted");
                thread::sleep(ms(1));
            }
        });
        let value = catch_unwind(AssertUnwindSafe(run));
        is_over.store(true, Ordering::SeqCst);
        watch.join().unwrap();
        value.unwrap()
    })
}

#[track_caller]
fn is_refused(result: Result<()>, why: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Fence { .. }) && error.to_string().contains(why), "{error}");
}

/// A connection breaks, or a server refuses.
#[track_caller]
fn is_failed(result: Result<()>, code: Option<&SqlState>) {
    match result.unwrap_err() {
        Error::Database { source, .. } => assert_eq!(source.code(), code, "{source:?}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_release_that_was_committed_as_text_is_never_taken_for_one_that_was_rolled_back() {
    for level in LEVELS {
        for (text, is_taken) in
            [("COMMIT", true), ("COMMIT", false), ("COMMIT; BEGIN", true), ("COMMIT AND CHAIN", false)]
        {
            let table = Table::new();
            let (lock, theirs, mut client) =
                (table.short_lock("l", ms(20_000), ms(100)), table.lock("l"), table.client());
            for how in ENDS {
                let guard = lock.lock("worker-1").unwrap();
                releasing(&guard, &mut client, level, |mut transaction| {
                    untrusted(&guard, || {
                        transaction.batch_execute(text).unwrap();
                        let new = is_taken.then(|| theirs.lock("worker-2").unwrap());
                        let result = end(transaction, how);
                        if matches!(how, End::Commit | End::Rollback) {
                            is_refused(result, "the lock is released");
                        }
                        // Until there would have been a refresh.
                        thread::sleep(ms(250));
                        assert!(new.is_none_or(|new| new.is_held()));
                    });
                });
                // It was released, by the caller.
                assert!(!guard.lost().is_lost(), "{text} {how:?}");
                guard.unlock().unwrap();
                assert!(theirs.try_lock("worker-2").unwrap().is_some());
            }
        }
    }
}

/// What comes after such a commit is not part of the transaction that releases, and not fenced.
#[test]
fn what_is_written_after_a_commit_as_text_is_rolled_back() {
    for text in ["COMMIT; BEGIN", "COMMIT AND CHAIN"] {
        let table = Table::new();
        with_number(&table);
        let (guard, mut client) = (table.lock("l").lock("worker-1").unwrap(), table.client());
        let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
        set(&mut transaction, &table, 1).unwrap();
        transaction.batch_execute(text).unwrap();
        set(&mut transaction, &table, 2).unwrap();
        is_refused(transaction.commit(), "the lock is released");
        assert_eq!(number(&table), 1);
        assert!(!guard.is_held());
        drop(guard);
        without_number(table);
    }
}

/// A transaction that was ended before is no transaction: each of its statements is one, and committed at once.
#[test]
fn a_release_in_a_transaction_that_had_been_ended_is_not_taken_for_one_that_was_rolled_back() {
    for how in ENDS {
        let table = Table::new();
        let (guard, mut client) = (table.short_lock("l", ms(20_000), ms(100)).lock("w").unwrap(), table.client());
        let mut transaction = client.transaction().unwrap();
        transaction.batch_execute("COMMIT").unwrap();
        let transaction = guard.unlock_in(transaction).unwrap();
        untrusted(&guard, || {
            let new = table.lock("l").lock("worker-2").unwrap();
            let _result = end(transaction, how);
            thread::sleep(ms(250));
            assert!(new.is_held());
        });
    }
}

#[test]
fn a_prepared_transaction_is_open_until_it_is_ended() {
    let server = Server::start_with(&["--fast", "-c", "max_prepared_transactions=20"]);
    let table = Table::on(&server.dsn);
    let storage = table.storage();
    let table = &table;
    let case = |how: End, ending: &str| {
        let name = format!("{how:?} {ending}");
        let lock = crate::support::short_lock(&storage, &name, ms(30_000), ms(200));
        let guard = lock.lock("worker-1").unwrap();
        let (mut client, mut other) = (server.client(), table.impatient_client());
        let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
        transaction.batch_execute(&format!("PREPARE TRANSACTION '{name}'")).unwrap();
        untrusted(&guard, || {
            let result = end(transaction, how);
            if how == End::Commit {
                is_refused(result, "not known");
            }
            thread::sleep(ms(500));
            assert!(table.lock(&name).try_lock("worker-2").unwrap().is_none());
            // It doesn't begin another one meanwhile.
            let error = guard.unlock_in(other.transaction().unwrap()).map(drop).unwrap_err();
            assert!(matches!(error, Error::Fence { .. }) && error.to_string().contains("not known"), "{error}");
        });
        if ending == "ROLLBACK" {
            other.batch_execute(&format!("{ending} PREPARED '{name}'")).unwrap();
            eventually("it is held again", || guard.is_held());
            is_refreshed(&guard);
            assert!(table.lock(&name).try_lock("worker-2").unwrap().is_none());
        } else {
            untrusted(&guard, || {
                other.batch_execute(&format!("{ending} PREPARED '{name}'")).unwrap();
                let new = table.lock(&name).lock("worker-2").unwrap();
                // Comes back because it is over.
                assert!(!takes_at_most(ms(10_000), "a refresh", || guard.lost().wait_for(ms(15_000))));
                assert!(new.is_held());
            });
        }
        guard.unlock().unwrap();
    };
    thread::scope(|scope| {
        for how in ENDS {
            for ending in ["COMMIT", "ROLLBACK"] {
                scope.spawn(move || case(how, ending));
            }
        }
    });
}

#[test]
fn a_prepared_transaction_that_nobody_ends_loses_the_hold_at_its_deadline() {
    let server = Server::start_with(&["--fast", "-c", "max_prepared_transactions=1"]);
    let table = Table::on(&server.dsn);
    let guard = table.short_lock("l", ms(4_000), ms(200)).lock("worker-1").unwrap();
    let (mut client, mut other) = (server.client(), server.client());
    let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    transaction.batch_execute("PREPARE TRANSACTION 'p'").unwrap();
    untrusted(&guard, || {
        end(transaction, End::Drop).unwrap();
        assert!(takes_at_most(ms(4_500), "the loss", || guard.lost().wait_for(ms(6_000))));
        other.batch_execute("ROLLBACK PREPARED 'p'").unwrap();
        thread::sleep(ms(300));
    });
    assert!(guard.unlock().unwrap_err().is_lease_lost(), "a lost hold stays lost");
    assert!(table.lock("l").try_lock_for("worker-2", ms(5_000)).unwrap().is_some());
}

/// The connection of the transaction breaks, and its last word is under way still.
#[test]
fn an_end_that_comes_late_counts_when_it_has_come() {
    for (how, word) in [(End::Commit, "COMMIT"), (End::Rollback, "ROLLBACK"), (End::Drop, "ROLLBACK")] {
        let table = Table::new();
        let proxy = Proxy::to(&dsn());
        let guard = table.short_lock("l", ms(20_000), ms(200)).lock("worker-1").unwrap();
        let mut client = Table::of(&proxy.dsn, &table.name).client();
        let transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
        proxy.keep_request(word.as_bytes());
        untrusted(&guard, || {
            let result = end(transaction, how);
            if how != End::Drop {
                is_failed(result, None);
            }
            assert_eq!(proxy.kept_requests(), 1);
            thread::sleep(ms(500));
            assert!(table.lock("l").try_lock("worker-2").unwrap().is_none());
        });
        if how == End::Commit {
            untrusted(&guard, || {
                proxy.deliver();
                let new = table.lock("l").lock("worker-2").unwrap();
                assert!(!takes_at_most(ms(10_000), "a refresh", || guard.lost().wait_for(ms(15_000))));
                assert!(new.is_held());
            });
        } else {
            proxy.deliver();
            eventually("it is held again", || guard.is_held());
            is_refreshed(&guard);
        }
        guard.unlock().unwrap();
    }
}

#[test]
fn a_rollback_whose_connection_broke_keeps_the_lock() {
    for how in [End::Rollback, End::Drop, End::Panic] {
        let table = Table::new();
        let proxy = Proxy::to(&dsn());
        let guard = table.short_lock("l", ms(5_000), ms(100)).lock("worker-1").unwrap();
        let mut client = Table::of(&proxy.dsn, &table.name).client();
        let transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
        proxy.cut();
        let result = end(transaction, how);
        if how == End::Rollback {
            is_failed(result, None);
        }
        eventually("it is held again", || guard.is_held());
        is_refreshed(&guard);
        assert!(table.lock("l").try_lock("worker-2").unwrap().is_none());
        guard.unlock().unwrap();
    }
}

/// The driver has said nothing to the server: on its connection the transaction is open.
#[test]
fn a_transaction_that_is_forgotten_is_open_and_loses_the_hold_at_its_deadline() {
    for text in ["COMMIT", "ROLLBACK", ""] {
        let table = Table::new();
        let (guard, mut client) = (table.short_lock("l", ms(1_500), ms(100)).lock("w").unwrap(), table.client());
        std::mem::forget(guard.unlock_in(client.transaction().unwrap()).unwrap());
        untrusted(&guard, || {
            client.batch_execute(text).unwrap();
            let new = (text == "COMMIT").then(|| table.lock("l").lock("worker-2").unwrap());
            assert!(takes_at_most(ms(2_500), "the loss", || guard.lost().wait_for(ms(5_000))));
            assert!(new.is_none_or(|new| new.is_held()));
        });
        drop(client);
        assert!(guard.unlock().unwrap_err().is_lease_lost());
        assert!(table.lock("l").try_lock_for("worker-2", ms(5_000)).unwrap().is_some());
    }
}

/// The transaction's own connection is well.
#[test]
fn a_hold_of_which_the_database_says_nothing_is_not_trusted_until_it_does() {
    for how in ENDS {
        let table = Table::new();
        let proxy = Proxy::to(&dsn());
        let lock = Table::of(&proxy.dsn, &table.name).short_lock("l", ms(20_000), ms(200));
        let (guard, mut client) = (lock.lock("worker-1").unwrap(), table.client());
        let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
        proxy.stall(true, true);
        untrusted(&guard, || {
            if how == End::Commit {
                transaction.batch_execute("ROLLBACK").unwrap();
                is_refused(end(transaction, how), "not known");
            } else {
                end(transaction, how).unwrap();
            }
        });
        proxy.stall(false, false);
        eventually("it is held again", || guard.is_held());
        is_refreshed(&guard);
        guard.unlock().unwrap();
    }
}

/// The statement of `unlock_in` fails: nothing is released, as the library says when it has asked.
#[test]
fn a_statement_that_failed_leaves_the_hold_as_the_database_says() {
    let read_only = |client: &mut Client, _: &Table| client.batch_execute("SET default_transaction_read_only = on");
    let locked = |client: &mut Client, table: &Table| {
        let mut locking = table.client();
        client.batch_execute("SET lock_timeout = 50")?;
        locking.batch_execute(&format!("BEGIN; LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE", table.name))?;
        // Long enough for the refusal, and short enough for the hold.
        thread::spawn(move || {
            thread::sleep(ms(500));
            drop(locking);
        });
        Ok(())
    };
    type Hurt<'a> = &'a dyn Fn(&mut Client, &Table) -> std::result::Result<(), postgres::Error>;
    let hurts: [(Hurt<'_>, SqlState); 2] =
        [(&read_only, SqlState::READ_ONLY_SQL_TRANSACTION), (&locked, SqlState::LOCK_NOT_AVAILABLE)];
    for (hurt, code) in hurts {
        let table = Table::new();
        let proxy = Proxy::to(&dsn());
        let lock = Table::of(&proxy.dsn, &table.name).short_lock("l", ms(20_000), ms(200));
        let (guard, mut client) = (lock.lock("worker-1").unwrap(), table.client());
        hurt(&mut client, &table).unwrap();
        is_failed(guard.unlock_in(client.transaction().unwrap()).map(drop), Some(&code));
        eventually("it is held", || guard.is_held());
        is_refreshed(&guard);

        let mut client = table.client();
        hurt(&mut client, &table).unwrap();
        proxy.stall(true, true);
        let start = Instant::now();
        is_failed(guard.unlock_in(client.transaction().unwrap()).map(drop), Some(&code));
        assert!(start.elapsed() < ms(3_000), "{:?}", start.elapsed());
        untrusted(&guard, || thread::sleep(ms(300)));
        proxy.stall(false, false);
        eventually("it is held again", || guard.is_held());
        guard.unlock().unwrap();
    }
}

/// Its connection breaks, and the request arrives later: it can't be committed any more.
#[test]
fn a_statement_that_came_late_releases_nothing() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let guard = table.short_lock("l", ms(5_000), ms(100)).lock("worker-1").unwrap();
    let mut client = Table::of(&proxy.dsn, &table.name).client();
    let transaction = client.transaction().unwrap();
    proxy.keep_request(b"UPDATE");
    is_failed(guard.unlock_in(transaction).map(drop), None);
    assert!(guard.is_held());
    proxy.deliver();
    for _ in 0..5 {
        is_refreshed(&guard);
        assert!(table.lock("l").try_lock("worker-2").unwrap().is_none());
    }
    guard.unlock().unwrap();
}

/// Such a refresh saw the hold before it was released.
#[test]
fn a_refresh_from_before_the_end_that_is_answered_after_it_proves_nothing() {
    let table = Table::new();
    let proxy = Proxy::to(&dsn());
    let lock = Table::of(&proxy.dsn, &table.name).short_lock("l", ms(20_000), ms(300));
    let (guard, mut client) = (lock.lock("worker-1").unwrap(), table.client());
    is_refreshed(&guard);
    // A prepared statement is told its name. Else there would be another one after 300 ms.
    proxy.hold_back_answer_to(b"refresh \"", ms(2_500));
    eventually("it is under way", || guard.remaining() < ms(18_300));
    let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    transaction.batch_execute("COMMIT").unwrap();
    let new = table.lock("l").lock("worker-2").unwrap();
    // Nobody is asked from here on, and the late answer comes.
    proxy.stall(true, false);
    untrusted(&guard, || {
        end(transaction, End::Drop).unwrap();
        thread::sleep(ms(1_500));
    });
    assert!(new.is_held());
    proxy.stall(false, false);
    assert!(!takes_at_most(ms(10_000), "a refresh", || guard.lost().wait_for(ms(15_000))));
}
