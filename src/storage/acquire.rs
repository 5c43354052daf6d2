//! One attempt to acquire a lock, with a deadline.
//!
//! Invariants:
//! - A claim is never sent again, unless the database has answered that it took nothing. If its answer is lost, the
//!   clean-up gets the claim, and the next try makes a new one.
//! - A hold that comes too late for its caller, or whose answer used up too much of its lease, is released.
//!
//! Uses `hold::lease`, `db`, and the modules below them.

use std::sync::Arc;
use std::time::Duration;

use crate::db::answer::{Acquired, Busy, Claim, Fault, Granted, RowWaiter};
use crate::db::session::Session;
use crate::db::sql::Sql;
use crate::db::workers::{Failed, MAX_TRIES, Tries, Urgency};
use crate::error::Error;
use crate::hold::lease::Lease;
use crate::storage::PostgresStorage;
use crate::storage::clean_up::Unfinished;
use crate::sync::Instant;
use crate::user_code::log_at;

/// After so many answers that took too much of the lease, an acquire fails.
const MAX_SLOW_ANSWERS: u32 = 2;
const FAST_ENOUGH_ANSWER: &str =
    "an answer within two fifths of the lease: the network, the server or this machine is too slow for such a lease";

/// The result of an attempt to acquire a lock.
pub(crate) enum Attempt {
    Taken {
        claim: Claim,
        granted: Granted,
        /// The owner before, if its lease had run out without a release.
        taken_over_from: Option<String>,
    },
    /// With what the lock's row says, if that is known.
    Busy(Option<Busy>),
}

/// An attempt whose answer came soon enough; or a hold that was released because its answer was slow.
type InTime = Result<Attempt, Slow>;

/// The lock was acquired, but the answer took too much of its lease.
struct Slow {
    took: Duration,
    /// The database has confirmed the release.
    is_released: bool,
}

impl PostgresStorage {
    /// Tries to acquire the lock, and tries again after each of up to `misses` misses. With a `row_waiter` the attempt
    /// keeps to the order of the row.
    ///
    /// A claim whose answer was lost is not sent again. The clean-up gets it. The next try first releases it, and then
    /// makes a new claim.
    pub(crate) fn acquire(
        &self,
        new_claim: impl Fn(Instant) -> Claim,
        row_waiter: Option<RowWaiter>,
        misses: u32,
        deadline: Instant,
    ) -> Result<Attempt, Failed> {
        let began = Instant::now();
        let mut unknown: Vec<Claim> = Vec::new();
        let (mut faults, mut slow) = (0, 0);
        loop {
            let claim = new_claim(deadline);
            let mut failed = match self.acquire_once(&claim, &unknown, row_waiter, misses, deadline) {
                Err(failed) => failed,
                Ok(Err(Slow { took, is_released })) => {
                    if !is_released {
                        self.clean_up(Unfinished::acquire(claim.clone(), Instant::now()));
                    }
                    slow += 1;
                    // One slow answer may be chance: the process may have been stopped for a while.
                    if slow < MAX_SLOW_ANSWERS && Instant::now() < deadline {
                        continue;
                    }
                    let (action, waiting_for) = (format!("acquire lock {:?}", claim.lock_id), FAST_ENOUGH_ANSWER);
                    return Err(Failed {
                        error: Error::Timeout { action, waiting_for, after: took },
                        is_unknown: false,
                        is_connection_fault: false,
                    });
                }
                Ok(Ok(attempt)) => return Ok(attempt),
            };
            if failed.is_unknown {
                if row_waiter.is_some() {
                    self.clean_up(Unfinished::row_entry(&claim.lock_id, claim.expires, Instant::now()));
                }
                self.clean_up(Unfinished::acquire(claim.clone(), Instant::now()));
                unknown.push(claim);
            }
            faults += u32::from(failed.is_connection_fault);
            let is_silent = matches!(failed.error, Error::Timeout { .. }) && !failed.is_connection_fault;
            if !failed.is_connection_fault && !is_silent || faults >= MAX_TRIES || Instant::now() >= deadline {
                if let Error::Timeout { after, waiting_for, .. } = &mut failed.error {
                    *after = began.elapsed();
                    if slow > 0 {
                        *waiting_for = FAST_ENOUGH_ANSWER;
                    }
                }
                return Err(failed);
            }
        }
    }

