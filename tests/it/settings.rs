//! Roles and databases with strange defaults: the lock works all the same.

use std::thread;

use postgres::{Client, NoTls};
use storage_lock::PostgresStorage;
use uuid::Uuid;

use crate::support::{Table, client, dsn, eventually, ms};

/// A role of its own with the given settings, and a table that it owns.
pub struct Role {
    pub name: String,
    pub table: Table,
}

impl Role {
    pub fn with(settings: &[&str]) -> Role {
        let name = format!("it_role_{}", Uuid::new_v4().simple());
        let mut client = client();
        client.batch_execute(&format!("CREATE ROLE {name} LOGIN SUPERUSER PASSWORD 'strange'")).unwrap();
        for setting in settings {
            client.batch_execute(&format!("ALTER ROLE {name} SET {setting}")).expect(setting);
        }
        let config: postgres::Config = dsn().parse().unwrap();
        let password = String::from_utf8(config.get_password().unwrap().to_vec()).unwrap();
        let dsn = dsn().replace(config.get_user().unwrap(), &name).replace(&password, "strange");
        Role { table: Table::of(&dsn, &format!("it_{}", Uuid::new_v4().simple())), name }
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        client()
            .batch_execute(&format!(
                "DROP TABLE IF EXISTS {}; DROP OWNED BY {}; DROP ROLE {}",
                self.table.name, self.name, self.name
            ))
            .ok();
    }
}

/// Hold, refresh, exclude, release, take over.
fn works(table: &Table) {
    let lock = table.short_lock("l", ms(1_000), ms(50));
    let guard = lock.lock("worker-1").unwrap();
    let before = lock.info().unwrap().unwrap();
    eventually("a refresh", || lock.info().unwrap().unwrap().lease_expire_time > before.lease_expire_time);
    assert!(table.lock("l").try_lock("worker-2").unwrap().is_none());
    guard.unlock().unwrap();
    let second = lock.lock("worker-2").unwrap();
    assert_eq!(second.version(), 2);
    assert_eq!(lock.info().unwrap().unwrap().owner_id, "worker-2");
}

#[test]
fn a_role_whose_transactions_are_serializable_or_read_only() {
    works(
        &Role::with(&["default_transaction_isolation = 'serializable'", "default_transaction_deferrable = on"]).table,
    );
    works(&Role::with(&["default_transaction_isolation = 'repeatable read'"]).table);
    works(&Role::with(&["default_transaction_read_only = on"]).table);
}

#[test]
fn a_role_with_strange_formats_and_languages() {
    works(&Role::with(&["timezone = 'Asia/Kathmandu'", "datestyle = 'SQL, DMY'", "intervalstyle = 'iso_8601'"]).table);
    works(&Role::with(&["lc_messages = 'C'", "extra_float_digits = -15", "bytea_output = 'escape'"]).table);
    works(&Role::with(&["standard_conforming_strings = off", "client_encoding = 'LATIN1'"]).table);
}

/// Also the one that another storage has made.
pub fn recognises_its_table(table: &Table) {
    works(table);
    assert!(PostgresStorage::new(table.options().create_table(false)).is_ok());
}

/// The server then writes `"text"` for `text`.
#[test]
fn a_role_or_a_dsn_that_quotes_all_identifiers() {
    recognises_its_table(&Role::with(&["quote_all_identifiers = on"]).table);
    let table = Table::new();
    let dsn = format!("{} options='-c quote_all_identifiers=on'", table.dsn);
    recognises_its_table(&Table::of(&dsn, &table.name));
}

#[test]
fn a_role_with_tiny_timeouts() {
    works(&Role::with(&["statement_timeout = 1", "lock_timeout = 1", "idle_in_transaction_session_timeout = 1"]).table);
    let role = Role::with(&["idle_session_timeout = 30"]);
    works(&role.table);
    // Each connection is closed by the server whenever it was idle for a moment.
    let lock = role.table.short_lock("l", ms(1_000), ms(100));
    for _ in 0..5 {
        let guard = lock.lock("worker").unwrap();
        thread::sleep(ms(100));
        guard.unlock().unwrap();
    }
}

