//! The fast path's counters.

use super::super::model::Family;
use super::super::names::{CACHE_FULL, MIDDLEBOXES, middlebox_of_chain, split_prefix};
use super::super::sys::{DumpRequest, FoundSet, SetFill};
use super::{Kernel, KernelError};
use crate::counter::Counter;
use crate::desired::Desired;
use crate::mark::slot_bits;
use crate::network::MiddleboxKey;
use crate::slots::{SlotKey, SlotVersion};
use nfqd_shmctl::{MacAddr, RuleId};
use std::collections::{BTreeMap, BTreeSet};

/// The counters of the fast path.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// The counters of the middleboxes.
    pub middleboxes: BTreeMap<MiddleboxKey, Counter>,
    /// The counters of the rules of a middlebox; `None` stands for its default.
    pub rules: BTreeMap<(MiddleboxKey, Option<RuleId>), Counter>,
    /// The counters of the backends of a service.
    pub backends: BTreeMap<SlotKey, BackendCounters>,
    /// Packets whose flows could not be cached, by the map that did not take them: because it was full,
    /// or because the kernel was about to enlarge it.
    pub cache_full: BTreeMap<String, u64>,
    /// The fill of the maps and sets, if the kernel tells it.
    pub fill: BTreeMap<String, SetFill>,
}

/// The counters of a backend of a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendCounters {
    /// Packets to the backend.
    pub sent: Counter,
    /// Replies of the backend.
    pub received: Counter,
}

impl BackendCounters {
    /// Adds other counters.
    pub fn add(&mut self, other: BackendCounters) {
        self.sent += other.sent;
        self.received += other.received;
    }
}

impl Counters {
    /// Adds all counters of another.
    pub fn add(&mut self, other: &Counters) {
        for (key, counter) in &other.middleboxes {
            *self.middleboxes.entry(*key).or_default() += *counter;
        }
        for (rule, counter) in &other.rules {
            *self.rules.entry(*rule).or_default() += *counter;
        }
        for (key, counters) in &other.backends {
            self.backends.entry(*key).or_default().add(*counters);
        }
        for (map, packets) in &other.cache_full {
            *self.cache_full.entry(map.clone()).or_default() += packets;
        }
    }

    /// Raises the counters of another reading to those of this earlier one, where they are lower.
    pub fn raise(&self, other: &mut Counters) {
        fn higher<K: Ord + Copy>(from: &BTreeMap<K, Counter>, to: &mut BTreeMap<K, Counter>) {
            for (key, counter) in from {
                let its = to.entry(*key).or_default();
                if its.packets < counter.packets {
                    *its = *counter;
                }
            }
        }
        higher(&self.middleboxes, &mut other.middleboxes);
        higher(&self.rules, &mut other.rules);
        for (key, counters) in &self.backends {
            let its = other.backends.entry(*key).or_default();
            if its.sent.packets < counters.sent.packets {
                its.sent = counters.sent;
            }
            if its.received.packets < counters.received.packets {
                its.received = counters.received;
            }
        }
    }

    /// Adds the counter of an element or a rule whose comment names a rule of the policy.
    fn add_commented(&mut self, key: MiddleboxKey, comment: Option<&str>, counter: Counter) {
        let rule = match comment.and_then(|text| text.strip_prefix("rule ")) {
            Some("default") => None,
            Some(name) => match name.parse() {
                Ok(rule) => Some(rule),
                Err(_) => return,
            },
            None => return,
        };
        *self.rules.entry((key, rule)).or_default() += counter;
    }
}

