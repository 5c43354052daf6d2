//! The threads that make the database calls. Each call has a deadline, and each thread has a connection of its own.
//!
//! The blocking client can neither be interrupted nor be used on a thread of an async runtime. So no caller ever
//! touches the client: a call is a task in a queue. A worker opens its connection *first*, and then takes tasks for as
//! long as there are any. The caller waits for the answer or for its deadline, whichever comes first.
//!
//! The states of a worker, and so of its connection:
//!
//! | state | what the worker does | what comes next |
//! | --- | --- | --- |
//! | opening | connects and logs in | *idle*; *closed* if that failed, or if enough others are open |
//! | probing | asks whether its connection is alive, or prepares a statement | *idle*; *closed* if no answer comes |
//! | idle | waits for a task, a minute at most | *in a call*; *closed* after the minute, or if the connection broke |
//! | in a call | runs a task before its deadline | *idle*; *closed* if the connection broke; *late* |
//! | late | is stuck in a call | *idle* if the answer does come; *closed* if enough others are open, or if it broke |
//!
//! - A worker that is opening counts as one that will take a task soon, for a second. After that, another one may be
//!   opened beside it. A worker that is probing counts as such for a moment.
//! - A connection is asked whether it is alive because another one broke, or was silent.
//! - A call is late at its deadline, or when it has been silent for too long. Another connection may then be opened in
//!   place of its own. The caller of a late call has gone, or goes at the deadline if no answer comes.
//!
//! The states of a task:
//!
//! | state | what comes next |
//! | --- | --- |
//! | queued | *running*, urgent tasks first; *failed*; *forgotten* when its caller gives up |
//! | running | *answered*; *queued* again if its connection broke; copied beside itself when it is silent; *given up* |
//!
//! - A queued task fails with the error of an opening that began after the task came, if no connection works and none
//!   is being opened.
//! - A running task is given up by its caller at the deadline, or when it is overtaken. The caller then knows that the
//!   task had been started.
//!
//! What follows from this:
//!
//! - A caller returns at its deadline, whatever the server and the network do. It returns earlier only with an answer,
//!   with the cause of a failure, or overtaken: its call, made once, was silent while another connection answered.
//! - A connection that can't be opened costs nothing while others work. Tasks wait for those, and it is opened later.
//! - A late answer costs no connection. Neither does the end of another connection: those that may be dead are probed.
//! - A task that may be made twice ([`Tries::Several`]) is made again on another connection when its own breaks or is
//!   silent. Acquires and hand-overs are made once. Their callers release what may have happened, and try again.
//! - Urgent tasks (refresh, release) go first, and after eight of them in a row an ordinary one. With two connections
//!   or more, one is never given to an ordinary task.
//! - A connection that a pool of the caller's lends goes back after each task. Late calls count against the limit then.
//! - A thread that is stuck costs its stack and its socket until the kernel gives the socket up (`tcp_user_timeout`,
//!   keep-alives). The kernel doesn't do that while something acknowledges and never answers. For that case,
//!   [`StuckLimit`](crate::db::stuck::StuckLimit) bounds how many threads may be stuck without a success in between.
//! - No mutex is held while a task runs, or while a connection is opened or closed.
//!
//! Uses the rest of `db`, `error`, `user_code` and `sync`.

mod slot;
mod state;
mod task;
mod worker;

use std::collections::VecDeque;
use std::process;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use self::slot::{Answer, Failed};
use self::slot::{Slot, Waited};
use self::state::State;
use self::task::{Next, Task, call_step};
use self::worker::{WorkerEntry, add_workers, contained};
use crate::db::answer::Fault;
use crate::db::connections::Connections;
use crate::db::health::Health;
use crate::db::session::Session;
use crate::error::{Error, Result};
use crate::sync::{Condvar, Instant, Mutex, lock};

/// A worker that has been without work for so long ends, and closes its connection.
const IDLE_TIME: Duration = Duration::from_secs(60);
/// For how long a worker that opens its connection counts as one that will take a task soon.
const OPENING_TIME: Duration = Duration::from_secs(1);
/// For how long a worker that probes its connection, or prepares a statement, counts as one that will take a task soon.
const PROBING_TIME: Duration = Duration::from_millis(50);
/// A connection that doesn't answer a probe in time is dead. The limit is four times the time of the last answer, but
/// within these two.
const PROBING_LIMITS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(5)];
/// How often a call that takes long checks whether another worker may be started.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// The longest pause between attempts to open another connection beside those that work.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// After so many failures in a row to open a further connection, a line is logged: those that are open may be dead.
const WARN_AFTER: u32 = 3;
/// How many times one copy of a call is made when its connections break, the first time included.
pub(crate) const MAX_TRIES: u32 = 3;
/// A call that has had no answer for so long may be tried on another connection.
const SILENCE: Duration = Duration::from_secs(2);
/// The same for a refresh, which may have less time.
const SHORT_SILENCE: Duration = Duration::from_millis(300);
/// Enough for the client, the logger and TLS. Only the pages that are touched cost memory.
const STACK_BYTES: usize = 512 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Keeps or ends a hold.
    Urgent,
    /// Everything else.
    Ordinary,
}

/// How many times a call may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tries {
    /// Once, because a second time would have another effect. The call is given up when it has been silent for
    /// `silence` and another connection answers.
    Once { silence: Duration },
    /// Again when the connection broke, and beside the first one when that is silent. The first answer counts.
    Several,
}

/// The workers of a storage. When it is dropped, the workers finish what is queued, and close their connections on
/// their own threads.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    /// The process that has the worker threads. A fork of it has none of them.
    process: u32,
}

