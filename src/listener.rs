//! The one connection of a storage that listens for releases, on a thread of its own.
//!
//! It is opened when a thread waits for another process, and closed when nobody has for a while. Nothing depends on it but
//! how soon a waiter hears of a release: without it waiters ask from time to time. So whenever it comes or goes, they are told, and ask: what was
//! sent before is not heard.

use std::sync::Arc;
use std::time::Duration;

use postgres::error::SqlState;
use uuid::Uuid;

use crate::connections::Connections;
use crate::error::chain;
use crate::line::Lines;
use crate::session::Session;
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};
use crate::term::backoff;
use crate::trouble::Trouble;
use crate::user_code::{self, note};

/// It is closed after so long without anybody who waits.
const IDLE_TIME: Duration = Duration::from_secs(10);
/// It is opened again at once if it lived for so long.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// How often to look whether anybody still waits.
const LOOK: Duration = Duration::from_millis(250);
/// After so long without a notification the server is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(30);
/// How long it may take to answer that.
const ANSWER_TIME: Duration = Duration::from_secs(5);

pub(crate) struct Listener {
    /// What this storage is called among the waiters of a row.
    pub(crate) waiter: Uuid,
    /// Its own: calls may be answered all the time.
    trouble: Trouble,
    state: Mutex<State>,
    closed: Condvar,
}

#[derive(Default)]
struct State {
    has_thread: bool,
    is_on: bool,
    /// A pooler is in the way.
    is_impossible: bool,
    is_closed: bool,
}

/// Why listening ended.
enum End {
    Idle,
    Lost {
        why: String,
        /// Not only because it was idle, as far as is known.
        is_break: bool,
    },
}

impl Listener {
    pub(crate) fn new() -> Listener {
        let trouble = Trouble::new("listening for releases again");
        Listener { waiter: Uuid::new_v4(), trouble, state: Mutex::default(), closed: Condvar::new() }
    }

    /// Whether notifications come.
    pub(crate) fn is_listening(&self) -> bool {
        lock(&self.state).is_on
    }

    /// Somebody waits in the lines: starts to listen, if that is possible and not done already.
    pub(crate) fn start(self: &Arc<Self>, lines: &Arc<Lines>, connections: &Connections, trouble: &Arc<Trouble>) {
        let mut state = lock(&self.state);
        if state.has_thread || state.is_impossible || state.is_closed {
            return;
        }
        state.has_thread = true;
        drop(state);
        // Dropped with the closure where no thread can be started.
        let running = Running(Arc::clone(self), Arc::clone(lines));
        let (connections, trouble) = (connections.clone(), Arc::clone(trouble));
        let run = move || user_code::call(|| running.run(&connections, &trouble));
        if let Err(error) = thread::Builder::new().name("lock-listen".to_owned()).spawn(run) {
            note!(debug, "cannot start a thread: {}", chain(&error));
        }
    }

    /// Ends the thread, soon.
    pub(crate) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.closed.notify_all();
    }

    fn set_on(&self, is_on: bool, lines: &Lines) {
        lock(&self.state).is_on = is_on;
        lines.listening_changed();
    }
}

/// The listener's thread. However it ends, or if it never began, the next one who waits may start another.
struct Running(Arc<Listener>, Arc<Lines>);

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        (state.has_thread, state.is_on) = (false, false);
    }
}

