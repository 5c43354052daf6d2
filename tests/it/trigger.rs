//! The version check: a table with its trigger refuses writes under an older version of its lock.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, Scope, ScopedJoinHandle};

use postgres::{Client, IsolationLevel, NoTls, Transaction};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use storage_lock::{Error, PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

use crate::support::{chain, client, dsn, eventually, ms, short_lock};

const TOO_OLD: &str = "SL001";
const NOT_SAID: &str = "SL002";

/// The SQLSTATE of what failed.
type Outcome = Result<(), String>;

/// A schema of its own, dropped at its end; `$S` stands for it.
struct Schema {
    name: String,
}

impl Schema {
    fn new() -> Schema {
        Schema::named(&format!("it_{}", Uuid::new_v4().simple()))
    }

    fn named(name: &str) -> Schema {
        let schema = Schema { name: name.to_owned() };
        schema.execute("CREATE SCHEMA $S");
        schema
    }

    /// With the check, and a table `data` that lock `l` guards.
    fn guarded() -> Schema {
        let schema = Schema::new();
        schema.storage().create_version_check().unwrap();
        schema.guard("data", "l");
        schema
    }

    fn storage(&self) -> PostgresStorage {
        PostgresStorage::new(PostgresStorageOptions::from_dsn(&dsn()).schema(&self.name)).unwrap()
    }

    fn guard(&self, table: &str, lock_id: &str) {
        self.execute(&format!(
            "CREATE TABLE $S.{table} (version bigint);
             CREATE TRIGGER check_version BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON $S.{table}
                 FOR EACH STATEMENT EXECUTE FUNCTION $S.storage_lock_check_version('{lock_id}')"
        ));
    }

    fn sql(&self, text: &str) -> String {
        text.replace("$S", &format!("\"{}\"", self.name.replace('"', "\"\"")))
    }

    fn execute(&self, text: &str) {
        client().batch_execute(&self.sql(text)).expect(text);
    }

    fn say(&self, transaction: &mut Transaction<'_>, lock_id: &str, version: i64) -> Outcome {
        let text = self.sql("SELECT $S.storage_lock_use_version($1, $2)");
        transaction.execute(&text, &[&lock_id, &version]).map(drop).map_err(code)
    }

    fn run(&self, transaction: &mut Transaction<'_>, text: &str) -> Outcome {
        transaction.batch_execute(&self.sql(text)).map_err(code)
    }

    /// A transaction of its own, under a version of lock `l`.
    fn write(&self, version: i64, text: &str) -> Outcome {
        let mut client = client();
        let mut transaction = client.transaction().unwrap();
        self.say(&mut transaction, "l", version)?;
        self.run(&mut transaction, text)?;
        transaction.commit().map_err(code)
    }

    fn insert(&self, version: i64) -> Outcome {
        self.write(version, &format!("INSERT INTO $S.data VALUES ({version})"))
    }

    /// An insert on a thread, which waits for another transaction.
    fn waiting_insert<'a>(&'a self, scope: &'a Scope<'a, '_>, version: i64) -> ScopedJoinHandle<'a, Outcome> {
        let thread = scope.spawn(move || self.insert(version));
        self.somebody_waits();
        thread
    }

    #[track_caller]
    fn somebody_waits(&self) {
        let mut client = client();
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND strpos(query, $1) > 0";
        eventually("it waits for another transaction", || {
            client.query_one(sql, &[&self.name]).unwrap().get::<_, i64>(0) == 1
        });
    }

    fn versions(&self) -> Vec<i64> {
        let sql = self.sql("SELECT version FROM $S.data ORDER BY version");
        client().query(&sql, &[]).unwrap().iter().map(|row| row.get(0)).collect()
    }
}

impl Drop for Schema {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.execute("DROP SCHEMA $S CASCADE");
        }
    }
}

fn code(error: postgres::Error) -> String {
    error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned())
}

fn refused(code: &str) -> Outcome {
    Err(code.to_owned())
}

