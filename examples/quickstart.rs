//! Ten workers, one lock: `scripts/with-postgres.sh cargo run --example quickstart`
//!
//! Each worker is a thread that writes its name to a shared resource while it holds the lock. `-- 50` makes the work
//! take 50 ms instead of 300 ms. At the end the log of the workers and the resource must agree.

use std::error::Error;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use storage_lock::StorageLock;

const WORKERS: usize = 10;

/// What everybody writes to, in two steps: only the lock keeps one worker's steps together.
#[derive(Default)]
struct Resource {
    steps: Mutex<Vec<String>>,
}

fn main() {
    if let Err(error) = run() {
        let mut cause = Some(&*error as &dyn Error);
        while let Some(error) = cause {
            eprintln!("quickstart: {error}");
            cause = error.source();
        }
        std::process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let work = match std::env::args().nth(1) {
        Some(millis) => Duration::from_millis(millis.parse().map_err(|_| format!("not a number of ms: {millis:?}"))?),
        None => Duration::from_millis(300),
    };
    let dsn = std::env::var("STORAGE_LOCK_POSTGRESQL_DSN")
        .map_err(|_| "STORAGE_LOCK_POSTGRESQL_DSN is not set; scripts/with-postgres.sh COMMAND sets it")?;

    let lock = StorageLock::connect("must-serial-operation-resource-foo", &dsn)?;

    let (started, resource, order) = (Instant::now(), Resource::default(), Mutex::new(Vec::new()));
    let say = |worker: &str, what: &str| println!("{:9.3} s  {worker:9}  {what}", started.elapsed().as_secs_f64());
    thread::scope(|scope| {
        let workers: Vec<_> = (1..=WORKERS)
            .map(|number| {
                let (lock, resource, order, say) = (&lock, &resource, &order, &say);
                scope.spawn(move || -> Result<(), storage_lock::Error> {
                    let worker = format!("worker-{number}");
                    let guard = lock.lock(&worker)?;
                    say(&worker, &format!("begin, version {}", guard.version()));
                    order.lock().expect("no panic").push(worker.clone());
                    resource.steps.lock().expect("no panic").push(format!("{worker} begin"));
                    thread::sleep(work);
                    resource.steps.lock().expect("no panic").push(format!("{worker} done"));
                    say(&worker, "done");
                    guard.unlock()
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
    })?;

    let (order, steps) = (order.into_inner()?, resource.steps.into_inner()?);
    println!("order: {}", order.join(", "));
    let expected: Vec<_> =
        order.iter().flat_map(|worker| [format!("{worker} begin"), format!("{worker} done")]).collect();
    if order.len() != WORKERS || steps != expected {
        return Err(format!("the log and the resource disagree: {order:?} and {steps:?}").into());
    }
    println!("the resource saw the {WORKERS} workers one after the other");
    Ok(())
}
