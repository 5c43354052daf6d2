//! What the text of every statement must contain, and must not.

use uuid::Uuid;

use super::*;

#[test]
fn only_the_clock_judges_leases() {
    let sql = Sql::new("public", "storage_lock");
    for text in [
        &sql.acquire.text,
        &sql.create,
        &sql.refresh.text,
        &sql.release.text,
        &sql.hand_over.text,
        &sql.fence,
        &sql.unlock_in,
        &sql.get,
        &sql.list,
    ] {
        let text = text.to_lowercase();
        for start_of_transaction in ["now(", "current_timestamp", "transaction_timestamp", "statement_timestamp"] {
            assert!(!text.contains(start_of_transaction), "{text}");
        }
    }
}

/// Each text of a `LISTEN` is another statement for the server to remember.
#[test]
fn all_processes_listen_on_a_few_channels() {
    let listens = (0..1_000).map(|_| listen(Uuid::new_v4()).split(';').next().unwrap_or_default().to_owned());
    let texts: std::collections::HashSet<String> = listens.collect();
    assert!(texts.len() <= 16, "{} texts", texts.len());
}

/// Otherwise the statement's own limit ends it before the server says that somebody has locked what it needs.
#[test]
fn who_waits_for_a_lock_in_the_server_hears_of_that_first() {
    let millis = |name: &str| -> u32 {
        let value = SESSION_OPTIONS.split(&format!(" {name}=")).nth(1).expect(name);
        value.split(' ').next().unwrap_or_default().parse().expect(name)
    };
    assert!(millis("lock_timeout") + 500 <= millis("statement_timeout"));
}

/// The words and signs of `text`, without its literals and quoted names.
fn unquoted(text: &str) -> String {
    let (mut plain, mut quote) = (String::new(), None);
    for sign in text.chars() {
        match quote {
            None if sign == '\'' || sign == '"' => quote = Some(sign),
            None => plain.push(sign),
            Some(open) if sign == open => {
                quote = None;
                plain.push_str("quoted");
            }
            Some(_) => {}
        }
    }
    plain
}

/// The parts of a statement that depend on the search path: functions, operators and types that aren't qualified as
/// PostgreSQL's own.
fn unqualified(text: &str) -> Vec<String> {
    // Only syntax that stands for no operator. `IN`, `BETWEEN`, `nullif` and `CASE x WHEN` would.
    const SYNTAX: [&str; 27] = [
        "WITH",
        "AS",
        "MATERIALIZED",
        "SELECT",
        "FROM",
        "WHERE",
        "AND",
        "OR",
        "NOT",
        "IS",
        "NULL",
        "FOR",
        "KEY",
        "SHARE",
        "UPDATE",
        "SET",
        "EXISTS",
        "RETURNING",
        "ORDINALITY",
        "ROWS",
        "CASE",
        "WHEN",
        "THEN",
        "ELSE",
        "END",
        "coalesce",
        "least",
    ];
    let mut text = unquoted(text);
    // This `=` assigns. It is no operator.
    text = text.replace("SET released_at = ", "SET released_at ");
    let mut found = Vec::new();
    while let Some((before, rest)) = text.split_once("OPERATOR(pg_catalog.") {
        let (_, after) = rest.split_once(')').expect("its end");
        text = format!("{before} {after}");
    }
    let casts = text.split("::").skip(1).filter(|cast| !cast.starts_with("pg_catalog."));
    found.extend(casts.map(|cast| format!("::{cast}")));
    text = text.replace("::", " ");
    found.extend(text.chars().filter(|sign| "+-*/<>=~!@#%^&|`?".contains(*sign)).map(String::from));
    let is_word = |sign: char| sign.is_alphanumeric() || sign == '_' || sign == '.' || sign == '$';
    let mut before = "";
    for (at, word) in text.match_indices(is_word).map(|(at, _)| at).filter_map(|at| {
        let starts = at == 0 || !text[..at].ends_with(is_word);
        starts.then(|| (at, text[at..].split(|sign| !is_word(sign)).next().unwrap_or_default()))
    }) {
        let is_called = text[at + word.len()..].trim_start().starts_with('(');
        let is_syntax = SYNTAX.contains(&word);
        // After `AS` come the columns of an alias.
        if is_called && !is_syntax && before != "AS" && !word.starts_with("pg_catalog.") {
            found.push(format!("{word}()"));
        }
        if !is_syntax && word.chars().all(|sign| sign.is_ascii_uppercase()) {
            found.push(word.to_owned());
        }
        before = word;
    }
    found
}

/// These statements run with the search path of the caller's session.
#[test]
fn what_runs_in_the_callers_session_calls_nothing_but_postgresqls_own() {
    let sql = Sql::new("public", "storage_lock");
    for text in [&sql.fence, &sql.unlock_in, &sql.is_unlocked_in] {
        assert_eq!(unqualified(text), Vec::<String>::new(), "{text}");
    }
    for (text, is_found) in [
        ("SELECT clock_timestamp()", "clock_timestamp()"),
        ("SELECT count (a) FROM t", "count()"),
        ("SELECT a FROM t, unnest(b) WITH ORDINALITY AS c (d, e)", "unnest()"),
        ("SELECT public.f(a)", "public.f()"),
        ("SELECT a::uuid", "::uuid"),
        ("SELECT a WHERE a = b", "="),
        ("SELECT 'x' || a", "|"),
        ("SELECT a WHERE a IN (b)", "IN"),
        ("SELECT nullif(a, b)", "nullif()"),
        ("SELECT a OPERATOR(public.=) b", "OPERATOR()"),
    ] {
        assert!(unqualified(text).iter().any(|found| found.starts_with(is_found)), "{text}: {:?}", unqualified(text));
    }
}

#[test]
fn identifiers_are_quoted() {
    let sql = Sql::new("My \"Schema\"", "weird; 'name\\");
    assert_eq!(sql.table, r#""My ""Schema"""."weird; 'name\""#);
    assert!(sql.lock_creation.contains(r#"E'"My ""Schema"""."weird; ''name\\"'"#), "{}", sql.lock_creation);
}
