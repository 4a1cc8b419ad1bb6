//! The command parser and the policy behind it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nfqd_tests::fuzz::command(data));
