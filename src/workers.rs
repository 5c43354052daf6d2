//! The threads that make the database calls, each call with a deadline, each thread with a connection of its own.
//!
//! The blocking client can neither be interrupted nor be used on a thread of an async runtime, so no caller ever
//! touches it. A call is a task in a queue. A worker opens its connection *first*, and then takes tasks, for as long
//! as there are any. The caller waits until the answer or its deadline, whichever is first.
//!
//! What a worker, and so its connection, may be in:
//!
//! | state | what it does | what comes next |
//! | --- | --- | --- |
//! | opening | connects and logs in; counts as one to come for a second, then another may be opened beside it | *idle*; *closed* if that failed, or enough others are open |
//! | probing | asks whether its connection is alive, because another one broke, or was silent; or prepares a statement; counts as one to come for a moment | *idle*; *closed* if there is no answer |
//! | idle | waits for a task, a minute at most | *in a call*; *closed* after that minute, or if it turns out to be broken |
//! | in a call | runs a task before its deadline | *idle*; *closed* if the connection broke; *late* when the deadline comes |
//! | late | is stuck in a call whose caller has gone; another one may be opened in its place | *idle* when the answer comes after all; *closed* if enough others are open, or it broke |
//!
//! And a task:
//!
//! | state | what comes next |
//! | --- | --- |
//! | queued | *running*, urgent ones first; *failed* with the error of an opening that began after it, if no connection works and none is being opened; *forgotten* when its caller gives up |
//! | running | *answered*; *queued* again if its connection broke; copied beside itself when it is silent; given up by its caller at the deadline, or when it is outrun, and then it is known that it had been started |
//!
//! So:
//!
//! - A caller is back at its deadline, whatever the server and the network do, and not before it, unless it has an
//!   answer or the cause, or its call, made once, was silent while another connection answered.
//! - A connection that can't be opened costs nothing while others work: tasks wait for those, and it is opened later.
//! - An answer that comes late costs no connection, and neither does the end of another one: those that may be dead
//!   are asked.
//! - A task that may be made twice ([`Tries::Several`]) is made again on another connection when its own breaks or is
//!   silent. Acquires and hand-overs are made once; their callers release what may have happened, and try anew.
//! - Urgent tasks (refresh, release) go first, and with two connections or more one is never given to another task.
//! - A thread that is stuck costs its stack and its socket until the kernel gives the socket up (`tcp_user_timeout`,
//!   keep-alives). Where that doesn't happen, because something acknowledges and never answers, [`Stragglers`] bounds
//!   how many there may be without a success in between.
//! - No mutex is held while a task runs, or a connection is opened or closed.

use std::collections::{HashMap, VecDeque};
use std::process;
use std::sync::Arc;
use std::time::Duration;

use crate::answer::Fault;
use crate::connections::Connections;
use crate::error::{Error, Result};
use crate::session::Session;
use crate::stragglers::{self, Stragglers};
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};
use crate::trouble::Trouble;
use crate::user_code::{self, note};

/// A worker without work ends after this, and closes its connection.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// For how long a worker that opens its connection counts as one that is about to take a task.
const OPENING_TIME: Duration = Duration::from_secs(1);
/// The same of one that asks whether its connection is alive, or prepares a statement.
const PROBING_TIME: Duration = Duration::from_millis(50);
/// A connection that doesn't answer such a question for so long is dead; or for four times the time of the last answer.
const PROBING_LIMITS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];
/// How often a call that takes long looks whether another worker may be started.
pub(crate) const LOOK: Duration = Duration::from_millis(250);
/// The longest pause between attempts to open another connection beside those that work.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// That no further connection can be opened is told after so many failures in a row: those that are there may be dead.
const TOLD_AFTER: u32 = 3;
/// How often one copy of a call is made when its connections break, the first time included.
pub(crate) const MAX_TRIES: u32 = 3;
/// After so long without an answer a call may be tried on another connection.
const SILENCE: Duration = Duration::from_secs(2);
/// The same of a refresh, which may have less time.
const SHORT_SILENCE: Duration = Duration::from_millis(300);
/// Enough for the client, the logger and TLS; only what is touched counts.
const STACK_BYTES: usize = 512 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Keeps or ends a hold.
    Urgent,
    /// Everything else.
    Ordinary,
}

