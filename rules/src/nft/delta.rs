//! Incremental changes of the ruleset, found from the changed middleboxes alone.

use super::build::{Ruleset, build_visiting};
use super::field::Value;
use super::filters::RuleList;
use super::middlebox::MiddleboxPart;
use super::model::{Element, Family, Table};
use super::names::SLOT_MAPS;
use super::options::RulesetOptions;
use super::table::base_table;
use crate::desired::Desired;
use crate::slots::Slots;
use nfqd_shmctl::MacAddr;
use std::collections::{BTreeMap, HashMap};

/// The state that stands in the kernel: not the ruleset itself, only what a change depends on.
#[derive(Debug)]
pub struct Installed {
    options: RulesetOptions,
    /// The part of the ruleset that does not depend on the policy.
    base: Table,
    /// The number of middleboxes that use each set and chain that comes and goes.
    users: HashMap<String, usize>,
}

/// A change of the ruleset, in steps, so that packets which both ends treat alike are treated so
/// throughout. Most changes have one step.
#[derive(Debug)]
pub struct Transition {
    pub(super) steps: Vec<Step>,
    users: BTreeMap<String, usize>,
}

/// The affected part of the ruleset, before and after a step.
#[derive(Debug)]
pub(super) struct Step {
    pub old: Table,
    pub new: Table,
}

impl Transition {
    /// The slots to be removed, by map: packets on their way may still carry them when the rest of
    /// the change is made.
    pub(super) fn leftovers(&self) -> BTreeMap<&String, BTreeMap<&Vec<Value>, &Element>> {
        let mut out: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for Step { old, new } in &self.steps {
            for (name, set) in old.sets.iter().filter(|(name, _)| name.starts_with(SLOT_MAPS)) {
                let stays = |key: &Vec<Value>| {
                    new.sets.get(name).is_some_and(|set| set.elements.contains_key(key))
                };
                let gone = set.elements.iter().filter(|(key, _)| !stays(key));
                out.entry(name).or_default().extend(gone);
            }
        }
        out.retain(|_, gone| !gone.is_empty());
        out
    }

    /// Whether [`super::kernel::Kernel::finish`] has anything to do.
    pub fn has_leftovers(&self) -> bool {
        !self.leftovers().is_empty()
    }
}

/// The parts of the changed middleboxes at one step of a change.
struct Stage<'a> {
    parts: Vec<MiddleboxPart>,
    slots: &'a Slots,
}

impl Installed {
    /// Returns the ruleset to be loaded, and the state that then stands.
    pub fn new(state: &Desired, options: &RulesetOptions) -> (Installed, Ruleset) {
        let mut users: HashMap<String, usize> = HashMap::new();
        let ruleset = build_visiting(&state.policy, &state.slots, options, |part| {
            for name in part.sets.keys().chain(part.chains.keys()) {
                match users.get_mut(name) {
                    Some(count) => *count += 1,
                    None => drop(users.insert(name.clone(), 1)),
                }
            }
        });
        let base = base_table(options);
        (Installed { options: *options, base, users }, ruleset)
    }

    /// Returns the change from the standing state to the desired one.
    pub fn change(&self, old: &Desired, new: &Desired) -> Transition {
        let mut stages = self.stages(old, new).into_iter();
        let mut before = stages.next().unwrap_or(Stage { parts: Vec::new(), slots: &old.slots });
        let names = |part: &MiddleboxPart| {
            part.sets.keys().chain(part.chains.keys()).cloned().collect::<Vec<_>>()
        };
        let (mut steps, mut users) = (Vec::new(), BTreeMap::new());
        for after in stages {
            if after.parts == before.parts {
                continue;
            }
            let touched = before.parts.iter().chain(&after.parts).flat_map(names);
            for name in touched {
                let count = || self.users.get(&name).copied().unwrap_or(0);
                users.entry(name.clone()).or_insert_with(count);
            }
            let used_before = users.clone();
            let mut count = |parts: &[MiddleboxPart], by: fn(usize, usize) -> usize| {
                for name in parts.iter().flat_map(names) {
                    users.entry(name).and_modify(|count| *count = by(*count, 1));
                }
            };
            count(&after.parts, usize::saturating_add);
            count(&before.parts, usize::saturating_sub);
            let old = self.table(&before, &after.parts, &used_before);
            let new = self.table(&after, &before.parts, &users);
            steps.push(Step { old, new });
            before = after;
        }
        Transition { steps, users }
    }

