//! The options of a storage and of a lock, and their checks. Invariant: every option is checked here, before anything
//! touches the network.
//!
//! Imports: `hold` for the lease arithmetic and the type of `on_lost`, then `events` and `error`.

mod dsn;
mod lock;
mod own_options;
mod storage;

pub use lock::LockOptions;
pub use storage::PostgresStorageOptions;

use crate::error::{Result, invalid};

/// The longest lock id or owner id.
const MAX_ID_BYTES: usize = 255;
/// PostgreSQL shortens a longer identifier without an error (`NAMEDATALEN` is 64). Then two names could mean one table.
const MAX_IDENTIFIER_BYTES: usize = 63;
/// How much an error shows of a text that can't be used.
const SHOWN_CHARS: usize = 300;

/// Checks a lock id or an owner id.
pub(crate) fn check_id(option: &'static str, id: &str) -> Result<()> {
    check_text(option, id, MAX_ID_BYTES)
}

fn check_identifier(option: &'static str, identifier: &str) -> Result<()> {
    check_text(option, identifier, MAX_IDENTIFIER_BYTES)
}

fn check_text(option: &'static str, text: &str, max_bytes: usize) -> Result<()> {
    if text.is_empty() || text.len() > max_bytes || text.contains('\0') {
        let expected = format!("1 to {max_bytes} bytes of text without NUL, not {} bytes", text.len());
        let shown: String = text.chars().take(SHOWN_CHARS).collect();
        let rest = if shown.len() < text.len() { "…" } else { "" };
        return Err(invalid(option, format!("{shown:?}{rest}"), expected));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
