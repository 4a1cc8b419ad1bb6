//! Registrations on disk: commands, one a line, in one file.
//!
//! Commands are appended as they are accepted, and synced before they are answered: what a change costs does not depend
//! on how much is registered. When the file has grown to twice what it needs it is written anew, beside, synced, and
//! renamed over the old one, so that a crash leaves one or the other. A last line without its end was being written when
//! the host went down; its command was never answered, and is not taken. When the disk is full the policy still holds in
//! memory and in the kernel; the daemon says so and tries again.

use nfqd_rules::Policy;
use nfqd_shmctl::Command;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// The directory of `--state`, held by one daemon at a time.
pub struct State {
    directory: PathBuf,
    /// The file, open for more lines; none until it has been written whole.
    file: Option<File>,
    /// Lines in it, and how many it had when it was written whole.
    lines: (usize, usize),
    /// Let go when the daemon ends, however it ends.
    _lock: Flock<File>,
}

/// Lines more than twice what is needed that the file may have before it is written anew.
const SPARE_LINES: usize = 1000;

/// Why registrations cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory or a file in it cannot be used.
    #[error("{path}: {source}; choose a directory that nfqd may write, with --state")]
    Io {
        /// What cannot be used.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another daemon has the directory.
    #[error(
        "{path}: another nfqd keeps its registrations here; stop it, or choose another directory with --state"
    )]
    Held {
        /// The directory.
        path: PathBuf,
    },
}

impl State {
    /// Takes the directory, which is made when it is not there.
    ///
    /// # Errors
    /// When it cannot be made, or another daemon has it.
    pub fn open(directory: &Path) -> Result<State, StateError> {
        let io = |source| StateError::Io { path: directory.to_path_buf(), source };
        fs::create_dir_all(directory).map_err(io)?;
        let lock = File::options().create(true).append(true).open(directory.join("lock")).map_err(io)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|_| StateError::Held { path: directory.to_path_buf() })?;
        Ok(State { directory: directory.to_path_buf(), file: None, lines: (0, 0), _lock: lock })
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.directory.join("commands")
    }

    /// The policy that was kept; an empty one at first. Lines that are not taken back come as errors: the file is then
    /// copied beside, so that nothing is lost, and one wrong line does not keep all others out.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn load(&self) -> Result<(Policy, Vec<String>), StateError> {
        let path = self.path();
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((Policy::default(), Vec::new()));
            }
            Err(source) => return Err(StateError::Io { path, source }),
        };
        let mut policy = Policy::default();
        let complete = text.rfind('\n').map_or(0, |at| at + 1);
        let (text, rest) = text.split_at(complete);
        let mut errors = apply_file(&mut policy, &path, text, |_, _| false);
        if !rest.is_empty() {
            let (path, line) = (path.display(), text.lines().count() + 1);
            errors.push(format!("{path}:{line}:1: '{}': this line has no end", rest.escape_default()));
        }
        if !errors.is_empty() {
            let copy = self.directory.join("commands.rejected");
            fs::copy(&path, &copy).map_err(|source| StateError::Io { path: copy, source })?;
        }
        Ok((policy, errors))
    }

    /// Keeps a policy: writes the file whole.
    ///
    /// # Errors
    /// When it cannot be written; the old file stands then.
    pub fn save(&mut self, policy: &Policy) -> Result<(), StateError> {
        let (path, new) = (self.path(), self.directory.join("commands.new"));
        // Until it is there, nothing may be appended to the old one.
        self.file = None;
        let write = || -> io::Result<(File, usize)> {
            let mut file = BufWriter::new(File::create(&new)?);
            file.write_all(b"# Registrations of nfqd, written by it; edit while it is stopped.\n")?;
            let mut lines = 0;
            for command in policy.commands() {
                writeln!(file, "{command}")?;
                lines += 1;
            }
            let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(&self.directory)?.sync_all()?;
            Ok((file, lines))
        };
        let (file, lines) = write().map_err(|source| StateError::Io { path: path.clone(), source })?;
        self.file = Some(file);
        self.lines = (lines, lines);
        Ok(())
    }

    /// Keeps what these commands, which `policy` has obeyed, have changed.
    ///
    /// # Errors
    /// When it cannot be written. The next [`State::save`] writes it whole.
    pub fn append(&mut self, commands: &[Command], policy: &Policy) -> Result<(), StateError> {
        let (lines, whole) = self.lines;
        let Some(file) = self.file.as_mut().filter(|_| lines <= 2 * whole + SPARE_LINES) else {
            return self.save(policy);
        };
        let text: String = commands.iter().map(|command| format!("{command}\n")).collect();
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_data());
        if let Err(source) = written {
            self.file = None;
            return Err(StateError::Io { path: self.path(), source });
        }
        self.lines.0 += commands.len();
        Ok(())
    }
}

