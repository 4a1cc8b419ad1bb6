//! Transitions between rule lists: the steps through which the kernel gets from one to another.

use super::placement::{LinearReason, placement};
use super::rule_list::{Matching, Relocation, RuleList};
use crate::filter::Conditions;
use nfqd_shmctl::{Action, RuleId};

impl RuleList {
    /// Returns the steps of a change from `self` to `new`: first more is allowed, then more is
    /// denied, then less is denied, then less is allowed. The kernel searches its sets one after
    /// the other, each in its state at that moment; but a packet that both lists treat alike is
    /// treated so by any mixture of two neighbouring steps. A rule that moves to another place is
    /// in both for one step: the kernel changes chains and sets at different moments.
    pub(in crate::nft) fn transition_to(&self, new: &RuleList) -> Vec<RuleList> {
        let (mut out, mut before) = (Vec::new(), self.clone());
        for after in self.unions(new) {
            out.extend(before.relocations(&after));
            before = after;
        }
        out
    }

    /// Returns the steps with the rules that move between sets and the chain.
    fn relocations(&self, after: &RuleList) -> Vec<RuleList> {
        let (now, then) = (placement(self).linear, placement(after).linear);
        let is_in = |list: &[(RuleId, Conditions, LinearReason)], rule: &Matching| {
            list.iter().any(|(id, wanted, _)| (id, wanted) == (&rule.0, &rule.1))
        };
        let common: Vec<&Matching> =
            self.rules.iter().filter(|rule| after.rules.contains(rule)).collect();
        let move_if =
            |from: &[_], to: &[_], relocation: Relocation| -> Vec<(Matching, Relocation)> {
                let moved = common.iter().filter(|rule| is_in(from, rule) && !is_in(to, rule));
                moved.map(|rule| (**rule, relocation)).collect()
            };
        let with = |list: &RuleList, relocating: Vec<(Matching, Relocation)>| RuleList {
            relocating,
            ..list.clone()
        };
        let into_chain = move_if(&then, &now, Relocation::Both);
        let into_set = |relocation: Relocation| move_if(&now, &then, relocation);
        let mut out = Vec::new();
        if !into_chain.is_empty() {
            out.push(with(self, into_chain));
        }
        if !into_set(Relocation::Both).is_empty() {
            out.push(with(after, into_set(Relocation::Chain)));
            out.push(with(after, into_set(Relocation::Both)));
        }
        out.push(after.clone());
        out
    }

