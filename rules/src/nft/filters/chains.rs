//! Sets and chains of a middlebox' filter rules.

use super::interval::{Interval, Ranges};
use super::placement::{Placement, placement};
use super::rule_list::{Matching, Relocation, RuleList};
use super::shape::{Shape, family, shape, verdict_of};
use crate::filter::Conditions;
use crate::nft::dsl::{commented, goto, rule, verdict};
use crate::nft::family::{FAMILIES, IPV4, IPV6, IpFamily};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Chain, Element, Rule, Set, Statement, Verdict};
use crate::nft::names::{own_name, rule_comment};
use crate::packet::VLAN_TYPES;
use nfqd_shmctl::{Action, EtherType, MacAddr, RuleId};
use std::collections::BTreeMap;

/// The longest name of a chain that middleboxes share; NFT_CHAIN_MAXNAMELEN is 256.
const MAX_NAME: usize = 200;

/// The sets and chains of one middlebox' filters.
#[derive(Default)]
pub(in crate::nft) struct FilterPlan {
    /// The chain that filters its packets.
    pub chain: Option<String>,
    pub chains: BTreeMap<String, Chain>,
    pub sets: BTreeMap<String, Set>,
    /// Whether packets that no rule matches are dropped.
    pub closed: bool,
}

/// The look-ups of a chain, in order.
#[derive(Default)]
struct LookUps {
    allow: Vec<Rule>,
    allow_transport: Vec<Rule>,
    deny: Vec<Rule>,
    deny_transport: Vec<Rule>,
}

impl LookUps {
    fn of(&mut self, shape: &Shape) -> &mut Vec<Rule> {
        match (shape.action, shape.transport.is_some()) {
            (Action::Allow, false) => &mut self.allow,
            (Action::Allow, true) => &mut self.allow_transport,
            (Action::Deny, false) => &mut self.deny,
            (Action::Deny, true) => &mut self.deny_transport,
        }
    }

    /// Returns the chain, and the one for later fragments, which have no transport header.
    fn chains(self, name: &str, closed: bool) -> BTreeMap<String, Chain> {
        let LookUps { allow, allow_transport, deny, deny_transport } = self;
        let close: Vec<Rule> = closed.then(|| rule(vec![goto("closed")])).into_iter().collect();
        let (mut out, mut rules) = (BTreeMap::new(), allow);
        let chain = |rules: Vec<Rule>| Chain { base: None, rules };
        if !allow_transport.is_empty() {
            let later = format!("{name}.later");
            rules.extend(later_fragments(&goto(&later)));
            out.insert(later, chain([deny.clone(), close.clone()].concat()));
            rules.extend(allow_transport);
            rules.extend(deny);
        } else {
            rules.extend(deny);
            if !deny_transport.is_empty() {
                rules.extend(later_fragments(&if closed {
                    goto("closed")
                } else {
                    verdict(Verdict::Return)
                }));
            }
        }
        rules.extend(deny_transport);
        rules.extend(close);
        out.insert(name.to_string(), chain(rules));
        out
    }
}

/// Precedes rules that load a transport header: later fragments have none. nft's slow path accounts
/// for that, but the fast one (`nft_payload_fast_eval`, seen in 6.18) reads whatever bytes are
/// there. Behind two fragment headers it even takes the IP header for the transport header
/// (`ipv6_find_hdr` leaves the offset at 0), and no rule can read the second one: packets with an
/// extension header behind the first are dropped.
fn later_fragments(then: &Statement) -> [Rule; 3] {
    const OFFSET: u16 = 0x1fff;
    let later = |ip: IpFamily, offset: Field| {
        rule(vec![ip.is(), Statement::IsNot(offset, Value::Port(0)), then.clone()])
    };
    let hides = vec![
        IPV6.is(),
        Statement::Present(Field::L4Protocol),
        Statement::In(vec![Field::Ip6FragmentNext], "extension_headers".to_string()),
        Statement::Counter,
        verdict(Verdict::Drop),
    ];
    [
        later(IPV4, Field::Ip4FragmentOffset(OFFSET)),
        later(IPV6, Field::Ip6FragmentOffset),
        commented(hides, "no telling whether it has a transport header"),
    ]
}

