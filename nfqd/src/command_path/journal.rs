//! The journal: registrations on disk, as commands, one a line, in one file, each with a checksum in the
//! comment before it.
//!
//! Commands are appended as they are accepted, and synced before they are answered: the cost of a
//! change does not depend on how much is registered. When the file has twice the lines that it
//! needs, it is written anew beside the old one, synced, and renamed over it, so that a crash
//! leaves one or the other. A last line without its end was being written when the host went down;
//! its command was never answered and is not restored. If the disk is full, the policy stays in
//! effect in memory and in the kernel; the daemon reports it and tries again.

use super::command_file::{apply_lines, line_of, sealed};
use nfqd_rules::{Desired, NetworkId};
use nfqd_shmctl::Command;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The directory of `--state`, which one daemon has at a time.
pub struct Journal {
    directory: PathBuf,
    /// The file, open for appending; `None` until it has been written as a whole.
    file: Option<File>,
    lines: usize,
    /// The lines of the file when it was last written as a whole.
    lines_at_save: usize,
    /// Released when the daemon ends, however it ends.
    _lock: Flock<File>,
}

/// The lines over twice the needed ones that the file may have before it is written anew.
const SPARE_LINES: usize = 1000;

/// The name of files with lines that were not restored, before their number.
const REJECTED: &str = "commands.rejected";

/// The reason registrations cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory or a file in it cannot be used.
    #[error("{path}: {source}; choose a directory that nfqd may write, with --state")]
    Io {
        /// The path that cannot be used.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another daemon has the directory.
    #[error(
        "{path}: another nfqd keeps its registrations here; stop it, or choose another directory with \
         --state"
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
}

impl Journal {
    /// Locks the directory, which is created if it does not exist.
    ///
    /// # Errors
    /// If it cannot be created, or another daemon has it.
    pub fn open(directory: &Path) -> Result<Journal, JournalError> {
        let io = |source| JournalError::Io { path: directory.to_path_buf(), source };
        fs::create_dir_all(directory).map_err(io)?;
        let lock = File::options().create(true).append(true).open(directory.join("lock"));
        let lock = Flock::lock(lock.map_err(io)?, FlockArg::LockExclusiveNonblock)
            .map_err(|_| JournalError::Locked { path: directory.to_path_buf() })?;
        let directory = directory.to_path_buf();
        Ok(Journal { directory, file: None, lines: 0, lines_at_save: 0, _lock: lock })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> PathBuf {
        self.directory.join("commands")
    }

    /// Restores the saved registrations, none at first. Returns the errors of lines that are not
    /// restored: one wrong line does not affect the others. If there are any, the file is kept under
    /// a new name, see [`Journal::rejected`].
    ///
    /// # Errors
    /// If the file cannot be read or kept.
    pub fn load(&self, desired: &mut Desired) -> Result<Vec<String>, JournalError> {
        let path = self.path();
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other,
        };
        let found = file.and_then(|file| apply_lines(desired, &path, BufReader::new(file)));
        let io = |source| JournalError::Io { path: path.clone(), source };
        let (mut errors, count) = found.map_err(io)?;
        if count != 0 {
            let kept = self.keep_rejected().map_err(io)?;
            let hidden = count - errors.len();
            if hidden != 0 {
                errors.push(format!("{}: {hidden} more lines", path.display()));
            }
            log::error!(
                "{count} lines of {} are not restored; the file is kept as {}",
                path.display(),
                kept.display()
            );
        }
        Ok(errors)
    }

