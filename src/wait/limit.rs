//! How long a caller waits for a busy lock, and when a waiter asks again if nobody notifies it.
//!
//! Time arithmetic only. Uses `sync`, and nothing else of the library.

use std::time::Duration;

use crate::sync::{Instant, random};

/// How long an attempt may go on after the end of its caller's time.
pub(crate) const SLACK: Duration = Duration::from_millis(500);
/// Short, because a free lock is promised to a waiter for not much longer. A waiter that can't listen has to find the
/// lock in that time.
const FIRST_POLL_INTERVAL: Duration = Duration::from_millis(16);
const LONGEST_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// As good as for ever, and yet every clock can show its end.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// For how long a caller waits for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WaitLimit {
    /// One attempt.
    NoWait,
    /// Until this instant. An instant in the past means one attempt.
    Until(Instant),
    Forever,
}

impl WaitLimit {
    /// A duration lasts for ever if no clock can show its end.
    pub(crate) fn lasting(duration: Duration) -> WaitLimit {
        Instant::now().checked_add(duration).map_or(WaitLimit::Forever, WaitLimit::Until)
    }

    pub(crate) fn end(&self, now: Instant) -> Instant {
        match self {
            WaitLimit::NoWait => now,
            WaitLimit::Until(end) => *end,
            WaitLimit::Forever => now + FOREVER,
        }
    }

    pub(crate) fn is_over(&self, now: Instant) -> bool {
        match self {
            WaitLimit::NoWait => true,
            WaitLimit::Until(end) => *end <= now,
            WaitLimit::Forever => false,
        }
    }

    /// The deadline of an attempt that starts now. The attempt may take `longest` if its caller is in no hurry.
    ///
    /// The limit of a caller that `has_waited` may have ended in the wait queue. Its deadline counts from that end.
    pub(crate) fn attempt_deadline(&self, now: Instant, longest: Duration, has_waited: bool) -> Instant {
        let WaitLimit::Until(end) = *self else { return now + longest };
        let end = if has_waited { end } else { end.max(now) };
        (now + longest).min(with_slack(end))
    }
}

/// When an attempt has to be back whose caller's time ends at `end`.
pub(super) fn with_slack(end: Instant) -> Instant {
    end.checked_add(SLACK).unwrap_or(end)
}

/// The pause after answer number `polls` (from 0) that the lock is busy, with `left` on its lease.
///
/// The pause grows to a second. Its jitter keeps waiters from asking simultaneously. It never outlasts the lease.
pub(crate) fn poll_interval(polls: u32, left: Option<Duration>) -> Duration {
    let full = FIRST_POLL_INTERVAL.saturating_mul(1 << polls.min(8)).min(LONGEST_POLL_INTERVAL);
    let pause = full / 2 + (full / 2).mul_f64(random_fraction());
    left.map_or(pause, |left| pause.min(left))
}

/// Between 0 and 1.
pub(crate) fn random_fraction() -> f64 {
    f64::from(random()) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests;
