//! The time arithmetic of a hold. It reads no clock: callers pass `now`, so that tests need no waiting.
//! Uses `sync` only.
//!
//! Invariant: this process alone decides whether it trusts a hold, and stops early. It trusts a hold until the
//! *deadline*:
//!
//! ```text
//! deadline = instant just before the request was sent + time left on the lease in the answer − safety margin
//! ```
//!
//! The database starts the lease after the request was sent. So the deadline comes before the end of the lease, however
//! long the answer takes. A late answer can't move a deadline that has passed: a lost hold stays lost.

use std::time::Duration;

use crate::sync::Instant;

/// The longest that one attempt to refresh may take before another attempt is made on another connection.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(5);
const SHORTEST_ATTEMPT: Duration = Duration::from_millis(20);

/// How long before the end of the lease the deadline is.
///
/// The margin covers clocks that run at slightly different speeds, and what a caller does between the call of `is_held`
/// and acting on the result. Two disciplined clocks, each within 500 ppm, drift apart by at most a thousandth of the
/// lease. Where that is more than a second, it is the margin.
pub(crate) fn safety_margin(lease: Duration) -> Duration {
    (lease / 10).min(Duration::from_secs(1)).max(lease / 1_000)
}

/// How much of a lease must be left to repeat a refresh that failed.
pub(crate) fn retry_time(lease: Duration) -> Duration {
    (lease / 3).max(Duration::from_millis(300))
}

/// For how long a hold is trusted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease {
    /// When the request was sent that last granted or renewed the lease.
    sent: Instant,
    deadline: Instant,
    length: Duration,
    is_lost: bool,
}

impl Lease {
    /// A lease of `length`, of which `left` was left when the database answered a request that was sent at `sent`.
    pub(crate) fn new(sent: Instant, left: Duration, length: Duration) -> Lease {
        let deadline = sent + left.min(length).saturating_sub(safety_margin(length));
        Lease { sent, deadline, length, is_lost: false }
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

    /// When a loss is reported: a little before the deadline. So callbacks and waiters learn of the loss by the
    /// deadline, although threads wake late.
    pub(crate) fn loss_time(&self) -> Instant {
        self.deadline.checked_sub(safety_margin(self.length) / 10).unwrap_or(self.sent)
    }

    /// Applies the answer to a refresh that was sent at `sent`: the database renewed the lease to its full length. An
    /// answer that comes too late changes nothing.
    pub(crate) fn extend(&mut self, now: Instant, sent: Instant) {
        if self.is_held(now) && sent > self.sent {
            self.sent = sent;
            self.deadline = self.deadline.max(sent + (self.length - safety_margin(self.length)));
        }
    }

    /// When to refresh: `interval` after the last request. It is sooner where little of the lease is left, as after a
    /// slow answer to an acquire, so that the refresh can be repeated.
    pub(crate) fn next_refresh(&self, interval: Duration) -> Instant {
        let for_repeating = retry_time(self.length).saturating_sub(safety_margin(self.length));
        (self.sent + interval).min(self.deadline.checked_sub(for_repeating).unwrap_or(self.sent))
    }

    /// Marks the hold as lost, for good.
    pub(crate) fn lose(&mut self) {
        self.is_lost = true;
    }

    /// How long an attempt to refresh may take: short enough to leave time for another attempt if this one is stuck.
    pub(crate) fn attempt_time(&self, now: Instant) -> Duration {
        (self.remaining(now) / 2).clamp(SHORTEST_ATTEMPT, LONGEST_ATTEMPT)
    }
}

#[cfg(test)]
pub(crate) mod tests;