/// How often a call may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tries {
    /// What it does twice is not what it does once. Given up when it has been silent for so long, and another
    /// connection answers.
    Once { silence: Duration },
    /// Again where the connection broke, and beside the first one where that is silent: whichever is answered first.
    Several,
}

/// What a task is given: a session, or why there is none, and the worker that runs it. It answers whether to try again with
/// another session.
type Step = Box<dyn FnMut(Result<&mut Session>, &Place<'_>) -> Next + Send>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    Done,
    /// Nobody wanted it any more, and the session was not used.
    NotAsked,
    TryAgain,
}

struct Task {
    urgency: Urgency,
    submitted: Instant,
    deadline: Instant,
    /// When it has run for so long, another worker may be started in its worker's place.
    answer_time: Duration,
    step: Step,
}

/// The workers of a storage. Dropping it lets them finish what is queued, and closes the connections on threads of ours.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    /// Where the workers are.
    process: u32,
}

struct Shared {
    max_live: usize,
    connections: Connections,
    trouble: Arc<Trouble>,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    urgent: VecDeque<Task>,
    ordinary: VecDeque<Task>,
    workers: HashMap<u64, Doing>,
    next_id: u64,
    stragglers: Stragglers,
    /// When a task was answered last.
    last_success: Option<Instant>,
    /// Why connections could not be opened, while others were being opened.
    unheard: Vec<Unheard>,
    /// When the last one was begun to be opened.
    last_opening: Option<Instant>,
    /// How often in a row no connection could be opened beside those that work, and when to try again.
    failures: u32,
    open_again_at: Option<Instant>,
    is_closed: bool,
}

/// What a worker does.
#[derive(Clone, Copy)]
enum Doing {
    Opening { since: Instant },
    Idle,
    Probing { since: Instant },
    Call { urgency: Urgency, since: Instant, late_at: Instant },
}

/// A connection could not be opened, in an attempt that `began` then. That is for a task that waited for it, unless
/// one of those succeeds that were being opened when it `failed`.
struct Unheard {
    error: Error,
    began: Instant,
    failed: Instant,
}

/// How many workers there are of each kind.
#[derive(Default)]
struct Count {
    opening: usize,
    /// Those that have been opening theirs for long.
    slow: u32,
    idle: usize,
    in_calls: usize,
    in_ordinary_calls: usize,
    /// Since the last success.
    stuck: usize,
}

impl Count {
    /// Those with a connection that works, as far as is known.
    fn open(&self) -> usize {
        self.idle + self.in_calls
    }
}

