//! The packet parser, the classifier and the rewriter behind it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nfqd_tests::fuzz::packet(data));
