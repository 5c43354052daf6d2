//! Writes that are committed only while the lock is held.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use nix::sys::signal::Signal;
use postgres::error::SqlState;
use postgres::{Client, IsolationLevel, Transaction};
use storage_lock::{Error, LockGuard};

use crate::support::child::Process;
use crate::support::proxy::Proxy;
use crate::support::{Table, dsn, eventually, is_refreshed, ms, takes_at_most, waits_for};

pub const LEVELS: [IsolationLevel; 3] =
    [IsolationLevel::ReadCommitted, IsolationLevel::RepeatableRead, IsolationLevel::Serializable];

/// A table with one number, beside the locks.
pub fn with_number(table: &Table) {
    table.execute("CREATE TABLE $T_number (n bigint)");
    table.execute("INSERT INTO $T_number VALUES (0)");
}

pub fn number(table: &Table) -> i64 {
    table.client().query_one(&format!("SELECT n FROM {}_number", table.name), &[]).unwrap().get(0)
}

pub fn without_number(table: Table) {
    table.execute("DROP TABLE $T_number");
}

pub fn begin(client: &mut Client, level: IsolationLevel) -> Transaction<'_> {
    client.build_transaction().isolation_level(level).start().unwrap()
}

/// Takes the snapshot, where there is one for the whole transaction.
fn see(transaction: &mut Transaction<'_>) {
    transaction.query_one("SELECT 1", &[]).unwrap();
}

pub fn set(transaction: &mut Transaction<'_>, table: &Table, n: i64) -> Result<u64, postgres::Error> {
    transaction.execute(&format!("UPDATE {}_number SET n = $1", table.name), &[&n])
}

#[track_caller]
fn is_lost<T>(result: Result<T, Error>) -> bool {
    let error = result.err().expect("it is refused");
    assert!(error.is_lease_lost(), "{error:?}");
    true
}

/// How many sessions wait for a lock of any kind that concerns a table.
fn waits_in_the_server(client: &mut Client, table: &Table) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%' || $1 || '%'";
    client.query_one(sql, &[&table.name]).unwrap().get(0)
}

#[test]
fn nobody_acquires_the_lock_before_a_fenced_transaction_ends() {
    for level in LEVELS {
        for commits in [true, false] {
            let table = Table::new();
            let (ours, theirs) = (table.lock("l"), table.lock("l"));
            let guard = ours.lock("worker-1").unwrap();
            let mut client = table.client();
            let mut transaction = begin(&mut client, level);
            guard.fence(&mut transaction).unwrap();
            table.expire("l");
            for _ in 0..20 {
                assert!(theirs.try_lock("worker-2").unwrap().is_none(), "{level:?}");
            }
            if commits {
                transaction.commit().unwrap()
            } else {
                transaction.rollback().unwrap()
            }
            let new = theirs.try_lock("worker-2").unwrap().expect("the lock is free");
            assert_eq!(new.version(), guard.version() + 1);
        }
    }
}

#[test]
fn the_transaction_of_a_hold_that_was_taken_over_is_refused_at_every_isolation_level() {
    for level in LEVELS {
        for has_begun in [true, false] {
            let table = Table::new();
            let (ours, theirs) = (table.lock("l"), table.lock("l"));
            let old = ours.lock("worker-1").unwrap();
            let mut client = table.client();
            let take_over = || {
                table.expire("l");
                theirs.try_lock("worker-1").unwrap().expect("the lock is free")
            };
            let (_new, mut transaction) = if has_begun {
                let mut transaction = begin(&mut client, level);
                see(&mut transaction);
                (take_over(), transaction)
            } else {
                (take_over(), begin(&mut client, level))
            };
            assert!(old.is_held(), "it hasn't heard of it");
            assert!(is_lost(old.fence(&mut transaction)), "{level:?}");
            drop(transaction);
            assert!(is_lost(old.fence_past_deadline(&mut begin(&mut client, level))), "{level:?}");
        }
    }
}

