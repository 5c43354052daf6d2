//! Opening and pooling connections.
//!
//! `r2d2` keeps the pool. Its own way of opening hides errors (it keeps the text of the last one only, and repeats for ever
//! in the background while a caller waits for its whole timeout), and a server that accepts and never answers would
//! hold its few threads. So what `r2d2` opens is an *attempt*, made on a thread of its own, which the caller awaits
//! for as long as it likes; one that nobody awaits any more stays in the pool for the next caller.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use postgres::error::SqlState;
use postgres::{Config, NoTls};
use r2d2::{ManageConnection, NopErrorHandler, Pool, PooledConnection};
use r2d2_postgres::PostgresConnectionManager;

use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::session::{Route, Session};
use crate::sql;
use crate::stragglers::{self, Stragglers};
use crate::user_code::{self, note};

/// What opening may take beyond the client's own `connect_timeout`, which covers the socket and not the log-in: the
/// client's error is the better one.
const OPENING_SLACK: Duration = Duration::from_millis(250);
/// How often each of several attempts is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// What a server, or a pooler before it, says of start-up options that it doesn't know.
const REFUSED_OPTIONS: [SqlState; 3] =
    [SqlState::PROTOCOL_VIOLATION, SqlState::FEATURE_NOT_SUPPORTED, SqlState::UNDEFINED_OBJECT];

/// The pool of a storage.
#[derive(Clone)]
pub(crate) struct Connections {
    pool: Pool<Opener>,
    /// For connections that don't belong into the pool.
    opener: Opener,
}

/// A session that is checked out; it goes back into the pool, or is closed if it can't be used again.
pub(crate) struct CheckedOut(PooledConnection<Opener>);

impl Connections {
    pub(crate) fn new(config: Config, max_connections: u32, events: Events) -> Connections {
        let hosts = config.get_hosts().len().max(config.get_hostaddrs().len()).max(1);
        let connect_timeout = config.get_connect_timeout().copied().unwrap_or_default();
        let opening_time = connect_timeout.saturating_mul(u32::try_from(hosts).unwrap_or(u32::MAX)) + OPENING_SLACK;
        let opener = Opener {
            config,
            max_connections: max_connections as usize,
            opening_time,
            route: Arc::new(Route::new(events)),
            under_way: Arc::default(),
            stragglers: Arc::default(),
        };
        let pool = Pool::builder()
            .max_size(max_connections.saturating_add(stragglers::MAX as u32))
            .min_idle(Some(0))
            .test_on_check_out(false)
            // Connections are kept by workers, which close them. What `r2d2` holds is an attempt that nobody awaited;
            // looking for its age would keep a closed pool's threads for half a minute.
            .idle_timeout(None)
            .max_lifetime(None)
            .error_handler(Box::new(NopErrorHandler))
            .build_unchecked(opener.clone());
        // What is opened apart doesn't count with the pool's.
        let opener = Opener { under_way: Arc::default(), stragglers: Arc::default(), max_connections: 1, ..opener };
        Connections { pool, opener }
    }

    /// How long it may take at most to open a connection.
    pub(crate) fn opening_time(&self) -> Duration {
        self.opener.opening_time
    }

    /// A session beside the pool, made ready by `prepare`.
    pub(crate) fn open_apart(
        &self,
        prepare: impl FnOnce(&mut Session) -> Result<(), postgres::Error> + Send + 'static,
    ) -> Result<Box<Session>> {
        let began = Instant::now();
        let mut attempt = self.opener.attempt(prepare);
        match attempt.wait(self.opening_time()) {
            Err((_, Some(error))) => Err(error),
            _ => match attempt {
                Attempt::Open(session) => Ok(session),
                _ => Err(opening_timed_out(began.elapsed())),
            },
        }
    }

    /// What was left behind since is not needed any more, and would stay open for nobody.
    fn only(&self, open: PooledConnection<Opener>) -> CheckedOut {
        while let Some(mut surplus) = self.pool.try_get() {
            *surplus = Attempt::Failed;
        }
        CheckedOut(open)
    }

