//! A mapped ivshmem region: bytes in, bytes out, and single bytes atomically.
//!
//! The other side may change any byte at any time. So there is never a Rust reference into the
//! region: ranges are copied by volatile reads and writes, and only the copy is parsed. This is the
//! only module of the crate with `unsafe`.
#![allow(unsafe_code)]

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::posix_fallocate;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

/// The size of a region that nfqd creates: 1 MiB, like the original's.
pub const DEFAULT_SIZE: usize = 1 << 20;

/// The smallest size of a region, in bytes: that of the mailbox.
const MIN_SIZE: u64 = 4096;

/// A shared mapping of a region.
#[derive(Debug)]
pub struct Region {
    map: MmapRaw,
    file: File,
    path: PathBuf,
}

/// The reason a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The region cannot be opened, created or mapped.
    #[error("{path}: {source}; it must be a file that this user can read and write")]
    Io {
        /// The path asked for.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The path is not a file that can be shared memory.
    #[error("{path}: not a regular file; give the mem-path of the VM's memory-backend-file")]
    Kind {
        /// The path asked for.
        path: PathBuf,
    },
    /// The file is too small for the mailbox, or smaller than it was.
    #[error("{path}: {size} bytes long; a region has at least {needed}")]
    Size {
        /// The path asked for.
        path: PathBuf,
        /// The size in bytes.
        size: u64,
        /// The size that it must have, in bytes.
        needed: u64,
    },
}

impl Region {
    /// Maps an existing region.
    ///
    /// # Errors
    /// If it is missing, unreadable, not a file, or too small.
    pub fn open(path: &Path) -> Result<Region, RegionError> {
        Region::map(path, OpenOptions::new().read(true).write(true), false)
    }

    /// Maps a region, which is created if it does not exist: [`DEFAULT_SIZE`] long, and for this
    /// user only.
    ///
    /// # Errors
    /// As [`Region::open`].
    pub fn open_or_create(path: &Path) -> Result<Region, RegionError> {
        let mut options = OpenOptions::new();
        Region::map(path, options.read(true).write(true).create(true).mode(0o600), true)
    }

    fn map(path: &Path, options: &OpenOptions, create: bool) -> Result<Region, RegionError> {
        let io = |source| RegionError::Io { path: path.to_path_buf(), source };
        let file = options.open(path).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        // In sysfs, the memory of a PCI device is a regular file as well.
        if !about.is_file() {
            return Err(RegionError::Kind { path: path.to_path_buf() });
        }
        if create {
            if about.len() == 0 {
                file.set_len(DEFAULT_SIZE as u64).map_err(io)?;
            }
            // Touching a hole that a full file system cannot fill is a SIGBUS; here it is an error.
            let len = file.metadata().map_err(io)?.len().min(DEFAULT_SIZE as u64);
            posix_fallocate(&file, 0, len as i64).map_err(|errno| io(errno.into()))?;
        }
        let size = file.metadata().map_err(io)?.len();
        if size < MIN_SIZE {
            return Err(RegionError::Size { path: path.to_path_buf(), size, needed: MIN_SIZE });
        }
        let map = MmapOptions::new().map_raw(&file).map_err(io)?;
        Ok(Region { map, file, path: path.to_path_buf() })
    }

