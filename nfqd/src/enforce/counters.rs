//! Counters of the kernel and the workers, carried over changes of the ruleset.
//!
//! An element or rule that is made anew in the kernel starts at zero; what its predecessor has
//! counted is added here.

use super::Enforcer;
use super::counter_reader::{CounterReader, Reading, finished_event};
use crate::backends::Activity;
use crate::packet_path::worker::Worker;
use nfqd_rules::nft::kernel::{BackendCounters, Counters, Kernel};
use nfqd_rules::slots::SlotKey;
use nfqd_rules::{Counter, Desired, MiddleboxKey, Policy, SlotId};
use nfqd_shmctl::RuleId;
use nix::sys::eventfd::EventFd;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// The least time between two readings of the kernel's counters.
const MIN_READ_INTERVAL: Duration = Duration::from_secs(1);
/// Readings take at most one part in this many of the time: guests may ask for them, and they are
/// as long as the ruleset.
const READ_SHARE: u32 = 20;

/// The fill, in percent, from which on a map is called full: it may have lost some elements between the
/// last packet that found no room and the reading.
const NEARLY_FULL_PERCENT: u64 = 90;

/// The longest reading that commands wait for; a longer one is left to a thread.
const MAX_PAUSE: Duration = Duration::from_millis(2);
/// The longest time for which clients wait for a reading; then they get the one before.
const MAX_WAIT: Duration = Duration::from_secs(2);
/// The middleboxes from which on the thread reads, however long the last reading took: there may be more
/// of them by now.
const MANY_MIDDLEBOXES: usize = 256;

/// The counters of the kernel, with what was carried over.
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
    /// The time that the last reading took.
    duration: Duration,
    /// The thread, once a reading has been long.
    reader: Option<CounterReader>,
    finished: Arc<EventFd>,
    /// The reading that the thread is at.
    pending: Option<PendingReading>,
}

/// A reading that the thread is at.
struct PendingReading {
    start: Instant,
    /// Counted things that were made anew since and begin at zero: their counts were carried over.
    renewed: Renewed,
    /// Whether the whole ruleset has been.
    is_void: bool,
}

/// Counted things that a change has made anew.
#[derive(Default)]
struct Renewed {
    middleboxes: Vec<MiddleboxKey>,
    rules: Vec<(MiddleboxKey, Option<RuleId>)>,
    backends: Vec<SlotKey>,
}

impl CarriedCounters {
    /// No counters.
    ///
    /// # Errors
    /// If there are no more file descriptors.
    pub(super) fn new() -> io::Result<CarriedCounters> {
        Ok(CarriedCounters {
            carried_counters: Counters::default(),
            kernel_counters: Counters::default(),
            full_maps: BTreeSet::new(),
            next_read: None,
            last_read: None,
            duration: Duration::ZERO,
            reader: None,
            finished: finished_event()?,
            pending: None,
        })
    }

    /// Begins with what was counted before, as far as a policy has it.
    pub(super) fn begin(&mut self, counted: Counters, policy: &Policy) {
        self.carried_counters = counted;
        self.retain(policy);
    }

    /// Forgets the counters of everything that a policy does not have.
    fn retain(&mut self, policy: &Policy) {
        let carried = &mut self.carried_counters;
        carried.middleboxes.retain(|key, _| policy.get(*key).is_some());
        carried.rules.retain(|(key, rule), _| has_rule(policy, *key, *rule));
        carried.backends.retain(|key, _| has_backend(policy, key));
    }

    /// Carries over the counters of rules and middleboxes that a change replaces.
    pub(super) fn carry_replaced(&mut self, replaced: &Counters) {
        // The last reading must not count them a second time until the next one.
        let last = &mut self.kernel_counters;
        for rule in replaced.rules.keys() {
            last.rules.remove(rule);
        }
        for key in replaced.middleboxes.keys() {
            last.middleboxes.remove(key);
        }
        if let Some(pending) = &mut self.pending {
            pending.renewed.rules.extend(replaced.rules.keys());
            pending.renewed.middleboxes.extend(replaced.middleboxes.keys());
        }
        self.carried_counters.add(replaced);
    }

