//! Who holds and who waits for a lock in this process: a line for each lock, first come, first served.
//!
//! Only the head of a line talks to the database, and only while the lock isn't this process's own. When it leaves, the next one goes on with
//! what is known, rather than asking again: two hundred threads that give up at once cost no statement. While the lock is this
//! process's, nobody asks: its release hands it to the head, or wakes the head.
//!
//! Nothing is lost between an event and a wait: both are under one mutex, and what happens while the head asks is kept until
//! it has its answer.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uuid::Uuid;

use crate::answer::{Busy, Claim, Granted, longest_sleep};
use crate::error::Result;
use crate::hold::Hold;
use crate::options::LockOptions;
use crate::sql::CLAIM_LIFE;
use crate::sync::thread::{self, ThreadId};
use crate::sync::{Condvar, Instant, Mutex, lock, wait_until};
use crate::trouble::Trouble;
use crate::user_code::note;
use crate::wait::{Patience, SLACK, pause, random_fraction};
use crate::workers::Failed;

/// For how long a process passes a lock on among its own threads while another process waits. Long enough that a
/// hand-over to another process, which costs a millisecond or two, costs little in all; short enough to wait for.
const TURN: Duration = Duration::from_millis(10);

/// The lines of a storage, and whether its database answers.
#[derive(Default)]
pub(crate) struct Lines(Mutex<HashMap<String, Line>>, Arc<Trouble>);

/// There is one while there is a hold or a waiter.
struct Line {
    /// The hold of this process, from when it was granted until it was released, handed over or lost.
    hold: Option<Arc<Hold>>,
    waiters: VecDeque<Arc<Waiter>>,
    /// When the head asks next, unless the lock is this process's.
    ask_at: Instant,
    asking: Option<Asking>,
    /// How often the answer was that nobody will tell us, while the lock stayed with this version.
    rounds: u32,
    seen: Option<i64>,
    /// When this process may take the lock, as those before it were notified: first by its own statement, second by
    /// somebody else's (a release, or a waiter behind it), as a notification said. Neither replaces the other.
    turns: [Option<Due>; 2],
    /// It has been seen that the lock is somebody's: those in the line wait, and don't try for the first time.
    is_busy: bool,
    /// This process stands in the row, or may.
    is_queued: bool,
    unreachable_since: Option<Instant>,
}

/// From when on the lock may be ours if it is free in this version: those before us have had their time by then.
#[derive(Clone, Copy)]
struct Due {
    version: i64,
    at: Instant,
}

/// The head is asking the database.
struct Asking {
    since: Instant,
    /// When to ask next, as it was told meanwhile.
    told: Option<Instant>,
}

/// A thread that waits.
pub(crate) struct Waiter {
    lock: Arc<LockOptions>,
    owner_id: String,
    thread: ThreadId,
    joined: Instant,
    wake: Condvar,
    /// The hold that another thread of this process handed to it.
    handed: OnceLock<Arc<Hold>>,
}

/// What a waiter does next.
pub(crate) enum Turn {
    /// The lock is its own.
    Handed(Arc<Hold>),
    /// It is the head, and asks the database: for the lock in this version, if those before us had their time.
    Ask(Option<i64>),
    /// Its patience is over; if so, for how long the database has been out of reach.
    Over(Option<Duration>),
}

/// What follows a hold.
pub(crate) enum Successor {
    /// A thread of this process.
    Waiter(Arc<Waiter>),
    /// Another process; this one stands in line again.
    Others,
    /// Nobody of this process waits.
    Nobody,
    /// The hold is not the one that this process knows.
    Unknown,
}

impl Waiter {
    /// A claim with a lease id of its own: what came of an attempt without an answer is undone behind its back.
    pub(crate) fn claim(&self, deadline: Instant) -> Claim {
        claim(&self.lock, &self.owner_id, deadline)
    }

    /// The hold that it has been granted, or handed by `before`.
    pub(crate) fn hold(&self, claim: Claim, granted: Granted, before: Option<&Hold>) -> Arc<Hold> {
        let turn_began = before.map_or(granted.sent, |before| before.turn_began);
        Arc::new(Hold::new(claim, granted, &self.lock, self.thread, turn_began))
    }
}

/// A new claim on a lock, for a call that its caller gives up at `deadline`.
pub(crate) fn claim(lock: &LockOptions, owner_id: &str, deadline: Instant) -> Claim {
    Claim {
        expires: deadline + CLAIM_LIFE,
        lock_id: lock.lock_id.clone(),
        owner_id: owner_id.to_owned(),
        lease_id: Uuid::new_v4(),
        lease: lock.lease_expire_after,
    }
}

impl Line {
    fn new(now: Instant) -> Line {
        Line {
            hold: None,
            waiters: VecDeque::new(),
            ask_at: now,
            asking: None,
            rounds: 0,
            seen: None,
            turns: [None; 2],
            is_busy: false,
            is_queued: false,
            unreachable_since: None,
        }
    }

