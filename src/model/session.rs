//! A session with the toy server: one row in memory, behind a network that the checker lets be slow or lossy.

#![allow(clippy::expect_used)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use postgres::Config;
use uuid::Uuid;

use crate::answer::{Acquired, Claim, Fault, Found, Granted, LockInformation, Ticket};
use crate::hold::Hold;
use crate::sql::{COLUMNS, Sql};
use crate::sync::{Condvar, Instant, Mutex, lock, random, thread, wait_until};
use crate::toy::{Notified, Row};

/// What the network does to statements.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    /// How long a request and an answer are under way at most.
    pub(crate) delay: Duration,
    /// One statement in so many is lost, or its answer is, and its connection with it; none if zero.
    pub(crate) losses: u32,
    /// The same for refreshes, beside those.
    pub(crate) lost_refreshes: u32,
    /// One notification in so many is lost; none if zero.
    pub(crate) lost_notifications: u32,
    /// There is a pooler in the way of notifications.
    pub(crate) is_deaf: bool,
}

/// After so long the client gives up a connection that is silent.
const SILENCE: Duration = Duration::from_secs(15);

thread_local! {
    /// Of the execution that runs. It is never borrowed where another thread may go on.
    static SERVER: RefCell<Server> = RefCell::default();
}

#[derive(Default)]
pub(crate) struct Server {
    pub(crate) weather: Weather,
    pub(crate) row: Option<Row>,
    /// By lease, how often somebody ended the hold: released it or handed it over. Zero of one that runs.
    pub(crate) ends: BTreeMap<i64, u32>,
    /// The versions, by lease.
    versions: HashMap<Uuid, i64>,
    /// How many statements came.
    pub(crate) statements: u32,
    inboxes: HashMap<Uuid, Arc<Inbox>>,
    /// The holds that somebody counts on.
    watched: Vec<Arc<Hold>>,
    /// The versions that were found not to be trusted any more.
    over: BTreeSet<i64>,
    /// A transaction of a caller's has released the hold, and is open.
    pub(crate) is_row_locked: bool,
    /// Somebody changes the row behind the library's back: what it says is not the truth.
    pub(crate) is_tampered: bool,
}

#[derive(Default)]
struct Inbox {
    payloads: Mutex<VecDeque<String>>,
    came: Condvar,
}

/// Looks at the server, or changes it, at one moment.
pub(crate) fn server<T>(look: impl FnOnce(&mut Server) -> T) -> T {
    SERVER.with_borrow_mut(look)
}

/// A server of an execution's own.
pub(crate) fn start_server(weather: Weather) {
    SERVER.set(Server { weather, ..Server::default() });
}

impl Server {
    /// From now on, nobody else may own the lock while this hold says that it is held.
    pub(crate) fn watch(&mut self, hold: &Arc<Hold>) {
        self.watched.push(Arc::clone(hold));
    }

    /// Its holder is about to give it back.
    pub(crate) fn unwatch(&mut self, hold: &Arc<Hold>) {
        let place = self.watched.iter().position(|watched| Arc::ptr_eq(watched, hold)).expect("watched");
        self.watched.swap_remove(place);
    }

    fn began(&mut self, claim: &Claim, version: i64) {
        self.versions.insert(claim.lease_id, version);
        self.ends.entry(version).or_default();
    }

    fn ended(&mut self, claim: &Claim) {
        if let Some(version) = self.versions.get(&claim.lease_id) {
            *self.ends.entry(*version).or_default() += 1;
        }
    }
}

/// Checks that what is trusted is true. Each hold is asked after the row was looked at: if it is trusted then, it was trusted
/// at that moment, because nothing revives a hold, and the row was its own.
pub(crate) fn check() {
    let now = Instant::now();
    let (row, watched, is_tampered) = server(|server| (server.row.clone(), server.watched.clone(), server.is_tampered));
    let Some(row) = row.filter(|_| !is_tampered) else { return };
    for hold in watched {
        let (version, was_over) = (hold.version, server(|server| server.over.contains(&hold.version)));
        if hold.is_held() {
            assert!(!was_over, "version {version} is trusted again");
            let is_true = row.is_held_by(&hold.claim, now) && row.version == version;
            assert!(is_true, "version {version} is trusted at {now:?}, but there is {row:?}");
        } else {
            server(|server| server.over.insert(version));
        }
    }
}

pub(crate) struct Session {
    pub(crate) is_broken: bool,
    inbox: Option<Arc<Inbox>>,
}

/// As if the connection had been lost: an error without the server's words.
fn fault() -> postgres::Error {
    "port=none".parse::<Config>().expect_err("not a port")
}

/// One in `of`.
fn chance(of: u32) -> bool {
    of > 0 && random().is_multiple_of(of)
}

/// What a statement does when a transaction has locked the row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It waits.
    Update,
    Refresh,
    /// It skips the row.
    Passing,
}