#[test]
fn the_version_check_is_not_created_unless_it_is_asked_for() {
    let schema = Schema::new();
    let storage = schema.storage();
    StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap().unlock().unwrap();
    storage.create_table().unwrap();
    let mut client = client();
    let mut objects = || {
        let sql = "SELECT relname::text FROM pg_class WHERE relnamespace = $1::text::regnamespace AND relkind = 'r'
                   UNION ALL SELECT proname::text FROM pg_proc WHERE pronamespace = $1::text::regnamespace ORDER BY 1";
        client.query(sql, &[&schema.name]).unwrap().iter().map(|row| row.get(0)).collect::<Vec<String>>()
    };
    assert_eq!(objects(), ["storage_lock"]);
    storage.create_version_check().unwrap();
    assert_eq!(
        objects(),
        ["storage_lock", "storage_lock_check_version", "storage_lock_use_version", "storage_lock_versions"]
    );
}

#[test]
fn the_version_check_may_be_created_again_and_by_many_at_once() {
    for _ in 0..5 {
        let schema = Schema::new();
        let storages: Vec<PostgresStorage> = (0..8).map(|_| schema.storage()).collect();
        thread::scope(|scope| {
            for storage in &storages {
                scope.spawn(|| (0..3).for_each(|_| storage.create_version_check().unwrap()));
            }
        });
    }
    // What was seen is kept, and nobody's open transaction is in the way.
    let schema = Schema::guarded();
    let mut client = client();
    let mut open = client.transaction().unwrap();
    schema.say(&mut open, "l", 7).unwrap();
    schema.storage().create_version_check().unwrap();
    open.commit().unwrap();
    assert_eq!(schema.insert(6), refused(TOO_OLD));
}

#[test]
fn the_version_check_works_in_a_database_without_the_lock() {
    let name = format!("it_{}", Uuid::new_v4().simple());
    client().batch_execute(&format!("CREATE DATABASE {name}")).unwrap();
    let schema = Schema::new();
    let config: postgres::Config = dsn().parse().unwrap();
    let dsn = dsn().replace(&format!("dbname={}", config.get_dbname().unwrap()), &format!("dbname={name}"));
    let mut elsewhere = Client::connect(&dsn, NoTls).unwrap();
    elsewhere.batch_execute(&schema.sql("CREATE SCHEMA $S")).unwrap();
    elsewhere.batch_execute(schema.storage().version_check_ddl()).unwrap();
    let mut say = |version: i64| {
        let sql = schema.sql("SELECT $S.storage_lock_use_version('l', $1)");
        elsewhere.execute(&sql, &[&version]).map(drop).map_err(code)
    };
    assert_eq!([say(2), say(1), say(2), say(3)], [Ok(()), refused(TOO_OLD), Ok(()), Ok(())]);
    drop(elsewhere);
    client().batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)")).unwrap();
}

#[test]
fn another_programs_table_of_versions_is_refused_and_not_touched() {
    for columns in ["lock_id text, version bigint", "lock_id text PRIMARY KEY, number bigint"] {
        let schema = Schema::new();
        schema.execute(&format!("CREATE TABLE $S.storage_lock_versions ({columns})"));
        let error = schema.storage().create_version_check().unwrap_err();
        assert!(matches!(error, Error::Database { .. }), "{error:?}");
        assert!(chain(&error).contains(&schema.name), "{}", chain(&error));
        let functions = "SELECT count(*) FROM pg_proc WHERE pronamespace = $1::text::regnamespace";
        assert_eq!(client().query_one(functions, &[&schema.name]).unwrap().get::<_, i64>(0), 0);
    }
}

