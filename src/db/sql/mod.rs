//! All SQL of the library: the table, and one statement for each operation. These statements are the lock's protocol.
//!
//! The folder uses only `std`, `postgres`, `uuid` and its own files: `benches/locks` compiles it, too. Nothing here
//! does I/O. `db::session` runs the statements, and `db::answer` says what their answers mean.
//!
//! # The row
//!
//! Each lock has one row, which is never deleted. The row's version is part of its key. The backward scan of the
//! primary key therefore meets the newest version first, even while an old snapshot elsewhere keeps all the dead
//! ones.
//!
//! Only `clock_timestamp()` judges a lease. `now()` is the start of the transaction, which may lie before a wait.
//!
//! Who locks the row, and what happens if another transaction has locked it in a way that conflicts:
//!
//! | statement | its lock | behind another lock |
//! | --- | --- | --- |
//! | acquire, hand-over | `FOR UPDATE`: it moves the key | skips the row (`SKIP LOCKED`) |
//! | registration (a part of acquire) | of an update that keeps the key | waits, 100 ms at most |
//! | refresh, release, withdraw | of an update that keeps the key | wait, 250 ms at most |
//! | fence | `FOR KEY SHARE`: it conflicts only with a move of the key | waits, as the caller's session says |
//! | unlock in | that of a fence, then of an update that keeps the key | waits, as the caller's session says |
//!
//! # Acquire
//!
//! An acquire is a compare-and-set that moves the key. It finds the newest row, locks that row if the lock is free, and
//! gives it the next version. If the lock is busy, an acquire without registration writes nothing.
//!
//! ```text
//! A and B acquire a lock that is free in version 7:
//! 1.  Both statements take their snapshots: version 7, free.
//! 2.  A locks the row, and writes version 8.
//! 3a. B reaches the row before A commits. B skips the locked row: a miss.
//! 3b. Or B reaches the row after that. B re-reads it, finds that the version has moved, and takes nothing: a miss.
//! ```
//!
//! With `SKIP LOCKED` no acquirer queues in the server behind another one, or behind a transaction that locked the row.
//! Measured on PostgreSQL 15, it costs 30 µs of an acquire of 450 µs.
//!
//! The *first hold* inserts the row. An advisory lock keeps creators apart. They try that lock, and don't wait for
//! it: if another creator has it, that is a miss. A statement of its own takes it, so that the insert's snapshot is
//! younger. That needs READ COMMITTED, whatever the default is.
//!
//! ```text
//! S and B find no row, and create the lock:
//! 1. S stalls before it has the advisory lock.
//! 2. B creates version 1, and releases it. Others move the row on, to version 3.
//! 3. S wakes, and gets the advisory lock.
//! 4. A snapshot from before step 2 shows S no row, and version 1 is a free key: S would insert it a second time.
//! 5. The insert has its own, younger snapshot. S sees the row, and inserts nothing: a miss.
//! ```
//!
//! # Refresh, release, hand-over
//!
//! **Refresh** and **release** name the row by lock, version and lease id, touch no key column, and are idempotent. A
//! repeated release keeps the time of the first one, so that a lost answer is not taken for a lost lease.
//!
//! ```text
//! A's lease ends while A refreshes it and B acquires:
//! 1.  A's statement sees a lease that still runs. B's statement sees a lease that is over.
//! 2a. A locks the row first. B skips it, or re-reads it and finds a longer lease: a miss.
//! 2b. Or B locks the row first. A waits, re-reads it, finds another version, and updates nothing: A's hold is lost.
//! ```
//!
//! **Hand-over** is a release and the next acquire in one statement, for two threads of one process.
//!
//! A granted lease must survive a crash of the server. Every statement that grants or extends a lease therefore turns
//! `synchronous_commit` on where it is off. A release may be lost in a crash: then the lease has to run out. So a
//! release commits without waiting for the disk.
//!
//! # The wait queue of processes
//!
//! The row's `waiters` lists the waiting processes, in the order in which they came, by the random id of their storage.
//! A waiting process that acquires a busy lock adds itself by the same statement: the *registration*.
//! Registration and release update the same row, so that the later one sees the earlier one.
//!
//! Unlike an acquire, a registration waits for a locked row, though not for long. Where a lock is handed over all the
//! time, somebody who is about to commit always has the row locked.
//!
//! ```text
//! A releases while B registers:
//! 1.  B's statement takes its snapshot: A holds the lock.
//! 2.  A's release commits. It notifies the waiters of the row as A saw it: without B.
//! 3.  B's registration waited for A. It re-reads the row, which is now released.
//! 4a. Nobody else waits. B may take the lock, adds nothing, and asks again: a miss.
//! 4b. Or others wait. The lock is promised to the first of them, and B adds itself behind them.
//! 5.  Nobody notifies B of that release. B must sleep by the row that it wrote, and not by its older snapshot.
//! ```
//!
//! A **free** lock (released, or with its lease over) is promised to the first process in the row for [`GRACE`]. The
//! promise counts from the moment at which the lock became free. A moment that the clock has yet to reach doesn't
//! count, as the database's clock may have been set back.
//!
//! After the promise, a waiter behind others takes the lock in two steps. First it notifies those before it, and
//! learns the version. It gives them [`STEP`] each ([`LONGEST_STEPS`] in all at most) and 50 ms more. Then it takes
//! the lock, if the lock is still free in that version, and removes those before it from the row.
//!
//! ```text
//! The lease of A, a dead holder, ends at T, in version 7. The row lists D, dead, and then B:
//! 1.  T: the lock is free, and promised to D.
//! 2.  T + GRACE: B's acquire takes nothing. It notifies D, and answers "free, in version 7".
//! 3.  STEP + 50 ms later B acquires again, and says "those before me are notified of version 7".
//! 4a. The lock is still free in version 7. B takes it as version 8, and D leaves the row.
//! 4b. Or D lives, and has taken and released the lock meanwhile. The version is 8: B takes nothing.
//! ```
//!
//! So dead processes cost the others a moment, once, however many they are. A live one is removed from the row only
//! if it is too slow to come in that time.
//!
//! A **release** notifies the first two waiters and the last one, however many there are. The first takes the lock.
//! The second looks after [`GRACE`]: its notification carries the version, as the first has been notified too. The
//! last looks [`STEP`] later for each process between them ([`LONGEST_STEPS`] at most): of many, the last is the
//! likeliest to be alive. Nothing depends on a notification. Each waiter looks by itself from time to time
//! (`Busy::sleep`).
//!
//! # Late copies
//!
//! A delayed copy of an acquire must not take the lock after its caller has gone. A claim is sent again only after an
//! answer that it took nothing. Its statement does nothing after an instant of the database's clock, so that the
//! clean-up (`storage::clean_up`) knows when to stop.
//!
//! ```text
//! A gives up an acquire that is stuck in the network:
//! 1.  The clean-up releases what A's lease id holds: nothing yet.
//! 2a. The statement arrives in time, and takes the lock. The clean-up looks again, and releases it.
//! 2b. Or the statement arrives later, and does nothing.
//! 2c. Or it looked at the clock in time, and has yet to commit. It still keeps the row locked (of a first hold, the
//!     advisory lock), which `is_settled` sees. The clean-up looks again.
//! ```
//!
//! # In the caller's transaction
//!
//! A **fence** locks the row in the caller's transaction, against a move of the key and nothing else (`FOR KEY SHARE`).
//! Acquirers skip the row as they skip each other. Refreshes and releases go on. A fence compares the lease id, too: a
//! version may come twice where commits were lost.
//!
//! A fence waits for an acquire that has the row locked. That may be one that takes the lock, or one that came too
//! late:
//!
//! ```text
//! A and B race for a lock. A wins, and fences a transaction:
//! 1. A commits version 8.
//! 2. B follows the row to version 8, locks it, finds that the version has moved, and takes nothing.
//! 3. B keeps A's row locked until B's transaction has ended, with nothing to commit.
//! 4. A's fence waits for the end of step 3.
//! ```
//!
//! **Unlock in** is a release in the caller's transaction. It leaves the transaction's settings alone. It is fenced
//! first, as a plain update would take B's hold away:
//!
//! ```text
//! A's lease is over. A releases in a transaction while B takes the lock over:
//! 1. B has the row locked. A's update would wait for B.
//! 2. B commits. The update would follow the row to B's version, lock it, and find nothing to change.
//! 3. B's row would stay locked until A's transaction ends. B couldn't refresh its lease.
//! 4. A fence follows the row, too, but with a lock that refreshes don't wait for. It finds no hold of A's, and the
//!    update never begins.
//! ```
//!
//! # Poolers
//!
//! A prepared statement does nothing unless it passes the *backend check*: one parameter must name the backend that it
//! runs in, and the statement's own name and table. That is a guard against poolers, see `db::session`. Behind a
//! pooler, where nothing is prepared, the parameter is NULL, and passes.
//!
//! # The version check
//!
//! The version check ([`version_check`]) is for those who write data under a lock. The library itself never uses it. It
//! remembers the greatest version in a table of its own, because the data may be in a database without our table.

