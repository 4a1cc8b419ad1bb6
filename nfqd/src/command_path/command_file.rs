//! Files of commands: one command a line, `#` comments.

use nfqd_rules::Policy;
use nfqd_shmctl::{BackendChange, Command, CommandError, ErrorCode, ParsedCommand, split_lines};
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
        source: std::io::Error,
    },
    /// Some commands are wrong: a line each, as `FILE:LINE:COLUMN: message`.
    #[error("{0}")]
    Commands(String),
}

/// Applies all commands of a text to a policy, but for those that `skip` returns true for. Returns
/// the errors as `FILE:LINE:COLUMN: message`; the commands without one are applied.
pub fn apply_text(
    policy: &mut Policy,
    path: &Path,
    text: &str,
    skip: impl Fn(&Policy, &Command) -> bool,
) -> Vec<String> {
    let mut errors = Vec::new();
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (number, line) in split_lines(text) {
        if let Err(error) = apply_line(policy, line, &skip) {
            let CommandError { column, message, .. } = error;
            errors.push(format!("{}:{number}:{column}: {message}", path.display()));
        }
    }
    errors
}

fn apply_line(
    policy: &mut Policy,
    line: &str,
    skip: impl Fn(&Policy, &Command) -> bool,
) -> Result<(), CommandError> {
    let parsed = ParsedCommand::parse(line)?;
    if skip(policy, &parsed.command) {
        return Ok(());
    }
    policy.apply(&parsed.command).map_err(|error| error.locate(&parsed))
}

/// Returns the policy that a file of commands makes.
///
/// # Errors
/// If the file cannot be read, or any of its commands is wrong.
pub fn read_policy(path: &Path) -> Result<Policy, CommandFileError> {
    let io = |source| CommandFileError::Io { path: path.to_path_buf(), source };
    let bytes = std::fs::read(path).map_err(io)?;
    let mut policy = Policy::default();
    let errors = apply_text(&mut policy, path, &String::from_utf8_lossy(&bytes), |_, _| false);
    if errors.is_empty() { Ok(policy) } else { Err(CommandFileError::Commands(errors.join("\n"))) }
}

/// Applies the file of `--commands` to a policy, as a whole or not at all. What is registered
/// already as the file has it stays as it is, with what guests have added since.
///
/// # Errors
/// If the file cannot be read, or any of its commands is wrong.
pub fn apply_startup_commands(
    policy: &mut Policy,
    path: Option<&Path>,
) -> Result<(), CommandFileError> {
    let Some(path) = path else { return Ok(()) };
    let io = |source| CommandFileError::Io { path: path.to_path_buf(), source };
    let text = std::fs::read_to_string(path).map_err(io)?;
    let mut changed = policy.clone();
    let errors = apply_text(&mut changed, path, &text, is_in_effect);
    if !errors.is_empty() {
        return Err(CommandFileError::Commands(errors.join("\n")));
    }
    *policy = changed;
    Ok(())
}

/// Whether a startup command changes nothing but would undo what was changed since: the rules of a
/// firewall that is registered with the same address and default, and the backends of a pool that
/// is registered with the same method and options.
fn is_in_effect(policy: &Policy, command: &Command) -> bool {
    match command {
        Command::RegisterFirewall { mac, ip, default } => {
            let firewall = policy.get(*mac).and_then(|middlebox| middlebox.firewall());
            firewall.is_some_and(|firewall| {
                firewall.ip() == *ip && firewall.default_action() == *default
            })
        }
        Command::RegisterService { mac, frontend, spec } if spec.method.is_pool() => {
            let service = policy.get(*mac).and_then(|middlebox| middlebox.service(frontend));
            service.is_some_and(|service| {
                service.method() == spec.method && *service.options() == spec.options
            })
        }
        // The backend to remove has been removed.
        Command::ChangeBackends { change: BackendChange::Remove(_), .. } => {
            let result = policy.clone().apply(command);
            result.is_err_and(|error| error.code == ErrorCode::UnknownBackend)
        }
        _ => false,
    }
}