#[test]
fn a_holder_that_lost_its_lock_cannot_write_after_its_successor_has() {
    let schema = Schema::guarded();
    let (first, second) = (schema.storage(), schema.storage());
    let stopped = short_lock(&first, "l", ms(1_000), ms(300)).lock("worker-1").unwrap();
    assert_eq!(schema.insert(stopped.version()), Ok(()));
    schema.execute("UPDATE $S.storage_lock SET lease_expire_time = clock_timestamp()");
    let guard = StorageLock::new(&second, "l").unwrap().lock("worker-2").unwrap();
    assert_eq!(schema.insert(guard.version()), Ok(()));
    assert_eq!(schema.insert(stopped.version()), refused(TOO_OLD));
    assert_eq!(schema.versions(), [1, 2]);
}

#[test]
fn a_smaller_version_is_refused_for_every_kind_of_write_and_others_pass() {
    let schema = Schema::guarded();
    for (number, write) in (1..).zip([
        "INSERT INTO $S.data VALUES (0)",
        "UPDATE $S.data SET version = version + 1",
        "DELETE FROM $S.data WHERE false",
        "TRUNCATE $S.data",
    ]) {
        // The last has not said a version: the trigger looks at what was set.
        let by_hand = |version: i64| {
            let mut client = client();
            let mut transaction = client.transaction().unwrap();
            let set = format!("SELECT set_config('storage_lock.versions', '{{\"l\": {version}}}', true)");
            transaction.batch_execute(&set).unwrap();
            schema.run(&mut transaction, write)?;
            transaction.commit().map_err(code)
        };
        let version = number * 10;
        assert_eq!(schema.write(version, write), Ok(()), "a greater one: {write}");
        assert_eq!(schema.write(version, write), Ok(()), "an equal one: {write}");
        assert_eq!(by_hand(version), Ok(()), "an equal one: {write}");
        assert_eq!(schema.write(version - 1, write), refused(TOO_OLD), "{write}");
        assert_eq!(by_hand(version - 1), refused(TOO_OLD), "{write}");
        assert_eq!(by_hand(version + 1), Ok(()), "a greater one: {write}");
        assert_eq!(by_hand(version), refused(TOO_OLD), "{write}");
    }
}

#[test]
fn the_error_names_the_lock_and_both_versions() {
    let schema = Schema::guarded();
    schema.insert(9_007_199_254_740_993).unwrap();
    let sql = schema.sql("SELECT $S.storage_lock_use_version('l', 9007199254740992)");
    let error = client().batch_execute(&sql).unwrap_err();
    assert_eq!(
        error.as_db_error().unwrap().message(),
        "version 9007199254740992 of lock \"l\" is too old: version 9007199254740993 has been seen"
    );
    let error = client().batch_execute(&schema.sql("DELETE FROM $S.data")).unwrap_err();
    let message = "this transaction has not said under which version of lock \"l\" it writes";
    assert_eq!(error.as_db_error().unwrap().message(), message);
    assert!(error.as_db_error().unwrap().hint().unwrap().contains("storage_lock_use_version"));
}

#[test]
fn a_write_that_does_not_say_its_version_is_refused() {
    let schema = Schema::guarded();
    let mut client = client();
    let insert = schema.sql("INSERT INTO $S.data VALUES (1)");
    let mut outcome = |sql: &str| client.batch_execute(&schema.sql(sql)).map_err(code);
    assert_eq!(outcome(&insert), refused(NOT_SAID));
    // What was said is forgotten at the end of the transaction, and with a savepoint.
    assert_eq!(outcome("SELECT $S.storage_lock_use_version('l', 1)"), Ok(()));
    assert_eq!(outcome(&insert), refused(NOT_SAID));
    let savepoint = "BEGIN; SAVEPOINT s; SELECT $S.storage_lock_use_version('l', 1); ROLLBACK TO s";
    assert_eq!(outcome(&format!("{savepoint}; {insert}")), refused(NOT_SAID));
    assert_eq!(outcome("ROLLBACK"), Ok(()));
    // Another lock's version says nothing of this one.
    assert_eq!(outcome(&format!("BEGIN; SELECT $S.storage_lock_use_version('other', 9); {insert}")), refused(NOT_SAID));
    assert_eq!(outcome("ROLLBACK"), Ok(()));
    for nothing in ["NULL, 1", "'l', NULL"] {
        assert_eq!(outcome(&format!("SELECT $S.storage_lock_use_version({nothing})")), refused(NOT_SAID));
    }
    // What is no version is refused too.
    for (nonsense, code) in
        [("{\"l\": \"new\"}", "22P02"), ("{\"l\": null}", NOT_SAID), ("42", NOT_SAID), ("l", "22P02")]
    {
        let set = format!("BEGIN; SELECT set_config('storage_lock.versions', '{nonsense}', true)");
        assert_eq!(outcome(&format!("{set}; {insert}")), refused(code), "{nonsense}");
        assert_eq!(outcome("ROLLBACK"), Ok(()));
    }
    assert_eq!(schema.versions(), []);
}

