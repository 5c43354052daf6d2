//! Rules 4 to 8: what everybody gets, how long it takes, and what goes wrong without a reason.

use std::collections::{HashMap, HashSet};

use super::*;

impl<'a> Judge<'a> {
    pub(super) fn everybody_recovers(&self, found: &mut Found) {
        let history = self.history;
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
                    let recovery = self.times.longest_lease + self.look(class, history.healed);
                    let until = history.healed + nanos(recovery);
                    let is_in_time = |operation: &Operation| {
                        operation.end.as_ref().is_some_and(|(end, _)| (history.healed..until).contains(end))
                    };
                    let lock = if class == OWN { format!("{OWN}-{process}-{thread}") } else { class.to_owned() };
                    if !taken.any(is_in_time) && !self.release_may_be_lost(&lock) {
                        let text = format!(
                            "p{process}.{thread} didn't get {class:?} within {recovery:?} after the last fault, \
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

    /// A release is acknowledged before it is on the disk. One that a crash undid leaves its lease to run out, which
    /// for a long lease is later than we wait.
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

    pub(super) fn nothing_is_left(&self, found: &mut Found) {
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

    pub(super) fn no_call_takes_too_long(&self, found: &mut Found) {
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

    pub(super) fn nothing_unexpected(&self, found: &mut Found) {
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
            // Of a transaction of the workers' own: one that met another writer, or was ended because it was idle for
            // too long.
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

    pub(super) fn nothing_refused_for_nothing(&self, found: &mut Found) {
        let mut of_lock: HashMap<(usize, &str), Vec<&Operation>> = HashMap::new();
        for operation in &self.history.operations {
            let Some(lock) = operation.call.lock().filter(|lock| lock.starts_with(OWN)) else { continue };
            if !matches!(operation.call, Call::Acquire { .. } | Call::Release { .. }) {
                continue;
            }
            let earlier = of_lock.entry((operation.process, lock)).or_default();
            if let Some((end, Outcome::Busy)) = operation.end {
                // It was taken and given back before, and nothing has hurt its user since.
                let was_released =
                    |release: &Operation| matches!(release.outcome(), Some(Outcome::Done | Outcome::RolledBack));
                let is_free = matches!(earlier.as_slice(), [.., acquire, release]
                    if acquire.taken().is_some() && was_released(release));
                let since = earlier.iter().rev().nth(1).map_or(end, |acquire| acquire.begin);
                let was_hurt = self.faults_of(operation.process).any(|fault| {
                    fault.kind != Kind::LostAnswer && fault.kind.hurts_calls() && fault.end > since && fault.begin < end
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

    pub(super) fn no_hold_lost_for_nothing(&self, found: &mut Found) {
        for hold in self.holds.values().flatten() {
            let (lock, name) = (hold.lock, hold.name());
            if let (Some(lost), Some((_, deadline))) = (hold.lost_at, hold.last_trusted)
                && lost.end.as_ref().is_some_and(|(end, _)| end + hold.told_early() < deadline)
                && !self.is_undone_between(lock, hold.acquire, lost)
                && self.freed(hold).is_none()
            {
                let text = format!("{lock:?}: {name} was lost before its deadline at {} ms", self.history.at(deadline));
                found.add(8, lost.begin, Some(lock), text);
            }
            // While a hold lasts, what a look says of its deadline says when it was refreshed last.
            let lease = hold.lease();
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
    pub(super) fn no_write_refused_for_nothing(&self, found: &mut Found) {
        for operation in &self.history.operations {
            let Some((end, Outcome::Failed(failure @ (Failure::LeaseLost | Failure::Fence), text))) = &operation.end
            else {
                continue;
            };
            let is_write =
                matches!(operation.call, Call::Write { .. } | Call::Release { how: Ending::UnlockIn { .. }, .. });
            let from = operation.begin.saturating_sub(nanos(self.times.longest_lease));
            let mut hurts = self.hurts_of(operation.process);
            if !is_write || hurts.any(|(begin, over)| over > from && begin < *end) {
                continue;
            }
            let Some(hold) = self.hold_of(operation).filter(|hold| self.freed(hold).is_none()) else { continue };
            let early = hold.told_early();
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
}
