//! The release as a part of the caller's transaction.

use std::thread;
use std::time::Duration;

use postgres::error::SqlState;
use postgres::{Client, IsolationLevel};
use storage_lock::{Error, LockGuard, UnlockTransaction};

use crate::fence::{LEVELS, begin, number, set, with_number, without_number};
use crate::support::proxy::Proxy;
use crate::support::{Table, dsn, eventually, is_refreshed, ms, short_lock, takes_at_most, waits_for};

/// The number and whether the lock's row says that it is released, as one statement sees them.
fn seen(client: &mut Client, table: &Table) -> (i64, bool) {
    let sql = "SELECT n, released_at IS NOT NULL FROM $T_number, $T".replace("$T", &table.name);
    let row = client.query_one(&sql, &[]).unwrap();
    (row.get(0), row.get(1))
}

fn code(error: &Error) -> Option<SqlState> {
    match error {
        Error::Database { source, .. } => source.code().cloned(),
        other => panic!("{other:?}"),
    }
}

/// Does something with the release of a hold in a transaction. A refresh at that moment is a reason to repeat it, at
/// the stricter levels.
pub fn releasing<T>(
    guard: &LockGuard,
    client: &mut Client,
    level: IsolationLevel,
    run: impl FnOnce(UnlockTransaction<'_>) -> T,
) -> T {
    loop {
        match guard.unlock_in(begin(client, level)) {
            Ok(transaction) => return run(transaction),
            Err(error) => assert_eq!(code(&error), Some(SqlState::T_R_SERIALIZATION_FAILURE), "{error:?}"),
        }
    }
}

#[test]
fn a_commit_publishes_what_was_written_and_the_release_together() {
    for level in LEVELS {
        let table = Table::new();
        with_number(&table);
        let (ours, theirs) = (table.lock("l"), table.lock("l"));
        let guard = ours.lock("worker-1").unwrap();
        let (mut client, mut observer) = (table.client(), table.client());
        let mut transaction = guard.unlock_in(begin(&mut client, level)).unwrap();
        assert!(!guard.is_held() && guard.remaining() == Duration::ZERO, "it may be committed at any time");
        // What comes after the release belongs to it too.
        set(&mut transaction, &table, 1).unwrap();
        for _ in 0..20 {
            assert_eq!(seen(&mut observer, &table), (0, false));
            assert!(theirs.try_lock("worker-2").unwrap().is_none());
        }
        transaction.commit().unwrap();
        assert_eq!(seen(&mut observer, &table), (1, true));
        let new = theirs.try_lock("worker-2").unwrap().expect("the lock is free");
        assert_eq!(new.version(), 2);
        // The guard knows, and leaves its successor alone.
        let before = theirs.info().unwrap();
        assert!(!guard.is_held() && !guard.lost().is_lost());
        takes_at_most(ms(100), "unlock", || guard.unlock()).unwrap();
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
        let guard = table.short_lock("l", ms(1_000), ms(100)).lock("worker-1").unwrap();
        let mut client = table.client();
        for is_explicit in [true, false] {
            releasing(&guard, &mut client, level, |mut transaction| {
                set(&mut transaction, &table, 1).unwrap();
                assert!(!guard.is_held());
                if is_explicit { transaction.rollback().unwrap() } else { drop(transaction) }
            });
            assert!(guard.is_held(), "at once");
            assert_eq!(number(&table), 0);
            is_refreshed(&guard);
            thread::sleep(ms(1_200));
            assert!(guard.is_held(), "it is refreshed on and on");
            assert!(theirs.try_lock("worker-2").unwrap().is_none());
        }
        guard.unlock().unwrap();
        assert!(theirs.try_lock("worker-2").unwrap().is_some());
        without_number(table);
    }
}

/// The server refuses to commit: it has rolled back.
#[test]
fn a_commit_that_fails_keeps_the_lock_and_its_refresh_going() {
    let table = Table::new();
    table.execute("CREATE TABLE $T_number (n bigint UNIQUE DEFERRABLE INITIALLY DEFERRED)");
    let guard = table.short_lock("l", ms(1_000), ms(100)).lock("worker-1").unwrap();
    let mut client = table.client();
    let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    transaction.execute(&format!("INSERT INTO {}_number VALUES (1), (1)", table.name), &[]).unwrap();
    assert_eq!(code(&transaction.commit().unwrap_err()), Some(SqlState::UNIQUE_VIOLATION));
    assert!(guard.is_held());
    is_refreshed(&guard);
    assert!(table.lock("l").try_lock("worker-2").unwrap().is_none());
    guard.unlock().unwrap();
    without_number(table);
}

/// The answer to the commit is lost, and it happened: the library finds out.
#[test]
fn a_commit_without_an_answer_is_settled() {
    let table = Table::new();
    with_number(&table);
    let proxy = Proxy::to(&dsn());
    let (lock, theirs) = (table.lock("l"), table.lock("l"));
    let guard = lock.lock("worker-1").unwrap();
    let mut client = Table::of(&proxy.dsn, &table.name).client();
    let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    set(&mut transaction, &table, 1).unwrap();
    proxy.lose_answer_to(b"COMMIT");
    transaction.commit().expect("it was committed");
    assert_eq!(number(&table), 1);
    assert!(!guard.is_held() && !guard.lost().is_lost());
    guard.unlock().unwrap();
    assert_eq!(theirs.try_lock("worker-2").unwrap().expect("the lock is free").version(), 2);
    without_number(table);
}

/// The request itself is lost, with its connection: the server rolls back.
#[test]
fn a_commit_that_never_arrived_keeps_the_lock() {
    let table = Table::new();
    with_number(&table);
    let proxy = Proxy::to(&dsn());
    let guard = table.short_lock("l", ms(3_000), ms(100)).lock("worker-1").unwrap();
    let mut client = Table::of(&proxy.dsn, &table.name).client();
    let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    set(&mut transaction, &table, 1).unwrap();
    proxy.cut();
    assert_eq!(code(&transaction.commit().unwrap_err()), None);
    eventually("it is held again", || guard.is_held());
    assert_eq!(number(&table), 0);
    is_refreshed(&guard);
    guard.unlock().unwrap();
    without_number(table);
}

/// The server ends the session in the commit. That the hold is not there any more doesn't mean that it was committed:
/// its lease may have run out before it was looked for, or meanwhile.
#[test]
fn a_commit_that_was_undone_is_not_taken_for_one_where_the_lease_has_run_out() {
    let table = Table::new();
    with_number(&table);
    let function = format!("{}_end", table.name);
    table.execute(&format!(
        "CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS
         $$BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END$$"
    ));
    table.execute(&format!(
        "CREATE CONSTRAINT TRIGGER ends AFTER UPDATE ON $T_number DEFERRABLE INITIALLY DEFERRED
         FOR EACH ROW EXECUTE FUNCTION {function}()"
    ));
    let proxy = Proxy::to(&dsn());
    let storage = Table::of(&proxy.dsn, &table.name).storage();
    for (lease, runs_out_before, runs_out_meanwhile) in
        [(ms(10_000), false, false), (ms(3_000), true, false), (ms(1_000), false, true)]
    {
        let guard = short_lock(&storage, "l", lease, ms(100)).lock("worker-1").unwrap();
        let mut client = table.client();
        let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
        set(&mut transaction, &table, 1).unwrap();
        let runs_out = runs_out_before || runs_out_meanwhile;
        if runs_out_before {
            assert!(guard.lost().wait_for(Duration::MAX));
        }
        let expires = || table.lock("l").info().unwrap().unwrap().lease_expire_time;
        let before = expires();
        thread::scope(|scope| {
            if runs_out_meanwhile {
                proxy.stall(true, false);
                scope.spawn(|| {
                    thread::sleep(ms(1_500));
                    proxy.stall(false, false);
                });
            }
            // The server's last words, or the end of the connection.
            let said = code(&transaction.commit().unwrap_err());
            assert!(said.is_none() || said == Some(SqlState::ADMIN_SHUTDOWN), "{said:?}");
        });
        assert_eq!(number(&table), 0);
        assert_eq!((guard.is_held(), guard.lost().is_lost()), (!runs_out, runs_out));
        assert_eq!(expires() == before, runs_out, "a hold that is lost is not refreshed");
        assert_eq!(guard.unlock().is_err_and(|error| error.is_lease_lost()), runs_out);
        assert!(table.lock("l").try_lock_for("worker-2", ms(2_000)).unwrap().is_some());
    }
    table.client().batch_execute(&format!("DROP FUNCTION {function} CASCADE")).unwrap();
    without_number(table);
}

/// The server answers such a commit as any other, and the driver doesn't look.
#[test]
fn a_transaction_in_which_a_statement_failed_is_not_said_to_be_committed_and_keeps_the_lock() {
    let table = Table::new();
    with_number(&table);
    let (theirs, mut client) = (table.lock("l"), table.client());
    let guard = table.short_lock("l", ms(2_000), ms(100)).lock("worker-1").unwrap();
    let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    set(&mut transaction, &table, 1).unwrap();
    transaction.execute("SELECT 1 / 0", &[]).unwrap_err();
    assert_eq!(code(&transaction.commit().unwrap_err()), Some(SqlState::IN_FAILED_SQL_TRANSACTION));
    assert_eq!(number(&table), 0);
    assert!(guard.is_held());
    is_refreshed(&guard);
    assert!(theirs.try_lock("worker-2").unwrap().is_none());
    guard.unlock().unwrap();
    without_number(table);
}

#[test]
fn a_release_that_was_rolled_back_within_its_transaction_is_not_taken_for_one() {
    let table = Table::new();
    let (theirs, mut client) = (table.lock("l"), table.client());
    let guard = table.short_lock("l", ms(2_000), ms(100)).lock("worker-1").unwrap();
    for text in ["ROLLBACK", "ROLLBACK; BEGIN", "ROLLBACK AND CHAIN"] {
        let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
        transaction.batch_execute(text).unwrap();
        let error = transaction.commit().unwrap_err();
        assert!(matches!(error, Error::Fence { .. }) && error.to_string().contains("rolled back"), "{error}");
        assert!(guard.is_held(), "after {text:?}");
        is_refreshed(&guard);
        assert!(theirs.try_lock("worker-2").unwrap().is_none());
    }
    guard.unlock_in(client.transaction().unwrap()).unwrap().commit().unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_some());
}