#[test]
fn a_transaction_writes_to_tables_of_several_locks() {
    let schema = Schema::guarded();
    schema.guard("other", "it's \"another\" lock\\".replace('\'', "''").as_str());
    let mut client = client();
    let mut transaction = client.transaction().unwrap();
    schema.say(&mut transaction, "l", 42).unwrap();
    schema.say(&mut transaction, "it's \"another\" lock\\", 7).unwrap();
    schema.run(&mut transaction, "INSERT INTO $S.data VALUES (42); INSERT INTO $S.other VALUES (7)").unwrap();
    transaction.commit().unwrap();
    let mut transaction = client.transaction().unwrap();
    schema.say(&mut transaction, "it's \"another\" lock\\", 8).unwrap();
    assert_eq!(schema.say(&mut transaction, "l", 41), refused(TOO_OLD));
}

#[test]
fn a_trigger_of_another_kind_is_refused() {
    let schema = Schema::guarded();
    for (kind, argument) in [
        ("BEFORE INSERT ON $S.data FOR EACH ROW", "'l'"),
        ("AFTER INSERT ON $S.data FOR EACH STATEMENT", "'l'"),
        ("BEFORE INSERT ON $S.data FOR EACH STATEMENT", ""),
    ] {
        schema.execute(&format!(
            "CREATE TRIGGER wrong {kind} EXECUTE FUNCTION $S.storage_lock_check_version({argument})"
        ));
        assert_eq!(schema.insert(1), refused("39P01"), "{kind} {argument}");
        schema.execute("DROP TRIGGER wrong ON $S.data");
    }
}

#[test]
fn a_newer_writer_waits_for_an_older_ones_open_transaction() {
    // The older version is new to the table, or it has been seen before; a transaction of another writer under it may
    // end first.
    for is_seen in [false, true] {
        let schema = Schema::guarded();
        if is_seen {
            schema.insert(1).unwrap();
        }
        let (mut client, mut another) = (client(), client());
        let mut old = client.transaction().unwrap();
        schema.say(&mut old, "l", 1).unwrap();
        if is_seen {
            let mut beside = another.transaction().unwrap();
            schema.say(&mut beside, "l", 1).unwrap();
            beside.commit().unwrap();
        }
        thread::scope(|scope| {
            let newer = schema.waiting_insert(scope, 2);
            // It does not refuse the older one while it waits.
            schema.run(&mut old, "INSERT INTO $S.data VALUES (1)").unwrap();
            assert!(!newer.is_finished());
            old.commit().unwrap();
            assert_eq!(newer.join().unwrap(), Ok(()));
        });
        assert_eq!(schema.insert(1), refused(TOO_OLD));
    }
}

#[test]
fn an_older_writer_waits_for_a_newer_ones_open_transaction_and_is_refused_if_it_commits() {
    for (is_seen, commits) in [(false, true), (true, true), (false, false), (true, false)] {
        let schema = Schema::guarded();
        if is_seen {
            schema.insert(1).unwrap();
        }
        let mut client = client();
        let mut newer = client.transaction().unwrap();
        schema.say(&mut newer, "l", 2).unwrap();
        thread::scope(|scope| {
            let old = schema.waiting_insert(scope, 1);
            if commits {
                newer.commit().unwrap();
                assert_eq!(old.join().unwrap(), refused(TOO_OLD), "seen before: {is_seen}");
            } else {
                newer.rollback().unwrap();
                assert_eq!(old.join().unwrap(), Ok(()), "seen before: {is_seen}");
            }
        });
    }
}

