//! Waiting for a lock: the wait queues of this process, and the notifications of other processes.
//!
//! There are two kinds of queue. A [`queue`] holds the threads of this process that wait for one lock. The lock's
//! *row* holds the processes that wait for it ([`crate::db::sql`]).
//!
//! Uses options/, hold/, db/ and what is below them. Within this folder, [`ticket`] and [`listener`] use [`queue`],
//! and [`queue`] uses [`limit`].

pub(crate) mod limit;
pub(crate) mod listener;
pub(crate) mod queue;
pub(crate) mod ticket;

#[cfg(test)]
mod tests;
