//! Packet fields as nftables names them, and the values that they are compared with.

use nfqd_shmctl::{AddressRange, EtherType, MacAddr, Protocol};
use std::fmt;
use std::net::IpAddr;

/// A field that a rule loads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Field {
    /// `ether daddr`.
    EtherDestination,
    /// `ether saddr`.
    EtherSource,
    /// `ether type`: the type of the outer VLAN tag, where there is one.
    OuterType,
    /// `vlan id`: the id of the outer VLAN tag.
    VlanId,
    /// `meta protocol`: the EtherType behind one VLAN tag.
    EtherType,
    /// `meta l4proto`: present only if the IP header is consistent.
    L4Protocol,
    /// `meta mark & …`.
    Mark(u32),
    /// `iif`: the index of the port that the frame came in by.
    InputInterface,
    /// `oif`: the index of the port that the frame leaves by.
    OutputInterface,
    /// `arp saddr ip`: the sender's address (RFC 826).
    ArpSenderIp,
    /// `arp saddr ether`: the sender's MAC.
    ArpSenderMac,
    /// The address that a neighbour advertisement is about (RFC 4861).
    AdvertisedIp6,
    /// `ip saddr`.
    Ip4Source,
    /// `ip daddr`.
    Ip4Destination,
    /// `ip frag-off & …`: flags and offset.
    Ip4FragmentOffset(u16),
    /// The TOS byte, which nft shows as `ip dscp … ip ecn …`.
    Ip4Tos,
    /// `ip6 saddr`.
    Ip6Source,
    /// `ip6 daddr`.
    Ip6Destination,
    /// `ip6 nexthdr`: the protocol, if there are no extension headers.
    Ip6NextHeader,
    /// `ip6 hoplimit`.
    Ip6HopLimit,
    /// The traffic class, which nft shows as `ip6 dscp … ip6 ecn …`.
    Ip6TrafficClass,
    /// `frag frag-off`: the offset in the first fragment header.
    Ip6FragmentOffset,
    /// `frag nexthdr`: the header behind the first fragment header.
    Ip6FragmentNext,
    /// `exthdr frag`: whether there is a fragment header.
    Ip6FragmentHeader,
    /// `ip length`.
    Ip4Length,
    /// `ip6 length`, without the header.
    Ip6Length,
    /// `th sport`.
    SourcePort,
    /// `th dport`.
    DestinationPort,
    /// `tcp flags`.
    TcpFlags,
    /// `icmp type`.
    IcmpType,
    /// `icmp code`.
    IcmpCode,
    /// `icmpv6 type`.
    Icmp6Type,
    /// `icmpv6 code`.
    Icmp6Code,
    /// The destination address of the IPv4 packet that an ICMP error quotes.
    QuotedIp4Destination,
    /// The destination address of the IPv6 packet that an ICMP error quotes.
    QuotedIp6Destination,
    /// `tcp checksum`.
    TcpChecksum,
    /// `udp checksum`.
    UdpChecksum,
}

/// The type of a set's key or data, with nft's number for it (`enum datatypes` of nft's
/// datatype.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Type {
    /// `ipv4_addr`, 4 bytes.
    Ip4,
    /// `ipv6_addr`, 16 bytes.
    Ip6,
    /// `ether_addr`, 6 bytes.
    Mac,
    /// `ether_type`, 2 bytes.
    EtherType,
    /// `inet_proto`, 1 byte.
    Protocol,
    /// `inet_service`, 2 bytes.
    Port,
    /// `mark`, 4 bytes in host order.
    Mark,
    /// `iface_index`, 4 bytes in host order.
    Interface,
    /// `icmp_type`, 1 byte.
    IcmpType,
    /// `icmpv6_type`, 1 byte.
    Icmp6Type,
}

impl Type {
    /// Returns nft's number of the type.
    pub(super) fn number(self) -> u32 {
        match self {
            Type::Ip4 => 7,
            Type::Ip6 => 8,
            Type::Mac => 9,
            Type::EtherType => 10,
            Type::Protocol => 12,
            Type::Port => 13,
            Type::IcmpType => 14,
            Type::Mark => 19,
            Type::Interface => 20,
            Type::Icmp6Type => 29,
        }
    }

    /// Returns the length in bytes.
    pub(super) fn len(self) -> usize {
        match self {
            Type::Protocol | Type::IcmpType | Type::Icmp6Type => 1,
            Type::EtherType | Type::Port => 2,
            Type::Ip4 | Type::Mark | Type::Interface => 4,
            Type::Mac => 6,
            Type::Ip6 => 16,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Ip4 => "ipv4_addr",
            Type::Ip6 => "ipv6_addr",
            Type::Mac => "ether_addr",
            Type::EtherType => "ether_type",
            Type::Protocol => "inet_proto",
            Type::Port => "inet_service",
            Type::Mark => "mark",
            Type::Interface => "iface_index",
            Type::IcmpType => "icmp_type",
            Type::Icmp6Type => "icmpv6_type",
        })
    }
}

