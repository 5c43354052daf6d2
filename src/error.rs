//! The one error type. Contention is never an error: a busy lock is `Ok(None)`.

use std::time::Duration;

use postgres::error::SqlState;

/// What `Result` means in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of any kind.
pub(crate) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why an operation failed.
///
/// The text says what was being done; the cause, where there is one, is in [`source`](std::error::Error::source) and
/// not repeated in the text. `postgres::Error` puts the server's own words one level further down, so print the
/// whole chain. No password is ever part of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option or an argument can't be used. Found before anything touched the network.
    #[error("invalid option {option} = {value}: expected {expected}")]
    InvalidOption {
        /// The option's name, as its setter or argument is called.
        option: &'static str,
        /// The value that was given. Of a DSN, which may hold a password, only the part that is safe to show.
        value: String,
        /// What would have been right.
        expected: String,
    },

    /// No connection could be opened: refused, unreachable, wrong password, unknown database, too many connections.
    #[error("cannot open a connection to PostgreSQL at {address}")]
    Connect {
        /// Where it was tried: host, address and port. Where there are several, this is one of them; up to four
        /// others follow, each with its cause.
        address: String,
        /// What was wrong there: a [`postgres::Error`], or the [`std::io::Error`] of what didn't come so far.
        source: Cause,
    },

    /// The time allowed was over before the database answered. What was asked may or may not have happened.
    #[error("cannot {action}: gave up after {after:?} of waiting for {waiting_for}")]
    Timeout {
        /// What was being done.
        action: String,
        /// What had not come: an answer, a connection, or a place among `max_connections`.
        waiting_for: &'static str,
        /// How long it was waited for.
        after: Duration,
    },

    /// The database refused a statement, or the connection broke under it and under its retry.
    #[error("cannot {action}")]
    Database {
        /// What was being done.
        action: String,
        /// What the client or the server said.
        source: postgres::Error,
    },

    /// The table is missing, isn't ours, or can't keep locks. It was not touched.
    #[error("cannot keep locks in table {table}: {problem}")]
    Table {
        /// The table with its schema, quoted as in SQL.
        table: String,
        /// What is wrong with it.
        problem: String,
    },

    /// The hold is over without having been released: its lease ran out, or could have run out as far as this process
    /// can tell. Somebody else may own the lock.
    #[error("lost the lease on lock {lock_id:?}, held by {owner_id:?} as version {version}")]
    LeaseLost {
        /// The lock.
        lock_id: String,
        /// The owner that held it.
        owner_id: String,
        /// The version of the lost hold.
        version: i64,
    },

    /// The hold is there, and the caller's transaction is not one that can be fenced by it, or release it.
    #[error("cannot fence a transaction by lock {lock_id:?}: {problem}")]
    Fence {
        /// The lock.
        lock_id: String,
        /// What is wrong with the transaction.
        problem: &'static str,
    },

    /// This process was forked from the one that opened the storage, and shares its connections, but has none of its
    /// threads.
    #[error("this process was forked from the one that opened the storage: open a storage of its own in it")]
    Forked,

    /// A thread of the library could not be started, or panicked.
    #[error("a thread of the library failed")]
    Thread {
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl Error {
    /// Whether this is [`Error::LeaseLost`].
    pub fn is_lease_lost(&self) -> bool {
        matches!(self, Error::LeaseLost { .. })
    }

    /// The text with that of all causes, for a log.
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }

    /// Whether the same call may succeed a little later: the connection, the load or the server's state is to blame.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Error::Connect { source, .. } => is_passing_cause(source.as_ref()),
            Error::Database { source, .. } => is_passing_error(source),
            Error::Timeout { .. } | Error::Thread { .. } => true,
            Error::InvalidOption { .. }
            | Error::Table { .. }
            | Error::LeaseLost { .. }
            | Error::Fence { .. }
            | Error::Forked => false,
        }
    }
}

/// An error's text with that of all its causes.
pub(crate) fn chain(first: &(dyn std::error::Error + 'static)) -> String {
    let texts: Vec<String> =
        std::iter::successors(Some(first), |error| error.source()).map(ToString::to_string).collect();
    texts.join(": ")
}

/// Whether a connection that could not be opened may be opened a little later.
pub(crate) fn is_passing_cause(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref().is_none_or(is_passing_error)
}

fn is_passing_error(error: &postgres::Error) -> bool {
    is_connection_fault(error) || error.code().is_some_and(is_passing)
}

/// Whether the server rolled a statement back for reasons that pass: 40 others were in the way, 53 disk, memory or connections are
/// used up, 54 a limit was reached, 55 something is in use, 58 the operating system failed, and a statement that was cancelled.
fn is_passing(code: &SqlState) -> bool {
    *code == SqlState::QUERY_CANCELED
        || ["40", "53", "54", "55", "58"].iter().any(|class| code.code().starts_with(class))
}

/// Whether the error speaks of the connection, which is not to be used again: what was asked may have happened.
pub(crate) fn is_connection_fault(error: &postgres::Error) -> bool {
    let Some(code) = error.code() else {
        // No answer from the server: a socket, a closed connection, a broken protocol.
        return true;
    };
    // 08 connection exception, 57P shutdown, restart or idle timeout, 53300 too many connections, 25006 a server that
    // became read-only (a failover), 25P03 a session that was ended because we, or the network, were slow within a transaction.
    code.code().starts_with("08")
        || code.code().starts_with("57P")
        || [
            SqlState::TOO_MANY_CONNECTIONS,
            SqlState::READ_ONLY_SQL_TRANSACTION,
            SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
        ]
        .contains(code)
}

/// Whether the server rolled a transaction back that may be repeated as it is.
pub(crate) fn is_serialization_failure(error: &postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED].contains(code))
}

/// An option that can't be used.
pub(crate) fn invalid(option: &'static str, value: impl ToString, expected: impl ToString) -> Error {
    Error::InvalidOption { option, value: value.to_string(), expected: expected.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_up_or_in_the_way_passes_and_what_is_wrong_does_not() {
        let passing = [
            SqlState::DISK_FULL,
            SqlState::OUT_OF_MEMORY,
            SqlState::INSUFFICIENT_RESOURCES,
            SqlState::T_R_DEADLOCK_DETECTED,
            SqlState::LOCK_NOT_AVAILABLE,
            SqlState::QUERY_CANCELED,
            SqlState::PROGRAM_LIMIT_EXCEEDED,
            SqlState::IO_ERROR,
        ];
        for code in passing {
            assert!(is_passing(&code), "{code:?}");
        }
        for code in [SqlState::UNDEFINED_TABLE, SqlState::INSUFFICIENT_PRIVILEGE, SqlState::SYNTAX_ERROR] {
            assert!(!is_passing(&code), "{code:?}");
        }
    }
}
