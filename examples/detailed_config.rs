//! Every option set: `scripts/with-postgres.sh cargo run --example detailed_config`

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use storage_lock::{LockOptions, PostgresStorage, PostgresStorageOptions, StorageLock};

mod support;

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let storage = PostgresStorage::new(
        PostgresStorageOptions::from_dsn(&support::dsn()?)
            .schema("public")
            .table_name("storage_lock_table")
            .create_table(true)
            .max_connections(4)
            .on_event(|event| println!("event: {event:?}")),
    )?;
    let lock = StorageLock::with_options(
        &storage,
        LockOptions::new("must-serial-operation-resource-foo")
            .lease_expire_after(Duration::from_secs(30))
            .lease_refresh_interval(Duration::from_secs(5))
            .version_miss_retry_times(3)
            .on_lost(|lost| eprintln!("{} lost {}: stop what it does", lost.owner_id(), lost.lock_id())),
    )?;

    let guard = lock.lock("worker-1")?;
    println!("{} holds {} as version {}", guard.owner_id(), guard.lock_id(), guard.version());
    println!("it may be trusted for {:?} without a further refresh", guard.remaining());
    println!("the table says: {:#?}", lock.info()?);
    println!("held now: {}", storage.list()?.iter().map(|held| held.lock_id.as_str()).collect::<Vec<_>>().join(", "));
    guard.unlock()?;
    Ok(())
}
