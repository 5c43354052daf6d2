//! Whom each `sslmode` believes.

use storage_lock::Error;

use crate::certificates::{Folder, Signed};
use crate::server::{TlsServer, is_encrypted, storage};
use crate::support::server::Server;
use crate::support::{chain, eventually, ms, takes_at_most};

const UNVERIFIED: &str = "certificate verify failed";

#[test]
fn each_mode_verifies_what_it_says() {
    let (authority, other) = (Signed::authority("ours"), Signed::authority("another"));
    let folder = Folder::new();
    let root = folder.write("root.crt", &authority.certificate());
    let server = TlsServer::start(&authority.sign("localhost"), &authority);
    let certificates = [
        ("right", authority.sign("localhost"), [true, true, true]),
        ("for another name", authority.sign("db.example"), [true, true, false]),
        ("expired", authority.sign_expired("localhost"), [true, false, false]),
        ("by itself", Signed::by_itself("localhost"), [true, false, false]),
        ("by another authority", other.sign("localhost"), [true, false, false]),
    ];
    for (what, certificate, is_believed) in certificates {
        server.has(&certificate);
        let dsns = [
            "sslmode=require".to_owned(),
            format!("sslmode=verify-ca sslrootcert={root}"),
            format!("sslmode=verify-full sslrootcert={root}"),
        ];
        for (options, is_believed) in dsns.iter().zip(is_believed) {
            let dsn = server.dsn_with(options);
            if is_believed {
                eventually(&format!("{what} is believed: {options}"), || storage(&dsn).is_ok());
                continue;
            }
            // The server may have the one before, still.
            eventually(&format!("{what} is refused: {options}"), || {
                storage(&dsn).is_err_and(|error| {
                    assert!(matches!(error, Error::Connect { .. }), "{error:?}");
                    chain(&error).contains(UNVERIFIED)
                })
            });
        }
    }
    // As libpq: with a root certificate, `require` verifies, too. The server's is by another authority now.
    let error = storage(&server.dsn_with(&format!("sslmode=require sslrootcert={root}"))).unwrap_err();
    assert!(chain(&error).contains(UNVERIFIED), "{}", chain(&error));
    // None of ours is among those that this machine trusts.
    let error = storage(&server.dsn_with("sslmode=verify-full sslrootcert=system")).unwrap_err();
    assert!(chain(&error).contains(UNVERIFIED), "{}", chain(&error));
    // A certificate that doesn't exist, or isn't one.
    for (file, why) in [("/nowhere/root.crt", "No such file"), (&*folder.write("empty.crt", b""), "no certificate")] {
        let error = storage(&server.dsn_with(&format!("sslmode=verify-full sslrootcert={file}"))).unwrap_err();
        assert!(chain(&error).contains(why) && chain(&error).contains("sslrootcert"), "{}", chain(&error));
    }
}

#[test]
fn the_address_of_a_server_is_verified_as_its_name() {
    let authority = Signed::authority("ours");
    let folder = Folder::new();
    let root = folder.write("root.crt", &authority.certificate());
    let server = TlsServer::start(&authority.sign("localhost"), &authority);
    let dsn =
        server.dsn_with(&format!("sslmode=verify-full sslrootcert={root}")).replace("host=localhost", "host=127.0.0.1");
    let error = storage(&dsn).unwrap_err();
    assert!(chain(&error).contains(UNVERIFIED), "{}", chain(&error));
}

#[test]
fn a_server_without_tls_is_reached_where_that_is_allowed() {
    let plain = Server::start_with(&["--fast"]);
    for mode in ["disable", "allow", "prefer"] {
        let _storage = storage(&with_mode(&plain.dsn, mode)).unwrap();
        assert!(!is_encrypted(&mut plain.client()), "{mode}");
    }
    let error = storage(&with_mode(&plain.dsn, "require")).unwrap_err();
    assert!(chain(&error).contains("server does not support TLS"), "{}", chain(&error));
}

fn with_mode(dsn: &str, mode: &str) -> String {
    let parts = dsn.split(' ').filter(|part| !part.starts_with("sslmode="));
    format!("{} sslmode={mode}", parts.collect::<Vec<_>>().join(" "))
}