struct Shared {
    max_live: usize,
    connections: Connections,
    health: Arc<Health>,
    state: Mutex<State>,
    wake: Condvar,
}

impl Workers {
    pub(crate) fn new(connections: Connections, max_connections: u32, health: Arc<Health>) -> Workers {
        let (max_live, state, wake) = (max_connections as usize, Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { max_live, connections, health, state, wake });
        Workers { shared, process: process::id() }
    }

    /// How long a call may take that first opens a connection, and then waits for `answer` at most.
    pub(crate) fn longest_call(&self, answer: Duration) -> Duration {
        self.shared.connections.opening_time() + answer
    }

    pub(crate) fn connections(&self) -> &Connections {
        &self.shared.connections
    }

    /// Makes a call and waits for its result until `deadline`.
    ///
    /// A value that comes too late for the caller goes to `late`, on the worker's thread, with the session that it came
    /// from. A caller that gives up knows whether its call had been started.
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
            let step = call_step(&slot, tries, action.clone(), call.clone(), late.clone());
            self.submit(Task { urgency, submitted: Instant::now(), deadline, answer_time: silence, step });
        };
        submit();
        let (mut next_check, mut is_suspect) = (began + CHECK_INTERVAL, false);
        loop {
            next_check = next_check.min(deadline);
            let Waited { started, is_overtaken } = match slot.wait(next_check, next_check < deadline) {
                Ok(answer) => return answer,
                Err(waited) => waited,
            };
            if is_overtaken || next_check == deadline {
                return Err(self.give_up(&action, began, started.is_some()));
            }
            let now = Instant::now();
            next_check = now + CHECK_INTERVAL;
            if let Some(started) = started {
                let silent_at = started + silence;
                if silent_at > now {
                    next_check = next_check.min(silent_at);
                } else if !std::mem::replace(&mut is_suspect, true) {
                    self.suspect();
                    if tries == Tries::Several {
                        slot.expect_another();
                        submit();
                    } else {
                        self.ask_another_connection(&slot, deadline);
                    }
                }
            }
            // A worker may have got stuck, with this call queued behind it.
            self.add_workers();
        }
    }

    /// What a caller gets that has waited long enough.
    fn give_up(&self, action: &impl Fn() -> String, began: Instant, is_started: bool) -> Failed {
        self.remove_expired();
        self.add_workers();
        let waiting_for = if is_started { "an answer" } else { self.what_is_missing() };
        let error = Error::Timeout { action: action(), waiting_for, after: began.elapsed() };
        Failed { error, is_unknown: is_started, is_connection_fault: false }
    }

    /// For how long a call of several statements may be silent: each of them may be as slow as others are.
    pub(crate) fn longest_silence(&self) -> Duration {
        SILENCE.max(self.shared.health.answer_time() * 4)
    }

    /// Asks on another connection whether the server answers, because a call that is made once is silent.
    ///
    /// If another connection answers first, the call is given up. If the network is slow, that question is slow too:
    /// the call's own answer may yet come.
    fn ask_another_connection<T: Send + 'static>(&self, slot: &Arc<Slot<T>>, deadline: Instant) {
        let (wanted, overtaken) = (Arc::clone(slot), Arc::clone(slot));
        self.send(
            Urgency::Urgent,
            deadline,
            || "ask whether the server answers".to_owned(),
            move || wanted.is_wanted(),
            Session::server_time,
            move |result| {
                if result.is_ok() {
                    overtaken.overtake();
                }
            },
        );
    }

    /// Takes note that a refresh has been silent for `silence`.
    pub(crate) fn refresh_was_silent(&self, silence: Duration) {
        if silence >= SHORT_SILENCE.max(self.shared.health.answer_time() * 4) {
            self.suspect();
        }
    }

    /// A connection is silent: the others have to answer before they are used.
    fn suspect(&self) {
        self.shared.connections.suspect();
        self.shared.wake.notify_all();
    }

    /// Makes a call without waiting for its result. `done` gets the result on the worker's thread. The call is not made
    /// if `is_wanted` then says no.
    pub(crate) fn send<T: 'static>(
        &self,
        urgency: Urgency,
        deadline: Instant,
        action: impl Fn() -> String + Send + 'static,
        is_wanted: impl Fn() -> bool + Send + 'static,
        mut call: impl FnMut(&mut Session) -> Result<T, Fault> + Send + 'static,
        done: impl Fn(Result<T>) + Send + 'static,
    ) {
        let step = move |session: Result<&mut Session>, _: &WorkerEntry<'_>| {
            if !is_wanted() {
                return Next::Skipped;
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

    /// Forgets the tasks whose callers have gone.
    fn remove_expired(&self) {
        let now = Instant::now();
        let mut state = lock(&self.shared.state);
        let take = |queue: &mut VecDeque<Task>| {
            let (expired, waiting) = std::mem::take(queue).into_iter().partition(|task| task.deadline < now);
            *queue = waiting;
            expired
        };
        let expired: [VecDeque<Task>; 2] = [take(&mut state.urgent), take(&mut state.ordinary)];
        // A task may own the last handle of this storage: the mutex must be free when the task is dropped.
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

    /// Wakes a worker, and starts more of them for what is queued, up to the limit. Called when a task comes, and when
    /// one turns out to be late.
    pub(crate) fn add_workers(&self) {
        self.shared.wake.notify_one();
        add_workers(&self.shared);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // In a forked process, the mutex may be locked by a thread that exists only in the parent.
        if self.process == process::id() {
            lock(&self.shared.state).is_closed = true;
            self.shared.wake.notify_all();
        }
    }
}