fn deliver(told: Vec<(Uuid, String)>) {
    let lost = server(|server| server.weather.lost_notifications);
    for (waiter, payload) in told {
        if chance(lost) {
            continue;
        }
        let inbox = server(|server| server.inboxes.get(&waiter).cloned());
        if let Some(inbox) = inbox {
            lock(&inbox.payloads).push_back(payload);
            inbox.came.notify_all();
        }
    }
}

/// A transaction of a caller's releases a hold, and stays open; false if there is nothing to release.
pub(crate) fn release_in_transaction(claim: &Claim) -> bool {
    server(|server| {
        let is_there =
            server.row.as_ref().is_some_and(|row| row.lease_id == claim.lease_id && row.released_at.is_none());
        server.is_row_locked = is_there && !server.is_row_locked;
        server.is_row_locked
    })
}

/// It ends.
pub(crate) fn end_transaction(claim: &Claim, commits: bool) {
    let now = Instant::now();
    let told = server(|server| {
        server.is_row_locked = false;
        let row = server.row.as_mut().filter(|_| commits)?;
        row.release(claim, None, None, false, now)
    });
    deliver(notifications(told.map(|(_, notified)| notified).unwrap_or_default(), &claim.lock_id));
}

/// A request or an answer is under way.
fn travel(weather: &Weather) {
    match random() % 4 {
        _ if weather.delay.is_zero() => {}
        0 => thread::sleep(weather.delay),
        1 => thread::sleep(weather.delay / 16),
        _ => {}
    }
}

impl Session {
    /// Opens one, which takes its time, and may fail.
    pub(crate) fn open() -> Result<Session, postgres::Error> {
        let weather = server(|server| server.weather);
        travel(&weather);
        if chance(weather.losses) { Err(fault()) } else { Ok(Session { is_broken: false, inbox: None }) }
    }

    /// Runs a statement on the server, at one moment, unless it gets lost.
    fn run<T>(
        &mut self,
        kind: Kind,
        statement: impl FnOnce(&mut Server, Instant) -> (T, Vec<(Uuid, String)>),
    ) -> Result<T, Fault> {
        let weather = server(|server| server.weather);
        let is_lost = chance(weather.losses) || kind == Kind::Refresh && chance(weather.lost_refreshes);
        let (is_request_lost, is_silent) = (is_lost && random().is_multiple_of(2), random().is_multiple_of(2));
        travel(&weather);
        let mut answer = None;
        if !is_request_lost {
            let mut statement = Some(statement);
            let (said, told) = loop {
                let now = Instant::now();
                let done = server(|server| {
                    if server.is_row_locked && kind != Kind::Passing {
                        return None;
                    }
                    server.statements += 1;
                    statement.take().map(|statement| statement(server, now))
                });
                match done {
                    Some(done) => break done,
                    None => thread::sleep(Duration::from_millis(1)),
                }
            };
            deliver(told);
            check();
            answer = Some(said);
        }
        match answer {
            Some(answer) if !is_lost => {
                travel(&weather);
                Ok(answer)
            }
            _ => {
                if is_silent {
                    thread::sleep(SILENCE);
                }
                Err(Fault::Postgres(fault()))
            }
        }
    }

    pub(crate) fn acquire(&mut self, _: &Sql, claim: &Claim, ticket: Option<Ticket>) -> Result<Acquired, Fault> {
        let sent = Instant::now();
        self.run(Kind::Passing, |server, now| {
            if server.is_row_locked {
                return (Acquired::Locked, Vec::new());
            }
            let Some(row) = &mut server.row else { return (Acquired::Absent, Vec::new()) };
            let (answer, notified) = row.acquire(claim, ticket, now);
            if let Some(version) = answer.taken {
                server.began(claim, version);
            }
            (answer.meaning(sent), notifications(notified, &claim.lock_id))
        })
    }

    pub(crate) fn create(&mut self, _: &Sql, claim: &Claim) -> Result<Acquired, Fault> {
        let sent = Instant::now();
        self.run(Kind::Update, |server, now| {
            if server.row.is_some() {
                return (Acquired::Missed, Vec::new());
            }
            server.row = Some(Row::create(claim, now));
            server.began(claim, 1);
            let granted = Granted { version: 1, sent, left: claim.lease, is_wanted: false };
            (Acquired::Taken { granted, taken_over_from: None }, Vec::new())
        })
    }

    pub(crate) fn refresh(&mut self, _: &Sql, claim: &Claim, version: i64) -> Result<Option<bool>, Fault> {
        self.run(Kind::Refresh, |server, now| {
            (server.row.as_mut().and_then(|row| row.refresh(claim, version, now)), Vec::new())
        })
    }