/// The commit of such a part is that of a savepoint, after which the whole can still be rolled back. The driver leaves
/// a savepoint behind when it rolls back to it.
#[test]
fn a_transaction_within_another_one_and_one_with_a_savepoint_are_refused_and_the_lock_is_held() {
    let is_refused = |result: Result<UnlockTransaction<'_>, Error>, guard: &LockGuard| {
        let error = result.map(drop).unwrap_err();
        assert!(matches!(error, Error::Fence { .. }) && error.to_string().contains("within another one"), "{error}");
        assert!(guard.is_held(), "as before");
        is_refreshed(guard);
    };
    for level in LEVELS {
        let table = Table::new();
        with_number(&table);
        let (theirs, mut client) = (table.lock("l"), table.client());
        // Too rarely for a refresh to come between.
        let guard = table.short_lock("l", ms(20_000), ms(1_000)).lock("worker-1").unwrap();
        let mut outer = begin(&mut client, level);
        let mut inner = outer.transaction().unwrap();
        set(&mut inner, &table, 1).unwrap();
        is_refused(guard.unlock_in(inner), &guard);
        // Its own part is undone, and no more: the whole goes on, and its commit releases nothing.
        set(&mut outer, &table, 2).unwrap();
        outer.commit().unwrap();
        assert_eq!(number(&table), 2);
        assert!(guard.is_held() && theirs.try_lock("worker-2").unwrap().is_none());

        let mut outer = begin(&mut client, level);
        set(&mut outer, &table, 3).unwrap();
        outer.transaction().unwrap().rollback().unwrap();
        is_refused(guard.unlock_in(outer), &guard);
        let mut outer = begin(&mut client, level);
        set(&mut outer, &table, 3).unwrap();
        outer.batch_execute("SAVEPOINT s").unwrap();
        is_refused(guard.unlock_in(outer), &guard);
        assert_eq!(number(&table), 2, "rolled back");
        assert!(theirs.try_lock("worker-2").unwrap().is_none());

        // What to do instead. One that was committed within it, and one that comes later, are in nobody's way.
        let mut outer = begin(&mut client, level);
        outer.transaction().unwrap().rollback().unwrap();
        guard.fence(&mut outer).unwrap();
        outer.commit().unwrap();
        let mut outer = begin(&mut client, level);
        outer.transaction().unwrap().commit().unwrap();
        let mut transaction = guard.unlock_in(outer).unwrap();
        transaction.transaction().unwrap().rollback().unwrap();
        transaction.commit().unwrap();
        assert!(theirs.try_lock("worker-2").unwrap().is_some());
        without_number(table);
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
    let transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    // Although the guard is kept.
    let versions = takes_at_most(ms(5_000), "both", || {
        transaction.commit().unwrap();
        [other.join().unwrap(), own.join().unwrap()]
    });
    assert_eq!(versions, [2, 3], "the other process stood in line first");
    guard.unlock().unwrap();
}

