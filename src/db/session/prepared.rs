//! Runs the statements that are prepared.
//!
//! A statement runs unprepared first, in one round trip. The session prepares it later, when nobody waits: see
//! [`Session::prepare`].

use std::time::{Duration, Instant};

use postgres::Row;
use postgres::error::SqlState;
use postgres::types::ToSql;

use super::Session;
use crate::db::answer::Fault;
use crate::db::sql::Prepared;

/// A statement that was answered within this time is prepared for its next run. That saves the server its planning, a
/// few tenths of a millisecond. It costs a round trip, for which a call may have to wait.
const WORTH_PREPARING: Duration = Duration::from_millis(20);

/// The errors of a prepared statement in a backend that doesn't have it, has it already, or has another one of that
/// name.
const NOT_OUR_STATEMENT: [SqlState; 5] = [
    SqlState::INVALID_SQL_STATEMENT_NAME,
    SqlState::DUPLICATE_PSTATEMENT,
    SqlState::PROTOCOL_VIOLATION,
    SqlState::INVALID_BINARY_REPRESENTATION,
    SqlState::CHARACTER_NOT_IN_REPERTOIRE,
];

impl Session {
    /// The value of a prepared statement's parameter for the backend check. NULL behind a pooler, which passes.
    pub(super) fn backend_check(&self, prepared: &Prepared) -> Option<String> {
        self.backend.map(|backend| format!("{backend} {}", prepared.name))
    }

    /// Runs a statement that returns one row. The first column is the result of the backend check.
    pub(super) fn run(&mut self, prepared: &Prepared, values: &[&(dyn ToSql + Sync)]) -> Result<Row, Fault> {
        let sent = Instant::now();
        let result = match self.statements.get(&prepared.name) {
            Some(statement) => self.client.query_one(statement, values),
            None => self.run_unprepared(prepared, &prepared.text, values),
        };
        if sent.elapsed() >= WORTH_PREPARING {
            // Prepares neither a slow statement nor the one before it.
            self.unprepared = None;
        }
        if result.as_ref().err().is_some_and(|error| error.code() == Some(&SqlState::PROGRAM_LIMIT_EXCEEDED)) {
            // The server's queue of notifications is full, because some session reads none. Nothing depends on them.
            return Ok(self.run_unprepared(prepared, &prepared.silent, values)?);
        }
        if self.backend.is_none() {
            return Ok(result?);
        }
        match &result {
            Err(error) if error.code().is_some_and(|code| NOT_OUR_STATEMENT.contains(code)) => {
                self.route.recognise_pooler("a prepared statement was not there");
                Err(Fault::Pooled)
            }
            Ok(row) if !row.try_get::<_, bool>(0)? => {
                self.route.recognise_pooler("a statement ran elsewhere");
                Err(Fault::Pooled)
            }
            _ => Ok(result?),
        }
    }

    /// Runs a statement without preparing it, also in one round trip.
    fn run_unprepared(
        &mut self,
        prepared: &Prepared,
        text: &str,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, postgres::Error> {
        let parameters: Vec<_> = values.iter().copied().zip(prepared.types.iter().cloned()).collect();
        let row = self.client.query_typed_one(text, &parameters)?;
        if self.backend.is_some() {
            self.unprepared = Some((prepared.name.clone(), prepared.text.clone(), prepared.types));
        }
        Ok(row)
    }

    /// Whether there is a statement to [`prepare`](Self::prepare).
    pub(crate) fn has_to_prepare(&self) -> bool {
        self.unprepared.is_some()
    }

    /// Prepares the statement that ran last, for its next run. The caller does this when no call waits.
    pub(crate) fn prepare(&mut self) -> Result<(), Fault> {
        if let Some((name, text, types)) = self.unprepared.take() {
            self.statements.insert(name, self.client.prepare_typed(&text, types)?);
        }
        Ok(())
    }
}
