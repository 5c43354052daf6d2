//! Histories made by hand: one that a lock may have, and for each rule some that it must not.

use super::*;
use crate::history::{Fence, Life, Row};

const TIMES: Times = Times {
    lease: Duration::from_secs(2),
    longest_lease: Duration::from_secs(2),
    refresh: Duration::from_millis(400),
    own_lease: Duration::from_secs(15),
    idle: Duration::from_secs(5),
};

/// Milliseconds.
pub(super) const fn ms(milliseconds: u64) -> Nanos {
    milliseconds * 1_000_000
}

/// Two workers of one thread each, until 20 s, healed at 10 s.
pub(super) struct Example(pub(super) History);

impl Example {
    /// Both take every lock in the end, and nothing is left over.
    pub(super) fn sound() -> Example {
        let life = |worker| Life {
            worker,
            begin: 0,
            end: Some(ms(15_000)),
            ending: Some(LifeEnd::Stopped),
            threads: 1,
            left: Some((Vec::new(), 0)),
            said: String::new(),
        };
        let mut example = Example(History {
            lives: vec![life(0), life(1)],
            healed: ms(10_000),
            alone_until: ms(20_000),
            end: ms(20_000),
            ..History::default()
        });
        for (process, at) in [(0, 11_000), (1, 11_500)] {
            for (lock, shift) in [(HOT.to_owned(), 0), (QUEUE.to_owned(), 100), (format!("{OWN}-{process}-1"), 200)] {
                let version = if lock.starts_with(OWN) { 90 } else { 90 + i64::try_from(process).unwrap() };
                example.hold(process, &lock, version, at + shift, at + shift + 50);
            }
        }
        for (lock, version) in [(HOT, 91), (QUEUE, 91), ("own-0-1", 90), ("own-1-1", 90)] {
            example.0.rows.push(Row { lock: lock.to_owned(), version, is_held: false, waiters: 0 });
        }
        example
    }

    pub(super) fn operation(
        &mut self,
        process: usize,
        begin: u64,
        end: u64,
        call: Call,
        outcome: Outcome,
    ) -> &mut Operation {
        let (begin, end) = (ms(begin), Some((ms(end), outcome)));
        self.0.operations.push(Operation { process, thread: 1, call, begin, limit: ms(5_000), uncommitted: None, end });
        self.0.operations.last_mut().unwrap()
    }

    pub(super) fn acquire(&mut self, process: usize, lock: &str, begin: u64, end: u64, outcome: Outcome) {
        self.ask(process, lock, How::TryLock, begin, end, outcome);
    }

    pub(super) fn ask(&mut self, process: usize, lock: &str, how: How, begin: u64, end: u64, outcome: Outcome) {
        let lease = nanos(if lock.starts_with(OWN) { TIMES.own_lease } else { TIMES.lease });
        self.operation(process, begin, end, Call::Acquire { lock: lock.to_owned(), how, lease }, outcome);
    }

    pub(super) fn look(&mut self, process: usize, lock: &str, version: i64, at: u64, remaining: Option<u64>) {
        let outcome = remaining.map_or(Outcome::NotHeld, |remaining| Outcome::Held(ms(remaining)));
        self.operation(process, at, at + 1, Call::Look { lock: lock.to_owned(), version }, outcome);
    }

    fn write(&mut self, process: usize, lock: &str, version: i64, at: u64, order: i64) {
        self.try_to_write(process, lock, version, at, Outcome::Done).uncommitted = Some(ms(at));
        self.0.written.push(Written { lock: lock.to_owned(), order, version, id: at });
    }

    fn try_to_write(&mut self, process: usize, lock: &str, version: i64, at: u64, outcome: Outcome) -> &mut Operation {
        let (lock, id, fence, level) = (lock.to_owned(), at, Fence::Last, Level::ReadCommitted);
        let call = Call::Write { lock, version, id, fence, is_past_deadline: false, level };
        self.operation(process, at, at + 1, call, outcome)
    }

    pub(super) fn release(&mut self, process: usize, lock: &str, version: i64, at: u64) {
        let call = Call::Release { lock: lock.to_owned(), version, how: Ending::Unlock };
        self.operation(process, at, at + 1, call, Outcome::Done);
    }