#[test]
fn the_same_owner_does_not_enter_again_what_is_being_released() {
    let table = Table::new();
    let lock = table.lock("l");
    let (guard, mut client) = (lock.lock("worker-1").unwrap(), table.client());
    let transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    assert!(lock.try_lock("worker-1").unwrap().is_none());
    transaction.rollback().unwrap();
    let again = lock.try_lock("worker-1").unwrap().expect("it enters again");
    assert_eq!(again.version(), 1);
    drop(again);
    guard.unlock_in(client.transaction().unwrap()).unwrap().commit().unwrap();
    assert_eq!(lock.lock("worker-1").unwrap().version(), 2);
}

#[test]
fn the_guards_of_a_lock_that_was_taken_twice_are_refused_and_the_last_one_is_not() {
    let table = Table::new();
    with_number(&table);
    let (lock, theirs) = (table.lock("l"), table.lock("l"));
    let (outer, mut client) = (lock.lock("worker-1").unwrap(), table.client());
    let inner = lock.lock("worker-1").unwrap();
    for guard in [&inner, &outer] {
        let mut transaction = client.transaction().unwrap();
        set(&mut transaction, &table, 1).unwrap();
        let error = guard.unlock_in(transaction).map(drop).unwrap_err();
        assert!(matches!(error, Error::Fence { .. }) && error.to_string().contains("more than once"), "{error}");
        assert!(outer.is_held() && inner.is_held());
        assert_eq!(number(&table), 0, "rolled back");
    }
    inner.unlock().unwrap();
    assert!(outer.is_held() && theirs.try_lock("worker-2").unwrap().is_none());
    outer.unlock_in(client.transaction().unwrap()).unwrap().commit().unwrap();
    assert!(theirs.try_lock("worker-2").unwrap().is_some());
    without_number(table);
}