#[test]
fn a_released_hold_fences_nothing() {
    for level in LEVELS {
        let table = Table::new();
        let lock = table.lock("l");
        let (outer, mut client) = (lock.lock("worker-1").unwrap(), table.client());
        let statement = outer.fence_statement();
        outer.unlock().unwrap();
        let mut transaction = begin(&mut client, level);
        let rows =
            transaction.query(&statement.sql, &[&statement.lock_id, &statement.version, &statement.lease_id]).unwrap();
        assert!(rows.is_empty(), "{level:?}");
    }
}

/// What a failover that lost commits may leave behind.
#[test]
fn a_fence_knows_its_hold_from_another_one_of_the_same_version() {
    let table = Table::new();
    let guard = table.lock("l").lock("worker-1").unwrap();
    table.execute("UPDATE $T SET lease_id = gen_random_uuid()");
    let mut client = table.client();
    assert!(is_lost(guard.fence(&mut client.transaction().unwrap())));
    assert!(is_lost(guard.unlock_in(client.transaction().unwrap())));
}

/// A restore brings older rows back, of the locks and of the data, while a holder from after the backup goes on.
#[test]
fn after_a_restore_from_a_backup_the_holders_of_lost_holds_are_refused_and_hear_of_it() {
    let table = Table::new();
    with_number(&table);
    let (ours, theirs) = (table.short_lock("l", ms(5_000), ms(1_000)), table.lock("l"));
    drop(ours.lock("worker-1").unwrap());
    table.execute("CREATE TABLE $T_backup AS TABLE $T");
    let (old, mut client) = (ours.lock("worker-1").unwrap(), table.client());
    let write = |guard: &LockGuard, client: &mut Client| {
        guard.transaction(client, |transaction| Ok::<_, Fault>(set(transaction, &table, guard.version())?))
    };
    write(&old, &mut client).unwrap();
    let restore = "BEGIN; DELETE FROM $T; INSERT INTO $T TABLE $T_backup; UPDATE $T_number SET n = 0; COMMIT";
    client.batch_execute(&restore.replace("$T", &table.name)).unwrap();

    let new = theirs.try_lock("worker-1").unwrap().expect("the lock is free");
    assert_eq!((old.version(), new.version()), (2, 2), "a version comes twice");
    assert!(matches!(write(&old, &mut client), Err(Fault::Lock(error)) if error.is_lease_lost()));
    assert_eq!(
        number(&table),
        0,
        "what was written under the lost hold is lost with it, and nothing is written any more"
    );
    write(&new, &mut client).unwrap();
    eventually("the first one hears of it", || !old.is_held());
    assert!(new.is_held());
    table.execute("DROP TABLE $T_backup");
    without_number(table);
}

#[test]
fn refreshes_go_on_under_a_fence_that_is_open_for_longer_than_the_lease() {
    thread::scope(|scope| {
        for level in LEVELS {
            scope.spawn(move || {
                let table = Table::new();
                let guard = table.short_lock("l", ms(10_000), ms(100)).lock("worker-1").unwrap();
                let mut client = table.client();
                let mut transaction = begin(&mut client, level);
                see(&mut transaction);
                // Fenced before and after refreshes, and again.
                is_refreshed(&guard);
                let end = Instant::now() + ms(10_200);
                while Instant::now() < end {
                    guard.fence(&mut transaction).unwrap();
                    is_refreshed(&guard);
                }
                assert!(guard.is_held(), "{level:?}");
                transaction.commit().unwrap();
                guard.unlock().unwrap();
            });
        }
    });
}

