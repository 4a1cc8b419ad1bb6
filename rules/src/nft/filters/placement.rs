//! Placement: the set or chain that each rule of a middlebox goes to.

use super::interval::{Interval, LimitError, MAX_PREFIXES, Ranges};
use super::rule_list::RuleList;
use super::shape::{Shape, family, shape};
use crate::filter::Conditions;
use crate::nft::family::IPV4;
use crate::nft::field::Value;
use crate::policy::Middlebox;
use nfqd_shmctl::{Action, MacAddr, RuleId};
use std::collections::BTreeMap;
use std::fmt;

/// The largest number of key parts that nft of Debian 12 lists correctly; the middlebox' MAC is
/// one.
const MAX_KEY: usize = 5;

/// The reason a rule is linear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinearReason {
    /// The rule compares a field that sets cannot hold.
    Field(&'static str),
    /// The rule compares too many fields.
    Fields,
    /// The MAC mask has holes.
    Mask,
    /// The ranges overlap those of this rule, which an interval set does not allow.
    Overlap(RuleId),
    /// The ranges and those of earlier rules consist of too many prefixes.
    Prefixes,
}

impl fmt::Display for LinearReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LinearReason::Field(field) => write!(f, "nftables has no sets of {field}"),
            LinearReason::Fields => {
                write!(
                    f,
                    "it compares more than {} fields, and nft cannot list longer keys correctly",
                    MAX_KEY - 1
                )
            }
            LinearReason::Mask => f.write_str("its MAC mask has holes"),
            LinearReason::Overlap(other) => write!(f, "its ranges overlap those of rule {other}"),
            LinearReason::Prefixes => {
                write!(f, "its ranges and those before it are more than {MAX_PREFIXES} prefixes")
            }
        }
    }
}

impl From<LimitError> for LinearReason {
    fn from(error: LimitError) -> LinearReason {
        match error {
            LimitError::Overlap(rule) => LinearReason::Overlap(rule),
            LimitError::Prefixes => LinearReason::Prefixes,
        }
    }
}

/// The place of a rule.
pub(super) enum RulePlace {
    Set { shape: Shape, first: Vec<Value>, last: Vec<Value> },
    Linear(LinearReason),
}

pub(super) fn place(action: Action, conditions: &Conditions) -> RulePlace {
    let ip = family(conditions).unwrap_or(IPV4);
    let no_set = [
        (conditions.vlan.is_some(), "VLAN ids"),
        (conditions.tos.is_some(), "TOS bytes"),
        (conditions.length.is_some(), "lengths"),
        (conditions.fragment.is_some(), "kinds of fragments"),
        (conditions.tcp_flags.is_some(), "TCP flags"),
        (conditions.icmp_code.is_some(), "ICMP codes"),
    ];
    if let Some((_, field)) = no_set.into_iter().find(|(asked, _)| *asked) {
        return RulePlace::Linear(LinearReason::Field(field));
    }
    // Only a length can exclude every packet of a family.
    let Some((shape, fields)) = shape(action, conditions, ip) else {
        return RulePlace::Linear(LinearReason::Fields);
    };
    if fields.len() >= MAX_KEY {
        return RulePlace::Linear(LinearReason::Fields);
    }
    let bounds: Option<Vec<(Value, Value)>> =
        fields.iter().map(|(_, test)| test.bounds()).collect();
    match bounds {
        Some(bounds) => {
            let (first, last) = bounds.into_iter().unzip();
            RulePlace::Set { shape, first, last }
        }
        None => RulePlace::Linear(LinearReason::Mask),
    }
}

/// The rules of a firewall, by place.
pub(super) struct Placement {
    /// Elements of the sets that all middleboxes share.
    pub exact: BTreeMap<Shape, BTreeMap<Vec<Value>, RuleId>>,
    /// Elements of the middlebox' own interval sets.
    pub ranges: BTreeMap<Shape, Interval>,
    pub linear: Vec<(RuleId, Conditions, LinearReason)>,
}

pub(super) fn placement(list: &RuleList) -> Placement {
    let mut out = Placement { exact: BTreeMap::new(), ranges: BTreeMap::new(), linear: Vec::new() };
    for &(id, conditions) in &list.rules {
        match place(id.action, &conditions) {
            RulePlace::Linear(why) => out.linear.push((id, conditions, why)),
            RulePlace::Set { shape, first, last } if first == last => {
                // Two rules of one middlebox may be equal; the first stays.
                out.exact.entry(shape).or_default().entry(first).or_insert(id);
            }
            RulePlace::Set { shape, first, last } => {
                let there = out.ranges.entry(shape).or_default();
                if let Err(error) = there.add(Ranges { first, last, rule: (id, conditions) }) {
                    out.linear.push((id, conditions, error.into()));
                }
            }
        }
    }
    out
}

/// Returns the linear rules with their reasons.
pub fn linear_rules(mac: MacAddr, middlebox: &Middlebox) -> Vec<(RuleId, LinearReason)> {
    placement(&RuleList::new(mac, middlebox))
        .linear
        .into_iter()
        .map(|(id, _, why)| (id, why))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::transition::tests::{MAC, list};
    use super::*;
    use crate::nft::filters::interval::MAX_PREFIXES;

    #[test]
    fn a_set_takes_a_bounded_number_of_prefixes() {
        let wide = |n: u32| {
            [
                format!(
                    "A {MAC} #{n} I 3 s ::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe d ::1-ffff::"
                ),
                format!("A {MAC} #{n} T 2 d {n}"),
            ]
        };
        let list = list("allow", &(1..=20).flat_map(wide).collect::<Vec<_>>());
        let placed = placement(&list);
        assert_eq!(
            placed.ranges.values().map(|set| set.elements.len()).sum::<usize>(),
            MAX_PREFIXES / 254
        );
        let (last, _, why) = placed.linear.last().unwrap();
        assert_eq!((last.to_string().as_str(), *why), ("#20", LinearReason::Prefixes));
    }
}
