//! Who holds a lock in this process, and who waits for it: one queue per lock, first come, first served.
//!
//! Only the head of a queue asks the database, and only while this process doesn't hold the lock. When the head
//! leaves, the next waiter goes on with what is known, and doesn't ask again. So two hundred threads that give up
//! simultaneously cost no statement. While this process holds the lock, nobody asks: the release hands the lock to
//! the head, or wakes the head.
//!
//! No event is lost between a check and the wait that follows it, because one mutex guards both. An event that comes
//! while the head asks is kept until the head has its answer.
//!
//! [`crate::wait::ticket`] decides what a waiter does next. Of db/, this file uses values and `Health` only.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uuid::Uuid;

use crate::db::answer::{Claim, Granted, longest_sleep};
use crate::db::health::Health;
use crate::db::sql::CLAIM_LIFE;
use crate::hold::Hold;
use crate::options::LockOptions;
use crate::sync::thread::ThreadId;
use crate::sync::{Condvar, Instant, Mutex, lock};
use crate::wait::limit::{SLACK, WaitLimit, poll_interval};

/// For how long a process passes a lock among its own threads while another process waits.
///
/// Letting another process have the lock costs a millisecond or two. This time is long enough to make that cost small,
/// and short enough for the other process to wait.
pub(super) const LOCAL_HAND_OVER_TIME: Duration = Duration::from_millis(10);

/// The queues of a storage, and whether its database answers.
#[derive(Default)]
pub(crate) struct WaitQueues {
    pub(super) by_lock: Mutex<HashMap<String, WaitQueue>>,
    pub(super) health: Arc<Health>,
}

/// The queue of one lock. It exists while this process has a hold or a waiter of the lock.
pub(super) struct WaitQueue {
    /// The hold of this process, from its grant until it is released, handed over or lost.
    pub(super) hold: Option<Arc<Hold>>,
    pub(super) waiters: VecDeque<Arc<Waiter>>,
    /// When the head asks next, unless this process holds the lock.
    pub(super) ask_at: Instant,
    pub(super) asking: Option<Asking>,
    /// How often the head asked with no notification to expect afterwards, while the lock stayed at `seen_version`.
    pub(super) polls: u32,
    pub(super) seen_version: Option<i64>,
    /// When this process may take the lock, because the processes before it in the row were notified. The first entry
    /// is for its own statement that notified them. The second entry is for a statement of somebody else (a release,
    /// or a waiter behind this process), which a notification reported. Neither entry replaces the other.
    pub(super) overtakes: [Option<Overtake>; 2],
    /// An attempt of this queue found the lock busy, or this process held it. Before that, a failed attempt ends a
    /// wait. After that, a transient error doesn't.
    pub(super) is_busy: bool,
    /// The row lists this process as a waiter, or may list it.
    pub(super) is_in_row: bool,
    /// The start of the first failed attempt after the last answer.
    pub(super) unreachable_since: Option<Instant>,
}

/// From `at` on, this process may take the lock if the lock is free in this version. By then, the processes before it
/// in the row have had their time.
#[derive(Clone, Copy)]
pub(super) struct Overtake {
    pub(super) version: i64,
    pub(super) at: Instant,
}

/// The head is asking the database.
pub(super) struct Asking {
    pub(super) since: Instant,
    /// When to ask next, because of an event that came while the head asked.
    pub(super) ask_again_at: Option<Instant>,
}

/// A thread that waits.
pub(crate) struct Waiter {
    pub(super) lock: Arc<LockOptions>,
    pub(super) owner_id: String,
    pub(super) thread: ThreadId,
    pub(super) joined: Instant,
    pub(super) wake: Condvar,
    /// The hold that another thread of this process handed to this one.
    pub(super) handed: OnceLock<Arc<Hold>>,
}

/// Who gets the lock after a hold.
pub(crate) enum Successor {
    /// A thread of this process.
    Waiter(Arc<Waiter>),
    /// Another process. This process waits in the row again.
    Others,
    /// No thread of this process waits.
    Nobody,
    /// This process has no such hold now.
    Unknown,
}

impl Waiter {
    /// A claim with a lease id of its own, by which the clean-up finds and undoes an attempt that got no answer.
    pub(crate) fn claim(&self, deadline: Instant) -> Claim {
        claim(&self.lock, &self.owner_id, deadline)
    }

    /// The hold that the database granted to this waiter, or that `before` handed to it.
    pub(crate) fn hold(&self, claim: Claim, granted: Granted, before: Option<&Hold>) -> Arc<Hold> {
        let process_acquired_at = before.map_or(granted.sent, |before| before.process_acquired_at);
        let (interval, on_lost) = (self.lock.refresh_interval(), self.lock.on_lost.clone());
        Arc::new(Hold::new(claim, granted, interval, on_lost, self.thread, process_acquired_at))
    }
}

