//! The one connection of a storage that listens for releases, on a thread of its own.
//!
//! It is opened when a thread waits for another process, and closed when no thread has waited for a while. It affects
//! only how soon a waiter learns of a release: without it, waiters ask from time to time. Each head asks whenever the
//! connection comes or goes, because nobody heard the notifications sent before.

use std::sync::Arc;
use std::time::Duration;

use postgres::error::SqlState;
use uuid::Uuid;

use crate::backoff::backoff;
use crate::db::connections::Connections;
use crate::db::health::Health;
use crate::db::session::Session;
use crate::error::chain;
use crate::sync::{Condvar, Instant, Mutex, lock, thread, wait_until};
use crate::user_code::{self, log_at};
use crate::wait::queue::WaitQueues;

/// The connection is closed when nobody has waited for so long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that lived for so long is opened again immediately. After a shorter life, the thread backs off first.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// How often to check whether anybody still waits.
const CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// After so long without a notification, the thread asks the server whether it is still there.
const LONGEST_SILENCE: Duration = Duration::from_secs(30);
/// How long the server may take to answer that question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) struct Listener {
    /// The id of this storage among the waiters of a row.
    pub(crate) waiter: Uuid,
    /// Not the health of the storage: calls may be answered all the time while nobody can listen.
    health: Health,
    state: Mutex<State>,
    closed: Condvar,
}

#[derive(Default)]
struct State {
    has_thread: bool,
    is_listening: bool,
    /// A pooler is in the way of notifications, so listening is impossible.
    is_pooled: bool,
    is_closed: bool,
}

/// Why listening ended.
enum End {
    Idle,
    Lost {
        why: String,
        /// The connection wasn't just closed for being idle, as far as is known.
        is_break: bool,
    },
}

impl Listener {
    pub(crate) fn new() -> Listener {
        let health = Health::new("listening for releases again");
        Listener { waiter: Uuid::new_v4(), health, state: Mutex::default(), closed: Condvar::new() }
    }

    /// Whether notifications come.
    pub(crate) fn is_listening(&self) -> bool {
        lock(&self.state).is_listening
    }

    /// Starts to listen, because a thread waits in the queues. Does nothing if a thread listens already, or if
    /// listening is impossible.
    pub(crate) fn start(self: &Arc<Self>, queues: &Arc<WaitQueues>, connections: &Connections, health: &Arc<Health>) {
        let mut state = lock(&self.state);
        if state.has_thread || state.is_pooled || state.is_closed {
            return;
        }
        let Some(connections) = connections.for_listening() else {
            state.is_pooled = true;
            return;
        };
        state.has_thread = true;
        drop(state);
        // If no thread can be started, the closure drops it.
        let running = ListenerThread { listener: Arc::clone(self), queues: Arc::clone(queues) };
        let health = Arc::clone(health);
        let run = move || user_code::call(|| running.run(&connections, &health));
        if let Err(error) = thread::Builder::new().name("lock-listen".to_owned()).spawn(run) {
            log_at!(debug, "cannot start a thread: {}", chain(&error));
        }
    }

    /// Ends the thread soon, without waiting for it.
    pub(crate) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.closed.notify_all();
    }

    fn set_listening(&self, is_listening: bool, queues: &WaitQueues) {
        lock(&self.state).is_listening = is_listening;
        queues.listening_changed();
    }
}

/// The listener's thread. When it ends, in whatever way, or if it never began, the next waiter may start another one.
struct ListenerThread {
    listener: Arc<Listener>,
    queues: Arc<WaitQueues>,
}

impl Drop for ListenerThread {
    fn drop(&mut self) {
        let mut state = lock(&self.listener.state);
        (state.has_thread, state.is_listening) = (false, false);
    }
}