#[test]
fn a_server_that_takes_only_tls_is_reached_by_it_and_an_error_says_so_otherwise() {
    let authority = Signed::authority("ours");
    let server = TlsServer::start(&authority.sign("localhost"), &authority);
    let password = server.dsn.split("password=").nth(1).unwrap().split(' ').next().unwrap();
    for role in ["app", "bare"] {
        server.superuser().batch_execute(&format!("CREATE ROLE {role} LOGIN SUPERUSER PASSWORD '{password}'")).unwrap();
    }
    server.rules("hostnossl all app all reject\nhostssl all bare all reject");
    let as_role = |role: &str, mode: &str| {
        let dsn = server.dsn_with(&format!("sslmode={mode}"));
        let parts =
            dsn.split(' ').map(|part| if part.starts_with("user=") { format!("user={role}") } else { part.to_owned() });
        storage(&parts.collect::<Vec<_>>().join(" "))
    };
    for mode in ["allow", "prefer", "require"] {
        let _storage = as_role("app", mode).unwrap_or_else(|error| panic!("{mode}: {}", chain(&error)));
        assert!(is_encrypted(&mut server.superuser()), "{mode}");
    }
    let error = as_role("app", "disable").unwrap_err();
    assert!(chain(&error).contains("rejects") && chain(&error).contains("no encryption"), "{}", chain(&error));
    assert!(chain(&error).contains("sslmode=require"), "{}", chain(&error));
    // A role that isn't let in with TLS is let in without it, where that is allowed.
    for mode in ["disable", "allow", "prefer"] {
        as_role("bare", mode).unwrap_or_else(|error| panic!("{mode}: {}", chain(&error)));
    }
    assert!(as_role("bare", "require").is_err());
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    for (options, expected) in [
        ("sslmode=require sslrootcert=system", "sslmode=verify-full"),
        ("sslmode=always", "verify-full"),
        ("sslsni=2", "sslsni=1"),
    ] {
        let error = storage(&format!("host=nowhere.invalid user=app {options}")).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "dsn", .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// Each of these meant something else to somebody who wrote it.
#[test]
fn no_garbled_dsn_ends_without_the_tls_that_it_asks_for() {
    let plain = Server::start_with(&["--fast"]);
    let part = |name: &str| plain.dsn.split(&format!("{name}=")).nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let (port, user, password) = (part("port"), part("user"), part("password"));
    let url = format!("postgresql://{user}:{password}@localhost:{port}/postgres");
    let words = format!("host=localhost port={port} user={user} password={password} dbname=postgres");
    let by_folder = words.replace("host=localhost", "host=/tmp hostaddr=127.0.0.1");
    for dsn in [
        format!("{url}?sslmode=require&"),
        format!("{url}?sslmode=require&&application_name=a"),
        format!("{url}?sslmode=require&x"),
        format!("{url}?sslmode=require&=x"),
        format!("{url}?sslmode=disable&sslmode=require"),
        format!("{url}?%73slmode=requir%65"),
        format!("{words} sslmode=require ="),
        format!("{words} sslmode = 'require' =x"),
        format!("={words} sslmode=require"),
        format!("{by_folder} sslmode=require"),
        format!("{by_folder} sslmode=verify-full sslrootcert=/nowhere"),
        format!("{words} sslnegotiation=direct"),
        format!("{words} sslnegotiation=direct sslmode=prefer"),
        format!("{words} sslcert=/nowhere sslkey=/nowhere"),
    ] {
        let result = storage(&dsn).map(drop);
        assert!(result.is_err(), "{}", dsn.replace(&password, "…"));
        assert!(!format!("{result:?}").contains(&password));
    }
}

#[test]
fn only_a_whole_name_is_verified() {
    let authority = Signed::authority("ours");
    let folder = Folder::new();
    let root = folder.write("root.crt", &authority.certificate());
    let server = TlsServer::start(&authority.sign("a.example"), &authority);
    let dsn = server.dsn_with(&format!("sslmode=verify-full sslsni=0 sslrootcert={root}"));
    let with_host = |host: &str| storage(&dsn.replace("host=localhost", &format!("host={host}"))).map(drop);
    with_host("a.example").unwrap();
    for host in ["''", ".example", "example", "b.a.example", "/tmp"] {
        let error = with_host(host).unwrap_err();
        let said = chain(&error);
        assert!(said.contains("name") || said.contains(UNVERIFIED), "{host}: {said}");
    }
}

#[test]
fn a_file_that_is_none_is_refused_at_once_and_its_name_is_not_shown() {
    let authority = Signed::authority("ours");
    let folder = Folder::new();
    let server = TlsServer::start(&authority.sign("localhost"), &authority);
    let pipe = folder.write("pipe", b"").replace("pipe", "fifo");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for (options, why) in [
        (format!("sslmode=verify-ca sslrootcert={pipe}"), "not a file"),
        (format!("sslmode=require sslcert={pipe} sslkey={pipe}"), "not a file"),
        ("sslmode=verify-ca sslrootcert=/dev/zero".to_owned(), "not a file"),
        ("sslmode=require sslcert= password=s3cret".to_owned(), "is no path"),
        ("sslmode=require sslcert=s3cret sslkey=s3cret".to_owned(), "sslcert"),
        ("sslmode=require sslkey='-----BEGIN PRIVATE KEY-----\ns3cret'".to_owned(), "is no path"),
    ] {
        let error = takes_at_most(ms(4_000), &options, || storage(&server.dsn_with(&options)).unwrap_err());
        assert!(chain(&error).contains(why), "{options}: {}", chain(&error));
        assert!(!format!("{error:?} {}", chain(&error)).contains("s3cret"), "{options}: {error:?}");
    }
    // Not set, as to libpq.
    storage(&server.dsn_with("sslmode=require sslcert='' sslkey='' sslrootcert=''")).unwrap();
}