/// A new claim on a lock, for a call whose caller gives up at `deadline`.
pub(crate) fn claim(lock: &LockOptions, owner_id: &str, deadline: Instant) -> Claim {
    Claim {
        expires: deadline + CLAIM_LIFE,
        lock_id: lock.lock_id.clone(),
        owner_id: owner_id.to_owned(),
        lease_id: Uuid::new_v4(),
        lease: lock.lease_expire_after,
    }
}

impl WaitQueue {
    pub(super) fn new(now: Instant) -> WaitQueue {
        WaitQueue {
            hold: None,
            waiters: VecDeque::new(),
            ask_at: now,
            asking: None,
            polls: 0,
            seen_version: None,
            overtakes: [None; 2],
            is_busy: false,
            is_in_row: false,
            unreachable_since: None,
        }
    }

    /// Since when the database has been silent, if it is out of reach, or if its answer to the head is late.
    pub(super) fn unreachable_since(&self, now: Instant) -> Option<Instant> {
        let late = self.asking.as_ref().map(|asking| asking.since).filter(|since| now.duration_since(*since) >= SLACK);
        self.unreachable_since.or(late)
    }

    pub(super) fn wake_head(&self) {
        if let Some(head) = self.waiters.front() {
            head.wake.notify_one();
        }
    }

    /// Makes the head ask at `at`, or sooner. An event never postpones what the head was going to do.
    pub(super) fn ask_by(&mut self, at: Instant) {
        match &mut self.asking {
            Some(asking) => asking.ask_again_at = Some(asking.ask_again_at.map_or(at, |before| before.min(at))),
            None => self.ask_at = self.ask_at.min(at),
        }
        self.wake_head();
    }

    /// The head has its answer. It asks again at `at`, or sooner if an event came while it asked.
    pub(super) fn answered(&mut self, at: Instant) {
        self.ask_at = self.asking.take().and_then(|asking| asking.ask_again_at).map_or(at, |sooner| sooner.min(at));
    }

    /// The head has asked, and nobody will notify it. It asks again after a poll interval, and when its limit ends.
    pub(super) fn ask_again(&mut self, limit: &WaitLimit, now: Instant, left: Option<Duration>) {
        let next = now + poll_interval(self.polls, left);
        self.polls = self.polls.saturating_add(1);
        self.answered(if limit.is_over(now) { next } else { next.min(limit.end(now)) });
    }

    pub(super) fn begin_hold(&mut self, hold: &Arc<Hold>) {
        // A thread that was paused for longer than its lease may come with an older hold.
        if self.hold.as_ref().is_none_or(|newest| newest.version < hold.version || !newest.is_held()) {
            self.hold = Some(Arc::clone(hold));
        }
        self.polls = 0;
        self.unreachable_since = None;
        self.mark_busy();
    }

    /// Records that the lock is not free for us. Waiters whose limit ended before may give up now.
    pub(super) fn mark_busy(&mut self) {
        if !std::mem::replace(&mut self.is_busy, true) {
            self.waiters.iter().for_each(|waiter| waiter.wake.notify_one());
        }
    }
}

impl WaitQueues {
    pub(crate) fn new(health: Arc<Health>) -> WaitQueues {
        WaitQueues { by_lock: Mutex::default(), health }
    }

    /// Adds a guard to this process's hold, if this thread holds the lock as this owner.
    pub(crate) fn reenter(&self, lock_id: &str, owner_id: &str) -> Option<Arc<Hold>> {
        let queues = lock(&self.by_lock);
        queues.get(lock_id)?.hold.as_ref().filter(|hold| hold.reenter(owner_id)).cloned()
    }

    /// A hold began without waiting.
    pub(crate) fn begin_hold(&self, hold: &Arc<Hold>) {
        let mut queues = lock(&self.by_lock);
        let queue = queues.entry(hold.claim.lock_id.clone()).or_insert_with(|| WaitQueue::new(Instant::now()));
        queue.begin_hold(hold);
    }

    /// A hold was lost. The head asks.
    pub(crate) fn lose_hold(&self, hold: &Arc<Hold>) {
        // If the row still lists this process, whoever takes the lock next removes the entry.
        let mut queues = lock(&self.by_lock);
        if let Some(queue) = queues.get_mut(&hold.claim.lock_id) {
            let is_in_row = queue.is_in_row;
            end_hold(&mut queues, hold, Instant::now(), is_in_row);
        }
    }

    /// A hold was released. The head asks at `ask_at`. `is_in_row` says whether the row lists this process as a waiter
    /// now. Returns whether it does so although no thread of the process waits.
    pub(crate) fn release_hold(&self, hold: &Arc<Hold>, ask_at: Instant, is_in_row: bool) -> bool {
        end_hold(&mut lock(&self.by_lock), hold, ask_at, is_in_row)
    }

