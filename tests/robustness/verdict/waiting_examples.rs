//! Histories made by hand: locks that are free beside those who wait for them, and holds that are ended by hand.

use super::examples::{Example, ms};
use super::*;
use crate::history::{Life, Row};

const LINE: &str = "line-0";
/// It only waits.
const WAITER: usize = 2;

fn sound() -> Example {
    let mut example = Example::sound();
    let life = Life { worker: WAITER, threads: 0, ..example.0.lives[0].clone() };
    example.0.lives.push(life);
    example
}

/// Worker 0 gives a lock back at 2.001 s, and the waiter has waited for it since 1.5 s. It gets it, or gives up, at
/// some time.
fn released_and_taken(end: u64, outcome: Outcome) -> Example {
    let mut example = sound();
    example.hold(0, LINE, 1, 1_000, 2_000);
    let is_taken = outcome == Outcome::Taken(2);
    example.ask(WAITER, LINE, How::TryLockFor, 1_500, end, outcome);
    if is_taken {
        example.release(WAITER, LINE, 2, end + 10);
    }
    let version = if is_taken { 2 } else { 1 };
    example.0.rows.push(Row { lock: LINE.to_owned(), version, is_held: false, waiters: 0 });
    example
}

fn is_release(call: &Operation) -> bool {
    matches!(call.call, Call::Release { .. })
}

fn taken(end: u64) -> Example {
    let mut example = released_and_taken(end, Outcome::Taken(2));
    example.limit_of_the_wait();
    example
}

impl Example {
    /// However long it waits, that breaks no other rule.
    fn limit_of_the_wait(&mut self) {
        for operation in &mut self.0.operations {
            if operation.call.lock() == Some(LINE) {
                operation.limit = Nanos::MAX;
            }
        }
    }
}

#[test]
fn a_lock_that_is_free_beside_a_waiter_for_longer_than_the_grace_breaks_rule_9_if_nothing_hurts() {
    taken(3_000).keeps_all();
    taken(3_200).breaks(9);
    // Nobody got it: the row says that nobody else has had it either.
    released_and_taken(3_000, Outcome::Busy).keeps_all();
    released_and_taken(3_200, Outcome::Busy).breaks(9);
    let mut example = released_and_taken(3_200, Outcome::Busy);
    example.0.rows.last_mut().unwrap().version = 2;
    example.keeps_all();
    // One who doesn't wait is refused.
    let mut example = sound();
    example.hold(0, LINE, 1, 1_000, 2_000);
    example.ask(WAITER, LINE, How::TryLock, 1_500, 3_200, Outcome::Busy);
    example.0.rows.push(Row { lock: LINE.to_owned(), version: 1, is_held: false, waiters: 0 });
    example.keeps_all();
}

#[test]
fn the_look_is_what_a_waiter_has_where_something_hurt_or_the_dead_stand_in_the_row() {
    let hurt = |end: u64, kind: Kind| {
        let mut example = taken(end);
        // Nobody whom it hurts has to do with the lock.
        example.fault(kind, Some(1), 1_900, 1_950);
        example
    };
    for kind in [Kind::Misled, Kind::Other, Kind::DeadWaiters(LINE.to_owned(), 9)] {
        hurt(8_900, kind.clone()).keeps_all();
        hurt(9_100, kind).breaks(9);
    }
    // Many look more seldom: those of the run and 60 every 7 s.
    hurt(10_900, Kind::DeadWaiters(LINE.to_owned(), 60)).keeps_all();
    hurt(11_100, Kind::DeadWaiters(LINE.to_owned(), 60)).breaks(9);
    // A drop that something hurts may have come to nothing until the lease has run out, and so may a release that a
    // crash undid.
    let released = |end: u64, how: Ending, kind: Kind| {
        let mut example = taken(end);
        let release = example.0.operations.iter_mut().find(|call| call.call.version() == Some(1) && is_release(call));
        release.unwrap().call = Call::Release { lock: LINE.to_owned(), version: 1, how };
        example.fault(kind, Some(0), 2_001, 2_900);
        example
    };
    for (how, kind) in [(Ending::Drop, Kind::Other), (Ending::Unlock, Kind::Crashed), (Ending::Drop, Kind::Crashed)] {
        released(6_400, how, kind.clone()).keeps_all();
        released(12_600, how, kind).breaks(9);
    }
    released(6_400, Ending::Unlock, Kind::Other).keeps_all();
    released(9_100, Ending::Unlock, Kind::Other).breaks(9);
    // What happened long ago has come to an end. The dead stay where they are.
    let hurt_before = |kind: Kind| {
        let mut example = taken(3_200);
        example.fault(kind, None, 3, 4);
        example.0.faults[0].begin = 0;
        example.0.faults[0].end = 0;
        example
    };
    hurt_before(Kind::Misled).breaks(9);
    hurt_before(Kind::DeadWaiters(LINE.to_owned(), 9)).keeps_all();
    hurt_before(Kind::DeadWaiters("another".to_owned(), 9)).breaks(9);
    let died = |lock: &str| {
        let mut example = taken(3_200);
        let ending = Some(LifeEnd::Killed);
        example.0.lives.push(Life { worker: 3, end: Some(ms(900)), ending, ..example.0.lives[WAITER].clone() });
        example.ask(3, lock, How::Lock, 500, 600, Outcome::Busy);
        example
    };
    died(LINE).keeps_all();
    died("another").breaks(9);
}