mod acquire;
mod conditions;
mod fence;
mod hold;
mod session;
mod table;
mod version_check;

use std::time::Duration;

use postgres::types::Type;

pub(crate) use self::session::{READS_ALL, SERVER_TIME, SESSION, SESSION_OPTIONS, listen};
pub(crate) use self::table::{COLUMNS, INSPECT};

/// For how long a free lock is promised to the first of the waiting processes.
pub(crate) const GRACE: Duration = Duration::from_millis(100);
/// How much later each further waiter looks than the one before it.
pub(crate) const STEP: Duration = Duration::from_millis(10);
/// The limit of all those steps together, where a waiter waits for them.
pub(crate) const LONGEST_STEPS: Duration = Duration::from_secs(1);
/// How many processes a row has room for. Others look from time to time.
pub(crate) const MAX_WAITERS: u32 = 1_000;
/// For how long the statement of a claim may take effect after its caller's deadline. The server's clock judges that,
/// and this process knows that clock only as of the last answer.
pub(crate) const CLAIM_LIFE: Duration = Duration::from_secs(20);

/// The statements for one table. The function that makes a statement describes its parameters. `db::session` binds
/// them.
#[derive(Debug)]
pub(crate) struct Sql {
    /// The table with its schema, quoted.
    pub(crate) table: String,
    pub(crate) create_table: String,
    pub(crate) acquire: Prepared,
    pub(crate) lock_creation: String,
    pub(crate) create: String,
    pub(crate) is_settled: String,
    pub(crate) refresh: Prepared,
    pub(crate) release: Prepared,
    pub(crate) hand_over: Prepared,
    pub(crate) withdraw: Prepared,
    pub(crate) fence: String,
    pub(crate) unlock_in: String,
    pub(crate) is_unlocked_in: String,
    pub(crate) get: String,
    pub(crate) list: String,
    pub(crate) version_check: String,
    pub(crate) create_version_check: String,
}

