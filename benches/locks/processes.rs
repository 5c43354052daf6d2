//! B3: how fast a lock goes from process to process: from just before `unlock` is called until `lock` returns
//! elsewhere.
//!
//! `CLOCK_MONOTONIC` is the same for all processes of a machine, and the versions say which hold came after which.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use storage_lock::StorageLock;

use crate::child::{Process, hear, say};
use crate::context::Context;
use crate::figures::{Figure, Section};
use crate::measure::{Spread, Times, between, digits, quantile, slice, times};
use crate::plot;
use crate::server::{Table, lock_and_unlock};

pub const ROLE: &str = "contend";
const PROCESSES: usize = 8;
const THREADS: usize = 2;
/// Enough for every connection to be open.
const WARM_UP_HOLDS: usize = 10;

/// A kind of hand-over, and the times of those in a round.
type Kind = (&'static str, fn(&Round) -> Times);

/// One hold, in nanoseconds of the monotonic clock.
struct Hold {
    version: i64,
    process: usize,
    thread: usize,
    asked: u64,
    acquired: u64,
    releasing: u64,
}

/// What one round came to.
struct Round {
    /// Holds a second.
    rate: f64,
    /// A release to acquire by the thread that released, by another one of its process, and in another process.
    same_thread: Times,
    same_process: Times,
    between: Times,
    longest_wait_ms: f64,
    by_process: [u64; PROCESSES],
    by_thread: [u64; PROCESSES * THREADS],
}

impl Round {
    fn within(&self) -> Times {
        sum([&self.same_thread, &self.same_process])
    }

    fn to_another_thread(&self) -> Times {
        sum([&self.same_process, &self.between])
    }

    fn all(&self) -> Times {
        sum([&self.within(), &self.between])
    }
}

pub fn run(context: &Context) -> Section {
    let s = Duration::from_secs;
    let (rounds, length, alone) = context.pick((3, s(10), s(1)), (1, s(1), Duration::from_millis(200)));
    let table = Table::new(context);
    let storage = table.storage();
    let lock = StorageLock::new(&storage, "unwanted").expect("make a lock");
    let rounds = between(rounds, || round(&table, length), || slice(alone, || lock_and_unlock(&lock, "worker")));

    let merged = |part: fn(&Round) -> Times| sum(&rounds.iter().map(|(round, _)| part(round)).collect::<Vec<_>>());
    let kinds: [Kind; 3] = [
        ("all", Round::all),
        ("within a process", Round::within),
        ("between processes", |round| round.between.clone()),
    ];
    let lines = kinds.map(|(kind, part)| (kind, distribution(&merged(part))));
    let rows = lines.iter().flat_map(|(kind, points)| {
        points.iter().map(|(ms, share)| vec![(*kind).to_owned(), format!("{ms:.3}"), format!("{share:.5}")])
    });
    context.write_csv("b3.csv", &["hand_over", "up_to_ms", "cumulative_share"], rows);
    if let Some(path) = context.file("hand_over.svg") {
        plot::hand_over(&path, &lines);
    }

    let spread = |value: &dyn Fn(&Round) -> f64| Spread::of(rounds.iter().map(|(round, _)| value(round)));
    let alone = Spread::of(rounds.iter().map(|(_, alone)| *alone));
    let ratio = Spread::of(rounds.iter().map(|(round, alone)| round.rate / alone));
    let [p50, p99] = [0.5, 0.99].map(|q| spread(&|round| quantile(&round.all(), q)));
    let mut figures = vec![
        Figure::new("holds a second", spread(&|round| round.rate)).yardstick(alone).ratio_at_least(ratio, 0.25, None),
        Figure::new("release to acquire, p50, ms", p50).at_most(p50.median, " ms", 3.0, 1.0),
        Figure::new("release to acquire, p99, ms", p99).at_most(p99.median, " ms", 50.0, 10.0),
    ];
    let to_another_thread: Kind = ("to another thread", Round::to_another_thread);
    for (kind, part) in kinds.into_iter().chain([to_another_thread]) {
        let times = merged(part);
        let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| digits(quantile(&times, q)));
        figures.push(Figure::new(format!("{kind}: p50, p99, max, ms"), format!("{p50}, {p99}, {max}")));
    }
    let share = |count: &dyn Fn(&Round) -> u64| spread(&|round| count(round) as f64 / round.all().len().max(1) as f64);
    figures.push(Figure::new("share of hand-overs between processes", share(&|round| round.between.len())));
    figures.push(Figure::new("share of hand-overs to the same thread", share(&|round| round.same_thread.len())));
    figures.push(Figure::new("longest wait for the lock, ms", spread(&|round| round.longest_wait_ms)));
    let least_and_most = |shares: &dyn Fn(&Round) -> Vec<f64>| {
        let [least, most] = [f64::min, f64::max].map(|f| spread(&|round| shares(round).into_iter().reduce(f).unwrap()));
        format!("{} to {}", digits(least.median), digits(most.median))
    };
    let by_process = least_and_most(&|round| shares(&round.by_process));
    figures.push(Figure::new("share of holds by process", by_process).yardstick(1.0 / PROCESSES as f64));
    let by_thread = least_and_most(&|round| shares(&round.by_thread));
    figures.push(Figure::new("share of holds by thread", by_thread).yardstick(1.0 / (PROCESSES * THREADS) as f64));
    Section {
        figures,
        notes: vec![
            "The yardstick is what one thread does alone, before and after; of shares, an even one.".to_owned(),
            "A release to acquire includes the statement that releases.".to_owned(),
        ],
        ..Section::default()
    }
}

