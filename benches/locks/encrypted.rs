//! B10: what TLS costs a lock and unlock while nobody else wants the lock.

use std::time::Duration;

use storage_lock::StorageLock;

use crate::context::Context;
use crate::figures::Section;
use crate::measure::{SLICE_HEADER, Slice, alternate, slice, slice_rows};
use crate::server::{Table, lock_and_unlock};
use crate::uncontended::{compared, ratios};

pub fn run(context: &Context) -> Section {
    let table = Table::new(context);
    let has_tls: String = table.client().query_one("SHOW ssl", &[]).expect("ask the server").get(0);
    if has_tls != "on" || !cfg!(feature = "tls") {
        return Section {
            notes: vec!["Not run: it needs a server that takes TLS, and the feature `tls`.".to_owned()],
            ..Section::default()
        };
    }
    let (rounds, length) = context.pick((20, Duration::from_millis(500)), (3, Duration::from_millis(100)));
    let lock = |storage, lock_id: &str| StorageLock::new(storage, lock_id).expect("make a lock");
    let (encrypted, plain) =
        (lock(&table.storage_with("sslmode=require"), "encrypted"), lock(&table.storage(), "plain"));
    let pairs = alternate(
        rounds,
        || slice(length, || lock_and_unlock(&encrypted, "worker")),
        || slice(length, || lock_and_unlock(&plain, "worker")),
    );
    context.write_csv("b10.csv", &SLICE_HEADER, slice_rows(&pairs, ["with TLS", "without"]));
    Section {
        figures: vec![compared("p50, ms", &pairs, Slice::p50).ratio(ratios(&pairs, Slice::p50))],
        notes: vec!["The yardstick is the library without TLS, on the same server.".to_owned()],
        ..Section::default()
    }
}