impl Field {
    /// Returns the type of a set's key part that holds this field; `None` for fields that are only
    /// compared.
    pub fn set_type(self) -> Option<Type> {
        match self {
            Field::EtherDestination | Field::EtherSource | Field::ArpSenderMac => Some(Type::Mac),
            Field::EtherType => Some(Type::EtherType),
            Field::L4Protocol | Field::Ip6NextHeader | Field::Ip6FragmentNext => {
                Some(Type::Protocol)
            }
            Field::Mark(_) => Some(Type::Mark),
            Field::InputInterface | Field::OutputInterface => Some(Type::Interface),
            // nft has no type for the ids of VLANs; this one has their length.
            Field::VlanId => Some(Type::Port),
            Field::Ip4Source
            | Field::Ip4Destination
            | Field::QuotedIp4Destination
            | Field::ArpSenderIp => Some(Type::Ip4),
            Field::Ip6Source
            | Field::Ip6Destination
            | Field::QuotedIp6Destination
            | Field::AdvertisedIp6 => Some(Type::Ip6),
            Field::SourcePort | Field::DestinationPort => Some(Type::Port),
            Field::IcmpType => Some(Type::IcmpType),
            Field::Icmp6Type => Some(Type::Icmp6Type),
            Field::OuterType
            | Field::Ip4FragmentOffset(_)
            | Field::Ip4Tos
            | Field::Ip6HopLimit
            | Field::Ip6TrafficClass
            | Field::Ip6FragmentOffset
            | Field::Ip6FragmentHeader
            | Field::Ip4Length
            | Field::Ip6Length
            | Field::TcpFlags
            | Field::IcmpCode
            | Field::Icmp6Code
            | Field::TcpChecksum
            | Field::UdpChecksum => None,
        }
    }

    /// Returns the length in bytes of the loaded value.
    pub(super) fn len(self) -> usize {
        match self {
            Field::Ip4Tos
            | Field::Ip6HopLimit
            | Field::Ip6FragmentHeader
            | Field::TcpFlags
            | Field::IcmpCode
            | Field::Icmp6Code => 1,
            Field::OuterType
            | Field::Ip4FragmentOffset(_)
            | Field::Ip6TrafficClass
            | Field::Ip6FragmentOffset
            | Field::Ip4Length
            | Field::Ip6Length
            | Field::TcpChecksum
            | Field::UdpChecksum => 2,
            _ => self.set_type().map_or(0, Type::len),
        }
    }

    /// Returns the number of 32-bit registers for the field.
    pub(super) fn registers(self) -> u32 {
        self.len().div_ceil(4) as u32
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Field::InputInterface => "iif",
            Field::OutputInterface => "oif",
            Field::EtherDestination => "ether daddr",
            Field::EtherSource => "ether saddr",
            Field::ArpSenderIp => "arp saddr ip",
            Field::ArpSenderMac => "arp saddr ether",
            Field::AdvertisedIp6 => "@th,64,128",
            Field::OuterType => "ether type",
            Field::VlanId => "vlan id",
            Field::EtherType => "meta protocol",
            Field::L4Protocol => "meta l4proto",
            Field::Mark(mask) => return write!(f, "meta mark & {mask:#010x}"),
            Field::Ip4Source => "ip saddr",
            Field::Ip4Destination => "ip daddr",
            Field::Ip4FragmentOffset(mask) => return write!(f, "ip frag-off & {mask}"),
            Field::Ip4Tos => "ip dscp",
            Field::Ip6Source => "ip6 saddr",
            Field::Ip6Destination => "ip6 daddr",
            Field::Ip6NextHeader => "ip6 nexthdr",
            Field::Ip6HopLimit => "ip6 hoplimit",
            Field::Ip6TrafficClass => "ip6 dscp",
            Field::SourcePort => "th sport",
            Field::DestinationPort => "th dport",
            Field::TcpChecksum => "tcp checksum",
            Field::UdpChecksum => "udp checksum",
            Field::Ip6FragmentOffset => "frag frag-off",
            Field::Ip6FragmentNext => "frag nexthdr",
            Field::Ip6FragmentHeader => "exthdr frag",
            Field::Ip4Length => "ip length",
            Field::Ip6Length => "ip6 length",
            Field::TcpFlags => "tcp flags",
            Field::IcmpType => "icmp type",
            Field::IcmpCode => "icmp code",
            Field::Icmp6Type => "icmpv6 type",
            Field::Icmp6Code => "icmpv6 code",
            Field::QuotedIp4Destination => "@th,192,32",
            Field::QuotedIp6Destination => "@th,256,128",
        };
        f.write_str(name)
    }
}

