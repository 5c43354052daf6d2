//! Ten workers, one lock: `scripts/with-postgres.sh cargo run --example quickstart`
//!
//! Each worker is a thread that writes its name to a shared resource while it holds the lock. The work takes 300 ms,
//! or as many as the first argument says (`… --example quickstart -- 50`). At the end the workers' log and the
//! resource must agree.

use std::error::Error;
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use storage_lock::StorageLock;

mod support;

const WORKERS: usize = 10;

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let work = match std::env::args().nth(1) {
        Some(millis) => Duration::from_millis(millis.parse().map_err(|_| format!("not a number of ms: {millis:?}"))?),
        None => Duration::from_millis(300),
    };
    let lock = StorageLock::connect("must-serial-operation-resource-foo", &support::dsn()?)?;

    // What everybody writes to, in two steps: only the lock keeps a worker's steps together.
    let (resource, written) = channel();
    let (log, logged) = channel();
    let started = Instant::now();
    thread::scope(|scope| {
        for number in 1..=WORKERS {
            let (lock, resource, log) = (&lock, resource.clone(), log.clone());
            scope.spawn(move || {
                let worker = format!("worker-{number}");
                let result = serial_operation(lock, &worker, work, &resource, started);
                log.send((worker, result)).ok();
            });
        }
    });
    drop((resource, log));

    let mut done = Vec::new();
    for (worker, result) in logged {
        let version = result.map_err(|error| Box::new(error) as Box<dyn Error>)?;
        done.push((version, worker));
    }
    done.sort();
    let order: Vec<String> = done.into_iter().map(|(_, worker)| worker).collect();
    println!("order: {}", order.join(", "));
    let steps: Vec<String> = written.into_iter().collect();
    let expected: Vec<String> =
        order.iter().flat_map(|worker| [format!("{worker} begin"), format!("{worker} done")]).collect();
    if order.len() != WORKERS || steps != expected {
        return Err(format!("log and resource disagree: {order:?} and {steps:?}").into());
    }
    println!("log and resource agree: {WORKERS} workers, one after the other");
    Ok(())
}

/// Does the work under the lock, and returns the hold's version.
fn serial_operation(
    lock: &StorageLock,
    worker: &str,
    work: Duration,
    resource: &Sender<String>,
    started: Instant,
) -> storage_lock::Result<i64> {
    let say = |what: &str| println!("{:9.3} s  {worker:9}  {what}", started.elapsed().as_secs_f64());
    let guard = lock.lock(worker)?;
    say(&format!("begin (version {})", guard.version()));
    resource.send(format!("{worker} begin")).ok();
    thread::sleep(work);
    resource.send(format!("{worker} done")).ok();
    say("done");
    let version = guard.version();
    guard.unlock()?;
    Ok(version)
}
