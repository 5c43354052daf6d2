//! Runs what can't be interrupted on a thread of its own, which is left behind when its time is over.
//!
//! No mutex is held across the work, or while the caller waits for it. Uses `events`, `error`, `user_code` and `sync`.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::hosts::Address;
use super::{Connections, SILENT_FOR};
use crate::error::{Cause, Result};
use crate::events::Event;
use crate::sync::{lock, wait_until};
use crate::user_code::{self, log_at};

/// An address that took so long to fail counts as silent.
const SLOW_FAILURE: Duration = Duration::from_secs(1);

/// How far a thread has come.
enum Progress<T> {
    /// What is left to do has the same time again.
    LoggedIn,
    Done(Result<T, Cause>),
}

impl Connections {
    /// Runs `work`, which can't be interrupted, on a thread of its own. The thread is left behind after the connect
    /// timeout. If it reports by then that it is logged in, it has the connect timeout once more.
    pub(super) fn limited<T: Send + 'static>(
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
            // The driver logs, and the logger is user code.
            let done = user_code::call(|| work(&|| _ = sender.send(Progress::LoggedIn)));
            let done =
                done.unwrap_or_else(|| Err("the client, or the logger, panicked while a connection was opened".into()));
            let is_open = is_connect && done.is_ok();
            let is_reconnect = is_open && route.end_interruption();
            drop(under_way);
            // If the caller doesn't wait any more, the session is closed here.
            user_code::call(|| drop(sender.send(Progress::Done(done))));
            // The line and the event come last. The logger and the callback may be slow. They may also use the storage,
            // and so wait for this very connection.
            if is_open {
                log_at!(debug, "opened a connection");
            }
            if is_reconnect {
                route.events.send(|| Event::Reconnected {});
            }
            drop(connections);
        })?;
        self.wait_for(&progress, address, began)
    }

    /// Waits for what came of an attempt, and notes whether its address was silent.
    fn wait_for<T>(&self, progress: &Receiver<Progress<T>>, address: &Address, began: Instant) -> Result<T, Cause> {
        let limit = self.connect_timeout();
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

    /// Counts an attempt that begins. While too many are stuck, first waits for one of them to end, or until the limit
    /// allows one more. Fails after the connect timeout.
    fn begin(&self) -> Result<UnderWay, Cause> {
        let limit = self.connect_timeout();
        let (until, mut state) = (Instant::now() + limit, lock(&self.0.state));
        loop {
            let now = Instant::now();
            let is_stuck = |began: &Instant| {
                now.duration_since(*began) >= limit && state.last_success.is_none_or(|it| it < *began)
            };
            let stuck = state.under_way.values().filter(|began| is_stuck(began)).count();
            if state.stuck_limit.may_add(stuck, now) {
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
