//! Where a caller waits for the answer to its call, and how a worker answers.
//!
//! A slot's mutex decides whether an answer is in time: `is_over` is set once, by the caller that gives up or by the
//! answer that it gets. Uses `error` and `sync`.

use std::sync::Arc;

use super::worker::WorkerEntry;
use crate::error::{Error, Result};
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};

/// The answer to a call.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) value: T,
    /// The call was made more than once. Another copy may have taken effect before the one that was answered.
    pub(crate) is_repeated: bool,
}

/// Why a call has no answer.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: Error,
    /// The call may have taken effect, or may yet do so.
    pub(crate) is_unknown: bool,
    /// The same call may work on another connection.
    pub(crate) is_connection_fault: bool,
}

#[cfg(test)]
impl Failed {
    /// The failure of a call that was not made.
    pub(crate) fn with(error: Error) -> Failed {
        Failed { error, is_unknown: false, is_connection_fault: false }
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Error {
        failed.error
    }
}

/// Where a caller waits for its answer.
pub(super) struct Slot<T> {
    state: Mutex<SlotState<T>>,
    answered: Condvar,
}

struct SlotState<T> {
    answer: Option<Result<T, Failed>>,
    /// How many copies of the call may yet answer.
    expected: u32,
    /// The failure of the first copy that failed, while others may yet answer.
    failed: Option<Failed>,
    /// Since when the call has had a connection, and how often it was made.
    started: Option<Instant>,
    starts: u32,
    /// Another connection has answered while this call was silent.
    is_overtaken: bool,
    /// The caller has gone, or has its answer.
    is_over: bool,
}

/// What a caller knows while it has no answer.
pub(super) struct Waited {
    /// Since when the call has been running, if it was started.
    pub(super) started: Option<Instant>,
    pub(super) is_overtaken: bool,
}

impl<T> Slot<T> {
    pub(super) fn new() -> Arc<Slot<T>> {
        let state = SlotState {
            answer: None,
            expected: 1,
            failed: None,
            started: None,
            starts: 0,
            is_overtaken: false,
            is_over: false,
        };
        Arc::new(Slot { state: Mutex::new(state), answered: Condvar::new() })
    }

    /// Counts a further copy of the call.
    pub(super) fn expect_another(&self) {
        lock(&self.state).expected += 1;
    }

    /// Whether the caller still waits.
    pub(super) fn is_wanted(&self) -> bool {
        !lock(&self.state).is_over
    }

    /// Ends the caller's wait, because another connection has answered.
    pub(super) fn overtake(&self) {
        lock(&self.state).is_overtaken = true;
        self.answered.notify_one();
    }

    /// Waits for the answer until `until`. `comes_back` says that the caller will wait again if there is none.
    pub(super) fn wait(&self, until: Instant, comes_back: bool) -> Result<Result<Answer<T>, Failed>, Waited> {
        let mut state = lock(&self.state);
        loop {
            if let Some(answer) = state.answer.take() {
                let is_repeated = state.starts > 1;
                return Ok(answer.map(|value| Answer { value, is_repeated }));
            }
            if state.is_overtaken || Instant::now() >= until {
                // A worker that answers takes the same mutex: from now on it finds that its answer is too late.
                state.is_over |= state.is_overtaken || !comes_back;
                return Err(Waited { started: state.started, is_overtaken: state.is_overtaken });
            }
            state = wait_until(&self.answered, state, until);
        }
    }
}

/// The worker's side of a slot.
pub(super) struct Reply<T>(Arc<Slot<T>>);

impl<T> Reply<T> {
    pub(super) fn new(slot: &Arc<Slot<T>>) -> Reply<T> {
        Reply(Arc::clone(slot))
    }

    /// Whether the caller still waits.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.is_wanted()
    }

    /// Notes that the call is about to be made. False if the caller doesn't wait any more.
    pub(super) fn start(&self) -> bool {
        let mut state = lock(&self.0.state);
        if !state.is_over {
            state.started.get_or_insert_with(Instant::now);
            state.starts += 1;
        }
        !state.is_over
    }

