//! What threads share, time, and chance. Here they are the standard library's; under the model checker (`--cfg shuttle`) the
//! checker's own, in `model/sync.rs`, under which it decides who goes on and when time passes.

use std::sync::PoisonError;

pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
pub(crate) use std::thread;
pub(crate) use std::time::Instant;

use uuid::Uuid;

/// Locks a mutex whether or not a thread panicked while holding it: what our mutexes guard is valid at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification, at most until `until`.
pub(crate) fn wait_until<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, until: Instant) -> MutexGuard<'a, T> {
    let left = until.saturating_duration_since(Instant::now());
    condvar.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
}

/// Any number.
pub(crate) fn random() -> u32 {
    Uuid::new_v4().as_fields().0
}
