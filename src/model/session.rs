//! The model server, and sessions with it: one row in memory, behind a network that may be slow or lossy.
//!
//! Replaces `db/session.rs` under the model checker. The checker's random numbers decide what the network
//! does.

#![allow(clippy::expect_used)]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use postgres::Config;
use uuid::Uuid;

use crate::db::answer::{Acquired, Claim, Fault, Found, FoundTable, Granted, LockInformation, RowWaiter};
use crate::db::sql::{COLUMNS, Sql};
use crate::hold::Hold;
use crate::model::row::{Notified, Row};
use crate::sync::{Condvar, Instant, Mutex, lock, random, thread, wait_until};

/// What the network does to statements.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NetworkFaults {
    /// How long a request or an answer takes at most.
    pub(crate) delay: Duration,
    /// One statement in so many is lost, or its answer is, together with its connection. Zero means none.
    pub(crate) losses: u32,
    /// One refresh in so many is lost in the same way, in addition.
    pub(crate) lost_refreshes: u32,
    /// One notification in so many is lost. Zero means none.
    pub(crate) lost_notifications: u32,
    /// A pooler keeps all notifications back.
    pub(crate) drops_notifications: bool,
}

/// The client gives up a connection that has been silent for so long.
const SILENCE: Duration = Duration::from_secs(15);

thread_local! {
    /// The server of the current execution. Nothing borrows it across a point where another thread may run.
    static SERVER: RefCell<Server> = RefCell::default();
}

#[derive(Default)]
pub(crate) struct Server {
    pub(crate) faults: NetworkFaults,
    pub(crate) row: Option<Row>,
    /// By version, how often somebody ended the hold: released it or handed it over. Zero for one that nobody has
    /// ended.
    pub(crate) ends: BTreeMap<i64, u32>,
    /// The versions, by lease id.
    versions: HashMap<Uuid, i64>,
    /// How many statements the server has run.
    pub(crate) statements: u32,
    inboxes: HashMap<Uuid, Arc<Inbox>>,
    /// The holds whose trust is checked.
    watched: Vec<Arc<Hold>>,
    /// The versions whose holds were found to be trusted no more.
    over: BTreeSet<i64>,
    /// A caller's transaction has released the hold, and is open.
    pub(crate) is_row_locked: bool,
    /// The scenario changed the row behind the library's back, so that trust can't be checked by it.
    pub(crate) is_tampered: bool,
}

#[derive(Default)]
struct Inbox {
    payloads: Mutex<VecDeque<String>>,
    arrived: Condvar,
}

/// Looks at the server, or changes it, in one step.
pub(crate) fn server<T>(look: impl FnOnce(&mut Server) -> T) -> T {
    SERVER.with_borrow_mut(look)
}

/// Starts a new server for an execution.
pub(crate) fn start_server(faults: NetworkFaults) {
    SERVER.set(Server { faults, ..Server::default() });
}

impl Server {
    /// From now on, nobody else may hold the lock while this hold says that it is held.
    pub(crate) fn watch(&mut self, hold: &Arc<Hold>) {
        self.watched.push(Arc::clone(hold));
    }

    /// The holder is about to release it.
    pub(crate) fn unwatch(&mut self, hold: &Arc<Hold>) {
        let position = self.watched.iter().position(|watched| Arc::ptr_eq(watched, hold)).expect("watched");
        self.watched.swap_remove(position);
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

/// Checks that every trusted hold is the row's. First reads the row, and then asks each hold. Nothing revives a hold:
/// one that is trusted now was trusted when the row was read. So that row must be its own.
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

/// The error of a lost connection, without an error of the server in it.
fn fault() -> postgres::Error {
    "port=none".parse::<Config>().expect_err("not a port")
}

/// True once in `of` times.
fn chance(of: u32) -> bool {
    of > 0 && random().is_multiple_of(of)
}

/// What a statement does when a transaction has locked the row.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The statement waits.
    Update,
    /// The statement waits, too. Refreshes may be lost more often.
    Refresh,
    /// The statement skips the row.
    SkipLocked,
}

fn deliver(sent: Vec<(Uuid, String)>) {
    let lost = server(|server| server.faults.lost_notifications);
    for (waiter, payload) in sent {
        if chance(lost) {
            continue;
        }
        let inbox = server(|server| server.inboxes.get(&waiter).cloned());
        if let Some(inbox) = inbox {
            lock(&inbox.payloads).push_back(payload);
            inbox.arrived.notify_all();
        }
    }
}

/// A caller's transaction releases a hold, and stays open. False if there is nothing to release.
pub(crate) fn release_in_transaction(claim: &Claim) -> bool {
    server(|server| {
        let is_there =
            server.row.as_ref().is_some_and(|row| row.lease_id == claim.lease_id && row.released_at.is_none());
        server.is_row_locked = is_there && !server.is_row_locked;
        server.is_row_locked
    })
}

/// That transaction ends.
pub(crate) fn end_transaction(claim: &Claim, commits: bool) {
    let now = Instant::now();
    let sent = server(|server| {
        server.is_row_locked = false;
        let row = server.row.as_mut().filter(|_| commits)?;
        row.release(claim, None, None, false, now)
    });
    deliver(notifications(sent.map(|(_, notified)| notified).unwrap_or_default(), &claim.lock_id));
}

/// Takes the time of a request or an answer.
fn travel(faults: &NetworkFaults) {
    match random() % 4 {
        _ if faults.delay.is_zero() => {}
        0 => thread::sleep(faults.delay),
        1 => thread::sleep(faults.delay / 16),
        _ => {}
    }
}

impl Session {
    /// Opens a session, which takes time, and may fail.
    pub(crate) fn open() -> Result<Session, postgres::Error> {
        let faults = server(|server| server.faults);
        travel(&faults);
        if chance(faults.losses) { Err(fault()) } else { Ok(Session { is_broken: false, inbox: None }) }
    }

