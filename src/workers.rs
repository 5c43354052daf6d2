//! The threads that make the database calls, each call with a deadline.
//!
//! The blocking client can neither be interrupted nor be used on a thread of an async runtime, so no caller ever touches it. A
//! call is a task in a queue; a worker takes it and runs it on its connection, which it keeps. The caller waits until the
//! answer or the deadline, whichever is first. A call that overruns its deadline costs its connection and, for as long
//! as it is stuck, its worker, which another one replaces; the stuck worker finishes the call alone, and undoes what
//! came of it too late. So:
//!
//! - A caller is back at its deadline, whatever the server and the network do.
//! - Every task is idempotent, because it may run again on another connection if the first one breaks.
//! - Urgent tasks (refresh, release) go first, and with two workers or more one is never given to another task.
//! - No mutex is held while a task runs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::answer::Fault;
use crate::connections::{CheckedOut, Connections};
use crate::error::{Error, Result};
use crate::session::Session;
use crate::stragglers::Stragglers;
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};
use crate::user_code;

/// A worker without work ends after this, and closes its connection.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// How often a call that takes long looks whether a worker is stuck.
const LOOK: Duration = Duration::from_millis(250);
/// How often a call is made in all when its connections break.
pub(crate) const MAX_TRIES: u32 = 3;
/// What a call that was never started had waited for.
const NO_CONNECTION: &str = "a connection to be free (max_connections) or opened";
/// Enough for the client, the logger and TLS; only what is touched counts.
const STACK_BYTES: usize = 512 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Keeps or ends a hold.
    Urgent,
    /// Everything else.
    Ordinary,
}

/// What a task is given: a session, or why there is none, and the worker that runs it. It answers whether to try again with
/// another session.
type Step = Box<dyn FnMut(Result<&mut Session>, &Place<'_>) -> Next + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Done,
    TryAgain,
}

struct Task {
    urgency: Urgency,
    deadline: Instant,
    step: Step,
}

/// The workers of a storage. Dropping it lets them finish what is queued, and closes the connections on threads of ours.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    /// Always there, until drop.
    connections: Option<Connections>,
}

struct Shared {
    max_live: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    urgent: VecDeque<Task>,
    ordinary: VecDeque<Task>,
    /// Every worker thread, with the task that it is running; none if it is idle, or about to look for a task.
    workers: HashMap<u64, Option<Running>>,
    next_id: u64,
    stragglers: Stragglers,
    is_closed: bool,
}

#[derive(Clone, Copy)]
struct Running {
    urgency: Urgency,
    deadline: Instant,
}

impl Running {
    fn is_stuck(&self, now: Instant) -> bool {
        self.deadline < now
    }
}

/// A call that has no result.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) error: Error,
    /// What was asked may have happened, or may yet happen.
    pub(crate) is_unknown: bool,
    /// The same on another connection may work.
    pub(crate) is_connection_fault: bool,
}

#[cfg(test)]
impl Failed {
    /// Nothing was asked.
    pub(crate) fn with(error: Error) -> Failed {
        Failed { error, is_unknown: false, is_connection_fault: false }
    }
}

impl From<Failed> for Error {
    fn from(failed: Failed) -> Error {
        failed.error
    }
}

impl State {
    /// The workers that aren't stuck.
    fn live(&self, now: Instant) -> usize {
        self.workers.values().filter(|running| running.is_none_or(|running| !running.is_stuck(now))).count()
    }

    /// How many ordinary tasks may be started now.
    fn ordinary_places(&self, now: Instant, max_live: usize) -> usize {
        let running = self.workers.values().flatten();
        let ordinary = running.filter(|running| running.urgency == Urgency::Ordinary && !running.is_stuck(now)).count();
        max_live.saturating_sub(1).max(1).saturating_sub(ordinary)
    }

    fn next_task(&mut self, now: Instant, max_live: usize) -> Option<Task> {
        if let Some(task) = self.urgent.pop_front() {
            return Some(task);
        }
        if self.ordinary_places(now, max_live) == 0 { None } else { self.ordinary.pop_front() }
    }

    /// Whether a further worker would find something to do, and may be started.
    fn may_add_worker(&mut self, now: Instant, max_live: usize) -> bool {
        let startable = self.urgent.len() + self.ordinary.len().min(self.ordinary_places(now, max_live));
        let (idle, live) = (self.workers.values().filter(|running| running.is_none()).count(), self.live(now));
        startable > idle && live < max_live && self.stragglers.may_add(self.workers.len() - live, now)
    }
}

