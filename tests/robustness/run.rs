//! A run: workers on a server, hurt by a plan, and judged.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};
use uuid::Uuid;

use crate::history::{Fault, History, Kind, LifeEnd, Row, Written, nanos, now};
use crate::hurt::{Plan, Targets};
use crate::processes::{Workers, history_of, wall_clock};
use crate::support::ms;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::verdict::{Counts, LONGEST_LOOK, Times, Violation, judge};
use crate::workload::{FOLLOW_UP, HOT, Habits, QUEUE, Setting, register_ddl};

pub const TIMES: Times =
    Times { lease: ms(2_000), longest_lease: ms(3_000), refresh: ms(400), own_lease: ms(15_000), idle: ms(5_000) };
pub const WORKERS: usize = 3;
const THREADS: u32 = 4;
/// How many workers there are beside them that only wait, and their threads.
const WAITING: usize = 2;
const WAITING_THREADS: u32 = 3;
/// Of a waiter in a row: not one that was put there, see `hurt`.
const IS_A_PROCESS: &str = "waiter::text NOT LIKE 'dead%'";
/// How long everything is hurt.
pub const FAULTS: Duration = ms(6_000);
/// After so many violations of a run nobody reads on.
const SHOWN: usize = 5;

/// What came of a run.
pub struct Report {
    pub seed: u64,
    pub violations: Vec<Violation>,
    pub counts: Counts,
    /// Seed, faults and the offending stretches of the history.
    pub text: String,
    pub used: Vec<&'static str>,
}

/// Runs a seed, and judges it when its processes have ended, which the next run needn't wait for.
pub fn run(seed: u64, server: &Arc<Mutex<Server>>) -> JoinHandle<Report> {
    let watch = Watch::start(WORKERS + WAITING);
    let plan = Plan::draw(seed, WORKERS, FAULTS, TIMES.lease);
    let habits = Habits { panic: plan.panics, have_other_leases: plan.leases };
    let run = Run::new(&format!("seed-{seed}"), locked(server).dsn.clone());
    let proxies: Vec<Proxy> = (0..WORKERS).map(|_| Proxy::to(&run.dsn)).collect();
    let dsns = proxies.iter().map(|proxy| proxy.dsn.clone()).collect();
    let clock_file = run.folder.join("clock");
    let clock = plan.clock.zip(wall_clock()).map(|(worker, library)| (worker, library, clock_file.clone()));
    fs::write(&clock_file, "+0").expect("write the clock");
    let workers = run.start(seed, dsns, WAITING, habits, clock);
    let faults = Mutex::default();
    let targets = Targets {
        workers: &workers,
        proxies: &proxies,
        server,
        dsn: &run.dsn,
        table: &run.table,
        clock_file,
        began: run.began,
        faults: &faults,
    };
    thread::scope(|scope| {
        let hurting = scope.spawn(|| targets.hurt(&plan, FAULTS));
        while !hurting.is_finished() {
            workers.look_after();
            thread::sleep(ms(10));
        }
    });
    let mut history = History { begin: run.began, healed: now(), ..History::default() };
    history.faults = faults.into_inner().unwrap_or_else(PoisonError::into_inner);
    workers.calm_down(TIMES.longest_lease + LONGEST_LOOK);
    workers.stop(ms(8_000));
    run.wait_for_the_last_to_leave_the_rows();
    history.alone_until = now();
    history.faults.extend(watch.stop());
    history.faults.sort_by_key(|fault| fault.begin);
    let used = plan.hurts().collect();
    thread::spawn(move || {
        let report = run.judge(seed, workers, history, used, |_| ());
        drop(proxies);
        report
    })
}

/// Watches for times in which the machine as a whole stood still: nothing can be asked of anybody then.
struct Watch {
    has_to_stop: Arc<AtomicBool>,
    watching: JoinHandle<Vec<Fault>>,
}

impl Watch {
    /// Longer than a busy machine keeps a thread from running.
    const STILL: Duration = ms(500);