    /// Since when nothing has been heard of the database, if it is out of reach, or was asked and is late with its answer.
    fn unreachable_since(&self, now: Instant) -> Option<Instant> {
        let late = self.asking.as_ref().map(|asking| asking.since).filter(|since| now.duration_since(*since) >= SLACK);
        self.unreachable_since.or(late)
    }

    fn wake_head(&self) {
        if let Some(head) = self.waiters.front() {
            head.wake.notify_one();
        }
    }

    /// The head shall ask at `at`, or sooner: nobody can keep it from what it was going to do.
    fn tell(&mut self, at: Instant) {
        match &mut self.asking {
            Some(asking) => asking.told = Some(asking.told.map_or(at, |before| before.min(at))),
            None => self.ask_at = self.ask_at.min(at),
        }
        self.wake_head();
    }

    /// The head has asked, and asks again at `at`, or sooner if somebody has told it so meanwhile.
    fn answered(&mut self, at: Instant) {
        self.ask_at = self.asking.take().and_then(|asking| asking.told).map_or(at, |told| told.min(at));
    }

    /// The head has asked, and nobody will tell it when to ask again: after a pause, and once more when its patience ends.
    fn ask_again(&mut self, patience: &Patience, now: Instant, left: Option<Duration>) {
        let next = now + pause(self.rounds, left);
        self.rounds = self.rounds.saturating_add(1);
        self.answered(if patience.is_over(now) { next } else { next.min(patience.end(now)) });
    }

    fn begin_hold(&mut self, hold: &Arc<Hold>) {
        // A thread that was stopped for longer than its lease may come with an older one.
        if self.hold.as_ref().is_none_or(|newest| newest.version < hold.version || !newest.is_held()) {
            self.hold = Some(Arc::clone(hold));
        }
        self.rounds = 0;
        self.unreachable_since = None;
        self.see_busy();
    }

    /// It is known now that the lock is somebody's. Those whose patience was over before may go.
    fn see_busy(&mut self) {
        if !std::mem::replace(&mut self.is_busy, true) {
            self.waiters.iter().for_each(|waiter| waiter.wake.notify_one());
        }
    }
}

impl Lines {
    pub(crate) fn new(trouble: Arc<Trouble>) -> Lines {
        Lines(Mutex::default(), trouble)
    }

    /// The hold of this process that this thread may enter again as this owner.
    pub(crate) fn enter_again(&self, lock_id: &str, owner_id: &str) -> Option<Arc<Hold>> {
        let lines = lock(&self.0);
        lines.get(lock_id)?.hold.as_ref().filter(|hold| hold.enter_again(owner_id)).cloned()
    }

    /// A hold began without waiting.
    pub(crate) fn begin_hold(&self, hold: &Arc<Hold>) {
        let mut lines = lock(&self.0);
        let line = lines.entry(hold.claim.lock_id.clone()).or_insert_with(|| Line::new(Instant::now()));
        line.begin_hold(hold);
    }

    /// A hold was lost. The head asks.
    pub(crate) fn lose_hold(&self, hold: &Arc<Hold>) {
        // If this process still stands in the row, whoever takes the lock next sends it away.
        let mut lines = lock(&self.0);
        if let Some(line) = lines.get_mut(&hold.claim.lock_id) {
            let is_queued = line.is_queued;
            end_hold(&mut lines, hold, Instant::now(), is_queued);
        }
    }

    /// A hold was released. The head asks at `ask_at`; `is_queued` says whether this process stands in the row now. Returns
    /// whether it does so for nobody.
    pub(crate) fn release_hold(&self, hold: &Arc<Hold>, ask_at: Instant, is_queued: bool) -> bool {
        end_hold(&mut lock(&self.0), hold, ask_at, is_queued)
    }

    /// Who is to have the lock after this hold. A process passes a lock on among its own threads, but not for long while others wait.
    pub(crate) fn successor(&self, hold: &Arc<Hold>) -> Successor {
        let mut lines = lock(&self.0);
        let line = lines.get_mut(&hold.claim.lock_id);
        let Some(line) = line.filter(|line| line.hold.as_ref().is_some_and(|newest| Arc::ptr_eq(newest, hold))) else {
            return Successor::Unknown;
        };
        // What is told from now on is about the time after this hold.
        line.ask_at = Instant::now() + longest_sleep(0);
        let Some(head) = line.waiters.front() else { return Successor::Nobody };
        if !hold.state().is_wanted || hold.turn_began.elapsed() < TURN {
            Successor::Waiter(Arc::clone(head))
        } else {
            Successor::Others
        }
    }

