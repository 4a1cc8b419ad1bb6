//! The guest's side of an ivshmem region, a mapping: bytes in, bytes out, and single bytes
//! atomically.
//!
//! The other side may change any byte at any time. So there is never a Rust reference into the
//! region: ranges are copied by volatile reads and writes, and only the copy is parsed. This is the
//! only module of the crate with `unsafe`.
#![allow(unsafe_code)]

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// The size of a region that nfqd creates: 1 MiB, like the original's.
pub const DEFAULT_SIZE: usize = 1 << 20;

/// The smallest size of a region, in bytes: that of the mailbox.
pub(crate) const MIN_SIZE: u64 = 4096;

/// A shared mapping of a region.
#[derive(Debug)]
pub struct Region {
    map: MmapRaw,
    file: File,
    register: Option<Register>,
}

/// The doorbell register of an ivshmem device, in BAR 0 (QEMU, docs/specs/ivshmem-spec.rst).
#[derive(Debug)]
pub struct Register {
    map: MmapRaw,
}

/// The size of BAR 0, and the offset of the doorbell register in it, in bytes.
const REGISTERS_SIZE: usize = 256;
const DOORBELL: usize = 12;

impl Register {
    /// Maps the registers of a device, its `resource0` in sysfs.
    ///
    /// # Errors
    /// If they cannot be mapped.
    pub fn open(path: &Path) -> io::Result<Register> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() < REGISTERS_SIZE as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Register { map: MmapOptions::new().len(REGISTERS_SIZE).map_raw(&file)? })
    }

    /// Rings: writes a number, the peer's in the upper half and the vector in the lower. All that was
    /// written to the memory before is seen by who hears it.
    pub fn ring(&self, number: u32) {
        std::sync::atomic::fence(Ordering::SeqCst);
        // SAFETY: needed because the register is a device's; the mapping begins at a page and has
        // REGISTERS_SIZE bytes, so the number is aligned and inside it.
        unsafe { self.map.as_mut_ptr().add(DOORBELL).cast::<u32>().write_volatile(number.to_le()) };
    }
}

/// A lock of a region's file, see [`Region::try_lock`].
#[derive(Debug)]
pub struct RegionLock {
    _lock: Flock<File>,
}

impl RegionLock {
    /// Locks a file by a descriptor of its own, without waiting.
    pub(crate) fn try_new(path: &Path) -> io::Result<Option<RegionLock>> {
        let own = OpenOptions::new().read(true).open(path)?;
        match Flock::lock(own, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(RegionLock { _lock: lock })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }
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
    #[error(
        "{path}: {kind}, not a regular file; give the mem-path of the VM's memory-backend-file"
    )]
    Kind {
        /// The path asked for.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file is too small for the mailbox.
    #[error("{path}: {size} bytes long; a region has at least {MIN_SIZE}")]
    Size {
        /// The path asked for.
        path: PathBuf,
        /// The size in bytes.
        size: u64,
    },
    /// The file belongs to a user who may not take the place of the one before.
    #[error(
        "{path}: recreated by user {owner}, who may not own this region; add owner={owner} to its --shm option if \
         the VM runs as that user"
    )]
    Owner {
        /// The path asked for.
        path: PathBuf,
        /// The user's number.
        owner: u32,
    },
    /// The path names another file than before.
    #[error("{path}: replaced by another file")]
    Replaced {
        /// The path asked for.
        path: PathBuf,
    },
}

impl Region {
    /// Maps an existing region.
    ///
    /// # Errors
    /// If it is missing, unreadable, not a file, or too small.
    pub fn open(path: &Path) -> Result<Region, RegionError> {
        let io = |source| RegionError::Io { path: path.to_path_buf(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        // In sysfs, the memory of a PCI device is a regular file as well.
        if !about.is_file() {
            return Err(RegionError::Kind { path: path.to_path_buf(), kind: "a special file" });
        }
        if about.len() < MIN_SIZE {
            return Err(RegionError::Size { path: path.to_path_buf(), size: about.len() });
        }
        Ok(Region { map: MmapOptions::new().map_raw(&file).map_err(io)?, file, register: None })
    }

    /// The region of a device with a doorbell.
    #[must_use]
    pub fn with_register(self, register: Register) -> Region {
        Region { register: Some(register), ..self }
    }

    /// Rings the host by this number, if the device has a doorbell and the number is not 0.
    pub(crate) fn ring(&self, number: u32) {
        if let Some(register) = self.register.as_ref().filter(|_| number != 0) {
            register.ring(number);
        }
    }

    /// Locks the file against other processes that lock it (`flock`), without waiting. Returns `None` if
    /// another process has it. The lock has a descriptor of its own, so it is released with the value
    /// or the process. It is advisory: the memory stays accessible.
    ///
    /// # Errors
    /// If the file cannot be locked.
    pub fn try_lock(&self) -> io::Result<Option<RegionLock>> {
        RegionLock::try_new(Path::new(&format!("/proc/self/fd/{}", self.file.as_raw_fd())))
    }

    /// Returns the size in bytes.
    pub fn size(&self) -> usize {
        self.map.len()
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

    fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "offset {offset} of a number is not a multiple of 8");
        let at = self.range(offset, 8);
        // SAFETY: as above; a mapping begins at a page, so the number is aligned.
        unsafe { AtomicU64::from_ptr(at.cast()) }
    }

    /// Reads a little-endian number as a whole; later reads see what its writer wrote before it.
    ///
    /// # Panics
    /// If the offset is not inside the region, or not a multiple of 8.
    pub fn load_u64(&self, offset: usize) -> u64 {
        u64::from_le(self.atomic_u64(offset).load(Ordering::Acquire))
    }

    /// Writes a little-endian number as a whole, after everything written before it.
    ///
    /// # Panics
    /// If the offset is not inside the region, or not a multiple of 8.
    pub fn store_u64(&self, offset: usize, number: u64) {
        self.atomic_u64(offset).store(number.to_le(), Ordering::Release);
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
    #[should_panic(expected = "2 bytes at 1048575")]
    fn a_range_outside_the_region_panics() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("region");
        std::fs::write(&path, vec![0; DEFAULT_SIZE]).unwrap();
        let region = Region::open(&path).unwrap();
        region.read(DEFAULT_SIZE - 1, &mut [0; 2]);
    }
}