    /// Returns the parts of the changed middleboxes, step by step from the standing state to the
    /// desired one.
    fn stages<'a>(&self, old: &'a Desired, new: &'a Desired) -> Vec<Stage<'a>> {
        let changed = new.changed(old);
        let rules = |desired: &Desired, mac: MacAddr| {
            desired
                .policy
                .get(mac)
                .map_or_else(RuleList::default, |middlebox| RuleList::new(mac, middlebox))
        };
        let lists: Vec<(MacAddr, RuleList, Vec<RuleList>)> = changed
            .into_iter()
            .map(|mac| (mac, rules(old, mac), rules(new, mac)))
            .map(|(mac, before, after)| (mac, before.clone(), before.transition_to(&after)))
            .collect();
        let steps = lists.iter().map(|(.., steps)| steps.len()).max().unwrap_or(0);
        let mut stages = vec![Stage { parts: Vec::new(), slots: &old.slots }];
        stages.extend((0..steps).map(|_| Stage { parts: Vec::new(), slots: &new.slots }));
        for (mac, before, lists) in &lists {
            let mut made: Option<(&RuleList, MiddleboxPart)> = None;
            for (at, stage) in stages.iter_mut().enumerate() {
                // Parts that are no longer registered stay until the last step.
                let (desired, list) = match at.checked_sub(1) {
                    None => (old, before),
                    Some(at) => {
                        let is_new = new.policy.get(*mac).is_some() || at + 1 == steps;
                        (
                            if is_new { new } else { old },
                            lists.get(at).or(lists.last()).unwrap_or(before),
                        )
                    }
                };
                let Some(middlebox) = desired.policy.get(*mac) else { continue };
                // After the first stage only the rules make a difference.
                let part = match made.take().filter(|(before, _)| at > 1 && *before == list) {
                    Some((_, part)) => part,
                    None => {
                        MiddleboxPart::with(*mac, middlebox, list, &desired.slots, &self.options)
                    }
                };
                stage.parts.push(part.clone());
                made = Some((list, part));
            }
        }
        stages
    }

    /// Returns the part of the ruleset that a step touches, at one end of it; `others` are the
    /// parts at the other end.
    fn table(
        &self,
        stage: &Stage<'_>,
        others: &[MiddleboxPart],
        users: &BTreeMap<String, usize>,
    ) -> Table {
        let mut table = Table::new(Family::Bridge);
        let used = |name: &String| users.get(name).is_some_and(|count| *count != 0);
        // Parts that stay for the sake of unchanged middleboxes are the same before and after.
        for part in others {
            let kept = part.sets.iter().filter(|(name, _)| used(name));
            table.sets.extend(kept.map(|(name, set)| (name.clone(), set.empty())));
            let kept = part.chains.iter().filter(|(name, _)| used(name));
            table.chains.extend(kept.map(|(name, chain)| (name.clone(), chain.clone())));
        }
        table.sets.extend(self.base.sets.iter().map(|(name, set)| (name.clone(), set.clone())));
        stage.parts.iter().for_each(|part| table.add(part.clone()));
        // Addresses of backends may be shared with unchanged middleboxes.
        for (name, set) in table.sets.iter_mut().filter(|(name, _)| name.starts_with("backends")) {
            let touched = others.iter().filter_map(|part| part.elements.get(name)).flatten();
            let is_backend =
                |key: &[Value]| matches!(key, [Value::Ip(ip)] if stage.slots.is_backend(*ip));
            let kept = touched.filter(|(key, _)| is_backend(key));
            set.elements.extend(kept.map(|(key, element)| (key.clone(), element.clone())));
        }
        table
    }