    /// Gives the file a further name, by which it stays when it is written anew. A name in use is
    /// left alone: it may be the only copy of what an earlier start rejected.
    fn keep_rejected(&self) -> io::Result<PathBuf> {
        let identity = |path: &Path| fs::metadata(path).map(|about| (about.dev(), about.ino()));
        let file = identity(&self.path())?;
        for number in 1_u32.. {
            let name = self.directory.join(format!("{REJECTED}.{number}"));
            // A start that failed afterwards has kept it.
            if identity(&name).is_ok_and(|other| other == file) {
                return Ok(name);
            }
            match fs::hard_link(self.path(), &name) {
                Ok(()) => return Ok(name),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // A file system without hard links.
                Err(_) if !name.exists() => return fs::copy(self.path(), &name).map(|_| name),
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Returns the files with lines that were not restored. The operator removes them when they have
    /// been looked at.
    pub fn rejected(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.directory) else { return Vec::new() };
        let is_rejected = |entry: &fs::DirEntry| {
            entry.file_name().to_str().is_some_and(|name| name.starts_with(REJECTED))
        };
        let mut out: Vec<PathBuf> =
            entries.flatten().filter(is_rejected).map(|entry| entry.path()).collect();
        out.sort_unstable();
        out
    }

    /// Checks that the file is still where it was written.
    ///
    /// # Errors
    /// If it has been removed or moved; the next [`Journal::save`] writes it as a whole.
    pub fn check(&mut self) -> Result<(), JournalError> {
        let Some(file) = &self.file else { return Ok(()) };
        let identity = |about: fs::Metadata| (about.dev(), about.ino());
        let source = match (fs::metadata(self.path()).map(identity), file.metadata().map(identity))
        {
            (Ok(there), Ok(ours)) if there == ours => return Ok(()),
            (Ok(_), Ok(_)) => io::Error::other("replaced by another file"),
            (Err(error), _) | (_, Err(error)) => error,
        };
        self.file = None;
        Err(JournalError::Io { path: self.path(), source })
    }

    /// Saves all registrations: writes the file as a whole.
    ///
    /// # Errors
    /// If it cannot be written; the old file stays then.
    pub fn save(&mut self, desired: &Desired) -> Result<(), JournalError> {
        // Until the new file is in place, nothing may be appended to the old one.
        self.file = None;
        let (file, lines) =
            self.write(desired).map_err(|source| JournalError::Io { path: self.path(), source })?;
        self.file = Some(file);
        (self.lines, self.lines_at_save) = (lines, lines);
        Ok(())
    }

    fn write(&self, desired: &Desired) -> io::Result<(File, usize)> {
        let new = self.directory.join("commands.new");
        let mut file = BufWriter::new(File::create(&new)?);
        file.write_all(b"# Registrations of nfqd. Edit them while it is stopped, and delete the checksum above a line that you change.\n")?;
        let mut lines = 0;
        for (network, command) in desired.policy.commands() {
            file.write_all(sealed(&line_of(&desired.networks, network, &command)).as_bytes())?;
            lines += 1;
        }
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&new, self.path())?;
        File::open(&self.directory)?.sync_all()?;
        Ok((file, lines))
    }

    /// Saves commands about a network, which have been applied to `desired`.
    ///
    /// # Errors
    /// If they cannot be written. The next [`Journal::save`] writes the file as a whole.
    pub fn append(
        &mut self,
        network: NetworkId,
        commands: &[Command],
        desired: &Desired,
    ) -> Result<(), JournalError> {
        if self.lines > 2 * self.lines_at_save + SPARE_LINES {
            return self.save(desired);
        }
        let Some(file) = self.file.as_mut() else { return self.save(desired) };
        let line = |command| sealed(&line_of(&desired.networks, network, command));
        let text: String = commands.iter().map(line).collect();
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_data());
        if let Err(source) = written {
            self.file = None;
            return Err(JournalError::Io { path: self.path(), source });
        }
        self.lines += commands.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::Policy;

    fn loaded(journal: &Journal) -> (Policy, Vec<String>) {
        let mut desired = Desired::default();
        let errors = journal.load(&mut desired).unwrap();
        (desired.policy, errors)
    }

    fn desired(policy: &Policy) -> Desired {
        Desired { policy: policy.clone(), ..Desired::default() }
    }

    #[test]
    fn a_saved_policy_is_restored_and_one_daemon_has_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut policy = Policy::default();
        policy.apply_line("R F 2:0:0:0:0:1 10.0.0.1").unwrap();
        policy.apply_line("A 2:0:0:0:0:1 #2 T 2 d 80").unwrap();
        {
            let mut journal = Journal::open(dir.path()).unwrap();
            assert_eq!(loaded(&journal), (Policy::default(), Vec::new()));
            journal.save(&desired(&policy)).unwrap();
            assert!(matches!(Journal::open(dir.path()), Err(JournalError::Locked { .. })));
        }
        assert_eq!(loaded(&Journal::open(dir.path()).unwrap()), (policy, Vec::new()));
    }

