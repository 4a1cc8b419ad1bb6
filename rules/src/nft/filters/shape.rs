//! Shapes: the fields that a rule compares, and its tests on them.

use crate::filter::Conditions;
use crate::nft::dsl::{rule, verdict};
use crate::nft::family::{IPV4, IPV6, IpFamily};
use crate::nft::field::{Field, Type, Value};
use crate::nft::model::{Rule, Set, Statement, Verdict};
use crate::packet::IPV6_LEN;
use nfqd_shmctl::{
    Action, AddressRange, EtherType, Fragment, FragmentMatch, MacAddr, MacMask, NumberRange,
    Protocol, TcpFlags,
};

/// The fields that rules of one shape compare, and their common conditions.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Shape {
    pub action: Action,
    /// The protocol whose header is compared; later fragments have none.
    pub transport: Option<Protocol>,
    /// Only packets of this EtherType; one of the IP families.
    pub family: Option<EtherType>,
    /// Whether the IP header must be consistent.
    pub needs_ip: bool,
    /// The key parts behind the middlebox' MAC.
    pub fields: Vec<Field>,
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
    pub(super) fn guards(&self) -> Vec<Statement> {
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

    pub(super) fn key(&self) -> Vec<Field> {
        [&[Field::EtherDestination], self.fields.as_slice()].concat()
    }

    /// Returns the look-up in a set of this shape.
    pub(super) fn rule(&self, set: &str) -> Rule {
        let mut statements = self.guards();
        statements.push(Statement::In(self.key(), set.to_string()));
        statements.push(verdict(verdict_of(self.action)));
        rule(statements)
    }

    pub(super) fn set(&self, interval: bool) -> Set {
        let key: Vec<Type> = self.key().into_iter().filter_map(Field::set_type).collect();
        let comment = match self.action {
            Action::Allow => "what matches is not denied",
            Action::Deny => "what matches is dropped",
        };
        Set { key, counter: true, interval, comment: Some(comment.to_string()), ..Set::default() }
    }
}

/// Returns the verdict: back to the chain that steers, or drop.
pub(super) fn verdict_of(action: Action) -> Verdict {
    match action {
        Action::Allow => Verdict::Return,
        Action::Deny => Verdict::Drop,
    }
}

/// A condition on a field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Test {
    Is(Value),
    IsNot(Value),
    Between(Value, Value),
    Masked { mask: Value, bits: Value },
}

impl Test {
    pub(super) fn between(first: Value, last: Value) -> Test {
        if first == last { Test::Is(first) } else { Test::Between(first, last) }
    }

    pub(super) fn addresses(range: AddressRange) -> Test {
        Test::between(Value::Ip(range.first()), Value::Ip(range.last()))
    }

    pub(super) fn numbers(range: NumberRange) -> Test {
        Test::between(Value::Port(range.first()), Value::Port(range.last()))
    }

    /// ICMP types and codes, which have 8 bits.
    pub(super) fn icmp(field: Field, range: NumberRange) -> Test {
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

    pub(super) fn macs(mask: MacMask) -> Test {
        match mask.exact() {
            Some(mac) => Test::Is(Value::Mac(mac)),
            None => Test::Masked { mask: Value::Mac(mask.mask()), bits: Value::Mac(mask.bits()) },
        }
    }

    pub(super) fn flags(flags: TcpFlags) -> Test {
        if flags.mask() == u8::MAX {
            return Test::Is(Value::Flags(flags.on()));
        }
        Test::Masked { mask: Value::Flags(flags.mask()), bits: Value::Flags(flags.on()) }
    }

    /// Returns the bounds, if an interval set can hold them.
    pub(super) fn bounds(self) -> Option<(Value, Value)> {
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

    pub(super) fn statement(self, field: Field) -> Statement {
        match self {
            Test::Is(value) => Statement::Is(field, value),
            Test::IsNot(value) => Statement::IsNot(field, value),
            Test::Between(first, last) => Statement::Between(field, first, last),
            Test::Masked { mask, bits } => Statement::Masked(field, mask, bits),
        }
    }
}

/// Returns the field and test of a fragment position in each family.
pub(super) fn fragment(wanted: FragmentMatch, ip: IpFamily) -> (Field, Test) {
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
pub(super) fn length(range: NumberRange, ip: IpFamily) -> Option<(Field, Test)> {
    if ip.is_ipv4() {
        return Some((Field::Ip4Length, Test::numbers(range)));
    }
    let header = IPV6_LEN as u16;
    let payload =
        NumberRange::new(range.first().saturating_sub(header), range.last().checked_sub(header)?)?;
    Some((Field::Ip6Length, Test::numbers(payload)))
}

/// Returns the family of the conditions, if they are for one.
pub(super) fn family(conditions: &Conditions) -> Option<IpFamily> {
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
pub(super) fn shape(
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
