//! The one error type. Contention is never an error: a busy lock is `Ok(None)`.
//!
//! Invariant: no error shows a password. Imports: nothing of this crate.

use std::time::Duration;

use postgres::error::SqlState;

/// The `Result` of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any error, as the source of ours.
pub(crate) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why an operation failed.
///
/// The text says what the library was doing. The cause, if there is one, is in [`source`](std::error::Error::source),
/// and the text doesn't repeat it. `postgres::Error` puts the server's own words one level further down, so print the
/// whole chain. No password is ever part of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option or an argument can't be used. This is found before anything touches the network.
    #[error("invalid option {option} = {value}: expected {expected}")]
    InvalidOption {
        /// The name of the option's setter, or of the argument.
        option: &'static str,
        /// The value that was given. A DSN may hold a password, so only the part that is safe to show.
        value: String,
        /// What a valid value looks like.
        expected: String,
    },

    /// No connection could be opened: refused, unreachable, wrong password, unknown database, too many connections.
    #[error("cannot open a connection to PostgreSQL at {address}")]
    Connect {
        /// Where it was tried: host, address and port. If there are several, this is one of them, and up to four others
        /// follow, each with its cause.
        address: String,
        /// What was wrong there: a [`postgres::Error`], or the [`std::io::Error`] of an attempt that failed earlier.
        source: Cause,
    },

    /// The time limit passed before the database answered. What was asked for may or may not have happened.
    #[error("cannot {action}: gave up after {after:?} of waiting for {waiting_for}")]
    Timeout {
        /// What was being done.
        action: String,
        /// What was missing: an answer, a connection, or a free one among `max_connections`.
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

    /// The table is missing, isn't ours, or can't keep locks; or the role has no right to use it. It was not touched.
    #[error("cannot keep locks in table {table}: {problem}")]
    Table {
        /// The table with its schema, quoted as in SQL.
        table: String,
        /// What is wrong with it, and what to do.
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

    /// The hold is there, but the caller's transaction can't be fenced by it, or can't release it.
    #[error("cannot fence a transaction by lock {lock_id:?}: {problem}")]
    Fence {
        /// The lock.
        lock_id: String,
        /// What is wrong with the transaction.
        problem: &'static str,
    },

    /// This process was forked from the one that opened the storage. It shares the connections of that process, but has
    /// none of its threads.
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

    /// The text, followed by the texts of all causes, for a log.
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }

    /// Whether a wait goes on after this error: it is transient, or credentials may be renewed meanwhile.
    pub(crate) fn may_pass_within_a_wait(&self) -> bool {
        let is_of_credentials = matches!(self, Error::Connect { source, .. } if is_of_credentials(source.as_ref()));
        self.is_transient() || is_of_credentials
    }

    /// Whether the same call may succeed a little later, because the cause is the connection, the load or the server's
    /// state.
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

/// Whether the server didn't accept who we are. That passes where credentials are renewed.
fn is_of_credentials(cause: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(cause), |cause| cause.source());
    let error = causes.find_map(|cause| cause.downcast_ref::<postgres::Error>());
    error.and_then(postgres::Error::code).is_some_and(|code| code.code().starts_with("28"))
}

/// An error's text, followed by the texts of all its causes.
pub(crate) fn chain(first: &(dyn std::error::Error + 'static)) -> String {
    let texts: Vec<String> =
        std::iter::successors(Some(first), |error| error.source()).map(ToString::to_string).collect();
    texts.join(": ")
}

/// Whether an attempt to open a connection may succeed a little later, after it failed for this cause.
pub(crate) fn is_passing_cause(cause: &(dyn std::error::Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(cause), |cause| cause.source());
    causes.find_map(|cause| cause.downcast_ref()).is_none_or(is_passing_error)
}

/// A server that can't be written to, until it is promoted.
#[derive(Debug, thiserror::Error)]
#[error("this server is a standby: locks are kept on the primary")]
pub(crate) struct Standby;

/// A server that lets nobody in without encryption, and what may help.
#[derive(Debug, thiserror::Error)]
#[error("the server wants an encrypted connection, which takes {hint}")]
pub(crate) struct Encryption {
    pub(crate) hint: &'static str,
    pub(crate) source: Cause,
}

/// Whether a server refused a connection because it was not encrypted.
pub(crate) fn wants_encryption(cause: &(dyn std::error::Error + 'static)) -> bool {
    let said = cause.downcast_ref::<postgres::Error>().and_then(postgres::Error::as_db_error);
    said.is_some_and(|said| {
        *said.code() == SqlState::INVALID_AUTHORIZATION_SPECIFICATION
            // The second one is said by PostgreSQL 13 and before.
            && (said.message().contains("no encryption") || said.message().contains("SSL off"))
    })
}

fn is_passing_error(error: &postgres::Error) -> bool {
    is_connection_fault(error) || error.code().is_some_and(is_passing)
}

/// Whether the server rolled a statement back for a reason that passes.
///
/// The classes: 40 other transactions interfered; 53 disk, memory or connections are used up; 54 a limit was reached;
/// 55 something is in use; 58 the operating system failed. A statement that was cancelled counts too.
fn is_passing(code: &SqlState) -> bool {
    *code == SqlState::QUERY_CANCELED
        || ["40", "53", "54", "55", "58"].iter().any(|class| code.code().starts_with(class))
}

/// Whether the error is the connection's fault. Then the connection must not be used again, and what was asked for may
/// have happened.
pub(crate) fn is_connection_fault(error: &postgres::Error) -> bool {
    let Some(code) = error.code() else {
        // Not an answer of the server: the socket failed, the connection was closed, or the protocol was broken.
        return true;
    };
    // 08: connection exception. 57P: shutdown, restart or idle timeout. 53300: too many connections. 25006: a server
    // that became read-only (a failover). 25P03: the server ended a session because this process, or the network, was
    // slow within a transaction.
    code.code().starts_with("08")
        || code.code().starts_with("57P")
        || [
            SqlState::TOO_MANY_CONNECTIONS,
            SqlState::READ_ONLY_SQL_TRANSACTION,
            SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
        ]
        .contains(code)
}

/// Whether the server rolled the transaction back because of other transactions, so that it may be repeated as it is.
pub(crate) fn is_serialization_failure(error: &postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| [SqlState::T_R_SERIALIZATION_FAILURE, SqlState::T_R_DEADLOCK_DETECTED].contains(code))
}

/// The error for an option that can't be used.
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