    /// Notes that the change has been made.
    pub fn done(&mut self, change: Transition) {
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
    use super::super::build::build;
    use super::super::model::Queues;
    use super::super::options::{FastPath, QueuePath};
    use super::*;
    use crate::service::BackendRef;
    use crate::slots::BackendObservation;
    use nfqd_shmctl::MacAddr;
    use proptest::prelude::*;
    use proptest::sample::select;
    use std::time::Instant;

    /// Returns the table after a transaction, as `kernel::difference` sends it.
    fn apply(table: &mut Table, change: &Transition) {
        for Step { old, new } in &change.steps {
            apply_step(table, old, new);
        }
    }

    fn apply_step(table: &mut Table, old: &Table, new: &Table) {
        for name in old.sets.keys().filter(|name| !new.sets.contains_key(*name)) {
            assert_eq!(
                table.sets.remove(name).as_ref(),
                old.sets.get(name),
                "{name} has elements that stay"
            );
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
        let rule = || {
            (select(vec!["#", "+"]), 1..4_u8).prop_map(|(sign, number)| format!("{sign}{number}"))
        };
        prop_oneof![
            2 => (mac(), select(vec!["", " deny"])).prop_map(|(mac, default)| format!("R F {mac} 10.0.0.9{default}")),
            8 => (mac(), rule(), fields).prop_map(|(mac, rule, fields)| format!("A {mac} {rule} {fields}")),
            2 => (mac(), rule()).prop_map(|(mac, rule)| format!("D {mac} {rule}")),
            4 => (mac(), select(vec!["10.0.0.5", "10.0.0.6"]), select(vec!["10.0.0.7", "10.0.0.8"]))
                .prop_map(|(mac, frontend, to)| format!("R L {mac} {frontend} 0 {to}")),
            4 => (mac(), select(vec!["10.0.0.5", "10.0.0.5:80", "10.0.0.6:80/tcp"]), select(vec!["rr", "hash"]),
                select(vec!["10.0.0.7", "10.0.0.8*2 10.0.0.7 dsr", "10.0.0.7:81 10.0.0.8", "10.0.0.9"]))
                .prop_map(|(mac, frontend, kind, to)| format!("R L {mac} {frontend} {kind} {to}")),
            4 => (mac(), select(vec!["10.0.0.5 ", "10.0.0.5:80 ", ""]), select(vec!["+ 10.0.0.9", "- 10.0.0.7", "= 10.0.0.8 drain"]))
                .prop_map(|(mac, frontend, edit)| format!("B {mac} {frontend}{edit}")),
            1 => (mac(), select(vec!["F", "L", "A"])).prop_map(|(mac, services)| format!("X {mac} {services}")),
        ]
    }

    proptest! {
        /// Step by step, or several commands at once, with backends' MACs becoming known: the
        /// result equals a full load.
        #[test]
        fn changes_make_what_a_load_makes(
            steps in proptest::collection::vec((proptest::collection::vec(command(), 1..4), any::<bool>()), 1..30),
            off: bool,
        ) {
            let queues = Queues { first: 0, count: 1, bypass: true };
            let fast_path = if off { FastPath::Off } else { FastPath::Full };
            let options = RulesetOptions { queue_path: QueuePath::BrNetfilter, fast_path, queues };
            let mut now = Desired::default();
            let (mut installed, mut ruleset) = Installed::new(&now, &options);
            let table = ruleset.get_mut(&Family::Bridge).unwrap();
            for (commands, known) in steps {
                let mut next = now.clone();
                for command in commands {
                    let _ = next.policy.apply_line(&command);
                }
                let mac = known.then_some(MacAddr([2; 6]));
                let view = |_: &BackendRef<'_>| BackendObservation { mac, ..BackendObservation::UNKNOWN };
                next.slots.sync_all(&next.policy, &view, Instant::now());
                let change = installed.change(&now, &next);
                apply(table, &change);
                installed.done(change);
                now = next;
                let wanted = build(&now.policy, &now.slots, &options);
                prop_assert_eq!(&*table, &wanted[&Family::Bridge]);
            }
            let (fresh, _) = Installed::new(&now, &options);
            prop_assert_eq!(installed.users, fresh.users);
        }
    }
}
