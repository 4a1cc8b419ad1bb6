//! Incremental changes of the ruleset, found from the changed middleboxes alone.

use super::build::{Ruleset, build_visiting, network_names, network_part};
use super::dispatch::dispatch;
use super::field::Value;
use super::filters::RuleList;
use super::middlebox::MiddleboxPart;
use super::model::{Element, Family, Set, Table};
use super::names::{SLOT_MAPS, split_prefix};
use super::options::{QueuePath, RulesetOptions};
use super::table::base_table;
use crate::desired::Desired;
use crate::network::{MiddleboxKey, NetworkId};
use crate::slots::Slots;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// The state that stands in the kernel: not the ruleset itself, only what a change depends on.
#[derive(Debug)]
pub struct Installed {
    options: RulesetOptions,
    /// The sets that all networks share.
    shared: BTreeMap<String, Set>,
    /// The number of middleboxes that use each set and chain that comes and goes, and each network,
    /// by its prefix.
    users: HashMap<String, usize>,
    /// The parts of networks, by their prefixes, as far as a change has needed them.
    network_parts: RefCell<HashMap<String, Arc<Table>>>,
}

/// A change of the ruleset, in steps, so that packets which both ends treat alike are treated so
/// throughout. Most changes have one step.
#[derive(Debug)]
pub struct Transition {
    pub(super) steps: Vec<Step>,
    /// The families of the tables that queue bridged packets.
    pub(super) queueing: &'static [Family],
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

/// The changed parts at one step of a change.
struct Stage<'a> {
    parts: Vec<MiddleboxPart>,
    /// The dispatch to networks; `None` if it does not change.
    dispatch: Option<Arc<Table>>,
    slots: &'a Slots,
}

impl Stage<'_> {
    /// Returns the prefixes of the networks of the parts.
    fn networks(&self) -> BTreeMap<&str, NetworkId> {
        self.parts.iter().map(|part| (part.prefix.as_str(), part.network)).collect()
    }
}

impl Installed {
    /// Returns the ruleset to be loaded, and the state that then stands.
    pub fn new(state: &Desired, options: &RulesetOptions) -> (Installed, Ruleset) {
        let mut users: HashMap<String, usize> = HashMap::new();
        let ruleset = build_visiting(state, options, |part| {
            for name in used_names(part) {
                match users.get_mut(name) {
                    Some(count) => *count += 1,
                    None => drop(users.insert(name.clone(), 1)),
                }
            }
        });
        let shared = base_table().sets;
        let network_parts = RefCell::default();
        (Installed { options: *options, shared, users, network_parts }, ruleset)
    }

    /// Returns the change from the standing state to the desired one.
    pub fn change(&self, old: &Desired, new: &Desired) -> Transition {
        let mut stages = self.stages(old, new).into_iter();
        let empty = Stage { parts: Vec::new(), dispatch: None, slots: &old.slots };
        let mut before = stages.next().unwrap_or(empty);
        let (mut steps, mut users) = (Vec::new(), BTreeMap::new());
        for after in stages {
            if after.parts == before.parts && after.dispatch == before.dispatch {
                continue;
            }
            let touched = before.parts.iter().chain(&after.parts).flat_map(used_names);
            for name in touched {
                let count = || self.users.get(name).copied().unwrap_or(0);
                users.entry(name.clone()).or_insert_with(count);
            }
            let used_before = users.clone();
            let mut count = |parts: &[MiddleboxPart], by: fn(usize, usize) -> usize| {
                for name in parts.iter().flat_map(used_names) {
                    users.entry(name.clone()).and_modify(|count| *count = by(*count, 1));
                }
            };
            count(&after.parts, usize::saturating_add);
            count(&before.parts, usize::saturating_sub);
            let old = self.table((&before, &used_before), (&after, &users));
            let new = self.table((&after, &users), (&before, &used_before));
            steps.push(Step { old, new });
            before = after;
        }
        Transition { steps, queueing: self.options.queueing_families(), users }
    }

