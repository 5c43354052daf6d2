//! What a storage's workers are doing, and the tasks that wait for them.
//!
//! All of it is behind the mutex of `Shared`. Nothing here blocks, makes a call or runs user code. Uses `db::stuck`,
//! `error` and `sync`.

use std::collections::{HashMap, VecDeque};

use super::task::Task;
use super::{OPENING_TIME, PROBING_TIME, Urgency};
use crate::db::stuck::{self, StuckLimit};
use crate::error::Error;
use crate::sync::Instant;

#[derive(Default)]
pub(super) struct State {
    pub(super) urgent: VecDeque<Task>,
    pub(super) ordinary: VecDeque<Task>,
    pub(super) workers: HashMap<u64, WorkerState>,
    pub(super) next_id: u64,
    pub(super) stuck_limit: StuckLimit,
    /// How many urgent tasks were taken in a row while an ordinary one could have been.
    pub(super) urgent_in_a_row: u32,
    /// When a task was last answered.
    pub(super) last_success: Option<Instant>,
    /// The openings that failed, and whose errors no task has got yet.
    pub(super) unreported: Vec<FailedOpening>,
    /// When the last opening began.
    pub(super) last_opening: Option<Instant>,
    /// How many times in a row no connection could be opened beside those that work.
    pub(super) failures: u32,
    /// When to try again after these failures.
    pub(super) open_again_at: Option<Instant>,
    pub(super) is_closed: bool,
}

/// The state of a worker, see the table in [`super`]. A call is late from `late_at` on.
#[derive(Clone, Copy)]
pub(super) enum WorkerState {
    Opening { since: Instant },
    Idle,
    Probing { since: Instant },
    Call { urgency: Urgency, since: Instant, late_at: Instant },
}

/// After so many urgent tasks in a row an ordinary one goes first: a few locks that are handed over all the time must
/// not keep everybody from all others.
const URGENT_IN_A_ROW: u32 = 8;

/// An attempt to open a connection that failed. A task that waited for it gets the error, once every opening that was
/// under way at that moment has failed too, or takes long. Until then the attempt counts as an opening.
pub(super) struct FailedOpening {
    pub(super) error: Error,
    pub(super) began: Instant,
    pub(super) failed: Instant,
}

/// How many workers there are in each state.
#[derive(Default)]
pub(super) struct Count {
    /// Those that will take a task soon.
    pub(super) opening: usize,
    /// Those that have been opening their connections for long.
    pub(super) slow: u32,
    pub(super) idle: usize,
    /// Those in calls that are not late yet.
    pub(super) in_calls: usize,
    pub(super) in_ordinary_calls: usize,
    /// Stuck workers whose call or opening began after the last success.
    pub(super) stuck: usize,
}

impl Count {
    /// Those with a connection that works, as far as we know.
    pub(super) fn open(&self) -> usize {
        self.idle + self.in_calls
    }
}

impl State {
    pub(super) fn count(&self, now: Instant) -> Count {
        let mut count = Count::default();
        for worker in self.workers.values() {
            let (since, is_stuck) = match *worker {
                WorkerState::Idle => {
                    count.idle += 1;
                    continue;
                }
                WorkerState::Probing { since } => {
                    let age = now.duration_since(since);
                    count.opening += usize::from(age < PROBING_TIME);
                    (since, age >= OPENING_TIME)
                }
                WorkerState::Opening { since } => {
                    let is_old = now.duration_since(since) >= OPENING_TIME;
                    count.opening += usize::from(!is_old);
                    count.slow += u32::from(is_old);
                    (since, is_old)
                }
                WorkerState::Call { urgency, since, late_at } => {
                    let is_late = late_at <= now;
                    count.in_calls += usize::from(!is_late);
                    count.in_ordinary_calls += usize::from(!is_late && urgency == Urgency::Ordinary);
                    (since, is_late)
                }
            };
            count.stuck += usize::from(is_stuck && self.last_success.is_none_or(|success| success < since));
        }
        count
    }

    /// How many tasks could be started now, given enough workers.
    pub(super) fn startable(&self, count: &Count, max_live: usize) -> usize {
        // If the server refuses further connections, one of those that are open is kept free for urgent tasks.
        let connections = if self.failures > 0 { count.open() } else { max_live };
        let ordinary_limit = connections.saturating_sub(1).max(1).saturating_sub(count.in_ordinary_calls);
        self.urgent.len() + self.ordinary.len().min(ordinary_limit)
    }