    pub(crate) fn release(
        &mut self,
        _: &Sql,
        claim: &Claim,
        version: Option<i64>,
        waiter: Option<Uuid>,
        waits_again: bool,
    ) -> Result<Option<u32>, Fault> {
        self.run(Kind::Update, |server, now| {
            let told = server.row.as_mut().and_then(|row| row.release(claim, version, waiter, waits_again, now));
            if told.is_some() {
                server.ended(claim);
            }
            let (waiters, notified) = told.map_or((None, Vec::new()), |(waiters, notified)| (Some(waiters), notified));
            (waiters, notifications(notified, &claim.lock_id))
        })
    }

    pub(crate) fn hand_over(
        &mut self,
        _: &Sql,
        claim: &Claim,
        version: i64,
        next: &Claim,
    ) -> Result<Option<Granted>, Fault> {
        let sent = Instant::now();
        self.run(Kind::Passing, |server, now| {
            if server.is_row_locked {
                return (None, Vec::new());
            }
            let handed = server.row.as_mut().and_then(|row| row.hand_over(claim, version, next, now));
            let Some(((version, left, is_wanted), notified)) = handed else { return (None, Vec::new()) };
            server.ended(claim);
            server.began(next, version);
            (Some(Granted { version, sent, left, is_wanted }), notifications(notified, &claim.lock_id))
        })
    }

    pub(crate) fn withdraw(&mut self, _: &Sql, lock_id: &str, waiter: Uuid) -> Result<(), Fault> {
        self.run(Kind::Update, |server, now| {
            let notified = server.row.as_mut().map(|row| row.withdraw(waiter, now)).unwrap_or_default();
            ((), notifications(notified, lock_id))
        })
    }

    pub(crate) fn is_settled(&mut self, _: &Sql, _: &str) -> Result<bool, Fault> {
        Ok(server(|server| !server.is_row_locked))
    }

    pub(crate) fn is_direct(&self) -> bool {
        server(|server| !server.weather.is_deaf)
    }

    pub(crate) fn listen(&mut self, waiter: Uuid) -> Result<(), postgres::Error> {
        self.inbox = Some(server(|server| Arc::clone(server.inboxes.entry(waiter).or_default())));
        Ok(())
    }

    pub(crate) fn notification(&mut self, patience: Duration) -> Result<Option<String>, postgres::Error> {
        let Some(inbox) = &self.inbox else { return Ok(None) };
        let until = Instant::now() + patience;
        let mut payloads = lock(&inbox.payloads);
        while payloads.is_empty() && Instant::now() < until {
            payloads = wait_until(&inbox.came, payloads, until);
        }
        Ok(payloads.pop_front())
    }

    pub(crate) fn is_alive(&mut self, _: Duration) -> bool {
        true
    }

    pub(crate) fn tell_break(&self) {}

    pub(crate) fn is_doubted(&self) -> bool {
        false
    }

    pub(crate) fn trust(&mut self) {}

    pub(crate) fn prove(&mut self, _: Duration) -> bool {
        true
    }

    pub(crate) fn is_usable(&self) -> bool {
        !self.is_broken
    }

    pub(crate) fn is_ready(&mut self, _: Duration) -> bool {
        self.is_usable()
    }

    pub(crate) fn has_to_prepare(&self) -> bool {
        false
    }

    pub(crate) fn prepare(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    pub(crate) fn is_closed(&self) -> bool {
        false
    }

    pub(crate) fn route_generation(&self) -> usize {
        0
    }

    pub(crate) fn mark_broken(&mut self, _: &Fault) {
        self.is_broken = true;
    }

    pub(crate) fn inspect(&mut self, _: &str, _: &str) -> Result<Found, Fault> {
        let columns = COLUMNS
            .iter()
            .map(|(name, type_, is_required)| format!("{name} {type_}{}", if *is_required { " NOT NULL" } else { "" }));
        let (kind, persistence) = ("r".to_owned(), "p".to_owned());
        Ok(Found::Table { kind, persistence, columns: columns.collect(), has_key: true, hides_rows: false })
    }

    pub(crate) fn create_table(&mut self, _: &Sql) -> Result<bool, Fault> {
        Ok(false)
    }

    pub(crate) fn create_version_check(&mut self, _: &Sql) -> Result<(), Fault> {
        Ok(())
    }

    pub(crate) fn get(&mut self, _: &Sql, _: &str) -> Result<Option<LockInformation>, Fault> {
        Ok(None)
    }

    pub(crate) fn list(&mut self, _: &Sql, _: Duration) -> Result<Vec<LockInformation>, Fault> {
        Ok(Vec::new())
    }

    pub(crate) fn server_time(&mut self) -> Result<SystemTime, Fault> {
        Ok(SystemTime::UNIX_EPOCH)
    }
}

/// The payloads of notifications.
fn notifications(notified: Vec<Notified>, lock_id: &str) -> Vec<(Uuid, String)> {
    let payload =
        |(waiter, delay, turn): Notified| (waiter, format!("{waiter} {} {turn} {lock_id}", delay.as_millis()));
    notified.into_iter().map(payload).collect()
}