impl Running {
    fn run(&self, connections: &Connections, trouble: &Trouble) {
        let Running(listener, lines) = self;
        let waiter = listener.waiter;
        let mut failures = 0;
        while !self.is_done() {
            match connections.open(move |session| session.listen(waiter)) {
                Ok(session) if !session.is_direct() => {
                    note!(info, "waiting polls: a pooler is in the way of notifications");
                    lock(&listener.state).is_impossible = true;
                    return;
                }
                Ok(mut session) => {
                    let began = Instant::now();
                    listener.trouble.over();
                    listener.set_on(true, lines);
                    let end = self.listen(&mut session);
                    listener.set_on(false, lines);
                    if let End::Lost { why, is_break } = end {
                        if is_break {
                            session.tell_break();
                        }
                        note!(debug, "the connection that listens was lost: {why}");
                    }
                    // One that is lost as soon as it is open is no better than none.
                    failures = if began.elapsed() < SHORT_LIFE { failures + 1 } else { 0 };
                }
                Err(error) => {
                    failures += 1;
                    let what = || format!("cannot listen for releases, waiting polls: {}", error.chain());
                    // That has its line already.
                    if trouble.is_on() { note!(debug, "{}", what()) } else { listener.trouble.failed(what) }
                }
            }
            let state = lock(&listener.state);
            if failures > 0 && !state.is_closed {
                drop(wait_until(&listener.closed, state, Instant::now() + backoff(failures)));
            }
        }
    }

    fn is_done(&self) -> bool {
        lock(&self.0.state).is_closed || !self.1.any_waits()
    }

    fn listen(&self, session: &mut Session) -> End {
        let (mut needed, mut heard, mut looked) = (Instant::now(), Instant::now(), Instant::now());
        let mut generation = session.route_generation();
        loop {
            match session.notification(LOOK) {
                Ok(Some(payload)) => {
                    heard = Instant::now();
                    // Others listen on this channel, too, and anybody may write to it.
                    if let Some((delay, turn, lock_id)) = addressed_to(self.0.waiter, &payload) {
                        self.1.notified(lock_id, delay, turn);
                    }
                }
                Ok(None) if session.is_closed() => {
                    return End::Lost { why: "the server closed the connection".to_owned(), is_break: false };
                }
                Ok(None) => {}
                Err(error) => {
                    let is_break = error.code() != Some(&SqlState::IDLE_SESSION_TIMEOUT);
                    return End::Lost { why: chain(&error), is_break };
                }
            }
            let now = Instant::now();
            if now.duration_since(looked) < LOOK {
                continue;
            }
            looked = now;
            if self.1.any_waits() {
                needed = now;
            }
            if now.duration_since(needed) >= IDLE_TIME || lock(&self.0.state).is_closed {
                return End::Idle;
            }
            // Where another connection has just broken, this one may be dead too.
            if generation != session.route_generation() || now.duration_since(heard) >= SILENCE {
                generation = session.route_generation();
                if !session.is_alive(ANSWER_TIME) {
                    let why = "the server doesn't answer on the connection".to_owned();
                    return End::Lost { why, is_break: true };
                }
                heard = now;
            }
        }
    }
}

/// When to look, the version that may be taken then, and the lock, if a notification is for this waiter: see `notify` in
/// [`crate::sql`].
fn addressed_to(waiter: Uuid, payload: &str) -> Option<(Duration, Option<i64>, &str)> {
    let mut parts = payload.splitn(4, ' ');
    let (id, delay, turn, lock_id) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let (delay, turn) = (delay.parse().ok()?, turn.parse().ok()?);
    (id.parse() == Ok(waiter)).then_some((Duration::from_millis(delay), Some(turn).filter(|turn| *turn > 0), lock_id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_notification_for_this_process_is_not_heard() {
        let waiter = Uuid::new_v4();
        let heard =
            |payload: &str| addressed_to(waiter, &payload.replace('$', &waiter.to_string())).map(|it| it.2.to_owned());
        assert_eq!(heard("$ 0 7 a lock").as_deref(), Some("a lock"));
        assert_eq!(heard(&format!("$ {} {} l", u64::MAX, i64::MAX)).as_deref(), Some("l"));
        for payload in ["", "$", "$ 0 l", "$ -1 0 l", "$ 0 x l", "0 0 l", &format!("{} 0 0 l", Uuid::new_v4())] {
            assert_eq!(heard(payload), None, "{payload}");
        }
    }
}
