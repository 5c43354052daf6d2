//! How fast the library is, measured against the bare statements that it sends.
//!
//! `scripts/bench.sh` runs all of it against a throwaway server; `cargo bench` runs it against the server in
//! `STORAGE_LOCK_POSTGRESQL_DSN`, whose role has to be a superuser. Each benchmark has its yardstick measured in the
//! same run, in slices that alternate with its own, and prints a table with what must be reached and what is aimed
//! for. A figure that misses fails nothing; a wrong result (an error, a lost hold, two owners) ends the run with a
//! non-zero code.

// A test, or a table of what to do, may be long.
#![allow(clippy::too_many_lines)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// One binary: `pub` is what the modules share.
#![allow(missing_docs, unreachable_pub)]

mod bare;
mod child;
mod context;
mod figures;
mod measure;
mod plot;
mod server;
/// The library's own statements, for the yardstick.
#[allow(dead_code, unused_imports)]
#[path = "../../src/db/sql/mod.rs"]
mod sql;

mod encrypted;
mod fenced;
mod large_table;
mod long_transaction;
mod many_locks;
mod naive;
mod processes;
mod thousand;
mod threads;
mod uncontended;
mod waiting;

use std::path::PathBuf;
use std::process::ExitCode;

use context::Context;
use figures::Section;

const USAGE: &str = "usage: cargo bench -- [--short] [--out FOLDER] [b1 b2 b3 b4 b5 b6 b7 b8 b9 b10]";

struct Benchmark {
    id: &'static str,
    title: &'static str,
    run: fn(&Context) -> Section,
}

/// What this binary does where it is run as another process's child.
const ROLES: [(&str, child::Run); 4] = [
    (processes::ROLE, processes::child),
    (waiting::ROLE, waiting::child),
    (fenced::ROLE, fenced::child),
    (thousand::ROLE, thousand::child),
];

const BENCHMARKS: [Benchmark; 10] = [
    Benchmark { id: "B1", title: "lock and unlock, nobody else", run: uncontended::run },
    Benchmark { id: "B2", title: "ten threads of one process, one lock", run: threads::run },
    Benchmark { id: "B3", title: "eight processes with two threads each, one lock", run: processes::run },
    Benchmark { id: "B4", title: "200 threads of one process wait for a held lock", run: waiting::run },
    Benchmark { id: "B5", title: "1,000 locks held by one process", run: thousand::run },
    Benchmark { id: "B6", title: "lock and unlock beside a long transaction", run: long_transaction::run },
    Benchmark { id: "B7", title: "lock and unlock beside a million other locks", run: large_table::run },
    Benchmark { id: "B8", title: "64 locks, 16 threads of one process", run: many_locks::run },
    Benchmark { id: "B9", title: "a one-row transaction that is fenced", run: fenced::run },
    Benchmark { id: "B10", title: "lock and unlock over TLS", run: encrypted::run },
];

fn main() -> ExitCode {
    if child::run(&ROLES) {
        return ExitCode::SUCCESS;
    }
    let (is_short, out, wanted) = match arguments() {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(problem) => return refuse(&format!("{problem}\n{USAGE}")),
    };
    let Ok(dsn) = std::env::var("STORAGE_LOCK_POSTGRESQL_DSN") else {
        return refuse(
            "STORAGE_LOCK_POSTGRESQL_DSN is not set: run scripts/bench.sh, which starts a server, or set it",
        );
    };
    let context = match Context::new(dsn, is_short, out) {
        Ok(context) => context,
        Err(problem) => return refuse(&problem),
    };

    let machine = format!("{} cores, PostgreSQL {}", context.cores, context.server_version);
    println!("{machine}{}", if is_short { ", a short run: its figures say nothing" } else { "" });
    let (mut all, mut wrong) = (Vec::new(), Vec::new());
    for benchmark in BENCHMARKS.iter().filter(|benchmark| wanted.is_empty() || wanted.contains(&benchmark.id)) {
        println!("\n{} {}", benchmark.id, benchmark.title);
        let section = (benchmark.run)(&context);
        figures::print(section.figures.iter().map(|figure| (None, figure)));
        section.notes.iter().for_each(|note| println!("  {note}"));
        wrong.extend(section.wrong.map(|what| format!("{}: {what}", benchmark.id)));
        all.extend(section.figures.into_iter().map(|figure| (benchmark.id, figure)));
    }
    println!("\nSummary ({machine})");
    figures::print(all.iter().filter(|(_, figure)| figure.goal.is_some()).map(|(id, figure)| (Some(*id), figure)));
    figures::write_summary(&context, &all);
    wrong.iter().for_each(|what| eprintln!("wrong: {what}"));
    if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn refuse(problem: &str) -> ExitCode {
    eprintln!("{problem}");
    ExitCode::from(2)
}

type Arguments = (bool, Option<PathBuf>, Vec<&'static str>);

/// Whether to be short, where to write files, and what to run (all, if nothing is named); none for a call for help.
fn arguments() -> Result<Option<Arguments>, String> {
    let (mut is_short, mut out, mut wanted) = (false, None, Vec::new());
    // `cargo bench` says `--bench` to everything that it runs.
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--short" => is_short = true,
            "--out" => out = Some(arguments.next().ok_or("--out needs a folder")?.into()),
            "-h" | "--help" => return Ok(None),
            name => match BENCHMARKS.iter().find(|benchmark| benchmark.id.eq_ignore_ascii_case(name)) {
                Some(benchmark) => wanted.push(benchmark.id),
                None => return Err(format!("unknown argument {name:?}")),
            },
        }
    }
    Ok(Some((is_short, out, wanted)))
}