    fn start(workers: usize) -> Watch {
        let has_to_stop = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&has_to_stop);
        let watching = thread::spawn(move || {
            let mut faults = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                let begin = now();
                thread::sleep(ms(20));
                let end = now();
                if end - begin > nanos(Self::STILL) {
                    faults.extend((0..workers).map(|worker| Fault {
                        what: "the machine stood still".to_owned(),
                        kind: Kind::Stopped,
                        worker: Some(worker),
                        begin,
                        end,
                    }));
                }
            }
            faults
        });
        Watch { has_to_stop, watching }
    }

    fn stop(self) -> Vec<Fault> {
        self.has_to_stop.store(true, Ordering::SeqCst);
        self.watching.join().expect("it only looks at the clock")
    }
}

/// Keeps tests that need the machine for themselves from each other.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn locked(server: &Mutex<Server>) -> MutexGuard<'_, Server> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The tables and files of a run.
pub struct Run {
    name: String,
    dsn: String,
    pub table: String,
    pub folder: PathBuf,
    pub began: u64,
}

impl Run {
    pub fn new(name: &str, dsn: String) -> Run {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("robustness").join(name);
        fs::remove_dir_all(&folder).ok();
        fs::create_dir_all(&folder).expect("make a folder");
        let table = format!("run_{}", Uuid::new_v4().simple());
        let mut client = Client::connect(&dsn, NoTls).expect("connect to the server");
        client.batch_execute(&register_ddl(&table)).expect("create the registers");
        Run { name: name.to_owned(), dsn, table, folder, began: now() }
    }

    /// Starts a worker for each DSN, and some that only wait.
    pub fn start(
        &self,
        seed: u64,
        mut dsns: Vec<String>,
        waiting: usize,
        habits: Habits,
        clock: Option<(usize, PathBuf, PathBuf)>,
    ) -> Workers {
        let workers = dsns.len();
        dsns.extend(std::iter::repeat_n(self.dsn.clone(), waiting));
        let setting = |(worker, dsn): (usize, String)| Setting {
            dsn: format!("{dsn} connect_timeout=1"),
            table: self.table.clone(),
            history: PathBuf::new(),
            seed,
            worker,
            workers,
            process: 0,
            threads: if worker < workers { THREADS } else { WAITING_THREADS },
            only_waits: worker >= workers,
            habits,
            // One works with the fewest, and one with a single one.
            max_connections: [4, 2, 1].get(worker).copied().unwrap_or(4),
            lease: TIMES.lease,
            longest_lease: TIMES.longest_lease,
            idle: TIMES.idle,
            refresh: TIMES.refresh,
            own_lease: TIMES.own_lease,
            began: self.began,
        };
        Workers::start(dsns.into_iter().enumerate().map(setting).collect(), &self.folder, clock)
    }

    /// Waits until all is over, and judges it.
    pub fn judge(
        self,
        seed: u64,
        workers: Workers,
        mut history: History,
        used: Vec<&'static str>,
        look: impl FnOnce(&History),
    ) -> Report {
        history.lives = workers.end(TIMES.own_lease.max(FOLLOW_UP) + ms(20_000));
        for process in 0..history.lives.len() {
            history.read(process, &history_of(&self.folder, process));
        }
        history.end_of_the_abandoned();
        // Whoever died holding a lock holds it for a lease.
        let settled = history.healed + nanos(TIMES.longest_lease + ms(1_000));
        thread::sleep(Duration::from_nanos(settled.saturating_sub(now())));
        self.read_tables(&mut history);
        history.end = now();
        look(&history);
        let (violations, counts) = judge(&history, TIMES);
        let text = self.text(&history, &violations, counts);
        if violations.is_empty() {
            fs::remove_dir_all(&self.folder).ok();
        }
        Report { seed, violations, counts, text, used }
    }

