//! All SQL: the table, and one statement an operation.
//!
//! One row a lock, never deleted, and its version is part of the key, so that the backward scan of the primary key meets
//! the newest version first even while an old snapshot elsewhere keeps all the dead ones.
//!
//! - **Acquire** is a compare-and-set that moves the key: find the newest row, lock it if it is free, give it the next
//!   version. Two acquirers see the same row free; the first locks it, the second skips the locked row, or finds on
//!   re-reading it that its version has moved: a *miss*. `SKIP LOCKED` means that an acquirer never queues in the
//!   server behind another one, or behind a transaction that locked the row. Measured on PostgreSQL 15: it costs 30 µs
//!   of an acquire of 450 µs. When busy, nothing is written.
//! - **Refresh** and **release** name the row by lock, version and lease, touch no key column, and are idempotent: a
//!   repeated release keeps the first one's time, so that a lost answer isn't taken for a lost lease.
//! - **Waiting** processes stand in the row too, in `waiters`, in the order in which they came, by the random id of their
//!   storage. A busy acquire of a process that waits puts it there: the *registration*. Registration and release update
//!   the same row, so that one of them sees the other. What a waiter sleeps by comes from the row that its own
//!   registration wrote: the statement's snapshot may be older than that row, and the lock released since.
//!   Unlike an acquire, a registration waits for the row, though not for long: where a lock is handed over all the
//!   time, its row is always locked by somebody who is about to commit.
//! - A **free** lock (released, or with its lease over) is promised to the first in the row for [`GRACE`]. The promise counts
//!   from the moment at which the lock became free; a moment that the clock has yet to reach doesn't count, as the
//!   database's clock may have been set back. After it, a waiter behind others takes the lock in two steps. It
//!   **notifies** those before it, and learns the version. It gives them [`STEP`] each (a second in all at most) and 50
//!   ms more. Then it takes the lock if it is still free in that version, and removes those before it from the row. So
//!   dead processes cost the others a moment, once, however many they are. A live one loses its place only if it is too
//!   slow to come in that time.
//! - A **release** notifies the first two and the last of the waiters, however many there are. The first takes the
//!   lock. The second looks after [`GRACE`], and the last [`STEP`] later for each between them (a second at most): of
//!   many, the last is the likeliest to be alive. Nothing depends on a
//!   notification: each waiter looks by itself from time to time ([`crate::answer::Busy`]).
//! - A late copy of an acquire must not take the lock for nobody. A claim is sent again only after an answer that it
//!   took nothing. Its statement does nothing after an instant of the database's clock, so that the follow-up knows
//!   when to stop ([`crate::follow_up`]).
//! - A **fence** locks the row in the caller's own transaction, against a move of the key and nothing else (`FOR KEY SHARE`): acquirers
//!   skip it as they skip each other, refreshes and releases go on. It waits for an acquire that has the row: not only one that takes
//!   it, but also one that came too late, and keeps the row of its winner until it has committed nothing. It compares the
//!   lease too: a version may come twice where commits were lost.
//! - A release in a transaction of the caller's, **unlock in**, is fenced first: an update that waited for a takeover would lock the
//!   row of the next owner, which then couldn't refresh it. It leaves the transaction's settings alone.
//! - **Hand-over** is a release and the next acquire in one statement, for two threads of one process.
//! - Only `clock_timestamp()` judges a lease. `now()` is the start of the transaction, which may lie before a wait.
//! - A granted lease must survive a crash of the server, so acquire and refresh turn `synchronous_commit` on where it is
//!   off. A release may be lost in a crash: then the lease runs out. It commits without waiting for the disk.
//! - The **version check** ([`version_check`]) is for whoever writes data under a lock, and never used by the library itself. It
//!   remembers the greatest version on its own, because the data may be in a database that doesn't have our table.
//! - A prepared statement does nothing unless it is told the backend that it runs in and its own name and table: a guard
//!   against poolers, see [`crate::session`].

use std::time::Duration;

use postgres::types::Type;
use uuid::Uuid;

/// What the names of our channels begin with; the last hexadecimal digit of the waiter's id follows. A few fixed names, because
/// each text of a `LISTEN` takes an entry of `pg_stat_statements`.
const CHANNEL: &str = "storage_lock_";
/// For how long a free lock is promised to the first of the waiting processes.
pub(crate) const GRACE: Duration = Duration::from_millis(100);
/// How much later than the one before it each further waiter looks.
pub(crate) const STEP: Duration = Duration::from_millis(10);
/// All those steps together, where they are waited for.
pub(crate) const LONGEST_STEPS: Duration = Duration::from_secs(1);
/// How many processes may stand in a row. Others look from time to time.
pub(crate) const MAX_WAITERS: u32 = 1_000;
/// For how long the statement of a claim may take effect after its caller's time is over. The server's clock, by which that is
/// judged, is known only as of the last answer.
pub(crate) const CLAIM_LIFE: Duration = Duration::from_secs(20);

