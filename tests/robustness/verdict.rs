//! The judge: it knows what a lock with a lease promises, and nothing of how this one is made.
//!
//! | rule | |
//! | --- | --- |
//! | 0 | the history is one: whole, in order, and of the time in which it was made |
//! | 1 | one owner: no hold is trusted while, or after, a newer one is |
//! | 2 | versions grow with every hold, in the order of the holds, and belong to one hold each |
//! | 3 | no write is committed after one of a newer hold, nor once a newer hold was taken, nor if it was refused |
//! | 4 | after the last fault everybody gets every lock within a lease and the look; nothing is left over at the end |
//! | 5 | no call takes longer than its documentation says |
//! | 6 | nothing panics, and no error comes that no fault explains |
//! | 7 | no lock is refused that nobody else wants, where nothing but an answer was lost |
//! | 8 | no hold is lost before its deadline; while nothing hurts it is refreshed, and its writes are not refused |
//! | 9 | no lock is free beside a live waiter for longer than the look; where nothing has hurt, than the grace |
//!
//! The **grace** is 1.1 s. A released lock is promised to one of those who wait for 100 ms, and then another one takes
//! it; the second is for a machine that does other things as well. It is asked for where nothing has hurt anybody for
//! [`QUIET`], and nobody dead can stand in the row.
//!
//! The **look** is 7 s (and up to 17 s where more than fifty stand in the row). Whoever waits looks by itself every 5
//! s, whatever stands in the row, and whatever it was told, or wasn't. Then it gives those before it 10 ms each, a
//! second at most, and has another one to take the lock.
//!
//! A lock is *free* from when a hold is over for certain (its release said so; it was dropped and nothing had hurt; its
//! lease ran out, with the time that a last refresh may have been on its way; somebody freed the row) to when the next
//! version was said to be taken, or could have been without our hearing of it, and only where no version was taken
//! between. Time in which the waiter, its network or the server was hurt, or a transaction may have locked the row,
//! doesn't count: the bound begins anew after it. One call waits all the time; that somebody else comes and goes is not
//! asked.
//!
//! A hold is *trusted* from the first time that its thread was seen to find it held to the last deadline that it was
//! told (`remaining`), or the end that its owner made of it, or its process's death. All instants are on the safe
//! side: a violation is one however the clock readings and the calls interleaved. A call without an answer may have
//! happened, at any time after its start.
//!
//! Where commits were undone (a restore, a failover to a standby that lacked them), a lock can't keep rules 1 to 3
//! across that moment: they are asked for before it, after it, and, of an owner from before, once it could hear of it
//! by a refresh.

#[cfg(test)]
mod examples;
#[cfg(test)]
#[path = "verdict/waiting_examples.rs"]
mod waiting_examples;

mod conduct;
mod liveness;
mod safety;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use crate::history::{
    Call, Ending, Failure, Fault, History, How, Kind, Level, LifeEnd, Nanos, Operation, Outcome, Written, nanos,
};
use crate::workload::{HOT, OWN, QUEUE};

/// What is allowed beyond a promised time, on a machine that does other things as well.
const SLACK: Duration = Duration::from_millis(1_000);
/// A lock is free no longer than this beside a live waiter: the look. So long everybody may take to get every lock,
/// beyond a lease.
const LOOK: Duration = Duration::from_millis(5_000 + 2_000);
/// The most where many stand in its row.
pub const LONGEST_LOOK: Duration = Duration::from_secs(15 + 2);
/// The same where nothing has hurt: the grace.
const GRACE: Duration = Duration::from_millis(100 + 1_000);
/// A connection that was lost is there again, and whoever uses it has looked.
const QUIET: Duration = Duration::from_secs(2);
/// What it takes to refresh a lease after a fault, beyond the interval.
const REFRESH_SLACK: Duration = Duration::from_millis(700);

/// The server writes an asynchronous commit down within three times its `wal_writer_delay` of 200 ms.
const UNWRITTEN: Duration = Duration::from_millis(600);

/// For how long a request may be on its way.
const STRAY: Duration = Duration::from_secs(5);

/// The times that the workers use.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    pub lease: Duration,
    /// Of those whose lease is another one.
    pub longest_lease: Duration,
    pub refresh: Duration,
    /// Of a thread's own locks.
    pub own_lease: Duration,
    /// How long a transaction of the workers may be idle before the server ends it.
    pub idle: Duration,
}

