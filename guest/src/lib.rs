//! The command writer inside a middlebox VM: commands in, the host's replies out.
//!
//! Exit codes: 0 accepted; 1 rejected, with the reason on standard error; 2 usage; 3 no device, or
//! the host did not take the command; 4 the host took it, but its reply cannot be parsed. Interrupted
//! by a signal, it withdraws its command and ends by that signal.

mod device;
mod sender;
mod words;

use clap::{CommandFactory, Parser};
use device::{Device, DeviceError};
use nfqd_shmctl::sender::{Patience, SendError};
use nfqd_shmctl::vsock::{self, Connection};
use nfqd_shmctl::{Command, Region, Register, Reply, split_lines};
use sender::{Link, Sender};
use serde_json::json;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use words::{Words, WordsError};

/// Asks the host of this VM for header filters and load balancing
#[derive(Parser)]
#[command(
    version,
    subcommand_negates_reqs = true,
    subcommand_precedence_over_arg = true,
    after_help = "Examples:\n  nfqd-guest register 10.129.126.15\n  nfqd-guest deny from 10.0.0.0/8 tcp to-port 80\n  \
                  nfqd-guest balance 10.129.126.15:80 least 10.129.126.17 10.129.126.18\n  nfqd-guest R F 12:13:14:15:16:17 \
                  10.129.126.15\n  nfqd-guest -w '@X 12:13:14:15:16:17 F@'"
)]
struct Cli {
    /// Write a message into the mailbox as it is, marks included
    #[arg(short = 'w', value_name = "@COMMAND@", required_unless_present = "file")]
    write: Option<String>,
    /// Send the commands of a file, one per line, # comments. Nothing is sent if one is not valid
    #[arg(short = 'f', value_name = "FILE", conflicts_with = "write")]
    file: Option<PathBuf>,
    /// The ivshmem device
    #[arg(long, value_name = "auto|PCI-ADDRESS", default_value = "auto", conflicts_with = "shm")]
    device: Device,
    /// A region that is mapped already, instead of the device
    #[arg(long, value_name = "PATH")]
    shm: Option<PathBuf>,
    /// Vsock instead of a device, which is used by itself if there is no device: to the host, or to
    /// this CID
    #[arg(
        long,
        value_name = "CID",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2",
        conflicts_with_all = ["device", "shm"]
    )]
    vsock: Option<u32>,
    /// Seconds to wait until the host takes the command
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    timeout: Duration,
    /// Print the replies as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    words: Option<Words>,
}

pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds =
        text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|time| *time <= Duration::from_secs(86400))
        .ok_or_else(|| "write a number of seconds, like 5 or 0.5".to_string())
}

/// The reason nothing, or not everything, was sent.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The input is wrong.
    #[error("{0}")]
    Input(String),
    /// The usage is wrong.
    #[error("{0}")]
    Usage(String),
    /// There is no device.
    #[error("{0}")]
    NoDevice(String),
    /// There is no reply.
    #[error(transparent)]
    Send(#[from] SendError),
}

impl Failure {
    fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::Input(_) => 1,
            Failure::Usage(_)
            | Failure::Send(
                SendError::NotAMessage(_) | SendError::TooLong(_) | SendError::NoMailbox,
            ) => 2,
            // Neither rejected nor free to be sent again.
            Failure::Send(
                SendError::NotAReply(_) | SendError::Reset | SendError::Unconfirmed(_),
            ) => 4,
            Failure::NoDevice(_) | Failure::Send(_) => 3,
        })
    }
}

impl From<WordsError> for Failure {
    fn from(error: WordsError) -> Failure {
        match error {
            WordsError::Query(_) => Failure::Input(error.to_string()),
            _ => Failure::Usage(error.to_string()),
        }
    }
}

/// A signal that ends the program, once it has withdrawn its command.
#[derive(Clone, Default)]
struct Interruption {
    flag: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Interruption {
    /// Notes the signals by which a program is asked to end.
    fn watch() -> Interruption {
        let out = Interruption::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // Without it the signal ends the program at once, as it does by default.
            let number = usize::try_from(signal).unwrap_or_default();
            let _ = signal_hook::flag::register_usize(signal, out.signal.clone(), number);
            let _ = signal_hook::flag::register(signal, out.flag.clone());
        }
        out
    }

    /// Returns the patience of a sender that gives up at a signal.
    fn patience(&self, timeout: Duration) -> Patience<'_> {
        Patience { timeout, interrupted: Some(&*self.flag) }
    }

    /// Ends the program by the signal, if there was one.
    fn finish(&self) {
        if let Ok(signal @ 1..) = i32::try_from(self.signal.load(Ordering::Relaxed)) {
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    }
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Words::Completions { shell }) = cli.words {
        clap_complete::generate(shell, &mut Cli::command(), "nfqd-guest", &mut std::io::stdout());
        return ExitCode::SUCCESS;
    }
    let interruption = Interruption::watch();
    match run(&cli, &interruption) {
        Ok(replies) => print(&replies, cli.json),
        Err(error) => {
            eprintln!("{error}");
            interruption.finish();
            error.exit_code()
        }
    }
}

