//! What is done to the workers, the network, the server and the database: drawn from a seed, several at once.
//!
//! There are tracks that run beside each other: one for each worker's process, one for several at once, one for each
//! worker's network, one for the server, and three for what is done inside the database. A track does one thing after
//! another.

mod rows;

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use postgres::{Client, NoTls};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::history::{Fault, Kind, Nanos, now};
use crate::processes::Workers;
use crate::support::ms;
use crate::support::proxy::Proxy;
use crate::support::server::Server;
use crate::workload::{FRESH_TIME, HOT};

use rows::{Freeing, Placing};

/// Something to be done, and for how long.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Since the beginning.
    pub at: Duration,
    pub lasts: Duration,
    pub hurt: Hurt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hurt {
    // To a worker's process.
    Kill,
    StopForLessThanALease,
    StopForMoreThanALease,
    /// It forgets a guard and ends.
    Abandon,
    /// Its wall clock jumps by an hour.
    WallClock {
        is_forward: bool,
    },
    // To several processes at the same moment.
    KillTogether {
        /// Those that only wait; else the others, but one.
        waiting: bool,
        spare: usize,
    },
    // To a worker's network.
    Cut,
    LoseAnswer {
        to: &'static str,
    },
    /// One answer comes late.
    HoldBackAnswer {
        to: &'static str,
        by: Duration,
    },
    Delay {
        requests: Duration,
        answers: Duration,
    },
    Stall {
        requests: bool,
        answers: bool,
        then_cuts: bool,
    },
    /// Answers become slow, and then nothing comes through any more.
    Fade {
        answers: Duration,
    },
    /// A request is kept on its way, and comes later, when its connection is gone.
    KeepRequest {
        with: &'static str,
        by: Duration,
    },
    /// From the answer to a request on, its connection says nothing any more.
    SwallowAnswers {
        with: &'static str,
    },
    // To the server.
    Crash,
    Restart,
    Freeze,
    // Inside the database.
    EndSessions,
    /// Every few moments.
    EndSessionsAgain,
    TakeAllConnections,
    KeepSnapshot,
    LockRow,
    LockTable,
    // To the rows of locks, and to what those are told who wait for them.
    PutDeadWaiters {
        count: i32,
        placing: Placing,
        with_nulls: bool,
    },
    FreeRow(Freeing),
    NotifyFalsely,
    EndListeners,
    /// The newest hold of a lock has never been, as after a restore or a failover that lost it.
    UndoCommit,
}

/// Which hurts there are, without their details; a seed uses some of them.
pub const KINDS: [&str; 30] = [
    "kill",
    "short stop",
    "long stop",
    "abandon",
    "wall clock",
    "cut",
    "lost answer",
    "late answer",
    "delay",
    "long delay",
    "stall",
    "fade",
    "crash",
    "restart",
    "freeze",
    "end sessions",
    "end sessions again",
    "full",
    "snapshot",
    "locked row",
    "locked table",
    "late request",
    "swallowed answers",
    "panics",
    "leases",
    "killed together",
    "dead waiters",
    "freed row",
    "false notifications",
    "lost notifications",
];

/// Those that need not hurt a call, and may leave a lock free beside a waiter.
const OF_WAITING: [&str; 7] =
    ["panics", "leases", "killed together", "dead waiters", "freed row", "false notifications", "lost notifications"];

