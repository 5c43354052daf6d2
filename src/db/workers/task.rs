//! A task: one copy of a call, as a worker runs it.
//!
//! Uses `db::answer`, `db::session`, `error` and `sync`.

use std::sync::Arc;
use std::time::Duration;

use super::slot::{Failed, Reply, Slot};
use super::worker::{WorkerEntry, contained};
use super::{MAX_TRIES, Tries, Urgency};
use crate::db::answer::Fault;
use crate::db::session::Session;
use crate::error::{Error, Result};
use crate::sync::Instant;

/// What runs a task. It gets a session, or the reason why there is none, and the entry of the worker that runs it. It
/// returns what is left to do.
pub(super) type Step = Box<dyn FnMut(Result<&mut Session>, &WorkerEntry<'_>) -> Next + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Done,
    /// Nobody wanted the result any more, and the session was not used.
    Skipped,
    /// The task is to be made again on another session.
    TryAgain,
}

pub(super) struct Task {
    pub(super) urgency: Urgency,
    pub(super) submitted: Instant,
    pub(super) deadline: Instant,
    /// When the task has run for so long, another worker may be started in place of its own.
    pub(super) answer_time: Duration,
    pub(super) step: Step,
}

/// The step that runs a call on a worker, and answers its caller.
pub(super) fn call_step<T: Send + 'static>(
    slot: &Arc<Slot<T>>,
    tries: Tries,
    action: impl Fn() -> String + Send + 'static,
    mut call: impl FnMut(&mut Session) -> Result<T, Fault> + Send + 'static,
    late: impl FnOnce(&mut Session, T) + Send + 'static,
) -> Step {
    let mut caller = Some((Reply::new(slot), late));
    let (mut tried, mut is_unknown) = (0, false);
    Box::new(move |session, entry| {
        let Some((reply, _)) = &caller else { return Next::Skipped };
        let result = match session {
            Err(error) => Err(Failed { error, is_unknown, is_connection_fault: false }),
            Ok(session) => {
                if !reply.start() {
                    return Next::Skipped;
                }
                tried += 1;
                match contained(session, &mut call) {
                    Ok(value) => Ok((session, value)),
                    Err(fault) => {
                        is_unknown |= fault.is_outcome_unknown();
                        let is_connection_fault = fault.is_connection_fault();
                        let may_again = is_connection_fault && tries == Tries::Several && tried < MAX_TRIES;
                        if may_again && reply.is_wanted() {
                            return Next::TryAgain;
                        }
                        Err(Failed { error: fault.into_error(&action), is_unknown, is_connection_fault })
                    }
                }
            }
        };
        if let Some((reply, late)) = caller.take() {
            match result {
                Ok((session, value)) => {
                    if let Err(Ok(value)) = reply.send(Ok(value), entry) {
                        late(session, value);
                    }
                }
                // A failure that comes too late concerns nobody.
                Err(failed) => drop(reply.send(Err(failed), entry)),
            }
        }
        Next::Done
    })
}

impl Fault {
    pub(crate) fn into_error(self, action: impl Fn() -> String) -> Error {
        match self {
            Fault::Postgres(source) => Error::Database { action: action(), source },
            // Each of the tries met another pooler. That can't happen twice: the first pooler turned prepared
            // statements off.
            Fault::Pooled => {
                Error::Timeout { action: action(), waiting_for: "a session of our own", after: Duration::ZERO }
            }
            Fault::Panicked => Error::Thread { source: std::io::Error::other("the logger panicked within a call") },
        }
    }
}
