//! Mutexes, condition variables, threads, time and random numbers.
//!
//! Here they are the standard library's. Under the model checker (`--cfg shuttle`), `model/sync.rs` replaces this
//! file: there the checker decides which thread runs, and when time passes. Uses no other module.

use std::sync::PoisonError;

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
pub(crate) use std::thread;
pub(crate) use std::time::Instant;

use uuid::Uuid;

/// Locks a mutex, even if a thread panicked while holding it: what our mutexes guard is valid at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification, until `until` at most.
pub(crate) fn wait_until<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, until: Instant) -> MutexGuard<'a, T> {
    let left = until.saturating_duration_since(Instant::now());
    condvar.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
}

/// A random number.
pub(crate) fn random() -> u32 {
    Uuid::new_v4().as_fields().0
}
