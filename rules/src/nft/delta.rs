//! What a change of the policy changes in the ruleset, found from the changed middleboxes alone.

use super::field::Value;
use super::model::{Element, Family, Table};
use super::part::Part;
use super::ruleset::{Options, Ruleset, build_of, frame};
use super::steps::RuleList;
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

/// A change of the ruleset, in steps, so that what both ends treat alike is treated so all the way. Most changes have one.
#[derive(Debug)]
pub struct Change {
    pub(super) steps: Vec<Step>,
    users: BTreeMap<String, usize>,
}

/// A part of the ruleset before and after a step; nothing else changes.
#[derive(Debug)]
pub(super) struct Step {
    pub old: Table,
    pub new: Table,
}

/// Maps from slots to addresses.
pub(super) const SLOT_MAPS: &str = "backend_";

impl Change {
    /// The slots that go, by map: packets on their way may still carry them when the rest of the change is made.
    pub(super) fn leftovers(&self) -> BTreeMap<&String, BTreeMap<&Vec<Value>, &Element>> {
        let mut out: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for Step { old, new } in &self.steps {
            for (name, set) in old.sets.iter().filter(|(name, _)| name.starts_with(SLOT_MAPS)) {
                let stays =
                    |key: &Vec<Value>| new.sets.get(name).is_some_and(|set| set.elements.contains_key(key));
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

/// The parts of the changed middleboxes at one moment of a change, and whose numbers they have.
struct Stage<'a> {
    parts: Vec<Part>,
    slots: &'a Slots,
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
        let mut stages = self.stages(old, new).into_iter();
        let mut before = stages.next().unwrap_or(Stage { parts: Vec::new(), slots: &old.slots });
        let names = |part: &Part| part.sets.keys().chain(part.chains.keys()).cloned().collect::<Vec<_>>();
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
            let mut count = |parts: &[Part], by: fn(usize, usize) -> usize| {
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
        Change { steps, users }
    }

    /// The parts of the changed middleboxes, step by step from what stands to what is to stand.
    fn stages<'a>(&self, old: &'a Desired, new: &'a Desired) -> Vec<Stage<'a>> {
        let changed = new.changed(old);
        let rules = |desired: &Desired, mac: MacAddr| {
            desired.policy.get(mac).map_or_else(RuleList::default, |middlebox| RuleList::new(mac, middlebox))
        };
        let lists: Vec<(MacAddr, RuleList, Vec<RuleList>)> = changed
            .into_iter()
            .map(|mac| (mac, rules(old, mac), rules(new, mac)))
            .map(|(mac, before, after)| (mac, before.clone(), before.steps(&after)))
            .collect();
        let steps = lists.iter().map(|(.., steps)| steps.len()).max().unwrap_or(0);
        let mut stages = vec![Stage { parts: Vec::new(), slots: &old.slots }];
        stages.extend((0..steps).map(|_| Stage { parts: Vec::new(), slots: &new.slots }));
        for (mac, before, lists) in &lists {
            let mut made: Option<(&RuleList, Part)> = None;
            for (at, stage) in stages.iter_mut().enumerate() {
                // What is not registered any more stays until the last step.
                let (desired, list) = match at.checked_sub(1) {
                    None => (old, before),
                    Some(at) => {
                        let is_new = new.policy.get(*mac).is_some() || at + 1 == steps;
                        (if is_new { new } else { old }, lists.get(at).or(lists.last()).unwrap_or(before))
                    }
                };
                let Some(middlebox) = desired.policy.get(*mac) else { continue };
                // Behind the first stage only the rules make a difference.
                let part = match made.take().filter(|(before, _)| at > 1 && *before == list) {
                    Some((_, part)) => part,
                    None => Part::with(*mac, middlebox, list, &desired.slots, &self.options),
                };
                stage.parts.push(part.clone());
                made = Some((list, part));
            }
        }
        stages
    }

    /// The part of the ruleset that a step touches, at one end of it; `others` are the parts at the other end.
    fn table(&self, stage: &Stage<'_>, others: &[Part], users: &BTreeMap<String, usize>) -> Table {
        let mut table = Table::new(Family::Bridge);
        let used = |name: &String| users.get(name).is_some_and(|count| *count != 0);
        // What stays for the sake of middleboxes that do not change is the same before and after.
        for part in others {
            let kept = part.sets.iter().filter(|(name, _)| used(name));
            table.sets.extend(kept.map(|(name, set)| (name.clone(), set.empty())));
            let kept = part.chains.iter().filter(|(name, _)| used(name));
            table.chains.extend(kept.map(|(name, chain)| (name.clone(), chain.clone())));
        }
        table.sets.extend(self.frame.sets.iter().map(|(name, set)| (name.clone(), set.clone())));
        stage.parts.iter().for_each(|part| table.add(part.clone()));
        // Addresses of backends may be shared with middleboxes that do not change.
        for (name, set) in table.sets.iter_mut().filter(|(name, _)| name.starts_with("backends")) {
            let touched = others.iter().filter_map(|part| part.elements.get(name)).flatten();
            let is_backend = |key: &[Value]| matches!(key, [Value::Ip(ip)] if stage.slots.is_backend(*ip));
            let kept = touched.filter(|(key, _)| is_backend(key));
            set.elements.extend(kept.map(|(key, element)| (key.clone(), element.clone())));
        }
        table
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
    use crate::slots::Seen;
    use nfqd_shmctl::MacAddr;
    use proptest::prelude::*;
    use proptest::sample::select;
    use std::time::Instant;

    /// What a transaction makes of a table, as `kernel::difference` sends it.
    fn apply(table: &mut Table, change: &Change) {
        for Step { old, new } in &change.steps {
            apply_step(table, old, new);
        }
    }

    fn apply_step(table: &mut Table, old: &Table, new: &Table) {
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
            4 => (mac(), select(vec!["10.0.0.5", "10.0.0.5:80", "10.0.0.6:80/tcp"]), select(vec!["rr", "hash"]),
                select(vec!["10.0.0.7", "10.0.0.8*2 10.0.0.7 dsr", "10.0.0.7:81 10.0.0.8", "10.0.0.9"]))
                .prop_map(|(mac, vip, kind, to)| format!("R L {mac} {vip} {kind} {to}")),
            4 => (mac(), select(vec!["10.0.0.5 ", "10.0.0.5:80 ", ""]), select(vec!["+ 10.0.0.9", "- 10.0.0.7", "= 10.0.0.8 drain"]))
                .prop_map(|(mac, vip, edit)| format!("B {mac} {vip}{edit}")),
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
                let mac = known.then_some(MacAddr([2; 6]));
                next.slots.follow(&next.policy, |_, _, _, _| Seen { mac, ..Seen::NOTHING }, Instant::now());
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
