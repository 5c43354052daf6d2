//! A lock on a server that takes only TLS, with a password that is a token and changes:
//! `cargo run --features tls --example managed_server -- 'host=… user=… dbname=…' CA_FILE COMMAND…`
//!
//! COMMAND prints a fresh token, such as `aws rds generate-db-auth-token …`. It is run before each connection. Each
//! connection is verified by the certificates in CA_FILE, name included.

use std::error::Error;
use std::io;
use std::process::Command;
use std::thread;
use std::time::Duration;

use openssl::ssl::{SslConnector, SslMethod};
use postgres::Config;
use postgres::config::SslMode;
use postgres_openssl::MakeTlsConnector;
use storage_lock::{PostgresStorage, PostgresStorageOptions, StorageLock};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [dsn, ca_file, program, rest @ ..] = arguments.as_slice() else {
        return Err("give 'host=… user=… dbname=…', a file of certificates, and a command that prints a token".into());
    };

    // A fresh builder trusts what this machine trusts, and verifies names.
    let mut tls = SslConnector::builder(SslMethod::tls_client())?;
    tls.set_ca_file(ca_file)?;
    let tls = MakeTlsConnector::new(tls.build());

    let (mut config, program, rest) = (dsn.parse::<Config>()?, program.clone(), rest.to_vec());
    config.ssl_mode(SslMode::Require);
    let with_token = move || -> io::Result<Config> {
        let output = Command::new(&program).args(&rest).output()?;
        if !output.status.success() {
            return Err(io::Error::other(format!("{program} failed: {}", output.status)));
        }
        let mut config = config.clone();
        config.password(output.stdout.trim_ascii_end());
        Ok(config)
    };

    let storage = PostgresStorage::new(PostgresStorageOptions::from_config_with(with_token, tls))?;
    let guard = StorageLock::new(&storage, "managed-server")?.lock("example")?;
    println!("version {}: held", guard.version());
    // The work. The lock is kept however often the token changes meanwhile.
    thread::sleep(Duration::from_secs(10));
    println!("still held: {}", guard.is_held());
    guard.unlock()?;
    Ok(())
}
