//! The table: created if it is missing, and refused if it can't keep locks, or the role may not use it.
//!
//! Uses `db` and the modules below it.

use crate::db::answer::{Found, FoundTable};
use crate::db::sql::{COLUMNS, quote};
use crate::error::{Error, Result};
use crate::storage::PostgresStorage;
use crate::user_code::log_at;

impl PostgresStorage {
    /// Creates the table if it is missing, and checks that it is ours and that the role may use it.
    ///
    /// [`new`](Self::new) has already done this, unless the options said
    /// [`create_table(false)`](crate::PostgresStorageOptions::create_table).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn create_table(&self) -> Result<()> {
        self.prepare_table(true)
    }

    /// The statement that creates the table, for a migration.
    pub fn table_ddl(&self) -> &str {
        &self.inner.sql.create_table
    }

    pub(super) fn prepare_table(&self, create: bool) -> Result<()> {
        let describe = format!("prepare table {}", self.inner.sql.table);
        let (schema, table_name) = (self.inner.schema.clone(), self.inner.table_name.clone());
        let found = self.read(describe, move |session, sql| {
            let found = session.inspect(&schema, &table_name)?;
            if !create || !matches!(found, Found::NoTable) {
                return Ok(found);
            }
            if session.create_table(sql)? {
                log_at!(info, "created table {}", sql.table);
            }
            session.inspect(&schema, &table_name)
        })?;
        match problem_of(&found, &self.inner.schema, &self.inner.sql.table) {
            Some(problem) => Err(Error::Table { table: self.inner.sql.table.clone(), problem }),
            None => Ok(()),
        }
    }
}

/// Why the table that was found can't keep locks for this role; none if it can.
fn problem_of(found: &Found, schema: &str, table: &str) -> Option<String> {
    match found {
        Found::NoSchema => Some("the schema does not exist; create it, or name another one".to_owned()),
        Found::NoUsage { role } => Some(format!(
            "role {role} has no USAGE on the schema; run: GRANT USAGE ON SCHEMA {} TO {role}",
            quote(schema)
        )),
        Found::NoTable => Some("it does not exist, and creating it was not asked for".to_owned()),
        Found::Table(found) => {
            problem_of_columns(found, table).or_else(|| problem_of_storage(found, table)).or_else(|| {
                let (role, missing) = (&found.role, &found.missing_rights);
                (!missing.is_empty()).then(|| {
                    let grant = format!("GRANT {} ON {table} TO {role}", missing.join(", "));
                    format!("role {role} has no {} on it; run: {grant}", missing.join(" and no "))
                })
            })
        }
    }
}

/// Whether it is our table, and takes our rows.
fn problem_of_columns(found: &FoundTable, table: &str) -> Option<String> {
    if found.kind != "r" {
        return Some("it is not an ordinary table".to_owned());
    }
    let missing: Vec<String> = COLUMNS
        .iter()
        .map(|(name, type_, is_required)| format!("{name} {type_}{}", if *is_required { " NOT NULL" } else { "" }))
        .filter(|column| !found.columns.contains(column))
        .collect();
    if !missing.is_empty() {
        return Some(format!("it is not ours: there is no column {}; name another table", missing.join(", ")));
    }
    if let Some(collation) = &found.collation {
        return Some(format!(
            "lock_id has the collation {collation}, and not C: two lock ids could count as one, or the index could \
             change its order; run: ALTER TABLE {table} ALTER lock_id TYPE text COLLATE \"C\""
        ));
    }
    let ours = |column: &str| COLUMNS.iter().any(|(name, ..)| *name == column);
    if let Some(further) = found.required.iter().find(|column| !ours(column)) {
        return Some(format!(
            "its column {further} is NOT NULL and has no default: no lock can be inserted; give the column a default, \
             or let it be NULL"
        ));
    }
    if !found.has_key {
        return Some("it has no primary key (lock_id, version)".to_owned());
    }
    None
}

/// Whether the server keeps its rows as locks need it.
fn problem_of_storage(found: &FoundTable, table: &str) -> Option<String> {
    if found.hides_rows {
        return Some(
            "row-level security applies to this role, and may hide rows: two owners could hold a lock; use a role \
             that it doesn't apply to, or disable it for the table"
                .to_owned(),
        );
    }
    if found.persistence != "p" {
        return Some(
            "it is not durable (UNLOGGED or temporary): after a crash two owners could hold a lock".to_owned(),
        );
    }
    if found.access_method != "heap" {
        return Some(format!(
            "its access method is {}: the library knows the row locks of heap only; create it again with USING heap",
            found.access_method
        ));
    }
    if found.is_partition {
        return Some(
            "it is a partition of another table, which can change what rows it takes; detach it, or name another table"
                .to_owned(),
        );
    }
    if !found.publications.is_empty() {
        return Some(format!(
            "it has no replica identity, and publication {} publishes its updates: the server refuses every update; \
             run: ALTER TABLE {table} REPLICA IDENTITY DEFAULT",
            found.publications.join(", ")
        ));
    }
    None
}
