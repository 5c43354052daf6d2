//! Ids and names of any characters, on a real server. What has to be so without one is in `src/fuzz.rs`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use postgres::{Client, NoTls};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use storage_lock::{Error, PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

use crate::support::server::Server;
use crate::support::{Table, dsn, takes_at_most, waits_for};

fn run<S: Strategy>(cases: u32, strategy: &S, check: impl Fn(S::Value)) {
    // A failure may take long each time.
    let config = Config { cases, failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
    let check = |value| {
        check(value);
        Ok(())
    };
    TestRunner::new(config).run(strategy, check).unwrap_or_else(|error| panic!("{error}"));
}

/// Any characters up to about so many bytes: those that mean something in SQL, or any.
fn any_text(bytes: usize) -> impl Strategy<Value = String> {
    const WORDS: &str = "' \" \\ \\\\ '' \"\" % _ $1 $$ ; -- /* */ , . { } ( ) E' U&\" :: NULL null public \
    storage_lock a A á a\u{301} ß \
                         🔒 \u{202e} \u{feff} \u{7f} \0 DROP TABLE";
    let words: Vec<&str> = WORDS.split(' ').chain([" ", "\n", "\r", "\t"]).collect();
    prop_oneof![
        vec(select(words), 0..bytes / 4).prop_map(|words| words.concat()),
        vec(any::<u8>(), 0..bytes / 2).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        vec(any::<char>(), 0..bytes / 3).prop_map(String::from_iter),
    ]
}

fn is_text_of_at_most(bytes: usize, text: &str) -> bool {
    (1..=bytes).contains(&text.len()) && !text.contains('\0')
}

#[test]
fn every_sequence_of_one_or_two_bytes_is_a_lock_of_its_own_or_refused() {
    let server = Server::start_with(&["--fast"]);
    let table = Table::on(&server.dsn);
    let storage = table.storage();
    let sequences = (0..=255).map(|byte| vec![byte]).chain((0..=65_535_u16).map(|bytes| bytes.to_be_bytes().to_vec()));
    let (ids, refused): (BTreeSet<String>, BTreeSet<String>) =
        sequences.filter_map(|bytes| String::from_utf8(bytes).ok()).partition(|text| !text.contains('\0'));
    // All that are UTF-8, less those with NUL.
    assert_eq!((ids.len(), refused.len()), (127 + 127 * 127 + 1_920, 1 + 255));
    let any = StorageLock::new(&storage, "any").unwrap();
    for id in &refused {
        let lock = StorageLock::new(&storage, id).map(drop);
        assert!(matches!(lock, Err(Error::InvalidOption { option: "lock_id", .. })), "{id:?}: {lock:?}");
        let owner = any.try_lock(id).map(drop);
        assert!(matches!(owner, Err(Error::InvalidOption { option: "owner_id", .. })), "{id:?}: {owner:?}");
    }
    // Of the pairs of ASCII those with a character that could mean something: all of them would take too long.
    let means_something =
        |id: &&String| !id.is_ascii() || id.len() == 1 || id.contains(['\'', '"', '\\', '%', '$', ';', ' ']);
    let ids: Vec<&String> = ids.iter().filter(means_something).collect();
    thread::scope(|scope| {
        for part in ids.chunks(ids.len() / 4 + 1) {
            let storage = &storage;
            scope.spawn(move || {
                for id in part {
                    let guard = StorageLock::new(storage, id.as_str()).unwrap().try_lock(id).unwrap().expect("free");
                    assert_eq!(guard.version(), 1, "{id:?} is a lock of its own");
                    guard.unlock().unwrap();
                }
            });
        }
    });
    let rows = table.client().query(&format!("SELECT lock_id, owner_id, version FROM {}", table.name), &[]).unwrap();
    let read: BTreeSet<(String, String, i64)> = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    assert_eq!(read, ids.into_iter().map(|id| (id.clone(), id.clone(), 1)).collect());
}

#[test]
fn any_text_is_a_lock_and_an_owner_of_its_own_or_refused() {
    let table = Table::new();
    let storage = table.storage();
    let versions = RefCell::new(BTreeMap::<String, i64>::new());
    let any = StorageLock::new(&storage, "any").unwrap();
    run(64, &vec((any_text(300), any_text(300)), 1..4), |texts| {
        // And what it could be taken for.
        let alike = |text: &String| {
            [text.clone(), text.to_uppercase(), format!("{text} "), text.replace('\'', "''"), text.replace('\\', "")]
        };
        let mut ids: BTreeSet<String> = texts.iter().flat_map(|(id, _)| alike(id)).collect();
        ids.retain(|id| {
            let result = StorageLock::new(&storage, id).map(drop);
            if is_text_of_at_most(255, id) {
                result.unwrap();
                return true;
            }
            assert!(matches!(result, Err(Error::InvalidOption { option: "lock_id", .. })), "{id:?}: {result:?}");
            let result = any.try_lock(id).map(drop);
            assert!(matches!(result, Err(Error::InvalidOption { option: "owner_id", .. })), "{id:?}: {result:?}");
            false
        });
        let owners: Vec<String> =
            texts.into_iter().map(|(_, id)| id).filter(|id| is_text_of_at_most(255, id)).collect();
        let owner = owners.first().map_or("owner", String::as_str);
        let guards: Vec<_> = ids
            .iter()
            .map(|id| {
                let guard = StorageLock::new(&storage, id).unwrap().try_lock(owner).unwrap().expect("free");
                let mut versions = versions.borrow_mut();
                let version = versions.entry(id.clone()).or_default();
                *version += 1;
                assert_eq!((guard.lock_id(), guard.owner_id(), guard.version()), (id.as_str(), owner, *version));
                guard
            })
            .collect();
        let held = storage.list().unwrap();
        assert!(held.iter().map(|held| &held.lock_id).eq(&ids), "{held:?} are held, and not {ids:?}");
        for guard in guards {
            let row = storage.get(guard.lock_id()).unwrap().unwrap();
            assert_eq!((row.lock_id.as_str(), row.owner_id.as_str()), (guard.lock_id(), owner));
            guard.unlock().unwrap();
        }
        assert_eq!(storage.list().unwrap(), []);
    });
    let mut client = table.client();
    let rows = client.query(&format!("SELECT lock_id, version FROM {}", table.name), &[]).unwrap();
    let rows: BTreeMap<String, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(rows, versions.into_inner());
}

/// The id is the end of the notification.
#[test]
fn a_release_of_a_lock_of_any_name_is_heard() {
    let table = Table::new();
    let (ours, theirs) = (table.storage(), table.storage());
    run(12, &any_text(300).prop_filter("an id", |id| is_text_of_at_most(255, id)), |id| {
        let guard = StorageLock::new(&ours, &id).unwrap().lock("worker").unwrap();
        let waiting = waits_for(&StorageLock::new(&theirs, &id).unwrap());
        table.hears(&id, 1);
        guard.unlock().unwrap();
        // Who doesn't hear of it asks after half a minute.
        takes_at_most(Duration::from_secs(10), "the next hold", || waiting.join().unwrap());
    });
}

/// Everything in a database that isn't the server's own.
fn relations(client: &mut Client) -> BTreeSet<(String, String)> {
    let sql = "SELECT nspname::text, coalesce(relname::text, '')
               FROM pg_namespace n LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind <> 'i'
               WHERE nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')";
    client.query(sql, &[]).expect(sql).iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[test]
fn any_text_is_the_name_of_that_schema_and_that_table_alone_or_refused() {
    let database = format!("it_{}", Uuid::new_v4().simple());
    let mut server = crate::support::client();
    server.batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
    let dsn = format!("{} dbname={database}", dsn());
    let client = RefCell::new(Client::connect(&dsn, NoTls).unwrap());
    client
        .borrow_mut()
        .batch_execute("CREATE TABLE storage_lock (n int); INSERT INTO storage_lock VALUES (7)")
        .unwrap();
    let before = relations(&mut client.borrow_mut());
    assert_eq!(before, BTreeSet::from([("public".to_owned(), "storage_lock".to_owned())]));

    // Names that begin with pg_ are the server's own.
    let is_ours = |schema: &str| !schema.starts_with("pg_") && schema != "public";
    let names = (any_text(80), any_text(80)).prop_filter("a new schema", move |(schema, _)| is_ours(schema));
    run(40, &names, |(schema, table_name)| {
        let options = || PostgresStorageOptions::from_dsn(&dsn).schema(&schema).table_name(&table_name);
        for (option, name) in [("schema", &schema), ("table_name", &table_name)] {
            if !is_text_of_at_most(63, name) {
                let error = PostgresStorage::new(options()).unwrap_err();
                assert!(matches!(error, Error::InvalidOption { option: named, .. } if named == option), "{error:?}");
                return;
            }
        }
        let client = &mut *client.borrow_mut();
        // Quoted by the server.
        let execute = |client: &mut Client, sql: &str| {
            let sql = client.query_one("SELECT format($3, $1::text, $2::text)", &[&schema, &table_name, &sql]).unwrap();
            client.batch_execute(sql.get(0)).unwrap();
        };
        execute(client, "CREATE SCHEMA %1$I");
        let storage = PostgresStorage::new(options()).unwrap();
        let guard = StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap();
        // Another one finds the table that is there.
        let other = PostgresStorage::new(options().create_table(false)).unwrap();
        let lock = StorageLock::new(&other, "l").unwrap();
        assert!(lock.try_lock("other").unwrap().is_none());
        guard.unlock().unwrap();
        assert_eq!(lock.lock("other").unwrap().version(), 2);
        let mut expected = before.clone();
        expected.insert((schema.clone(), table_name.clone()));
        assert_eq!(relations(client), expected);
        execute(client, "DROP TABLE %1$I.%2$I; DROP SCHEMA %1$I");
        assert_eq!(relations(client), before);
        assert_eq!(client.query_one("SELECT n FROM public.storage_lock", &[]).unwrap().get::<_, i32>(0), 7);
    });
    drop(client);
    server.batch_execute(&format!("DROP DATABASE {database} WITH (FORCE)")).unwrap();
}