/// The columns, their types as `format_type` names them, and whether they are `NOT NULL`.
pub(crate) const COLUMNS: [(&str, &str, bool); 8] = [
    ("lock_id", "text", true),
    ("version", "bigint", true),
    ("owner_id", "text", true),
    ("lease_id", "uuid", true),
    ("lock_begin_time", "timestamp with time zone", true),
    ("lease_expire_time", "timestamp with time zone", true),
    ("released_at", "timestamp with time zone", false),
    ("waiters", "uuid[]", false),
];

/// Makes a commit durable whatever the role's default is, and leaves `local`, `remote_write` and `remote_apply` alone.
const DURABLE: &str = "(current_setting('synchronous_commit') <> 'off' \
                       OR set_config('synchronous_commit', 'on', true) IS NOT NULL)";

/// Whether a claim's statement still may take effect.
const IS_IN_TIME: &str = "(clock_timestamp() <= $8)";

/// A row that somebody keeps locked is not waited for in the server, where that takes a connection from others: it is asked for again.
const SHORT_WAIT: &str = "set_config('lock_timeout', '250', true) IS NOT NULL";

/// Makes a commit return before it is on the disk.
const NOT_DURABLE: &str = "set_config('synchronous_commit', 'off', true) IS NOT NULL";

/// What to send as start-up options, so that a session does what the lock needs whatever the role's defaults are:
/// index scans also while the table is small (a plan is kept while the table grows), no planning and no JIT
/// compilation of tiny statements, functions that nobody can shadow, and no statement that outlives its caller for long. A
/// lock that isn't granted is to be told from a statement that took too long: its limit comes first.
pub(crate) const SESSION_OPTIONS: &str = "-c storage_lock.direct=on \
     -c quote_all_identifiers=off -c enable_seqscan=off -c plan_cache_mode=force_generic_plan -c jit=off -c search_path=pg_catalog \
     -c default_transaction_isolation=read\\ committed -c default_transaction_read_only=off \
     -c statement_timeout=5000 -c lock_timeout=1500 -c idle_in_transaction_session_timeout=5000";

/// This session's backend, whether the start-up options reached it, and what time it is.
pub(crate) const SESSION: &str =
    "SELECT pg_backend_pid(), current_setting('storage_lock.direct', true) = 'on', clock_timestamp()";

/// What a transaction needs that reads the whole table.
pub(crate) const READS_ALL: &str = "SET LOCAL enable_seqscan = on";

pub(crate) const SERVER_TIME: &str = "SELECT clock_timestamp()";

/// Whether the schema exists; kind, persistence and columns of the table, if it exists; whether it has our primary key; and whether
/// rows may be hidden from this role.
/// 950 is the fixed object id of the collation `"C"`.
pub(crate) const INSPECT: &str = "\
SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1), table_.kind, table_.persistence, table_.columns, table_.key, table_.hides
FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
    SELECT c.relkind::text AS kind, c.relpersistence::text AS persistence,
        ARRAY(SELECT a.attname || ' ' || replace(format_type(a.atttypid, a.atttypmod), '\"', '')
                     || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
                     || CASE WHEN a.attname = 'lock_id' AND a.attcollation <> 950
                             THEN ' of another collation' ELSE '' END
              FROM pg_catalog.pg_attribute a
              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
        EXISTS (SELECT FROM pg_catalog.pg_index i
                WHERE i.indrelid = c.oid AND i.indisprimary AND i.indnkeyatts = 2
                  AND (SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attnum = i.indkey[0]) = 'lock_id'
                  AND (SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = c.oid AND attnum = i.indkey[1]) = 'version'
               ) AS key,
        pg_catalog.row_security_active(c.oid) AS hides
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2
) AS table_ ON true";

/// The statements for one table. Parameters are described at [`crate::session`], which binds them.
#[derive(Debug)]
pub(crate) struct Sql {
    /// The table with its schema, quoted.
    pub(crate) table: String,
    pub(crate) create_table: String,
    pub(crate) acquire: Prepared,
    pub(crate) lock_creation: String,
    pub(crate) create: String,
    pub(crate) is_settled: String,
    pub(crate) refresh: Prepared,
    pub(crate) release: Prepared,
    pub(crate) hand_over: Prepared,
    pub(crate) withdraw: Prepared,
    pub(crate) fence: String,
    pub(crate) unlock_in: String,
    pub(crate) is_unlocked_in: String,
    pub(crate) get: String,
    pub(crate) list: String,
    pub(crate) version_check: String,
    pub(crate) create_version_check: String,
}

