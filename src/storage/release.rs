//! The end of a hold: a hand-over to the next thread of this process that waits, or a release.
//!
//! Invariants:
//! - Both together take at most [`RELEASE_TIME`].
//! - The clean-up gets every hold whose release isn't confirmed, and every claim of a hand-over without an answer.
//!
//! Uses `wait::queue`, `hold`, `db`, and the modules below them.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::backoff::backoff;
use crate::db::answer::{Claim, Granted};
use crate::db::session::Session;
use crate::db::sql::{GRACE, STEP};
use crate::db::workers::{Answer, Tries, Urgency};
use crate::error::{Error, Result};
use crate::hold::Hold;
use crate::storage::PostgresStorage;
use crate::storage::clean_up::Unfinished;
use crate::sync::{Instant, thread};
use crate::user_code::log_at;
use crate::wait::queue::{Successor, Waiter};

/// The longest that an unlock, or the drop of a guard, may take.
pub(crate) const RELEASE_TIME: Duration = Duration::from_secs(2);

/// What a release says to the database.
#[derive(Clone)]
struct Release {
    claim: Claim,
    version: i64,
    /// This process as a waiter in the row. The release removes it from the row.
    waiter: Option<Uuid>,
    /// The release puts this process back into the row, behind all others. With no other there, it stays out.
    waits_again: bool,
}

impl PostgresStorage {
    /// Ends a hold within [`RELEASE_TIME`]: hands the lock over to the next thread of this process that waits, or
    /// releases it. If the release fails, the clean-up repeats it until the lease has run out.
    pub(crate) fn release(&self, hold: &Arc<Hold>) -> Result<()> {
        self.release_until(hold, Instant::now() + RELEASE_TIME)
    }

    fn release_until(&self, hold: &Arc<Hold>, deadline: Instant) -> Result<()> {
        let own = Some(self.inner.listener.waiter);
        let successor = self.queues().successor(hold);
        let (began, mut first) = (Instant::now(), None);
        if let Successor::Waiter(next) = &successor {
            match self.hand_over(hold, next, deadline) {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // The release below finds out whether the hand-over happened.
                Err(error) => first = Some(error),
            }
        }
        let waits_again = matches!(successor, Successor::Waiter(_) | Successor::Others);
        let waiter = if matches!(successor, Successor::Unknown) { None } else { own };
        let result = self.release_with_retries(hold, waiter, waits_again, first, began, deadline);
        // The waiters before this process in the row have their time first. This process asks when that time is over.
        // With none before it, this process isn't in the row, and has to ask immediately.
        let before = result.as_ref().map_or(0, |waiters| if waits_again { waiters.saturating_sub(1) } else { 0 });
        let pause = if before > 0 { GRACE + STEP * (before - 1) } else { Duration::ZERO };
        if self.queues().release_hold(hold, Instant::now() + pause, before > 0) {
            self.leave_row(&hold.claim.lock_id);
        } else if before > 0 {
            self.listen();
        }
        result.map(drop)
    }

    /// Hands a hold over. False if the hold is lost, or a transaction has locked its row.
    ///
    /// A hand-over that has no answer for half of the time is given up if another connection answers. The other half is
    /// for a release.
    fn hand_over(&self, hold: &Arc<Hold>, next: &Arc<Waiter>, deadline: Instant) -> Result<bool> {
        let now = Instant::now();
        let once = Tries::Once { silence: deadline.saturating_duration_since(now) / 2 };
        let claim = next.claim(deadline);
        let (sql, before, owned) = (Arc::clone(&self.inner.sql), Arc::clone(hold), claim.clone());
        let call = move |session: &mut Session| session.hand_over(&sql, &before.claim, before.version, &owned);
        let (storage, sql, owned) = (self.clone(), Arc::clone(&self.inner.sql), claim.clone());
        let late = move |session: &mut Session, granted: Option<Granted>| {
            if let Some(granted) = granted {
                storage.release_late_hold(session, &sql, owned, granted);
            }
        };
        let describe = claim.lock_id.clone();
        let action = move || format!("hand over lock {describe:?}");
        let granted = match self.inner.workers.call(Urgency::Urgent, deadline, once, action, call, late) {
            Ok(Answer { value: Some(granted), .. }) => granted,
            Ok(Answer { value: None, .. }) => return Ok(false),
            Err(failed) => {
                if failed.is_unknown {
                    self.clean_up(Unfinished::acquire(claim, Instant::now()));
                }
                return Err(failed.error);
            }
        };
        let handed = next.hold(claim, granted, Some(hold));
        if !self.queues().hand(next, &handed) {
            // The waiter has given up meanwhile. Its hold is ended in its place: handed over again, or released.
            if let Err(error) = self.release_until(&handed, deadline) {
                log_at!(debug, "a hold that nobody took up: {}", error.chain());
            }
        }
        Ok(true)
    }

    /// Releases a hold, and says how many processes wait. `first` is the error of the hand-over that was tried before,
    /// if it failed. `began` is when the first of all these tries began.
    fn release_with_retries(
        &self,
        hold: &Hold,
        waiter: Option<Uuid>,
        waits_again: bool,
        mut first: Option<Error>,
        began: Instant,
        deadline: Instant,
    ) -> Result<u32> {
        let mut failures = 0;
        let release = Release { claim: hold.claim.clone(), version: hold.version, waiter, waits_again };
        loop {
            match self.run_release(deadline, &release) {
                Ok((Some(waiters), _)) => return Ok(waiters),
                // An earlier try has released the hold, and its answer was lost: nobody but this process could end the
                // hold before its deadline.
                Ok((None, is_repetition)) if (is_repetition || first.is_some()) && hold.is_held() => return Ok(0),
                Ok((None, _)) => return Err(hold.lost()),
                Err(error) => {
                    failures += 1;
                    let (pause, is_transient) = (backoff(failures), error.is_transient());
                    let mut error = if is_transient { first.take().unwrap_or(error) } else { error };
                    if !is_transient || Instant::now() + pause >= deadline {
                        self.clean_up(Unfinished::hold(hold.claim.clone(), hold.version, Instant::now()));
                        if let Error::Timeout { after, .. } = &mut error {
                            *after = began.elapsed();
                        }
                        return Err(error);
                    }
                    first = Some(error);
                    thread::sleep(pause);
                }
            }
        }
    }

    /// How many processes wait, none if there was nothing to release; and whether it took more than one try.
    fn run_release(&self, deadline: Instant, release: &Release) -> Result<(Option<u32>, bool)> {
        let (sql, release) = (Arc::clone(&self.inner.sql), release.clone());
        let describe = release.claim.lock_id.clone();
        let call = move |session: &mut Session| {
            let Release { claim, version, waiter, waits_again } = &release;
            session.release(&sql, claim, Some(*version), *waiter, *waits_again)
        };
        let action = move || format!("release lock {describe:?}");
        let answer = self.inner.workers.call(Urgency::Urgent, deadline, Tries::Several, action, call, |_, _| ())?;
        Ok((answer.value, answer.is_repeated))
    }
}
