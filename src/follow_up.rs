//! What was left unfinished: acquires and releases whose outcome nobody knows, and places in rows for nobody.
//!
//! One thread of a storage, while there is something to do, releases what such a claim may have taken, or may not have given
//! back. A claim is named by its lease, so this hurts nobody else. Whoever gives a call up that had been started hands its claim over
//! here at that moment, while the call itself may be stuck. It ends when the database has confirmed the release, when nothing can come
//! of the claim any more ([`CLAIM_LIFE`]), when the lease has run out by itself, or after ten minutes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::answer::Claim;
use crate::sql::CLAIM_LIFE;
use crate::sync::{Condvar, Instant, Mutex, lock, wait_until};
use crate::term::backoff;

/// Beyond this number, leases run out by themselves.
const MAX_UNFINISHED: usize = 1_000;
/// That there is nothing to release says little while the statement of a claim may still take effect; a second for the clocks.
const STRAY_TIME: Duration = CLAIM_LIFE.saturating_add(Duration::from_secs(1));

/// How often to look for what may come yet: at first, and later.
const FIRST_LOOKS: Duration = Duration::from_millis(250);
const LAST_LOOKS: Duration = Duration::from_secs(2);
/// Nothing is followed up for longer, however long its lease is.
const LONGEST: Duration = Duration::from_secs(10 * 60);

/// Something to be undone.
#[derive(Clone, Debug)]
pub(crate) struct Unfinished {
    pub(crate) lock_id: String,
    pub(crate) claim: Option<UnknownClaim>,
    /// The process may stand in the row.
    pub(crate) may_wait: bool,
    since: Instant,
    failures: u32,
    next: Instant,
}

/// A claim that is to be released.
#[derive(Clone, Debug)]
pub(crate) struct UnknownClaim {
    pub(crate) claim: Claim,
    /// The version of a hold; none of an acquire that may never have come to be one.
    pub(crate) version: Option<i64>,
}

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Released,
    NotThere,
    Failed,
    /// The database refuses, and goes on to.
    Refused,
}

impl Unfinished {
    /// A hold that may not have been given back.
    pub(crate) fn hold(claim: Claim, version: i64, now: Instant) -> Unfinished {
        Unfinished::new(claim.lock_id.clone(), Some(UnknownClaim { claim, version: Some(version) }), false, now)
    }

    /// An acquire that may have happened, or may happen yet.
    pub(crate) fn acquire(claim: Claim, may_wait: bool, now: Instant) -> Unfinished {
        Unfinished::new(claim.lock_id.clone(), Some(UnknownClaim { claim, version: None }), may_wait, now)
    }

    /// A place in the row of a lock for which nobody of this process waits any more.
    pub(crate) fn place(lock_id: &str, now: Instant) -> Unfinished {
        Unfinished::new(lock_id.to_owned(), None, true, now)
    }

    fn new(lock_id: String, claim: Option<UnknownClaim>, may_wait: bool, now: Instant) -> Unfinished {
        Unfinished { lock_id, claim, may_wait, since: now, failures: 0, next: now }
    }

    /// What is left to do after an attempt, if anything.
    fn after(mut self, outcome: Outcome, now: Instant) -> Option<Unfinished> {
        let age = now.duration_since(self.since);
        let is_stray = self.claim.as_ref().is_some_and(|unknown| unknown.version.is_none());
        let is_done = match outcome {
            Outcome::Released | Outcome::Refused => true,
            Outcome::NotThere => !is_stray || age >= STRAY_TIME,
            Outcome::Failed => false,
        };
        // What comes late has its lease from then on.
        let lease = self.claim.as_ref().map_or(LONGEST, |unknown| unknown.claim.lease);
        let lasts = if is_stray { lease.saturating_add(STRAY_TIME) } else { lease };
        if is_done || age >= lasts.min(LONGEST) {
            return None;
        }
        self.failures = self.failures.saturating_add(1);
        let is_not_there = outcome == Outcome::NotThere;
        let pause = if is_not_there { (age / 2).clamp(FIRST_LOOKS, LAST_LOOKS) } else { backoff(self.failures) };
        self.next = now + pause;
        Some(self)
    }
}

/// The unfinished claims of a storage.
#[derive(Default)]
pub(crate) struct FollowUps {
    state: Mutex<State>,
    added: Condvar,
}

#[derive(Default)]
struct State {
    unfinished: VecDeque<Unfinished>,
    has_thread: bool,
}

impl FollowUps {
    /// Takes a claim up, and says whether its caller has to start the thread that runs [`run`](Self::run).
    pub(crate) fn add(&self, unfinished: Unfinished) -> bool {
        let mut state = lock(&self.state);
        if state.unfinished.len() < MAX_UNFINISHED {
            state.unfinished.push_back(unfinished);
        }
        self.added.notify_one();
        !std::mem::replace(&mut state.has_thread, true)
    }

