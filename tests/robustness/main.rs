//! Real clients, everything hurt, what each client saw recorded, and a judge that knows nothing of the implementation.
//!
//! - `workload`: worker processes (this binary, started again) whose threads take and give back a few locks;
//! - `hurt`: what is done to them, to the network and to the server, drawn from a seed;
//! - `history`: what each of them saw;
//! - `verdict`: whether a lock may behave like that;
//! - `processes` and `run` put a run together; `seeds` runs many, `pair` one whose primary dies.
//!
//! `scripts/robustness.sh` runs as many as one likes, or a certain one again. `planted` has bugs that this finds.

// A test, or a table of what to do, may be long.
#![allow(clippy::too_many_lines)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// One binary: `pub` is what the modules share.
#![allow(unreachable_pub)]

// What all test binaries share, of which each uses a part.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

mod history;
mod hurt;
mod pair;
mod processes;
mod run;
mod seeds;
mod verdict;
mod workload;
