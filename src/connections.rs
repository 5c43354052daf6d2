//! Opening connections, to each address of each host in turn, as libpq does.
//!
//! Each address has the whole `connect_timeout`, log-in included, which the client's own doesn't cover; so has the
//! look-up of a name. The client can't be interrupted, and looking a name up can't, so each of these is done on a
//! thread of its own, which is left behind when its time is over. Addresses and names that were silent a short while
//! ago are tried last.
//!
//! `r2d2_postgres` opens the connections. They are kept by the workers, one each, and not by a pool of `r2d2`'s: that
//! would cost three threads a storage, keep the text of the last error only, repeat for ever what failed, whoever
//! wants it, and count a connection that is stuck as one in use for as long as it is.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use postgres::config::{Host, LoadBalanceHosts};
use postgres::error::SqlState;
use postgres::{Config, NoTls};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;

use crate::error::{Cause, Error, Result, chain, is_passing_cause};
use crate::events::{Event, Events};
use crate::session::{Route, Session};
use crate::sql;
use crate::stragglers::Stragglers;
use crate::sync::{lock, random, wait_until};
use crate::user_code::{self, note};

/// What opening may take beyond the time of its addresses.
const SLACK: Duration = Duration::from_millis(250);
/// How many addresses a host is taken to have before it was looked up.
const MANY_ADDRESSES: usize = 10;
/// What took so long to fail counts as silent.
const SLOW_FAILURE: Duration = Duration::from_secs(1);
/// What was silent is tried last for so long.
const SILENT_FOR: Duration = Duration::from_secs(60);
/// More descriptors than the client needs to open a connection: it panics where it gets none.
const DESCRIPTORS: usize = 8;
/// How many addresses an error explains beside the first.
const SHOWN_CAUSES: usize = 4;
/// What a server, or a pooler before it, says of start-up options that it doesn't know.
const REFUSED_OPTIONS: [SqlState; 3] =
    [SqlState::PROTOCOL_VIOLATION, SqlState::FEATURE_NOT_SUPPORTED, SqlState::UNDEFINED_OBJECT];

/// Opens the connections of a storage.
#[derive(Clone)]
pub(crate) struct Connections(Arc<Shared>);

struct Shared {
    /// Without hosts.
    config: Config,
    hosts: Vec<Address>,
    is_shuffled: bool,
    route: Arc<Route>,
    connect_timeout: Duration,
    /// How many addresses the hosts had that the last attempt came to.
    addresses: AtomicUsize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What is under way on threads of its own, and since when.
    under_way: HashMap<u64, Instant>,
    next_id: u64,
    last_success: Option<Instant>,
    stragglers: Stragglers,
    /// Since when addresses are silent.
    silent: Vec<(Address, Instant)>,
}

/// Where a server may be: a host, and which of its addresses, if it has been looked up.
#[derive(Clone, PartialEq, Eq)]
struct Address {
    host: Option<Host>,
    ip: Option<IpAddr>,
    port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.ip) {
            (Some(Host::Tcp(name)), Some(ip)) if *name != ip.to_string() => write!(f, "{name} ({ip})")?,
            (Some(Host::Tcp(name)), _) => write!(f, "{name}")?,
            #[cfg(unix)]
            (Some(Host::Unix(folder)), _) => write!(f, "{}", folder.display())?,
            (None, Some(ip)) => write!(f, "{ip}")?,
            (None, None) => {}
        }
        write!(f, ", port {}", self.port)
    }
}

/// How far a thread has come.
enum Progress<T> {
    /// The rest has a time of its own.
    LoggedIn,
    Done(Result<T, Cause>),
}

