//! Deny rules: what a middlebox stores for each, and which packets one matches.

use crate::packet::{Fragment, Packet};
use nfqd_shmctl::{
    AddressRange, Clear, Command, EtherType, InetClear, InetSet, LinkClear, LinkSet, MacAddr, MacMask,
    NumberRange, PortClear, PortSet, Protocol, RuleNumber, Set, Transport, VlanClear, VlanSet,
};
use std::net::IpAddr;

/// One deny rule: the bits that are on, and the stored values whether their bit is on or not.
///
/// All bits that are on must match; a rule with no bit on matches nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    inet: InetSet,
    link: LinkSet,
    tcp: PortSet,
    udp: PortSet,
    vlan: VlanSet,
}

/// Why a rule cannot be as a command wants it: words for the person who wrote the command.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RuleError {
    /// A bit is on for a field that has no value.
    #[error("switches on bit {bit} of class {class}, but {key} never got a value; add '{key} VALUE'")]
    NoValue {
        /// The class letter.
        class: char,
        /// The bit's value.
        bit: u8,
        /// The key letter.
        key: char,
    },
    /// Source and destination are of different families.
    #[error("source {source_ip} and destination {destination} are not of one family; no packet has both")]
    Families {
        /// The source address.
        source_ip: AddressRange,
        /// The destination address.
        destination: AddressRange,
    },
}

/// A rule with its defaults filled in and its contradictions found: what a packet must have.
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
    /// The protocol.
    pub protocol: Option<Protocol>,
    /// The source port, of the protocol above.
    pub source_port: Option<NumberRange>,
    /// The destination port, of the protocol above.
    pub destination_port: Option<NumberRange>,
}

impl Rule {
    /// The rule with more bits on and more values stored, as `A` has it.
    ///
    /// # Errors
    /// When a bit would be on without a value, or the addresses are of two families.
    pub fn with(&self, set: &Set, ip: IpAddr) -> Result<Rule, RuleError> {
        let mut rule = self.clone();
        match set {
            Set::Inet(new) => {
                let old = &mut rule.inet;
                old.bits |= new.bits;
                old.source = new.source.or(old.source);
                old.destination = new.destination.or(old.destination);
                old.tos = new.tos.or(old.tos);
                old.protocol = new.protocol.or(old.protocol);
            }
            Set::Link(new) => {
                let old = &mut rule.link;
                old.bits |= new.bits;
                old.source = new.source.or(old.source);
                old.destination = new.destination.or(old.destination);
                old.ether_type = new.ether_type.or(old.ether_type);
            }
            Set::Vlan(new) => {
                let old = &mut rule.vlan;
                old.bits |= new.bits;
                old.id = new.id.or(old.id);
            }
            Set::Ports(transport, new) => {
                let old = rule.ports(*transport);
                old.bits |= new.bits;
                old.source = new.source.or(old.source);
                old.destination = new.destination.or(old.destination);
            }
        }
        rule.check(ip)?;
        Ok(rule)
    }

    /// The rule with fewer bits on and the named values blanked, as `D` has it.
    ///
    /// # Errors
    /// When what is left contradicts itself.
    pub fn without(&self, clear: &Clear, ip: IpAddr) -> Result<Rule, RuleError> {
        fn blank<T>(value: &mut Option<T>, named: bool) {
            if named {
                *value = None;
            }
        }
        let mut rule = self.clone();
        match *clear {
            Clear::Inet(InetClear { keep, source, destination, tos, protocol }) => {
                rule.inet.bits &= keep;
                blank(&mut rule.inet.source, source);
                blank(&mut rule.inet.destination, destination);
                blank(&mut rule.inet.tos, tos);
                blank(&mut rule.inet.protocol, protocol);
            }
            Clear::Link(LinkClear { keep, source, destination, ether_type }) => {
                rule.link.bits &= keep;
                blank(&mut rule.link.source, source);
                blank(&mut rule.link.destination, destination);
                blank(&mut rule.link.ether_type, ether_type);
            }
            Clear::Vlan(VlanClear { keep, id }) => {
                rule.vlan.bits &= keep;
                blank(&mut rule.vlan.id, id);
            }
            Clear::Ports(transport, PortClear { keep, source, destination }) => {
                let ports = rule.ports(transport);
                ports.bits &= keep;
                blank(&mut ports.source, source);
                blank(&mut ports.destination, destination);
            }
        }
        rule.check(ip)?;
        Ok(rule)
    }

    fn ports(&mut self, transport: Transport) -> &mut PortSet {
        match transport {
            Transport::Tcp => &mut self.tcp,
            Transport::Udp => &mut self.udp,
        }
    }

    fn check(&self, ip: IpAddr) -> Result<(), RuleError> {
        let (inet, link, tcp, udp) = (&self.inet, &self.link, &self.tcp, &self.udp);
        for (class, bits, bit, key, has_value) in [
            ('I', inet.bits, 1, 's', inet.source.is_some()),
            ('I', inet.bits, 4, 't', inet.tos.is_some()),
            ('I', inet.bits, 8, 'p', inet.protocol.is_some()),
            ('M', link.bits, 1, 's', link.source.is_some()),
            ('M', link.bits, 4, 'p', link.ether_type.is_some()),
            ('T', tcp.bits, 1, 's', tcp.source.is_some()),
            ('T', tcp.bits, 2, 'd', tcp.destination.is_some()),
            ('U', udp.bits, 1, 's', udp.source.is_some()),
            ('U', udp.bits, 2, 'd', udp.destination.is_some()),
            ('V', self.vlan.bits, 1, 's', self.vlan.id.is_some()),
        ] {
            if bits & bit != 0 && !has_value {
                return Err(RuleError::NoValue { class, bit, key });
            }
        }
        let destination = inet.destination.flatten().unwrap_or(ip.into());
        match inet.source {
            Some(source_ip) if inet.bits & 3 == 3 && source_ip.is_ipv4() != destination.is_ipv4() => {
                Err(RuleError::Families { source_ip, destination })
            }
            _ => Ok(()),
        }
    }

