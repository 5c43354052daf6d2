//! What a worker does: a process of its own, with several threads that take and give back a few locks.

mod panics;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use postgres::{Client, IsolationLevel, NoTls, Transaction};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use storage_lock::{Error, LockGuard, LockOptions, PostgresStorage, PostgresStorageOptions, Result, StorageLock};

use crate::history::{Call, Ending, Failure, Fence, How, Level, Nanos, Outcome, Recorder, nanos, now};
use crate::support::{chain, ms};

/// Tells a process of this binary that it is a worker, and which.
pub const WORKER: &str = "STORAGE_LOCK_ROBUSTNESS_WORKER";
/// What a worker's lines begin with.
pub const PREFIX: &str = "worker: ";
/// Asks a worker to say the same, with the number that follows, when one of its threads has written and not committed
/// yet.
pub const IN_A_WRITE: &str = "in a write ";
/// How a worker exits that ends without giving anything back.
pub const ABANDONED: i32 = 7;

/// Everybody takes it, in all ways.
pub const HOT: &str = "hot";
/// Everybody waits for it, for as long as it takes.
pub const QUEUE: &str = "queue";
/// New ones come into use all the time: at first by one worker, which makes the first hold in its time, however slow
/// its network.
const FRESH: &str = "fresh";
/// A worker has it most of the time, and others ask for it.
fn kept(worker: usize) -> String {
    format!("kept-{worker}")
}

/// Seldom taken: those who wait for one wait until somebody gives it back.
pub const LINE: &str = "line";
const LINES: usize = 3;

/// A thread's own, with a lease so long that one which leaked is noticed. Nobody else wants it.
pub const OWN: &str = "own";

/// How long a call that sets no limit may take by the documentation, with the connect timeout in our DSN.
const CALL_LIMIT: Duration = ms(1_000 + 250 + 5_000);
const RELEASE_LIMIT: Duration = ms(2_000);
/// What `try_lock_for` may take beyond its timeout.
const SLACK: Duration = ms(500);
/// For how long a request that was given up may still come through, and is followed up.
pub const FOLLOW_UP: Duration = ms(30_000);
/// What the names of the library's threads begin with, and those of what it uses.
const OURS: [&str; 3] = ["lock-", "r2d2-", "tokio-"];
/// The longest pause within a transaction, in leases: beyond one.
const LONGEST_PAUSE: (u32, u32) = (5, 4);
/// A new lock comes into use so often.
pub const FRESH_TIME: Duration = ms(1_500);

/// What a worker is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setting {
    pub dsn: String,
    pub table: String,
    pub history: PathBuf,
    pub seed: u64,
    pub worker: usize,
    pub workers: usize,
    /// Counts the processes of a run; a worker that is started again is another one.
    pub process: usize,
    pub threads: u32,
    /// It takes nothing but the lines, and waits for them.
    pub only_waits: bool,
    pub habits: Habits,
    pub max_connections: u32,
    pub lease: Duration,
    pub longest_lease: Duration,
    /// How long a transaction may be idle before the server ends it.
    pub idle: Duration,
    pub refresh: Duration,
    pub own_lease: Duration,
    pub began: Nanos,
}

/// What the workers of a run do otherwise than those of another.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Habits {
    /// Their loggers and callbacks panic now and then.
    pub panic: bool,
    /// Some threads have another lease for what everybody takes.
    pub have_other_leases: bool,
}

/// The statements for the register: one write at a time, numbered in the order in which they commit.
pub fn register_ddl(table: &str) -> String {
    format!(
        "CREATE TABLE {table}_register (lock text PRIMARY KEY, writes bigint NOT NULL);
         CREATE TABLE {table}_written (lock text, position bigint, version bigint, id bigint)"
    )
}

const FAULTS: u8 = 0;
/// No more faults: take every lock once, say so, and go on.
const CALM: u8 = 1;
const STOP: u8 = 2;

