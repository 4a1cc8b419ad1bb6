//! Placement of a middlebox' filter rules in nftables.
//!
//! Rules that compare the same fields have the same *shape*. Exact rules of all middleboxes are
//! elements of one hash set per shape, whose key begins with the middlebox' MAC. Rules with
//! prefixes or ranges are elements of an interval set per shape and middlebox: the kernel clones an
//! interval set for every transaction on it and searches all its elements at once
//! (nft_set_pipapo.c), so that a common one would make each middlebox pay for all others. Rules
//! that no set can hold are *linear*: rules in a chain of their middlebox.
//!
//! A packet meets only the shapes of its own middlebox: a map leads to a chain of look-ups, which
//! middleboxes of equal shapes share.

use super::dsl::{commented, goto, rule, verdict};
use super::family::{FAMILIES, IPV4, IPV6, IpFamily};
use super::field::{Field, Type, Value};
use super::model::{Chain, Element, Rule, Set, Statement, Verdict};
use super::names::{own_name, rule_comment};
use super::transition::{Matching, Relocation, RuleList};
use crate::filter::Conditions;
use crate::packet::{IPV6_LEN, VLAN_TYPES};
use crate::policy::Middlebox;
use nfqd_shmctl::{
    Action, AddressRange, EtherType, Fragment, FragmentMatch, MacAddr, MacMask, NumberRange,
    Protocol, RuleId, TcpFlags,
};
use std::collections::BTreeMap;
use std::fmt;

/// The largest number of key parts that nft of Debian 12 lists correctly; the middlebox' MAC is
/// one.
const MAX_KEY: usize = 5;
/// The largest number of prefixes that the ranges of an interval set may consist of in one field:
/// the kernel keeps a bit for each, examines all of them for a packet, and takes quadratic time to
/// change one.
const MAX_PREFIXES: usize = 2048;
/// The longest name of a chain that middleboxes share; NFT_CHAIN_MAXNAMELEN is 256.
const MAX_NAME: usize = 200;

/// The placement of the filters of one middlebox.
#[derive(Default)]
pub(super) struct FilterPlan {
    /// The chain that filters its packets.
    pub chain: Option<String>,
    pub chains: BTreeMap<String, Chain>,
    pub sets: BTreeMap<String, Set>,
    /// Whether packets that no rule matches are dropped.
    pub closed: bool,
}

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
                    "it compares more than {} fields, and nft lists no longer keys rightly",
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

/// The fields that rules of one shape compare, and their common conditions.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Shape {
    action: Action,
    /// The protocol whose header is compared; later fragments have none.
    transport: Option<Protocol>,
    /// Only packets of this EtherType; one of the IP families.
    family: Option<EtherType>,
    /// Whether the IP header must be consistent.
    needs_ip: bool,
    /// The key parts behind the middlebox' MAC.
    fields: Vec<Field>,
}

impl Shape {
    pub(super) fn name(&self) -> String {
        let mut name = match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
        }
        .to_string();
        match self.family {
            Some(EtherType::IPV4) => name.push('4'),
            Some(_) => name.push('6'),
            None => {}
        }
        name.push_str(match self.transport {
            Some(Protocol::TCP) => "_tcp",
            Some(Protocol::UDP) => "_udp",
            _ => "",
        });
        for field in &self.fields {
            name.push_str(match field {
                Field::EtherSource => "_ether",
                Field::EtherType => "_type",
                Field::L4Protocol => "_proto",
                Field::SourcePort => "_sport",
                Field::DestinationPort => "_dport",
                Field::Ip4Source | Field::Ip6Source => "_saddr",
                Field::IcmpType | Field::Icmp6Type => "_icmp",
                _ => "_daddr",
            });
        }
        name
    }

    /// Returns the conditions on a packet before its fields are compared.
    fn guards(&self) -> Vec<Statement> {
        let mut out = Vec::new();
        out.extend(
            self.family.map(|family| Statement::Is(Field::EtherType, Value::EtherType(family))),
        );
        if let Some(protocol) = self.transport {
            out.push(Statement::Is(Field::L4Protocol, Value::Protocol(protocol)));
        } else if self.needs_ip && !self.fields.contains(&Field::L4Protocol) {
            out.push(Statement::Present(Field::L4Protocol));
        }
        out
    }

    fn key(&self) -> Vec<Field> {
        [&[Field::EtherDestination], self.fields.as_slice()].concat()
    }

    /// Returns the look-up in a set of this shape.
    fn rule(&self, set: &str) -> Rule {
        let mut statements = self.guards();
        statements.push(Statement::In(self.key(), set.to_string()));
        statements.push(verdict(verdict_of(self.action)));
        rule(statements)
    }

    fn set(&self, interval: bool) -> Set {
        let key: Vec<Type> = self.key().into_iter().filter_map(Field::set_type).collect();
        let comment = match self.action {
            Action::Allow => "what matches is not denied",
            Action::Deny => "what matches is dropped",
        };
        Set { key, counter: true, interval, comment: Some(comment.to_string()), ..Set::default() }
    }
}

