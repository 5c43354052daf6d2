//! When a hold is trusted, refreshed and lost, by example.

use super::*;

const LEASE: Duration = Duration::from_secs(30);
const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn the_deadline_counts_from_the_request() {
    let sent = Instant::now();
    let lease = Lease::new(sent, LEASE, LEASE);
    assert_eq!(lease.deadline(), sent + s(29));
    assert!(lease.is_held(sent + s(28)));
    assert!(!lease.is_held(sent + s(29)));
    assert_eq!(lease.remaining(sent + s(9)), s(20));
    assert_eq!(lease.remaining(sent + s(99)), s(0));
}

#[test]
fn slow_refresh_does_not_extend_the_deadline() {
    let start = Instant::now();
    let mut lease = Lease::new(start, LEASE, LEASE);
    // A refresh was sent at 5 s and answered at 28 s: the lease counts from 5 s.
    lease.extend(start + s(28), start + s(5));
    assert_eq!(lease.deadline(), start + s(34));
    // A refresh was sent at 6 s, but answered when the deadline had passed.
    lease.extend(start + s(34), start + s(6));
    assert_eq!(lease.deadline(), start + s(34));
    assert!(!lease.is_held(start + s(34)));
}

#[test]
fn an_older_answer_does_not_shorten_the_term() {
    let start = Instant::now();
    let mut lease = Lease::new(start, LEASE, LEASE);
    lease.extend(start + s(11), start + s(10));
    lease.extend(start + s(12), start + s(5));
    assert_eq!(lease.deadline(), start + s(39));
}

#[test]
fn a_lost_hold_stays_lost() {
    let start = Instant::now();
    let mut lease = Lease::new(start, LEASE, LEASE);
    lease.lose();
    lease.extend(start + s(1), start);
    assert!(!lease.is_held(start + s(1)));
    assert_eq!(lease.remaining(start + s(1)), s(0));
}

#[test]
fn a_hold_lasts_as_long_as_the_server_says() {
    let sent = Instant::now();
    assert_eq!(Lease::new(sent, s(10), LEASE).deadline(), sent + s(9));
    assert!(!Lease::new(sent, s(1), LEASE).is_held(sent));
    assert_eq!(Lease::new(sent, s(99), LEASE).deadline(), sent + s(29));
}

#[test]
fn the_margin_covers_clocks_of_different_speeds_however_long_the_lease_is() {
    assert_eq!(safety_margin(s(1)), Duration::from_millis(100));
    assert_eq!(safety_margin(s(30)), s(1));
    assert_eq!(safety_margin(s(1_000)), s(1));
    let sent = Instant::now();
    assert!(!Lease::new(sent, s(86_400), s(86_400)).is_held(sent + s(86_400).div_f64(1.001)));
}

#[test]
fn attempts_leave_time_for_another() {
    let start = Instant::now();
    let lease = Lease::new(start, LEASE, LEASE);
    assert_eq!(lease.attempt_time(start), s(5));
    assert_eq!(lease.attempt_time(start + s(27)), s(1));
    assert_eq!(lease.attempt_time(start + s(99)), SHORTEST_ATTEMPT);
}

#[test]
fn a_refresh_is_due_after_its_interval_and_never_too_late_to_repeat_it() {
    let sent = Instant::now();
    assert_eq!(Lease::new(sent, LEASE, LEASE).next_refresh(s(5)), sent + s(5));
    assert_eq!(Lease::new(sent, LEASE, LEASE).next_refresh(s(20)), sent + s(20));
    // With 15 s left, the deadline is at 14 s, and the last 9 s are for repeating the refresh.
    assert_eq!(Lease::new(sent, s(15), LEASE).next_refresh(s(20)), sent + s(5));
}

pub(crate) mod properties;
