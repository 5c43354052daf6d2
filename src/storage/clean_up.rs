//! The clean-up of unfinished work: acquires and releases with an unknown outcome, and entries in the rows of locks
//! that no thread of this process waits for.
//!
//! While there is such work, one thread of the storage releases what the claims may have acquired, or may not have
//! released. It names a claim by its lease id, so it touches no other hold. A caller that gives up a started call
//! adds its claim here immediately, while the call itself may still be stuck.
//!
//! The clean-up of a claim ends at the first of these:
//! - the database has said that the hold is released, or, if its version is known, that it isn't there;
//! - the claim has expired, and no acquire of the lock is about to commit;
//! - the lease has run out by itself;
//! - ten minutes have passed.
//!
//! Claims go before entries in rows. Work that has failed less often goes first, so that a locked row delays its own
//! work only.
//!
//! Uses `wait::queue`, `db`, and the modules below them.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use crate::backoff::backoff;
use crate::db::answer::Claim;
use crate::db::session::Session;
use crate::db::workers::{Tries, Urgency};
use crate::error::Result;
use crate::storage::PostgresStorage;
use crate::storage::release::RELEASE_TIME;
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};
use crate::user_code::{self, log_at};

/// How long to go on after a claim has expired, because the two clocks may differ.
const CLOCK_SLACK: Duration = Duration::from_secs(1);
/// The pauses between two looks for something that may yet happen grow from the shortest to the longest.
const SHORTEST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// No work is repeated for longer than this, however long its lease is.
const LONGEST: Duration = Duration::from_secs(10 * 60);

/// Work to be done, and when to try it next.
#[derive(Clone, Debug)]
pub(crate) struct Unfinished {
    pub(crate) work: Work,
    since: Instant,
    failures: u32,
    next: Instant,
}

#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// A hold that may not have been released.
    Hold { claim: Claim, version: i64 },
    /// An acquire that may have happened, or may yet happen until its claim expires.
    Acquire { claim: Claim },
    /// This process may be in a lock's row, or may yet get there before `until`, while none of its threads waits.
    RowEntry { lock_id: String, until: Instant },
}

/// The result of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The hold was there, and is released.
    Undone,
    /// Nothing is left to undo now.
    NothingLeft,
    Failed,
}

impl Unfinished {
    pub(crate) fn hold(claim: Claim, version: i64, now: Instant) -> Unfinished {
        Unfinished::new(Work::Hold { claim, version }, now)
    }

    pub(crate) fn acquire(claim: Claim, now: Instant) -> Unfinished {
        Unfinished::new(Work::Acquire { claim }, now)
    }

    pub(crate) fn row_entry(lock_id: &str, until: Instant, now: Instant) -> Unfinished {
        Unfinished::new(Work::RowEntry { lock_id: lock_id.to_owned(), until }, now)
    }

    fn new(work: Work, now: Instant) -> Unfinished {
        Unfinished { work, since: now, failures: 0, next: now }
    }

    /// The work that remains after an attempt, if any.
    fn after(mut self, outcome: Outcome, now: Instant) -> Option<Unfinished> {
        // The work ends then, whatever the database says.
        let longest = self.since + LONGEST;
        let (is_done, ends) = match &self.work {
            Work::Hold { claim, .. } => (outcome != Outcome::Failed, self.since + claim.lease.min(LONGEST)),
            Work::Acquire { claim } => {
                let is_over = now >= claim.expires + CLOCK_SLACK;
                let is_done = outcome == Outcome::Undone || outcome == Outcome::NothingLeft && is_over;
                (is_done, claim.expires + CLOCK_SLACK + claim.lease.min(LONGEST))
            }
            Work::RowEntry { until, .. } => (outcome != Outcome::Failed && now >= *until, longest),
        };
        if is_done || now >= ends.min(longest) {
            return None;
        }
        let age = now.duration_since(self.since);
        self.failures = if outcome == Outcome::Failed { self.failures.saturating_add(1) } else { 0 };
        let pause = if outcome == Outcome::Failed {
            backoff(self.failures)
        } else {
            (age / 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
        };
        self.next = now + pause;
        Some(self)
    }

    /// The order of work that is due: the least goes first.
    fn order(&self) -> impl Ord + use<> {
        (matches!(self.work, Work::RowEntry { .. }), self.failures, self.next)
    }

    /// Merges this entry in a row into `other`, if both are for one lock. `other` then lasts until the later end.
    fn merges_into(&self, other: &mut Unfinished) -> bool {
        match (&self.work, &mut other.work) {
            (Work::RowEntry { lock_id, until }, Work::RowEntry { lock_id: other_id, until: other_until })
                if lock_id == other_id =>
            {
                *other_until = (*other_until).max(*until);
                (other.since, other.next) = (self.since, other.next.min(self.next));
                true
            }
            _ => false,
        }
    }
}

/// The unfinished work of a storage.
#[derive(Default)]
pub(crate) struct CleanUps {
    state: Mutex<State>,
    added: Condvar,
}

#[derive(Default)]
struct State {
    unfinished: Vec<Unfinished>,
    has_thread: bool,
}

impl CleanUps {
    /// Adds work, and says whether the caller has to start the thread that calls [`run`](Self::run).
    pub(crate) fn add(&self, unfinished: Unfinished) -> bool {
        let mut state = lock(&self.state);
        if !state.unfinished.iter_mut().any(|other| unfinished.merges_into(other)) {
            state.unfinished.push(unfinished);
        }
        self.added.notify_one();
        !std::mem::replace(&mut state.has_thread, true)
    }

