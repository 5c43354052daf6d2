//! What every client saw: each call with the instants just before and just after it, on the machine's monotonic
//! clock, which all processes share.
//!
//! A worker writes a line before a call and one after it, each with one `write`, so that SIGKILL loses nothing that was
//! complete. A call without its second line may have happened, at any time after its start.

use std::collections::HashMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Nanoseconds on the machine's monotonic clock.
pub type Nanos = u64;

pub fn now() -> Nanos {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the monotonic clock");
    Duration::from(time).as_nanos().try_into().expect("a clock that began at boot")
}

pub fn nanos(duration: Duration) -> Nanos {
    duration.as_nanos().try_into().unwrap_or(Nanos::MAX)
}

/// How a lock is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    Lock,
    TryLock,
    TryLockFor,
    TryLockUntil,
}

/// How a hold is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    Unlock,
    Drop,
    /// The guard is forgotten, and the process ends soon.
    Abandon,
    /// As part of a transaction that writes, and is committed or rolled back.
    UnlockIn {
        id: u64,
        commits: bool,
    },
}

/// How a write is made to depend on the hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fence {
    /// By `transaction`, which fences last.
    Transaction,
    First,
    Last,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    ReadCommitted,
    RepeatableRead,
    Serializable,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    Open,
    Acquire {
        lock: String,
        how: How,
        /// What its hold's lease is.
        lease: Nanos,
    },
    /// Asks `is_held` and `remaining`.
    Look {
        lock: String,
        version: i64,
    },
    /// Writes to the register of the lock, with the version, if the hold lasts until then.
    Write {
        lock: String,
        version: i64,
        id: u64,
        fence: Fence,
        /// As long as nobody else has the lock.
        is_past_deadline: bool,
        level: Level,
    },
    Release {
        lock: String,
        version: i64,
        how: Ending,
    },
}

impl Call {
    pub fn lock(&self) -> Option<&str> {
        match self {
            Call::Open => None,
            Call::Acquire { lock, .. }
            | Call::Look { lock, .. }
            | Call::Write { lock, .. }
            | Call::Release { lock, .. } => Some(lock),
        }
    }

    /// What it writes, if it does.
    pub fn write_id(&self) -> Option<u64> {
        match self {
            Call::Write { id, .. } | Call::Release { how: Ending::UnlockIn { id, commits: true }, .. } => Some(*id),
            _ => None,
        }
    }

    /// The hold that it is about.
    pub fn version(&self) -> Option<i64> {
        match self {
            Call::Open | Call::Acquire { .. } => None,
            Call::Look { version, .. } | Call::Write { version, .. } | Call::Release { version, .. } => Some(*version),
        }
    }
}

