//! The number of new flows of each middlebox in the last second, by which floods are noticed.

use nfqd_rules::MiddleboxKey;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// The number of counters. Middleboxes that share one are told apart by nothing, which is rare enough:
/// a flood is named, not punished.
const COUNTERS: usize = 4096;

/// A meter of new flows, which all workers share.
pub struct FlowMeter {
    hash: RandomState,
    counters: Vec<AtomicU32>,
}

impl Default for FlowMeter {
    fn default() -> FlowMeter {
        FlowMeter {
            hash: RandomState::new(),
            counters: (0..COUNTERS).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

impl FlowMeter {
    fn at(&self, middlebox: MiddleboxKey) -> Option<&AtomicU32> {
        self.counters.get(self.hash.hash_one(middlebox) as usize % COUNTERS)
    }

    /// Counts a new flow to a middlebox.
    pub fn count(&self, middlebox: MiddleboxKey) {
        self.at(middlebox).into_iter().for_each(|counter| {
            counter.fetch_add(1, Relaxed);
        });
    }

    /// Returns the count of each middlebox since the last call, if it is at least `least`, and begins
    /// anew.
    pub fn take(
        &self,
        middleboxes: impl Iterator<Item = MiddleboxKey>,
        least: u32,
    ) -> Vec<(MiddleboxKey, u32)> {
        let mut out = Vec::new();
        if self.counters.iter().any(|counter| counter.load(Relaxed) >= least) {
            for middlebox in middleboxes {
                let count = self.at(middlebox).map_or(0, |counter| counter.load(Relaxed));
                if count >= least {
                    out.push((middlebox, count));
                }
            }
        }
        self.counters.iter().for_each(|counter| counter.store(0, Relaxed));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_shmctl::MacAddr;

    #[test]
    fn the_middlebox_with_many_new_flows_is_named_once() {
        let meter = FlowMeter::default();
        let key = |last: u8| MiddleboxKey::anywhere(MacAddr([2, 0, 0, 0, 0, last]));
        for _ in 0..100 {
            meter.count(key(1));
        }
        meter.count(key(2));
        let all = || [key(1), key(2)].into_iter();
        let found = meter.take(all(), 50);
        // Both may share a counter.
        assert!(found.iter().any(|(found, count)| *found == key(1) && *count >= 100), "{found:?}");
        assert_eq!(meter.take(all(), 50), []);
    }
}
