//! The refresh thread of a held lock.
//!
//! The thread keeps the lease going, and marks the hold lost at its deadline, even while a refresh is stuck. It never
//! waits for one call alone. It waits for whichever comes first of an answer, the time to act, the deadline, and the
//! end of the hold. It stops only when the hold is over.
//!
//! Uses `wait::queue`, `hold`, `db`, and the modules below them.

use std::sync::Arc;
use std::time::Duration;

use crate::backoff::backoff;
use crate::db::session::Session;
use crate::db::workers::{CHECK_INTERVAL, Tries, Urgency};
use crate::error::{Error, Result};
use crate::events::Event;
use crate::hold::{Hold, HoldState, Unlocking};
use crate::storage::PostgresStorage;
use crate::storage::release::RELEASE_TIME;
use crate::sync::{Instant, MutexGuard, thread, wait_until};
use crate::user_code::log_at;

/// Enough for the callback that the user sets for a loss. Pages that are never touched cost nothing.
const STACK_BYTES: usize = 1024 * 1024;

/// Starts the refresh thread of a hold.
pub(crate) fn start(storage: &PostgresStorage, hold: &Arc<Hold>) -> Result<()> {
    let (storage, hold) = (storage.clone(), Arc::clone(hold));
    thread::Builder::new()
        .name("lock-refresh".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let ended = EndedByPanic(&storage, &hold);
            run(&storage, &hold);
            drop(ended);
        })
        .map_err(|source| Error::Thread { source })?;
    Ok(())
}

/// Frees the wait queue of the hold if its refresh thread panics. Else this process's waiters would wait for a thread
/// that has ended.
struct EndedByPanic<'a>(&'a PostgresStorage, &'a Arc<Hold>);

impl Drop for EndedByPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.queues().lose_hold(self.1);
        }
    }
}

fn run(storage: &PostgresStorage, hold: &Arc<Hold>) {
    let mut state = hold.state();
    let awaited = Awaited::RefreshTime(state.lease.next_refresh(hold.refresh_interval));
    let mut refresher = Refresher { storage, hold, awaited, attempt: 0, failures: 0 };
    loop {
        let now = Instant::now();
        if state.guards == 0 && !(state.is_gone && state.owes_end_event) {
            return;
        }
        if state.unlocking == Unlocking::Done {
            drop(state);
            storage.queues().lose_hold(hold);
            return;
        }
        if now >= state.lease.loss_time() || !state.lease.is_held(now) {
            // The loss is final: an answer that comes now finds the hold lost.
            state.lease.lose();
            let sends_event = state.take_end_event();
            hold.changed.notify_all();
            drop(state);
            storage.queues().lose_hold(hold);
            if sends_event {
                // The callback goes first, because it has a deadline.
                hold.on_lost.call(hold);
                hold.send_lost(storage.events());
                log_at!(warn, "{}", hold.lost());
            }
            return;
        }
        let step = refresher.next_step(&mut state, now);
        if let Some((error, pause)) = refresher.take_step(step, state) {
            refresher.awaited = Awaited::RefreshTime(now + pause);
            let (lock_id, owner_id, version) = hold.names();
            storage.events().send(|| Event::RefreshFailed { lock_id, owner_id, version, error: &error });
            storage.health().failed(|| format!("lock {lock_id:?} (version {version}): {}", error.chain()));
        }
        state = hold.state();
    }
}

/// What the thread waits for.
enum Awaited {
    /// The time of the next refresh.
    RefreshTime(Instant),
    /// The answer to the last refresh, sent at `since`. Without an answer by `by`, the next refresh is sent.
    Answer { since: Instant, by: Instant },
}

/// What the thread does next.
enum Step {
    /// A refresh was answered after this latency: the lease is renewed.
    Succeed(Duration),
    /// The last refresh failed.
    Fail(Error),
    /// The last refresh, sent then, has had no answer in time.
    GiveUp(Instant),
    /// A refresh is due. Its answer should come by then.
    Send(Instant),
    /// Nothing is to do until then. A change of the hold wakes the thread.
    Sleep(Instant),
    /// The same while an answer is awaited.
    AwaitAnswer(Instant),
}

/// What the refresh thread remembers from one step to the next.
struct Refresher<'a> {
    storage: &'a PostgresStorage,
    hold: &'a Arc<Hold>,
    awaited: Awaited,
    /// The number of the last refresh.
    attempt: u64,
    /// How many refreshes have failed in a row.
    failures: u32,
}

