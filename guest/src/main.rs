//! The command writer inside a middlebox VM: one command in, the host's reply out.
//!
//! Exit codes: 0 accepted; 1 rejected, with the reason on standard error; 2 usage; 3 no device, or
//! the host did not take the command; 4 the host took it, but its reply cannot be parsed.

mod device;

use clap::Parser;
use device::Device;
use nfqd_shmctl::mailbox::guest::{SendError, send_command, send_message};
use nfqd_shmctl::{Region, Reply};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Asks the host of this VM for header filters and load balancing
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  nfqd-guest R F 12:13:14:15:16:17 10.129.126.15\n  nfqd-guest A 12:13:14:15:16:17 M 5 s 1:2:3:4:5:6 p 8\n  nfqd-guest -w '@X 12:13:14:15:16:17 F@'"
)]
struct Cli {
    /// Write a message into the mailbox as it is, marks included
    #[arg(
        short = 'w',
        value_name = "@COMMAND@",
        conflicts_with = "command",
        required_unless_present = "command"
    )]
    write: Option<String>,
    /// The ivshmem device
    #[arg(long, value_name = "auto|PCI-ADDRESS", default_value = "auto", conflicts_with = "shm")]
    device: Device,
    /// A region that is mapped already, instead of the device
    #[arg(long, value_name = "PATH")]
    shm: Option<PathBuf>,
    /// Seconds to wait until the host takes the command
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    timeout: Duration,
    /// The command and its words
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds =
        text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|time| *time <= Duration::from_secs(86400))
        .ok_or_else(|| "write a number of seconds, like 5 or 0.5".to_string())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let region = match open(&cli) {
        Ok(region) => region,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(3);
        }
    };
    let result = match &cli.write {
        Some(message) => send_message(&region, message, cli.timeout),
        None => send_command(&region, &cli.command.join(" "), cli.timeout),
    };
    match result {
        Ok(replies) => print(&replies),
        Err(error @ SendError::NotAMessage(_)) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
        // Neither rejected nor free to be sent again.
        Err(error @ SendError::NotAReply(_)) => {
            eprintln!("{error}");
            ExitCode::from(4)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(3)
        }
    }
}

/// Prints the replies, to standard error if any command was rejected.
fn print(replies: &[Reply]) -> ExitCode {
    let text: Vec<String> = replies.iter().map(Reply::to_string).collect();
    if replies.iter().all(Reply::is_ok) {
        println!("{}", text.join("\n"));
        ExitCode::SUCCESS
    } else {
        eprintln!("{}", text.join("\n"));
        ExitCode::FAILURE
    }
}

fn open(cli: &Cli) -> Result<Region, String> {
    let open = |path: &Path| Region::open(path).map_err(|error| error.to_string());
    match &cli.shm {
        Some(path) => open(path),
        None => open(&device::memory(&cli.device).map_err(|error| error.to_string())?),
    }
}
