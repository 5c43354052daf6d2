//! A logger and callbacks that panic now and then, as those of any program may. The judge looks for panics: of these
//! nobody hears, unless the library lets one through.

use std::panic;

use log::{LevelFilter, Log, Metadata, Record};
use rand::Rng;

/// Why they panic.
struct OnPurpose;

/// The same, and once more when it is thrown away.
struct OnPurposeTwice;

impl Drop for OnPurposeTwice {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic::panic_any(OnPurpose);
        }
    }
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What the library says, and not what it is made of says.
        metadata.target().starts_with("storage_lock")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            now_and_then();
        }
    }

    fn flush(&self) {}
}

/// From now on what this process logs may panic, and nobody says so.
pub fn begin() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !info.payload().is::<OnPurpose>() && !info.payload().is::<OnPurposeTwice>() {
            usual(info);
        }
    }));
    log::set_logger(&Logger).expect("the only logger");
    log::set_max_level(LevelFilter::Debug);
}

pub fn now_and_then() {
    match rand::rng().random_range(0..20) {
        0 => panic::panic_any(OnPurpose),
        1 => panic::panic_any(OnPurposeTwice),
        _ => {}
    }
}
