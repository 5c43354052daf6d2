//! A throwaway server that takes TLS.

use std::fs;
use std::ops::Deref;

use postgres::{Client, NoTls};
use storage_lock::{PostgresStorage, PostgresStorageOptions, Result};

use crate::certificates::Signed;
use crate::support::eventually;
use crate::support::server::Server;

/// Its superuser comes in by the socket, whatever the rules are.
pub struct TlsServer(Server);

impl Deref for TlsServer {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.0
    }
}

impl TlsServer {
    /// A server with a certificate, that asks clients for theirs and verifies them by `clients`.
    pub fn start(certificate: &Signed, clients: &Signed) -> TlsServer {
        let server = TlsServer(Server::start_with(&["--fast"]));
        server.has(certificate);
        server.write("root.crt", &clients.certificate());
        server.set("ssl_ca_file", "root.crt");
        server.set("ssl", "on");
        server.is_on();
        server
    }

    fn is_on(&self) {
        let dsn = self.dsn_with("sslmode=require");
        eventually("the server takes TLS", || {
            self.superuser().batch_execute("SELECT pg_reload_conf()").unwrap();
            storage(&dsn).is_ok()
        });
    }

    /// From now on the server has this certificate.
    pub fn has(&self, certificate: &Signed) {
        self.write("server.crt", &certificate.certificate());
        self.write("server.key", &certificate.key());
        self.superuser().batch_execute("SELECT pg_reload_conf()").unwrap();
    }

    /// Writes a file into the server's folder, as the server: the user that owns it may be another one.
    fn write(&self, name: &str, content: &[u8]) {
        let content = String::from_utf8(content.to_vec()).unwrap();
        let sql = format!(
            "COPY (SELECT unnest(string_to_array($1, E'\\n'))) TO PROGRAM 'umask 077; cat > {}/{name}'",
            self.folder()
        );
        // COPY takes no parameters.
        self.superuser().batch_execute(&sql.replace("$1", &format!("'{}'", content.trim_end()))).unwrap();
    }

    fn folder(&self) -> String {
        self.superuser().query_one("SHOW data_directory", &[]).unwrap().get(0)
    }

    pub fn superuser(&self) -> Client {
        Client::connect(&self.0.dsn, NoTls).unwrap()
    }

    /// Puts lines before the others in `pg_hba.conf`, and waits until they are in force.
    pub fn rules(&self, lines: &str) {
        let mut client = self.superuser();
        let file: String = client.query_one("SHOW hba_file", &[]).unwrap().get(0);
        let rules = fs::read_to_string(&file).unwrap();
        fs::write(&file, format!("{lines}\n{rules}")).unwrap();
        client.batch_execute("SELECT pg_reload_conf()").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(300));
    }

    /// The server by the name `localhost`, and with these options.
    pub fn dsn_with(&self, options: &str) -> String {
        let kept = |part: &&str| !["host=", "hostaddr=", "sslmode="].iter().any(|name| part.starts_with(name));
        let parts: Vec<&str> = self.0.dsn.split(' ').filter(kept).collect();
        format!("{} host=localhost hostaddr=127.0.0.1 connect_timeout=20 {options}", parts.join(" "))
    }
}

/// Opens a storage, in which each test has its table.
pub fn storage(dsn: &str) -> Result<PostgresStorage> {
    PostgresStorage::new(PostgresStorageOptions::from_dsn(dsn).table_name("tls"))
}

/// Whether the storage's connections are encrypted.
#[track_caller]
pub fn is_encrypted(client: &mut Client) -> bool {
    let sql = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
               WHERE application_name = 'storage_lock' AND backend_type = 'client backend'";
    let is_encrypted: Option<bool> = client.query_one(sql, &[]).unwrap().get(0);
    is_encrypted.expect("the storage has connections")
}
