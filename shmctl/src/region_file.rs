//! The host's side of an ivshmem region: the file behind it.
//!
//! The host reads and writes the file and does not map it, because its owner may cut it at any time:
//! then a read is short, where touching a mapping would be a SIGBUS. A shared mapping of the guest and
//! the file are the same pages (mm/filemap.c, mm/shmem.c).

use crate::region::{DEFAULT_SIZE, MIN_SIZE, RegionError};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, posix_fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{File, FileType, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown,
};
use std::path::{Path, PathBuf};

/// The owner and the mode of a region that the host makes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ownership {
    /// The user, by number; the host's own if there is none.
    pub owner: Option<u32>,
    /// The group, by number; the host's own if there is none.
    pub group: Option<u32>,
    /// The permissions.
    pub mode: u32,
}

impl Default for Ownership {
    /// For the host's own user only.
    fn default() -> Ownership {
        Ownership { owner: None, group: None, mode: 0o600 }
    }
}

/// An open region file.
#[derive(Debug)]
pub struct RegionFile {
    file: File,
    path: PathBuf,
    owner: u32,
    size: u64,
    /// Device and inode, which tell whether the path still names this file; `None` if it never did.
    identity: Option<(u64, u64)>,
}

impl RegionFile {
    /// Opens an existing region.
    ///
    /// # Errors
    /// If it is missing, not accessible, not a regular file, or too small.
    pub fn open(path: &Path) -> Result<RegionFile, RegionError> {
        let io = |source| RegionError::Io { path: path.to_path_buf(), source };
        RegionFile::check(path, existing(path).map_err(|error| kind_or(path, error, io))?)
    }

    /// Opens a region, which is made if it does not exist: [`DEFAULT_SIZE`] long, with this ownership.
    ///
    /// # Errors
    /// As [`RegionFile::open`], or if it cannot be made; then nothing is left of it.
    pub fn open_or_create(path: &Path, ownership: Ownership) -> Result<RegionFile, RegionError> {
        let io = |source| RegionError::Io { path: path.to_path_buf(), source };
        // Asking for a file to be made is refused if another user owns it in a sticky folder
        // (sysctl fs.protected_regular), so that comes second.
        let file = match existing(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                create(path, ownership).map_err(io)?
            }
            other => other.map_err(|error| kind_or(path, error, io))?,
        };
        let about = file.metadata().map_err(io)?;
        if about.is_file() && about.len() == 0 {
            allocate(&file).map_err(io)?;
        }
        RegionFile::check(path, file)
    }

    fn check(path: &Path, file: File) -> Result<RegionFile, RegionError> {
        let path = path.to_path_buf();
        let about = match file.metadata() {
            Ok(about) => about,
            Err(source) => return Err(RegionError::Io { path, source }),
        };
        if !about.is_file() {
            return Err(RegionError::Kind { path, kind: kind_of(about.file_type()) });
        }
        if about.len() < MIN_SIZE {
            return Err(RegionError::Size { path, size: about.len() });
        }
        Ok(RegionFile {
            file,
            path,
            owner: about.uid(),
            size: about.len(),
            identity: Some((about.dev(), about.ino())),
        })
    }

    /// Makes a region that has no path, [`DEFAULT_SIZE`] long, whose size nobody can change (memfd_create(2)).
    /// `name` stands for it in errors.
    ///
    /// # Errors
    /// If there is no memory left.
    pub fn unnamed(name: &Path) -> Result<RegionFile, RegionError> {
        let io = |source: io::Error| RegionError::Io { path: name.to_path_buf(), source };
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create("nfqd", flags).map_err(|errno| io(errno.into()))?);
        allocate(&file).map_err(io)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| io(errno.into()))?;
        RegionFile::adopt(name, file.into())
    }

    /// Takes over the descriptor of a region that has no path.
    ///
    /// # Errors
    /// If it is no region.
    pub fn adopt(name: &Path, descriptor: OwnedFd) -> Result<RegionFile, RegionError> {
        let region = RegionFile::check(name, descriptor.into())?;
        Ok(RegionFile { identity: None, ..region })
    }

    /// Returns the number of the user whom the file belongs to.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// Returns the size in bytes that the file had when it was opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the path of the region.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the path still names this file.
    ///
    /// # Errors
    /// If it names none, or another one.
    pub fn check_path(&self) -> Result<(), RegionError> {
        let path = self.path.clone();
        let Some(identity) = self.identity else { return Ok(()) };
        match std::fs::symlink_metadata(&path) {
            Ok(about) if (about.dev(), about.ino()) == identity => Ok(()),
            Ok(_) => Err(RegionError::Replaced { path }),
            Err(source) => Err(RegionError::Io { path, source }),
        }
    }

    /// Copies bytes out. A concurrent change by the other side may be seen in part.
    ///
    /// # Errors
    /// If the file has been cut, or cannot be read.
    pub fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), RegionError> {
        self.file.read_exact_at(out, offset as u64).map_err(|source| self.error(source))
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), RegionError> {
        self.file.write_all_at(bytes, offset as u64).map_err(|source| self.error(source))
    }

    /// Replaces a byte if it is still `old`. A writer that changes it at the same moment, instead of
    /// waiting, may find its own byte replaced.
    ///
    /// # Errors
    /// As of [`RegionFile::read`] and [`RegionFile::write`].
    pub fn replace(&self, offset: usize, old: u8, new: u8) -> Result<(), RegionError> {
        let mut byte = [0];
        self.read(offset, &mut byte)?;
        if byte == [old] { self.write(offset, &[new]) } else { Ok(()) }
    }

    fn error(&self, source: io::Error) -> RegionError {
        let path = self.path.clone();
        if source.kind() == io::ErrorKind::UnexpectedEof {
            let size = self.file.metadata().map_or(0, |about| about.len());
            return RegionError::Size { path, size };
        }
        RegionError::Io { path, source }
    }
}

