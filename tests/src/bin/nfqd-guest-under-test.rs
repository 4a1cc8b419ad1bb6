//! nfqd-guest, built with the tests that run it, so that they never run a stale one.

use std::process::ExitCode;

fn main() -> ExitCode {
    nfqd_guest::main()
}
