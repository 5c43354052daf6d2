//! The library against a real PostgreSQL server, real processes, real signals and real sockets.
//!
//! `scripts/with-postgres.sh cargo test` runs them. A test that hurts a server starts one of its own. Each has its own
//! table, and a name that is a claim.

// A test, or a table of what to do, may be long.
#![allow(clippy::too_many_lines)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// One binary: `pub` is what the modules share.
#![allow(unreachable_pub)]

// What all test binaries share, of which each uses a part.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

mod clean_up;
mod connections;
mod doors;
mod events;
mod examples;
mod fence;
mod fork;
mod free;
mod fuzz;
mod holds;
mod input;
mod leaks;
mod locked;
mod loss;
mod many;
mod networks;
mod notify;
mod pair;
mod pool;
mod pooler;
mod processes;
mod queue;
mod rights;
mod roles;
mod script;
mod servers;
mod settings;
mod table;
mod tidy;
mod told;
mod trigger;
mod unlock_ends;
mod unlock_in;
mod waiting;
