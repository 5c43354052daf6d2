//! What is known of how the database answers: when it did last, and how long that takes. And what is logged where it
//! doesn't: a line when that begins and one when it is over, however many holds and threads it concerns.

use std::time::Duration;

use crate::sync::{Instant, Mutex, lock};
use crate::user_code::note;

/// Trouble that comes back sooner than this after its last line is not told again at once.
const QUIET: Duration = Duration::from_secs(10);

/// The trouble of a storage.
#[derive(Default)]
pub(crate) struct Trouble {
    /// What is said when it is over.
    over: &'static str,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    began: Option<Instant>,
    failures: u64,
    /// Whether this trouble has its line, and when there was one last.
    is_told: bool,
    told: Option<Instant>,
    last_answer: Option<Instant>,
    /// How long answers take: the last one, and a little of those before it.
    took: Duration,
}

impl Trouble {
    pub(crate) fn new(over: &'static str) -> Trouble {
        Trouble { over, ..Trouble::default() }
    }

    pub(crate) fn is_on(&self) -> bool {
        lock(&self.state).began.is_some()
    }

    /// When the database answered last.
    pub(crate) fn last_answer(&self) -> Option<Instant> {
        lock(&self.state).last_answer
    }

    /// How long answers take at present.
    pub(crate) fn last_took(&self) -> Duration {
        lock(&self.state).took
    }

    /// Something failed that is tried again.
    pub(crate) fn failed(&self, why: impl Fn() -> String) {
        let mut state = lock(&self.state);
        let now = Instant::now();
        state.began.get_or_insert(now);
        state.failures += 1;
        let is_new = !state.is_told && state.told.is_none_or(|told| now.duration_since(told) >= QUIET);
        if is_new {
            (state.is_told, state.told) = (true, Some(now));
        }
        drop(state);
        if is_new {
            note!(warn, "{}; trying again, and not telling each time", why());
        } else {
            note!(debug, "{}; trying again", why());
        }
    }

    /// The database has answered, after so long.
    pub(crate) fn answered(&self, took: Duration) {
        let mut state = lock(&self.state);
        (state.last_answer, state.took) = (Some(Instant::now()), took.max(state.took / 2));
    }

    /// What failed has succeeded.
    pub(crate) fn over(&self) {
        let (began, failures, is_told) = {
            let mut state = lock(&self.state);
            (state.began.take(), std::mem::take(&mut state.failures), std::mem::take(&mut state.is_told))
        };
        if let (Some(began), true) = (began, is_told) {
            note!(info, "{}: {failures} attempts had failed within {:.1?}", self.over, began.elapsed());
        }
    }
}
