//! A lock over TLS, and with a connector of the caller's own.

use std::thread;

use openssl::ssl::{SslConnector, SslMethod};
use postgres::config::SslMode;
use postgres_openssl::MakeTlsConnector;
use storage_lock::{PostgresStorage, PostgresStorageOptions, StorageLock};

use crate::certificates::{Folder, Signed};
use crate::server::{TlsServer, is_encrypted, storage};
use crate::support::{ms, short_lock, takes_at_most, waits_for};

#[test]
fn a_lock_is_held_waited_for_handed_over_and_fenced_over_tls() {
    let authority = Signed::authority("ours");
    let folder = Folder::new();
    let root = folder.write("root.crt", &authority.certificate());
    let server = TlsServer::start(&authority.sign("localhost"), &authority);
    let dsn = server.dsn_with(&format!("sslmode=verify-full sslrootcert={root}"));
    let (ours, theirs) = (storage(&dsn).unwrap(), storage(&dsn).unwrap());
    let guard = short_lock(&ours, "l", ms(30_000), ms(50)).lock("worker").unwrap();
    // A thread of this process, and another process, which is notified.
    let (here, there) = (StorageLock::new(&ours, "l").unwrap(), StorageLock::new(&theirs, "l").unwrap());
    let (here, there) = (waits_for(&here), waits_for(&there));
    thread::sleep(ms(500));
    let mut builder = SslConnector::builder(SslMethod::tls_client()).unwrap();
    builder.set_ca_file(&root).unwrap();
    let mut config: postgres::Config = server.dsn_with("sslmode=require").parse().unwrap();
    let tls = MakeTlsConnector::new(builder.build());
    let mut client = config.ssl_mode(SslMode::Require).connect(tls.clone()).unwrap();
    guard
        .transaction(&mut client, |transaction| {
            transaction.execute("SELECT 1", &[]).map_err(Box::<dyn std::error::Error>::from)
        })
        .unwrap();
    assert!(is_encrypted(&mut server.superuser()));
    guard.unlock().unwrap();
    takes_at_most(ms(4_000), "the hand-overs", || (here.join().unwrap(), there.join().unwrap()));
    // With a connector and a configuration of the caller's.
    let options = PostgresStorageOptions::from_config(config, tls).table_name("tls");
    let own = PostgresStorage::new(options).unwrap();
    assert!(StorageLock::new(&own, "l").unwrap().lock("worker").unwrap().version() > 2);
    assert!(is_encrypted(&mut server.superuser()));
}
