//! What a caller can give: ids of every kind, and input that can't be used.

use std::net::TcpListener;
use std::time::Duration;

use storage_lock::{Error, LockOptions, PostgresStorage, PostgresStorageOptions, StorageLock};

use crate::support::{Table, chain, dsn, ms, takes_at_most};

#[test]
fn every_text_is_a_lock_id_and_an_owner_id() {
    let table = Table::new();
    let storage = table.storage();
    let ids = [
        "a",
        " ",
        "'; DROP TABLE storage_lock; --",
        "\"quoted\"",
        "back\\slash",
        "100%_$1",
        "line\nline\r\ttab",
        "Ünïcödé 🔒 \u{202e}rtl \u{0}"[..].trim_end_matches('\0'),
        "e\u{301}",
        "é",
        &"x".repeat(255),
        &"🔒".repeat(63),
    ];
    for id in ids {
        let lock = StorageLock::new(&storage, id).unwrap();
        let guard = lock.lock(id).unwrap();
        assert_eq!(guard.version(), 1, "{id:?} is a lock of its own");
        let information = storage.get(id).unwrap().unwrap();
        assert_eq!((information.lock_id.as_str(), information.owner_id.as_str()), (id, id));
        guard.unlock().unwrap();
    }
}

#[test]
fn unusable_input_is_refused_before_anything_touches_the_network() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let good = format!("host=127.0.0.1 port={port} user=u password=s3cret");
    let options = || PostgresStorageOptions::from_dsn(&good);
    let storage = |options| PostgresStorage::new(options).map(|_| ());
    let refused = [
        ("lock_id", StorageLock::connect("", &good).map(|_| ())),
        ("lock_id", StorageLock::connect("x".repeat(256), &good).map(|_| ())),
        ("lock_id", StorageLock::connect("a\0b", &good).map(|_| ())),
        ("dsn", PostgresStorage::connect("host=127.0.0.1 port=").map(|_| ())),
        ("dsn", PostgresStorage::connect(&format!("{good} sslmode=require")).map(|_| ())),
        ("dsn", PostgresStorage::connect("").map(|_| ())),
        ("max_connections", storage(options().max_connections(0))),
        ("schema", storage(options().schema(""))),
        ("table_name", storage(options().table_name("x".repeat(64)))),
    ];
    for (expected, result) in refused {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option, .. } if option == expected), "{error:?}");
        assert!(error.to_string().starts_with(&format!("invalid option {expected} = ")), "{error}");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }
    assert!(listener.accept().is_err(), "somebody connected");
}

#[test]
fn an_error_about_a_huge_text_is_short() {
    let huge = "🔒".repeat(5_000_000);
    let storage = PostgresStorageOptions::from_dsn(&dsn()).table_name(&huge);
    for error in [StorageLock::connect(huge.clone(), &dsn()).unwrap_err(), PostgresStorage::new(storage).unwrap_err()] {
        let text = error.to_string();
        assert!(text.len() < 2_000 && text.contains("20000000 bytes") && text.contains('🔒'), "{text}");
    }
}

#[test]
fn unusable_options_of_a_lock_are_refused() {
    let table = Table::new();
    let storage = table.storage();
    let with = |options| StorageLock::with_options(&storage, options).map(|_| ());
    let lease = |lease| LockOptions::new("l").lease_expire_after(lease);
    let refused = [
        ("lock_id", StorageLock::new(&storage, "").map(|_| ())),
        ("lease_expire_after", with(lease(ms(999)))),
        ("lease_refresh_interval", with(lease(ms(3_000)).lease_refresh_interval(ms(2_001)))),
        ("lease_refresh_interval", with(lease(ms(3_000)).lease_refresh_interval(Duration::ZERO))),
        ("lock_id", storage.get("").map(|_| ())),
    ];
    for (expected, result) in refused {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option, .. } if option == expected), "{error:?}");
    }
    let lock = StorageLock::new(&storage, "l").unwrap();
    for owner_id in ["", "a\0b", &"x".repeat(256)] {
        for result in [lock.lock(owner_id).map(|_| ()), lock.try_lock(owner_id).map(|_| ())] {
            assert!(matches!(result, Err(Error::InvalidOption { option: "owner_id", .. })), "{result:?}");
        }
    }
    assert_eq!(lock.info().unwrap(), None, "no attempt was made");
}

#[test]
fn errors_never_print_the_password() {
    let config: postgres::Config = dsn().parse().unwrap();
    let Some(password) = config.get_password() else { return };
    let password = String::from_utf8(password.to_vec()).unwrap();
    let wrong = dsn().replace(&password, "wr0ng");
    let mut shown = vec![format!("{:?}", PostgresStorageOptions::from_dsn(&dsn()))];
    for dsn in [wrong, dsn().replace("dbname=", "dbname=no_such_")] {
        let error = PostgresStorage::connect(&dsn).unwrap_err();
        shown.push(format!("{} {error:?}", chain(&error)));
    }
    for shown in shown {
        assert!(!shown.contains(&password) && !shown.contains("wr0ng"), "{shown}");
    }
}

#[test]
fn a_wrong_password_and_a_refused_connection_come_back_at_once() {
    let config: postgres::Config = dsn().parse().unwrap();
    let password = String::from_utf8(config.get_password().expect("a password in the DSN").to_vec()).unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for (dsn, says) in [
        (dsn().replace(&password, "wrong"), "password authentication failed"),
        (format!("host=127.0.0.1 port={nobody} user=u"), "refused"),
        ("host=no.such.host.invalid user=u".to_owned(), "lookup"),
    ] {
        let error = takes_at_most(ms(3_000), says, || StorageLock::connect("l", &dsn).unwrap_err());
        assert!(matches!(error, Error::Connect { .. }), "{error:?}");
        assert!(chain(&error).contains(says), "{}", chain(&error));
    }
}