    /// Returns the path of the region.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.map.len()
    }

    /// Checks that the file still backs the whole mapping. Touching a mapping of a file that was
    /// truncated is a SIGBUS, so this comes before reading a region that another user could
    /// truncate.
    ///
    /// # Errors
    /// If the file has become smaller, or its size is not known.
    pub fn check_size(&self) -> Result<(), RegionError> {
        let size = self
            .file
            .metadata()
            .map_err(|source| RegionError::Io { path: self.path.clone(), source })?
            .len();
        let needed = self.map.len() as u64;
        if size < needed {
            return Err(RegionError::Size { path: self.path.clone(), size, needed });
        }
        Ok(())
    }

    /// Returns a pointer to `len` bytes at `offset`.
    ///
    /// # Panics
    /// If they are not inside the region: offsets are constants of the layout, never read from the
    /// region.
    fn range(&self, offset: usize, len: usize) -> *mut u8 {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.map.len());
        assert!(inside, "{len} bytes at {offset} of a region of {}", self.map.len());
        // SAFETY: needed to name a byte of the mapping; the assertion keeps the pointer inside it.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    /// Copies bytes out. A concurrent change by the other side may be seen in part.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        let from = self.range(offset, out.len());
        let (words, rest) = out.as_chunks_mut::<8>();
        let done = words.len() * 8;
        for (index, word) in words.iter_mut().enumerate() {
            // SAFETY: needed because the memory is shared; `range` has checked all of it, an array
            // of bytes needs no alignment, and a volatile read holds for any value that another
            // process puts there.
            *word = unsafe { from.add(index * 8).cast::<[u8; 8]>().read_volatile() };
        }
        for (index, byte) in rest.iter_mut().enumerate() {
            // SAFETY: as above.
            *byte = unsafe { from.add(done + index).read_volatile() };
        }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// If the range is not inside the region.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.range(offset, bytes.len());
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `read`; no Rust reference to this memory exists that the write could
            // break.
            unsafe { to.add(index).write_volatile(*byte) };
        }
    }

    fn atomic(&self, offset: usize) -> &AtomicU8 {
        let at = self.range(offset, 1);
        // SAFETY: needed for ordering between two processes; the byte is inside the mapping, which
        // lives as long as `self`, and every access that must not be torn goes through an atomic.
        unsafe { AtomicU8::from_ptr(at) }
    }

    /// Reads a byte; later reads see what its writer wrote before it.
    ///
    /// # Panics
    /// If the offset is not inside the region.
    pub fn load(&self, offset: usize) -> u8 {
        self.atomic(offset).load(Ordering::Acquire)
    }

    /// Writes a byte after everything written before it.
    ///
    /// # Panics
    /// If the offset is not inside the region.
    pub fn store(&self, offset: usize, byte: u8) {
        self.atomic(offset).store(byte, Ordering::Release);
    }

    /// Replaces `old` by `new` if the byte is still `old`, and returns whether it was.
    ///
    /// # Panics
    /// If the offset is not inside the region.
    pub fn replace(&self, offset: usize, old: u8, new: u8) -> bool {
        self.atomic(offset).compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("region");
        assert!(matches!(Region::open(&path), Err(RegionError::Io { .. })));
        let host = Region::open_or_create(&path).unwrap();
        let guest = Region::open(&path).unwrap();
        assert_eq!((host.size(), guest.size()), (DEFAULT_SIZE, DEFAULT_SIZE));
        guest.write(DEFAULT_SIZE - 3, b"end");
        let mut out = [0; 3];
        host.read(DEFAULT_SIZE - 3, &mut out);
        assert_eq!(&out, b"end");
        guest.store(0, b'@');
        assert_eq!(host.load(0), b'@');
        assert!(host.replace(0, b'@', b'$'));
        assert!(!host.replace(0, b'@', b'$'));
    }

    #[test]
    fn files_that_are_not_regions_are_rejected() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Region::open_or_create(dir.path()).is_err());
        let small = dir.path().join("small");
        std::fs::write(&small, [0; 100]).unwrap();
        assert!(matches!(Region::open_or_create(&small), Err(RegionError::Size { size: 100, .. })));
    }

    #[test]
    fn a_cut_file_is_noticed_before_it_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("region");
        let region = Region::open_or_create(&path).unwrap();
        region.check_size().unwrap();
        File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
        assert!(matches!(region.check_size(), Err(RegionError::Size { size: 4096, .. })));
    }

    #[test]
    #[should_panic(expected = "2 bytes at 1048575")]
    fn a_range_outside_the_region_panics() {
        let dir = tempfile::tempdir().unwrap();
        let region = Region::open_or_create(&dir.path().join("region")).unwrap();
        region.read(DEFAULT_SIZE - 1, &mut [0; 2]);
    }
}