    /// A hold that is trusted from one instant to the other.
    pub(super) fn hold(&mut self, process: usize, lock: &str, version: i64, from: u64, until: u64) {
        self.acquire(process, lock, from - 2, from - 1, Outcome::Taken(version));
        self.look(process, lock, version, from, Some(1_800));
        self.look(process, lock, version, until - 2, Some(1_800));
        self.release(process, lock, version, until);
    }

    pub(super) fn fault(&mut self, kind: Kind, worker: Option<usize>, begin: u64, end: u64) {
        let (begin, end) = (ms(begin), ms(end));
        self.0.faults.push(Fault { what: "a fault".to_owned(), kind, worker, begin, end });
    }

    fn judge(mut self) -> (Vec<Violation>, Counts) {
        self.0.operations.sort_by_key(|operation| operation.begin);
        judge(&self.0, TIMES)
    }

    #[track_caller]
    pub(super) fn keeps_all(self) {
        let violations = self.judge().0;
        assert!(violations.is_empty(), "{violations:?}");
    }

    #[track_caller]
    pub(super) fn breaks(self, rule: u8) {
        let violations = self.judge().0;
        assert!(violations.iter().any(|violation| violation.rule == rule), "rule {rule} is kept: {violations:?}");
        assert!(violations.iter().all(|violation| violation.rule == rule), "others too: {violations:?}");
    }
}

#[test]
fn a_sound_history_keeps_all_rules() {
    let mut example = Example::sound();
    example.hold(0, HOT, 1, 1_000, 2_000);
    // Asked while the other one had it.
    example.acquire(1, HOT, 1_500, 2_010, Outcome::Taken(2));
    example.look(1, HOT, 2, 2_011, Some(1_800));
    example.release(1, HOT, 2, 2_100);
    example.keeps_all();
}

#[test]
fn two_that_trust_their_holds_at_once_break_rule_1() {
    let mut example = Example::sound();
    example.hold(0, HOT, 1, 1_000, 2_000);
    example.hold(1, HOT, 2, 1_900, 2_500);
    example.breaks(1);
}

#[test]
fn one_who_was_told_a_later_deadline_breaks_rule_1_without_looking_again() {
    let mut example = Example::sound();
    example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
    example.look(0, HOT, 1, 1_002, Some(1_800));
    // Stopped here, and killed at 5 s.
    example.fault(Kind::Stopped, Some(0), 1_010, 5_000);
    example.hold(1, HOT, 2, 2_700, 2_750);
    (example.0.lives[0].end, example.0.lives[0].ending) = (Some(ms(5_000)), Some(LifeEnd::Killed));
    example.0.operations.retain(|operation| operation.process == 1 || operation.begin < ms(5_000));
    example.breaks(1);
}

#[test]
fn one_whose_deadline_has_passed_or_who_died_keeps_rule_1() {
    let killed_at = |at: u64, taken_over_at: u64| {
        let mut example = Example::sound();
        example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
        example.look(0, HOT, 1, 1_002, Some(1_800));
        example.hold(1, HOT, 2, taken_over_at, taken_over_at + 50);
        (example.0.lives[0].end, example.0.lives[0].ending) = (Some(ms(at)), Some(LifeEnd::Killed));
        example.0.operations.retain(|operation| operation.process == 1 || operation.begin < ms(at));
        example
    };
    killed_at(5_000, 2_900).keeps_all();
    killed_at(1_500, 1_600).keeps_all();
}

#[test]
fn a_look_that_took_long_proves_nothing() {
    let mut example = Example::sound();
    example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
    let look = Call::Look { lock: HOT.to_owned(), version: 1 };
    // Stopped somewhere in the look: it may have been true only at its beginning.
    example.operation(0, 1_002, 4_000, look, Outcome::Held(ms(10)));
    example.look(0, HOT, 1, 4_001, None);
    example.fault(Kind::Stopped, Some(0), 1_003, 3_990);
    example.hold(1, HOT, 2, 3_000, 3_100);
    example.keeps_all();
}

#[test]
fn an_older_hold_that_is_trusted_after_a_newer_one_breaks_rule_1() {
    let mut example = Example::sound();
    example.hold(1, HOT, 2, 1_000, 1_100);
    example.acquire(0, HOT, 900, 1_200, Outcome::Taken(1));
    example.look(0, HOT, 1, 1_201, Some(1_800));
    example.release(0, HOT, 1, 1_300);
    example.breaks(1);
}