impl Hurt {
    pub fn name(&self) -> &'static str {
        match self {
            Hurt::Kill => "kill",
            Hurt::StopForLessThanALease => "short stop",
            Hurt::StopForMoreThanALease => "long stop",
            Hurt::Abandon => "abandon",
            Hurt::WallClock { .. } => "wall clock",
            Hurt::Cut => "cut",
            Hurt::LoseAnswer { .. } => "lost answer",
            Hurt::HoldBackAnswer { .. } => "late answer",
            Hurt::Delay { answers, .. } if *answers > ms(600) => "long delay",
            Hurt::Delay { .. } => "delay",
            Hurt::Stall { .. } => "stall",
            Hurt::Fade { .. } => "fade",
            Hurt::Crash => "crash",
            Hurt::Restart => "restart",
            Hurt::Freeze => "freeze",
            Hurt::EndSessions => "end sessions",
            Hurt::EndSessionsAgain => "end sessions again",
            Hurt::TakeAllConnections => "full",
            Hurt::KeepSnapshot => "snapshot",
            Hurt::LockRow => "locked row",
            Hurt::LockTable => "locked table",
            Hurt::KeepRequest { .. } => "late request",
            Hurt::SwallowAnswers { .. } => "swallowed answers",
            Hurt::KillTogether { .. } => "killed together",
            Hurt::PutDeadWaiters { .. } => "dead waiters",
            Hurt::FreeRow(_) => "freed row",
            Hurt::NotifyFalsely => "false notifications",
            Hurt::EndListeners => "lost notifications",
            Hurt::UndoCommit => "undone commit",
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Hurt::StopForLessThanALease | Hurt::StopForMoreThanALease => Kind::Stopped,
            Hurt::LoseAnswer { .. } => Kind::LostAnswer,
            // Who is killed is said apart.
            Hurt::WallClock { .. } | Hurt::KeepSnapshot | Hurt::KillTogether { .. } => Kind::Harmless,
            Hurt::NotifyFalsely | Hurt::EndListeners => Kind::Misled,
            Hurt::Crash => Kind::Crashed,
            _ => Kind::Other,
        }
    }
}

/// What is going to be done in a run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// By worker.
    pub process: Vec<Vec<Planned>>,
    pub together: Vec<Planned>,
    pub network: Vec<Vec<Planned>>,
    pub server: Vec<Planned>,
    pub database: Vec<Planned>,
    pub undone: Vec<Planned>,
    pub rows: Vec<Planned>,
    /// Whether the workers' loggers and callbacks panic.
    pub panics: bool,
    /// Whether threads have leases of different lengths for one lock.
    pub leases: bool,
    /// The worker whose wall clock can be moved.
    pub clock: Option<usize>,
}

