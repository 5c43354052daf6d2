//! Slices of time in which something is repeated, and what several rounds of them say.

use std::fmt;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rand::seq::SliceRandom;

/// Durations in nanoseconds, to three digits.
pub type Times = Histogram<u64>;

pub fn times() -> Times {
    Histogram::new(3).expect("three digits")
}

pub fn record(times: &mut Times, duration: Duration) {
    times.record(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)).expect("it grows");
}

/// A quantile in milliseconds.
pub fn quantile(times: &Times, quantile: f64) -> f64 {
    times.value_at_quantile(quantile) as f64 / 1e6
}

/// What was done in one slice of time.
pub struct Slice {
    pub times: Times,
    pub elapsed: Duration,
}

impl Slice {
    pub fn p50(&self) -> f64 {
        quantile(&self.times, 0.5)
    }

    /// Cycles a second.
    pub fn rate(&self) -> f64 {
        self.times.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// For a CSV file: cycles, seconds, p50 and p99 in milliseconds.
    pub fn columns(&self) -> Vec<String> {
        vec![
            self.times.len().to_string(),
            format!("{:.3}", self.elapsed.as_secs_f64()),
            format!("{:.4}", self.p50()),
            format!("{:.4}", quantile(&self.times, 0.99)),
        ]
    }
}

/// The names of [`Slice::columns`], after those of a slice's round and side.
pub const SLICE_HEADER: [&str; 6] = ["round", "side", "cycles", "seconds", "p50_ms", "p99_ms"];

/// Repeats a cycle for a while.
pub fn slice(duration: Duration, mut cycle: impl FnMut()) -> Slice {
    let mut times = times();
    let began = Instant::now();
    loop {
        let before = Instant::now();
        cycle();
        record(&mut times, before.elapsed());
        let elapsed = began.elapsed();
        if elapsed >= duration {
            return Slice { times, elapsed };
        }
    }
}

/// Repeats each cycle in a thread of its own for the same while, and counts what was complete at its end.
pub fn slice_of_threads<F: FnMut() + Send>(duration: Duration, cycles: Vec<F>) -> Slice {
    let barrier = Barrier::new(cycles.len());
    let mut all = times();
    thread::scope(|scope| {
        let threads: Vec<_> = cycles
            .into_iter()
            .map(|mut cycle| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let mut times = times();
                    barrier.wait();
                    let end = Instant::now() + duration;
                    let mut before = Instant::now();
                    while before < end {
                        cycle();
                        let after = Instant::now();
                        if after <= end {
                            record(&mut times, after - before);
                        }
                        before = after;
                    }
                    times
                })
            })
            .collect();
        for thread in threads {
            all.add(thread.join().expect("a thread of a slice")).expect("it grows");
        }
    });
    Slice { times: all, elapsed: duration }
}

/// Slices of two sides, taking turns in going first, after one of each that doesn't count.
pub fn alternate(
    rounds: usize,
    mut ours: impl FnMut() -> Slice,
    mut yardstick: impl FnMut() -> Slice,
) -> Vec<(Slice, Slice)> {
    ours();
    yardstick();
    (0..rounds)
        .map(|round| {
            if round % 2 == 0 {
                let ours = ours();
                (ours, yardstick())
            } else {
                let yardstick = yardstick();
                (ours(), yardstick)
            }
        })
        .collect()
}

/// Several sides that take turns cycle by cycle, in an order that changes, where slices of one would differ by the
/// time at which they came. One round doesn't count. A slice's time is that of its own cycles.
pub fn interleave<const N: usize>(rounds: usize, length: Duration, mut cycle: impl FnMut(usize)) -> Vec<[Slice; N]> {
    let mut order: [usize; N] = std::array::from_fn(|side| side);
    let mut round = || {
        let mut slices = [(); N].map(|()| Slice { times: times(), elapsed: Duration::ZERO });
        let end = Instant::now() + length;
        while Instant::now() < end {
            order.shuffle(&mut rand::rng());
            for side in order {
                let before = Instant::now();
                cycle(side);
                let took = before.elapsed();
                record(&mut slices[side].times, took);
                slices[side].elapsed += took;
            }
        }
        slices
    };
    round();
    (0..rounds).map(|_| round()).collect()
}

/// Runs something several times, each between two slices of a yardstick: the results, and the yardstick's mean rate
/// before and after each.
pub fn between<T>(rounds: usize, mut run: impl FnMut() -> T, mut yardstick: impl FnMut() -> Slice) -> Vec<(T, f64)> {
    yardstick();
    let mut before = yardstick().rate();
    (0..rounds)
        .map(|_| {
            let result = run();
            let after = yardstick().rate();
            let mean = (before + after) / 2.0;
            before = after;
            (result, mean)
        })
        .collect()
}

/// For a CSV file: the rounds of [`alternate`].
pub fn slice_rows(pairs: &[(Slice, Slice)], sides: [&str; 2]) -> Vec<Vec<String>> {
    let rows = pairs.iter().zip(1..).flat_map(|((ours, yardstick), round)| {
        [(sides[0], ours), (sides[1], yardstick)].map(|(side, slice)| slice_row(round, side, slice))
    });
    rows.collect()
}

/// For a CSV file: one slice of a side in a round.
pub fn slice_row(round: usize, side: &str, slice: &Slice) -> Vec<String> {
    let mut row = vec![round.to_string(), side.to_owned()];
    row.extend(slice.columns());
    row
}

/// The median of several rounds, and their range.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Spread { median, least: values[0], most: values[values.len() - 1] }
    }

    /// What there is only one of.
    pub fn single(value: f64) -> Spread {
        Spread { median: value, least: value, most: value }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", digits(self.median))?;
        if self.least < self.most { write!(f, " ({} to {})", digits(self.least), digits(self.most)) } else { Ok(()) }
    }
}

/// A number with three digits or so.
pub fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}