    /// The commands that make this rule of an empty one.
    pub fn commands(&self, mac: MacAddr, rule: RuleNumber) -> Vec<Command> {
        let sets = [
            (self.inet != InetSet::default()).then_some(Set::Inet(self.inet)),
            (self.link != LinkSet::default()).then_some(Set::Link(self.link)),
            (self.tcp != PortSet::default()).then_some(Set::Ports(Transport::Tcp, self.tcp)),
            (self.udp != PortSet::default()).then_some(Set::Ports(Transport::Udp, self.udp)),
            (self.vlan != VlanSet::default()).then_some(Set::Vlan(self.vlan)),
        ];
        let mut sets: Vec<Set> = sets.into_iter().flatten().collect();
        if sets.is_empty() {
            // A rule with no bit on is kept.
            sets.push(Set::Inet(InetSet::default()));
        }
        sets.into_iter().map(|set| Command::Add { mac, rule, set }).collect()
    }

    /// What a packet to the middlebox `mac`, registered with `ip`, must have to be dropped; `None` when no packet can
    /// have it: no bit is on, or the bits contradict each other.
    pub fn conditions(&self, mac: MacAddr, ip: IpAddr) -> Option<Conditions> {
        let (inet, link, vlan) = (&self.inet, &self.link, &self.vlan);
        // The ports of one protocol; no packet is of both.
        let (protocol, ports) = match (self.tcp.bits, self.udp.bits) {
            (0, 0) => (None, PortSet::default()),
            (_, 0) => (Some(Protocol::TCP), self.tcp),
            (0, _) => (Some(Protocol::UDP), self.udp),
            _ => return None,
        };
        let on = |bits: u8, bit: u8| bits & bit != 0;
        if inet.bits | link.bits | ports.bits | vlan.bits == 0 {
            return None;
        }
        if on(link.bits, 2) && link.destination.flatten().is_some_and(|other| other != mac) {
            return None;
        }
        let mut conditions = Conditions {
            source_mac: link.source.filter(|_| on(link.bits, 1)),
            vlan: vlan.id.filter(|_| on(vlan.bits, 1)),
            ether_type: link.ether_type.filter(|_| on(link.bits, 4)),
            source: inet.source.filter(|_| on(inet.bits, 1)),
            destination: on(inet.bits, 2).then(|| inet.destination.flatten().unwrap_or(ip.into())),
            tos: inet.tos.filter(|_| on(inet.bits, 4)),
            protocol: inet.protocol.filter(|_| on(inet.bits, 8)),
            source_port: ports.source.filter(|_| on(ports.bits, 1)),
            destination_port: ports.destination.filter(|_| on(ports.bits, 2)),
        };
        if let Some(protocol) = protocol {
            if conditions.protocol.is_some_and(|named| named != protocol) {
                return None;
            }
            conditions.protocol = Some(protocol);
        }
        let family = match (conditions.source, conditions.destination) {
            (Some(a), Some(b)) if a.is_ipv4() != b.is_ipv4() => return None,
            (Some(address), _) | (_, Some(address)) => {
                Some(if address.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 })
            }
            (None, None) => None,
        };
        let needs_ip = family.is_some() || conditions.tos.is_some() || conditions.protocol.is_some();
        match (conditions.ether_type, family) {
            (Some(named), Some(family)) if named != family => return None,
            (Some(named), _) if needs_ip && ![EtherType::IPV4, EtherType::IPV6].contains(&named) => {
                return None;
            }
            _ => {}
        }
        Some(conditions)
    }
}

impl Conditions {
    /// Whether any of them looks at the IP header or behind it.
    pub fn need_ip(&self) -> bool {
        self.source.is_some() || self.destination.is_some() || self.tos.is_some() || self.protocol.is_some()
    }

    /// Whether any of them looks at ports.
    pub fn need_ports(&self) -> bool {
        self.source_port.is_some() || self.destination_port.is_some()
    }

    /// Whether a packet has all of them.
    pub fn match_packet(&self, packet: &Packet) -> bool {
        fn same<T: PartialEq>(wanted: Option<T>, found: Option<T>) -> bool {
            wanted.is_none() || wanted == found
        }
        fn within<T>(wanted: Option<T>, found: impl FnOnce(T) -> bool) -> bool {
            wanted.is_none_or(found)
        }
        /// The id in the tag control information (IEEE 802.1Q).
        const VLAN_ID: u16 = 0x0fff;
        let link = &packet.link;
        if !within(self.source_mac, |mask| mask.contains(link.source))
            || !same(self.ether_type, link.ether_type)
            || !within(self.vlan, |ids| link.vlan.is_some_and(|tag| ids.contains(tag & VLAN_ID)))
        {
            return false;
        }
        if !self.need_ip() {
            return true;
        }
        let Some(ip) = packet.ip else { return false };
        let ports = ip.ports.filter(|_| ip.fragment != Fragment::Later);
        within(self.source, |range| range.contains(ip.source))
            && within(self.destination, |range| range.contains(ip.destination))
            && same(self.tos, Some(ip.tos))
            && same(self.protocol, Some(ip.protocol))
            && within(self.source_port, |range| ports.is_some_and(|ports| range.contains(ports.source)))
            && within(self.destination_port, |range| {
                ports.is_some_and(|ports| range.contains(ports.destination))
            })
    }
}
