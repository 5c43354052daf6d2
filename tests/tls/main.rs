//! TLS, by the options of a DSN: against servers with certificates made here.
//!
//! `scripts/with-postgres.sh cargo test --features tls --test tls` runs them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
// One binary: `pub` is what the modules share.
#![allow(unreachable_pub)]

// What all test binaries share, of which each uses a part.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

mod certificates;
mod clients;
mod modes;
mod server;
mod whole;
