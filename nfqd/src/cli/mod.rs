//! The command line of nfqd: its subcommands, and what they print.
//!
//! Exit codes: 0 done; 1 the input is wrong; 2 usage; 3 system error.

mod explain;
mod observe;
mod report;
pub mod status;
mod top;
mod trace;

use crate::api::{Answer, Request};
use crate::command_path::command_file::{CommandFileError, read_commands};
use crate::config::{
    DEFAULT_CONTROL, DEFAULT_OBSERVE, DaemonArgs, LEGACY_CONTROL, QueueRange, SteerChoice,
};
use crate::daemon::Daemon;
use crate::host_lock::HostLock;
use crate::startup::StartError;
use crate::{api, doctor, holder, hook, replay, serve};
use clap::{Args, CommandFactory, Parser, Subcommand};
use nfqd_rules::nft::build;
use nfqd_rules::nft::kernel::Kernel;
use nfqd_rules::nft::model::Queues;
use nfqd_rules::nft::options::{FastPath, QueuePath, RulesetOptions};
use nfqd_rules::slots::Unobserved;
use std::io::{self, BufWriter, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Enforces header filters and DNAT-style load balancing for middlebox VMs on the bridges of a KVM
/// host
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Job>,
    #[command(flatten)]
    args: DaemonArgs,
}

#[derive(Subcommand)]
enum Job {
    /// Run the daemon, as without a subcommand
    Run(DaemonArgs),
    /// Parse commands and print each error as FILE:LINE:COLUMN: message
    Check {
        /// Commands, one per line, # comments
        file: PathBuf,
    },
    /// Print the nftables ruleset that would be loaded; needs no root
    Rules(RulesArgs),
    /// Run a pcap or pcapng capture through the engine, without root or kernel
    Replay {
        /// The capture, of Ethernet frames
        capture: PathBuf,
        /// The commands that make the policy
        #[arg(long, value_name = "FILE")]
        commands: PathBuf,
        /// Print one JSON object per packet
        #[arg(long)]
        json: bool,
        /// Write the frames as they leave
        #[arg(long, value_name = "OUT")]
        write: Option<PathBuf>,
    },
    /// Show the state of the running daemon
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print the first line only
        #[arg(long, conflicts_with = "json")]
        brief: bool,
        /// Wait up to this many seconds for the status to be OK
        #[arg(long, value_name = "SECONDS", default_value_t = 0)]
        wait: u64,
        /// A socket of the daemon
        #[arg(long, visible_alias = "control", value_name = "PATH", default_value = DEFAULT_OBSERVE)]
        socket: PathBuf,
    },
    /// Show what would happen to a packet now, and why
    Trace(trace::TraceArgs),
    /// Show the engine's decisions as they happen
    Observe(observe::ObserveArgs),
    /// Show the rates of middleboxes, backends, rules and queues
    Top(top::TopArgs),
    /// Show what a command means, and what it becomes in nftables; needs no daemon
    Explain {
        /// The command
        #[arg(required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Add a channel to the running daemon; it outlives a restart
    Attach {
        /// The region, a path or a name in /dev/shm, with the keys of --shm
        #[arg(value_name = "NAME[,KEY=VALUE]...")]
        channel: String,
        /// The control socket of the daemon
        #[arg(long, visible_alias = "socket", value_name = "PATH", default_value = DEFAULT_CONTROL)]
        control: PathBuf,
    },
    /// Remove a channel that was attached; what its guest has registered stays
    Detach {
        /// The region, a path or a name in /dev/shm
        name: String,
        /// The control socket of the daemon
        #[arg(long, visible_alias = "socket", value_name = "PATH", default_value = DEFAULT_CONTROL)]
        control: PathBuf,
    },
    /// Attach and detach channels for another program; prints nothing, and always exits with 0
    Hook {
        #[command(subcommand)]
        caller: HookCaller,
    },
    /// Show metrics, the status as JSON, and a live page by HTTP, from an unprivileged process
    Serve {
        /// The address and port
        #[arg(long, value_name = "ADDRESS:PORT", default_value_t = serve::DEFAULT_LISTEN)]
        listen: SocketAddr,
        /// The observation socket of the daemon
        #[arg(long, value_name = "PATH", default_value = DEFAULT_OBSERVE)]
        socket: PathBuf,
    },
    /// Examine this host and the running daemon; print PASS, WARN or FAIL for each check, and the fix
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// A socket of the daemon
        #[arg(long, visible_alias = "control", value_name = "PATH", default_value = DEFAULT_OBSERVE)]
        socket: PathBuf,
    },
    /// Write what a report of a bug needs into an archive: status, findings of the doctor, ruleset, links, log
    Report {
        /// The archive, which must not exist
        #[arg(value_name = "FILE.tar")]
        file: PathBuf,
        /// A socket of the daemon
        #[arg(long, visible_alias = "control", value_name = "PATH", default_value = DEFAULT_OBSERVE)]
        socket: PathBuf,
    },
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of nfqd and its subcommands into a directory
    #[command(hide = true)]
    Manual {
        /// The directory
        directory: PathBuf,
    },
    /// Keep the descriptors of a daemon while it is not running; the daemon starts it
    #[command(hide = true)]
    Hold,
    /// Remove the ruleset that a daemon has left
    Flush,
}

