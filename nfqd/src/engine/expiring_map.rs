//! A sharded map of bounded size whose entries expire.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::sync::{Mutex, MutexGuard, PoisonError};

const SHARDS: usize = 64;
/// Entries that a full shard samples before it evicts one of them.
const CANDIDATES: usize = 16;

/// A sharded map of bounded size whose entries expire some time after they were inserted. A full
/// shard evicts, of `CANDIDATES` sampled entries, the one closest to expiry; never the entry that
/// is being inserted. All workers share the map.
pub struct ExpiringMap<K, V> {
    hash: RandomState,
    shards: Vec<Mutex<Shard<K, V>>>,
    capacity: usize,
}

struct Shard<K, V> {
    index: HashMap<K, usize>,
    entries: Vec<Entry<K, V>>,
    /// The position at which the sampling of candidates continues, as in the CLOCK algorithm.
    clock_hand: usize,
}

struct Entry<K, V> {
    key: K,
    value: V,
    expires: u32,
}

impl<K: Copy + Eq + Hash, V: Copy> ExpiringMap<K, V> {
    /// A map for `capacity` entries, rounded up.
    pub fn new(capacity: usize) -> ExpiringMap<K, V> {
        let shard =
            || Mutex::new(Shard { index: HashMap::new(), entries: Vec::new(), clock_hand: 0 });
        ExpiringMap {
            hash: RandomState::new(),
            shards: (0..SHARDS).map(|_| shard()).collect(),
            capacity: capacity.div_ceil(SHARDS).max(1),
        }
    }

    /// Locks the shard of a key. A shard is never left inconsistent, so that a panic elsewhere does
    /// no harm.
    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K, V>> {
        let at = self.hash.hash_one(key) as usize % SHARDS;
        self.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Inserts a value, in place of one with the same key; it expires after `timeout` seconds.
    pub fn insert(&self, key: K, value: V, now: u32, timeout: u32) {
        let mut guard = self.shard(&key);
        let shard = &mut *guard;
        let entry = Entry { key, value, expires: now.saturating_add(timeout) };
        if let Some(&at) = shard.index.get(&key) {
            shard.entries[at] = entry;
            return;
        }
        let at = if shard.entries.len() < self.capacity {
            shard.entries.push(entry);
            shard.entries.len() - 1
        } else {
            let at = shard.eviction_candidate(now);
            let old = std::mem::replace(&mut shard.entries[at], entry);
            shard.index.remove(&old.key);
            at
        };
        shard.index.insert(key, at);
    }

    /// Returns the value of a key, unless it has expired.
    pub fn get(&self, key: &K, now: u32) -> Option<V> {
        let shard = self.shard(key);
        let entry =
            shard.entries.get(*shard.index.get(key)?).filter(|entry| entry.expires > now)?;
        Some(entry.value)
    }
}

impl<K, V> Shard<K, V> {
    /// Returns the entry to evict: the first sampled one that has expired, or the one closest to
    /// expiry.
    fn eviction_candidate(&mut self, now: u32) -> usize {
        let len = self.entries.len();
        let mut best = self.clock_hand % len;
        for step in 0..CANDIDATES.min(len) {
            let at = (self.clock_hand + step) % len;
            if self.entries[at].expires < self.entries[best].expires {
                best = at;
            }
            if self.entries[best].expires <= now {
                break;
            }
        }
        self.clock_hand = (best + 1) % len;
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_expires_after_its_time() {
        let map = ExpiringMap::new(100);
        map.insert(1, 'a', 0, 300);
        assert_eq!(map.get(&1, 299), Some('a'));
        assert_eq!((map.get(&1, 300), map.get(&2, 0)), (None, None), "look-ups do not refresh it");
        map.insert(1, 'b', 900, 1);
        assert_eq!(map.get(&1, 900), Some('b'));
    }

    #[test]
    fn a_full_map_takes_new_entries_and_keeps_its_bound() {
        let map = ExpiringMap::new(640);
        for key in 0..10_000_u32 {
            map.insert(key, (), key / 100, 300);
            assert_eq!(map.get(&key, key / 100), Some(()), "{key}");
        }
        let kept = (0..10_000).filter(|key| map.get(key, 99).is_some()).count();
        assert!((320..=640).contains(&kept), "{kept}");
    }
}
