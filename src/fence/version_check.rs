//! The version check: tables in any database that refuse writes under an older version of their lock.
//!
//! How the check works is told beside its statements, in `db/sql/version_check.rs`. Imports: as of this module, see
//! [`super`].

use crate::error::Result;
use crate::storage::PostgresStorage;

impl PostgresStorage {
    /// Creates what tables need to refuse writes under an older version of their lock.
    ///
    /// That is: the functions `storage_lock_use_version` and `storage_lock_check_version`, and the table
    /// `storage_lock_versions`, which keeps the greatest version of each lock that they have seen. All of it is in the
    /// storage's schema, and needs nothing else. For data in another database, run
    /// [`version_check_ddl`](Self::version_check_ddl) there. The lock itself doesn't use it.
    ///
    /// A trigger names the lock of its table:
    ///
    /// ```sql
    /// CREATE TRIGGER check_version BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON accounts
    ///     FOR EACH STATEMENT EXECUTE FUNCTION public.storage_lock_check_version('transfers');
    /// ```
    ///
    /// From then on each transaction must say, before it writes to the table, under which version it writes: the
    /// [`version`](crate::LockGuard::version) of the guard. For tables of several locks it says so for each lock:
    ///
    /// ```sql
    /// BEGIN;
    /// SELECT public.storage_lock_use_version('transfers', 42);
    /// UPDATE accounts SET balance = balance - 10 WHERE id = 7;
    /// COMMIT;
    /// ```
    ///
    /// A version smaller than the greatest one seen is an error with SQLSTATE `SL001`. A write without a version is an
    /// error with SQLSTATE `SL002`. Once a transaction under a version is committed, no transaction under an older one
    /// can commit, whatever rows it wrote and whatever the isolation level.
    ///
    /// The call waits for the end of open transactions under other versions. Transactions under one version don't wait
    /// for each other, but for the first of them, which made the version known. So where several connections write
    /// under one version, call it once in a transaction of its own, after acquiring the lock. Transactions of an old
    /// version that overlap without a pause keep a newer one waiting: set `lock_timeout` where that must end. A writer
    /// under several locks must name them always in the same order, or it meets deadlocks.
    ///
    /// What you read after the call, older holders can't change until your commit. What you read before it, they may
    /// have changed. So call it *before* reading, in a statement of its own. At `REPEATABLE READ` and `SERIALIZABLE` a
    /// transaction reads what was there before that wait. There, also call it in a transaction of its own.
    ///
    /// Not checked are: writes that name a partition, if only the partitioned table has the trigger; logical
    /// replication and `session_replication_role = replica`; changes of the table itself. Locks of two tables in one
    /// schema are told apart by their ids alone. If versions begin anew, because the lock's table was made anew, delete
    /// the lock's row in `storage_lock_versions`.
    ///
    /// May be called again, even by several processes simultaneously, and replaces the functions. Blocks for at most
    /// the connect timeout, for each address, and 5 s.
    ///
    /// A role that calls this needs `CREATE` on the schema, and must own what is there already. A role that writes
    /// needs `USAGE` on the schema, and `SELECT`, `INSERT` and `UPDATE` on `storage_lock_versions`.
    ///
    /// # Errors
    /// [`Error::Connect`](crate::Error::Connect), [`Error::Timeout`](crate::Error::Timeout) and
    /// [`Error::Database`](crate::Error::Database); the last one also if there is another table of that name.
    pub fn create_version_check(&self) -> Result<()> {
        let describe = format!("create the version check in schema {:?}", self.schema());
        self.read(describe, |session, sql| session.create_version_check(sql))
    }

    /// The statements that [create the version check](Self::create_version_check), for a migration or another database.
    pub fn version_check_ddl(&self) -> &str {
        &self.sql().version_check
    }
}
