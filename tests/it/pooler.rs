//! Behind pgbouncer in transaction mode: a server session belongs to a client for one transaction only.
//!
//! Needs `pgbouncer` on the path; without it these tests say so and pass, unless
//! `STORAGE_LOCK_TEST_PGBOUNCER=required`.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use postgres::{Client, Config, NoTls};
use storage_lock::PostgresStorage;

use crate::settings::{Role, recognises_its_table};
use crate::support::{Table, dsn, is_refreshed, ms, short_lock, takes_at_most, within};

pub struct Pgbouncer {
    pub dsn: String,
    process: Child,
    folder: PathBuf,
}

impl Pgbouncer {
    /// With two server connections, which it hands out in turns.
    pub fn start(settings: &str) -> Option<Pgbouncer> {
        Pgbouncer::before(&dsn(), settings)
    }

    fn before(dsn: &str, settings: &str) -> Option<Pgbouncer> {
        let binary = ["pgbouncer", "/usr/sbin/pgbouncer"].into_iter().find(|binary| {
            Command::new(binary).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
        });
        let Some(binary) = binary else {
            assert!(std::env::var("STORAGE_LOCK_TEST_PGBOUNCER").is_err(), "pgbouncer is required, and not there");
            println!("pgbouncer is not there: not tested");
            return None;
        };
        let config: Config = dsn.parse().unwrap();
        let (user, database) = (config.get_user().unwrap(), config.get_dbname().unwrap());
        let password = String::from_utf8(config.get_password().unwrap().to_vec()).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = std::env::temp_dir().join(format!("storage-lock-pgbouncer-{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&folder).unwrap();
        // pgbouncer refuses root, and turns to a user who has to read this.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        let file = folder.join("pgbouncer.ini");
        fs::File::create(&file)
            .unwrap()
            .write_all(
                format!(
                    "[databases]\n{database} = host=127.0.0.1 port={} user={user} password={password}\n\
                     [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
                     pool_mode = transaction\ndefault_pool_size = 2\nserver_round_robin = 1\n{settings}\n",
                    config.get_ports()[0]
                )
                .as_bytes(),
            )
            .unwrap();
        let mut command = Command::new(binary);
        if nix::unistd::geteuid().is_root() {
            command.args(["-u", "nobody"]);
        }
        let process = command.arg("-q").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let dsn = format!("host=127.0.0.1 port={port} user={user} dbname={database}");
        within(Duration::from_secs(10), "pgbouncer listens", || TcpStream::connect(("127.0.0.1", port)).ok());
        Some(Pgbouncer { dsn, process, folder })
    }
}

impl Drop for Pgbouncer {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
        fs::remove_dir_all(&self.folder).ok();
    }
}

/// Several clients at once, so that a client's statements meet both server sessions.
fn works(pgbouncer: &Pgbouncer) {
    let table = Table::new();
    let through = Table::of(&pgbouncer.dsn, &table.name);
    thread::scope(|scope| {
        for thread in 0..4 {
            let through = &through;
            scope.spawn(move || {
                let storage = through.storage();
                let lock = short_lock(&storage, &format!("own-{}", thread % 2), ms(2_000), ms(100));
                for _ in 0..50 {
                    let guard = lock.lock(&format!("worker-{thread}")).unwrap();
                    let other = through.storage().get("own-0").unwrap();
                    assert!(other.is_some() || thread % 2 == 1);
                    guard.unlock().unwrap();
                }
                let held = short_lock(&storage, &format!("held-{thread}"), ms(2_000), ms(100)).lock("worker").unwrap();
                for _ in 0..3 {
                    is_refreshed(&held);
                }
                held.unlock().unwrap();
            });
        }
    });
    let storage = table.storage();
    let holds: i64 = (0..2).map(|n| storage.get(&format!("own-{n}")).unwrap().unwrap().version).sum();
    assert_eq!(holds, 200, "each hold has a version of its own");
    // Nothing of ours is left in the sessions that others get.
    for _ in 0..4 {
        let mut client = Client::connect(&pgbouncer.dsn, NoTls).unwrap();
        for message in client.simple_query("SHOW enable_seqscan").unwrap() {
            if let postgres::SimpleQueryMessage::Row(row) = message {
                assert_eq!(row.get(0), Some("on"));
            }
        }
    }
}

#[test]
fn a_pooler_that_refuses_start_up_options_is_recognised() {
    if let Some(pgbouncer) = Pgbouncer::start("") {
        works(&pgbouncer);
    }
}

#[test]
fn a_pooler_that_drops_start_up_options_is_recognised() {
    if let Some(pgbouncer) = Pgbouncer::start("ignore_startup_parameters = options") {
        works(&pgbouncer);
    }
}

/// It would go on to hear what is meant for us, and keep it for its own client.
#[test]
fn no_session_that_another_client_gets_listens_after_a_wait() {
    let Some(pgbouncer) = Pgbouncer::start("") else { return };
    let table = Table::new();
    let guard = table.lock("l").lock("holder").unwrap();
    let through = Table::of(&pgbouncer.dsn, &table.name);
    for _ in 0..4 {
        // One each, as each finds out for itself that there is a pooler.
        assert!(through.lock("l").try_lock_for("waiter", ms(500)).unwrap().is_none());
        let mut client = Client::connect(&pgbouncer.dsn, NoTls).unwrap();
        for _ in 0..2 {
            let messages = client.simple_query("SELECT count(*) FROM pg_listening_channels()").unwrap();
            for message in messages {
                if let postgres::SimpleQueryMessage::Row(row) = message {
                    assert_eq!(row.get(0), Some("0"), "another client's session listens");
                }
            }
        }
    }
    guard.unlock().unwrap();
    let lock = through.lock("l");
    takes_at_most(ms(5_000), "the next one's turn", || lock.lock("waiter").unwrap().unlock().unwrap());
}

/// The search path can't be set there.
#[test]
fn impostors_behind_a_pooler_do_not_judge_the_table() {
    let schema = format!("evil_{}", uuid::Uuid::new_v4().simple());
    let mut functions = format!("CREATE SCHEMA {schema};");
    for (function, answer) in [
        ("has_schema_privilege(oid, text) RETURNS bool", "false"),
        ("has_column_privilege(oid, smallint, text) RETURNS bool", "false"),
        ("row_security_active(oid) RETURNS bool", "true"),
        ("format_type(oid, int) RETURNS text", "''x''"),
        ("replace(text, text, text) RETURNS text", "''x''"),
        ("unnest(text[]) RETURNS text", "''DELETE''"),
        ("quote_ident(text) RETURNS text", "(1 / 0)::text"),
    ] {
        functions += &format!("CREATE FUNCTION {schema}.{function} LANGUAGE sql AS 'SELECT {answer}';");
    }
    let mut client = Client::connect(&dsn(), NoTls).unwrap();
    client.batch_execute(&functions).unwrap();
    let role = Role::with(&[&format!("search_path = {schema}, pg_catalog")]);
    if let Some(pgbouncer) = Pgbouncer::before(&role.table.dsn, "") {
        for _ in 0..2 {
            PostgresStorage::new(Table::of(&pgbouncer.dsn, &role.table.name).options()).expect("it is in order");
        }
    }
    drop(role);
    client.batch_execute(&format!("DROP SCHEMA {schema} CASCADE")).unwrap();
}

/// Its settings can't be sent.
#[test]
fn a_role_that_quotes_all_identifiers_behind_a_pooler() {
    let role = Role::with(&["quote_all_identifiers = on"]);
    if let Some(pgbouncer) = Pgbouncer::before(&role.table.dsn, "") {
        recognises_its_table(&Table::of(&pgbouncer.dsn, &role.table.name));
    }
}
