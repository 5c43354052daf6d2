//! Who connects, and how: credentials that change, options that are refused by name, servers that can't be used.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use postgres::config::TargetSessionAttrs;
use postgres::{Config, NoTls};
use storage_lock::{Error, PostgresStorage, PostgresStorageOptions, StorageLock};
use uuid::Uuid;

use crate::support::child::{Process, say};
use crate::support::{Table, chain, client, dsn, is_refreshed, ms, short_lock, takes_at_most, waits_for};

/// A role with a password that changes, and what its users know of it.
struct Rotated {
    role: String,
    password: Arc<Mutex<String>>,
    asked: Arc<AtomicUsize>,
    table: Table,
}

impl Rotated {
    fn new() -> Rotated {
        let role = format!("rotated_{}", Uuid::new_v4().simple());
        let password = Arc::new(Mutex::new("first".to_owned()));
        client().batch_execute(&format!("CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'first'")).unwrap();
        Rotated { role, password, asked: Arc::default(), table: Table::new() }
    }

    fn storage(&self) -> PostgresStorage {
        let (role, password, asked) = (self.role.clone(), Arc::clone(&self.password), Arc::clone(&self.asked));
        let config = move || {
            asked.fetch_add(1, Ordering::SeqCst);
            let mut config: Config = dsn().parse().unwrap();
            config.user(&role).password(&*password.lock().unwrap());
            Ok::<_, std::io::Error>(config)
        };
        let options = PostgresStorageOptions::from_config_with(config, NoTls).table_name(&self.table.name);
        PostgresStorage::new(options).unwrap()
    }

    /// The server's password is another one, and all connections of the role are ended.
    fn rotate(&self, password: &str) {
        let mut client = client();
        client.batch_execute(&format!("ALTER ROLE {} PASSWORD '{password}'", self.role)).unwrap();
        let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = $1";
        client.query_one(sql, &[&self.role]).unwrap();
    }

    fn learn(&self, password: &str) {
        password.clone_into(&mut self.password.lock().unwrap());
    }
}

impl Drop for Rotated {
    fn drop(&mut self) {
        let role = &self.role;
        let sql = format!("DROP TABLE IF EXISTS {}; DROP OWNED BY {role}; DROP ROLE {role}", self.table.name);
        let sessions = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = $1";
        let mut client = client();
        client.query_one(sessions, &[&self.role]).ok();
        client.batch_execute(&sql).ok();
    }
}

#[test]
fn a_held_lock_and_a_waiting_one_survive_a_rotation_of_the_password() {
    let rotated = Rotated::new();
    let (ours, theirs) = (rotated.storage(), rotated.storage());
    let guard = short_lock(&ours, "l", ms(20_000), ms(200)).lock("worker").unwrap();
    let waiting = waits_for(&StorageLock::new(&theirs, "l").unwrap());
    rotated.table.hears("l", 1);
    for password in ["second", "third"] {
        rotated.rotate(password);
        // The new one is known a while later.
        thread::sleep(ms(1_500));
        assert!(guard.is_held());
        rotated.learn(password);
        is_refreshed(&guard);
    }
    let asked = rotated.asked.load(Ordering::SeqCst);
    assert!(asked >= 4, "asked {asked} times, before each connection");
    guard.unlock().unwrap();
    assert_eq!(takes_at_most(ms(15_000), "the waiting one", || waiting.join().unwrap()), 2);
}

#[test]
fn a_source_of_credentials_that_fails_is_the_cause_of_the_error() {
    let broken = || PostgresStorageOptions::from_config_with(|| Err::<Config, _>("the vault is sealed"), NoTls);
    let error = PostgresStorage::new(broken()).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
    assert!(chain(&error).contains("the vault is sealed"), "{}", chain(&error));
    // One that panics harms nobody.
    let panics =
        PostgresStorageOptions::from_config_with(|| -> Result<Config, String> { panic!("in a callback") }, NoTls);
    let error = PostgresStorage::new(panics).unwrap_err();
    assert!(chain(&error).contains("panicked"), "{}", chain(&error));
    // What it returns is checked as any configuration.
    let nowhere = PostgresStorageOptions::from_config(Config::new(), NoTls);
    let error = PostgresStorage::new(nowhere).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { option: "config", .. }), "{error:?}");
    let nowhere = PostgresStorageOptions::from_config_with(|| Ok::<_, String>(Config::new()), NoTls);
    let error = PostgresStorage::new(nowhere).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }) && chain(&error).contains("a host"), "{error:?}");
    // One that fails later costs no hold.
    let table = Table::new();
    let (works, text) = (Arc::new(AtomicUsize::new(1)), dsn());
    let switch = Arc::clone(&works);
    let config = move || match switch.load(Ordering::SeqCst) {
        0 => Err("the vault is sealed"),
        _ => Ok(text.parse::<Config>().unwrap()),
    };
    let options = PostgresStorageOptions::from_config_with(config, NoTls).table_name(&table.name);
    let storage = PostgresStorage::new(options).unwrap();
    let guard = short_lock(&storage, "l", ms(20_000), ms(200)).lock("worker").unwrap();
    works.store(0, Ordering::SeqCst);
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE '%' || $1 || '%' \
               AND pid <> pg_backend_pid()";
    client().query_one(sql, &[&table.name]).unwrap();
    thread::sleep(ms(1_000));
    works.store(1, Ordering::SeqCst);
    is_refreshed(&guard);
    assert!(guard.is_held());
}