impl AsFd for RegionFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens an existing file. A link is not followed: its owner could have any file of the host
/// overwritten.
fn existing(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path)
}

fn create(path: &Path, ownership: Ownership) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let file = options.open(path)?;
    let made = allocate(&file)
        .and_then(|()| fchown(&file, ownership.owner, ownership.group))
        .and_then(|()| file.set_permissions(Permissions::from_mode(ownership.mode)));
    if let Err(error) = made {
        // A file without its memory would be taken for a region the next time.
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

/// Gives a file the size of a region, and the memory for it: a guest that touches a hole which a full
/// file system cannot fill dies.
fn allocate(file: &File) -> io::Result<()> {
    posix_fallocate(file, 0, DEFAULT_SIZE as i64).map_err(io::Error::from)
}

/// Returns the error of a path that cannot be opened: what it is, if it is no regular file.
fn kind_or(
    path: &Path,
    error: io::Error,
    otherwise: impl FnOnce(io::Error) -> RegionError,
) -> RegionError {
    match std::fs::symlink_metadata(path) {
        Ok(about) if !about.is_file() => {
            RegionError::Kind { path: path.to_path_buf(), kind: kind_of(about.file_type()) }
        }
        _ => otherwise(error),
    }
}

fn kind_of(kind: FileType) -> &'static str {
    match kind {
        kind if kind.is_dir() => "a directory",
        kind if kind.is_symlink() => "a symbolic link",
        kind if kind.is_fifo() => "a FIFO",
        kind if kind.is_socket() => "a socket",
        _ => "a device",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Region;

    fn made() -> (tempfile::TempDir, PathBuf, RegionFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("region");
        let host = RegionFile::open_or_create(&path, Ownership::default()).unwrap();
        (dir, path, host)
    }

    #[test]
    fn the_host_and_a_mapping_see_each_other() {
        let (_dir, path, host) = made();
        let guest = Region::open(&path).unwrap();
        assert_eq!(guest.size(), DEFAULT_SIZE);
        guest.write(DEFAULT_SIZE - 3, b"end");
        let mut out = [0; 3];
        host.read(DEFAULT_SIZE - 3, &mut out).unwrap();
        assert_eq!(&out, b"end");
        guest.store(0, b'@');
        host.replace(0, b'@', b'$').unwrap();
        host.replace(0, b'@', b'%').unwrap();
        assert_eq!(guest.load(0), b'$');
        host.write(1, b"reply").unwrap();
        assert_eq!(guest.load(5), b'y');
    }

    #[test]
    fn what_is_no_region_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(path("target"), path("dangling")).unwrap();
        std::fs::write(path("small"), [0; 100]).unwrap();
        let open =
            |path: &Path| RegionFile::open_or_create(path, Ownership::default()).unwrap_err();
        for (path, words) in [
            (dir.path().to_path_buf(), "a directory, not a regular file"),
            (path("fifo"), "a FIFO, not a regular file"),
            (path("dangling"), "a symbolic link, not a regular file"),
            (PathBuf::from("/dev/null"), "a device, not a regular file"),
            (path("small"), "100 bytes long; a region has at least 4096"),
            (path("nowhere/region"), "No such file"),
        ] {
            let error = open(&path);
            assert!(error.to_string().contains(words), "{error}");
        }
        assert!(!path("target").exists(), "a link is not followed");
    }

    #[test]
    fn a_cut_file_is_an_error_and_a_replaced_one_is_noticed() {
        let (_dir, path, host) = made();
        let mut out = [0; 4096];
        host.read(0, &mut out).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let error = host.read(0, &mut out).unwrap_err();
        assert!(matches!(error, RegionError::Size { size: 100, .. }), "{error}");
        host.check_path().unwrap();
        std::fs::rename(&path, path.with_extension("old")).unwrap();
        assert!(matches!(host.check_path(), Err(RegionError::Io { .. })));
        std::fs::write(&path, [0; 4096]).unwrap();
        assert!(matches!(host.check_path(), Err(RegionError::Replaced { .. })));
        RegionFile::open(&path).unwrap();
    }

    #[test]
    fn a_region_without_a_path_cannot_be_cut() {
        let name = Path::new("vm");
        let region = RegionFile::unnamed(name).unwrap();
        let file = File::from(region.as_fd().try_clone_to_owned().unwrap());
        for size in [0, 4096, 2 << 20] {
            assert!(file.set_len(size).is_err(), "{size}");
        }
        region.write(7, b"seen").unwrap();
        let again = RegionFile::adopt(name, file.into()).unwrap();
        let mut out = [0; 4];
        again.read(7, &mut out).unwrap();
        assert_eq!((&out, again.size()), (b"seen", DEFAULT_SIZE as u64));
        again.check_path().unwrap();
    }

    #[test]
    fn a_region_that_is_made_has_the_mode_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str, mode: u32| {
            let path = dir.path().join(name);
            let ownership = Ownership { mode, ..Ownership::default() };
            RegionFile::open_or_create(&path, ownership).unwrap();
            std::fs::metadata(&path).unwrap().mode() & 0o7777
        };
        assert_eq!((mode("one", 0o660), mode("two", 0o600)), (0o660, 0o600));
        assert_eq!(mode("one", 0o600), 0o660, "an existing one keeps its mode");
    }
}
