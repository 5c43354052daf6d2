//! A blocking, thread-based distributed lock, kept in a PostgreSQL table.

mod connections;
mod error;
mod follow_up;
mod guard;
mod hold;
mod lock;
mod options;
mod refresh;
mod session;
mod sql;
mod storage;
mod stragglers;
mod term;
mod wait;
mod workers;

pub use error::{Error, Result};
pub use guard::LockGuard;
pub use lock::StorageLock;
pub use options::{LockOptions, PostgresStorageOptions};
pub use session::LockInformation;
pub use storage::PostgresStorage;
