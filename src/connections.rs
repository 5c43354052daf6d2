//! Opening and pooling connections.
//!
//! `r2d2` keeps the pool. Its own ways of opening would hide errors (it keeps the text of the last one only, retries in the
//! background for ever, and a caller waits for its whole timeout) and can be stuck in a server that accepts and
//! never answers. So here an attempt to open always succeeds as far as `r2d2` can tell: what it puts into the pool is the
//! *outcome* of the attempt, made on a thread of its own that can be left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::{Config, NoTls};
use r2d2::{ManageConnection, NopErrorHandler, Pool, PooledConnection};
use r2d2_postgres::PostgresConnectionManager;

use crate::error::{Error, Result};
use crate::session::{Route, Session};
use crate::sql;

/// How many connections may be around beyond `max_connections`, because a call is stuck in them; the same number of attempts
/// to open one may be.
pub(crate) const MAX_STUCK: usize = 8;
/// What opening may take beyond the client's own `connect_timeout`, which covers the socket and not the log-in: the
/// client's error is the better one.
const OPENING_SLACK: Duration = Duration::from_millis(250);
/// A connection that isn't used is closed after this; `r2d2` looks every 30 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Old connections are replaced, for servers that moved behind the same name.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);

/// The pool of a storage.
#[derive(Clone)]
pub(crate) struct Connections {
    pool: Pool<Opener>,
    opening_time: Duration,
}

/// A session that is checked out; it goes back into the pool, or is closed if it can't be used again.
pub(crate) struct CheckedOut(PooledConnection<Opener>);

impl Connections {
    pub(crate) fn new(config: Config, max_connections: u32) -> Connections {
        let hosts = config.get_hosts().len().max(config.get_hostaddrs().len()).max(1);
        let connect_timeout = config.get_connect_timeout().copied().unwrap_or_default();
        let opening_time = connect_timeout.saturating_mul(u32::try_from(hosts).unwrap_or(u32::MAX)) + OPENING_SLACK;
        let opener = Opener { config, time: opening_time, route: Arc::default(), under_way: Arc::default() };
        let pool = Pool::builder()
            .max_size(max_connections.saturating_add(MAX_STUCK as u32))
            .min_idle(Some(0))
            .test_on_check_out(false)
            .idle_timeout(Some(IDLE_TIMEOUT))
            .max_lifetime(Some(MAX_LIFETIME))
            .error_handler(Box::new(NopErrorHandler))
            .build_unchecked(opener);
        Connections { pool, opening_time }
    }

    /// How long it may take at most to open a connection.
    pub(crate) fn opening_time(&self) -> Duration {
        self.opening_time
    }

    /// An open session, before `deadline`.
    pub(crate) fn check_out(&self, deadline: Instant) -> Result<CheckedOut> {
        let started = Instant::now();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut outcome = self.pool.get_timeout(left).map_err(|_| opening_timed_out(started.elapsed()))?;
            match &mut *outcome {
                Outcome::Open(session) if session.is_usable() => return Ok(CheckedOut(outcome)),
                // What another caller didn't wait for: a failure of the past.
                Outcome::Failed { at, .. } if *at < started => {}
                Outcome::Failed { error, .. } => {
                    if let Some(error) = error.take() {
                        return Err(error);
                    }
                }
                Outcome::Open(_) => {}
            }
        }
    }
}

impl CheckedOut {
    pub(crate) fn session(&mut self) -> Option<&mut Session> {
        match &mut *self.0 {
            Outcome::Open(session) => Some(session),
            Outcome::Failed { .. } => None,
        }
    }
}

/// What came of an attempt to open a connection.
enum Outcome {
    Open(Session),
    Failed { error: Option<Error>, at: Instant },
}

#[derive(Debug)]
struct Opener {
    config: Config,
    time: Duration,
    route: Arc<Route>,
    under_way: Arc<AtomicUsize>,
}

impl ManageConnection for Opener {
    type Connection = Outcome;
    type Error = std::convert::Infallible;

    fn connect(&self) -> Result<Outcome, Self::Error> {
        Ok(self
            .open_in_time()
            .map_or_else(|error| Outcome::Failed { error: Some(error), at: Instant::now() }, Outcome::Open))
    }

    fn is_valid(&self, _: &mut Outcome) -> Result<(), Self::Error> {
        Ok(())
    }

    fn has_broken(&self, outcome: &mut Outcome) -> bool {
        match outcome {
            Outcome::Open(session) => !session.is_usable(),
            Outcome::Failed { .. } => true,
        }
    }
}

impl Opener {
    fn open_in_time(&self) -> Result<Session> {
        let attempt = UnderWay::new(&self.under_way).ok_or(Error::Timeout {
            action: "open a connection".to_owned(),
            waiting_for: "earlier attempts, all of which are stuck",
            after: Duration::ZERO,
        })?;
        let (config, route) = (self.config.clone(), Arc::clone(&self.route));
        let (sender, receiver) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("lock-connect".to_owned())
            .spawn(move || {
                let _attempt = attempt;
                // Nobody waits any more: the session is closed here.
                drop(sender.send(open(config, route)));
            })
            .map_err(|source| Error::Thread { source })?;
        match receiver.recv_timeout(self.time) {
            Ok(opened) => opened.map_err(|source| Error::Connect { source }),
            Err(_) => Err(opening_timed_out(self.time)),
        }
    }
}

fn open(config: Config, route: Arc<Route>) -> Result<Session, postgres::Error> {
    let generation = route.generation.load(Ordering::Relaxed);
    if !route.is_pooled.load(Ordering::Relaxed) {
        let mut with_options = config.clone();
        with_options.options(&match config.get_options() {
            Some(options) => format!("{options} {}", sql::SESSION_OPTIONS),
            None => sql::SESSION_OPTIONS.to_owned(),
        });
        match PostgresConnectionManager::new(with_options, NoTls).connect() {
            Err(error) if error.code() == Some(&SqlState::PROTOCOL_VIOLATION) => {
                route.recognise_pooler("it refused the start-up options");
            }
            opened => {
                log::debug!(target: "storage_lock", "opened a connection: {}", outcome_of(&opened));
                return Session::new(opened?, true, route, generation);
            }
        }
    }
    let opened = PostgresConnectionManager::new(config, NoTls).connect();
    log::debug!(target: "storage_lock", "opened a connection through a pooler: {}", outcome_of(&opened));
    Session::new(opened?, false, route, generation)
}

fn outcome_of<T>(opened: &Result<T, postgres::Error>) -> String {
    opened.as_ref().map_or_else(ToString::to_string, |_| "ok".to_owned())
}

fn opening_timed_out(after: Duration) -> Error {
    Error::Timeout { action: "open a connection".to_owned(), waiting_for: "PostgreSQL to let us in", after }
}

/// Counts an attempt for as long as it is under way, stuck or not.
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn new(count: &Arc<AtomicUsize>) -> Option<UnderWay> {
        let count = UnderWay(Arc::clone(count));
        // The sum includes this one, and is taken back by drop.
        (count.0.fetch_add(1, Ordering::Relaxed) < MAX_STUCK).then_some(count)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
