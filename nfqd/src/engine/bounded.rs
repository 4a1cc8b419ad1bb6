//! A bounded map that forgets what was put there some time ago. A full shard gives up the entry that is nearest to that among
//! a few, never a new one.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Seconds of the engine's clock.
pub type Seconds = u32;

const SHARDS: usize = 64;
/// How many candidates a full shard looks at before it gives one up.
const CANDIDATES: usize = 16;

/// The map, shared by all workers.
pub struct Bounded<K, V> {
    hash: RandomState,
    shards: Vec<Mutex<Shard<K, V>>>,
    capacity: usize,
    timeout: Seconds,
}

struct Shard<K, V> {
    index: HashMap<K, usize>,
    entries: Vec<Entry<K, V>>,
    /// Where the search for something to give up goes on.
    hand: usize,
}

struct Entry<K, V> {
    key: K,
    value: V,
    expires: Seconds,
}

/// A shard is never left half changed, so that a panic elsewhere does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Copy + Eq + Hash, V: Copy> Bounded<K, V> {
    /// A map for `capacity` entries, rounded up, which are forgotten after `timeout` seconds.
    pub fn new(capacity: usize, timeout: Seconds) -> Bounded<K, V> {
        let shard = || Mutex::new(Shard { index: HashMap::new(), entries: Vec::new(), hand: 0 });
        Bounded {
            hash: RandomState::new(),
            shards: (0..SHARDS).map(|_| shard()).collect(),
            capacity: capacity.div_ceil(SHARDS).max(1),
            timeout,
        }
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K, V>> {
        let at = self.hash.hash_one(key) as usize % SHARDS;
        lock(&self.shards[at])
    }

    /// Remembers a value; one of the same key is replaced.
    pub fn insert(&self, key: K, value: V, now: Seconds) {
        let mut guard = self.shard(&key);
        let shard = &mut *guard;
        let entry = Entry { key, value, expires: now.saturating_add(self.timeout) };
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

    /// The value of a key.
    pub fn get(&self, key: &K, now: Seconds) -> Option<V> {
        let shard = self.shard(key);
        let entry = shard.entries.get(*shard.index.get(key)?).filter(|entry| entry.expires > now)?;
        Some(entry.value)
    }
}

impl<K, V> Shard<K, V> {
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

    #[test]
    fn an_entry_lives_its_time() {
        let map = Bounded::new(100, 300);
        map.insert(1, 'a', 0);
        assert_eq!(map.get(&1, 299), Some('a'));
        assert_eq!((map.get(&1, 300), map.get(&2, 0)), (None, None), "however often it is asked for");
        map.insert(1, 'b', 900);
        assert_eq!(map.get(&1, 900), Some('b'));
    }

    #[test]
    fn a_full_map_takes_new_entries_and_keeps_its_bound() {
        let map = Bounded::new(640, 300);
        for key in 0..10_000_u32 {
            map.insert(key, (), key / 100);
            assert_eq!(map.get(&key, key / 100), Some(()), "{key}");
        }
        let kept = (0..10_000).filter(|key| map.get(key, 99).is_some()).count();
        assert!((320..=640).contains(&kept), "{kept}");
    }
}