#[test]
fn a_hold_past_its_deadline_is_refused_and_can_be_fenced_on_request_until_it_is_taken_over() {
    for level in LEVELS {
        let table = Table::new();
        with_number(&table);
        let guard = table.short_lock("l", ms(1_000), ms(600)).lock("worker-1").unwrap();
        // Nothing is refreshed any more, and the lease runs out.
        table.execute("ALTER TABLE $T RENAME TO $T_away");
        eventually("the hold is lost", || !guard.is_held());
        table.execute("ALTER TABLE $T_away RENAME TO $T");
        table.expire("l");
        let (theirs, mut client) = (table.lock("l"), table.client());
        assert!(is_lost(guard.fence(&mut client.transaction().unwrap())));
        assert!(is_lost(guard.unlock_in(client.transaction().unwrap())));
        let work = |transaction: &mut Transaction<'_>| set(transaction, &table, 7).map_err(Fault::from);
        assert!(matches!(guard.transaction(&mut client, work), Err(Fault::Lock(error)) if error.is_lease_lost()));
        assert_eq!(number(&table), 0);

        let mut transaction = begin(&mut client, level);
        guard.fence_past_deadline(&mut transaction).unwrap();
        set(&mut transaction, &table, 8).unwrap();
        assert!(theirs.try_lock("worker-2").unwrap().is_none(), "{level:?}");
        transaction.commit().unwrap();
        assert_eq!(number(&table), 8);
        let _new = theirs.try_lock("worker-2").unwrap().expect("the lock is free");
        assert!(is_lost(guard.fence_past_deadline(&mut begin(&mut client, level))));
        without_number(table);
    }
}

