//! A thread's ticket in a wait queue, and what the thread does next.
//!
//! Each decision is made under the mutex of the queues, and so is the wait that follows it. The mutex is not held
//! while the database is asked. Of db/, this file uses values only.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::ControlFlow::{self, Break, Continue};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::db::answer::Busy;
use crate::db::workers::Failed;
use crate::error::Result;
use crate::hold::Hold;
use crate::options::LockOptions;
use crate::sync::{Condvar, Instant, lock, thread, wait_until};
use crate::user_code::log_at;
use crate::wait::limit::{SLACK, WaitLimit, random_fraction, with_slack};
use crate::wait::queue::{Asking, Overtake, WaitQueue, WaitQueues, Waiter};

/// What a waiter does next.
pub(crate) enum NextStep {
    /// The waiter has the lock: another thread handed it this hold.
    Handed(Arc<Hold>),
    /// The waiter is the head, and asks the database. If there is a version, the processes before this one in the row
    /// have had their time: the waiter may take the lock in that version.
    Ask(Option<i64>),
    /// The waiter's time is over. If the database is out of reach, this says for how long.
    GiveUp(Option<Duration>),
}

/// A thread's ticket in a queue. The thread has to [`leave`](Ticket::leave) the queue when it stops waiting.
pub(crate) struct Ticket<'a> {
    pub(super) queues: &'a WaitQueues,
    pub(super) waiter: Arc<Waiter>,
    pub(super) last_asked: Cell<Option<Instant>>,
}

/// What is left to do after a waiter has left its queue.
#[derive(Default)]
pub(crate) struct LeftOver {
    /// A hold that was handed over, and that the waiter did not take up.
    pub(crate) hold: Option<Arc<Hold>>,
    /// The row may list this process as a waiter, although none of its threads waits any more.
    pub(crate) is_in_row: bool,
}

/// What a waiter knows of the database's answers, to any call of the storage.
struct Reachability {
    last_answer: Option<Instant>,
    /// Since when the database has been out of reach, if it is. Not before the waiter joined, nor before the last
    /// answer.
    unreachable_since: Option<Instant>,
}

impl WaitQueues {
    /// Joins the queue of a lock, at its end.
    pub(crate) fn join(&self, options: &Arc<LockOptions>, owner_id: &str) -> Ticket<'_> {
        let waiter = Arc::new(Waiter {
            lock: Arc::clone(options),
            owner_id: owner_id.to_owned(),
            thread: thread::current().id(),
            joined: Instant::now(),
            wake: Condvar::new(),
            handed: OnceLock::new(),
        });
        let mut queues = lock(&self.by_lock);
        let queue = queues.entry(options.lock_id.clone()).or_insert_with(|| WaitQueue::new(Instant::now()));
        queue.waiters.push_back(Arc::clone(&waiter));
        Ticket { queues: self, waiter, last_asked: Cell::new(None) }
    }
}