fn sum<'a>(parts: impl IntoIterator<Item = &'a Times>) -> Times {
    let mut sum = times();
    parts.into_iter().for_each(|part| sum.add(part).expect("it grows"));
    sum
}

fn shares(holds: &[u64]) -> Vec<f64> {
    let total: u64 = holds.iter().sum();
    holds.iter().map(|holds| *holds as f64 / total as f64).collect()
}

/// Which share of the times is up to so many milliseconds.
fn distribution(times: &Times) -> Vec<(f64, f64)> {
    let mut seen = 0;
    // From 10 µs, in steps of a tenth.
    let steps = times.iter_log(10_000, 1.1).map(|step| {
        seen += step.count_since_last_iteration();
        (step.value_iterated_to() as f64 / 1e6, seen as f64 / times.len() as f64)
    });
    let steps: Vec<(f64, f64)> = steps.collect();
    // A line begins at none.
    let begin = steps.iter().take_while(|(_, share)| *share == 0.0).count().saturating_sub(1);
    steps[begin..].to_vec()
}

fn round(table: &Table, length: Duration) -> Round {
    let lock_id = format!("wanted-{}", monotonic_nanos());
    let arguments = [lock_id, length.as_nanos().to_string()];
    let mut processes: Vec<Process> =
        (0..PROCESSES).map(|_| Process::start(ROLE, &table.dsn, table, &arguments)).collect();
    for process in &mut processes {
        assert_eq!(process.expect_line(), "ready");
    }
    let start = monotonic_nanos() + 100_000_000;
    let end = start + u64::try_from(length.as_nanos()).unwrap();
    processes.iter_mut().for_each(|process| process.tell(&start.to_string()));

    let mut holds = Vec::new();
    for (process, mut child) in processes.into_iter().enumerate() {
        while let Some(line) = child.next_line() {
            let mut numbers = line.split(' ').map(|number| number.parse::<u64>().expect("a number"));
            let mut next = || numbers.next().expect("five numbers");
            let (thread, version) = (next() as usize, next() as i64);
            holds.push(Hold { version, process, thread, asked: next(), acquired: next(), releasing: next() });
        }
        child.finish();
    }
    holds.sort_by_key(|hold| hold.version);

    let mut round = Round {
        rate: 0.0,
        same_thread: times(),
        same_process: times(),
        between: times(),
        longest_wait_ms: 0.0,
        by_process: [0; PROCESSES],
        by_thread: [0; PROCESSES * THREADS],
    };
    for pair in holds.windows(2) {
        let (before, after) = (&pair[0], &pair[1]);
        assert!(before.version < after.version, "version {} was given twice", before.version);
        assert!(before.releasing <= after.acquired, "versions {} and {} overlap", before.version, after.version);
        // What ends after the time is up is without competition. A version in between may have gone to nobody.
        if after.acquired <= end && before.version + 1 == after.version {
            let times = match (before.process == after.process, before.thread == after.thread) {
                (true, true) => &mut round.same_thread,
                (true, false) => &mut round.same_process,
                (false, _) => &mut round.between,
            };
            times.record((after.acquired - before.releasing).max(1)).expect("it grows");
        }
    }
    round.longest_wait_ms = holds.iter().map(|hold| hold.acquired - hold.asked).max().unwrap_or(0) as f64 / 1e6;
    for hold in holds.iter().filter(|hold| hold.acquired <= end) {
        round.by_process[hold.process] += 1;
        round.by_thread[hold.process * THREADS + hold.thread] += 1;
    }
    round.rate = round.by_process.iter().sum::<u64>() as f64 / length.as_secs_f64();
    round
}

/// One of the processes: takes the lock in each of its threads until the time is up, and then says when it had it.
pub fn child(table: &Table, arguments: &[&str]) {
    let [lock_id, length] = arguments else { panic!("a lock and a length") };
    let length: u64 = length.parse().expect("nanoseconds");
    let storage = table.storage();
    let lock = StorageLock::new(&storage, *lock_id).expect("make a lock");
    let id = std::process::id();
    let warm_up = StorageLock::new(&storage, format!("warm-up-{id}")).expect("make a lock");
    in_threads(|thread| (0..WARM_UP_HOLDS).for_each(|_| lock_and_unlock(&warm_up, &format!("worker-{thread}"))));
    say("ready");
    let Some(start) = hear() else { return };
    let start: u64 = start.parse().expect("an instant");
    let barrier = Barrier::new(THREADS);
    let holds = in_threads(|thread| {
        let owner_id = format!("worker-{id}-{thread}");
        let mut holds = Vec::new();
        barrier.wait();
        thread::sleep(Duration::from_nanos(start.saturating_sub(monotonic_nanos())));
        while monotonic_nanos() < start + length {
            let asked = monotonic_nanos();
            let guard = lock.lock(&owner_id).expect("lock");
            let acquired = monotonic_nanos();
            let version = guard.version();
            let releasing = monotonic_nanos();
            guard.unlock().expect("unlock");
            holds.push((version, asked, acquired, releasing));
        }
        holds
    });
    for (thread, holds) in holds.into_iter().enumerate() {
        holds.iter().for_each(|(version, asked, acquired, releasing)| {
            say(format_args!("{thread} {version} {asked} {acquired} {releasing}"));
        });
    }
}

fn in_threads<T: Send>(run: impl Fn(usize) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || run(thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread that takes the lock")).collect()
    })
}

fn monotonic_nanos() -> u64 {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a monotonic clock"));
    u64::try_from(now.as_nanos()).unwrap()
}
