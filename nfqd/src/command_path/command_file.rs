//! Files of commands: one command a line, `#` comments. A line may begin with the network of its
//! middlebox, as in `[kvmbr0 vlan 100] R F 02:00:00:00:00:01 10.0.0.1`; without it the middlebox is
//! where its MAC is seen.

use nfqd_rules::{Desired, MiddleboxKey, Network, NetworkId, Networks, Policy};
use nfqd_shmctl::{
    BackendChange, Command, CommandError, ErrorCode, MacAddr, ParsedCommand, split_lines,
};
use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};

/// The reason a file of commands is not applied.
#[derive(Debug, thiserror::Error)]
pub enum CommandFileError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The path of the file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Some commands are wrong: a line each, as `FILE:LINE:COLUMN: message`.
    #[error("{0}")]
    Commands(String),
}

/// The byte order mark, with which some editors begin a file.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Applies all commands of a text to a desired state, but for those that `skip` returns true for.
/// Returns the errors as `FILE:LINE:COLUMN: message`; the commands without one are applied.
pub fn apply_text(
    desired: &mut Desired,
    path: &Path,
    text: &str,
    skip: impl Fn(&Policy, NetworkId, &Command) -> bool,
) -> Vec<String> {
    let mut errors = Vec::new();
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    for (number, line) in split_lines(text) {
        if let Err(error) = apply_line(desired, line, &skip) {
            let CommandError { column, message, .. } = error;
            errors.push(format!("{}:{number}:{column}: {message}", path.display()));
        }
    }
    errors
}

/// The longest line of a file of registrations, in bytes: a command with its network.
const MAX_LINE: usize = 1 << 14;
/// The maximum number of errors of a file of registrations that are reported one by one.
const MAX_ERRORS: usize = 100;

/// The beginning of a line with the checksum of the next one.
const CHECKSUM: &str = "# crc32 ";

/// Returns a line of a file of registrations, with its checksum before it. For whoever reads commands, that
/// is a comment.
pub(super) fn sealed(line: &str) -> String {
    format!("{CHECKSUM}{:08x}\n{line}\n", crc32(line))
}

fn crc32(line: &str) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(line.as_bytes());
    crc.sum()
}

/// Checks a line against the checksum before it, and notes the checksum of the next one. A line without one
/// was written by an earlier version, or by hand.
fn check_line(text: &str, expected: &mut Option<u32>) -> Result<(), CommandError> {
    let line = text.trim_end_matches(['\n', '\r']);
    if let Some(digits) = line.strip_prefix(CHECKSUM) {
        *expected = u32::from_str_radix(digits, 16).ok();
        return Ok(());
    }
    if line.trim_start().starts_with('#') || line.trim().is_empty() {
        return Ok(());
    }
    match expected.take() {
        Some(sum) if sum != crc32(line) => {
            let start: String = line.chars().take(80).flat_map(char::escape_default).collect();
            let message = format!(
                "'{start}': not what nfqd wrote; if you have changed it, delete the line '{CHECKSUM}…' above it"
            );
            Err(CommandError { code: ErrorCode::Value, column: 1, message })
        }
        _ => Ok(()),
    }
}

/// Applies the lines of a reader to a desired state, as [`apply_text`] does, in memory that does not
/// depend on what is read. Returns the first errors, and how many there were in all. A last line
/// without its end is one of them, and so is a line that does not fit its checksum.
///
/// # Errors
/// If the reader fails.
pub(super) fn apply_lines(
    desired: &mut Desired,
    path: &Path,
    mut reader: impl BufRead,
) -> io::Result<(Vec<String>, usize)> {
    let (mut errors, mut count) = (Vec::new(), 0);
    let (mut line, mut expected) = (Vec::new(), None);
    for number in 1.. {
        line.clear();
        if (&mut reader).take(MAX_LINE as u64).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        let is_complete = line.last() == Some(&b'\n');
        let text = String::from_utf8_lossy(&line);
        let text = text.strip_prefix(BYTE_ORDER_MARK).filter(|_| number == 1).unwrap_or(&text);
        let result = if is_complete {
            let apply = |(_, line)| apply_line(desired, line, |_, _, _| false);
            check_line(text, &mut expected).and_then(|()| split_lines(text).try_for_each(apply))
        } else {
            Err(unusable(text, line.len() == MAX_LINE))
        };
        if let Err(CommandError { column, message, .. }) = result {
            count += 1;
            if errors.len() < MAX_ERRORS {
                errors.push(format!("{}:{number}:{column}: {message}", path.display()));
            }
        }
        if !is_complete {
            skip_line(&mut reader)?;
        }
    }
    Ok((errors, count))
}

/// Returns the error of a line that is too long, or was being written when the host went down.
fn unusable(text: &str, is_long: bool) -> CommandError {
    let start: String = text.chars().take(80).flat_map(char::escape_default).collect();
    let what = if is_long { "too long" } else { "incomplete last line, not restored" };
    CommandError { code: ErrorCode::Syntax, column: 1, message: format!("'{start}': {what}") }
}

/// Reads to the end of a line.
fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let (len, is_done) =
            (end.map_or(buffer.len(), |at| at + 1), end.is_some() || buffer.is_empty());
        reader.consume(len);
        if is_done {
            return Ok(());
        }
    }
}

