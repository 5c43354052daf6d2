//! Reads the rows of answers. Pure: no I/O, and no clock of this process.

use std::time::{Duration, SystemTime};

use postgres::Row;

use crate::db::answer::{AcquireRow, Found, FoundTable, LockInformation, RowWaiter};
use crate::db::sql::GRACE;

/// The row of an acquire at server time `now`, where `version` is the newest version.
pub(super) fn acquire_row(
    row: &Row,
    version: i64,
    now: SystemTime,
    row_waiter: Option<RowWaiter>,
) -> Result<AcquireRow, postgres::Error> {
    let (waiter, notified_version) = (row_waiter.map(|it| it.id), row_waiter.and_then(|it| it.notified_version));
    let position = row.try_get::<_, Option<i32>>(9)?.and_then(|position| u32::try_from(position).ok());
    let waiters = u32::try_from(row.try_get::<_, i32>(10)?).unwrap_or_default();
    let (released_at, lease_end): (Option<SystemTime>, SystemTime) = (row.try_get(7)?, row.try_get(8)?);
    // As the statement judges it: see `may_take` in `db::sql`.
    let is_free = released_at.is_some() || lease_end <= now;
    let free_since = released_at.map_or(lease_end, |at| at.min(lease_end));
    let promise_end = free_since.checked_add(GRACE).filter(|_| free_since <= now).unwrap_or(now);
    let is_due = notified_version == Some(version) && promise_end <= now;
    let end = row.try_get::<_, Option<_>>(2)?.unwrap_or(if is_free { promise_end } else { lease_end });
    Ok(AcquireRow {
        taken: row.try_get(1)?,
        left: end.duration_since(now).unwrap_or_default(),
        is_wanted: row.try_get(4)?,
        version,
        owner_id: row.try_get(6)?,
        is_released: released_at.is_some(),
        is_free,
        may_take: is_free && (waiter.is_none() || waiters == 0 || position == Some(1) || is_due),
        has_notified: row.try_get::<_, Option<i64>>(12)?.is_some(),
        waits: waiter.is_some(),
        position,
        waiters,
    })
}

/// What [`INSPECT`](crate::db::sql::INSPECT) found under the name of our table.
pub(super) fn found(row: &Row) -> Result<Found, postgres::Error> {
    let Some(has_usage) = row.try_get::<_, Option<bool>>(0)? else { return Ok(Found::NoSchema) };
    let role = row.try_get(1)?;
    if !has_usage {
        return Ok(Found::NoUsage { role });
    }
    let Some(kind) = row.try_get::<_, Option<String>>(2)? else { return Ok(Found::NoTable) };
    Ok(Found::Table(Box::new(FoundTable {
        role,
        kind,
        is_partition: row.try_get(3)?,
        access_method: row.try_get(4)?,
        persistence: row.try_get(5)?,
        columns: row.try_get(6)?,
        required: row.try_get(7)?,
        collation: row.try_get(8)?,
        has_key: row.try_get(9)?,
        hides_rows: row.try_get(10)?,
        publications: row.try_get(11)?,
        missing_rights: row.try_get(12)?,
    })))
}

pub(super) fn lock_information(row: &Row) -> Result<LockInformation, postgres::Error> {
    Ok(LockInformation {
        lock_id: row.try_get(0)?,
        owner_id: row.try_get(1)?,
        version: row.try_get(2)?,
        lock_begin_time: row.try_get(3)?,
        lease_expire_time: row.try_get(4)?,
        released_at: row.try_get(5)?,
        is_held: row.try_get(6)?,
        waiters: usize::try_from(row.try_get::<_, i32>(7)?).unwrap_or_default(),
    })
}

/// The time from column `now` to column `end`.
pub(super) fn time_left(row: &Row, end: usize, now: usize) -> Result<Duration, postgres::Error> {
    Ok(row.try_get::<_, SystemTime>(end)?.duration_since(row.try_get(now)?).unwrap_or_default())
}
