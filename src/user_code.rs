//! Code of the user's that the library calls: callbacks, and the logger.
//!
//! It may panic, where the library may not: not in the caller's thread, and not in a thread that keeps a hold. A logger
//! that writes to a closed pipe does. So each of these calls is made here.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Calls what may panic; none if it did.
pub(crate) fn call<T>(user_code: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(user_code)) {
        Ok(value) => Some(value),
        Err(payload) => {
            // What it panicked with is the user's too, and may panic when it is dropped.
            std::mem::forget(payload);
            None
        }
    }
}

/// Logs a line at a level of `log`, which names its macro.
macro_rules! note {
    ($level:ident, $($text:tt)+) => {
        // A line that the logger could not write is lost.
        _ = $crate::user_code::call(|| log::$level!(target: "storage_lock", $($text)+))
    };
}
pub(crate) use note;

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
}
