//! One hold of a lock, as its guards, its refresh thread and its calls in flight share it; and the holds of a storage.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::session::Claim;
use crate::term::Term;
use crate::workers::lock;

/// A hold is `(lock_id, version, lease_id)`, never an owner's name.
pub(crate) struct Hold {
    pub(crate) claim: Claim,
    pub(crate) version: i64,
    pub(crate) refresh_interval: Duration,
    /// Where the lock was taken: this thread may take it again.
    thread: ThreadId,
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
    /// What came of the refresh of this number.
    pub(crate) answer: Option<(u64, Result<()>)>,
}

impl Hold {
    pub(crate) fn new(claim: Claim, version: i64, term: Term, refresh_interval: Duration) -> Hold {
        let state = HoldState { term, guards: 1, is_gone: false, answer: None };
        Hold {
            claim,
            version,
            refresh_interval,
            thread: thread::current().id(),
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
    fn enter_again(&self, owner_id: &str) -> bool {
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
    pub(crate) fn refreshed(&self, number: u64, sent: Instant, result: Result<bool>) {
        let mut state = self.state();
        let now = Instant::now();
        match &result {
            Ok(true) => state.term.extend(now, sent),
            // Released meanwhile: no loss.
            Ok(false) if state.guards == 0 => return,
            Ok(false) => {
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

/// The holds of one storage in this process, by lock id: a lock has one at most, and maybe others that are lost.
#[derive(Default)]
pub(crate) struct Holds(Mutex<HashMap<String, Arc<Hold>>>);

impl Holds {
    pub(crate) fn enter_again(&self, lock_id: &str, owner_id: &str) -> Option<Arc<Hold>> {
        lock(&self.0).get(lock_id).filter(|hold| hold.enter_again(owner_id)).cloned()
    }

    pub(crate) fn insert(&self, hold: &Arc<Hold>) {
        lock(&self.0).insert(hold.claim.lock_id.clone(), Arc::clone(hold));
    }

    pub(crate) fn remove(&self, hold: &Arc<Hold>) {
        let mut holds = lock(&self.0);
        // A lost hold may have been followed by another one.
        if holds.get(&hold.claim.lock_id).is_some_and(|newest| Arc::ptr_eq(newest, hold)) {
            holds.remove(&hold.claim.lock_id);
        }
    }
}
