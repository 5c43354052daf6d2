//! The database: connections, the threads that make calls on them, every statement, and what an answer means.
//!
//! Imports go one way: this module uses `events`, `error`, `user_code` and `sync`, and none above it.

pub(crate) mod answer;
// The model checker replaces the connections and the sessions by a model of the server.
#[cfg_attr(all(test, shuttle), path = "../model/connections.rs")]
pub(crate) mod connections;
pub(crate) mod health;
#[cfg(not(all(test, shuttle)))]
pub(crate) mod route;
pub(crate) mod server;
#[cfg_attr(all(test, shuttle), path = "../model/session.rs")]
pub(crate) mod session;
pub(crate) mod sql;
pub(crate) mod stuck;
pub(crate) mod tls;
pub(crate) mod workers;
