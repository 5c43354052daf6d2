//! What holds of a term whatever the lease, the network and the two clocks do.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// All leases that can be set.
pub(crate) fn leases() -> impl Strategy<Value = Duration> {
    const SECOND: u64 = 1_000_000;
    prop_oneof![SECOND..5 * SECOND, SECOND..120 * SECOND, SECOND..=365 * 24 * 60 * 60 * SECOND]
        .prop_map(Duration::from_micros)
}

/// A part of a lease, or of two: 1.0 is the whole.
fn parts() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(1.0), 0.0..0.01, 0.0..1.0, 0.99..1.01, 0.0..2.0]
}

/// What happens in the life of a hold, in parts of its lease.
#[derive(Clone, Debug)]
struct Refresh {
    /// Sent so long after the one before, served so long after that, answered so long after that, if it ever is.
    sent: f64,
    served: f64,
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

/// By how much the server's clock may run faster than ours. Each is kept within 500 ppm by whoever disciplines it.
const FASTEST: f64 = 1.001;

proptest! {
    /// The one property that the lock stands on. A hold begins by an acquire that is served some time after it was sent;
    /// refreshes follow, in any order of service and of answers; the server's clock is a little faster than ours.
    #[test]
    fn a_term_is_never_trusted_when_the_lease_is_over_on_the_server(
        lease in leases(), served in parts(), answered in parts(), recognised in proptest::option::of(parts()),
        refreshes in refreshes(), rate in prop_oneof![Just(FASTEST), Just(1.0), 0.999..FASTEST],
    ) {
        let start = Instant::now();
        // What the server counts as its lease, in microseconds, passes sooner here.
        let on_server = |since: Instant| since + Duration::from_micros(lease.as_micros() as u64).div_f64(rate);
        // An acquire that took the lock, or found on repetition that an earlier one, some time ago, had.
        let served = start + lease.mul_f64(served);
        let granted = served.checked_sub(lease.mul_f64(recognised.unwrap_or(0.0))).unwrap_or(served);
        let mut end = on_server(granted);
        let left = Duration::from_micros(end.saturating_duration_since(served).mul_f64(rate).as_micros() as u64);
        let mut term = Term::new(start, left, lease);
        let mut now = served + lease.mul_f64(answered);
        prop_assert!(left.is_zero() || term.deadline() <= end, "trusted from the beginning: {term:?}");

        let mut events = Vec::new();
        let mut sent = now;
        for (number, refresh) in refreshes.iter().enumerate() {
            sent += lease.mul_f64(refresh.sent);
            let served = sent + lease.mul_f64(refresh.served);
            events.push((served, Event::Served { number }));
            if let Some(answered) = refresh.answered {
                events.push((served + lease.mul_f64(answered), Event::Answered { number, sent }));
            }
        }
        events.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let mut was_served = vec![false; refreshes.len()];
        for (at, event) in events {
            // The last instant before this event at which the hold is trusted.
            let last = (term.deadline() - Duration::from_nanos(1)).min(at - Duration::from_nanos(1));
            prop_assert!(last < now || !term.is_held(last) || last < end, "{term:?} at {last:?}, but over at {end:?}");
            now = at;
            match event {
                // The server renews what has not run out.
                Event::Served { number } => {
                    was_served[number] = now < end;
                    end = if now < end { on_server(now) } else { end };
                }
                Event::Answered { number, sent } if was_served[number] => term.extend(now, sent),
                Event::Answered { .. } => term.lose(),
            }
        }
        let last = term.deadline() - Duration::from_nanos(1);
        prop_assert!(last < now || !term.is_held(last) || last < end, "{term:?} at last, but over at {end:?}");
    }

    #[test]
    fn a_deadline_is_never_later_than_what_was_granted_less_the_margin(lease in leases(), left in parts(), sent in parts()) {
        let (start, left) = (Instant::now(), lease.mul_f64(left));
        let mut term = Term::new(start, left, lease);
        prop_assert!(term.deadline() <= start + left.saturating_sub(safety_margin(lease)).min(lease));
        prop_assert!(!term.is_held(start) || left > safety_margin(lease));
        let (before, sent) = (term.deadline(), start + lease.mul_f64(sent));
        term.extend(start, sent);
        prop_assert!(term.deadline() <= before.max(sent + (lease - safety_margin(lease))));
    }

    /// Also not by an answer to a request that was sent in time, and not when it was lost by word of the server.
    #[test]
    fn nothing_revives_a_hold_that_is_over(
        lease in leases(), left in parts(), answers in vec((parts(), parts(), any::<bool>()), 1..12),
    ) {
        let start = Instant::now();
        let mut term = Term::new(start, lease.mul_f64(left), lease);
        let (mut now, mut was_over) = (start, !term.is_held(start));
        for (after, age, is_loss) in answers {
            now += lease.mul_f64(after / 2.0);
            was_over |= !term.is_held(now);
            if is_loss && age > 1.0 {
                term.lose();
            } else {
                term.extend(now, now.checked_sub(lease.mul_f64(age)).unwrap_or(now));
            }
            prop_assert!(!was_over || !term.is_held(now), "{term:?} at {now:?}");
            prop_assert_eq!(term.is_held(now), term.remaining(now) > Duration::ZERO);
        }
    }

    #[test]
    fn an_extension_depends_on_when_it_was_asked_for_and_not_on_when_it_was_answered(
        lease in leases(), sent in 0.0..0.5, other in 0.0..0.5, answered in 0.5..0.85, later in 0.5..0.85,
    ) {
        let start = Instant::now();
        let [sent, other, answered, later] = [sent, other, answered, later].map(|part| start + lease.mul_f64(part));
        let extended = |answers: &[(Instant, Instant)]| {
            let mut term = Term::new(start, lease, lease);
            answers.iter().for_each(|(now, sent)| term.extend(*now, *sent));
            term.deadline()
        };
        prop_assert_eq!(extended(&[(answered, sent)]), extended(&[(later, sent)]));
        // The order of two answers doesn't matter, an answer that is served twice doesn't, and none takes time away.
        prop_assert_eq!(extended(&[(answered, sent), (answered, other)]), extended(&[(answered, other), (answered, sent)]));
        prop_assert_eq!(extended(&[(answered, sent), (later, sent)]), extended(&[(answered, sent)]));
        prop_assert!(extended(&[(answered, sent)]) >= extended(&[]));
        prop_assert!(extended(&[(answered, sent.max(other))]) >= extended(&[(answered, sent.min(other))]));
    }

    #[test]
    fn a_refresh_is_due_after_its_interval_or_while_there_is_time_to_repeat_it(
        lease in leases(), left in parts(), interval in parts(),
    ) {
        let start = Instant::now();
        let (term, interval) = (Term::new(start, lease.mul_f64(left), lease), lease.mul_f64(interval));
        let next = term.next_refresh(interval);
        prop_assert!(next <= start + interval);
        let for_repeating = retry_time(lease) - safety_margin(lease);
        prop_assert!(next + for_repeating <= term.deadline() || next <= start, "{term:?} is refreshed at {next:?}");
    }

    #[test]
    fn attempts_are_bounded_and_leave_time_for_another(lease in leases(), left in parts(), now in parts()) {
        let start = Instant::now();
        let (term, now) = (Term::new(start, lease.mul_f64(left), lease), start + lease.mul_f64(now));
        let time = term.attempt_time(now);
        prop_assert!((SHORTEST_ATTEMPT..=LONGEST_ATTEMPT).contains(&time));
        prop_assert!(time == SHORTEST_ATTEMPT || time <= term.remaining(now) / 2);
    }

    #[test]
    fn a_backoff_never_shrinks_and_stays_within_its_bounds(failures in any::<u32>(), more in any::<u32>()) {
        let (one, later) = (backoff(failures), backoff(failures.saturating_add(more)));
        prop_assert!(FIRST_BACKOFF <= one && one <= later && later <= LONGEST_BACKOFF);
    }
}