#[test]
fn a_second_transaction_that_would_release_is_refused_at_once() {
    let table = Table::new();
    let (guard, mut one, mut two) = (table.lock("l").lock("worker-1").unwrap(), table.client(), table.client());
    let first = guard.unlock_in(one.transaction().unwrap()).unwrap();
    let second = takes_at_most(ms(500), "the second one", || guard.unlock_in(two.transaction().unwrap()).map(drop));
    assert!(matches!(second, Err(Error::Fence { .. })), "{second:?}");
    assert!(!guard.is_held(), "the first one may be committed at any time");
    first.commit().unwrap();
    // A repetition must not write twice.
    assert!(guard.unlock_in(two.transaction().unwrap()).unwrap_err().is_lease_lost());
    assert!(guard.fence(&mut two.transaction().unwrap()).unwrap_err().is_lease_lost());
    guard.unlock().unwrap();
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
        assert!(old.unlock_in(transaction).unwrap_err().is_lease_lost(), "{level:?}");
        assert_eq!(theirs.info().unwrap(), before);
        assert!(old.unlock().unwrap_err().is_lease_lost());
        assert!(new.is_held());
    }
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
        let error = guard.unlock_in(transaction).unwrap_err();
        assert_eq!(code(&error), Some(SqlState::T_R_SERIALIZATION_FAILURE));
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
    let mut transaction = guard.unlock_in(transaction).unwrap();
    assert_eq!(read(&mut transaction), before);
    transaction.commit().unwrap();
}