    #[test]
    fn a_wrong_line_does_not_affect_the_others_and_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        fs::write(
            journal.path(),
            b"R F 2:0:0:0:0:1 10.0.0.1\n\nA 2:0:0:0:0:1 I 99\n\xff\nA 2:0:0:0:0:1 I 2\n",
        )
        .unwrap();
        let (policy, errors) = loaded(&journal);
        assert_eq!(policy.commands().count(), 2);
        let expected =
            "commands:3:17: '99': not a bit value of this class; write a number from 0 to 15";
        assert!(errors[0].ends_with(expected) && errors.len() == 2, "{errors:?}");
        journal.save(&desired(&policy)).unwrap();
        let rejected = fs::read(dir.path().join("commands.rejected.1")).unwrap();
        assert!(rejected.windows(4).any(|word| word == b"I 99"));
        // The next accident does not overwrite it, and a start that fails does not repeat it.
        fs::write(journal.path(), "junk\n").unwrap();
        assert_eq!(loaded(&journal).1.len(), 1);
        assert_eq!(loaded(&journal).1.len(), 1);
        assert_eq!(fs::read(dir.path().join("commands.rejected.1")).unwrap(), rejected);
        assert_eq!(journal.rejected().len(), 2);
    }

    /// A byte that has changed on the disk, so that the line is still a command.
    #[test]
    fn a_line_that_does_not_fit_its_checksum_is_not_restored() {
        let dir = tempfile::tempdir().unwrap();
        let mut policy = Policy::default();
        for line in ["R F 2:0:0:0:0:1 10.0.0.1", "R F 2:0:0:0:0:2 10.0.0.2"] {
            policy.apply_line(line).unwrap();
        }
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.save(&desired(&policy)).unwrap();
        let command = policy.apply_line("A 2:0:0:0:0:1 #2 T 2 d 80").unwrap();
        journal.append(NetworkId::ANY, &[command], &desired(&policy)).unwrap();
        let whole = fs::read_to_string(journal.path()).unwrap();
        assert_eq!(loaded(&journal), (policy.clone(), Vec::new()));
        for (from, to, left) in
            [("d 80", "d 81", 2), ("10.0.0.2", "10.0.0.3", 2), ("#2 T", "#3 T", 2)]
        {
            fs::write(journal.path(), whole.replace(from, to)).unwrap();
            let (policy, errors) = loaded(&journal);
            assert_eq!((policy.commands().count(), errors.len()), (left, 1), "{to}: {errors:?}");
            assert!(errors[0].contains("not what nfqd wrote"), "{errors:?}");
        }
        // By hand, without checksums; and a file is what its commands are.
        let by_hand: String = whole
            .lines()
            .filter(|line| !line.starts_with("# crc32"))
            .map(|line| line.replace("d 80", "d 81") + "\n")
            .collect();
        fs::write(journal.path(), by_hand + "R F 2:0:0:0:0:3 10.0.0.3\n").unwrap();
        let (policy, errors) = loaded(&journal);
        assert_eq!((policy.commands().count(), errors), (4, Vec::new()));
    }

    #[test]
    fn garbage_is_read_in_bounded_memory_and_told_in_bounded_words() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let long = "x".repeat(1 << 20);
        let text = "junk\n".repeat(5000) + &long + "\nR F 2:0:0:0:0:1 10.0.0.1\n";
        fs::write(journal.path(), text).unwrap();
        let (policy, errors) = loaded(&journal);
        assert_eq!(policy.commands().count(), 1, "the line behind it");
        assert!(errors.len() == 101 && errors.iter().all(|error| error.len() < 500), "{errors:?}");
        assert!(errors[100].ends_with("4901 more lines"), "{}", errors[100]);
    }

    #[test]
    fn a_directory_that_vanishes_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut journal = Journal::open(&state).unwrap();
        journal.save(&Desired::default()).unwrap();
        journal.check().unwrap();
        fs::rename(&state, dir.path().join("away")).unwrap();
        assert!(matches!(journal.check(), Err(JournalError::Io { .. })));
        assert!(matches!(journal.save(&Desired::default()), Err(JournalError::Io { .. })));
        fs::create_dir(&state).unwrap();
        journal.save(&Desired::default()).unwrap();
        journal.check().unwrap();
    }

    #[test]
    fn commands_are_appended_until_the_file_is_too_long() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        let mut policy = Policy::default();
        let mut change = |journal: &mut Journal, line: &str| {
            let command = policy.apply_line(line).unwrap();
            journal.append(NetworkId::ANY, &[command], &desired(&policy)).unwrap();
            if line.len().is_multiple_of(7) {
                assert_eq!(loaded(journal), (policy.clone(), Vec::new()));
            }
            let text = fs::read_to_string(journal.path()).unwrap();
            text.lines().filter(|line| !line.starts_with('#')).count()
        };
        assert_eq!(change(&mut journal, "R F 2:0:0:0:0:1 10.0.0.1"), 1);
        assert_eq!(change(&mut journal, "A 2:0:0:0:0:1 T 2 d 80"), 2);
        assert_eq!(change(&mut journal, "X 2:0:0:0:0:1"), 3);
        assert_eq!(change(&mut journal, "R F 2:0:0:0:0:1 10.0.0.1"), 4);
        let longest =
            (0..1100).map(|n| change(&mut journal, &format!("A 2:0:0:0:0:1 T 2 d {n}"))).max();
        assert!((SPARE_LINES..SPARE_LINES + 10).contains(&longest.unwrap()), "{longest:?}");
    }

    #[test]
    fn a_line_that_was_being_written_is_not_restored() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        fs::write(journal.path(), b"R F 2:0:0:0:0:1 10.0.0.1\nA 2:0:0:0:0:1 T 2 d 8").unwrap();
        let (policy, errors) = loaded(&journal);
        assert_eq!(policy.commands().count(), 1);
        assert!(
            errors[0].ends_with(
                "commands:2:1: 'A 2:0:0:0:0:1 T 2 d 8': incomplete last line, not restored"
            ),
            "{errors:?}"
        );
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.save(&Desired::default()).unwrap();
        let before = fs::read(journal.path()).unwrap();
        // A directory in the way of the new file fails as a full disk does.
        fs::create_dir(dir.path().join("commands.new")).unwrap();
        assert!(matches!(journal.save(&Desired::default()), Err(JournalError::Io { .. })));
        assert_eq!(fs::read(journal.path()).unwrap(), before);
    }

    #[test]
    fn registrations_keep_their_network() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        let line = "[kvmbr0 vlan 100] R F 02:00:00:00:00:01 10.0.0.1\n";
        fs::write(journal.path(), [line, "R F 2:0:0:0:0:1 10.0.0.2\n", "[a/b] Q\n"].concat())
            .unwrap();
        let mut found = Desired::default();
        let errors = journal.load(&mut found).unwrap();
        assert_eq!((errors.len(), found.policy.middleboxes().len()), (1, 2));
        assert!(errors[0].contains("commands:3:1: '[a/b]': not a network"), "{errors:?}");
        journal.save(&found).unwrap();
        assert!(fs::read_to_string(journal.path()).unwrap().contains(line));
        let mut again = Desired::default();
        assert_eq!(journal.load(&mut again).unwrap(), Vec::<String>::new());
        assert_eq!((again.policy, again.networks), (found.policy, found.networks));
        fs::write(journal.path(), "[br0] A 2:0:0:0:0:1 I 99\n").unwrap();
        assert!(journal.load(&mut Desired::default()).unwrap()[0].contains(":1:23: '99'"));
    }
}
