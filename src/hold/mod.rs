//! One hold of a lock, shared by its guards, its refresh thread and its calls in flight.
//!
//! Invariants:
//! - A hold is `(lock_id, version, lease_id)`, never an owner's name.
//! - A hold that is lost stays lost.
//!
//! This module may use the value types of `db::answer`, `events`, `error`, `user_code` and `sync`; nothing else of
//! `db`.

pub(crate) mod lease;
pub(crate) mod loss;

use std::time::Duration;

use crate::db::answer::{Claim, Granted};
use crate::error::{Error, Result};
use crate::events::{Event, Events};
use crate::hold::lease::Lease;
use crate::hold::loss::OnLost;
use crate::sync::thread::{self, ThreadId};
use crate::sync::{Condvar, Instant, Mutex, MutexGuard, lock};

pub(crate) struct Hold {
    pub(crate) claim: Claim,
    pub(crate) version: i64,
    pub(crate) refresh_interval: Duration,
    /// The thread that acquired the lock, and may acquire it again.
    thread: ThreadId,
    /// When this process acquired the lock. Hand-overs between its threads don't change it.
    pub(crate) process_acquired_at: Instant,
    /// When the request for this hold was sent.
    pub(crate) began: Instant,
    pub(crate) on_lost: OnLost,
    state: Mutex<HoldState>,
    /// Notified when something changes that the refresh thread or a `LostSignal` waits for.
    pub(crate) changed: Condvar,
}

pub(crate) struct HoldState {
    pub(crate) lease: Lease,
    /// The number of guards. At zero the hold is being released, and nobody may enter it again.
    pub(crate) guards: usize,
    /// While there were guards, the database said that the hold is gone. The refresh thread then reports the loss, even
    /// if the guards have gone since.
    pub(crate) is_gone: bool,
    /// Other processes wait for the lock, as far as is known.
    pub(crate) is_wanted: bool,
    /// The number of a refresh, and its result: how long it took, or why it failed. The refresh thread takes it.
    pub(crate) answer: Option<(u64, Result<Duration>)>,
    /// `Event::Acquired` was sent, and neither `Lost` nor `Released` has been sent yet.
    pub(crate) owes_end_event: bool,
    pub(crate) unlocking: Unlocking,
}

/// Whether a transaction of the caller releases the hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unlocking {
    No,
    /// The transaction may be committed at any time. Until it ends, nothing is refreshed: a refresh would wait in the
    /// server for the transaction.
    Pending,
    /// The transaction ended before `since`, and only the database knows how. A refresh that is sent after `since`
    /// finds the hold if the transaction was rolled back. It waits for the transaction if that is open or prepared
    /// after all.
    Unknown {
        since: Instant,
        /// The statement that releases the hold was answered. If it failed instead, a hold that isn't there is lost.
        may_be_released: bool,
    },
    /// The transaction is committed.
    Done,
}

impl HoldState {
    /// Whether a caller may act on the hold.
    pub(crate) fn is_trusted(&self, now: Instant) -> bool {
        self.lease.is_held(now) && self.unlocking == Unlocking::No
    }

    pub(crate) fn is_lost(&self, now: Instant) -> bool {
        !self.lease.is_held(now) && (self.guards > 0 && self.unlocking != Unlocking::Done || self.lease.is_lost())
    }

    pub(crate) fn set_unlocking(&mut self, unlocking: Unlocking, now: Instant) {
        if self.is_lost(now) {
            // The loss is final, even if the transaction releases the hold after all.
            self.lease.lose();
        }
        self.unlocking = unlocking;
    }

    /// Whether nobody relies on the hold any more.
    pub(crate) fn is_over(&self) -> bool {
        self.guards == 0 || self.unlocking == Unlocking::Done
    }

    /// The database said that the hold isn't there, and no transaction is open that releases it.
    fn mark_missing(&mut self, now: Instant) {
        // After the deadline there is another possible reason: the transaction was rolled back, and the lease ran out.
        if matches!(self.unlocking, Unlocking::Unknown { may_be_released: true, .. }) && self.lease.is_held(now) {
            self.unlocking = Unlocking::Done;
        } else {
            self.lease.lose();
            self.is_gone = true;
        }
    }

    /// True for the first caller, which then has to send the event of the end. False for later callers, and if no event
    /// of the beginning was sent.
    pub(crate) fn take_end_event(&mut self) -> bool {
        std::mem::take(&mut self.owes_end_event)
    }
}

