//! The command line of nfqd.
//!
//! Exit codes: 0 done; 1 the input is wrong; 2 usage; 3 the system refuses.

use clap::{Args, Parser, Subcommand};
use nfqd::config::{DEFAULT_CONTROL, Options, QueueRange, SteerChoice};
use nfqd::daemon::{Daemon, StartError};
use nfqd::{replay, state, status};
use nfqd_rules::Policy;
use nfqd_rules::nft::kernel::Kernel;
use nfqd_rules::nft::model::Queues;
use nfqd_rules::nft::ruleset::{self, FastPath, Steer};
use nfqd_rules::slots::{Seen, Slots};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Enforces on a KVM host's bridge what its middlebox VMs ask for: header filters and DNAT-style load balancing.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Job>,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Job {
    /// Run the daemon, as without a subcommand
    Run(Options),
    /// Parse commands and print each error as FILE:LINE:COLUMN: message
    Check {
        /// Commands, one a line, # comments
        file: PathBuf,
    },
    /// Print the nftables ruleset that would be loaded; needs no root
    Rules(RulesArguments),
    /// Run a pcap or pcapng capture through the decision, without root or kernel
    Replay {
        /// The capture, of Ethernet frames
        capture: PathBuf,
        /// The commands that make the policy
        #[arg(long, value_name = "FILE")]
        commands: PathBuf,
        /// One JSON object a packet
        #[arg(long)]
        json: bool,
        /// Write the frames as they leave
        #[arg(long, value_name = "OUT")]
        write: Option<PathBuf>,
    },
    /// Ask the running daemon
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Where the daemon listens
        #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL)]
        control: PathBuf,
    },
    /// Remove the ruleset that a daemon left
    Flush,
}

#[derive(Args)]
struct RulesArguments {
    /// The commands that make the policy
    #[arg(long, value_name = "FILE")]
    commands: Option<PathBuf>,
    /// NFQUEUE numbers
    #[arg(long, value_name = "N|N-M", default_value = "0-3")]
    queue: QueueRange,
    /// How frames get into the queue; auto means native here
    #[arg(long, default_value = "auto")]
    steer: SteerChoice,
}

/// Why nfqd ends without having done its job.
enum Failure {
    Input(String),
    System(String),
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Failure {
        if error.is_input() { Failure::Input(error.to_string()) } else { Failure::System(error.to_string()) }
    }
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let cli = Cli::parse();
    let result = match cli.command {
        None => run(&cli.options),
        Some(Job::Run(options)) => run(&options),
        Some(Job::Check { file }) => check(&file),
        Some(Job::Rules(arguments)) => rules(&arguments),
        Some(Job::Replay { capture, commands, json, write }) => {
            replay(&capture, &commands, json, write.as_deref())
        }
        Some(Job::Status { json, control }) => status(&control, json),
        Some(Job::Flush) => flush(),
    };
    let (code, message) = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Input(message)) => (1, message),
        Err(Failure::System(message)) => (3, message),
    };
    for line in message.lines() {
        eprintln!("{line}");
    }
    ExitCode::from(code)
}

fn run(options: &Options) -> Result<(), Failure> {
    Ok(Daemon::start(options)?.run()?)
}

/// The policy of a file of commands; every error of it, a line each.
fn read_policy(path: &Path) -> Result<Policy, Failure> {
    let text = std::fs::read(path).map_err(|error| Failure::Input(format!("{}: {error}", path.display())))?;
    let text = String::from_utf8_lossy(&text);
    let mut policy = Policy::default();
    let errors = state::apply_file(&mut policy, path, &text, |_, _| false);
    if errors.is_empty() { Ok(policy) } else { Err(Failure::Input(errors.join("\n"))) }
}

/// What is wrong is what this job is to print: it goes to standard output.
fn check(file: &Path) -> Result<(), Failure> {
    match read_policy(file) {
        Err(Failure::Input(errors)) => {
            print(|out| writeln!(out, "{errors}"))?;
            Err(Failure::Input(String::new()))
        }
        other => other.map(drop),
    }
}

fn rules(arguments: &RulesArguments) -> Result<(), Failure> {
    let policy = arguments.commands.as_deref().map(read_policy).transpose()?.unwrap_or_default();
    let mut slots = Slots::default();
    slots.follow(&policy, |_, _, _, _| Seen::NOTHING, Instant::now());
    let queues = Queues { first: arguments.queue.first, count: arguments.queue.count, bypass: true };
    let steer = match arguments.steer {
        SteerChoice::BrNetfilter => Steer::BrNetfilter,
        SteerChoice::Auto | SteerChoice::Native => Steer::Native,
    };
    let options = ruleset::Options { steer, fast_path: FastPath::Full, queues };
    let tables = ruleset::build(&policy, &slots, &options);
    let text: String = tables.values().map(ToString::to_string).collect();
    print(|out| out.write_all(text.as_bytes()))
}

fn replay(capture: &Path, commands: &Path, json: bool, write: Option<&Path>) -> Result<(), Failure> {
    let policy = read_policy(commands)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let result = replay::replay(capture, &policy, json, write, &mut out);
    let flushed = out.flush();
    match result {
        Err(replay::ReplayError::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::Input(error.to_string())),
        Ok(()) => print(|_| flushed),
    }
}

fn status(control: &Path, json: bool) -> Result<(), Failure> {
    let status = status::ask(control).map_err(|error| {
        Failure::System(format!(
            "{}: {error}; no nfqd answers here: is it running, and is this its --control?",
            control.display()
        ))
    })?;
    let text = if json {
        serde_json::to_string_pretty(&status).map(|text| text + "\n").unwrap_or_default()
    } else {
        status.text()
    };
    print(|out| out.write_all(text.as_bytes()))
}

fn flush() -> Result<(), Failure> {
    let removed = Kernel::open().and_then(|mut kernel| kernel.remove());
    match removed.map_err(|error| Failure::System(error.to_string()))? {
        true => println!("removed the tables of nfqd"),
        false => println!("there were no tables of nfqd"),
    }
    Ok(())
}

/// Writes to standard output; that nobody reads it is no failure.
fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    match write(&mut io::stdout().lock()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::System(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}