fn apply_line(
    Desired { policy, networks, .. }: &mut Desired,
    line: &str,
    skip: impl Fn(&Policy, NetworkId, &Command) -> bool,
) -> Result<(), CommandError> {
    let (network, line, offset) = split_network(line)?;
    let moved = |error: CommandError| CommandError { column: error.column + offset, ..error };
    let parsed = ParsedCommand::parse(line).map_err(moved)?;
    let id = network.as_ref().map_or(Some(NetworkId::ANY), |network| networks.intern(network));
    let id = id.unwrap_or(NetworkId::ANY);
    if skip(policy, id, &parsed.command) {
        return Ok(());
    }
    policy.apply(id, &parsed.command).map_err(|error| moved(error.locate(&parsed)))
}

/// Splits a line into the network that it begins with, if it does, and the command, with the offset
/// of that in columns.
fn split_network(line: &str) -> Result<(Option<Network>, &str, usize), CommandError> {
    let text = line.trim_start();
    let Some(rest) = text.strip_prefix('[') else { return Ok((None, line, 0)) };
    let blanks = line.len() - text.len();
    let error = || CommandError {
        code: ErrorCode::Syntax,
        column: blanks + 1,
        message: format!(
            "'{}': not a network; write [BRIDGE] or [BRIDGE vlan ID] before the command",
            text.split_whitespace().next().unwrap_or_default().escape_default()
        ),
    };
    let (name, command) = rest.split_once(']').ok_or_else(error)?;
    let network: Network = name.parse().map_err(|_| error())?;
    if network.vlan.is_some_and(|vlan| !(1..=4094).contains(&vlan)) {
        return Err(error());
    }
    Ok((Some(network), command, line.len() - command.len()))
}

/// Writes a command as a line of a file.
pub fn line_of(networks: &Networks, network: NetworkId, command: &Command) -> String {
    match networks.name(network) {
        Some(name) => format!("[{name}] {command}"),
        None => command.to_string(),
    }
}

/// Returns the desired state that a file of commands makes, without slots.
///
/// # Errors
/// If the file cannot be read, or any of its commands is wrong.
pub fn read_commands(path: &Path) -> Result<Desired, CommandFileError> {
    let io = |source| CommandFileError::Io { path: path.to_path_buf(), source };
    let bytes = std::fs::read(path).map_err(io)?;
    let mut desired = Desired::default();
    let text = String::from_utf8_lossy(&bytes);
    let errors = apply_text(&mut desired, path, &text, |_, _, _| false);
    if errors.is_empty() { Ok(desired) } else { Err(CommandFileError::Commands(errors.join("\n"))) }
}

/// Applies the file of `--commands` to a desired state, as a whole or not at all. What is registered
/// already as the file has it stays as it is, with what guests have added since.
///
/// # Errors
/// If the file cannot be read, or any of its commands is wrong.
pub fn apply_startup_commands(
    desired: &mut Desired,
    path: Option<&Path>,
) -> Result<(), CommandFileError> {
    let Some(path) = path else { return Ok(()) };
    let io = |source| CommandFileError::Io { path: path.to_path_buf(), source };
    let text = std::fs::read_to_string(path).map_err(io)?;
    let mut changed = desired.clone();
    let errors = apply_text(&mut changed, path, &text, is_in_effect);
    if !errors.is_empty() {
        return Err(CommandFileError::Commands(errors.join("\n")));
    }
    *desired = changed;
    Ok(())
}

/// Whether a startup command changes nothing but would undo what was changed since: the rules of a
/// firewall that is registered with the same address and default, and the backends of a pool that
/// is registered with the same method and options.
fn is_in_effect(policy: &Policy, network: NetworkId, command: &Command) -> bool {
    let get = |mac: &MacAddr| policy.get(MiddleboxKey { network, mac: *mac });
    match command {
        Command::RegisterFirewall { mac, ip, default } => {
            let firewall = get(mac).and_then(|middlebox| middlebox.firewall());
            firewall.is_some_and(|firewall| {
                firewall.ip() == *ip && firewall.default_action() == *default
            })
        }
        Command::RegisterService { mac, frontend, spec } if spec.method.is_pool() => {
            let service = get(mac).and_then(|middlebox| middlebox.service(frontend));
            service.is_some_and(|service| {
                service.method() == spec.method && *service.options() == spec.options
            })
        }
        // The backend to remove has been removed.
        Command::ChangeBackends { change: BackendChange::Remove(_), .. } => {
            let result = policy.clone().apply(network, command);
            result.is_err_and(|error| error.code == ErrorCode::UnknownBackend)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_with_networks_in_the_reference_are_read_and_written_back() {
        let text = include_str!("../../../docs/COMMANDS.md");
        let lines: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    [")).collect();
        assert_eq!(lines.len(), 2);
        for line in lines {
            let line = format!("[{line}");
            let mut desired = Desired::default();
            apply_line(&mut desired, &line, |_, _, _| false).unwrap();
            let keys: Vec<MiddleboxKey> = desired.policy.middleboxes().keys().copied().collect();
            let (_, command, _) = split_network(&line).unwrap();
            let command = ParsedCommand::parse(command).unwrap().command;
            assert_eq!(line_of(&desired.networks, keys[0].network, &command), line);
        }
    }
}
