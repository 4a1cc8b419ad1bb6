//! The ruleset that a policy needs: the base table, and what each middlebox adds to it.

use super::middlebox::MiddleboxPart;
use super::model::{Family, Table};
use super::options::{QueuePath, RulesetOptions};
use super::table::{base_table, queueing_table};
use crate::policy::Policy;
use crate::slots::Slots;
use std::collections::BTreeMap;

/// All tables, by family.
pub type Ruleset = BTreeMap<Family, Table>;

/// Returns the ruleset that a policy needs.
pub fn build(policy: &Policy, slots: &Slots, options: &RulesetOptions) -> Ruleset {
    build_visiting(policy, slots, options, |_| {})
}

/// Returns the ruleset that a policy needs, and shows the part of each middlebox to `visit`.
pub(super) fn build_visiting(
    policy: &Policy,
    slots: &Slots,
    options: &RulesetOptions,
    mut visit: impl FnMut(&MiddleboxPart),
) -> Ruleset {
    let mut table = base_table(options);
    for (mac, middlebox) in policy.middleboxes() {
        let part = MiddleboxPart::new(*mac, middlebox, slots, options);
        visit(&part);
        table.add(part);
    }
    let mut out = Ruleset::from([(Family::Bridge, table)]);
    if options.queue_path == QueuePath::BrNetfilter {
        for family in [Family::Ip, Family::Ip6] {
            out.insert(family, queueing_table(family, options.queues));
        }
    }
    out
}

impl Table {
    /// Adds the part of a middlebox.
    pub(super) fn add(&mut self, part: MiddleboxPart) {
        for (name, set) in part.sets {
            self.sets.entry(name).or_insert_with(|| set.empty()).elements.extend(set.elements);
        }
        for (name, elements) in part.elements {
            if let Some(set) = self.sets.get_mut(&name) {
                set.elements.extend(elements);
            }
        }
        self.chains.extend(part.chains);
    }
}