#[derive(Clone, Debug)]
pub struct Violation {
    pub rule: u8,
    pub text: String,
    pub at: Nanos,
    pub lock: Option<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}: {}", self.rule, self.text)
    }
}

/// What happened, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub holds: usize,
    /// Holds that followed one which its owner did not give back.
    pub takeovers: usize,
    pub lost: usize,
    pub calls: usize,
    pub unanswered: usize,
    pub faults: usize,
    pub kills: usize,
    /// Writes that were committed.
    pub writes: usize,
    /// Those that were refused because the hold was lost.
    pub refused: usize,
    /// Those of them that came when a newer hold had been taken: what a fence is for.
    pub refused_late: usize,
    /// Free times of a lock beside somebody who waited for it, and the longest of them.
    pub free: usize,
    pub longest_free: Duration,
    /// Those of them that nothing had hurt.
    pub free_quietly: usize,
    pub longest_quietly: Duration,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.holds += other.holds;
        self.takeovers += other.takeovers;
        self.lost += other.lost;
        self.calls += other.calls;
        self.unanswered += other.unanswered;
        self.faults += other.faults;
        self.kills += other.kills;
        self.writes += other.writes;
        self.refused += other.refused;
        self.refused_late += other.refused_late;
        self.free += other.free;
        self.longest_free = self.longest_free.max(other.longest_free);
        self.free_quietly += other.free_quietly;
        self.longest_quietly = self.longest_quietly.max(other.longest_quietly);
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { holds, takeovers, lost, calls, unanswered, faults, kills, .. } = self;
        let Counts { writes, refused, refused_late, free, longest_free, free_quietly, longest_quietly, .. } = self;
        write!(
            f,
            "{holds} holds, {takeovers} takeovers, {lost} losses, {calls} calls ({unanswered} unanswered), \
             {faults} faults ({kills} kills), {writes} writes and {refused} refused ({refused_late} after a newer \
             hold), \
             {free} times free beside a waiter (for {longest_free:.1?} at most; {free_quietly} of them unhurt, \
             for {longest_quietly:.1?})"
        )
    }
}

/// One hold, as its thread saw it.
struct Hold<'a> {
    lock: &'a str,
    version: i64,
    acquire: &'a Operation,
    looks: Vec<&'a Operation>,
    release: Option<&'a Operation>,
    /// Since then at the latest it was trusted.
    trusted_from: Option<Nanos>,
    /// Until then at least.
    trusted_until: Nanos,
    /// The last time at which it was trusted for certain, and what it was told then.
    last_trusted: Option<(Nanos, Nanos)>,
    /// When it was first seen to be lost.
    lost_at: Option<&'a Operation>,
}

impl<'a> Hold<'a> {
    fn new(history: &History, acquire: &'a Operation, version: i64, of_hold: &[&'a Operation]) -> Hold<'a> {
        let is_look = |operation: &&&Operation| matches!(operation.call, Call::Look { .. });
        let looks: Vec<&Operation> = of_hold.iter().filter(is_look).copied().collect();
        let release = of_hold.iter().find(|operation| matches!(operation.call, Call::Release { .. })).copied();
        let held = |look: &&Operation| match &look.end {
            Some((end, Outcome::Held(remaining))) => Some((look.begin, *end, look.begin + remaining)),
            _ => None,
        };
        let trusted_from = looks.iter().find_map(held).map(|(_, end, _)| end);
        let last_trusted = looks.iter().rev().find_map(held).map(|(begin, _, deadline)| (begin, deadline));
        let is_lost = |look: &&&Operation| look.outcome() == Some(&Outcome::NotHeld);
        let lost_at = looks.iter().find(is_lost).copied();
        let mut trusted_until = looks.iter().filter_map(held).map(|(_, _, deadline)| deadline).max().unwrap_or(0);
        if let (Some((last, _)), Some(lost)) = (last_trusted, lost_at)
            && lost.end.as_ref().is_some_and(|(end, _)| *end < trusted_until)
        {
            // Told so before its deadline.
            trusted_until = last;
        }
        let death = history.lives[acquire.process].end;
        for end in [release.map(|release| release.begin), death].into_iter().flatten() {
            trusted_until = trusted_until.min(end);
        }
        let lock = acquire.call.lock().unwrap_or_default();
        Hold { lock, version, acquire, looks, release, trusted_from, trusted_until, last_trusted, lost_at }
    }

    fn was_given_back(&self) -> bool {
        self.release.is_some_and(|release| {
            matches!(release.outcome(), Some(Outcome::Done | Outcome::RolledBack))
                && !matches!(release.call, Call::Release { how: Ending::Abandon, .. })
                && self.lost_at.is_none()
        })
    }

    fn lease(&self) -> Nanos {
        let Call::Acquire { lease, .. } = self.acquire.call else { return 0 };
        lease
    }

    /// How long before the deadline it may be told to be lost: a hundredth of the lease, at most 100 ms.
    fn told_early(&self) -> Nanos {
        (self.lease() / 100).min(100_000_000)
    }

    fn name(&self) -> String {
        format!("version {} (p{}.{})", self.version, self.acquire.process, self.acquire.thread)
    }
}