    /// Forgets all work, because the thread could not be started.
    pub(crate) fn give_up(&self) {
        *lock(&self.state) = State::default();
    }

    /// Makes attempts, each without the mutex, until no work is left.
    pub(crate) fn run(&self, attempt: impl Fn(&Work) -> Outcome) {
        let mut state = lock(&self.state);
        loop {
            let now = Instant::now();
            let due = (0_usize..).zip(&state.unfinished).filter(|(_, unfinished)| unfinished.next <= now);
            let most_urgent = due.max_by_key(|(_, unfinished)| Reverse(unfinished.order())).map(|(at, _)| at);
            if let Some(at) = most_urgent {
                let unfinished = state.unfinished.swap_remove(at);
                drop(state);
                let outcome = attempt(&unfinished.work);
                state = lock(&self.state);
                state.unfinished.extend(unfinished.after(outcome, Instant::now()));
            } else if let Some(next) = state.unfinished.iter().map(|unfinished| unfinished.next).min() {
                state = wait_until(&self.added, state, next);
            } else {
                state.has_thread = false;
                return;
            }
        }
    }
}

impl PostgresStorage {
    /// Removes this process from a lock's row, in the background.
    pub(crate) fn leave_row(&self, lock_id: &str) {
        let now = Instant::now();
        self.clean_up(Unfinished::row_entry(lock_id, now, now));
    }

    /// Removes this process from a lock's row, unless one of its threads waits for the lock again.
    fn withdraw(&self, lock_id: &str) -> Result<()> {
        if self.queues().keep_row_entry(lock_id) {
            return Ok(());
        }
        let (sql, waiter) = (Arc::clone(&self.inner.sql), self.inner.listener.waiter);
        let (described, owned) = (lock_id.to_owned(), lock_id.to_owned());
        let action = move || format!("leave the row of lock {described:?}");
        let call = move |session: &mut Session| session.withdraw(&sql, &owned, waiter);
        let deadline = Instant::now() + RELEASE_TIME;
        let result = self.inner.workers.call(Urgency::Ordinary, deadline, Tries::Several, action, call, |_, _| ());
        // A thread may have begun to wait meanwhile, and has to ask.
        self.queues().left_row(lock_id);
        result?;
        Ok(())
    }

    /// Does unfinished work in the background.
    pub(crate) fn clean_up(&self, unfinished: Unfinished) {
        if !self.inner.clean_ups.add(unfinished) {
            return;
        }
        let storage = self.clone();
        let run = move || {
            user_code::call(|| storage.inner.clean_ups.run(|work| storage.try_to_undo(work)));
        };
        if let Err(error) = thread::Builder::new().name("lock-clean-up".to_owned()).spawn(run) {
            self.inner.clean_ups.give_up();
            log_at!(debug, "cannot start a thread: {error}");
        }
    }

    fn try_to_undo(&self, work: &Work) -> Outcome {
        let (claim, version) = match work {
            Work::RowEntry { lock_id, .. } => {
                return self.withdraw(lock_id).map_or(Outcome::Failed, |()| Outcome::NothingLeft);
            }
            Work::Hold { claim, version } => (claim, Some(*version)),
            Work::Acquire { claim } => (claim, None),
        };
        let (sql, claim) = (Arc::clone(&self.inner.sql), claim.clone());
        let describe = claim.lock_id.clone();
        let call = move |session: &mut Session| {
            if session.release(&sql, &claim, version, None, false)?.is_some() {
                return Ok(Outcome::Undone);
            }
            // The acquire can't begin any more after its claim has expired. It may be about to commit, and the release
            // doesn't see that. Only the last attempts ask for it, because the question locks the row for a moment.
            let is_last = version.is_none() && claim.expires <= Instant::now();
            let is_settled = !is_last || session.is_settled(&sql, &claim.lock_id)?;
            Ok(if is_settled { Outcome::NothingLeft } else { Outcome::Failed })
        };
        let action = move || format!("release lock {describe:?}");
        let deadline = Instant::now() + RELEASE_TIME;
        let outcome = self.inner.workers.call(Urgency::Ordinary, deadline, Tries::Several, action, call, |_, _| ());
        outcome.map_or(Outcome::Failed, |answer| answer.value)
    }
}

#[cfg(test)]
mod tests;