impl Ticket<'_> {
    pub(crate) fn waiter(&self) -> &Waiter {
        &self.waiter
    }

    pub(crate) fn lock_id(&self) -> &str {
        &self.waiter.lock.lock_id
    }

    fn is_head(&self, queue: &WaitQueue) -> bool {
        queue.waiters.front().is_some_and(|head| Arc::ptr_eq(head, &self.waiter))
    }

    /// The queue, if this waiter is still its head. Otherwise another thread handed a hold to the waiter while it
    /// asked, and the answer says nothing.
    fn asking_queue<'l>(&self, queues: &'l mut HashMap<String, WaitQueue>) -> Option<&'l mut WaitQueue> {
        queues.get_mut(self.lock_id()).filter(|queue| self.is_head(queue))
    }

    /// Waits until there is something to do.
    pub(crate) fn next_step(&self, limit: &WaitLimit) -> NextStep {
        let mut queues = lock(&self.queues.by_lock);
        loop {
            if let Some(hold) = self.waiter.handed.get() {
                return NextStep::Handed(Arc::clone(hold));
            }
            let now = Instant::now();
            let Some(queue) = queues.get_mut(self.lock_id()) else { return NextStep::GiveUp(None) };
            match self.step_now(queue, limit, now) {
                Break(step) => return step,
                Continue(wake) => queues = wait_until(&self.waiter.wake, queues, wake),
            }
        }
    }

    /// What to do now, or else when to look again.
    fn step_now(&self, queue: &mut WaitQueue, limit: &WaitLimit, now: Instant) -> ControlFlow<NextStep, Instant> {
        let reachability = self.reachability(queue, now);
        // A waiter looks from time to time, whatever happens.
        let mut wake = limit.end(now).min(now + self.waiter.lock.lease_expire_after);
        if let Some(at) = self.give_up_if_unreachable(&reachability, limit, now)? {
            wake = wake.min(at);
        }
        if let Some(at) = self.ask_if_due(queue, limit, now)? {
            wake = wake.min(at);
        }
        if limit.is_over(now) { self.give_up_after_limit(queue, &reachability, limit, now) } else { Continue(wake) }
    }

    fn reachability(&self, queue: &WaitQueue, now: Instant) -> Reachability {
        // Any answer counts: the answer to this queue may be lost while the next call of somebody else gets its own.
        let last_answer = self.queues.health.last_answer();
        let last = last_answer.map_or(self.waiter.joined, |answer| answer.max(self.waiter.joined));
        let unreachable_since = queue.unreachable_since(now).map(|since| since.max(last));
        Reachability { last_answer, unreachable_since }
    }

    /// A waiter without a limit that has not asked yet gives up when the database has been unreachable for one lease.
    /// Returns when that will be.
    fn give_up_if_unreachable(
        &self,
        reachability: &Reachability,
        limit: &WaitLimit,
        now: Instant,
    ) -> ControlFlow<NextStep, Option<Instant>> {
        let lease = self.waiter.lock.lease_expire_after;
        // A waiter that has asked before doesn't give up here: when it asks next, it gets an error to give up with.
        let (WaitLimit::Forever, Some(since), None) = (limit, reachability.unreachable_since, self.last_asked.get())
        else {
            return Continue(None);
        };
        let unreachable = now.duration_since(since);
        if unreachable >= lease { Break(NextStep::GiveUp(Some(unreachable))) } else { Continue(Some(since + lease)) }
    }

    /// The head asks if it is time. Otherwise returns when that will be, if the waiter is the head and may still ask.
    fn ask_if_due(
        &self,
        queue: &mut WaitQueue,
        limit: &WaitLimit,
        now: Instant,
    ) -> ControlFlow<NextStep, Option<Instant>> {
        if !self.is_head(queue) || !self.may_ask(limit, now) {
            return Continue(None);
        }
        match queue.hold.as_ref().filter(|hold| hold.is_held()) {
            Some(hold) => Continue(Some(now + hold.remaining())),
            None if queue.ask_at <= now => {
                self.last_asked.set(Some(now));
                queue.asking = Some(Asking { since: now, ask_again_at: None });
                let due = queue.overtakes.iter().flatten().find(|due| due.at <= now);
                Break(NextStep::Ask(due.map(|due| due.version)))
            }
            None => Continue(Some(queue.ask_at)),
        }
    }

    /// After its limit, a waiter asks at most once more, whatever notifications come. A waiter that has asked before
    /// does so only until [`SLACK`] is over.
    fn may_ask(&self, limit: &WaitLimit, now: Instant) -> bool {
        let late = with_slack(limit.end(now));
        !(limit.is_over(now) && self.last_asked.get().is_some_and(|asked| limit.is_over(asked) || now >= late))
    }

    fn give_up_after_limit(
        &self,
        queue: &WaitQueue,
        reachability: &Reachability,
        limit: &WaitLimit,
        now: Instant,
    ) -> ControlFlow<NextStep, Instant> {
        let late = with_slack(limit.end(now));
        // Before the first answer, nobody knows that the lock is busy. The answer may be about to come.
        if !queue.is_busy && now < late && queue.asking.is_some() {
            return Continue(late);
        }
        let waited = now.duration_since(self.waiter.joined);
        let is_answering = reachability.last_answer.is_some_and(|answer| now.duration_since(answer) < SLACK);
        let unreachable = reachability.unreachable_since.map(|since| now.duration_since(since));
        let unreachable = unreachable.filter(|_| !is_answering);
        Break(NextStep::GiveUp(unreachable.or((!queue.is_busy).then_some(waited))))
    }

    /// The head acquired the lock.
    pub(crate) fn acquired(&self, hold: &Arc<Hold>) {
        let mut queues = lock(&self.queues.by_lock);
        let Some(queue) = queues.get_mut(self.lock_id()) else { return };
        queue.waiters.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        queue.asking = None;
        queue.is_in_row = false;
        queue.begin_hold(hold);
    }

    /// The lock can't be had now. `busy` says what is known of it. A process that listens is notified when that
    /// changes.
    pub(crate) fn busy(&self, busy: Option<&Busy>, is_listening: bool, limit: &WaitLimit) {
        let now = Instant::now();
        let mut queues = lock(&self.queues.by_lock);
        let Some(queue) = self.asking_queue(&mut queues) else { return };
        queue.mark_busy();
        queue.unreachable_since = None;
        // If nothing is known, an earlier try of this attempt may have put this process into the row.
        queue.is_in_row |= busy.is_none_or(|busy| busy.position.is_some());
        let version = busy.map(|busy| busy.version);
        if queue.seen_version != version {
            // A lock that changes hands is worth asking for often.
            (queue.seen_version, queue.polls) = (version, 0);
        }
        // The jitter keeps the waiting processes from asking simultaneously.
        let sleep = busy.map(|busy| busy.sleep(1.0 - random_fraction() / 4.0));
        let [ours, _] = &mut queue.overtakes;
        let due = busy
            .and_then(Busy::notified_version)
            .zip(sleep)
            .map(|(version, sleep)| Overtake { version, at: now + sleep });
        // An event may make us ask sooner, and notify the processes before us again. Our own time stays where it was.
        *ours = due.map(|due| ours.filter(|before| before.version == due.version).unwrap_or(due));
        match (busy, sleep) {
            // Nobody asks for a free lock before the others have had their time, whether or not we listen.
            (Some(busy), Some(sleep)) if is_listening || busy.is_free => queue.answered(now + sleep),
            _ => queue.ask_again(limit, now, sleep),
        }
    }

    /// Asking failed. Returns the error if it ends the wait: it was the first attempt, or the error isn't transient, or
    /// the limit is over. `Forever` is over after one lease without an answer.
    pub(crate) fn failed(&self, failed: Failed, asked: Instant, limit: &WaitLimit) -> Result<()> {
        let Failed { error, is_unknown, .. } = failed;
        let now = Instant::now();
        let mut queues = lock(&self.queues.by_lock);
        let Some(queue) = self.asking_queue(&mut queues) else { return Ok(()) };
        let since = *queue.unreachable_since.get_or_insert(asked);
        let lease = self.waiter.lock.lease_expire_after;
        let since = since.max(self.waiter.joined).max(self.queues.health.last_answer().unwrap_or(since));
        let is_hopeless = *limit == WaitLimit::Forever && now.duration_since(since) >= lease;
        let is_over = limit.is_over(now) || is_hopeless;
        queue.is_in_row |= is_unknown;
        queue.ask_again(limit, now, None);
        if is_over || !queue.is_busy || !error.may_pass_within_a_wait() {
            return Err(error);
        }
        drop(queues);
        log_at!(debug, "waiting for lock {:?} goes on: {}", self.lock_id(), error.chain());
        Ok(())
    }

    /// Leaves the queue. `has_hold` says that the waiter has taken up the hold that was handed to it.
    pub(crate) fn leave(&self, has_hold: bool) -> LeftOver {
        let mut queues = lock(&self.queues.by_lock);
        let hold = if has_hold { None } else { self.waiter.handed.get().cloned() };
        let Some(queue) = queues.get_mut(self.lock_id()) else { return LeftOver { hold, is_in_row: false } };
        let was_head = self.is_head(queue);
        queue.waiters.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        if was_head {
            // This head may have been asking, or its first attempt may have failed. The next head makes its own
            // attempt.
            let was_asking = queue.asking.take().is_some();
            if was_asking || !queue.is_busy {
                queue.ask_at = Instant::now();
            }
            queue.wake_head();
        }
        let is_empty = queue.hold.is_none() && queue.waiters.is_empty();
        let is_in_row = is_empty && queue.is_in_row;
        if is_empty {
            queues.remove(self.lock_id());
        }
        LeftOver { hold, is_in_row }
    }
}
