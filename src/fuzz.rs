//! Checks that must pass for any text that a caller gives as a DSN, an id or a name. A check panics only if something
//! is wrong.
//!
//! The property tests of this module use them, and so does the coverage-guided fuzzer in `fuzz`. Imports: `options`,
//! `error`, and the statements of `db::sql`, to see that a name stays a name in each of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::LazyLock;

use crate::db::sql::Sql;
use crate::error::{Error, Result};
use crate::options::{LockOptions, PostgresStorageOptions, check_id};

/// A password. No other text of a check contains three characters of it in a row.
pub const SECRET: &str = "q7Zx9Vk2WmJ4";

/// Checks that a DSN is refused as a DSN, or means what the driver reads in it. Checks that nothing shows a piece of
/// [`SECRET`], wherever it is in the DSN.
pub fn check_dsn(dsn: &str) {
    let options = PostgresStorageOptions::from_dsn(dsn);
    shows_no_secret(dsn, &format!("{options:?} {options:#?}"));
    match options.checked_config() {
        Ok(config) => {
            let read: postgres::Config = dsn.parse().expect("an accepted DSN can be read");
            assert_eq!(config.get_hosts(), read.get_hosts());
            assert_eq!(config.get_hostaddrs(), read.get_hostaddrs());
            assert_eq!(config.get_ports(), read.get_ports());
            assert_eq!(config.get_user(), read.get_user());
            assert_eq!(config.get_password(), read.get_password());
            assert_eq!(config.get_dbname(), read.get_dbname());
            assert_eq!(config.get_options(), read.get_options());
            let texts = [config.get_user(), config.get_dbname(), config.get_options(), config.get_application_name()];
            assert!(!texts.into_iter().flatten().any(|text| text.contains('\0')), "{dsn:?} can't be sent");
            assert!(!config.get_hosts().is_empty() || !config.get_hostaddrs().is_empty());
            assert!(
                config.get_connect_timeout().is_some_and(|timeout| !timeout.is_zero() && timeout.as_secs() <= 3_600)
            );
        }
        Err(error) => {
            assert!(matches!(error, Error::InvalidOption { option: "dsn", .. }), "{dsn:?}: {error:?}");
            assert!(std::error::Error::source(&error).is_none(), "{dsn:?} has a cause that may show it");
            shows_no_secret(dsn, &format!("{error} {error:?} {error:#?}"));
        }
    }
}

fn shows_no_secret(dsn: &str, shown: &str) {
    for piece in SECRET.as_bytes().windows(3) {
        let piece = std::str::from_utf8(piece).unwrap();
        assert!(!shown.contains(piece), "{dsn:?} shows {piece:?}: {shown}");
    }
}

/// Checks that a text is accepted as a lock id, an owner id, and the name of a schema or table exactly if its length
/// fits and it has no NUL. Checks that an accepted name is that name in every statement, and nothing else.
pub fn check_name(text: &str) {
    let is_one = |longest: usize| (1..=longest).contains(&text.len()) && !text.contains('\0');
    is_refused_unless(is_one(255), "lock_id", LockOptions::new(text).check());
    is_refused_unless(is_one(255), "owner_id", check_id("owner_id", text));
    let options = || PostgresStorageOptions::from_dsn("host=h");
    is_refused_unless(is_one(63), "schema", options().schema(text).checked_config().map(drop));
    is_refused_unless(is_one(63), "table_name", options().table_name(text).checked_config().map(drop));
    if is_one(63) {
        static PLAIN: LazyLock<Vec<Vec<Token>>> =
            LazyLock::new(|| statements("a", "b").iter().map(|statement| tokens(statement)).collect());
        let (with, table) = (statements(text, text), Sql::new(text, text).table);
        assert_eq!(with.len(), PLAIN.len());
        with.iter().zip(&*PLAIN).for_each(|(with, plain)| same_but_for_names(with, plain, text, &table));
    }
}

fn is_refused_unless(is_right: bool, option: &str, result: Result<()>) {
    match result {
        Ok(()) => assert!(is_right, "{option} was not refused"),
        Err(Error::InvalidOption { option: named, .. }) => assert!(!is_right && named == option, "{named} was refused"),
        Err(error) => panic!("{error:?}"),
    }
}

fn statements(schema: &str, table_name: &str) -> Vec<String> {
    let sql = Sql::new(schema, table_name);
    let prepared = [sql.acquire, sql.refresh, sql.release, sql.hand_over, sql.withdraw].map(|prepared| prepared.text);
    [sql.table, sql.create_table, sql.lock_creation, sql.create, sql.get, sql.list]
        .into_iter()
        .chain(prepared)
        .collect()
}

#[derive(Debug, PartialEq)]
enum Token {
    Identifier(String),
    Text(String),
    Other(String),
}

/// Splits a statement at its quotes, as PostgreSQL does.
fn tokens(sql: &str) -> Vec<Token> {
    let (mut tokens, mut chars) = (Vec::new(), sql.chars().peekable());
    let mut other = String::new();
    while let Some(first) = chars.next() {
        if first != '"' && first != '\'' {
            other.push(first);
            continue;
        }
        let has_escapes = other.ends_with('E');
        tokens.push(Token::Other(std::mem::take(&mut other)));
        let mut content = String::new();
        loop {
            match chars.next().expect("a quote has no end") {
                c if c == first && chars.peek() != Some(&first) => break,
                '\\' if first == '\'' && has_escapes => content.push(chars.next().expect("an escape has no end")),
                // The first of a doubled quote.
                c if c == first => content.extend(chars.next()),
                c => content.push(c),
            }
        }
        tokens.push(if first == '"' { Token::Identifier(content) } else { Token::Text(content) });
    }
    tokens.push(Token::Other(other));
    tokens
}

fn same_but_for_names(with: &str, plain: &[Token], name: &str, table: &str) {
    let with_tokens = tokens(with);
    assert_eq!(with_tokens.len(), plain.len(), "{with}");
    for (token, plain) in with_tokens.iter().zip(plain) {
        match (token, plain) {
            (Token::Identifier(own), Token::Identifier(plain)) if plain == "a" || plain == "b" => assert_eq!(own, name),
            (Token::Text(text), Token::Text(plain)) => assert_eq!(*text, plain.replace(r#""a"."b""#, table)),
            (token, plain) => assert_eq!(token, plain, "{with}"),
        }
    }
}

#[cfg(test)]
mod tests;