impl Workers {
    pub(crate) fn new(connections: Connections, max_connections: u32) -> Workers {
        let shared = Shared { max_live: max_connections as usize, state: Mutex::default(), wake: Condvar::new() };
        Workers { shared: Arc::new(shared), connections: Some(connections) }
    }

    /// How long a call may take that opens a connection first and then waits for an answer for `answer`.
    pub(crate) fn longest_call(&self, answer: Duration) -> Duration {
        self.connections.as_ref().map(Connections::opening_time).unwrap_or_default() + answer
    }

    pub(crate) fn connections(&self) -> Option<&Connections> {
        self.connections.as_ref()
    }

    /// Makes a call and waits for its result until `deadline`.
    ///
    /// `call` runs up to `tries` times, each on another connection. `late` hears on the worker's thread of a value that
    /// came too late for the caller, with the session that it came from. A caller that gives up knows whether its call had
    /// been started.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        urgency: Urgency,
        deadline: Instant,
        most_tries: u32,
        action: impl Fn() -> String + Clone + Send + 'static,
        mut call: impl FnMut(&mut Session) -> Result<T, Fault> + Send + 'static,
        late: impl FnOnce(&mut Session, T) + Send + 'static,
    ) -> Result<T, Failed> {
        let started = Instant::now();
        let slot = Slot::new();
        let mut caller = Some((Reply(Arc::clone(&slot)), late));
        let (mut tries, mut is_unknown, describe) = (0, false, action.clone());
        let step = move |session: Result<&mut Session>, place: &Place<'_>| {
            let Some((reply, _)) = &caller else { return Next::Done };
            let result = match session {
                Err(error) => Err(Failed { error, is_unknown, is_connection_fault: false }),
                Ok(_) if !reply.start() && tries == 0 => return Next::Done,
                Ok(session) => {
                    tries += 1;
                    match contained(&mut call, session) {
                        Ok(value) => Ok((session, value)),
                        Err(fault) => {
                            is_unknown |= fault.is_outcome_unknown();
                            let is_connection_fault = fault.is_connection_fault();
                            if is_connection_fault {
                                session.mark_broken(&fault);
                                if tries < most_tries && reply.is_wanted() {
                                    return Next::TryAgain;
                                }
                            }
                            Err(Failed { error: fault.into_error(&describe), is_unknown, is_connection_fault })
                        }
                    }
                }
            };
            if let Some((reply, late)) = caller.take() {
                match result {
                    Ok((session, value)) => {
                        if let Err(Ok(value)) = reply.send(Ok(value), place) {
                            late(session, value);
                        }
                    }
                    // Nobody is interested in why nothing came too late.
                    Err(failed) => drop(reply.send(Err(failed), place)),
                }
            }
            Next::Done
        };
        self.submit(urgency, deadline, Box::new(step));
        loop {
            let look = Instant::now() + LOOK;
            match slot.wait(deadline.min(look), look < deadline) {
                Ok(answer) => return answer,
                Err(has_started) if deadline <= look => {
                    self.remove_expired();
                    let waiting_for = if has_started { "an answer" } else { NO_CONNECTION };
                    let error = Error::Timeout { action: action(), waiting_for, after: started.elapsed() };
                    return Err(Failed { error, is_unknown: has_started, is_connection_fault: false });
                }
                // A worker may have got stuck, and this call waits behind it.
                Err(_) => self.add_workers(),
            }
        }
    }

    /// Makes a call and goes on; `done` gets the result on the worker's thread, and `is_wanted` is asked before each try.
    pub(crate) fn send<T: 'static>(
        &self,
        urgency: Urgency,
        deadline: Instant,
        action: impl Fn() -> String + Send + 'static,
        is_wanted: impl Fn() -> bool + Send + 'static,
        mut call: impl FnMut(&mut Session) -> Result<T, Fault> + Send + 'static,
        done: impl Fn(Result<T>) + Send + 'static,
    ) {
        let step = move |session: Result<&mut Session>, _: &Place<'_>| {
            if !is_wanted() {
                return Next::Done;
            }
            done(session.and_then(|session| match contained(&mut call, session) {
                Ok(value) => Ok(value),
                Err(fault) => {
                    if fault.is_connection_fault() {
                        session.mark_broken(&fault);
                    }
                    Err(fault.into_error(&action))
                }
            }));
            Next::Done
        };
        self.submit(urgency, deadline, Box::new(step));
    }

    fn submit(&self, urgency: Urgency, deadline: Instant, step: Step) {
        let task = Task { urgency, deadline, step };
        let mut state = lock(&self.shared.state);
        match urgency {
            Urgency::Urgent => state.urgent.push_back(task),
            Urgency::Ordinary => state.ordinary.push_back(task),
        }
        drop(state);
        self.shared.wake.notify_one();
        self.add_workers();
    }

    /// Forgets the tasks that nobody waits for any more.
    fn remove_expired(&self) {
        let now = Instant::now();
        let mut state = lock(&self.shared.state);
        let take = |queue: &mut VecDeque<Task>| {
            let (expired, waiting) = std::mem::take(queue).into_iter().partition(|task| task.deadline < now);
            *queue = waiting;
            expired
        };
        let expired: [VecDeque<Task>; 2] = [take(&mut state.urgent), take(&mut state.ordinary)];
        // A task may hold the last handle of this storage.
        drop(state);
        drop(expired);
    }

    /// Starts workers for what is queued, up to the limit. Called when a task comes, and when one turns out to be stuck.
    fn add_workers(&self) {
        let Some(connections) = &self.connections else { return };
        loop {
            let mut state = lock(&self.shared.state);
            if !state.may_add_worker(Instant::now(), self.shared.max_live) {
                return;
            }
            let id = state.next_id;
            state.next_id += 1;
            state.workers.insert(id, None);
            drop(state);
            let (shared, connections) = (Arc::clone(&self.shared), connections.clone());
            let worker = Worker { id, shared, connections, connection: None };
            let started = thread::Builder::new()
                .name("lock-worker".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || user_code::call(|| worker.run()));
            if let Err(source) = started {
                // The worker was dropped with the closure, and with it its place among the workers.
                let mut state = lock(&self.shared.state);
                if state.workers.is_empty() {
                    let tasks: Vec<Task> = state.urgent.drain(..).collect();
                    let tasks: Vec<Task> = tasks.into_iter().chain(state.ordinary.drain(..)).collect();
                    drop(state);
                    for mut task in tasks {
                        let source = std::io::Error::new(source.kind(), source.to_string());
                        (task.step)(Err(Error::Thread { source }), &Place::default());
                    }
                }
                return;
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        lock(&self.shared.state).is_closed = true;
        self.shared.wake.notify_all();
        // The last owner closes the connections, and the client panics if that is done on a thread of an async runtime.
        if let Some(connections) = self.connections.take() {
            let connections = Arc::new(Mutex::new(Some(connections)));
            let closing = Arc::clone(&connections);
            let close = move || user_code::call(|| drop(lock(&closing).take()));
            if thread::Builder::new().name("lock-close".to_owned()).spawn(close).is_err() {
                std::mem::forget(lock(&connections).take());
            }
        }
    }
}

/// A worker's place among the workers, as the task that it runs sees it. A worker becomes idle just before its caller gets
/// the answer: with the next call the caller would else find it busy still, and start another worker.
#[derive(Default)]
struct Place<'a>(Option<(&'a Shared, u64)>);