/// A statement that runs often, and so is prepared once on each connection.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) text: String,
    /// The same statement without notifications, for a server whose queue of notifications is full.
    pub(crate) silent: String,
    /// The operation and the table. The parameter for the backend check has to say this, after the number of the
    /// backend.
    pub(crate) name: String,
    /// The types of the parameters.
    pub(crate) types: &'static [Type],
}

impl Prepared {
    /// Makes a statement. `text` gets the backend check as SQL, which compares `parameter`. A NULL passes the check.
    fn new(
        operation: &str,
        table: &str,
        types: &'static [Type],
        parameter: &str,
        text: impl FnOnce(&str) -> String,
    ) -> Prepared {
        let name = format!("{operation} {table}");
        let expected = format!("pg_backend_pid() || {}", literal(&format!(" {name}")));
        let text = text(&format!("coalesce({parameter}::text, {expected}) = {expected}"));
        // `concat` takes the same arguments as `pg_notify`, and sends nothing.
        let silent = text.replace("pg_catalog.pg_notify(", "pg_catalog.concat(");
        Prepared { text, silent, name, types }
    }
}

impl Sql {
    pub(crate) fn new(schema: &str, table_name: &str) -> Sql {
        let table = format!("{}.{}", quote(schema), quote(table_name));
        Sql {
            create_table: table::create(&table),
            acquire: acquire::acquire(&table),
            lock_creation: acquire::lock_creation(&table),
            create: acquire::create(&table),
            is_settled: acquire::is_settled(&table),
            refresh: hold::refresh(&table),
            release: hold::release(&table),
            hand_over: hold::hand_over(&table),
            withdraw: hold::withdraw(&table),
            fence: fence::fence(&table),
            unlock_in: fence::unlock_in(&table),
            is_unlocked_in: fence::is_unlocked_in(&table),
            get: table::get(&table),
            list: table::list(&table),
            version_check: version_check::version_check(schema),
            create_version_check: version_check::create(schema),
            table,
        }
    }
}

/// Quotes an identifier. Any characters but NUL are fine.
pub(crate) fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

/// Quotes a string as a literal that means the same whatever `standard_conforming_strings` is.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// Quotes the body of a function, even one that contains a name that looks like the end of such a literal.
fn dollar_quoted(text: &str) -> String {
    let mut tag = "$body$".to_owned();
    while text.contains(&tag) {
        tag.insert(1, '_');
    }
    format!("{tag}{text}{tag}")
}

#[cfg(test)]
mod tests;
