//! The table: created once, in the schema that is named, and never taken for ours when it isn't.

use std::thread;

use storage_lock::{Error, PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

use crate::support::child::Process;
use crate::support::{Table, chain, client, dsn};

fn problem(result: Result<PostgresStorage, Error>) -> String {
    match result {
        Err(Error::Table { table, problem }) => format!("{table}: {problem}"),
        other => panic!("expected Error::Table, not {other:?}"),
    }
}

#[test]
fn it_is_created_when_it_is_missing_and_used_when_it_is_there() {
    let table = Table::new();
    let first = table.storage();
    drop(StorageLock::new(&first, "l").unwrap().lock("worker").unwrap());
    let second = table.storage();
    assert_eq!(second.get("l").unwrap().unwrap().version, 1);
    second.create_table().unwrap();
}

#[test]
fn the_ddl_makes_the_table_that_is_made() {
    let table = Table::new();
    let options = table.options().create_table(false);
    let problem = problem(PostgresStorage::new(options.clone()));
    assert!(problem.contains(&table.name) && problem.contains("does not exist"), "{problem}");
    // A storage of another table tells the statement.
    let other = Table::new();
    let ddl = other.storage().table_ddl().replace(&other.name, &table.name);
    client().batch_execute(&ddl).unwrap();
    let storage = PostgresStorage::new(options).unwrap();
    drop(StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap());
    assert!(storage.table_ddl().contains("PRIMARY KEY (lock_id, version)"));
}

#[test]
fn a_missing_schema_is_an_error_that_says_so() {
    let table = Table::new();
    let problem = problem(PostgresStorage::new(table.options().schema("no such schema")));
    assert!(problem.starts_with("\"no such schema\".") && problem.contains("schema does not exist"), "{problem}");
}

#[test]
fn strange_identifiers_are_quoted() {
    let schema = format!("My \"Schema\" {}", Uuid::new_v4().simple());
    let quoted = format!("\"{}\"", schema.replace('"', "\"\""));
    client().batch_execute(&format!("CREATE SCHEMA {quoted}")).unwrap();
    for table_name in ["weird; name", "x\"; DROP TABLE y; --", "Capital", "it's\\", "100%", "{here} $1 $HERE"] {
        let options = PostgresStorageOptions::from_dsn(&dsn()).schema(&schema).table_name(table_name);
        let storage = PostgresStorage::new(options).unwrap();
        let guard = StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap();
        assert_eq!(storage.list().unwrap().len(), 1);
        guard.unlock().unwrap();
    }
    client().batch_execute(&format!("DROP SCHEMA {quoted} CASCADE")).unwrap();
}

#[test]
fn another_programs_table_is_refused_and_not_touched() {
    let table = Table::new();
    // What the Go library keeps under the same default name.
    table.execute(
        "CREATE TABLE $T (lock_id varchar(255) PRIMARY KEY, owner_id varchar(255), version bigint, \
    lock_information_json_string text)",
    );
    table.execute("INSERT INTO $T VALUES ('l', 'somebody', 7, '{}')");
    for create_table in [true, false] {
        let problem = problem(PostgresStorage::new(table.options().create_table(create_table)));
        assert!(problem.contains(&table.name), "{problem}");
        for missing in ["lock_id text", "lease_id uuid NOT NULL", "lease_expire_time timestamp with time zone NOT NULL"]
        {
            assert!(problem.contains(missing), "{problem} doesn't name {missing}");
        }
    }
    let sql = format!("SELECT t::text FROM {} t", table.name);
    assert_eq!(table.client().query_one(&sql, &[]).unwrap().get::<_, String>(0), "(l,somebody,7,{})");
}

#[test]
fn a_table_that_would_break_the_lock_is_refused() {
    for (change, says) in [
        ("ALTER TABLE $T DROP CONSTRAINT $T_pkey", "primary key"),
        ("ALTER TABLE $T SET UNLOGGED", "UNLOGGED"),
        ("ALTER TABLE $T ALTER lock_id TYPE text COLLATE \"default\"", "lock_id"),
        ("ALTER TABLE $T ALTER version TYPE integer", "version bigint"),
        ("ALTER TABLE $T ALTER lease_id DROP NOT NULL", "lease_id uuid NOT NULL"),
        ("ALTER TABLE $T DROP released_at", "released_at"),
    ] {
        let table = Table::new();
        table.storage();
        table.client().batch_execute(&change.replace("$T", &table.name)).unwrap();
        let problem = problem(PostgresStorage::new(table.options()));
        assert!(problem.contains(says), "{change}: {problem}");
    }
    let view = Table::new();
    view.execute("CREATE VIEW $T AS SELECT 1");
    assert!(problem(PostgresStorage::new(view.options())).contains("not an ordinary table"));
    view.execute("DROP VIEW $T");
}

#[test]
fn further_columns_are_no_reason_to_refuse() {
    let table = Table::new();
    table.storage();
    table.execute("ALTER TABLE $T ADD note text");
    drop(table.lock("l").lock("worker").unwrap());
}

#[test]
fn creators_that_start_at_once_all_succeed() {
    for _ in 0..10 {
        let table = Table::new();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| table.storage());
            }
        });
    }
    // The same with processes.
    let table = Table::new();
    let mut children: Vec<Process> = (0..4).map(|_| Process::start("open", &table, &[])).collect();
    for child in &mut children {
        assert_eq!(child.expect_line(), "ready");
    }
    for child in &mut children {
        child.go_on();
    }
    for child in &mut children {
        assert_eq!(child.expect_line(), "opened");
    }
}