/// Not a test of its own: the body of every worker process.
#[test]
fn worker_process() {
    let Ok(setting) = std::env::var(WORKER) else { return };
    let setting: Setting = serde_json::from_str(&setting).expect("a setting");
    let (phase, abandons) = (Arc::new(AtomicU8::new(FAULTS)), Arc::new(AtomicBool::new(false)));
    let asked = Arc::new(AtomicU64::new(0));
    let (told, abandon, ask) = (Arc::clone(&phase), Arc::clone(&abandons), Arc::clone(&asked));
    thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(std::io::Result::ok) {
            match line.as_str() {
                "calm" => told.store(CALM, Ordering::SeqCst),
                "stop" => told.store(STOP, Ordering::SeqCst),
                "abandon" => abandon.store(true, Ordering::SeqCst),
                other => match other.strip_prefix(IN_A_WRITE).and_then(|number| number.parse().ok()) {
                    Some(number) => ask.store(number, Ordering::SeqCst),
                    None => panic!("told {other:?}"),
                },
            }
        }
        if told.load(Ordering::SeqCst) != STOP {
            // The parent has gone.
            std::process::exit(3);
        }
    });
    if setting.habits.panic {
        panics::begin();
    }
    let recorder = Recorder::new(&setting.history);
    work(&setting, &recorder, &phase, &abandons, &asked);
    println!("{PREFIX}quiet");
    let (threads, sockets) = left(Instant::now() + setting.own_lease.max(FOLLOW_UP) + ms(10_000));
    recorder.left(threads, sockets);
    std::process::exit(0);
}

fn work(setting: &Setting, recorder: &Recorder, phase: &AtomicU8, abandons: &AtomicBool, asked: &AtomicU64) {
    let storage = loop {
        let tls = if uses_tls() { " sslmode=require" } else { "" };
        let mut options = PostgresStorageOptions::from_dsn(&format!("{}{tls}", setting.dsn))
            .table_name(&setting.table)
            .max_connections(setting.max_connections);
        if setting.habits.panic {
            options = options.on_event(|_| panics::now_and_then());
        }
        let open = || PostgresStorage::new(options);
        match recorder.call(0, Call::Open, CALL_LIMIT, open, done) {
            Ok(storage) => break storage,
            Err(_) if phase.load(Ordering::SeqCst) == STOP => return,
            Err(_) => thread::sleep(ms(20)),
        }
    };
    thread::scope(|scope| {
        for number in 1..=setting.threads {
            let worker = Worker {
                setting,
                recorder,
                phase,
                abandons,
                asked,
                storage: &storage,
                thread: number,
                random: StdRng::seed_from_u64(setting.seed ^ (setting.process as u64) << 16 ^ u64::from(number)),
                register: None,
            };
            thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn_scoped(scope, move || worker.run())
                .expect("start a thread");
        }
    });
}

/// The threads and sockets of this process that are left, when there are none of the library's any more or the time
/// is over.
fn left(until: Instant) -> (Vec<String>, usize) {
    loop {
        let tasks = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        let threads: Vec<String> = names
            .map(|name| name.trim().to_owned())
            .filter(|name| OURS.iter().any(|ours| name.starts_with(ours)))
            .collect();
        let descriptors = std::fs::read_dir("/proc/self/fd").expect("descriptors").flatten();
        let targets = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok());
        let sockets = targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count();
        if threads.is_empty() && sockets == 0 || Instant::now() >= until {
            return (threads, sockets);
        }
        thread::sleep(ms(20));
    }
}

/// One thread of a worker.
struct Worker<'a> {
    setting: &'a Setting,
    recorder: &'a Recorder,
    phase: &'a AtomicU8,
    abandons: &'a AtomicBool,
    asked: &'a AtomicU64,
    storage: &'a PostgresStorage,
    thread: u32,
    random: StdRng,
    register: Option<Client>,
}

/// Whether the library's connections use TLS. What a proxy looks for in their requests it doesn't find then: those
/// faults don't happen.
pub fn uses_tls() -> bool {
    std::env::var_os("STORAGE_LOCK_ROBUSTNESS_TLS").is_some()
}

