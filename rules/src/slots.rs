//! Slots: small numbers for the backends of services, which packet marks and the kernel's flow caches carry.
//!
//! A number is not given to another backend while a cached flow may still carry it.

use crate::mark::MAX_INDEX;
use crate::policy::{Middlebox, Policy};
use crate::service::Service;
use imbl::{OrdMap, OrdSet};
use nfqd_shmctl::{BackendName, MacAddr, OnDead, Vip};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// What a slot stands for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotKey {
    /// The middlebox.
    pub middlebox: MacAddr,
    /// What clients use.
    pub vip: Vip,
    /// The backend; it has a port if and only if `vip` has one.
    pub backend: BackendName,
}

impl SlotKey {
    /// The ports that are translated into each other, when they differ: the one that clients use, and the backend's.
    pub fn ports(&self) -> Option<(u16, u16)> {
        self.vip.port.zip(self.backend.port).filter(|(own, backends)| own != backends)
    }
}

impl fmt::Display for SlotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}", self.middlebox, self.vip, self.backend)
    }
}

impl FromStr for SlotKey {
    type Err = ();

    fn from_str(text: &str) -> Result<SlotKey, ()> {
        let (service, backend) = text.split_once(" -> ").ok_or(())?;
        let (middlebox, vip) = service.split_once(' ').ok_or(())?;
        Ok(SlotKey { middlebox: middlebox.parse()?, vip: vip.parse()?, backend: backend.parse()? })
    }
}

/// A backend of a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// The number, from 1.
    pub index: u32,
    /// The backend's MAC, once it is known.
    pub mac: Option<MacAddr>,
    /// Whether it is taken as alive.
    pub alive: bool,
    /// Whether the backend owns the address that clients use: nothing but the MAC is rewritten.
    pub dsr: bool,
    fingerprint: u32,
}

impl Slot {
    /// The comment of a kernel map's element for this slot of `key`.
    pub fn comment(self, key: SlotKey) -> String {
        Edition { key, fingerprint: self.fingerprint }.to_string()
    }
}

/// What the host has seen of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// Its MAC.
    pub mac: Option<MacAddr>,
    /// Whether it is taken as alive.
    pub alive: bool,
}

impl Seen {
    /// Nothing is known, so nothing speaks against it.
    pub const NOTHING: Seen = Seen { mac: None, alive: true };
}

/// Numbers from 1 for things that come and go. A number that is given back rests before another thing gets it.
#[derive(Clone, Debug)]
struct Numbers<K: Ord> {
    used: OrdMap<K, u32>,
    /// Numbers given back, with the time from which they may be used again, and what they stood for, when it is known.
    resting: OrdMap<u32, (Instant, Option<K>)>,
    /// How many numbers rest that were each middlebox'.
    resting_of: OrdMap<MacAddr, u32>,
    /// How long a number rests.
    rest: Duration,
    /// No number that rests is ready before this.
    ready: Option<Instant>,
    /// Numbers below `next` that are neither used nor rest.
    free: OrdSet<u32>,
    /// Numbers from here on were never used.
    next: u32,
}

/// Whose a number is.
trait Owned {
    fn owner(&self) -> MacAddr;
}

impl Owned for MacAddr {
    fn owner(&self) -> MacAddr {
        *self
    }
}

impl Owned for Edition {
    fn owner(&self) -> MacAddr {
        self.key.middlebox
    }
}

impl<K: Copy + Ord + Owned> Numbers<K> {
    fn new(rest: Duration) -> Numbers<K> {
        Numbers {
            used: OrdMap::new(),
            resting: OrdMap::new(),
            resting_of: OrdMap::new(),
            rest,
            ready: None,
            free: OrdSet::new(),
            next: 1,
        }
    }

    fn adopt(&mut self, index: u32, key: K, now: Instant) {
        if index == 0 || index > MAX_INDEX || self.used.contains_key(&key) {
            return;
        }
        self.seen(index, now);
        if self.take_up(index) {
            self.used.insert(key, index);
        }
    }

    /// The number rests no longer, if it did.
    fn take_up(&mut self, index: u32) -> bool {
        let Some((_, owner)) = self.resting.remove(&index) else { return false };
        if let Some(owner) = owner.map(|key| key.owner()) {
            match self.resting_of.get(&owner).copied().unwrap_or(0) {
                0 | 1 => drop(self.resting_of.remove(&owner)),
                count => drop(self.resting_of.insert(owner, count - 1)),
            }
        }
        true
    }