/// Makes all that PostgreSQL has of these names, of simple types, fail for who has the schema `evil` first in its
/// search path.
fn shadow(client: &mut Client, evil: &str) {
    let create = "
        CREATE SCHEMA evil;
        CREATE FUNCTION evil.fails(bigint) RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RAISE ''shadowed''; END';
        CREATE AGGREGATE evil.count (\"any\") (
            SFUNC = pg_catalog.int8inc_any, STYPE = bigint, INITCOND = '0', FINALFUNC = evil.fails);
        CREATE AGGREGATE evil.count (*) (SFUNC = pg_catalog.int8inc, STYPE = bigint, INITCOND = '0', FINALFUNC =
        evil.fails);
        DO $do$
        DECLARE
            simple CONSTANT regtype[] :=
            '{text,bigint,integer,uuid,uuid[],xid,xid8,boolean,timestamptz,anyelement,anynonarray,anyarray}';
            it record;
        BEGIN
            FOR it IN SELECT proname, proretset, prorettype::regtype AS returns,
                    array_to_string(ARRAY(SELECT unnest(proargtypes)::regtype), ', ') AS arguments
                FROM pg_proc
                WHERE pronamespace = 'pg_catalog'::regnamespace AND prokind = 'f' AND proargmodes IS NULL
                  AND proargtypes::oid[] <@ simple::oid[]
                  AND (prorettype = ANY (simple) OR prorettype = 'void'::regtype)
                  AND proname IN ('clock_timestamp', 'now', 'pg_notify', 'unnest', 'txid_current',
                  'pg_current_xact_id', 'right', 'left',
                                  'concat', 'array_remove', 'array_append', 'array_position', 'cardinality',
                                  'gen_random_uuid')
            LOOP
                EXECUTE format('CREATE FUNCTION evil.%I(%s) RETURNS %s %s LANGUAGE plpgsql AS $f$BEGIN RAISE
                ''shadowed %s''; END$f$',
                    it.proname, it.arguments, CASE WHEN it.proretset THEN 'SETOF' END, it.returns, it.proname);
            END LOOP;
            FOR it IN SELECT DISTINCT oprname, l::text AS l, r::text AS r
                FROM pg_operator, unnest(ARRAY[oprleft::regtype]) AS l, unnest(ARRAY[oprright::regtype]) AS r
                WHERE oprnamespace = 'pg_catalog'::regnamespace AND oprleft = ANY (simple) AND oprright = ANY (simple)
                UNION SELECT '||', l, r FROM unnest('{text,bigint,uuid}'::text[]) AS l,
                unnest('{text,bigint,uuid}'::text[]) AS r
            LOOP
                EXECUTE format('CREATE OR REPLACE FUNCTION evil.operator(%s, %s) RETURNS boolean LANGUAGE plpgsql AS
                    ''BEGIN RAISE ''''a shadowed operator''''; END''', it.l, it.r);
                EXECUTE format('CREATE OPERATOR evil.%s (FUNCTION = evil.operator, LEFTARG = %s, RIGHTARG = %s)',
                it.oprname, it.l, it.r);
            END LOOP;
            FOR it IN SELECT unnest('{text,uuid,int8,int4,timestamptz,xid,bool}'::text[]) AS name LOOP
                EXECUTE format('CREATE DOMAIN evil.%I AS pg_catalog.%I CHECK (false)',
                    it.name, it.name);
            END LOOP;
        END
        $do$";
    client.batch_execute(&create.replace("evil", evil)).unwrap();
    client.batch_execute(&format!("SET search_path = {evil}, pg_catalog, public")).unwrap();
    for fails in [
        "clock_timestamp()",
        "count(1)",
        "count(pg_catalog.pg_notify('a', 'b'))",
        "pg_notify('a', 'b')",
        "txid_current()",
    ]
    .into_iter()
    .chain([
        "'a' || pg_catalog.gen_random_uuid()",
        "7::bigint % 3::bigint",
        "1::bigint = 1::bigint",
        "'a'::text",
        "'a'::uuid",
    ])
    .chain(["(SELECT a FROM unnest(ARRAY[pg_catalog.gen_random_uuid()]) WITH ORDINALITY AS t (a, b))"])
    {
        let mut transaction = client.transaction().unwrap();
        let result = transaction.query(&format!("SELECT {fails}"), &[]);
        assert!(result.is_err(), "{fails} isn't shadowed");
    }
}