    /// An open session, before `deadline`. An attempt that an earlier caller left behind may be stuck, so it is awaited
    /// beside a fresh one, whichever is first.
    pub(crate) fn check_out(&self, deadline: Instant) -> Result<CheckedOut> {
        let started = Instant::now();
        let mut under_way: Vec<PooledConnection<Opener>> = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(opening_timed_out(started.elapsed()));
            }
            let attempt = self.pool.get_timeout(left).map_err(|_| opening_timed_out(started.elapsed()))?;
            match &*attempt {
                Attempt::Open(session) if session.is_usable() => return Ok(self.only(attempt)),
                Attempt::Open(_) | Attempt::Failed => {}
                Attempt::UnderWay { began, .. } => {
                    let is_fresh = *began >= started;
                    under_way.push(attempt);
                    if is_fresh {
                        break;
                    }
                }
            }
        }
        loop {
            let patience = if under_way.len() == 1 { deadline.saturating_duration_since(Instant::now()) } else { LOOK };
            let mut still_under_way = Vec::new();
            let mut open = None;
            for mut attempt in under_way {
                if open.is_some() {
                    // One is enough: the thread that opens it will close it.
                    *attempt = Attempt::Failed;
                    continue;
                }
                match attempt.wait(patience) {
                    Ok(true) => open = Some(attempt),
                    Ok(false) => still_under_way.push(attempt),
                    // What became of the others says nothing about now.
                    Err((began, Some(error))) if began >= started => return Err(error),
                    Err(_) => {}
                }
            }
            if let Some(open) = open {
                still_under_way.iter_mut().for_each(|surplus| **surplus = Attempt::Failed);
                return Ok(self.only(open));
            }
            under_way = still_under_way;
            if under_way.is_empty() || deadline <= Instant::now() {
                return Err(opening_timed_out(started.elapsed()));
            }
        }
    }
}

impl CheckedOut {
    /// The session, if it may be used (again).
    pub(crate) fn usable(&mut self) -> Option<&mut Session> {
        match &mut *self.0 {
            Attempt::Open(session) if session.is_usable() => Some(session),
            _ => None,
        }
    }

    /// Closes the connection instead of putting it back.
    pub(crate) fn close(mut self) {
        *self.0 = Attempt::Failed;
    }
}

/// An attempt to open a connection, and what came of it.
enum Attempt {
    UnderWay { result: Receiver<Result<Session>>, began: Instant, give_up_at: Instant },
    Open(Box<Session>),
    Failed,
}

impl Attempt {
    /// Whether it may stay in the pool.
    fn is_usable(&self) -> bool {
        match self {
            Attempt::UnderWay { give_up_at, .. } => Instant::now() < *give_up_at,
            Attempt::Open(session) => session.is_usable(),
            Attempt::Failed => false,
        }
    }

    /// Waits for what is under way: whether it is open; or when it began, and why it failed, if it was made at all.
    fn wait(&mut self, patience: Duration) -> Result<bool, (Instant, Option<Error>)> {
        let Attempt::UnderWay { result, began, give_up_at } = &*self else { return Ok(true) };
        let (began, until) = (*began, give_up_at.saturating_duration_since(Instant::now()));
        let error = match result.recv_timeout(patience.min(until)) {
            Ok(Ok(session)) => {
                *self = Attempt::Open(Box::new(session));
                return Ok(true);
            }
            Ok(Err(error)) => Some(error),
            Err(RecvTimeoutError::Timeout) if Instant::now() < *give_up_at => return Ok(false),
            Err(RecvTimeoutError::Timeout) => Some(opening_timed_out(began.elapsed())),
            // Not made, because too many are stuck; or its thread panicked.
            Err(RecvTimeoutError::Disconnected) => None,
        };
        *self = Attempt::Failed;
        Err((began, error))
    }
}

#[derive(Clone, Debug)]
struct Opener {
    config: Config,
    max_connections: usize,
    opening_time: Duration,
    route: Arc<Route>,
    under_way: Arc<AtomicUsize>,
    stragglers: Arc<Mutex<Stragglers>>,
}

