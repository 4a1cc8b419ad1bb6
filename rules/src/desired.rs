//! The desired state: what the kernel and the engine are to enforce.

use crate::network::{MiddleboxKey, Networks};
use crate::policy::Policy;
use crate::service::Service;
use crate::slots::{SlotKey, Slots};
use nfqd_shmctl::MacAddr;
use std::collections::BTreeSet;

/// A policy with the slots of its backends and the networks of its middleboxes. A clone is cheap.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// The policy.
    pub policy: Policy,
    /// The slots of its backends, and the identifiers of its middleboxes.
    pub slots: Slots,
    /// The networks of the host.
    pub networks: Networks,
}

impl Desired {
    /// Returns the middleboxes that differ between two states; found without visiting what both
    /// share.
    pub fn changed(&self, before: &Desired) -> BTreeSet<MiddleboxKey> {
        let policy = self.policy.changed(&before.policy);
        policy.into_iter().chain(self.slots.changed(&before.slots)).collect()
    }

    /// Returns the service of a slot, if it is registered.
    pub fn service(&self, key: &SlotKey) -> Option<&Service> {
        self.policy.get(key.middlebox)?.service(&key.frontend)
    }

    /// Returns the middlebox with this MAC whose sets and chains have names with this prefix.
    pub fn middlebox_named(&self, prefix: &str, mac: MacAddr) -> Option<MiddleboxKey> {
        self.slots.middlebox_at(self.networks.id_of_prefix(prefix)?, mac)
    }
}
