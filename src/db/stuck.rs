//! How many threads may be left behind in calls that never end.
//!
//! A thread in the client can't be interrupted. The first few that get stuck are replaced immediately. When more and
//! more get stuck, with no answer in between, the server is likely to be frozen: further threads would get stuck too.
//! But perhaps a box on the way swallowed just these connections, and serves new ones. So one more thread is allowed
//! from time to time.
//!
//! Uses `sync`.

use std::time::Duration;

use crate::sync::Instant;

/// Without a success in between, no thread is added when so many are stuck. With successes, more may get stuck. Beyond
/// this number, they too are allowed one by one.
pub(crate) const MAX: usize = 64;
/// So many may get stuck before the limit sets in.
pub(crate) const BURST: usize = 8;
/// The shortest time between two threads that are allowed beyond that.
const EXTRA_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
pub(crate) struct StuckLimit {
    last_extra: Option<Instant>,
}

impl StuckLimit {
    /// Whether another thread may be started while `stuck` threads are stuck, which got stuck after the last success.
    pub(crate) fn may_add(&mut self, stuck: usize, now: Instant) -> bool {
        if stuck < BURST {
            return true;
        }
        let may = stuck < MAX && self.last_extra.is_none_or(|last| now.duration_since(last) >= EXTRA_INTERVAL);
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
        let (mut stuck_limit, start) = (StuckLimit::default(), Instant::now());
        assert!((0..8).all(|stuck| stuck_limit.may_add(stuck, start)));
        assert!(stuck_limit.may_add(8, start));
        assert!(!stuck_limit.may_add(9, start + Duration::from_secs(29)));
        assert!(stuck_limit.may_add(9, start + Duration::from_secs(30)));
        assert!(!stuck_limit.may_add(10, start + Duration::from_secs(59)));
        assert!(stuck_limit.may_add(63, start + Duration::from_secs(60)));
        assert!(!stuck_limit.may_add(64, start + Duration::from_secs(1_000)));
    }

    proptest! {
        #[test]
        fn beyond_eight_there_is_one_more_each_half_minute_at_most_and_never_one_beyond_64(
            asked in vec((0..100_usize, 0..40_000_u64), 1..100),
        ) {
            let (mut stuck_limit, mut now, mut last) = (StuckLimit::default(), Instant::now(), None::<Instant>);
            for (stuck, after) in asked {
                now += Duration::from_millis(after);
                let is_due = last.is_none_or(|last| now - last >= EXTRA_INTERVAL);
                let may = stuck_limit.may_add(stuck, now);
                prop_assert_eq!(may, stuck < BURST || (stuck < MAX && is_due), "{} stuck", stuck);
                if may && stuck >= BURST {
                    last = Some(now);
                }
            }
        }
    }
}
