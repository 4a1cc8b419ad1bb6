//! The desired state: what the kernel and the engine are to enforce.

use crate::policy::Policy;
use crate::slots::Slots;
use nfqd_shmctl::MacAddr;
use std::collections::BTreeSet;

/// A policy with the slots of its backends. A clone is cheap.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// The policy.
    pub policy: Policy,
    /// The slots of its backends, and the identifiers of its middleboxes.
    pub slots: Slots,
}

impl Desired {
    /// Returns the middleboxes that differ between two states; found without visiting what both
    /// share.
    pub fn changed(&self, before: &Desired) -> BTreeSet<MacAddr> {
        let policy = self.policy.changed(&before.policy);
        policy.into_iter().chain(self.slots.changed(&before.slots)).collect()
    }
}