#[test]
fn writers_under_one_version_wait_for_the_first_of_them_and_not_for_each_other() {
    let schema = Schema::guarded();
    let mut first = client();
    let mut first = first.transaction().unwrap();
    schema.say(&mut first, "l", 1).unwrap();
    thread::scope(|scope| {
        let second = schema.waiting_insert(scope, 1);
        first.commit().unwrap();
        assert_eq!(second.join().unwrap(), Ok(()));
    });
    let mut clients: Vec<Client> = (0..4).map(|_| client()).collect();
    let mut open: Vec<Transaction<'_>> = clients.iter_mut().map(|client| client.transaction().unwrap()).collect();
    for transaction in &mut open {
        schema.run(transaction, "SET LOCAL lock_timeout = '2s'").unwrap();
        schema.say(transaction, "l", 1).unwrap();
        schema.run(transaction, "INSERT INTO $S.data VALUES (1)").unwrap();
    }
    for transaction in open {
        transaction.commit().unwrap();
    }
    assert_eq!(schema.versions(), [1; 5]);
}

/// Otherwise a newer holder computes with what an older one is about to change.
#[test]
fn what_is_read_after_the_version_was_said_is_what_older_writers_left() {
    let schema = Schema::guarded();
    schema.insert(1).unwrap();
    // What a newer writer reads right after it waited for an older one that inserts, and in its next transaction.
    let reads = |isolation: IsolationLevel, older: i64, newer: i64| {
        let (mut old_client, mut new_client) = (client(), client());
        let mut old = old_client.transaction().unwrap();
        schema.say(&mut old, "l", older).unwrap();
        schema.run(&mut old, &format!("INSERT INTO $S.data VALUES ({older})")).unwrap();
        let newest = schema.sql("SELECT count(*) FROM $S.data WHERE version = $1");
        let mut transaction = new_client.build_transaction().isolation_level(isolation).start().unwrap();
        let at_once = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                schema.say(&mut transaction, "l", newer).unwrap();
                let row = transaction.query_one(&newest, &[&older]).unwrap();
                transaction.commit().unwrap();
                row.get::<_, i64>(0)
            });
            schema.somebody_waits();
            old.commit().unwrap();
            reader.join().unwrap()
        });
        let mut transaction = new_client.build_transaction().isolation_level(isolation).start().unwrap();
        schema.say(&mut transaction, "l", newer).unwrap();
        (at_once, transaction.query_one(&newest, &[&older]).unwrap().get::<_, i64>(0))
    };
    assert_eq!(reads(IsolationLevel::ReadCommitted, 1, 2), (2, 2));
    schema.insert(2).unwrap();
    // Its snapshot is older than its wait. Hence the call in a transaction of its own.
    assert_eq!(reads(IsolationLevel::RepeatableRead, 2, 3), (1, 2));
}

