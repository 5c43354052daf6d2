//! B8: whether different locks get in each other's way in one process.

use std::time::Duration;

use storage_lock::StorageLock;

use crate::bare::Bare;
use crate::context::Context;
use crate::figures::Section;
use crate::measure::{SLICE_HEADER, Slice, alternate, slice_of_threads, slice_rows};
use crate::server::{Table, lock_and_unlock};
use crate::uncontended::{compared, ratios};

const LOCKS: usize = 64;
const THREADS: usize = 16;
const CONNECTIONS: u32 = 16;

pub fn run(context: &Context) -> Section {
    let (rounds, length) = context.pick((6, Duration::from_secs(2)), (1, Duration::from_millis(300)));
    let table = Table::new(context);
    let storage = table.storage_of(CONNECTIONS);
    let lock_id = |number: usize| format!("lock-{number}");
    let locks: Vec<StorageLock> =
        (0..LOCKS).map(|number| StorageLock::new(&storage, lock_id(number)).expect("make a lock")).collect();
    locks.iter().for_each(|lock| lock_and_unlock(lock, "creator"));
    let mut bares: Vec<Bare> =
        (0..THREADS).map(|number| Bare::new(&table, &storage, &lock_id(number * LOCKS / THREADS))).collect();
    let mut randoms: Vec<Random> = (1..).take(THREADS).map(Random).collect();
    let locks = &locks;
    let pairs = alternate(
        rounds,
        || {
            let cycles = randoms.iter_mut().zip(0..).map(|(random, thread)| {
                let owner_id = format!("worker-{thread}");
                move || lock_and_unlock(&locks[random.below(LOCKS)], &owner_id)
            });
            slice_of_threads(length, cycles.collect())
        },
        || slice_of_threads(length, bares.iter_mut().map(|bare| || bare.acquire_and_release()).collect()),
    );
    context.write_csv("b8.csv", &SLICE_HEADER, slice_rows(&pairs, ["library", "bare clients"]));
    let measure = format!("cycles a second (max_connections = {CONNECTIONS})");
    Section {
        figures: vec![
            compared(&measure, &pairs, Slice::rate).ratio_at_least(ratios(&pairs, Slice::rate), 0.5, 0.8),
            compared("p50, ms", &pairs, Slice::p50).ratio(ratios(&pairs, Slice::p50)),
        ],
        notes: vec![format!(
            "The yardstick is {THREADS} bare clients, each with a lock of its own. The library's threads pick one of \
             {LOCKS} at random."
        )],
        ..Section::default()
    }
}

/// Xorshift: the same locks in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}