/// Returns the verdict: back to the chain that steers, or drop.
fn verdict_of(action: Action) -> Verdict {
    match action {
        Action::Allow => Verdict::Return,
        Action::Deny => Verdict::Drop,
    }
}

/// A condition on a field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Test {
    Is(Value),
    IsNot(Value),
    Between(Value, Value),
    Masked { mask: Value, bits: Value },
}

impl Test {
    fn between(first: Value, last: Value) -> Test {
        if first == last { Test::Is(first) } else { Test::Between(first, last) }
    }

    fn addresses(range: AddressRange) -> Test {
        Test::between(Value::Ip(range.first()), Value::Ip(range.last()))
    }

    fn numbers(range: NumberRange) -> Test {
        Test::between(Value::Port(range.first()), Value::Port(range.last()))
    }

    /// ICMP types and codes, which have 8 bits.
    fn icmp(field: Field, range: NumberRange) -> Test {
        let value = |number: u16| {
            let number = u8::try_from(number).unwrap_or(u8::MAX);
            match field {
                Field::IcmpType => Value::IcmpType(number),
                Field::IcmpCode => Value::IcmpCode(number),
                Field::Icmp6Type => Value::Icmp6Type(number),
                _ => Value::Icmp6Code(number),
            }
        };
        Test::between(value(range.first()), value(range.last()))
    }

    fn macs(mask: MacMask) -> Test {
        match mask.exact() {
            Some(mac) => Test::Is(Value::Mac(mac)),
            None => Test::Masked { mask: Value::Mac(mask.mask()), bits: Value::Mac(mask.bits()) },
        }
    }

    fn flags(flags: TcpFlags) -> Test {
        if flags.mask() == u8::MAX {
            return Test::Is(Value::Flags(flags.on()));
        }
        Test::Masked { mask: Value::Flags(flags.mask()), bits: Value::Flags(flags.on()) }
    }

    /// Returns the bounds, if an interval set can hold them.
    fn bounds(self) -> Option<(Value, Value)> {
        match self {
            Test::Is(value) => Some((value, value)),
            Test::Between(first, last) => Some((first, last)),
            Test::Masked { mask: Value::Mac(mask), bits: Value::Mac(bits) } => {
                let number = |mac: MacAddr| {
                    mac.0.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
                };
                let rest = !number(mask) & 0xffff_ffff_ffff;
                let mut last = bits;
                last.0.iter_mut().zip(mask.0).for_each(|(byte, mask)| *byte |= !mask);
                (rest & (rest + 1) == 0).then_some((Value::Mac(bits), Value::Mac(last)))
            }
            Test::IsNot(_) | Test::Masked { .. } => None,
        }
    }

    fn statement(self, field: Field) -> Statement {
        match self {
            Test::Is(value) => Statement::Is(field, value),
            Test::IsNot(value) => Statement::IsNot(field, value),
            Test::Between(first, last) => Statement::Between(field, first, last),
            Test::Masked { mask, bits } => Statement::Masked(field, mask, bits),
        }
    }
}

