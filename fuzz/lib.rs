//! The files of the library that read what a caller gives. They are taken from its sources: they aren't public, and what is public
//! would connect to whatever it reads. Some come along because those use them.

#[allow(dead_code)]
#[path = "../src/answer.rs"]
mod answer;
#[allow(dead_code)]
#[path = "../src/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../src/events.rs"]
mod events;
#[path = "../src/fuzz.rs"]
mod fuzz;
#[allow(dead_code)]
#[path = "../src/hold.rs"]
mod hold;
#[allow(dead_code)]
#[path = "../src/loss.rs"]
mod loss;
#[allow(dead_code)]
#[path = "../src/options.rs"]
mod options;
#[allow(dead_code)]
#[path = "../src/sql.rs"]
mod sql;
#[allow(dead_code, unused_imports)]
#[path = "../src/sync.rs"]
mod sync;
#[allow(dead_code)]
#[path = "../src/term.rs"]
mod term;
#[allow(dead_code)]
#[path = "../src/user_code.rs"]
mod user_code;
#[allow(dead_code)]
#[path = "../src/wait.rs"]
mod wait;

/// Any bytes as a DSN. 1 stands for the password that must not be shown.
pub fn dsn(bytes: &[u8]) {
    fuzz::check_dsn(&String::from_utf8_lossy(bytes).replace('\u{1}', fuzz::SECRET));
}

/// Any bytes as a lock id, an owner id, a schema and a table.
pub fn name(bytes: &[u8]) {
    fuzz::check_name(&String::from_utf8_lossy(bytes));
}
