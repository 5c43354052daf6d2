//! One open connection, and the operations that run on it.
//!
//! A *direct* session runs each statement in one round trip, and prepares it after its first run. A pooler that hands a
//! server session to another client after each transaction makes that impossible and unsafe:
//!
//! - A prepared name may mean another client's statement there. In every process the client names its statements
//!   `s0`, `s1` and so on.
//! - Settings would leak into other clients' sessions.
//!
//! Invariants:
//!
//! - A session sets nothing with `SET`. It asks for its settings in the start-up packet. Such poolers refuse those
//!   (pgbouncer: 08P01), or drop them: then the marker isn't there when the session reads it back.
//! - A prepared statement does nothing unless it is the statement that was meant, in the backend that was meant (the
//!   *backend check*).
//! - At the first sign of a pooler the storage turns to unnamed statements, which take one round trip each, too.
//!
//! Uses [`crate::db::answer`], [`crate::db::route`], [`crate::db::sql`], and the modules below `db`. Under the model
//! checker `model/session.rs` replaces this module.

mod connection;
mod prepared;
mod rows;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use postgres::error::SqlState;
use postgres::fallible_iterator::FallibleIterator;
use postgres::types::Type;
use postgres::{IsolationLevel, Statement};
use uuid::Uuid;

use self::rows::{acquire_row, found, lock_information, time_left};
use crate::db::answer::{Acquired, Claim, Fault, Found, Granted, LockInformation, RowWaiter};
use crate::db::route::Route;
use crate::db::server::Link;
use crate::db::sql::{self, Sql};
use crate::error::{Cause, Standby, is_serialization_failure};

pub(crate) struct Session {
    client: Link,
    /// The backend that has our prepared statements. None behind a pooler.
    backend: Option<i32>,
    /// The prepared statements, by name.
    statements: HashMap<String, Statement>,
    /// The statement that ran last without being prepared: its name, its text, and the types of its parameters.
    unprepared: Option<(String, String, &'static [Type])>,
    route: Arc<Route>,
    /// The route's generation when this session answered last.
    generation: usize,
    is_broken: bool,
    /// What the server's clock said last, and when this process read that.
    clock: (SystemTime, Instant),
}

impl Session {
    /// Makes a session of a new connection. `with_options` says that [`sql::SESSION_OPTIONS`] were sent.
    pub(crate) fn new(
        mut client: Link,
        with_options: bool,
        route: Arc<Route>,
        generation: usize,
    ) -> Result<Session, Cause> {
        let row = client.query_typed_one(sql::SESSION, &[])?;
        if row.try_get(3)? {
            return Err(Standby.into());
        }
        let (is_direct, time) = (row.try_get::<_, Option<bool>>(1)? == Some(true), row.try_get(2)?);
        if with_options && !is_direct {
            route.recognise_pooler("it dropped the start-up options");
        }
        let backend = if with_options && is_direct { Some(row.try_get(0)?) } else { None };
        let session = Session {
            client,
            backend,
            statements: HashMap::new(),
            unprepared: None,
            route,
            generation,
            is_broken: false,
            clock: (time, Instant::now()),
        };
        session.route.set_clock(session.clock);
        Ok(session)
    }

    /// Makes a session for one call, on a connection that a pool of the caller's lends. Nothing of the connection's
    /// own state is changed, and nothing is asked but for the first time.
    pub(crate) fn lent(client: Link, route: Arc<Route>) -> Result<Session, Cause> {
        let generation = route.generation.load(Ordering::Relaxed);
        let Some(clock) = route.clock() else { return Session::new(client, false, route, generation) };
        let (statements, unprepared, is_broken) = (HashMap::new(), None, false);
        Ok(Session { client, backend: None, statements, unprepared, route, generation, is_broken, clock })
    }

    /// Whether the connection has to go back to a pool after the call.
    pub(crate) fn is_lent(&self) -> bool {
        matches!(self.client, Link::Lent(_))
    }

    fn set_clock(&mut self, time: SystemTime) {
        self.clock = (time, Instant::now());
        self.route.set_clock(self.clock);
    }

    /// One attempt in one statement. A waiter keeps to the order of the row, and is in the row afterwards if the lock
    /// is busy. Without a waiter, a free lock is free even if it is promised to another process.
    pub(crate) fn acquire(
        &mut self,
        sql: &Sql,
        claim: &Claim,
        row_waiter: Option<RowWaiter>,
    ) -> Result<Acquired, Fault> {
        // After a suspend, or a jump of the server's clock, our idea of that clock is wrong: the claim seems too late.
        // The answer has corrected that idea, so this tries once more.
        match self.try_to_acquire(sql, claim, row_waiter)? {
            Acquired::TooLate => self.try_to_acquire(sql, claim, row_waiter),
            acquired => Ok(acquired),
        }
    }