    /// Gives a waiter the hold that was handed to it; false if it doesn't wait any more, and somebody has to end the hold.
    pub(crate) fn hand(&self, waiter: &Arc<Waiter>, hold: &Arc<Hold>) -> bool {
        let mut lines = lock(&self.0);
        let line = lines.entry(hold.claim.lock_id.clone()).or_insert_with(|| Line::new(Instant::now()));
        line.begin_hold(hold);
        if !line.waiters.front().is_some_and(|head| Arc::ptr_eq(head, waiter)) {
            // Its thread may come back at once, and must not enter what is going to be ended.
            hold.leave();
            return false;
        }
        line.waiters.pop_front();
        line.asking = None;
        let is_handed = waiter.handed.set(Arc::clone(hold)).is_ok();
        waiter.wake.notify_one();
        is_handed
    }

    /// A notification says that a lock is free, or soon will be. This process looks after `delay`, and may then take
    /// the lock in version `turn`. A false notification does no harm: the row decides, and the process also looks by
    /// itself.
    pub(crate) fn notified(&self, lock_id: &str, delay: Duration, turn: Option<i64>) {
        if let (Some(line), Some(at)) = (lock(&self.0).get_mut(lock_id), Instant::now().checked_add(delay)) {
            let [_, notified] = &mut line.turns;
            // The same may be said twice.
            if notified.is_none_or(|due| Some(due.version) != turn) {
                *notified = turn.map(|version| Due { version, at }).or(*notified);
            }
            line.tell(at);
        }
    }

    /// Notifications come from now on, or don't any more: each head asks, to stand in the row or because it won't be told.
    pub(crate) fn listening_changed(&self) {
        let now = Instant::now();
        lock(&self.0).values_mut().for_each(|line| line.tell(now));
    }

    /// This process doesn't stand in the row of this lock any more. Whoever has come to wait for it since has to ask.
    pub(crate) fn withdrawn(&self, lock_id: &str) {
        if let Some(line) = lock(&self.0).get_mut(lock_id) {
            line.tell(Instant::now());
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.0).is_empty()
    }

    /// Whether somebody waits for this lock, who takes over the place that the process may have in the row.
    pub(crate) fn takes_place_over(&self, lock_id: &str) -> bool {
        let mut lines = lock(&self.0);
        let waiting = lines.get_mut(lock_id).filter(|line| !line.waiters.is_empty());
        waiting.map(|line| line.is_queued = true).is_some()
    }

    /// Whether anybody waits for other processes.
    pub(crate) fn any_waits(&self) -> bool {
        lock(&self.0).values().any(|line| line.hold.is_none() && !line.waiters.is_empty())
    }
}

fn end_hold(lines: &mut HashMap<String, Line>, hold: &Arc<Hold>, ask_at: Instant, is_queued: bool) -> bool {
    let Some(line) = lines.get_mut(&hold.claim.lock_id) else { return is_queued };
    // A lost hold may have been followed by another one.
    if !line.hold.as_ref().is_some_and(|newest| Arc::ptr_eq(newest, hold)) {
        return false;
    }
    line.hold = None;
    line.is_queued = is_queued;
    if line.waiters.is_empty() {
        lines.remove(&hold.claim.lock_id);
        return is_queued;
    }
    line.ask_at = line.ask_at.min(ask_at);
    line.tell(line.ask_at);
    false
}

/// A thread's place in a line. It leaves the line when it is dropped.
pub(crate) struct Place<'a> {
    lines: &'a Lines,
    waiter: Arc<Waiter>,
    /// When it asked last.
    asked: Cell<Option<Instant>>,
}

/// What leaving a line leaves to do.
#[derive(Default)]
pub(crate) struct Left {
    /// A hold that was handed over and not taken up.
    pub(crate) hold: Option<Arc<Hold>>,
    /// Nobody of this process waits any more, and the row says that somebody does.
    pub(crate) is_queued: bool,
}

impl Lines {
    /// Joins the line of a lock, at its end.
    pub(crate) fn join(&self, options: &Arc<LockOptions>, owner_id: &str) -> Place<'_> {
        let waiter = Arc::new(Waiter {
            lock: Arc::clone(options),
            owner_id: owner_id.to_owned(),
            thread: thread::current().id(),
            joined: Instant::now(),
            wake: Condvar::new(),
            handed: OnceLock::new(),
        });
        let mut lines = lock(&self.0);
        let line = lines.entry(options.lock_id.clone()).or_insert_with(|| Line::new(Instant::now()));
        line.waiters.push_back(Arc::clone(&waiter));
        Place { lines: self, waiter, asked: Cell::new(None) }
    }
}

