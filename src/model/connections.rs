//! Connections to the toy server: there is always another one.

use std::sync::Arc;
use std::time::Duration;

use postgres::Config;

use crate::error::{Error, Result};
use crate::events::Events;
use crate::session::Session;
use crate::sync::Instant;

/// Something that is dropped, like the real ones.
#[derive(Clone)]
pub(crate) struct Connections(Arc<()>);

pub(crate) struct CheckedOut(Session);

impl Connections {
    pub(crate) fn new(_: Config, _: u32, _: Events) -> Connections {
        Connections(Arc::new(()))
    }

    pub(crate) fn opening_time(&self) -> Duration {
        Duration::from_secs(5)
    }

    pub(crate) fn open_apart(
        &self,
        prepare: impl FnOnce(&mut Session) -> Result<(), postgres::Error>,
    ) -> Result<Box<Session>> {
        let mut session = Session::new();
        prepare(&mut session).map_err(|source| Error::Connect { source })?;
        Ok(Box::new(session))
    }

    pub(crate) fn check_out(&self, _: Instant) -> Result<CheckedOut> {
        Ok(CheckedOut(Session::new()))
    }
}

impl CheckedOut {
    pub(crate) fn usable(&mut self) -> Option<&mut Session> {
        if self.0.is_broken { None } else { Some(&mut self.0) }
    }

    pub(crate) fn close(self) {}
}
