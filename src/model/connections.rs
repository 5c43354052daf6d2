//! Connections to the toy server, as slow and as lossy to open as what is sent on them.

use std::sync::Arc;
use std::time::Duration;

use postgres::Config;

use crate::error::{Error, Result};
use crate::events::Events;
use crate::session::Session;

#[derive(Clone)]
pub(crate) struct Connections(Arc<()>);

impl Connections {
    pub(crate) fn new(_: &Config, _: Events) -> Connections {
        Connections(Arc::default())
    }

    pub(crate) fn opening_time(&self) -> Duration {
        Duration::from_secs(5)
    }

    pub(crate) fn doubt(&self) {}

    pub(crate) fn open(&self, prepare: impl Fn(&mut Session) -> Result<(), postgres::Error>) -> Result<Session> {
        let opened = Session::open().and_then(|mut session| prepare(&mut session).map(|()| session));
        opened.map_err(|source| Error::Connect { address: "the toy".to_owned(), source: source.into() })
    }
}
