//! What was left unfinished: acquires and releases whose outcome nobody knows.
//!
//! One thread of a storage, while there is something to do, releases what such a claim may have taken, or may not have given
//! back. A claim is named by its lease, so this hurts nobody else. It ends when the database has confirmed the release, when the
//! lease has run out by itself, or after ten minutes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::answer::Claim;
use crate::sync::{Condvar, Instant, Mutex, lock, wait_until};
use crate::term::backoff;

/// Beyond this number, leases run out by themselves.
const MAX_UNFINISHED: usize = 1_000;
/// An acquire whose connection broke may still be on its way for this long: that there is nothing to release yet says little.
const STRAY_TIME: Duration = Duration::from_secs(60);

const FIRST_LOOKS: Duration = Duration::from_millis(250);
/// Nothing is followed up for longer, however long its lease is.
const LONGEST: Duration = Duration::from_secs(10 * 60);

/// Something to be released.
#[derive(Clone, Debug)]
pub(crate) struct Unfinished {
    pub(crate) claim: Claim,
    /// The version of a hold; none of an acquire that may never have come to be one.
    pub(crate) version: Option<i64>,
    since: Instant,
    failures: u32,
    next: Instant,
}

/// What came of an attempt to release it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Released,
    NotThere,
    Failed,
    Hopeless,
}

impl Unfinished {
    pub(crate) fn new(claim: Claim, version: Option<i64>, now: Instant) -> Unfinished {
        Unfinished { claim, version, since: now, failures: 0, next: now }
    }

    /// What is left to do after an attempt, if anything.
    fn after(mut self, outcome: Outcome, now: Instant) -> Option<Unfinished> {
        let age = now.duration_since(self.since);
        let is_done = match outcome {
            Outcome::Released | Outcome::Hopeless => true,
            Outcome::NotThere => self.version.is_some() || age >= STRAY_TIME,
            Outcome::Failed => false,
        };
        if is_done || age >= self.claim.lease.min(LONGEST) {
            return None;
        }
        self.failures = self.failures.saturating_add(1);
        // Looks four times a second at first, then ever less often.
        let is_not_there = outcome == Outcome::NotThere;
        self.next = now + if is_not_there { (age / 2).max(FIRST_LOOKS) } else { backoff(self.failures) };
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
        Unfinished::new(claim, version, now)
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
    fn failures_are_repeated_until_the_lease_has_run_out() {
        let now = Instant::now();
        assert!(unfinished(Some(7), now).after(Outcome::Failed, now + Duration::from_secs(299)).is_some());
        assert!(unfinished(Some(7), now).after(Outcome::Failed, now + Duration::from_secs(300)).is_none());
        assert!(unfinished(None, now).after(Outcome::Released, now).is_none());
        assert!(unfinished(None, now).after(Outcome::Hopeless, now).is_none());
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
            left.claim.lease = lease;
            let mut now = start;
            for (outcome, took) in attempts {
                now = now.max(left.next) + Duration::from_millis(took);
                let outcome = match outcome {
                    0 if took < 10 => Outcome::Released,
                    1 if took < 10 => Outcome::Hopeless,
                    2 => Outcome::NotThere,
                    _ => Outcome::Failed,
                };
                let ends = matches!(outcome, Outcome::Released | Outcome::Hopeless)
                    || outcome == Outcome::NotThere && version.is_some()
                    || now >= start + lease.min(LONGEST);
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
