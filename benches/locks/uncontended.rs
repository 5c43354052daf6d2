//! B1: what the library costs on top of its two statements while nobody else wants the lock.

use std::time::Duration;

use storage_lock::StorageLock;

use crate::bare::Bare;
use crate::context::Context;
use crate::figures::{Figure, Section};
use crate::measure::{SLICE_HEADER, Slice, Spread, alternate, quantile, slice, slice_rows};
use crate::server::{Table, lock_and_unlock};

pub fn run(context: &Context) -> Section {
    let (rounds, length) = context.pick((20, Duration::from_millis(500)), (3, Duration::from_millis(100)));
    let table = Table::new(context);
    let storage = table.storage();
    let lock = StorageLock::new(&storage, "ours").expect("make a lock");
    let mut bare = Bare::new(&table, &storage, "bare");
    let pairs = alternate(
        rounds,
        || slice(length, || lock_and_unlock(&lock, "worker")),
        || slice(length, || bare.acquire_and_release()),
    );
    context.write_csv("b1.csv", &SLICE_HEADER, slice_rows(&pairs, ["library", "bare statements"]));

    let p99 = |slice: &Slice| quantile(&slice.times, 0.99);
    Section {
        figures: vec![
            compared("p50, ms", &pairs, Slice::p50).ratio_at_most(ratios(&pairs, Slice::p50), 1.6, 1.3),
            compared("p99, ms", &pairs, p99).ratio(ratios(&pairs, p99)),
            compared("cycles a second", &pairs, Slice::rate).ratio(ratios(&pairs, Slice::rate)),
        ],
        notes: vec!["The yardstick is the same two statements, prepared on one bare client.".to_owned()],
        ..Section::default()
    }
}

/// A figure of both sides of [`alternate`], each the median of its rounds.
pub fn compared(measure: &str, pairs: &[(Slice, Slice)], value: impl Fn(&Slice) -> f64) -> Figure {
    let ours = Spread::of(pairs.iter().map(|(ours, _)| value(ours)));
    let yardstick = Spread::of(pairs.iter().map(|(_, yardstick)| value(yardstick)));
    Figure::new(measure, ours).yardstick(yardstick)
}

/// Ours over the yardstick's, round by round.
pub fn ratios(pairs: &[(Slice, Slice)], value: impl Fn(&Slice) -> f64) -> Spread {
    Spread::of(pairs.iter().map(|(ours, yardstick)| value(ours) / value(yardstick)))
}
