//! Slots: small numbers for the backends of services, which packet marks and the kernel's flow caches carry.
//!
//! A number is not given to another backend while a cached flow may still carry it.

use crate::mark::MAX_INDEX;
use crate::policy::Policy;
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

/// The text by which a kernel map's element is recognised after a restart.
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
}

/// The slots in use, and those that rest.
#[derive(Clone, Debug)]
pub struct Slots {
    used: BTreeMap<SlotKey, Slot>,
    /// Numbers given back, with the time from which they may be used again.
    resting: Vec<(u32, SlotKey, Instant)>,
    /// Numbers below `next` that are neither used nor rest.
    free: BTreeSet<u32>,
    /// Numbers from here on were never used; 0 is never.
    next: u32,
}

/// How long a number rests: longer than any flow cache entry lives.
pub const REST: Duration = Duration::from_secs(crate::nft::ruleset::REPLY_TIMEOUT as u64 + 30);

impl Default for Slots {
    fn default() -> Slots {
        Slots { used: BTreeMap::new(), resting: Vec::new(), free: BTreeSet::new(), next: 1 }
    }
}

impl Slots {
    /// Takes over numbers that a table in the kernel still carries.
    pub fn adopt(&mut self, found: impl IntoIterator<Item = (u32, SlotKey)>) {
        for (index, key) in found {
            if index == 0 || index > MAX_INDEX || self.used.contains_key(&key) {
                continue;
            }
            self.free.extend(self.next..=index);
            self.next = self.next.max(index + 1);
            if self.free.remove(&index) {
                self.used.insert(key, Slot { index, mac: None });
            }
        }
    }

    /// Gives every destination of the policy a slot, and takes back those of destinations that are gone. `macs` says
    /// which MAC a backend's address has.
    pub fn follow(&mut self, policy: &Policy, macs: impl Fn(IpAddr) -> Option<MacAddr>, now: Instant) {
        let mut wanted: BTreeMap<SlotKey, Option<MacAddr>> = BTreeMap::new();
        for (middlebox, vip, to) in policy.destinations() {
            wanted.insert(SlotKey { middlebox, vip, backend: to.ip }, to.mac.or_else(|| macs(to.ip)));
        }
        let gone: Vec<SlotKey> = self.used.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for key in gone {
            if let Some(slot) = self.used.remove(&key) {
                self.resting.push((slot.index, key, now + REST));
            }
        }
        let free = &mut self.free;
        self.resting.retain(|&(index, _, until)| until > now || !free.insert(index));
        for (key, mac) in wanted {
            if !self.used.contains_key(&key) {
                let Some(index) = self.allocate(key) else { continue };
                self.used.insert(key, Slot { index, mac });
            }
            if let Some(slot) = self.used.get_mut(&key) {
                slot.mac = mac;
            }
        }
    }

    /// A number for a key: the one it had, when that still rests; otherwise the lowest free one.
    fn allocate(&mut self, key: SlotKey) -> Option<u32> {
        if let Some(at) = self.resting.iter().position(|&(_, resting, _)| resting == key) {
            return Some(self.resting.swap_remove(at).0);
        }
        self.free.pop_first().or_else(|| {
            let fresh = (self.next <= MAX_INDEX).then_some(self.next)?;
            self.next += 1;
            Some(fresh)
        })
    }

    /// The slot of a backend of a service.
    pub fn get(&self, key: &SlotKey) -> Option<Slot> {
        self.used.get(key).copied()
    }

    /// All slots in use.
    pub fn iter(&self) -> impl Iterator<Item = (&SlotKey, &Slot)> {
        self.used.iter()
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
        assert_eq!(indexes(&slots), [1], "the same backend has its own number back");
        slots.follow(&Policy::default(), |_| None, now + REST / 2);
        slots.follow(&policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.9"), |_| None, now + REST * 3);
        assert_eq!(indexes(&slots), [1]);
    }

    #[test]
    fn numbers_found_in_the_kernel_are_kept() {
        let a = policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2");
        let mut first = Slots::default();
        first.adopt([(7, SlotKey::from_str("02:00:00:00:00:01 10.0.0.1 -> 10.0.0.2").unwrap())]);
        first.follow(&a, |_| Some(MacAddr([2; 6])), Instant::now());
        let (key, slot) = first.iter().next().unwrap();
        assert_eq!((slot.index, slot.mac), (7, Some(MacAddr([2; 6]))));
        assert_eq!(key.to_string().parse(), Ok(*key));
    }
}
