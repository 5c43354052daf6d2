//! Calls of user code: callbacks, and the logger.
//!
//! User code may panic: a logger that writes to a closed pipe does. Invariant: such a panic reaches neither the
//! caller's thread nor a thread of the library. So every call of user code is made here, and its panic ends here.
//!
//! Imports: nothing of this crate.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Calls code that may panic. Returns `None` if it did.
pub(crate) fn call<T>(user_code: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(user_code)) {
        Ok(value) => Some(value),
        Err(payload) => {
            // The panic's payload is user code too: its drop may panic, with a payload whose drop may panic again.
            // Forgetting the second payload ends that.
            if let Err(another) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
                std::mem::forget(another);
            }
            None
        }
    }
}

/// A callback, if the user set one. Its last clone may be dropped in any thread, together with everything that the
/// callback owns.
pub(crate) struct Callback<F: ?Sized>(Option<Arc<F>>);

impl<F: ?Sized> Callback<F> {
    pub(crate) fn to(callback: Arc<F>) -> Callback<F> {
        Callback(Some(callback))
    }

    pub(crate) fn get(&self) -> Option<&F> {
        self.0.as_deref()
    }
}

impl<F: ?Sized> Default for Callback<F> {
    fn default() -> Callback<F> {
        Callback(None)
    }
}

impl<F: ?Sized> Clone for Callback<F> {
    fn clone(&self) -> Callback<F> {
        Callback(self.0.clone())
    }
}

impl<F: ?Sized> Drop for Callback<F> {
    fn drop(&mut self) {
        if let Some(callback) = self.0.take() {
            call(|| drop(callback));
        }
    }
}

impl<F: ?Sized> fmt::Debug for Callback<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "(set)" } else { "(not set)" })
    }
}

/// Logs a line at `$level`, the name of a macro of `log`.
macro_rules! log_at {
    ($level:ident, $($text:tt)+) => {
        // A line that the logger could not write is lost.
        _ = $crate::user_code::call(|| log::$level!(target: "storage_lock", $($text)+))
    };
}
pub(crate) use log_at;

#[cfg(test)]
mod tests {
    use super::*;

    struct PanicsInItsDrop;

    impl Drop for PanicsInItsDrop {
        fn drop(&mut self) {
            panic!("in a drop");
        }
    }

    #[test]
    fn a_panic_ends_here_whatever_it_was_raised_with() {
        assert_eq!(call(|| 7), Some(7));
        assert_eq!(call(|| std::panic::panic_any(PanicsInItsDrop)), None::<()>);
    }

    #[test]
    fn what_a_panic_was_raised_with_is_dropped() {
        let owned = Arc::new(());
        for _ in 0..3 {
            let payload = Arc::clone(&owned);
            assert_eq!(call(|| std::panic::panic_any(payload)), None::<()>);
            assert_eq!(Arc::strong_count(&owned), 1);
        }
    }

    #[test]
    fn a_callback_that_panics_when_it_is_dropped_harms_nobody() {
        let owned = PanicsInItsDrop;
        let callback: Callback<dyn Fn()> = Callback::to(Arc::new(move || _ = &owned));
        let copy = callback.clone();
        drop(callback);
        copy.get().expect("set")();
        drop(copy);
    }
}
