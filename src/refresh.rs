//! The refresh thread of a held lock.
//!
//! It keeps the lease going, and marks the hold lost at its deadline, also while a refresh of its own is stuck: it never
//! waits for one call, only for whatever comes first of an answer, the time to act, the deadline, and the end of the hold.
//! It gives up only when the hold is over.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::hold::Hold;
use crate::storage::PostgresStorage;
use crate::term::backoff;
use crate::workers::wait_until;

/// Little is done on it; only what is touched counts.
const STACK_BYTES: usize = 256 * 1024;

/// Starts the refresh thread of a hold.
pub(crate) fn start(storage: &PostgresStorage, hold: &Arc<Hold>) -> Result<()> {
    let (storage, hold) = (storage.clone(), Arc::clone(hold));
    thread::Builder::new()
        .name("lock-refresh".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || run(&storage, &hold))
        .map_err(|source| Error::Thread { source })?;
    Ok(())
}

/// What the thread waits for next.
enum Next {
    /// The time of the next refresh.
    Refresh(Instant),
    /// The answer to the last one; if it hasn't come by then, another one is sent.
    Answer(Instant),
}

fn run(storage: &PostgresStorage, hold: &Arc<Hold>) {
    let mut next = Next::Refresh(Instant::now() + hold.refresh_interval);
    let (mut attempt, mut failures) = (0_u64, 0_u32);
    let mut state = hold.state();
    loop {
        let now = Instant::now();
        if state.guards == 0 {
            return;
        }
        let answer = state.answer.take();
        if let Some((_, Ok(false))) = answer {
            state.term.lose();
        }
        if !state.term.is_held(now) {
            // For good: an answer that comes now finds the deadline passed.
            state.term.lose();
            drop(state);
            log::warn!(target: "storage_lock", "{}", hold.lost());
            return;
        }
        match answer {
            Some((_, Ok(_))) => {
                failures = 0;
                next = Next::Refresh(now + hold.refresh_interval);
            }
            Some((number, Err(error))) if number == attempt => {
                failures += 1;
                next = Next::Refresh(now + backoff(failures));
                warn_of_failure(hold, &error);
            }
            // An answer to an attempt that was given up.
            Some((_, Err(_))) | None => {}
        }
        let wake = match next {
            Next::Refresh(at) if at <= now => {
                attempt += 1;
                let deadline = now + state.term.attempt_time(now);
                next = Next::Answer(deadline);
                drop(state);
                let number = attempt;
                storage.send_refresh(hold, deadline, move |hold, sent, result| {
                    let mut state = hold.state();
                    if let Ok(true) = result {
                        state.term.extend(Instant::now(), sent, hold.claim.lease);
                        log::trace!(target: "storage_lock", "refreshed lock {:?}", hold.claim.lock_id);
                    }
                    state.answer = Some((number, result));
                    hold.changed.notify_all();
                });
                state = hold.state();
                continue;
            }
            Next::Answer(by) if by <= now => {
                failures += 1;
                next = Next::Refresh(now);
                let action = format!("refresh lock {:?}", hold.claim.lock_id);
                warn_of_failure(hold, &Error::Timeout { action, waiting_for: "an answer", after: now.elapsed() });
                continue;
            }
            Next::Refresh(at) | Next::Answer(at) => at.min(state.term.deadline()),
        };
        state = wait_until(&hold.changed, state, wake);
    }
}

fn warn_of_failure(hold: &Hold, error: &Error) {
    let (lock_id, version) = (&hold.claim.lock_id, hold.version);
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    log::warn!(target: "storage_lock", "lock {lock_id:?} (version {version}): {error}{cause}; trying again");
}