impl Hold {
    /// A hold that was just granted to `thread`. The process has had the lock since `process_acquired_at`.
    pub(crate) fn new(
        claim: Claim,
        granted: Granted,
        refresh_interval: Duration,
        on_lost: OnLost,
        thread: ThreadId,
        process_acquired_at: Instant,
    ) -> Hold {
        let lease = Lease::new(granted.sent, granted.left, claim.lease);
        let state = HoldState {
            lease,
            guards: 1,
            is_gone: false,
            is_wanted: granted.is_wanted,
            answer: None,
            owes_end_event: false,
            unlocking: Unlocking::No,
        };
        Hold {
            claim,
            version: granted.version,
            refresh_interval,
            thread,
            process_acquired_at,
            began: granted.sent,
            on_lost,
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
        if state.is_trusted(now) { state.lease.remaining(now) } else { Duration::ZERO }
    }

    /// Whether the hold isn't lost and its deadline is yet to come, even if a transaction of the caller releases it.
    pub(crate) fn is_before_deadline(&self) -> bool {
        self.state().lease.is_held(Instant::now())
    }

    /// Adds a guard if the same owner asks on the same thread, and the hold is trusted.
    pub(crate) fn reenter(&self, owner_id: &str) -> bool {
        if self.claim.owner_id != owner_id || self.thread != thread::current().id() {
            return false;
        }
        let mut state = self.state();
        let may_enter = state.guards > 0 && state.is_trusted(Instant::now());
        state.guards += usize::from(may_enter);
        may_enter
    }

    /// Whether a refresh of the hold is still of use.
    pub(crate) fn is_to_be_refreshed(&self) -> bool {
        let state = self.state();
        state.guards > 0 && state.lease.is_held(Instant::now())
    }

    /// Applies the result of the refresh `number`, which was sent at `sent`.
    pub(crate) fn refreshed(&self, number: u64, sent: Instant, result: Result<Option<bool>>) {
        let mut state = self.state();
        let now = Instant::now();
        match &result {
            Ok(Some(is_wanted)) => {
                state.lease.extend(now, sent);
                state.is_wanted = *is_wanted;
                if matches!(state.unlocking, Unlocking::Unknown { since, .. } if sent > since) {
                    state.unlocking = Unlocking::No;
                }
            }
            // The hold was released meanwhile, or is about to be: that is no loss.
            Ok(None) if state.guards == 0 || matches!(state.unlocking, Unlocking::Pending | Unlocking::Done) => return,
            Ok(None) => state.mark_missing(now),
            Err(_) => {}
        }
        // The answer to an older attempt doesn't replace an unread answer to a newer one.
        if state.answer.as_ref().is_none_or(|(unread, _)| *unread < number) {
            state.answer = Some((number, result.map(|_| now.duration_since(sent))));
        }
        self.changed.notify_all();
    }

    /// The database told a guard that the hold isn't there. While a transaction is open that releases the hold, nothing
    /// changes: the end of the transaction decides.
    pub(crate) fn mark_missing(&self) {
        let mut state = self.state();
        if !matches!(state.unlocking, Unlocking::Pending | Unlocking::Done) {
            state.mark_missing(Instant::now());
        }
        self.changed.notify_all();
    }

    /// The database told a guard that the hold is there. The guard asked after the transaction had ended, at `ended`.
    pub(crate) fn confirm_present(&self, ended: Instant) {
        let mut state = self.state();
        // The refresh thread may have found this out before, and another transaction may have begun since.
        if matches!(state.unlocking, Unlocking::Unknown { since, .. } if since == ended) {
            state.unlocking = Unlocking::No;
        }
        self.changed.notify_all();
    }

    /// Marks the hold as lost: as far as is known, it was over before it was released.
    pub(crate) fn lose(&self) {
        self.state().lease.lose();
        self.changed.notify_all();
    }

    /// Removes a guard, and says whether it was the last one. After the last one the refresh thread stops immediately,
    /// unless it has a loss to report.
    pub(crate) fn leave(&self) -> bool {
        let mut state = self.state();
        let is_lost = state.is_lost(Instant::now());
        state.guards = state.guards.saturating_sub(1);
        if state.guards == 0 && is_lost {
            // A `LostSignal` may outlive the guards. Without guards the passing of the deadline is no loss, so record
            // this one.
            state.lease.lose();
        }
        self.changed.notify_all();
        state.guards == 0
    }

    /// Begins the release by a transaction of the caller. The error says why that is impossible: `No` if there are
    /// other guards, else the state of another such transaction.
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

    /// The lock id, the owner id and the version, for events and log lines.
    pub(crate) fn names(&self) -> (&str, &str, i64) {
        (&self.claim.lock_id, &self.claim.owner_id, self.version)
    }

    pub(crate) fn send_lost(&self, events: &Events) {
        let (lock_id, owner_id, version) = self.names();
        events.send(|| Event::Lost { lock_id, owner_id, version });
    }

    pub(crate) fn lost(&self) -> Error {
        Error::LeaseLost {
            lock_id: self.claim.lock_id.clone(),
            owner_id: self.claim.owner_id.clone(),
            version: self.version,
        }
    }
}
