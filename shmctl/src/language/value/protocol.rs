//! Protocol numbers: EtherTypes, IP protocols, ICMP types.

use super::{NumberRange, ParseValueError, decimal, number};
use std::fmt;
use std::str::FromStr;

/// An Ethernet protocol number in host order, never below 0x0600 (smaller values are 802.3
/// lengths).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EtherType(u16);

impl EtherType {
    /// IPv4, 0x0800.
    pub const IPV4: EtherType = EtherType(0x0800);
    /// ARP, 0x0806.
    pub const ARP: EtherType = EtherType(0x0806);
    /// IPv6, 0x86dd.
    pub const IPV6: EtherType = EtherType(0x86dd);

    /// Returns the EtherType with this number, unless it is an 802.3 length.
    pub fn new(number: u16) -> Option<EtherType> {
        (number >= 0x0600).then_some(EtherType(number))
    }

    /// Returns the number, in host order.
    pub fn number(self) -> u16 {
        self.0
    }
}

/// Parses a decimal as the raw field on a little-endian host (8 is 0x0800), as the original did;
/// hexadecimal numbers and the names `ip`, `arp` and `ip6` mean themselves.
impl FromStr for EtherType {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let lower = text.to_ascii_lowercase();
        match lower.as_str() {
            "ip" => return Ok(EtherType::IPV4),
            "arp" => return Ok(EtherType::ARP),
            "ip6" => return Ok(EtherType::IPV6),
            _ => {}
        }
        let number = match lower.strip_prefix("0x") {
            Some(hex) if hex.len() <= 4 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u16::from_str_radix(hex, 16).map_err(|_| ParseValueError)?
            }
            Some(_) => return Err(ParseValueError),
            None => decimal::<u16>(&lower).ok_or(ParseValueError)?.swap_bytes(),
        };
        EtherType::new(number).ok_or(ParseValueError)
    }
}

impl fmt::Display for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// An IP protocol number (IANA "Assigned Internet Protocol Numbers").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Protocol(pub u8);

/// The names of protocols. The first name of a number is the one that is written.
const PROTOCOLS: [(&str, u8); 14] = [
    ("icmp", 1),
    ("igmp", 2),
    ("tcp", 6),
    ("udp", 17),
    ("dccp", 33),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("icmp6", 58),
    ("ipv6-icmp", 58),
    ("ospf", 89),
    ("vrrp", 112),
    ("sctp", 132),
    ("udplite", 136),
];

impl Protocol {
    /// ICMP for IPv4.
    pub const ICMP: Protocol = Protocol(1);
    /// TCP.
    pub const TCP: Protocol = Protocol(6);
    /// UDP.
    pub const UDP: Protocol = Protocol(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Protocol = Protocol(58);
    /// UDP-Lite.
    pub const UDPLITE: Protocol = Protocol(136);
}

impl FromStr for Protocol {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let known = PROTOCOLS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        known
            .map(|&(_, number)| number)
            .or_else(|| number(text))
            .map(Protocol)
            .ok_or(ParseValueError)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match PROTOCOLS.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Names of ICMP types, as in nft (RFC 792 and IANA "ICMP Type Numbers").
pub(crate) const ICMP_TYPES: [(&str, u8); 13] = [
    ("echo-reply", 0),
    ("destination-unreachable", 3),
    ("source-quench", 4),
    ("redirect", 5),
    ("echo-request", 8),
    ("router-advertisement", 9),
    ("router-solicitation", 10),
    ("time-exceeded", 11),
    ("parameter-problem", 12),
    ("timestamp-request", 13),
    ("timestamp-reply", 14),
    ("address-mask-request", 17),
    ("address-mask-reply", 18),
];

/// Names of ICMPv6 types, as in nft (RFC 4443, RFC 4861 and IANA "ICMPv6 Parameters").
pub(crate) const ICMP6_TYPES: [(&str, u8); 14] = [
    ("destination-unreachable", 1),
    ("packet-too-big", 2),
    ("time-exceeded", 3),
    ("parameter-problem", 4),
    ("echo-request", 128),
    ("echo-reply", 129),
    ("mld-listener-query", 130),
    ("mld-listener-report", 131),
    ("mld-listener-done", 132),
    ("nd-router-solicit", 133),
    ("nd-router-advert", 134),
    ("nd-neighbor-solicit", 135),
    ("nd-neighbor-advert", 136),
    ("nd-redirect", 137),
];

/// Returns the number with this name, as a range.
pub(crate) fn named_range(names: &[(&str, u8)], text: &str) -> Option<NumberRange> {
    let (_, number) = names.iter().find(|(name, _)| name.eq_ignore_ascii_case(text))?;
    NumberRange::new(u16::from(*number), u16::from(*number))
}