#[test]
fn strange_names_and_search_paths_change_nothing() {
    let schema = Schema::named(&format!("My \"$S\" $body$ 100% it's\\ {}", Uuid::new_v4().simple()));
    schema.storage().create_version_check().unwrap();
    schema.guard("data", "l");
    let evil = Schema::new();
    evil.execute(
        "CREATE TABLE $S.storage_lock_versions (lock_id text PRIMARY KEY, version bigint);
         CREATE FUNCTION $S.no(bigint, bigint) RETURNS bool LANGUAGE sql AS 'SELECT false';
         CREATE OPERATOR $S.> (FUNCTION = $S.no, LEFTARG = bigint, RIGHTARG = bigint);
         CREATE OPERATOR $S.>= (FUNCTION = $S.no, LEFTARG = bigint, RIGHTARG = bigint);
         CREATE FUNCTION $S.set_config(text, text, bool) RETURNS text LANGUAGE sql AS 'SELECT NULL::text';
         CREATE FUNCTION $S.current_setting(text, bool) RETURNS text LANGUAGE sql AS 'SELECT NULL::text'",
    );
    let impostors = "CREATE TEMP TABLE IF NOT EXISTS storage_lock_versions (lock_id text PRIMARY KEY, version bigint);
                     CREATE DOMAIN pg_temp.jsonb AS text";
    let outcome = |version: i64, lock_id: &str| {
        let mut client = client();
        client.batch_execute(impostors).unwrap();
        let mut transaction = client.transaction().unwrap();
        evil.run(&mut transaction, "SET LOCAL search_path = pg_temp, $S, pg_catalog")?;
        schema.say(&mut transaction, lock_id, version)?;
        schema.run(&mut transaction, &format!("INSERT INTO $S.data VALUES ({version})"))?;
        transaction.commit().map_err(code)
    };
    assert_eq!(outcome(2, "l"), Ok(()));
    assert_eq!(outcome(2, "l"), Ok(()));
    assert_eq!(outcome(1, "l"), refused(TOO_OLD));
    assert_eq!(outcome(2, "L"), refused(NOT_SAID));
}

#[test]
fn a_writer_needs_three_rights_to_the_versions_and_usage_of_the_schema() {
    let schema = Schema::guarded();
    let role = format!("it_role_{}", Uuid::new_v4().simple());
    schema.execute(&format!(
        "CREATE ROLE {role}; GRANT INSERT ON $S.data TO {role}; GRANT USAGE ON SCHEMA $S TO {role};
         GRANT SELECT, INSERT, UPDATE ON $S.storage_lock_versions TO {role}"
    ));
    let number = AtomicUsize::new(1);
    // One version that is new to the table, and one that is not, of a lock that is new to it.
    let outcome = || {
        let mut client = client();
        let lock_id = format!("l{}", number.fetch_add(1, Ordering::SeqCst));
        client.batch_execute(&format!("SET ROLE {role}")).unwrap();
        for version in [1, 2, 2] {
            let mut transaction = client.transaction().unwrap();
            schema.say(&mut transaction, &lock_id, version)?;
            schema.say(&mut transaction, "l", 1)?;
            schema.run(&mut transaction, "INSERT INTO $S.data VALUES (1)")?;
            transaction.commit().map_err(code)?;
        }
        Ok(())
    };
    assert_eq!(outcome(), Ok(()));
    for right in ["SELECT ON", "INSERT ON", "UPDATE ON", "USAGE ON SCHEMA"] {
        let object = if right.ends_with("SCHEMA") { "$S" } else { "$S.storage_lock_versions" };
        schema.execute(&format!("REVOKE {right} {object} FROM {role}"));
        assert_eq!(outcome(), refused("42501"), "without {right}");
        schema.execute(&format!("GRANT {right} {object} TO {role}"));
    }
    assert_eq!(outcome(), Ok(()));
    schema.execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}"));
}

/// Where a lock is new to the table, its row may come between two statements of the check.
#[test]
fn the_first_writers_of_a_lock_do_not_wait_for_each_other_in_a_circle() {
    let schema = Schema::guarded();
    // An update looks at the table, and then takes its time.
    schema.execute(
        "CREATE FUNCTION $S.sleep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END';
         CREATE TRIGGER sleep BEFORE UPDATE ON $S.storage_lock_versions FOR EACH STATEMENT EXECUTE FUNCTION $S.sleep()",
    );
    let schema = &schema;
    thread::scope(|scope| {
        let writers = [2, 3].map(|version| scope.spawn(move || schema.insert(version)));
        let mut client = client();
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND strpos(query, $1) > 0";
        eventually("both have looked", || client.query_one(sql, &[&schema.name]).unwrap().get::<_, i64>(0) == 2);
        schema.execute("INSERT INTO $S.storage_lock_versions VALUES ('l', 1)");
        let [older, newer] = writers.map(|writer| writer.join().unwrap());
        assert_eq!(newer, Ok(()));
        assert!(older == Ok(()) || older == refused(TOO_OLD), "{older:?}");
    });
}

