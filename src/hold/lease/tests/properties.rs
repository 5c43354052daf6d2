//! What is true of a lease, whatever its length is, and whatever the network and the two clocks do.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Every length of a lease that can be set.
pub(crate) fn leases() -> impl Strategy<Value = Duration> {
    const SECOND: u64 = 1_000_000;
    prop_oneof![SECOND..5 * SECOND, SECOND..120 * SECOND, SECOND..=365 * 24 * 60 * 60 * SECOND]
        .prop_map(Duration::from_micros)
}

/// A part of a lease, or of two leases: 1.0 is one whole lease.
fn parts() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(1.0), 0.0..0.01, 0.0..1.0, 0.99..1.01, 0.0..2.0]
}

/// One refresh in the life of a hold. Times are parts of the lease.
#[derive(Clone, Debug)]
struct Refresh {
    /// How long after the refresh before.
    sent: f64,
    /// How long after it was sent.
    served: f64,
    /// How long after it was served, if it is ever answered.
    answered: Option<f64>,
}

fn refreshes() -> impl Strategy<Value = Vec<Refresh>> {
    let refresh = (parts(), parts(), proptest::option::weighted(0.8, parts()));
    vec(refresh.prop_map(|(sent, served, answered)| Refresh { sent, served, answered }), 0..12)
}

#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Event {
    Served { number: usize },
    Answered { number: usize, sent: Instant },
}

/// How much faster the server's clock may run than ours. Whatever disciplines a clock keeps it within 500 ppm.
const FASTEST: f64 = 1.001;

