//! The ruleset that a desired state needs: the base table, the part of each network that has
//! middleboxes, and the part of each middlebox.

use super::dispatch::dispatch;
use super::family::{IPV4, IPV6};
use super::field::Value;
use super::middlebox::MiddleboxPart;
use super::model::{Element, Family, Set, Table};
use super::names::NETWORKS;
use super::options::RulesetOptions;
use super::table::{base_table, network_table, queueing_table};
use crate::desired::Desired;
use crate::mark::{self, Origin};
use crate::network::{Network, NetworkId, Networks};
use std::collections::{BTreeMap, BTreeSet};

/// All tables, by family.
pub type Ruleset = BTreeMap<Family, Table>;

/// Returns the ruleset that a desired state needs.
pub fn build(desired: &Desired, options: &RulesetOptions) -> Ruleset {
    build_visiting(desired, options, |_| {})
}

/// Returns the ruleset that a desired state needs, and shows the part of each middlebox to `visit`.
pub(super) fn build_visiting(
    desired: &Desired,
    options: &RulesetOptions,
    mut visit: impl FnMut(&MiddleboxPart),
) -> Ruleset {
    let mut table = base_table();
    let mut inhabited = BTreeSet::new();
    for key in desired.policy.middleboxes().keys() {
        let Some(part) = MiddleboxPart::new(*key, desired, options) else { continue };
        visit(&part);
        if inhabited.insert(part.network) {
            table.merge(network_part(part.network, &part.prefix, options));
        }
        table.add(part);
    }
    table.merge(dispatch(&desired.networks, &desired.slots, options.queue_path));
    table.merge(network_names(&desired.networks));
    let mut out = Ruleset::new();
    for &family in options.queueing_families() {
        let mut queueing = queueing_table(family, options.queues);
        queueing.sets = tracked_slots(&table, family);
        out.insert(family, queueing);
    }
    out.insert(Family::Bridge, table);
    out
}

/// Returns the names of the maps of slots of a table that queues.
pub(super) fn tracked_maps(family: Family) -> [String; 4] {
    let ip = if family == Family::Ip { IPV4 } else { IPV6 };
    let [backend, frontend] = ["backend_ip", "backend_vip"].map(|name| ip.name(name));
    [backend, frontend, "backend_port".to_string(), "backend_vport".to_string()]
}

/// Returns these maps as those of the bridge are.
pub(super) fn tracked_slots(bridge: &Table, family: Family) -> BTreeMap<String, Set> {
    let of = |name: String| {
        let set = bridge.sets.get(&name)?;
        Some((name, Set { counter: false, ..set.clone() }))
    };
    tracked_maps(family).into_iter().filter_map(of).collect()
}

/// Returns the part of a network.
pub(super) fn network_part(network: NetworkId, prefix: &str, options: &RulesetOptions) -> Table {
    network_table(network, options).with_prefix(prefix)
}

/// Returns the set that tells the numbers of networks.
pub(super) fn network_names(networks: &Networks) -> Table {
    let mut out = Table::new(Family::Bridge);
    let element = |(id, name): (NetworkId, &Network)| {
        let comment = Some(name.to_string());
        let key = vec![Value::Mark(mark::upcall_bits(Origin::Network(id)))];
        (key, Element { comment, ..Element::default() })
    };
    let elements = networks.names().map(element).collect();
    out.sets.insert(NETWORKS.to_string(), Set { elements, ..Set::default() });
    out
}

impl Table {
    /// Adds the part of a middlebox.
    pub(super) fn add(&mut self, part: MiddleboxPart) {
        let MiddleboxPart { elements, sets, chains, .. } = part;
        self.merge(Table { family: self.family, sets, chains });
        for (name, elements) in elements {
            if let Some(set) = self.sets.get_mut(&name) {
                set.elements.extend(elements);
            }
        }
    }

    /// Adds the sets, elements and chains of another table.
    pub(super) fn merge(&mut self, other: Table) {
        for (name, set) in other.sets {
            self.sets.entry(name).or_insert_with(|| set.empty()).elements.extend(set.elements);
        }
        self.chains.extend(other.chains);
    }
}