/// A value of a field or a set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Value {
    /// A MAC address.
    Mac(MacAddr),
    /// An IP address.
    Ip(IpAddr),
    /// An EtherType.
    EtherType(EtherType),
    /// A protocol.
    Protocol(Protocol),
    /// A port, or another 16-bit number in network order.
    Port(u16),
    /// Bits of the mark.
    Mark(u32),
    /// An interface index.
    Interface(u32),
    /// A TOS or traffic-class byte.
    Tos(u8),
    /// Whether a header is present.
    Exists(bool),
    /// A hop limit.
    HopLimit(u8),
    /// TCP flags.
    Flags(u8),
    /// An ICMP type.
    IcmpType(u8),
    /// An ICMP code.
    IcmpCode(u8),
    /// An ICMPv6 type.
    Icmp6Type(u8),
    /// An ICMPv6 code.
    Icmp6Code(u8),
}

impl Value {
    /// Returns the value as a number, in the order of the kernel's interval sets.
    pub(super) fn number(self) -> u128 {
        match self {
            Value::Mac(mac) => mac.0.iter().fold(0, |number, byte| number << 8 | u128::from(*byte)),
            Value::Ip(IpAddr::V4(ip)) => u128::from(ip.to_bits()),
            Value::Ip(IpAddr::V6(ip)) => ip.to_bits(),
            Value::EtherType(ether_type) => u128::from(ether_type.number()),
            Value::Protocol(protocol) => u128::from(protocol.0),
            Value::Port(port) => u128::from(port),
            Value::Mark(number) | Value::Interface(number) => u128::from(number),
            Value::Exists(there) => u128::from(there),
            Value::Tos(byte)
            | Value::HopLimit(byte)
            | Value::Flags(byte)
            | Value::IcmpType(byte)
            | Value::IcmpCode(byte)
            | Value::Icmp6Type(byte)
            | Value::Icmp6Code(byte) => u128::from(byte),
        }
    }

    /// Returns the bytes as they are in a register: network order, marks in host order.
    pub(super) fn bytes(self) -> Vec<u8> {
        match self {
            Value::Mac(mac) => mac.0.to_vec(),
            Value::Ip(IpAddr::V4(ip)) => ip.octets().to_vec(),
            Value::Ip(IpAddr::V6(ip)) => ip.octets().to_vec(),
            Value::EtherType(ether_type) => ether_type.number().to_be_bytes().to_vec(),
            Value::Protocol(protocol) => vec![protocol.0],
            Value::Port(port) => port.to_be_bytes().to_vec(),
            Value::Mark(number) | Value::Interface(number) => number.to_ne_bytes().to_vec(),
            Value::Exists(there) => vec![u8::from(there)],
            Value::Tos(byte)
            | Value::HopLimit(byte)
            | Value::Flags(byte)
            | Value::IcmpType(byte)
            | Value::IcmpCode(byte)
            | Value::Icmp6Type(byte)
            | Value::Icmp6Code(byte) => vec![byte],
        }
    }
}

/// ECN code points as nft names them.
const ECN: [&str; 4] = ["not-ect", "ect1", "ect0", "ce"];

/// DSCP code points as nft of Debian 12 names them; others are shown as numbers.
const DSCP: [(u8, &str); 21] = [
    (0, "cs0"),
    (8, "cs1"),
    (16, "cs2"),
    (24, "cs3"),
    (32, "cs4"),
    (40, "cs5"),
    (48, "cs6"),
    (56, "cs7"),
    (10, "af11"),
    (12, "af12"),
    (14, "af13"),
    (18, "af21"),
    (20, "af22"),
    (22, "af23"),
    (26, "af31"),
    (28, "af32"),
    (30, "af33"),
    (34, "af41"),
    (36, "af42"),
    (38, "af43"),
    (46, "ef"),
];