/// An application's own error type.
#[derive(Debug)]
enum Fault {
    Own(&'static str),
    Postgres(#[allow(dead_code)] postgres::Error),
    Lock(Error),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Lock(error)
    }
}

impl From<postgres::Error> for Fault {
    fn from(error: postgres::Error) -> Fault {
        Fault::Postgres(error)
    }
}

#[test]
fn a_transaction_commits_what_was_done_under_the_lock_and_nothing_else() {
    let table = Table::new();
    with_number(&table);
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let (guard, mut client) = (ours.lock("worker-1").unwrap(), table.client());

    let value = guard.transaction(&mut client, |transaction| {
        set(transaction, &table, 1)?;
        Ok::<_, Fault>("the closure's value")
    });
    assert_eq!((value.unwrap(), number(&table)), ("the closure's value", 1));

    let failed: Result<(), Fault> = guard.transaction(&mut client, |transaction| {
        set(transaction, &table, 2)?;
        Err(Fault::Own("its own error"))
    });
    assert!(matches!(failed, Err(Fault::Own("its own error"))));
    assert_eq!(number(&table), 1, "rolled back");

    let panicked = catch_unwind(AssertUnwindSafe(|| {
        guard.transaction(&mut client, |transaction| -> Result<(), Fault> {
            set(transaction, &table, 3)?;
            panic!("in the closure");
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(number(&table), 1, "rolled back");

    // An error of the database that the closure doesn't mind has ended the transaction all the same.
    let aborted = guard.transaction(&mut client, |transaction| {
        set(transaction, &table, 4)?;
        transaction.execute("SELECT 1 / 0", &[]).unwrap_err();
        Ok::<_, Fault>(())
    });
    let code = |error: &Error| {
        std::error::Error::source(error).unwrap().downcast_ref::<postgres::Error>().unwrap().code().cloned()
    };
    assert!(
        matches!(&aborted, Err(Fault::Lock(error)) if code(error) == Some(SqlState::IN_FAILED_SQL_TRANSACTION)),
        "{aborted:?}"
    );

    table.expire("l");
    let _new = theirs.try_lock("worker-2").unwrap().expect("the lock is free");
    let lost = guard.transaction(&mut client, |transaction| Ok::<_, Fault>(set(transaction, &table, 5)?));
    assert!(matches!(lost, Err(Fault::Lock(error)) if error.is_lease_lost()));
    assert_eq!(number(&table), 1, "nothing is committed");
    without_number(table);
}

#[test]
fn of_a_commit_without_an_answer_it_is_only_known_that_it_came_in_time_if_it_did() {
    let table = Table::new();
    with_number(&table);
    let proxy = Proxy::to(&dsn());
    let (guard, theirs) = (table.lock("l").lock("worker-1").unwrap(), table.lock("l"));
    let mut client = Table::of(&proxy.dsn, &table.name).client();
    proxy.lose_answer_to(b"COMMIT");
    let result = guard.transaction(&mut client, |transaction| Ok::<_, Fault>(set(transaction, &table, 1)?));
    let code = |error: &Error| match error {
        Error::Database { source, .. } => source.code().cloned(),
        other => panic!("{other:?}"),
    };
    assert!(matches!(&result, Err(Fault::Lock(error)) if code(error).is_none()), "{result:?}");
    // This one came.
    eventually("the commit", || number(&table) == 1);
    guard.unlock().unwrap();
    drop(theirs.lock("worker-2").unwrap());
    assert_eq!(number(&table), 1);
    without_number(table);
}

#[test]
fn a_transaction_that_cannot_see_the_hold_is_told_so_and_the_hold_is_not_taken_for_lost() {
    let (table, elsewhere) = (Table::new(), Table::new());
    // Another table stands for another database.
    elsewhere.storage();
    let lock = table.lock("l");
    let mut client = table.client();
    let mut old = begin(&mut client, IsolationLevel::RepeatableRead);
    drop(lock.lock("worker-1").unwrap());
    see(&mut old);
    let guard = lock.lock("worker-1").unwrap();
    let told = |error: Error| {
        assert!(matches!(&error, Error::Fence { lock_id, .. } if lock_id == "l"), "{error:?}");
    };
    told(match guard.fence(&mut old).unwrap_err() {
        // The hold before was moved under the snapshot: a repetition will see this one.
        Error::Database { source, .. } => {
            assert_eq!(source.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE));
            drop(old);
            let mut old = begin(&mut client, IsolationLevel::RepeatableRead);
            see(&mut old);
            drop(guard);
            let guard = lock.lock("worker-1").unwrap();
            let error = guard.fence(&mut old).unwrap_err();
            drop(old);
            error
        }
        error => {
            drop(old);
            error
        }
    });

    let guard = lock.lock("worker-1").unwrap();
    let mut reads = client.build_transaction().read_only(true).start().unwrap();
    let error = guard.fence(&mut reads).unwrap_err();
    assert!(
        matches!(&error, Error::Database { source, .. } if source.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION)),
        "{error:?}"
    );
    drop(reads);

    // Somebody has locked the row by hand.
    let (mut locker, mut other) = (table.client(), table.impatient_client());
    let mut locked = locker.transaction().unwrap();
    locked.execute(&format!("SELECT FROM {} FOR UPDATE", table.name), &[]).unwrap();
    let mut transaction = other.transaction().unwrap();
    // It is waited for as long as the transaction's own settings allow.
    transaction.batch_execute("SET LOCAL lock_timeout = '100ms'").unwrap();
    let error = takes_at_most(ms(3_000), "a fence behind a locked row", || guard.fence(&mut transaction)).unwrap_err();
    assert!(
        matches!(&error, Error::Database { source, .. } if source.code() == Some(&SqlState::LOCK_NOT_AVAILABLE)),
        "{error:?}"
    );
    assert!(guard.is_held());
}

/// Two serializable transactions that read what the other one writes: it has nothing to do with the lock.
#[test]
fn a_serialization_failure_that_is_none_of_the_locks_is_not_taken_for_a_lost_lease() {
    let table = Table::new();
    let guard = table.lock("l").lock("worker-1").unwrap();
    table.execute("CREATE TABLE $T_number (n bigint)");
    let (mut one, mut two) = (table.client(), table.client());
    let (mut one, mut two) =
        (begin(&mut one, IsolationLevel::Serializable), begin(&mut two, IsolationLevel::Serializable));
    for (transaction, n) in [(&mut one, 1_i64), (&mut two, 2)] {
        transaction.query(&format!("SELECT n FROM {}_number", table.name), &[]).unwrap();
        transaction.execute(&format!("INSERT INTO {}_number VALUES ($1)", table.name), &[&n]).unwrap();
    }
    one.commit().unwrap();
    let error = guard.fence(&mut two).unwrap_err();
    assert!(
        matches!(&error, Error::Database { source, .. } if source.code() == Some(&SqlState::T_R_SERIALIZATION_FAILURE)),
        "{error:?}"
    );
    drop(two);
    guard.unlock().unwrap();
    without_number(table);
}

#[test]
fn a_fence_in_a_savepoint_holds_with_it_and_is_undone_with_it() {
    let table = Table::new();
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let (guard, mut client) = (ours.lock("worker-1").unwrap(), table.client());
    let mut transaction = client.transaction().unwrap();
    let mut savepoint = transaction.transaction().unwrap();
    guard.fence(&mut savepoint).unwrap();
    savepoint.commit().unwrap();
    table.expire("l");
    assert!(theirs.try_lock("worker-2").unwrap().is_none());
    let mut savepoint = transaction.transaction().unwrap();
    guard.fence(&mut savepoint).unwrap();
    savepoint.rollback().unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_none(), "the first one holds");
    transaction.rollback().unwrap();

    let mut transaction = client.transaction().unwrap();
    let mut savepoint = transaction.transaction().unwrap();
    guard.fence(&mut savepoint).unwrap();
    savepoint.rollback().unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_some());
}

/// Why it is safe: the row stays locked until the transaction ends, whether or not it says that it is released.
#[test]
fn a_transaction_that_was_fenced_before_its_guard_was_dropped_commits_before_anybody_has_the_lock() {
    let table = Table::new();
    with_number(&table);
    let (ours, theirs) = (table.lock("l"), table.lock("l"));
    let (guard, mut client) = (ours.lock("worker-1").unwrap(), table.client());
    let mut transaction = client.transaction().unwrap();
    guard.fence(&mut transaction).unwrap();
    set(&mut transaction, &table, 1).unwrap();
    // The release doesn't wait for the transaction.
    takes_at_most(ms(1_000), "unlock", || guard.unlock().unwrap());
    assert!(theirs.info().unwrap().unwrap().released_at.is_some());
    for _ in 0..20 {
        assert!(theirs.try_lock("worker-2").unwrap().is_none());
    }
    let waiter = waits_for(&theirs);
    assert_eq!(number(&table), 0);
    transaction.commit().unwrap();
    assert_eq!(waiter.join().unwrap(), 2);
    assert_eq!(number(&table), 1);
    without_number(table);
}

#[test]
fn who_waits_behind_a_fenced_transaction_does_not_hang_in_the_server_and_gives_up_in_time() {
    let table = Table::new();
    let guard = table.short_lock("l", ms(1_000), ms(100)).lock("worker-1").unwrap();
    let (mut client, mut observer) = (table.client(), table.client());
    let mut transaction = client.transaction().unwrap();
    guard.fence(&mut transaction).unwrap();
    let expired = "UPDATE $T SET lease_expire_time = clock_timestamp()";
    let released = "UPDATE $T SET released_at = clock_timestamp()";
    for (becomes, is_held) in [(None, true), (Some(expired), false), (Some(released), false)] {
        if let Some(change) = becomes {
            table.execute(change);
            eventually("its holder hears of it", || !guard.is_held());
        }
        let theirs = table.lock("l");
        let waiter = thread::spawn(move || {
            takes_at_most(ms(1_500) + ms(500), "try_lock_for", || {
                // On a machine that is busy it may hear nothing in time.
                match theirs.try_lock_for("worker-2", ms(1_500)) {
                    Err(Error::Timeout { .. }) => false,
                    guard => guard.unwrap().is_some(),
                }
            })
        });
        while !waiter.is_finished() {
            assert_eq!(waits_in_the_server(&mut observer, &table), 0, "somebody waits for a row");
            thread::sleep(ms(2));
        }
        assert!(!waiter.join().unwrap());
        assert_eq!(guard.is_held(), is_held);
    }
    transaction.commit().unwrap();
    assert!(table.lock("l").try_lock_for("worker-2", ms(2_000)).unwrap().is_some());
}

/// What keeps the lock of a process that is stopped, or whose machine is gone, and had fenced a transaction.
#[test]
fn a_fence_of_a_session_that_idles_for_too_long_is_ended_by_the_server() {
    let table = Table::new();
    with_number(&table);
    let guard = table.short_lock("l", ms(1_000), ms(100)).lock("worker-1").unwrap();
    let mut client = table.client();
    client.batch_execute("SET idle_in_transaction_session_timeout = '3s'").unwrap();
    let mut transaction = client.transaction().unwrap();
    set(&mut transaction, &table, 1).unwrap();
    guard.fence(&mut transaction).unwrap();
    table.expire("l");
    let (theirs, start) = (table.lock("l"), Instant::now());
    assert!(theirs.try_lock_for("worker-2", ms(1_000)).unwrap().is_none());
    assert!(theirs.try_lock_for("worker-2", ms(10_000)).unwrap().is_some());
    assert!(start.elapsed() >= ms(2_000), "it was not the timeout that ended it");
    transaction.commit().unwrap_err();
    assert_eq!(number(&table), 0);
    without_number(table);
}

/// An operator, or a type, of its schema could say that any lease is the right one.
#[test]
fn the_search_path_of_the_transaction_changes_nothing() {
    let table = Table::new();
    let evil = format!("{}_evil", table.name);
    let mut client = table.client();
    client.batch_execute(&format!("CREATE SCHEMA {evil}")).unwrap();
    for of in ["text", "bigint", "uuid"] {
        let create = format!(
            "CREATE FUNCTION {evil}.same({of}, {of}) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT true';
             CREATE OPERATOR {evil}.= (FUNCTION = {evil}.same, LEFTARG = {of}, RIGHTARG = {of})"
        );
        client.batch_execute(&create).unwrap();
    }
    client
        .batch_execute(&format!(
            "SET search_path = {evil}, pg_catalog; CREATE TEMPORARY TABLE uuid (); CREATE TEMPORARY TABLE text ()"
        ))
        .unwrap();
    assert!(client.query_one("SELECT 1::bigint = 2::bigint", &[]).unwrap().get::<_, bool>(0), "it is evil");
    let guard = table.lock("l").lock("worker-1").unwrap();
    let own = guard.fence_statement();
    guard.fence(&mut client.transaction().unwrap()).unwrap();
    guard.unlock_in(client.transaction().unwrap()).unwrap().rollback().unwrap();
    // As a restore would have it: another hold of the same version.
    table.execute("UPDATE $T SET lease_id = gen_random_uuid()");
    assert!(is_lost(guard.fence(&mut client.transaction().unwrap())));
    let mut transaction = client.transaction().unwrap();
    let params: [&(dyn postgres::types::ToSql + Sync); 3] = [&own.lock_id, &own.version, &own.lease_id];
    assert!(transaction.query_opt(&own.sql, &params).unwrap().is_none());
    drop(transaction);
    assert!(is_lost(guard.unlock_in(client.transaction().unwrap()).map(drop)));
    client.batch_execute(&format!("RESET search_path; DROP SCHEMA {evil} CASCADE")).unwrap();
}

/// A process that is stopped for longer than its lease, with its commit before it.
#[test]
fn the_commit_of_a_zombie_is_refused_at_every_isolation_level() {
    for level in LEVELS {
        let table = Table::new();
        with_number(&table);
        let mut zombie = Process::start("write", &table, &["l", &format!("{level:?}"), "stopped before its fence"]);
        assert_eq!(zombie.expect_line(), "1");
        zombie.signal(Signal::SIGSTOP);
        let new = takes_at_most(ms(15_000), "the takeover", || table.lock("l").lock("worker-1").unwrap());
        let mut client = table.client();
        new.transaction(&mut client, |transaction| Ok::<_, Fault>(set(transaction, &table, new.version())?)).unwrap();
        zombie.signal(Signal::SIGCONT);
        zombie.go_on();
        assert_eq!(zombie.expect_line(), "fence: lost, past its deadline: lost", "{level:?}");
        assert_eq!(number(&table), 2, "{level:?}");
        drop(zombie);
        without_number(table);
    }
}

/// One whose fence had run before it was stopped has the lock until it ends, however long that takes.
#[test]
fn who_would_take_over_from_a_zombie_with_a_fence_waits_until_it_ends() {
    for level in LEVELS {
        let table = Table::new();
        with_number(&table);
        let mut zombie = Process::start("write", &table, &["l", &format!("{level:?}"), "stopped after its fence"]);
        assert_eq!(zombie.expect_line(), "1");
        assert_eq!(zombie.expect_line(), "fenced");
        zombie.signal(Signal::SIGSTOP);
        let (theirs, stopped) = (table.lock("l"), Instant::now());
        assert!(theirs.try_lock_for("worker-2", ms(2_500)).unwrap().is_none(), "its lease of 1 s is over");
        let row = theirs.info().unwrap().unwrap();
        assert!(!row.is_held && row.version == 1, "{row:?}");
        zombie.signal(Signal::SIGCONT);
        zombie.go_on();
        let new = takes_at_most(ms(3_000), "the takeover", || theirs.lock("worker-2").unwrap());
        println!("{level:?}: waited {:?} for a lease of 1 s", stopped.elapsed());
        assert_eq!(zombie.expect_line(), "committed");
        assert_eq!((new.version(), number(&table)), (2, 1), "{level:?}: it came first");
        let mut client = table.client();
        new.transaction(&mut client, |transaction| Ok::<_, Fault>(set(transaction, &table, new.version())?)).unwrap();
        assert_eq!(number(&table), 2);
        drop(zombie);
        without_number(table);
    }
}

/// One that asked before the lock was taken, and reaches the row afterwards, keeps it until it has committed nothing.
#[test]
fn an_acquire_that_came_too_late_is_waited_for_and_not_taken_for_a_loss() {
    const FENCES: usize = 600;
    let table = Table::new();
    table.storage();
    let fenced = AtomicUsize::new(0);
    thread::scope(|scope| {
        for level in LEVELS {
            let (table, fenced) = (&table, &fenced);
            scope.spawn(move || {
                let (lock, mut client) = (table.lock("l"), table.client());
                while fenced.load(Ordering::SeqCst) < FENCES {
                    // The others ask all the time.
                    let Some(guard) = lock.try_lock("worker").unwrap() else { continue };
                    let mut transaction = begin(&mut client, level);
                    let result = guard.fence(&mut transaction);
                    // Nobody waits for one that has failed.
                    fenced.fetch_add(if result.is_ok() { 1 } else { FENCES }, Ordering::SeqCst);
                    result.expect("it has just been acquired");
                    transaction.rollback().unwrap();
                    guard.unlock().unwrap();
                }
            });
        }
    });
}

/// Refreshes, waiters that come and go, other fences, and vacuum, all of the same row.
#[test]
fn a_fence_finds_its_row_whatever_else_is_done_to_it() {
    let table = Table::new();
    let guard = table.short_lock("l", ms(5_000), ms(10)).lock("worker-1").unwrap();
    let end = Instant::now() + ms(3_000);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let lock = table.lock("l");
                while Instant::now() < end {
                    assert!(lock.try_lock_for("worker-2", ms(15)).unwrap().is_none());
                }
            });
        }
        scope.spawn(|| {
            let mut client = table.client();
            while Instant::now() < end {
                client.batch_execute(&format!("VACUUM (FREEZE) {}", table.name)).unwrap();
            }
        });
        for level in LEVELS {
            let (guard, table) = (&guard, &table);
            scope.spawn(move || {
                let mut client = table.client();
                for round in 0.. {
                    let mut transaction = begin(&mut client, level);
                    see(&mut transaction);
                    // Sometimes with an old snapshot.
                    thread::sleep(ms(if round % 3 == 0 { 25 } else { 0 }));
                    let mut savepoint = transaction.transaction().unwrap();
                    guard.fence(&mut savepoint).unwrap();
                    if round % 2 == 0 {
                        savepoint.rollback().unwrap()
                    } else {
                        savepoint.commit().unwrap()
                    }
                    guard.fence(&mut transaction).unwrap();
                    transaction.commit().unwrap();
                    if Instant::now() >= end {
                        break;
                    }
                }
            });
        }
    });
    assert!(guard.is_held());
}