impl Worker<'_> {
    fn run(mut self) {
        let is_in = |phase: &AtomicU8, wanted| phase.load(Ordering::SeqCst) == wanted;
        if self.setting.only_waits {
            while is_in(self.phase, FAULTS) {
                self.wait_in_line();
            }
            println!("{PREFIX}calm {}", self.thread);
            while is_in(self.phase, CALM) {
                thread::sleep(ms(10));
            }
            return;
        }
        while is_in(self.phase, FAULTS) {
            self.round();
        }
        for lock in [QUEUE.to_owned(), HOT.to_owned(), self.own()] {
            let how = if lock == QUEUE { How::Lock } else { How::TryLockFor };
            while is_in(self.phase, CALM) && !self.take(&lock, how, ms(0)) {}
        }
        println!("{PREFIX}calm {}", self.thread);
        while is_in(self.phase, CALM) {
            self.take(HOT, How::TryLockFor, ms(0));
            thread::sleep(ms(10));
        }
    }

    fn own(&self) -> String {
        format!("{OWN}-{}-{}", self.setting.process, self.thread)
    }

    /// One thread has a lock most of the time, so that whatever happens happens to somebody's hold: its own, or one
    /// that others ask for all the time.
    fn keeps(&self) -> bool {
        self.thread == self.setting.threads
    }

    fn hurries(&self) -> bool {
        self.thread.is_multiple_of(2)
    }

    fn line(&mut self) -> String {
        format!("{LINE}-{}", self.random.random_range(0..LINES))
    }

    /// Waits for as long as it takes.
    fn wait_in_line(&mut self) {
        let (hold, pause) = (self.random.random_range(ms(0)..ms(300)), self.random.random_range(ms(0)..ms(300)));
        let line = self.line();
        self.take(&line, How::Lock, hold);
        thread::sleep(pause);
    }

    fn lease(&self, lock_id: &str) -> Duration {
        let Setting { lease, longest_lease, own_lease, worker, habits, .. } = *self.setting;
        match lock_id {
            lock if lock.starts_with(OWN) => own_lease,
            HOT | QUEUE if habits.have_other_leases => {
                [lease, lease * 3 / 5, longest_lease][(worker + self.thread as usize) % 3]
            }
            _ => lease,
        }
    }

    /// Takes some lock somehow, for some time.
    fn round(&mut self) {
        let lease = self.setting.lease;
        if self.keeps() {
            let hold = self.random.random_range(lease..lease * 3);
            let lock = if self.random.random_bool(0.3) { self.own() } else { kept(self.setting.worker) };
            self.take(&lock, How::TryLockFor, hold);
            return;
        }
        let ways = [How::TryLock, How::TryLockFor, How::TryLockUntil, How::Lock];
        // Half of the threads are in a hurry: while others wait for a lock whose holder died, they go on with other
        // ones.
        let hurries = self.hurries();
        let how =
            *ways.get(..if hurries { 3 } else { 4 }).and_then(|ways| ways.choose(&mut self.random)).expect("a way");
        if self.random.random_bool(0.03) {
            let (line, hold) = (self.line(), self.random.random_range(ms(20)..ms(400)));
            self.take(&line, if how == How::Lock { How::TryLockFor } else { how }, hold);
            return;
        }
        let (lock, how) = match self.random.random_range(if hurries { 15 } else { 0 }..100) {
            0..15 => (QUEUE.to_owned(), How::Lock),
            15..40 => (HOT.to_owned(), how),
            // Who waits is there when it changes hands, also when it shouldn't.
            40..60 => (kept(self.random.random_range(0..self.setting.workers)), How::TryLockFor),
            60..80 => {
                // One that is new here, or any that somebody may still hold.
                let age = (now() - self.setting.began) / nanos(FRESH_TIME);
                let (back, worker) = if self.random.random_bool(0.5) {
                    (0, self.setting.worker)
                } else {
                    (self.random.random_range(1..3), self.random.random_range(0..self.setting.workers))
                };
                (format!("{FRESH}-{}-{worker}", age.saturating_sub(back)), how)
            }
            _ => (self.own(), impatient(how)),
        };
        // What others want is held for long only now and then.
        let (long, longer) = match lock.as_str() {
            HOT | QUEUE => (0.03, 0.025),
            lock if lock.starts_with("kept") => (0.0, 0.0),
            lock if lock.starts_with(FRESH) => (0.3, 0.4),
            _ => (0.1, 0.01),
        };
        let hold = if lock != QUEUE && self.random.random_bool(longer) {
            // Long enough that it has to be refreshed, and that others find out if it isn't theirs.
            self.random.random_range(lease / 2..lease * 2)
        } else if self.random.random_bool(long) {
            self.random.random_range(ms(20)..ms(300))
        } else {
            self.random.random_range(ms(0)..ms(15))
        };
        let pause = self.random.random_range(ms(0)..ms(15));
        self.take(&lock, how, hold);
        thread::sleep(pause);
    }

    /// Takes a lock, uses it for some time, and gives it back; false if it wasn't to be had.
    fn take(&mut self, lock_id: &str, how: How, hold: Duration) -> bool {
        let lease = self.lease(lock_id);
        let mut options =
            LockOptions::new(lock_id).lease_expire_after(lease).lease_refresh_interval(self.setting.refresh);
        if self.setting.habits.panic {
            options = options.on_lost(|_| panics::now_and_then());
        }
        let lock = StorageLock::with_options(self.storage, options).expect("valid options");
        let timeout = self.random.random_range(ms(0)..if self.hurries() { ms(100) } else { ms(1_200) });
        let limit = match how {
            How::Lock => Duration::MAX,
            How::TryLock => CALL_LIMIT,
            How::TryLockFor | How::TryLockUntil => timeout + SLACK,
        };
        let call = Call::Acquire { lock: lock_id.to_owned(), how, lease: nanos(lease) };
        // Everybody has the same name: it must not matter.
        let acquire = || match how {
            How::Lock => lock.lock("worker-1").map(Some),
            How::TryLock => lock.try_lock("worker-1"),
            How::TryLockFor => lock.try_lock_for("worker-1", timeout),
            How::TryLockUntil => lock.try_lock_until("worker-1", Instant::now() + timeout),
        };
        let acquired = self.recorder.call(self.thread, call, limit, acquire, |acquired| match acquired {
            Ok(Some(guard)) => Outcome::Taken(guard.version()),
            Ok(None) => Outcome::Busy,
            Err(error) => failed(error),
        });
        match acquired {
            Ok(Some(guard)) => {
                // What went wrong when a lock was made shows while others want it.
                let is_first = lock_id.starts_with(FRESH) && guard.version() == 1;
                self.use_and_give_back(guard, if is_first { hold.max(lease) } else { hold });
                true
            }
            Ok(None) => false,
            Err(_) => {
                thread::sleep(ms(20));
                false
            }
        }
    }

    fn use_and_give_back(&mut self, guard: LockGuard, hold: Duration) {
        let until = Instant::now() + hold;
        let (lock, version) = (guard.lock_id().to_owned(), guard.version());
        let mut chance = if self.keeps() { 0.5 } else { 0.3 };
        loop {
            let is_held = self.look(&guard);
            // One who has lost the lock writes as well: it is the fence that keeps it from doing harm.
            if self.random.random_bool(if is_held { chance } else { 0.7 }) {
                self.write(&guard);
            }
            if !is_held || !self.look(&guard) {
                break;
            }
            // One that is stuck in a write doesn't look.
            chance = if self.keeps() { 0.0 } else { 0.02 };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.phase.load(Ordering::SeqCst) != FAULTS {
                break;
            }
            thread::sleep(left.min(ms(20)));
        }
        let how = match self.random.random_range(0..100) {
            _ if self.abandons.swap(false, Ordering::SeqCst) => Ending::Abandon,
            0..15 => Ending::UnlockIn { id: self.next_id(), commits: self.random.random_bool(0.7) },
            15..60 => Ending::Unlock,
            _ => Ending::Drop,
        };
        let call = Call::Release { lock, version, how };
        match how {
            Ending::Unlock => {
                self.recorder.call(self.thread, call, RELEASE_LIMIT, || guard.unlock(), done).ok();
            }
            Ending::Drop => {
                self.recorder.call(self.thread, call, RELEASE_LIMIT, || drop(guard), |()| Outcome::Done);
            }
            Ending::UnlockIn { id, commits } => self.unlock_in(guard, id, commits),
            Ending::Abandon => {
                let pause = self.random.random_range(ms(0)..ms(50));
                self.recorder.call(
                    self.thread,
                    call,
                    pause + RELEASE_LIMIT,
                    || std::mem::forget(guard),
                    |()| Outcome::Done,
                );
                thread::sleep(pause);
                std::process::exit(ABANDONED);
            }
        }
    }

    fn look(&self, guard: &LockGuard) -> bool {
        let call = Call::Look { lock: guard.lock_id().to_owned(), version: guard.version() };
        let look = || (guard.is_held(), guard.remaining());
        let (is_held, _) = self.recorder.call(self.thread, call, ms(0), look, |(is_held, remaining)| {
            if *is_held { Outcome::Held(nanos(*remaining)) } else { Outcome::NotHeld }
        });
        is_held
    }

    /// How long a transaction pauses: before its write and its fence, between them, and after both.
    fn draw_pauses(&mut self, guard: &LockGuard) -> [Duration; 3] {
        let lease = self.setting.lease;
        let mut pauses = [(); 3]
            .map(|()| if self.random.random_bool(0.1) { self.random.random_range(ms(0)..ms(30)) } else { ms(0) });
        let often = match guard.lock_id() {
            // What everybody wants is blocked for long only now and then.
            HOT | QUEUE => 0.015,
            lock if lock.starts_with(LINE) => 0.015,
            // Those that others want as well, and that are held for longer anyway.
            _ if self.keeps() => 0.6,
            lock if lock.starts_with(FRESH) => 0.15,
            _ => 0.05,
        };
        let long = if guard.is_held() {
            self.random.random_bool(often).then(|| lease * LONGEST_PAUSE.0 / LONGEST_PAUSE.1)
        } else {
            // Long enough for somebody else to take the lock.
            self.random.random_bool(0.5).then(|| lease / 2)
        };
        if let Some(long) = long {
            // Most of them after the fence: then its row's lock is all that keeps others away.
            let place = [0, 1, 2, 2].choose(&mut self.random).copied().expect("a place");
            pauses[place] = self.random.random_range(ms(0)..long);
        }
        pauses
    }

    fn next_id(&self) -> u64 {
        static IDS: AtomicU64 = AtomicU64::new(0);
        IDS.fetch_add(1, Ordering::SeqCst) | (self.setting.process as u64) << 32
    }

    /// Writes to the lock's register if the hold lasts until then. Whether it does nobody has looked: that is for the
    /// fence.
    fn write(&mut self, guard: &LockGuard) {
        let fences = [Fence::Transaction, Fence::Transaction, Fence::First, Fence::First, Fence::Last];
        let levels = [Level::ReadCommitted, Level::RepeatableRead, Level::Serializable];
        let fence = *fences.choose(&mut self.random).expect("a fence");
        let (mut level, mut is_past_deadline) = (
            *levels.choose(&mut self.random).expect("a level"),
            self.random.random_bool(if guard.is_held() { 0.4 } else { 0.9 }),
        );
        if fence == Fence::Transaction {
            (level, is_past_deadline) = (Level::ReadCommitted, false);
        }
        // Takes the snapshot before the pauses, where there is one for the whole transaction.
        let sees = level != Level::ReadCommitted && self.random.random_bool(0.5);
        let (lock, version, id) = (guard.lock_id().to_owned(), guard.version(), self.next_id());
        let call = Call::Write { lock, version, id, fence, is_past_deadline, level };
        let pauses = self.draw_pauses(guard);
        self.register(call, Outcome::Done, |write, client| {
            if fence == Fence::Transaction {
                return guard.transaction(client, |transaction| {
                    write.pause(guard, pauses[0]);
                    write.run(guard, id, transaction)?;
                    write.say_that_it_is_written(guard);
                    write.pause(guard, pauses[1] + pauses[2]);
                    write.is_uncommitted();
                    Ok(())
                });
            }
            let fences = |transaction: &mut Transaction<'_>| {
                if is_past_deadline { guard.fence_past_deadline(transaction) } else { guard.fence(transaction) }
            };
            let mut transaction = begin(client, level)?;
            if sees {
                transaction.query_one("SELECT 1", &[])?;
            }
            write.pause(guard, pauses[0]);
            if fence == Fence::First {
                fences(&mut transaction)?;
                write.pause(guard, pauses[1]);
                write.run(guard, id, &mut transaction)?;
                write.say_that_it_is_written(guard);
            } else {
                write.run(guard, id, &mut transaction)?;
                write.say_that_it_is_written(guard);
                write.pause(guard, pauses[1]);
                fences(&mut transaction)?;
            }
            write.pause(guard, pauses[2]);
            write.is_uncommitted();
            Ok(transaction.commit()?)
        });
    }

    /// Writes to the register, and gives the lock back in the same transaction, if that is committed.
    fn unlock_in(&mut self, guard: LockGuard, id: u64, commits: bool) {
        let level = if self.random.random_bool(0.5) { Level::ReadCommitted } else { Level::RepeatableRead };
        let (lock, version, how) = (guard.lock_id().to_owned(), guard.version(), Ending::UnlockIn { id, commits });
        let outcome = if commits { Outcome::Done } else { Outcome::RolledBack };
        let pauses = self.draw_pauses(&guard);
        self.register(Call::Release { lock, version, how }, outcome, |write, client| {
            // Dropped at the end, whatever comes of it.
            let guard = guard;
            let mut transaction = begin(client, level)?;
            write.run(&guard, id, &mut transaction)?;
            write.pause(&guard, pauses[0]);
            let transaction = guard.unlock_in(transaction)?;
            write.pause(&guard, pauses[1] + pauses[2]);
            write.is_uncommitted();
            Ok(if commits { transaction.commit() } else { transaction.rollback() }?)
        });
    }

    /// Does something on this thread's connection for the registers.
    fn register(
        &mut self,
        call: Call,
        outcome: Outcome,
        work: impl FnOnce(&Write<'_>, &mut Client) -> std::result::Result<(), Refusal>,
    ) {
        let (setting, client) = (self.setting, &mut self.register);
        let (recorder, phase, asked) = (self.recorder, self.phase, self.asked);
        let write = Write { setting, recorder, phase, asked, thread: self.thread };
        let run = || {
            if client.is_none() {
                *client = Some(connect(setting).map_err(no_connection)?);
            }
            work(&write, client.as_mut().expect("connected"))
        };
        let result = self.recorder.call(self.thread, call, Duration::MAX, run, |result| match result {
            Ok(()) => outcome,
            Err(Refusal::Lock(error)) => failed(error),
            Err(Refusal::Database(error)) => Outcome::Failed(Failure::Database(code(error)), chain(error)),
        });
        if result.is_err_and(|error| !matches!(error, Refusal::Lock(Error::LeaseLost { .. }))) {
            self.register = None;
        }
    }
}

