//! Opens a session at one address. Uses `db::route`, `db::session`, `db::sql` and `error`.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use postgres::Config;
use postgres::error::SqlState;

use super::Shared;
use crate::db::server::Link;
use crate::db::session::Session;
use crate::db::sql;
use crate::error::Cause;

/// More descriptors than the client needs to open a connection. The client panics if it gets none.
const DESCRIPTORS: usize = 8;
/// The errors of a server, or of a pooler in front of it, that doesn't know our start-up options.
const REFUSED_OPTIONS: [SqlState; 3] =
    [SqlState::PROTOCOL_VIOLATION, SqlState::FEATURE_NOT_SUPPORTED, SqlState::UNDEFINED_OBJECT];

/// What is missing in a container whose user is only a number.
const NAMELESS: &str = "no user is named, and the one that runs this process has no name: set `user`";

/// Opens a session with our start-up options, or without them if something on the way refuses them.
pub(super) fn open(shared: &Shared, config: Config, logged_in: &dyn Fn()) -> Result<Session, Cause> {
    let route = Arc::clone(&shared.route);
    let generation = route.generation.load(Ordering::Relaxed);
    let connect = |config: Config| {
        look_for_descriptors()?;
        (shared.server.connect)(&config)
            .map_err(|cause| if is_nameless(&config, &cause) { NAMELESS.into() } else { cause })
    };
    let is_refusal = |cause: &Cause| {
        let code = cause.downcast_ref::<postgres::Error>().and_then(postgres::Error::code);
        code.is_some_and(|code| REFUSED_OPTIONS.contains(code))
    };
    let session = if route.is_pooled.load(Ordering::Relaxed) {
        let client = connect(config)?;
        logged_in();
        Session::new(Link::Own(client), false, route, generation)?
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
                Session::new(Link::Own(client), false, route, generation)?
            }
            opened => {
                let client = opened?;
                logged_in();
                Session::new(Link::Own(client), true, route, generation)?
            }
        }
    };
    Ok(session)
}

/// Whether the client looked for the name of the user that runs this process, and there is none: it then fails before
/// it says anything to the server.
fn is_nameless(config: &Config, cause: &Cause) -> bool {
    let error = cause.downcast_ref::<postgres::Error>();
    let source = error.and_then(std::error::Error::source).and_then(|source| source.downcast_ref::<io::Error>());
    let is_missing = source.is_some_and(|source| source.kind() == io::ErrorKind::NotFound);
    // A socket that is missing is an error of connecting.
    is_missing && config.get_user().is_none() && error.is_some_and(|it| it.to_string().contains("communicating"))
}

/// Fails if a connection's file descriptors are not available: the client would panic where it fails to get them.
/// Another thread of the program may still take them before the client does.
fn look_for_descriptors() -> io::Result<()> {
    /// When the latest connections began to take their descriptors.
    static TAKING: Mutex<Vec<Instant>> = Mutex::new(Vec::new());
    const MOST: usize = 8;

    // Never wait here: in a forked process, the mutex may be locked by a thread that exists only in the parent.
    let taking = TAKING.try_lock().map_or(MOST, |mut taking| {
        taking.retain(|began| began.elapsed() < Duration::from_millis(100));
        taking.push(Instant::now());
        taking.len().min(MOST)
    });
    if cfg!(unix) {
        let tried: io::Result<Vec<_>> = (0..taking * DESCRIPTORS / 2).map(|_| io::pipe()).collect();
        // EMFILE and ENFILE. Any other error of a pipe says nothing about a socket.
        if let Err(error) = tried
            && matches!(error.raw_os_error(), Some(23 | 24))
        {
            return Err(error);
        }
    }
    Ok(())
}
