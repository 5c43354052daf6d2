//! How long waiters sleep, and when they may take a lock.

use super::*;

const LONG: Duration = Duration::from_secs(600);
const BUSY: Busy = Busy {
    version: 7,
    owner_id: String::new(),
    is_free: false,
    left: LONG,
    has_notified: false,
    position: Some(1),
    waiters: 1,
};

#[test]
fn a_waiter_looks_when_the_lease_ends_that_is_in_the_way() {
    let left = Duration::from_millis(700);
    assert_eq!(Busy { left, ..BUSY }.sleep(1.0), left);
    let second = Busy { left, position: Some(2), waiters: 2, ..BUSY };
    assert!(second.sleep(1.0) > left && second.sleep(1.0) <= left + 2 * GRACE, "{:?}", second.sleep(1.0));
}

#[test]
fn a_waiter_looks_from_time_to_time_whatever_it_was_told() {
    for (position, waiters, longest) in
        [(Some(1), 1, LONGEST_SLEEP), (Some(50), 50, LONGEST_SLEEP), (Some(9), 1_000, LONGEST_SLEEP_OF_MANY)]
    {
        let busy = Busy { position, waiters, ..BUSY };
        assert!(busy.sleep(1.0) <= longest, "{busy:?} sleeps for {:?}", busy.sleep(1.0));
    }
    let without_a_place = Busy { position: None, waiters: MAX_WAITERS, ..BUSY };
    assert!(without_a_place.sleep(1.0) <= LONGEST_SLEEP, "nobody notifies it");
}

#[test]
fn a_free_lock_is_looked_at_soon_however_many_stand_before() {
    for position in [1, 2, 10, 300, MAX_WAITERS] {
        for has_notified in [false, true] {
            let busy = Busy { is_free: true, has_notified, position: Some(position), waiters: position, ..BUSY };
            let longest = GRACE + REACTION_TIME + LONGEST_STEPS;
            assert!(busy.sleep(1.0) <= longest, "{busy:?} sleeps for {:?}", busy.sleep(1.0));
        }
    }
}

#[test]
fn who_has_notified_those_before_it_may_take_that_version() {
    let free = Busy { is_free: true, position: Some(2), waiters: 2, ..BUSY };
    assert_eq!(free.notified_version(), None);
    assert_eq!(Busy { has_notified: true, ..free }.notified_version(), Some(7));
    assert_eq!(Busy { has_notified: true, ..BUSY }.notified_version(), None, "it is held");
}

pub(crate) mod properties;