impl Plan {
    /// Draws a plan. Each seed uses about half of what there is, so that what one hurt hides another seed shows.
    pub fn draw(seed: u64, workers: usize, lasts: Duration, lease: Duration) -> Plan {
        let mut random = StdRng::seed_from_u64(seed);
        let mut used: Vec<&str> = if random.random_bool(0.3) {
            // One or two things, again and again.
            KINDS.choose_multiple(&mut random, 2).copied().collect()
        } else if random.random_bool(0.3) {
            // Those who wait can be reached all the time, and have no excuse.
            OF_WAITING.into_iter().filter(|_| random.random_bool(0.6)).collect()
        } else {
            KINDS.into_iter().filter(|_| random.random_bool(0.5)).collect()
        };
        if used.is_empty() {
            used.extend(KINDS);
        }
        // It weakens what can be asked for, so it comes in some seeds only.
        let undoes = random.random_bool(0.2);
        if undoes {
            used.push("undone commit");
        }
        let clock = used.contains(&"wall clock").then(|| random.random_range(0..workers));
        let has = |kind: &str| used.contains(&kind);
        // Some seeds hurt all the time, others leave time to see what follows from one thing.
        let calm = random.random_range(1..=4);
        let mut track = |gap: Duration, draw: &dyn Fn(&mut StdRng) -> Vec<(Hurt, Duration)>| {
            let gap = gap * calm / 2;
            let (mut planned, mut at) = (Vec::new(), random.random_range(ms(0)..gap));
            while at < lasts {
                let choices = draw(&mut random);
                let Some((hurt, lasts)) = choices.choose(&mut random).copied() else { break };
                planned.push(Planned { at, lasts, hurt });
                at += lasts + random.random_range(gap / 4..gap);
            }
            planned
        };
        let process = (0..workers).map(|worker| {
            track(ms(2_500), &|random| {
                let all = [
                    (Hurt::Kill, random.random_range(ms(0)..ms(600))),
                    (Hurt::StopForLessThanALease, random.random_range(ms(50)..lease * 3 / 4)),
                    (Hurt::StopForMoreThanALease, random.random_range(lease * 21 / 20..lease * 3 / 2)),
                    (Hurt::Abandon, ms(0)),
                    (Hurt::WallClock { is_forward: random.random_bool(0.5) }, ms(300)),
                ];
                let is_possible =
                    |hurt: &Hurt| has(hurt.name()) && (hurt.name() != "wall clock" || clock == Some(worker));
                all.into_iter().filter(|(hurt, _)| is_possible(hurt)).collect()
            })
        });
        let process = process.collect();
        let together = track(ms(3_000), &|random| {
            let hurt = Hurt::KillTogether { waiting: random.random_bool(0.7), spare: random.random_range(0..workers) };
            if has(hurt.name()) { vec![(hurt, random.random_range(ms(0)..ms(600)))] } else { Vec::new() }
        });
        let network = (0..workers).map(|_| {
            track(ms(2_000), &|random| {
                let mut delay = || if random.random_bool(0.3) { ms(0) } else { random.random_range(ms(1)..ms(600)) };
                let delay = Hurt::Delay { requests: delay(), answers: delay() };
                // Longer than some leases, and than a try.
                let long = Hurt::Delay { requests: ms(0), answers: random.random_range(ms(601)..ms(3_000)) };
                let which = random.random_range(1..4);
                let stall =
                    Hurt::Stall { requests: which & 1 > 0, answers: which & 2 > 0, then_cuts: random.random_bool(0.4) };
                // Parts of our statements, and of the names that go with those that are prepared.
                let texts = ["pg_try_advisory", "acquire \"", "refresh \"", "release \"", "hand over \""];
                let lost = Hurt::LoseAnswer { to: texts.choose(random).copied().expect("one of five") };
                // To be late matters most where a transaction has begun: when the first hold of a lock is made.
                let to = if random.random_bool(0.3) {
                    texts[0]
                } else {
                    texts.choose(random).copied().expect("one of five")
                };
                let is_first = to == "pg_try_advisory";
                let by = if !is_first && random.random_bool(0.5) {
                    ms(100)..ms(500)
                } else {
                    // Of a first hold not so long that it is over before it is known.
                    lease * 3 / 4..if is_first { lease * 11 / 10 } else { lease * 5 / 4 }
                };
                let late = Hurt::HoldBackAnswer { to, by: random.random_range(by) };
                let fade = Hurt::Fade { answers: random.random_range(lease / 5..lease * 2 / 5) };
                // Mostly one that takes a lock.
                let with = if random.random_bool(0.5) {
                    texts[1]
                } else {
                    texts[1..].choose(random).copied().expect("one of four")
                };
                let keep = Hurt::KeepRequest { with, by: random.random_range(ms(300)..ms(3_500)) };
                let all = [
                    (keep, ms(1_000)),
                    (Hurt::SwallowAnswers { with }, random.random_range(ms(1_000)..ms(3_500))),
                    (Hurt::Cut, ms(0)),
                    (lost, ms(200)),
                    (late, FRESH_TIME),
                    (fade, random.random_range(lease..lease * 3 / 2)),
                    (delay, random.random_range(ms(500)..ms(2_500))),
                    (long, random.random_range(ms(1_000)..ms(4_000))),
                    (stall, random.random_range(ms(100)..lease * 3 / 2)),
                ];
                all.into_iter().filter(|(hurt, _)| has(hurt.name())).collect()
            })
        });
        let network = network.collect();
        let server = track(ms(3_500), &|random| {
            let all = [
                (Hurt::Crash, random.random_range(ms(0)..ms(500))),
                (Hurt::Restart, ms(0)),
                (Hurt::Freeze, random.random_range(ms(100)..lease * 5 / 4)),
            ];
            all.into_iter().filter(|(hurt, _)| has(hurt.name())).collect()
        });
        let database = track(ms(1_800), &|random| {
            let all = [
                (Hurt::EndSessions, ms(0)),
                (Hurt::EndSessionsAgain, random.random_range(ms(300)..ms(2_000))),
                (Hurt::TakeAllConnections, random.random_range(ms(200)..ms(1_500))),
                (Hurt::KeepSnapshot, random.random_range(ms(500)..ms(3_000))),
                (Hurt::LockRow, random.random_range(ms(50)..lease * 5 / 4)),
                // Seldom for long: nothing else happens meanwhile.
                (Hurt::LockTable, ms(1_000) + ms(6_000).mul_f64(random.random_range(0.0..1.0_f64).powi(3))),
            ];
            all.into_iter().filter(|(hurt, _)| has(hurt.name())).collect()
        });
        let undone = track(ms(2_000), &|_| if undoes { vec![(Hurt::UndoCommit, ms(0))] } else { Vec::new() });
        let rows = track(ms(1_200), &|random| {
            rows::draw(random).into_iter().filter(|hurt| has(hurt.name())).map(|hurt| (hurt, ms(0))).collect()
        });
        let (panics, leases) = (has("panics"), has("leases"));
        Plan { process, together, network, server, database, undone, rows, panics, leases, clock }
    }

