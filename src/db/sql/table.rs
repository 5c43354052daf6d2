//! The table: its columns, how to check and create it, and how to read its rows.

/// The columns: name, type as `format_type` names it, and whether it is `NOT NULL`.
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

/// Returns one row: whether the schema exists, and what is known of the table, if there is one. That is its kind,
/// persistence and columns, whether it has our primary key, and whether rows may be hidden from this role.
///
/// 950 is the fixed object id of the collation `"C"`.
pub(crate) const INSPECT: &str = "\
SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = $1), table_.kind, \
       table_.persistence, table_.columns, table_.key, table_.hides
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
                  AND (SELECT attname FROM pg_catalog.pg_attribute \
                       WHERE attrelid = c.oid AND attnum = i.indkey[0]) = 'lock_id'
                  AND (SELECT attname FROM pg_catalog.pg_attribute \
                       WHERE attrelid = c.oid AND attnum = i.indkey[1]) = 'version'
               ) AS key,
        pg_catalog.row_security_active(c.oid) AS hides
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relname = $2
) AS table_ ON true";

/// The columns that make a `LockInformation`.
const INFORMATION: &str = "lock_id, owner_id, version, lock_begin_time, lease_expire_time, released_at, \
                           released_at IS NULL AND lease_expire_time > clock_timestamp() AS is_held, \
                           coalesce(cardinality(waiters), 0) AS waiters";

pub(super) fn create(table: &str) -> String {
    format!(
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
    )
}

/// $1 lock.
pub(super) fn get(table: &str) -> String {
    format!("SELECT {INFORMATION} FROM {table} WHERE lock_id = $1 ORDER BY version DESC LIMIT 1")
}

pub(super) fn list(table: &str) -> String {
    format!(
        "SELECT {INFORMATION} FROM {table}
WHERE released_at IS NULL AND lease_expire_time > clock_timestamp() ORDER BY lock_id"
    )
}