impl Connections {
    pub(crate) fn new(config: &Config, events: Events) -> Connections {
        Connections(Arc::new(Shared {
            hosts: hosts(config),
            is_shuffled: config.get_load_balance_hosts() == LoadBalanceHosts::Random,
            connect_timeout: config.get_connect_timeout().copied().unwrap_or(Duration::from_secs(5)),
            config: without_hosts(config),
            route: Arc::new(Route::new(events)),
            addresses: AtomicUsize::new(0),
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// How long it may take to open a connection, when each address has its time, look-ups apart. Before the first
    /// look-up that is a guess, and a long one: an attempt ends when all addresses have been tried, however many they
    /// are.
    pub(crate) fn opening_time(&self) -> Duration {
        let addresses = match self.0.addresses.load(Ordering::Relaxed) {
            0 => self.0.hosts.len() * MANY_ADDRESSES,
            known => known.max(self.0.hosts.len()),
        };
        self.0.connect_timeout.saturating_mul(u32::try_from(addresses).unwrap_or(u32::MAX)) + SLACK
    }

    /// A connection is silent.
    pub(crate) fn doubt(&self) {
        self.0.route.doubt();
    }

    /// A session, made ready by `prepare`, on the first address that lets us in.
    pub(crate) fn open(
        &self,
        prepare: impl Fn(&mut Session) -> Result<(), postgres::Error> + Clone + Send + 'static,
    ) -> Result<Session> {
        let (mut addresses, mut silent, mut failed) = (0, Vec::new(), Vec::new());
        for host in self.in_order(self.0.hosts.clone()) {
            let found = match self.look_up(&host) {
                Ok(found) => found,
                Err(cause) => {
                    failed.push((host, cause));
                    continue;
                }
            };
            addresses += found.len();
            self.0.addresses.store(addresses, Ordering::Relaxed);
            let (last, now): (Vec<Address>, _) = self.in_order(found).into_iter().partition(|it| self.is_silent(it));
            silent.extend(last);
            if let Some(session) = self.connect_to_one(now, &prepare, &mut failed) {
                return Ok(session);
            }
        }
        if let Some(session) = self.connect_to_one(silent, &prepare, &mut failed) {
            return Ok(session);
        }
        // What may pass is worth trying again, whatever the others say.
        let main = failed.iter().position(|(_, cause)| is_passing_cause(cause.as_ref())).unwrap_or_default();
        if failed.is_empty() {
            return Err(Error::Connect { address: "(no address)".to_owned(), source: "no host has an address".into() });
        }
        let (address, source) = failed.remove(main);
        let shown = failed.iter().take(SHOWN_CAUSES);
        let others: String =
            shown.map(|(address, cause)| format!("; nor at {address} ({})", chain(cause.as_ref()))).collect();
        let more = failed.len().saturating_sub(SHOWN_CAUSES);
        let more = if more > 0 { format!("; nor at {more} others") } else { String::new() };
        Err(Error::Connect { address: format!("{address}{others}{more}"), source })
    }

    /// A session on the first of these addresses that lets us in; why the others don't is added to what has failed.
    fn connect_to_one(
        &self,
        addresses: Vec<Address>,
        prepare: &(impl Fn(&mut Session) -> Result<(), postgres::Error> + Clone + Send + 'static),
        failed: &mut Vec<(Address, Cause)>,
    ) -> Option<Session> {
        for address in addresses {
            match self.connect(&address, prepare.clone()) {
                Ok(session) => return Some(session),
                Err(cause) => failed.push((address, cause)),
            }
        }
        None
    }

    /// Shuffled, if that was asked for; what was silent comes last.
    fn in_order(&self, mut addresses: Vec<Address>) -> Vec<Address> {
        if self.0.is_shuffled {
            addresses.sort_by_cached_key(|_| random());
        }
        addresses.sort_by_key(|address| self.is_silent(address));
        addresses
    }

    fn is_silent(&self, address: &Address) -> bool {
        let state = lock(&self.0.state);
        state.silent.iter().any(|(silent, since)| silent == address && since.elapsed() < SILENT_FOR)
    }

    /// The addresses of a host.
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
        address: &Address,
        prepare: impl FnOnce(&mut Session) -> Result<(), postgres::Error> + Send + 'static,
    ) -> Result<Session, Cause> {
        let (shared, config) = (Arc::clone(&self.0), self.config_for(address));
        self.limited(address, true, move |logged_in| {
            let mut session = open(&shared, config, logged_in)?;
            prepare(&mut session)?;
            lock(&shared.state).last_success = Some(Instant::now());
            Ok(session)
        })
    }

    fn config_for(&self, address: &Address) -> Config {
        let mut config = self.0.config.clone();
        config.port(address.port);
        match &address.host {
            Some(Host::Tcp(name)) => _ = config.host(name),
            #[cfg(unix)]
            Some(Host::Unix(folder)) => _ = config.host_path(folder),
            None => {}
        }
        if let Some(ip) = address.ip {
            config.hostaddr(ip);
        }
        config
    }

    /// Does on a thread of its own what can't be interrupted. It is left behind after the connect timeout; and after
    /// another one, if it has said by then that it is logged in.
    fn limited<T: Send + 'static>(
        &self,
        address: &Address,
        is_connect: bool,
        work: impl FnOnce(&dyn Fn()) -> Result<T, Cause> + Send + 'static,
    ) -> Result<T, Cause> {
        let under_way = self.begin()?;
        let began = Instant::now();
        let (sender, progress) = mpsc::channel();
        let (connections, route) = (self.clone(), Arc::clone(&self.0.route));
        thread::Builder::new().name("lock-connect".to_owned()).spawn(move || {
            // The driver logs, and the logger is the user's.
            let done = user_code::call(|| work(&|| _ = sender.send(Progress::LoggedIn)));
            let done =
                done.unwrap_or_else(|| Err("the client, or the logger, panicked while a connection was opened".into()));
            let is_open = is_connect && done.is_ok();
            let is_reconnect = is_open && route.ends_interruption();
            drop(under_way);
            // If nobody waits any more, the session is closed here.
            user_code::call(|| drop(sender.send(Progress::Done(done))));
            // Last: whoever is told may take its time, or use the storage, and so wait for this very connection.
            if is_open {
                note!(debug, "opened a connection");
            }
            if is_reconnect {
                route.events.tell(|| Event::Reconnected {});
            }
            drop(connections);
        })?;
        let limit = self.0.connect_timeout;
        let mut progressed = progress.recv_timeout(limit);
        if let Ok(Progress::LoggedIn) = progressed {
            progressed = progress.recv_timeout(limit);
        }
        let silent = &mut lock(&self.0.state).silent;
        silent.retain(|(silent, since)| silent != address && since.elapsed() < SILENT_FOR);
        match progressed {
            Ok(Progress::Done(done)) => {
                if done.is_err() && began.elapsed() >= SLOW_FAILURE {
                    silent.push((address.clone(), Instant::now()));
                }
                done
            }
            Err(RecvTimeoutError::Disconnected) => Err("the thread that opened the connection panicked".into()),
            Ok(Progress::LoggedIn) | Err(RecvTimeoutError::Timeout) => {
                silent.push((address.clone(), Instant::now()));
                let why = format!("no answer within {limit:?} (connect_timeout)");
                Err(io::Error::new(io::ErrorKind::TimedOut, why).into())
            }
        }
    }

    /// Counts what begins, unless too much is stuck: then it waits for something of that to end, or for the next place.
    fn begin(&self) -> Result<UnderWay, Cause> {
        let limit = self.0.connect_timeout;
        let (until, mut state) = (Instant::now() + limit, lock(&self.0.state));
        loop {
            let now = Instant::now();
            let is_stuck = |began: &Instant| {
                now.duration_since(*began) >= limit && state.last_success.is_none_or(|it| it < *began)
            };
            let stuck = state.under_way.values().filter(|began| is_stuck(began)).count();
            if state.stragglers.may_add(stuck, now) {
                let id = state.next_id;
                state.next_id += 1;
                state.under_way.insert(id, now);
                return Ok(UnderWay { connections: self.clone(), id });
            }
            if now >= until {
                let why = format!("{stuck} attempts to connect are stuck, and none ended within {limit:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, why).into());
            }
            state = wait_until(&self.0.changed, state, until);
        }
    }
}

/// Counts an attempt for as long as it is under way, stuck or not.
struct UnderWay {
    connections: Connections,
    id: u64,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        lock(&self.connections.0.state).under_way.remove(&self.id);
        self.connections.0.changed.notify_all();
    }
}

/// Opens a session with our start-up options, or without them where something in the way doesn't take them.
fn open(shared: &Shared, config: Config, logged_in: &dyn Fn()) -> Result<Session, Cause> {
    let route = Arc::clone(&shared.route);
    let generation = route.generation.load(Ordering::Relaxed);
    let connect = |config: Config| {
        look_for_descriptors()?;
        Ok::<_, Cause>(PostgresConnectionManager::new(config, NoTls).connect()?)
    };
    let is_refusal = |cause: &Cause| {
        let code = cause.downcast_ref::<postgres::Error>().and_then(postgres::Error::code);
        code.is_some_and(|code| REFUSED_OPTIONS.contains(code))
    };
    let session = if route.is_pooled.load(Ordering::Relaxed) {
        let client = connect(config)?;
        logged_in();
        Session::new(client, false, route, generation)?
    } else {
        let mut with_options = config.clone();
        with_options.options(
            match config.get_options() {
                Some(options) => format!("{options} {}", sql::SESSION_OPTIONS),
                None => sql::SESSION_OPTIONS.to_owned(),
            }
            .as_str(),
        );
        match connect(with_options) {
            Err(cause) if is_refusal(&cause) => {
                let client = connect(config)?;
                logged_in();
                route.recognise_pooler("it refused the start-up options");
                Session::new(client, false, route, generation)?
            }
            opened => {
                let client = opened?;
                logged_in();
                Session::new(client, true, route, generation)?
            }
        }
    };
    Ok(session)
}

/// The hosts of a configuration, with their ports.
fn hosts(config: &Config) -> Vec<Address> {
    let (hosts, ips, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let port = |at| ports.get(at).or(ports.first()).copied().unwrap_or(5432);
    (0..hosts.len().max(ips.len()))
        .map(|at| Address { host: hosts.get(at).cloned(), ip: ips.get(at).copied(), port: port(at) })
        .collect()
}

/// Everything of a configuration but its hosts, for which one address of one host will stand.
fn without_hosts(config: &Config) -> Config {
    let mut copy = Config::new();
    copy.ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding());
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(dbname) = config.get_dbname() {
        copy.dbname(dbname);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(name) = config.get_application_name() {
        copy.application_name(name);
    }
    if let Some(timeout) = config.get_connect_timeout() {
        copy.connect_timeout(*timeout);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy
}

/// Whether a connection's descriptors can be had: the client, which is about to take them, panics where they can't.
/// Another thread of the program may come between.
fn look_for_descriptors() -> io::Result<()> {
    /// When connections began to take theirs.
    static TAKING: Mutex<Vec<Instant>> = Mutex::new(Vec::new());
    const MOST: usize = 8;

    // In a fork a thread that is no more may have it.
    let taking = TAKING.try_lock().map_or(MOST, |mut taking| {
        taking.retain(|began| began.elapsed() < Duration::from_millis(100));
        taking.push(Instant::now());
        taking.len().min(MOST)
    });
    if cfg!(unix) {
        let tried: io::Result<Vec<_>> = (0..taking * DESCRIPTORS / 2).map(|_| io::pipe()).collect();
        // EMFILE and ENFILE. What else may be wrong with a pipe says nothing about a socket.
        if let Err(error) = tried
            && matches!(error.raw_os_error(), Some(23 | 24))
        {
            return Err(error);
        }
    }
    Ok(())
}
