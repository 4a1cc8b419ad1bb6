//! Slots that are gone, and that replies on their way through the bridge may still carry.
//!
//! A reply is marked with its slot where it comes in and translated where it leaves. In between it may
//! be on another core, or in another program's queue, so the maps that translate it keep a slot longer than those
//! by which frames get it.

use super::super::field::Value;
use super::super::names::split_prefix;
use std::time::{Duration, Instant};

/// Whether this map of slots is used where replies leave.
pub(super) fn translates_replies(map: &str) -> bool {
    split_prefix(map).1.starts_with("backend_v")
}

/// The keys of elements that are to be removed, by map.
type Keys = Vec<(String, Vec<Vec<Value>>)>;

/// The slots, with the time of their removal from the other maps. The oldest come first.
#[derive(Default)]
pub(super) struct Retired(Vec<(Instant, Keys)>);

impl Retired {
    pub(super) fn add(&mut self, keys: Keys) {
        if !keys.is_empty() {
            self.0.push((Instant::now(), keys));
        }
    }

    /// Takes the keys out that have been kept for this long.
    pub(super) fn take_due(&mut self, kept: Duration) -> Keys {
        let due = self.0.partition_point(|(since, _)| since.elapsed() >= kept);
        self.0.drain(..due).flat_map(|(_, keys)| keys).collect()
    }
}