/// What kind of error it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    Connect,
    Timeout,
    /// With the SQLSTATE, if the server said anything.
    Database(Option<String>),
    LeaseLost,
    Fence,
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Taken(i64),
    Busy,
    /// The hold is trusted for so long from now.
    Held(Nanos),
    NotHeld,
    Done,
    /// As it was meant to.
    RolledBack,
    Failed(Failure, String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Event {
    Begin(Call, Nanos),
    /// What the call is writing is not committed yet.
    Uncommitted,
    End(Outcome),
    /// What was left when everything had been dropped: threads by name, and sockets.
    Left(Vec<String>, usize),
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    at: Nanos,
    thread: u32,
    event: Event,
}

/// Writes a process's history.
pub struct Recorder(File);

impl Recorder {
    pub fn new(path: &Path) -> Recorder {
        Recorder(OpenOptions::new().create(true).append(true).open(path).expect("open the history"))
    }

    /// Makes a call, which should take no longer than `limit`.
    pub fn call<T>(
        &self,
        thread: u32,
        call: Call,
        limit: Duration,
        run: impl FnOnce() -> T,
        outcome: impl FnOnce(&T) -> Outcome,
    ) -> T {
        self.write(thread, Event::Begin(call, nanos(limit)));
        let value = run();
        self.write(thread, Event::End(outcome(&value)));
        value
    }

    /// The call that a thread is in has yet to ask for its commit.
    pub fn uncommitted(&self, thread: u32) {
        self.write(thread, Event::Uncommitted);
    }

    pub fn left(&self, threads: Vec<String>, sockets: usize) {
        self.write(0, Event::Left(threads, sockets));
    }

    fn write(&self, thread: u32, event: Event) {
        // The line is made after the clock was read, and before a call: that is the safe side at both ends.
        let mut line = serde_json::to_vec(&Line { at: now(), thread, event }).expect("a line");
        line.push(b'\n');
        (&self.0).write_all(&line).expect("write the history");
    }
}

/// A call as it was seen.
#[derive(Clone, Debug)]
pub struct Operation {
    pub process: usize,
    pub thread: u32,
    pub call: Call,
    pub begin: Nanos,
    /// What the documentation says that it takes at most.
    pub limit: Nanos,
    /// The last time at which what it writes can't have been committed.
    pub uncommitted: Option<Nanos>,
    /// None if nobody knows.
    pub end: Option<(Nanos, Outcome)>,
}

impl Kind {
    /// Whether it hurts calls. The others change what waiting processes find or are told, or end one hold.
    pub fn hurts_calls(&self) -> bool {
        !matches!(self, Kind::Harmless | Kind::Freed { .. } | Kind::DeadWaiters(..) | Kind::Misled)
    }
}

impl Operation {
    pub fn outcome(&self) -> Option<&Outcome> {
        self.end.as_ref().map(|(_, outcome)| outcome)
    }

    /// The version that it took.
    pub fn taken(&self) -> Option<i64> {
        match (&self.call, self.outcome()) {
            (Call::Acquire { .. }, Some(Outcome::Taken(version))) => Some(*version),
            _ => None,
        }
    }
}

/// One process, from its start to its end.
#[derive(Clone, Debug)]
pub struct Life {
    pub worker: usize,
    pub begin: Nanos,
    /// No later than its end: from just before it was killed, or from when it was seen to have ended by itself.
    pub end: Option<Nanos>,
    pub ending: Option<LifeEnd>,
    pub threads: u32,
    /// What was left when everything had been dropped.
    pub left: Option<(Vec<String>, usize)>,
    /// What it said to its standard error.
    pub said: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifeEnd {
    Killed,
    /// It ended in the middle of things, as it meant to.
    Abandoned,
    /// It was told to stop, and did.
    Stopped,
    Other(i32),
}

/// What was done to the processes, the network and the server.
#[derive(Clone, Debug)]
pub struct Fault {
    pub what: String,
    pub kind: Kind,
    /// The worker that it was done to; all, if none.
    pub worker: Option<usize>,
    pub begin: Nanos,
    pub end: Nanos,
}

/// What the verdict has to know of a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The process didn't run.
    Stopped,
    /// An answer was lost after the server had committed.
    LostAnswer,
    /// Nothing that a client of the database should notice.
    Harmless,
    /// The server ended without writing down what it could lose.
    Crashed,
    /// Commits on this lock were undone, as by a restore from a backup; on any, if it has no name.
    Undone(String),
    /// Somebody ended the hold of this version by hand. Its row has the next version since, where `moves`.
    Freed {
        lock: String,
        version: i64,
        moves: bool,
    },
    /// So many processes that don't exist were put among those that wait for this lock.
    DeadWaiters(String, u32),
    /// What waiting processes are told was lost, or was false.
    Misled,
    Other,
}

/// A write to a register, as the database committed it; `order` counts the writes of a lock.
#[derive(Clone, Debug)]
pub struct Written {
    pub lock: String,
    pub order: i64,
    pub version: i64,
    pub id: u64,
}

/// A row of the lock's table, at the end of everything.
#[derive(Clone, Debug)]
pub struct Row {
    pub lock: String,
    pub version: i64,
    pub is_held: bool,
    pub waiters: i64,
}

/// All that is known of a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// By their beginning.
    pub operations: Vec<Operation>,
    pub lives: Vec<Life>,
    pub faults: Vec<Fault>,
    pub written: Vec<Written>,
    pub rows: Vec<Row>,
    pub begin: Nanos,
    /// When the last fault was over.
    pub healed: Nanos,
    /// Until then no other run hurt the server.
    pub alone_until: Nanos,
    pub end: Nanos,
}

