//! What is checked before the first lock: the role's rights, and what else would make a statement fail later.

use postgres::{Client, NoTls};
use storage_lock::{Error, PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

use crate::support::{Table, chain, client, dsn, eventually, is_refreshed, ms, short_lock, takes_at_most, waits_for};

/// What is wrong with the table, as opening a storage says it.
#[track_caller]
fn problem(options: PostgresStorageOptions) -> String {
    match PostgresStorage::new(options) {
        Err(Error::Table { problem, .. }) => problem,
        other => panic!("expected Error::Table, not {other:?}"),
    }
}

/// The statement that an error tells to run.
#[track_caller]
fn remedy(problem: &str) -> String {
    problem.split_once("run: ").unwrap_or_else(|| panic!("{problem:?} says nothing to run")).1.to_owned()
}

/// A table of a superuser, and a role that is none.
struct Limited {
    table: Table,
    role: String,
    dsn: String,
}

impl Limited {
    fn new() -> Limited {
        let table = Table::new();
        table.storage();
        let role = format!("{}_Role", table.name);
        table.execute(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'limited'"));
        Limited { dsn: format!("{} user={role} password=limited", table.dsn), table, role }
    }

    /// Runs statements in which `$T` stands for the table, and `$R` for the role.
    fn execute(&self, sql: &str) {
        let sql = sql.replace("$T", &self.table.name).replace("$R", &format!("\"{}\"", self.role));
        self.table.client().batch_execute(&sql).expect(&sql);
    }

    fn options(&self) -> PostgresStorageOptions {
        PostgresStorageOptions::from_dsn(&self.dsn).table_name(&self.table.name)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let sql = format!("DROP OWNED BY \"{role}\"; DROP ROLE \"{role}\"", role = self.role);
            eventually("the role is free", || self.table.client().batch_execute(&sql).is_ok());
        }
    }
}

#[test]
fn each_missing_privilege_is_named_at_start_with_its_grant() {
    const PRIVILEGES: [&str; 3] = ["SELECT", "INSERT", "UPDATE"];
    let limited = Limited::new();
    for set in 0..7 {
        let (granted, missing): (Vec<(usize, &str)>, Vec<_>) =
            PRIVILEGES.into_iter().enumerate().partition(|(place, _)| set & (1 << place) != 0);
        limited.execute("REVOKE ALL ON $T FROM $R");
        for (_, privilege) in granted {
            limited.execute(&format!("GRANT {privilege} ON $T TO $R"));
        }
        let missing: Vec<&str> = missing.into_iter().map(|(_, privilege)| privilege).collect();
        let problem = problem(limited.options());
        let says = format!("role \"{}\" has no {} on it;", limited.role, missing.join(" and no "));
        assert!(problem.starts_with(&says), "{problem}");
        let grant = remedy(&problem);
        assert!(grant.starts_with(&format!("GRANT {} ON ", missing.join(", "))), "{problem}");
        limited.execute(&grant);
        PostgresStorage::new(limited.options()).expect("no more is needed");
    }
    let lock = StorageLock::new(&PostgresStorage::new(limited.options()).unwrap(), "l").unwrap();
    lock.lock("worker").unwrap().unlock().unwrap();
}

#[test]
fn privileges_on_each_column_count_and_one_column_without_is_missed() {
    const COLUMNS: &str =
        "lock_id, version, owner_id, lease_id, lock_begin_time, lease_expire_time, released_at, waiters";
    let limited = Limited::new();
    limited.execute(&format!("GRANT SELECT ({COLUMNS}), INSERT ({COLUMNS}), UPDATE ({COLUMNS}) ON $T TO $R"));
    let storage = PostgresStorage::new(limited.options()).expect("it may use each column");
    StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap().unlock().unwrap();
    assert!(storage.list().unwrap().is_empty());
    limited.execute("REVOKE UPDATE (waiters) ON $T FROM $R");
    let problem = problem(limited.options());
    assert!(problem.contains("has no UPDATE on it"), "{problem}");
}

#[test]
fn a_role_without_usage_of_the_schema_is_told_so_whether_the_table_exists_or_not() {
    let limited = Limited::new();
    let schema = format!("My \"Schema\" {}", limited.table.name);
    let quoted = format!("\"{}\"", schema.replace('"', "\"\""));
    limited.execute(&format!("CREATE SCHEMA {quoted}"));
    let says = format!("role \"{}\" has no USAGE on the schema;", limited.role);
    let check = || {
        for create_table in [true, false] {
            let problem = problem(limited.options().schema(&schema).create_table(create_table));
            assert!(problem.starts_with(&says), "{problem}");
        }
    };
    // Without the table. `CREATE` alone would be enough to create the table, and not to use it.
    check();
    limited.execute(&format!("GRANT CREATE ON SCHEMA {quoted} TO $R"));
    check();
    limited.execute(&format!("REVOKE CREATE ON SCHEMA {quoted} FROM $R"));
    // With it.
    PostgresStorage::new(limited.table.options().schema(&schema)).unwrap();
    limited.execute(&format!("GRANT SELECT, INSERT, UPDATE ON {quoted}.$T TO $R"));
    check();
    limited.execute(&remedy(&problem(limited.options().schema(&schema))));
    PostgresStorage::new(limited.options().schema(&schema)).expect("no more is needed");
    limited.execute(&format!("DROP SCHEMA {quoted} CASCADE"));
}

#[test]
fn a_missing_create_is_an_error_of_the_database_that_names_the_schema() {
    let limited = Limited::new();
    let schema = format!("{}_schema", limited.table.name);
    limited.execute(&format!("CREATE SCHEMA {schema}; GRANT USAGE ON SCHEMA {schema} TO $R"));
    let error = PostgresStorage::new(limited.options().schema(&schema)).unwrap_err();
    assert!(matches!(error, Error::Database { .. }), "{error:?}");
    let text = chain(&error);
    let table = format!("cannot prepare table \"{schema}\".\"{}\"", limited.table.name);
    assert!(text.starts_with(&table), "{text}");
    assert!(text.ends_with(&format!("permission denied for schema {schema}")), "{text}");
    limited.execute(&format!("DROP SCHEMA {schema}"));
}

#[test]
fn another_collation_is_refused_by_its_name() {
    let table = Table::new();
    table.storage();
    table.execute("ALTER TABLE $T ALTER lock_id TYPE text COLLATE \"default\"");
    let problem = problem(table.options());
    assert!(problem.starts_with("lock_id has the collation default, and not C:"), "{problem}");
    table.execute(&remedy(&problem));
    PostgresStorage::new(table.options()).expect("no more is wrong");
}

#[test]
fn a_further_column_is_refused_only_if_it_keeps_locks_out() {
    let table = Table::new();
    drop(table.lock("before").lock("worker").unwrap());
    let domains = ["strict", "kind"].map(|domain| format!("{}_{domain}", table.name));
    let [strict, kind] = &domains;
    table.execute(&format!("CREATE DOMAIN {strict} AS text NOT NULL"));
    table.execute(&format!("CREATE DOMAIN {kind} AS text NOT NULL DEFAULT 'x'"));
    table.execute("DELETE FROM $T");
    for column in ["text NOT NULL", strict] {
        table.execute(&format!("ALTER TABLE $T ADD note {column}"));
        let problem = problem(table.options());
        assert!(problem.starts_with("its column note is NOT NULL and has no default"), "{column}: {problem}");
        // It is true.
        let insert = "INSERT INTO $T VALUES ('l', 1, 'o', '00000000-0000-0000-0000-000000000000', now(), now())"
            .replace("$T", &table.name);
        let error = table.client().batch_execute(&insert).unwrap_err();
        assert_eq!(error.code(), Some(&postgres::error::SqlState::NOT_NULL_VIOLATION), "{column}: {error:?}");
        table.execute("ALTER TABLE $T DROP note");
    }
    for column in [
        "text",
        "text NOT NULL DEFAULT 'x'",
        "int GENERATED ALWAYS AS IDENTITY",
        "int GENERATED BY DEFAULT AS IDENTITY",
        "text NOT NULL GENERATED ALWAYS AS (lock_id || '!') STORED",
        kind,
    ] {
        table.execute(&format!("ALTER TABLE $T ADD note {column}"));
        StorageLock::new(&table.storage(), column).unwrap().lock("worker").expect(column).unlock().expect(column);
        table.execute("ALTER TABLE $T DROP note");
    }
    // A trigger that fills it, and that nobody looks into.
    table.execute("DELETE FROM $T");
    table.execute("ALTER TABLE $T ADD note text NOT NULL");
    let function = format!("{}_fills", table.name);
    table
        .client()
        .batch_execute(&format!(
        "CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN new.note = 'x'; RETURN new; END $$;
         CREATE TRIGGER fills BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION {function}()",
        table.name
    ))
        .unwrap();
    StorageLock::new(&table.storage(), "filled").unwrap().lock("worker").expect("filled").unlock().expect("filled");
    table.execute(&format!("DROP FUNCTION {function} CASCADE"));
    for domain in domains {
        table.execute(&format!("DROP DOMAIN {domain}"));
    }
}

#[test]
fn another_access_method_is_refused_and_the_library_creates_heap_whatever_the_default_is() {
    let (table, other) = (Table::new(), Table::new());
    let method = format!("{}_method", table.name);
    table.execute(&format!("CREATE ACCESS METHOD {method} TYPE TABLE HANDLER heap_tableam_handler"));
    let dsn = format!("{} options='-c default_table_access_method={method}'", table.dsn);
    let options = PostgresStorageOptions::from_dsn(&dsn);
    let storage = PostgresStorage::new(options.clone().table_name(&table.name)).expect("it is heap");
    let ddl = storage.table_ddl().replace(&table.name, &other.name);
    other.client().batch_execute(&ddl.replace("USING heap", &format!("USING {method}"))).unwrap();
    let problem = problem(other.options());
    assert!(problem.starts_with(&format!("its access method is {method}:")), "{problem}");
    other.execute("DROP TABLE $T");
    table.execute(&format!("DROP ACCESS METHOD {method}"));
}

#[test]
fn a_partition_is_refused() {
    let table = Table::new();
    table.storage();
    table.execute("CREATE TABLE $T_parent (LIKE $T) PARTITION BY LIST (lock_id)");
    table.execute("ALTER TABLE $T_parent ATTACH PARTITION $T FOR VALUES IN ('l')");
    let problem = problem(table.options());
    assert!(problem.starts_with("it is a partition of another table"), "{problem}");
    table.execute("ALTER TABLE $T_parent DETACH PARTITION $T");
    PostgresStorage::new(table.options()).expect("no more is wrong");
    table.execute("DROP TABLE $T_parent");
}

/// In a database of its own: a publication for all tables keeps other tests from updating tables without a key.
#[test]
fn a_published_table_without_a_replica_identity_is_refused() {
    let database = format!("it_{}", Uuid::new_v4().simple());
    let mut server = client();
    server.batch_execute(&format!("CREATE DATABASE {database}")).unwrap();
    {
        let table = Table::on(&format!("{} dbname={database}", dsn()));
        drop(table.lock("l").lock("worker").unwrap());
        let number: String = table.client().query_one("SHOW server_version_num", &[]).unwrap().get(0);
        let mut kinds = vec!["TABLE $T".to_owned(), "TABLE $T_other, $T".to_owned(), "ALL TABLES".to_owned()];
        if number.parse::<u32>().unwrap() >= 150_000 {
            kinds.push("TABLES IN SCHEMA public".to_owned());
        }
        table.execute("CREATE TABLE $T_other ()");
        let update = "UPDATE $T SET released_at = released_at".replace("$T", &table.name);
        let nothing = "ALTER TABLE $T REPLICA IDENTITY NOTHING";
        for kind in kinds {
            table.execute(nothing);
            table.execute(&format!("CREATE PUBLICATION \"My pub\" FOR {kind}"));
            let problem = problem(table.options());
            assert!(problem.contains("publication My pub publishes its updates"), "{kind}: {problem}");
            // It is true.
            table.client().batch_execute(&update).expect_err(&kind);
            table.execute(&remedy(&problem));
            for identity in ["DEFAULT", "FULL", "USING INDEX $T_pkey"] {
                table.execute(&format!("ALTER TABLE $T REPLICA IDENTITY {identity}"));
                PostgresStorage::new(table.options()).expect(identity);
                table.client().batch_execute(&update).expect(identity);
            }
            table.execute(nothing);
            table.execute("ALTER PUBLICATION \"My pub\" SET (publish = 'insert, delete')");
            PostgresStorage::new(table.options()).expect("updates are not published");
            table.client().batch_execute(&update).expect("updates are not published");
            table.execute("DROP PUBLICATION \"My pub\"");
        }
        // An identity by an index that is gone is none.
        table.execute("CREATE UNIQUE INDEX $T_lease ON $T (lease_id)");
        table.execute("ALTER TABLE $T REPLICA IDENTITY USING INDEX $T_lease");
        table.execute("DROP INDEX $T_lease");
        PostgresStorage::new(table.options()).expect("nothing is published");
        table.execute("CREATE PUBLICATION one FOR TABLE $T");
        table.execute("CREATE PUBLICATION two FOR ALL TABLES");
        let problem = problem(table.options());
        assert!(problem.contains("publication one, two publishes"), "{problem}");
        table.client().batch_execute(&update).expect_err("an index that is gone");
        // Of a table that is not published, nobody asks for an identity.
        table.execute("DROP PUBLICATION two");
        table.execute("CREATE SCHEMA other");
        table.execute("CREATE TABLE other.$T ()");
        for another in ["$T_other", "other.$T"] {
            table.execute(&format!("ALTER PUBLICATION one SET TABLE {another}"));
            PostgresStorage::new(table.options()).expect("another table is published");
        }
    }
    eventually("the database is free", || server.batch_execute(&format!("DROP DATABASE {database}")).is_ok());
}

/// The statements of a document's section on roles.
fn statements(document: &str, margin: &str, heading: &str) -> Vec<String> {
    let text = std::fs::read_to_string(format!("{}/{document}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let text: String = text.lines().map(|line| format!("{}\n", line.strip_prefix(margin).unwrap_or(line))).collect();
    let section = text.split_once(&format!("\n{heading} Roles\n")).unwrap().1;
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```sql\n").skip(1);
    blocks.map(|block| block.split_once("```").unwrap().0.to_owned()).collect()
}

/// The same text with other words.
fn with_names(text: &str, names: &[(&str, String)]) -> String {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let words = text.split_inclusive(|c| !is_part(c));
    let replaced = words.map(|word| {
        let name = word.trim_end_matches(|c| !is_part(c));
        let new = names.iter().find(|(old, _)| *old == name).map_or(name, |(_, new)| new);
        format!("{new}{}", &word[name.len()..])
    });
    replaced.collect()
}

#[test]
fn the_roles_of_the_readme_are_those_of_the_reference() {
    let readme = statements("README.md", "", "##");
    assert_eq!(readme.len(), 3);
    assert_eq!(readme, statements("src/options/storage.rs", "/// ", "#"));
}

#[test]
fn the_roles_of_the_readme_can_do_what_they_are_for_and_no_more() {
    let id = format!("it_{}", Uuid::new_v4().simple());
    let names = ["owner", "locker", "viewer", "locks"].map(|name| (name, format!("{id}_{name}")));
    let [.., (_, schema)] = &names;
    let [roles, grants, view] = <[String; 3]>::try_from(statements("README.md", "", "##")).unwrap();
    let run = |client: &mut Client, sql: &str| client.batch_execute(&with_names(sql, &names));
    let mut server = client();
    run(&mut server, &roles).unwrap();
    run(&mut server, "ALTER ROLE owner PASSWORD 'r'; ALTER ROLE locker PASSWORD 'r'; ALTER ROLE viewer PASSWORD 'r'")
        .unwrap();
    let dsn_of = |role: &str| format!("{} user={id}_{role} password=r", dsn());
    let options = |role: &str| PostgresStorageOptions::from_dsn(&dsn_of(role)).schema(schema);
    let client_of = |role: &str| Client::connect(&dsn_of(role), NoTls).unwrap();

    // Nobody but the owner can create the table.
    for role in ["locker", "viewer"] {
        let error = PostgresStorage::new(options(role)).unwrap_err();
        assert!(chain(&error).contains("permission denied for schema"), "{}", chain(&error));
    }
    drop(PostgresStorage::new(options("owner")).expect("the owner creates the table"));
    run(&mut client_of("owner"), &grants).unwrap();

    // Lock, refresh, wait, fence, list.
    let [first, second] = [(), ()].map(|()| PostgresStorage::new(options("locker")).expect("open it as locker"));
    let guard = short_lock(&first, "l", ms(5_000), ms(100)).lock("worker").unwrap();
    is_refreshed(&guard);
    let waiter = waits_for(&StorageLock::new(&second, "l").unwrap());
    let listens = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE usename = '{id}_locker' AND state = 'idle' \
         AND query LIKE 'LISTEN%'"
    );
    eventually("the waiter listens", || server.query_one(&listens, &[]).unwrap().get::<_, i64>(0) == 1);
    let mut mine = client_of("locker");
    let fenced = guard.transaction(&mut mine, |transaction| -> Result<(), Box<dyn std::error::Error>> {
        Ok(transaction.batch_execute("SELECT 1")?)
    });
    fenced.expect("fence");
    assert_eq!(first.list().unwrap().len(), 1);
    let seen = client_of("viewer").query(&with_names(&view, &names), &[]).expect("the viewer reads");
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].get("lock_id"), seen[0].get("version"), seen[0].get("waiters")), ("l", 1_i64, 1_i32));
    guard.unlock().unwrap();
    assert_eq!(takes_at_most(ms(3_000), "the notification", || waiter.join().unwrap()), 2);
    assert!(client_of("viewer").query(&with_names(&view, &names), &[]).unwrap().is_empty());

    // The viewer can't lock, and the locker can't drop.
    let problem = problem(options("viewer"));
    assert!(problem.contains("has no INSERT and no UPDATE on it"), "{problem}");
    for (role, sql) in [
        ("viewer", "UPDATE locks.storage_lock SET released_at = NULL"),
        ("viewer", "SELECT FROM locks.storage_lock FOR KEY SHARE"),
        ("locker", "DELETE FROM locks.storage_lock"),
        ("locker", "DROP TABLE locks.storage_lock"),
        ("locker", "CREATE TABLE locks.other ()"),
    ] {
        let error = run(&mut client_of(role), sql).expect_err(sql);
        assert_eq!(error.code(), Some(&postgres::error::SqlState::INSUFFICIENT_PRIVILEGE), "{sql}: {error:?}");
    }
    drop((first, second, mine));
    let drop_all = "DROP SCHEMA IF EXISTS locks CASCADE; DROP ROLE owner, locker, viewer";
    eventually("the roles are free", || run(&mut server, drop_all).is_ok());
}