    /// A number that the kernel may still carry: it and those below it rest, unless they are taken over.
    fn seen(&mut self, index: u32, now: Instant) {
        for index in self.next..=index.min(MAX_INDEX) {
            self.lay_down(index, None, now);
        }
        self.next = self.next.max(index.saturating_add(1));
    }

    fn lay_down(&mut self, index: u32, owner: Option<K>, now: Instant) {
        let until = now + self.rest;
        self.ready = Some(self.ready.map_or(until, |ready| ready.min(until)));
        self.resting.insert(index, (until, owner));
        if let Some(key) = owner {
            *self.resting_of.entry(key.owner()).or_default() += 1;
        }
    }

    /// Takes a number back.
    fn release(&mut self, key: &K, now: Instant) {
        if let Some(index) = self.used.remove(key) {
            self.lay_down(index, Some(*key), now);
        }
    }

    /// The number of a key, which gets one if it has none and there is one left.
    fn give(&mut self, key: K, now: Instant) -> Option<u32> {
        if let Some(index) = self.used.get(&key) {
            return Some(*index);
        }
        self.wake(now);
        if self.resting_of.get(&key.owner()).is_some_and(|resting| *resting >= MOST_RESTING) {
            return None;
        }
        // The lowest free number. One that rests is not free even for the key that had it: the engine may have
        // forgotten meanwhile what the kernel still remembers under it.
        let lowest = self.free.get_min().copied();
        let index = match lowest {
            Some(index) => index,
            None => (self.next <= MAX_INDEX).then_some(self.next)?,
        };
        self.free.remove(&index);
        self.next = self.next.max(index + 1);
        self.used.insert(key, index);
        Some(index)
    }

    /// Frees the numbers that have rested.
    fn wake(&mut self, now: Instant) {
        if self.ready.is_none_or(|ready| ready > now) {
            return;
        }
        let rested: Vec<u32> =
            self.resting.iter().filter(|(_, (until, _))| *until <= now).map(|(index, _)| *index).collect();
        for index in rested {
            self.take_up(index);
            self.free.insert(index);
        }
        self.ready = self.resting.values().map(|(until, _)| *until).min();
    }

    /// A number that `key` used for a moment: the kernel may have learnt it.
    fn lay_down_again(&mut self, index: u32, key: &K, now: Instant) {
        if self.free.remove(&index).is_some() || self.take_up(index) {
            self.lay_down(index, Some(*key), now);
        }
        for index in self.next..=index.min(MAX_INDEX) {
            self.lay_down(index, Some(*key), now);
        }
        self.next = self.next.max(index.saturating_add(1));
    }
}

/// The slots in use, and the numbers by which marks name middleboxes on the way to the engine. A clone costs nothing: both
/// share what is the same.
#[derive(Clone, Debug)]
pub struct Slots {
    numbers: Numbers<Edition>,
    current: OrdMap<SlotKey, Slot>,
    by_slot: OrdMap<u32, SlotKey>,
    /// How many slots each backend has.
    backends: OrdMap<IpAddr, u32>,
    middleboxes: Numbers<MacAddr>,
    by_index: OrdMap<u32, MacAddr>,
}

/// A slot under one edition of its middlebox' services. Any change of them may send a flow elsewhere, so it gives all
/// slots of the middlebox new numbers: what the kernel has cached misses, and asks the engine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Edition {
    key: SlotKey,
    fingerprint: u32,
}

impl Edition {
    /// What the slot stands for.
    pub fn key(&self) -> SlotKey {
        self.key
    }
}

/// The text by which a kernel map's element is recognised after a restart.
impl fmt::Display for Edition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} edition {:08x}", self.key, self.fingerprint)
    }
}

impl FromStr for Edition {
    type Err = ();

    fn from_str(text: &str) -> Result<Edition, ()> {
        let (key, fingerprint) = text.split_once(" edition ").ok_or(())?;
        let fingerprint = u32::from_str_radix(fingerprint, 16).map_err(drop)?;
        Ok(Edition { key: key.parse()?, fingerprint })
    }
}