impl History {
    /// Adds what a process wrote.
    pub fn read(&mut self, process: usize, path: &Path) {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut open: HashMap<u32, Operation> = HashMap::new();
        for line in text.lines() {
            let Line { at, thread, event } =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("process {process}: {error}: {line}"));
            match event {
                Event::Begin(call, limit) => {
                    let operation = Operation { process, thread, call, begin: at, limit, uncommitted: None, end: None };
                    self.operations.extend(open.insert(thread, operation));
                }
                Event::Uncommitted => {
                    open.get_mut(&thread).expect("in a call").uncommitted = Some(at);
                }
                Event::End(outcome) => {
                    let mut operation = open.remove(&thread).expect("an end without a beginning");
                    operation.end = Some((at, outcome));
                    self.operations.push(operation);
                }
                Event::Left(threads, sockets) => self.lives[process].left = Some((threads, sockets)),
            }
        }
        self.operations.extend(open.into_values());
        self.operations.sort_by_key(|operation| operation.begin);
    }

    /// One that ended in the middle of things is known to have lived until its last word.
    pub fn end_of_the_abandoned(&mut self) {
        for (process, life) in self.lives.iter_mut().enumerate() {
            if life.ending == Some(LifeEnd::Abandoned) {
                let operations = self.operations.iter().filter(|operation| operation.process == process);
                let said = operations.map(|operation| operation.end.as_ref().map_or(operation.begin, |(end, _)| *end));
                life.end = said.max();
            }
        }
    }

    /// The history of one lock around an instant, in words.
    pub fn stretch(&self, lock: Option<&str>, around: Nanos) -> String {
        const BEFORE: Nanos = 3_000_000_000;
        const AFTER: Nanos = 1_000_000_000;
        let (from, until) = (around.saturating_sub(BEFORE), around.saturating_add(AFTER));
        let mut lines: Vec<(Nanos, String)> = Vec::new();
        for fault in &self.faults {
            if fault.begin < until && fault.end > from {
                lines.push((fault.begin, format!("{} — {}  FAULT {fault}", self.at(fault.begin), self.at(fault.end))));
            }
        }
        // Looks repeat each other.
        const SELDOM: Nanos = 200_000_000;
        let mut looks: HashMap<(usize, u32, i64), Nanos> = HashMap::new();
        let mut repeats = |look: &Operation| match (&look.call, look.outcome()) {
            (Call::Look { version, .. }, Some(Outcome::Held(_))) => {
                let last = looks.entry((look.process, look.thread, *version)).or_insert(0);
                let is_soon = look.begin < *last + SELDOM;
                *last = if is_soon { *last } else { look.begin };
                is_soon
            }
            _ => false,
        };
        for operation in &self.operations {
            let end = operation.end.as_ref().map_or(Nanos::MAX, |(end, _)| *end);
            let is_of_lock = lock.is_none() || operation.call.lock() == lock;
            if is_of_lock && operation.begin < until && end > from && !repeats(operation) {
                let end = operation
                    .end
                    .as_ref()
                    .map_or("?".to_owned(), |(at, outcome)| format!("{}  {outcome:?}", self.at(*at)));
                let (process, thread, call) = (operation.process, operation.thread, &operation.call);
                let line = format!("{} p{process}.{thread} {call:?} — {end}", self.at(operation.begin));
                lines.push((operation.begin, line));
            }
        }
        lines.sort();
        const MOST: usize = 150;
        let skipped = lines.len().saturating_sub(MOST);
        let near = lines.partition_point(|(at, _)| *at <= around);
        let first = near.saturating_sub(MOST * 2 / 3).min(skipped);
        let shown = lines.into_iter().skip(first).take(MOST).map(|(_, line)| format!("    {line}\n"));
        let note = if skipped > 0 { format!("    ({skipped} lines not shown)\n") } else { String::new() };
        note + &shown.collect::<String>()
    }

    /// Milliseconds since the beginning.
    pub fn at(&self, at: Nanos) -> String {
        #[allow(clippy::cast_precision_loss)] // for people
        let milliseconds = at.saturating_sub(self.begin) as f64 / 1e6;
        format!("{milliseconds:9.3}")
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        self.worker.map_or(Ok(()), |worker| write!(f, " (worker {worker})"))
    }
}
