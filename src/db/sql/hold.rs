//! Refresh, release and hand-over of a hold; and the withdrawal of a waiter from the row.

use postgres::types::Type;

use super::Prepared;
use super::conditions::{DURABLE, IS_IN_TIME, NOT_DURABLE, SHORT_WAIT, is_free, lease_from_now, newest, notify_some};

const REFRESH: &[Type] = &[Type::TEXT, Type::INT8, Type::UUID, Type::INT8, Type::TEXT];

/// $1 lock, $2 version, $3 lease id, $4 lease in microseconds, $5 backend check.
pub(super) fn refresh(table: &str) -> Prepared {
    Prepared::new("refresh", table, REFRESH, "$5", |is_checked| {
        format!(
            "WITH refreshed AS (
    UPDATE {table} SET lease_expire_time = {lease}
    WHERE lock_id = $1 AND version = $2 AND lease_id = $3 AND released_at IS NULL
      AND lease_expire_time > clock_timestamp() AND {is_checked} AND {DURABLE} AND {SHORT_WAIT}
    RETURNING waiters
)
SELECT {is_checked}, EXISTS (SELECT FROM refreshed), EXISTS (SELECT FROM refreshed WHERE waiters IS NOT NULL)",
            lease = lease_from_now("$4"),
        )
    })
}

const RELEASE: &[Type] = &[Type::TEXT, Type::INT8, Type::UUID, Type::TEXT, Type::UUID, Type::BOOL];

/// $1 lock, $2 version or NULL for the newest, $3 lease id, $4 backend check, $5 this process as a waiter or NULL, $6
/// whether the process goes on waiting.
///
/// $6 puts the process behind those who wait. If nobody else waits, it leaves the row instead: it has no need to be
/// there. Returns how many wait.
pub(super) fn release(table: &str) -> Prepared {
    Prepared::new("release", table, RELEASE, "$4", |is_checked| {
        format!(
            "WITH released AS (
    UPDATE {table} SET released_at = coalesce(released_at, clock_timestamp()),
        waiters = CASE WHEN waiters IS NULL OR waiters = ARRAY[$5::uuid] THEN NULL
                       WHEN $6 THEN array_append(array_remove(waiters, $5), $5)
                       ELSE array_remove(waiters, $5) END
    WHERE lock_id = $1 AND version = coalesce($2, ({newest})) AND lease_id = $3 AND {is_checked} AND {NOT_DURABLE}
      AND {SHORT_WAIT}
    RETURNING version, waiters
)
SELECT {is_checked}, (SELECT coalesce(cardinality(waiters), 0) FROM released), {notifications}",
            newest = newest(table),
            notifications = notify_some("released", "version"),
        )
    })
}

const HAND_OVER: &[Type] =
    &[Type::TEXT, Type::INT8, Type::UUID, Type::TEXT, Type::UUID, Type::INT8, Type::TEXT, Type::TIMESTAMPTZ];

/// $1 lock, $2 version, $3 lease id, $4 the next owner, $5 its lease id, $6 its lease in microseconds, $7 backend
/// check, $8 until when the statement may take effect.
///
/// `own` skips a row that somebody's transaction has locked. Such a row is for a release, which the transaction doesn't
/// hold up. `shorter` has a row if the new lease ends before the old one: waiters who sleep by the old one must look.
pub(super) fn hand_over(table: &str) -> Prepared {
    Prepared::new("hand over", table, HAND_OVER, "$7", |is_checked| {
        format!(
            "WITH own AS MATERIALIZED (
    SELECT version, lease_expire_time FROM {table}
    WHERE lock_id = $1 AND version = $2 AND lease_id = $3 AND released_at IS NULL
      AND lease_expire_time > clock_timestamp() AND {IS_IN_TIME} AND {is_checked} AND {DURABLE}
    FOR UPDATE SKIP LOCKED
), moved AS (
    UPDATE {table} AS lock
    SET version = lock.version + 1, owner_id = $4, lease_id = $5, lock_begin_time = clock_timestamp(), \
        lease_expire_time = {lease}
    WHERE lock_id = $1 AND version = (SELECT version FROM own)
    RETURNING version, lease_expire_time, waiters
), shorter AS (
    SELECT version, waiters FROM moved WHERE lease_expire_time < (SELECT lease_expire_time FROM own)
)
SELECT {is_checked}, moved.version, moved.lease_expire_time, clock_timestamp(), moved.waiters IS NOT NULL, \
       {IS_IN_TIME}, {notifications}
FROM (VALUES (1)) AS one LEFT JOIN moved ON true",
            lease = lease_from_now("$6"),
            notifications = notify_some("shorter", "0"),
        )
    })
}

const WITHDRAW: &[Type] = &[Type::TEXT, Type::UUID, Type::TEXT];

/// $1 lock, $2 waiter, $3 backend check. A free lock may have been promised to this waiter: so the next ones are
/// notified.
pub(super) fn withdraw(table: &str) -> Prepared {
    Prepared::new("withdraw", table, WITHDRAW, "$3", |is_checked| {
        format!(
            "WITH gone AS (
    UPDATE {table} SET waiters = nullif(array_remove(waiters, $2), '{{}}')
    WHERE lock_id = $1 AND version >= ({newest}) AND $2 = ANY (waiters) AND {is_checked} AND {NOT_DURABLE}
      AND {SHORT_WAIT}
    RETURNING version, waiters, lease_expire_time, released_at
), free AS MATERIALIZED (
    SELECT version, waiters FROM gone WHERE {is_free}
)
SELECT {is_checked}, {notifications}",
            newest = newest(table),
            is_free = is_free(""),
            notifications = notify_some("free", "version"),
        )
    })
}