    /// The names of all that is done.
    pub fn hurts(&self) -> impl Iterator<Item = &'static str> {
        let by_worker = self.process.iter().chain(&self.network);
        let others = [&self.together, &self.server, &self.database, &self.undone, &self.rows];
        let done = by_worker.chain(others).flatten().map(|planned| planned.hurt.name());
        done.chain(self.panics.then_some("panics")).chain(self.leases.then_some("leases"))
    }
}

/// What there is to hurt.
pub struct Targets<'a> {
    pub workers: &'a Workers,
    pub proxies: &'a [Proxy],
    pub server: &'a Mutex<Server>,
    pub dsn: &'a str,
    pub table: &'a str,
    /// Says what time it is to the worker whose wall clock can be moved.
    pub clock_file: PathBuf,
    pub began: Nanos,
    pub faults: &'a Mutex<Vec<Fault>>,
}

impl Targets<'_> {
    /// Carries a plan out, and returns when the last thing of it is over.
    pub fn hurt(&self, plan: &Plan, lasts: Duration) {
        thread::scope(|scope| {
            for (worker, track) in plan.process.iter().enumerate() {
                scope.spawn(move || {
                    self.run(track, lasts, Some(worker), |planned| {
                        self.hurt_process(worker, planned);
                        None
                    })
                });
            }
            for ((worker, track), proxy) in plan.network.iter().enumerate().zip(self.proxies) {
                scope.spawn(move || {
                    self.run(track, lasts, Some(worker), |planned| {
                        hurt_network(proxy, planned);
                        None
                    })
                });
            }
            scope.spawn(|| {
                self.run(&plan.server, lasts, None, |planned| {
                    self.hurt_server(planned);
                    None
                })
            });
            scope.spawn(|| {
                self.run(&plan.together, lasts, None, |planned| {
                    self.kill_together(planned);
                    None
                })
            });
            for track in [&plan.database, &plan.undone, &plan.rows] {
                scope.spawn(|| self.run(track, lasts, None, |planned| self.hurt_database(planned)));
            }
        });
    }

    fn run(&self, track: &[Planned], lasts: Duration, worker: Option<usize>, hurt: impl Fn(&Planned) -> Option<Kind>) {
        for planned in track {
            let since = Duration::from_nanos(now() - self.began);
            if since > lasts {
                return;
            }
            thread::sleep(planned.at.saturating_sub(since));
            if let (Kind::Stopped, Some(worker)) = (planned.hurt.kind(), worker) {
                // Just before its commit or its fence: so it has a chance to come late.
                self.workers.wait_for_a_write(worker, ms(1_000));
            }
            let begin = now();
            let kind = hurt(planned).unwrap_or_else(|| planned.hurt.kind());
            self.note(planned, kind, worker, begin);
        }
    }

    fn note(&self, planned: &Planned, kind: Kind, worker: Option<usize>, begin: Nanos) {
        let what = format!("{:?} for {:?}", planned.hurt, planned.lasts);
        let fault = Fault { what, kind, worker, begin, end: now() };
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
    }

    fn kill_together(&self, planned: &Planned) {
        let Hurt::KillTogether { waiting, spare } = planned.hurt else { unreachable!("{planned:?}") };
        let mut killed = self.workers.which(waiting);
        killed.retain(|worker| waiting || *worker != spare);
        let begin = now();
        self.workers.kill(&killed);
        thread::sleep(planned.lasts);
        for worker in killed {
            self.workers.start_again(worker);
            self.note(planned, Kind::Other, Some(worker), begin);
        }
    }

    fn hurt_process(&self, worker: usize, planned: &Planned) {
        match planned.hurt {
            Hurt::Kill => {
                self.workers.kill(&[worker]);
                thread::sleep(planned.lasts);
                self.workers.start_again(worker);
            }
            Hurt::StopForLessThanALease | Hurt::StopForMoreThanALease => {
                self.workers.signal(worker, Signal::SIGSTOP);
                thread::sleep(planned.lasts);
                self.workers.signal(worker, Signal::SIGCONT);
            }
            Hurt::Abandon => self.workers.tell(worker, "abandon"),
            Hurt::WallClock { is_forward } => {
                let offset = if is_forward { "+3600" } else { "-3600" };
                self.set_clock(offset);
                thread::sleep(planned.lasts);
                self.set_clock("+0");
            }
            _ => unreachable!("{planned:?}"),
        }
    }

    pub fn set_clock(&self, offset: &str) {
        // At once, so that nobody reads half of it.
        let new = self.clock_file.with_extension("new");
        fs::write(&new, offset).and_then(|()| fs::rename(&new, &self.clock_file)).expect("set the clock");
    }

    fn hurt_server(&self, planned: &Planned) {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        match planned.hurt {
            Hurt::Crash => {
                server.ctl(&["stop", "-m", "immediate"]);
                thread::sleep(planned.lasts);
                server.ctl(&["start"]);
            }
            Hurt::Restart => server.ctl(&["restart", "-m", "fast"]),
            Hurt::Freeze => {
                server.freeze();
                thread::sleep(planned.lasts);
                server.thaw();
            }
            _ => unreachable!("{planned:?}"),
        }
    }

    /// What fails here fails because of something else that is being done to the server. Says what it has done to
    /// which lock.
    fn hurt_database(&self, planned: &Planned) -> Option<Kind> {
        let mut client = Client::connect(&format!("{} connect_timeout=2", self.dsn), NoTls).ok()?;
        let table = self.table;
        match planned.hurt {
            Hurt::EndSessions | Hurt::EndSessionsAgain => {
                let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                           WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND random() < 0.7";
                let start = Instant::now();
                while client.batch_execute(sql).is_ok() && start.elapsed() < planned.lasts {
                    thread::sleep(ms(50));
                }
            }
            Hurt::LockTable => {
                // Behind whoever uses it now; everybody else stands behind this one meanwhile.
                let sql = format!("SET lock_timeout = '3s'; BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE");
                if client.batch_execute(&sql).is_ok() {
                    thread::sleep(planned.lasts);
                }
            }
            Hurt::PutDeadWaiters { count, placing, with_nulls } => {
                return Some(rows::put_dead_waiters(&mut client, table, count, placing, with_nulls));
            }
            Hurt::FreeRow(how) => return Some(rows::free_row(&mut client, table, how)),
            Hurt::NotifyFalsely => rows::notify_falsely(&mut client, table),
            Hurt::EndListeners => rows::end_listeners(&mut client),
            Hurt::TakeAllConnections => {
                let mut taken = Vec::new();
                while let Ok(another) = Client::connect(&format!("{} connect_timeout=2", self.dsn), NoTls) {
                    taken.push(another);
                }
                thread::sleep(planned.lasts);
            }
            Hurt::KeepSnapshot => {
                let sql = format!("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM {table}");
                client.batch_execute(&sql).ok();
                thread::sleep(planned.lasts);
            }
            Hurt::LockRow => {
                let sql = format!("BEGIN; SELECT FROM {table} WHERE lock_id = '{HOT}' FOR UPDATE");
                client.batch_execute(&sql).ok();
                thread::sleep(planned.lasts);
            }
            Hurt::UndoCommit => {
                // The row as it was before its newest hold: somebody else's, under the version and the lease of
                // another time.
                let sql = format!(
                    "UPDATE {table} SET version = version - 1, owner_id = 'before', lease_id = gen_random_uuid(),
                         lease_expire_time = clock_timestamp() + interval '1 second', waiters = NULL
                     WHERE (lock_id, version) IN (SELECT lock_id, version FROM {table}
                         WHERE version > 1 AND released_at IS NULL AND lease_expire_time > clock_timestamp()
                         ORDER BY lock_id = '{HOT}' AND random() < 0.5 DESC, random() LIMIT 1)
                     RETURNING lock_id"
                );
                let undone = client.query(&sql, &[]);
                // Without an answer it may have been any.
                return match undone.as_deref() {
                    Ok([]) => Some(Kind::Harmless),
                    Ok([row, ..]) => Some(Kind::Undone(row.get(0))),
                    Err(_) => Some(Kind::Undone(String::new())),
                };
            }
            _ => unreachable!("{planned:?}"),
        }
        None
    }
}

