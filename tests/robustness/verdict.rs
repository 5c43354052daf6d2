//! The judge: it knows what a lock with a lease promises, and nothing of how this one is made.
//!
//! | rule | |
//! | --- | --- |
//! | 0 | the history is one: whole, in order, and of the time in which it was made |
//! | 1 | one owner: no hold is trusted while, or after, a newer one is |
//! | 2 | versions grow with every hold, in the order of the holds, and belong to one hold each |
//! | 3 | no write is committed after one of a newer hold, nor once a newer hold was taken, nor if it was refused |
//! | 4 | after the last fault everybody gets every lock within a lease and 5 s; nothing is left over at the end |
//! | 5 | no call takes longer than its documentation says |
//! | 6 | nothing panics, and no error comes that no fault explains |
//! | 7 | no lock is refused that nobody else wants, where nothing but an answer was lost |
//! | 8 | no hold is lost before its deadline; while nothing hurts it is refreshed, and its writes are not refused |
//!
//! A hold is *trusted* from the first time that its thread was seen to find it held to the last deadline that it was
//! told (`remaining`), or the end that its owner made of it, or its process's death. All instants are on the safe side: a
//! violation is one however the clock readings and the calls interleaved. A call without an answer may have
//! happened, at any time after its start.
//!
//! Where commits were undone (a restore, a failover to a standby that lacked them), a lock can't keep rules 1 to 3 across that
//! moment: they are asked for before it, after it, and, of an owner from before, once it could hear of it by a refresh.

#[cfg(test)]
mod examples;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::Duration;

use crate::history::{
    Call, Ending, Failure, Fault, History, Kind, Level, LifeEnd, Nanos, Operation, Outcome, Written, nanos,
};
use crate::workload::{HOT, OWN, QUEUE};

/// What is allowed beyond a promised time, on a machine that does other things as well.
const SLACK: Duration = Duration::from_millis(1_000);
/// How long everybody may take to get every lock, beyond a lease.
const RECOVERY: Duration = Duration::from_secs(5);
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
    pub refresh: Duration,
    pub own_lease: Duration,
}

impl Times {
    fn lease_of(&self, lock: &str) -> Duration {
        if lock.starts_with(OWN) { self.own_lease } else { self.lease }
    }