/// Applies the commands of a file to a policy, but for those that `skip` says of. The errors come back as
/// `FILE:LINE:COLUMN: message`; the commands without one are applied.
pub fn apply_file(
    policy: &mut Policy,
    path: &Path,
    text: &str,
    skip: impl Fn(&Policy, &Command) -> bool,
) -> Vec<String> {
    let mut errors = Vec::new();
    // Some editors begin a file with a byte order mark.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (number, line) in nfqd_shmctl::split_lines(text) {
        let obeyed = Command::parse(line)
            .and_then(|command| if skip(policy, &command) { Ok(()) } else { policy.obey(&command, line) });
        if let Err(error) = obeyed {
            errors.push(format!("{}:{number}:{}: {}", path.display(), error.column, error.message));
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_one_daemon_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut policy = Policy::default();
        policy.apply_line("R F 2:0:0:0:0:1 10.0.0.1").unwrap();
        policy.apply_line("A 2:0:0:0:0:1 #2 T 2 d 80").unwrap();
        {
            let mut state = State::open(dir.path()).unwrap();
            assert_eq!(state.load().unwrap(), (Policy::default(), Vec::new()));
            state.save(&policy).unwrap();
            assert!(matches!(State::open(dir.path()), Err(StateError::Held { .. })));
        }
        assert_eq!(State::open(dir.path()).unwrap().load().unwrap(), (policy, Vec::new()));
    }

    #[test]
    fn one_wrong_line_keeps_no_other_out_and_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(dir.path()).unwrap();
        fs::write(state.path(), b"R F 2:0:0:0:0:1 10.0.0.1\n\nA 2:0:0:0:0:1 I 99\n\xff\nA 2:0:0:0:0:1 I 2\n")
            .unwrap();
        let (policy, errors) = state.load().unwrap();
        assert_eq!(policy.commands().count(), 2);
        let expected = "commands:3:17: '99': not a bit value of this class; write a number from 0 to 15";
        assert!(errors[0].ends_with(expected) && errors.len() == 2, "{errors:?}");
        state.save(&policy).unwrap();
        let rejected = fs::read(dir.path().join("commands.rejected")).unwrap();
        assert!(rejected.windows(4).any(|word| word == b"I 99"));
    }

    #[test]
    fn commands_are_appended_until_the_file_is_too_long() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(dir.path()).unwrap();
        let mut policy = Policy::default();
        let mut change = |state: &mut State, line: &str| {
            let command = policy.apply_line(line).unwrap();
            state.append(&[command], &policy).unwrap();
            if line.len().is_multiple_of(7) {
                assert_eq!(state.load().unwrap(), (policy.clone(), Vec::new()));
            }
            fs::read_to_string(state.path()).unwrap().lines().count()
        };
        assert_eq!(change(&mut state, "R F 2:0:0:0:0:1 10.0.0.1"), 2);
        assert_eq!(change(&mut state, "A 2:0:0:0:0:1 T 2 d 80"), 3);
        assert_eq!(change(&mut state, "X 2:0:0:0:0:1"), 4);
        assert_eq!(change(&mut state, "R F 2:0:0:0:0:1 10.0.0.1"), 5);
        let longest = (0..1100).map(|n| change(&mut state, &format!("A 2:0:0:0:0:1 T 2 d {n}"))).max();
        assert!((SPARE_LINES..SPARE_LINES + 10).contains(&longest.unwrap()), "{longest:?}");
    }

    #[test]
    fn a_line_that_was_being_written_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path()).unwrap();
        fs::write(state.path(), b"R F 2:0:0:0:0:1 10.0.0.1\nA 2:0:0:0:0:1 T 2 d 8").unwrap();
        let (policy, errors) = state.load().unwrap();
        assert_eq!(policy.commands().count(), 1);
        assert!(
            errors[0].ends_with("commands:2:1: 'A 2:0:0:0:0:1 T 2 d 8': this line has no end"),
            "{errors:?}"
        );
    }

    #[test]
    fn what_cannot_be_written_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(dir.path()).unwrap();
        state.save(&Policy::default()).unwrap();
        let before = fs::read(state.path()).unwrap();
        // A directory in the way of the new file fails as a full disk does.
        fs::create_dir(dir.path().join("commands.new")).unwrap();
        assert!(matches!(state.save(&Policy::default()), Err(StateError::Io { .. })));
        assert_eq!(fs::read(state.path()).unwrap(), before);
    }
}
