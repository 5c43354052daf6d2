//! What the answers to an acquire mean, against a toy of the row, which is known to be right.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::term::Term;
use crate::toy::Row;

const LEASE: Duration = Duration::from_secs(10);

fn rows() -> impl Strategy<Value = AcquireRow> {
    let left = prop_oneof![Just(Duration::ZERO), (1..100_000_000_u64).prop_map(Duration::from_micros)];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<Option<bool>>());
    (any::<Option<i64>>(), any::<i64>(), left, flags).prop_map(|(taken, newest, left, flags)| {
        let (is_mine, is_released, is_wanted, is_queued) = flags;
        AcquireRow { taken, newest, owner_id: "before".to_owned(), is_mine, is_released, left, is_wanted, is_queued }
    })
}

/// What a process does, or what befalls it. A number names one of those that take part.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// With a new lease, standing in line or not.
    Acquire {
        who: usize,
        waits: bool,
    },
    /// The answer was lost: the same statement again.
    Repeat {
        who: usize,
        waits: bool,
    },
    Refresh {
        who: usize,
    },
    Release {
        who: usize,
        waits_again: bool,
    },
    HandOver {
        who: usize,
    },
    Withdraw {
        who: usize,
    },
    /// In milliseconds.
    Pass(u64),
}

pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let times = prop_oneof![Just(0_u64), Just(1), 50..200_u64, 5_000..11_000_u64];
    let step = (0..7, 0..3_usize, any::<bool>(), times).prop_map(|(kind, who, flag, time)| match kind {
        0 => Step::Acquire { who, waits: flag },
        1 => Step::Repeat { who, waits: flag },
        2 => Step::Refresh { who },
        3 => Step::Release { who, waits_again: flag },
        4 => Step::HandOver { who },
        5 => Step::Withdraw { who },
        _ => Step::Pass(time),
    });
    vec(step, 1..60)
}

struct Process {
    waiter: Uuid,
    claim: Claim,
    /// What it believes to hold.
    hold: Option<(Claim, i64, Term)>,
}

pub(crate) fn new_claim() -> Claim {
    let lease_id = Uuid::new_v4();
    Claim { lock_id: "l".to_owned(), owner_id: lease_id.to_string(), lease_id, lease: LEASE }
}

proptest! {
    #[test]
    fn nothing_is_taken_by_an_answer_that_leaves_no_time_or_speaks_of_another(row in rows()) {
        let sent = Instant::now();
        match row.clone().meaning(sent) {
            Acquired::Taken { granted, taken_over_from } => {
                prop_assert!(!granted.left.is_zero() && granted.left == row.left && granted.sent == sent);
                prop_assert!(row.taken.is_some() || row.is_mine && !row.is_released, "somebody else's");
                prop_assert_eq!(granted.version, row.taken.unwrap_or(row.newest));
                prop_assert!(taken_over_from.is_none() || row.taken.is_some() && !row.is_released);
            }
            Acquired::Busy { version, left, is_promised, is_queued, .. } => {
                prop_assert!(row.taken.is_none() && !left.is_zero());
                prop_assert_eq!((version, is_promised, is_queued), (row.newest, row.is_released, row.is_queued == Some(true)));
                // Who waits for it isn't left to itself by mistake.
                prop_assert!(row.is_queued != Some(false), "it could have stood in line, and doesn't");
            }
            Acquired::Missed => prop_assert!(row.left.is_zero() || row.taken.is_none()),
            Acquired::Locked | Acquired::Absent => prop_assert!(false, "a row says neither"),
        }
    }

    /// Three processes do anything in any order; each believes what its answers mean. None believes to hold the lock when
    /// it doesn't, and one that is told that the lock is busy isn't told so of its own.
    #[test]
    fn who_took_the_lock_by_an_answer_holds_it_in_the_row(steps in steps()) {
        let mut now = Instant::now();
        let mut processes = [0, 1, 2].map(|_| Process { waiter: Uuid::new_v4(), claim: new_claim(), hold: None });
        let first = processes[0].claim.clone();
        let mut row = Row::create(&first, now);
        processes[0].hold = Some((first, 1, Term::new(now, LEASE, LEASE)));
        let mut newest = 1;
        for step in steps {
            match step {
                Step::Acquire { who, waits } | Step::Repeat { who, waits } => {
                    let process = &mut processes[who];
                    if matches!(step, Step::Acquire { .. }) {
                        process.claim = new_claim();
                    }
                    let had = row.is_held_by(&process.claim, now);
                    let answer = row.acquire(&process.claim, waits.then_some(process.waiter), now).meaning(now);
                    let has = row.is_held_by(&process.claim, now);
                    prop_assert_eq!(matches!(answer, Acquired::Taken { .. }), has, "{:?} of {:?}", answer, row);
                    match answer {
                        Acquired::Taken { granted, .. } => {
                            prop_assert_eq!(granted.version, row.version);
                            let term = Term::new(granted.sent, granted.left, LEASE);
                            process.hold = Some((process.claim.clone(), granted.version, term));
                        }
                        Acquired::Busy { is_queued, version, .. } => {
                            prop_assert_eq!(version, row.version);
                            prop_assert_eq!(is_queued, waits && row.waiters.contains(&process.waiter));
                        }
                        // To be asked again: only where it was its own claim that is over, or time has passed.
                        _ => prop_assert!(!had),
                    }
                }
                Step::Refresh { who } => {
                    if let Some((claim, version, term)) = &mut processes[who].hold {
                        match row.refresh(claim, *version, now) {
                            Some(_) => term.extend(now, now),
                            None => term.lose(),
                        }
                    }
                }
                Step::Release { who, waits_again } => {
                    let Process { waiter, hold, .. } = &mut processes[who];
                    if let Some((claim, version, _)) = hold.take() {
                        let was_held = row.is_held_by(&claim, now);
                        let told = row.release(&claim, Some(version), Some(*waiter), waits_again, now);
                        prop_assert!(told.is_some() || !was_held);
                    }
                }
                Step::HandOver { who } => {
                    let next = new_claim();
                    let process = &mut processes[who];
                    if let Some((claim, version, _)) = process.hold.take() {
                        let was_held = row.is_held_by(&claim, now);
                        let given = row.hand_over(&claim, version, &next, now);
                        prop_assert_eq!(given.is_some(), was_held);
                        process.hold = given.map(|(version, left, _)| (next, version, Term::new(now, left, LEASE)));
                    }
                }
                Step::Withdraw { who } => drop(row.withdraw(processes[who].waiter)),
                Step::Pass(millis) => now += Duration::from_millis(millis),
            }
            prop_assert!(row.version >= newest, "a version fell");
            newest = row.version;
            for (claim, version, term) in processes.iter().filter_map(|process| process.hold.as_ref()) {
                let is_true = row.version == *version && row.is_held_by(claim, now);
                prop_assert!(!term.is_held(now) || is_true, "version {} is trusted, but there is {:?}", version, row);
            }
        }
    }
}