#[test]
fn what_the_driver_does_not_know_is_refused_by_name() {
    let cases = [
        ("host=h service=prod", "no `service`"),
        ("host=h passfile=/x", "no `passfile`"),
        ("host=h gssencmode=prefer", "no `gssencmode`"),
        ("host=h client_encoding = 'UTF8'", "no `client_encoding`"),
        ("postgresql://u:p@h/d?schema=public", "PostgresStorageOptions::schema"),
        ("postgresql://u:p@h/d?ssl=true&application_name=a", "no `ssl`"),
        ("postgresql://u:p@h/d?%73%73l=true", "no `ssl`"),
        ("host=h target_session_attrs=primary", "target_session_attrs=read-write"),
        ("host=h target_session_attrs=standby", "target_session_attrs=read-write"),
        ("postgresql://h/d?target_session_attrs=prefer-standby", "target_session_attrs=read-write"),
        ("host=h target_session_attrs=read-only", "target_session_attrs=read-write"),
        ("jdbc:postgresql://h/d?user=u&password=p", "without `jdbc:`"),
        ("postgresql://u:p@h/d\n", "line break"),
        ("host=h sslmode=sometimes", "sslmode=disable"),
        ("host=h sslcrl=/x", "no `sslcrl`"),
    ];
    for (dsn, expected) in cases {
        let error = PostgresStorage::connect(dsn).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { .. }), "{dsn}: {error:?}");
        assert!(error.to_string().contains(expected), "{dsn}: {error}");
    }
    // A value is never shown, nor a name that may be a part of a password.
    let error = PostgresStorage::connect("host=h password=a s3cret=b").unwrap_err();
    assert!(!error.to_string().contains("s3cret"), "{error}");
    let mut config = Config::new();
    config.host("h").target_session_attrs(TargetSessionAttrs::ReadOnly);
    let error = PostgresStorage::new(PostgresStorageOptions::from_config(config, NoTls)).unwrap_err();
    assert!(error.to_string().contains("read-write"), "{error}");
}

#[test]
#[cfg(not(feature = "tls"))]
fn without_the_feature_what_needs_tls_is_refused_by_its_name() {
    for options in [
        "sslmode=require",
        "sslmode=verify-ca",
        "sslmode=verify-full",
        "sslmode=verify-full sslrootcert=system",
        "sslrootcert=/root.crt",
        "sslcert=/a.crt sslkey=/a.key",
        "sslkey=/a.key",
        "channel_binding=require",
        "sslmode=require sslnegotiation=direct",
    ] {
        let error = PostgresStorage::connect(&format!("host=nowhere.invalid user=app {options}")).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "dsn", .. }), "{error:?}");
        assert!(error.to_string().contains("feature `tls`"), "{error}");
    }
    for garbled in ["postgresql://u:p@h/d?sslmode=require&", "host=h sslmode=require ="] {
        let error = PostgresStorage::connect(garbled).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "dsn", .. }), "{error:?}");
    }
    for mode in ["disable", "allow", "prefer"] {
        PostgresStorage::connect(&format!("{} sslmode={mode}", dsn())).unwrap();
    }
}

#[test]
fn a_storage_asks_for_its_credentials_once_a_connection() {
    let rotated = Rotated::new();
    let storage = rotated.storage();
    assert_eq!(rotated.asked.load(Ordering::SeqCst), 1);
    drop(StorageLock::new(&storage, "l").unwrap().lock("worker").unwrap());
    assert_eq!(rotated.asked.load(Ordering::SeqCst), 1);
}

#[test]
fn what_worked_before_there_was_tls_is_read_as_it_was() {
    let open = |dsn: &str| format!("{:?}", PostgresStorage::connect(dsn).map(drop));
    for dsn in ["postgresql://u:p@127.0.0.1:1/d?application_name=a@b", "postgresql://u:p@127.0.0.1:1/d?"] {
        assert!(open(dsn).contains("Connect"), "{dsn}: {}", open(dsn));
    }
    for garbled in ["host=h =x port=6000", "postgresql://u:a?b@h/d", "postgresql://u:p@h/d?a=b&&c=d"] {
        assert!(open(garbled).contains("InvalidOption"), "{garbled}: {}", open(garbled));
    }
}

#[test]
#[cfg(not(feature = "tls"))]
fn a_server_that_takes_only_tls_is_said_to_need_the_feature() {
    use crate::support::eventually;
    use crate::support::server::Server;

    let server = Server::start_with(&["--fast"]);
    let mut client = server.client();
    let file: String = client.query_one("SHOW hba_file", &[]).unwrap().get(0);
    let rules = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("hostnossl all all all reject\n{rules}")).unwrap();
    client.batch_execute("SELECT pg_reload_conf()").unwrap();
    eventually("the rules are in force", || match PostgresStorage::connect(&server.dsn) {
        Ok(_) => false,
        Err(error) => {
            assert!(chain(&error).contains("feature `tls`"), "{}", chain(&error));
            assert!(chain(&error).contains("no encryption"), "{}", chain(&error));
            true
        }
    });
}

#[test]
fn a_user_that_is_only_a_number_is_told_to_name_one() {
    let table = Table::new();
    match Process::start_nameless("connect without a user", &table, &[]) {
        Some(mut child) => {
            let said = child.expect_line();
            assert!(said.contains("no user is named") && said.contains("set `user`"), "{said}");
        }
        None => println!("not tested: no namespace for it can be made here"),
    }
}

pub fn connect_without_a_user(table: &Table) {
    let parts: Vec<&str> = table.dsn.split(' ').filter(|part| !part.starts_with("user=")).collect();
    say(chain(&PostgresStorage::connect(&parts.join(" ")).unwrap_err()));
}