#[test]
fn a_version_that_comes_twice_or_falls_breaks_rule_2() {
    let mut example = Example::sound();
    example.hold(0, HOT, 7, 1_000, 1_100);
    example.hold(1, HOT, 7, 2_000, 2_100);
    example.breaks(2);
    let mut example = Example::sound();
    example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(7));
    example.release(0, HOT, 7, 1_100);
    example.acquire(1, HOT, 2_000, 2_001, Outcome::Taken(6));
    example.release(1, HOT, 6, 2_100);
    example.breaks(2);
    let mut example = Example::sound();
    example.0.rows[0].version = 90;
    example.breaks(2);
}

#[test]
fn commits_that_were_undone_excuse_until_the_next_refresh() {
    let undone = |until: u64| {
        let mut example = Example::sound();
        example.hold(0, HOT, 7, 1_000, until);
        example.fault(Kind::Undone(HOT.to_owned()), None, 1_500, 1_501);
        example
    };
    let mut example = undone(2_000);
    example.hold(1, HOT, 7, 1_600, 2_500);
    example.keeps_all();
    // By now a refresh must have said that the hold is gone, whoever has the lock.
    undone(3_000).breaks(1);
    let mut example = undone(6_000);
    example.fault(Kind::Other, Some(0), 1_400, 5_700);
    example.hold(1, HOT, 8, 1_600, 6_500);
    example.breaks(1);
}

/// One that was stopped until its deadline had passed, and the one that took over.
fn taken_over() -> Example {
    let mut example = Example::sound();
    example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
    example.look(0, HOT, 1, 1_002, Some(1_800));
    example.fault(Kind::Stopped, Some(0), 1_010, 4_000);
    example.acquire(1, HOT, 3_000, 3_001, Outcome::Taken(2));
    example.release(1, HOT, 2, 3_020);
    example
}

#[test]
fn a_write_of_an_older_hold_after_one_of_a_newer_one_breaks_rule_3_whatever_its_writer_knew() {
    let wrote = |orders: [i64; 2]| {
        let mut example = taken_over();
        // It may have been committed before the takeover: nobody saw it uncommitted later.
        example.write(0, HOT, 1, 1_005, orders[0]);
        example.write(1, HOT, 2, 3_010, orders[1]);
        for operation in &mut example.0.operations {
            if matches!(operation.call, Call::Write { version: 1, .. }) {
                operation.end = Some((ms(4_100), Outcome::Done));
            }
        }
        example.look(0, HOT, 1, 4_200, None);
        example
    };
    wrote([1, 2]).keeps_all();
    wrote([2, 1]).breaks(3);
    let mut undone = wrote([2, 1]);
    undone.fault(Kind::Undone(HOT.to_owned()), None, 2_000, 2_001);
    undone.keeps_all();
}

#[test]
fn a_commit_of_an_older_hold_once_a_newer_one_was_taken_breaks_rule_3_if_nobody_else_wrote() {
    let uncommitted_at = |at: u64, is_committed: bool| {
        let mut example = taken_over();
        let write = example.try_to_write(0, HOT, 1, 1_005, Outcome::Done);
        (write.uncommitted, write.end) = (Some(ms(at)), None);
        // The call has no answer, and its process has come to its end in it.
        example.0.operations.retain(|operation| operation.process == 1 || operation.begin <= ms(1_005));
        (example.0.lives[0].end, example.0.lives[0].ending) = (Some(ms(4_500)), Some(LifeEnd::Killed));
        if is_committed {
            example.0.written.push(Written { lock: HOT.to_owned(), order: 1, version: 1, id: 1_005 });
        }
        example
    };
    uncommitted_at(2_900, true).keeps_all();
    uncommitted_at(4_050, true).breaks(3);
    uncommitted_at(4_050, false).keeps_all();
}

