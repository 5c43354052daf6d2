//! B5: what it takes to hold many locks for a while.

use std::fs;
use std::time::{Duration, Instant};
use std::{hint, thread};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use storage_lock::{LockGuard, LockOptions, StorageLock};

use crate::child::{Process, hear, say};
use crate::context::Context;
use crate::figures::{Figure, Section};
use crate::measure::{Spread, digits};
use crate::server::{NO_STATEMENTS, Role, StatementsView, Table};

pub const ROLE: &str = "hold";
const CONNECTIONS: u32 = 4;

pub fn run(context: &Context) -> Section {
    let s = Duration::from_secs;
    let (locks, length, lease, interval) =
        context.pick((1_000, s(60), s(10), s(3)), (100, s(2), s(2), Duration::from_millis(500)));
    let _view = StatementsView::new(context);
    let table = Table::new(context);
    table.storage();
    let mut role = Role::new(&table);
    let arguments = [locks, length.as_millis(), lease.as_millis(), interval.as_millis()].map(|n| n.to_string());
    let mut holding = Process::start(ROLE, &role.dsn, &table, &arguments);
    assert_eq!(holding.expect_line(), "ready");
    let before = role.statements();
    holding.tell("hold");
    let said = holding.expect_line();
    let statements = before.and_then(|before| Some(role.statements()?.since(&before)));
    let connections = role.connections();
    holding.tell("end");
    holding.finish();

    let numbers: Vec<f64> = said.split(' ').map(|number| number.parse().expect("a number")).collect();
    let [lost, peak_mb, cpu_seconds] = numbers[..] else { panic!("the holder said {said:?}") };
    let refreshes = locks as f64 * length.as_secs_f64() / interval.as_secs_f64();
    let measure = "statements over what the interval asks for";
    let counted = match &statements {
        Some(statements) => Figure::new(measure, statements.total()).yardstick(digits(refreshes)).ratio_at_most(
            Spread::single(statements.total() as f64 / refreshes),
            1.3,
            None,
        ),
        None => Figure::new(measure, NO_STATEMENTS),
    };
    let header =
        ["locks", "seconds", "lost", "peak_mb", "cpu_seconds", "connections", "statements", "refreshes_asked_for"];
    let row = [
        locks.to_string(),
        length.as_secs().to_string(),
        lost.to_string(),
        digits(peak_mb),
        digits(cpu_seconds),
        connections.to_string(),
        statements.as_ref().map(|statements| statements.total().to_string()).unwrap_or_default(),
        digits(refreshes),
    ];
    context.write_csv("b5.csv", &header, [row.to_vec()]);
    Section {
        figures: vec![
            Figure::new("holds lost", lost).at_most(lost, "", 0.0, None),
            Figure::new("peak memory, MB", digits(peak_mb)).at_most(peak_mb, " MB", 120.0, 60.0),
            counted,
            Figure::new("CPU, share of one core", digits(cpu_seconds / length.as_secs_f64())),
            Figure::new("connections", connections).yardstick(CONNECTIONS),
        ],
        notes: statements.iter().flat_map(|statements| statements.notes()).collect(),
        wrong: (lost > 0.0).then(|| format!("{lost} of {locks} holds were lost")),
    }
}

/// The process that holds. It says how many holds were lost, its peak memory in MB, and its CPU seconds while holding.
pub fn child(table: &Table, arguments: &[&str]) {
    let numbers: Vec<u64> = arguments.iter().map(|number| number.parse().expect("a number")).collect();
    let [locks, length, lease, interval] = numbers[..] else { panic!("four numbers") };
    let storage = table.storage_of(CONNECTIONS);
    let take = |number| {
        let options = LockOptions::new(format!("lock-{number}"))
            .lease_expire_after(Duration::from_millis(lease))
            .lease_refresh_interval(Duration::from_millis(interval));
        StorageLock::with_options(&storage, options).expect("make a lock").lock("holder").expect("lock")
    };
    let guards: Vec<LockGuard> = (0..locks).map(take).collect();
    say("ready");
    if hear().is_none() {
        return;
    }
    let (end, cpu_before) = (Instant::now() + Duration::from_millis(length), cpu_seconds());
    while Instant::now() < end {
        guards.iter().for_each(|guard| {
            hint::black_box(guard.is_held());
        });
        thread::sleep(Duration::from_millis(100));
    }
    let cpu = cpu_seconds() - cpu_before;
    // A lost hold never comes back.
    let lost = guards.iter().filter(|guard| !guard.is_held()).count();
    say(format_args!("{lost} {} {cpu}", peak_megabytes()));
    hear();
    for guard in guards {
        guard.unlock().ok();
    }
}

fn cpu_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("the usage of this process");
    (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
}

fn peak_megabytes() -> f64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux's /proc");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    let kibibytes: f64 = line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number");
    kibibytes * 1024.0 / 1e6
}
