//! Allocation of identifiers, with a quarantine before an identifier is used again.

use super::version::SlotVersion;
use crate::ids::{Id, MAX_ID};
use crate::network::MiddleboxKey;
use imbl::{OrdMap, OrdSet};
use std::time::{Duration, Instant};

/// An allocator of identifiers for keys that come and go. A clone is cheap: both share what is
/// equal.
#[derive(Clone, Debug)]
pub(super) struct IdAllocator<K: Ord, I> {
    used: OrdMap<K, I>,
    /// Released identifiers, with the end of their quarantine, and the key they had if it is known.
    quarantined: OrdMap<u32, (Instant, Option<K>)>,
    quarantined_by_owner: OrdMap<MiddleboxKey, u32>,
    quarantine: Duration,
    /// The most identifiers of one owner that may be in quarantine.
    max_quarantined: u32,
    /// No quarantine ends before this.
    next_release: Option<Instant>,
    /// Identifiers below `next` that are neither used nor quarantined.
    free: OrdSet<u32>,
    /// Identifiers from here on have never been used.
    next: u32,
}

/// A key whose identifiers count against the quota of a middlebox.
pub(super) trait Owned {
    fn owner(&self) -> MiddleboxKey;
}

impl Owned for MiddleboxKey {
    fn owner(&self) -> MiddleboxKey {
        *self
    }
}

impl Owned for SlotVersion {
    fn owner(&self) -> MiddleboxKey {
        self.key.middlebox
    }
}

impl<K: Copy + Ord + Owned, I: Id> IdAllocator<K, I> {
    pub(super) fn new(quarantine: Duration, max_quarantined: u32) -> IdAllocator<K, I> {
        IdAllocator {
            used: OrdMap::new(),
            quarantined: OrdMap::new(),
            quarantined_by_owner: OrdMap::new(),
            quarantine,
            max_quarantined,
            next_release: None,
            free: OrdSet::new(),
            next: 1,
        }
    }

    /// Returns the keys that have an identifier, with it.
    pub(super) fn used(&self) -> &OrdMap<K, I> {
        &self.used
    }

    /// Returns the key that a quarantined identifier had.
    pub(super) fn former_key(&self, id: I) -> Option<K> {
        self.quarantined.get(&id.number()).and_then(|(_, key)| *key)
    }

    /// Takes over an identifier that the kernel carries for a key.
    pub(super) fn adopt(&mut self, id: I, key: K, now: Instant) {
        if self.used.contains_key(&key) {
            return;
        }
        self.reserve_up_to(id, now);
        if self.reclaim(id.number()) {
            self.used.insert(key, id);
        }
    }

    /// Quarantines an identifier that the kernel may carry, and all unknown ones below it.
    pub(super) fn reserve_up_to(&mut self, id: I, now: Instant) {
        self.quarantine_new(id.number(), None, now);
    }

    /// Releases the identifier of a key into quarantine.
    pub(super) fn release(&mut self, key: &K, now: Instant) {
        if let Some(id) = self.used.remove(key) {
            self.quarantine(id.number(), Some(*key), now);
        }
    }

    /// Returns the identifier of a key, and allocates one if it has none. `None` if no identifier
    /// is left, or if the owner has too many in quarantine.
    pub(super) fn allocate(&mut self, key: K, now: Instant) -> Option<I> {
        if let Some(id) = self.used.get(&key) {
            return Some(*id);
        }
        self.release_expired(now);
        let quarantined = self.quarantined_by_owner.get(&key.owner());
        if quarantined.is_some_and(|count| *count >= self.max_quarantined) {
            return None;
        }
        // A quarantined identifier is not even for the key that had it: the engine may have
        // forgotten what the kernel still caches under it.
        let number = match self.free.get_min().copied() {
            Some(number) => number,
            None => (self.next <= MAX_ID).then_some(self.next)?,
        };
        let id = I::from_number(number)?;
        self.free.remove(&number);
        self.next = self.next.max(number + 1);
        self.used.insert(key, id);
        Some(id)
    }

    /// Quarantines an identifier that `key` had for a moment in a state that was rolled back: the
    /// kernel may have cached it.
    pub(super) fn quarantine_again(&mut self, id: I, key: &K, now: Instant) {
        let number = id.number();
        if self.free.remove(&number).is_some() || self.reclaim(number) {
            self.quarantine(number, Some(*key), now);
        }
        self.quarantine_new(number, Some(*key), now);
    }

    /// Quarantines all identifiers up to this one that were never used.
    fn quarantine_new(&mut self, last: u32, key: Option<K>, now: Instant) {
        for number in self.next..=last {
            self.quarantine(number, key, now);
        }
        self.next = self.next.max(last.saturating_add(1));
    }

    fn quarantine(&mut self, number: u32, key: Option<K>, now: Instant) {
        let until = now + self.quarantine;
        self.next_release = Some(self.next_release.map_or(until, |next| next.min(until)));
        self.quarantined.insert(number, (until, key));
        if let Some(key) = key {
            *self.quarantined_by_owner.entry(key.owner()).or_default() += 1;
        }
    }

    /// Takes an identifier out of quarantine. Returns whether it was there.
    fn reclaim(&mut self, number: u32) -> bool {
        let Some((_, key)) = self.quarantined.remove(&number) else { return false };
        if let Some(owner) = key.map(|key| key.owner()) {
            match self.quarantined_by_owner.get(&owner).copied().unwrap_or(0) {
                0 | 1 => drop(self.quarantined_by_owner.remove(&owner)),
                count => drop(self.quarantined_by_owner.insert(owner, count - 1)),
            }
        }
        true
    }

    /// Frees the identifiers whose quarantine has ended.
    fn release_expired(&mut self, now: Instant) {
        if self.next_release.is_none_or(|next| next > now) {
            return;
        }
        let expired: Vec<u32> = self
            .quarantined
            .iter()
            .filter(|(_, (until, _))| *until <= now)
            .map(|(number, _)| *number)
            .collect();
        for number in expired {
            self.reclaim(number);
            self.free.insert(number);
        }
        self.next_release = self.quarantined.values().map(|(until, _)| *until).min();
    }
}
