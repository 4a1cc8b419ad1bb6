//! The flows that the engine has sent to backends: what it needs to translate the way back.
//!
//! This table is the truth; the kernel's maps are a cache of it. It is shared by all workers, because a flow and its
//! way back may come by different queues. It is bounded: a full shard gives up the flow that was seen longest ago among
//! a few, never a new one.

use nfqd_rules::packet::Ports;
use nfqd_rules::slots::SlotKey;
use nfqd_shmctl::Protocol;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The way back of a flow, as its packets show it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FlowKey {
    /// The backend, which sends them.
    pub backend: IpAddr,
    /// The client, to which they go.
    pub client: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// Ports as in packets from the backend; both 0 where there are none.
    pub ports: Ports,
}

/// Later fragments of a datagram have no ports; the first one says which flow they belong to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FragmentKey {
    /// Who sends them.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The datagram's identification.
    pub id: u32,
}

/// Seconds of the engine's clock.
pub type Seconds = u32;

/// Seconds without a packet after which a flow is forgotten: RFC 5382 asks for 2 h 4 min for established TCP, RFC 4787
/// for 5 min for UDP, RFC 5508 for 60 s for ICMP.
fn timeout(protocol: Protocol) -> Seconds {
    match protocol {
        Protocol::TCP => 7440,
        Protocol::UDP | Protocol::UDPLITE => 300,
        _ => 60,
    }
}

/// Seconds that the first fragment of a datagram is remembered (RFC 791 reassembly: 15 s and up).
const FRAGMENT_TIMEOUT: Seconds = 30;

const SHARDS: usize = 64;
/// How many candidates a full shard looks at before it gives one up.
const CANDIDATES: usize = 16;

/// The table.
pub struct Flows {
    flows: Sharded<FlowKey>,
    fragments: Sharded<FragmentKey>,
}

impl Flows {
    /// A table for `capacity` flows, rounded up.
    pub fn new(capacity: usize) -> Flows {
        Flows { flows: Sharded::new(capacity), fragments: Sharded::new(capacity / 16) }
    }

    /// Remembers a flow; a flow of the same key is replaced.
    pub fn insert(&self, key: FlowKey, slot: SlotKey, now: Seconds) {
        self.flows.insert(key, slot, now, timeout(key.protocol));
    }

    /// The slot of a flow, which is seen by this.
    pub fn get(&self, key: &FlowKey, now: Seconds) -> Option<SlotKey> {
        self.flows.get(key, now, timeout(key.protocol))
    }

    /// Forgets a flow.
    pub fn remove(&self, key: &FlowKey) {
        self.flows.remove(key);
    }

    /// Remembers to which slot the datagram belongs.
    pub fn insert_fragment(&self, key: FragmentKey, slot: SlotKey, now: Seconds) {
        self.fragments.insert(key, slot, now, FRAGMENT_TIMEOUT);
    }

    /// The slot of a datagram whose first fragment was seen.
    pub fn get_fragment(&self, key: &FragmentKey, now: Seconds) -> Option<SlotKey> {
        self.fragments.get(key, now, FRAGMENT_TIMEOUT)
    }

