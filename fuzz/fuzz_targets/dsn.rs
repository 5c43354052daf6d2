#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| storage_lock_fuzz::dsn(bytes));