/// What came of a call.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    pub(crate) value: T,
    /// It was made more than once, and may have taken effect before the one that was answered.
    pub(crate) is_repeated: bool,
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
    fn count(&self, now: Instant) -> Count {
        let mut count = Count::default();
        for doing in self.workers.values() {
            let (since, is_stuck) = match *doing {
                Doing::Idle => {
                    count.idle += 1;
                    continue;
                }
                Doing::Probing { since } => {
                    let age = now.duration_since(since);
                    count.opening += usize::from(age < PROBING_TIME);
                    (since, age >= OPENING_TIME)
                }
                Doing::Opening { since } => {
                    let is_old = now.duration_since(since) >= OPENING_TIME;
                    count.opening += usize::from(!is_old);
                    count.slow += u32::from(is_old);
                    (since, is_old)
                }
                Doing::Call { urgency, since, late_at } => {
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

    /// How many tasks could be started now.
    fn startable(&self, count: &Count, max_live: usize) -> usize {
        // Where the server lets fewer in, one of those is kept free.
        let connections = if self.failures > 0 { count.open() } else { max_live };
        let ordinary_places = connections.saturating_sub(1).max(1).saturating_sub(count.in_ordinary_calls);
        self.urgent.len() + self.ordinary.len().min(ordinary_places)
    }

    fn next_task(&mut self, now: Instant, max_live: usize) -> Option<Task> {
        if self.startable(&self.count(now), max_live) == 0 {
            return None;
        }
        self.urgent.pop_front().or_else(|| self.ordinary.pop_front())
    }

    /// Puts a task back where it came from.
    fn put_back(&mut self, task: Task) {
        match task.urgency {
            Urgency::Urgent => self.urgent.push_front(task),
            Urgency::Ordinary => self.ordinary.push_front(task),
        }
    }

    /// Takes the first task out that was there before `began`.
    fn take_submitted_before(&mut self, began: Instant) -> Option<Task> {
        let take = |queue: &mut VecDeque<Task>| {
            let at = queue.iter().position(|task| task.submitted <= began)?;
            queue.remove(at)
        };
        take(&mut self.urgent).or_else(|| take(&mut self.ordinary))
    }

    /// Whether a further worker would find something to do, and may be started.
    fn may_add_worker(&mut self, now: Instant, max_live: usize) -> bool {
        let count = self.count(now);
        let opening = count.opening + self.unheard.len();
        let is_needed = self.startable(&count, max_live) > count.idle + opening;
        let has_room = count.open() + opening < max_live;
        let is_due = count.open() == 0 || self.open_again_at.is_none_or(|at| at <= now);
        // Beside those that take long, which a slow network makes them do, more and more rarely.
        let pause = OPENING_TIME * count.slow.saturating_mul(count.slow);
        let is_due = is_due && self.last_opening.is_none_or(|last| now.duration_since(last) >= pause);
        // Of those that are stuck for ever, with successes in between, there may be many: then one more from time to
        // time.
        let are_many = self.workers.len() >= max_live + stragglers::MAX;
        let stuck = if are_many { count.stuck.max(stragglers::AT_ONCE) } else { count.stuck };
        is_needed && has_room && is_due && self.stragglers.may_add(stuck, now)
    }

    /// The tasks that get an error now, as no connection works, and none of those succeeded that were being opened.
    fn failed_tasks(&mut self, now: Instant) -> Vec<(Task, Error)> {
        if self.unheard.is_empty() {
            return Vec::new();
        }
        if self.count(now).open() > 0 {
            self.unheard.clear();
            return Vec::new();
        }
        let opening = self.workers.values().filter_map(|doing| match doing {
            Doing::Opening { since } if now.duration_since(*since) < OPENING_TIME => Some(*since),
            _ => None,
        });
        let first = opening.min();
        let is_over = |it: &Unheard| {
            // After a silence the others, which began later, are likely to be as silent.
            it.failed.duration_since(it.began) >= OPENING_TIME || first.is_none_or(|first| first > it.failed)
        };
        let (over, unheard): (Vec<_>, _) = std::mem::take(&mut self.unheard).into_iter().partition(is_over);
        self.unheard = unheard;
        let task_for = |it: Unheard| self.take_submitted_before(it.began).map(|task| (task, it.error));
        over.into_iter().filter_map(task_for).collect()
    }
}

impl Workers {
    pub(crate) fn new(connections: Connections, max_connections: u32, trouble: Arc<Trouble>) -> Workers {
        let (max_live, state, wake) = (max_connections as usize, Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { max_live, connections, trouble, state, wake });
        Workers { shared, process: process::id() }
    }

    /// How long a call may take that opens a connection first and then waits for an answer for `answer`.
    pub(crate) fn longest_call(&self, answer: Duration) -> Duration {
        self.shared.connections.opening_time() + answer
    }

    pub(crate) fn connections(&self) -> &Connections {
        &self.shared.connections
    }

    /// Makes a call and waits for its result until `deadline`.
    ///
    /// `late` hears on the worker's thread of a value that came too late for
    /// the caller, with the session that it came from. A caller that gives up knows whether its call had been started.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        urgency: Urgency,
        deadline: Instant,
        tries: Tries,
        action: impl Fn() -> String + Clone + Send + 'static,
        call: impl FnMut(&mut Session) -> Result<T, Fault> + Clone + Send + 'static,
        late: impl FnOnce(&mut Session, T) + Clone + Send + 'static,
    ) -> Result<Answer<T>, Failed> {
        let began = Instant::now();
        let slot = Slot::new();
        let silence = match tries {
            Tries::Once { silence } => silence,
            Tries::Several => SILENCE.min(deadline.saturating_duration_since(began) / 2),
        };
        let submit = || {
            let step = step(&slot, tries, action.clone(), call.clone(), late.clone());
            self.submit(Task { urgency, submitted: Instant::now(), deadline, answer_time: silence, step });
        };
        submit();
        let (mut look, mut is_doubted) = (began + LOOK, false);
        loop {
            look = look.min(deadline);
            let Waited { started, is_outrun } = match slot.wait(look, look < deadline) {
                Ok(answer) => return answer,
                Err(waited) => waited,
            };
            if is_outrun || look == deadline {
                self.remove_expired();
                self.add_workers();
                let waiting_for = if started.is_some() { "an answer" } else { self.what_is_missing() };
                let error = Error::Timeout { action: action(), waiting_for, after: began.elapsed() };
                return Err(Failed { error, is_unknown: started.is_some(), is_connection_fault: false });
            }
            let now = Instant::now();
            look = now + LOOK;
            if let Some(started) = started {
                let silent_at = started + silence;
                if silent_at > now {
                    look = look.min(silent_at);
                } else if !std::mem::replace(&mut is_doubted, true) {
                    self.doubt();
                    if tries == Tries::Several {
                        slot.expect_another();
                        submit();
                    } else {
                        self.race(&slot, deadline);
                    }
                }
            }
            // A worker may have got stuck, and this call waits behind it.
            self.add_workers();
        }
    }

    /// How long a call of several statements may be silent, each of which may be as slow as others are.
    pub(crate) fn longest_silence(&self) -> Duration {
        SILENCE.max(self.shared.trouble.last_took() * 4)
    }

    /// A call is silent. Where the network is slow, it is not alone with that, and its answer is yet to come. Where
    /// another connection answers first, this one is given up.
    fn race<T: Send + 'static>(&self, slot: &Arc<Slot<T>>, deadline: Instant) {
        let (wanted, outrun) = (Arc::clone(slot), Arc::clone(slot));
        self.send(
            Urgency::Urgent,
            deadline,
            || "ask whether the server answers".to_owned(),
            move || !lock(&wanted.state).is_over,
            Session::server_time,
            move |result| {
                if result.is_ok() {
                    outrun.outrun();
                }
            },
        );
    }

    /// A refresh has been silent for so long.
    pub(crate) fn refresh_was_silent(&self, silence: Duration) {
        if silence >= SHORT_SILENCE.max(self.shared.trouble.last_took() * 4) {
            self.doubt();
        }
    }

    /// A connection is silent: the others have to answer before they are used.
    fn doubt(&self) {
        self.shared.connections.doubt();
        self.shared.wake.notify_all();
    }

    /// Makes a call and goes on; `done` gets the result on the worker's thread, and `is_wanted` is asked before.
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
                return Next::NotAsked;
            }
            done(session.and_then(|session| contained(session, &mut call).map_err(|fault| fault.into_error(&action))));
            Next::Done
        };
        let (submitted, step) = (Instant::now(), Box::new(step));
        self.submit(Task { urgency, submitted, deadline, answer_time: Duration::MAX, step });
    }

    fn submit(&self, task: Task) {
        let mut state = lock(&self.shared.state);
        match task.urgency {
            Urgency::Urgent => state.urgent.push_back(task),
            Urgency::Ordinary => state.ordinary.push_back(task),
        }
        drop(state);
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

    /// What a call that was not started waits for.
    fn what_is_missing(&self) -> &'static str {
        let count = lock(&self.shared.state).count(Instant::now());
        if count.open() > 0 {
            "a connection to be free (max_connections)"
        } else if count.stuck > 0 {
            "a connection: those before are stuck"
        } else {
            "PostgreSQL to let us in"
        }
    }

    /// Wakes a worker or starts more of them for what is queued, up to the limit. Called when a task comes, and when
    /// one turns out to be late.
    pub(crate) fn add_workers(&self) {
        self.shared.wake.notify_one();
        add_workers(&self.shared);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // In a fork a thread that is no more may have the mutex.
        if self.process == process::id() {
            lock(&self.shared.state).is_closed = true;
            self.shared.wake.notify_all();
        }
    }
}

