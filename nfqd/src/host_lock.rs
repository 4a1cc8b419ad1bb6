//! The lock of a network namespace: one nfqd has its tables and queues at a time.
//!
//! The lock is a locked file in `/run`, where only root can be in the way, named by the namespace's
//! inode. It ends with its process, however that ends.

use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The network namespace of this process.
const NAMESPACE: &str = "/proc/self/ns/net";
/// The directory of the locks.
const DIRECTORY: &str = "/run/nfqd";

/// The reason this nfqd may not have the network namespace.
#[derive(Debug, thiserror::Error)]
pub enum HostLockError {
    /// Another one has it.
    #[error(
        "another nfqd (pid {pid}) serves this network namespace; stop it first, or ask it by 'nfqd status'"
    )]
    Taken {
        /// The process, as it has written it.
        pid: String,
    },
    /// The file cannot be made.
    #[error("{path}: {source}; nfqd locks the network namespace there")]
    Io {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The lock, until it is dropped or the process ends.
#[derive(Debug)]
pub struct HostLock {
    _file: Flock<File>,
}

/// Returns the path of a file that belongs to this network namespace, where only root can be in the way.
pub(crate) fn path_of_namespace(extension: &str) -> io::Result<PathBuf> {
    let inode = fs::metadata(NAMESPACE)?.ino();
    Ok(Path::new(DIRECTORY).join(format!("netns-{inode}.{extension}")))
}

impl HostLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// If another nfqd has it, or the file cannot be made.
    pub fn take() -> Result<HostLock, HostLockError> {
        let io = |path: &Path, source| HostLockError::Io { path: path.to_path_buf(), source };
        let directory = Path::new(DIRECTORY);
        let made = DirBuilder::new().mode(0o755).recursive(true).create(directory);
        made.map_err(|error| io(directory, error))?;
        let path = path_of_namespace("lock").map_err(|error| io(Path::new(NAMESPACE), error))?;
        // Whoever can open it can lock it.
        let file = File::options().create(true).read(true).append(true).mode(0o600).open(&path);
        let file = file.map_err(|error| io(&path, error))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            HostLockError::Taken { pid: pid.trim().to_string() }
        })?;
        let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        written.map_err(|error| io(&path, error))?;
        Ok(HostLock { _file: file })
    }
}