/// ICMP types and codes as nft of Debian 12 names them; others are shown as numbers.
const ICMP_TYPES: [(u8, &str); 15] = [
    (0, "echo-reply"),
    (3, "destination-unreachable"),
    (4, "source-quench"),
    (5, "redirect"),
    (8, "echo-request"),
    (9, "router-advertisement"),
    (10, "router-solicitation"),
    (11, "time-exceeded"),
    (12, "parameter-problem"),
    (13, "timestamp-request"),
    (14, "timestamp-reply"),
    (15, "info-request"),
    (16, "info-reply"),
    (17, "address-mask-request"),
    (18, "address-mask-reply"),
];
const ICMP_CODES: [(u8, &str); 8] = [
    (0, "net-unreachable"),
    (1, "host-unreachable"),
    (2, "prot-unreachable"),
    (3, "port-unreachable"),
    (4, "frag-needed"),
    (9, "net-prohibited"),
    (10, "host-prohibited"),
    (13, "admin-prohibited"),
];
const ICMP6_TYPES: [(u8, &str); 18] = [
    (1, "destination-unreachable"),
    (2, "packet-too-big"),
    (3, "time-exceeded"),
    (4, "parameter-problem"),
    (128, "echo-request"),
    (129, "echo-reply"),
    (130, "mld-listener-query"),
    (131, "mld-listener-report"),
    (132, "mld-listener-done"),
    (133, "nd-router-solicit"),
    (134, "nd-router-advert"),
    (135, "nd-neighbor-solicit"),
    (136, "nd-neighbor-advert"),
    (137, "nd-redirect"),
    (138, "router-renumbering"),
    (141, "ind-neighbor-solicit"),
    (142, "ind-neighbor-advert"),
    (143, "mld2-listener-report"),
];
const ICMP6_CODES: [(u8, &str); 6] = [
    (0, "no-route"),
    (1, "admin-prohibited"),
    (3, "addr-unreachable"),
    (4, "port-unreachable"),
    (5, "policy-fail"),
    (6, "reject-route"),
];
const TCP_FLAGS: [&str; 8] = ["fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr"];

fn named(f: &mut fmt::Formatter<'_>, names: &[(u8, &str)], number: u8) -> fmt::Result {
    match names.iter().find(|(named, _)| *named == number) {
        Some((_, name)) => f.write_str(name),
        None => write!(f, "{number}"),
    }
}

impl Value {
    /// Writes a range as nft shows it: one value, a prefix where addresses make one, or first and
    /// last.
    pub(super) fn range_text(first: &Value, last: &Value) -> String {
        match (first, last) {
            _ if first == last => first.to_string(),
            (Value::Ip(a), Value::Ip(b)) => {
                AddressRange::new(*a, *b).map_or_else(String::new, |range| range.to_string())
            }
            _ => format!("{}-{}", first.bound_text(), last.bound_text()),
        }
    }

    /// Writes a bound of a range as nft shows it: ICMP types and codes without their names.
    pub(super) fn bound_text(&self) -> String {
        match self {
            Value::IcmpType(n) | Value::IcmpCode(n) | Value::Icmp6Type(n) | Value::Icmp6Code(n) => {
                n.to_string()
            }
            other => other.to_string(),
        }
    }

    /// Writes the byte as nft shows it: `0x04 ip ecn ect1` behind `ip dscp`.
    pub(super) fn tos_text(tos: u8, family: &str) -> String {
        let ecn = ECN.get(usize::from(tos & 3)).copied().unwrap_or_default();
        let dscp = match DSCP.iter().find(|(number, _)| *number == tos >> 2) {
            Some((_, name)) => (*name).to_string(),
            None => format!("{:#04x}", tos >> 2),
        };
        format!("{dscp} {family} ecn {ecn}")
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Mac(mac) => mac.fmt(f),
            Value::Ip(ip) => ip.fmt(f),
            Value::EtherType(EtherType::IPV4) => f.write_str("ip"),
            Value::EtherType(EtherType::IPV6) => f.write_str("ip6"),
            Value::EtherType(EtherType::ARP) => f.write_str("arp"),
            Value::EtherType(tag) if tag.number() == 0x8100 => f.write_str("8021q"),
            Value::EtherType(tag) if tag.number() == 0x88a8 => f.write_str("8021ad"),
            Value::EtherType(other) => write!(f, "{:#06x}", other.number()),
            Value::Protocol(Protocol::TCP) => f.write_str("tcp"),
            Value::Protocol(Protocol::UDP) => f.write_str("udp"),
            Value::Protocol(Protocol::ICMP) => f.write_str("icmp"),
            Value::Protocol(Protocol::ICMPV6) => f.write_str("ipv6-icmp"),
            Value::Protocol(Protocol::UDPLITE) => f.write_str("udplite"),
            Value::Protocol(other) => other.0.fmt(f),
            Value::Port(port) => port.fmt(f),
            Value::Mark(mark) => write!(f, "{mark:#010x}"),
            Value::Interface(index) => index.fmt(f),
            Value::Tos(tos) => tos.fmt(f),
            Value::Exists(there) => f.write_str(if *there { "exists" } else { "missing" }),
            Value::HopLimit(limit) => write!(f, "{limit}"),
            Value::Flags(flags) => {
                let on = TCP_FLAGS.iter().enumerate().filter(|(at, _)| flags & 1 << at != 0);
                f.write_str(&on.map(|(_, name)| *name).collect::<Vec<_>>().join(","))
            }
            Value::IcmpType(number) => named(f, &ICMP_TYPES, *number),
            Value::IcmpCode(number) => named(f, &ICMP_CODES, *number),
            Value::Icmp6Type(number) => named(f, &ICMP6_TYPES, *number),
            Value::Icmp6Code(number) => named(f, &ICMP6_CODES, *number),
        }
    }
}
