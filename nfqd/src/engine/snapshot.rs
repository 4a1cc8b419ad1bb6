//! The snapshot of the policy that the engine decides by.

use super::Ingress;
use nfqd_rules::mark::{self, Origin};
use nfqd_rules::pool::Pools;
use nfqd_rules::slots::{BackendView, SlotKey};
use nfqd_rules::{Desired, Firewall, Middlebox, MiddleboxKey, NetworkId, Policy, SlotId};
use nfqd_shmctl::{Action, MacAddr};
use std::time::Instant;

/// Everything that a verdict depends on besides the packet and the flows. Every change of the
/// policy makes a new one, which is cheap.
#[derive(Clone, Debug)]
pub struct Snapshot {
    desired: Desired,
    pools: Pools,
    /// Whether the kernel may cache flows.
    pub cache_flows: bool,
    /// Whether connection tracking sees packets behind the engine, but before they are redirected: by
    /// br_netfilter.
    pub tracked_first: bool,
    /// The filters that the engine evaluates.
    pub filter_scope: FilterScope,
}

/// The filters that the engine evaluates; the kernel has evaluated the others before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FilterScope {
    /// All filters.
    #[default]
    All,
    /// Filters of middleboxes without a rule on VLAN tags: packets that come through br_netfilter
    /// do not show their tags.
    Untagged,
    /// No filters.
    None,
}

impl Default for Snapshot {
    fn default() -> Snapshot {
        Snapshot::new(Desired::default(), Pools::default())
    }
}

impl Snapshot {
    /// A snapshot of a desired state; `pools` are those of its services.
    pub fn new(desired: Desired, pools: Pools) -> Snapshot {
        let filter_scope = FilterScope::All;
        Snapshot { desired, pools, cache_flows: true, tracked_first: false, filter_scope }
    }

    /// Returns the snapshot of a policy that follows this one: slots and pools stay as far as their
    /// services do. `view` is the observed state of backends.
    pub fn successor(&self, policy: Policy, view: &impl BackendView) -> Snapshot {
        let mut desired = Desired { policy, ..self.desired.clone() };
        desired.slots.sync_all(&desired.policy, view, Instant::now());
        let mut pools = self.pools.clone();
        for mac in desired.changed(&self.desired) {
            pools.update(mac, desired.policy.get(mac), &desired.slots);
        }
        Snapshot { desired, pools, ..*self }
    }

    /// Returns a copy that evaluates all filters, and whose pools of a middlebox take turns of their own.
    pub fn detached(&self, middlebox: Option<MiddleboxKey>) -> Snapshot {
        let mut pools = self.pools.clone();
        middlebox.into_iter().for_each(|key| pools.detach(key));
        let filter_scope = FilterScope::All;
        Snapshot { desired: self.desired.clone(), pools, filter_scope, ..*self }
    }

    /// Returns the policy.
    pub fn policy(&self) -> &Policy {
        &self.desired.policy
    }

    /// Returns the desired state.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Returns the pools of the services.
    pub fn pools(&self) -> &Pools {
        &self.pools
    }

    /// Returns the origin of a packet by its mark, and the MAC of the middlebox that it goes to, if
    /// the mark names that.
    pub fn origin_of(&self, mark: u32) -> (Ingress, Option<MacAddr>) {
        let slots = &self.desired.slots;
        let (network, mac) = match mark::origin(mark) {
            Origin::Network(network) => (network, None),
            Origin::Middlebox(id) => {
                let key = slots.middlebox(id);
                let network = key.and_then(|key| slots.network_of(key));
                (network.unwrap_or(NetworkId::ANY), key.map(|key| key.mac))
            }
        };
        (Ingress { network, is_own: mark::is_own(mark) }, mac)
    }

    /// Returns the middlebox with this MAC on a network.
    pub fn middlebox_at(&self, network: NetworkId, mac: MacAddr) -> Option<MiddleboxKey> {
        self.desired.slots.middlebox_at(network, mac)
    }

    /// Returns what the filters of the middlebox with this MAC do with packets that no rule matches.
    pub fn default_action(&self, network: NetworkId, mac: MacAddr) -> Action {
        let middlebox = self.middlebox_at(network, mac).and_then(|key| self.policy().get(key));
        let firewall = middlebox.and_then(Middlebox::firewall);
        firewall.map_or(Action::Allow, Firewall::default_action)
    }

    /// Returns the MAC of a slot's backend, if it is known.
    pub fn mac(&self, key: &SlotKey) -> Option<MacAddr> {
        self.desired.slots.get(key).and_then(|slot| slot.mac)
    }

    /// Whether the backend of a slot owns the frontend's address.
    pub fn is_dsr(&self, key: &SlotKey) -> bool {
        self.desired.slots.get(key).is_some_and(|slot| slot.dsr)
    }

    /// Whether the engine evaluates the filters of a middlebox.
    pub(super) fn filters(&self, mac: MacAddr, middlebox: &Middlebox) -> bool {
        match self.filter_scope {
            FilterScope::All => true,
            FilterScope::Untagged => {
                middlebox.firewall().is_some_and(|firewall| !firewall.depends_on_tags(mac))
            }
            FilterScope::None => false,
        }
    }

    /// Whether packets can be sent to the backend of a slot.
    pub(super) fn is_reachable(&self, key: &SlotKey) -> bool {
        self.mac(key).is_some()
    }

    /// Whether this snapshot has never known a slot, so that a newer one has allocated it.
    pub(super) fn is_unknown(&self, slot: SlotId) -> bool {
        let slots = &self.desired.slots;
        slots.key_of(slot).is_none() && slots.former_key_of(slot).is_none()
    }
}