#[test]
fn a_write_that_is_refused_breaks_rule_8_if_its_hold_lasted_and_nothing_hurt_it() {
    let lost = || Outcome::Failed(Failure::LeaseLost, String::new());
    let refused = |outcome: Outcome| {
        let mut example = Example::sound();
        example.acquire(0, HOT, 5_000, 5_001, Outcome::Taken(1));
        example.look(0, HOT, 1, 5_002, Some(1_800));
        example.try_to_write(0, HOT, 1, 5_010, outcome);
        example.release(0, HOT, 1, 5_300);
        example
    };
    refused(lost()).breaks(8);
    refused(Outcome::Failed(Failure::Fence, String::new())).breaks(8);
    for (worker, is_excused) in [(Some(0), true), (None, true), (Some(1), false)] {
        let mut example = refused(lost());
        example.fault(Kind::Other, worker, 4_000, 4_100);
        if is_excused { example.keeps_all() } else { example.breaks(8) }
    }
    // It was lost; and that a newer hold had been taken by then is counted.
    let mut example = taken_over();
    example.try_to_write(0, HOT, 1, 4_100, lost());
    let (violations, counts) = example.judge();
    assert!(violations.is_empty(), "{violations:?}");
    assert_eq!((counts.writes, counts.refused, counts.refused_late), (0, 1, 1));
    // And one that is there all the same.
    let mut example = taken_over();
    example.try_to_write(0, HOT, 1, 4_100, lost());
    example.0.written.push(Written { lock: HOT.to_owned(), order: 1, version: 1, id: 4_100 });
    example.breaks(3);
}

#[test]
fn a_transaction_that_gives_the_lock_back_ends_its_hold_and_writes_if_it_is_committed() {
    let unlocked = |commits: bool, outcome: Outcome| {
        let mut example = Example::sound();
        example.acquire(0, HOT, 5_000, 5_001, Outcome::Taken(1));
        example.look(0, HOT, 1, 5_002, Some(1_800));
        let how = Ending::UnlockIn { id: 7, commits };
        example.operation(0, 5_010, 5_020, Call::Release { lock: HOT.to_owned(), version: 1, how }, outcome);
        example.0.written.push(Written { lock: HOT.to_owned(), order: 1, version: 1, id: 7 });
        example
    };
    let mut example = unlocked(true, Outcome::Done);
    // Trusted as soon as it can have been committed.
    example.hold(1, HOT, 2, 5_015, 5_100);
    example.keeps_all();
    unlocked(false, Outcome::RolledBack).breaks(0);
    let mut example = unlocked(true, Outcome::Done);
    example.0.written.clear();
    example.breaks(0);
}

#[test]
fn one_who_gets_no_lock_or_leaves_something_over_breaks_rule_4() {
    let mut example = Example::sound();
    example.0.operations.retain(|operation| operation.process != 1 || operation.call.lock() != Some(QUEUE));
    example.breaks(4);
    let changes: [fn(&mut History); 6] = [
        |history| history.rows[0].is_held = true,
        |history| history.rows[1].waiters = 1,
        |history| history.rows[2].is_held = true,
        |history| history.rows.push(history.rows[0].clone()),
        |history| history.lives[0].left = Some((vec!["lock-refresh".to_owned()], 0)),
        |history| history.lives[0].left = Some((Vec::new(), 1)),
    ];
    for change in changes {
        let mut example = Example::sound();
        change(&mut example.0);
        example.breaks(4);
    }
}

#[test]
fn a_release_that_a_crash_undid_leaves_its_lease() {
    let crashed_at = |at: u64| {
        let mut example = Example::sound();
        example.hold(0, "own-0-1", 5, 9_000, 9_100);
        example.0.rows[2].is_held = true;
        example
            .0
            .operations
            .retain(|operation| operation.call.lock() != Some("own-0-1") || operation.begin < ms(9_500));
        example.0.rows[2].version = 5;
        example.fault(Kind::Crashed, None, at, at + 100);
        example
    };
    crashed_at(9_200).keeps_all();
    crashed_at(8_000).breaks(4);
}

#[test]
fn a_call_that_takes_longer_than_it_may_breaks_rule_5() {
    let acquired_at = |end: u64| {
        let mut example = Example::sound();
        example.acquire(0, HOT, 1_000, end, Outcome::Busy);
        example
    };
    acquired_at(6_500).keeps_all();
    acquired_at(7_500).breaks(5);
    // Unless it was stopped for that long.
    let mut example = acquired_at(7_500);
    example.fault(Kind::Stopped, Some(0), 2_000, 4_000);
    example.keeps_all();
    let mut example = acquired_at(7_500);
    example.fault(Kind::Stopped, Some(1), 2_000, 4_000);
    example.breaks(5);
}

#[test]
fn a_panic_an_unexpected_error_or_end_breaks_rule_6() {
    let mut example = Example::sound();
    example.0.lives[1].said = "thread 'lock-worker' panicked at src/x.rs:1:1".to_owned();
    example.breaks(6);
    let mut example = Example::sound();
    example.0.lives[1].ending = Some(LifeEnd::Other(134));
    example.0.lives[1].left = None;
    example.breaks(6);
    for (code, is_explained) in [(None, true), (Some("57P01"), true), (Some("23505"), false), (Some("42P01"), false)] {
        let mut example = Example::sound();
        let failure = Failure::Database(code.map(str::to_owned));
        example.acquire(0, HOT, 1_000, 1_001, Outcome::Failed(failure, String::new()));
        if is_explained { example.keeps_all() } else { example.breaks(6) }
    }
}