#[derive(Subcommand)]
enum HookCaller {
    /// Called by /etc/libvirt/hooks/qemu with its arguments, and the domain's XML on standard input
    Libvirt {
        /// The name of the domain
        domain: String,
        /// The operation, such as prepare or release
        operation: String,
        /// The sub-operation and what follows
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
        /// The control socket of the daemon
        #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL)]
        control: PathBuf,
    },
    /// Called as a hookscript of Proxmox VE
    Proxmox {
        /// The number of the VM
        vm: String,
        /// The phase, such as post-start or post-stop
        phase: String,
        /// The control socket of the daemon
        #[arg(long, value_name = "PATH", default_value = DEFAULT_CONTROL)]
        control: PathBuf,
    },
}

#[derive(Args)]
struct RulesArgs {
    /// The commands that make the policy
    #[arg(long, value_name = "FILE")]
    commands: Option<PathBuf>,
    /// NFQUEUE numbers
    #[arg(long, value_name = "N|N-M", default_value = "0-3")]
    queue: QueueRange,
    /// The path of frames into the queues; auto means native here
    #[arg(long, default_value = "auto")]
    steer: SteerChoice,
}

/// The reason nfqd exits without having done its job.
enum Failure {
    Input(String),
    System(String),
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Failure {
        if error.is_input() {
            Failure::Input(error.to_string())
        } else {
            Failure::System(error.to_string())
        }
    }
}

impl From<CommandFileError> for Failure {
    fn from(error: CommandFileError) -> Failure {
        Failure::Input(error.to_string())
    }
}

/// Runs the command line of this process, and returns its exit code.
pub fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let arguments = Cli::parse();
    let result = match arguments.command {
        None => run(&arguments.args),
        Some(Job::Run(args)) => run(&args),
        Some(Job::Check { file }) => check(&file),
        Some(Job::Rules(args)) => rules(&args),
        Some(Job::Replay { capture, commands, json, write }) => {
            replay_capture(&capture, &commands, json, write.as_deref())
        }
        Some(Job::Status { json, brief, wait, socket }) => {
            let form = match (json, brief) {
                (true, _) => StatusForm::Json,
                (false, true) => StatusForm::Brief,
                (false, false) => StatusForm::Text,
            };
            show_status(&socket, form, Duration::from_secs(wait))
        }
        Some(Job::Trace(args)) => trace::run(&args).and_then(|trace| show_trace(&trace, args.json)),
        Some(Job::Observe(args)) => observe::run(&args),
        Some(Job::Top(args)) => top::run(&args),
        Some(Job::Explain { command }) => explain(&command.join(" ")),
        Some(Job::Serve { listen, socket }) => serve::serve(listen, &socket)
            .map_err(|error| Failure::System(format!("{listen}: {error}"))),
        Some(Job::Hold) => holder::run().map_err(|error| Failure::System(error.to_string())),
        Some(Job::Hook { caller }) => {
            run_hook(&caller);
            Ok(())
        }
        Some(Job::Attach { channel, control }) => change(&control, &Request::Attach { channel }),
        Some(Job::Detach { name, control }) => change(&control, &Request::Detach { name }),
        Some(Job::Doctor { json, socket }) => show_findings(&socket, json),
        Some(Job::Report { file, socket }) => {
            log::set_max_level(log::LevelFilter::Off);
            report::run(&file, &socket)
        }
        Some(Job::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "nfqd", &mut io::stdout());
            Ok(())
        }
        Some(Job::Manual { directory }) => write_manual(&directory),
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

