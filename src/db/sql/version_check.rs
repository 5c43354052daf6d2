//! The statements that make tables refuse writes under an older version.
//!
//! A writer names its version in a statement of its own, before it reads and writes. The trigger checks the version
//! again: a setting of the transaction carries it from the one to the other. What counts is the row lock, which lasts
//! as long as the transaction:
//!
//! - A newer version updates the row. Everybody else waits for the end of its transaction, which may still be rolled
//!   back.
//! - An equal version locks the row in share mode, so that a newer one waits for its end. Nothing of the old version is
//!   committed after something of the new one, whatever rows and tables they write to.
//! - A shared lock never becomes an exclusive one, for which two transactions would wait for each other. Only a row
//!   that has the version, or a greater one, is locked in share mode.
//!
//! In READ COMMITTED each statement has a snapshot of its own. In the stricter levels, a row that has moved meanwhile
//! is a serialization failure in each of the three cases.

use super::{dollar_quoted, literal, quote};

/// The table that remembers the greatest versions.
fn versions(schema: &str) -> String {
    format!("{}.\"storage_lock_versions\"", quote(schema))
}

/// The statements that create the functions and their table.
pub(super) fn version_check(schema: &str) -> String {
    let versions = versions(schema);
    let use_version = format!("{}.\"storage_lock_use_version\"", quote(schema));
    // The operators' names depend on the search path, too. If pg_temp isn't named, it comes first.
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

/// Creates them, one creator after the other: two creators can't both create what is missing, nor both replace a
/// function, at the same moment. The last statement writes nothing. It fails if another program has a table of that
/// name.
pub(super) fn create(schema: &str) -> String {
    format!(
        "SELECT pg_advisory_xact_lock(hashtextextended({name}, 0));
{version_check};
INSERT INTO {versions} (lock_id, version) SELECT '', 0 WHERE false ON CONFLICT (lock_id) DO NOTHING",
        name = literal(&format!("storage_lock_versions of {schema}")),
        version_check = version_check(schema),
        versions = versions(schema),
    )
}