#[test]
fn a_lock_of_ones_own_that_is_refused_breaks_rule_7() {
    let refused = || {
        let mut example = Example::sound();
        example.hold(0, "own-0-1", 1, 1_000, 1_100);
        example.acquire(0, "own-0-1", 1_200, 1_201, Outcome::Busy);
        example
    };
    refused().breaks(7);
    let mut example = refused();
    example.fault(Kind::LostAnswer, Some(0), 1_150, 1_250);
    example.breaks(7);
    // A connection that was cut before the server had committed; an earlier acquire that may come through yet.
    let mut example = refused();
    example.fault(Kind::Other, Some(0), 1_150, 1_250);
    example.keeps_all();
    let mut example = refused();
    example.acquire(0, "own-0-1", 500, 600, Outcome::Failed(Failure::Timeout, String::new()));
    example.keeps_all();
    let mut example = refused();
    example.fault(Kind::Other, Some(1), 1_150, 1_250);
    example.breaks(7);
}

#[test]
fn a_hold_that_is_lost_or_not_refreshed_for_nothing_breaks_rule_8() {
    let mut example = Example::sound();
    example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
    example.look(0, HOT, 1, 1_002, Some(1_800));
    example.look(0, HOT, 1, 2_000, None);
    example.breaks(8);
    // It may be told so a hundredth of the lease before its deadline of 2.802 s.
    for (at, is_kept) in [(2_785, true), (2_775, false)] {
        let mut example = Example::sound();
        example.fault(Kind::Other, None, 1_100, 2_700);
        example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
        example.look(0, HOT, 1, 1_002, Some(1_800));
        example.look(0, HOT, 1, at, None);
        if is_kept { example.keeps_all() } else { example.breaks(8) }
    }
    let not_refreshed = || {
        let mut example = Example::sound();
        example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
        example.look(0, HOT, 1, 1_002, Some(1_800));
        example.look(0, HOT, 1, 2_600, Some(200));
        example.look(0, HOT, 1, 2_900, None);
        example
    };
    not_refreshed().breaks(8);
    let mut example = not_refreshed();
    example.fault(Kind::Other, None, 1_500, 1_900);
    example.keeps_all();
    let mut example = not_refreshed();
    example.fault(Kind::Harmless, None, 1_500, 1_900);
    example.breaks(8);
    // Its lease is longer than anybody waits for.
    let mut example = Example::sound();
    example.acquire(0, "own-0-1", 1_000, 1_001, Outcome::Taken(1));
    example.look(0, "own-0-1", 1, 1_002, Some(13_500));
    example.look(0, "own-0-1", 1, 4_000, Some(10_500));
    example.release(0, "own-0-1", 1, 4_100);
    example.breaks(8);
}

#[test]
fn a_history_that_is_none_breaks_rule_0() {
    let mut example = Example::sound();
    example.look(0, HOT, 5, 1_000, Some(1_000));
    example.breaks(0);
    // Two calls at once on one thread.
    let mut example = Example::sound();
    example.acquire(0, HOT, 1_000, 1_500, Outcome::Busy);
    example.acquire(0, HOT, 1_400, 1_600, Outcome::Busy);
    example.breaks(0);
    // Before its process began; after the end of everything.
    let mut example = Example::sound();
    example.0.lives[0].begin = ms(2_000);
    example.acquire(0, HOT, 1_000, 1_500, Outcome::Busy);
    example.breaks(0);
    let mut example = Example::sound();
    example.acquire(0, HOT, 19_000, 21_000, Outcome::Busy);
    example.breaks(0);
    // A write that was acknowledged and isn't there, and one that nobody sent.
    let mut example = Example::sound();
    example.acquire(0, HOT, 1_000, 1_001, Outcome::Taken(1));
    example.write(0, HOT, 1, 1_010, 1);
    example.0.written.clear();
    example.breaks(0);
    let mut example = Example::sound();
    example.0.written.push(Written { lock: HOT.to_owned(), order: 1, version: 90, id: 77 });
    example.breaks(0);
}
