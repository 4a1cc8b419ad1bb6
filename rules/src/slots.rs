//! Slots: small numbers for the backends of services, which packet marks and the kernel's flow caches carry.
//!
//! A number is not given to another backend while a cached flow may still carry it.

use crate::mark::MAX_INDEX;
use crate::policy::{Middlebox, Policy};
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
struct Numbers<K> {
    used: BTreeMap<K, u32>,
    /// Numbers given back, with the time from which they may be used again.
    resting: Vec<(u32, Instant)>,
    /// Numbers below `next` that are neither used nor rest.
    free: BTreeSet<u32>,
    /// Numbers from here on were never used.
    next: u32,
}

impl<K> Default for Numbers<K> {
    fn default() -> Numbers<K> {
        Numbers { used: BTreeMap::new(), resting: Vec::new(), free: BTreeSet::new(), next: 1 }
    }
}

impl<K: Copy + Ord> Numbers<K> {
    fn adopt(&mut self, index: u32, key: K, now: Instant) {
        if index == 0 || index > MAX_INDEX || self.used.contains_key(&key) {
            return;
        }
        self.seen(index, now);
        let at = self.resting.iter().position(|&(resting, _)| resting == index);
        if let Some(at) = at {
            self.resting.swap_remove(at);
            self.used.insert(key, index);
        }
    }

    /// A number that the kernel may still carry: it and those below it rest, unless they are taken over.
    fn seen(&mut self, index: u32, now: Instant) {
        let until = now + REST;
        self.resting.extend((self.next..=index.min(MAX_INDEX)).map(|index| (index, until)));
        self.next = self.next.max(index.saturating_add(1));
    }

    /// Gives every key a number, and takes back those of keys that are gone.
    fn follow(&mut self, wanted: impl Fn(&K) -> bool, keys: impl Iterator<Item = K>, now: Instant) {
        let resting = &mut self.resting;
        self.used.retain(|key, index| {
            let stays = wanted(key);
            if !stays {
                resting.push((*index, now + REST));
            }
            stays
        });
        let free = &mut self.free;
        self.resting.retain(|&(index, until)| until > now || !free.insert(index));
        for key in keys {
            if !self.used.contains_key(&key)
                && let Some(index) = self.allocate()
            {
                self.used.insert(key, index);
            }
        }
    }

    /// The lowest free number. One that rests is not free even for the key that had it: the engine may have forgotten
    /// meanwhile what the kernel still remembers under it.
    fn allocate(&mut self) -> Option<u32> {
        self.free.pop_first().or_else(|| {
            let fresh = (self.next <= MAX_INDEX).then_some(self.next)?;
            self.next += 1;
            Some(fresh)
        })
    }
}

impl<K> Numbers<K> {
    /// A number that others used for a moment: the kernel may have learnt it.
    fn rest(&mut self, index: u32, now: Instant) {
        if self.free.remove(&index) {
            self.resting.push((index, now + REST));
        }
    }
}

/// The slots in use, and the numbers by which marks name middleboxes on the way to the engine.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    numbers: Numbers<Edition>,
    current: BTreeMap<SlotKey, Slot>,
    middleboxes: Numbers<MacAddr>,
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
        for &index in discarded.numbers.used.values() {
            self.numbers.rest(index, now);
            self.numbers.seen(index, now);
        }
        for &index in discarded.middleboxes.used.values() {
            self.middleboxes.rest(index, now);
            self.middleboxes.seen(index, now);
        }
    }

    /// Whether every destination of the policy got a slot.
    pub fn are_enough_for(&self, policy: &Policy) -> bool {
        self.current.len() == policy.destinations().count()
    }

    /// Takes over the numbers of middleboxes that a table in the kernel still carries.
    pub fn adopt_middleboxes(&mut self, found: impl IntoIterator<Item = (u32, MacAddr)>, now: Instant) {
        found.into_iter().for_each(|(index, mac)| self.middleboxes.adopt(index, mac, now));
    }

    /// Gives every destination and every middlebox of the policy a number, and takes back those that are gone. `macs`
    /// says which MAC a backend's address has.
    pub fn follow(&mut self, policy: &Policy, macs: impl Fn(IpAddr) -> Option<MacAddr>, now: Instant) {
        let registered = |mac: &MacAddr| policy.get(*mac).is_some();
        self.middleboxes.follow(registered, policy.middleboxes().keys().copied(), now);
        let mut wanted: BTreeMap<Edition, Option<MacAddr>> = BTreeMap::new();
        for (&mac, middlebox) in policy.middleboxes() {
            let fingerprint = fingerprint(middlebox);
            for (&vip, balance) in middlebox.services() {
                let to = balance.destination();
                let key = SlotKey { middlebox: mac, vip, backend: to.ip };
                wanted.insert(Edition { key, fingerprint }, to.mac.or_else(|| macs(to.ip)));
            }
        }
        self.numbers.follow(|edition| wanted.contains_key(edition), wanted.keys().copied(), now);
        let slot = |(edition, mac): (Edition, Option<MacAddr>)| {
            let index = *self.numbers.used.get(&edition)?;
            Some((edition.key, Slot { index, mac, fingerprint: edition.fingerprint }))
        };
        self.current = wanted.into_iter().filter_map(slot).collect();
    }

    /// The slot of a backend of a service.
    pub fn get(&self, key: &SlotKey) -> Option<Slot> {
        self.current.get(key).copied()
    }

    /// All slots in use.
    pub fn iter(&self) -> impl Iterator<Item = (SlotKey, Slot)> {
        self.current.iter().map(|(key, slot)| (*key, *slot))
    }

    /// The numbers of the middleboxes.
    pub fn middleboxes(&self) -> impl Iterator<Item = (MacAddr, u32)> {
        self.middleboxes.used.iter().map(|(mac, index)| (*mac, *index))
    }
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
