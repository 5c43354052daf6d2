//! Events as metrics: `scripts/with-postgres.sh cargo run --example prometheus`
//!
//! Some threads take turns at a lock, and one doesn't wait; what they did is printed in the text format that
//! Prometheus reads. A service would serve that text on `/metrics`.

use std::error::Error;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};
use storage_lock::{Event, LockOptions, PostgresStorage, PostgresStorageOptions, StorageLock};

mod support;

const THREADS: usize = 3;
const TURNS: usize = 3;

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let registry = Registry::new();
    let metrics = Metrics::new(&registry)?;
    let options = PostgresStorageOptions::from_dsn(&support::dsn()?);
    let storage = PostgresStorage::new(options.on_event(move |event| metrics.count(event)))?;
    // A lease as short as this one is for a short example: a refresh comes after 50 ms.
    let options = LockOptions::new("metered")
        .lease_expire_after(Duration::from_secs(2))
        .lease_refresh_interval(Duration::from_millis(50));
    let lock = StorageLock::with_options(&storage, options)?;

    thread::scope(|scope| {
        let workers: Vec<_> = (1..=THREADS)
            .map(|number| {
                let lock = &lock;
                scope.spawn(move || work(lock, &format!("worker-{number}")))
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    let guard = lock.lock("worker-1")?;
    if lock.try_lock("hurried")?.is_some() {
        return Err("the lock is somebody else's".into());
    }
    // Still held: the gauge says so.
    print!("{}", TextEncoder::new().encode_to_string(&registry.gather())?);
    guard.unlock()?;
    Ok(())
}

fn work(lock: &StorageLock, worker: &str) -> storage_lock::Result<()> {
    for _ in 0..TURNS {
        let guard = lock.lock(worker)?;
        thread::sleep(Duration::from_millis(120));
        guard.unlock()?;
    }
    Ok(())
}

/// What is counted.
///
/// No metric has the lock or its owner as a label: each value of a label is a series of its own, kept for ever by the
/// process and by Prometheus, and ids that are made from users or jobs are without end. Where the locks are few and
/// known, a label for them is fine.
struct Metrics {
    acquires: IntCounterVec,
    held: IntGauge,
    waited: Histogram,
    busy: IntCounter,
    refreshes: Histogram,
    failed_refreshes: IntCounter,
    losses: IntCounter,
    releases: IntCounterVec,
    reconnects: IntCounter,
}

impl Metrics {
    fn new(registry: &Registry) -> prometheus::Result<Metrics> {
        // From half a millisecond to half a minute, and to the longest that a refresh should take.
        let waited = prometheus::exponential_buckets(0.000_5, 4.0, 9)?;
        let latencies = prometheus::exponential_buckets(0.000_25, 2.0, 14)?;
        let counter = |name, help| IntCounter::new(name, help);
        let metrics = Metrics {
            acquires: IntCounterVec::new(
                Opts::new("storage_lock_acquires_total", "Locks acquired; by a takeover where a lease had run out."),
                &["takeover"],
            )?,
            held: IntGauge::new("storage_lock_held", "Locks that this process holds.")?,
            waited: Histogram::with_opts(
                HistogramOpts::new("storage_lock_acquire_wait_seconds", "How long the acquires took.").buckets(waited),
            )?,
            busy: counter(
                "storage_lock_busy_total",
                "Times that the database was asked for a lock that was not free.",
            )?,
            refreshes: Histogram::with_opts(
                HistogramOpts::new("storage_lock_refresh_seconds", "How long the refreshes took.").buckets(latencies),
            )?,
            failed_refreshes: counter(
                "storage_lock_failed_refreshes_total",
                "Attempts to refresh a lease that failed.",
            )?,
            losses: counter("storage_lock_losses_total", "Locks that were lost while they were held.")?,
            releases: IntCounterVec::new(
                Opts::new("storage_lock_releases_total", "Locks released; confirmed if the database said so."),
                &["confirmed"],
            )?,
            reconnects: counter("storage_lock_reconnects_total", "Connections opened after others had broken.")?,
        };
        registry.register(Box::new(metrics.acquires.clone()))?;
        registry.register(Box::new(metrics.held.clone()))?;
        registry.register(Box::new(metrics.waited.clone()))?;
        registry.register(Box::new(metrics.busy.clone()))?;
        registry.register(Box::new(metrics.refreshes.clone()))?;
        registry.register(Box::new(metrics.failed_refreshes.clone()))?;
        registry.register(Box::new(metrics.losses.clone()))?;
        registry.register(Box::new(metrics.releases.clone()))?;
        registry.register(Box::new(metrics.reconnects.clone()))?;
        // Series that are there from the start, at 0, can be alerted on when they grow for the first time.
        for value in ["false", "true"] {
            metrics.acquires.with_label_values(&[value]);
            metrics.releases.with_label_values(&[value]);
        }
        Ok(metrics)
    }

    fn count(&self, event: &Event<'_>) {
        match event {
            Event::Acquired { waited, is_takeover, .. } => {
                self.acquires.with_label_values(&[yes_or_no(*is_takeover)]).inc();
                self.waited.observe(waited.as_secs_f64());
                self.held.inc();
            }
            Event::Busy { .. } => self.busy.inc(),
            // How many there were is in the histogram.
            Event::Refreshed { latency, .. } => self.refreshes.observe(latency.as_secs_f64()),
            Event::RefreshFailed { .. } => self.failed_refreshes.inc(),
            Event::Lost { .. } => {
                self.losses.inc();
                self.held.dec();
            }
            Event::Released { is_confirmed, .. } => {
                self.releases.with_label_values(&[yes_or_no(*is_confirmed)]).inc();
                self.held.dec();
            }
            Event::Reconnected { .. } => self.reconnects.inc(),
            // What a later version tells of.
            _ => {}
        }
    }
}

fn yes_or_no(is_so: bool) -> &'static str {
    if is_so { "true" } else { "false" }
}