    /// Answers the caller, and marks the worker idle. Gives the result back if the caller doesn't wait any more.
    pub(super) fn send(&self, result: Result<T, Failed>, entry: &WorkerEntry<'_>) -> Result<(), Result<T, Failed>> {
        let mut state = lock(&self.0.state);
        if state.is_over {
            return Err(result);
        }
        entry.set_idle();
        state.expected = state.expected.saturating_sub(1);
        match result {
            Ok(value) => state.answer = Some(Ok(value)),
            Err(failed) => {
                let is_unknown = failed.is_unknown;
                let first = state.failed.take().unwrap_or(failed);
                let failed = Failed { is_unknown: first.is_unknown || is_unknown, ..first };
                if state.expected > 0 {
                    state.failed = Some(failed);
                    return Ok(());
                }
                state.answer = Some(Err(failed));
            }
        }
        state.is_over = true;
        self.0.answered.notify_one();
        Ok(())
    }
}

impl<T> Drop for Reply<T> {
    /// Answers the caller of a call that panicked. Otherwise that caller would wait until its deadline. When a reply is
    /// dropped without a panic, the caller has its answer, or its deadline has passed.
    fn drop(&mut self) {
        if thread::panicking() {
            let is_unknown = lock(&self.0.state).started.is_some();
            let error = Error::Thread { source: std::io::Error::other("the worker thread panicked") };
            drop(self.send(Err(Failed { error, is_unknown, is_connection_fault: false }), &WorkerEntry::default()));
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::time::Duration;

    use super::*;

    fn two_copies() -> (Arc<Slot<u32>>, [Reply<u32>; 2]) {
        let slot = Slot::new();
        slot.expect_another();
        let copies = [0, 1].map(|_| Reply::new(&slot));
        (slot, copies)
    }

    fn failed() -> Failed {
        Failed::with(Error::Forked)
    }

    #[test]
    fn an_answer_says_whether_the_call_was_made_more_than_once() {
        let (slot, [first, second]) = two_copies();
        assert!(first.start() && second.start());
        // Even the answer to the copy that was made first says so: this copy may have reached the server second.
        first.send(Ok(7), &WorkerEntry::default()).unwrap();
        let Ok(Ok(answer)) = slot.wait(Instant::now(), false) else { panic!("no answer") };
        assert!(answer.value == 7 && answer.is_repeated);
        assert!(matches!(second.send(Ok(8), &WorkerEntry::default()), Err(Ok(8))), "nobody waits for it any more");
        assert!(!second.start() && !second.is_wanted());
    }

    #[test]
    fn an_error_of_one_copy_waits_for_what_comes_of_the_other() {
        for comes in [Ok(7), Err(failed())] {
            let (slot, [first, second]) = two_copies();
            assert!(first.start());
            first.send(Err(Failed { is_unknown: true, ..failed() }), &WorkerEntry::default()).unwrap();
            assert!(slot.wait(Instant::now(), true).is_err(), "the other one may yet be answered");
            let is_ok = comes.is_ok();
            second.send(comes, &WorkerEntry::default()).unwrap();
            match slot.wait(Instant::now(), false) {
                Ok(Ok(answer)) => assert!(is_ok && answer.value == 7),
                Ok(Err(failed)) => assert!(!is_ok && failed.is_unknown, "what one of them asked may have happened"),
                Err(_) => panic!("no answer"),
            }
        }
    }

    #[test]
    fn who_is_overtaken_gives_up_and_its_answer_is_too_late() {
        let slot = Slot::new();
        let reply = Reply::new(&slot);
        assert!(reply.start());
        slot.overtake();
        let waited = slot.wait(Instant::now() + Duration::from_secs(9), true).expect_err("no answer");
        assert!(waited.is_overtaken && waited.started.is_some());
        assert!(matches!(reply.send(Ok(7), &WorkerEntry::default()), Err(Ok(7))));
    }
}
