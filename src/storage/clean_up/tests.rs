//! Which work is repeated, in which order, and until when.

use std::cell::RefCell;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::db::sql::CLAIM_LIFE;
use crate::hold::lease::tests::properties::leases;

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
    assert!(hold(now).after(Outcome::NothingLeft, now).is_none());
    let again = acquire(now).after(Outcome::NothingLeft, now).expect("again");
    assert!(again.next > now);
    assert!(again.clone().after(Outcome::NothingLeft, now + CLAIM_LIFE).is_some());
    assert!(again.after(Outcome::NothingLeft, now + CLAIM_LIFE + CLOCK_SLACK).is_none());
}

#[test]
fn failures_are_repeated_until_the_lease_has_run_out() {
    let now = Instant::now();
    assert!(hold(now).after(Outcome::Failed, now + Duration::from_secs(299)).is_some());
    assert!(hold(now).after(Outcome::Failed, now + Duration::from_secs(300)).is_none());
    // An acquire that happened late has its full lease from then on.
    let lasts = CLAIM_LIFE + CLOCK_SLACK + Duration::from_secs(300);
    assert!(acquire(now).after(Outcome::Failed, now + lasts - Duration::from_millis(1)).is_some());
    assert!(acquire(now).after(Outcome::Failed, now + lasts).is_none());
    assert!(acquire(now).after(Outcome::Undone, now).is_none());
}

#[test]
fn a_place_in_a_row_is_given_up_once_and_failures_are_repeated() {
    let now = Instant::now();
    let entry = |until| Unfinished::row_entry("l", until, now);
    assert!(entry(now).after(Outcome::NothingLeft, now).is_none());
    assert!(entry(now).after(Outcome::Failed, now + Duration::from_secs(599)).is_some());
    assert!(entry(now).after(Outcome::Failed, now + LONGEST).is_none());
    // A late copy of the request may yet put the process into the row.
    let later = now + CLAIM_LIFE;
    assert!(entry(later).after(Outcome::Undone, now).is_some());
    assert!(entry(later).after(Outcome::NothingLeft, later).is_none());
}

#[test]
fn whatever_number_is_left_all_of_it_is_tried_and_places_of_a_lock_are_one() {
    let (clean_ups, now) = (CleanUps::default(), Instant::now());
    for n in 0..3_000 {
        clean_ups.add(Unfinished::row_entry(&format!("l{}", n % 1_500), now, now));
        clean_ups.add(hold(now));
    }
    let tried = RefCell::new((0, 0));
    clean_ups.run(|work| {
        let (entries, holds) = &mut *tried.borrow_mut();
        *(if matches!(work, Work::RowEntry { .. }) { entries } else { holds }) += 1;
        Outcome::NothingLeft
    });
    assert_eq!(tried.into_inner(), (1_500, 3_000));
}

#[test]
fn what_fails_again_and_again_keeps_no_other_claim_waiting() {
    let (clean_ups, now) = (CleanUps::default(), Instant::now());
    for n in 0..100 {
        clean_ups.add(Unfinished::row_entry(&format!("l{n}"), now, now));
        clean_ups.add(Unfinished { failures: 3, ..hold(now) });
    }
    let fresh = acquire(now);
    let Work::Acquire { claim } = &fresh.work else { panic!("an acquire") };
    let lease_id = claim.lease_id;
    clean_ups.add(fresh);
    let first = RefCell::new(None);
    clean_ups.run(|work| {
        let of = match work {
            Work::Hold { claim, .. } | Work::Acquire { claim } => Some(claim.lease_id),
            Work::RowEntry { .. } => None,
        };
        first.borrow_mut().get_or_insert(of);
        Outcome::Undone
    });
    assert_eq!(first.into_inner(), Some(Some(lease_id)));
}

proptest! {
    /// This holds for any outcomes of the attempts, and however long each attempt takes.
    #[test]
    fn what_is_followed_up_is_given_up_with_its_lease_and_never_asked_for_in_a_hurry(
        lease in leases(), is_hold: bool, attempts in vec((0..3_u32, 0..3_000_u64), 1..200),
    ) {
        let start = Instant::now();
        let claim = Claim { lease, ..claim(start) };
        let expires = claim.expires + CLOCK_SLACK;
        let mut left =
            if is_hold { Unfinished::hold(claim, 7, start) } else { Unfinished::acquire(claim, start) };
        let ends = start + if is_hold { lease } else { lease.saturating_add(expires - start) }.min(LONGEST);
        let mut now = start;
        for (outcome, took) in attempts {
            now = now.max(left.next) + Duration::from_millis(took);
            let outcome = match outcome {
                0 if took < 10 => Outcome::Undone,
                1 => Outcome::NothingLeft,
                _ => Outcome::Failed,
            };
            let is_over = outcome == Outcome::Undone
                || outcome == Outcome::NothingLeft && (is_hold || now >= expires)
                || now >= ends;
            let Some(again) = left.after(outcome, now) else {
                prop_assert!(is_over, "{:?} after {:?}", outcome, now - start);
                return Ok(());
            };
            prop_assert!(!is_over, "{:?} after {:?}", outcome, now - start);
            prop_assert!(again.next >= now + backoff(1));
            prop_assert!(again.next <= now + LONGEST_PAUSE, "the next look is in {:?}", again.next - now);
            left = again;
        }
    }
}