#[test]
fn time_in_which_a_waiter_or_the_server_was_hurt_does_not_count() {
    // Somebody dead may stand in the row all the time.
    let taken = |end: u64| {
        let mut example = taken(end);
        example.fault(Kind::DeadWaiters(LINE.to_owned(), 9), None, 1_000, 1_001);
        example
    };
    let hurt = |worker: Option<usize>, kind: Kind| {
        let mut example = taken(12_000);
        example.fault(kind, worker, 5_500, 5_600);
        example
    };
    hurt(Some(WAITER), Kind::Stopped).keeps_all();
    hurt(None, Kind::Other).keeps_all();
    hurt(Some(0), Kind::Other).breaks(9);
    hurt(None, Kind::Misled).breaks(9);
    // It begins anew.
    let mut example = taken(14_000);
    example.fault(Kind::Other, None, 5_500, 5_600);
    example.breaks(9);
    // A waiter that was killed has waited until then.
    let killed_at = |at: u64| {
        let mut example = taken(14_000);
        (example.0.lives[WAITER].end, example.0.lives[WAITER].ending) = (Some(ms(at)), Some(LifeEnd::Killed));
        example.0.operations.retain(|operation| operation.begin < ms(at) || operation.process != WAITER);
        for operation in example.0.operations.iter_mut().filter(|operation| operation.process == WAITER) {
            operation.end = None;
        }
        example.0.rows.last_mut().unwrap().version = 1;
        example
    };
    killed_at(8_900).keeps_all();
    killed_at(9_100).breaks(9);
    // Another run may hurt it from here on.
    let mut example = taken(14_000);
    example.0.alone_until = ms(3_000);
    example.keeps_all();
}

#[test]
fn a_lock_that_somebody_may_have_had_meanwhile_is_not_free() {
    // Version 2 was somebody's who never heard of it.
    let mut example = released_and_taken(14_000, Outcome::Taken(3));
    example.limit_of_the_wait();
    example.release(WAITER, LINE, 3, 14_010);
    example.0.rows.last_mut().unwrap().version = 3;
    example.keeps_all();
    // Versions from before commits were undone tell nothing; those since then do.
    for (at, is_before) in [(1_200, true), (500, false)] {
        let mut example = taken(9_100);
        example.0.operations.retain(|call| !matches!(&call.call, Call::Look { lock, .. } if lock == LINE));
        example.fault(Kind::Undone(LINE.to_owned()), None, at, at + 1);
        example.fault(Kind::DeadWaiters(LINE.to_owned(), 9), None, at, at + 1);
        if is_before { example.keeps_all() } else { example.breaks(9) }
    }
    // Its answer was held back.
    let mut example = taken(14_000);
    example.fault(Kind::Other, Some(WAITER), 3_000, 14_000);
    example.keeps_all();
    // Its lease has yet to run out.
    let lost = |end: u64| {
        let mut example = sound();
        example.acquire(0, LINE, 1_000, 1_001, Outcome::Taken(1));
        example.look(0, LINE, 1, 1_002, Some(1_800));
        example.fault(Kind::Stopped, Some(0), 1_010, 3_000);
        example.fault(Kind::DeadWaiters(LINE.to_owned(), 9), None, 1_000, 1_001);
        example.look(0, LINE, 1, 3_100, None);
        example.ask(WAITER, LINE, How::Lock, 1_500, end, Outcome::Taken(2));
        example.release(WAITER, LINE, 2, end + 10);
        example.limit_of_the_wait();
        example
    };
    lost(12_400).keeps_all();
    lost(12_800).breaks(9);
    // Somebody's transaction had its row.
    let wrote = |version: i64| {
        let mut example = taken(3_200);
        let (lock, how) = (LINE.to_owned(), Ending::UnlockIn { id: 1, commits: false });
        example.0.operations.retain(|call| !matches!(&call.call, Call::Release { lock, .. } if lock == LINE));
        example.release(0, LINE, 1, 2_000);
        example.release(WAITER, LINE, 2, 3_210);
        let call = Call::Release { lock, version, how };
        let failed = Outcome::Failed(Failure::Timeout, String::new());
        let operation = example.operation(0, 2_010, 2_500, call, failed);
        operation.limit = Nanos::MAX;
        example
    };
    wrote(1).keeps_all();
    wrote(2).breaks(9);
}

#[test]
fn a_row_that_is_freed_by_hand_ends_its_hold_and_is_free_for_no_longer_than_the_look() {
    let freed = |end: u64, moves: bool| {
        let mut example = sound();
        example.acquire(0, LINE, 1_000, 1_001, Outcome::Taken(1));
        example.look(0, LINE, 1, 1_002, Some(1_900));
        example.look(0, LINE, 1, 2_000, Some(1_900));
        // Its next refresh says so.
        example.look(0, LINE, 1, 2_500, None);
        let lock = LINE.to_owned();
        example.fault(Kind::Freed { lock, version: 1, moves }, None, 1_900, 1_950);
        let version = if moves { 3 } else { 2 };
        example.ask(WAITER, LINE, How::Lock, 1_500, end, Outcome::Taken(version));
        example.look(WAITER, LINE, version, end + 1, Some(1_800));
        example.release(WAITER, LINE, version, end + 10);
        example.limit_of_the_wait();
        example
    };
    for moves in [false, true] {
        freed(1_970, moves).keeps_all();
        freed(8_900, moves).keeps_all();
        freed(9_000, moves).breaks(9);
    }
    // It is still trusted when it must have heard of it.
    let mut example = freed(1_970, true);
    example.0.operations.retain(|call| !matches!(&call.call, Call::Look { lock, version: 1, .. } if lock == LINE));
    for at in (1_010..4_000).step_by(200) {
        example.look(0, LINE, 1, at, Some(1_900));
    }
    example.breaks(1);
}
