//! Opens connections: tries each address of each host in turn, as libpq does.
//!
//! Each address has the whole `connect_timeout` for itself, log-in included; the client's own timeout doesn't cover the
//! log-in. The look-up of a name has the same time. Neither the client nor a look-up can be interrupted. So each of
//! them runs on a thread of its own, which is left behind when its time is over. Addresses and names that were silent
//! a short while ago are tried last.
//!
//! `r2d2_postgres` opens the connections. The workers keep them, one each, instead of an `r2d2` pool. Such a pool would
//! - cost three threads a storage;
//! - keep only the text of the last error;
//! - repeat for ever what failed, whether or not anybody still wants it;
//! - count a stuck connection as one in use for as long as it is stuck.
//!
//! Uses `db::route`, `db::session`, `db::sql`, `db::stuck`, `events`, `error`, `user_code` and `sync`. Under the model
//! checker, `model/connections.rs` replaces this module.

mod hosts;
mod limited;
mod open;

use std::collections::HashMap;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use postgres::Config;
use postgres::config::{Host, LoadBalanceHosts};

use self::hosts::{Address, config_for, hosts};
use self::open::open;
use crate::db::route::Route;
use crate::db::server::{Lend, Server};
use crate::db::session::Session;
use crate::db::stuck::StuckLimit;
use crate::error::{Cause, Error, Result, chain, is_passing_cause};
use crate::events::{Event, Events};
use crate::sync::{lock, random};

/// What opening may take beyond the time of its addresses.
const SLACK: Duration = Duration::from_millis(250);
/// How many addresses we assume for a host that was not looked up yet.
const MANY_ADDRESSES: usize = 10;
/// For how long an address or a name that was silent is tried last.
const SILENT_FOR: Duration = Duration::from_secs(60);
/// For how many addresses beside the first one an error gives the cause.
const SHOWN_CAUSES: usize = 4;

/// Opens the connections of a storage.
#[derive(Clone)]
pub(crate) struct Connections(Arc<Shared>);

struct Shared {
    server: Server,
    /// With a pool, what opens the connection that listens.
    listening: Option<Connections>,
    route: Arc<Route>,
    /// The connect timeout of the latest configuration, in milliseconds, and how many hosts it has.
    connect_timeout: AtomicUsize,
    hosts: AtomicUsize,
    /// How many addresses the last attempt found, for the hosts that it came to.
    addresses: AtomicUsize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The attempts that run on threads of their own, and since when.
    under_way: HashMap<u64, Instant>,
    next_id: u64,
    last_success: Option<Instant>,
    stuck_limit: StuckLimit,
    /// The addresses that were silent, and since when.
    silent: Vec<(Address, Instant)>,
}