/// Returns the field and test of a fragment position in each family.
fn fragment(wanted: FragmentMatch, ip: IpFamily) -> (Field, Test) {
    const MORE: u16 = 0x2000;
    const OFFSET: u16 = 0x1fff;
    const BOTH: u16 = MORE | OFFSET;
    let zero = Value::Port(0);
    if ip.is_ipv4() {
        return match wanted {
            FragmentMatch::Is(Fragment::Whole) => (Field::Ip4FragmentOffset(BOTH), Test::Is(zero)),
            FragmentMatch::Is(Fragment::First) => {
                (Field::Ip4FragmentOffset(BOTH), Test::Is(Value::Port(MORE)))
            }
            FragmentMatch::Is(Fragment::Later) => {
                (Field::Ip4FragmentOffset(OFFSET), Test::IsNot(zero))
            }
            FragmentMatch::Any => (Field::Ip4FragmentOffset(BOTH), Test::IsNot(zero)),
        };
    }
    match wanted {
        FragmentMatch::Is(Fragment::Whole) => {
            (Field::Ip6FragmentHeader, Test::Is(Value::Exists(false)))
        }
        FragmentMatch::Is(Fragment::First) => (Field::Ip6FragmentOffset, Test::Is(zero)),
        FragmentMatch::Is(Fragment::Later) => (Field::Ip6FragmentOffset, Test::IsNot(zero)),
        FragmentMatch::Any => (Field::Ip6FragmentHeader, Test::Is(Value::Exists(true))),
    }
}

/// Returns the length in each family's field; `None` if no packet of IPv6 is so short.
fn length(range: NumberRange, ip: IpFamily) -> Option<(Field, Test)> {
    if ip.is_ipv4() {
        return Some((Field::Ip4Length, Test::numbers(range)));
    }
    let header = IPV6_LEN as u16;
    let payload =
        NumberRange::new(range.first().saturating_sub(header), range.last().checked_sub(header)?)?;
    Some((Field::Ip6Length, Test::numbers(payload)))
}

/// Returns the family of the conditions, if they are for one.
fn family(conditions: &Conditions) -> Option<IpFamily> {
    match (conditions.source.or(conditions.destination), conditions.ether_type) {
        (Some(range), _) => Some(IpFamily::of(range.first())),
        // Beside conditions on the IP header an EtherType can only be one of the two.
        (None, Some(EtherType::IPV6)) if conditions.need_ip() => Some(IPV6),
        (None, Some(_)) if conditions.need_ip() => Some(IPV4),
        _ => None,
    }
}

/// Returns the shape of conditions, and the tests behind the middlebox' MAC in one family; `None`
/// if no packet of that family can match.
fn shape(
    action: Action,
    conditions: &Conditions,
    ip: IpFamily,
) -> Option<(Shape, Vec<(Field, Test)>)> {
    let family = family(conditions).map(|ip| ip.ether_type);
    let transport = conditions.protocol.filter(|_| conditions.need_transport());
    let (icmp_type, icmp_code) = match ip.suffix {
        '4' => (Field::IcmpType, Field::IcmpCode),
        _ => (Field::Icmp6Type, Field::Icmp6Code),
    };
    let length = match conditions.length {
        Some(range) => Some(length(range, ip)?),
        None => None,
    };
    let tos = if ip.is_ipv4() { Field::Ip4Tos } else { Field::Ip6TrafficClass };
    let named_type = conditions.ether_type.filter(|_| family.is_none());
    let protocol = conditions.protocol.filter(|_| transport.is_none());
    let fields = [
        conditions.source_mac.map(|mask| (Field::EtherSource, Test::macs(mask))),
        conditions.vlan.map(|ids| (Field::VlanId, Test::numbers(ids))),
        named_type.map(|named| (Field::EtherType, Test::Is(Value::EtherType(named)))),
        conditions.source.map(|range| (ip.source, Test::addresses(range))),
        conditions.destination.map(|range| (ip.destination, Test::addresses(range))),
        conditions.tos.map(|byte| (tos, Test::Is(Value::Tos(byte)))),
        length,
        conditions.fragment.map(|wanted| fragment(wanted, ip)),
        protocol.map(|protocol| (Field::L4Protocol, Test::Is(Value::Protocol(protocol)))),
        conditions.source_port.map(|range| (Field::SourcePort, Test::numbers(range))),
        conditions.destination_port.map(|range| (Field::DestinationPort, Test::numbers(range))),
        conditions.tcp_flags.map(|flags| (Field::TcpFlags, Test::flags(flags))),
        conditions.icmp_type.map(|range| (icmp_type, Test::icmp(icmp_type, range))),
        conditions.icmp_code.map(|range| (icmp_code, Test::icmp(icmp_code, range))),
    ];
    let fields: Vec<(Field, Test)> = fields.into_iter().flatten().collect();
    let names = fields.iter().map(|(field, _)| *field).collect();
    Some((
        Shape { action, transport, family, needs_ip: conditions.need_ip(), fields: names },
        fields,
    ))
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
    exact: BTreeMap<Shape, BTreeMap<Vec<Value>, RuleId>>,
    /// Elements of the middlebox' own interval sets.
    pub ranges: BTreeMap<Shape, Interval>,
    pub linear: Vec<(RuleId, Conditions, LinearReason)>,
}

