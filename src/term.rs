//! The time arithmetic of a hold. Every method takes `now`, so that time can be tested without waiting for it.
//!
//! Invariant: trust is local and early. A hold is trusted until its *deadline*:
//!
//! ```text
//! deadline = instant just before the request was sent + time left on the lease in the answer − safety margin
//! ```
//!
//! The database starts its lease at some moment after the request was sent, so the deadline comes first, however long the
//! answer took. An answer that arrives late can't move a deadline that has passed: a lost hold stays lost.

use std::time::Duration;

use crate::sync::Instant;

/// The longest that one attempt to refresh may take before another one is made on another connection.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(5);
const SHORTEST_ATTEMPT: Duration = Duration::from_millis(20);
const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);

/// What is taken off each lease before the hold is trusted: for clocks that run at slightly different speeds, and for
/// what a caller does between asking `is_held` and acting on it. Two clocks that are disciplined, each by up to 500 ppm, part by a
/// thousandth of a lease at most; where that is more than a second, it is the margin.
pub(crate) fn safety_margin(lease: Duration) -> Duration {
    (lease / 10).min(Duration::from_secs(1)).max(lease / 1_000)
}

/// What must be left of a lease for repeating a refresh that failed.
pub(crate) fn retry_time(lease: Duration) -> Duration {
    (lease / 3).max(Duration::from_millis(300))
}

/// For how long a hold is trusted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Term {
    /// When the request was sent that granted or renewed the lease last.
    sent: Instant,
    deadline: Instant,
    lease: Duration,
    is_lost: bool,
}

impl Term {
    /// A term that was granted by an answer with `left` on the lease, to a request sent at `sent`.
    pub(crate) fn new(sent: Instant, left: Duration, lease: Duration) -> Term {
        let deadline = sent + left.min(lease).saturating_sub(safety_margin(lease));
        Term { sent, deadline, lease, is_lost: false }
    }

    pub(crate) fn is_held(&self, now: Instant) -> bool {
        !self.is_lost && now < self.deadline
    }

    pub(crate) fn remaining(&self, now: Instant) -> Duration {
        if self.is_lost { Duration::ZERO } else { self.deadline.saturating_duration_since(now) }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.is_lost
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// When a loss is told: a little before the deadline, so that whoever is told hears of it by then, although threads wake late.
    pub(crate) fn loss_time(&self) -> Instant {
        self.deadline.checked_sub(safety_margin(self.lease) / 10).unwrap_or(self.sent)
    }

    /// A refresh sent at `sent` was answered: the lease was renewed to its full length. Too late an answer changes nothing.
    pub(crate) fn extend(&mut self, now: Instant, sent: Instant) {
        if self.is_held(now) && sent > self.sent {
            self.sent = sent;
            self.deadline = self.deadline.max(sent + (self.lease - safety_margin(self.lease)));
        }
    }

    /// When to refresh: `interval` after the last time, but early enough to repeat it where the term is a short one, as of
    /// a hold whose answer took long.
    pub(crate) fn next_refresh(&self, interval: Duration) -> Instant {
        let for_repeating = retry_time(self.lease).saturating_sub(safety_margin(self.lease));
        (self.sent + interval).min(self.deadline.checked_sub(for_repeating).unwrap_or(self.sent))
    }

    /// The hold is over, for good.
    pub(crate) fn lose(&mut self) {
        self.is_lost = true;
    }

    /// How long an attempt to refresh may take: short enough to leave time for another, should it be stuck.
    pub(crate) fn attempt_time(&self, now: Instant) -> Duration {
        (self.remaining(now) / 2).clamp(SHORTEST_ATTEMPT, LONGEST_ATTEMPT)
    }
}

/// How long to wait after the `failures`-th failure in a row (from 1).
pub(crate) fn backoff(failures: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_BACKOFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(30);
    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_deadline_counts_from_the_request() {
        let sent = Instant::now();
        let term = Term::new(sent, LEASE, LEASE);
        assert_eq!(term.deadline(), sent + s(29));
        assert!(term.is_held(sent + s(28)));
        assert!(!term.is_held(sent + s(29)));
        assert_eq!(term.remaining(sent + s(9)), s(20));
        assert_eq!(term.remaining(sent + s(99)), s(0));
    }

    #[test]
    fn slow_refresh_does_not_extend_the_deadline() {
        let start = Instant::now();
        let mut term = Term::new(start, LEASE, LEASE);
        // Sent at 5 s, answered at 28 s: the lease counts from 5 s.
        term.extend(start + s(28), start + s(5));
        assert_eq!(term.deadline(), start + s(34));
        // Sent at 6 s, but answered when the term was over.
        term.extend(start + s(34), start + s(6));
        assert_eq!(term.deadline(), start + s(34));
        assert!(!term.is_held(start + s(34)));
    }

    #[test]
    fn an_older_answer_does_not_shorten_the_term() {
        let start = Instant::now();
        let mut term = Term::new(start, LEASE, LEASE);
        term.extend(start + s(11), start + s(10));
        term.extend(start + s(12), start + s(5));
        assert_eq!(term.deadline(), start + s(39));
    }

    #[test]
    fn a_lost_hold_stays_lost() {
        let start = Instant::now();
        let mut term = Term::new(start, LEASE, LEASE);
        term.lose();
        term.extend(start + s(1), start);
        assert!(!term.is_held(start + s(1)));
        assert_eq!(term.remaining(start + s(1)), s(0));
    }

    #[test]
    fn a_hold_lasts_as_long_as_the_server_says() {
        let sent = Instant::now();
        assert_eq!(Term::new(sent, s(10), LEASE).deadline(), sent + s(9));
        assert!(!Term::new(sent, s(1), LEASE).is_held(sent));
        assert_eq!(Term::new(sent, s(99), LEASE).deadline(), sent + s(29));
    }

    #[test]
    fn the_margin_covers_clocks_of_different_speeds_however_long_the_lease_is() {
        assert_eq!(safety_margin(s(1)), Duration::from_millis(100));
        assert_eq!(safety_margin(s(30)), s(1));
        assert_eq!(safety_margin(s(1_000)), s(1));
        let sent = Instant::now();
        assert!(!Term::new(sent, s(86_400), s(86_400)).is_held(sent + s(86_400).div_f64(1.001)));
    }

    #[test]
    fn attempts_leave_time_for_another() {
        let start = Instant::now();
        let term = Term::new(start, LEASE, LEASE);
        assert_eq!(term.attempt_time(start), s(5));
        assert_eq!(term.attempt_time(start + s(27)), s(1));
        assert_eq!(term.attempt_time(start + s(99)), SHORTEST_ATTEMPT);
    }

    #[test]
    fn a_refresh_is_due_after_its_interval_and_never_too_late_to_repeat_it() {
        let sent = Instant::now();
        assert_eq!(Term::new(sent, LEASE, LEASE).next_refresh(s(5)), sent + s(5));
        assert_eq!(Term::new(sent, LEASE, LEASE).next_refresh(s(20)), sent + s(20));
        // With 15 s left: the deadline is at 14 s, and 9 s are for repeating.
        assert_eq!(Term::new(sent, s(15), LEASE).next_refresh(s(20)), sent + s(5));
    }

    #[test]
    fn backoff_grows_to_a_second() {
        let steps: Vec<_> = (1..=8).map(|failures| backoff(failures).as_millis()).collect();
        assert_eq!(steps, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(backoff(u32::MAX), LONGEST_BACKOFF);
    }
}

#[cfg(test)]
// Named, because the fuzzer takes this file in from another folder.
#[path = "term/properties.rs"]
pub(crate) mod properties;