    fn try_to_acquire(&mut self, sql: &Sql, claim: &Claim, row_waiter: Option<RowWaiter>) -> Result<Acquired, Fault> {
        let (micros, check) = (micros(claim.lease), self.backend_check(&sql.acquire));
        let (waiter, notified_version) = (row_waiter.map(|it| it.id), row_waiter.and_then(|it| it.notified_version));
        let ends = self.server_expiry(claim);
        let sent = Instant::now();
        let row = self.run(
            &sql.acquire,
            &[&claim.lock_id, &claim.owner_id, &claim.lease_id, &micros, &check, &waiter, &notified_version, &ends],
        );
        let row = match row {
            Err(fault) => return missed_or_locked(fault),
            Ok(row) => row,
        };
        let now = row.try_get(3)?;
        self.set_clock(now);
        if !row.try_get::<_, bool>(11)? {
            return Ok(Acquired::TooLate);
        }
        let Some(version) = row.try_get::<_, Option<i64>>(5)? else { return Ok(Acquired::Absent) };
        Ok(acquire_row(&row, version, now, row_waiter)?.meaning(sent))
    }

    /// Creates the first hold of a lock.
    ///
    /// A stale snapshot that saw no row must not insert the first version again after others have moved on. So the
    /// advisory lock has a statement of its own: the insert's snapshot is then younger than the commit of the creator
    /// that had the advisory lock before. This needs READ COMMITTED, whatever the default is. See [`sql`] for the
    /// interleaving.
    ///
    /// The advisory lock is tried, and not waited for. While a creator stalls inside its transaction, others find the
    /// lock busy, until the server ends that session.
    pub(crate) fn create(&mut self, sql: &Sql, claim: &Claim) -> Result<Acquired, Fault> {
        self.try_to_create(sql, claim).or_else(missed_or_locked)
    }

    fn try_to_create(&mut self, sql: &Sql, claim: &Claim) -> Result<Acquired, Fault> {
        let (micros, ends) = (micros(claim.lease), self.server_expiry(claim));
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
        let left = time_left(row, 1, 2)?;
        let granted = Granted { version: row.try_get(0)?, sent, left, is_wanted: false };
        transaction.commit()?;
        Ok(Acquired::Taken { granted, taken_over_from: None })
    }

    /// Extends the lease to its full length, and returns whether other processes wait. None if the hold is gone.
    pub(crate) fn refresh(&mut self, sql: &Sql, claim: &Claim, version: i64) -> Result<Option<bool>, Fault> {
        let (micros, check) = (micros(claim.lease), self.backend_check(&sql.refresh));
        let row = self.run(&sql.refresh, &[&claim.lock_id, &version, &claim.lease_id, &micros, &check])?;
        Ok(if row.try_get(1)? { Some(row.try_get(2)?) } else { None })
    }

    /// Ends the hold of this claim, notifies waiters, and returns how many processes wait. None if the hold had been
    /// lost, or (without a version) had never come to be. Afterwards this process, as `waiter`, is behind the others
    /// in the row if it `waits_again`, and else not in the row.
    pub(crate) fn release(
        &mut self,
        sql: &Sql,
        claim: &Claim,
        version: Option<i64>,
        waiter: Option<Uuid>,
        waits_again: bool,
    ) -> Result<Option<u32>, Fault> {
        let check = self.backend_check(&sql.release);
        let row =
            self.run(&sql.release, &[&claim.lock_id, &version, &claim.lease_id, &check, &waiter, &waits_again])?;
        Ok(row.try_get::<_, Option<i32>>(1)?.map(|waiters| u32::try_from(waiters).unwrap_or_default()))
    }

    /// Ends the hold of a claim, and begins the hold of the next claim. None if the hold was lost, or somebody's
    /// transaction has locked the row.
    pub(crate) fn hand_over(
        &mut self,
        sql: &Sql,
        claim: &Claim,
        version: i64,
        next: &Claim,
    ) -> Result<Option<Granted>, Fault> {
        let (micros, check) = (micros(next.lease), self.backend_check(&sql.hand_over));
        let ends = self.server_expiry(next);
        let sent = Instant::now();
        let row = self.run(
            &sql.hand_over,
            &[&claim.lock_id, &version, &claim.lease_id, &next.owner_id, &next.lease_id, &micros, &check, &ends],
        );
        let row = match row {
            Err(Fault::Postgres(error)) if is_serialization_failure(&error) => return Ok(None),
            row => row?,
        };
        self.set_clock(row.try_get(3)?);
        let Some(version) = row.try_get(1)? else { return Ok(None) };
        Ok(Some(Granted { version, sent, left: time_left(&row, 2, 3)?, is_wanted: row.try_get(4)? }))
    }

