//! Writes that are committed only while the lock is still held: the row of the hold, locked in the caller's own transaction.
//!
//! Why it is safe, whatever stops for however long: the lock of the row, and what the transaction writes, become visible to others at one
//! moment, when it ends; and nobody can acquire the lock before. If somebody has acquired it already, the row isn't there any more.

use postgres::types::Type;
use postgres::{Client, Row, Transaction};

use crate::error::{Error, Result, is_serialization_failure};
use crate::guard::LockGuard;

/// What is wrong with a transaction that doesn't find a hold which is there.
const NOT_SEEN: &str = "the hold is there, but the transaction doesn't see it: it may be on another server or database; and at \
                        REPEATABLE READ or SERIALIZABLE it must begin after the lock was acquired";

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
    /// Its parameter `$3`, as text. It tells the hold from another one of the same version, which there may be where commits were
    /// lost: by a restore, or a failover to a standby that lacked them.
    pub lease_id: String,
}

impl LockGuard {
    /// Makes a transaction of yours depend on the hold: it is committed only if, until it ends, the lock is nobody else's.
    ///
    /// After `Ok`, nobody can acquire the lock before the transaction ends, whatever happens to this process, this guard and its lease; refreshes
    /// go on. So what it reads and writes, before and after the fence, happens before anything that a later owner does under the lock. A
    /// transaction may be fenced at any time between its begin and its commit. The earlier, the sooner it knows, and
    /// the longer a takeover has to wait: [`transaction`](Self::transaction) does so last. A process that is stopped in a fenced transaction keeps
    /// the lock until the server ends its session: set `idle_in_transaction_session_timeout`.
    ///
    /// The transaction can be on any connection to the database that keeps the lock, at any isolation level (at `REPEATABLE READ` and
    /// `SERIALIZABLE` it has to begin after the lock was acquired), but not be read-only; its role needs `SELECT` and `UPDATE` on the table. A
    /// fence in a savepoint that is rolled back is undone.
    ///
    /// It is one statement on the transaction's connection, and blocks for as long as that does. It waits for an acquire of the lock that has just
    /// got, or missed, the row, and for anybody who has locked the row or the table by hand: set `lock_timeout` if that may take long. If
    /// it fails, up to 2 s more are used to find out why.
    ///
    /// # Errors
    /// [`Error::LeaseLost`] if the hold is past its deadline, somebody else has acquired the lock, or that can't be ruled out: roll back.
    /// [`Error::Fence`] if the hold is there, and the transaction doesn't see it. [`Error::Database`] if the statement failed; with
    /// SQLSTATE 40001, the hold is there, and the transaction can be repeated.
    pub fn fence(&self, transaction: &mut Transaction<'_>) -> Result<()> {
        self.storage.check_process()?;
        if !self.hold.is_before_deadline() {
            return Err(self.hold.lost());
        }
        self.fence_past_deadline(transaction)
    }

    /// As [`fence`](Self::fence), also for a hold that is past its deadline, and so lost, if nobody has taken the lock over yet.
    ///
    /// That is safe: nobody can from now on until the transaction ends, because its row is locked. What was done under the hold outside of the
    /// database since its deadline is not. It saves work that is complete but for its commit, as after a pause.
    ///
    /// # Errors
    /// As [`fence`](Self::fence).
    pub fn fence_past_deadline(&self, transaction: &mut Transaction<'_>) -> Result<()> {
        self.storage.check_process()?;
        match self.query(transaction, &self.storage.sql().fence) {
            Ok(rows) if !rows.is_empty() => Ok(()),
            result => Err(self.why_not(result.err())),
        }
    }

    /// Runs `work` in a transaction on `client`, and commits what it did only if the lock is still held then: begin, `work`,
    /// [`fence`](Self::fence), commit. If anything fails, or `work` returns an error or panics, all of it is rolled back.
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
    /// A `COMMIT` or `ROLLBACK` that `work` sends as text ends the transaction behind its back: what it did before is not fenced.
    ///
    /// It costs one statement more than the transaction without the lock: a round trip, and its planning. For another isolation level, build
    /// the transaction yourself, and call `fence` before its commit.
    ///
    /// # Errors
    /// What `work` returns, as it is; what `fence` returns; and [`Error::Database`] if begin or commit fails. If the connection breaks
    /// in the commit (an error without a SQLSTATE), the transaction may have been committed: then that was before anybody else owned the lock.
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
    /// Run it in your transaction with its three parameters. If it returns a row, the transaction is fenced, as by
    /// [`fence_past_deadline`](Self::fence_past_deadline); if it returns none, or fails with SQLSTATE 40001, roll back: the lock may be
    /// somebody else's. It doesn't look at the deadline: ask [`is_held`](Self::is_held) first where that
    /// matters. The text is the same for all holds of a table, so that it can be prepared once a connection, which spares its
    /// planning.
    ///
    /// ```no_run
    /// # fn doc(guard: &storage_lock::LockGuard, transaction: &mut postgres::Transaction<'_>) -> Result<(), postgres::Error> {
    /// let fence = guard.fence_statement();
    /// // sqlx: query(&fence.sql).bind(&fence.lock_id).bind(fence.version).bind(&fence.lease_id).fetch_optional(&mut *transaction).await?
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

    pub(crate) fn query(&self, transaction: &mut Transaction<'_>, sql: &str) -> Result<Vec<Row>, postgres::Error> {
        let lease_id = self.hold.claim.lease_id.to_string();
        let (lock_id, version) = (self.lock_id(), self.version());
        transaction.query_typed(sql, &[(&lock_id, Type::TEXT), (&version, Type::INT8), (&lease_id, Type::TEXT)])
    }

    /// Why a fence found nothing, or failed.
    fn why_not(&self, error: Option<postgres::Error>) -> Error {
        match error {
            Some(source) if !is_serialization_failure(&source) => self.failed("fence", source),
            // A takeover, or something else in the transaction.
            error => {
                let is_there = self.look_for();
                if is_there == Some(false) {
                    self.hold.is_not_there();
                }
                self.why_not_found(is_there, error)
            }
        }
    }

    /// Why a statement found no hold, or failed, where the database was asked for the hold afterwards.
    pub(crate) fn why_not_found(&self, is_there: Option<bool>, error: Option<postgres::Error>) -> Error {
        match (is_there, error) {
            (Some(true), None) => self.unfit(NOT_SEEN),
            (Some(true), Some(source)) => self.failed("fence", source),
            (None, Some(source)) if !is_serialization_failure(&source) => self.failed("fence", source),
            _ => self.hold.lost(),
        }
    }

    /// Whether the hold is there, as the database says now; none if it doesn't, or the deadline has passed: before it was asked, because
    /// who looks for a hold refreshes it; or since then, because it may have been there, and its lease be over.
    pub(crate) fn look_for(&self) -> Option<bool> {
        let is_there = if self.hold.is_before_deadline() { self.storage.look_for(&self.hold) } else { None };
        is_there.filter(|_| self.hold.is_before_deadline())
    }

    pub(crate) fn unfit(&self, problem: &'static str) -> Error {
        Error::Fence { lock_id: self.lock_id().to_owned(), problem }
    }

    pub(crate) fn failed(&self, what: &str, source: postgres::Error) -> Error {
        Error::Database { action: format!("{what} a transaction under lock {:?}", self.lock_id()), source }
    }
}
