//! B2: whether threads of one process hand a lock over as fast as one of them takes it alone.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use storage_lock::StorageLock;

use crate::context::Context;
use crate::figures::{Figure, Section};
use crate::measure::{SLICE_HEADER, Spread, between, digits, quantile, slice, slice_of_threads};
use crate::server::{Table, lock_and_unlock};

const THREADS: usize = 10;

pub fn run(context: &Context) -> Section {
    let s = Duration::from_secs;
    let (rounds, length, alone) = context.pick((5, s(3), s(1)), (1, s(1), Duration::from_millis(200)));
    let table = Table::new(context);
    let storage = table.storage();
    let wanted = StorageLock::new(&storage, "wanted").expect("make a lock");
    let unwanted = StorageLock::new(&storage, "unwanted").expect("make a lock");
    let is_held = AtomicBool::new(false);
    let by_thread: [AtomicU64; THREADS] = Default::default();
    let (wanted, is_held, by_thread) = (&wanted, &is_held, &by_thread);
    let rounds = between(
        rounds,
        || {
            let cycle = |thread: usize| {
                let owner_id = format!("worker-{thread}");
                move || {
                    let guard = wanted.lock(&owner_id).expect("lock");
                    assert!(!is_held.swap(true, Ordering::SeqCst), "two threads hold the lock");
                    by_thread[thread].fetch_add(1, Ordering::Relaxed);
                    is_held.store(false, Ordering::SeqCst);
                    guard.unlock().expect("unlock");
                }
            };
            slice_of_threads(length, (0..THREADS).map(cycle).collect())
        },
        || slice(alone, || lock_and_unlock(&unwanted, "worker")),
    );
    let rows = rounds.iter().zip(1..).map(|((slice, alone), round)| {
        let mut row = vec![round.to_string(), "ten threads".to_owned()];
        row.extend(slice.columns());
        row.push(format!("{alone:.1}"));
        row
    });
    context.write_csv("b2.csv", &[&SLICE_HEADER[..], &["alone_per_second"]].concat(), rows);

    let rate = Spread::of(rounds.iter().map(|(slice, _)| slice.rate()));
    let alone = Spread::of(rounds.iter().map(|(_, alone)| *alone));
    let ratio = Spread::of(rounds.iter().map(|(slice, alone)| slice.rate() / alone));
    let longest = Spread::of(rounds.iter().map(|(slice, _)| quantile(&slice.times, 1.0)));
    let holds = by_thread.each_ref().map(|holds| holds.load(Ordering::Relaxed));
    let total: u64 = holds.iter().sum();
    let [least, most] =
        [holds.iter().min(), holds.iter().max()].map(|holds| digits(*holds.unwrap() as f64 / total as f64));
    Section {
        figures: vec![
            Figure::new("holds a second", rate).yardstick(alone).ratio_at_least(ratio, 0.5, 1.0),
            Figure::new("longest complete cycle, ms", longest),
            Figure::new("share of holds by thread", format!("{least} to {most}")).yardstick(1.0 / THREADS as f64),
        ],
        notes: vec![
            "The yardstick is what one thread does alone, before and after; of shares, an even one.".to_owned(),
        ],
        ..Section::default()
    }
}
