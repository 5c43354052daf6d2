//! How long to wait for a busy lock, and when to ask again where nobody tells.

use std::time::Duration;

use crate::sync::{Instant, random};

/// What an attempt that is under way when the caller's time is over may still take.
pub(crate) const SLACK: Duration = Duration::from_millis(500);
/// Short, because a free lock is promised to a waiter that can't listen for not much longer.
const FIRST_PAUSE: Duration = Duration::from_millis(16);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// As good as for ever, and an instant that any clock can show.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// For how long a caller waits for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// One attempt.
    None,
    /// Until then; an instant in the past is one attempt.
    Until(Instant),
    Forever,
}

impl Patience {
    /// A duration so long that no clock can show its end is for ever.
    pub(crate) fn lasting(duration: Duration) -> Patience {
        Instant::now().checked_add(duration).map_or(Patience::Forever, Patience::Until)
    }

    pub(crate) fn end(&self, now: Instant) -> Instant {
        match self {
            Patience::None => now,
            Patience::Until(end) => *end,
            Patience::Forever => now + FOREVER,
        }
    }

    pub(crate) fn is_over(&self, now: Instant) -> bool {
        match self {
            Patience::None => true,
            Patience::Until(end) => *end <= now,
            Patience::Forever => false,
        }
    }

    /// When an attempt that starts now has to be back, given how long it may take where nobody is in a hurry. The patience of
    /// one that `has_waited` may have ended while it stood in line.
    pub(crate) fn attempt_deadline(&self, now: Instant, longest: Duration, has_waited: bool) -> Instant {
        let Patience::Until(end) = *self else { return now + longest };
        let end = if has_waited { end } else { end.max(now) };
        (now + longest).min(end.checked_add(SLACK).unwrap_or(end))
    }
}

/// How long to pause after the `rounds`-th answer (from 0) that the lock is busy with `left` on its lease: a time that grows
/// to a second, with jitter, so that waiters don't ask all at once, but not beyond the end of the lease.
pub(crate) fn pause(rounds: u32, left: Option<Duration>) -> Duration {
    let full = FIRST_PAUSE.saturating_mul(1 << rounds.min(8)).min(LONGEST_PAUSE);
    let pause = full / 2 + (full / 2).mul_f64(random_fraction());
    left.map_or(pause, |left| pause.min(left))
}

/// Between 0 and 1.
pub(crate) fn random_fraction() -> f64 {
    f64::from(random()) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// The last instant that the clock can show.
    fn last_instant(now: Instant) -> Instant {
        let mut last = now;
        for bit in (0..64).rev() {
            last = last.checked_add(Duration::from_nanos(1 << bit)).unwrap_or(last);
            last = last.checked_add(Duration::from_secs(1 << bit)).unwrap_or(last);
        }
        last
    }

    #[test]
    fn a_timeout_of_zero_is_one_attempt_and_an_endless_one_is_for_ever() {
        let now = Instant::now();
        assert!(Patience::lasting(Duration::ZERO).is_over(Instant::now()));
        assert!(matches!(Patience::lasting(Duration::MAX), Patience::Forever));
        assert!(!Patience::Forever.is_over(now + Duration::from_secs(1_000_000)));
    }

    #[test]
    fn an_attempt_ends_soon_after_the_patience() {
        let (now, long) = (Instant::now(), Duration::from_secs(10));
        for has_waited in [false, true] {
            let deadline = |patience: Patience| patience.attempt_deadline(now, long, has_waited);
            assert_eq!(deadline(Patience::Until(now + 2_000 * MS)), now + 2_500 * MS);
            assert_eq!(deadline(Patience::Until(now + 99 * long)), now + long);
            assert_eq!(deadline(Patience::Until(last_instant(now))), now + long);
            assert_eq!(deadline(Patience::Forever), now + long);
        }
        let over = Patience::Until(now - 200 * MS);
        assert_eq!(over.attempt_deadline(now, long, false), now + 500 * MS);
        assert_eq!(over.attempt_deadline(now, long, true), now + 300 * MS);
    }

    #[test]
    fn pauses_grow_to_a_second_with_jitter() {
        for (rounds, full) in [(0, 16), (1, 32), (3, 128), (6, 1_000), (u32::MAX, 1_000)] {
            let pauses: Vec<_> = (0..100).map(|_| pause(rounds, None)).collect();
            assert!(pauses.iter().all(|pause| (full / 2 * MS..=full * MS).contains(pause)), "{rounds}: {pauses:?}");
            assert!(pauses.iter().any(|pause| *pause != pauses[0]), "no jitter");
        }
    }

    #[test]
    fn a_pause_ends_with_the_lease() {
        assert_eq!(pause(9, Some(7 * MS)), 7 * MS);
    }

    fn any_duration() -> impl Strategy<Value = Duration> {
        let any = (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(seconds, nanos)| Duration::new(seconds, nanos));
        prop_oneof![Just(Duration::ZERO), Just(Duration::MAX), any, (0..100_000_u64).prop_map(Duration::from_millis)]
    }

    proptest! {
        #[test]
        fn no_patience_panics_and_its_attempts_end_in_time(
            lasting in any_duration(), later in 0..100_000_u32, longest in 0..5_000_000_u32, has_waited: bool, is_last: bool,
        ) {
            let start = Instant::now();
            let patience = if is_last { Patience::Until(last_instant(start)) } else { Patience::lasting(lasting) };
            let (now, longest) = (start + later * MS, longest * MS);
            let (end, attempt) = (patience.end(now), patience.attempt_deadline(now, longest, has_waited));
            prop_assert_eq!(patience.is_over(now), end <= now);
            prop_assert!(attempt <= now + longest);
            prop_assert!(attempt <= end.max(now).checked_add(SLACK).unwrap_or(end));
            // One that stood in line is back soon after its patience ended, also where that was some time ago.
            prop_assert!(!has_waited || end.checked_add(SLACK).is_none_or(|end| attempt <= end));
            prop_assert!(has_waited || attempt >= now + longest.min(SLACK));
        }

        #[test]
        fn a_pause_is_within_its_bounds(rounds: u32, left in proptest::option::of(any_duration())) {
            let pause = pause(rounds, left);
            prop_assert!(pause <= LONGEST_PAUSE && left.is_none_or(|left| pause <= left));
            prop_assert!(pause >= FIRST_PAUSE / 2 || Some(pause) == left, "{:?}", pause);
        }
    }
}
