//! Statements and start-up options of a session, apart from locks.

use uuid::Uuid;

use super::conditions::CHANNEL;

/// The start-up options of a session. They give the lock what it needs, whatever the role's defaults are:
///
/// - index scans even while the table is small, because a plan is kept while the table grows;
/// - no planning and no JIT compilation of tiny statements;
/// - functions that nobody can shadow;
/// - no statement that outlives its caller for long.
///
/// `lock_timeout` ends before `statement_timeout`, so that a locked row is told apart from a slow statement.
pub(crate) const SESSION_OPTIONS: &str = "-c storage_lock.direct=on \
     -c quote_all_identifiers=off -c enable_seqscan=off -c plan_cache_mode=force_generic_plan -c jit=off \
     -c search_path=pg_catalog \
     -c default_transaction_isolation=read\\ committed -c default_transaction_read_only=off \
     -c statement_timeout=5000 -c lock_timeout=1500 -c idle_in_transaction_session_timeout=5000";

/// Asks for the session's backend, whether the start-up options reached it, what time it is, and whether the server is
/// a standby.
pub(crate) const SESSION: &str = "SELECT pg_backend_pid(), current_setting('storage_lock.direct', true) = 'on', \
     clock_timestamp(), pg_is_in_recovery()";

/// A transaction that reads the whole table needs this.
pub(crate) const READS_ALL: &str = "SET LOCAL enable_seqscan = on";

pub(crate) const SERVER_TIME: &str = "SELECT clock_timestamp()";

/// Listens for the notifications of a waiting process. Its id is in the text for those who look at the server's
/// sessions.
pub(crate) fn listen(waiter: Uuid) -> String {
    let id = waiter.to_string();
    let digit = id.chars().last().unwrap_or_default();
    format!("LISTEN \"{CHANNEL}{digit}\"; SELECT 'waiter {id}'")
}
