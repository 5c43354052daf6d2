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

/// Returns one row: whether this role has `USAGE` on the schema (NULL if there is no schema), the role's name, quoted,
/// and what is known of the table, if there is one. That is what `FoundTable` of `db::answer` has, in
/// its order. Every role may read these catalogs. PostgreSQL 12 has all of these columns.
///
/// - 950 is the fixed object id of the collation `"C"`.
/// - A generated column counts as one with a default (`atthasdef`), an identity column doesn't.
/// - A domain can be `NOT NULL`, and can have a default.
/// - `has_column_privilege` is true if the role has the privilege on the column or on the whole table.
/// - An update needs a replica identity if it is published. By default that is the primary key. An index that was the
///   identity may have been dropped.
/// - Only the view `pg_publication_tables` knows every kind of publication in every version.
pub(crate) const INSPECT: &str = "\
SELECT (SELECT pg_catalog.has_schema_privilege(oid, 'USAGE') FROM pg_catalog.pg_namespace WHERE nspname = $1), \
       pg_catalog.quote_ident(current_user), table_.*
FROM (VALUES (1)) AS one LEFT JOIN LATERAL (
    SELECT c.relkind::text, c.relispartition,
        coalesce((SELECT amname::text FROM pg_catalog.pg_am WHERE oid = c.relam), 'none'), c.relpersistence::text,
        ARRAY(SELECT a.attname || ' '
                     || pg_catalog.replace(pg_catalog.format_type(a.atttypid, a.atttypmod), '\"', '')
                     || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
              FROM pg_catalog.pg_attribute a
              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
        ARRAY(SELECT a.attname::text
              FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
              WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                AND (a.attnotnull OR t.typnotnull) AND NOT a.atthasdef AND t.typdefault IS NULL
                AND a.attidentity = ''
                AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger g
                                WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgtype & 7 = 7)),
        (SELECT l.collname::text
         FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_collation l ON l.oid = a.attcollation
         WHERE a.attrelid = c.oid AND a.attname = 'lock_id' AND l.oid <> 950),
        EXISTS (SELECT FROM pg_catalog.pg_index i
                WHERE i.indrelid = c.oid AND i.indisprimary AND i.indnkeyatts = 2
                  AND (SELECT attname FROM pg_catalog.pg_attribute \
                       WHERE attrelid = c.oid AND attnum = i.indkey[0]) = 'lock_id'
                  AND (SELECT attname FROM pg_catalog.pg_attribute \
                       WHERE attrelid = c.oid AND attnum = i.indkey[1]) = 'version'
               ),
        pg_catalog.row_security_active(c.oid),
        CASE WHEN c.relreplident = 'n'
               OR c.relreplident = 'i' AND NOT EXISTS (SELECT FROM pg_catalog.pg_index i
                                                       WHERE i.indrelid = c.oid AND i.indisreplident)
             THEN ARRAY(SELECT p.pubname::text
                        FROM pg_catalog.pg_publication p
                        JOIN pg_catalog.pg_publication_tables t ON t.pubname = p.pubname
                        WHERE p.pubupdate AND t.schemaname = n.nspname AND t.tablename = c.relname
                        ORDER BY 1)
             ELSE ARRAY[]::text[] END,
        ARRAY(SELECT privilege FROM pg_catalog.unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS privilege
              WHERE EXISTS (SELECT FROM pg_catalog.pg_attribute a
                            WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                              AND a.attname IN ('lock_id', 'version', 'owner_id', 'lease_id', 'lock_begin_time',
                                                'lease_expire_time', 'released_at', 'waiters')
                              AND NOT pg_catalog.has_column_privilege(c.oid, a.attnum, privilege)))
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
         ) USING heap WITH (fillfactor = 70)"
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