impl ListenerThread {
    fn run(&self, connections: &Connections, health: &Health) {
        let ListenerThread { listener, queues } = self;
        let waiter = listener.waiter;
        let mut failures = 0;
        while !self.is_done() {
            match connections.open(move |session| session.listen(waiter)) {
                Ok(session) if !session.is_direct() => {
                    log_at!(info, "waiting polls: a pooler is in the way of notifications");
                    lock(&listener.state).is_pooled = true;
                    return;
                }
                Ok(mut session) => {
                    let began = Instant::now();
                    listener.health.recovered();
                    listener.set_listening(true, queues);
                    let end = self.receive(&mut session);
                    listener.set_listening(false, queues);
                    if let End::Lost { why, is_break } = end {
                        if is_break {
                            session.report_break();
                        }
                        log_at!(debug, "the connection that listens was lost: {why}");
                    }
                    // A connection that is lost as soon as it is open is no better than none.
                    failures = if began.elapsed() < SHORT_LIFE { failures + 1 } else { 0 };
                }
                Err(error) => {
                    failures += 1;
                    let what = || format!("cannot listen for releases, waiting polls: {}", error.chain());
                    // If refreshes fail too, those failures have their log line already.
                    if health.is_failing() { log_at!(debug, "{}", what()) } else { listener.health.failed(what) }
                }
            }
            let state = lock(&listener.state);
            if failures > 0 && !state.is_closed {
                drop(wait_until(&listener.closed, state, Instant::now() + backoff(failures)));
            }
        }
    }

    fn is_done(&self) -> bool {
        lock(&self.listener.state).is_closed || !self.queues.any_waits()
    }

    /// Passes notifications to the queues, until nobody has waited for a while or the connection is lost.
    fn receive(&self, session: &mut Session) -> End {
        let (mut last_needed, mut last_heard, mut last_check) = (Instant::now(), Instant::now(), Instant::now());
        let mut generation = session.route_generation();
        loop {
            match session.notification(CHECK_INTERVAL) {
                Ok(Some(payload)) => {
                    last_heard = Instant::now();
                    // Other waiters listen on this channel too, and anybody may write to it.
                    if let Some((delay, notified_version, lock_id)) = parse(&payload, self.listener.waiter) {
                        self.queues.notified(lock_id, delay, notified_version);
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
            if now.duration_since(last_check) < CHECK_INTERVAL {
                continue;
            }
            last_check = now;
            if self.queues.any_waits() {
                last_needed = now;
            }
            if now.duration_since(last_needed) >= IDLE_TIMEOUT || lock(&self.listener.state).is_closed {
                return End::Idle;
            }
            // If another connection has just broken, this one may be dead too.
            if generation != session.route_generation() || now.duration_since(last_heard) >= LONGEST_SILENCE {
                generation = session.route_generation();
                if !session.is_alive(ANSWER_TIMEOUT) {
                    let why = "the server doesn't answer on the connection".to_owned();
                    return End::Lost { why, is_break: true };
                }
                last_heard = now;
            }
        }
    }
}

/// What a notification for this waiter says: when to ask, the version that may be taken then, and the lock. None if
/// it is for somebody else, or no notification at all. See `notify` in [`crate::db::sql`].
fn parse(payload: &str, waiter: Uuid) -> Option<(Duration, Option<i64>, &str)> {
    let mut parts = payload.splitn(4, ' ');
    let (id, delay, notified_version, lock_id) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let (delay, notified_version) = (delay.parse().ok()?, notified_version.parse().ok()?);
    (id.parse() == Ok(waiter)).then_some((
        Duration::from_millis(delay),
        Some(notified_version).filter(|version| *version > 0),
        lock_id,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_a_notification_for_this_process_is_not_heard() {
        let waiter = Uuid::new_v4();
        let heard = |payload: &str| parse(&payload.replace('$', &waiter.to_string()), waiter).map(|it| it.2.to_owned());
        assert_eq!(heard("$ 0 7 a lock").as_deref(), Some("a lock"));
        assert_eq!(heard(&format!("$ {} {} l", u64::MAX, i64::MAX)).as_deref(), Some("l"));
        for payload in ["", "$", "$ 0 l", "$ -1 0 l", "$ 0 x l", "0 0 l", &format!("{} 0 0 l", Uuid::new_v4())] {
            assert_eq!(heard(payload), None, "{payload}");
        }
    }
}
