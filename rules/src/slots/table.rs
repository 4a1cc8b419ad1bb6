//! The table of slots in use.

use super::allocator::IdAllocator;
use super::version::{SlotVersion, fingerprint};
use super::{BackendObservation, BackendView, Liveness, Slot, SlotKey};
use crate::ids::{MiddleboxId, SlotId};
use crate::limits::BACKENDS_OF_NETWORK;
use crate::network::{MiddleboxKey, NetworkId};
use crate::policy::{Middlebox, Policy};
use crate::service::{BackendRef, Service};
use crate::timeouts::LONGEST_TIMEOUT;
use imbl::{OrdMap, OrdSet};
use nfqd_shmctl::{BackendName, Frontend, MacAddr, OnDead, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Quarantine of a slot's identifier: longer than anything that the kernel caches under it.
pub const QUARANTINE: Duration = Duration::from_secs(LONGEST_TIMEOUT as u64 + 30);

/// Quarantine of a middlebox' identifier: longer than any packet is on its way to the engine.
const MIDDLEBOX_QUARANTINE: Duration = Duration::from_secs(60);

/// The most slot identifiers of one middlebox that may be in quarantine. Guests create and remove
/// services at will; the limit keeps one of them from using up the identifiers of all.
pub const MAX_QUARANTINED: u32 = 16_384;

/// The slots in use, and the identifiers by which marks name middleboxes on the way to the engine.
/// A clone is cheap: both share what is equal.
#[derive(Clone, Debug)]
pub struct Slots {
    slot_ids: IdAllocator<SlotVersion, SlotId>,
    current: OrdMap<SlotKey, Slot>,
    by_id: OrdMap<SlotId, SlotKey>,
    /// The addresses of the backends of each middlebox whose replies are translated, with the time at
    /// which they were removed, if they were; and the number of middleboxes on a network that have each.
    counted_by: OrdMap<MiddleboxKey, CountedBackends>,
    backends: OrdMap<(NetworkId, IpAddr), u32>,
    /// The number of backend addresses of a network, those of IPv4 and those of IPv6.
    backend_counts: OrdMap<(NetworkId, bool), u32>,
    middlebox_ids: IdAllocator<MiddleboxKey, MiddleboxId>,
    by_middlebox_id: OrdMap<MiddleboxId, MiddleboxKey>,
    /// The addresses of the registered backends of each middlebox, alive or not, and the number of
    /// middleboxes on a network that have each.
    watched_by: OrdMap<MiddleboxKey, (NetworkId, Arc<BTreeSet<IpAddr>>)>,
    watched: OrdMap<(NetworkId, IpAddr), u32>,
    /// The registered addresses on each network, with the middleboxes that have them.
    claims: OrdSet<(NetworkId, IpAddr, MiddleboxKey)>,
    claimed_by: OrdMap<MiddleboxKey, Arc<BTreeSet<(NetworkId, IpAddr)>>>,
    /// The network of each middlebox, and the other way round.
    homes: OrdMap<MiddleboxKey, NetworkId>,
    residents: OrdMap<(NetworkId, MacAddr), MiddleboxKey>,
}

impl Default for Slots {
    fn default() -> Slots {
        Slots {
            slot_ids: IdAllocator::new(QUARANTINE, MAX_QUARANTINED),
            current: OrdMap::new(),
            by_id: OrdMap::new(),
            counted_by: OrdMap::new(),
            backends: OrdMap::new(),
            backend_counts: OrdMap::new(),
            middlebox_ids: IdAllocator::new(MIDDLEBOX_QUARANTINE, MAX_QUARANTINED),
            by_middlebox_id: OrdMap::new(),
            claims: OrdSet::new(),
            claimed_by: OrdMap::new(),
            watched_by: OrdMap::new(),
            watched: OrdMap::new(),
            homes: OrdMap::new(),
            residents: OrdMap::new(),
        }
    }
}

/// The addresses of backends on a network.
type CountedBackends = (NetworkId, Arc<BTreeMap<IpAddr, Option<Instant>>>);

/// The time for which a removed backend's packets are still recognized: longer than TCP retransmits a
/// segment (924 s with tcp_retries2 = 15).
const FORMER_TIME: Duration = Duration::from_secs(960);
/// The most backends of a middlebox that were removed and are still known.
const MAX_FORMER: usize = 255;

/// A slot that the policy needs.
struct Wanted {
    observation: BackendObservation,
    dsr: bool,
}

impl Slots {
    /// Takes over the slots that a table in the kernel carries.
    pub fn adopt(&mut self, found: impl IntoIterator<Item = (SlotId, SlotVersion)>, now: Instant) {
        for (id, version) in found {
            self.slot_ids.adopt(id, version, now);
        }
    }

    /// Takes over the identifiers of middleboxes that a table in the kernel carries.
    pub fn adopt_middleboxes(
        &mut self,
        found: impl IntoIterator<Item = (MiddleboxId, MiddleboxKey)>,
        now: Instant,
    ) {
        for (id, middlebox) in found {
            self.middlebox_ids.adopt(id, middlebox, now);
        }
    }

    /// Quarantines an identifier that a cached flow in the kernel carries.
    pub fn reserve(&mut self, id: SlotId, now: Instant) {
        self.slot_ids.reserve_up_to(id, now);
    }

    /// Restores `old` in place of slots that were in use for a moment; the identifiers of those are
    /// quarantined.
    pub fn restore(&mut self, old: Slots, now: Instant) {
        let discarded = std::mem::replace(self, old);
        for (version, &id) in discarded.slot_ids.used() {
            if !self.slot_ids.used().contains_key(version) {
                self.slot_ids.quarantine_again(id, version, now);
            }
        }
        for (middlebox, &id) in discarded.middlebox_ids.used() {
            if !self.middlebox_ids.used().contains_key(middlebox) {
                self.middlebox_ids.quarantine_again(id, middlebox, now);
            }
        }
    }

    /// Gives every backend and middlebox of the policy a slot and an identifier, and releases those
    /// that are gone. Returns false if there are not enough identifiers.
    pub fn sync_all(&mut self, policy: &Policy, view: &impl BackendView, now: Instant) -> bool {
        let slots = self.slot_ids.used().keys().map(|version| version.key().middlebox);
        let known = self.middlebox_ids.used().keys().copied().chain(slots);
        let gone: BTreeSet<MiddleboxKey> = known.filter(|key| policy.get(*key).is_none()).collect();
        for middlebox in gone {
            self.sync(middlebox, None, view, now);
        }
        // Moving middleboxes leave first, so that two may change places, and those that name their
        // network come before those that were only seen there.
        let all = policy.middleboxes();
        for key in all.keys() {
            if self.network_of(*key) != Some(view.network(*key)) {
                self.settle(*key, None);
            }
        }
        let (named, seen): (Vec<_>, Vec<_>) =
            all.iter().partition(|(key, _)| view.network(**key) == key.network);
        let mut enough = true;
        for (key, middlebox) in named.into_iter().chain(seen) {
            enough &= self.sync(*key, Some(middlebox), view, now);
        }
        enough
    }

    /// Does the same for one middlebox; `None` if it is not registered. A backend that is dead has
    /// no slot, unless its flows stay with it. Returns false if there are not enough identifiers.
    pub fn sync(
        &mut self,
        key: MiddleboxKey,
        middlebox: Option<&Middlebox>,
        view: &impl BackendView,
        now: Instant,
    ) -> bool {
        self.settle(key, middlebox.map(|_| view.network(key)));
        if middlebox.is_some() {
            // Without an identifier of the middlebox, slots are of no use.
            let Some(id) = self.middlebox_ids.allocate(key, now) else { return false };
            self.by_middlebox_id.insert(id, key);
        } else {
            if let Some(id) = self.middlebox_ids.used().get(&key) {
                self.by_middlebox_id.remove(id);
            }
            self.middlebox_ids.release(&key, now);
        }
        let network = self.network_of(key);
        self.watch(key, network.zip(middlebox));
        self.claim(key, network.zip(middlebox));
        let wanted = network
            .map_or_else(BTreeMap::new, |network| wanted_slots(network, key, middlebox, view));
        let first = SlotVersion { key: first_key(key), fingerprint: 0 };
        let gone: Vec<SlotVersion> = self
            .slot_ids
            .used()
            .range(first..)
            .map(|(version, _)| *version)
            .take_while(|version| version.key.middlebox == key)
            .filter(|version| !wanted.contains_key(version))
            .collect();
        for version in gone {
            self.slot_ids.release(&version, now);
        }
        let before: Vec<(SlotKey, Slot)> = self.of(key).collect();
        for (key, slot) in before {
            self.current.remove(&key);
            self.by_id.remove(&slot.id);
        }
        let mut enough = self.count_backends(key, network.zip(middlebox), now);
        for (version, Wanted { observation, dsr }) in wanted {
            let SlotVersion { key, fingerprint } = version;
            let BackendObservation { mac, liveness } = observation;
            let network = network.unwrap_or(NetworkId::ANY);
            let has_room = dsr || self.is_backend(network, key.backend.ip);
            let id = if has_room { self.slot_ids.allocate(version, now) } else { None };
            let Some(id) = id else {
                enough = false;
                continue;
            };
            let slot = Slot { id, mac, liveness, dsr, network, fingerprint };
            self.current.insert(key, slot);
            self.by_id.insert(id, key);
        }
        enough
    }

    /// Whether the kernel's set of a network's backends has room for an address. Former backends leave
    /// half of it to others.
    fn has_room(&self, network: NetworkId, ip: IpAddr, is_former: bool) -> bool {
        let count = self.backend_counts.get(&(network, ip.is_ipv4())).copied().unwrap_or(0);
        let room = if is_former { BACKENDS_OF_NETWORK / 2 } else { BACKENDS_OF_NETWORK };
        count < room || self.is_backend(network, ip)
    }

    /// Replaces the addresses of backends that are counted for a middlebox: of all that it has
    /// registered, because a backend without a slot, which is dead, still sends packets of its flows; and
    /// for some time of those that it had. Packets of a backend that owns the frontend's address need no
    /// translation, so it is not counted. Returns false if a network has too many.
    fn count_backends(
        &mut self,
        key: MiddleboxKey,
        registered: Option<(NetworkId, &Middlebox)>,
        now: Instant,
    ) -> bool {
        let old = self.counted_by.get(&key).cloned();
        let mut new: BTreeMap<IpAddr, Option<Instant>> = BTreeMap::new();
        if let Some((_, middlebox)) = registered {
            let services = middlebox.services().values().filter(|service| !service.options().dsr);
            let names = services.flat_map(|service| service.backends().keys());
            new.extend(names.map(|name| (name.ip, None)));
        }
        let network = registered.map(|(network, _)| network);
        // Without a service, its flows are over.
        let has_services =
            registered.is_some_and(|(_, middlebox)| !middlebox.services().is_empty());
        let before = old.as_ref().filter(|(its, _)| Some(*its) == network && has_services);
        if let Some((_, old)) = before {
            let gone = old.iter().filter(|(ip, _)| !new.contains_key(ip));
            let former = gone.map(|(ip, since)| (*ip, since.unwrap_or(now)));
            let recent = former.filter(|(_, since)| now < *since + FORMER_TIME);
            let mut recent: Vec<_> = recent.collect();
            recent.sort_by_key(|(_, since)| std::cmp::Reverse(*since));
            recent.truncate(MAX_FORMER);
            new.extend(recent.into_iter().map(|(ip, since)| (ip, Some(since))));
        }
        let new = network.map(|network| (network, new)).filter(|(_, new)| !new.is_empty());
        let is_same = match (&old, &new) {
            (Some((network, old)), Some((now, new))) => network == now && **old == *new,
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return true;
        }
        for (network, ip) in old.iter().flat_map(|(n, all)| all.keys().map(|ip| (*n, *ip))) {
            self.count_backend((network, ip), |count| count.saturating_sub(1));
        }
        let Some((network, addresses)) = new else {
            self.counted_by.remove(&key);
            return true;
        };
        let mut enough = true;
        let mut counted = BTreeMap::new();
        for (ip, since) in addresses {
            if self.has_room(network, ip, since.is_some()) {
                self.count_backend((network, ip), |count| count + 1);
                counted.insert(ip, since);
            } else if since.is_none() {
                enough = false;
            }
        }
        self.counted_by.insert(key, (network, Arc::new(counted)));
        enough
    }

    /// Returns the addresses of backends that are counted for a middlebox.
    pub fn counted(&self, key: MiddleboxKey) -> impl Iterator<Item = IpAddr> {
        let counted = self.counted_by.get(&key).into_iter();
        counted.flat_map(|(_, addresses)| addresses.keys().copied())
    }

    /// Returns the middleboxes that had a backend whose packets need no longer be known.
    pub fn with_expired_backends(&self, now: Instant) -> Vec<MiddleboxKey> {
        let is_over = |since: &Option<Instant>| since.is_some_and(|at| now >= at + FORMER_TIME);
        let expired = self.counted_by.iter().filter(|(_, (_, all))| all.values().any(is_over));
        expired.map(|(key, _)| *key).collect()
    }

    fn count_backend(&mut self, address: (NetworkId, IpAddr), change: fn(u32) -> u32) {
        let is_new = match change(self.backends.get(&address).copied().unwrap_or(0)) {
            0 => self.backends.remove(&address).map(|_| false),
            count => self.backends.insert(address, count).is_none().then_some(true),
        };
        if let Some(is_new) = is_new {
            let family = (address.0, address.1.is_ipv4());
            let count = self.backend_counts.entry(family).or_default();
            *count = if is_new { *count + 1 } else { count.saturating_sub(1) };
        }
    }

    /// Returns the middleboxes whose identifiers, networks or slots differ; found without visiting what both
    /// share.
    pub fn changed(&self, before: &Slots) -> BTreeSet<MiddleboxKey> {
        use imbl::ordmap::DiffItem::{Add, Remove, Update};
        let slots = before.current.diff(&self.current).map(|item| match item {
            Add(key, _) | Remove(key, _) | Update { new: (key, _), .. } => key.middlebox,
        });
        let ids = before.middlebox_ids.used().diff(self.middlebox_ids.used());
        let middleboxes = ids.map(|item| match item {
            Add(key, _) | Remove(key, _) | Update { new: (key, _), .. } => *key,
        });
        let homes = before.homes.diff(&self.homes).map(|item| match item {
            Add(key, _) | Remove(key, _) | Update { new: (key, _), .. } => *key,
        });
        let claims = before.claims.diff(&self.claims).flat_map(|item| {
            use imbl::ordset::DiffItem::{Add, Remove};
            let (Add(claim) | Remove(claim)) = item;
            let (network, ip, key) = *claim;
            // The address may pass from one middlebox to another.
            [Some(key), before.owner(network, ip), self.owner(network, ip)].into_iter().flatten()
        });
        let counted = before.counted_by.diff(&self.counted_by).map(|item| match item {
            Add(key, _) | Remove(key, _) | Update { new: (key, _), .. } => *key,
        });
        slots.chain(middleboxes).chain(homes).chain(claims).chain(counted).collect()
    }

    /// Returns the slot of a backend of a service.
    pub fn get(&self, key: &SlotKey) -> Option<Slot> {
        self.current.get(key).copied()
    }

    /// Returns the backend of a slot in use.
    pub fn key_of(&self, id: SlotId) -> Option<SlotKey> {
        self.by_id.get(&id).copied()
    }

    /// Returns the backend of a slot that is no longer in use, as long as a flow may refer to it.
    pub fn former_key_of(&self, id: SlotId) -> Option<SlotKey> {
        self.slot_ids.former_key(id).map(|version| version.key())
    }

    /// Returns the slot in use of the backend that this slot stands or stood for.
    pub fn current(&self, id: SlotId) -> Option<SlotId> {
        if self.by_id.contains_key(&id) {
            return Some(id);
        }
        self.get(&self.former_key_of(id)?).map(|slot| slot.id)
    }

    /// Returns all slots in use.
    pub fn iter(&self) -> impl Iterator<Item = (SlotKey, Slot)> {
        self.current.iter().map(|(key, slot)| (*key, *slot))
    }

    /// Returns the slots of one middlebox.
    pub fn of(&self, middlebox: MiddleboxKey) -> impl Iterator<Item = (SlotKey, Slot)> {
        let from = self.current.range(first_key(middlebox)..);
        let all = from.map(|(key, slot)| (*key, *slot));
        all.take_while(move |(key, _)| key.middlebox == middlebox)
    }

    /// Whether an address on a network is that of a backend whose replies are translated.
    pub fn is_backend(&self, network: NetworkId, ip: IpAddr) -> bool {
        self.backends.contains_key(&(network, ip))
    }

    /// Returns the network that a middlebox is on; `None` if it is not registered, or if another one
    /// with its MAC is there.
    pub fn network_of(&self, middlebox: MiddleboxKey) -> Option<NetworkId> {
        self.homes.get(&middlebox).copied()
    }

    /// Returns the middlebox with this MAC on a network.
    pub fn middlebox_at(&self, network: NetworkId, mac: MacAddr) -> Option<MiddleboxKey> {
        self.residents.get(&(network, mac)).copied()
    }

    /// Whether a network has middleboxes.
    pub fn is_inhabited(&self, network: NetworkId) -> bool {
        let first = self.residents.range((network, MacAddr([0; 6]))..).next();
        first.is_some_and(|((found, _), _)| *found == network)
    }

    /// Replaces the addresses of backends that are watched for a middlebox.
    fn watch(&mut self, key: MiddleboxKey, registered: Option<(NetworkId, &Middlebox)>) {
        let addresses = |middlebox: &Middlebox| {
            let services = middlebox.services().values();
            services.flat_map(|service| service.backends().keys().map(|name| name.ip)).collect()
        };
        let new = registered.map(|(network, middlebox)| (network, addresses(middlebox)));
        let new = new.filter(|(_, addresses): &(_, BTreeSet<IpAddr>)| !addresses.is_empty());
        let old = self.watched_by.get(&key).cloned();
        let is_same = match (&old, &new) {
            (Some((network, old)), Some((now, new))) => network == now && **old == *new,
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return;
        }
        for (network, ip) in old.iter().flat_map(|(n, all)| all.iter().map(|ip| (*n, *ip))) {
            match self.watched.get(&(network, ip)).copied().unwrap_or(0) {
                0 | 1 => drop(self.watched.remove(&(network, ip))),
                count => drop(self.watched.insert((network, ip), count - 1)),
            }
        }
        let Some((network, addresses)) = new else {
            self.watched_by.remove(&key);
            return;
        };
        for ip in &addresses {
            *self.watched.entry((network, *ip)).or_default() += 1;
        }
        self.watched_by.insert(key, (network, Arc::new(addresses)));
    }

    /// Replaces the claims of a middlebox to its addresses.
    fn claim(&mut self, key: MiddleboxKey, registered: Option<(NetworkId, &Middlebox)>) {
        let claims = |(network, middlebox): (NetworkId, &Middlebox)| {
            middlebox.addresses().map(|ip| (network, ip)).collect()
        };
        let new: BTreeSet<(NetworkId, IpAddr)> = registered.map(claims).unwrap_or_default();
        let old = self.claimed_by.get(&key).cloned().unwrap_or_default();
        if *old == new {
            return;
        }
        for (network, ip) in old.difference(&new) {
            self.claims.remove(&(*network, *ip, key));
        }
        for (network, ip) in new.difference(&old) {
            self.claims.insert((*network, *ip, key));
        }
        if new.is_empty() {
            self.claimed_by.remove(&key);
        } else {
            self.claimed_by.insert(key, Arc::new(new));
        }
    }

    /// Returns the middlebox that a registered address belongs to; the first of several that have
    /// registered it.
    pub fn owner(&self, network: NetworkId, ip: IpAddr) -> Option<MiddleboxKey> {
        let least = MiddleboxKey { network: NetworkId::ANY, mac: MacAddr([0; 6]) };
        let (its, its_ip, key) = self.claims.range((network, ip, least)..).next()?;
        ((*its, *its_ip) == (network, ip)).then_some(*key)
    }

    /// Whether a registered backend on a network has this address, alive or not.
    pub fn is_watched(&self, network: NetworkId, ip: IpAddr) -> bool {
        self.watched.contains_key(&(network, ip))
    }

    /// Returns the networks that have middleboxes.
    pub fn inhabited(&self) -> impl Iterator<Item = NetworkId> {
        let mut next = (NetworkId::ANY, MacAddr([0; 6]));
        std::iter::from_fn(move || {
            let ((network, _), _) = self.residents.range(next..).next()?;
            next = (NetworkId::new(network.get() + 1)?, MacAddr([0; 6]));
            Some(*network)
        })
    }

    /// Moves a middlebox to its network. If another one with its MAC is there, that one stays, unless
    /// only the new one names this network.
    fn settle(&mut self, key: MiddleboxKey, network: Option<NetworkId>) {
        let before = self.network_of(key);
        if before == network && before.is_some() {
            return;
        }
        if let Some(before) = before {
            self.homes.remove(&key);
            self.residents.remove(&(before, key.mac));
        }
        let Some(network) = network else { return };
        let other = self.middlebox_at(network, key.mac);
        if other.is_none_or(|other| key.network == network && other.network != network) {
            other.and_then(|other| self.homes.remove(&other));
            self.homes.insert(key, network);
            self.residents.insert((network, key.mac), key);
        }
    }

    /// Returns the identifier of a middlebox.
    pub fn middlebox_id(&self, middlebox: MiddleboxKey) -> Option<MiddleboxId> {
        self.middlebox_ids.used().get(&middlebox).copied()
    }

    /// Returns the middlebox with this identifier.
    pub fn middlebox(&self, id: MiddleboxId) -> Option<MiddleboxKey> {
        self.by_middlebox_id.get(&id).copied()
    }
}

impl SlotKey {
    /// The slot that stands for the middlebox itself in a pool: for its local connections.
    pub fn local(middlebox: MiddleboxKey, frontend: Frontend) -> SlotKey {
        let backend = BackendName { ip: frontend.ip, port: frontend.port };
        SlotKey { middlebox, frontend, backend }
    }

    /// Whether the slot stands for the middlebox itself.
    pub fn is_local(&self) -> bool {
        *self == SlotKey::local(self.middlebox, self.frontend)
    }
}

fn wanted_slots(
    network: NetworkId,
    key: MiddleboxKey,
    middlebox: Option<&Middlebox>,
    view: &impl BackendView,
) -> BTreeMap<SlotVersion, Wanted> {
    let mut wanted = BTreeMap::new();
    let Some(middlebox) = middlebox else { return wanted };
    for (frontend, service) in middlebox.services() {
        let fingerprint = fingerprint(network, key.mac, middlebox, frontend, service);
        if service.method().is_pool() {
            let local = SlotKey::local(key, *frontend);
            let observation =
                BackendObservation { mac: Some(key.mac), ..BackendObservation::UNKNOWN };
            wanted
                .insert(SlotVersion { key: local, fingerprint }, Wanted { observation, dsr: true });
        }
        for (name, backend) in service.backends() {
            let reference = BackendRef { middlebox: key, frontend, service, name, backend };
            let observation = view.observe(&reference, network);
            let has_flows = match observation.liveness {
                Liveness::Alive | Liveness::Failing => true,
                Liveness::Dead => keeps_flows(frontend, service),
                Liveness::Drained => false,
            };
            if !has_flows {
                continue;
            }
            let slot = SlotKey { middlebox: key, frontend: *frontend, backend: *name };
            let dsr = service.options().dsr;
            wanted.insert(SlotVersion { key: slot, fingerprint }, Wanted { observation, dsr });
        }
    }
    wanted
}

/// Whether some flows of a service stay with a dead backend.
fn keeps_flows(frontend: &Frontend, service: &Service) -> bool {
    match service.options().on_dead {
        OnDead::Keep => true,
        OnDead::KeepConnections => frontend.protocol != Some(Protocol::UDP),
        OnDead::Move | OnDead::Reset => false,
    }
}

/// Returns a key that sorts before all slots of a middlebox.
fn first_key(middlebox: MiddleboxKey) -> SlotKey {
    let least = IpAddr::from([0; 4]);
    let backend = BackendName { ip: least, port: None };
    SlotKey { middlebox, frontend: Frontend::of(least), backend }
}
