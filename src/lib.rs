//! A blocking, thread-based distributed lock, kept in a PostgreSQL table.
//!
//! It is *not* a mutex that makes late writes impossible by itself: no lock with a lease is. A holder that is paused for longer than its
//! lease may go on in the belief that it still holds. Where that matters, write to the same database in a
//! [`LockGuard::transaction`], which is committed only if the lock is still held; let what is written elsewhere carry
//! [`LockGuard::version`], and refuse an older one. [`guarantees`] says what holds when, and which to use.
//!
//! # Quick start
//!
//! ```no_run
//! # fn main() -> storage_lock::Result<()> {
//! use storage_lock::StorageLock;
//!
//! let lock = StorageLock::connect("nightly-report", "host=db user=app password=secret dbname=app")?;
//! if let Some(guard) = lock.try_lock("host-7")? {
//!     // Only one is here.
//!     guard.unlock()?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The types, in reading order
//!
//! - [`StorageLock`]: one lock, by its name. [`lock`](StorageLock::lock) waits, [`try_lock`](StorageLock::try_lock) doesn't,
//!   [`try_lock_for`](StorageLock::try_lock_for) and [`try_lock_until`](StorageLock::try_lock_until) wait for a while. A busy
//!   lock is `Ok(None)`, never an error.
//! - [`LockGuard`]: the hold. Releases on drop, or by [`unlock`](LockGuard::unlock), which says what came of it.
//! - [`PostgresStorage`]: the table on its server, shared by any number of locks, with [`PostgresStorageOptions`];
//!   [`LockOptions`] for a lock of its own settings; [`LockInformation`] to look at locks without taking them.
//! - [`LockGuard::transaction`], [`fence`](LockGuard::fence) and [`unlock_in`](LockGuard::unlock_in): what you write in the same database, and the
//!   release, committed only if the lock is still held; [`UnlockTransaction`] and [`FenceStatement`] are what the last ones return, and
//!   what other drivers need.
//! - [`LostSignal`]: whether a hold is lost, to look at and to wait for; [`LockOptions::on_lost`] is called. [`Event`]s are for counting.
//! - [`Error`]: everything that can go wrong.
//!
//! # How the lease works
//!
//! A hold lasts for a lease, 30 s by default, from the moment at which the database granted it, by the database's clock alone. A
//! thread of the hold renews it, every 5 s by default. When its holder dies, the lease runs out, and whoever asks next takes the
//! lock over. A hold is identified by lock, version and a random lease id, never by an owner's name.
//!
//! This process trusts a hold until its *deadline*, on its own monotonic clock:
//!
//! ```text
//! deadline = instant before the request was sent + time left on the lease in the answer - safety margin
//! safety margin = a tenth of the lease, at most 1 s; but a thousandth of a lease of more than 1,000 s
//! ```
//!
//! The lease began after the request was sent, so the deadline comes first, however slow the answer was, and nobody else can have
//! the lock before it. [`LockGuard::is_held`] compares it with the clock and does nothing else. A hold whose deadline has
//! passed is lost for good; a hundredth of the lease before it (at most 100 ms) the loss is told to whoever wants to hear of it. Refreshes
//! that fail are repeated until then, each on another connection if one is stuck.
//!
//! # How waiting works
//!
//! Threads of one process that wait for one lock stand in a line, first come, first served. Only the first of them asks the
//! database, and only while the lock isn't held by its own process, where a release hands it to the next thread in one statement.
//!
//! A process that finds a lock busy puts itself into the lock's row, behind others that wait, and listens (`LISTEN`)
//! for the release, on one connection a storage, beside the others, which is opened when somebody waits and closed
//! when nobody has for 10 s. A release notifies the first two processes in the row and the last one, however many
//! wait. If nobody waits, it sends nothing. While other processes wait, a process passes the lock among its own
//! threads for 10 ms at most.
//!
//! A free lock is promised to the first process in the row for 100 ms, whether it was released or its lease ran out. After that, a
//! process behind others notifies those before it, gives them 10 ms each (1 s at most) and a twentieth of a second more, and takes the lock
//! if nobody else has. Those before it leave the row: whoever of them still wants the lock asks, and stands at its end.
//! [`try_lock`](StorageLock::try_lock) doesn't wait in that order: it takes a lock that is free, promised or not, or goes away.
//!
//! A lost notification delays a waiter, but never strands it. A waiter reads the end of the lease from the row, and
//! looks then: that is how it gets the lock of a dead holder. It also looks by itself at least every 5 s, whatever it
//! was told (every 15 s where more than 50 processes wait). So a lock that was freed without a notification, for
//! example by hand, is found within that time.
//! Without `LISTEN` (behind a pooler in transaction mode, or while the connection is lost) waiters ask
//! at growing intervals of up to a second.
//!
//! # Guarantees and limits
//!
//! [`guarantees`] says what may fail and what holds then, each with its test: also what becomes of a lock when a standby is
//! promoted. In short: while the database keeps its committed data, its clock doesn't jump, no machine that holds a lock is suspended and nobody else
//! writes to the table, no two holds of a lock are trusted at once; versions only grow; every call comes back in time, also when
//! the server is frozen; nothing panics in the caller's thread. Database calls run on threads of the library's own, so they may be
//! made from a thread of an async runtime, which they block; but for fences and what else runs on a connection of yours, which
//! blocks, and panics, where that does.
//!
//! The same owner id on the same thread gets a lock that it holds again, at once, and the last guard releases it. The
//! thread counts that took the lock: **if you send a guard to another thread, the first one can still enter again**, and both
//! are inside under one hold and one version. Use an owner id for each piece of work where that would be wrong.
//!
//! # When drop doesn't run
//!
//! `mem::forget` of a guard keeps the lock for as long as the process lives. After `process::exit`, an abort or SIGKILL the lock is
//! free when its lease has run out. `let _ = lock.lock("worker-1")?;` drops the guard, and releases the lock, at once.
//!
//! # What is logged
//!
//! Through `log`, with the target `storage_lock`. These levels are a promise (test
//! `what_is_logged_at_which_level_is_a_promise`):
//!
//! | level | what |
//! | --- | --- |
//! | `error` | nothing |
//! | `warn` | a hold was lost (once: also where its guard is dropped afterwards); refreshes, or attempts to listen, began to fail, and are repeated (a line for each of the two, until they succeed again, at most one in 10 s); no connection can be opened beside those that work (a line after three failures in a row, until one can); a dropped guard could not release its lock; a callback panicked. Never in a healthy run |
//! | `info` | a lock was taken over from a holder whose lease had run out; the table was created; a pooler was recognised; refreshes succeed again, or listening, after so many failures |
//! | `debug` | a lock was acquired, busy or released; a connection was opened, or found closed; each further failure; a wait goes on although the database is out of reach |
//! | `trace` | a lease was refreshed |
//!
//! A slow logger delays the thread that writes the line, as a slow callback does; a delayed refresh can lose the hold.
//! A logger that panics costs the line. But the driver (target `tokio_postgres`) logs at `debug` within each call. A
//! panic there costs the connection, and the call is made on another one, three times in all. So filter the
//! driver's lines.
//!
//! # Versions
//!
//! Semantic versioning; the minimum supported Rust version is 1.89, and raising it is a minor release. The public API
//! names types of `postgres` 0.19 in [`Error`]. PostgreSQL 12 or later by its SQL; tested with 15.