    /// Who gets the lock after this hold. A process passes a lock among its own threads, but not for long while other
    /// processes wait.
    pub(crate) fn successor(&self, hold: &Arc<Hold>) -> Successor {
        let mut queues = lock(&self.by_lock);
        let queue = queues.get_mut(&hold.claim.lock_id);
        let Some(queue) = queue.filter(|queue| queue.hold.as_ref().is_some_and(|newest| Arc::ptr_eq(newest, hold)))
        else {
            return Successor::Unknown;
        };
        // Drops the old time. From now on, only new events make the head ask soon.
        queue.ask_at = Instant::now() + longest_sleep(0);
        let Some(head) = queue.waiters.front() else { return Successor::Nobody };
        if !hold.state().is_wanted || hold.process_acquired_at.elapsed() < LOCAL_HAND_OVER_TIME {
            Successor::Waiter(Arc::clone(head))
        } else {
            Successor::Others
        }
    }

    /// Gives `hold` to `waiter`, if the waiter is still the head. Returns false if it has left: then the caller has to
    /// end the hold.
    pub(crate) fn hand(&self, waiter: &Arc<Waiter>, hold: &Arc<Hold>) -> bool {
        let mut queues = lock(&self.by_lock);
        let queue = queues.entry(hold.claim.lock_id.clone()).or_insert_with(|| WaitQueue::new(Instant::now()));
        queue.begin_hold(hold);
        if !queue.waiters.front().is_some_and(|head| Arc::ptr_eq(head, waiter)) {
            // The waiter's thread may come back immediately. It must not re-enter a hold that is about to end.
            hold.leave();
            return false;
        }
        queue.waiters.pop_front();
        queue.asking = None;
        let is_handed = waiter.handed.set(Arc::clone(hold)).is_ok();
        waiter.wake.notify_one();
        is_handed
    }

    /// A notification says that a lock is free, or soon will be. The head asks after `delay`. From then on this
    /// process may take the lock in `notified_version`. A false notification does no harm: the row decides, and the
    /// head also asks without notifications.
    pub(crate) fn notified(&self, lock_id: &str, delay: Duration, notified_version: Option<i64>) {
        if let (Some(queue), Some(at)) = (lock(&self.by_lock).get_mut(lock_id), Instant::now().checked_add(delay)) {
            let [_, notified] = &mut queue.overtakes;
            // A second notification of the same version doesn't move the time of the first.
            if notified.is_none_or(|due| Some(due.version) != notified_version) {
                *notified = notified_version.map(|version| Overtake { version, at }).or(*notified);
            }
            queue.ask_by(at);
        }
    }

    /// From now on notifications come, or they no longer come. Each head asks: to be listed in the row, or because
    /// nobody will notify it.
    pub(crate) fn listening_changed(&self) {
        let now = Instant::now();
        lock(&self.by_lock).values_mut().for_each(|queue| queue.ask_by(now));
    }

    /// This process has left the row of this lock. A waiter that came in the meantime has to ask.
    pub(crate) fn left_row(&self, lock_id: &str) {
        if let Some(queue) = lock(&self.by_lock).get_mut(lock_id) {
            queue.ask_by(Instant::now());
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.by_lock).is_empty()
    }

    /// Whether a thread waits for this lock. If so, it takes over the entry that the process may have in the row.
    pub(crate) fn keep_row_entry(&self, lock_id: &str) -> bool {
        let mut queues = lock(&self.by_lock);
        let waiting = queues.get_mut(lock_id).filter(|queue| !queue.waiters.is_empty());
        waiting.map(|queue| queue.is_in_row = true).is_some()
    }

    /// Whether any thread waits for another process.
    pub(crate) fn any_waits(&self) -> bool {
        lock(&self.by_lock).values().any(|queue| queue.hold.is_none() && !queue.waiters.is_empty())
    }
}

/// Ends the queue's hold and makes the head ask. Returns whether the row lists this process although nobody waits.
fn end_hold(queues: &mut HashMap<String, WaitQueue>, hold: &Arc<Hold>, ask_at: Instant, is_in_row: bool) -> bool {
    let Some(queue) = queues.get_mut(&hold.claim.lock_id) else { return is_in_row };
    // This process may have acquired the lock again since it lost this hold.
    if !queue.hold.as_ref().is_some_and(|newest| Arc::ptr_eq(newest, hold)) {
        return false;
    }
    queue.hold = None;
    queue.is_in_row = is_in_row;
    if queue.waiters.is_empty() {
        queues.remove(&hold.claim.lock_id);
        return is_in_row;
    }
    queue.ask_at = queue.ask_at.min(ask_at);
    queue.ask_by(queue.ask_at);
    false
}
