//! How many threads may be left behind in calls that never end.
//!
//! A thread in the client can't be interrupted. A few stuck ones are replaced at once. When more and more get stuck,
//! and nothing is answered in between, the server is likely to be frozen, and further ones would only add to the
//! pile; but it may also be a box in between that swallowed just these connections and serves new ones, so one more
//! is let go from time to time.

use std::time::Duration;

use crate::sync::Instant;

/// Never more than this without a success in between. Where there are successes, more than this come one by one, too.
pub(crate) const MAX: usize = 64;
pub(crate) const AT_ONCE: usize = 8;
const ONE_MORE_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(crate) struct Stragglers {
    last_extra: Option<Instant>,
}

impl Stragglers {
    /// Whether another thread may be started while `stuck` are stuck, counted since the last success.
    pub(crate) fn may_add(&mut self, stuck: usize, now: Instant) -> bool {
        if stuck < AT_ONCE {
            return true;
        }
        let may = stuck < MAX && self.last_extra.is_none_or(|last| now.duration_since(last) >= ONE_MORE_AFTER);
        if may {
            self.last_extra = Some(now);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn eight_may_be_stuck_and_then_one_more_each_half_minute_up_to_64() {
        let (mut stragglers, start) = (Stragglers::default(), Instant::now());
        assert!((0..8).all(|stuck| stragglers.may_add(stuck, start)));
        assert!(stragglers.may_add(8, start));
        assert!(!stragglers.may_add(9, start + Duration::from_secs(29)));
        assert!(stragglers.may_add(9, start + Duration::from_secs(30)));
        assert!(!stragglers.may_add(10, start + Duration::from_secs(59)));
        assert!(stragglers.may_add(63, start + Duration::from_secs(60)));
        assert!(!stragglers.may_add(64, start + Duration::from_secs(1_000)));
    }

    proptest! {
        #[test]
        fn beyond_eight_there_is_one_more_each_half_minute_at_most_and_never_one_beyond_64(
            asked in vec((0..100_usize, 0..40_000_u64), 1..100),
        ) {
            let (mut stragglers, mut now, mut last) = (Stragglers::default(), Instant::now(), None::<Instant>);
            for (stuck, after) in asked {
                now += Duration::from_millis(after);
                let (may, is_due) = (stragglers.may_add(stuck, now), last.is_none_or(|last| now - last >= ONE_MORE_AFTER));
                prop_assert_eq!(may, stuck < AT_ONCE || (stuck < MAX && is_due), "{} stuck", stuck);
                if may && stuck >= AT_ONCE {
                    last = Some(now);
                }
            }
        }
    }
}