/// The search path of the caller's session is the caller's, and may have anything in it.
#[test]
fn nothing_in_the_callers_search_path_changes_what_a_release_or_a_fence_does() {
    for level in LEVELS {
        let table = Table::new();
        let evil = format!("{}_evil", table.name);
        let (ours, theirs, mut client) = (table.lock("l"), table.lock("l"), table.client());
        shadow(&mut client, &evil);
        let guard = ours.lock("worker-1").unwrap();
        let mut transaction = begin(&mut client, level);
        guard.fence(&mut transaction).unwrap();
        guard.fence_past_deadline(&mut transaction).unwrap();
        transaction.commit().unwrap();
        guard.unlock_in(begin(&mut client, level)).unwrap().rollback().unwrap();
        assert!(guard.is_held());
        // With somebody to notify.
        let waits = waits_for(&theirs);
        eventually("it stands in the row", || table.waiters("l").len() == 1);
        releasing(&guard, &mut client, level, |transaction| transaction.commit()).unwrap();
        assert_eq!(takes_at_most(ms(5_000), "the hand-over", || waits.join().unwrap()), 2);
        assert!(!guard.is_held() && !guard.lost().is_lost());
        client.batch_execute(&format!("RESET search_path; DROP SCHEMA {evil} CASCADE")).unwrap();
    }
}

#[test]
fn a_transaction_that_stays_open_for_longer_than_the_lease_loses_the_hold_and_releases_the_lock_all_the_same() {
    let table = Table::new();
    with_number(&table);
    let (theirs, mut client) = (table.lock("l"), table.client());
    let guard = table.short_lock("l", ms(1_000), ms(100)).lock("worker-1").unwrap();
    let mut transaction = guard.unlock_in(client.transaction().unwrap()).unwrap();
    set(&mut transaction, &table, 1).unwrap();
    // It isn't refreshed, and nobody else can have it.
    assert!(takes_at_most(ms(2_000), "the loss", || guard.lost().wait_for(Duration::MAX)));
    assert!(theirs.try_lock_for("worker-2", ms(500)).unwrap().is_none());
    transaction.commit().unwrap();
    assert_eq!(number(&table), 1);
    assert!(guard.lost().is_lost(), "for ever");
    assert!(theirs.try_lock_for("worker-2", ms(2_000)).unwrap().is_some());
    without_number(table);
}

/// Open transactions wait in nobody's way: not for connections of the library's, and not for its threads.
#[test]
fn transactions_that_stay_open_keep_no_other_hold_from_being_refreshed_or_released() {
    let table = Table::new();
    let storage = table.storage();
    let guards: Vec<_> =
        (0..6).map(|n| short_lock(&storage, &format!("open-{n}"), ms(20_000), ms(50)).lock("w").unwrap()).collect();
    let other = short_lock(&storage, "other", ms(2_000), ms(50)).lock("w").unwrap();
    let mut clients: Vec<Client> = guards.iter().map(|_| table.client()).collect();
    let open: Vec<_> = guards
        .iter()
        .zip(&mut clients)
        .map(|(guard, client)| guard.unlock_in(client.transaction().unwrap()).unwrap())
        .collect();
    thread::sleep(ms(2_500));
    is_refreshed(&other);
    takes_at_most(ms(1_000), "unlock", || other.unlock()).unwrap();
    takes_at_most(ms(1_000), "try_lock", || {
        drop(short_lock(&storage, "free", ms(2_000), ms(50)).try_lock("w").unwrap())
    });
    for transaction in open {
        transaction.commit().unwrap();
    }
    assert!(guards.iter().all(|guard| !guard.is_held() && !guard.lost().is_lost()));
}