impl Place<'_> {
    pub(crate) fn waiter(&self) -> &Waiter {
        &self.waiter
    }

    pub(crate) fn lock_id(&self) -> &str {
        &self.waiter.lock.lock_id
    }

    fn is_head(&self, line: &Line) -> bool {
        line.waiters.front().is_some_and(|head| Arc::ptr_eq(head, &self.waiter))
    }

    /// The line, unless this waiter was taken out of it with a hold while it asked: then the answer says nothing.
    fn line_asked<'l>(&self, lines: &'l mut HashMap<String, Line>) -> Option<&'l mut Line> {
        lines.get_mut(self.lock_id()).filter(|line| self.is_head(line))
    }

    /// Waits for something to do.
    pub(crate) fn turn(&self, patience: &Patience) -> Turn {
        let mut lines = lock(&self.lines.0);
        loop {
            if let Some(hold) = self.waiter.handed.get() {
                return Turn::Handed(Arc::clone(hold));
            }
            let now = Instant::now();
            let Some(line) = lines.get_mut(self.lock_id()) else { return Turn::Over(None) };
            let lease = self.waiter.lock.lease_expire_after;
            // Looks from time to time, whatever happens.
            let mut wake = patience.end(now).min(now + lease);
            // Any answer counts: that to this line may be lost, and the next one isn't.
            let heard = self.lines.1.last_answer();
            let last = heard.map_or(self.waiter.joined, |heard| heard.max(self.waiter.joined));
            let since = line.unreachable_since(now).map(|since| since.max(last));
            let unreachable = since.map(|since| now.duration_since(since));
            // One that has asked before has an error to give up with, when it asks next.
            if let (Patience::Forever, Some(since), None) = (patience, since, self.asked.get()) {
                if now.duration_since(since) >= lease {
                    return Turn::Over(unreachable);
                }
                wake = wake.min(since + lease);
            }
            // Once more after the end, if there is time for it, and then no more, whatever is told.
            let end = patience.end(now);
            let late = end.checked_add(SLACK).unwrap_or(end);
            let may_ask = !(patience.is_over(now)
                && self.asked.get().is_some_and(|asked| patience.is_over(asked) || now >= late));
            if self.is_head(line) && may_ask {
                match line.hold.as_ref().filter(|hold| hold.is_held()) {
                    Some(hold) => wake = wake.min(now + hold.remaining()),
                    None if line.ask_at <= now => {
                        self.asked.set(Some(now));
                        line.asking = Some(Asking { since: now, told: None });
                        let due = line.turns.iter().flatten().find(|due| due.at <= now);
                        return Turn::Ask(due.map(|due| due.version));
                    }
                    None => wake = wake.min(line.ask_at),
                }
            }
            if patience.is_over(now) {
                // Where nobody has had an answer yet, nobody knows that the lock is busy. It may be just coming.
                if line.is_busy || now >= late || line.asking.is_none() {
                    let waited = now.duration_since(self.waiter.joined);
                    let is_answering = heard.is_some_and(|heard| now.duration_since(heard) < SLACK);
                    let unreachable = unreachable.filter(|_| !is_answering);
                    return Turn::Over(unreachable.or((!line.is_busy).then_some(waited)));
                }
                wake = late;
            }
            lines = wait_until(&self.waiter.wake, lines, wake);
        }
    }

    /// The head took the lock.
    pub(crate) fn took(&self, hold: &Arc<Hold>) {
        let mut lines = lock(&self.lines.0);
        let Some(line) = lines.get_mut(self.lock_id()) else { return };
        line.waiters.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        line.asking = None;
        line.is_queued = false;
        line.begin_hold(hold);
    }

    /// The lock can't be had now; `busy` says what is known of it. A process that listens is notified when that changes.
    pub(crate) fn busy(&self, busy: Option<&Busy>, is_listening: bool, patience: &Patience) {
        let now = Instant::now();
        let mut lines = lock(&self.lines.0);
        let Some(line) = self.line_asked(&mut lines) else { return };
        line.see_busy();
        line.unreachable_since = None;
        // Where nothing is known, a try before the last one may have put it into the row.
        line.is_queued |= busy.is_none_or(|busy| busy.place.is_some());
        let version = busy.map(|busy| busy.version);
        if line.seen != version {
            // A lock that changes hands is worth asking for often.
            (line.seen, line.rounds) = (version, 0);
        }
        // Not all processes that wait at the same moment.
        let sleep = busy.map(|busy| busy.sleep(1.0 - random_fraction() / 4.0));
        let [ours, _] = &mut line.turns;
        let due = busy.and_then(Busy::turn).zip(sleep).map(|(version, sleep)| Due { version, at: now + sleep });
        // Whoever makes us look sooner, and notify those before us again, doesn't put our turn off.
        *ours = due.map(|due| ours.filter(|before| before.version == due.version).unwrap_or(due));
        match (busy, sleep) {
            // A free lock isn't asked for before others had their time.
            (Some(busy), Some(sleep)) if is_listening || busy.is_free => line.answered(now + sleep),
            _ => line.ask_again(patience, now, sleep),
        }
    }

    /// Asking failed. Gives the error back where it ends the wait: at the first attempt, if it won't pass, and when the
    /// patience is over, which for one without an end is after a lease without an answer.
    pub(crate) fn failed(&self, failed: Failed, asked: Instant, patience: &Patience) -> Result<()> {
        let Failed { error, is_unknown, .. } = failed;
        let now = Instant::now();
        let mut lines = lock(&self.lines.0);
        let Some(line) = self.line_asked(&mut lines) else { return Ok(()) };
        let since = *line.unreachable_since.get_or_insert(asked);
        let lease = self.waiter.lock.lease_expire_after;
        let since = since.max(self.waiter.joined).max(self.lines.1.last_answer().unwrap_or(since));
        let is_hopeless = *patience == Patience::Forever && now.duration_since(since) >= lease;
        let is_over = patience.is_over(now) || is_hopeless;
        line.is_queued |= is_unknown;
        line.ask_again(patience, now, None);
        if is_over || !line.is_busy || !error.is_transient() {
            return Err(error);
        }
        drop(lines);
        note!(debug, "waiting for lock {:?} goes on: {}", self.lock_id(), error.chain());
        Ok(())
    }

    /// Leaves the line. `has_hold` says that the waiter has taken up the hold that was handed to it.
    pub(crate) fn leave(&self, has_hold: bool) -> Left {
        let mut lines = lock(&self.lines.0);
        let hold = if has_hold { None } else { self.waiter.handed.get().cloned() };
        let Some(line) = lines.get_mut(self.lock_id()) else { return Left { hold, is_queued: false } };
        let was_head = self.is_head(line);
        line.waiters.retain(|waiter| !Arc::ptr_eq(waiter, &self.waiter));
        if was_head {
            // It may have been asking, or have failed at its first attempt: the next one's is its own.
            let was_asking = line.asking.take().is_some();
            if was_asking || !line.is_busy {
                line.ask_at = Instant::now();
            }
            line.wake_head();
        }
        let is_empty = line.hold.is_none() && line.waiters.is_empty();
        let is_queued = is_empty && line.is_queued;
        if is_empty {
            lines.remove(self.lock_id());
        }
        Left { hold, is_queued }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::sql::GRACE;

    const LONG: Duration = Duration::from_secs(30);
    const BUSY: Busy = Busy {
        version: 1,
        owner_id: String::new(),
        is_free: false,
        left: LONG,
        has_notified: false,
        place: Some(1),
        waiters: 1,
    };

    fn options() -> Arc<LockOptions> {
        Arc::new(LockOptions::new("l"))
    }

    fn granted(version: i64) -> Granted {
        Granted { version, sent: Instant::now(), left: LONG, is_wanted: false }
    }

    fn take(place: &Place<'_>, version: i64) -> Arc<Hold> {
        assert!(matches!(place.turn(&Patience::Forever), Turn::Ask(_)));
        let hold = place.waiter().hold(place.waiter().claim(Instant::now()), granted(version), None);
        place.took(&hold);
        hold
    }

    fn soon() -> Patience {
        Patience::Until(Instant::now() + Duration::from_millis(20))
    }

    #[test]
    fn only_the_head_asks_and_only_while_the_lock_is_not_ours() {
        let lines = Lines::default();
        let [head, next] = [0, 1].map(|_| lines.join(&options(), "o"));
        let hold = take(&head, 1);
        // Nobody asks while it is ours, and it is known to be busy.
        assert!(matches!(next.turn(&soon()), Turn::Over(None)));
        assert!(!lines.release_hold(&hold, Instant::now(), false));
        assert!(matches!(next.turn(&soon()), Turn::Ask(_)));
        let last = lines.join(&options(), "o");
        assert!(matches!(last.turn(&soon()), Turn::Over(_)));
    }

    #[test]
    fn what_is_told_while_the_head_asks_is_kept_until_it_has_its_answer() {
        let lines = Lines::default();
        let place = lines.join(&options(), "o");
        assert!(matches!(place.turn(&soon()), Turn::Ask(_)));
        lines.notified("l", Duration::ZERO, None);
        place.busy(Some(&BUSY), true, &Patience::Forever);
        assert!(matches!(place.turn(&soon()), Turn::Ask(_)));
        // That of the last place doesn't undo that of the first.
        lines.notified("l", Duration::ZERO, None);
        lines.notified("l", 7 * GRACE, None);
        place.busy(Some(&BUSY), true, &Patience::Forever);
        assert!(matches!(place.turn(&soon()), Turn::Ask(_)));
        place.busy(Some(&BUSY), true, &Patience::Forever);
        assert!(matches!(place.turn(&soon()), Turn::Over(None)));
        // Another lock's release is none of ours.
        lines.notified("l2", Duration::ZERO, None);
        assert!(matches!(place.turn(&soon()), Turn::Over(None)));
    }

    #[test]
    fn those_who_are_told_later_ask_later() {
        let lines = Lines::default();
        let place = lines.join(&options(), "o");
        assert!(matches!(place.turn(&soon()), Turn::Ask(_)));
        place.busy(Some(&BUSY), true, &Patience::Forever);
        let told = Instant::now();
        lines.notified("l", 2 * GRACE, None);
        assert!(matches!(place.turn(&Patience::Forever), Turn::Ask(_)));
        assert!(told.elapsed() >= 2 * GRACE, "{:?}", told.elapsed());
    }

    #[test]
    fn a_notification_only_makes_a_waiter_look_sooner() {
        let lines = Lines::default();
        let place = lines.join(&options(), "o");
        for is_asking in [false, true] {
            assert!(matches!(place.turn(&Patience::Until(Instant::now() + LONG)), Turn::Ask(_)));
            let busy = || place.busy(Some(&Busy { left: GRACE, ..BUSY.clone() }), true, &Patience::Forever);
            let notified = || [LONG, 100 * LONG].map(|delay| lines.notified("l", delay, Some(1)));
            if is_asking {
                notified();
                busy();
            } else {
                busy();
                notified();
            }
            let start = Instant::now();
            assert!(matches!(place.turn(&Patience::Until(start + LONG / 3)), Turn::Ask(None)), "not in time");
        }
    }

    /// Each makes it look, and notify those before it again.
    #[test]
    fn a_flood_of_notifications_does_not_put_a_turn_off() {
        let lines = Lines::default();
        let place = lines.join(&options(), "o");
        let busy = Busy { is_free: true, has_notified: true, place: Some(2), waiters: 2, ..BUSY.clone() };
        let start = Instant::now();
        loop {
            match place.turn(&Patience::Until(start + LONG)) {
                Turn::Ask(Some(version)) => {
                    assert_eq!(version, busy.version);
                    break;
                }
                Turn::Ask(None) => place.busy(Some(&busy), true, &Patience::Forever),
                _ => panic!("it doesn't ask"),
            }
            lines.notified("l", Duration::ZERO, None);
            assert!(start.elapsed() < LONG / 10, "its turn doesn't come");
            thread::sleep(Duration::from_millis(1));
        }
        // That of another version is not this one.
        let next = Busy { version: 2, ..busy };
        place.busy(Some(&next), true, &Patience::Forever);
        lines.notified("l", Duration::ZERO, None);
        assert!(matches!(place.turn(&Patience::Until(start + LONG)), Turn::Ask(None)), "of the version before");
    }

    /// As those behind it do, whose notifications make it look again and again.
    #[test]
    fn whoever_has_notified_those_before_it_has_its_turn_in_time_however_often_it_looks() {
        let lines = Lines::default();
        let place = lines.join(&options(), "o");
        let free =
            Busy { version: 7, is_free: true, has_notified: true, place: Some(200), waiters: 200, ..BUSY.clone() };
        let (start, longest) = (Instant::now(), free.sleep(1.0));
        while let Turn::Ask(turn) = place.turn(&Patience::Until(start + LONG)) {
            if turn == Some(7) {
                break;
            }
            assert!(start.elapsed() < 5 * longest, "no turn after {:?}", start.elapsed());
            place.busy(Some(&free), true, &Patience::Forever);
            lines.notified("l", Duration::from_millis(5), None);
        }
        assert!(start.elapsed() >= longest / 2, "the others had no time to come: {:?}", start.elapsed());
    }

    #[test]
    fn a_release_of_our_own_postpones_no_look() {
        let lines = Lines::default();
        let [first, second] = [0, 1].map(|_| lines.join(&options(), "o"));
        let hold = take(&first, 1);
        assert!(matches!(lines.successor(&hold), Successor::Waiter(_)));
        // It is told while the release is under way.
        lines.notified("l", Duration::ZERO, None);
        assert!(!lines.release_hold(&hold, Instant::now() + LONG, true));
        assert!(matches!(second.turn(&soon()), Turn::Ask(_)), "it waits for what the release says");
    }

    #[test]
    fn a_head_that_ends_while_it_asks_leaves_the_asking_to_the_next() {
        let lines = Lines::default();
        let [head, next] = [0, 1].map(|_| lines.join(&options(), "o"));
        assert!(matches!(head.turn(&soon()), Turn::Ask(_)));
        head.leave(false);
        assert!(matches!(next.turn(&soon()), Turn::Ask(_)));
    }

    #[test]
    fn the_next_head_goes_on_with_what_is_known_and_the_last_one_withdraws() {
        let lines = Lines::default();
        let [head, next] = [0, 1].map(|_| lines.join(&options(), "o"));
        assert!(matches!(head.turn(&soon()), Turn::Ask(_)));
        head.busy(Some(&BUSY), true, &Patience::Forever);
        assert!(!head.leave(false).is_queued);
        assert!(matches!(next.turn(&soon()), Turn::Over(None)), "it asks what is known");
        assert!(next.leave(false).is_queued);
        assert!(lines.is_empty());
    }

    #[test]
    fn a_hold_goes_to_the_head_or_comes_back() {
        let lines = Lines::default();
        let [first, second, third] = [0, 1, 2].map(|_| lines.join(&options(), "o"));
        let hold = take(&first, 1);
        let Successor::Waiter(head) = lines.successor(&hold) else { panic!("nobody") };
        assert!(Arc::ptr_eq(&head, &second.waiter));
        let handed = head.hold(head.claim(Instant::now()), granted(2), Some(&hold));
        // It gives up at this moment: before it has been handed over, or after.
        second.leave(false);
        assert!(!lines.hand(&head, &handed));
        let Successor::Waiter(head) = lines.successor(&handed) else { panic!("nobody") };
        let again = head.hold(head.claim(Instant::now()), granted(3), Some(&handed));
        assert!(lines.hand(&head, &again));
        assert!(matches!(third.turn(&soon()), Turn::Handed(_)));
        let left = third.leave(false).hold.expect("a hold that was not taken up");
        assert_eq!(left.version, 3);
    }

    #[test]
    fn an_answer_to_one_that_was_handed_a_hold_meanwhile_changes_nothing() {
        let lines = Lines::default();
        let [first, second, third] = [0, 1, 2].map(|_| lines.join(&options(), "o"));
        let hold = take(&first, 1);
        // The second one asks while the lock is ours, because the hold was taken by one that didn't wait.
        lines.lose_hold(&hold);
        assert!(matches!(second.turn(&soon()), Turn::Ask(_)));
        lines.begin_hold(&hold);
        let Successor::Waiter(head) = lines.successor(&hold) else { panic!("nobody") };
        let handed = head.hold(head.claim(Instant::now()), granted(2), Some(&hold));
        assert!(lines.hand(&head, &handed));
        assert!(!lines.release_hold(&handed, Instant::now(), false));
        assert!(matches!(third.turn(&soon()), Turn::Ask(_)));
        lines.notified("l", Duration::ZERO, None);
        second.busy(Some(&BUSY), true, &Patience::Forever);
        third.busy(Some(&BUSY), true, &Patience::Forever);
        assert!(matches!(third.turn(&soon()), Turn::Ask(_)), "what it was told is lost");
    }

    #[test]
    fn a_turn_ends_when_others_wait() {
        let lines = Lines::default();
        let [first, _second] = [0, 1].map(|_| lines.join(&options(), "o"));
        let hold = take(&first, 1);
        assert!(matches!(lines.successor(&hold), Successor::Waiter(_)));
        hold.state().is_wanted = true;
        assert!(matches!(lines.successor(&hold), Successor::Waiter(_)), "not at once");
        thread::sleep(TURN);
        assert!(matches!(lines.successor(&hold), Successor::Others));
        hold.state().is_wanted = false;
        assert!(matches!(lines.successor(&hold), Successor::Waiter(_)), "nobody else waits");
        assert!(!lines.release_hold(&hold, Instant::now(), false));
        assert!(matches!(lines.successor(&hold), Successor::Unknown));
    }

    #[test]
    fn who_joins_where_the_first_attempt_fails_tries_for_itself() {
        let lines = Lines::default();
        let [head, next] = [0, 1].map(|_| lines.join(&options(), "o"));
        let error = || Failed::with(Error::Timeout { action: "ask".to_owned(), waiting_for: "an answer", after: LONG });
        assert!(matches!(head.turn(&soon()), Turn::Ask(_)));
        assert!(head.failed(error(), Instant::now(), &Patience::Forever).is_err());
        head.leave(false);
        let start = Instant::now();
        assert!(matches!(next.turn(&Patience::Forever), Turn::Ask(_)));
        assert!(start.elapsed() < Duration::from_millis(50), "it waits for {:?}", start.elapsed());
        // Once the lock was seen to be busy, what fails is waiting.
        next.busy(Some(&Busy { left: Duration::ZERO, ..BUSY.clone() }), false, &Patience::Forever);
        assert!(matches!(next.turn(&Patience::Forever), Turn::Ask(_)));
        assert!(next.failed(error(), Instant::now(), &Patience::Forever).is_ok());
        // For as long as a lease.
        assert!(next.failed(error(), Instant::now(), &soon()).is_ok());
        lines.0.lock().unwrap().get_mut("l").unwrap().unreachable_since = Instant::now().checked_sub(2 * LONG);
        assert!(
            next.failed(error(), Instant::now(), &Patience::Forever).is_ok(),
            "it hasn't waited for so long itself"
        );
    }

    #[test]
    fn a_listener_that_comes_or_goes_makes_heads_ask() {
        let lines = Lines::default();
        let place = lines.join(&options(), "o");
        assert!(lines.any_waits());
        assert!(matches!(place.turn(&soon()), Turn::Ask(_)));
        place.busy(Some(&BUSY), true, &Patience::Forever);
        lines.listening_changed();
        assert!(matches!(place.turn(&soon()), Turn::Ask(_)));
        place.busy(Some(&BUSY), true, &Patience::Forever);
        lines.withdrawn("l");
        let hold = take(&place, 1);
        assert!(!lines.any_waits(), "one that waits for its own process doesn't count");
        assert!(!lines.release_hold(&hold, Instant::now(), false));
        assert!(!lines.any_waits() && lines.is_empty());
    }

    fn hold(version: i64, left: Duration) -> Arc<Hold> {
        let granted = Granted { left, ..granted(version) };
        Arc::new(Hold::new(
            claim(&options(), "o", Instant::now()),
            granted,
            &options(),
            thread::current().id(),
            granted.sent,
        ))
    }

    #[test]
    fn one_whose_patience_is_over_asks_once_more_and_no_more() {
        let lines = Lines::default();
        let place = lines.join(&options(), "o");
        let patience = soon();
        let mut asked_late = 0;
        while matches!(place.turn(&patience), Turn::Ask(_)) {
            asked_late += usize::from(patience.is_over(Instant::now()));
            thread::sleep(Duration::from_millis(5));
            lines.notified("l", Duration::ZERO, None);
            place.busy(Some(&BUSY), true, &patience);
        }
        assert!(asked_late <= 1, "asked {asked_late} times");
    }

    #[test]
    fn the_end_of_a_hold_wakes_the_head_also_if_nobody_says_so() {
        let lines = Lines::default();
        lines.begin_hold(&hold(1, Duration::from_secs(3) + Duration::from_millis(50)));
        let place = lines.join(&options(), "o");
        let start = Instant::now();
        assert!(matches!(place.turn(&Patience::Until(start + LONG)), Turn::Ask(_)));
        assert!(start.elapsed() < LONG / 2, "{:?}", start.elapsed());
    }

    #[test]
    fn an_older_hold_does_not_hide_a_newer_one() {
        let lines = Lines::default();
        let (old, new) = (hold(5, LONG), hold(7, LONG));
        lines.begin_hold(&new);
        lines.begin_hold(&old);
        assert_eq!(lines.enter_again("l", "o").expect("the newer one is entered again").version, 7);
    }

    #[test]
    fn a_hold_that_nobody_took_up_is_not_entered_again() {
        let lines = Lines::default();
        let [first, second] = [0, 1].map(|_| lines.join(&options(), "o"));
        let hold = take(&first, 1);
        let Successor::Waiter(head) = lines.successor(&hold) else { panic!("nobody") };
        let handed = head.hold(head.claim(Instant::now()), granted(2), Some(&hold));
        second.leave(false);
        assert!(!lines.hand(&head, &handed));
        // This is the thread and the owner for which it was meant.
        assert!(lines.enter_again("l", "o").is_none());
    }

    #[test]
    fn a_place_in_the_row_for_nobody_is_given_up() {
        let lines = Lines::default();
        let [first, second] = [0, 1].map(|_| lines.join(&options(), "o"));
        let hold = take(&first, 1);
        // Released, and standing in the row for the second one, which leaves before it asks.
        assert!(!lines.release_hold(&hold, Instant::now() + LONG, true));
        assert!(second.leave(false).is_queued);
        // The same, and it has left before.
        let hold = take(&lines.join(&options(), "o"), 2);
        assert!(lines.release_hold(&hold, Instant::now() + LONG, true));
    }

    #[test]
    fn who_waits_behind_a_patient_head_gives_up_after_a_lease_without_the_database() {
        let lines = Lines::default();
        let [head, next] = [0, 1].map(|_| lines.join(&Arc::new(LockOptions::new("l").lease_expire_after(GRACE)), "o"));
        assert!(matches!(head.turn(&soon()), Turn::Ask(_)));
        head.busy(Some(&BUSY), true, &Patience::Forever);
        let error = Failed::with(Error::Timeout { action: "ask".to_owned(), waiting_for: "an answer", after: LONG });
        lines.listening_changed();
        assert!(matches!(head.turn(&soon()), Turn::Ask(_)));
        head.failed(error, Instant::now(), &Patience::Until(Instant::now() + LONG)).expect("patient");
        let start = Instant::now();
        let Turn::Over(Some(unreachable)) = next.turn(&Patience::Forever) else { panic!("it goes on") };
        assert!(unreachable >= GRACE && start.elapsed() < LONG / 2, "{unreachable:?}");
    }

    #[test]
    fn one_in_a_hurry_waits_for_the_first_answer() {
        let lines = Lines::default();
        let [head, hurried] = [0, 1].map(|_| lines.join(&options(), "o"));
        assert!(matches!(head.turn(&soon()), Turn::Ask(_)));
        let patience = Patience::Until(Instant::now());
        thread::scope(|scope| {
            // The same place, in another thread.
            let (lines, waiter) = (&lines, Arc::clone(&hurried.waiter));
            let turn = scope.spawn(move || Place { lines, waiter, asked: Cell::new(None) }.turn(&patience));
            thread::sleep(Duration::from_millis(20));
            head.busy(Some(&BUSY), true, &Patience::Forever);
            // Busy, and not an error.
            assert!(matches!(turn.join().unwrap(), Turn::Over(None)));
        });
    }
}
