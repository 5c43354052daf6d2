//! Rule 9: a free lock is taken, where somebody who lives waits for it.

use super::*;

/// A request that was sent just before its process ended, or was hurt, may come through so much later.
const ON_ITS_WAY: Nanos = 500_000_000;

/// A time in which a lock is free, whatever nobody has heard of.
struct Free {
    /// Of the hold before it.
    version: i64,
    from: Nanos,
    until: Nanos,
}

impl<'a> Judge<'a> {
    pub(super) fn no_free_lock_beside_a_waiter(&self, found: &mut Found) -> Counts {
        let mut counts = Counts::default();
        for (lock, holds) in &self.holds {
            // Versions that come twice tell nothing of what was between them: only the last of their kind are looked
            // at.
            let undone = self.undone(lock).map(|(_, end)| end).max().unwrap_or(0);
            let holds: Vec<&Hold<'_>> = holds.iter().filter(|hold| hold.acquire.begin >= undone).collect();
            let waits: Vec<&Operation> = self.history.operations.iter().filter(|call| waits_for(call, lock)).collect();
            for free in self.free_times(lock, &holds, undone) {
                let beside = waits.iter().map(|wait| (*wait, self.beside(lock, &free, wait)));
                let Some((wait, (from, until))) = beside.max_by_key(|(_, (from, until))| until - from) else {
                    continue;
                };
                let is_quiet = self.is_quiet(lock, from, until);
                if until > from {
                    let length = Duration::from_nanos(until - from);
                    counts.free += 1;
                    counts.longest_free = counts.longest_free.max(length);
                    if is_quiet {
                        counts.free_quietly += 1;
                        counts.longest_quietly = counts.longest_quietly.max(length);
                    }
                }
                if until - from > nanos(if is_quiet { GRACE } else { self.look(lock, until) }) {
                    let (at, quiet) = (|at| self.history.at(at), if is_quiet { ", and nothing had hurt" } else { "" });
                    let text = format!(
                        "{lock:?} was free after version {} from {} to {} ms while p{}.{} waited for it, \
                         unhurt from {} to {} ms{quiet}",
                        free.version,
                        at(free.from),
                        at(free.until),
                        wait.process,
                        wait.thread,
                        at(from),
                        at(until),
                    );
                    found.add(9, from, Some(lock), text);
                }
            }
        }
        counts
    }