    /// Carries over the counters of slots that are being replaced, because a new slot starts at
    /// zero. They are those of the last reading: the kernel could only be asked for all of them.
    pub(super) fn carry_removed_slots(&mut self, old: &Desired, new: &Desired) {
        for middlebox in new.changed(old) {
            for (key, slot) in old.slots.of(middlebox) {
                let is_removed = new.slots.get(&key).is_none_or(|now| now.id != slot.id);
                if let Some(pending) = self.pending.as_mut().filter(|_| is_removed) {
                    pending.renewed.backends.push(key);
                }
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
        if let Some(pending) = &mut self.pending {
            pending.is_void = true;
        }
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
                for (frontend, service) in old.services() {
                    for name in service.backends().keys() {
                        let key = SlotKey { middlebox, frontend: *frontend, backend: *name };
                        if !has_backend(now, &key) {
                            counters.backends.remove(&key);
                        }
                    }
                }
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

    /// Reads the counters, or begins to, unless they were read recently.
    fn read(&mut self, kernel: &mut Kernel, desired: &Desired) {
        let start = Instant::now();
        if self.reader.as_ref().is_some_and(CounterReader::has_ended) {
            log::warn!("the thread that reads counters has ended; another one is started");
            (self.reader, self.pending) = (None, None);
        }
        if self.pending.is_some() || self.next_read.is_some_and(|next| start < next) {
            return;
        }
        let is_long =
            self.duration > MAX_PAUSE || desired.policy.middleboxes().len() > MANY_MIDDLEBOXES;
        if is_long && self.begin_reading(desired, start) {
            return;
        }
        let counters = kernel.counters(desired);
        self.take_over(start, (counters, start.elapsed()));
    }

    /// Whether the thread is at a reading that is worth waiting for.
    fn is_reading(&self) -> bool {
        self.pending.as_ref().is_some_and(|pending| pending.start.elapsed() < MAX_WAIT)
    }

    /// Has the thread read. Returns false if there is none.
    fn begin_reading(&mut self, desired: &Desired, start: Instant) -> bool {
        if self.reader.is_none() {
            let reader = CounterReader::start(&self.finished);
            let failed = |error: &io::Error| log::warn!("no thread for counters: {error}");
            self.reader = reader.inspect_err(failed).ok();
        }
        let has_begun = self.reader.as_ref().is_some_and(|reader| reader.begin(desired.clone()));
        let renewed = Renewed::default();
        self.pending = has_begun.then_some(PendingReading { start, renewed, is_void: false });
        has_begun
    }

    /// Takes over what the thread has read.
    fn finish_reading(&mut self) {
        let reading = self.reader.as_ref().and_then(CounterReader::take);
        if let Some(reading) = reading {
            self.complete(reading);
        }
    }

    fn complete(&mut self, (mut counters, duration): Reading) {
        let Some(pending) = self.pending.take() else { return };
        if pending.is_void {
            return;
        }
        if let Ok(counters) = &mut counters {
            for key in pending.renewed.middleboxes {
                counters.middleboxes.remove(&key);
            }
            for rule in pending.renewed.rules {
                counters.rules.remove(&rule);
            }
            for key in pending.renewed.backends {
                counters.backends.remove(&key);
            }
            // Counters never fall: a commit may have hidden elements from the reading.
            self.kernel_counters.raise(counters);
        }
        self.take_over(pending.start, (counters, duration));
    }

    fn take_over(&mut self, start: Instant, (counters, duration): Reading) {
        match counters {
            Ok(counters) => {
                self.note_full_maps(&counters);
                let old = std::mem::replace(&mut self.kernel_counters, counters);
                if let Some(reader) = &self.reader {
                    reader.free(old);
                }
            }
            Err(error) => log::warn!("counters: {error}"),
        }
        self.duration = duration;
        self.last_read = Some(start);
        self.next_read = Some(Instant::now() + MIN_READ_INTERVAL.max(duration * READ_SHARE));
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
    pub fn read_counters(&mut self) {
        self.counters.read(&mut self.kernel, &self.desired_in_kernel);
    }

    /// Whether a thread reads the counters, because they are many.
    pub fn reads_counters_by_thread(&self) -> bool {
        self.counters.reader.is_some()
    }

    /// Whether a thread reads the counters, so that they are newer soon.
    pub fn is_reading_counters(&self) -> bool {
        self.counters.is_reading()
    }

    /// Takes over the counters that a thread has read.
    pub fn finish_reading_counters(&mut self) {
        self.counters.finish_reading();
    }

    /// Returns the descriptor that is readable when a thread has read the counters.
    pub fn counters_fd(&self) -> BorrowedFd<'_> {
        self.counters.finished.as_fd()
    }

    /// Returns the time since the last reading, if there was one.
    pub fn counters_age(&self) -> Option<Duration> {
        self.counters.last_read.map(|read| read.elapsed())
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

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_shmctl::MacAddr;

    /// Begins a reading at which a middlebox' rule had counted 5 packets.
    fn reading() -> (CarriedCounters, [(MiddleboxKey, Option<RuleId>); 2]) {
        let rules = [1, 2].map(|last| {
            let middlebox = MiddleboxKey::anywhere(MacAddr([2, 0, 0, 0, 0, last]));
            (middlebox, "#1".parse::<RuleId>().ok())
        });
        let mut counters = CarriedCounters::new().unwrap();
        counters.kernel_counters.rules.insert(rules[0], packets(5));
        let (start, renewed) = (Instant::now(), Renewed::default());
        counters.pending = Some(PendingReading { start, renewed, is_void: false });
        (counters, rules)
    }

    fn packets(packets: u64) -> Counter {
        Counter { packets, bytes: packets * 100 }
    }

    fn of_rules(rules: [(MiddleboxKey, Option<RuleId>); 2], counts: [u64; 2]) -> Counters {
        let rules = rules.into_iter().zip(counts.map(packets)).collect();
        Counters { rules, ..Counters::default() }
    }

    fn total(counters: &CarriedCounters, rule: (MiddleboxKey, Option<RuleId>)) -> u64 {
        let both = [&counters.carried_counters, &counters.kernel_counters];
        both.iter().filter_map(|its| its.rules.get(&rule)).map(|counter| counter.packets).sum()
    }

    #[test]
    fn a_rule_that_changes_during_a_reading_counts_once() {
        let (mut counters, rules) = reading();
        counters.carry_replaced(&of_rules([rules[0]; 2], [7, 7]));
        // The reading was made before the change.
        counters.complete((Ok(of_rules(rules, [7, 3])), Duration::ZERO));
        assert_eq!(rules.map(|rule| total(&counters, rule)), [7, 3]);
        assert!(!counters.is_reading());
    }

    #[test]
    fn a_rule_that_a_reading_has_missed_keeps_its_count() {
        let (mut counters, rules) = reading();
        let seen = Counters { rules: [(rules[1], packets(3))].into(), ..Counters::default() };
        counters.complete((Ok(seen), Duration::ZERO));
        assert_eq!(rules.map(|rule| total(&counters, rule)), [5, 3]);
    }

    #[test]
    fn a_reading_during_which_the_ruleset_was_loaded_is_void() {
        let (mut counters, rules) = reading();
        counters.carry_all(&of_rules(rules, [8, 2]));
        counters.complete((Ok(of_rules(rules, [8, 2])), Duration::ZERO));
        assert_eq!(rules.map(|rule| total(&counters, rule)), [8, 2]);
    }
}