#[test]
fn a_search_path_with_impostors() {
    let schema = format!("evil_{}", Uuid::new_v4().simple());
    client()
        .batch_execute(&format!(
            "CREATE SCHEMA {schema};
             CREATE FUNCTION {schema}.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT \
             ''infinity''::timestamptz';
             CREATE FUNCTION {schema}.pg_backend_pid() RETURNS int LANGUAGE sql AS 'SELECT 1'"
        ))
        .unwrap();
    let role = Role::with(&[&format!("search_path = {schema}, pg_catalog")]);
    works(&role.table);
    let public: bool = client()
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_tables WHERE schemaname = 'public' AND tablename = $1)",
            &[&role.table.name],
        )
        .unwrap()
        .get(0);
    assert!(public, "the table is in the schema that was named, not in the search path's");
    drop(role);
    client().batch_execute(&format!("DROP SCHEMA {schema} CASCADE")).unwrap();
}

/// Watched from inside the statements: what `synchronous_commit` is while each of them writes.
#[test]
fn granted_leases_are_durable_whatever_the_roles_default_is_and_releases_need_not_be() {
    for (default, granted) in [("off", "on"), ("local", "local"), ("on", "on")] {
        let role = Role::with(&[&format!("synchronous_commit = {default}")]);
        let table = &role.table;
        table.storage();
        Client::connect(&table.dsn, NoTls)
            .unwrap()
            .batch_execute(
                &"CREATE TABLE $T_seen (what text, setting text);
                  CREATE FUNCTION $T_see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                      INSERT INTO public.$T_seen VALUES (CASE
                          WHEN TG_OP = 'INSERT' THEN 'create'
                          WHEN new.released_at IS NOT NULL THEN 'release'
                          WHEN new.version <> old.version THEN 'acquire' ELSE 'refresh' END,
                          current_setting('synchronous_commit'));
                      RETURN new; END $$;
                  CREATE TRIGGER see BEFORE INSERT OR UPDATE ON $T FOR EACH ROW EXECUTE FUNCTION $T_see()"
                    .replace("$T", &table.name),
            )
            .unwrap();
        works(table);
        let mut seen: Vec<(String, String)> = table
            .client()
            .query(&format!("SELECT DISTINCT what, setting FROM {}_seen", table.name), &[])
            .unwrap()
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect();
        seen.sort();
        let expected = [("acquire", granted), ("create", granted), ("refresh", granted), ("release", "off")];
        assert_eq!(seen, expected.map(|(what, setting)| (what.to_owned(), setting.to_owned())), "default {default}");
        table
            .client()
            .batch_execute(&"DROP TABLE $T, $T_seen; DROP FUNCTION $T_see".replace("$T", &table.name))
            .unwrap();
    }
}

#[test]
fn options_in_the_dsn_are_kept() {
    let table = Table::new();
    let dsn = format!("{} options='-c work_mem=1234kB' application_name=it_options", table.dsn);
    let storage = PostgresStorage::new(Table::of(&dsn, &table.name).options()).unwrap();
    storage.server_time().unwrap();
    let connected: i64 = client()
        .query_one("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'it_options'", &[])
        .unwrap()
        .get(0);
    assert_eq!(connected, 1, "one connection, opened on demand");
}

/// Prepared plans are kept while a table grows from one page to many: they must use the index from the start.
#[test]
fn statements_use_the_index_of_a_small_table() {
    let table = Table::new();
    drop(table.lock("l").lock("worker").unwrap());
    // The planner learns that it is one page, for which it prefers to read all of it.
    table.client().batch_execute(&format!("VACUUM ANALYZE {}", table.name)).unwrap();
    let lock = table.lock("l");
    let scans = || {
        let sql = "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = $1";
        table.client().query_one(sql, &[&table.name]).unwrap().get::<_, i64>(0)
    };
    for _ in 0..50 {
        drop(lock.lock("worker").unwrap());
        assert!(lock.info().unwrap().is_some());
    }
    drop(lock);
    // A backend reports when it ends, at the latest.
    eventually("the storage's connections have ended", || {
        let sql = "SELECT count(*) FROM pg_stat_user_tables WHERE relname = $1 AND idx_scan >= 100";
        table.client().query_one(sql, &[&table.name]).unwrap().get::<_, i64>(0) == 1
    });
    // Making the primary key is one.
    assert!(scans() <= 1, "{} sequential scans", scans());
}