impl Refresher<'_> {
    /// Decides what to do next, under the mutex of the hold.
    fn next_step(&mut self, state: &mut HoldState, now: Instant) -> Step {
        match (state.answer.take(), &self.awaited) {
            (Some((_, Ok(latency))), _) => {
                self.failures = 0;
                self.awaited = Awaited::RefreshTime(state.lease.next_refresh(self.hold.refresh_interval));
                Step::Succeed(latency)
            }
            _ if state.unlocking == Unlocking::Pending => {
                // A refresh that is under way waits for the transaction, which is no failure.
                if matches!(self.awaited, Awaited::Answer { .. }) {
                    self.awaited = Awaited::RefreshTime(now);
                }
                Step::Sleep(state.lease.loss_time())
            }
            (Some((number, Err(error))), Awaited::Answer { .. }) if number == self.attempt => Step::Fail(error),
            (_, Awaited::RefreshTime(at)) if *at <= now => {
                self.attempt += 1;
                // Where answers take long, the answer to this attempt comes sooner than the answer to another one
                // would.
                let slow = self.storage.health().answer_time().mul_f64(1.5).min(state.lease.remaining(now) * 9 / 10);
                let by = now + state.lease.attempt_time(now).max(slow);
                self.awaited = Awaited::Answer { since: now, by };
                Step::Send(by)
            }
            (_, Awaited::Answer { since, by }) if *by <= now => Step::GiveUp(*since),
            // Nothing to do. An error here came from an attempt that was given up.
            (_, Awaited::RefreshTime(at)) => Step::Sleep(state.lease.loss_time().min(*at)),
            (_, Awaited::Answer { by, .. }) => {
                Step::AwaitAnswer(state.lease.loss_time().min(*by).min(now + CHECK_INTERVAL))
            }
        }
    }

    /// Does what was decided. Returns why a refresh failed, if one did, and the pause before the next one.
    ///
    /// No mutex is held while something is sent or logged: a logger may be slow, or call a method of a guard.
    fn take_step(&mut self, step: Step, state: MutexGuard<'_, HoldState>) -> Option<(Error, Duration)> {
        let (storage, hold) = (self.storage, self.hold);
        match step {
            Step::Succeed(latency) => {
                drop(state);
                storage.health().recovered();
                let (lock_id, owner_id, version) = hold.names();
                storage.events().send(|| Event::Refreshed { lock_id, owner_id, version, latency });
                log_at!(trace, "refreshed lock {:?}", hold.claim.lock_id);
                None
            }
            Step::Fail(error) => {
                drop(state);
                self.failures += 1;
                Some((error, backoff(self.failures).min(hold.remaining() / 2)))
            }
            Step::GiveUp(since) => {
                drop(state);
                storage.refresh_was_silent(since.elapsed());
                let action = format!("refresh lock {:?}", hold.claim.lock_id);
                self.failures += 1;
                Some((Error::Timeout { action, waiting_for: "an answer", after: since.elapsed() }, Duration::ZERO))
            }
            Step::Send(by) => {
                drop(state);
                storage.send_refresh(hold, self.attempt, by);
                None
            }
            Step::Sleep(until) => {
                drop(wait_until(&hold.changed, state, until));
                None
            }
            Step::AwaitAnswer(until) => {
                drop(wait_until(&hold.changed, state, until));
                // The worker may be stuck, or the connection that it opens.
                storage.add_workers();
                None
            }
        }
    }
}

impl PostgresStorage {
    /// Sends a refresh. Its answer goes to the hold, even when it comes late.
    pub(crate) fn send_refresh(&self, hold: &Arc<Hold>, number: u64, deadline: Instant) {
        let sql = Arc::clone(&self.inner.sql);
        let (described, wanted, called, answered) =
            (Arc::clone(hold), Arc::clone(hold), Arc::clone(hold), Arc::clone(hold));
        self.inner.workers.send(
            Urgency::Urgent,
            deadline,
            move || format!("refresh lock {:?}", described.claim.lock_id),
            move || wanted.is_to_be_refreshed(),
            move |session| {
                let sent = Instant::now();
                Ok((sent, session.refresh(&sql, &called.claim, called.version)?))
            },
            move |result: Result<(Instant, Option<bool>)>| match result {
                Ok((sent, is_there)) => answered.refreshed(number, sent, Ok(is_there)),
                Err(error) => answered.refreshed(number, Instant::now(), Err(error)),
            },
        );
    }

    /// Whether the database still has a hold, found out by a refresh within [`RELEASE_TIME`]. None if there is no
    /// answer.
    pub(crate) fn find_hold(&self, hold: &Hold) -> Option<bool> {
        self.check_process().ok()?;
        let deadline = Instant::now() + RELEASE_TIME;
        let mut failures = 0;
        loop {
            let (sql, claim, version) = (Arc::clone(&self.inner.sql), hold.claim.clone(), hold.version);
            let describe = hold.claim.lock_id.clone();
            let action = move || format!("look for lock {describe:?}");
            let call = move |session: &mut Session| session.refresh(&sql, &claim, version);
            match self.inner.workers.call(Urgency::Urgent, deadline, Tries::Several, action, call, |_, _| ()) {
                Ok(answer) => return Some(answer.value.is_some()),
                // A transaction may have locked the row, perhaps one that is about to end.
                Err(failed) => {
                    failures += 1;
                    let pause = backoff(failures);
                    if !failed.error.is_transient() || Instant::now() + pause >= deadline {
                        return None;
                    }
                    thread::sleep(pause);
                }
            }
        }
    }
}