    /// Sends the claim, after the release of the earlier claims, whose outcome is unknown.
    fn acquire_once(
        &self,
        claim: &Claim,
        unknown: &[Claim],
        row_waiter: Option<RowWaiter>,
        misses: u32,
        deadline: Instant,
    ) -> Result<InTime, Failed> {
        let (sql, owned, unknown) = (Arc::clone(&self.inner.sql), claim.clone(), unknown.to_vec());
        let call = move |session: &mut Session| {
            for before in &unknown {
                match session.release(&sql, before, None, None, false) {
                    Err(fault) if fault.is_connection_fault() => return Err(fault),
                    // The clean-up repeats a release that fails otherwise.
                    _ => {}
                }
            }
            acquire_on(session, &sql, &owned, row_waiter, misses, deadline)
        };
        let (storage, sql) = (self.clone(), Arc::clone(&self.inner.sql));
        // Only a late hold is released here. The caller that gave up hands its entry in the row to the clean-up.
        let late = move |session: &mut Session, attempt: InTime| {
            if let Ok(Attempt::Taken { claim, granted, .. }) = attempt {
                storage.release_late_hold(session, &sql, claim, granted);
            }
        };
        let describe = claim.lock_id.clone();
        let action = move || format!("acquire lock {describe:?}");
        let workers = &self.inner.workers;
        let once = Tries::Once { silence: workers.longest_silence() };
        workers.call(Urgency::Ordinary, deadline, once, action, call, late).map(|answer| answer.value)
    }

    /// Releases a hold that a call was granted too late for its caller.
    pub(super) fn release_late_hold(&self, session: &mut Session, sql: &Sql, claim: Claim, granted: Granted) {
        log_at!(debug, "lock {:?} was taken too late, and is released", claim.lock_id);
        if session.release(sql, &claim, Some(granted.version), None, false).is_err() {
            self.clean_up(Unfinished::hold(claim, granted.version, Instant::now()));
        }
    }
}

/// Acquires the lock, or creates the first hold that it ever had. Runs on the worker's thread.
fn acquire_on(
    session: &mut Session,
    sql: &Sql,
    claim: &Claim,
    row_waiter: Option<RowWaiter>,
    misses: u32,
    deadline: Instant,
) -> Result<InTime, Fault> {
    let mut missed = 0;
    loop {
        let outcome = match session.acquire(sql, claim, row_waiter)? {
            Acquired::Absent => session.create(sql, claim)?,
            outcome => outcome,
        };
        match outcome {
            Acquired::Taken { granted, taken_over_from } => {
                // A second answer as slow as this one must come before the loss time, with a little to spare.
                let (took, lease) = (granted.sent.elapsed(), Lease::new(granted.sent, granted.left, claim.lease));
                if took.mul_f64(2.2) <= lease.loss_time().saturating_duration_since(granted.sent) {
                    return Ok(Ok(Attempt::Taken { claim: claim.clone(), granted, taken_over_from }));
                }
                // Refreshes with answers as slow as this one would lose the hold.
                let is_released = match session.release(sql, claim, Some(granted.version), None, false) {
                    Err(fault) if fault.is_connection_fault() => return Err(fault),
                    released => released.is_ok(),
                };
                return Ok(Err(Slow { took, is_released }));
            }
            Acquired::Busy(busy) => return Ok(Ok(Attempt::Busy(Some(busy)))),
            Acquired::Missed | Acquired::Absent if missed < misses && Instant::now() < deadline => missed += 1,
            Acquired::Missed | Acquired::Absent | Acquired::Locked | Acquired::TooLate => {
                return Ok(Ok(Attempt::Busy(None)));
            }
        }
    }
}
