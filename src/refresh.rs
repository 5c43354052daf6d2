//! The refresh thread of a held lock.
//!
//! It keeps the lease going, and marks the hold lost at its deadline, also while a refresh of its own is stuck: it never
//! waits for one call, only for whatever comes first of an answer, the time to act, the deadline, and the end of the hold.
//! It gives up only when the hold is over.

use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::events::Event;
use crate::hold::{Hold, Unlocking};
use crate::storage::PostgresStorage;
use crate::sync::{Instant, thread, wait_until};
use crate::term::backoff;
use crate::user_code::note;
use crate::workers::LOOK;

/// Enough for what the caller does when a hold is lost; only what is touched counts.
const STACK_BYTES: usize = 1024 * 1024;

/// Starts the refresh thread of a hold.
pub(crate) fn start(storage: &PostgresStorage, hold: &Arc<Hold>) -> Result<()> {
    let (storage, hold) = (storage.clone(), Arc::clone(hold));
    thread::Builder::new()
        .name("lock-refresh".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let ended = EndedByPanic(&storage, &hold);
            run(&storage, &hold);
            drop(ended);
        })
        .map_err(|source| Error::Thread { source })?;
    Ok(())
}

/// Whoever waits in this process would else wait for a thread that is no more.
struct EndedByPanic<'a>(&'a PostgresStorage, &'a Arc<Hold>);

impl Drop for EndedByPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lines().lose_hold(self.1);
        }
    }
}

/// What the thread waits for next.
enum Next {
    /// The time of the next refresh.
    Refresh(Instant),
    /// The answer to the last one, sent at `since`. If it hasn't come by then, another one is sent.
    Answer { since: Instant, by: Instant },
}

fn run(storage: &PostgresStorage, hold: &Arc<Hold>) {
    let (mut attempt, mut failures) = (0_u64, 0_u32);
    let mut state = hold.state();
    let mut next = Next::Refresh(state.term.next_refresh(hold.refresh_interval));
    loop {
        let now = Instant::now();
        if state.guards == 0 && !(state.is_gone && state.owes_end) {
            return;
        }
        if state.unlocking == Unlocking::Done {
            drop(state);
            storage.lines().lose_hold(hold);
            return;
        }
        if now >= state.term.loss_time() || !state.term.is_held(now) {
            // For good: an answer that comes now finds the hold lost.
            state.term.lose();
            let is_mine_to_tell = state.tell_end();
            hold.changed.notify_all();
            drop(state);
            storage.lines().lose_hold(hold);
            if is_mine_to_tell {
                // The one with the deadline goes first.
                hold.on_lost.call(hold);
                hold.tell_loss(storage.events());
                note!(warn, "{}", hold.lost());
            }
            return;
        }
        // No mutex is held while something is sent or logged: a logger may be slow, or ask a guard.
        let failed = match (state.answer.take(), &next) {
            (Some((_, Ok(latency))), _) => {
                failures = 0;
                next = Next::Refresh(state.term.next_refresh(hold.refresh_interval));
                drop(state);
                storage.trouble().over();
                let (lock_id, owner_id, version) = hold.names();
                storage.events().tell(|| Event::Refreshed { lock_id, owner_id, version, latency });
                note!(trace, "refreshed lock {:?}", hold.claim.lock_id);
                None
            }
            _ if state.unlocking == Unlocking::Pending => {
                // One that is under way waits for the transaction, which is no failure.
                if matches!(next, Next::Answer { .. }) {
                    next = Next::Refresh(now);
                }
                let wake = state.term.loss_time();
                drop(wait_until(&hold.changed, state, wake));
                None
            }
            (Some((number, Err(error))), Next::Answer { .. }) if number == attempt => {
                drop(state);
                failures += 1;
                Some((error, backoff(failures).min(hold.remaining() / 2)))
            }
            (_, Next::Refresh(at)) if *at <= now => {
                attempt += 1;
                // Where answers take long, that of this attempt comes before that of another one would.
                let slow = storage.trouble().last_took().mul_f64(1.5).min(state.term.remaining(now) * 9 / 10);
                let by = now + state.term.attempt_time(now).max(slow);
                next = Next::Answer { since: now, by };
                drop(state);
                storage.send_refresh(hold, attempt, by);
                None
            }
            (_, Next::Answer { since, by }) if *by <= now => {
                drop(state);
                storage.refresh_was_silent(since.elapsed());
                let action = format!("refresh lock {:?}", hold.claim.lock_id);
                failures += 1;
                Some((Error::Timeout { action, waiting_for: "an answer", after: since.elapsed() }, Duration::ZERO))
            }
            // Nothing to do; an error may have come from an attempt that was given up.
            (_, Next::Refresh(wake)) => {
                let wake = state.term.loss_time().min(*wake);
                drop(wait_until(&hold.changed, state, wake));
                None
            }
            (_, Next::Answer { by, .. }) => {
                let wake = state.term.loss_time().min(*by).min(now + LOOK);
                drop(wait_until(&hold.changed, state, wake));
                // The worker may be stuck, or the connection that it opens.
                storage.add_workers();
                None
            }
        };
        if let Some((error, pause)) = failed {
            next = Next::Refresh(now + pause);
            let (lock_id, owner_id, version) = hold.names();
            storage.events().tell(|| Event::RefreshFailed { lock_id, owner_id, version, error: &error });
            storage.trouble().failed(|| format!("lock {lock_id:?} (version {version}): {}", error.chain()));
        }
        state = hold.state();
    }
}
