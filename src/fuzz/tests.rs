//! The checks on texts that are enumerated or drawn at random.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use super::*;

/// A piece of what DSNs and SQL are made of.
fn piece() -> impl Strategy<Value = String> {
    const WORDS: &str = "host hostaddr port user password dbname options application_name sslmode keepalives \
                         connect_timeout target_session_attrs postgresql:// postgres:// = ' \" \\ : @ / ? & , ; % %00 \
                         %40 %zz %ff [ ] [::1] 127.0.0.1 localhost 5432 -1 0 99999999999999999999 require prefer \0 \
                         -- /* */ $1 $$ E' '' \"\" é 🔒";
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

/// Valid DSNs with the secret as their password.
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

/// Every sequence of one or two bytes that is valid UTF-8.
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
    let texts: Vec<String> = (0..=127_u8).map(|byte| char::from(byte).to_string()).chain(["é".to_owned()]).collect();
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

/// If a character ends the password early, the rest lands in the host, the database or an option.
#[test]
fn a_password_with_what_a_url_has_to_encode_lands_nowhere_else() {
    let [first, second] = [SECRET.get(..6).unwrap(), SECRET.get(6..).unwrap()];
    for special in ["@", "/", "?", "#", "%", ":", "@/", "/@", "@t/", "?@", "@?", "#@/", "%@", "@t:1/", "@t?a=", ",@"] {
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
