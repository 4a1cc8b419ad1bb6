//! Slots: small numbers for the backends of services, which packet marks and the kernel's flow caches carry.
//!
//! A number is not given to another backend while a cached flow may still carry it.

use crate::mark::MAX_INDEX;
use crate::policy::{Middlebox, Policy};
use imbl::{OrdMap, OrdSet};
use nfqd_shmctl::MacAddr;
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
    /// The address that clients use.
    pub vip: IpAddr,
    /// The backend's address.
    pub backend: IpAddr,
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
        let address = |text: &str| text.parse::<IpAddr>().map_err(drop);
        Ok(SlotKey { middlebox: middlebox.parse()?, vip: address(vip)?, backend: address(backend)? })
    }
}

/// A backend of a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// The number, from 1.
    pub index: u32,
    /// The backend's MAC, once it is known.
    pub mac: Option<MacAddr>,
    fingerprint: u32,
}

impl Slot {
    /// The comment of a kernel map's element for this slot of `key`.
    pub fn comment(self, key: SlotKey) -> String {
        Edition { key, fingerprint: self.fingerprint }.to_string()
    }
}

/// Numbers from 1 for things that come and go. A number that is given back rests before another thing gets it.
#[derive(Clone, Debug)]
struct Numbers<K: Ord> {
    used: OrdMap<K, u32>,
    /// Numbers given back, with the time from which they may be used again.
    resting: OrdMap<u32, Instant>,
    /// No number that rests is ready before this.
    ready: Option<Instant>,
    /// Numbers below `next` that are neither used nor rest.
    free: OrdSet<u32>,
    /// Numbers from here on were never used.
    next: u32,
}

impl<K: Ord> Default for Numbers<K> {
    fn default() -> Numbers<K> {
        Numbers { used: OrdMap::new(), resting: OrdMap::new(), ready: None, free: OrdSet::new(), next: 1 }
    }
}

impl<K: Copy + Ord> Numbers<K> {
    fn adopt(&mut self, index: u32, key: K, now: Instant) {
        if index == 0 || index > MAX_INDEX || self.used.contains_key(&key) {
            return;
        }
        self.seen(index, now);
        if self.resting.remove(&index).is_some() {
            self.used.insert(key, index);
        }
    }

    /// A number that the kernel may still carry: it and those below it rest, unless they are taken over.
    fn seen(&mut self, index: u32, now: Instant) {
        for index in self.next..=index.min(MAX_INDEX) {
            self.lay_down(index, now);
        }
        self.next = self.next.max(index.saturating_add(1));
    }

    fn lay_down(&mut self, index: u32, now: Instant) {
        let until = now + REST;
        self.ready = Some(self.ready.map_or(until, |ready| ready.min(until)));
        self.resting.insert(index, until);
    }

    /// Takes a number back.
    fn release(&mut self, key: &K, now: Instant) {
        if let Some(index) = self.used.remove(key) {
            self.lay_down(index, now);
        }
    }

    /// The number of a key, which gets one if it has none and there is one left.
    fn give(&mut self, key: K, now: Instant) -> Option<u32> {
        if let Some(index) = self.used.get(&key) {
            return Some(*index);
        }
        self.wake(now);
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
            self.resting.iter().filter(|(_, until)| **until <= now).map(|(index, _)| *index).collect();
        for index in rested {
            self.resting.remove(&index);
            self.free.insert(index);
        }
        self.ready = self.resting.values().min().copied();
    }

    /// A number that others used for a moment: the kernel may have learnt it.
    fn rest(&mut self, index: u32, now: Instant) {
        if self.free.remove(&index).is_some() {
            self.lay_down(index, now);
        }
        self.seen(index, now);
    }
}

/// The slots in use, and the numbers by which marks name middleboxes on the way to the engine. A clone costs nothing: both
/// share what is the same.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    numbers: Numbers<Edition>,
    current: OrdMap<SlotKey, Slot>,
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