    /// Returns the parts of the changed middleboxes, step by step from the standing state to the
    /// desired one.
    fn stages<'a>(&self, old: &'a Desired, new: &'a Desired) -> Vec<Stage<'a>> {
        let changed = new.changed(old);
        let rules = |desired: &Desired, key: MiddleboxKey| {
            let middlebox = desired.policy.get(key);
            middlebox.map_or_else(RuleList::default, |middlebox| RuleList::new(key.mac, middlebox))
        };
        let dispatches = changed_dispatch(old, new, &changed, self.options.queue_path);
        let lists: Vec<(MiddleboxKey, RuleList, Vec<RuleList>)> = changed
            .into_iter()
            .map(|key| (key, rules(old, key), rules(new, key)))
            .map(|(key, before, after)| (key, before.clone(), before.transition_to(&after)))
            .collect();
        let steps = lists.iter().map(|(.., steps)| steps.len()).max();
        let steps = steps.unwrap_or(0).max(usize::from(dispatches.is_some()));
        let (first, others) = dispatches.unzip();
        let stage = |dispatch, desired: &'a Desired| Stage {
            parts: Vec::new(),
            dispatch,
            slots: &desired.slots,
        };
        let mut stages = vec![stage(first, old)];
        stages.extend((0..steps).map(|_| stage(others.clone(), new)));
        for (key, before, lists) in &lists {
            let mut made: Option<(&RuleList, MiddleboxPart)> = None;
            for (at, stage) in stages.iter_mut().enumerate() {
                // Parts that are no longer registered stay until the last step.
                let (desired, list) = match at.checked_sub(1) {
                    None => (old, before),
                    Some(at) => {
                        let is_new = new.policy.get(*key).is_some() || at + 1 == steps;
                        (
                            if is_new { new } else { old },
                            lists.get(at).or(lists.last()).unwrap_or(before),
                        )
                    }
                };
                if desired.policy.get(*key).is_none() {
                    continue;
                }
                // After the first stage only the rules make a difference.
                let part = match made.take().filter(|(before, _)| at > 1 && *before == list) {
                    Some((_, part)) => part,
                    None => match MiddleboxPart::with(*key, list, desired, &self.options) {
                        Some(part) => part,
                        None => continue,
                    },
                };
                stage.parts.push(part.clone());
                made = Some((list, part));
            }
        }
        stages
    }

    /// Returns the part of a network.
    fn network_part(&self, network: NetworkId, prefix: &str) -> Arc<Table> {
        let mut parts = self.network_parts.borrow_mut();
        let made = || Arc::new(network_part(network, prefix, &self.options));
        parts.entry(prefix.to_string()).or_insert_with(made).clone()
    }

    /// Returns the part of the ruleset that a step touches, at one end of it, with the users of names
    /// there; `other` is the other end. What is the same at both ends is left out, but for the sets in which
    /// elements differ.
    fn table(
        &self,
        (stage, users): (&Stage<'_>, &BTreeMap<String, usize>),
        (other, other_users): (&Stage<'_>, &BTreeMap<String, usize>),
    ) -> Table {
        let mut table = Table::new(Family::Bridge);
        let is_in = |users: &BTreeMap<String, usize>, name: &str| {
            users.get(name).is_some_and(|count| *count != 0)
        };
        let used = |name: &str| is_in(users, name);
        let touched: BTreeSet<&String> =
            stage.parts.iter().chain(&other.parts).flat_map(|part| part.elements.keys()).collect();
        // Parts that stay for the sake of unchanged middleboxes are the same before and after.
        for part in &other.parts {
            let kept = part.sets.iter().filter(|(name, _)| used(name));
            table.sets.extend(kept.map(|(name, set)| (name.clone(), set.empty())));
            let kept = part.chains.iter().filter(|(name, _)| used(name));
            table.chains.extend(kept.map(|(name, chain)| (name.clone(), chain.clone())));
        }
        let of = |sets: &BTreeMap<String, Set>| -> Vec<(String, Set)> {
            let named = |name: &&String| Some(((*name).clone(), sets.get(*name)?.clone()));
            touched.iter().filter_map(named).collect()
        };
        table.sets.extend(of(&self.shared));
        let networks: BTreeMap<&str, NetworkId> =
            other.networks().into_iter().chain(stage.networks()).collect();
        for (&prefix, &network) in networks.iter().filter(|(prefix, _)| used(prefix)) {
            let part = self.network_part(network, prefix);
            if is_in(other_users, prefix) {
                table.sets.extend(of(&part.sets));
            } else {
                table.merge(Table::clone(&part));
            }
        }
        stage.parts.iter().for_each(|part| table.add(part.clone()));
        if let Some(dispatch) = &stage.dispatch {
            table.merge(Table::clone(dispatch));
        }
        // Addresses of backends may be shared with unchanged middleboxes.
        for (name, set) in &mut table.sets {
            let (prefix, name_of_all) = split_prefix(name);
            let is_shared: fn(&Slots, NetworkId, IpAddr) -> bool = match name_of_all {
                "backends4" | "backends6" => Slots::is_backend,
                "watched4" | "watched6" => Slots::is_watched,
                _ => continue,
            };
            let Some(&network) = networks.get(prefix) else { continue };
            let touched = other.parts.iter().filter_map(|part| part.elements.get(name)).flatten();
            let stays = |key: &[Value]| matches!(key, [Value::Ip(ip)] if is_shared(stage.slots, network, *ip));
            let kept = touched.filter(|(key, _)| stays(key));
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

/// Returns the names that count as used by a part: of its sets, of its chains, and the prefix of its
/// network.
fn used_names(part: &MiddleboxPart) -> impl Iterator<Item = &String> {
    part.sets.keys().chain(part.chains.keys()).chain([&part.prefix])
}

/// Returns the dispatch to networks before and after a change, if it may differ.
fn changed_dispatch(
    old: &Desired,
    new: &Desired,
    changed: &BTreeSet<MiddleboxKey>,
    path: QueuePath,
) -> Option<(Arc<Table>, Arc<Table>)> {
    let networks = [old, new].map(|desired| {
        changed.iter().filter_map(|key| desired.slots.network_of(*key)).collect::<BTreeSet<_>>()
    });
    let is_same =
        |network: &NetworkId| old.slots.is_inhabited(*network) == new.slots.is_inhabited(*network);
    if old.networks.is_same(&new.networks) && networks.iter().flatten().all(is_same) {
        return None;
    }
    let of = |desired: &Desired| {
        let mut table = dispatch(&desired.networks, &desired.slots, path);
        table.merge(network_names(&desired.networks));
        Arc::new(table)
    };
    Some((of(old), of(new)))
}

#[cfg(test)]
mod tests {
    use super::super::build::build;
    use super::super::model::Queues;
    use super::super::options::{FastPath, QueuePath};
    use super::*;
    use crate::service::BackendRef;
    use crate::slots::{BackendObservation, BackendView};
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

    /// A host on which the middlebox with an odd MAC is on one of two networks, or not seen yet.
    struct Host {
        mac: Option<MacAddr>,
        network: NetworkId,
    }

    impl BackendView for Host {
        fn observe(&self, _: &BackendRef<'_>, _: NetworkId) -> BackendObservation {
            BackendObservation { mac: self.mac, ..BackendObservation::UNKNOWN }
        }

        fn network(&self, middlebox: MiddleboxKey) -> NetworkId {
            let MacAddr([.., last]) = middlebox.mac;
            if last % 2 == 1 { self.network } else { middlebox.network }
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
        /// Step by step, or several commands at once, with backends' MACs becoming known and middleboxes
        /// moving between networks: the result equals a full load.
        #[test]
        fn changes_make_what_a_load_makes(
            steps in proptest::collection::vec((proptest::collection::vec(command(), 0..4), any::<bool>(), 0..3_usize), 1..30),
            off: bool,
        ) {
            let queues = Queues { first: 0, count: 1, bypass: true };
            let fast_path = if off { FastPath::Off } else { FastPath::Full };
            let options = RulesetOptions { queue_path: QueuePath::BrNetfilter, fast_path, queues };
            let mut now = Desired::default();
            let mut networks = vec![NetworkId::ANY];
            for name in ["br0", "br1 vlan 7"] {
                networks.extend(now.networks.intern(&name.parse().unwrap()));
            }
            let (mut installed, mut ruleset) = Installed::new(&now, &options);
            let table = ruleset.get_mut(&Family::Bridge).unwrap();
            for (commands, known, network) in steps {
                let mut next = now.clone();
                for command in commands {
                    let _ = next.policy.apply_line(&command);
                }
                let mac = known.then_some(MacAddr([2; 6]));
                let view = Host { mac, network: networks[network] };
                next.slots.sync_all(&next.policy, &view, Instant::now());
                let change = installed.change(&now, &next);
                apply(table, &change);
                installed.done(change);
                now = next;
                let wanted = build(&now, &options);
                prop_assert_eq!(&*table, &wanted[&Family::Bridge]);
            }
            let (fresh, _) = Installed::new(&now, &options);
            prop_assert_eq!(installed.users, fresh.users);
        }
    }
}
