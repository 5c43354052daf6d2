//! How long callers wait, when their attempts end, and how long waiters pause.

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
    assert!(WaitLimit::lasting(Duration::ZERO).is_over(Instant::now()));
    assert!(matches!(WaitLimit::lasting(Duration::MAX), WaitLimit::Forever));
    assert!(!WaitLimit::Forever.is_over(now + Duration::from_secs(1_000_000)));
}

#[test]
fn an_attempt_ends_soon_after_the_patience() {
    let (now, long) = (Instant::now(), Duration::from_secs(10));
    for has_waited in [false, true] {
        let deadline = |limit: WaitLimit| limit.attempt_deadline(now, long, has_waited);
        assert_eq!(deadline(WaitLimit::Until(now + 2_000 * MS)), now + 2_500 * MS);
        assert_eq!(deadline(WaitLimit::Until(now + 99 * long)), now + long);
        assert_eq!(deadline(WaitLimit::Until(last_instant(now))), now + long);
        assert_eq!(deadline(WaitLimit::Forever), now + long);
    }
    let over = WaitLimit::Until(now - 200 * MS);
    assert_eq!(over.attempt_deadline(now, long, false), now + 500 * MS);
    assert_eq!(over.attempt_deadline(now, long, true), now + 300 * MS);
}

#[test]
fn pauses_grow_to_a_second_with_jitter() {
    for (rounds, full) in [(0, 16), (1, 32), (3, 128), (6, 1_000), (u32::MAX, 1_000)] {
        let pauses: Vec<_> = (0..100).map(|_| poll_interval(rounds, None)).collect();
        assert!(pauses.iter().all(|pause| (full / 2 * MS..=full * MS).contains(pause)), "{rounds}: {pauses:?}");
        assert!(pauses.iter().any(|pause| *pause != pauses[0]), "no jitter");
    }
}

#[test]
fn a_pause_ends_with_the_lease() {
    assert_eq!(poll_interval(9, Some(7 * MS)), 7 * MS);
}

fn any_duration() -> impl Strategy<Value = Duration> {
    let any = (any::<u64>(), 0..1_000_000_000_u32).prop_map(|(seconds, nanos)| Duration::new(seconds, nanos));
    prop_oneof![Just(Duration::ZERO), Just(Duration::MAX), any, (0..100_000_u64).prop_map(Duration::from_millis)]
}

proptest! {
    #[test]
    fn no_patience_panics_and_its_attempts_end_in_time(
        lasting in any_duration(), later in 0..100_000_u32, longest in 0..5_000_000_u32,
        has_waited: bool, is_last: bool,
    ) {
        let start = Instant::now();
        let limit = if is_last { WaitLimit::Until(last_instant(start)) } else { WaitLimit::lasting(lasting) };
        let (now, longest) = (start + later * MS, longest * MS);
        let (end, attempt) = (limit.end(now), limit.attempt_deadline(now, longest, has_waited));
        prop_assert_eq!(limit.is_over(now), end <= now);
        prop_assert!(attempt <= now + longest);
        prop_assert!(attempt <= end.max(now).checked_add(SLACK).unwrap_or(end));
        // A caller that waited is back soon after its limit, even if that limit ended some time ago.
        prop_assert!(!has_waited || end.checked_add(SLACK).is_none_or(|end| attempt <= end));
        prop_assert!(has_waited || attempt >= now + longest.min(SLACK));
    }

    #[test]
    fn a_pause_is_within_its_bounds(rounds: u32, left in proptest::option::of(any_duration())) {
        let pause = poll_interval(rounds, left);
        prop_assert!(pause <= LONGEST_POLL_INTERVAL && left.is_none_or(|left| pause <= left));
        prop_assert!(pause >= FIRST_POLL_INTERVAL / 2 || Some(pause) == left, "{:?}", pause);
    }
}
