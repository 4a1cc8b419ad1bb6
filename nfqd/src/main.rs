//! nfqd, see [`nfqd::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    nfqd::cli::main()
}
