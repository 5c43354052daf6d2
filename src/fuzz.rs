//! What has to be so whatever a caller gives as a DSN, an id or a name: for property tests here, and for the coverage-guided fuzzer in
//! `fuzz`, which includes this file. Nothing here panics unless something is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::sync::LazyLock;

use crate::error::{Error, Result};
use crate::options::{LockOptions, PostgresStorageOptions, check_id};
use crate::sql::Sql;

/// A password that nothing else has three characters in common with.
pub(crate) const SECRET: &str = "q7Zx9Vk2WmJ4";

/// A DSN is refused as such, or means what the client reads in it; nothing shows a piece of [`SECRET`], wherever it is in the DSN.
pub(crate) fn check_dsn(dsn: &str) {
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

/// A text is a lock id, an owner id, the name of a schema and of a table exactly if its length fits and it has no NUL; and as a
/// name it is that name in every statement, and nothing else.
pub(crate) fn check_name(text: &str) {
    let is_one = |longest: usize| (1..=longest).contains(&text.len()) && !text.contains('\0');
    is_refused_unless(is_one(255), "lock_id", LockOptions::new(text).check());
    is_refused_unless(is_one(255), "owner_id", check_id("owner_id", text));
    let options = || PostgresStorageOptions::from_dsn("host=h");
    is_refused_unless(is_one(63), "schema", options().schema(text).checked_config().map(drop));
    is_refused_unless(is_one(63), "table_name", options().table_name(text).checked_config().map(drop));
    if is_one(63) {
        static PLAIN: LazyLock<Vec<Vec<Token>>> =
            LazyLock::new(|| statements("a", "b").iter().map(|it| tokens(it)).collect());
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

/// Splits a statement as PostgreSQL does, as far as quotes are concerned.
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
                // One of two.
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
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;
    use proptest::test_runner::{Config, TestRunner};

    use super::*;

    /// What DSNs and SQL are made of.
    fn piece() -> impl Strategy<Value = String> {
        const WORDS: &str = "host hostaddr port user password dbname options application_name sslmode keepalives connect_timeout \
                             target_session_attrs postgresql:// postgres:// = ' \" \\ : @ / ? & , ; % %00 %40 %zz %ff [ ] [::1] \
                             127.0.0.1 localhost 5432 -1 0 99999999999999999999 require prefer \0 -- /* */ $1 $$ E' '' \"\" é 🔒";
        let pieces: Vec<&str> = WORDS.split(' ').chain([" ", "\n", "\t", SECRET]).collect();
        select(pieces).prop_map(str::to_owned)
    }

    fn run<S: Strategy>(cases: u32, strategy: &S, check: impl Fn(S::Value)) {
        let config = Config { cases, failure_persistence: None, ..Config::default() };
        TestRunner::new(config)
            .run(strategy, |value| {
                check(value);
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{error}"));
    }

    fn any_bytes() -> impl Strategy<Value = String> {
        vec(any::<u8>(), 0..300).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn pieces() -> impl Strategy<Value = String> {
        vec(piece(), 0..24).prop_map(|pieces| pieces.concat())
    }

    /// DSNs with the secret for a password.
    fn right_dsns() -> [String; 6] {
        [
            format!("host=db.example user=app password={SECRET} dbname=app"),
            format!("host=a,b port=1,2 user='the app' password='{SECRET}' connect_timeout=3"),
            format!("password = '{SECRET}' host = /run/postgresql user = app"),
            format!("postgresql://app:{SECRET}@db.example:5432/app?connect_timeout=3"),
            format!("postgres://app:{SECRET}@[::1]:5432,b/app"),
            format!("postgresql:///app?host=/run/postgresql&user=app&password={SECRET}"),
        ]
    }

    /// Every sequence of one and two bytes that is UTF-8.
    fn short_texts() -> impl Iterator<Item = String> {
        let one = (0..=255).map(|byte| vec![byte]);
        let two = (0..=65_535_u16).map(|bytes| bytes.to_be_bytes().to_vec());
        one.chain(two).filter_map(|bytes| String::from_utf8(bytes).ok())
    }

    #[test]
    fn every_dsn_of_one_or_two_bytes_is_refused_and_not_shown() {
        for dsn in short_texts() {
            check_dsn(&dsn);
            assert!(PostgresStorageOptions::from_dsn(&dsn).checked_config().is_err(), "{dsn:?}");
        }
    }

    #[test]
    fn a_dsn_with_one_wrong_character_anywhere_shows_nothing_of_its_password() {
        let texts: Vec<String> =
            (0..=127_u8).map(|byte| char::from(byte).to_string()).chain(["é".to_owned()]).collect();
        for dsn in right_dsns() {
            PostgresStorageOptions::from_dsn(&dsn).checked_config().expect("a right one");
            for at in 0..=dsn.len() {
                let (before, after) = dsn.split_at(at);
                let rest = after.get(1..).unwrap_or_default();
                check_dsn(&format!("{before}{rest}"));
                for text in &texts {
                    check_dsn(&format!("{before}{text}{after}"));
                    check_dsn(&format!("{before}{text}{rest}"));
                }
            }
        }
    }

    /// Whatever of it ends the password early lands in the host, the database or an option.
    #[test]
    fn a_password_with_what_a_url_has_to_encode_lands_nowhere_else() {
        let [first, second] = [SECRET.get(..6).unwrap(), SECRET.get(6..).unwrap()];
        for special in
            ["@", "/", "?", "#", "%", ":", "@/", "/@", "@t/", "?@", "@?", "#@/", "%@", "@t:1/", "@t?a=", ",@"]
        {
            for scheme in ["postgresql", "postgres"] {
                for tail in ["@db.example/app", "@db.example:5432/app?connect_timeout=3", "@[::1],b/app"] {
                    let dsn = format!("{scheme}://app:{first}{special}{second}{tail}");
                    let options = PostgresStorageOptions::from_dsn(&dsn);
                    shows_no_secret(&dsn, &format!("{options:?}"));
                    match options.checked_config() {
                        Ok(config) => {
                            let elsewhere = (config.get_hosts(), config.get_user(), config.get_dbname());
                            shows_no_secret(&dsn, &format!("{elsewhere:?} {:?}", config.get_options()));
                        }
                        Err(error) => shows_no_secret(&dsn, &format!("{error} {error:?}")),
                    }
                }
            }
        }
    }

    #[test]
    fn no_dsn_shows_a_piece_of_its_password_however_garbled_it_is() {
        let change = (any::<prop::sample::Index>(), 0..3_usize, prop_oneof![piece(), any_bytes()]);
        let garbled = (select(right_dsns().to_vec()), vec(change, 1..6)).prop_map(|(dsn, changes)| {
            let mut dsn: Vec<char> = dsn.chars().collect();
            for (at, removed, inserted) in changes {
                let at = at.index(dsn.len() + 1);
                let end = (at + removed).min(dsn.len());
                dsn.splice(at..end, inserted.chars());
            }
            dsn.into_iter().collect::<String>()
        });
        run(4_000, &garbled, |dsn| check_dsn(&dsn));
        run(4_000, &pieces(), |dsn| check_dsn(&dsn));
        run(4_000, &any_bytes(), |dsn| check_dsn(&dsn));
    }

    #[test]
    fn every_text_of_one_or_two_bytes_is_a_name_and_nothing_else_in_sql() {
        short_texts().for_each(|text| check_name(&text));
    }

    #[test]
    fn any_text_is_a_name_and_nothing_else_in_sql_or_refused() {
        run(1_000, &pieces(), |text| check_name(&text));
        run(1_000, &any_bytes(), |text| check_name(&text));
    }
}
