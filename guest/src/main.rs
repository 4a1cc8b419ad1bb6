//! The program `nfqd-guest`.

use std::process::ExitCode;

fn main() -> ExitCode {
    nfqd_guest::main()
}
