//! The host's end of the rings, with a guest that writes anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nfqd_tests::fuzz::ring(data));