    /// The thread could not be started.
    pub(crate) fn give_up(&self) {
        *lock(&self.state) = State::default();
    }

    /// Follows up until nothing is left.
    pub(crate) fn run(&self, attempt: impl Fn(&Unfinished) -> Outcome) {
        let mut state = lock(&self.state);
        loop {
            let now = Instant::now();
            let due = state.unfinished.iter().position(|unfinished| unfinished.next <= now);
            if let Some(unfinished) = due.and_then(|due| state.unfinished.remove(due)) {
                drop(state);
                let outcome = attempt(&unfinished);
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::term::properties::leases;

    fn unfinished(version: Option<i64>, now: Instant) -> Unfinished {
        let claim = Claim {
            lock_id: "l".to_owned(),
            owner_id: "o".to_owned(),
            lease_id: uuid::Uuid::new_v4(),
            lease: Duration::from_secs(300),
        };
        match version {
            Some(version) => Unfinished::hold(claim, version, now),
            None => Unfinished::acquire(claim, false, now),
        }
    }

    #[test]
    fn an_acquire_that_is_not_there_yet_is_looked_for_again_and_a_hold_is_not() {
        let now = Instant::now();
        assert!(unfinished(Some(7), now).after(Outcome::NotThere, now).is_none());
        let again = unfinished(None, now).after(Outcome::NotThere, now).expect("again");
        assert!(again.next > now);
        assert!(again.after(Outcome::NotThere, now + STRAY_TIME).is_none());
    }

    #[test]
    fn a_claim_is_looked_for_for_as_long_as_its_statement_may_take_effect() {
        let now = Instant::now();
        let mut left = unfinished(None, now);
        while left.next <= now + CLAIM_LIFE {
            let looked = left.next;
            left = left.after(Outcome::NotThere, looked).expect("another look, as it may come yet");
        }
        assert!(left.after(Outcome::NotThere, now + 2 * CLAIM_LIFE).is_none());
    }

    #[test]
    fn failures_are_repeated_until_the_lease_has_run_out() {
        let now = Instant::now();
        assert!(unfinished(Some(7), now).after(Outcome::Failed, now + Duration::from_secs(299)).is_some());
        assert!(unfinished(Some(7), now).after(Outcome::Failed, now + Duration::from_secs(300)).is_none());
        assert!(unfinished(None, now).after(Outcome::Released, now).is_none());
        assert!(unfinished(None, now).after(Outcome::Refused, now).is_none());
    }

    #[test]
    fn a_place_in_a_row_is_given_up_once_and_failures_are_repeated() {
        let now = Instant::now();
        assert!(Unfinished::place("l", now).after(Outcome::NotThere, now).is_none());
        assert!(Unfinished::place("l", now).after(Outcome::Failed, now + Duration::from_secs(599)).is_some());
        assert!(Unfinished::place("l", now).after(Outcome::Failed, now + LONGEST).is_none());
    }

    proptest! {
        /// Whatever comes of the attempts, and however long each takes.
        #[test]
        fn what_is_followed_up_is_given_up_with_its_lease_and_never_asked_for_in_a_hurry(
            lease in leases(), version in proptest::option::of(any::<i64>()),
            attempts in vec((0..4_u32, 0..3_000_u64), 1..200),
        ) {
            let start = Instant::now();
            let mut left = unfinished(version, start);
            left.claim.as_mut().expect("a claim").claim.lease = lease;
            let lasts = if version.is_some() { lease } else { lease.saturating_add(STRAY_TIME) };
            let mut now = start;
            for (outcome, took) in attempts {
                now = now.max(left.next) + Duration::from_millis(took);
                let outcome = match outcome {
                    0 if took < 10 => Outcome::Released,
                    1 if took < 10 => Outcome::Refused,
                    2 => Outcome::NotThere,
                    _ => Outcome::Failed,
                };
                let ends = matches!(outcome, Outcome::Released | Outcome::Refused)
                    || outcome == Outcome::NotThere && version.is_some()
                    || now >= start + lasts.min(LONGEST);
                let Some(again) = left.after(outcome, now) else {
                    let is_stray_no_more = outcome == Outcome::NotThere && now >= start + STRAY_TIME;
                    prop_assert!(ends || is_stray_no_more, "{:?} after {:?}", outcome, now - start);
                    return Ok(());
                };
                prop_assert!(!ends, "{:?} after {:?}", outcome, now - start);
                prop_assert!(again.next >= now + backoff(1));
                prop_assert!(again.next <= now + LONGEST, "the next look is in {:?}", again.next - now);
                left = again;
            }
        }
    }
}