    pub(super) fn next_task(&mut self, now: Instant, max_live: usize) -> Option<Task> {
        if self.startable(&self.count(now), max_live) == 0 {
            return None;
        }
        let may_take_ordinary = self.startable(&self.count(now), max_live) > self.urgent.len();
        let is_ordinarys_turn = may_take_ordinary && self.urgent_in_a_row >= URGENT_IN_A_ROW;
        let is_passed_over = may_take_ordinary && !is_ordinarys_turn && !self.urgent.is_empty();
        self.urgent_in_a_row = if is_passed_over { self.urgent_in_a_row + 1 } else { 0 };
        let (first, second) = if is_ordinarys_turn {
            (&mut self.ordinary, &mut self.urgent)
        } else {
            (&mut self.urgent, &mut self.ordinary)
        };
        first.pop_front().or_else(|| second.pop_front())
    }

    /// Puts a task back at the front of its queue.
    pub(super) fn put_back(&mut self, task: Task) {
        match task.urgency {
            Urgency::Urgent => self.urgent.push_front(task),
            Urgency::Ordinary => self.ordinary.push_front(task),
        }
    }

    /// Takes out the first task that came before `began`, an urgent one if there is one.
    pub(super) fn take_submitted_before(&mut self, began: Instant) -> Option<Task> {
        let take = |queue: &mut VecDeque<Task>| {
            let at = queue.iter().position(|task| task.submitted <= began)?;
            queue.remove(at)
        };
        take(&mut self.urgent).or_else(|| take(&mut self.ordinary))
    }

    /// Whether a further worker would find something to do, and may be started.
    pub(super) fn may_add_worker(&mut self, now: Instant, max_live: usize, is_lent: bool) -> bool {
        let count = self.count(now);
        let opening = count.opening + self.unreported.len();
        let is_needed = self.startable(&count, max_live) > count.idle + opening;
        // Of the caller's connections no late one is replaced.
        let has_room = if is_lent { self.workers.len() } else { count.open() + opening } < max_live;
        let is_due = count.open() == 0 || self.open_again_at.is_none_or(|at| at <= now);
        // On a slow network openings take long. The more of them do, the more rarely another one begins.
        let pause = OPENING_TIME * count.slow.saturating_mul(count.slow);
        let is_due = is_due && self.last_opening.is_none_or(|last| now.duration_since(last) >= pause);
        // `count.stuck` leaves out the workers whose call began before the last success. Some of those stay stuck for
        // ever. When there are too many of them, one more is started from time to time only.
        let are_many = self.workers.len() >= max_live + stuck::MAX;
        let stuck = if are_many { count.stuck.max(stuck::BURST) } else { count.stuck };
        is_needed && has_room && is_due && self.stuck_limit.may_add(stuck, now)
    }

    /// The tasks that get an error now: no connection works, and none opened of those that were being opened.
    pub(super) fn failed_tasks(&mut self, now: Instant) -> Vec<(Task, Error)> {
        if self.unreported.is_empty() {
            return Vec::new();
        }
        if self.count(now).open() > 0 {
            self.unreported.clear();
            return Vec::new();
        }
        let opening = self.workers.values().filter_map(|worker| match worker {
            WorkerState::Opening { since } if now.duration_since(*since) < OPENING_TIME => Some(*since),
            _ => None,
        });
        let first = opening.min();
        let is_over = |it: &FailedOpening| {
            // An opening that took so long to fail met silence. Those that began later are likely to meet it too.
            it.failed.duration_since(it.began) >= OPENING_TIME || first.is_none_or(|first| first > it.failed)
        };
        let (over, unreported): (Vec<_>, _) = std::mem::take(&mut self.unreported).into_iter().partition(is_over);
        self.unreported = unreported;
        let task_for = |it: FailedOpening| self.take_submitted_before(it.began).map(|task| (task, it.error));
        over.into_iter().filter_map(task_for).collect()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::time::Duration;

    use super::super::Next;
    use super::*;

    fn task(urgency: Urgency) -> Task {
        let now = Instant::now();
        let (deadline, answer_time) = (now + Duration::from_secs(60), Duration::from_secs(60));
        Task { urgency, submitted: now, deadline, answer_time, step: Box::new(|_, _| Next::Done) }
    }

    #[test]
    fn urgent_tasks_without_end_keep_no_ordinary_one_for_ever() {
        for max_live in [1, 4] {
            let mut state = State::default();
            state.ordinary.extend([task(Urgency::Ordinary), task(Urgency::Ordinary)]);
            let mut taken = Vec::new();
            while !state.ordinary.is_empty() {
                state.urgent.push_back(task(Urgency::Urgent));
                taken.push(state.next_task(Instant::now(), max_live).expect("a task").urgency);
                assert!(taken.len() < 100, "starved");
            }
            let urgent = taken.iter().filter(|urgency| **urgency == Urgency::Urgent).count();
            assert!(taken[0] == Urgency::Urgent && urgent >= 2 * URGENT_IN_A_ROW as usize, "urgent ones go first");
        }
    }
}