    /// Runs a statement on the server, in one step, unless it gets lost.
    fn run<T>(
        &mut self,
        kind: Kind,
        statement: impl FnOnce(&mut Server, Instant) -> (T, Vec<(Uuid, String)>),
    ) -> Result<T, Fault> {
        let faults = server(|server| server.faults);
        let is_lost = chance(faults.losses) || kind == Kind::Refresh && chance(faults.lost_refreshes);
        let (is_request_lost, is_silent) = (is_lost && random().is_multiple_of(2), random().is_multiple_of(2));
        travel(&faults);
        let mut answer = None;
        if !is_request_lost {
            let mut statement = Some(statement);
            let (value, sent) = loop {
                let now = Instant::now();
                let done = server(|server| {
                    if server.is_row_locked && kind != Kind::SkipLocked {
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
            deliver(sent);
            check();
            answer = Some(value);
        }
        match answer {
            Some(answer) if !is_lost => {
                travel(&faults);
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

    pub(crate) fn acquire(&mut self, _: &Sql, claim: &Claim, row_waiter: Option<RowWaiter>) -> Result<Acquired, Fault> {
        let sent = Instant::now();
        self.run(Kind::SkipLocked, |server, now| {
            if server.is_row_locked {
                return (Acquired::Locked, Vec::new());
            }
            let Some(row) = &mut server.row else { return (Acquired::Absent, Vec::new()) };
            let (answer, notified) = row.acquire(claim, row_waiter, now);
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
            let sent = server.row.as_mut().and_then(|row| row.release(claim, version, waiter, waits_again, now));
            if sent.is_some() {
                server.ended(claim);
            }
            let (waiters, notified) = sent.map_or((None, Vec::new()), |(waiters, notified)| (Some(waiters), notified));
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
        self.run(Kind::SkipLocked, |server, now| {
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
        server(|server| !server.faults.drops_notifications)
    }

    pub(crate) fn listen(&mut self, waiter: Uuid) -> Result<(), postgres::Error> {
        self.inbox = Some(server(|server| Arc::clone(server.inboxes.entry(waiter).or_default())));
        Ok(())
    }

    pub(crate) fn notification(&mut self, timeout: Duration) -> Result<Option<String>, postgres::Error> {
        let Some(inbox) = &self.inbox else { return Ok(None) };
        let until = Instant::now() + timeout;
        let mut payloads = lock(&inbox.payloads);
        while payloads.is_empty() && Instant::now() < until {
            payloads = wait_until(&inbox.arrived, payloads, until);
        }
        Ok(payloads.pop_front())
    }

    pub(crate) fn is_alive(&mut self, _: Duration) -> bool {
        true
    }

    pub(crate) fn report_break(&self) {}

    pub(crate) fn is_suspect(&self) -> bool {
        false
    }

    pub(crate) fn trust(&mut self) {}

    pub(crate) fn answers_within(&mut self, _: Duration) -> bool {
        true
    }

    pub(crate) fn is_lent(&self) -> bool {
        false
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
        Ok(Found::Table(Box::new(FoundTable {
            role: "model".to_owned(),
            kind: "r".to_owned(),
            is_partition: false,
            access_method: "heap".to_owned(),
            persistence: "p".to_owned(),
            columns: columns.collect(),
            required: Vec::new(),
            collation: None,
            has_key: true,
            hides_rows: false,
            publications: Vec::new(),
            missing_rights: Vec::new(),
        })))
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

/// The notifications with their payloads, as the statements make them.
fn notifications(notified: Vec<Notified>, lock_id: &str) -> Vec<(Uuid, String)> {
    let payload = |(waiter, delay, notified_version): Notified| {
        (waiter, format!("{waiter} {} {notified_version} {lock_id}", delay.as_millis()))
    };
    notified.into_iter().map(payload).collect()
}
