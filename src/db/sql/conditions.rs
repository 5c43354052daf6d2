//! Pieces of SQL that several statements have in common.
//!
//! A parameter `row` is the prefix of a row's columns, such as `lock.`, or empty. What the conditions mean is said in
//! the header of [`super`].

use super::{GRACE, LONGEST_STEPS, STEP};

/// What the names of our channels begin with. The last hexadecimal digit of the waiter's id follows. The names are
/// few and fixed, because each text of a `LISTEN` takes an entry of `pg_stat_statements`.
pub(super) const CHANNEL: &str = "storage_lock_";

/// Makes the commit durable, whatever the role's default is. Leaves `local`, `remote_write` and `remote_apply` alone.
pub(super) const DURABLE: &str = "(current_setting('synchronous_commit') <> 'off' \
                       OR set_config('synchronous_commit', 'on', true) IS NOT NULL)";

/// Whether a claim's statement may still take effect.
pub(super) const IS_IN_TIME: &str = "(clock_timestamp() <= $8)";

/// Limits the wait for a locked row to 250 ms. A long wait in the server would keep a connection from others, so the
/// library asks again instead.
pub(super) const SHORT_WAIT: &str = "set_config('lock_timeout', '250', true) IS NOT NULL";

/// Makes the commit return before it is on the disk.
pub(super) const NOT_DURABLE: &str = "set_config('synchronous_commit', 'off', true) IS NOT NULL";

/// The newest version of lock $1.
pub(super) fn newest(table: &str) -> String {
    format!("SELECT version FROM {table} WHERE lock_id = $1 ORDER BY version DESC LIMIT 1")
}

pub(super) fn lease_from_now(micros: &str) -> String {
    format!("clock_timestamp() + {micros}::bigint * interval '1 microsecond'")
}

pub(super) fn is_free(row: &str) -> String {
    format!("({row}released_at IS NOT NULL OR {row}lease_expire_time <= clock_timestamp())")
}

/// Whether the promise of a free lock is over. The promise doesn't count if the lock became free in the future, which
/// means that the database's clock was set back.
pub(super) fn is_lapsed(row: &str) -> String {
    let grace = format!("interval '{} milliseconds'", GRACE.as_millis());
    // When the lock became free.
    let since = format!("least({row}released_at, {row}lease_expire_time)");
    format!("({since} + {grace} <= clock_timestamp() OR {since} > clock_timestamp())")
}

/// Whether a process may take the lock, which must be free. A process that doesn't wait ($6 is NULL) may. The waiter $6
/// may in three cases:
///
/// - Nobody is in the row.
/// - The waiter is the first in the row.
/// - Those before it have been notified of version $7, which is still the row's, and the promise is over.
pub(super) fn may_take(row: &str) -> String {
    format!(
        "({free} AND coalesce($6 IS NULL OR coalesce(cardinality({row}waiters), 0) = 0 OR {row}waiters[1] = $6
                     OR {row}version = $7 AND {lapsed}, false))",
        free = is_free(row),
        lapsed = is_lapsed(row),
    )
}

/// Notifies waiters, each on its channel. `rows` is where to find `waiters`, and `condition` chooses among them.
///
/// The payload has four parts: the waiter's id, the `delay` after which to look (in milliseconds), the version of
/// which those before the waiter are notified (`turn`, or 0), and the lock. An entry of `waiters` that somebody else
/// made may be NULL. All names are qualified, because the statement runs in the caller's session, too.
pub(super) fn notify(rows: &str, delay: &str, turn: &str, condition: &str) -> String {
    format!(
        "(SELECT pg_catalog.count(pg_catalog.pg_notify(
            pg_catalog.concat('{CHANNEL}', pg_catalog.right(waiter::pg_catalog.text, 1)),
            pg_catalog.concat_ws(' ', waiter, {delay}, {turn}, $1)))
        FROM {rows}, ROWS FROM (pg_catalog.unnest(waiters)) WITH ORDINALITY AS entry (waiter, place)
        WHERE waiter IS NOT NULL AND ({condition}))"
    )
}

/// Notifies the first two waiters and the last one. The second gets the version, because the first is notified with it.
pub(super) fn notify_some(rows: &str, turn: &str) -> String {
    let (grace, step, longest) = (GRACE.as_millis(), STEP.as_millis(), LONGEST_STEPS.as_millis());
    let steps = format!("(place OPERATOR(pg_catalog.-) 2) OPERATOR(pg_catalog.*) {step}");
    let delay = format!("{grace} OPERATOR(pg_catalog.+) least({steps}, {longest})");
    notify(
        rows,
        &format!("CASE WHEN place OPERATOR(pg_catalog.=) 1 THEN 0 ELSE {delay} END"),
        &format!("CASE WHEN place OPERATOR(pg_catalog.<=) 2 THEN {turn} ELSE 0 END"),
        "place OPERATOR(pg_catalog.<=) 2 OR place OPERATOR(pg_catalog.=) pg_catalog.cardinality(waiters)",
    )
}