/// FNV-1a over the services' text: the same after a restart.
fn fingerprint(middlebox: &Middlebox) -> u32 {
    let text: String =
        middlebox.services().iter().map(|(vip, balance)| format!("{vip} {balance}\n")).collect();
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// How long a number rests: longer than any flow cache entry lives.
pub const REST: Duration = Duration::from_secs(crate::nft::ruleset::REPLY_TIMEOUT as u64 + 30);

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
        discarded.numbers.used.values().for_each(|&index| self.numbers.rest(index, now));
        discarded.middleboxes.used.values().for_each(|&index| self.middleboxes.rest(index, now));
    }

    /// Takes over the numbers of middleboxes that a table in the kernel still carries.
    pub fn adopt_middleboxes(&mut self, found: impl IntoIterator<Item = (u32, MacAddr)>, now: Instant) {
        found.into_iter().for_each(|(index, mac)| self.middleboxes.adopt(index, mac, now));
    }

    /// Gives every destination and every middlebox of the policy a number, and takes back those that are gone. `macs`
    /// says which MAC a backend's address has. False when there are not enough numbers.
    pub fn follow(
        &mut self,
        policy: &Policy,
        macs: impl Fn(IpAddr) -> Option<MacAddr>,
        now: Instant,
    ) -> bool {
        let known = self
            .middleboxes
            .used
            .keys()
            .chain(self.numbers.used.keys().map(|edition| &edition.key.middlebox));
        let gone: BTreeSet<MacAddr> = known.filter(|mac| policy.get(**mac).is_none()).copied().collect();
        for mac in gone {
            self.update(mac, None, &macs, now);
        }
        let mut enough = true;
        for (mac, middlebox) in policy.middleboxes() {
            enough &= self.update(*mac, Some(middlebox), &macs, now);
        }
        enough
    }

    /// The same for one middlebox, which is registered so or not at all.
    pub fn update(
        &mut self,
        mac: MacAddr,
        middlebox: Option<&Middlebox>,
        macs: impl Fn(IpAddr) -> Option<MacAddr>,
        now: Instant,
    ) -> bool {
        let mut enough = true;
        match middlebox {
            Some(_) => match self.middleboxes.give(mac, now) {
                Some(index) => drop(self.by_index.insert(index, mac)),
                None => enough = false,
            },
            None => {
                let index = self.middleboxes.used.get(&mac).copied();
                index.map(|index| self.by_index.remove(&index));
                self.middleboxes.release(&mac, now);
            }
        }
        let fingerprint = middlebox.map_or(0, fingerprint);
        let services = middlebox.into_iter().flat_map(Middlebox::services);
        let wanted: BTreeMap<Edition, Option<MacAddr>> = services
            .map(|(&vip, balance)| {
                let to = balance.destination();
                let key = SlotKey { middlebox: mac, vip, backend: to.ip };
                (Edition { key, fingerprint }, to.mac.or_else(|| macs(to.ip)))
            })
            .collect();
        let numbered = self.numbers.used.range(Edition { key: first_key(mac), fingerprint: 0 }..);
        let numbered =
            numbered.map(|(edition, _)| *edition).take_while(|edition| edition.key.middlebox == mac);
        let gone: Vec<Edition> = numbered.filter(|edition| !wanted.contains_key(edition)).collect();
        gone.iter().for_each(|edition| self.numbers.release(edition, now));
        let before: Vec<SlotKey> = self.of(mac).map(|(key, _)| key).collect();
        for key in before {
            self.current.remove(&key);
            self.count_backend(key.backend, false);
        }
        for (edition, mac) in wanted {
            match self.numbers.give(edition, now) {
                Some(index) => {
                    self.current.insert(edition.key, Slot { index, mac, fingerprint });
                    self.count_backend(edition.key.backend, true);
                }
                None => enough = false,
            }
        }
        enough
    }

    fn count_backend(&mut self, ip: IpAddr, more: bool) {
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
    SlotKey { middlebox, vip: least, backend: least }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(line: &str) -> Policy {
        let mut policy = Policy::default();
        policy.apply_line(line).unwrap();
        policy
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
        slots.follow(&a, |_| None, now);
        assert_eq!(indexes(&slots), [1]);
        slots.follow(&b, |_| None, now);
        assert_eq!(indexes(&slots), [2]);
        slots.follow(&a, |_| None, now + REST / 2);
        assert_eq!(indexes(&slots), [3], "not even the backend that had it");
        slots.follow(&b, |_| None, now + REST * 3);
        assert_eq!(indexes(&slots), [1]);
    }

    #[test]
    fn what_held_for_a_moment_rests() {
        let (a, b) =
            (policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2"), policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3"));
        let now = Instant::now();
        let mut slots = Slots::default();
        slots.follow(&a, |_| None, now);
        let before = slots.clone();
        slots.follow(&b, |_| None, now);
        assert_eq!(indexes(&slots), [2]);
        slots.put_back(before, now);
        assert_eq!(indexes(&slots), [1], "the kernel still has it");
        slots.follow(&b, |_| None, now);
        assert_eq!(indexes(&slots), [3]);
    }

    #[test]
    fn numbers_found_in_the_kernel_are_kept() {
        let a = policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2");
        let now = Instant::now();
        let mut first = Slots::default();
        first.follow(&a, |_| None, now);
        let (key, slot) = first.iter().next().unwrap();
        let edition: Edition = slot.comment(key).parse().unwrap();
        let mut second = Slots::default();
        second.adopt([(7, edition)], now);
        second.follow(&a, |_| Some(MacAddr([2; 6])), now);
        let slot = second.get(&key).unwrap();
        assert_eq!((slot.index, slot.mac), (7, Some(MacAddr([2; 6]))));
        second.seen(9, now);
        // What stands under the same backend but other terms is another edition.
        second.follow(&policy("R L 2:0:0:0:0:1 10.0.0.1 1 10.0.0.9 10.0.0.2"), |_| None, now);
        assert_eq!(second.get(&key).unwrap().index, 10, "the kernel may carry any number up to 9");
    }
}
