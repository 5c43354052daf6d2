//! One hold of a lock, as its guards, its refresh thread and its calls in flight share it.

use std::time::Duration;

use crate::answer::{Claim, Granted};
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::loss::OnLost;
use crate::options::LockOptions;
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
    /// When it was asked for.
    pub(crate) began: Instant,
    pub(crate) on_lost: OnLost,
    state: Mutex<HoldState>,
    /// Something changed that the refresh thread waits for.
    pub(crate) changed: Condvar,
}

pub(crate) struct HoldState {
    pub(crate) term: Term,
    /// How many guards there are; at zero the hold is being released, and nobody may enter it again.
    pub(crate) guards: usize,
    /// The database said that the hold is not there any more, while there were guards. Then its thread tells so, also if they have gone since.
    pub(crate) is_gone: bool,
    /// Other processes wait for the lock, as far as is known.
    pub(crate) is_wanted: bool,
    /// What came of the refresh of this number, and how long it took.
    pub(crate) answer: Option<(u64, Result<Duration>)>,
    /// Its beginning has been told, and its end, a loss or a release, has not.
    pub(crate) owes_end: bool,
    pub(crate) unlocking: Unlocking,
}

/// Whether a transaction of the caller's releases the hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unlocking {
    No,
    /// It may be committed at any time. Meanwhile nothing is refreshed: that would wait for it in the server.
    Pending,
    /// It has ended before `since`, and only the database knows how. A refresh that is sent later finds the hold if it
    /// was rolled back, and waits for it if it is open or prepared after all.
    Unknown {
        since: Instant,
        /// Its statement was answered. Of one that failed, a hold that isn't there is lost.
        may_be_released: bool,
    },
    /// It is committed.
    Done,
}

impl HoldState {
    /// Whether somebody may act on it.
    pub(crate) fn is_trusted(&self, now: Instant) -> bool {
        self.term.is_held(now) && self.unlocking == Unlocking::No
    }

    pub(crate) fn is_lost(&self, now: Instant) -> bool {
        !self.term.is_held(now) && (self.guards > 0 && self.unlocking != Unlocking::Done || self.term.is_lost())
    }

    pub(crate) fn set_unlocking(&mut self, unlocking: Unlocking, now: Instant) {
        if self.is_lost(now) {
            // For ever, also where it comes to be released all the same.
            self.term.lose();
        }
        self.unlocking = unlocking;
    }

    /// Whether nobody counts on it any more.
    pub(crate) fn is_over(&self) -> bool {
        self.guards == 0 || self.unlocking == Unlocking::Done
    }

    /// The database says so, and no transaction is open that releases it.
    fn is_not_there(&mut self, now: Instant) {
        // Later it may as well be over because the transaction was rolled back, and the lease ran out.
        if matches!(self.unlocking, Unlocking::Unknown { may_be_released: true, .. }) && self.term.is_held(now) {
            self.unlocking = Unlocking::Done;
        } else {
            self.term.lose();
            self.is_gone = true;
        }
    }

    /// Its end is going to be told by whoever asks; false if somebody else has done so, or nobody was told that it began.
    pub(crate) fn tell_end(&mut self) -> bool {
        std::mem::take(&mut self.owes_end)
    }
}