impl Kernel {
    /// Reads the counters of our ruleset, without those of slots that are gone. `desired` tells which
    /// middlebox is where.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn counters(&mut self, desired: &Desired) -> Result<Counters, KernelError> {
        let is_current = |id: &[u8], version: &SlotVersion| {
            let slot = desired.slots.get(&version.key());
            slot.is_some_and(|slot| slot_bits(slot.id).to_ne_bytes()[..] == *id)
        };
        self.read_counters(desired, is_current)
    }

    /// Reads the same of a ruleset that an earlier process loaded, whatever slots are there.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn earlier_counters(&mut self, desired: &Desired) -> Result<Counters, KernelError> {
        self.read_counters(desired, |_, _| true)
    }

    fn read_counters(
        &mut self,
        desired: &Desired,
        is_counted: impl Fn(&[u8], &SlotVersion) -> bool,
    ) -> Result<Counters, KernelError> {
        let mut out = Counters::default();
        if !self.owns_table(Family::Bridge)? {
            return Ok(out);
        }
        let sets = self.dump(&DumpRequest::Sets(Family::Bridge))?.sets;
        let filled = |(name, set): (&String, &FoundSet)| Some((name.clone(), set.fill?));
        out.fill = sets.iter().filter_map(filled).collect();
        for name in sets.keys().filter(|name| counts_rules(name)) {
            let (prefix, kind) = split_prefix(name);
            if kind == MIDDLEBOXES {
                self.add_middlebox_counters(prefix, |_| true, desired, &mut out)?;
                continue;
            }
            for element in self.elements(Family::Bridge, name)? {
                let mac = element.key.first_chunk().copied().map(MacAddr);
                let key = mac.and_then(|mac| desired.middlebox_named(prefix, mac));
                if let Some((key, counter)) = key.zip(element.counter) {
                    out.add_commented(key, element.comment.as_deref(), counter);
                }
            }
        }
        for name in ["backend_mac", "backend_vip4", "backend_vip6"] {
            for element in self.elements(Family::Bridge, name)? {
                let version: Option<SlotVersion> =
                    element.comment.as_ref().and_then(|text| text.parse().ok());
                let Some((version, counter)) = version.zip(element.counter) else { continue };
                // The counts of a slot that is gone were carried over.
                if !is_counted(&element.key, &version) {
                    continue;
                }
                let sums = out.backends.entry(version.key()).or_default();
                if name == "backend_mac" {
                    sums.sent += counter;
                } else {
                    sums.received += counter;
                }
            }
        }
        self.add_chain_counters(None, desired, &mut out)?;
        Ok(out)
    }

    /// Adds the counters of the middleboxes of the network with this prefix, as far as their keys are
    /// wanted.
    pub(super) fn add_middlebox_counters(
        &mut self,
        prefix: &str,
        is_wanted: impl Fn(&[u8]) -> bool,
        desired: &Desired,
        out: &mut Counters,
    ) -> Result<(), KernelError> {
        let elements = self.elements(Family::Bridge, &format!("{prefix}{MIDDLEBOXES}"))?;
        for element in elements.into_iter().filter(|element| is_wanted(&element.key)) {
            let mac = element.key.first_chunk().copied().map(MacAddr);
            let key = mac.and_then(|mac| desired.middlebox_named(prefix, mac));
            if let Some((key, counter)) = key.zip(element.counter) {
                *out.middleboxes.entry(key).or_default() += counter;
            }
        }
        Ok(())
    }

    /// Adds the counters of the rules of one chain, or of all chains.
    pub(super) fn add_chain_counters(
        &mut self,
        chain: Option<&str>,
        desired: &Desired,
        out: &mut Counters,
    ) -> Result<(), KernelError> {
        let request = DumpRequest::Rules(Family::Bridge, chain.map(str::to_string));
        // A commit during the dump may have shown one twice.
        let mut seen = BTreeSet::new();
        for rule in self.dump(&request)?.rules.into_iter().filter(|rule| seen.insert(rule.handle)) {
            let Some(counter) = rule.counter else { continue };
            let full = rule.comment.as_deref().and_then(|text| text.strip_prefix(CACHE_FULL));
            let middlebox = middlebox_of_chain(&rule.chain);
            let key = middlebox.and_then(|(prefix, mac)| desired.middlebox_named(prefix, mac));
            if let Some(key) = key {
                out.add_commented(key, rule.comment.as_deref(), counter);
            } else if let Some(map) = full.filter(|_| counter.packets != 0) {
                *out.cache_full.entry(map.to_string()).or_default() += counter.packets;
            }
        }
        Ok(())
    }
}

/// Whether the elements of a set count for middleboxes or rules.
fn counts_rules(set: &str) -> bool {
    let (_, set) = split_prefix(set);
    [MIDDLEBOXES, "closed"].contains(&set) || set.starts_with("deny") || set.starts_with("allow")
}
