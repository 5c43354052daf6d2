//! B4: what a process with many waiting threads costs the server while nothing changes.

use std::thread;
use std::time::{Duration, Instant};

use storage_lock::StorageLock;

use crate::child::{Process, hear, say};
use crate::context::Context;
use crate::figures::{Figure, Section};
use crate::server::{NO_STATEMENTS, Role, StatementsView, Table};

pub const ROLE: &str = "wait";
const THREADS: usize = 200;
const LOCK: &str = "held";

pub fn run(context: &Context) -> Section {
    let length = context.pick(Duration::from_secs(20), Duration::from_secs(2));
    let _view = StatementsView::new(context);
    let table = Table::new(context);
    let guard = StorageLock::new(&table.storage(), LOCK).expect("make a lock").lock("holder").expect("lock");
    let mut role = Role::new(&table);
    let mut waiting = Process::start(ROLE, &role.dsn, &table, &[]);
    assert_eq!(waiting.expect_line(), "ready");

    let before = role.statements();
    waiting.tell("wait");
    let end = Instant::now() + length;
    let mut connections = role.connections();
    while Instant::now() < end {
        thread::sleep(Duration::from_millis(50));
        connections = connections.max(role.connections());
    }
    let statements = before.and_then(|before| Some(role.statements()?.since(&before)));
    // The time is up before any waiter's is: who came back got the lock, or an error.
    assert!(waiting.is_silent(), "a waiter came back");
    drop(waiting);
    guard.unlock().expect("unlock");

    let measure = format!("statements in {} s", length.as_secs());
    let counted = match &statements {
        Some(statements) => Figure::new(measure, statements.total()).at_most(statements.total() as f64, "", 20.0, 4.0),
        None => Figure::new(measure, NO_STATEMENTS),
    };
    if let Some(statements) = &statements {
        context.write_csv("b4.csv", &["statement", "calls"], statements.rows());
    }
    Section {
        figures: vec![counted, Figure::new("connections", connections).at_most(connections as f64, "", 3.0, None)],
        notes: statements.iter().flat_map(|statements| statements.notes()).collect(),
        ..Section::default()
    }
}

/// The process that waits, until it is killed or its parent is gone.
pub fn child(table: &Table, _: &[&str]) {
    let lock = StorageLock::new(&table.storage(), LOCK).expect("make a lock");
    say("ready");
    hear();
    for thread in 0..THREADS {
        let lock = lock.clone();
        thread::spawn(move || {
            let result = lock.try_lock_for(&format!("waiter-{thread}"), Duration::from_secs(600));
            say(format_args!("{result:?}"));
        });
    }
    hear();
}