impl Place<'_> {
    fn free(&self) {
        if let Some((shared, id)) = self.0 {
            lock(&shared.state).workers.insert(id, None);
        }
    }
}

struct Worker {
    id: u64,
    shared: Arc<Shared>,
    connections: Connections,
    connection: Option<CheckedOut>,
}

impl Worker {
    fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut state = lock(&shared.state);
        loop {
            let now = Instant::now();
            // Another worker replaced this one while it was stuck, or there is no more work.
            let is_surplus = state.live(now) > shared.max_live;
            let Some(task) = (if is_surplus { None } else { state.next_task(now, shared.max_live) }) else {
                // One that lost its connection leaves too, so that whoever is idle can start at once.
                if !is_surplus && !state.is_closed && self.connection.is_some() {
                    state = wait_until(&shared.wake, state, now + IDLE_TIME);
                    if now.elapsed() < IDLE_TIME || !state.urgent.is_empty() || !state.ordinary.is_empty() {
                        continue;
                    }
                }
                // Under the same mutex as the decision to leave: whoever submits a task next doesn't count on this worker.
                state.workers.remove(&self.id);
                break;
            };
            let running = Running { urgency: task.urgency, deadline: task.deadline };
            state.workers.insert(self.id, Some(running));
            drop(state);
            self.run_task(task, &Place(Some((&shared, self.id))));
            state = lock(&shared.state);
            state.workers.insert(self.id, None);
            if !state.ordinary.is_empty() {
                // This task's end may be what an ordinary task waited for, while this worker takes an urgent one.
                shared.wake.notify_one();
            }
        }
        drop(state);
        if let Some(connection) = self.connection.take() {
            connection.close();
        }
    }

    fn run_task(&mut self, mut task: Task, place: &Place<'_>) {
        if task.deadline < Instant::now() {
            // Nobody waits any more: its connection, which is a good one, is not touched.
            return;
        }
        loop {
            let mut connection = match self.connection.take() {
                Some(connection) => connection,
                None => match self.connections.check_out(task.deadline) {
                    Ok(connection) => connection,
                    Err(error) => {
                        (task.step)(Err(error), place);
                        return;
                    }
                },
            };
            let Some(session) = connection.usable() else { continue };
            let next = (task.step)(Ok(session), place);
            if task.deadline < Instant::now() {
                connection.close();
            } else {
                self.connection = Some(connection);
            }
            if next == Next::Done {
                return;
            }
        }
    }
}