impl Opener {
    /// Starts to open a session and to make it ready, on a thread of its own.
    fn attempt(&self, prepare: impl FnOnce(&mut Session) -> Result<(), postgres::Error> + Send + 'static) -> Attempt {
        let began = Instant::now();
        let (sender, result) = mpsc::sync_channel(1);
        let under_way = UnderWay::new(&self.under_way);
        let stuck = under_way.others().saturating_sub(self.max_connections);
        if self.stragglers.lock().unwrap_or_else(PoisonError::into_inner).may_add(stuck, began) {
            let (config, route, failed) = (self.config.clone(), Arc::clone(&self.route), sender.clone());
            let started = thread::Builder::new().name("lock-connect".to_owned()).spawn(move || {
                // The driver logs, and the logger is the user's.
                let opened = user_code::call(|| {
                    let mut session = open(&config, Arc::clone(&route))?;
                    prepare(&mut session)?;
                    Ok(session)
                });
                let opened = opened.map(|opened| opened.map_err(|source| Error::Connect { source }));
                let opened = opened.unwrap_or_else(|| Err(panicked()));
                let is_reconnect = opened.is_ok() && route.ends_interruption();
                drop(under_way);
                // If nobody waits any more, the session is closed here.
                user_code::call(|| drop(sender.send(opened)));
                // Last: whoever is told may take its time, or use the storage, and so wait for this very connection.
                if is_reconnect {
                    route.events.tell(|| Event::Reconnected {});
                }
            });
            if let Err(source) = started {
                drop(failed.send(Err(Error::Thread { source })));
            }
        }
        Attempt::UnderWay { result, began, give_up_at: began + self.opening_time }
    }
}

impl ManageConnection for Opener {
    type Connection = Attempt;
    type Error = std::convert::Infallible;

    fn connect(&self) -> Result<Attempt, Self::Error> {
        Ok(self.attempt(|_| Ok(())))
    }

    fn is_valid(&self, _: &mut Attempt) -> Result<(), Self::Error> {
        Ok(())
    }

    fn has_broken(&self, attempt: &mut Attempt) -> bool {
        !attempt.is_usable()
    }
}

/// Opens a session with our start-up options, or without them where something in the way doesn't take them.
fn open(config: &Config, route: Arc<Route>) -> Result<Session, postgres::Error> {
    let generation = route.generation.load(Ordering::Relaxed);
    let connect = |config: Config| PostgresConnectionManager::new(config, NoTls).connect();
    let session = if route.is_pooled.load(Ordering::Relaxed) {
        Session::new(connect(config.clone())?, false, route, generation)?
    } else {
        let mut with_options = config.clone();
        with_options.options(&match config.get_options() {
            Some(options) => format!("{options} {}", sql::SESSION_OPTIONS),
            None => sql::SESSION_OPTIONS.to_owned(),
        });
        match connect(with_options) {
            Err(error) if error.code().is_some_and(|code| REFUSED_OPTIONS.contains(code)) => {
                let client = connect(config.clone())?;
                route.recognise_pooler("it refused the start-up options");
                Session::new(client, false, route, generation)?
            }
            opened => Session::new(opened?, true, route, generation)?,
        }
    };
    note!(debug, "opened a connection");
    Ok(session)
}

fn panicked() -> Error {
    Error::Thread { source: std::io::Error::other("the logger panicked while a connection was opened") }
}

fn opening_timed_out(after: Duration) -> Error {
    Error::Timeout { action: "open a connection".to_owned(), waiting_for: "PostgreSQL to let us in", after }
}

/// Counts an attempt for as long as it is under way, stuck or not.
struct UnderWay(Arc<AtomicUsize>);

impl UnderWay {
    fn new(count: &Arc<AtomicUsize>) -> UnderWay {
        count.fetch_add(1, Ordering::Relaxed);
        UnderWay(Arc::clone(count))
    }

    fn others(&self) -> usize {
        self.0.load(Ordering::Relaxed).saturating_sub(1)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