    /// A process takes itself out of the row of a lock in the background. The next run's faults are none of this one's.
    fn wait_for_the_last_to_leave_the_rows(&self) {
        let start = Instant::now();
        let sql = format!(
            "SELECT count(*) FROM {}, unnest(waiters) AS waiter WHERE lock_id IN ($1, $2) AND {IS_A_PROCESS}",
            self.table
        );
        while start.elapsed() < ms(2_000) {
            let count =
                Client::connect(&self.dsn, NoTls).and_then(|mut client| client.query_one(&sql, &[&HOT, &QUEUE]));
            if count.is_ok_and(|count| count.get::<_, i64>(0) == 0) {
                return;
            }
            thread::sleep(ms(20));
        }
    }

    /// While the next run hurts the server, it may take a few tries.
    fn read_tables(&self, history: &mut History) {
        let start = Instant::now();
        loop {
            match self.try_to_read_tables() {
                Ok((rows, written)) => {
                    (history.rows, history.written) = (rows, written);
                    return;
                }
                Err(error) => assert!(start.elapsed() < Duration::from_secs(60), "cannot read the tables: {error}"),
            }
            thread::sleep(ms(100));
        }
    }

    fn try_to_read_tables(&self) -> Result<(Vec<Row>, Vec<Written>), postgres::Error> {
        let table = &self.table;
        let mut client = Client::connect(&format!("{} connect_timeout=2", self.dsn), NoTls)?;
        let sql = format!(
            "SELECT lock_id, version, released_at IS NULL AND lease_expire_time > clock_timestamp(),
                    (SELECT count(*) FROM unnest(waiters) AS waiter WHERE {IS_A_PROCESS}) FROM {table}"
        );
        let row = |row: &postgres::Row| Row {
            lock: row.get(0),
            version: row.get(1),
            is_held: row.get(2),
            waiters: row.get(3),
        };
        let rows = client.query(&sql, &[])?.iter().map(row).collect();
        let written = |row: &postgres::Row| Written {
            lock: row.get(0),
            order: row.get(1),
            version: row.get(2),
            id: row.get::<_, i64>(3).cast_unsigned(),
        };
        let sql = format!("SELECT lock, position, version, id FROM {table}_written");
        let written = client.query(&sql, &[])?.iter().map(written).collect();
        // If this fails it stays behind, on a throwaway server.
        client.batch_execute(&format!("DROP TABLE {table}, {table}_register, {table}_written")).ok();
        Ok((rows, written))
    }

    fn text(&self, history: &History, violations: &[Violation], counts: Counts) -> String {
        let verdict = if violations.is_empty() { "holds" } else { "IS BROKEN" };
        let mut text = format!("{}: the verdict {verdict}. {counts}\n", self.name);
        if violations.is_empty() {
            return text;
        }
        let rules: BTreeSet<String> = violations.iter().map(|violation| violation.rule.to_string()).collect();
        let rules: Vec<String> = rules.into_iter().collect();
        writeln!(text, "  broken rules: {}", rules.join(", ")).ok();
        writeln!(text, "  histories: {}", self.folder.display()).ok();
        for (process, life) in history.lives.iter().enumerate() {
            let end = life.end.map(|end| history.at(end)).unwrap_or_default();
            let (begin, ending) = (history.at(life.begin), life.ending.unwrap_or(LifeEnd::Other(-1)));
            writeln!(text, "  p{process} is worker {}: {begin} — {end} ms, {ending:?}", life.worker).ok();
        }
        writeln!(text, "  faults, until {} ms:", history.at(history.healed)).ok();
        for fault in &history.faults {
            writeln!(text, "    {} — {} ms  {fault}", history.at(fault.begin), history.at(fault.end)).ok();
        }
        for violation in violations.iter().take(SHOWN) {
            writeln!(text, "  {violation}").ok();
            text += &history.stretch(violation.lock.as_deref(), violation.at);
        }
        if violations.len() > SHOWN {
            writeln!(text, "  and {} more violations", violations.len() - SHOWN).ok();
            for violation in violations.iter().skip(SHOWN).take(20) {
                writeln!(text, "    {violation}").ok();
            }
        }
        text
    }
}
