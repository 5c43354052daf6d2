//! The list of all held locks.
//!
//! A list runs on its own thread, and on its own connection where one can be opened. One list runs at a time.
//! Uses `db` and the modules below it.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use crate::db::answer::LockInformation;
use crate::error::{Error, Result};
use crate::storage::PostgresStorage;
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};
use crate::user_code;

/// The longest that a list may take.
const LIST_TIME: Duration = Duration::from_secs(60);
/// The longest that a list may take on a connection that other calls need.
const SHORT_LIST_TIME: Duration = Duration::from_secs(1);
/// How many lists may run or be stuck at the same time.
const MAX_LISTS: usize = 8;

impl PostgresStorage {
    /// The locks that are held now, by lock id.
    ///
    /// Reads the whole table on its own connection, one list at a time. Where no further connection can be opened, the
    /// list reads on one of the other connections, for a second at most.
    ///
    /// Blocks for at most the connect timeout, for each address, plus 60 s.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn list(&self) -> Result<Vec<LockInformation>> {
        self.check_process()?;
        let (began, action) = (Instant::now(), || "list the locks".to_owned());
        let longest = self.inner.workers.longest_call(LIST_TIME);
        let timeout = |waiting_for| Error::Timeout { action: action(), waiting_for, after: began.elapsed() };
        let Some(permit) = ListPermit::take(&self.inner.lists, began + longest, longest) else {
            return Err(timeout("the list before to end"));
        };
        if self.inner.workers.connections().is_lent() {
            let deadline = began + longest;
            return self.read_until(deadline, action(), |session, sql| session.list(sql, LIST_TIME));
        }
        let (sender, listed) = mpsc::channel();
        let (connections, sql) = (self.inner.workers.connections().clone(), Arc::clone(&self.inner.sql));
        let list = move || {
            let opened = connections.open(|_| Ok(()));
            let listed = opened.map(|mut session| session.list(&sql, LIST_TIME));
            drop(permit);
            drop(sender.send(listed));
        };
        let thread = thread::Builder::new().name("lock-list".to_owned()).spawn(move || user_code::call(list));
        let opened = match thread {
            Ok(_) => listed.recv_timeout((began + longest).saturating_duration_since(Instant::now())),
            Err(source) => Ok(Err(Error::Thread { source })),
        };
        match opened {
            Ok(Ok(listed)) => listed.map_err(|fault| fault.into_error(action)),
            Ok(Err(error)) if error.is_transient() => {
                let deadline = (began + longest).min(Instant::now() + self.longest_call());
                self.read_until(deadline, action(), |session, sql| session.list(sql, SHORT_LIST_TIME)).or(Err(error))
            }
            Ok(Err(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => Err(timeout("an answer")),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::Thread { source: io::Error::other("the client, or the logger, panicked") })
            }
        }
    }
}

/// When each of the lists began that are running now.
#[derive(Default)]
pub(super) struct Lists {
    began: Mutex<Vec<Instant>>,
    ended: Condvar,
}

/// The permission to run one list, with the instant at which it began.
struct ListPermit(Arc<Lists>, Instant);

impl ListPermit {
    /// Waits until no other list runs. A list that has run for `longest` counts as stuck, and isn't waited for. None if
    /// `deadline` comes first.
    fn take(lists: &Arc<Lists>, deadline: Instant, longest: Duration) -> Option<ListPermit> {
        let mut began = lock(&lists.began);
        loop {
            let now = Instant::now();
            if began.len() < MAX_LISTS && began.iter().all(|began| now.duration_since(*began) >= longest) {
                began.push(now);
                return Some(ListPermit(Arc::clone(lists), now));
            }
            if now >= deadline {
                return None;
            }
            let stuck_at = began.iter().max().and_then(|newest| newest.checked_add(longest));
            began = wait_until(&lists.ended, began, stuck_at.map_or(deadline, |at| at.min(deadline)));
        }
    }
}

impl Drop for ListPermit {
    fn drop(&mut self) {
        let mut began = lock(&self.0.began);
        if let Some(own) = began.iter().position(|began| *began == self.1) {
            began.swap_remove(own);
        }
        self.0.ended.notify_all();
    }
}