fn run(args: &DaemonArgs) -> Result<(), Failure> {
    Ok(Daemon::start(args)?.run()?)
}

/// Prints what is wrong with a file of commands. That is the output of this job, so it goes to
/// standard output.
fn check(file: &Path) -> Result<(), Failure> {
    match read_commands(file) {
        Ok(_) => Ok(()),
        Err(error) => {
            print(|out| writeln!(out, "{error}"))?;
            Err(Failure::Input(String::new()))
        }
    }
}

/// The header of the output of `nfqd rules`, which says why nft cannot load it.
const FOR_READING: &str = "\
# The ruleset that nfqd would load, for reading only: nft cannot load it, because it has no syntax for xt targets
# and rejects maps with long keys that rules update. nfqd loads the same ruleset by netlink, in one transaction.
";

fn rules(args: &RulesArgs) -> Result<(), Failure> {
    let mut desired = args.commands.as_deref().map(read_commands).transpose()?.unwrap_or_default();
    desired.slots.sync_all(&desired.policy, &Unobserved, Instant::now());
    let queues = Queues { first: args.queue.first, count: args.queue.count, bypass: true };
    let queue_path = match args.steer {
        SteerChoice::BrNetfilter => QueuePath::BrNetfilter,
        SteerChoice::Auto | SteerChoice::Native => QueuePath::Native,
    };
    let options = RulesetOptions { queue_path, fast_path: FastPath::Full, queues };
    let tables = build::build(&desired, &options);
    let text: String = tables.values().map(ToString::to_string).collect();
    let text = format!("{FOR_READING}{text}");
    print(|out| out.write_all(text.as_bytes()))
}

fn replay_capture(
    capture: &Path,
    commands: &Path,
    json: bool,
    write: Option<&Path>,
) -> Result<(), Failure> {
    let policy = read_commands(commands)?.policy;
    let mut out = BufWriter::new(io::stdout().lock());
    let result = replay::replay(capture, &policy, json, write, &mut out);
    let flushed = out.flush();
    match result {
        Err(replay::ReplayError::Io { source, .. })
            if source.kind() == io::ErrorKind::BrokenPipe =>
        {
            Ok(())
        }
        Err(error) => Err(Failure::Input(error.to_string())),
        Ok(()) => print(|_| flushed),
    }
}

/// The form in which the status is printed.
#[derive(Clone, Copy)]
enum StatusForm {
    Text,
    Brief,
    Json,
}

/// The pause between two looks at the status while waiting.
const WAIT_INTERVAL: Duration = Duration::from_millis(100);

fn show_status(socket: &Path, form: StatusForm, wait: Duration) -> Result<(), Failure> {
    // The path of earlier versions sends the status in their form, and means the default here.
    let is_legacy = socket == Path::new(LEGACY_CONTROL);
    let socket = if is_legacy { Path::new(DEFAULT_OBSERVE) } else { socket };
    let deadline = Instant::now() + wait;
    let state = loop {
        let state = api::client::status(socket);
        let is_well = state.as_ref().is_ok_and(|state| state.problems().is_empty());
        if is_well || Instant::now() >= deadline {
            break state;
        }
        std::thread::sleep(WAIT_INTERVAL);
    };
    let state = state.map_err(|error| {
        Failure::System(format!(
            "{}: {error}; is nfqd running, and is this one of its sockets?",
            socket.display()
        ))
    })?;
    let problems = state.problems();
    let text = match form {
        StatusForm::Text => status::text(&state),
        StatusForm::Brief => api::first_line(&problems),
        StatusForm::Json => state.to_json(),
    };
    print(|out| out.write_all(text.as_bytes()))?;
    if problems.is_empty() { Ok(()) } else { Err(Failure::Input(String::new())) }
}

