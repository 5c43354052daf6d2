//! Data elsewhere, guarded by the version: `scripts/with-postgres.sh cargo run --example object_store`
//!
//! A process can be paused after it took the lock, and wake up when another one has it: no lock keeps its late write
//! away. Here the object does. It carries the version under which it was written, and a writer with a smaller one
//! gives up. The bucket is in memory, and does what S3 and its like do: metadata, an ETag, writes on condition of it.
//! An ETag of S3 may be a hash of the body alone: there, write the version into the body too, so that no two versions
//! have the same one.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use storage_lock::StorageLock;

mod support;

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let lock = StorageLock::connect("report-object", &support::dsn()?)?;
    let bucket = Bucket::default();

    // This is all that is left to a process that was paused for longer than its lease: the version that it had.
    // Nothing is paused here, and the lock is given back, so that nobody has to wait for the end of the lease.
    let guard = lock.lock("worker-1")?;
    let late = guard.version();
    guard.unlock()?;

    let guard = lock.lock("worker-2")?;
    println!("worker-2: {}", write(&bucket, "first report", guard.version()));
    println!("worker-1: {}", write(&bucket, "late report", late));
    println!("worker-2: {}", write(&bucket, "second report", guard.version()));
    guard.unlock()?;

    println!("there is: {:?}", bucket.get().map(|object| object.body));
    Ok(())
}

enum Outcome {
    Written { version: i64 },
    TooOld { version: i64, seen: i64 },
}

/// Writes, unless the object has a greater version. It may change between the look and the write: then it has another
/// ETag, and is looked at again.
fn write(bucket: &Bucket, body: &str, version: i64) -> Outcome {
    loop {
        let found = bucket.get();
        let seen = found.as_ref().map_or(0, |object| object.version);
        if seen > version {
            return Outcome::TooOld { version, seen };
        }
        if bucket.put_if_match(found.map(|object| object.etag), body, version) {
            return Outcome::Written { version };
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Written { version } => write!(f, "written as version {version}"),
            Outcome::TooOld { version, seen } => write!(f, "version {version} is too old: {seen} has been seen"),
        }
    }
}

/// One object, or none yet.
#[derive(Default)]
struct Bucket {
    object: Mutex<Option<Object>>,
}

#[derive(Clone)]
struct Object {
    body: String,
    etag: u64,
    /// S3 keeps such a thing as `x-amz-meta-version`.
    version: i64,
}

impl Bucket {
    /// `GET`: the object and its metadata.
    fn get(&self) -> Option<Object> {
        self.object.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `PUT` with `If-Match: etag`, or with `If-None-Match: *` if there was no object. False is 412 Precondition
    /// Failed.
    fn put_if_match(&self, etag: Option<u64>, body: &str, version: i64) -> bool {
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        if object.as_ref().map(|object| object.etag) != etag {
            return false;
        }
        *object = Some(Object { body: body.to_owned(), etag: etag.unwrap_or_default() + 1, version });
        true
    }
}