impl Hold {
    /// A hold for `thread` that was just granted, in a turn of this process that began at `turn_began`.
    pub(crate) fn new(
        claim: Claim,
        granted: Granted,
        options: &LockOptions,
        thread: ThreadId,
        turn_began: Instant,
    ) -> Hold {
        let term = Term::new(granted.sent, granted.left, claim.lease);
        let state = HoldState {
            term,
            guards: 1,
            is_gone: false,
            is_wanted: granted.is_wanted,
            answer: None,
            owes_end: false,
            unlocking: Unlocking::No,
        };
        Hold {
            claim,
            version: granted.version,
            refresh_interval: options.refresh_interval(),
            thread,
            turn_began,
            began: granted.sent,
            on_lost: options.on_lost.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, HoldState> {
        lock(&self.state)
    }

    pub(crate) fn is_held(&self) -> bool {
        self.state().is_trusted(Instant::now())
    }

    pub(crate) fn remaining(&self) -> Duration {
        let (state, now) = (self.state(), Instant::now());
        if state.is_trusted(now) { state.term.remaining(now) } else { Duration::ZERO }
    }

    /// Whether its deadline is yet to come, also where a transaction of the caller's releases it.
    pub(crate) fn is_before_deadline(&self) -> bool {
        self.state().term.is_held(Instant::now())
    }

    /// Adds a guard, if the same owner asks on the same thread and the hold is good.
    pub(crate) fn enter_again(&self, owner_id: &str) -> bool {
        if self.claim.owner_id != owner_id || self.thread != thread::current().id() {
            return false;
        }
        let mut state = self.state();
        let may_enter = state.guards > 0 && state.is_trusted(Instant::now());
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
                if matches!(state.unlocking, Unlocking::Unknown { since, .. } if sent > since) {
                    state.unlocking = Unlocking::No;
                }
            }
            // Released meanwhile: no loss.
            Ok(None) if state.guards == 0 || matches!(state.unlocking, Unlocking::Pending | Unlocking::Done) => return,
            Ok(None) => state.is_not_there(now),
            Err(_) => {}
        }
        // An answer that nobody has read yet is not replaced by that of an older attempt.
        if state.answer.as_ref().is_none_or(|(unread, _)| *unread < number) {
            state.answer = Some((number, result.map(|_| now.duration_since(sent))));
        }
        self.changed.notify_all();
    }

    /// The database says so to a guard. While a transaction is open that releases it, that is for the end of the
    /// transaction to find.
    pub(crate) fn is_not_there(&self) {
        let mut state = self.state();
        if !matches!(state.unlocking, Unlocking::Pending | Unlocking::Done) {
            state.is_not_there(Instant::now());
        }
        self.changed.notify_all();
    }

    /// The database says so to a guard that asked when the transaction had ended, at `ended`.
    pub(crate) fn is_there(&self, ended: Instant) {
        let mut state = self.state();
        // The refresh thread may have found it before, and another transaction have begun.
        if matches!(state.unlocking, Unlocking::Unknown { since, .. } if since == ended) {
            state.unlocking = Unlocking::No;
        }
        self.changed.notify_all();
    }

    /// It was lost before it was released, as far as is known.
    pub(crate) fn lose(&self) {
        self.state().term.lose();
        self.changed.notify_all();
    }

    /// Takes a guard away and says whether it was the last one. The refresh thread stops at once.
    pub(crate) fn leave(&self) -> bool {
        let mut state = self.state();
        let is_lost = state.is_lost(Instant::now());
        state.guards = state.guards.saturating_sub(1);
        if state.guards == 0 && is_lost {
            // For a signal that outlives the guards: from now on time doesn't count.
            state.term.lose();
        }
        self.changed.notify_all();
        state.guards == 0
    }

    /// A transaction of the caller's is going to release it; or how that stands: `No` if there are other guards.
    pub(crate) fn begin_unlocking(&self) -> Result<(), Unlocking> {
        let mut state = self.state();
        if state.unlocking == Unlocking::No && state.guards == 1 {
            state.unlocking = Unlocking::Pending;
            Ok(())
        } else {
            Err(state.unlocking)
        }
    }

    pub(crate) fn set_unlocking(&self, unlocking: Unlocking) {
        self.state().set_unlocking(unlocking, Instant::now());
        self.changed.notify_all();
    }

    /// Lock, owner and version, as everybody is told them.
    pub(crate) fn names(&self) -> (&str, &str, i64) {
        (&self.claim.lock_id, &self.claim.owner_id, self.version)
    }

    pub(crate) fn tell_loss(&self, events: &Events) {
        let (lock_id, owner_id, version) = self.names();
        events.tell(|| Event::Lost { lock_id, owner_id, version });
    }

    pub(crate) fn lost(&self) -> Error {
        Error::LeaseLost {
            lock_id: self.claim.lock_id.clone(),
            owner_id: self.claim.owner_id.clone(),
            version: self.version,
        }
    }
}
