//! Connections to the model server. To open one is as slow and as lossy as to use it.
//!
//! Stands in for `db::connections` under the model checker. Uses `db::session` (the model's), `events` and `error`.

use std::sync::Arc;
use std::time::Duration;

use crate::db::server::Server;
use crate::db::session::Session;
use crate::error::{Error, Result};
use crate::events::Events;

#[derive(Clone)]
pub(crate) struct Connections(Arc<()>);

impl Connections {
    pub(crate) fn new(_: Server, _: Events) -> Connections {
        Connections(Arc::default())
    }

    pub(crate) fn opening_time(&self) -> Duration {
        Duration::from_secs(5)
    }

    pub(crate) fn for_listening(&self) -> Option<Connections> {
        Some(self.clone())
    }

    pub(crate) fn is_lent(&self) -> bool {
        false
    }

    pub(crate) fn suspect(&self) {}

    pub(crate) fn open(&self, prepare: impl Fn(&mut Session) -> Result<(), postgres::Error>) -> Result<Session> {
        let opened = Session::open().and_then(|mut session| prepare(&mut session).map(|()| session));
        opened.map_err(|source| Error::Connect { address: "the model".to_owned(), source: source.into() })
    }
}
