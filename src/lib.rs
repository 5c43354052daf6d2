//! A blocking, thread-based distributed lock, kept in a PostgreSQL table.
//!
//! It is *not* a mutex that makes late writes impossible by itself: no lock with a lease is. A holder that is paused
//! for longer than its lease may go on and believe that it still holds the lock. Where that matters:
//! - Write to the same database in a [`LockGuard::transaction`], which commits only if the lock is still held.
//! - Send [`LockGuard::version`] with what you write elsewhere, and refuse an older version there.
//!
//! [`guarantees`] says what holds when, and which of these to use.
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
//! - [`StorageLock`]: one lock, by its name. [`lock`](StorageLock::lock) waits, and [`try_lock`](StorageLock::try_lock)
//!   doesn't. [`try_lock_for`](StorageLock::try_lock_for) and [`try_lock_until`](StorageLock::try_lock_until) wait for
//!   a while. A busy lock is `Ok(None)`, never an error.
//! - [`LockGuard`]: the hold. Dropping it releases the lock. [`unlock`](LockGuard::unlock) also says what came of the
//!   release.
//! - [`PostgresStorage`]: the table on its server, with [`PostgresStorageOptions`]. Any number of locks can share it.
//!   [`LockOptions`] is for a lock with its own settings. [`LockInformation`] describes a lock without acquiring it.
//! - [`LockGuard::transaction`], [`fence`](LockGuard::fence) and [`unlock_in`](LockGuard::unlock_in): what you write in
//!   the same database, and the release, are committed only if the lock is still held. [`UnlockTransaction`] is what
//!   `unlock_in` returns. [`FenceStatement`] is what other drivers need.
//! - [`LostSignal`]: whether a hold is lost, to look at and to wait for. The callback [`LockOptions::on_lost`] is
//!   called. [`Event`]s are for counting.
//! - [`Error`]: everything that can go wrong.
//!
//! # How the lease works
//!
//! A hold lasts for a lease, 30 s by default. The lease begins at the moment at which the database grants it, by the
//! database's clock alone. A thread of the hold refreshes it, every 5 s by default. If the holder dies, the lease runs
//! out, and the next one that asks takes the lock over. A hold is identified by lock, version and a random lease id,
//! never by an owner's name.
//!
//! This process trusts a hold until its *deadline*, on its own monotonic clock:
//!
//! ```text
//! deadline = instant before the request was sent + time left on the lease in the answer - safety margin
//! safety margin = a tenth of the lease, at most 1 s; but a thousandth of a lease of more than 1,000 s
//! ```
//!
//! The lease began after the request was sent. So the deadline comes before the end of the lease, however slow the
//! answer was, and nobody else can have the lock before the deadline. [`LockGuard::is_held`] compares the deadline with
//! the clock and does nothing else.
//!
//! A hold whose deadline has passed is lost for good. The library reports the loss a little before the deadline: by a
//! hundredth of the lease, at most 100 ms. It repeats failed refreshes until then, each on another connection if one is
//! stuck.
//!
//! # How waiting works
//!
//! There are two kinds of wait queue: one for threads in each process, and one for processes in each lock's row.
//!
//! The threads of a process that wait for one lock form a queue, first come, first served. Only the first thread asks
//! the database, and only while its own process doesn't hold the lock. If its own process holds it, a release hands the
//! lock over to the next thread in one statement.
//!
//! A process that finds a lock busy adds itself to the end of the queue in the lock's row. Then it listens (`LISTEN`)
//! for the release. A storage has one connection for that, beside the others. It opens the connection when a thread
//! waits, and closes it when nobody has waited for 10 s. A release notifies the first two processes in the row's queue
//! and the last one, however many wait. If nobody waits, it sends nothing. While other processes wait, a process hands
//! the lock over among its own threads for 10 ms at most.
//!
//! A free lock is reserved for the first process in the row's queue for 100 ms, whether it was released or its lease
//! ran out. After that, a process further back may acquire it, in these steps:
//! 1. It notifies the processes before it.
//! 2. It gives them 10 ms each, at most 1 s, and 50 ms more.
//! 3. It acquires the lock, if nobody else has.
//! 4. The processes before it leave the row's queue. Those that still want the lock ask, and join the queue at its end.
//!
//! [`try_lock`](StorageLock::try_lock) ignores this order: it acquires a lock that is free, reserved or not, or returns
//! without waiting.
//!
//! A lost notification delays a waiter, but never strands it. A waiter reads the end of the lease from the row, and
//! asks at that time: that is how it acquires the lock of a dead holder. It also polls at least every 5 s, whatever
//! notifications came (every 15 s where more than 50 processes wait). So it finds a lock that was freed without a
//! notification, for example by hand, within that time. Without `LISTEN` (behind a pooler in transaction mode, or while
//! the connection is lost) waiters poll at growing intervals of up to a second.
//!
//! # Guarantees and limits
//!
//! [`guarantees`] says what may fail and what holds then, each with its test. It also says what becomes of a lock when
//! a standby is promoted. In short, this holds while the database keeps its committed data, its clock doesn't jump, no
//! machine that holds a lock is suspended, and nobody else writes to the table:
//! - No two holds of a lock are trusted at the same time.
//! - Versions only grow.
//! - Every call comes back in time, even when the server is frozen.
//! - Nothing panics in the caller's thread.
//!
//! Database calls run on threads of the library. So you may make them from a thread of an async runtime, which they
//! block. The exception is what runs on a connection of yours, such as a fence: it blocks, and panics, where that
//! connection does.
//!
//! The lock is re-entrant per thread and owner id: the same owner id on the same thread gets a lock that it holds again
//! immediately, and the last guard releases it. What counts is the thread that acquired the lock. **If you send a guard
//! to another thread, the first thread can still enter again**, and both are inside under one hold and one version.
//! Where that would be wrong, use an owner id for each piece of work.
//!
//! # When drop doesn't run
//!
//! `mem::forget` of a guard keeps the lock for as long as the process lives. After `process::exit`, an abort or SIGKILL
//! the lock is free when its lease has run out. `let _ = lock.lock("worker-1")?;` drops the guard immediately, and so
//! releases the lock.
//!
//! # What is logged
//!
//! The library logs through `log`, with the target `storage_lock`. These levels are a promise
//! (test `what_is_logged_at_which_level_is_a_promise`):
//!
//! - `error`: nothing.
//! - `warn`: never in a healthy run, and only for these:
//!   - A hold was lost. This is logged once, even where its guard is dropped afterwards.
//!   - Refreshes, or attempts to listen, began to fail, and are repeated. Each of the two has one line until they
//!     succeed again, at most one in 10 s.
//!   - No connection can be opened beside those that work. This is one line after three failures in a row, until one
//!     can be opened.
//!   - A dropped guard could not release its lock.
//!   - A callback panicked.
//! - `info`:
//!   - A lock was taken over from a holder whose lease had run out.
//!   - The table was created.
//!   - A pooler was recognised.
//!   - Refreshes, or attempts to listen, succeed again, after so many failures.
//! - `debug`:
//!   - A lock was acquired, busy or released.
//!   - A connection was opened, or found closed.
//!   - Each further failure.
//!   - A wait goes on although the database is out of reach.
//! - `trace`: a lease was refreshed.
//!
//! A slow logger delays the thread that writes the line, as a slow callback does. A delayed refresh can lose the hold.
//! A logger that panics costs the line.
//!
//! The driver (target `tokio_postgres`) logs at `debug` within each call. A logger that panics there costs the
//! connection. The call is made on another one, three times in all. So filter the driver's lines.
//!
//! # Glossary
//!
//! - *acquire*: to get the lock. A new hold begins.
//! - *release*: to end a hold, so that others can acquire the lock.
//! - *refresh*: to renew the lease of a hold to its full length.
//! - *hold*: one owner has the lock, from one acquire until the release, or until the hold is lost.
//! - *lease*: the time for which the database grants a hold. It runs out unless it is refreshed.
//! - *deadline*: the moment until which this process trusts a hold. It comes before the end of the lease.
//! - *safety margin*: the time taken off the lease for the deadline, because clocks run at different speeds.
//! - *version* (fencing token): a number for each hold of a lock, greater than those of all earlier holds.
//! - *owner id*: the name that a caller gives when it asks for a lock. Others see it, and it doesn't identify a hold.
//! - *takeover*: an acquire of a lock whose last holder let its lease run out without a release.
//! - *hand-over*: a release that gives the lock to the next waiting thread of the same process, in one statement.
//! - *wait queue*: those who wait for a lock, in order: threads in their process, and processes in the lock's row.
//! - *fence*: a statement in your transaction, which then commits only if the lock is still held.
//! - *clean-up*: a background thread undoes what calls without a known outcome may have left behind.
//! - *storage*: the table that keeps the locks, on its server, and the connections to it.
//!
//! # Versions
//!
//! Semantic versioning. The minimum supported Rust version is 1.89, and raising it is a minor release. The public API
//! names types of `postgres` 0.19 in [`Error`]. PostgreSQL 12 or later by its SQL; tested with 15.

#![forbid(unsafe_code)]
// The model has its own session and connections. So what only the real ones use is unused there.
#![cfg_attr(all(test, shuttle), allow(dead_code, unused_imports))]

mod backoff;
mod db;
mod error;
mod events;
mod fence;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod guarantees;
mod guard;
mod hold;
mod lock;
#[cfg(test)]
mod model;
mod options;
mod storage;
#[cfg_attr(all(test, shuttle), path = "model/sync.rs")]
mod sync;
mod user_code;
mod wait;

pub use db::answer::LockInformation;
pub use error::{Error, Result};
pub use events::Event;
pub use fence::FenceStatement;
pub use fence::unlock_in::UnlockTransaction;
pub use guard::LockGuard;
pub use hold::loss::LostSignal;
pub use lock::StorageLock;
pub use options::{LockOptions, PostgresStorageOptions};
pub use storage::PostgresStorage;

/// The README's code is compiled with the doctests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
