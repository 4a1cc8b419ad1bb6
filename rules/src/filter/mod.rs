//! Filter rules: the stored state of a rule, and the conditions that a packet must meet to match
//! it.

pub mod classifier;
mod comparison;

pub use comparison::Comparison;

use crate::packet::{IPV6_LEN, Packet};
use nfqd_shmctl::{
    AddressRange, Class, Command, EtherType, Field, FieldValue, FilterRemoval, FilterUpdate,
    FragmentMatch, MacAddr, MacMask, NumberRange, Protocol, RuleId, TcpFlags,
};
use std::net::IpAddr;

/// A rule: the bits that are on, and the stored values, whether their bit is on or not.
///
/// The bits that are on: all must match. A rule with no bit on matches nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FilterRule {
    /// The bits of each class.
    bits: [u8; Class::ALL.len()],
    /// The values, sorted, at most one of each field.
    values: Box<[FieldValue]>,
}

/// The reason a rule cannot be changed as a command asks, in words for its author.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RuleError {
    /// A bit is on for a field that has no value.
    #[error("sets bit {bit} of class {class}, but {key} has no value; add '{key} VALUE'")]
    NoValue {
        /// The class letter.
        class: char,
        /// The bit's value.
        bit: u8,
        /// The key letter.
        key: char,
    },
    /// Source and destination are of different families.
    #[error(
        "source {source_ip} and destination {destination} are not of one family; no packet has both"
    )]
    Families {
        /// The source address.
        source_ip: AddressRange,
        /// The destination address.
        destination: AddressRange,
    },
}

/// The conditions of a rule, with defaults filled in and contradictions found.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Conditions {
    /// The source MAC.
    pub source_mac: Option<MacMask>,
    /// The id of the outer VLAN tag.
    pub vlan: Option<NumberRange>,
    /// The EtherType behind one VLAN tag.
    pub ether_type: Option<EtherType>,
    /// The source address.
    pub source: Option<AddressRange>,
    /// The destination address.
    pub destination: Option<AddressRange>,
    /// The TOS or traffic-class byte.
    pub tos: Option<u8>,
    /// The IP packet's length.
    pub length: Option<NumberRange>,
    /// The position in a fragmented datagram.
    pub fragment: Option<FragmentMatch>,
    /// The protocol.
    pub protocol: Option<Protocol>,
    /// The source port, of the protocol above.
    pub source_port: Option<NumberRange>,
    /// The destination port, of the protocol above.
    pub destination_port: Option<NumberRange>,
    /// The TCP flags.
    pub tcp_flags: Option<TcpFlags>,
    /// The ICMP or ICMPv6 type, by the protocol above.
    pub icmp_type: Option<NumberRange>,
    /// The ICMP or ICMPv6 code.
    pub icmp_code: Option<NumberRange>,
}

impl FilterRule {
    /// Returns the rule with more bits on and more values stored, as `A` asks.
    ///
    /// # Errors
    /// If a bit would be on without a value, or the addresses are of two families.
    pub fn with(&self, update: &FilterUpdate, ip: IpAddr) -> Result<FilterRule, RuleError> {
        let mut rule = self.clone();
        *rule.bits_of(update.class) |= update.bits;
        let unchanged = self
            .values
            .iter()
            .filter(|old| update.values.iter().all(|new| new.field() != old.field()));
        rule.set_values(unchanged.chain(&update.values).copied());
        rule.check(ip)?;
        Ok(rule)
    }

    /// Returns the rule with fewer bits on and the named values removed, as `D` asks.
    ///
    /// # Errors
    /// If the remaining bits and values contradict each other.
    pub fn without(&self, removal: &FilterRemoval, ip: IpAddr) -> Result<FilterRule, RuleError> {
        let mut rule = self.clone();
        *rule.bits_of(removal.class) &= removal.keep;
        let remaining = self.values.iter().filter(|old| !removal.values.contains(&old.field()));
        rule.set_values(remaining.copied());
        rule.check(ip)?;
        Ok(rule)
    }

    fn bits_of(&mut self, class: Class) -> &mut u8 {
        // The classes are numbered from 0 without gaps.
        &mut self.bits[class as usize]
    }

    fn set_values(&mut self, values: impl Iterator<Item = FieldValue>) {
        let mut values: Vec<FieldValue> = values.collect();
        values.sort_by_key(FieldValue::field);
        self.values = values.into();
    }

