//! Clients that have to say who they are.

use storage_lock::Result;

use crate::certificates::{Folder, Signed, set_mode};
use crate::server::{TlsServer, storage};
use crate::support::chain;

/// A server that lets role `app` in by a certificate, and role `scram` by a password.
fn server(authority: &Signed) -> TlsServer {
    let server = TlsServer::start(&authority.sign("localhost"), authority);
    let roles = "CREATE ROLE app LOGIN SUPERUSER; CREATE ROLE scram LOGIN SUPERUSER PASSWORD 'a secret'";
    server.superuser().batch_execute(roles).unwrap();
    server.rules("hostssl all app all cert\nhost all scram all scram-sha-256");
    server
}

fn opens(server: &TlsServer, role: &str, options: &str) -> Result<()> {
    let dsn = server.dsn_with(options);
    let parts =
        dsn.split(' ').map(|part| if part.starts_with("user=") { format!("user={role}") } else { part.to_owned() });
    storage(&parts.collect::<Vec<_>>().join(" ")).map(drop)
}

#[test]
fn a_certificate_lets_a_client_in_and_its_key_is_its_owners_alone() {
    let (authority, other) = (Signed::authority("ours"), Signed::authority("another"));
    let folder = Folder::new();
    let server = server(&authority);
    let options = |name: &str, signed: &Signed| {
        let certificate = folder.write(&format!("{name}.crt"), &signed.certificate());
        let key = folder.write(&format!("{name}.key"), &signed.key());
        (format!("sslmode=require sslcert={certificate} sslkey={key}"), key)
    };
    let (right, key) = options("right", &authority.sign("app"));
    opens(&server, "app", &right).unwrap();
    for (what, options) in [
        ("none", "sslmode=require".to_owned()),
        ("of another role", options("role", &authority.sign("somebody")).0),
        ("by another authority", options("other", &other.sign("app")).0),
        ("expired", options("expired", &authority.sign_expired("app")).0),
    ] {
        assert!(opens(&server, "app", &options).is_err(), "{what}");
    }
    // With the key of another certificate.
    let (_, others) = options("others", &authority.sign("app"));
    let error = opens(&server, "app", &right.replace(&key, &others)).unwrap_err();
    assert!(chain(&error).contains("sslkey"), "{}", chain(&error));
    // A key with a password: nobody is asked for it.
    let (locked, _) = {
        let signed = authority.sign("app");
        let certificate = folder.write("locked.crt", &signed.certificate());
        let key = folder.write("locked.key", &signed.locked_key("s3cret"));
        (format!("sslmode=require sslcert={certificate} sslkey={key}"), key)
    };
    let error = opens(&server, "app", &locked).unwrap_err();
    assert!(chain(&error).contains("it has a password"), "{}", chain(&error));
    // A key that others can read.
    set_mode(&key, 0o644);
    let error = opens(&server, "app", &right).unwrap_err();
    assert!(chain(&error).contains("sslkey") && chain(&error).contains("0600"), "{}", chain(&error));
    set_mode(&key, 0o600);
    opens(&server, "app", &right).unwrap();
}

#[test]
fn a_password_is_bound_to_the_channel_where_that_is_asked_for() {
    let authority = Signed::authority("ours");
    let server = server(&authority);
    let with = |options: &str| opens(&server, "scram", &format!("password='a secret' {options}"));
    for options in ["sslmode=disable", "sslmode=require", "sslmode=require channel_binding=require"] {
        with(options).unwrap_or_else(|error| panic!("{options}: {}", chain(&error)));
    }
    let error = with("sslmode=disable channel_binding=require").unwrap_err();
    assert!(chain(&error).contains("channel binding"), "{}", chain(&error));
    let error = opens(&server, "scram", "password=wrong sslmode=require").unwrap_err();
    assert!(chain(&error).contains("password authentication failed"), "{}", chain(&error));
    assert!(!chain(&error).contains("wrong"), "{}", chain(&error));
}