/// An element of an interval set: from the first to the last value in every field.
pub(super) struct Ranges {
    first: Vec<Value>,
    last: Vec<Value>,
    pub rule: Matching,
}

/// The elements of an interval set, indexed by the first field.
#[derive(Default)]
pub(super) struct Interval {
    pub elements: Vec<Ranges>,
    /// The bounds of each element in every field, by its start in the first one.
    bounds: BTreeMap<(u128, usize), Vec<(u128, u128)>>,
    /// The longest range in the first field.
    longest: u128,
    /// The prefixes that the ranges consist of, field by field.
    prefixes: Vec<usize>,
}

/// Returns the number of prefixes that a range consists of.
fn prefixes(first: u128, last: u128) -> usize {
    let (mut at, mut count) = (first, 0);
    loop {
        count += 1;
        // The largest prefix that begins here and does not exceed the end.
        let room = (last - at).checked_add(1).map_or(127, u128::ilog2);
        let bits = at.trailing_zeros().min(room);
        match at
            .checked_add((1 << bits) - 1)
            .and_then(|end| if end < last { end.checked_add(1) } else { None })
        {
            Some(next) => at = next,
            None => return count,
        }
    }
}

impl Interval {
    /// Adds an element, or returns the reason the set cannot hold it.
    fn add(&mut self, ranges: Ranges) -> Option<LinearReason> {
        let bounds = ranges
            .first
            .iter()
            .zip(&ranges.last)
            .map(|(first, last)| (first.number(), last.number()));
        let bounds: Vec<(u128, u128)> = bounds.collect();
        let &(first, last) = bounds.first()?;
        let near = (first.saturating_sub(self.longest), 0)..=(last, usize::MAX);
        let overlaps = |other: &[(u128, u128)]| {
            other.iter().zip(&bounds).all(|((a, b), (first, last))| a <= last && first <= b)
        };
        if let Some(((_, at), _)) = self.bounds.range(near).find(|(_, other)| overlaps(other)) {
            return self.elements.get(*at).map(|other| LinearReason::Overlap(other.rule.0));
        }
        self.prefixes.resize(bounds.len(), 0);
        let sums = self
            .prefixes
            .iter()
            .zip(&bounds)
            .map(|(sum, (first, last))| sum + prefixes(*first, *last));
        let sums: Vec<usize> = sums.collect();
        if sums.iter().any(|&sum| sum > MAX_PREFIXES) {
            return Some(LinearReason::Prefixes);
        }
        self.prefixes = sums;
        self.longest = self.longest.max(last - first);
        self.bounds.insert((first, self.elements.len()), bounds);
        self.elements.push(ranges);
        None
    }
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
                if let Some(why) = there.add(Ranges { first, last, rule: (id, conditions) }) {
                    out.linear.push((id, conditions, why));
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

/// Returns the look-ups of a chain, in order.
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
        let chain = |rules: Vec<Rule>| Chain { priority: None, rules };
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

/// Returns the placement of the filters of a middlebox.
pub(super) fn filters(mac: MacAddr, list: &RuleList) -> FilterPlan {
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

#[cfg(test)]
mod tests {
    use super::super::transition::tests::{MAC, list};
    use super::*;

    #[test]
    fn ranges_are_made_of_prefixes() {
        let most = u128::MAX;
        for (first, last, count) in [
            (0, 0, 1),
            (0, 255, 1),
            (80, 90, 3),
            (1, 65534, 30),
            (0, most, 2),
            (0, most - 1, 128),
            (1, most, 128),
            (1, most - 1, 254),
            (most, most, 1),
        ] {
            assert_eq!(prefixes(first, last), count, "{first}-{last}");
        }
    }

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
