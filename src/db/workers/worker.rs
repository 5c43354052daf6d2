//! One worker, a thread with a connection of its own, and what starts workers.
//!
//! The states that a worker goes through are in the table of [`super`]. The mutex is taken to change the state, and
//! released while the worker uses its session. Uses `db::answer`, `db::session`, `error`, `user_code` and `sync`.

use std::sync::Arc;
use std::time::Duration;

use super::state::{FailedOpening, State, WorkerState};
use super::task::{Next, Task};
use super::{CHECK_INTERVAL, IDLE_TIME, LONGEST_PAUSE, PROBING_LIMITS, STACK_BYTES, Shared, WARN_AFTER};
use crate::db::answer::Fault;
use crate::db::session::Session;
use crate::error::Error;
use crate::sync::{Instant, MutexGuard, lock, thread, wait_until};
use crate::user_code::{self, log_at};

/// A worker's entry among the workers, for the task that it runs.
///
/// The worker becomes idle just before its caller gets the answer. Otherwise the caller's next call could find it busy,
/// and start another worker.
#[derive(Default)]
pub(super) struct WorkerEntry<'a>(Option<(&'a Shared, u64)>);

impl WorkerEntry<'_> {
    pub(super) fn set_idle(&self) {
        if let Some((shared, id)) = self.0 {
            lock(&shared.state).workers.insert(id, WorkerState::Idle);
        }
    }
}

/// Starts workers for what is queued, up to the limit.
pub(super) fn add_workers(shared: &Arc<Shared>) {
    loop {
        let mut state = lock(&shared.state);
        let now = Instant::now();
        let failed = state.failed_tasks(now);
        if !failed.is_empty() {
            drop(state);
            failed.into_iter().for_each(|(mut task, error)| _ = (task.step)(Err(error), &WorkerEntry::default()));
            continue;
        }
        if !state.may_add_worker(now, shared.max_live, shared.connections.is_lent()) {
            return;
        }
        state.last_opening = Some(now);
        let id = state.next_id;
        state.next_id += 1;
        state.workers.insert(id, WorkerState::Opening { since: now });
        drop(state);
        let worker = Worker { id, shared: Arc::clone(shared) };
        let started = thread::Builder::new()
            .name("lock-worker".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || user_code::call(|| worker.run()));
        if let Err(source) = started {
            // The worker was dropped with the closure, which removed its entry.
            opening_failed(shared, Error::Thread { source }, now);
        }
    }
}

/// Takes note that no connection could be opened, in an attempt that began at `began`.
fn opening_failed(shared: &Shared, error: Error, began: Instant) {
    let mut state = lock(&shared.state);
    let now = Instant::now();
    let open = state.count(now).open();
    if open == 0 {
        state.unreported.push(FailedOpening { error, began, failed: now });
        return;
    }
    state.failures = state.failures.saturating_add(1);
    state.open_again_at = Some(now + (CHECK_INTERVAL * (1 << state.failures.min(8))).min(LONGEST_PAUSE));
    let is_warning = state.failures == WARN_AFTER;
    drop(state);
    if is_warning {
        log_at!(warn, "no more than {open} connections could be opened, going on with them: {}", error.chain());
    } else {
        log_at!(debug, "no further connection could be opened: {}", error.chain());
    }
}

struct Worker {
    id: u64,
    shared: Arc<Shared>,
}

impl Worker {
    fn run(self) {
        let began = Instant::now();
        let opened = self.shared.connections.open(|_| Ok(()));
        match opened {
            Ok(session) => self.serve(session),
            Err(error) => {
                lock(&self.shared.state).workers.remove(&self.id);
                opening_failed(&self.shared, error, began);
            }
        }
        // The end of this worker may have made room for another one, or left a task behind.
        add_workers(&self.shared);
    }