proptest! {
    /// The lock depends on this property. A hold begins with an acquire that is served some time after it was sent.
    /// Refreshes follow. They are served and answered in any order. The server's clock is a little faster than ours.
    #[test]
    fn a_lease_is_never_trusted_when_it_is_over_on_the_server(
        length in leases(), served in parts(), answered in parts(), recognised in proptest::option::of(parts()),
        refreshes in refreshes(), rate in prop_oneof![Just(FASTEST), Just(1.0), 0.999..FASTEST],
    ) {
        let start = Instant::now();
        // The server counts the length of the lease in microseconds. On our clock that time passes sooner.
        let on_server = |since: Instant| since + Duration::from_micros(length.as_micros() as u64).div_f64(rate);
        // The acquire took the lock, or its repetition found that an earlier one had done so some time ago.
        let served = start + length.mul_f64(served);
        let granted = served.checked_sub(length.mul_f64(recognised.unwrap_or(0.0))).unwrap_or(served);
        let mut end = on_server(granted);
        let left = Duration::from_micros(end.saturating_duration_since(served).mul_f64(rate).as_micros() as u64);
        let mut lease = Lease::new(start, left, length);
        let mut now = served + length.mul_f64(answered);
        prop_assert!(left.is_zero() || lease.deadline() <= end, "trusted from the beginning: {lease:?}");

        let mut events = Vec::new();
        let mut sent = now;
        for (number, refresh) in refreshes.iter().enumerate() {
            sent += length.mul_f64(refresh.sent);
            let served = sent + length.mul_f64(refresh.served);
            events.push((served, Event::Served { number }));
            if let Some(answered) = refresh.answered {
                events.push((served + length.mul_f64(answered), Event::Answered { number, sent }));
            }
        }
        events.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let mut was_served = vec![false; refreshes.len()];
        for (at, event) in events {
            // The last instant before this event at which the hold may be trusted.
            let last = (lease.deadline() - Duration::from_nanos(1)).min(at - Duration::from_nanos(1));
            let is_trusted = last >= now && lease.is_held(last);
            prop_assert!(!is_trusted || last < end, "{lease:?} at {last:?}, but over at {end:?}");
            now = at;
            match event {
                // The server renews a lease that has not run out.
                Event::Served { number } => {
                    was_served[number] = now < end;
                    end = if now < end { on_server(now) } else { end };
                }
                Event::Answered { number, sent } if was_served[number] => lease.extend(now, sent),
                Event::Answered { .. } => lease.lose(),
            }
        }
        let last = lease.deadline() - Duration::from_nanos(1);
        let is_trusted = last >= now && lease.is_held(last);
        prop_assert!(!is_trusted || last < end, "{lease:?} at last, but over at {end:?}");
    }

    #[test]
    fn a_deadline_is_never_later_than_what_was_granted_less_the_margin(
        length in leases(), left in parts(), sent in parts(),
    ) {
        let (start, left) = (Instant::now(), length.mul_f64(left));
        let mut lease = Lease::new(start, left, length);
        prop_assert!(lease.deadline() <= start + left.saturating_sub(safety_margin(length)).min(length));
        prop_assert!(!lease.is_held(start) || left > safety_margin(length));
        let (before, sent) = (lease.deadline(), start + length.mul_f64(sent));
        lease.extend(start, sent);
        prop_assert!(lease.deadline() <= before.max(sent + (length - safety_margin(length))));
    }

    /// Not even an answer to a request that was sent in time does, nor any answer after the server said that the hold
    /// is lost.
    #[test]
    fn nothing_revives_a_hold_that_is_over(
        length in leases(), left in parts(), answers in vec((parts(), parts(), any::<bool>()), 1..12),
    ) {
        let start = Instant::now();
        let mut lease = Lease::new(start, length.mul_f64(left), length);
        let (mut now, mut was_over) = (start, !lease.is_held(start));
        for (after, age, is_loss) in answers {
            now += length.mul_f64(after / 2.0);
            was_over |= !lease.is_held(now);
            if is_loss && age > 1.0 {
                lease.lose();
            } else {
                lease.extend(now, now.checked_sub(length.mul_f64(age)).unwrap_or(now));
            }
            prop_assert!(!was_over || !lease.is_held(now), "{lease:?} at {now:?}");
            prop_assert_eq!(lease.is_held(now), lease.remaining(now) > Duration::ZERO);
        }
    }

    #[test]
    fn an_extension_depends_on_when_it_was_asked_for_and_not_on_when_it_was_answered(
        length in leases(), sent in 0.0..0.5, other in 0.0..0.5, answered in 0.5..0.85, later in 0.5..0.85,
    ) {
        let start = Instant::now();
        let [sent, other, answered, later] = [sent, other, answered, later].map(|part| start + length.mul_f64(part));
        let extended = |answers: &[(Instant, Instant)]| {
            let mut lease = Lease::new(start, length, length);
            answers.iter().for_each(|(now, sent)| lease.extend(*now, *sent));
            lease.deadline()
        };
        prop_assert_eq!(extended(&[(answered, sent)]), extended(&[(later, sent)]));
        // The order of two answers doesn't matter. A repeated answer changes nothing. No answer takes time away.
        let in_order = extended(&[(answered, sent), (answered, other)]);
        prop_assert_eq!(in_order, extended(&[(answered, other), (answered, sent)]));
        prop_assert_eq!(extended(&[(answered, sent), (later, sent)]), extended(&[(answered, sent)]));
        prop_assert!(extended(&[(answered, sent)]) >= extended(&[]));
        prop_assert!(extended(&[(answered, sent.max(other))]) >= extended(&[(answered, sent.min(other))]));
    }

    #[test]
    fn a_refresh_is_due_after_its_interval_or_while_there_is_time_to_repeat_it(
        length in leases(), left in parts(), interval in parts(),
    ) {
        let start = Instant::now();
        let (lease, interval) = (Lease::new(start, length.mul_f64(left), length), length.mul_f64(interval));
        let next = lease.next_refresh(interval);
        prop_assert!(next <= start + interval);
        let for_repeating = retry_time(length) - safety_margin(length);
        prop_assert!(next + for_repeating <= lease.deadline() || next <= start, "{lease:?} is refreshed at {next:?}");
    }

    #[test]
    fn attempts_are_bounded_and_leave_time_for_another(length in leases(), left in parts(), now in parts()) {
        let start = Instant::now();
        let (lease, now) = (Lease::new(start, length.mul_f64(left), length), start + length.mul_f64(now));
        let time = lease.attempt_time(now);
        prop_assert!((SHORTEST_ATTEMPT..=LONGEST_ATTEMPT).contains(&time));
        prop_assert!(time == SHORTEST_ATTEMPT || time <= lease.remaining(now) / 2);
    }
}
