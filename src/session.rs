//! One open connection, and what can be asked on it.
//!
//! A *direct* session prepares each of its statements after it has run it first, and runs each in one round trip.
//! Behind a pooler that hands a server session to another client after each transaction that is neither possible nor
//! safe: a prepared name may mean another client's statement there (the client names them `s0`, `s1`, … in every
//! process), and settings would leak into other clients' sessions. So a session sets nothing with `SET`; it asks for
//! its settings in the start-up packet, which such poolers refuse (pgbouncer: 08P01) or drop (the marker isn't there
//! when read back), and each prepared statement does nothing unless it is the statement that was meant, in the
//! backend that was meant. At the first sign of a pooler the storage turns to unnamed statements, also one round trip
//! each.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use postgres::error::SqlState;
use postgres::fallible_iterator::FallibleIterator;
use postgres::types::{ToSql, Type};
use postgres::{Client, IsolationLevel, Row, Statement};
use uuid::Uuid;

use crate::answer::{AcquireRow, Acquired, Claim, Fault, Found, Granted, LockInformation, Ticket};
use crate::error::{chain, is_serialization_failure};
use crate::events::Events;
use crate::sql::{self, Prepared, Sql};
use crate::user_code::note;

/// What all sessions of a storage know of the way to the server.
#[derive(Debug, Default)]
pub(crate) struct Route {
    /// A pooler shares server sessions between clients: nothing may depend on the session.
    pub(crate) is_pooled: AtomicBool,
    /// Goes up when a connection breaks, or is silent: those that were open then may be dead too, and have to answer
    /// first.
    pub(crate) generation: AtomicUsize,
    /// A connection broke, and none has been opened since.
    is_interrupted: AtomicBool,
    pub(crate) events: Events,
}

pub(crate) struct Session {
    client: Client,
    /// The backend that our prepared statements are in; none behind a pooler.
    backend: Option<i32>,
    /// By the names of the statements.
    statements: HashMap<String, Statement>,
    /// What was run last without being prepared: its name, its text, and the types of its parameters.
    unprepared: Option<(String, String, &'static [Type])>,
    route: Arc<Route>,
    generation: usize,
    is_broken: bool,
    /// What the server's clock said last, and when that was read.
    clock: (SystemTime, Instant),
}

impl Session {
    /// Takes a new connection over; `with_options` says that [`sql::SESSION_OPTIONS`] were sent.
    pub(crate) fn new(
        mut client: Client,
        with_options: bool,
        route: Arc<Route>,
        generation: usize,
    ) -> Result<Session, postgres::Error> {
        let row = client.query_typed_one(sql::SESSION, &[])?;
        let (is_direct, time) = (row.try_get::<_, Option<bool>>(1)? == Some(true), row.try_get(2)?);
        if with_options && !is_direct {
            route.recognise_pooler("it dropped the start-up options");
        }
        let backend = if with_options && is_direct { Some(row.try_get(0)?) } else { None };
        let clock = (time, Instant::now());
        Ok(Session {
            client,
            backend,
            statements: HashMap::new(),
            unprepared: None,
            route,
            generation,
            is_broken: false,
            clock,
        })
    }

    /// Whether it may be used again.
    pub(crate) fn is_usable(&self) -> bool {
        let is_closed = self.client.is_closed();
        if is_closed && !self.is_broken {
            self.tell_break();
        }
        !is_closed && !self.is_broken && (self.backend.is_none() || !self.route.is_pooled.load(Ordering::Relaxed))
    }