    fn is_on(&self, field: Field) -> bool {
        self.bits[field.class() as usize] & field.bit() != 0
    }

    fn value(&self, field: Field) -> Option<FieldValue> {
        self.values.iter().copied().find(|value| value.field() == field).or(field.default_value())
    }

    /// Returns the values of the fields whose bits are on.
    fn on(&self) -> impl Iterator<Item = (Field, Option<FieldValue>)> {
        let fields = Class::ALL.into_iter().flat_map(Class::fields).copied();
        fields.filter(|&field| self.is_on(field)).map(|field| (field, self.value(field)))
    }

    fn check(&self, ip: IpAddr) -> Result<(), RuleError> {
        if let Some((field, _)) = self.on().find(|(_, value)| value.is_none()) {
            let class = field.class().letter();
            return Err(RuleError::NoValue { class, bit: field.bit(), key: field.letter() });
        }
        if !(self.is_on(Field::SourceIp) && self.is_on(Field::DestinationIp)) {
            return Ok(());
        }
        match (self.value(Field::SourceIp), self.value(Field::DestinationIp)) {
            (
                Some(FieldValue::SourceIp(source_ip)),
                Some(FieldValue::DestinationIp(destination)),
            ) => {
                let destination = destination.unwrap_or(ip.into());
                let same = source_ip.is_ipv4() == destination.is_ipv4();
                if same { Ok(()) } else { Err(RuleError::Families { source_ip, destination }) }
            }
            _ => Ok(()),
        }
    }

    /// Returns the commands that make this rule from an empty one.
    pub fn commands(&self, mac: MacAddr, rule: RuleId) -> Vec<Command> {
        let of = |class: Class| {
            let values = self
                .values
                .iter()
                .copied()
                .filter(|value| value.field().class() == class)
                .collect();
            FilterUpdate { class, bits: self.bits[class as usize], values }
        };
        let mut sets: Vec<FilterUpdate> = Class::ALL.into_iter().map(of).collect();
        sets.retain(|set| set.bits != 0 || !set.values.is_empty());
        if sets.is_empty() {
            // A rule with no bit on is kept as well.
            sets.push(FilterUpdate { class: Class::Inet, bits: 0, values: Vec::new() });
        }
        sets.into_iter().map(|set| Command::Add { mac, rule, update: set }).collect()
    }

    /// Returns the conditions on a packet to the middlebox `mac`, registered with `ip`; `None` if
    /// no packet can meet them: no bit is on, or the bits contradict each other.
    pub fn conditions(&self, mac: MacAddr, ip: IpAddr) -> Option<Conditions> {
        if self.bits.iter().all(|&bits| bits == 0) {
            return None;
        }
        let mut out = Conditions::default();
        // Several fields of a rule may each imply a protocol or a family; no packet has two.
        let (mut protocols, mut families) = (Vec::new(), Vec::new());
        let mut ask = |protocol: Protocol, family: Option<EtherType>| {
            protocols.push(protocol);
            families.extend(family);
        };
        let family =
            |range: AddressRange| if range.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
        let mut named_type = None;
        for value in self.on().filter_map(|(_, value)| value) {
            match value {
                FieldValue::SourceIp(range) => out.source = Some(range),
                FieldValue::DestinationIp(range) => {
                    out.destination = Some(range.unwrap_or(ip.into()));
                }
                FieldValue::Tos(tos) => out.tos = Some(tos),
                FieldValue::Protocol(protocol) => ask(protocol, None),
                FieldValue::SourceMac(mask) => out.source_mac = Some(mask),
                FieldValue::DestinationMac(other) if other.is_some_and(|other| other != mac) => {
                    return None;
                }
                FieldValue::DestinationMac(_) => {}
                FieldValue::EtherType(ether_type) => named_type = Some(ether_type),
                FieldValue::TcpSource(range) | FieldValue::UdpSource(range) => {
                    out.source_port = Some(range);
                }
                FieldValue::TcpDestination(range) | FieldValue::UdpDestination(range) => {
                    out.destination_port = Some(range);
                }
                FieldValue::VlanId(ids) => out.vlan = Some(ids),
                FieldValue::IcmpType(range) | FieldValue::Icmp6Type(range) => {
                    out.icmp_type = Some(range);
                }
                FieldValue::IcmpCode(range) | FieldValue::Icmp6Code(range) => {
                    out.icmp_code = Some(range);
                }
                FieldValue::TcpFlags(flags) => out.tcp_flags = Some(flags),
                FieldValue::Length(range) => out.length = Some(range),
                FieldValue::Fragment(fragment) => out.fragment = Some(fragment),
            }
            match value.field().class() {
                Class::Tcp | Class::Flags => ask(Protocol::TCP, None),
                Class::Udp => ask(Protocol::UDP, None),
                Class::Icmp => ask(Protocol::ICMP, Some(EtherType::IPV4)),
                Class::Icmp6 => ask(Protocol::ICMPV6, Some(EtherType::IPV6)),
                Class::Inet | Class::Link | Class::Vlan | Class::Packet => {}
            }
        }
        families.extend(out.source.into_iter().chain(out.destination).map(family));
        out.protocol = the_same(&protocols)?;
        let family = the_same(&families)?;
        let icmp = out.icmp_type.is_some() || out.icmp_code.is_some();
        let is_ipv6 = [family, named_type].contains(&Some(EtherType::IPV6));
        if is_ipv6 && out.length.is_some_and(|range| usize::from(range.last()) < IPV6_LEN) {
            return None;
        }
        // With addresses the EtherType is redundant; for ICMP it tells the two families' types
        // apart.
        out.ether_type = match (named_type, family) {
            (Some(named), Some(family)) if named != family => return None,
            (Some(named), None)
                if out.need_ip() && ![EtherType::IPV4, EtherType::IPV6].contains(&named) =>
            {
                return None;
            }
            (named, family) => named.or(family.filter(|_| icmp)),
        };
        Some(out)
    }
}