    /// From when each version's hold is over for certain to when the next one may have begun, of the holds since an
    /// instant.
    fn free_times(&self, lock: &str, holds: &[&Hold<'a>], since: Nanos) -> Vec<Free> {
        let mut over: BTreeMap<i64, Nanos> = BTreeMap::new();
        for hold in holds {
            over.extend(self.over_by(hold).map(|from| (hold.version, from)));
        }
        // When a version was made by hand.
        let mut moved: HashMap<i64, Nanos> = HashMap::new();
        for fault in &self.history.faults {
            let Kind::Freed { lock: of, version, moves } = &fault.kind else { continue };
            if of == lock && fault.begin >= since {
                let freed = version + i64::from(*moves);
                let from = over.entry(freed).or_insert(fault.end);
                *from = (*from).min(fault.end);
                if *moves {
                    moved.insert(freed, fault.begin);
                }
            }
        }
        let row = self.history.rows.iter().find(|row| row.lock == lock);
        let until = |version: i64, from: Nanos| {
            let mut next = holds.iter().filter(|hold| hold.version == version + 1);
            match (next.next(), moved.get(&(version + 1))) {
                (Some(next), _) => self.may_have_begun(next, from),
                (None, Some(moved)) => Some(*moved),
                // Nobody has taken it since.
                (None, None) if row.is_some_and(|row| row.version == version) => Some(Nanos::MAX),
                // Somebody has, and nobody knows when.
                (None, None) => None,
            }
        };
        let free = over.into_iter().filter_map(|(version, from)| {
            let until = until(version, from)?.min(self.history.alone_until);
            (from < until).then_some(Free { version, from, until })
        });
        free.collect()
    }

    /// When a hold is over at the latest, if that is known.
    fn over_by(&self, hold: &Hold<'_>) -> Option<Nanos> {
        let process = hold.acquire.process;
        let died = self.history.lives[process].end.filter(|_| self.has_died(process));
        let released = hold.release.and_then(|release| Some((release.begin, release.end.as_ref()?.0)));
        if let Some((begin, end)) = released.filter(|_| hold.was_given_back()) {
            // A drop doesn't say whether it could.
            let says_so = hold.release.is_some_and(|release| {
                let how = if let Call::Release { how, .. } = release.call { how } else { Ending::Drop };
                matches!(how, Ending::Unlock | Ending::UnlockIn { .. }) && release.outcome() == Some(&Outcome::Done)
            });
            let is_undone =
                self.history.faults.iter().any(|fault| {
                    fault.kind == Kind::Crashed && fault.end > begin && fault.begin < end + nanos(UNWRITTEN)
                });
            let hurts_it = |(from, over): (Nanos, Nanos)| over + nanos(QUIET) > begin && from < end;
            if !is_undone && (says_so || !self.hurts_of(process).any(hurts_it)) {
                return Some(end);
            }
        }
        // Nobody refreshes its lease any more, but what was on its way.
        let lost = hold.lost_at.and_then(|lost| lost.end.as_ref()).map(|(end, _)| *end);
        let mut last = [lost, released.map(|(_, end)| end), died].into_iter().flatten().min()?;
        let mut hurts: Vec<(Nanos, Nanos)> = self.hurts_of(process).collect();
        hurts.sort_unstable();
        for (from, over) in hurts {
            if from < last + ON_ITS_WAY {
                last = last.max(over);
            }
        }
        Some(last + ON_ITS_WAY + hold.lease())
    }

    /// When a hold can have begun at the earliest, where the lock was free at an instant before: shortly before its
    /// call came back, unless something kept the answer back. One that was kept back for longer than a lease would have
    /// been of no use.
    fn may_have_begun(&self, hold: &Hold<'_>, free: Nanos) -> Option<Nanos> {
        let (taken, _) = hold.acquire.end.as_ref()?;
        let keeps_it_back =
            |(from, over): &(Nanos, Nanos)| *over > free && from < taken && over + ON_ITS_WAY + hold.lease() >= *taken;
        let kept_back = self.hurts_of(hold.acquire.process).filter(keeps_it_back).map(|(from, _)| from);
        Some(kept_back.min().unwrap_or(*taken))
    }

    /// The longest time of a free lock in which a call waited for it, and nothing hurt it.
    fn beside(&self, lock: &str, free: &Free, wait: &Operation) -> (Nanos, Nanos) {
        let life = &self.history.lives[wait.process];
        let end = wait.end.as_ref().map(|(end, _)| *end).or(life.end).unwrap_or(Nanos::MAX);
        let (from, until) = (free.from.max(wait.begin), free.until.min(end));
        if until <= from {
            return (from, from);
        }
        let hurts = self.hurts_of(wait.process).chain(self.row_was_kept(lock, free.version));
        longest_clear(from, until, hurts.collect())
    }

    /// When transactions of the workers may have locked the row of a version.
    fn row_was_kept(&self, lock: &str, version: i64) -> impl Iterator<Item = (Nanos, Nanos)> {
        self.history.operations.iter().filter_map(move |call| {
            let is_transaction = call.call.write_id().is_some()
                || matches!(call.call, Call::Release { how: Ending::UnlockIn { .. }, .. });
            if !is_transaction || call.call.lock() != Some(lock) || call.call.version() != Some(version) {
                return None;
            }
            let idle = nanos(self.times.idle + SLACK);
            Some(match &call.end {
                Some((end, Outcome::Done | Outcome::RolledBack | Outcome::Failed(Failure::LeaseLost, _))) => {
                    (call.begin, *end)
                }
                // The server may not have heard that it is over.
                Some((end, _)) => (call.begin, end + idle),
                None => (call.begin, self.history.lives[call.process].end.map_or(Nanos::MAX, |end| end + idle)),
            })
        })
    }

    /// Whether nothing hurts, or has just hurt, and nobody dead can stand in the row of the lock.
    fn is_quiet(&self, lock: &str, from: Nanos, until: Nanos) -> bool {
        let is_hurt = self.history.faults.iter().any(|fault| {
            let is_near = fault.end + nanos(QUIET) > from && fault.begin < until;
            match &fault.kind {
                Kind::Harmless => false,
                Kind::DeadWaiters(of, _) => of == lock && fault.begin < until,
                _ => is_near,
            }
        });
        let has_died_waiting = self.history.operations.iter().any(|call| {
            waits_for(call, lock)
                && self.has_died(call.process)
                && self.history.lives[call.process].end.is_none_or(|end| end < until)
        });
        !is_hurt && !has_died_waiting
    }

    fn has_died(&self, process: usize) -> bool {
        self.history.lives[process].ending != Some(LifeEnd::Stopped)
    }
}

/// Whether it waits for a lock, for some time.
fn waits_for(call: &Operation, lock: &str) -> bool {
    matches!(&call.call, Call::Acquire { lock: of, how, .. } if of == lock && *how != How::TryLock)
}