/// Why a write was not made.
enum Refusal {
    Lock(Error),
    Database(postgres::Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        Refusal::Lock(error)
    }
}

impl From<postgres::Error> for Refusal {
    fn from(error: postgres::Error) -> Refusal {
        Refusal::Database(error)
    }
}

/// A transaction that is fenced keeps the lock until the server ends it, also if its process is stopped, or can't be
/// reached: the server does so when the longest stop and a pause after it are over, and before everybody must have got
/// every lock. A statement may wait for as long as that, behind another writer of the register.
fn connect(setting: &Setting) -> std::result::Result<Client, postgres::Error> {
    let most = setting.idle.as_millis();
    let mut config: postgres::Config = setting.dsn.parse()?;
    config.options(&format!("-c idle_in_transaction_session_timeout={most} -c statement_timeout={most}"));
    config.connect(NoTls)
}

fn no_connection(source: postgres::Error) -> Error {
    Error::Connect { address: "the server".to_owned(), source: source.into() }
}

fn begin(client: &mut Client, level: Level) -> std::result::Result<Transaction<'_>, postgres::Error> {
    let level = match level {
        Level::ReadCommitted => IsolationLevel::ReadCommitted,
        Level::RepeatableRead => IsolationLevel::RepeatableRead,
        Level::Serializable => IsolationLevel::Serializable,
    };
    client.build_transaction().isolation_level(level).start()
}

