//! The fast path's counters.

use super::super::model::Family;
use super::super::names::{CACHE_FULL, mac_of_chain};
use super::super::sys::DumpRequest;
use super::{Kernel, KernelError};
use crate::counter::Counter;
use crate::slots::{SlotKey, SlotVersion};
use nfqd_shmctl::{MacAddr, RuleId};
use std::collections::BTreeMap;

/// The counters of the fast path.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// The counters of the middleboxes.
    pub middleboxes: BTreeMap<MacAddr, Counter>,
    /// The counters of the rules of a middlebox; `None` stands for its default.
    pub rules: BTreeMap<(MacAddr, Option<RuleId>), Counter>,
    /// The counters of the backends of a service.
    pub backends: BTreeMap<SlotKey, BackendCounters>,
    /// Packets whose flows could not be cached, by the map that was full.
    pub cache_full: BTreeMap<String, u64>,
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
        for (mac, counter) in &other.middleboxes {
            *self.middleboxes.entry(*mac).or_default() += *counter;
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

    /// Adds the counter of an element or a rule whose comment names a rule of the policy.
    fn add_commented(&mut self, mac: MacAddr, comment: Option<&str>, counter: Counter) {
        let rule = match comment.and_then(|text| text.strip_prefix("rule ")) {
            Some("default") => None,
            Some(name) => match name.parse() {
                Ok(rule) => Some(rule),
                Err(_) => return,
            },
            None => return,
        };
        *self.rules.entry((mac, rule)).or_default() += counter;
    }
}

impl Kernel {
    /// Reads the counters of our ruleset, whichever process loaded it.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn counters(&mut self) -> Result<Counters, KernelError> {
        let mut out = Counters::default();
        if !self.owns_table(Family::Bridge)? {
            return Ok(out);
        }
        let sets = self.dump(&DumpRequest::Sets(Family::Bridge))?.sets;
        for name in sets.keys().filter(|name| counts_rules(name)) {
            for element in self.elements(Family::Bridge, name)? {
                let mac = element.key.first_chunk().copied().map(MacAddr);
                if let Some((mac, counter)) = mac.zip(element.counter) {
                    if name == "middleboxes" {
                        *out.middleboxes.entry(mac).or_default() += counter;
                    } else {
                        out.add_commented(mac, element.comment.as_deref(), counter);
                    }
                }
            }
        }
        for name in ["backend_mac", "backend_vip4", "backend_vip6"] {
            for element in self.elements(Family::Bridge, name)? {
                let version: Option<SlotVersion> =
                    element.comment.as_ref().and_then(|text| text.parse().ok());
                let Some((version, counter)) = version.zip(element.counter) else { continue };
                let sums = out.backends.entry(version.key()).or_default();
                if name == "backend_mac" {
                    sums.sent += counter;
                } else {
                    sums.received += counter;
                }
            }
        }
        self.add_chain_counters(None, &mut out)?;
        Ok(out)
    }

    /// Adds the counters of the rules of one chain, or of all chains.
    pub(super) fn add_chain_counters(
        &mut self,
        chain: Option<&str>,
        out: &mut Counters,
    ) -> Result<(), KernelError> {
        let request = DumpRequest::Rules(Family::Bridge, chain.map(str::to_string));
        for rule in self.dump(&request)?.rules {
            let Some(counter) = rule.counter else { continue };
            let full = rule.comment.as_deref().and_then(|text| text.strip_prefix(CACHE_FULL));
            if let Some(mac) = mac_of_chain(&rule.chain) {
                out.add_commented(mac, rule.comment.as_deref(), counter);
            } else if let Some(map) = full.filter(|_| counter.packets != 0) {
                *out.cache_full.entry(map.to_string()).or_default() += counter.packets;
            }
        }
        Ok(())
    }
}

/// Whether the elements of a set count for middleboxes or rules.
fn counts_rules(set: &str) -> bool {
    ["middleboxes", "closed"].contains(&set) || set.starts_with("deny") || set.starts_with("allow")
}