    /// Whether the backend is this session's alone: only then can it listen.
    pub(crate) fn is_direct(&self) -> bool {
        self.backend.is_some()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Whether another connection has broken, or been silent, since this one answered last: then it may be dead, too.
    pub(crate) fn is_doubted(&self) -> bool {
        self.generation != self.route_generation()
    }

    /// It has answered: it is not doubted before the generation goes up again.
    pub(crate) fn trust(&mut self) {
        self.generation = self.route_generation();
    }

    /// Whether it answers within `patience`; if not, it is not to be used any more.
    pub(crate) fn prove(&mut self, patience: Duration) -> bool {
        // It may have been closed because it was idle, which says nothing of others.
        if !self.is_ready(CHECKED_AFTER) {
            return false;
        }
        let is_alive = self.is_alive(patience);
        if is_alive {
            self.trust();
        } else {
            self.tell_break();
            self.is_broken = true;
        }
        is_alive
    }

    /// Goes up when any connection of the storage breaks, or is silent.
    pub(crate) fn route_generation(&self) -> usize {
        self.route.generation.load(Ordering::Relaxed)
    }

    /// Not to be used again; and those connections are doubted that have not answered since this one did.
    pub(crate) fn mark_broken(&mut self, fault: &Fault) {
        self.is_broken = true;
        // One that turned out to be a pooler's is well.
        if !matches!(fault, Fault::Pooled) {
            self.tell_break();
        }
        self.route.generation.fetch_max(self.generation + 1, Ordering::Relaxed);
    }

    /// This connection broke.
    pub(crate) fn tell_break(&self) {
        self.route.is_interrupted.store(true, Ordering::Relaxed);
    }

    /// One attempt, one statement. Whoever waits keeps to the order of the row, and stands there afterwards if the lock is busy; for
    /// whoever doesn't, a free lock is free even if it is promised to somebody.
    pub(crate) fn acquire(&mut self, sql: &Sql, claim: &Claim, ticket: Option<Ticket>) -> Result<Acquired, Fault> {
        // Once more where our idea of the server's clock was wrong: after a suspend, or a jump of that clock.
        match self.try_to_acquire(sql, claim, ticket)? {
            Acquired::TooLate => self.try_to_acquire(sql, claim, ticket),
            acquired => Ok(acquired),
        }
    }

    fn try_to_acquire(&mut self, sql: &Sql, claim: &Claim, ticket: Option<Ticket>) -> Result<Acquired, Fault> {
        let (micros, place) = (micros(claim.lease), self.place(&sql.acquire));
        let (waiter, turn) = (ticket.map(|ticket| ticket.waiter), ticket.and_then(|ticket| ticket.turn));
        let ends = self.end_of(claim);
        let sent = Instant::now();
        let row = self.run(
            &sql.acquire,
            &[&claim.lock_id, &claim.owner_id, &claim.lease_id, &micros, &place, &waiter, &turn, &ends],
        );
        let row = match row {
            Err(fault) => return unlucky(fault),
            Ok(row) => row,
        };
        let now = row.try_get(3)?;
        self.clock = (now, Instant::now());
        if !row.try_get::<_, bool>(11)? {
            return Ok(Acquired::TooLate);
        }
        let Some(version) = row.try_get::<_, Option<i64>>(5)? else { return Ok(Acquired::Absent) };
        let place = row.try_get::<_, Option<i32>>(9)?.and_then(|place| u32::try_from(place).ok());
        let waiters = u32::try_from(row.try_get::<_, i32>(10)?).unwrap_or_default();
        let (released_at, lease_end): (Option<SystemTime>, SystemTime) = (row.try_get(7)?, row.try_get(8)?);
        // As the statement does it, see `may_take` there.
        let is_free = released_at.is_some() || lease_end <= now;
        let free_since = released_at.map_or(lease_end, |at| at.min(lease_end));
        let promise_end = free_since.checked_add(sql::GRACE).filter(|_| free_since <= now).unwrap_or(now);
        let is_due = turn == Some(version) && promise_end <= now;
        let end = row.try_get::<_, Option<_>>(2)?.unwrap_or(if is_free { promise_end } else { lease_end });
        let row = AcquireRow {
            taken: row.try_get(1)?,
            left: end.duration_since(now).unwrap_or_default(),
            is_wanted: row.try_get(4)?,
            version,
            owner_id: row.try_get(6)?,
            is_released: released_at.is_some(),
            is_free,
            may_take: is_free && (waiter.is_none() || waiters == 0 || place == Some(1) || is_due),
            has_notified: row.try_get::<_, Option<i64>>(12)?.is_some(),
            waits: waiter.is_some(),
            place,
            waiters,
        };
        Ok(row.meaning(sent))
    }

    /// The first hold of a lock id. A stale snapshot that saw no row must not insert the first version again after
    /// others have moved on: the advisory lock is taken in a statement of its own, so that the snapshot of the insert is
    /// younger than the commit of whoever had that lock before, which needs READ COMMITTED whatever the
    /// default is. The lock is tried, not waited for: a creator that stalls inside its transaction makes others find
    /// the lock busy until the server ends its session.
    pub(crate) fn create(&mut self, sql: &Sql, claim: &Claim) -> Result<Acquired, Fault> {
        self.try_to_create(sql, claim).or_else(unlucky)
    }

    fn try_to_create(&mut self, sql: &Sql, claim: &Claim) -> Result<Acquired, Fault> {
        let (micros, ends) = (micros(claim.lease), self.end_of(claim));
        let mut transaction =
            self.client.build_transaction().isolation_level(IsolationLevel::ReadCommitted).read_only(false).start()?;
        let row = transaction.query_typed(&sql.lock_creation, &[(&claim.lock_id, Type::TEXT)])?;
        if row.first().map(|row| row.try_get(0)).transpose()? != Some(true) {
            return Ok(Acquired::Missed);
        }
        let sent = Instant::now();
        let rows = transaction.query_typed(
            &sql.create,
            &[
                (&claim.lock_id, Type::TEXT),
                (&claim.owner_id, Type::TEXT),
                (&claim.lease_id, Type::UUID),
                (&micros, Type::INT8),
                (&ends, Type::TIMESTAMPTZ),
            ],
        )?;
        let Some(row) = rows.first() else { return Ok(Acquired::Missed) };
        let left = left(row, 1, 2)?;
        let granted = Granted { version: row.try_get(0)?, sent, left, is_wanted: false };
        transaction.commit()?;
        Ok(Acquired::Taken { granted, taken_over_from: None })
    }

    /// Renews the lease to its full length and says whether other processes wait; none if the hold is not there any more.
    pub(crate) fn refresh(&mut self, sql: &Sql, claim: &Claim, version: i64) -> Result<Option<bool>, Fault> {
        let (micros, place) = (micros(claim.lease), self.place(&sql.refresh));
        let row = self.run(&sql.refresh, &[&claim.lock_id, &version, &claim.lease_id, &micros, &place])?;
        Ok(if row.try_get(1)? { Some(row.try_get(2)?) } else { None })
    }

    /// Ends the hold of this claim, notifies those who wait, and says how many wait; none if the hold had been lost, or
    /// (with no version) had never come to be. This process, as `waiter`, stands behind them afterwards or not at all.
    pub(crate) fn release(
        &mut self,
        sql: &Sql,
        claim: &Claim,
        version: Option<i64>,
        waiter: Option<Uuid>,
        waits_again: bool,
    ) -> Result<Option<u32>, Fault> {
        let place = self.place(&sql.release);
        let row =
            self.run(&sql.release, &[&claim.lock_id, &version, &claim.lease_id, &place, &waiter, &waits_again])?;
        Ok(row.try_get::<_, Option<i32>>(1)?.map(|waiters| u32::try_from(waiters).unwrap_or_default()))
    }

    /// Ends the hold of a claim and begins that of the next one; none if the hold was lost, or somebody's transaction has
    /// locked the row.
    pub(crate) fn hand_over(
        &mut self,
        sql: &Sql,
        claim: &Claim,
        version: i64,
        next: &Claim,
    ) -> Result<Option<Granted>, Fault> {
        let (micros, place) = (micros(next.lease), self.place(&sql.hand_over));
        let ends = self.end_of(next);
        let sent = Instant::now();
        let row = self.run(
            &sql.hand_over,
            &[&claim.lock_id, &version, &claim.lease_id, &next.owner_id, &next.lease_id, &micros, &place, &ends],
        );
        let row = match row {
            Err(Fault::Postgres(error)) if is_serialization_failure(&error) => return Ok(None),
            row => row?,
        };
        self.clock = (row.try_get(3)?, Instant::now());
        let Some(version) = row.try_get(1)? else { return Ok(None) };
        Ok(Some(Granted { version, sent, left: left(&row, 2, 3)?, is_wanted: row.try_get(4)? }))
    }

    /// Takes a waiter out of the row.
    pub(crate) fn withdraw(&mut self, sql: &Sql, lock_id: &str, waiter: Uuid) -> Result<(), Fault> {
        let place = self.place(&sql.withdraw);
        self.run(&sql.withdraw, &[&lock_id, &waiter, &place])?;
        Ok(())
    }

    /// Whether no acquire of a lock is about to commit.
    pub(crate) fn is_settled(&mut self, sql: &Sql, lock_id: &str) -> Result<bool, Fault> {
        Ok(self.client.query_typed_one(&sql.is_settled, &[(&lock_id, Type::TEXT)])?.try_get(0)?)
    }

    /// Until when, by the server's clock, a claim may take effect. That is too early by the time for which the answer was under way
    /// that told us the clock.
    fn end_of(&self, claim: &Claim) -> SystemTime {
        let (time, read) = self.clock;
        let end = time.checked_add(claim.expires.saturating_duration_since(read)).unwrap_or(time);
        end.checked_sub(read.saturating_duration_since(claim.expires)).unwrap_or(end)
    }

    /// From now on notifications for this waiter come to this session.
    /// Not where the backend will be another client's.
    pub(crate) fn listen(&mut self, waiter: Uuid) -> Result<(), postgres::Error> {
        if !self.is_direct() {
            return Ok(());
        }
        self.client.batch_execute(&sql::listen(waiter))
    }

    /// The next notification's payload, if one comes within `patience`.
    pub(crate) fn notification(&mut self, patience: Duration) -> Result<Option<String>, postgres::Error> {
        let mut notifications = self.client.notifications();
        Ok(notifications.timeout_iter(patience).next()?.map(|notification| notification.payload().to_owned()))
    }

    /// Whether the server answers within `patience`.
    pub(crate) fn is_alive(&mut self, patience: Duration) -> bool {
        self.client.is_valid(patience).is_ok()
    }

    pub(crate) fn get(&mut self, sql: &Sql, lock_id: &str) -> Result<Option<LockInformation>, Fault> {
        let rows = self.client.query_typed(&sql.get, &[(&lock_id, Type::TEXT)])?;
        Ok(rows.first().map(information).transpose()?)
    }

    /// Within `longest`, for the server.
    pub(crate) fn list(&mut self, sql: &Sql, longest: Duration) -> Result<Vec<LockInformation>, Fault> {
        let mut transaction = self.client.build_transaction().read_only(true).start()?;
        // What is right for one row isn't for all of them.
        let longest = longest.as_millis();
        transaction.batch_execute(&format!("{}; SET LOCAL statement_timeout = {longest}", sql::READS_ALL))?;
        let rows = transaction.query_typed(&sql.list, &[])?;
        transaction.commit()?;
        Ok(rows.iter().map(information).collect::<Result<_, _>>()?)
    }

    pub(crate) fn server_time(&mut self) -> Result<SystemTime, Fault> {
        Ok(self.client.query_typed_one(sql::SERVER_TIME, &[])?.try_get(0)?)
    }

    pub(crate) fn inspect(&mut self, schema: &str, table_name: &str) -> Result<Found, Fault> {
        let row = self.client.query_typed_one(sql::INSPECT, &[(&schema, Type::NAME), (&table_name, Type::NAME)])?;
        if !row.try_get::<_, bool>(0)? {
            return Ok(Found::NoSchema);
        }
        let Some(kind) = row.try_get::<_, Option<String>>(1)? else { return Ok(Found::NoTable) };
        Ok(Found::Table {
            kind,
            persistence: row.try_get(2)?,
            columns: row.try_get(3)?,
            has_key: row.try_get(4)?,
            hides_rows: row.try_get(5)?,
        })
    }

    /// Creates the table; false if another process did so at the same time.
    pub(crate) fn create_table(&mut self, sql: &Sql) -> Result<bool, Fault> {
        match self.client.batch_execute(&sql.create_table) {
            Err(error) if error.code().is_some_and(|code| TABLE_EXISTS.contains(code)) => Ok(false),
            result => Ok(result.map(|()| true)?),
        }
    }

    /// One batch, and so one transaction.
    pub(crate) fn create_version_check(&mut self, sql: &Sql) -> Result<(), Fault> {
        Ok(self.client.batch_execute(&sql.create_version_check)?)
    }

    /// What a prepared statement's parameter for the place has to be.
    fn place(&self, prepared: &Prepared) -> Option<String> {
        self.backend.map(|backend| format!("{backend} {}", prepared.name))
    }

    /// Whether it may be used, after it has been idle for so long.
    pub(crate) fn is_ready(&mut self, idle: Duration) -> bool {
        if idle >= CHECKED_AFTER && !self.is_broken {
            // Reads what came meanwhile, which may be the end of the connection: nothing was asked, so nothing is lost.
            let end = self.client.notifications().timeout_iter(Duration::ZERO).next();
            if end.is_err() || self.client.is_closed() {
                let why = end.err();
                // Closed because it was idle, by the server or by something on the way, it says nothing of others.
                if why.as_ref().and_then(|error| error.code()).is_some_and(|code| SHUT_DOWN.contains(code)) {
                    self.tell_break();
                }
                self.is_broken = true;
                note!(debug, "an idle connection was closed: {}", why.map_or_else(String::new, |error| chain(&error)));
            }
        }
        !self.is_broken && self.is_usable()
    }

    /// Runs a statement that returns one row, whose first column says whether the statement was in its place.
    fn run(&mut self, prepared: &Prepared, values: &[&(dyn ToSql + Sync)]) -> Result<Row, Fault> {
        let sent = Instant::now();
        let result = match self.statements.get(&prepared.name) {
            Some(statement) => self.client.query_one(statement, values),
            None => self.run_unprepared(prepared, &prepared.text, values),
        };
        if sent.elapsed() >= WORTH_PREPARING {
            // A slow statement is not prepared, nor is the one before it.
            self.unprepared = None;
        }
        if result.as_ref().err().is_some_and(|error| error.code() == Some(&SqlState::PROGRAM_LIMIT_EXCEEDED)) {
            // The queue of notifications is full, of which somebody reads none. Nothing depends on them.
            return Ok(self.run_unprepared(prepared, &prepared.silent, values)?);
        }
        if self.backend.is_none() {
            return Ok(result?);
        }
        match &result {
            Err(error) if error.code().is_some_and(|code| NOT_OUR_STATEMENT.contains(code)) => {
                self.route.recognise_pooler("a prepared statement was not there");
                Err(Fault::Pooled)
            }
            Ok(row) if !row.try_get::<_, bool>(0)? => {
                self.route.recognise_pooler("a statement ran elsewhere");
                Err(Fault::Pooled)
            }
            _ => Ok(result?),
        }
    }

    /// In one round trip, too.
    fn run_unprepared(
        &mut self,
        prepared: &Prepared,
        text: &str,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, postgres::Error> {
        let parameters: Vec<_> = values.iter().copied().zip(prepared.types.iter().cloned()).collect();
        let row = self.client.query_typed_one(text, &parameters)?;
        if self.backend.is_some() {
            self.unprepared = Some((prepared.name.clone(), prepared.text.clone(), prepared.types));
        }
        Ok(row)
    }

    /// Whether there is something to [`prepare`](Self::prepare).
    pub(crate) fn has_to_prepare(&self) -> bool {
        self.unprepared.is_some()
    }

    /// Prepares for the next time what was run last: when nobody waits for it.
    pub(crate) fn prepare(&mut self) -> Result<(), Fault> {
        if let Some((name, text, types)) = self.unprepared.take() {
            self.statements.insert(name, self.client.prepare_typed(&text, types)?);
        }
        Ok(())
    }
}

/// A statement that was answered within this is prepared for the next time. That saves the server its planning, a few
/// tenths of a millisecond, and costs a round trip, for which a call may have to wait.
const WORTH_PREPARING: Duration = Duration::from_millis(20);

/// What the server says when it ends sessions for reasons of its own.
const SHUT_DOWN: [SqlState; 3] = [SqlState::ADMIN_SHUTDOWN, SqlState::CRASH_SHUTDOWN, SqlState::CANNOT_CONNECT_NOW];

/// A connection that has been idle for so long is looked at before it is used: the server, or something on the way,
/// may have closed it.
const CHECKED_AFTER: Duration = Duration::from_millis(100);

/// What `CREATE TABLE` says when another session creates the same table, and so the row type of that name, at the same time.
const TABLE_EXISTS: [SqlState; 3] = [SqlState::DUPLICATE_TABLE, SqlState::UNIQUE_VIOLATION, SqlState::DUPLICATE_OBJECT];

/// What a prepared statement says in a backend that doesn't have it, has it already, or has another one of that name.
const NOT_OUR_STATEMENT: [SqlState; 5] = [
    SqlState::INVALID_SQL_STATEMENT_NAME,
    SqlState::DUPLICATE_PSTATEMENT,
    SqlState::PROTOCOL_VIOLATION,
    SqlState::INVALID_BINARY_REPRESENTATION,
    SqlState::CHARACTER_NOT_IN_REPERTOIRE,
];

impl Route {
    pub(crate) fn new(events: Events) -> Route {
        Route { events, ..Route::default() }
    }

    /// A connection was opened: whether one had broken before.
    pub(crate) fn ends_interruption(&self) -> bool {
        self.is_interrupted.swap(false, Ordering::Relaxed)
    }

    /// A connection is silent.
    pub(crate) fn doubt(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn recognise_pooler(&self, why: &str) {
        if !self.is_pooled.swap(true, Ordering::Relaxed) {
            note!(info, "a pooler in transaction mode is in the way ({why}): using unnamed statements");
        }
    }
}

fn information(row: &Row) -> Result<LockInformation, postgres::Error> {
    Ok(LockInformation {
        lock_id: row.try_get(0)?,
        owner_id: row.try_get(1)?,
        version: row.try_get(2)?,
        lock_begin_time: row.try_get(3)?,
        lease_expire_time: row.try_get(4)?,
        released_at: row.try_get(5)?,
        is_held: row.try_get(6)?,
        waiters: usize::try_from(row.try_get::<_, i32>(7)?).unwrap_or_default(),
    })
}

/// What a fault means for an acquire that others were in the way of.
fn unlucky(fault: Fault) -> Result<Acquired, Fault> {
    match fault {
        Fault::Postgres(error) if is_serialization_failure(&error) => Ok(Acquired::Missed),
        Fault::Postgres(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(Acquired::Locked),
        fault => Err(fault),
    }
}

/// How long it is from the time in column `now` to the one in column `end`.
fn left(row: &Row, end: usize, now: usize) -> Result<Duration, postgres::Error> {
    Ok(row.try_get::<_, SystemTime>(end)?.duration_since(row.try_get(now)?).unwrap_or_default())
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod likeness;
#[cfg(test)]
mod races;
