//! Acquire, the first hold of a lock, and whether an acquire is about to commit.

use postgres::types::Type;

use super::conditions::{
    DURABLE, IS_IN_TIME, NOT_DURABLE, is_free, is_lapsed, lease_from_now, may_take, newest, notify,
};
use super::{LONGEST_STEPS, MAX_WAITERS, Prepared, STEP, literal};

const ACQUIRE: &[Type] =
    &[Type::TEXT, Type::TEXT, Type::UUID, Type::INT8, Type::TEXT, Type::UUID, Type::INT8, Type::TIMESTAMPTZ];

/// $1 lock, $2 owner, $3 lease id, $4 lease in microseconds, $5 backend check, $6 waiter or NULL, $7 the version of
/// which those before the waiter are notified, or NULL, $8 until when the statement may take effect.
///
/// - `cur` reads the newest row, without a lock.
/// - `free` locks that row, only if the lock may be taken.
/// - `taken` moves the row to the next version.
/// - `queued` is the registration: if nothing is free, it puts the waiter into the row. It accepts a version that has
///   just followed: a lock that is handed over all the time has a row that is always about to change.
/// - `seen` is the row by which the waiter sleeps: that of `queued`, if there is one.
pub(super) fn acquire(table: &str) -> Prepared {
    Prepared::new("acquire", table, ACQUIRE, "$5", |is_checked| {
        format!(
            "WITH cur AS MATERIALIZED (
    SELECT version, owner_id, lease_expire_time, released_at, waiters FROM {table}
    WHERE lock_id = $1 AND {is_checked} ORDER BY version DESC LIMIT 1
), free AS MATERIALIZED (
    SELECT version FROM {table}
    WHERE lock_id = $1 AND version = (SELECT version FROM cur) AND {may_take} AND {IS_IN_TIME} AND {DURABLE}
    FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE {table} AS lock
    SET version = lock.version + 1, owner_id = $2, lease_id = $3, lock_begin_time = clock_timestamp(),
        lease_expire_time = {lease}, released_at = NULL,
        waiters = nullif(array_remove(CASE
            WHEN $6 IS NOT NULL
            THEN lock.waiters[coalesce(array_position(lock.waiters, $6), cardinality(lock.waiters)) + 1:]
            WHEN {is_lapsed} THEN lock.waiters[2:]
            ELSE lock.waiters END, $6), '{{}}')
    WHERE lock_id = $1 AND version = (SELECT version FROM free)
    RETURNING version, lease_expire_time, waiters
), queued AS (
    UPDATE {table} SET waiters = array_append(waiters, $6)
    WHERE $6 IS NOT NULL AND NOT EXISTS (SELECT FROM free) AND {IS_IN_TIME}
      AND lock_id = $1 AND version >= (SELECT version FROM cur) AND NOT {may_take}
      AND array_position(waiters, $6) IS NULL AND coalesce(cardinality(waiters), 0) < {MAX_WAITERS} AND {NOT_DURABLE}
      AND set_config('lock_timeout', '100', true) IS NOT NULL
    RETURNING version, owner_id, lease_expire_time, released_at, waiters
), seen AS MATERIALIZED (
    SELECT *, array_position(waiters, $6) AS place FROM (
        SELECT * FROM queued UNION ALL SELECT * FROM cur WHERE NOT EXISTS (SELECT FROM queued)) AS newest
)
SELECT {is_checked}, taken.version, taken.lease_expire_time, clock_timestamp(), taken.waiters IS NOT NULL,
       seen.version, seen.owner_id, seen.released_at, seen.lease_expire_time,
       seen.place, coalesce(cardinality(seen.waiters), 0), {IS_IN_TIME},
       CASE WHEN taken.version IS NULL AND $6 IS NOT NULL AND {IS_IN_TIME}
                 AND {seen_is_free} AND {seen_is_lapsed} AND NOT {seen_may_take}
            THEN {notifications} END
FROM (VALUES (1)) AS one LEFT JOIN seen ON true LEFT JOIN taken ON true",
            lease = lease_from_now("$4"),
            may_take = may_take(""),
            is_lapsed = is_lapsed("lock."),
            seen_is_free = is_free("seen."),
            seen_is_lapsed = is_lapsed("seen."),
            seen_may_take = may_take("seen."),
            notifications = notify(
                "(SELECT seen.version, seen.waiters, seen.place AS own) AS before",
                &format!("least((place - 1) * {}, {})", STEP.as_millis(), LONGEST_STEPS.as_millis()),
                "version",
                "own IS NULL OR place < own",
            ),
        )
    })
}

/// $1 lock. Takes the advisory lock of a first hold, in a statement of its own, before [`create`] gets its snapshot.
pub(super) fn lock_creation(table: &str) -> String {
    format!(
        "SELECT pg_try_advisory_xact_lock(hashtextextended($1, {literal}::regclass::oid::bigint)),
       set_config('idle_in_transaction_session_timeout', '5000', true), {DURABLE}",
        literal = literal(table),
    )
}

/// $1 lock, $2 owner, $3 lease id, $4 lease in microseconds, $5 until when the statement may take effect.
pub(super) fn create(table: &str) -> String {
    format!(
        "INSERT INTO {table} (lock_id, version, owner_id, lease_id, lock_begin_time, lease_expire_time)
SELECT $1, 1, $2, $3, clock_timestamp(), {lease}
WHERE NOT EXISTS (SELECT FROM {table} WHERE lock_id = $1) AND clock_timestamp() <= $5
RETURNING version, lease_expire_time, clock_timestamp()",
        lease = lease_from_now("$4"),
    )
}

/// $1 lock. Whether no acquire of the lock is about to commit. Such an acquire has the row locked, or, of a first
/// hold, the advisory lock. This statement locks the row itself, and so has something to commit. Its commit doesn't
/// wait for the disk.
pub(super) fn is_settled(table: &str) -> String {
    format!(
        "SELECT EXISTS (SELECT FROM {table} WHERE lock_id = $1 AND version = ({newest}) FOR KEY SHARE SKIP LOCKED)
    OR NOT EXISTS (SELECT FROM {table} WHERE lock_id = $1)
       AND pg_try_advisory_xact_lock(hashtextextended($1, {literal}::regclass::oid::bigint)), {NOT_DURABLE}",
        newest = newest(table),
        literal = literal(table),
    )
}
