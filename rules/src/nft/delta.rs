//! What a change of the policy changes in the ruleset, found from the changed middleboxes alone.

use super::field::Value;
use super::model::{Family, Table};
use super::part::Part;
use super::ruleset::{Options, Ruleset, build_of, frame};
use crate::policy::Policy;
use crate::slots::Slots;
use nfqd_shmctl::MacAddr;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What is to hold: a policy, and the numbers that its ruleset has. A clone costs nothing.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// The policy.
    pub policy: Policy,
    /// The numbers.
    pub slots: Slots,
}

impl Desired {
    /// The middleboxes that differ between the two; found without looking at what both share.
    pub fn changed(&self, before: &Desired) -> BTreeSet<MacAddr> {
        self.policy.changed(&before.policy).into_iter().chain(self.slots.changed(&before.slots)).collect()
    }
}

/// What stands in the kernel: not the ruleset itself, only what tells how to change it.
#[derive(Debug)]
pub struct Standing {
    options: Options,
    /// What stands whatever is registered.
    frame: Table,
    /// How many middleboxes use each set and chain that comes and goes.
    users: HashMap<String, usize>,
}

/// A part of the ruleset before and after a change; nothing else changes.
#[derive(Debug)]
pub struct Change {
    pub(super) old: Table,
    pub(super) new: Table,
    users: BTreeMap<String, usize>,
}

impl Standing {
    /// The ruleset to be loaded, and what then stands.
    pub fn new(state: &Desired, options: &Options) -> (Standing, Ruleset) {
        let mut users: HashMap<String, usize> = HashMap::new();
        let ruleset = build_of(&state.policy, &state.slots, options, |part| {
            for name in part.sets.keys().chain(part.chains.keys()) {
                match users.get_mut(name) {
                    Some(count) => *count += 1,
                    None => drop(users.insert(name.clone(), 1)),
                }
            }
        });
        let frame = frame(options);
        (Standing { options: *options, frame, users }, ruleset)
    }

    /// What changes between what stands and what is to stand.
    pub fn change(&self, old: &Desired, new: &Desired) -> Change {
        let changed = new.changed(old);
        let parts = |state: &Desired| -> Vec<Part> {
            let registered = changed.iter().filter_map(|mac| Some((*mac, state.policy.get(*mac)?)));
            registered
                .map(|(mac, middlebox)| Part::new(mac, middlebox, &state.slots, &self.options))
                .collect()
        };
        let (old_parts, new_parts) = (parts(old), parts(new));
        let names = |part: &Part| part.sets.keys().chain(part.chains.keys()).cloned().collect::<Vec<_>>();
        let mut users: BTreeMap<String, usize> = BTreeMap::new();
        for name in old_parts.iter().chain(&new_parts).flat_map(names) {
            let count = self.users.get(&name).copied().unwrap_or(0);
            users.insert(name, count);
        }
        let before = users.clone();
        let mut count = |parts: &[Part], by: fn(usize, usize) -> usize| {
            for name in parts.iter().flat_map(names) {
                users.entry(name).and_modify(|count| *count = by(*count, 1));
            }
        };
        count(&new_parts, usize::saturating_add);
        count(&old_parts, usize::saturating_sub);
        let table = |parts: Vec<Part>, others: &[Part], users: &BTreeMap<String, usize>, state: &Desired| {
            let mut table = Table::new(Family::Bridge);
            let used = |name: &String| users.get(name).is_some_and(|count| *count != 0);
            // What stays for the sake of middleboxes that do not change is the same before and after.
            for part in others {
                let kept = part.sets.iter().filter(|(name, _)| used(name));
                table.sets.extend(kept.map(|(name, set)| (name.clone(), set.empty())));
                let kept = part.chains.iter().filter(|(name, _)| used(name));
                table.chains.extend(kept.map(|(name, chain)| (name.clone(), chain.clone())));
            }
            let standing = self.frame.sets.iter().map(|(name, set)| (name.clone(), set.clone()));
            table.sets.extend(standing);
            parts.into_iter().for_each(|part| table.add(part));
            // Addresses of backends may be shared with middleboxes that do not change.
            for (name, set) in table.sets.iter_mut().filter(|(name, _)| name.starts_with("backends")) {
                let touched = others.iter().filter_map(|part| part.elements.get(name)).flatten();
                let is_backend =
                    |key: &[Value]| matches!(key, [Value::Ip(ip)] if state.slots.is_backend(*ip));
                let kept = touched.filter(|(key, _)| is_backend(key));
                set.elements.extend(kept.map(|(key, element)| (key.clone(), element.clone())));
            }
            table
        };
        let old_table = table(old_parts.clone(), &new_parts, &before, old);
        let new_table = table(new_parts, &old_parts, &users, new);
        Change { old: old_table, new: new_table, users }
    }

    /// The change has been made.
    pub fn done(&mut self, change: Change) {
        for (name, count) in change.users {
            if count == 0 {
                self.users.remove(&name)
            } else {
                self.users.insert(name, count)
            };
        }
    }
}