#![forbid(unsafe_code)]
// What only the real session and the real connections use.
#![cfg_attr(all(test, shuttle), allow(dead_code))]

mod answer;
#[cfg_attr(all(test, shuttle), path = "model/connections.rs")]
mod connections;
mod error;
mod events;
mod fence;
mod follow_up;
#[cfg(test)]
mod fuzz;
pub mod guarantees;
mod guard;
mod hold;
mod line;
mod listener;
mod lock;
mod loss;
#[cfg(all(test, shuttle))]
mod model;
mod options;
mod refresh;
#[cfg_attr(all(test, shuttle), path = "model/session.rs")]
mod session;
mod sql;
mod storage;
mod stragglers;
#[cfg_attr(all(test, shuttle), path = "model/sync.rs")]
mod sync;
mod term;
#[cfg(test)]
mod toy;
mod trouble;
mod unlock_in;
mod user_code;
mod wait;
mod workers;

pub use answer::LockInformation;
pub use error::{Error, Result};
pub use events::Event;
pub use fence::FenceStatement;
pub use guard::LockGuard;
pub use lock::StorageLock;
pub use loss::LostSignal;
pub use options::{LockOptions, PostgresStorageOptions};
pub use storage::PostgresStorage;
pub use unlock_in::UnlockTransaction;

/// The README's code is compiled with the doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
