//! What was left unfinished: acquires and releases whose outcome nobody knows, and places in rows for nobody.
//!
//! One thread of a storage, while there is something to do, releases what such a claim may have taken, or may not have
//! given back. A claim is named by its lease, so this touches no other hold. A caller that gives up a started call
//! hands its claim over here immediately, while the call itself may still be stuck.
//!
//! The follow-up of a claim ends at the first of these:
//! - the database has confirmed the release;
//! - the claim has expired, and no acquire of the lock is about to commit;
//! - the lease has run out by itself;
//! - ten minutes have passed.
//!
//! Claims go before places in rows. Work that has failed less often goes first, so that a locked row delays its own
//! work only.

use std::cmp::Reverse;
use std::time::Duration;

use crate::answer::Claim;
use crate::sync::{Condvar, Instant, Mutex, lock, wait_until};
use crate::term::backoff;

/// For clocks that part, after a claim has expired.
const SLACK: Duration = Duration::from_secs(1);
/// How often to look for what may come yet: at first, and later.
const FIRST_LOOKS: Duration = Duration::from_millis(250);
const LAST_LOOKS: Duration = Duration::from_secs(2);
/// Nothing is followed up for longer, however long its lease is.
const LONGEST: Duration = Duration::from_secs(10 * 60);

/// Something to be undone.
#[derive(Clone, Debug)]
pub(crate) struct Unfinished {
    pub(crate) work: Work,
    since: Instant,
    failures: u32,
    next: Instant,
}

#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// A hold that may not have been given back.
    Hold { claim: Claim, version: i64 },
    /// An acquire that may have happened, or may happen until its claim expires.
    Acquire { claim: Claim },
    /// The process may stand in the row of a lock for which nobody of it waits, or may come to stand there until then.
    Place { lock_id: String, until: Instant },
}

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was there, and is undone.
    Undone,
    /// It isn't there.
    NotThere,
    Failed,
}

impl Unfinished {
    pub(crate) fn hold(claim: Claim, version: i64, now: Instant) -> Unfinished {
        Unfinished::new(Work::Hold { claim, version }, now)
    }

    pub(crate) fn acquire(claim: Claim, now: Instant) -> Unfinished {
        Unfinished::new(Work::Acquire { claim }, now)
    }

    pub(crate) fn place(lock_id: &str, until: Instant, now: Instant) -> Unfinished {
        Unfinished::new(Work::Place { lock_id: lock_id.to_owned(), until }, now)
    }

    fn new(work: Work, now: Instant) -> Unfinished {
        Unfinished { work, since: now, failures: 0, next: now }
    }

    /// What is left to do after an attempt, if anything.
    fn after(mut self, outcome: Outcome, now: Instant) -> Option<Unfinished> {
        // By when nothing is left, whatever the database says.
        let longest = self.since + LONGEST;
        let (is_done, ends) = match &self.work {
            Work::Hold { claim, .. } => (outcome != Outcome::Failed, self.since + claim.lease.min(LONGEST)),
            Work::Acquire { claim } => {
                let is_over = now >= claim.expires + SLACK;
                let is_done = outcome == Outcome::Undone || outcome == Outcome::NotThere && is_over;
                (is_done, claim.expires + SLACK + claim.lease.min(LONGEST))
            }
            Work::Place { until, .. } => (outcome != Outcome::Failed && now >= *until, longest),
        };
        if is_done || now >= ends.min(longest) {
            return None;
        }
        let age = now.duration_since(self.since);
        self.failures = if outcome == Outcome::Failed { self.failures.saturating_add(1) } else { 0 };
        let pause =
            if outcome == Outcome::Failed { backoff(self.failures) } else { (age / 2).clamp(FIRST_LOOKS, LAST_LOOKS) };
        self.next = now + pause;
        Some(self)
    }

    /// What goes before others that are due.
    fn urgency(&self) -> impl Ord + use<> {
        (matches!(self.work, Work::Place { .. }), self.failures, self.next)
    }

