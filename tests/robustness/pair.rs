//! The same workers on a pair of servers whose primary dies under them.

use std::time::Duration;

use crate::history::{Fault, History, Kind, Nanos, now};
use crate::run::{Run, TIMES, one_at_a_time};
use crate::support::ms;
use crate::support::server::Pair;
use crate::verdict::LONGEST_LOOK;
use crate::workload::{HOT, Habits, OWN, QUEUE};

/// How long they work before the primary dies, and after the promotion.
const WORK: Duration = ms(2_000);

#[test]
fn the_primary_dies_under_load_and_the_verdict_holds() {
    let _alone = one_at_a_time();
    let mut pair = Pair::synchronous();
    let run = Run::new("pair", pair.dsn.clone());
    let workers = run.start(1, vec![pair.dsn.clone(); 3], 0, Habits::default(), None);
    std::thread::sleep(WORK);
    let begin = now();
    pair.primary.kill();
    pair.promote();
    let promoted = now();
    // Releases commit asynchronously: what a crash may undo, a failover may too.
    let what = "the primary dies, and the standby is promoted".to_owned();
    let faults = vec![Fault { what, kind: Kind::Crashed, worker: None, begin, end: promoted }];
    std::thread::sleep(WORK);
    let mut history = History { begin: run.began, healed: promoted, faults, ..History::default() };
    workers.calm_down(TIMES.longest_lease + LONGEST_LOOK);
    workers.stop(ms(8_000));
    history.alone_until = now();
    let mut gaps = Vec::new();
    let report = run.judge(1, workers, history, Vec::new(), |history| {
        gaps.extend([HOT, QUEUE, OWN].map(|lock| longest_gap(history, lock, begin)));
    });
    print!("{}", report.text);
    println!("promoted {:?} after the kill", Duration::from_nanos(promoted - begin));
    println!("nobody got the hot lock, the queue's, any of a thread's own, for {gaps:.2?}");
    assert!(report.violations.is_empty(), "{:?}", report.violations);
    assert!(report.counts.holds > 50 && report.counts.writes > 20, "hardly anything happened: {}", report.counts);
}

/// From the last time that somebody got a lock before an instant to the first time after it.
fn longest_gap(history: &History, lock: &str, at: Nanos) -> Duration {
    let taken = history.operations.iter().filter(|operation| {
        operation.taken().is_some() && operation.call.lock().is_some_and(|taken| taken.starts_with(lock))
    });
    let ends: Vec<Nanos> = taken.filter_map(|operation| operation.end.as_ref().map(|(end, _)| *end)).collect();
    let before = ends.iter().filter(|end| **end <= at).max().copied().unwrap_or(at);
    let after = ends.iter().filter(|end| **end > at).min().copied().unwrap_or(Nanos::MAX);
    Duration::from_nanos(after - before)
}
