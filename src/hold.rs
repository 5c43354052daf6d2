//! One hold of a lock, as its guards, its refresh thread and its calls in flight share it.

use std::time::Duration;

use crate::answer::{Claim, Granted};
use crate::error::{Error, Result};
use crate::sync::thread::{self, ThreadId};
use crate::sync::{Condvar, Instant, Mutex, MutexGuard, lock};
use crate::term::Term;

/// A hold is `(lock_id, version, lease_id)`, never an owner's name.
pub(crate) struct Hold {
    pub(crate) claim: Claim,
    pub(crate) version: i64,
    pub(crate) refresh_interval: Duration,
    /// Where the lock was taken: this thread may take it again.
    thread: ThreadId,
    /// Since when the lock has been this process's, by this hold and those that handed it on.
    pub(crate) turn_began: Instant,
    state: Mutex<HoldState>,
    /// Something changed that the refresh thread waits for.
    pub(crate) changed: Condvar,
}

pub(crate) struct HoldState {
    pub(crate) term: Term,
    /// How many guards there are; at zero the hold is being released, and nobody may enter it again.
    pub(crate) guards: usize,
    /// The database said that the hold is not there any more.
    pub(crate) is_gone: bool,
    /// Other processes wait for the lock, as far as is known.
    pub(crate) is_wanted: bool,
    /// What came of the refresh of this number.
    pub(crate) answer: Option<(u64, Result<()>)>,
}

impl Hold {
    /// A hold for `thread` that was just granted, in a turn of this process that began at `turn_began`.
    pub(crate) fn new(
        claim: Claim,
        granted: Granted,
        refresh_interval: Duration,
        thread: ThreadId,
        turn_began: Instant,
    ) -> Hold {
        let term = Term::new(granted.sent, granted.left, claim.lease);
        let state = HoldState { term, guards: 1, is_gone: false, is_wanted: granted.is_wanted, answer: None };
        Hold {
            claim,
            version: granted.version,
            refresh_interval,
            thread,
            turn_began,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, HoldState> {
        lock(&self.state)
    }

    pub(crate) fn is_held(&self) -> bool {
        self.state().term.is_held(Instant::now())
    }

    pub(crate) fn remaining(&self) -> Duration {
        self.state().term.remaining(Instant::now())
    }

    /// Adds a guard, if the same owner asks on the same thread and the hold is good.
    pub(crate) fn enter_again(&self, owner_id: &str) -> bool {
        if self.claim.owner_id != owner_id || self.thread != thread::current().id() {
            return false;
        }
        let mut state = self.state();
        let may_enter = state.guards > 0 && state.term.is_held(Instant::now());
        state.guards += usize::from(may_enter);
        may_enter
    }

    /// Whether a refresh of it would still be of use.
    pub(crate) fn is_to_be_refreshed(&self) -> bool {
        let state = self.state();
        state.guards > 0 && state.term.is_held(Instant::now())
    }

    /// A refresh that was sent at `sent` has been answered.
    pub(crate) fn refreshed(&self, number: u64, sent: Instant, result: Result<Option<bool>>) {
        let mut state = self.state();
        let now = Instant::now();
        match &result {
            Ok(Some(is_wanted)) => {
                state.term.extend(now, sent);
                state.is_wanted = *is_wanted;
            }
            // Released meanwhile: no loss.
            Ok(None) if state.guards == 0 => return,
            Ok(None) => {
                state.term.lose();
                state.is_gone = true;
            }
            Err(_) => {}
        }
        // An answer that nobody has read yet is not replaced by that of an older attempt.
        if state.answer.as_ref().is_none_or(|(unread, _)| *unread < number) {
            state.answer = Some((number, result.map(|_| ())));
        }
        self.changed.notify_all();
    }

    /// Takes a guard away and says whether it was the last one. The refresh thread stops at once.
    pub(crate) fn leave(&self) -> bool {
        let mut state = self.state();
        state.guards = state.guards.saturating_sub(1);
        self.changed.notify_all();
        state.guards == 0
    }

    pub(crate) fn lost(&self) -> Error {
        Error::LeaseLost {
            lock_id: self.claim.lock_id.clone(),
            owner_id: self.claim.owner_id.clone(),
            version: self.version,
        }
    }
}