/// Each of three takes the lock from the others again and again, at whatever moment of their transactions.
#[test]
fn of_a_takeover_and_a_fenced_commit_at_the_same_time_the_order_is_that_of_the_versions() {
    const ROUNDS: usize = 3_000;
    let table = Table::new();
    table.storage();
    // Writes are numbered in the order in which they are committed: the row is locked until then.
    table.execute("CREATE TABLE $T_number (n bigint, writes bigint)");
    table.execute("INSERT INTO $T_number VALUES (0, 0)");
    table.execute("CREATE TABLE $T_written (position bigint, version bigint, seen bigint)");
    let (committed, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for level in LEVELS {
            let (table, committed, refused) = (&table, &committed, &refused);
            scope.spawn(move || {
                let (lock, mut client, mut ager) = (table.lock("l"), table.client(), table.client());
                let sql = |text: &str| text.replace("$T", &table.name);
                let expire = ager.prepare(&sql("UPDATE $T SET lease_expire_time = clock_timestamp()")).unwrap();
                let read = client.prepare(&sql("SELECT n FROM $T_number")).unwrap();
                let write = client
                    .prepare(&sql("WITH turn AS (UPDATE $T_number SET n = $1, writes = writes + 1 RETURNING writes)
                                   INSERT INTO $T_written SELECT writes, $1, $2 FROM turn"))
                    .unwrap();
                for round in 0..ROUNDS / LEVELS.len() {
                    let guard = loop {
                        if let Some(guard) = lock.try_lock("worker").unwrap() {
                            break guard;
                        }
                    };
                    // As if it had been stopped: from now on anybody may take over.
                    ager.execute(&expire, &[]).unwrap();
                    // The fence before what is read and written, or after it.
                    let result = (|| -> Result<(), Fault> {
                        let mut transaction = begin(&mut client, level);
                        if round % 2 == 0 {
                            guard.fence(&mut transaction)?;
                        }
                        let seen: i64 = transaction.query_one(&read, &[])?.get(0);
                        transaction.execute(&write, &[&guard.version(), &seen])?;
                        if round % 2 == 1 {
                            guard.fence(&mut transaction)?;
                        }
                        Ok(transaction.commit()?)
                    })();
                    let count = if result.is_ok() { committed } else { refused };
                    count.fetch_add(1, Ordering::SeqCst);
                    match result {
                        Ok(()) => {}
                        Err(Fault::Lock(error)) => assert!(error.is_lease_lost(), "{error:?}"),
                        // A newer hold wrote after this one's snapshot.
                        Err(Fault::Postgres(error)) => {
                            assert_eq!(error.code(), Some(&SqlState::T_R_SERIALIZATION_FAILURE));
                        }
                        Err(Fault::Own(_)) => unreachable!(),
                    }
                }
            });
        }
    });
    let (committed, refused) = (committed.into_inner(), refused.into_inner());
    println!("{committed} committed, {refused} refused");
    let sql = "SELECT version, seen FROM $T_written ORDER BY position".replace("$T", &table.name);
    let written: Vec<(i64, i64)> =
        table.client().query(&sql, &[]).unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(written.len(), committed);
    let mut before = 0;
    for (version, seen) in written {
        assert!(version > before, "version {version} was committed after {before}");
        assert_eq!(seen, before, "version {version} has seen what the hold before it wrote");
        before = version;
    }
    // How many of each is a matter of the load.
    assert!(committed > 50 && refused > 50, "{committed} committed, {refused} refused: no race");
    table.execute("DROP TABLE $T_written");
    without_number(table);
}
