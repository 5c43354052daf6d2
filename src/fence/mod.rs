//! Fences: the caller's own transaction locks the row of the hold, and commits only while the lock is still held.
//!
//! Why a fence is safe, whatever stops for however long:
//! - The row lock ends together with its transaction. What the transaction wrote becomes visible at that same moment.
//! - Nobody can acquire the lock before that moment.
//! - If somebody has already acquired the lock, the row of this hold is gone. The fence finds no row, and refuses.
//!
//! Imports: this module adds methods to `guard::LockGuard` and `storage::PostgresStorage`. Below those it uses `hold`,
//! `error` and `sync`.

pub(crate) mod unlock_in;
mod version_check;

use postgres::types::Type;
use postgres::{Client, Row, Transaction};

use crate::error::{Error, Result, is_serialization_failure};
use crate::guard::LockGuard;

/// The problem of a transaction that doesn't see a hold, although the hold is there.
const NOT_SEEN: &str = "the hold is there, but the transaction doesn't see it: it may be on another server or \
                        database; and at REPEATABLE READ or SERIALIZABLE it must begin after the lock was acquired";

/// A statement that fences a transaction of any driver: see [`LockGuard::fence_statement`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FenceStatement {
    /// The statement. It returns one row or none.
    pub sql: String,
    /// Its parameter `$1`, as text.
    pub lock_id: String,
    /// Its parameter `$2`, a `bigint`.
    pub version: i64,
    /// Its parameter `$3`, as text. Two holds can have the same version after commits were lost: by a restore, or a
    /// failover to a standby that lacked them. The lease id tells such holds apart.
    pub lease_id: String,
}

impl LockGuard {
    /// Makes a transaction of yours depend on the hold: it commits only if nobody else has the lock until it ends.
    ///
    /// After `Ok`, nobody can acquire the lock before the transaction ends. That holds whatever happens to this
    /// process, this guard and its lease. Refreshes go on. So everything that the transaction reads and writes, before
    /// and after the fence, happens before anything that a later owner does under the lock.
    ///
    /// You may fence a transaction at any time between its begin and its commit. An early fence finds out earlier that
    /// the hold is lost, and makes a takeover wait longer. [`transaction`](Self::transaction) fences last. A process
    /// that is stopped in a fenced transaction keeps the lock until the server ends its session: set
    /// `idle_in_transaction_session_timeout`.
    ///
    /// The transaction can be on any connection to the database that keeps the lock, and at any isolation level. At
    /// `REPEATABLE READ` and `SERIALIZABLE` it must begin after the lock was acquired. It must not be read-only. Its
    /// role needs `SELECT` and `UPDATE` on the table. Rolling back to a savepoint undoes a fence made after it.
    ///
    /// The fence is one statement on the transaction's connection, and blocks for as long as that connection does. It
    /// waits for an acquire of the lock that has just got the row, or just missed it. It also waits for anybody who has
    /// locked the row or the table by hand: set `lock_timeout` if that may take long. A fence that fails uses up to 2 s
    /// more to find out why.
    ///
    /// # Errors
    /// [`Error::LeaseLost`] if the hold is past its deadline, if somebody else has acquired the lock, or if that can't
    /// be ruled out: roll back. [`Error::Fence`] if the hold is there, and the transaction doesn't see it.
    /// [`Error::Database`] if the statement failed; with SQLSTATE 40001, the hold is there, and you can repeat the
    /// transaction.
    pub fn fence(&self, transaction: &mut Transaction<'_>) -> Result<()> {
        self.storage.check_process()?;
        if !self.hold.is_before_deadline() {
            return Err(self.hold.lost());
        }
        self.fence_past_deadline(transaction)
    }

    /// As [`fence`](Self::fence), and accepts a hold that is past its deadline, and so lost, if nobody has taken the
    /// lock over yet.
    ///
    /// That is safe for the transaction: its fence locks the row, so nobody can take the lock over until it ends. It is
    /// not safe for what was done outside of the database since the deadline. Use it to save work that lacks only its
    /// commit, for example after a pause.
    ///
    /// # Errors
    /// As [`fence`](Self::fence).
    pub fn fence_past_deadline(&self, transaction: &mut Transaction<'_>) -> Result<()> {
        self.storage.check_process()?;
        match self.query(transaction, &self.storage.sql().fence) {
            Ok(rows) if !rows.is_empty() => Ok(()),
            result => Err(self.fence_failure(result.err())),
        }
    }

