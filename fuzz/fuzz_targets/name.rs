//! Any bytes as a lock id, an owner id, a schema and a table.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| storage_lock::fuzz::check_name(&String::from_utf8_lossy(bytes)));
