//! How a connection is made: with which configuration, and with which TLS. Uses `error` and `user_code`.

use std::sync::Arc;
use std::time::Duration;

use postgres::config::Host;
use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::{Client, Config, Socket};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;

use crate::error::{Cause, Error, Result};
use crate::user_code;

/// Returns the configuration for the next connection.
pub(crate) type Source = Arc<dyn Fn() -> Result<Config, Cause> + Send + Sync>;
/// Makes a connection. No type of a TLS library shows from here on.
pub(crate) type Connect = Arc<dyn Fn(&Config) -> Result<Client, Cause> + Send + Sync>;

/// The server of a storage.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) source: Source,
    pub(crate) connect: Connect,
    /// For each address of each host.
    pub(crate) connect_timeout: Duration,
    /// How many hosts the first configuration has.
    pub(crate) hosts: usize,
}

impl Server {
    /// The configuration for the next connection.
    pub(crate) fn config(&self) -> Result<Config> {
        let config = user_code::call(|| (self.source)());
        config.unwrap_or_else(|| Err("what was given to from_config_with panicked".into())).map_err(|cause| {
            // The configuration was returned, and can't be used.
            let source = match cause.downcast::<Error>() {
                Ok(error) => return *error,
                Err(source) => source,
            };
            Error::Connect { address: "(no configuration)".to_owned(), source }
        })
    }
}

/// Makes connections with a TLS connector.
pub(crate) fn connect_with<T>(tls: T) -> Connect
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::TlsConnect: Send,
    T::Stream: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    Arc::new(move |config| Ok(PostgresConnectionManager::new(config.clone(), tls.clone()).connect()?))
}

/// Whether the configuration names the socket of a server on this machine.
pub(crate) fn is_local(config: &Config) -> bool {
    #[cfg(unix)]
    let is_local = config.get_hosts().iter().any(|host| matches!(host, Host::Unix(_)));
    #[cfg(not(unix))]
    let is_local = config.get_hosts().is_empty() && false;
    is_local
}