    /// How many flows are remembered; those that are too old but not yet replaced count.
    pub fn len(&self) -> usize {
        self.flows.shards.iter().map(|shard| lock(shard).entries.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

struct Sharded<K> {
    hash: RandomState,
    shards: Vec<Mutex<Shard<K>>>,
    capacity: usize,
}

struct Shard<K> {
    index: HashMap<K, usize>,
    entries: Vec<Entry<K>>,
    /// Where the search for something to give up goes on.
    hand: usize,
}

struct Entry<K> {
    key: K,
    slot: SlotKey,
    expires: Seconds,
}

/// A shard is never left half changed, so that a panic elsewhere does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Copy + Eq + Hash> Sharded<K> {
    fn new(capacity: usize) -> Sharded<K> {
        let shard = || Mutex::new(Shard { index: HashMap::new(), entries: Vec::new(), hand: 0 });
        Sharded {
            hash: RandomState::new(),
            shards: (0..SHARDS).map(|_| shard()).collect(),
            capacity: capacity.div_ceil(SHARDS).max(1),
        }
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K>> {
        let at = self.hash.hash_one(key) as usize % SHARDS;
        lock(&self.shards[at])
    }

    fn insert(&self, key: K, slot: SlotKey, now: Seconds, timeout: Seconds) {
        let mut guard = self.shard(&key);
        let shard = &mut *guard;
        let entry = Entry { key, slot, expires: now.saturating_add(timeout) };
        if let Some(&at) = shard.index.get(&key) {
            shard.entries[at] = entry;
            return;
        }
        let at = if shard.entries.len() < self.capacity {
            shard.entries.push(entry);
            shard.entries.len() - 1
        } else {
            let at = shard.victim(now);
            let old = std::mem::replace(&mut shard.entries[at], entry);
            shard.index.remove(&old.key);
            at
        };
        shard.index.insert(key, at);
    }

    /// The place stays taken until it is given up, which is at once: nothing is older.
    fn remove(&self, key: &K) {
        let mut guard = self.shard(key);
        let shard = &mut *guard;
        if let Some(entry) = shard.index.get(key).and_then(|&at| shard.entries.get_mut(at)) {
            entry.expires = 0;
        }
    }

    fn get(&self, key: &K, now: Seconds, timeout: Seconds) -> Option<SlotKey> {
        let mut guard = self.shard(key);
        let shard = &mut *guard;
        let at = *shard.index.get(key)?;
        let entry = shard.entries.get_mut(at).filter(|entry| entry.expires > now)?;
        entry.expires = now.saturating_add(timeout);
        Some(entry.slot)
    }
}

impl<K> Shard<K> {
    /// The entry to give up: the first that is too old, or the one nearest to it, among a few from the hand on.
    fn victim(&mut self, now: Seconds) -> usize {
        let len = self.entries.len();
        let mut best = self.hand % len;
        for step in 0..CANDIDATES.min(len) {
            let at = (self.hand + step) % len;
            if self.entries[at].expires < self.entries[best].expires {
                best = at;
            }
            if self.entries[best].expires <= now {
                break;
            }
        }
        self.hand = (best + 1) % len;
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_shmctl::MacAddr;

    fn key(client: u32) -> FlowKey {
        FlowKey {
            backend: IpAddr::from([10, 0, 0, 3]),
            client: IpAddr::from(client.to_be_bytes()),
            protocol: Protocol::UDP,
            ports: Ports { source: 53, destination: 1000 },
        }
    }

    fn slot(n: u8) -> SlotKey {
        let ip = |last: u8| IpAddr::from([10, 0, 0, last]);
        SlotKey { middlebox: MacAddr([2; 6]), vip: ip(2), backend: ip(n) }
    }

    #[test]
    fn a_flow_lives_as_long_as_it_is_seen() {
        let flows = Flows::new(100);
        flows.insert(key(1), slot(3), 0);
        assert_eq!(flows.get(&key(1), 299), Some(slot(3)));
        assert_eq!(flows.get(&key(1), 598), Some(slot(3)));
        assert_eq!(flows.get(&key(1), 898), None);
        assert_eq!(flows.get(&key(2), 0), None);
        flows.insert(key(1), slot(4), 900);
        assert_eq!((flows.get(&key(1), 900), flows.len()), (Some(slot(4)), 1));
    }

    #[test]
    fn a_full_table_takes_new_flows_and_keeps_its_bound() {
        let flows = Flows::new(640);
        for client in 0..10_000 {
            flows.insert(key(client), slot(3), client / 100);
            assert_eq!(flows.get(&key(client), client / 100), Some(slot(3)), "{client}");
        }
        assert!(flows.len() <= 640);
        let kept = (0..10_000).filter(|&client| flows.get(&key(client), 99).is_some()).count();
        assert_eq!(kept, flows.len());
    }

    #[test]
    fn fragments_are_forgotten_soon() {
        let flows = Flows::new(100);
        let key = FragmentKey {
            source: IpAddr::from([10, 0, 0, 3]),
            destination: IpAddr::from([10, 0, 0, 1]),
            protocol: Protocol::UDP,
            id: 7,
        };
        flows.insert_fragment(key, slot(3), 0);
        assert_eq!(flows.get_fragment(&key, FRAGMENT_TIMEOUT - 1), Some(slot(3)));
        assert_eq!(flows.get_fragment(&key, FRAGMENT_TIMEOUT * 3), None);
    }
}