fn show_trace(trace: &api::Trace, json: bool) -> Result<(), Failure> {
    let text = if json {
        serde_json::to_string(trace).map(|text| text + "\n").unwrap_or_default()
    } else {
        trace::text(trace)
    };
    print(|out| out.write_all(text.as_bytes()))
}

fn run_hook(caller: &HookCaller) {
    // The largest XML of a domain that is read.
    const MAX_XML: u64 = 4 << 20;
    match caller {
        HookCaller::Libvirt { domain, operation, control, .. } => {
            let mut xml = String::new();
            let read = io::stdin().lock().take(MAX_XML).read_to_string(&mut xml);
            if read.is_ok() {
                hook::libvirt::run(control, domain, operation, &xml);
            }
        }
        HookCaller::Proxmox { vm, phase, control } => hook::proxmox::run(control, vm, phase),
    }
}

/// Asks the daemon for a change.
fn change(control: &Path, request: &Request) -> Result<(), Failure> {
    let answer = api::client::ask(control, request).map_err(|error| {
        let path = control.display();
        Failure::System(format!(
            "{path}: {error}; is nfqd running, and is this its control socket?"
        ))
    })?;
    match answer {
        Answer::Error(error) => Err(Failure::Input(error.to_string())),
        _ => Ok(()),
    }
}

fn show_findings(socket: &Path, json: bool) -> Result<(), Failure> {
    // A line that would be logged is a finding.
    log::set_max_level(log::LevelFilter::Off);
    let findings = doctor::examine(socket);
    let text = if json {
        serde_json::to_string_pretty(&findings).map(|text| text + "\n").unwrap_or_default()
    } else {
        doctor::text(&findings)
    };
    print(|out| out.write_all(text.as_bytes()))?;
    let failed = findings.iter().any(|finding| finding.grade == doctor::Grade::Fail);
    if failed { Err(Failure::Input(String::new())) } else { Ok(()) }
}

fn explain(command: &str) -> Result<(), Failure> {
    let text = explain::explain(command)
        .map_err(|error| Failure::Input(format!("column {}: {}", error.column, error.message)))?;
    print(|out| out.write_all(text.as_bytes()))
}

/// Writes the manual pages: `nfqd.8`, and `nfqd-SUBCOMMAND.8`.
fn write_manual(directory: &Path) -> Result<(), Failure> {
    let error = |error: io::Error| Failure::System(format!("{}: {error}", directory.display()));
    let command = Cli::command();
    let mut pages = vec![("nfqd".to_string(), command.clone())];
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        let name = format!("nfqd-{}", sub.get_name());
        let page = sub.clone().display_name(&name).bin_name(&name);
        pages.push((name, page));
    }
    for (name, command) in pages {
        let mut page = Vec::new();
        let manual = clap_mangen::Man::new(command).section("8").source(env!("CARGO_PKG_VERSION"));
        manual.render(&mut page).map_err(error)?;
        std::fs::write(directory.join(format!("{name}.8")), page).map_err(error)?;
    }
    Ok(())
}

fn flush() -> Result<(), Failure> {
    // A running nfqd would load them again.
    let _lock = HostLock::take().map_err(|error| Failure::System(error.to_string()))?;
    let removed = Kernel::open().and_then(|mut kernel| kernel.remove());
    if removed.map_err(|error| Failure::System(error.to_string()))? {
        println!("removed nfqd's tables");
    } else {
        println!("nfqd's tables were not loaded");
    }
    Ok(())
}

/// Writes to standard output. A reader that has gone is not a failure.
fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Failure> {
    match write(&mut io::stdout().lock()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::System(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}