/// Returns the one value that is given, if any; `None` if two differ.
#[allow(clippy::option_option)]
fn the_same<T: Copy + PartialEq>(values: &[T]) -> Option<Option<T>> {
    let first = values.first().copied();
    values.iter().all(|value| Some(*value) == first).then_some(first)
}

impl Conditions {
    /// Whether any condition reads the IP header or what follows it.
    pub fn need_ip(&self) -> bool {
        self.source.is_some()
            || self.destination.is_some()
            || self.tos.is_some()
            || self.length.is_some()
            || self.fragment.is_some()
            || self.protocol.is_some()
    }

    /// Whether any condition reads what follows the IP header; later fragments have nothing there.
    pub fn need_transport(&self) -> bool {
        self.source_port.is_some()
            || self.destination_port.is_some()
            || self.tcp_flags.is_some()
            || self.icmp_type.is_some()
            || self.icmp_code.is_some()
    }

    /// Whether a packet meets all conditions.
    pub fn match_packet(&self, packet: &Packet) -> bool {
        fn same<T: PartialEq>(wanted: Option<T>, found: Option<T>) -> bool {
            wanted.is_none() || wanted == found
        }
        fn within<T>(wanted: Option<T>, found: impl FnOnce(T) -> bool) -> bool {
            wanted.is_none_or(found)
        }
        let number = |wanted: Option<NumberRange>, found: Option<u16>| {
            within(wanted, |range| found.is_some_and(|found| range.contains(found)))
        };
        let link = &packet.link;
        if !within(self.source_mac, |mask| mask.contains(link.source))
            || !same(self.ether_type, link.ether_type)
            || !number(self.vlan, link.vlan_id())
        {
            return false;
        }
        if !self.need_ip() {
            return true;
        }
        let Some(ip) = packet.ip else { return false };
        within(self.source, |range| range.contains(ip.source))
            && within(self.destination, |range| range.contains(ip.destination))
            && same(self.tos, Some(ip.tos))
            && within(self.length, |range| {
                u16::try_from(ip.length).is_ok_and(|length| range.contains(length))
            })
            && within(self.fragment, |wanted| wanted.contains(ip.nft_fragment))
            && same(self.protocol, Some(ip.protocol))
            && number(self.source_port, ip.source_port)
            && number(self.destination_port, ip.ports.map(|ports| ports.destination))
            && within(self.tcp_flags, |flags| {
                ip.tcp_flags.is_some_and(|found| flags.contains(found))
            })
            && number(self.icmp_type, ip.icmp_type.map(u16::from))
            && number(self.icmp_code, ip.icmp_code.map(u16::from))
    }
}