    /// Runs `work` in a transaction on `client`, and commits what it did only if the lock is still held then.
    ///
    /// The steps are: begin, `work`, [`fence`](Self::fence), commit. If one of them fails, or `work` returns an error
    /// or panics, everything is rolled back.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dsn = "host=localhost user=app";
    /// use postgres::{Client, NoTls};
    /// use storage_lock::StorageLock;
    ///
    /// let mut client = Client::connect(dsn, NoTls)?;
    /// let guard = StorageLock::connect("counter", dsn)?.lock("worker-1")?;
    /// guard.transaction(&mut client, |transaction| {
    ///     transaction.execute("UPDATE counter SET n = n + 1", &[])
    ///         .map_err(Box::<dyn std::error::Error>::from)
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// If `work` sends `COMMIT` or `ROLLBACK` as text, it ends the transaction unnoticed. What `work` did before that
    /// is not fenced.
    ///
    /// The fence costs one statement more than the same transaction without the lock: a round trip, and its planning.
    /// For another isolation level, build the transaction yourself, and call `fence` before its commit.
    ///
    /// # Errors
    /// What `work` returns, as it is; what `fence` returns; and [`Error::Database`] if begin or commit fails. If the
    /// connection breaks in the commit (an error without a SQLSTATE), the transaction may have been committed. If it
    /// was, then before anybody else owned the lock.
    pub fn transaction<T, E: From<Error>>(
        &self,
        client: &mut Client,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        self.storage.check_process()?;
        if !self.hold.is_before_deadline() {
            return Err(self.hold.lost().into());
        }
        let mut transaction = client.transaction().map_err(|source| self.failed("begin", source))?;
        // If it is dropped, it is rolled back.
        let value = work(&mut transaction)?;
        self.fence(&mut transaction)?;
        transaction.commit().map_err(|source| self.failed("commit", source))?;
        Ok(value)
    }

    /// The fence for another driver, such as `sqlx`, `diesel` or `tokio-postgres`.
    ///
    /// Run the statement in your transaction with its three parameters. If it returns a row, the transaction is fenced,
    /// as by [`fence_past_deadline`](Self::fence_past_deadline). If it returns none, or fails with SQLSTATE 40001, roll
    /// back: the lock may be somebody else's.
    ///
    /// The statement doesn't look at the deadline. Where the deadline matters, ask [`is_held`](Self::is_held) first.
    /// All holds of a table have the same text, so you can prepare it once for each connection, which saves its
    /// planning.
    ///
    /// ```no_run
    /// # fn doc(
    /// #     guard: &storage_lock::LockGuard,
    /// #     transaction: &mut postgres::Transaction<'_>,
    /// # ) -> Result<(), postgres::Error> {
    /// let fence = guard.fence_statement();
    /// // sqlx: query(&fence.sql).bind(&fence.lock_id).bind(fence.version).bind(&fence.lease_id)
    /// //     .fetch_optional(&mut *transaction).await?
    /// let is_ours = transaction.query_opt(&fence.sql, &[&fence.lock_id, &fence.version, &fence.lease_id])?.is_some();
    /// # Ok(())
    /// # }
    /// ```
    pub fn fence_statement(&self) -> FenceStatement {
        FenceStatement {
            sql: self.storage.sql().fence.clone(),
            lock_id: self.lock_id().to_owned(),
            version: self.version(),
            lease_id: self.hold.claim.lease_id.to_string(),
        }
    }

    /// Runs a statement in the caller's transaction. Its parameters name the hold: lock, version and lease id.
    fn query(&self, transaction: &mut Transaction<'_>, sql: &str) -> Result<Vec<Row>, postgres::Error> {
        let lease_id = self.hold.claim.lease_id.to_string();
        let (lock_id, version) = (self.lock_id(), self.version());
        transaction.query_typed(sql, &[(&lock_id, Type::TEXT), (&version, Type::INT8), (&lease_id, Type::TEXT)])
    }

    /// Why a fence found nothing, or failed.
    fn fence_failure(&self, error: Option<postgres::Error>) -> Error {
        match error {
            Some(source) if !is_serialization_failure(&source) => self.failed("fence", source),
            // Either a takeover, or something else in the transaction: only the database knows.
            error => {
                let is_there = self.find_hold();
                if is_there == Some(false) {
                    self.hold.mark_missing();
                }
                self.missing_hold_error(is_there, error)
            }
        }
    }

    /// Why a statement found no hold, or failed. `is_there` is what the database said afterwards.
    fn missing_hold_error(&self, is_there: Option<bool>, error: Option<postgres::Error>) -> Error {
        match (is_there, error) {
            (Some(true), None) => self.fence_error(NOT_SEEN),
            (Some(true), Some(source)) => self.failed("fence", source),
            (None, Some(source)) if !is_serialization_failure(&source) => self.failed("fence", source),
            _ => self.hold.lost(),
        }
    }

    /// Asks the database whether the hold is there. `None` if it doesn't answer, or if the deadline has passed.
    ///
    /// The deadline is checked twice:
    /// - Before the question, because the question is a refresh, and a lost hold must not be refreshed.
    /// - After the answer, because the hold may have been there, and its lease may be over by now.
    fn find_hold(&self) -> Option<bool> {
        let is_there = if self.hold.is_before_deadline() { self.storage.find_hold(&self.hold) } else { None };
        is_there.filter(|_| self.hold.is_before_deadline())
    }

    fn fence_error(&self, problem: &'static str) -> Error {
        Error::Fence { lock_id: self.lock_id().to_owned(), problem }
    }

    fn failed(&self, what: &str, source: postgres::Error) -> Error {
        Error::Database { action: format!("{what} a transaction under lock {:?}", self.lock_id()), source }
    }
}
