//! Any bytes as a DSN. 1 stands for the password that must not be shown.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    storage_lock::fuzz::check_dsn(&String::from_utf8_lossy(bytes).replace('\u{1}', storage_lock::fuzz::SECRET));
});