/// Returns the sets and chains of a middlebox' filters.
pub(in crate::nft) fn filters(mac: MacAddr, list: &RuleList) -> FilterPlan {
    let Placement { exact, mut ranges, linear } = placement(list);
    let mut linear: Vec<Matching> =
        linear.into_iter().map(|(id, conditions, _)| (id, conditions)).collect();
    for (rule, relocation) in &list.relocating {
        if *relocation == Relocation::Chain {
            ranges
                .values_mut()
                .for_each(|set| set.elements.retain(|element| element.rule != *rule));
        }
        linear.push(*rule);
    }
    ranges.retain(|_, set| !set.elements.is_empty());
    let closed = list.closed;
    if exact.is_empty() && ranges.is_empty() && linear.is_empty() && !closed {
        return FilterPlan::default();
    }
    let own = !(ranges.is_empty() && linear.is_empty());
    let key = |values: &[Value]| [&[Value::Mac(mac)], values].concat();
    let (mut sets, mut look_ups) = (BTreeMap::new(), LookUps::default());
    let mut name = "filters".to_string();
    for (shape, elements) in exact {
        let (set, mut made) = (shape.name(), shape.set(false));
        let element =
            |id: RuleId| Element { comment: Some(rule_comment(id)), ..Element::default() };
        made.elements =
            elements.into_iter().map(|(values, id)| (key(&values), element(id))).collect();
        look_ups.of(&shape).push(shape.rule(&set));
        name = format!("{name}.{set}");
        sets.insert(set, made);
    }
    for (shape, Interval { elements, .. }) in ranges {
        let (set, mut made) = (own_name(&shape.name(), mac), shape.set(true));
        let element = |Ranges { first, last, rule }: Ranges| {
            (
                key(&first),
                Element { last: Some(key(&last)), data: None, comment: Some(rule_comment(rule.0)) },
            )
        };
        made.elements = elements.into_iter().map(element).collect();
        look_ups.of(&shape).push(shape.rule(&set));
        sets.insert(set, made);
    }
    for (id, conditions) in linear {
        for (shape, rule) in plain_rules(id, &conditions) {
            look_ups.of(&shape).push(rule);
        }
    }
    if closed {
        name.push_str(".closed");
    }
    let name = if own || name.len() > MAX_NAME { own_name("filters", mac) } else { name };
    FilterPlan { chains: look_ups.chains(&name, closed), chain: Some(name), sets, closed }
}

/// Returns a linear rule: one nft rule; one per family if it compares fields that differ between
/// them, one per kind of VLAN tag.
fn plain_rules(id: RuleId, conditions: &Conditions) -> Vec<(Shape, Rule)> {
    let differs =
        conditions.tos.is_some() || conditions.length.is_some() || conditions.fragment.is_some();
    let families: Vec<Option<IpFamily>> = match family(conditions) {
        Some(ip) => vec![Some(ip)],
        None if differs => FAMILIES.map(Some).to_vec(),
        None => vec![None],
    };
    let tags: Vec<Option<EtherType>> = if conditions.vlan.is_some() {
        VLAN_TYPES.map(EtherType::new).to_vec()
    } else {
        vec![None]
    };
    let mut out = Vec::new();
    for ip in families {
        let Some((shape, fields)) = shape(id.action, conditions, ip.unwrap_or(IPV4)) else {
            continue;
        };
        for &tag in &tags {
            let is_tag = tag.map(|tag| Statement::Is(Field::OuterType, Value::EtherType(tag)));
            let mut statements: Vec<Statement> =
                is_tag.into_iter().chain(ip.map(IpFamily::is)).collect();
            let is_family = |guard: &Statement| matches!(guard, Statement::Is(Field::EtherType, _));
            statements.extend(shape.guards().into_iter().filter(|guard| !is_family(guard)));
            statements.extend(fields.iter().map(|&(field, test)| test.statement(field)));
            statements.push(Statement::Counter);
            statements.push(verdict(verdict_of(id.action)));
            out.push((shape.clone(), commented(statements, &rule_comment(id))));
        }
    }
    out
}