struct Judge<'a> {
    history: &'a History,
    times: Times,
    /// By lock, and there by version.
    holds: BTreeMap<&'a str, Vec<Hold<'a>>>,
}

#[derive(Default)]
struct Found(Vec<Violation>);

impl Found {
    fn add(&mut self, rule: u8, at: Nanos, lock: Option<&str>, text: String) {
        self.0.push(Violation { rule, text, at, lock: lock.map(str::to_owned) });
    }
}

/// Judges a run.
pub fn judge(history: &History, times: Times) -> (Vec<Violation>, Counts) {
    let (judge, mut found) = (Judge { history, times, holds: holds(history) }, Found::default());
    judge.the_history_is_one(&mut found);
    judge.one_owner(&mut found);
    judge.undone_owners_are_told(&mut found);
    judge.versions_grow(&mut found);
    judge.no_stale_write(&mut found);
    judge.everybody_recovers(&mut found);
    judge.nothing_is_left(&mut found);
    judge.no_call_takes_too_long(&mut found);
    judge.nothing_unexpected(&mut found);
    judge.nothing_refused_for_nothing(&mut found);
    judge.no_hold_lost_for_nothing(&mut found);
    judge.no_write_refused_for_nothing(&mut found);
    let free = judge.no_free_lock_beside_a_waiter(&mut found);
    found.0.sort_by_key(|violation| (violation.rule, violation.at));
    let mut counts = judge.counts();
    counts += free;
    (found.0, counts)
}

fn holds(history: &History) -> BTreeMap<&str, Vec<Hold<'_>>> {
    // A thread has one hold at a time, so that a version of a lock names its hold even if it came twice.
    let mut of_thread: HashMap<(usize, u32), Vec<&Operation>> = HashMap::new();
    for operation in &history.operations {
        of_thread.entry((operation.process, operation.thread)).or_default().push(operation);
    }
    let mut holds: BTreeMap<&str, Vec<Hold<'_>>> = BTreeMap::new();
    for operations in of_thread.values() {
        let starts = operations.iter().enumerate();
        for (index, version) in starts.filter_map(|(index, operation)| Some((index, operation.taken()?))) {
            let rest = operations.get(index + 1..).unwrap_or_default();
            let length = rest.iter().take_while(|operation| operation.call.version() == Some(version)).count();
            let hold = Hold::new(history, operations[index], version, rest.get(..length).unwrap_or_default());
            holds.entry(hold.lock).or_default().push(hold);
        }
    }
    for holds in holds.values_mut() {
        holds.sort_by_key(|hold| (hold.version, hold.acquire.begin));
    }
    holds
}

impl<'a> Judge<'a> {
    fn counts(&self) -> Counts {
        let history = self.history;
        let mut counts = Counts {
            calls: history.operations.len(),
            unanswered: history.operations.iter().filter(|operation| operation.end.is_none()).count(),
            faults: history.faults.len(),
            kills: history.lives.iter().filter(|life| life.ending == Some(LifeEnd::Killed)).count(),
            writes: history.written.len(),
            ..Counts::default()
        };
        for operation in &history.operations {
            if let (Some(_), Some((end, Outcome::Failed(Failure::LeaseLost, _)))) =
                (operation.call.write_id(), &operation.end)
            {
                let of_lock = operation.call.lock().and_then(|lock| self.holds.get(lock));
                let is_late = of_lock.into_iter().flatten().any(|newer| {
                    Some(newer.version) > operation.call.version()
                        && newer.acquire.end.as_ref().is_some_and(|(taken, _)| taken < end)
                });
                counts.refused += 1;
                counts.refused_late += usize::from(is_late);
            }
        }
        for holds in self.holds.values() {
            counts.holds += holds.len();
            counts.lost += holds.iter().filter(|hold| hold.lost_at.is_some()).count();
            let pairs = holds.windows(2);
            counts.takeovers += pairs.filter(|pair| matches!(pair, [before, _] if !before.was_given_back())).count();
        }
        counts
    }

