//! What the answers to an acquire mean, compared with the model of the row. Test `the_model_answers_as_the_server_does`
//! shows that the model is right.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::hold::lease::Lease;
use crate::model::row::Row;

const LEASE: Duration = Duration::from_secs(10);

fn rows() -> impl Strategy<Value = AcquireRow> {
    let left = prop_oneof![Just(Duration::ZERO), (1..100_000_000_u64).prop_map(Duration::from_micros)];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let position = (proptest::option::of(1..2_000_u32), 0..2_000_u32);
    (any::<Option<i64>>(), any::<i64>(), left, flags, position).prop_map(|(taken, version, left, flags, position)| {
        let (is_free, may_take, is_wanted, has_notified, waits) = flags;
        let ((position, waiters), is_released) = (position, is_free && is_wanted);
        let owner_id = "before".to_owned();
        AcquireRow {
            taken,
            left,
            is_wanted,
            version,
            owner_id,
            is_released,
            is_free,
            may_take,
            has_notified,
            waits,
            position,
            waiters,
        }
    })
}

/// What a process does, or what happens to it. `who` is the index of the process.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// As a waiter in the row, or without one.
    Acquire {
        who: usize,
        waits: bool,
    },
    /// As a waiter in the row, with the version of the answer before.
    AcquireNotified {
        who: usize,
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
    /// Time passes, in milliseconds.
    Pass(u64),
}

