//! The descriptors that outlive this process: kept by the service manager, or else by a
//! [holder](crate::holder).

use crate::descriptors::{Descriptors, take_inherited};
use crate::holder::Holder;
use crate::supervisor::Supervisor;
use nix::errno::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The number of times that a holder is asked for what it has.
const TAKE_ATTEMPTS: u32 = 5;

/// The store of descriptors.
pub struct DescriptorStore {
    keeper: Keeper,
    /// Those of an earlier nfqd that have not been taken yet.
    earlier: Descriptors,
    /// The number of holders that have ended, with all that they had.
    losses: u32,
    /// The reason there is no holder, if it has been logged.
    logged: Option<String>,
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
        // systemd 254 and later say how many descriptors they keep.
        let keeps = std::env::var("FDSTORE").map_or(true, |most| most != "0");
        if supervisor.is_there() && keeps {
            return DescriptorStore {
                keeper: Keeper::ServiceManager(supervisor),
                earlier,
                losses: 0,
                logged: None,
            };
        }
        let Ok(mut holder) = Holder::connect() else {
            return DescriptorStore { keeper: Keeper::Nobody, earlier, losses: 0, logged: None };
        };
        let mut taken = holder.take();
        // A slow one is asked again: without its answer, all VMs would lose their doorbells.
        for _ in 1..TAKE_ATTEMPTS {
            if taken.is_ok() {
                break;
            }
            if let Ok(again) = Holder::connect() {
                holder = again;
                taken = holder.take();
            }
        }
        match taken {
            Ok(taken) => earlier.extend(taken),
            Err(errno) => {
                log::error!(
                    "holder of descriptors: {errno}; what VMs were given is not taken over"
                );
                let keeper = Keeper::Nobody;
                return DescriptorStore { keeper, earlier, losses: 0, logged: None };
            }
        }
        DescriptorStore { keeper: Keeper::Holder(holder), earlier, losses: 0, logged: None }
    }

    /// A store that keeps nothing.
    #[cfg(test)]
    pub fn none() -> DescriptorStore {
        let (keeper, earlier) = (Keeper::None, Descriptors::new());
        DescriptorStore { keeper, earlier, losses: 0, logged: None }
    }

    /// Takes a descriptor of an earlier nfqd.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.earlier.remove(name)
    }

    /// Keeps a descriptor under a name. Returns false if that failed: it is lost when nfqd ends, unless
    /// it is stored again.
    pub fn store(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> bool {
        if let Keeper::Nobody = self.keeper {
            match Holder::start() {
                Ok(holder) => (self.keeper, self.logged) = (Keeper::Holder(holder), None),
                Err(error) => {
                    let reason = error.to_string();
                    if self.logged.as_ref() != Some(&reason) {
                        log::warn!(
                            "no holder of descriptors: {reason}; VMs' doorbells are lost if nfqd ends"
                        );
                    }
                    self.logged = Some(reason);
                    return false;
                }
            }
        }
        match &self.keeper {
            Keeper::ServiceManager(supervisor) => supervisor.store(name, descriptor),
            Keeper::Holder(holder) => {
                let stored = holder.store(name, descriptor);
                return self.check(stored);
            }
            _ => {}
        }
        true
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

    /// Notes a holder that has ended; another one is started when there is something to keep. Returns
    /// whether it has not.
    fn check(&mut self, result: Result<(), Errno>) -> bool {
        if let Err(errno) = result {
            log::warn!("holder of descriptors: {errno}; another one is started");
            (self.keeper, self.losses) = (Keeper::Nobody, self.losses + 1);
        }
        result.is_ok()
    }

    /// Looks after the holder, once a second.
    pub fn follow(&mut self) {
        if let Keeper::Holder(holder) = &self.keeper {
            let alive = holder.check();
            self.check(alive);
        }
    }

    /// Returns a number that differs when what was kept has to be stored again, because its holder has
    /// ended.
    pub fn losses(&self) -> u32 {
        self.losses
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
        // What belongs to a channel that could not be opened waits for the next nfqd.
        if !self.earlier.is_empty() {
            return;
        }
        if let Keeper::Holder(holder) = std::mem::replace(&mut self.keeper, Keeper::Nobody) {
            holder.release();
        }
    }
}
