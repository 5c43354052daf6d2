//! How a connection is made: with which configuration, and with which TLS. Uses `error` and `user_code`.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

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

/// Takes a connection out of a pool of the caller's, within a time.
pub(crate) type Lend = Arc<dyn Fn(Duration) -> Result<Link, Cause> + Send + Sync>;

/// A connection.
#[expect(clippy::large_enum_variant, reason = "there are few of them, and nobody moves them about")]
pub(crate) enum Link {
    Own(Client),
    /// From a pool of the caller's, to which it goes back when this is dropped.
    Lent(Box<dyn DerefMut<Target = Client> + Send>),
}

impl Deref for Link {
    type Target = Client;

    fn deref(&self) -> &Client {
        match self {
            Link::Own(client) => client,
            Link::Lent(client) => client,
        }
    }
}

impl DerefMut for Link {
    fn deref_mut(&mut self) -> &mut Client {
        match self {
            Link::Own(client) => client,
            Link::Lent(client) => client,
        }
    }
}

/// The server of a storage.
#[derive(Clone)]
pub(crate) struct Server {
    /// The pool of the caller's, which all connections but the one that listens come from.
    pub(crate) pool: Option<Lend>,
    /// With a pool, the server for the connection that listens, if there is to be one.
    pub(crate) listening: Option<Box<Server>>,
    pub(crate) source: Source,
    pub(crate) connect: Connect,
    /// What is known before the configuration is asked for: its time for each address of each host, and how many
    /// hosts it has.
    pub(crate) connect_timeout: Duration,
    pub(crate) hosts: usize,
}

/// How long a pool is waited for.
const POOL_TIMEOUT: Duration = Duration::from_secs(5);

impl Server {
    /// A pool of the caller's, and a server to listen on.
    pub(crate) fn of_pool(pool: &Lend, listening: Option<Server>) -> Server {
        Server {
            pool: Some(Arc::clone(pool)),
            listening: listening.map(Box::new),
            source: Arc::new(|| Err("the connections come from a pool".into())),
            connect: Arc::new(|_| Err("the connections come from a pool".into())),
            connect_timeout: POOL_TIMEOUT,
            hosts: 1,
        }
    }

    /// The configuration for the next connection.
    pub(crate) fn config(&self) -> Result<Config> {
        let config = user_code::call(|| (self.source)());
        let config = config.unwrap_or_else(|| Err("what was given to from_config_with panicked".into()));
        config.map_err(|source| Error::Connect { address: "(no configuration)".to_owned(), source })
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

/// Takes connections out of a pool.
pub(crate) fn lend_from<T>(pool: r2d2::Pool<PostgresConnectionManager<T>>) -> Lend
where
    T: MakeTlsConnect<Socket> + Clone + Send + Sync + 'static,
    T::TlsConnect: Send,
    T::Stream: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let pool = Elsewhere(Some(pool));
    Arc::new(move |timeout| match &pool.0 {
        Some(pool) => Ok(Link::Lent(Box::new(pool.get_timeout(timeout)?))),
        None => Err("the pool is closed".into()),
    })
}

/// Something that is dropped on a thread of its own: connections, which panic where an async runtime drops them.
struct Elsewhere<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Drop for Elsewhere<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        let drop_it = move || _ = user_code::call(|| drop(value));
        // Where no thread can be started, it is dropped here.
        drop(thread::Builder::new().name("lock-close".to_owned()).spawn(drop_it));
    }
}

/// Whether the configuration names the socket of a server on this machine.
#[cfg(unix)]
pub(crate) fn is_local(config: &Config) -> bool {
    use postgres::config::Host;
    config.get_hostaddrs().is_empty() && matches!(config.get_hosts(), [Host::Unix(_)])
}

#[cfg(not(unix))]
pub(crate) fn is_local(_: &Config) -> bool {
    false
}