    /// How long before the deadline a hold may be told to be lost: a hundredth of the lease, at most 100 ms.
    fn told_early(&self, lock: &str) -> Duration {
        (self.lease_of(lock) / 100).min(Duration::from_millis(100))
    }
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
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { holds, takeovers, lost, calls, unanswered, faults, kills, writes, refused, refused_late } = self;
        write!(
            f,
            "{holds} holds, {takeovers} takeovers, {lost} losses, {calls} calls ({unanswered} unanswered), \
             {faults} faults ({kills} kills), {writes} writes and {refused} refused ({refused_late} after a newer hold)"
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
    found.0.sort_by_key(|violation| (violation.rule, violation.at));
    (found.0, judge.counts())
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

    /// When commits were last undone after one of the two began and before the other was over, if they were.
    fn undone_between(&self, lock: &str, first: &Operation, second: &Operation) -> Option<Nanos> {
        let until = |operation: &Operation| operation.end.as_ref().map_or(Nanos::MAX, |(end, _)| *end);
        let (from, until) = (first.begin.min(second.begin), until(first).max(until(second)));
        self.undone(lock).filter(|(begin, end)| *end > from && *begin < until).map(|(_, end)| end).max()
    }

    fn is_undone_between(&self, lock: &str, first: &Operation, second: &Operation) -> bool {
        self.undone_between(lock, first, second).is_some()
    }

    fn the_history_is_one(&self, found: &mut Found) {
        let history = self.history;
        let mut last: HashMap<(usize, u32), &Operation> = HashMap::new();
        for operation in &history.operations {
            let (begin, end) = (operation.begin, operation.end.as_ref().map_or(history.end, |(end, _)| *end));
            let life = &history.lives[operation.process];
            if begin < life.begin || end > history.end || end < begin || begin > history.end {
                let text = format!("{:?} began at {begin} and ended at {end}, out of its time", operation.call);
                found.add(0, begin, operation.call.lock(), text);
            }
            if let Some(before) = last.insert((operation.process, operation.thread), operation) {
                let is_over = before.end.as_ref().is_some_and(|(end, _)| *end <= begin);
                if !is_over {
                    let text = format!("{:?} began while its thread was in {:?}", operation.call, before.call);
                    found.add(0, begin, operation.call.lock(), text);
                }
            }
            if let Call::Look { lock, version }
            | Call::Write { lock, version, .. }
            | Call::Release { lock, version, .. } = &operation.call
            {
                let of_lock = self.holds.get(lock.as_str());
                let is_known = of_lock.is_some_and(|holds| holds.iter().any(|hold| hold.version == *version));
                if !is_known {
                    found.add(0, begin, Some(lock), format!("{:?} of a hold that nobody took", operation.call));
                }
            }
        }
        // What the database acknowledged is there, once, and what is there was sent.
        let there: HashMap<u64, usize> = history.written.iter().fold(HashMap::new(), |mut there, written| {
            *there.entry(written.id).or_default() += 1;
            there
        });
        let mut sent = HashSet::new();
        for operation in &history.operations {
            let Some(id) = operation.call.write_id() else { continue };
            sent.insert(id);
            let times = there.get(&id).copied().unwrap_or_default();
            if operation.outcome() == Some(&Outcome::Done) && times != 1 {
                let text = format!("{:?} was acknowledged and is there {times} times", operation.call);
                found.add(0, operation.begin, operation.call.lock(), text);
            }
        }
        for written in history.written.iter().filter(|written| !sent.contains(&written.id)) {
            found.add(0, history.end, Some(&written.lock), format!("{written:?} was never sent"));
        }
    }

    fn one_owner(&self, found: &mut Found) {
        for (lock, holds) in &self.holds {
            let lease = nanos(self.times.lease_of(lock) + SLACK);
            for (index, newer) in holds.iter().enumerate() {
                for older in holds.iter().take(index) {
                    let (Some(older_from), Some(newer_from)) = (older.trusted_from, newer.trusted_from) else {
                        continue;
                    };
                    if older.trusted_until <= newer_from {
                        continue;
                    }
                    let undone = self.undone_between(lock, older.acquire, newer.acquire);
                    let both_from = older_from.max(newer_from);
                    let both_until = older.trusted_until.min(newer.trusted_until);
                    let is_broken = match undone {
                        // Which one is the newer says its version.
                        None => older.version < newer.version || both_from < both_until,
                        // By then a refresh has told it.
                        Some(undone) => both_from < both_until && both_until > undone + lease,
                    };
                    if is_broken {
                        let at = |at| self.history.at(at);
                        let text = format!(
                            "two owners of {lock:?}: {} was trusted from {} to {} ms, and the newer {} from {} ms on",
                            older.name(),
                            at(older_from),
                            at(older.trusted_until),
                            newer.name(),
                            at(newer_from),
                        );
                        found.add(1, newer_from, Some(lock), text);
                    }
                }
            }
        }
    }

    /// A hold whose commit was undone is over. Its owner hears of it from its next refresh.
    fn undone_owners_are_told(&self, found: &mut Found) {
        for hold in self.holds.values().flatten() {
            for (begin, end) in self.undone(hold.lock) {
                let was_held = hold.trusted_from.is_some_and(|from| from < begin)
                    && hold.release.is_none_or(|release| release.begin > end);
                let process = hold.acquire.process;
                let trusts = |look: &&&Operation| {
                    matches!(look.end, Some((_, Outcome::Held(_))))
                        && look.begin > end
                        && self.clear_time(process, end, look.begin) > nanos(self.times.refresh + REFRESH_SLACK)
                };
                if let Some(look) = hold.looks.iter().find(trusts).filter(|_| was_held) {
                    let (name, undone) = (hold.name(), self.history.at(end));
                    let text = format!("{:?}: {name} was undone at {undone} ms, and is still trusted", hold.lock);
                    found.add(1, look.begin, Some(hold.lock), text);
                }
            }
        }
    }

    fn versions_grow(&self, found: &mut Found) {
        for (lock, holds) in &self.holds {
            for pair in holds.windows(2) {
                let [first, second] = pair else { continue };
                if first.version == second.version && !self.is_undone_between(lock, first.acquire, second.acquire) {
                    let text = format!("{lock:?}: {} and {} are one version", first.name(), second.name());
                    found.add(2, second.acquire.begin, Some(lock), text);
                }
            }
            // Who asked after another one had got the lock gets a greater version.
            let mut by_begin: Vec<&Hold<'_>> = holds.iter().collect();
            by_begin.sort_by_key(|hold| hold.acquire.begin);
            let mut by_end = by_begin.clone();
            by_end.sort_by_key(|hold| hold.acquire.end.as_ref().map(|(end, _)| *end));
            let (mut ended, mut greatest) = (by_end.into_iter().peekable(), None::<&Hold<'_>>);
            for hold in by_begin {
                let is_before =
                    |other: &&Hold<'_>| other.acquire.end.as_ref().is_some_and(|(end, _)| *end < hold.acquire.begin);
                while let Some(other) = ended.next_if(is_before) {
                    let is_new_era =
                        greatest.is_some_and(|greatest| self.is_undone_between(lock, greatest.acquire, other.acquire));
                    if is_new_era || greatest.is_none_or(|greatest| greatest.version < other.version) {
                        greatest = Some(other);
                    }
                }
                if let Some(before) = greatest
                    && before.version > hold.version
                    && !self.is_undone_between(lock, before.acquire, hold.acquire)
                {
                    let text = format!("{lock:?}: {} was taken after {}", hold.name(), before.name());
                    found.add(2, hold.acquire.begin, Some(lock), text);
                }
            }
            let row = self.history.rows.iter().find(|row| row.lock == *lock);
            let newest = holds.iter().map(|hold| hold.version).max();
            if let (Some(row), Some(newest)) = (row, newest)
                && row.version < newest
                && self.undone(lock).next().is_none()
            {
                let text = format!("{lock:?} ends with version {} and had version {newest}", row.version);
                found.add(2, self.history.end, Some(lock), text);
            }
        }
    }

    /// What the database committed, and in which order.
    fn no_stale_write(&self, found: &mut Found) {
        let by_id =
            self.history.operations.iter().filter_map(|operation| Some((operation.call.write_id()?, operation)));
        let writes: HashMap<u64, &Operation> = by_id.collect();
        let mut by_lock: BTreeMap<&str, Vec<(&Written, &Operation)>> = BTreeMap::new();
        for written in &self.history.written {
            if let Some(write) = writes.get(&written.id) {
                by_lock.entry(&written.lock).or_default().push((written, *write));
            }
        }
        for (lock, mut written) in by_lock {
            written.sort_by_key(|(written, _)| written.order);
            let mut newest: Option<(&Written, &Operation)> = None;
            for (written, write) in written {
                let name = || self.hold_of(write).map(Hold::name).unwrap_or_default();
                if let Some(Outcome::Failed(Failure::LeaseLost | Failure::Fence, _)) = write.outcome() {
                    let text = format!("{lock:?}: a write of {} was refused, and is committed", name());
                    found.add(3, write.begin, Some(lock), text);
                }
                if let Some(newer) = self.taken_before_commit(write) {
                    let at = |at| self.history.at(at);
                    let text = format!(
                        "{lock:?}: the write of {} was not committed by {} ms, nor undone when {} had taken the lock by {} ms",
                        name(),
                        at(write.uncommitted.unwrap_or_default()),
                        newer.name(),
                        at(newer.acquire.end.as_ref().map_or(0, |(end, _)| *end)),
                    );
                    found.add(3, write.begin, Some(lock), text);
                }
                match newest {
                    Some((before, newer))
                        if before.version > written.version && !self.is_undone_between_holds(lock, newer, write) =>
                    {
                        let text = format!("{lock:?}: {} wrote after version {}", name(), before.version);
                        found.add(3, write.begin, Some(lock), text);
                    }
                    _ => newest = Some((written, write)),
                }
            }
        }
    }

    /// A newer hold that had been taken when a write was not committed yet.
    fn taken_before_commit(&self, write: &Operation) -> Option<&Hold<'a>> {
        let (lock, uncommitted, hold) = (write.call.lock()?, write.uncommitted?, self.hold_of(write)?);
        self.holds.get(lock)?.iter().find(|newer| {
            newer.version > hold.version
                && newer.acquire.end.as_ref().is_some_and(|(end, _)| *end < uncommitted)
                && !self.is_undone_between(lock, hold.acquire, newer.acquire)
        })
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

    fn is_undone_between_holds(&self, lock: &str, first: &Operation, second: &Operation) -> bool {
        match (self.hold_of(first), self.hold_of(second)) {
            (Some(first_hold), Some(second_hold)) => {
                self.is_undone_between(lock, first_hold.acquire, second)
                    || self.is_undone_between(lock, second_hold.acquire, first)
            }
            _ => false,
        }
    }

    fn everybody_recovers(&self, found: &mut Found) {
        let history = self.history;
        let until = history.healed + nanos(self.times.lease + RECOVERY);
        for (process, life) in history.lives.iter().enumerate() {
            if life.ending != Some(LifeEnd::Stopped) {
                continue;
            }
            for thread in 1..=life.threads {
                for class in [HOT, QUEUE, OWN] {
                    let mut taken = history.operations.iter().filter(|operation| {
                        (operation.process, operation.thread) == (process, thread)
                            && operation.taken().is_some()
                            && operation.call.lock().is_some_and(|lock| lock.starts_with(class))
                    });
                    let is_in_time = |operation: &Operation| {
                        operation.end.as_ref().is_some_and(|(end, _)| (history.healed..until).contains(end))
                    };
                    let lock = if class == OWN { format!("{OWN}-{process}-{thread}") } else { class.to_owned() };
                    if !taken.any(is_in_time) && !self.release_may_be_lost(&lock) {
                        let text = format!(
                            "p{process}.{thread} didn't get {class:?} within a lease and {RECOVERY:?} after the last fault, \
                             which was over at {} ms",
                            history.at(history.healed)
                        );
                        let lock = if class == OWN { format!("{OWN}-{process}-{thread}") } else { class.to_owned() };
                        found.add(4, until, Some(&lock), text);
                    }
                }
            }
        }
    }

    /// A release is acknowledged before it is on the disk. One that a crash undid leaves its lease to run out, which for a long
    /// lease is later than we wait.
    fn release_may_be_lost(&self, lock: &str) -> bool {
        let history = self.history;
        let mut crashes = history.faults.iter().filter(|fault| fault.kind == Kind::Crashed);
        crashes.any(|crash| {
            let from = crash.begin.saturating_sub(nanos(UNWRITTEN));
            history.operations.iter().any(|operation| {
                matches!(operation.call, Call::Release { .. })
                    && operation.call.lock() == Some(lock)
                    && operation.end.as_ref().is_some_and(|(end, _)| (from..crash.end).contains(end))
            })
        })
    }

    fn nothing_is_left(&self, found: &mut Found) {
        let history = self.history;
        for (process, life) in history.lives.iter().enumerate() {
            match (&life.ending, &life.left) {
                (Some(LifeEnd::Stopped), Some((threads, sockets))) if threads.is_empty() && *sockets == 0 => {}
                (Some(LifeEnd::Stopped), left) => {
                    found.add(4, history.end, None, format!("p{process} left over: {left:?}"));
                }
                (Some(LifeEnd::Killed | LifeEnd::Abandoned), _) => {}
                (ending, _) => found.add(6, history.end, None, format!("p{process} ended with {ending:?}")),
            }
        }
        let died = |lock: &str| {
            history.lives.iter().enumerate().any(|(process, life)| {
                life.ending != Some(LifeEnd::Stopped) && lock.starts_with(&format!("{OWN}-{process}-"))
            })
        };
        let mut seen = HashSet::new();
        for row in &history.rows {
            if !seen.insert(&row.lock) {
                found.add(4, history.end, Some(&row.lock), format!("{:?} has more than one row", row.lock));
            }
            if row.is_held && !died(&row.lock) && !self.release_may_be_lost(&row.lock) {
                let text = format!("{:?} is still held, as version {}", row.lock, row.version);
                found.add(4, history.end, Some(&row.lock), text);
            }
            if row.waiters > 0 && [HOT, QUEUE].contains(&row.lock.as_str()) {
                let text = format!("{} processes still stand in the row of {:?}", row.waiters, row.lock);
                found.add(4, history.end, Some(&row.lock), text);
            }
        }
    }

    fn no_call_takes_too_long(&self, found: &mut Found) {
        let history = self.history;
        for operation in &history.operations {
            let Some(limit) = operation.limit.checked_add(nanos(SLACK)) else { continue };
            let life = &history.lives[operation.process];
            // One without an answer may have waited until its process ended.
            let end = operation.end.as_ref().map(|(end, _)| *end).or(life.end).unwrap_or(history.end);
            let stops =
                history.faults.iter().filter(|fault| fault.kind == Kind::Stopped && fault.worker == Some(life.worker));
            let stopped: Nanos =
                stops.map(|stop| stop.end.min(end).saturating_sub(stop.begin.max(operation.begin))).sum();
            let took = end.saturating_sub(operation.begin).saturating_sub(stopped);
            if took > limit {
                let text = format!(
                    "{:?} of p{}.{} took {} ms, and may take {} ms",
                    operation.call,
                    operation.process,
                    operation.thread,
                    took / 1_000_000,
                    operation.limit / 1_000_000
                );
                found.add(5, end, operation.call.lock(), text);
            }
        }
    }

    fn nothing_unexpected(&self, found: &mut Found) {
        for (process, life) in self.history.lives.iter().enumerate() {
            if life.said.contains("panicked at") {
                let said: String = life.said.chars().take(2_000).collect();
                found.add(6, life.begin, None, format!("p{process} said: {said}"));
            }
        }
        // Broken connections, a server that stops, starts or is full, and calls that were given up.
        let passes = |code: &str| {
            ["08", "57P"].iter().any(|class| code.starts_with(class)) || ["53300", "57014", "55P03"].contains(&code)
        };
        for operation in &self.history.operations {
            let Some(Outcome::Failed(failure, text)) = operation.outcome() else { continue };
            // Of a transaction of the workers' own: one that met another writer, or was ended because it was idle for too long.
            let is_own =
                matches!(operation.call, Call::Write { .. } | Call::Release { how: Ending::UnlockIn { .. }, .. });
            let meets_others = !matches!(operation.call, Call::Write { level: Level::ReadCommitted, .. });
            let is_explained = match (&operation.call, failure) {
                (_, Failure::Database(Some(code))) if is_own && code == "40001" => meets_others,
                (_, Failure::Database(Some(code))) if is_own && ["25P03", "40P01"].contains(&code.as_str()) => true,
                // Whether they are refused for a reason is asked elsewhere.
                (Call::Write { .. }, Failure::LeaseLost) => true,
                (_, Failure::Fence) => is_own,
                (_, Failure::Connect | Failure::Timeout) => true,
                (_, Failure::Database(code)) => code.as_deref().is_none_or(passes),
                (Call::Release { .. }, Failure::LeaseLost) => true,
                _ => false,
            };
            if !is_explained {
                let text = format!("{:?} failed: {text}", operation.call);
                found.add(6, operation.begin, operation.call.lock(), text);
            }
        }
    }

    /// The faults that a worker could notice.
    fn faults_of(&self, process: usize) -> impl Iterator<Item = &'a Fault> + use<'a> {
        let worker = self.history.lives[process].worker;
        self.history.faults.iter().filter(move |fault| fault.worker.is_none_or(|hurt| hurt == worker))
    }

    fn nothing_refused_for_nothing(&self, found: &mut Found) {
        let mut of_lock: HashMap<(usize, &str), Vec<&Operation>> = HashMap::new();
        for operation in &self.history.operations {
            let Some(lock) = operation.call.lock().filter(|lock| lock.starts_with(OWN)) else { continue };
            if !matches!(operation.call, Call::Acquire { .. } | Call::Release { .. }) {
                continue;
            }
            let earlier = of_lock.entry((operation.process, lock)).or_default();
            if let Some((end, Outcome::Busy)) = operation.end {
                // It was taken and given back before, and nothing has hurt its user since.
                let is_free = matches!(earlier.as_slice(), [.., acquire, release]
                    if acquire.taken().is_some() && matches!(release.outcome(), Some(Outcome::Done | Outcome::RolledBack)));
                let since = earlier.iter().rev().nth(1).map_or(end, |acquire| acquire.begin);
                let was_hurt = self.faults_of(operation.process).any(|fault| {
                    !matches!(fault.kind, Kind::LostAnswer | Kind::Harmless) && fault.end > since && fault.begin < end
                });
                // What failed before may come through yet.
                let stray = since.saturating_sub(nanos(STRAY));
                let may_be_a_stray = earlier.iter().any(|call| {
                    call.begin > stray
                        && !matches!(call.outcome(), Some(Outcome::Taken(_) | Outcome::Done | Outcome::RolledBack))
                });
                if is_free && !was_hurt && !may_be_a_stray {
                    let user = format!("p{}.{}", operation.process, operation.thread);
                    let text = format!("{lock:?} was refused to its only user, {user}");
                    found.add(7, operation.begin, Some(lock), text);
                }
            }
            earlier.push(operation);
        }
    }

    fn no_hold_lost_for_nothing(&self, found: &mut Found) {
        for hold in self.holds.values().flatten() {
            let (lock, name) = (hold.lock, hold.name());
            if let (Some(lost), Some((_, deadline))) = (hold.lost_at, hold.last_trusted)
                && lost.end.as_ref().is_some_and(|(end, _)| end + nanos(self.times.told_early(lock)) < deadline)
                && !self.is_undone_between(lock, hold.acquire, lost)
            {
                let text = format!("{lock:?}: {name} was lost before its deadline at {} ms", self.history.at(deadline));
                found.add(8, lost.begin, Some(lock), text);
            }
            // While a hold lasts, what a look says of its deadline says when it was refreshed last.
            let lease = nanos(self.times.lease_of(lock));
            let trusted = lease - lease / 10;
            let unrefreshed = hold.looks.iter().find_map(|look| {
                let (end, Outcome::Held(remaining)) = look.end.as_ref()? else { return None };
                // By then it was sent: `remaining` was read at the end of the look at the latest.
                let refreshed = (end + remaining).saturating_sub(trusted).max(hold.acquire.begin);
                let clear = self.clear_time(hold.acquire.process, refreshed, look.begin);
                (clear > nanos(self.times.refresh + REFRESH_SLACK)).then_some((look.begin, clear / 1_000_000))
            });
            if let Some((at, clear)) = unrefreshed {
                let text = format!("{lock:?}: {name} was not refreshed although nothing hurt it for {clear} ms");
                found.add(8, at, Some(lock), text);
            }
        }
    }

    /// A fence may say that a hold is lost if it is, or if nobody can tell. Where nothing hurt, it can tell.
    fn no_write_refused_for_nothing(&self, found: &mut Found) {
        for operation in &self.history.operations {
            let Some((end, Outcome::Failed(failure @ (Failure::LeaseLost | Failure::Fence), text))) = &operation.end
            else {
                continue;
            };
            let is_write =
                matches!(operation.call, Call::Write { .. } | Call::Release { how: Ending::UnlockIn { .. }, .. });
            let from = operation.begin.saturating_sub(nanos(self.times.lease));
            let mut hurts = self.faults_of(operation.process).filter(|fault| fault.kind != Kind::Harmless);
            if !is_write || hurts.any(|fault| fault.end > from && fault.begin < *end) {
                continue;
            }
            let Some(hold) = self.hold_of(operation) else { continue };
            let early = nanos(self.times.told_early(hold.lock));
            let lasts = |look: &&Operation| match look.outcome() {
                Some(Outcome::Held(remaining)) => look.begin + remaining > end + early,
                _ => false,
            };
            if *failure == Failure::Fence || hold.looks.iter().any(lasts) {
                let text =
                    format!("{:?}: a write of {} was refused, and nothing had hurt it: {text}", hold.lock, hold.name());
                found.add(8, operation.begin, Some(hold.lock), text);
            }
        }
    }

    /// The longest time between two instants in which nothing hurt a process.
    fn clear_time(&self, process: usize, from: Nanos, until: Nanos) -> Nanos {
        let hurting = self.faults_of(process).filter(|fault| fault.kind != Kind::Harmless);
        let mut hurts: Vec<(Nanos, Nanos)> = hurting.map(|fault| (fault.begin, fault.end)).collect();
        hurts.push((until, Nanos::MAX));
        hurts.sort_unstable();
        let (mut clear, mut from) = (0, from);
        for (hurt, over) in hurts {
            clear = clear.max(hurt.min(until).saturating_sub(from));
            from = from.max(over);
        }
        clear
    }
}