// The types of the parameters of what is prepared.
const ACQUIRE: &[Type] =
    &[Type::TEXT, Type::TEXT, Type::UUID, Type::INT8, Type::TEXT, Type::UUID, Type::INT8, Type::TIMESTAMPTZ];
const REFRESH: &[Type] = &[Type::TEXT, Type::INT8, Type::UUID, Type::INT8, Type::TEXT];
const RELEASE: &[Type] = &[Type::TEXT, Type::INT8, Type::UUID, Type::TEXT, Type::UUID, Type::BOOL];
const HAND_OVER: &[Type] =
    &[Type::TEXT, Type::INT8, Type::UUID, Type::TEXT, Type::UUID, Type::INT8, Type::TEXT, Type::TIMESTAMPTZ];
const WITHDRAW: &[Type] = &[Type::TEXT, Type::UUID, Type::TEXT];

/// A statement that is run often, and so is prepared once a connection.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) text: String,
    /// The same without notifications, where the server takes no more of them.
    pub(crate) silent: String,
    /// What the statement is, and for which table. Its parameter for the place has to say this, after the number of
    /// the backend.
    pub(crate) name: String,
    /// Of its parameters.
    pub(crate) types: &'static [Type],
}

impl Prepared {
    /// `text` gets the check of `parameter`, the place; NULL passes.
    fn new(
        operation: &str,
        table: &str,
        types: &'static [Type],
        parameter: &str,
        text: impl FnOnce(&str) -> String,
    ) -> Prepared {
        let name = format!("{operation} {table}");
        let place = format!("pg_backend_pid() || {}", literal(&format!(" {name}")));
        let text = text(&format!("coalesce({parameter}::text, {place}) = {place}"));
        // Something that is counted as well.
        let silent = text.replace("pg_catalog.pg_notify(", "pg_catalog.concat(");
        Prepared { text, silent, name, types }
    }
}