    /// Returns the lists between which only one kind of change happens.
    fn unions(&self, new: &RuleList) -> [RuleList; 4] {
        let union = |action: Action| -> Vec<Matching> {
            let more = new.of(action).filter(|rule| !self.rules.contains(rule));
            self.of(action).chain(more).copied().collect()
        };
        let list = |allow: Vec<Matching>, deny: Vec<Matching>, closed: bool| RuleList {
            rules: [allow, deny].concat(),
            closed,
            relocating: Vec::new(),
        };
        let of = |list: &RuleList, action: Action| list.of(action).copied().collect::<Vec<_>>();
        let (allow, deny) = (union(Action::Allow), union(Action::Deny));
        [
            list(allow.clone(), of(self, Action::Deny), self.closed),
            list(allow.clone(), deny, self.closed || new.closed),
            list(allow, of(new, Action::Deny), new.closed),
            new.clone(),
        ]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::placement::{RulePlace, place};
    use super::*;
    use crate::Policy;
    use crate::packet::Packet;
    use proptest::prelude::*;
    use proptest::sample::select;
    use std::collections::BTreeMap;

    pub(in super::super) const MAC: &str = "2:0:0:0:0:1";

    pub(in super::super) fn list(default: &str, lines: &[String]) -> RuleList {
        let mut policy = Policy::default();
        policy.apply_line(&format!("R F {MAC} 10.0.0.1 {default}")).unwrap();
        for line in lines {
            policy.apply_line(line).unwrap();
        }
        let mac = MAC.parse().unwrap();
        RuleList::new(mac, policy.get(crate::MiddleboxKey::anywhere(mac)).unwrap())
    }

    fn rules() -> impl Strategy<Value = RuleList> {
        let rule = (select(vec!["#", "+"]), 1..9_u8, 0..4_u8, 0..4_u8).prop_map(
            |(sign, number, first, more)| {
                format!("A {MAC} {sign}{number} U 2 d {first}-{}", first + more)
            },
        );
        (select(vec!["allow", "deny"]), proptest::collection::vec(rule, 0..6))
            .prop_map(|(default, lines)| list(default, &lines))
    }

    fn packet(port: u8) -> Packet {
        let mut out = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        out.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 9, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
        out.extend([0, 99, 0, port, 0, 8, 0, 0]);
        Packet::from_frame(&out).unwrap()
    }

    /// Whether rules let a packet pass, each present or not as `is_there` says.
    fn passes(
        rules: &[(RuleId, Conditions)],
        closed: bool,
        packet: &Packet,
        mut is_there: impl FnMut(&(RuleId, Conditions)) -> bool,
    ) -> bool {
        let there: Vec<_> = rules
            .iter()
            .filter(|rule| is_there(rule))
            .filter(|(_, wanted)| wanted.match_packet(packet))
            .collect();
        let any = |action: Action| there.iter().any(|(id, _)| id.action == action);
        any(Action::Allow) || !(any(Action::Deny) || closed)
    }

    /// Returns the linear rules of this list, and those in the interval sets, by shape.
    fn places(list: &RuleList) -> (Vec<Matching>, BTreeMap<String, Vec<Matching>>) {
        let placed = placement(list);
        let mut chain: Vec<Matching> =
            placed.linear.iter().map(|(id, wanted, _)| (*id, *wanted)).collect();
        let mut sets: BTreeMap<String, Vec<Matching>> = BTreeMap::new();
        for (shape, set) in placed.ranges {
            sets.insert(
                shape.name(),
                set.elements.into_iter().map(|element| element.rule).collect(),
            );
        }
        for (rule, relocation) in &list.relocating {
            if *relocation == Relocation::Chain {
                sets.values_mut().for_each(|rules| rules.retain(|other| other != rule));
            }
            chain.push(*rule);
        }
        sets.retain(|_, rules| !rules.is_empty());
        (chain, sets)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Chains and sets change at different moments: a rule that stays is seen with either chain
        /// and either set.
        #[test]
        fn a_rule_that_stays_is_always_somewhere(old in rules(), new in rules()) {
            let mut before = old.clone();
            for after in old.transition_to(&new) {
                let ends = [places(&before), places(&after)];
                for rule in before.rules.iter().filter(|rule| after.rules.contains(rule)) {
                    let exact = matches!(place(rule.0.action, &rule.1), RulePlace::Set { first, last, .. } if first == last);
                    for (chain, sets) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                        let (plain, looked_up) = &ends[chain];
                        let in_set = |name: &String| ends[sets].1.get(name).is_some_and(|rules| rules.contains(rule));
                        let seen = exact || plain.contains(rule) || looked_up.keys().any(in_set);
                        prop_assert!(seen, "{:?}\n{:?}\n{:?}", rule, before, after);
                    }
                }
                before = after;
            }
        }

        /// A packet may see any mixture of a step's two ends.
        #[test]
        fn what_both_ends_treat_alike_no_mixture_treats_otherwise(
            old in rules(), new in rules(), port in 0..8_u8, mixture in any::<[bool; 32]>()
        ) {
            let packet = packet(port);
            let verdict = |list: &RuleList| passes(&list.rules, list.closed, &packet, |_| true);
            let alike = verdict(&old) == verdict(&new);
            let mut before = old.clone();
            for after in old.transition_to(&new) {
                let more = after.rules.iter().filter(|rule| !before.rules.contains(rule));
                let all: Vec<_> = before.rules.iter().chain(more).copied().collect();
                let mut choice = mixture.iter().cycle();
                let closed = if *choice.next().unwrap() { before.closed } else { after.closed };
                let mixed = passes(&all, closed, &packet, |rule| {
                    let both = before.rules.contains(rule) && after.rules.contains(rule);
                    both || *choice.next().unwrap()
                });
                prop_assert!(!alike || mixed == verdict(&old), "{:?}\n{:?}", before, after);
                before = after;
            }
            prop_assert_eq!(before, new);
        }
    }
}