/// Writers under versions that grow, in a disorder: what was committed, in its order, and how many were refused.
fn interleaved(isolation: IsolationLevel, transactions: usize) -> (Vec<i64>, usize) {
    let schema = Schema::guarded();
    schema.execute("CREATE TABLE $S.committed (position bigserial, version bigint)");
    let mut random = StdRng::seed_from_u64(7);
    // Four for each version, each up to forty places from its own.
    let mut writers: Vec<(usize, i64)> =
        (0..transactions).map(|number| (number + random.random_range(0..40), number as i64 / 4 + 1)).collect();
    writers.sort_by_key(|(place, _)| *place);
    let (next, refusals) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for thread in 0..16 {
            let (schema, writers, next, refusals) = (&schema, &writers, &next, &refusals);
            scope.spawn(move || {
                let mut client = client();
                let mut random = StdRng::seed_from_u64(thread);
                while let Some((_, version)) = writers.get(next.fetch_add(1, Ordering::SeqCst)) {
                    loop {
                        match interleaved_write(schema, &mut client, isolation, *version, &mut random) {
                            Ok(()) => break,
                            Err(code) if code == TOO_OLD => {
                                refusals.fetch_add(1, Ordering::SeqCst);
                                break;
                            }
                            Err(code) if code == "40001" && !matches!(isolation, IsolationLevel::ReadCommitted) => {}
                            Err(code) => panic!("{code}"),
                        }
                    }
                }
            });
        }
    });
    let sql = schema.sql("SELECT version FROM $S.committed ORDER BY position");
    let committed: Vec<i64> = client().query(&sql, &[]).unwrap().iter().map(|row| row.get(0)).collect();
    let mut sorted = committed.clone();
    sorted.sort_unstable();
    assert_eq!(schema.versions(), sorted, "what was written and what was committed");
    (committed, refusals.into_inner())
}

/// The trigger alone has to do, so half of them only set the version.
fn interleaved_write(
    schema: &Schema,
    client: &mut Client,
    isolation: IsolationLevel,
    version: i64,
    random: &mut StdRng,
) -> Outcome {
    let mut transaction = client.build_transaction().isolation_level(isolation).start().map_err(code)?;
    if random.random() {
        schema.say(&mut transaction, "l", version)?;
    } else {
        let set = format!("SELECT set_config('storage_lock.versions', '{{\"l\": {version}}}', true)");
        schema.run(&mut transaction, &set)?;
    }
    schema.run(&mut transaction, &format!("INSERT INTO $S.data VALUES ({version})"))?;
    thread::sleep(ms(random.random_range(0..8)));
    // Who has this lock is the next one to commit.
    schema.run(&mut transaction, "SELECT pg_advisory_xact_lock('$S'::regnamespace::oid::bigint)")?;
    schema.run(&mut transaction, &format!("INSERT INTO $S.committed (version) VALUES ({version})"))?;
    transaction.commit().map_err(code)
}

#[track_caller]
fn never_falls((committed, refusals): (Vec<i64>, usize), transactions: usize) {
    let falls: Vec<&[i64]> = committed.windows(2).filter(|pair| pair[0] > pair[1]).collect();
    assert!(falls.is_empty(), "an older version was committed after a newer one: {falls:?}");
    assert_eq!(committed.len() + refusals, transactions);
    assert!(committed.len() > transactions / 10 && refusals > transactions / 10, "{refusals} were refused");
}

#[test]
fn of_1_000_interleaved_writers_none_commits_after_a_newer_one() {
    never_falls(interleaved(IsolationLevel::ReadCommitted, 1_000), 1_000);
}

#[test]
fn no_isolation_level_lets_a_writer_commit_after_a_newer_one() {
    never_falls(interleaved(IsolationLevel::RepeatableRead, 300), 300);
    never_falls(interleaved(IsolationLevel::Serializable, 300), 300);
}