/// What runs a call on a worker, and answers its caller.
fn step<T: Send + 'static>(
    slot: &Arc<Slot<T>>,
    tries: Tries,
    action: impl Fn() -> String + Send + 'static,
    mut call: impl FnMut(&mut Session) -> Result<T, Fault> + Send + 'static,
    late: impl FnOnce(&mut Session, T) + Send + 'static,
) -> Step {
    let mut caller = Some((Reply(Arc::clone(slot)), late));
    let (mut tried, mut is_unknown) = (0, false);
    Box::new(move |session, place| {
        let Some((reply, _)) = &caller else { return Next::NotAsked };
        let result = match session {
            Err(error) => Err(Failed { error, is_unknown, is_connection_fault: false }),
            Ok(session) => {
                if !reply.start() {
                    return Next::NotAsked;
                }
                tried += 1;
                match contained(session, &mut call) {
                    Ok(value) => Ok((session, value)),
                    Err(fault) => {
                        is_unknown |= fault.is_outcome_unknown();
                        let is_connection_fault = fault.is_connection_fault();
                        let may_again = is_connection_fault && tries == Tries::Several && tried < MAX_TRIES;
                        if may_again && reply.is_wanted() {
                            return Next::TryAgain;
                        }
                        Err(Failed { error: fault.into_error(&action), is_unknown, is_connection_fault })
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
    })
}

/// Starts workers for what is queued, up to the limit.
fn add_workers(shared: &Arc<Shared>) {
    loop {
        let mut state = lock(&shared.state);
        let now = Instant::now();
        let failed = state.failed_tasks(now);
        if !failed.is_empty() {
            drop(state);
            failed.into_iter().for_each(|(mut task, error)| _ = (task.step)(Err(error), &Place::default()));
            continue;
        }
        if !state.may_add_worker(now, shared.max_live) {
            return;
        }
        state.last_opening = Some(now);
        let id = state.next_id;
        state.next_id += 1;
        state.workers.insert(id, Doing::Opening { since: now });
        drop(state);
        let worker = Worker { id, shared: Arc::clone(shared) };
        let started = thread::Builder::new()
            .name("lock-worker".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || user_code::call(|| worker.run()));
        if let Err(source) = started {
            // The worker was dropped with the closure, and with it its place among the workers.
            opening_failed(shared, Error::Thread { source }, now);
        }
    }
}

/// No connection could be opened, in an attempt that began then.
fn opening_failed(shared: &Shared, error: Error, began: Instant) {
    let mut state = lock(&shared.state);
    let now = Instant::now();
    let open = state.count(now).open();
    if open == 0 {
        state.unheard.push(Unheard { error, began, failed: now });
        return;
    }
    state.failures = state.failures.saturating_add(1);
    state.open_again_at = Some(now + (LOOK * (1 << state.failures.min(8))).min(LONGEST_PAUSE));
    let is_to_be_told = state.failures == TOLD_AFTER;
    drop(state);
    if is_to_be_told {
        note!(warn, "no more than {open} connections could be opened, going on with them: {}", error.chain());
    } else {
        note!(debug, "no further connection could be opened: {}", error.chain());
    }
}

/// A worker's place among the workers, as the task that it runs sees it. A worker becomes idle just before its caller gets
/// the answer: with the next call the caller would else find it busy still, and start another worker.
#[derive(Default)]
struct Place<'a>(Option<(&'a Shared, u64)>);

impl Place<'_> {
    fn free(&self) {
        if let Some((shared, id)) = self.0 {
            lock(&shared.state).workers.insert(id, Doing::Idle);
        }
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
        // Its end may have made room, or left a task behind.
        add_workers(&self.shared);
    }

    /// Runs tasks for as long as the session can be used, and there may be any.
    fn serve(&self, mut session: Session) {
        let shared = &*self.shared;
        let mut state = lock(&shared.state);
        let mut idle_since = Instant::now();
        (state.failures, state.open_again_at) = (0, None);
        loop {
            state.workers.insert(self.id, Doing::Idle);
            let now = Instant::now();
            if session.is_doubted() {
                state.workers.insert(self.id, Doing::Probing { since: now });
                drop(state);
                let [shortest, longest] = PROBING_LIMITS;
                let patience = (shared.trouble.last_took() * 4).clamp(shortest, longest);
                let is_alive = contained(&mut session, |session| Ok(session.prove(patience)));
                state = lock(&shared.state);
                if !is_alive.unwrap_or(false) {
                    break;
                }
                state.workers.insert(self.id, Doing::Idle);
            }
            let now = Instant::now();
            // Others were opened while this one was stuck, or took long to be opened.
            if state.count(now).open() > shared.max_live {
                break;
            }
            let Some(task) = state.next_task(now, shared.max_live) else {
                if session.has_to_prepare() {
                    state.workers.insert(self.id, Doing::Probing { since: now });
                    drop(state);
                    // What is wrong with it, if that isn't the connection, the next call finds.
                    drop(contained(&mut session, Session::prepare));
                    state = lock(&shared.state);
                    continue;
                }
                if !session.is_usable() {
                    break;
                }
                let until = idle_since + IDLE_TIME;
                if state.is_closed || now >= until {
                    break;
                }
                state = wait_until(&shared.wake, state, until);
                continue;
            };
            if task.deadline < now {
                // Nobody waits any more. It may hold the last handle of this storage.
                drop(state);
                user_code::call(|| drop(task));
                state = lock(&shared.state);
                continue;
            }
            let late_at = now.checked_add(task.answer_time).map_or(task.deadline, |at| at.min(task.deadline));
            state.workers.insert(self.id, Doing::Call { urgency: task.urgency, since: now, late_at });
            drop(state);
            let is_ready = contained(&mut session, |session| Ok(session.is_ready(now.duration_since(idle_since))));
            let mut task = task;
            let next = if is_ready.unwrap_or(false) {
                (task.step)(Ok(&mut session), &Place(Some((shared, self.id))))
            } else {
                Next::TryAgain
            };
            let is_usable = session.is_usable();
            let is_answered = next == Next::Done && is_usable;
            if is_answered {
                shared.trouble.answered(now.elapsed());
                session.trust();
            }
            // What it owns goes without the mutex, unless it is put back.
            let unfinished = (next == Next::TryAgain).then_some(task);
            state = lock(&shared.state);
            if is_answered {
                state.last_success = Some(Instant::now());
            }
            if let Some(task) = unfinished {
                state.put_back(task);
                // Those that are idle look whether they are alive.
                shared.wake.notify_all();
            }
            if !is_usable {
                break;
            }
            if !state.ordinary.is_empty() {
                // This task's end may be what an ordinary task waited for, while this worker takes an urgent one.
                shared.wake.notify_one();
            }
            idle_since = Instant::now();
        }
        // Under the same mutex as the decision to leave: whoever submits a task next doesn't count on this worker.
        state.workers.remove(&self.id);
        drop(state);
        // Whoever was woken for a task that this one has put back, or could have taken, was this one.
        shared.wake.notify_one();
        user_code::call(|| drop(session));
    }
}

impl Drop for Worker {
    /// Also after a panic, and where no thread could be started.
    fn drop(&mut self) {
        lock(&self.shared.state).workers.remove(&self.id);
    }
}

/// Does something on a session. The driver logs while it makes a call, and the logger is the user's.
fn contained<T>(session: &mut Session, call: impl FnOnce(&mut Session) -> Result<T, Fault>) -> Result<T, Fault> {
    let result = user_code::call(|| call(session)).unwrap_or(Err(Fault::Panicked));
    if let Err(fault) = &result
        && fault.is_connection_fault()
    {
        session.mark_broken(fault);
    }
    result
}

impl Fault {
    pub(crate) fn into_error(self, action: impl Fn() -> String) -> Error {
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
    /// How many may yet answer.
    expected: u32,
    /// Why those that will not didn't, as the first of them said.
    failed: Option<Failed>,
    /// Since when the call has a connection, and how often it was made.
    started: Option<Instant>,
    starts: u32,
    /// Another connection has answered meanwhile.
    is_outrun: bool,
    /// The caller has gone, or has its answer.
    is_over: bool,
}

/// What a caller knows that has no answer yet.
struct Waited {
    /// Since when the call has been running.
    started: Option<Instant>,
    is_outrun: bool,
}

impl<T> Slot<T> {
    fn new() -> Arc<Slot<T>> {
        let state = SlotState {
            answer: None,
            expected: 1,
            failed: None,
            started: None,
            starts: 0,
            is_outrun: false,
            is_over: false,
        };
        Arc::new(Slot { state: Mutex::new(state), answered: Condvar::new() })
    }

    /// The call is made once more.
    fn expect_another(&self) {
        lock(&self.state).expected += 1;
    }

    /// Another connection has answered: the caller shall wait no longer.
    fn outrun(&self) {
        lock(&self.state).is_outrun = true;
        self.answered.notify_one();
    }

    /// The answer, if it comes until then.
    fn wait(&self, until: Instant, comes_back: bool) -> Result<Result<Answer<T>, Failed>, Waited> {
        let mut state = lock(&self.state);
        loop {
            if let Some(answer) = state.answer.take() {
                let is_repeated = state.starts > 1;
                return Ok(answer.map(|value| Answer { value, is_repeated }));
            }
            if state.is_outrun || Instant::now() >= until {
                // From here on the worker knows, under the same mutex, that its answer is too late.
                state.is_over |= state.is_outrun || !comes_back;
                return Err(Waited { started: state.started, is_outrun: state.is_outrun });
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
        !lock(&self.0.state).is_over
    }

    /// The call is going to be made; false if nobody waits for it any more.
    fn start(&self) -> bool {
        let mut state = lock(&self.0.state);
        if !state.is_over {
            state.started.get_or_insert_with(Instant::now);
            state.starts += 1;
        }
        !state.is_over
    }

    /// Answers, and frees the worker's place; or gives the result back if nobody waits for it any more.
    fn send(&self, result: Result<T, Failed>, place: &Place<'_>) -> Result<(), Result<T, Failed>> {
        let mut state = lock(&self.0.state);
        if state.is_over {
            return Err(result);
        }
        place.free();
        state.expected = state.expected.saturating_sub(1);
        match result {
            Ok(value) => state.answer = Some(Ok(value)),
            Err(failed) => {
                let is_unknown = failed.is_unknown;
                let first = state.failed.take().unwrap_or(failed);
                let failed = Failed { is_unknown: first.is_unknown || is_unknown, ..first };
                if state.expected > 0 {
                    state.failed = Some(failed);
                    return Ok(());
                }
                state.answer = Some(Err(failed));
            }
        }
        state.is_over = true;
        self.0.answered.notify_one();
        Ok(())
    }
}

impl<T> Drop for Reply<T> {
    /// The caller of a call that ended in a panic shall not wait for the deadline. (Dropped otherwise, that has passed.)
    fn drop(&mut self) {
        if thread::panicking() {
            let is_unknown = lock(&self.0.state).started.is_some();
            let error = Error::Thread { source: std::io::Error::other("the worker thread panicked") };
            drop(self.send(Err(Failed { error, is_unknown, is_connection_fault: false }), &Place::default()));
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    fn two_copies() -> (Arc<Slot<u32>>, [Reply<u32>; 2]) {
        let slot = Slot::new();
        slot.expect_another();
        let copies = [0, 1].map(|_| Reply(Arc::clone(&slot)));
        (slot, copies)
    }

    fn failed() -> Failed {
        Failed::with(Error::Forked)
    }

    #[test]
    fn an_answer_says_whether_the_call_was_made_more_than_once() {
        let (slot, [first, second]) = two_copies();
        assert!(first.start() && second.start());
        // Also that to the copy which was made first: it may have come to the server after the other one.
        first.send(Ok(7), &Place::default()).unwrap();
        let Ok(Ok(answer)) = slot.wait(Instant::now(), false) else { panic!("no answer") };
        assert!(answer.value == 7 && answer.is_repeated);
        assert!(matches!(second.send(Ok(8), &Place::default()), Err(Ok(8))), "nobody waits for it any more");
        assert!(!second.start() && !second.is_wanted());
    }

    #[test]
    fn an_error_of_one_copy_waits_for_what_comes_of_the_other() {
        for comes in [Ok(7), Err(failed())] {
            let (slot, [first, second]) = two_copies();
            assert!(first.start());
            first.send(Err(Failed { is_unknown: true, ..failed() }), &Place::default()).unwrap();
            assert!(slot.wait(Instant::now(), true).is_err(), "the other one may yet be answered");
            let is_ok = comes.is_ok();
            second.send(comes, &Place::default()).unwrap();
            match slot.wait(Instant::now(), false) {
                Ok(Ok(answer)) => assert!(is_ok && answer.value == 7),
                Ok(Err(failed)) => assert!(!is_ok && failed.is_unknown, "what one of them asked may have happened"),
                Err(_) => panic!("no answer"),
            }
        }
    }

    #[test]
    fn who_is_outrun_gives_up_and_its_answer_is_too_late() {
        let slot = Slot::new();
        let reply = Reply(Arc::clone(&slot));
        assert!(reply.start());
        slot.outrun();
        let waited = slot.wait(Instant::now() + Duration::from_secs(9), true).expect_err("no answer");
        assert!(waited.is_outrun && waited.started.is_some());
        assert!(matches!(reply.send(Ok(7), &Place::default()), Err(Ok(7))));
    }
}
