//! A primary and its standby: the primary dies, the standby is promoted. Each test has a pair of its own.

use crate::support::server::Pair;
use crate::support::{Table, eventually};

#[test]
fn the_standby_has_what_was_committed_before_it_was_cut_off() {
    let mut pair = Pair::asynchronous();
    let table = Table::on(&pair.dsn);
    let guard = table.lock("l").lock("worker").unwrap();
    let mut reader = pair.standby.client();
    let mut version = || {
        let row = reader.query_opt(&format!("SELECT version FROM {}", table.name), &[]).ok()??;
        Some(row.get::<_, i64>(0))
    };
    eventually("the standby has the row", || version() == Some(1));
    pair.cut_off_standby();
    guard.unlock().unwrap();
    assert_eq!(table.lock("l").lock("worker").unwrap().version(), 2);
    pair.primary.kill();
    pair.promote();
    assert_eq!(table.storage().get("l").unwrap().unwrap().version, 1);
}
