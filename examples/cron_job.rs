//! A job that many machines start and one does: `scripts/with-postgres.sh cargo run --example cron_job`
//!
//! When another one has the lock it says who, and ends with code 0.

use std::error::Error;
use std::process::ExitCode;

use storage_lock::StorageLock;

mod support;

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let lock = StorageLock::connect("nightly-report", &support::dsn()?)?;
    let Some(guard) = lock.try_lock(&format!("process {}", std::process::id()))? else {
        match lock.info()? {
            Some(info) => println!("{} has the lock: nothing to do", info.owner_id),
            None => println!("somebody has the lock: nothing to do"),
        }
        return Ok(());
    };
    println!("{} does the job", guard.owner_id());
    for part in 1..=3 {
        // A job in parts looks between them whether it may still trust its hold.
        if !guard.is_held() {
            return Err("lost the lock: somebody else may be at it".into());
        }
        println!("part {part} done");
    }
    guard.unlock()?;
    Ok(())
}
