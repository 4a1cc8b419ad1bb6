//! The link of an ivshmem-plain device: a region file, which VMs make, cut and replace.

use super::shared_memory::SharedMemory;
use nfqd_shmctl::{Ownership, RegionError, RegionFile};
use nix::unistd::geteuid;
use std::path::{Path, PathBuf};

/// A region file, followed by its path.
pub(super) struct RegionLink {
    path: PathBuf,
    /// The users whose file is accepted when the region is opened again, because anybody can create
    /// a file of that name in a world-writable directory.
    owners: Vec<u32>,
    /// The memory, or why it is not read.
    memory: Result<SharedMemory, RegionError>,
}

impl RegionLink {
    /// Opens a region, which is made if it does not exist.
    pub(super) fn open(path: &Path, ownership: Ownership) -> RegionLink {
        let region = RegionFile::open_or_create(path, ownership);
        let memory = region.and_then(|region| SharedMemory::open(region, 0));
        if let Err(error) = &memory {
            log::error!("{error}; the commands of this channel are not read until this is fixed");
        }
        let first = memory.as_ref().ok().map(|memory| memory.region().owner());
        let owners = [0, geteuid().as_raw()].into_iter().chain(ownership.owner).chain(first);
        RegionLink { path: path.to_path_buf(), owners: owners.collect(), memory }
    }

    /// Returns the memory, unless it is not read at the moment.
    pub(super) fn memory(&self) -> Option<&SharedMemory> {
        self.memory.as_ref().ok()
    }

    /// Returns the memory, unless it is not read at the moment.
    pub(super) fn memory_mut(&mut self) -> Option<&mut SharedMemory> {
        self.memory.as_mut().ok()
    }

    /// Returns why the region is not read.
    pub(super) fn error(&self) -> Option<&RegionError> {
        self.memory.as_ref().err()
    }

    /// Rejects a path that is not a region and will not become one, such as a directory.
    ///
    /// # Errors
    /// The reason.
    pub(super) fn refuse_mistake(self) -> Result<RegionLink, RegionError> {
        let is_mistake = |error: &RegionError| match error {
            RegionError::Kind { .. } => true,
            RegionError::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            RegionError::Size { .. } | RegionError::Owner { .. } | RegionError::Replaced { .. } => {
                false
            }
        };
        match self.memory {
            Err(error) if is_mistake(&error) => Err(error),
            memory => Ok(RegionLink { memory, ..self }),
        }
    }

    /// Follows the path: a region that a VM's start has made anew, or that could not be used, is
    /// opened again. Returns whether it was.
    pub(super) fn follow(&mut self) -> bool {
        if let Ok(memory) = &self.memory {
            let Err(error) = memory.repair() else { return false };
            self.close(error);
        }
        let opened = RegionFile::open(&self.path).and_then(|region| {
            let (path, owner) = (region.path().to_path_buf(), region.owner());
            let is_known = self.owners.contains(&owner);
            if is_known {
                SharedMemory::open(region, 0)
            } else {
                Err(RegionError::Owner { path, owner })
            }
        });
        self.memory = opened;
        if self.memory.is_ok() {
            log::info!("{}: its commands are read again", self.path.display());
        }
        self.memory.is_ok()
    }

    /// Stops reading the region.
    pub(super) fn close(&mut self, error: RegionError) {
        log::warn!("{error}; the commands of this channel are not read until this is fixed");
        self.memory = Err(error);
    }

    /// Accepts no owner, as of a path in a directory of somebody else.
    #[cfg(test)]
    pub(super) fn forget_owners(&mut self) {
        self.owners.clear();
    }
}
