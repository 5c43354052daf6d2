//! How the database answers: when it did last, and how long that takes. Also logs when attempts fail: one line when
//! failures begin and one when they are over, however many holds and threads they concern.
//!
//! No mutex is held while a line is logged. Uses `user_code` and `sync`.

use std::time::Duration;

use crate::sync::{Instant, Mutex, lock};
use crate::user_code::log_at;

/// The shortest time between two warnings. Failures that begin again sooner have their warning when it is over, if they
/// still go on then.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// What failed on the way to the database, and how it answers.
#[derive(Default)]
pub(crate) struct Health {
    /// The start of the line that is logged when the failures are over.
    recovery: &'static str,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Since when attempts have been failing.
    began: Option<Instant>,
    failures: u64,
    /// Whether these failures have had their warning, and when the last warning was.
    is_warned: bool,
    last_warning: Option<Instant>,
    last_answer: Option<Instant>,
    /// How long answers take: the last one, or half the figure before it if that is more.
    took: Duration,
}

impl Health {
    pub(crate) fn new(recovery: &'static str) -> Health {
        Health { recovery, ..Health::default() }
    }

    pub(crate) fn is_failing(&self) -> bool {
        lock(&self.state).began.is_some()
    }

    /// When the database last answered.
    pub(crate) fn last_answer(&self) -> Option<Instant> {
        lock(&self.state).last_answer
    }

    /// How long answers take at present.
    pub(crate) fn answer_time(&self) -> Duration {
        lock(&self.state).took
    }

    /// Takes note of an attempt that failed, and that will be repeated.
    pub(crate) fn failed(&self, why: impl Fn() -> String) {
        let mut state = lock(&self.state);
        let now = Instant::now();
        state.began.get_or_insert(now);
        state.failures += 1;
        let is_new = !state.is_warned && state.last_warning.is_none_or(|at| now.duration_since(at) >= WARNING_INTERVAL);
        if is_new {
            (state.is_warned, state.last_warning) = (true, Some(now));
        }
        drop(state);
        if is_new {
            log_at!(warn, "{}; trying again, and not telling each time", why());
        } else {
            log_at!(debug, "{}; trying again", why());
        }
    }

    /// Takes note that the database has answered, and how long that took.
    pub(crate) fn answered(&self, took: Duration) {
        let mut state = lock(&self.state);
        (state.last_answer, state.took) = (Some(Instant::now()), took.max(state.took / 2));
    }

    /// Takes note that what failed has succeeded.
    pub(crate) fn recovered(&self) {
        let (began, failures, is_warned) = {
            let mut state = lock(&self.state);
            (state.began.take(), std::mem::take(&mut state.failures), std::mem::take(&mut state.is_warned))
        };
        if let (Some(began), true) = (began, is_warned) {
            log_at!(info, "{}: {failures} attempts had failed within {:.1?}", self.recovery, began.elapsed());
        }
    }
}