impl Connections {
    pub(crate) fn new(server: Server, events: Events) -> Connections {
        Connections(Arc::new(Shared {
            listening: server.listening.clone().map(|server| Connections::new(*server, events.clone())),
            connect_timeout: AtomicUsize::new(millis(server.connect_timeout)),
            hosts: AtomicUsize::new(server.hosts),
            server,
            route: Arc::new(Route::new(events)),
            addresses: AtomicUsize::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// How long it may take to open a connection when each address uses its whole time. Look-ups are not included.
    ///
    /// Before the first look-up, this is a guess, and a long one. An attempt ends when all addresses have been tried,
    /// however many there are.
    pub(crate) fn opening_time(&self) -> Duration {
        if self.is_lent() {
            return self.connect_timeout() + SLACK;
        }
        let addresses = match self.0.addresses.load(Ordering::Relaxed) {
            0 => self.0.hosts.load(Ordering::Relaxed) * MANY_ADDRESSES,
            known => known.max(self.0.hosts.load(Ordering::Relaxed)),
        };
        self.connect_timeout().saturating_mul(u32::try_from(addresses).unwrap_or(u32::MAX)) + SLACK
    }

    /// What opens the connection that listens; none if there is to be none.
    pub(crate) fn for_listening(&self) -> Option<Connections> {
        if self.0.server.pool.is_some() { self.0.listening.clone() } else { Some(self.clone()) }
    }

    fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.0.connect_timeout.load(Ordering::Relaxed) as u64)
    }

    /// Notes what a configuration says of the time that connecting may take.
    fn learn(&self, config: &Config) {
        if let Some(timeout) = config.get_connect_timeout() {
            self.0.connect_timeout.store(millis(*timeout), Ordering::Relaxed);
        }
        self.0.hosts.store(config.get_hosts().len().max(config.get_hostaddrs().len()), Ordering::Relaxed);
    }

    /// Whether each connection is lent for a call.
    pub(crate) fn is_lent(&self) -> bool {
        self.0.server.pool.is_some()
    }

    /// Notes that a connection is silent.
    pub(crate) fn suspect(&self) {
        self.0.route.suspect();
    }

    /// Opens a session on the first address that lets us in, and makes it ready with `prepare`.
    pub(crate) fn open(
        &self,
        prepare: impl Fn(&mut Session) -> Result<(), postgres::Error> + Clone + Send + 'static,
    ) -> Result<Session> {
        if let Some(lend) = &self.0.server.pool {
            return self.borrow(lend, prepare);
        }
        let config = self.0.server.config()?;
        self.learn(&config);
        let is_shuffled = config.get_load_balance_hosts() == LoadBalanceHosts::Random;
        let (mut addresses, mut silent, mut failed) = (0, Vec::new(), Vec::new());
        for host in self.in_order(hosts(&config), is_shuffled) {
            let found = match self.look_up(&host) {
                Ok(found) => found,
                Err(cause) => {
                    failed.push((host, cause));
                    continue;
                }
            };
            addresses += found.len();
            self.0.addresses.store(addresses, Ordering::Relaxed);
            let (last, first): (Vec<Address>, _) =
                self.in_order(found, is_shuffled).into_iter().partition(|it| self.is_silent(it));
            silent.extend(last);
            if let Some(session) = self.connect_to_one(&config, first, &prepare, &mut failed) {
                return Ok(session);
            }
        }
        if let Some(session) = self.connect_to_one(&config, silent, &prepare, &mut failed) {
            return Ok(session);
        }
        Err(connect_error(failed))
    }

    /// Makes a session of a connection from the caller's pool.
    fn borrow(&self, lend: &Lend, prepare: impl Fn(&mut Session) -> Result<(), postgres::Error>) -> Result<Session> {
        let session = lend(self.connect_timeout()).and_then(|link| {
            let mut session = Session::lent(link, Arc::clone(&self.0.route))?;
            prepare(&mut session)?;
            Ok(session)
        });
        let session = session.map_err(|source| Error::Connect { address: "(the pool)".to_owned(), source })?;
        if self.0.route.end_interruption() {
            self.0.route.events.send(|| Event::Reconnected {});
        }
        Ok(session)
    }

    /// Opens a session on the first of these addresses that lets us in. The causes of the others go to `failed`.
    fn connect_to_one(
        &self,
        config: &Config,
        addresses: Vec<Address>,
        prepare: &(impl Fn(&mut Session) -> Result<(), postgres::Error> + Clone + Send + 'static),
        failed: &mut Vec<(Address, Cause)>,
    ) -> Option<Session> {
        for address in addresses {
            match self.connect(config_for(config, &address), &address, prepare.clone()) {
                Ok(session) => return Some(session),
                Err(cause) => failed.push((address, cause)),
            }
        }
        None
    }

    /// Puts the addresses that were silent last, and shuffles them before if the configuration says so.
    fn in_order(&self, mut addresses: Vec<Address>, is_shuffled: bool) -> Vec<Address> {
        if is_shuffled {
            addresses.sort_by_cached_key(|_| random());
        }
        addresses.sort_by_key(|address| self.is_silent(address));
        addresses
    }

    fn is_silent(&self, address: &Address) -> bool {
        let state = lock(&self.0.state);
        state.silent.iter().any(|(silent, since)| silent == address && since.elapsed() < SILENT_FOR)
    }

    /// Finds the addresses of a host.
    fn look_up(&self, host: &Address) -> Result<Vec<Address>, Cause> {
        let Some(Host::Tcp(name)) = &host.host else { return Ok(vec![host.clone()]) };
        if host.ip.is_some() {
            return Ok(vec![host.clone()]);
        }
        if let Ok(ip) = name.parse() {
            return Ok(vec![Address { ip: Some(ip), ..host.clone() }]);
        }
        let (name, port) = (name.clone(), host.port);
        let ips: Vec<IpAddr> = self.limited(host, false, move |_| {
            Ok((name.as_str(), port).to_socket_addrs()?.map(|found| found.ip()).collect())
        })?;
        Ok(ips.into_iter().map(|ip| Address { ip: Some(ip), ..host.clone() }).collect())
    }

    fn connect(
        &self,
        config: Config,
        address: &Address,
        prepare: impl FnOnce(&mut Session) -> Result<(), postgres::Error> + Send + 'static,
    ) -> Result<Session, Cause> {
        let shared = Arc::clone(&self.0);
        self.limited(address, true, move |logged_in| {
            let mut session = open(&shared, config, logged_in)?;
            prepare(&mut session)?;
            lock(&shared.state).last_success = Some(Instant::now());
            Ok(session)
        })
    }
}

/// An hour at most, which any machine can count.
fn millis(duration: Duration) -> usize {
    usize::try_from(duration.as_millis()).unwrap_or(usize::MAX)
}

/// One error for all the addresses that failed.
fn connect_error(mut failed: Vec<(Address, Cause)>) -> Error {
    // A cause that may pass comes first, whatever the others are: it says that trying again is worth while.
    let main = failed.iter().position(|(_, cause)| is_passing_cause(cause.as_ref())).unwrap_or_default();
    if failed.is_empty() {
        return Error::Connect { address: "(no address)".to_owned(), source: "no host has an address".into() };
    }
    let (address, source) = failed.remove(main);
    let shown = failed.iter().take(SHOWN_CAUSES);
    let others: String =
        shown.map(|(address, cause)| format!("; nor at {address} ({})", chain(cause.as_ref()))).collect();
    let more = failed.len().saturating_sub(SHOWN_CAUSES);
    let more = if more > 0 { format!("; nor at {more} others") } else { String::new() };
    Error::Connect { address: format!("{address}{others}{more}"), source }
}
