//! The table: created if it is missing, and refused if it can't keep locks.
//!
//! Uses `db` and the modules below it.

use crate::db::answer::Found;
use crate::db::sql::COLUMNS;
use crate::error::{Error, Result};
use crate::storage::PostgresStorage;
use crate::user_code::log_at;

impl PostgresStorage {
    /// Creates the table if it is missing, and checks that it is ours.
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
        match problem_of(&found) {
            Some(problem) => Err(Error::Table { table: self.inner.sql.table.clone(), problem }),
            None => Ok(()),
        }
    }
}

/// Why the table that was found can't keep locks; none if it can.
fn problem_of(found: &Found) -> Option<String> {
    let (kind, persistence, columns, has_key, hides_rows) = match found {
        Found::NoSchema => return Some("the schema does not exist; create it, or name another one".to_owned()),
        Found::NoTable => return Some("it does not exist, and creating it was not asked for".to_owned()),
        Found::Table { kind, persistence, columns, has_key, hides_rows } => {
            (kind, persistence, columns, has_key, hides_rows)
        }
    };
    if kind != "r" {
        return Some("it is not an ordinary table".to_owned());
    }
    let missing: Vec<String> = COLUMNS
        .iter()
        .map(|(name, type_, is_required)| format!("{name} {type_}{}", if *is_required { " NOT NULL" } else { "" }))
        .filter(|column| !columns.contains(column))
        .collect();
    if !missing.is_empty() {
        return Some(format!("it is not ours: there is no column {}; name another table", missing.join(", ")));
    }
    if !has_key {
        return Some("it has no primary key (lock_id, version)".to_owned());
    }
    if *hides_rows {
        return Some(
            "row-level security applies to this role, and may hide rows: two owners could hold a lock; use a role \
             that it doesn't apply to, or disable it for the table"
                .to_owned(),
        );
    }
    if persistence != "p" {
        return Some(
            "it is not durable (UNLOGGED or temporary): after a crash two owners could hold a lock".to_owned(),
        );
    }
    None
}
