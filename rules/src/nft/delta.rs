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

#[cfg(test)]
mod tests {
    use super::super::model::Queues;
    use super::super::ruleset::{FastPath, Steer, build};
    use super::*;
    use nfqd_shmctl::MacAddr;
    use proptest::prelude::*;
    use proptest::sample::select;
    use std::net::IpAddr;
    use std::time::Instant;

    /// What a transaction makes of a table, as `kernel::difference` sends it.
    fn apply(table: &mut Table, change: &Change) {
        let Change { old, new, .. } = change;
        for name in old.sets.keys().filter(|name| !new.sets.contains_key(*name)) {
            assert_eq!(table.sets.remove(name).as_ref(), old.sets.get(name), "{name} has elements that stay");
        }
        for (name, set) in &new.sets {
            let before = old.sets.get(name);
            assert_eq!(table.sets.contains_key(name), before.is_some(), "{name}");
            let there = table.sets.entry(name.clone()).or_insert_with(|| set.empty());
            for key in before.into_iter().flat_map(|set| set.elements.keys()) {
                assert!(there.elements.remove(key).is_some(), "{name}: {key:?}");
            }
            there.elements.extend(set.elements.clone());
        }
        for name in old.chains.keys().filter(|name| !new.chains.contains_key(*name)) {
            assert!(table.chains.remove(name).is_some(), "{name}");
        }
        for (name, chain) in &new.chains {
            assert_eq!(table.chains.contains_key(name), old.chains.contains_key(name), "{name}");
            table.chains.insert(name.clone(), chain.clone());
        }
    }

    fn command() -> impl Strategy<Value = String> {
        let mac = || select(vec!["2:0:0:0:0:1", "2:0:0:0:0:2", "2:0:0:0:0:3"]);
        let fields = select(vec![
            "T 2 d 80",
            "T 2 d 81",
            "T 2 d 80-90",
            "I 1 s 10.0.0.1",
            "I 1 s 10.0.0.0/8",
            "I 1 s 10.0.0.0/16",
            "V 1 s 7",
            "I 0",
        ]);
        let rule = || (select(vec!["#", "+"]), 1..4_u8).prop_map(|(sign, number)| format!("{sign}{number}"));
        prop_oneof![
            2 => (mac(), select(vec!["", " deny"])).prop_map(|(mac, default)| format!("R F {mac} 10.0.0.9{default}")),
            8 => (mac(), rule(), fields).prop_map(|(mac, rule, fields)| format!("A {mac} {rule} {fields}")),
            2 => (mac(), rule()).prop_map(|(mac, rule)| format!("D {mac} {rule}")),
            4 => (mac(), select(vec!["10.0.0.5", "10.0.0.6"]), select(vec!["10.0.0.7", "10.0.0.8"]))
                .prop_map(|(mac, vip, to)| format!("R L {mac} {vip} 0 {to}")),
            1 => (mac(), select(vec!["F", "L", "A"])).prop_map(|(mac, services)| format!("X {mac} {services}")),
        ]
    }

    proptest! {
        /// Step by step, or several commands at once, with MACs of backends that become known: what stands is what would be
        /// loaded.
        #[test]
        fn changes_make_what_a_load_makes(
            steps in proptest::collection::vec((proptest::collection::vec(command(), 1..4), any::<bool>()), 1..30),
            off: bool,
        ) {
            let queues = Queues { first: 0, count: 1, bypass: true };
            let fast_path = if off { FastPath::Off } else { FastPath::Full };
            let options = Options { steer: Steer::BrNetfilter, fast_path, queues };
            let mut now = Desired::default();
            let (mut standing, mut ruleset) = Standing::new(&now, &options);
            let table = ruleset.get_mut(&Family::Bridge).unwrap();
            for (commands, known) in steps {
                let mut next = now.clone();
                for command in commands {
                    let _ = next.policy.apply_line(&command);
                }
                let mac = |_: IpAddr| known.then_some(MacAddr([2; 6]));
                next.slots.follow(&next.policy, mac, Instant::now());
                let change = standing.change(&now, &next);
                apply(table, &change);
                standing.done(change);
                now = next;
                let wanted = build(&now.policy, &now.slots, &options);
                prop_assert_eq!(&*table, &wanted[&Family::Bridge]);
            }
            let (fresh, _) = Standing::new(&now, &options);
            prop_assert_eq!(standing.users, fresh.users);
        }
    }
}