    /// When commits on a lock were undone: the moment just before, and just after.
    fn undone(&self, lock: &str) -> impl Iterator<Item = (Nanos, Nanos)> + use<'a> {
        let lock = lock.to_owned();
        let is_of = move |fault: &&Fault| matches!(&fault.kind, Kind::Undone(of) if *of == lock || of.is_empty());
        self.history.faults.iter().filter(is_of).map(|fault| (fault.begin, fault.end))
    }

    /// When somebody ended a hold by hand: the moment just before, and just after.
    fn freed(&self, hold: &Hold<'_>) -> Option<(Nanos, Nanos)> {
        let is_of = |fault: &&Fault| {
            matches!(&fault.kind, Kind::Freed { lock, version, .. }
            if *lock == hold.lock && *version == hold.version)
        };
        self.history.faults.iter().find(is_of).map(|fault| (fault.begin, fault.end))
    }

    /// How long a lock may be free at most. Where more than fifty stand in a row, each of them looks every tenth of a
    /// second times their number, up to 15 s; and some of those who were put there may have gone.
    fn look(&self, lock: &str, until: Nanos) -> Duration {
        let before = self.history.faults.iter().filter(|fault| fault.begin < until);
        let dead = before.map(|fault| match &fault.kind {
            Kind::DeadWaiters(of, count) if of == lock => *count,
            _ => 0,
        });
        // Beside them, those of the run.
        let stand = dead.sum::<u32>() + 10;
        LOOK + (Duration::from_millis(100) * stand).clamp(Duration::from_secs(5), Duration::from_secs(15))
            - Duration::from_secs(5)
    }

    /// When commits were last undone after one of the two began and before the other was over, if they were.
    fn undone_between(&self, lock: &str, first: &Operation, second: &Operation) -> Option<Nanos> {
        let until = |operation: &Operation| operation.end.as_ref().map_or(Nanos::MAX, |(end, _)| *end);
        let (from, until) = (first.begin.min(second.begin), until(first).max(until(second)));
        self.undone(lock).filter(|(begin, end)| *end > from && *begin < until).map(|(_, end)| end).max()
    }

    fn is_undone_between(&self, lock: &str, first: &Operation, second: &Operation) -> bool {
        self.undone_between(lock, first, second).is_some()
    }

    fn hold_of(&self, operation: &Operation) -> Option<&Hold<'a>> {
        let holds = self.holds.get(operation.call.lock()?)?;
        let is_of = |hold: &&Hold<'_>| {
            Some(hold.version) == operation.call.version()
                && (hold.acquire.process, hold.acquire.thread) == (operation.process, operation.thread)
                && hold.acquire.begin <= operation.begin
        };
        holds.iter().filter(is_of).max_by_key(|hold| hold.acquire.begin)
    }

    /// The faults that a worker could notice.
    fn faults_of(&self, process: usize) -> impl Iterator<Item = &'a Fault> + use<'a> {
        let worker = self.history.lives[process].worker;
        self.history.faults.iter().filter(move |fault| fault.worker.is_none_or(|hurt| hurt == worker))
    }

    /// The faults that hurt a worker's calls.
    fn hurts_of(&self, process: usize) -> impl Iterator<Item = (Nanos, Nanos)> + use<'a> {
        self.faults_of(process).filter(|fault| fault.kind.hurts_calls()).map(|fault| (fault.begin, fault.end))
    }

    /// The longest time between two instants in which nothing hurt a process.
    fn clear_time(&self, process: usize, from: Nanos, until: Nanos) -> Nanos {
        let (begin, end) = longest_clear(from, until, self.hurts_of(process).collect());
        end - begin
    }
}

/// The longest time between two instants that is free of others.
fn longest_clear(from: Nanos, until: Nanos, mut hurts: Vec<(Nanos, Nanos)>) -> (Nanos, Nanos) {
    hurts.push((until, Nanos::MAX));
    hurts.sort_unstable();
    let (mut longest, mut from) = ((from, from), from);
    for (hurt, over) in hurts {
        let end = hurt.min(until).max(from);
        if end - from > longest.1 - longest.0 {
            longest = (from, end);
        }
        from = from.max(over);
    }
    longest
}