    /// Removes a waiter from the row.
    pub(crate) fn withdraw(&mut self, sql: &Sql, lock_id: &str, waiter: Uuid) -> Result<(), Fault> {
        let check = self.backend_check(&sql.withdraw);
        self.run(&sql.withdraw, &[&lock_id, &waiter, &check])?;
        Ok(())
    }

    /// Whether no acquire of a lock is about to commit.
    pub(crate) fn is_settled(&mut self, sql: &Sql, lock_id: &str) -> Result<bool, Fault> {
        Ok(self.client.query_typed_one(&sql.is_settled, &[(&lock_id, Type::TEXT)])?.try_get(0)?)
    }

    /// When a claim expires, by the server's clock. The result is too early by the time that the answer with that clock
    /// took to reach us.
    fn server_expiry(&self, claim: &Claim) -> SystemTime {
        let (time, read) = self.clock;
        let end = time.checked_add(claim.expires.saturating_duration_since(read)).unwrap_or(time);
        end.checked_sub(read.saturating_duration_since(claim.expires)).unwrap_or(end)
    }

    /// From now on, this session receives the notifications for this waiter. Does nothing behind a pooler, where the
    /// backend will be another client's.
    pub(crate) fn listen(&mut self, waiter: Uuid) -> Result<(), postgres::Error> {
        if !self.is_direct() {
            return Ok(());
        }
        self.client.batch_execute(&sql::listen(waiter))
    }

    /// Waits for the next notification, for `timeout` at most, and returns its payload.
    pub(crate) fn notification(&mut self, timeout: Duration) -> Result<Option<String>, postgres::Error> {
        let mut notifications = self.client.notifications();
        Ok(notifications.timeout_iter(timeout).next()?.map(|notification| notification.payload().to_owned()))
    }

    pub(crate) fn get(&mut self, sql: &Sql, lock_id: &str) -> Result<Option<LockInformation>, Fault> {
        let rows = self.client.query_typed(&sql.get, &[(&lock_id, Type::TEXT)])?;
        Ok(rows.first().map(lock_information).transpose()?)
    }

    /// Reads all held locks. The server has `longest` for it.
    pub(crate) fn list(&mut self, sql: &Sql, longest: Duration) -> Result<Vec<LockInformation>, Fault> {
        let mut transaction = self.client.build_transaction().read_only(true).start()?;
        // The session's settings are right for one row, but not for the whole table.
        let longest = longest.as_millis();
        transaction.batch_execute(&format!("{}; SET LOCAL statement_timeout = {longest}", sql::READS_ALL))?;
        let rows = transaction.query_typed(&sql.list, &[])?;
        transaction.commit()?;
        Ok(rows.iter().map(lock_information).collect::<Result<_, _>>()?)
    }

    pub(crate) fn server_time(&mut self) -> Result<SystemTime, Fault> {
        Ok(self.client.query_typed_one(sql::SERVER_TIME, &[])?.try_get(0)?)
    }

    pub(crate) fn inspect(&mut self, schema: &str, table_name: &str) -> Result<Found, Fault> {
        let row = self.client.query_typed_one(sql::INSPECT, &[(&schema, Type::NAME), (&table_name, Type::NAME)])?;
        Ok(found(&row)?)
    }

    /// Creates the table. False if another process did so at the same time.
    pub(crate) fn create_table(&mut self, sql: &Sql) -> Result<bool, Fault> {
        match self.client.batch_execute(&sql.create_table) {
            Err(error) if error.code().is_some_and(|code| TABLE_EXISTS.contains(code)) => Ok(false),
            result => Ok(result.map(|()| true)?),
        }
    }

    /// Creates table and functions of the version check, in one batch, and so in one transaction.
    pub(crate) fn create_version_check(&mut self, sql: &Sql) -> Result<(), Fault> {
        Ok(self.client.batch_execute(&sql.create_version_check)?)
    }
}

/// The errors of `CREATE TABLE` when another session creates the same table, and so the row type of that name, at the
/// same time.
const TABLE_EXISTS: [SqlState; 3] = [SqlState::DUPLICATE_TABLE, SqlState::UNIQUE_VIOLATION, SqlState::DUPLICATE_OBJECT];

/// A fault as an answer to an acquire, where others were in its way.
fn missed_or_locked(fault: Fault) -> Result<Acquired, Fault> {
    match fault {
        Fault::Postgres(error) if is_serialization_failure(&error) => Ok(Acquired::Missed),
        Fault::Postgres(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(Acquired::Locked),
        fault => Err(fault),
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