#[test]
fn a_role_without_create_uses_a_table_that_is_there_and_cannot_make_one() {
    let (table, missing) = (Table::new(), Table::new());
    table.storage();
    let role = format!("it_role_{}", Uuid::new_v4().simple());
    table.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'limited'"));
    table.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC");
    table.execute(&format!("GRANT SELECT, INSERT, UPDATE ON $T TO {role}"));
    let config: postgres::Config = dsn().parse().unwrap();
    let password = String::from_utf8(config.get_password().unwrap().to_vec()).unwrap();
    let limited = dsn().replace(config.get_user().unwrap(), &role).replace(&password, "limited");
    drop(Table::of(&limited, &table.name).lock("l").lock("worker").unwrap());
    let error = PostgresStorage::new(Table::of(&limited, &missing.name).options()).unwrap_err();
    assert!(matches!(error, Error::Database { .. }), "{error:?}");
    let text = chain(&error);
    assert!(text.contains(&missing.name) && text.contains("permission denied"), "{text}");
    table.execute(&format!("REVOKE ALL ON $T FROM {role}"));
    table.execute(&format!("DROP ROLE {role}"));
}

/// A policy that hides rows would make every lock look as if nobody had ever held it.
#[test]
fn a_table_whose_rows_may_be_hidden_from_the_role_is_refused() {
    let table = Table::new();
    drop(table.lock("l").lock("worker").unwrap());
    let role = format!("{}_role", table.name);
    let mut client = table.client();
    client
        .batch_execute(&format!(
            "CREATE ROLE {role} LOGIN PASSWORD 'w';
             GRANT SELECT, INSERT, UPDATE ON {table} TO {role};
             ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            table = table.name
        ))
        .unwrap();
    let as_role = Table::of(&format!("{} user={role} password=w", table.dsn), &table.name);
    let error = PostgresStorage::new(as_role.options()).unwrap_err();
    assert!(error.to_string().contains("row-level security"), "{error}");
    // It doesn't apply to the owner of the table, nor to anybody when it is disabled.
    assert!(PostgresStorage::new(table.options()).is_ok());
    client.batch_execute(&format!("ALTER TABLE {} DISABLE ROW LEVEL SECURITY", table.name)).unwrap();
    assert!(PostgresStorage::new(as_role.options()).is_ok());
    drop(as_role);
    client.batch_execute(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).unwrap();
}

/// The statements count places from 1, in one dimension.
#[test]
fn waiters_that_no_statement_would_find_are_refused() {
    let table = Table::new();
    drop(table.lock("l").lock("worker").unwrap());
    let set = |waiters: &str| {
        let sql = format!("UPDATE {} SET waiters = {waiters}", table.name);
        table.client().batch_execute(&sql)
    };
    let id = "gen_random_uuid()";
    for waiters in [
        format!("ARRAY[[{id}, {id}]]"),
        format!("ARRAY[[{id}], [{id}]]"),
        format!("array_fill({id}, ARRAY[2], ARRAY[0])"),
        format!("array_fill({id}, ARRAY[2], ARRAY[5])"),
        format!("array_fill({id}, ARRAY[1, 1])"),
    ] {
        let error = set(&waiters).expect_err(&waiters);
        assert_eq!(error.code(), Some(&postgres::error::SqlState::CHECK_VIOLATION), "{waiters}: {error:?}");
    }
    for waiters in ["NULL".to_owned(), format!("ARRAY[{id}, NULL, {id}]"), format!("array_fill({id}, ARRAY[3])")] {
        set(&waiters).expect(&waiters);
    }
}
