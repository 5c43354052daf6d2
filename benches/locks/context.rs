//! What every benchmark is given: the server, how long to take, and where to put files.

use std::fs;
use std::path::PathBuf;
use std::thread;

use postgres::{Client, NoTls};

pub struct Context {
    pub dsn: String,
    pub is_short: bool,
    pub cores: usize,
    pub server_version: String,
    out: Option<PathBuf>,
}

impl Context {
    pub fn new(dsn: String, is_short: bool, out: Option<PathBuf>) -> Result<Context, String> {
        let mut client =
            Client::connect(&dsn, NoTls).map_err(|error| format!("STORAGE_LOCK_POSTGRESQL_DSN: {}", chain(&error)))?;
        let row = client.query_one("SHOW server_version", &[]).map_err(|error| chain(&error))?;
        if let Some(folder) = &out {
            fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Ok(Context { dsn, is_short, cores, server_version: row.get(0), out })
    }

    /// One of two, by the kind of the run.
    pub fn pick<T>(&self, full: T, short: T) -> T {
        if self.is_short { short } else { full }
    }

    /// Where a file goes, if files are wanted.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        self.out.as_ref().map(|folder| folder.join(name))
    }

    /// Writes a CSV file, if files are wanted.
    pub fn write_csv(&self, name: &str, header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
        let Some(path) = self.file(name) else { return };
        let mut writer = csv::Writer::from_path(&path).expect("open a CSV file");
        writer.write_record(header).expect("write CSV");
        rows.into_iter().for_each(|row| writer.write_record(row).expect("write CSV"));
        writer.flush().expect("write CSV");
    }
}

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
