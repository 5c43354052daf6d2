//! What is done to the rows of locks, and to what those are told who wait for them: by hand, as somebody with access to
//! the database may, or by chance.

use std::ops::Range;

use postgres::Client;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use uuid::Uuid;

use super::Hurt;
use crate::history::Kind;

/// Where those are put who don't exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Placing {
    Before,
    After,
    Around,
}

/// How a row is freed by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Freeing {
    /// The next version, which is released.
    Moved,
    Released,
    Expired,
}

const FEW: Range<i32> = 1..12;
const MANY: Range<i32> = 12..301;

/// One of each.
pub fn draw(random: &mut StdRng) -> [Hurt; 4] {
    // Where many stand in a row they look more seldom.
    let count = if random.random_bool(0.7) { FEW } else { MANY };
    let placing = [Placing::Before, Placing::Before, Placing::After, Placing::Around];
    let freeing = [Freeing::Moved, Freeing::Released, Freeing::Expired];
    [
        Hurt::PutDeadWaiters {
            count: random.random_range(count),
            placing: *placing.choose(random).expect("a place"),
            with_nulls: random.random_bool(0.3),
        },
        Hurt::FreeRow(*freeing.choose(random).expect("a way")),
        Hurt::NotifyFalsely,
        Hurt::EndListeners,
    ]
}

/// Locks that several want, those first for which somebody waits: most likely one of the lines.
const WANTED: &str = "lock_id ~ '^(line|hot|queue|kept)' \
                      ORDER BY waiters IS NULL, lock_id LIKE 'line%' AND random() < 0.6 DESC, random() LIMIT 1";
const HELD: &str = "released_at IS NULL AND lease_expire_time > clock_timestamp()";
const IMPATIENT: &str = "SET lock_timeout = '500ms'";

/// They can be told from processes by their ids.
pub fn put_dead_waiters(client: &mut Client, table: &str, count: i32, placing: Placing, with_nulls: bool) -> Kind {
    let waiters = match placing {
        Placing::Before => "dead || waiters",
        Placing::After => "waiters || dead",
        Placing::Around => "dead || waiters || dead",
    };
    let sql = format!(
        "UPDATE {table} SET waiters = {waiters}
         FROM (SELECT array_agg(CASE WHEN $2 AND random() < 0.2 THEN NULL
                                     ELSE overlay(gen_random_uuid()::text PLACING 'dead' FROM 1)::uuid END) AS dead
               FROM generate_series(1, $1)) AS made
         WHERE (lock_id, version) IN (SELECT lock_id, version FROM {table} WHERE {WANTED}) RETURNING lock_id"
    );
    client.batch_execute(IMPATIENT).ok();
    match client.query(&sql, &[&count, &with_nulls]).as_deref() {
        Ok([row, ..]) => Kind::DeadWaiters(row.get(0), 2 * count.unsigned_abs()),
        Ok([]) => Kind::Harmless,
        Err(error) if error.code().is_some() => Kind::Harmless,
        // It may have been any.
        Err(_) => Kind::Undone(String::new()),
    }
}

/// Nobody is told.
pub fn free_row(client: &mut Client, table: &str, how: Freeing) -> Kind {
    let (set, moves) = match how {
        Freeing::Moved => (
            "version = version + 1, owner_id = 'by hand', lease_id = gen_random_uuid(), \
             released_at = clock_timestamp()",
            true,
        ),
        Freeing::Released => ("released_at = clock_timestamp()", false),
        Freeing::Expired => ("lease_expire_time = clock_timestamp()", false),
    };
    let sql = format!(
        "UPDATE {table} SET {set}
         WHERE (lock_id, version) IN (SELECT lock_id, version FROM {table} WHERE {HELD} AND {WANTED}) AND {HELD}
         RETURNING lock_id, version"
    );
    client.batch_execute(IMPATIENT).ok();
    match client.query(&sql, &[]).as_deref() {
        Ok([row, ..]) => {
            let version = row.get::<_, i64>(1) - i64::from(moves);
            Kind::Freed { lock: row.get(0), version, moves }
        }
        Ok([]) => Kind::Harmless,
        Err(error) if error.code().is_some() => Kind::Harmless,
        Err(_) => Kind::Undone(String::new()),
    }
}

/// Any role may do this. Some of it looks like what the library says, some like what it said in another version.
pub fn notify_falsely(client: &mut Client, table: &str) {
    let mut random = rand::rng();
    let sql = format!(
        "SELECT DISTINCT waiter, lock_id, version FROM {table}, unnest(waiters) AS waiter WHERE waiter IS NOT NULL"
    );
    let mut targets: Vec<(Uuid, String, i64)> =
        client.query(&sql, &[]).unwrap_or_default().iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    targets.truncate(40);
    // One that doesn't exist, and a lock that nobody wants.
    targets.push((Uuid::new_v4(), "nobody's".to_owned(), 1));
    for (waiter, lock, version) in targets {
        let delay = *[0, 1, 100, 10_000, 4_000_000_000, i64::MAX].choose(&mut random).expect("a delay");
        let turn = *[0, version, version + 1, -1, i64::MAX].choose(&mut random).expect("a turn");
        let payload = match random.random_range(0..8) {
            0 => String::new(),
            1 => "x".repeat(random.random_range(1..7_999)),
            2 => format!("{waiter} {lock}"),
            3 => format!("{waiter} {delay}{turn} {turn} "),
            4 => format!("{} {delay} {turn} {lock}", Uuid::new_v4()),
            _ => format!("{waiter} {delay} {turn} {lock}"),
        };
        let digit = waiter.simple().to_string().pop().expect("32 digits");
        let place = random.random_range(1..100_000_u32) * if random.random_bool(0.5) { 1 } else { 40_000 };
        let sql = "SELECT pg_notify($1, $2), pg_notify('storage_lock_' || $3, $4)";
        client
            .execute(
                sql,
                &[&format!("storage_lock_{digit}"), &payload, &waiter.to_string(), &format!("{place} {lock}")],
            )
            .ok();
    }
}

/// What is said before they listen again nobody hears.
pub fn end_listeners(client: &mut Client) {
    client.batch_execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'").ok();
}