/// What a write does within its call.
struct Write<'a> {
    setting: &'a Setting,
    recorder: &'a Recorder,
    phase: &'a AtomicU8,
    asked: &'a AtomicU64,
    thread: u32,
}

impl Write<'_> {
    fn run(
        &self,
        guard: &LockGuard,
        id: u64,
        transaction: &mut Transaction<'_>,
    ) -> std::result::Result<(), postgres::Error> {
        let (table, id) = (&self.setting.table, i64::try_from(id).expect("a small number"));
        let sql = format!(
            "WITH turn AS (INSERT INTO {table}_register AS register VALUES ($1, 1)
                           ON CONFLICT (lock) DO UPDATE SET writes = register.writes + 1 RETURNING writes)
             INSERT INTO {table}_written SELECT $1, writes, $2, $3 FROM turn"
        );
        transaction.execute(&sql, &[&guard.lock_id(), &guard.version(), &id]).map(drop)
    }

    /// When the faults are over everybody goes on at once. One that loses its hold meanwhile is late: it gives others
    /// time to take over.
    fn pause(&self, guard: &LockGuard, pause: Duration) {
        let (mut until, mut was_held) = (Instant::now() + pause, !pause.is_zero() && guard.is_held());
        loop {
            if was_held && !guard.is_held() {
                was_held = false;
                until = until.max(Instant::now() + self.setting.lease * 3 / 4);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.phase.load(Ordering::SeqCst) != FAULTS {
                return;
            }
            thread::sleep(left.min(ms(20)));
        }
    }

    /// To whoever wants to stop this process just then, where somebody else is likely to take the lock.
    fn say_that_it_is_written(&self, guard: &LockGuard) {
        if !guard.lock_id().starts_with(OWN) && !guard.lock_id().starts_with(FRESH) {
            let number = self.asked.swap(0, Ordering::SeqCst);
            if number > 0 {
                println!("{PREFIX}{IN_A_WRITE}{number}");
                thread::sleep(ms(100));
            }
        }
    }

    fn is_uncommitted(&self) {
        self.recorder.uncommitted(self.thread);
    }
}

/// For what nobody should wait for without an end.
fn impatient(how: How) -> How {
    if how == How::Lock { How::TryLock } else { how }
}

fn done<T>(result: &Result<T>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(error) => failed(error),
    }
}

fn failed(error: &Error) -> Outcome {
    let failure = match error {
        Error::Connect { .. } => Failure::Connect,
        Error::Timeout { .. } => Failure::Timeout,
        Error::Database { source, .. } => Failure::Database(code(source)),
        Error::LeaseLost { .. } => Failure::LeaseLost,
        Error::Fence { .. } => Failure::Fence,
        _ => Failure::Other,
    };
    Outcome::Failed(failure, chain(error))
}

fn code(error: &postgres::Error) -> Option<String> {
    error.code().map(|code| code.code().to_owned())
}
