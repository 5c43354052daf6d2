//! Rules 0 to 3: the history is one, and so is the owner of a lock.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::*;

impl<'a> Judge<'a> {
    pub(super) fn the_history_is_one(&self, found: &mut Found) {
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

    pub(super) fn one_owner(&self, found: &mut Found) {
        for (lock, holds) in &self.holds {
            for (index, newer) in holds.iter().enumerate() {
                for older in holds.iter().take(index) {
                    let (Some(older_from), Some(newer_from)) = (older.trusted_from, newer.trusted_from) else {
                        continue;
                    };
                    if older.trusted_until <= newer_from {
                        continue;
                    }
                    let undone = self.undone_between(lock, older.acquire, newer.acquire);
                    let undone = undone.max(self.freed(older).map(|(_, freed)| freed));
                    let both_from = older_from.max(newer_from);
                    let both_until = older.trusted_until.min(newer.trusted_until);
                    let is_broken = match undone {
                        // Which one is the newer says its version.
                        None => older.version < newer.version || both_from < both_until,
                        // By then a refresh has told it.
                        Some(undone) => both_from < both_until && both_until > undone + older.lease() + nanos(SLACK),
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

    /// A hold whose commit was undone, or that somebody ended by hand, is over. Its owner hears of it from its next
    /// refresh.
    pub(super) fn undone_owners_are_told(&self, found: &mut Found) {
        for hold in self.holds.values().flatten() {
            for (begin, end) in self.undone(hold.lock).chain(self.freed(hold)) {
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

    pub(super) fn versions_grow(&self, found: &mut Found) {
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
    pub(super) fn no_stale_write(&self, found: &mut Found) {
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
                        "{lock:?}: the write of {} was not committed by {} ms, nor undone when {} had taken the lock \
                         by {} ms",
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

    fn is_undone_between_holds(&self, lock: &str, first: &Operation, second: &Operation) -> bool {
        match (self.hold_of(first), self.hold_of(second)) {
            (Some(first_hold), Some(second_hold)) => {
                self.is_undone_between(lock, first_hold.acquire, second)
                    || self.is_undone_between(lock, second_hold.acquire, first)
            }
            _ => false,
        }
    }
}
