//! Counters of the kernel and the workers, carried over changes of the ruleset.
//!
//! An element or rule that is made anew in the kernel starts at zero; what its predecessor has
//! counted is added here.

use super::Enforcer;
use crate::backends::Activity;
use crate::packet_path::worker::Worker;
use nfqd_rules::nft::kernel::{BackendCounters, Counters, Kernel};
use nfqd_rules::slots::SlotKey;
use nfqd_rules::{Counter, Desired, MiddleboxKey, Policy, SlotId};
use nfqd_shmctl::RuleId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// The least time between two readings of the kernel's counters.
const MIN_READ_INTERVAL: Duration = Duration::from_secs(1);
/// Readings take at most one part in this many of the time: guests may ask for them, and they are
/// as long as the ruleset.
const READ_SHARE: u32 = 20;

/// The fill, in percent, from which on a map is called full: it may have lost some elements between the
/// last packet that found no room and the reading.
const NEARLY_FULL_PERCENT: u64 = 90;

/// The counters of the kernel, with what was carried over.
#[derive(Default)]
pub(super) struct CarriedCounters {
    carried_counters: Counters,
    /// The last reading.
    kernel_counters: Counters,
    /// The maps that were full when they did not take a flow.
    full_maps: BTreeSet<String>,
    /// The earliest time of the next reading.
    next_read: Option<Instant>,
    /// The time of the last reading.
    last_read: Option<Instant>,
}

impl CarriedCounters {
    /// Counters that begin with what was counted before.
    pub(super) fn new(carried_counters: Counters) -> CarriedCounters {
        CarriedCounters { carried_counters, ..CarriedCounters::default() }
    }

    /// Forgets the counters of everything that a policy does not have.
    pub(super) fn retain(&mut self, policy: &Policy) {
        let carried = &mut self.carried_counters;
        carried.middleboxes.retain(|key, _| policy.get(*key).is_some());
        carried.rules.retain(|(key, rule), _| has_rule(policy, *key, *rule));
        carried.backends.retain(|key, _| has_backend(policy, key));
    }

    /// Carries over the counters of rules and middleboxes that a change replaces.
    pub(super) fn carry_replaced(&mut self, replaced: &Counters) {
        // The last reading must not count them a second time until the next one.
        let last = &mut self.kernel_counters;
        last.rules.retain(|rule, _| !replaced.rules.contains_key(rule));
        last.middleboxes.retain(|key, _| !replaced.middleboxes.contains_key(key));
        self.carried_counters.add(replaced);
    }

    /// Carries over the counters of slots that are being replaced, because a new slot starts at
    /// zero. They are those of the last reading: the kernel could only be asked for all of them.
    pub(super) fn carry_removed_slots(&mut self, old: &Desired, new: &Desired) {
        for middlebox in new.changed(old) {
            for (key, slot) in old.slots.of(middlebox) {
                let is_removed = new.slots.get(&key).is_none_or(|now| now.id != slot.id);
                if is_removed && let Some(counters) = self.kernel_counters.backends.remove(&key) {
                    self.carried_counters.backends.entry(key).or_default().add(counters);
                }
            }
        }
    }

    /// Carries over all counters of tables that have been loaded anew.
    pub(super) fn carry_all(&mut self, counters: &Counters) {
        self.carried_counters.add(counters);
        (self.kernel_counters, self.next_read) = (Counters::default(), None);
    }

    /// Forgets the counters of rules, middleboxes and backends that a change has removed.
    pub(super) fn forget_removed(&mut self, before: &Policy, now: &Policy, workers: &[Worker]) {
        for middlebox in now.changed(before) {
            let Some(old) = before.get(middlebox) else { continue };
            let both = [&mut self.carried_counters, &mut self.kernel_counters];
            for counters in both {
                if now.get(middlebox).is_none() {
                    counters.middleboxes.remove(&middlebox);
                }
                let stays = |key: &SlotKey| key.middlebox != middlebox || has_backend(now, key);
                counters.backends.retain(|key, _| stays(key));
                let gone = |rule: &Option<RuleId>| !has_rule(now, middlebox, *rule);
                for rule in old.rules_and_default().filter(gone) {
                    counters.rules.remove(&(middlebox, rule));
                }
            }
            let gone = |rule: &Option<RuleId>| !has_rule(now, middlebox, *rule);
            for rule in old.rules_and_default().filter(gone) {
                for worker in workers {
                    let rules = worker.counters.rules.lock();
                    rules.unwrap_or_else(PoisonError::into_inner).remove(&(middlebox, rule));
                }
            }
        }
    }