fn hurt_network(proxy: &Proxy, planned: &Planned) {
    match planned.hurt {
        Hurt::KeepRequest { with, by } => {
            proxy.keep_request(with.as_bytes());
            let start = Instant::now();
            while proxy.kept_requests() == 0 && start.elapsed() < planned.lasts {
                thread::sleep(ms(5));
            }
            proxy.keep_no_request();
            if proxy.kept_requests() > 0 {
                thread::sleep(by);
                proxy.deliver();
            }
        }
        Hurt::SwallowAnswers { with } => {
            proxy.swallow_answers_after(with.as_bytes());
            thread::sleep(planned.lasts);
            proxy.swallow_no_answers();
            // Nobody is left with a connection that says nothing.
            proxy.cut();
        }
        Hurt::Cut => proxy.cut(),
        Hurt::LoseAnswer { to } => {
            proxy.lose_answer_to(to.as_bytes());
            thread::sleep(planned.lasts);
            proxy.lose_no_answer();
        }
        Hurt::HoldBackAnswer { to, by } => {
            proxy.hold_back_answer_to(to.as_bytes(), by);
            thread::sleep(planned.lasts);
            proxy.hold_back_no_answer();
            thread::sleep(by);
        }
        Hurt::Delay { requests, answers } => {
            proxy.delay_requests(requests);
            proxy.delay_answers(answers);
            thread::sleep(planned.lasts);
            proxy.delay_requests(ms(0));
            proxy.delay_answers(ms(0));
            // What is on its way takes as long as it would have.
            thread::sleep(requests.max(answers));
        }
        Hurt::Fade { answers } => {
            proxy.delay_answers(answers);
            // Long enough for a refresh.
            thread::sleep(answers * 2 + ms(500));
            proxy.stall(true, true);
            thread::sleep(planned.lasts);
            proxy.delay_answers(ms(0));
            proxy.stall(false, false);
        }
        Hurt::Stall { requests, answers, then_cuts } => {
            proxy.stall(requests, answers);
            thread::sleep(planned.lasts);
            if then_cuts {
                proxy.cut();
            }
            proxy.stall(false, false);
        }
        _ => unreachable!("{planned:?}"),
    }
}