impl Sql {
    pub(crate) fn new(schema: &str, table_name: &str) -> Sql {
        let table = format!("{}.{}", quote(schema), quote(table_name));
        let newest = format!("SELECT version FROM {table} WHERE lock_id = $1 ORDER BY version DESC LIMIT 1");
        let lease_from_now = |micros: &str| format!("clock_timestamp() + {micros}::bigint * interval '1 microsecond'");
        let information = "lock_id, owner_id, version, lock_begin_time, lease_expire_time, released_at, \
                           released_at IS NULL AND lease_expire_time > clock_timestamp() AS is_held, \
                           coalesce(cardinality(waiters), 0) AS waiters";
        let version_check = version_check(schema);
        let grace = format!("interval '{} milliseconds'", GRACE.as_millis());
        // When the lock became free, if it is free.
        let free_since = |row: &str| format!("least({row}released_at, {row}lease_expire_time)");
        let is_free =
            |row: &str| format!("({row}released_at IS NOT NULL OR {row}lease_expire_time <= clock_timestamp())");
        let is_lapsed = |row: &str| {
            let since = free_since(row);
            format!("({since} + {grace} <= clock_timestamp() OR {since} > clock_timestamp())")
        };
        // For the process $6, which has notified those before it of version $7; or for one that doesn't wait.
        let may_take = |row: &str| {
            format!(
                "({free} AND coalesce($6 IS NULL OR coalesce(cardinality({row}waiters), 0) = 0 OR {row}waiters[1] = $6
                     OR {row}version = $7 AND {lapsed}, false))",
                free = is_free(row),
                lapsed = is_lapsed(row),
            )
        };
        // Notifies waiters: each on its channel, whoever it is, when to look, the version of which those before it are notified, or
        // 0, and of which lock. An entry that somebody else made may be NULL. All of it is qualified: it runs in the caller's session too.
        let notify = |rows: &str, delay: &str, turn: &str, condition: &str| {
            format!(
                "(SELECT pg_catalog.count(pg_catalog.pg_notify(
            pg_catalog.concat('{CHANNEL}', pg_catalog.right(waiter::pg_catalog.text, 1)),
            pg_catalog.concat_ws(' ', waiter, {delay}, {turn}, $1)))
        FROM {rows}, ROWS FROM (pg_catalog.unnest(waiters)) WITH ORDINALITY AS entry (waiter, place)
        WHERE waiter IS NOT NULL AND ({condition}))"
            )
        };
        // The first two, and the last.
        let tell = |rows: &str, turn: &str| {
            let (grace, step, longest) = (GRACE.as_millis(), STEP.as_millis(), LONGEST_STEPS.as_millis());
            let steps = format!("(place OPERATOR(pg_catalog.-) 2) OPERATOR(pg_catalog.*) {step}");
            let delay = format!("{grace} OPERATOR(pg_catalog.+) least({steps}, {longest})");
            notify(
                rows,
                &format!("CASE WHEN place OPERATOR(pg_catalog.=) 1 THEN 0 ELSE {delay} END"),
                &format!("CASE WHEN place OPERATOR(pg_catalog.<=) 2 THEN {turn} ELSE 0 END"),
                "place OPERATOR(pg_catalog.<=) 2 OR place OPERATOR(pg_catalog.=) pg_catalog.cardinality(waiters)",
            )
        };
        // $1 lock, $2 version, $3 lease id as text, which every driver can send. It runs in the caller's session, whose search path decides
        // what a function, an operator or a type is that doesn't name its schema.
        let own = "lock_id OPERATOR(pg_catalog.=) $1 AND version OPERATOR(pg_catalog.=) $2 \
                   AND lease_id OPERATOR(pg_catalog.=) $3::pg_catalog.text::pg_catalog.uuid";
        // Written by this transaction itself, and not by a subtransaction of it, which a savepoint begins.
        let is_whole = "xmin::pg_catalog.text::pg_catalog.int8 OPERATOR(pg_catalog.=) \
                        (pg_catalog.txid_current() OPERATOR(pg_catalog.%) 4294967296)";
        // A row is the proof.
        let fence = format!("SELECT version FROM {table} WHERE {own} AND released_at IS NULL FOR KEY SHARE");
        Sql {
            create_table: format!(
                "CREATE TABLE {table} (\n    \
                     lock_id           text COLLATE \"C\" NOT NULL,\n    \
                     version           bigint           NOT NULL,\n    \
                     owner_id          text             NOT NULL,\n    \
                     lease_id          uuid             NOT NULL,\n    \
                     lock_begin_time   timestamptz      NOT NULL,\n    \
                     lease_expire_time timestamptz      NOT NULL,\n    \
                     released_at       timestamptz,\n    \
                     waiters           uuid[]           CHECK (array_ndims(waiters) = 1 AND array_lower(waiters, 1) = 1),\n    \
                     PRIMARY KEY (lock_id, version)\n\
                 ) WITH (fillfactor = 70)"
            ),
            // $1 lock, $2 owner, $3 lease id, $4 lease in microseconds, $5 place, $6 waiter or NULL, $7 the version of which those
            // before it are notified, or NULL, $8 until when it may take effect.
            // `cur` shows what there is; `free` locks it only if it may be taken; `taken` moves it to the next version; `queued`
            // puts the waiter into the row otherwise: also into that of a version that has just followed, where a lock is
            // handed over all the time, and its row is always about to change. `seen` is what the waiter sleeps by.
            acquire: Prepared::new("acquire", &table, ACQUIRE, "$5", |here| {
                format!(
                    "WITH cur AS MATERIALIZED (
    SELECT version, owner_id, lease_expire_time, released_at, waiters FROM {table}
    WHERE lock_id = $1 AND {here} ORDER BY version DESC LIMIT 1
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
SELECT {here}, taken.version, taken.lease_expire_time, clock_timestamp(), taken.waiters IS NOT NULL,
       seen.version, seen.owner_id, seen.released_at, seen.lease_expire_time,
       seen.place, coalesce(cardinality(seen.waiters), 0), {IS_IN_TIME},
       CASE WHEN taken.version IS NULL AND $6 IS NOT NULL AND {IS_IN_TIME}
                 AND {seen_is_free} AND {seen_is_lapsed} AND NOT {seen_may_take}
            THEN {told} END
FROM (VALUES (1)) AS one LEFT JOIN seen ON true LEFT JOIN taken ON true",
                    lease = lease_from_now("$4"),
                    may_take = may_take(""),
                    is_lapsed = is_lapsed("lock."),
                    seen_is_free = is_free("seen."),
                    seen_is_lapsed = is_lapsed("seen."),
                    seen_may_take = may_take("seen."),
                    told = notify(
                        "(SELECT seen.version, seen.waiters, seen.place AS own) AS before",
                        &format!("least((place - 1) * {}, {})", STEP.as_millis(), LONGEST_STEPS.as_millis()),
                        "version",
                        "own IS NULL OR place < own",
                    ),
                )
            }),
            // $1 lock. Taken in a statement of its own, before `create` gets its snapshot.
            lock_creation: format!(
                "SELECT pg_try_advisory_xact_lock(hashtextextended($1, {literal}::regclass::oid::bigint)),
       set_config('idle_in_transaction_session_timeout', '5000', true), {DURABLE}",
                literal = literal(&table),
            ),
            // $1 lock. Whether no acquire of it is about to commit: that has its row, or, of a first hold, its advisory lock. It locks the
            // row itself, and so has something to commit.
            is_settled: format!(
                "SELECT EXISTS (SELECT FROM {table} WHERE lock_id = $1 AND version = ({newest}) FOR KEY SHARE SKIP LOCKED)
    OR NOT EXISTS (SELECT FROM {table} WHERE lock_id = $1)
       AND pg_try_advisory_xact_lock(hashtextextended($1, {literal}::regclass::oid::bigint)), {NOT_DURABLE}",
                literal = literal(&table),
            ),
            // $1 lock, $2 owner, $3 lease id, $4 lease in microseconds, $5 until when it may take effect.
            create: format!(
                "INSERT INTO {table} (lock_id, version, owner_id, lease_id, lock_begin_time, lease_expire_time)
SELECT $1, 1, $2, $3, clock_timestamp(), {lease}
WHERE NOT EXISTS (SELECT FROM {table} WHERE lock_id = $1) AND clock_timestamp() <= $5
RETURNING version, lease_expire_time, clock_timestamp()",
                lease = lease_from_now("$4"),
            ),
            // $1 lock, $2 version, $3 lease id, $4 lease in microseconds, $5 place.
            refresh: Prepared::new("refresh", &table, REFRESH, "$5", |here| {
                format!(
                    "WITH refreshed AS (
    UPDATE {table} SET lease_expire_time = {lease}
    WHERE lock_id = $1 AND version = $2 AND lease_id = $3 AND released_at IS NULL
      AND lease_expire_time > clock_timestamp() AND {here} AND {DURABLE} AND {SHORT_WAIT}
    RETURNING waiters
)
SELECT {here}, EXISTS (SELECT FROM refreshed), EXISTS (SELECT FROM refreshed WHERE waiters IS NOT NULL)",
                    lease = lease_from_now("$4"),
                )
            }),
            // $1 lock, $2 version or NULL for the newest, $3 lease id, $4 place, $5 this process as a waiter or NULL, $6
            // whether it goes on waiting, which puts it behind those who wait; with nobody before it, it has no need to.
            // Returns how many wait.
            release: Prepared::new("release", &table, RELEASE, "$4", |here| {
                format!(
                    "WITH released AS (
    UPDATE {table} SET released_at = coalesce(released_at, clock_timestamp()),
        waiters = CASE WHEN waiters IS NULL OR waiters = ARRAY[$5::uuid] THEN NULL
                       WHEN $6 THEN array_append(array_remove(waiters, $5), $5)
                       ELSE array_remove(waiters, $5) END
    WHERE lock_id = $1 AND version = coalesce($2, ({newest})) AND lease_id = $3 AND {here} AND {NOT_DURABLE}
      AND {SHORT_WAIT}
    RETURNING version, waiters
)
SELECT {here}, (SELECT coalesce(cardinality(waiters), 0) FROM released), {told}",
                    told = tell("released", "version"),
                )
            }),
            // $1 lock, $2 version, $3 lease id, $4 the next owner, $5 its lease id, $6 its lease in microseconds, $7 place, $8 until when
            // it may take effect. `own` skips a row that somebody's transaction has locked: that is for a release, which isn't
            // held up by it. Whoever sleeps by a lease that ends later than the new one has to look.
            hand_over: Prepared::new("hand over", &table, HAND_OVER, "$7", |here| {
                format!(
                    "WITH own AS MATERIALIZED (
    SELECT version, lease_expire_time FROM {table}
    WHERE lock_id = $1 AND version = $2 AND lease_id = $3 AND released_at IS NULL
      AND lease_expire_time > clock_timestamp() AND {IS_IN_TIME} AND {here} AND {DURABLE}
    FOR UPDATE SKIP LOCKED
), moved AS (
    UPDATE {table} AS lock
    SET version = lock.version + 1, owner_id = $4, lease_id = $5, lock_begin_time = clock_timestamp(), lease_expire_time = {lease}
    WHERE lock_id = $1 AND version = (SELECT version FROM own)
    RETURNING version, lease_expire_time, waiters
), shorter AS (
    SELECT version, waiters FROM moved WHERE lease_expire_time < (SELECT lease_expire_time FROM own)
)
SELECT {here}, moved.version, moved.lease_expire_time, clock_timestamp(), moved.waiters IS NOT NULL, {IS_IN_TIME}, {told}
FROM (VALUES (1)) AS one LEFT JOIN moved ON true",
                    lease = lease_from_now("$6"),
                    told = tell("shorter", "0"),
                )
            }),
            // $1 lock, $2 waiter, $3 place. If the lock is free, and promised to it, the next ones have to know.
            withdraw: Prepared::new("withdraw", &table, WITHDRAW, "$3", |here| {
                format!(
                    "WITH gone AS (
    UPDATE {table} SET waiters = nullif(array_remove(waiters, $2), '{{}}')
    WHERE lock_id = $1 AND version >= ({newest}) AND $2 = ANY (waiters) AND {here} AND {NOT_DURABLE}
      AND {SHORT_WAIT}
    RETURNING version, waiters, lease_expire_time, released_at
), free AS MATERIALIZED (
    SELECT version, waiters FROM gone WHERE {is_free}
)
SELECT {here}, {told}",
                    is_free = is_free(""),
                    told = tell("free", "version"),
                )
            }),
            fence: fence.clone(),
            // The same parameters. False in a savepoint.
            unlock_in: format!(
                "WITH own AS MATERIALIZED (
    {fence}
), released AS (
    UPDATE {table} SET released_at = pg_catalog.clock_timestamp()
    WHERE {own} AND EXISTS (SELECT FROM own) AND released_at IS NULL
    RETURNING version, waiters, {is_whole} AS is_whole
)
SELECT (SELECT is_whole FROM released), {told}",
                told = tell("released", "version"),
            ),
            // The same parameters. Whether it is this transaction that releases the hold, still: another one on the
            // same connection may have.
            is_unlocked_in: format!(
                "SELECT version FROM {table} WHERE {own} AND released_at IS NOT NULL AND {is_whole}"
            ),
            get: format!("SELECT {information} FROM {table} WHERE lock_id = $1 ORDER BY version DESC LIMIT 1"),
            list: format!(
                "SELECT {information} FROM {table}
WHERE released_at IS NULL AND lease_expire_time > clock_timestamp() ORDER BY lock_id"
            ),
            // One after the other, as what is missing for two at once can't be created by both, nor a function be replaced. The
            // last statement writes nothing, and fails if there is another program's table of that name.
            create_version_check: format!(
                "SELECT pg_advisory_xact_lock(hashtextextended({name}, 0));
{version_check};
INSERT INTO {versions} (lock_id, version) SELECT '', 0 WHERE false ON CONFLICT (lock_id) DO NOTHING",
                name = literal(&format!("storage_lock_versions of {schema}")),
                versions = versions(schema),
            ),
            version_check,
            table,
        }
    }
}