    /// Runs tasks for as long as the session can be used, and there may be any.
    fn serve(&self, mut session: Session) {
        let shared = &*self.shared;
        let mut state = lock(&shared.state);
        let mut idle_since = Instant::now();
        (state.failures, state.open_again_at) = (0, None);
        loop {
            state.workers.insert(self.id, WorkerState::Idle);
            let now = Instant::now();
            if session.is_suspect() {
                let is_alive;
                (state, is_alive) = self.probe(state, &mut session, now);
                if !is_alive {
                    break;
                }
                state.workers.insert(self.id, WorkerState::Idle);
            }
            let now = Instant::now();
            // Others were opened while this one was stuck, or took long to open.
            if state.count(now).open() > shared.max_live {
                break;
            }
            let Some(task) = state.next_task(now, shared.max_live) else {
                let goes_on;
                (state, goes_on) = self.idle(state, &mut session, now, idle_since + IDLE_TIME);
                if goes_on {
                    continue;
                }
                break;
            };
            if task.deadline < now {
                // The caller has gone. The task may own the last handle of the storage: drop it without the mutex.
                drop(state);
                user_code::call(|| drop(task));
                state = lock(&shared.state);
                continue;
            }
            let is_usable;
            (state, is_usable) = self.run_task(state, &mut session, task, now, now.duration_since(idle_since));
            // A pool of the caller's gets its connection back after each call.
            if !is_usable || session.is_lent() {
                break;
            }
            if !state.ordinary.is_empty() {
                // An ordinary task may have waited for the end of this task, while this worker takes an urgent one.
                shared.wake.notify_one();
            }
            idle_since = Instant::now();
        }
        // Still under the mutex of the decision to end: whoever submits a task later doesn't count on this worker.
        state.workers.remove(&self.id);
        drop(state);
        // This worker may have been the one that was woken for a task that it put back, or could have taken.
        shared.wake.notify_one();
        user_code::call(|| drop(session));
    }

    /// Asks, without the mutex, whether the connection is alive.
    fn probe<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        session: &mut Session,
        now: Instant,
    ) -> (MutexGuard<'a, State>, bool) {
        state.workers.insert(self.id, WorkerState::Probing { since: now });
        drop(state);
        let [shortest, longest] = PROBING_LIMITS;
        let timeout = (self.shared.health.answer_time() * 4).clamp(shortest, longest);
        let is_alive = contained(session, |session| Ok(session.answers_within(timeout)));
        (lock(&self.shared.state), is_alive.unwrap_or(false))
    }

    /// Prepares a statement without the mutex, or waits for a task until `until`. False if the worker is to end.
    fn idle<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        session: &mut Session,
        now: Instant,
        until: Instant,
    ) -> (MutexGuard<'a, State>, bool) {
        if session.has_to_prepare() {
            state.workers.insert(self.id, WorkerState::Probing { since: now });
            drop(state);
            // An error that isn't the connection's will come up again in the next call.
            drop(contained(session, Session::prepare));
            return (lock(&self.shared.state), true);
        }
        if !session.is_usable() || session.is_lent() || state.is_closed || now >= until {
            return (state, false);
        }
        (wait_until(&self.shared.wake, state, until), true)
    }

    /// Runs a task without the mutex, after an idle time of `idle`. False if the session can't be used any more.
    fn run_task<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        session: &mut Session,
        mut task: Task,
        now: Instant,
        idle: Duration,
    ) -> (MutexGuard<'a, State>, bool) {
        let shared = &*self.shared;
        let late_at = now.checked_add(task.answer_time).map_or(task.deadline, |at| at.min(task.deadline));
        state.workers.insert(self.id, WorkerState::Call { urgency: task.urgency, since: now, late_at });
        drop(state);
        let is_ready = contained(session, |session| Ok(session.is_ready(idle)));
        let next = if is_ready.unwrap_or(false) {
            (task.step)(Ok(&mut *session), &WorkerEntry(Some((shared, self.id))))
        } else {
            Next::TryAgain
        };
        let is_usable = session.is_usable();
        let is_answered = next == Next::Done && is_usable;
        if is_answered {
            shared.health.answered(now.elapsed());
            session.trust();
        }
        // Unless the task is put back, what it owns is dropped here, without the mutex.
        let unfinished = (next == Next::TryAgain).then_some(task);
        let mut state = lock(&shared.state);
        if is_answered {
            state.last_success = Some(Instant::now());
        }
        if let Some(task) = unfinished {
            state.put_back(task);
            // The idle workers check whether their connections are alive.
            shared.wake.notify_all();
        }
        (state, is_usable)
    }
}

impl Drop for Worker {
    /// Removes the entry even after a panic, or if no thread could be started.
    fn drop(&mut self) {
        lock(&self.shared.state).workers.remove(&self.id);
    }
}

/// Uses a session, and contains a panic: the driver logs while it makes a call, and the logger is user code. A session
/// whose connection is at fault is marked broken.
pub(super) fn contained<T>(
    session: &mut Session,
    call: impl FnOnce(&mut Session) -> Result<T, Fault>,
) -> Result<T, Fault> {
    let result = user_code::call(|| call(session)).unwrap_or(Err(Fault::Panicked));
    if let Err(fault) = &result
        && fault.is_connection_fault()
    {
        session.mark_broken(fault);
    }
    result
}
