//! Deny rules: what a middlebox stores for each, and which packets one matches.

use crate::packet::{Fragment, Packet};
use nfqd_shmctl::{
    Clear, Command, EtherType, InetClear, InetSet, LinkClear, LinkSet, MacAddr, Protocol, RuleNumber, Set,
    TcpClear, TcpSet,
};
use std::net::IpAddr;

/// One deny rule: the bits that are on, and the stored values whether their bit is on or not.
///
/// All bits that are on must match; a rule with no bit on matches nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    inet: InetSet,
    link: LinkSet,
    tcp: TcpSet,
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
        source_ip: IpAddr,
        /// The destination address.
        destination: IpAddr,
    },
}

/// A rule with its defaults filled in and its contradictions found: what a packet must have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Conditions {
    /// The source MAC.
    pub source_mac: Option<MacAddr>,
    /// The EtherType behind one VLAN tag.
    pub ether_type: Option<EtherType>,
    /// The source address.
    pub source: Option<IpAddr>,
    /// The destination address.
    pub destination: Option<IpAddr>,
    /// The TOS or traffic-class byte.
    pub tos: Option<u8>,
    /// The protocol.
    pub protocol: Option<Protocol>,
    /// The source port.
    pub source_port: Option<u16>,
    /// The destination port.
    pub destination_port: Option<u16>,
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
            Set::Tcp(new) => {
                let old = &mut rule.tcp;
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
            Clear::Tcp(TcpClear { keep, source, destination }) => {
                rule.tcp.bits &= keep;
                blank(&mut rule.tcp.source, source);
                blank(&mut rule.tcp.destination, destination);
            }
        }
        rule.check(ip)?;
        Ok(rule)
    }

    fn check(&self, ip: IpAddr) -> Result<(), RuleError> {
        let (inet, link, tcp) = (&self.inet, &self.link, &self.tcp);
        for (class, bits, bit, key, has_value) in [
            ('I', inet.bits, 1, 's', inet.source.is_some()),
            ('I', inet.bits, 4, 't', inet.tos.is_some()),
            ('I', inet.bits, 8, 'p', inet.protocol.is_some()),
            ('M', link.bits, 1, 's', link.source.is_some()),
            ('M', link.bits, 4, 'p', link.ether_type.is_some()),
            ('T', tcp.bits, 1, 's', tcp.source.is_some()),
            ('T', tcp.bits, 2, 'd', tcp.destination.is_some()),
        ] {
            if bits & bit != 0 && !has_value {
                return Err(RuleError::NoValue { class, bit, key });
            }
        }
        let destination = inet.destination.flatten().unwrap_or(ip);
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
            (self.tcp != TcpSet::default()).then_some(Set::Tcp(self.tcp)),
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
        let (inet, link, tcp) = (&self.inet, &self.link, &self.tcp);
        let on = |bits: u8, bit: u8| bits & bit != 0;
        if inet.bits | link.bits | tcp.bits == 0 {
            return None;
        }
        if on(link.bits, 2) && link.destination.flatten().is_some_and(|other| other != mac) {
            return None;
        }
        let ports = tcp.bits != 0;
        let mut conditions = Conditions {
            source_mac: link.source.filter(|_| on(link.bits, 1)),
            ether_type: link.ether_type.filter(|_| on(link.bits, 4)),
            source: inet.source.filter(|_| on(inet.bits, 1)),
            destination: on(inet.bits, 2).then(|| inet.destination.flatten().unwrap_or(ip)),
            tos: inet.tos.filter(|_| on(inet.bits, 4)),
            protocol: inet.protocol.filter(|_| on(inet.bits, 8)),
            source_port: tcp.source.filter(|_| on(tcp.bits, 1)),
            destination_port: tcp.destination.filter(|_| on(tcp.bits, 2)),
        };
        if ports {
            if conditions.protocol.is_some_and(|protocol| protocol != Protocol::TCP) {
                return None;
            }
            conditions.protocol = Some(Protocol::TCP);
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
        if !same(self.source_mac, Some(packet.link.source)) || !same(self.ether_type, packet.link.ether_type)
        {
            return false;
        }
        if !self.need_ip() {
            return true;
        }
        let Some(ip) = packet.ip else { return false };
        let ports = ip.ports.filter(|_| ip.fragment != Fragment::Later);
        same(self.source, Some(ip.source))
            && same(self.destination, Some(ip.destination))
            && same(self.tos, Some(ip.tos))
            && same(self.protocol, Some(ip.protocol))
            && same(self.source_port, ports.map(|ports| ports.source))
            && same(self.destination_port, ports.map(|ports| ports.destination))
    }
}