    fn read(&mut self, kernel: &mut Kernel, desired: &Desired) {
        let start = Instant::now();
        if self.next_read.is_some_and(|next| start < next) {
            return;
        }
        match kernel.counters(desired) {
            Ok(counters) => {
                self.note_full_maps(&counters);
                self.kernel_counters = counters;
            }
            Err(error) => log::warn!("counters: {error}"),
        }
        let pause = MIN_READ_INTERVAL.max(start.elapsed() * READ_SHARE);
        self.last_read = Some(start);
        self.next_read = Some(Instant::now() + pause);
    }
}

impl CarriedCounters {
    /// Notes the maps that have not taken flows since the last reading, and are full; on a kernel that
    /// does not tell that, they are taken for full.
    fn note_full_maps(&mut self, counters: &Counters) {
        for (map, packets) in &counters.cache_full {
            let before = self.kernel_counters.cache_full.get(map).copied().unwrap_or_default();
            let fill = counters.fill.get(map);
            let is_full = fill.is_none_or(|fill| {
                u64::from(fill.count) * 100 >= u64::from(fill.size) * NEARLY_FULL_PERCENT
            });
            if *packets > before && is_full {
                self.full_maps.insert(map.clone());
            }
        }
    }
}

impl Enforcer {
    /// Reads the kernel's counters, unless they were read recently.
    pub fn read_counters(&mut self, desired: &Desired) {
        self.counters.read(&mut self.kernel, desired);
    }

    /// Returns the time since the last reading.
    pub fn counters_age(&self) -> Duration {
        self.counters.last_read.map_or(Duration::ZERO, |read| read.elapsed())
    }

    /// Returns what went to a middlebox, as of the last reading.
    pub fn middlebox_counter(&self, middlebox: MiddleboxKey) -> Counter {
        let all = [&self.counters.carried_counters, &self.counters.kernel_counters];
        all.iter().filter_map(|counters| counters.middleboxes.get(&middlebox)).copied().sum()
    }

    /// Returns what went to a backend of a service and came from it, as of the last reading.
    pub fn backend_counters(&self, key: &SlotKey) -> BackendCounters {
        let mut sum = BackendCounters::default();
        for counters in [&self.counters.carried_counters, &self.counters.kernel_counters] {
            sum.add(counters.backends.get(key).copied().unwrap_or_default());
        }
        sum
    }

    /// Returns the traffic of a backend that has a slot: in the kernel as of the last reading, in the
    /// engine until now.
    pub fn activity(&self, key: &SlotKey, slot: SlotId) -> Activity {
        let answers = self.shared.state.flows.answers(slot);
        let now = self.shared.now();
        let age = |at: Option<u32>| at.map(|at| now.saturating_sub(at));
        let counted = self.counters.kernel_counters.backends.get(key).copied().unwrap_or_default();
        Activity {
            answered: age(answers.answered),
            accepted_tcp: age(answers.accepted_tcp),
            accepted_other: age(answers.accepted_other),
            counted: self.counters.last_read,
            unanswered: age(answers.unanswered),
            replies: counted.received.packets.saturating_sub(u64::from(answers.refusals)),
        }
    }

    /// Returns packets whose flows the kernel could not cache, by the map that was full, as of the
    /// last reading.
    pub fn cache_full_packets(&self) -> &BTreeMap<String, u64> {
        &self.counters.kernel_counters.cache_full
    }

    /// Returns the maps that were full when they did not take a flow, as of the last reading.
    pub fn full_maps(&self) -> &BTreeSet<String> {
        &self.counters.full_maps
    }

    /// Returns what a rule has matched: in the kernel as of the last reading, in the engine until
    /// now. `None` stands for the default.
    pub fn rule_counter(&self, middlebox: MiddleboxKey, rule: Option<RuleId>) -> Counter {
        let key = (middlebox, rule);
        let kernel = [&self.counters.carried_counters, &self.counters.kernel_counters];
        let kernel: Counter =
            kernel.iter().filter_map(|counters| counters.rules.get(&key)).copied().sum();
        let mut sum = kernel;
        for worker in &self.workers {
            let rules = worker.counters.rules.lock().unwrap_or_else(PoisonError::into_inner);
            sum += rules.get(&key).copied().unwrap_or_default();
        }
        sum
    }
}

fn has_backend(policy: &Policy, key: &SlotKey) -> bool {
    let service = policy.get(key.middlebox).and_then(|middlebox| middlebox.service(&key.frontend));
    service.is_some_and(|service| service.backends().contains_key(&key.backend))
}

fn has_rule(policy: &Policy, key: MiddleboxKey, rule: Option<RuleId>) -> bool {
    policy.get(key).is_some_and(|middlebox| middlebox.has_rule(rule))
}
