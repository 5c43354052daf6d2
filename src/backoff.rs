//! The pause before a retry. Uses no other module.

use std::time::Duration;

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);

/// How long to pause after the `failures`-th failure in a row, counted from 1.
pub(crate) fn backoff(failures: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_BACKOFF)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn backoff_grows_to_a_second() {
        let steps: Vec<_> = (1..=8).map(|failures| backoff(failures).as_millis()).collect();
        assert_eq!(steps, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        assert_eq!(backoff(u32::MAX), LONGEST_BACKOFF);
    }

    proptest! {
        #[test]
        fn a_backoff_never_shrinks_and_stays_within_its_bounds(failures in any::<u32>(), more in any::<u32>()) {
            let (one, later) = (backoff(failures), backoff(failures.saturating_add(more)));
            prop_assert!(FIRST_BACKOFF <= one && one <= later && later <= LONGEST_BACKOFF);
        }
    }
}
