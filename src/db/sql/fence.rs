//! The statements that run in the caller's transaction: the fence, and the release that is a part of it.
//!
//! Invariant: every function, operator and type names its schema. Otherwise the search path of the caller's session
//! would decide what it is.

use super::conditions::notify_some;

/// Finds the hold. $1 lock, $2 version, $3 lease id, as text, which every driver can send.
const OWN: &str = "lock_id OPERATOR(pg_catalog.=) $1 AND version OPERATOR(pg_catalog.=) $2 \
                   AND lease_id OPERATOR(pg_catalog.=) $3::pg_catalog.text::pg_catalog.uuid";

/// Whether this transaction itself wrote the row, rather than a subtransaction of it, which a savepoint begins.
const IS_WHOLE: &str = "xmin::pg_catalog.text::pg_catalog.int8 OPERATOR(pg_catalog.=) \
                        (pg_catalog.txid_current() OPERATOR(pg_catalog.%) 4294967296)";

/// Parameters: see [`OWN`]. Returns a row if the hold is there, and so proves that it is.
pub(super) fn fence(table: &str) -> String {
    format!("SELECT version FROM {table} WHERE {OWN} AND released_at IS NULL FOR KEY SHARE")
}

/// Parameters: see [`OWN`]. Returns NULL if the hold isn't there, and false in a savepoint.
pub(super) fn unlock_in(table: &str) -> String {
    format!(
        "WITH own AS MATERIALIZED (
    {fence}
), released AS (
    UPDATE {table} SET released_at = pg_catalog.clock_timestamp()
    WHERE {OWN} AND EXISTS (SELECT FROM own) AND released_at IS NULL
    RETURNING version, waiters, {IS_WHOLE} AS is_whole
)
SELECT (SELECT is_whole FROM released), {notifications}",
        fence = fence(table),
        notifications = notify_some("released", "version"),
    )
}

/// Parameters: see [`OWN`]. Returns a row if this very transaction still releases the hold. An earlier transaction on
/// the same connection may have released it.
pub(super) fn is_unlocked_in(table: &str) -> String {
    format!("SELECT version FROM {table} WHERE {OWN} AND released_at IS NOT NULL AND {IS_WHOLE}")
}
