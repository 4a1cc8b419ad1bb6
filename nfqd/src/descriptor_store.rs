//! The descriptors that outlive this process: kept by the service manager, or else by a
//! [holder](crate::holder).

use crate::descriptors::{Descriptors, take_inherited};
use crate::holder::Holder;
use crate::supervisor::Supervisor;
use nix::errno::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The store of descriptors.
pub struct DescriptorStore {
    keeper: Keeper,
    /// Those of an earlier nfqd that have not been taken yet.
    earlier: Descriptors,
    /// Whether a holder has ended, with all that it had.
    has_lost: bool,
}

enum Keeper {
    ServiceManager(Supervisor),
    Holder(Holder),
    /// None yet: a holder is started for the first descriptor.
    Nobody,
    /// None at all.
    #[cfg(test)]
    None,
}

impl DescriptorStore {
    /// Opens the store, with what an earlier nfqd has left there.
    pub fn open() -> DescriptorStore {
        let supervisor = Supervisor::from_environment();
        let mut earlier = take_inherited();
        if supervisor.is_there() {
            return DescriptorStore {
                keeper: Keeper::ServiceManager(supervisor),
                earlier,
                has_lost: false,
            };
        }
        let Ok(holder) = Holder::connect() else {
            return DescriptorStore { keeper: Keeper::Nobody, earlier, has_lost: false };
        };
        match holder.take() {
            Ok(taken) => earlier.extend(taken),
            Err(errno) => log::warn!("holder of descriptors: {errno}"),
        }
        DescriptorStore { keeper: Keeper::Holder(holder), earlier, has_lost: false }
    }

    /// A store that keeps nothing.
    #[cfg(test)]
    pub fn none() -> DescriptorStore {
        let (keeper, earlier) = (Keeper::None, Descriptors::new());
        DescriptorStore { keeper, earlier, has_lost: false }
    }

    /// Takes a descriptor of an earlier nfqd.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.earlier.remove(name)
    }

    /// Keeps a descriptor under a name. If that fails, it is logged: it is lost when nfqd ends.
    pub fn store(&mut self, name: &str, descriptor: BorrowedFd<'_>) {
        if let Keeper::Nobody = self.keeper {
            match Holder::start() {
                Ok(holder) => self.keeper = Keeper::Holder(holder),
                Err(error) => {
                    log::warn!("no holder of descriptors: {error}; {name} is lost when nfqd ends");
                }
            }
        }
        match &self.keeper {
            Keeper::ServiceManager(supervisor) => supervisor.store(name, descriptor),
            Keeper::Holder(holder) => {
                let stored = holder.store(name, descriptor);
                self.check(stored);
            }
            _ => {}
        }
    }

    /// Closes a descriptor that is kept.
    pub fn remove(&mut self, name: &str) {
        match &self.keeper {
            Keeper::ServiceManager(supervisor) => supervisor.remove(name),
            Keeper::Holder(holder) => {
                let removed = holder.remove(name);
                self.check(removed);
            }
            _ => {}
        }
    }

    fn check(&mut self, result: Result<(), Errno>) {
        if let Err(errno) = result {
            log::warn!("holder of descriptors: {errno}; another one is started");
            (self.keeper, self.has_lost) = (Keeper::Nobody, true);
        }
    }

    /// Looks after the holder, once a second.
    pub fn follow(&mut self) {
        self.has_lost = false;
        if let Keeper::Holder(holder) = &self.keeper {
            let alive = holder.check();
            self.check(alive);
        }
    }

    /// Whether what was kept has to be stored again, because its holder has ended.
    pub fn has_lost(&self) -> bool {
        self.has_lost
    }

    /// Whether a service manager keeps the descriptors.
    pub fn is_managed(&self) -> bool {
        matches!(self.keeper, Keeper::ServiceManager(_))
    }

    /// Closes those of an earlier nfqd that nobody has taken, because their channels are gone.
    pub fn forget_earlier(&mut self) {
        for (name, _) in std::mem::take(&mut self.earlier) {
            log::info!("{name} is closed: it belongs to no channel any more");
            self.remove(&name);
        }
    }

    /// Ends a holder, which has nothing worth keeping.
    pub fn release(&mut self) {
        if let Keeper::Holder(holder) = std::mem::replace(&mut self.keeper, Keeper::Nobody) {
            holder.release();
        }
    }
}