    /// Whether this is the same place; it is looked for until the later of both.
    fn joins(&self, other: &mut Unfinished) -> bool {
        match (&self.work, &mut other.work) {
            (Work::Place { lock_id, until }, Work::Place { lock_id: other_id, until: other_until })
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
pub(crate) struct FollowUps {
    state: Mutex<State>,
    added: Condvar,
}

#[derive(Default)]
struct State {
    unfinished: Vec<Unfinished>,
    has_thread: bool,
}

impl FollowUps {
    /// Takes something up, and says whether its caller has to start the thread that runs [`run`](Self::run).
    pub(crate) fn add(&self, unfinished: Unfinished) -> bool {
        let mut state = lock(&self.state);
        if !state.unfinished.iter_mut().any(|other| unfinished.joins(other)) {
            state.unfinished.push(unfinished);
        }
        self.added.notify_one();
        !std::mem::replace(&mut state.has_thread, true)
    }

    /// The thread could not be started.
    pub(crate) fn give_up(&self) {
        *lock(&self.state) = State::default();
    }

    /// Follows up until nothing is left.
    pub(crate) fn run(&self, attempt: impl Fn(&Work) -> Outcome) {
        let mut state = lock(&self.state);
        loop {
            let now = Instant::now();
            let due = (0_usize..).zip(&state.unfinished).filter(|(_, unfinished)| unfinished.next <= now);
            let most_urgent = due.max_by_key(|(_, unfinished)| Reverse(unfinished.urgency())).map(|(at, _)| at);
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::sql::CLAIM_LIFE;
    use crate::term::properties::leases;

    fn claim(now: Instant) -> Claim {
        Claim {
            lock_id: "l".to_owned(),
            owner_id: "o".to_owned(),
            lease_id: uuid::Uuid::new_v4(),
            lease: Duration::from_secs(300),
            expires: now + CLAIM_LIFE,
        }
    }

    fn hold(now: Instant) -> Unfinished {
        Unfinished::hold(claim(now), 7, now)
    }

    fn acquire(now: Instant) -> Unfinished {
        Unfinished::acquire(claim(now), now)
    }

    #[test]
    fn a_claim_is_looked_for_for_as_long_as_its_statement_may_take_effect() {
        let now = Instant::now();
        assert!(hold(now).after(Outcome::NotThere, now).is_none());
        let again = acquire(now).after(Outcome::NotThere, now).expect("again");
        assert!(again.next > now);
        assert!(again.clone().after(Outcome::NotThere, now + CLAIM_LIFE).is_some());
        assert!(again.after(Outcome::NotThere, now + CLAIM_LIFE + SLACK).is_none());
    }

    #[test]
    fn failures_are_repeated_until_the_lease_has_run_out() {
        let now = Instant::now();
        assert!(hold(now).after(Outcome::Failed, now + Duration::from_secs(299)).is_some());
        assert!(hold(now).after(Outcome::Failed, now + Duration::from_secs(300)).is_none());
        // What came late has its lease from then on.
        let lasts = CLAIM_LIFE + SLACK + Duration::from_secs(300);
        assert!(acquire(now).after(Outcome::Failed, now + lasts - Duration::from_millis(1)).is_some());
        assert!(acquire(now).after(Outcome::Failed, now + lasts).is_none());
        assert!(acquire(now).after(Outcome::Undone, now).is_none());
    }

    #[test]
    fn a_place_in_a_row_is_given_up_once_and_failures_are_repeated() {
        let now = Instant::now();
        let place = |until| Unfinished::place("l", until, now);
        assert!(place(now).after(Outcome::NotThere, now).is_none());
        assert!(place(now).after(Outcome::Failed, now + Duration::from_secs(599)).is_some());
        assert!(place(now).after(Outcome::Failed, now + LONGEST).is_none());
        // A late copy of the request may yet put the process there.
        let later = now + CLAIM_LIFE;
        assert!(place(later).after(Outcome::Undone, now).is_some());
        assert!(place(later).after(Outcome::NotThere, later).is_none());
    }

    #[test]
    fn whatever_number_is_left_all_of_it_is_tried_and_places_of_a_lock_are_one() {
        let (follow_ups, now) = (FollowUps::default(), Instant::now());
        for n in 0..3_000 {
            follow_ups.add(Unfinished::place(&format!("l{}", n % 1_500), now, now));
            follow_ups.add(hold(now));
        }
        let tried = RefCell::new((0, 0));
        follow_ups.run(|work| {
            let (places, holds) = &mut *tried.borrow_mut();
            *(if matches!(work, Work::Place { .. }) { places } else { holds }) += 1;
            Outcome::NotThere
        });
        assert_eq!(tried.into_inner(), (1_500, 3_000));
    }

    #[test]
    fn what_fails_again_and_again_keeps_no_other_claim_waiting() {
        let (follow_ups, now) = (FollowUps::default(), Instant::now());
        for n in 0..100 {
            follow_ups.add(Unfinished::place(&format!("l{n}"), now, now));
            follow_ups.add(Unfinished { failures: 3, ..hold(now) });
        }
        let fresh = acquire(now);
        let Work::Acquire { claim } = &fresh.work else { panic!("an acquire") };
        let lease_id = claim.lease_id;
        follow_ups.add(fresh);
        let first = RefCell::new(None);
        follow_ups.run(|work| {
            let of = match work {
                Work::Hold { claim, .. } | Work::Acquire { claim } => Some(claim.lease_id),
                Work::Place { .. } => None,
            };
            first.borrow_mut().get_or_insert(of);
            Outcome::Undone
        });
        assert_eq!(first.into_inner(), Some(Some(lease_id)));
    }

    proptest! {
        /// Whatever comes of the attempts, and however long each takes.
        #[test]
        fn what_is_followed_up_is_given_up_with_its_lease_and_never_asked_for_in_a_hurry(
            lease in leases(), is_hold: bool, attempts in vec((0..3_u32, 0..3_000_u64), 1..200),
        ) {
            let start = Instant::now();
            let claim = Claim { lease, ..claim(start) };
            let expires = claim.expires + SLACK;
            let mut left =
                if is_hold { Unfinished::hold(claim, 7, start) } else { Unfinished::acquire(claim, start) };
            let ends = start + if is_hold { lease } else { lease.saturating_add(expires - start) }.min(LONGEST);
            let mut now = start;
            for (outcome, took) in attempts {
                now = now.max(left.next) + Duration::from_millis(took);
                let outcome = match outcome {
                    0 if took < 10 => Outcome::Undone,
                    1 => Outcome::NotThere,
                    _ => Outcome::Failed,
                };
                let is_over = outcome == Outcome::Undone
                    || outcome == Outcome::NotThere && (is_hold || now >= expires)
                    || now >= ends;
                let Some(again) = left.after(outcome, now) else {
                    prop_assert!(is_over, "{:?} after {:?}", outcome, now - start);
                    return Ok(());
                };
                prop_assert!(!is_over, "{:?} after {:?}", outcome, now - start);
                prop_assert!(again.next >= now + backoff(1));
                prop_assert!(again.next <= now + LAST_LOOKS, "the next look is in {:?}", again.next - now);
                left = again;
            }
        }
    }
}
