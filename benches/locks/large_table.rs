//! B7: whether it matters how many other locks the table knows.

use std::time::Duration;

use storage_lock::StorageLock;

use crate::context::Context;
use crate::figures::Section;
use crate::measure::{SLICE_HEADER, Slice, alternate, slice, slice_rows};
use crate::server::{Table, lock_and_unlock};
use crate::uncontended::{compared, ratios};

pub fn run(context: &Context) -> Section {
    let (rounds, length) = context.pick((20, Duration::from_millis(500)), (3, Duration::from_millis(100)));
    let (large, empty) = (Table::new(context), Table::new(context));
    let storages = [&large, &empty].map(Table::storage);
    fill(&large, context.pick(1_000_000, 20_000));
    let locks = storages.each_ref().map(|storage| StorageLock::new(storage, "ours").expect("make a lock"));
    let of = |lock: usize| slice(length, || lock_and_unlock(&locks[lock], "worker"));
    let pairs = alternate(rounds, || of(0), || of(1));
    context.write_csv("b7.csv", &SLICE_HEADER, slice_rows(&pairs, ["large table", "empty table"]));
    Section {
        figures: vec![compared("p50, ms", &pairs, Slice::p50).ratio_at_most(ratios(&pairs, Slice::p50), 1.3, 1.1)],
        notes: vec!["The yardstick is the same with a table of no other locks.".to_owned()],
        ..Section::default()
    }
}

/// Other locks, all of them free, left as autovacuum would leave them, and written out, so that no checkpoint runs
/// later.
fn fill(table: &Table, rows: i32) {
    let mut client = table.client();
    let insert = format!(
        "INSERT INTO {name} SELECT 'other-' || i, 1, 'worker-' || i, md5(i::text)::uuid, clock_timestamp(),
             clock_timestamp() + interval '30 s', clock_timestamp() FROM generate_series(1, $1::integer) AS i",
        name = table.name
    );
    client.execute(&insert, &[&rows]).expect("fill the table");
    client.batch_execute(&format!("VACUUM (ANALYZE) {}", table.name)).expect("vacuum the table");
    client.batch_execute("CHECKPOINT").expect("checkpoint");
}