impl Drop for Worker {
    /// After a panic.
    fn drop(&mut self) {
        lock(&self.shared.state).workers.remove(&self.id);
    }
}

/// The driver logs while it makes a call, and the logger is the user's.
fn contained<T>(call: &mut impl FnMut(&mut Session) -> Result<T, Fault>, session: &mut Session) -> Result<T, Fault> {
    user_code::call(|| call(session)).unwrap_or(Err(Fault::Panicked))
}

impl Fault {
    fn into_error(self, action: impl Fn() -> String) -> Error {
        match self {
            Fault::Postgres(source) => Error::Database { action: action(), source },
            // Each of the tries met another pooler: it can't happen twice, because the first one turned them off.
            Fault::Pooled => {
                Error::Timeout { action: action(), waiting_for: "a session of our own", after: Duration::ZERO }
            }
            Fault::Panicked => Error::Thread { source: std::io::Error::other("the logger panicked within a call") },
        }
    }
}

/// Where a caller waits for its answer.
struct Slot<T> {
    state: Mutex<SlotState<T>>,
    answered: Condvar,
}

struct SlotState<T> {
    answer: Option<Result<T, Failed>>,
    /// The call has a connection.
    has_started: bool,
    /// The caller has gone.
    is_abandoned: bool,
}

impl<T> Slot<T> {
    fn new() -> Arc<Slot<T>> {
        let state = SlotState { answer: None, has_started: false, is_abandoned: false };
        Arc::new(Slot { state: Mutex::new(state), answered: Condvar::new() })
    }

    /// The answer; or, if it hasn't come until then, whether the call has been started.
    fn wait(&self, until: Instant, comes_back: bool) -> Result<Result<T, Failed>, bool> {
        let mut state = lock(&self.state);
        loop {
            if let Some(answer) = state.answer.take() {
                return Ok(answer);
            }
            if Instant::now() >= until {
                // From here on the worker knows, under the same mutex, that its answer is too late.
                state.is_abandoned = !comes_back;
                return Err(state.has_started);
            }
            state = wait_until(&self.answered, state, until);
        }
    }
}

/// The worker's side of a slot.
struct Reply<T>(Arc<Slot<T>>);

impl<T> Reply<T> {
    /// Whether somebody still waits.
    fn is_wanted(&self) -> bool {
        !lock(&self.0.state).is_abandoned
    }

    /// The call is going to be made; false if nobody waits for it any more.
    fn start(&self) -> bool {
        let mut state = lock(&self.0.state);
        state.has_started = true;
        !state.is_abandoned
    }

    /// Answers, and frees the worker's place; or gives the result back if nobody waits for it any more.
    fn send(&self, result: Result<T, Failed>, place: &Place<'_>) -> Result<(), Result<T, Failed>> {
        let mut state = lock(&self.0.state);
        if state.is_abandoned {
            return Err(result);
        }
        place.free();
        state.answer = Some(result);
        self.0.answered.notify_one();
        Ok(())
    }
}

impl<T> Drop for Reply<T> {
    /// The caller of a call that ended in a panic shall not wait for the deadline. (Dropped otherwise, that has passed.)
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if thread::panicking() && state.answer.is_none() && !state.is_abandoned {
            let error = Error::Thread { source: std::io::Error::other("the worker thread panicked") };
            state.answer = Some(Err(Failed { error, is_unknown: state.has_started, is_connection_fault: false }));
            self.0.answered.notify_one();
        }
    }
}