fn run(cli: &Cli, interruption: &Interruption) -> Result<Vec<Reply>, Failure> {
    let sender = || -> Result<Sender, Failure> {
        let link = open(cli, interruption)?;
        Ok(Sender::new(link, cli.timeout, interruption.clone()))
    };
    if let Some(message) = &cli.write {
        return Ok(sender()?.send(message)?);
    }
    if let Some(path) = &cli.file {
        let commands = commands_of_file(path)?;
        return Ok(sender()?.send_commands(&commands)?);
    }
    let Some(words) = &cli.words else { return Ok(Vec::new()) };
    let asked: OnceCell<Sender> = OnceCell::new();
    let ask = |query: &str| {
        let query_error = |error: Failure| WordsError::Query(error.to_string());
        let opened = sender().map_err(query_error)?;
        let sender = asked.get_or_init(|| opened);
        let replies = sender.lock().and_then(|()| sender.send_commands(&[query.to_string()]));
        match replies.map_err(|error| query_error(error.into()))?.first() {
            Some(Reply::Ok(text)) => Ok(text.clone()),
            other => Err(WordsError::Query(other.map(Reply::to_string).unwrap_or_default())),
        }
    };
    let commands = words.commands(ask)?;
    let is_new_rule = asked.get().is_some();
    let sender = match asked.into_inner() {
        Some(sender) => sender,
        None => sender()?,
    };
    if let Words::Watch { interval, .. } = words {
        return watch(&sender, &commands, *interval);
    }
    let replies = sender.send_commands(&commands)?;
    if is_new_rule && replies.iter().any(Reply::is_ok) && !replies.iter().all(Reply::is_ok) {
        // A part of a new rule would match more than all of it.
        let remove = commands.first().and_then(|command| words::removal_of(command));
        remove.map(|remove| sender.send_commands(&[remove])).transpose()?;
    }
    Ok(replies)
}

/// Shows the reply to a query again and again, until it is rejected or the program interrupted.
fn watch(sender: &Sender, query: &[String], interval: Duration) -> Result<Vec<Reply>, Failure> {
    const CLEAR: &str = "\x1b[H\x1b[2J";
    loop {
        let replies = sender.send_commands(query)?;
        if !replies.iter().all(Reply::is_ok) {
            return Ok(replies);
        }
        print!("{CLEAR}");
        replies.iter().for_each(|reply| println!("{}", readable(reply)));
        let until = std::time::Instant::now() + interval;
        while std::time::Instant::now() < until {
            if sender.is_interrupted() {
                return Err(Failure::Send(SendError::Interrupted));
            }
            std::thread::sleep(Duration::from_millis(20).min(interval));
        }
    }
}

/// Returns the answer to a query with each part on a line of its own.
fn readable(reply: &Reply) -> String {
    match reply {
        Reply::Ok(text) => text.replace("; ", "\n"),
        Reply::Err(_) => reply.to_string(),
    }
}

/// Returns the commands of a file, all of them valid.
fn commands_of_file(path: &Path) -> Result<Vec<String>, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::Input(format!("{}: {error}", path.display())))?;
    let mut errors = Vec::new();
    let mut commands = Vec::new();
    for (line, command) in split_lines(&text) {
        match Command::parse(command) {
            Ok(_) => commands.push(command.trim().to_string()),
            Err(error) => errors.push(format!(
                "{}:{line}:{}: {}",
                path.display(),
                error.column,
                error.message
            )),
        }
    }
    if errors.is_empty() { Ok(commands) } else { Err(Failure::Input(errors.join("\n"))) }
}

/// Prints the replies, to standard error if any command was rejected.
fn print(replies: &[Reply], as_json: bool) -> ExitCode {
    let is_ok = replies.iter().all(Reply::is_ok);
    if as_json {
        let replies: Vec<_> = replies.iter().map(json_of).collect();
        println!("{}", json!({ "replies": replies }));
    } else {
        let text: Vec<String> = replies.iter().map(Reply::to_string).collect();
        if is_ok {
            println!("{}", text.join("\n"));
        } else {
            eprintln!("{}", text.join("\n"));
        }
    }
    if is_ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn json_of(reply: &Reply) -> serde_json::Value {
    match reply {
        Reply::Ok(text) => json!({ "ok": true, "text": text }),
        Reply::Err(rejection) => json!({
            "ok": false,
            "code": rejection.code().to_string(),
            "column": rejection.column(),
            "message": rejection.message(),
        }),
    }
}

/// Opens what the arguments name: by default the device of this VM, or vsock if there is none.
fn open(cli: &Cli, interruption: &Interruption) -> Result<Link, Failure> {
    let open =
        |path: &Path| Region::open(path).map_err(|error| Failure::NoDevice(error.to_string()));
    let connect = |cid| -> Result<Link, Failure> {
        Ok(Link::Vsock(Connection::open(cid, interruption.patience(cli.timeout))?))
    };
    if let Some(cid) = cli.vsock {
        return connect(cid);
    }
    if let Some(path) = &cli.shm {
        return Ok(Link::Region(open(path)?));
    }
    let found = match device::memory(&cli.device) {
        Err(DeviceError::None) if Path::new(vsock::DEVICE).exists() => {
            return connect(vsock::HOST);
        }
        found => found.map_err(|error| Failure::NoDevice(error.to_string()))?,
    };
    if !found.others.is_empty() {
        eprintln!(
            "this VM has several ivshmem devices; using {}, name another with --device: {}",
            found.address,
            found.others.join(", ")
        );
    }
    let region = open(&found.memory)?;
    // Without it, the host polls.
    let register = Register::open(&found.registers).ok();
    Ok(Link::Region(match register {
        Some(register) => region.with_register(register),
        None => region,
    }))
}
