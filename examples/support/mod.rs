//! What the examples share: where the server is, and how an error is told.

use std::error::Error;
use std::process::ExitCode;

/// The server's DSN, from the environment.
pub(crate) fn dsn() -> Result<String, Box<dyn Error>> {
    std::env::var("STORAGE_LOCK_POSTGRESQL_DSN")
        .map_err(|_| "STORAGE_LOCK_POSTGRESQL_DSN is not set; scripts/with-postgres.sh COMMAND sets it".into())
}

/// Prints an error with all its causes: the server's own words are the last of them.
pub(crate) fn exit_code(result: Result<(), Box<dyn Error>>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    eprintln!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  because: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}
