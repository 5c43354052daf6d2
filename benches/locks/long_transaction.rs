//! B6: whether the lock stays fast while an old snapshot keeps every dead row of it.

use std::time::{Duration, Instant};

use postgres::Client;
use storage_lock::StorageLock;

use crate::context::Context;
use crate::figures::{Figure, Section};
use crate::measure::{Spread, digits, quantile, record, times};
use crate::naive::Naive;
use crate::plot;
use crate::server::{Table, lock_and_unlock};

/// Three ways to keep a lock, that take turns, and how long a turn is; the library has half of the time.
const SHAPES: [(&str, Duration); 3] = [
    ("storage-lock", Duration::from_millis(100)),
    ("row inserted and deleted", Duration::from_millis(50)),
    ("one row updated in place", Duration::from_millis(50)),
];

/// When a cycle began, in seconds, and how long it took.
type Cycle = (f64, Duration);

pub fn run(context: &Context) -> Section {
    let length = context.pick(60.0, 3.0);
    let table = Table::new(context);
    let storage = table.storage();
    let lock = StorageLock::new(&storage, "ours").expect("make a lock");
    let mut inserted = Naive::inserted_and_deleted(&table);
    let mut updated = Naive::updated_in_place(&table);
    let mut cycles: [Box<dyn FnMut()>; 3] = [
        Box::new(|| lock_and_unlock(&lock, "worker")),
        Box::new(move || inserted.take_and_release()),
        Box::new(move || updated.take_and_release()),
    ];
    for cycle in &mut cycles {
        (0..context.pick(200, 20)).for_each(|_| cycle());
    }

    let mut long = table.client();
    open_snapshot(&mut long);
    let mut measured: [Vec<Cycle>; 3] = Default::default();
    let began = Instant::now();
    while began.elapsed().as_secs_f64() < length {
        for ((cycle, measured), (_, turn)) in cycles.iter_mut().zip(&mut measured).zip(SHAPES) {
            let end = Instant::now() + turn;
            while Instant::now() < end {
                let before = Instant::now();
                cycle();
                measured.push(((before - began).as_secs_f64(), before.elapsed()));
            }
        }
    }
    // It was open all the time.
    long.batch_execute("SELECT 1; COMMIT").expect("end the long transaction");

    let seconds = length as usize;
    let lines: [(&str, Vec<(f64, f64)>); 3] = std::array::from_fn(|shape| {
        let points = (0..seconds).filter_map(|second| {
            let from = second as f64;
            Some((from + 0.5, p50(&measured[shape], from, from + 1.0)?))
        });
        (SHAPES[shape].0, points.collect())
    });
    let rows = lines.iter().flat_map(|(shape, points)| {
        points.iter().map(|(second, p50)| vec![(*shape).to_owned(), second.to_string(), format!("{p50:.4}")])
    });
    context.write_csv("b6.csv", &["shape", "second", "p50_ms"], rows);
    if let Some(path) = context.file("long_transaction.svg") {
        plot::long_transaction(&path, length, &lines);
    }

    let window = length / 6.0;
    let figure = |shape: usize| {
        let first = p50(&measured[shape], 0.0, window).expect("cycles in the beginning");
        let last = p50(&measured[shape], length - window, f64::INFINITY).expect("cycles in the end");
        let measure = format!("{}: last p50, ms", SHAPES[shape].0);
        (Figure::new(measure, digits(last)).yardstick(digits(first)), Spread::single(last / first))
    };
    let (ours, ratio) = figure(0);
    let mut figures = vec![ours.ratio_at_most(ratio, 1.5, 1.15)];
    figures.extend([1, 2].map(figure).map(|(figure, ratio)| figure.ratio(ratio)));
    Section {
        figures,
        notes: vec![format!(
            "Of {length} s, the last {w} are compared with the first {w}, which are the yardstick. The other two \
             shapes are naive ones.",
            w = digits(window)
        )],
        ..Section::default()
    }
}

/// A snapshot exists from the first query on.
fn open_snapshot(client: &mut Client) {
    client
        .batch_execute(
            "SET idle_in_transaction_session_timeout = 0; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM \
             pg_class LIMIT 1",
        )
        .expect("begin a long transaction");
}

/// In milliseconds, of the cycles that began in a while; none if there were none.
fn p50(cycles: &[Cycle], from: f64, to: f64) -> Option<f64> {
    let mut times = times();
    cycles.iter().filter(|(at, _)| (from..to).contains(at)).for_each(|(_, took)| record(&mut times, *took));
    (!times.is_empty()).then(|| quantile(&times, 0.5))
}