/// FNV-1a over a text: the same after a restart.
fn fnv(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// What packets of a service's slots depend on besides their keys. A change gives them new numbers, so that what the kernel
/// remembers misses. Where all packets of a service go to one backend, that is all services of the middlebox. Flows of a
/// pool keep their backend, whatever other pools there are; services to one backend take what they take at once, which for
/// a pool are those that go before it.
fn fingerprint(mac: MacAddr, middlebox: &Middlebox, vip: &Vip, service: &Service) -> u32 {
    let is_pool = service.method().is_pool();
    let counts =
        |(other, its): &(&Vip, &Service)| !is_pool || !its.method().is_pool() && other.goes_before(vip);
    let commands = middlebox.services().iter().filter(counts).flat_map(|(vip, its)| its.commands(mac, *vip));
    let text = commands.map(|command| command.to_string()).collect::<Vec<_>>().join("\n");
    let kind = if is_pool && service.terms().dsr { "dsr" } else { "nat" };
    fnv(&format!("{kind} {text}"))
}

/// The slot that stands for the middlebox itself, in a pool: for connections that it has itself.
pub fn own_slot(middlebox: MacAddr, vip: Vip) -> SlotKey {
    SlotKey { middlebox, vip, backend: BackendName { ip: vip.ip, port: vip.port } }
}

impl Default for Slots {
    fn default() -> Slots {
        Slots {
            numbers: Numbers::new(REST),
            current: OrdMap::new(),
            by_slot: OrdMap::new(),
            backends: OrdMap::new(),
            middleboxes: Numbers::new(MIDDLEBOX_REST),
            by_index: OrdMap::new(),
        }
    }
}

/// How long the number of a middlebox rests: longer than any packet is on its way to the engine.
const MIDDLEBOX_REST: Duration = Duration::from_secs(60);

/// How long a slot's number rests: longer than anything that the kernel remembers under it.
pub const REST: Duration = Duration::from_secs(crate::nft::ruleset::LONGEST_MEMORY as u64 + 30);

/// How many numbers of slots may rest that were one middlebox'. Guests make and end services as they like; this keeps one from
/// using up what others need.
pub const MOST_RESTING: u32 = 16_384;

impl Slots {
    /// Takes over the slots that a table in the kernel still carries.
    pub fn adopt(&mut self, found: impl IntoIterator<Item = (u32, Edition)>, now: Instant) {
        found.into_iter().for_each(|(index, key)| self.numbers.adopt(index, key, now));
    }

    /// A number that a flow in the kernel still carries: nothing else gets it soon.
    pub fn seen(&mut self, index: u32, now: Instant) {
        self.numbers.seen(index, now);
    }

    /// Puts `old` back, in the place of slots that held for a moment: what these have used rests.
    pub fn put_back(&mut self, old: Slots, now: Instant) {
        let discarded = std::mem::replace(self, old);
        for (edition, &index) in &discarded.numbers.used {
            if !self.numbers.used.contains_key(edition) {
                self.numbers.lay_down_again(index, edition, now);
            }
        }
        for (mac, &index) in &discarded.middleboxes.used {
            if !self.middleboxes.used.contains_key(mac) {
                self.middleboxes.lay_down_again(index, mac, now);
            }
        }
    }

    /// Takes over the numbers of middleboxes that a table in the kernel still carries.
    pub fn adopt_middleboxes(&mut self, found: impl IntoIterator<Item = (u32, MacAddr)>, now: Instant) {
        found.into_iter().for_each(|(index, mac)| self.middleboxes.adopt(index, mac, now));
    }

    /// Gives every backend and every middlebox of the policy a number, and takes back those that are gone. `seen` says what
    /// the host has seen of a backend of a middlebox' service; one that is dead has no number, unless its flows stay with it. False
    /// when there are not enough numbers.
    pub fn follow(
        &mut self,
        policy: &Policy,
        seen: impl Fn(MacAddr, &Vip, &Service, &BackendName) -> Seen,
        now: Instant,
    ) -> bool {
        let known = self
            .middleboxes
            .used
            .keys()
            .chain(self.numbers.used.keys().map(|edition| &edition.key.middlebox));
        let gone: BTreeSet<MacAddr> = known.filter(|mac| policy.get(**mac).is_none()).copied().collect();
        for mac in gone {
            self.update(mac, None, &seen, now);
        }
        let mut enough = true;
        for (mac, middlebox) in policy.middleboxes() {
            enough &= self.update(*mac, Some(middlebox), &seen, now);
        }
        enough
    }

    /// The same for one middlebox, which is registered so or not at all.
    pub fn update(
        &mut self,
        mac: MacAddr,
        middlebox: Option<&Middlebox>,
        seen: impl Fn(MacAddr, &Vip, &Service, &BackendName) -> Seen,
        now: Instant,
    ) -> bool {
        let mut enough = true;
        match middlebox {
            Some(_) => match self.middleboxes.give(mac, now) {
                Some(index) => drop(self.by_index.insert(index, mac)),
                // Without it nothing else is of use.
                None => return false,
            },
            None => {
                let index = self.middleboxes.used.get(&mac).copied();
                index.map(|index| self.by_index.remove(&index));
                self.middleboxes.release(&mac, now);
            }
        }
        let mut wanted: BTreeMap<Edition, (Seen, bool)> = BTreeMap::new();
        if let Some(middlebox) = middlebox {
            for (vip, service) in middlebox.services() {
                let (fingerprint, dsr) = (fingerprint(mac, middlebox, vip, service), service.terms().dsr);
                if service.method().is_pool() {
                    let own = Edition { key: own_slot(mac, *vip), fingerprint };
                    wanted.insert(own, (Seen { mac: Some(mac), ..Seen::NOTHING }, true));
                }
                for (name, backend) in service.backends() {
                    let seen = seen(mac, vip, service, name);
                    if seen.alive || service.terms().on_dead == OnDead::Keep {
                        let key = SlotKey { middlebox: mac, vip: *vip, backend: *name };
                        let seen = Seen { mac: backend.mac.or(seen.mac), ..seen };
                        wanted.insert(Edition { key, fingerprint }, (seen, dsr));
                    }
                }
            }
        }
        let numbered = self.numbers.used.range(Edition { key: first_key(mac), fingerprint: 0 }..);
        let numbered =
            numbered.map(|(edition, _)| *edition).take_while(|edition| edition.key.middlebox == mac);
        let gone: Vec<Edition> = numbered.filter(|edition| !wanted.contains_key(edition)).collect();
        gone.iter().for_each(|edition| self.numbers.release(edition, now));
        let before: Vec<(SlotKey, Slot)> = self.of(mac).collect();
        for (key, slot) in before {
            self.current.remove(&key);
            self.by_slot.remove(&slot.index);
            self.count_backend(key, slot, false);
        }
        for (Edition { key, fingerprint }, (Seen { mac, alive, .. }, dsr)) in wanted {
            match self.numbers.give(Edition { key, fingerprint }, now) {
                Some(index) => {
                    let slot = Slot { index, mac, alive, dsr, fingerprint };
                    self.current.insert(key, slot);
                    self.by_slot.insert(index, key);
                    self.count_backend(key, slot, true);
                }
                None => enough = false,
            }
        }
        enough
    }

    /// What a backend sends that owns the address itself is nothing to translate.
    fn count_backend(&mut self, key: SlotKey, slot: Slot, more: bool) {
        if slot.dsr {
            return;
        }
        let ip = key.backend.ip;
        let count = self.backends.get(&ip).copied().unwrap_or(0);
        match if more { count + 1 } else { count.saturating_sub(1) } {
            0 => drop(self.backends.remove(&ip)),
            count => drop(self.backends.insert(ip, count)),
        }
    }

    /// The middleboxes whose numbers or backends' MACs differ; found without looking at what both share.
    pub fn changed(&self, before: &Slots) -> BTreeSet<MacAddr> {
        use imbl::ordmap::DiffItem::{Add, Remove, Update};
        let slots = before.current.diff(&self.current).map(|item| match item {
            Add(key, _) | Remove(key, _) | Update { new: (key, _), .. } => key.middlebox,
        });
        let numbers = before.middleboxes.used.diff(&self.middleboxes.used).map(|item| match item {
            Add(mac, _) | Remove(mac, _) | Update { new: (mac, _), .. } => *mac,
        });
        slots.chain(numbers).collect()
    }

    /// The slot of a backend of a service.
    pub fn get(&self, key: &SlotKey) -> Option<Slot> {
        self.current.get(key).copied()
    }

    /// What a slot stands for, if it is in use.
    pub fn key_of(&self, index: u32) -> Option<SlotKey> {
        self.by_slot.get(&index).copied()
    }

    /// What a slot stood for that is in use no more, as long as something may remember it.
    pub fn former_key_of(&self, index: u32) -> Option<SlotKey> {
        self.numbers.resting.get(&index).and_then(|(_, edition)| *edition).map(|edition| edition.key)
    }

    /// The slot that stands now for what a slot stands or stood for.
    pub fn current(&self, index: u32) -> Option<u32> {
        if self.by_slot.contains_key(&index) {
            return Some(index);
        }
        self.get(&self.former_key_of(index)?).map(|slot| slot.index)
    }

    /// All slots in use.
    pub fn iter(&self) -> impl Iterator<Item = (SlotKey, Slot)> {
        self.current.iter().map(|(key, slot)| (*key, *slot))
    }

    /// The slots of one middlebox.
    pub fn of(&self, middlebox: MacAddr) -> impl Iterator<Item = (SlotKey, Slot)> {
        let from = self.current.range(first_key(middlebox)..);
        from.map(|(key, slot)| (*key, *slot)).take_while(move |(key, _)| key.middlebox == middlebox)
    }

    /// Whether an address is a backend's.
    pub fn is_backend(&self, ip: IpAddr) -> bool {
        self.backends.contains_key(&ip)
    }

    /// The number of a middlebox.
    pub fn middlebox(&self, mac: MacAddr) -> Option<u32> {
        self.middleboxes.used.get(&mac).copied()
    }

    /// The middlebox of a number.
    pub fn middlebox_of(&self, index: u32) -> Option<MacAddr> {
        self.by_index.get(&index).copied()
    }
}

/// Stands before all slots of a middlebox.
fn first_key(middlebox: MacAddr) -> SlotKey {
    let least = IpAddr::from([0; 4]);
    SlotKey { middlebox, vip: Vip::of(least), backend: BackendName { ip: least, port: None } }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(line: &str) -> Policy {
        let mut policy = Policy::default();
        policy.apply_line(line).unwrap();
        policy
    }

    fn nothing(_: MacAddr, _: &Vip, _: &Service, _: &BackendName) -> Seen {
        Seen::NOTHING
    }

    fn first_vip(policy: &Policy) -> Vip {
        *policy.get(MacAddr([2, 0, 0, 0, 0, 1])).unwrap().services().keys().next().unwrap()
    }

    fn indexes(slots: &Slots) -> Vec<u32> {
        slots.iter().map(|(_, slot)| slot.index).collect()
    }

    #[test]
    fn a_number_rests_before_another_backend_gets_it() {
        let (a, b) =
            (policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2"), policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3"));
        let now = Instant::now();
        let mut slots = Slots::default();
        slots.follow(&a, nothing, now);
        assert_eq!(indexes(&slots), [1]);
        slots.follow(&b, nothing, now);
        assert_eq!(indexes(&slots), [2]);
        slots.follow(&a, nothing, now + REST / 2);
        assert_eq!(indexes(&slots), [3], "not even the backend that had it");
        slots.follow(&b, nothing, now + REST * 3);
        assert_eq!(indexes(&slots), [1]);
    }

    #[test]
    fn a_pools_numbers_stay_while_other_things_change() {
        let mut policy = policy("R L 2:0:0:0:0:1 10.0.0.1:80 rr 10.0.0.2 10.0.0.3:8080");
        let mut slots = Slots::default();
        let now = Instant::now();
        slots.follow(&policy, nothing, now);
        let of_backends = |slots: &Slots| -> Vec<(String, u32)> {
            let backends = slots.iter().filter(|(key, _)| key.backend.ip != key.vip.ip);
            backends.map(|(key, slot)| (format!("{} -> {}", key.vip, key.backend), slot.index)).collect()
        };
        let first = of_backends(&slots);
        assert_eq!(first.len(), 2);
        let own = slots.get(&own_slot(MacAddr([2, 0, 0, 0, 0, 1]), first_vip(&policy))).unwrap().index;
        for line in [
            "B 2:0:0:0:0:1 + 10.0.0.4*5",
            "B 2:0:0:0:0:1 = 10.0.0.2 drain",
            "R L 2:0:0:0:0:1 10.0.0.1 rr 10.0.0.2",
        ] {
            policy.apply_line(line).unwrap();
            slots.follow(&policy, nothing, now);
        }
        let all = of_backends(&slots);
        assert!(all.len() == 4 && first.iter().all(|slot| all.contains(slot)), "{first:?} {all:?}");
        assert!(slots.key_of(own).is_some(), "what is the middlebox' own stays so");
        policy.apply_line("R L 2:0:0:0:0:1 10.0.0.1:81 0 10.0.0.9").unwrap();
        slots.follow(&policy, nothing, now);
        assert!(slots.key_of(own).is_some() && first.iter().all(|slot| of_backends(&slots).contains(slot)));
        let of_the_address = all.iter().find(|(name, _)| name.starts_with("10.0.0.1 ->")).unwrap();
        assert!(slots.key_of(of_the_address.1).is_none(), "some of its flows are another service's now");
        policy.apply_line("R L 2:0:0:0:0:1 10.0.0.1:80/tcp 0 10.0.0.9").unwrap();
        slots.follow(&policy, nothing, now);
        assert!(slots.key_of(own).is_none(), "this may be a service's now");
        policy.apply_line("X 2:0:0:0:0:1 L 10.0.0.1:80/tcp").unwrap();
        policy.apply_line("X 2:0:0:0:0:1 L 10.0.0.1:81").unwrap();
        slots.follow(&policy, nothing, now);
        let first = of_backends(&slots);
        let index = first.iter().find(|(name, _)| name.ends_with(":8080")).unwrap().1;
        let other = first.iter().find(|(name, _)| name.ends_with(":80")).unwrap().1;
        let key = slots.key_of(index).unwrap();
        assert_eq!((key.ports(), slots.key_of(other).unwrap().ports()), (Some((80, 8080)), None));
        // A dead backend has none, and gets another when it lives again.
        let dead = |_: MacAddr, _: &Vip, _: &Service, name: &BackendName| Seen {
            alive: name.ip != IpAddr::from([10, 0, 0, 3]),
            ..Seen::NOTHING
        };
        slots.follow(&policy, dead, now);
        assert_eq!((slots.get(&key), slots.key_of(index)), (None, None));
        slots.follow(&policy, nothing, now);
        assert!(slots.get(&key).unwrap().index > index);
    }

    #[test]
    fn one_guest_cannot_use_up_the_numbers() {
        let line =
            |backend: u32| format!("R L 2:0:0:0:0:1 10.0.0.1 0 {}", IpAddr::from(backend.to_be_bytes()));
        let mut slots = Slots::default();
        let now = Instant::now();
        let follow = |slots: &mut Slots, n: u32| slots.follow(&policy(&line(0x0b00_0000 + n)), nothing, now);
        let changes = (0..MOST_RESTING * 2).take_while(|n| follow(&mut slots, *n)).count();
        assert_eq!(changes, MOST_RESTING as usize);
        let other = policy("R L 2:0:0:0:0:2 10.0.0.1 0 10.0.0.2");
        assert!(slots.update(
            MacAddr([2, 0, 0, 0, 0, 2]),
            other.get(MacAddr([2, 0, 0, 0, 0, 2])),
            nothing,
            now
        ));
        let late = now + REST * 2;
        assert!(slots.follow(&policy(&line(1)), nothing, late));
    }

    #[test]
    fn what_held_for_a_moment_rests() {
        let (a, b) =
            (policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2"), policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3"));
        let now = Instant::now();
        let mut slots = Slots::default();
        slots.follow(&a, nothing, now);
        let before = slots.clone();
        slots.follow(&b, nothing, now);
        assert_eq!(indexes(&slots), [2]);
        slots.put_back(before, now);
        assert_eq!(indexes(&slots), [1], "the kernel still has it");
        slots.follow(&b, nothing, now);
        assert_eq!(indexes(&slots), [3]);
    }

    #[test]
    fn numbers_found_in_the_kernel_are_kept() {
        let a = policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2");
        let now = Instant::now();
        let mut first = Slots::default();
        first.follow(&a, nothing, now);
        let (key, slot) = first.iter().next().unwrap();
        let edition: Edition = slot.comment(key).parse().unwrap();
        let mut second = Slots::default();
        second.adopt([(7, edition)], now);
        second.follow(&a, |_, _, _, _| Seen { mac: Some(MacAddr([2; 6])), ..Seen::NOTHING }, now);
        let slot = second.get(&key).unwrap();
        assert_eq!((slot.index, slot.mac), (7, Some(MacAddr([2; 6]))));
        second.seen(9, now);
        // What stands under the same backend but other terms is another edition.
        second.follow(&policy("R L 2:0:0:0:0:1 10.0.0.1 1 10.0.0.9 10.0.0.2"), nothing, now);
        assert_eq!(second.get(&key).unwrap().index, 10, "the kernel may carry any number up to 9");
    }
}