pub(crate) fn steps() -> impl Strategy<Value = Vec<Step>> {
    let times = prop_oneof![Just(0_u64), Just(1), 50..200_u64, 5_000..11_000_u64];
    let step = (0..7, 0..3_usize, any::<bool>(), times).prop_map(|(kind, who, flag, time)| match kind {
        0 => Step::Acquire { who, waits: flag },
        1 => Step::AcquireNotified { who },
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
    notified_version: Option<i64>,
    /// The hold that it believes to have.
    hold: Option<(Claim, i64, Lease)>,
}

pub(crate) fn new_claim() -> Claim {
    let lease_id = Uuid::new_v4();
    Claim {
        lock_id: "l".to_owned(),
        owner_id: lease_id.to_string(),
        lease_id,
        lease: LEASE,
        expires: Instant::now() + LEASE,
    }
}

proptest! {
    #[test]
    fn nothing_is_taken_by_an_answer_that_speaks_of_another(row in rows()) {
        let sent = Instant::now();
        match row.clone().meaning(sent) {
            Acquired::Taken { granted, taken_over_from } => {
                prop_assert!(granted.left == row.left && granted.sent == sent);
                prop_assert_eq!(Some(granted.version), row.taken);
                prop_assert_eq!(taken_over_from.is_none(), row.is_released);
            }
            Acquired::Busy(busy) => {
                prop_assert!(row.taken.is_none() && !row.may_take);
                prop_assert_eq!((busy.version, busy.is_free, busy.position), (row.version, row.is_free, row.position));
                // If the row has room, a waiter is in it.
                prop_assert!(!row.waits || row.position.is_some() || row.waiters >= MAX_WAITERS);
            }
            Acquired::Missed => prop_assert!(row.taken.is_none()),
            answer => prop_assert!(false, "a row doesn't say {:?}", answer),
        }
    }

    #[test]
    fn a_waiter_never_sleeps_for_long_and_never_longer_than_what_it_waits_for(
        row in rows(), fraction in 0.75..=1.0_f64,
    ) {
        let Acquired::Busy(busy) = row.meaning(Instant::now()) else { return Ok(()) };
        let sleep = busy.sleep(fraction);
        prop_assert!(sleep <= longest_sleep(busy.waiters));
        prop_assert!(busy.waiters > 50 || sleep <= Duration::from_secs(5));
        let before = busy.position.map_or(busy.waiters, |position| position - 1);
        if busy.is_free {
            prop_assert!(sleep <= GRACE + REACTION_TIME + LONGEST_STEPS, "a free lock is slept by for {:?}", sleep);
            prop_assert_eq!(busy.notified_version(), busy.has_notified.then_some(busy.version));
        } else {
            prop_assert!(before > 0 || sleep <= busy.left);
            prop_assert!(busy.notified_version().is_none());
        }
    }

    /// Three processes do anything in any order, and each believes what its answers mean. None believes to hold the
    /// lock when it doesn't. No process hears "busy" about its own hold.
    #[test]
    fn who_took_the_lock_by_an_answer_holds_it_in_the_row(steps in steps()) {
        let mut now = Instant::now();
        let mut processes = [0, 1, 2].map(|_| Process { waiter: Uuid::new_v4(), notified_version: None, hold: None });
        let first = new_claim();
        let mut row = Row::create(&first, now);
        processes[0].hold = Some((first, 1, Lease::new(now, LEASE, LEASE)));
        let mut newest = 1;
        for step in steps {
            match step {
                Step::Acquire { .. } | Step::AcquireNotified { .. } => {
                    let (who, waits, notified_version) = match step {
                        Step::AcquireNotified { who } => (who, true, processes[who].notified_version),
                        Step::Acquire { who, waits } => (who, waits, None),
                        _ => unreachable!("another step"),
                    };
                    let process = &mut processes[who];
                    let row_waiter = waits.then_some(RowWaiter { id: process.waiter, notified_version });
                    let (claim, before) = (new_claim(), row.clone());
                    let answer = row.acquire(&claim, row_waiter, now).0.meaning(now);
                    let has = row.is_held_by(&claim, now);
                    prop_assert_eq!(matches!(answer, Acquired::Taken { .. }), has, "{:?} of {:?}", answer, row);
                    process.notified_version = None;
                    match answer {
                        Acquired::Taken { granted, .. } => {
                            prop_assert_eq!(granted.version, row.version);
                            // No waiter takes the lock before those in front of it had their time.
                            let first = before.waiters.first();
                            let is_first = first.is_none_or(|it| *it == process.waiter);
                            let is_due = notified_version == Some(before.version) || is_first;
                            prop_assert!(!waits || is_due, "it was not its notified_version: {:?}", before);
                            let lease = Lease::new(granted.sent, granted.left, LEASE);
                            process.hold = Some((claim, granted.version, lease));
                        }
                        Acquired::Busy(busy) => {
                            prop_assert_eq!(busy.version, row.version);
                            prop_assert_eq!(busy.position.is_some(), waits && row.waiters.contains(&process.waiter));
                            process.notified_version = busy.notified_version();
                        }
                        answer => prop_assert!(false, "{:?} of {:?}", answer, row),
                    }
                }
                Step::Refresh { who } => {
                    if let Some((claim, version, lease)) = &mut processes[who].hold {
                        match row.refresh(claim, *version, now) {
                            Some(_) => lease.extend(now, now),
                            None => lease.lose(),
                        }
                    }
                }
                Step::Release { who, waits_again } => {
                    let Process { waiter, hold, .. } = &mut processes[who];
                    if let Some((claim, version, _)) = hold.take() {
                        let was_held = row.is_held_by(&claim, now);
                        let released = row.release(&claim, Some(version), Some(*waiter), waits_again, now);
                        prop_assert!(released.is_some() || !was_held);
                    }
                }
                Step::HandOver { who } => {
                    let next = new_claim();
                    let process = &mut processes[who];
                    if let Some((claim, version, _)) = process.hold.take() {
                        let was_held = row.is_held_by(&claim, now);
                        let handed = row.hand_over(&claim, version, &next, now).map(|(handed, _)| handed);
                        prop_assert_eq!(handed.is_some(), was_held);
                        process.hold = handed.map(|(version, left, _)| (next, version, Lease::new(now, left, LEASE)));
                    }
                }
                Step::Withdraw { who } => drop(row.withdraw(processes[who].waiter, now)),
                Step::Pass(millis) => now += Duration::from_millis(millis),
            }
            prop_assert!(row.version >= newest, "a version fell");
            newest = row.version;
            for (claim, version, lease) in processes.iter().filter_map(|process| process.hold.as_ref()) {
                let is_true = row.version == *version && row.is_held_by(claim, now);
                prop_assert!(!lease.is_held(now) || is_true, "version {} is trusted, but there is {:?}", version, row);
            }
        }
    }
}