/// Where the greatest versions are remembered.
fn versions(schema: &str) -> String {
    format!("{}.\"storage_lock_versions\"", quote(schema))
}

/// What makes tables refuse writes under an older version.
///
/// A writer says its version in a statement of its own before it reads and writes, and the trigger checks that again: a
/// setting of the transaction carries it from one to the other. What counts is the row lock, which lasts as long as the transaction:
///
/// - A newer version updates the row, so that everybody else waits for its end: it may yet be rolled back.
/// - An equal one locks it in share mode. So a newer one waits for its end, and nothing of the old version is committed after
///   something of the new one, whatever rows and tables they write to.
/// - A shared lock is never turned into an exclusive one, for which two transactions would wait for each other: only a
///   row that has the version, or a greater one, is locked in share mode.
///
/// Each statement has a snapshot of its own in READ COMMITTED. In the stricter levels a row that has moved meanwhile is a
/// serialization failure in each of the three.
fn version_check(schema: &str) -> String {
    let versions = versions(schema);
    let use_version = format!("{}.\"storage_lock_use_version\"", quote(schema));
    // The names of the operators depend on the search path too. pg_temp comes first if it isn't named.
    let language = "LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp";
    let use_body = dollar_quoted(&format!(
        "
DECLARE
    seen bigint;
BEGIN
    IF lock_name IS NULL OR lock_version IS NULL THEN
        RAISE EXCEPTION 'this transaction has not said under which version of lock \"%\" it writes', lock_name
            USING ERRCODE = 'SL002', HINT = 'Call storage_lock_use_version in a statement of its own first.';
    END IF;
    LOOP
        UPDATE {versions} SET version = lock_version WHERE lock_id = lock_name AND version < lock_version;
        EXIT WHEN FOUND;
        SELECT version INTO seen FROM {versions} WHERE lock_id = lock_name AND version >= lock_version FOR SHARE;
        IF seen > lock_version THEN
            RAISE EXCEPTION 'version % of lock \"%\" is too old: version % has been seen', lock_version, lock_name, seen
                USING ERRCODE = 'SL001';
        END IF;
        EXIT WHEN FOUND;
        INSERT INTO {versions} (lock_id, version) VALUES (lock_name, lock_version) ON CONFLICT DO NOTHING;
        EXIT WHEN FOUND;
    END LOOP;
    PERFORM set_config('storage_lock.versions', (
        coalesce(nullif(current_setting('storage_lock.versions', true), ''), '{{}}')::jsonb
        || jsonb_build_object(lock_name, lock_version))::text, true);
END
"
    ));
    let check_body = dollar_quoted(&format!(
        "
BEGIN
    -- A row would be locked before the version is checked, and left out.
    IF TG_NARGS <> 1 OR TG_WHEN <> 'BEFORE' OR TG_LEVEL <> 'STATEMENT' THEN
        RAISE EXCEPTION 'trigger % has to be BEFORE and FOR EACH STATEMENT, with a lock id as its argument', TG_NAME
            USING ERRCODE = 'trigger_protocol_violated';
    END IF;
    PERFORM {use_version}(
        TG_ARGV[0], (nullif(current_setting('storage_lock.versions', true), '')::jsonb ->> TG_ARGV[0])::bigint);
    RETURN NULL;
END
"
    ));
    format!(
        "CREATE TABLE IF NOT EXISTS {versions} (
    lock_id text COLLATE \"C\" PRIMARY KEY,
    version bigint NOT NULL
);
CREATE OR REPLACE FUNCTION {use_version}(lock_name text, lock_version bigint) RETURNS void
{language} AS {use_body};
CREATE OR REPLACE FUNCTION {}.\"storage_lock_check_version\"() RETURNS trigger
{language} AS {check_body}",
        quote(schema)
    )
}

/// An identifier as SQL. Any characters but NUL are fine.
fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

/// Listens for what a waiting process is notified of. Who looks at the sessions of the server finds its id.
pub(crate) fn listen(waiter: Uuid) -> String {
    let id = waiter.to_string();
    let digit = id.chars().last().unwrap_or_default();
    format!("LISTEN \"{CHANNEL}{digit}\"; SELECT 'waiter {id}'")
}

/// A string literal as SQL, whatever `standard_conforming_strings` is.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// The body of a function: also one with names in it that look like the end of such a literal.
fn dollar_quoted(text: &str) -> String {
    let mut tag = "$body$".to_owned();
    while text.contains(&tag) {
        tag.insert(1, '_');
    }
    format!("{tag}{text}{tag}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_clock_judges_leases() {
        let sql = Sql::new("public", "storage_lock");
        for text in [
            &sql.acquire.text,
            &sql.create,
            &sql.refresh.text,
            &sql.release.text,
            &sql.hand_over.text,
            &sql.fence,
            &sql.unlock_in,
            &sql.get,
            &sql.list,
        ] {
            let text = text.to_lowercase();
            for start_of_transaction in ["now(", "current_timestamp", "transaction_timestamp", "statement_timestamp"] {
                assert!(!text.contains(start_of_transaction), "{text}");
            }
        }
    }

    /// Each text of a `LISTEN` is another statement for the server to remember.
    #[test]
    fn all_processes_listen_on_a_few_channels() {
        let listens = (0..1_000).map(|_| listen(Uuid::new_v4()).split(';').next().unwrap_or_default().to_owned());
        let texts: std::collections::HashSet<String> = listens.collect();
        assert!(texts.len() <= 16, "{} texts", texts.len());
    }

    /// Otherwise its statement takes too long before it is known that somebody else has locked what it needs.
    #[test]
    fn who_waits_for_a_lock_in_the_server_hears_of_that_first() {
        let millis = |name: &str| -> u32 {
            let value = SESSION_OPTIONS.split(&format!(" {name}=")).nth(1).expect(name);
            value.split(' ').next().unwrap_or_default().parse().expect(name)
        };
        assert!(millis("lock_timeout") + 500 <= millis("statement_timeout"));
    }

    /// What `text`, without its literals and quoted names, says in words and in signs.
    fn unquoted(text: &str) -> String {
        let (mut plain, mut quote) = (String::new(), None);
        for sign in text.chars() {
            match quote {
                None if sign == '\'' || sign == '"' => quote = Some(sign),
                None => plain.push(sign),
                Some(open) if sign == open => {
                    quote = None;
                    plain.push_str("quoted");
                }
                Some(_) => {}
            }
        }
        plain
    }

    /// What of a statement depends on the search path: functions, operators and types that don't say that they are
    /// PostgreSQL's own.
    fn unqualified(text: &str) -> Vec<String> {
        // Syntax, none of which stands for an operator, as `IN`, `BETWEEN`, `nullif` or `CASE x WHEN` would.
        const SYNTAX: [&str; 27] = [
            "WITH",
            "AS",
            "MATERIALIZED",
            "SELECT",
            "FROM",
            "WHERE",
            "AND",
            "OR",
            "NOT",
            "IS",
            "NULL",
            "FOR",
            "KEY",
            "SHARE",
            "UPDATE",
            "SET",
            "EXISTS",
            "RETURNING",
            "ORDINALITY",
            "ROWS",
            "CASE",
            "WHEN",
            "THEN",
            "ELSE",
            "END",
            "coalesce",
            "least",
        ];
        let mut text = unquoted(text);
        // An assignment is no comparison.
        text = text.replace("SET released_at = ", "SET released_at ");
        let mut found = Vec::new();
        while let Some((before, rest)) = text.split_once("OPERATOR(pg_catalog.") {
            let (_, after) = rest.split_once(')').expect("its end");
            text = format!("{before} {after}");
        }
        let casts = text.split("::").skip(1).filter(|cast| !cast.starts_with("pg_catalog."));
        found.extend(casts.map(|cast| format!("::{cast}")));
        text = text.replace("::", " ");
        found.extend(text.chars().filter(|sign| "+-*/<>=~!@#%^&|`?".contains(*sign)).map(String::from));
        let is_word = |sign: char| sign.is_alphanumeric() || sign == '_' || sign == '.' || sign == '$';
        let mut before = "";
        for (at, word) in text.match_indices(is_word).map(|(at, _)| at).filter_map(|at| {
            let starts = at == 0 || !text[..at].ends_with(is_word);
            starts.then(|| (at, text[at..].split(|sign| !is_word(sign)).next().unwrap_or_default()))
        }) {
            let is_called = text[at + word.len()..].trim_start().starts_with('(');
            let is_syntax = SYNTAX.contains(&word);
            // The columns of an alias.
            if is_called && !is_syntax && before != "AS" && !word.starts_with("pg_catalog.") {
                found.push(format!("{word}()"));
            }
            if !is_syntax && word.chars().all(|sign| sign.is_ascii_uppercase()) {
                found.push(word.to_owned());
            }
            before = word;
        }
        found
    }

    /// It runs with the search path of the caller's session.
    #[test]
    fn what_runs_in_the_callers_session_calls_nothing_but_postgresqls_own() {
        let sql = Sql::new("public", "storage_lock");
        for text in [&sql.fence, &sql.unlock_in, &sql.is_unlocked_in] {
            assert_eq!(unqualified(text), Vec::<String>::new(), "{text}");
        }
        for (text, is_found) in [
            ("SELECT clock_timestamp()", "clock_timestamp()"),
            ("SELECT count (a) FROM t", "count()"),
            ("SELECT a FROM t, unnest(b) WITH ORDINALITY AS c (d, e)", "unnest()"),
            ("SELECT public.f(a)", "public.f()"),
            ("SELECT a::uuid", "::uuid"),
            ("SELECT a WHERE a = b", "="),
            ("SELECT 'x' || a", "|"),
            ("SELECT a WHERE a IN (b)", "IN"),
            ("SELECT nullif(a, b)", "nullif()"),
            ("SELECT a OPERATOR(public.=) b", "OPERATOR()"),
        ] {
            assert!(
                unqualified(text).iter().any(|found| found.starts_with(is_found)),
                "{text}: {:?}",
                unqualified(text)
            );
        }
    }

    #[test]
    fn identifiers_are_quoted() {
        let sql = Sql::new("My \"Schema\"", "weird; 'name\\");
        assert_eq!(sql.table, r#""My ""Schema"""."weird; 'name\""#);
        assert!(sql.lock_creation.contains(r#"E'"My ""Schema"""."weird; ''name\\"'"#), "{}", sql.lock_creation);
    }
}
