//! Classes of filter fields, the fields, and the values that rules compare them with.
//!
//! The one table of the filter language: the parser, the policy and the printed form all
//! use it.

use super::value::{
    AddressRange, EtherType, FragmentMatch, MacAddr, MacMask, NumberRange, Protocol, TcpFlags,
};
use super::value::{ICMP_TYPES, ICMP6_TYPES, named_range, number};
use std::fmt;

/// A class of fields, with a letter in commands. Its fields are the bits of the value behind the
/// letter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Class {
    /// `I`: IP header.
    Inet,
    /// `M`: Ethernet header.
    Link,
    /// `T`: TCP ports.
    Tcp,
    /// `U`: UDP ports.
    Udp,
    /// `V`: the outer VLAN tag.
    Vlan,
    /// `C`: ICMP, the control messages of IPv4.
    Icmp,
    /// `N`: ICMPv6, the control messages and neighbour discovery of IPv6.
    Icmp6,
    /// `F`: TCP flags.
    Flags,
    /// `P`: the packet as a whole.
    Packet,
}

/// A field that a rule can compare.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Field {
    /// `I s`: source addresses.
    SourceIp,
    /// `I d`: destination addresses.
    DestinationIp,
    /// `I t`: the whole TOS or traffic-class byte.
    Tos,
    /// `I p`: the protocol behind any IPv6 extension headers.
    Protocol,
    /// `M s`: source MACs.
    SourceMac,
    /// `M d`: the destination MAC.
    DestinationMac,
    /// `M p`: the EtherType behind one VLAN tag.
    EtherType,
    /// `T s`: TCP source ports.
    TcpSource,
    /// `T d`: TCP destination ports.
    TcpDestination,
    /// `U s`: UDP source ports.
    UdpSource,
    /// `U d`: UDP destination ports.
    UdpDestination,
    /// `V s`: ids of the outer VLAN tag.
    VlanId,
    /// `C t`: ICMP types.
    IcmpType,
    /// `C c`: ICMP codes.
    IcmpCode,
    /// `N t`: ICMPv6 types.
    Icmp6Type,
    /// `N c`: ICMPv6 codes.
    Icmp6Code,
    /// `F f`: TCP flags.
    TcpFlags,
    /// `P l`: the IP packet's length in bytes, header included.
    Length,
    /// `P f`: the position of the packet in a fragmented datagram.
    Fragment,
}

/// A field with the value that a rule compares it with.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FieldValue {
    /// Source addresses.
    SourceIp(AddressRange),
    /// Destination addresses; `None` is the registered one.
    DestinationIp(Option<AddressRange>),
    /// The TOS or traffic-class byte.
    Tos(u8),
    /// The protocol.
    Protocol(Protocol),
    /// Source MACs.
    SourceMac(MacMask),
    /// The destination MAC; `None` is the registered one.
    DestinationMac(Option<MacAddr>),
    /// The EtherType.
    EtherType(EtherType),
    /// TCP source ports.
    TcpSource(NumberRange),
    /// TCP destination ports.
    TcpDestination(NumberRange),
    /// UDP source ports.
    UdpSource(NumberRange),
    /// UDP destination ports.
    UdpDestination(NumberRange),
    /// VLAN ids, 0 to 4095.
    VlanId(NumberRange),
    /// ICMP types, 0 to 255.
    IcmpType(NumberRange),
    /// ICMP codes, 0 to 255.
    IcmpCode(NumberRange),
    /// ICMPv6 types, 0 to 255.
    Icmp6Type(NumberRange),
    /// ICMPv6 codes, 0 to 255.
    Icmp6Code(NumberRange),
    /// TCP flags.
    TcpFlags(TcpFlags),
    /// Lengths in bytes.
    Length(NumberRange),
    /// Positions in a fragmented datagram.
    Fragment(FragmentMatch),
}

impl Class {
    /// Every class.
    pub const ALL: [Class; 9] = [
        Class::Inet,
        Class::Link,
        Class::Tcp,
        Class::Udp,
        Class::Vlan,
        Class::Icmp,
        Class::Icmp6,
        Class::Flags,
        Class::Packet,
    ];

    /// Returns the letter in commands.
    pub fn letter(self) -> char {
        match self {
            Class::Inet => 'I',
            Class::Link => 'M',
            Class::Tcp => 'T',
            Class::Udp => 'U',
            Class::Vlan => 'V',
            Class::Icmp => 'C',
            Class::Icmp6 => 'N',
            Class::Flags => 'F',
            Class::Packet => 'P',
        }
    }

    /// Returns the fields, in the order of their bits.
    pub fn fields(self) -> &'static [Field] {
        match self {
            Class::Inet => &[Field::SourceIp, Field::DestinationIp, Field::Tos, Field::Protocol],
            Class::Link => &[Field::SourceMac, Field::DestinationMac, Field::EtherType],
            Class::Tcp => &[Field::TcpSource, Field::TcpDestination],
            Class::Udp => &[Field::UdpSource, Field::UdpDestination],
            Class::Vlan => &[Field::VlanId],
            Class::Icmp => &[Field::IcmpType, Field::IcmpCode],
            Class::Icmp6 => &[Field::Icmp6Type, Field::Icmp6Code],
            Class::Flags => &[Field::TcpFlags],
            Class::Packet => &[Field::Length, Field::Fragment],
        }
    }

    /// Returns the largest bit value: every field of the class on.
    pub fn all(self) -> u8 {
        self.fields().iter().fold(0, |bits, field| bits | field.bit())
    }
}

impl Field {
    /// Returns the class of the field.
    pub fn class(self) -> Class {
        match self {
            Field::SourceIp | Field::DestinationIp | Field::Tos | Field::Protocol => Class::Inet,
            Field::SourceMac | Field::DestinationMac | Field::EtherType => Class::Link,
            Field::TcpSource | Field::TcpDestination => Class::Tcp,
            Field::UdpSource | Field::UdpDestination => Class::Udp,
            Field::VlanId => Class::Vlan,
            Field::IcmpType | Field::IcmpCode => Class::Icmp,
            Field::Icmp6Type | Field::Icmp6Code => Class::Icmp6,
            Field::TcpFlags => Class::Flags,
            Field::Length | Field::Fragment => Class::Packet,
        }
    }

    /// Returns the letter of the field's key.
    pub fn letter(self) -> char {
        match self {
            Field::SourceIp
            | Field::SourceMac
            | Field::TcpSource
            | Field::UdpSource
            | Field::VlanId => 's',
            Field::DestinationIp
            | Field::DestinationMac
            | Field::TcpDestination
            | Field::UdpDestination => 'd',
            Field::Tos | Field::IcmpType | Field::Icmp6Type => 't',
            Field::Protocol | Field::EtherType => 'p',
            Field::IcmpCode | Field::Icmp6Code => 'c',
            Field::TcpFlags | Field::Fragment => 'f',
            Field::Length => 'l',
        }
    }

    /// Returns the bit in the value of the class: 1, 2, 4 or 8.
    pub fn bit(self) -> u8 {
        let at = self.class().fields().iter().position(|&field| field == self);
        at.map_or(0, |at| 1 << at)
    }

    /// Returns the name of the field in a sentence.
    pub fn name(self) -> &'static str {
        match self {
            Field::SourceIp => "source address",
            Field::DestinationIp => "destination address",
            Field::Tos => "TOS or traffic-class byte",
            Field::Protocol => "protocol",
            Field::SourceMac => "source MAC",
            Field::DestinationMac => "destination MAC",
            Field::EtherType => "EtherType",
            Field::TcpSource => "TCP source port",
            Field::TcpDestination => "TCP destination port",
            Field::UdpSource => "UDP source port",
            Field::UdpDestination => "UDP destination port",
            Field::VlanId => "VLAN id",
            Field::IcmpType => "ICMP type",
            Field::IcmpCode => "ICMP code",
            Field::Icmp6Type => "ICMPv6 type",
            Field::Icmp6Code => "ICMPv6 code",
            Field::TcpFlags => "TCP flags",
            Field::Length => "IP length in bytes",
            Field::Fragment => "position in a fragmented datagram",
        }
    }

    /// Whether the registration provides a value, so that a command may leave it out.
    pub fn has_default(self) -> bool {
        matches!(self, Field::DestinationIp | Field::DestinationMac)
    }

    /// Returns what is expected behind the key, for messages: what the word is not, and what to
    /// write.
    pub fn expected(self) -> &'static str {
        match self {
            Field::SourceIp | Field::DestinationIp => {
                "not an IP address, prefix or range; write one like 10.129.126.15, 10.0.0.0/8, 2001:db8::/32 or \
                 10.0.0.1-10.0.0.9"
            }
            Field::Tos => "not a TOS byte; write a number from 0 to 255",
            Field::Protocol => {
                "not an IP protocol; write a number from 0 to 255 or a name like tcp, udp, icmp, icmp6"
            }
            Field::SourceMac => {
                "not a MAC address; write one like 12:13:14:15:16:17, or with a mask \
                 12:13:14:00:00:00/ff:ff:ff:00:00:00"
            }
            Field::DestinationMac => {
                "not a MAC address; write six hexadecimal bytes like 12:13:14:15:16:17"
            }
            Field::EtherType => {
                "not an EtherType; write ip, arp, ip6 or a hexadecimal number from 0x0600 up (a decimal is the \
                 field in network order read on a little-endian host: 8 is 0x0800)"
            }
            Field::TcpSource | Field::TcpDestination | Field::UdpSource | Field::UdpDestination => {
                "not a port or a range of them; write a number from 0 to 65535, or two like 80-90"
            }
            Field::VlanId => {
                "not a VLAN id or a range of them; write a number from 0 to 4095, or two like 100-199"
            }
            Field::IcmpType => {
                "not an ICMP type or a range of them; write a number from 0 to 255, two like 13-18, or a name like \
                 echo-request"
            }
            Field::Icmp6Type => {
                "not an ICMPv6 type or a range of them; write a number from 0 to 255, two like 133-137, or a name \
                 like nd-router-advert"
            }
            Field::IcmpCode | Field::Icmp6Code => {
                "not a code or a range of them; write a number from 0 to 255, or two like 0-3"
            }
            Field::TcpFlags => {
                "not TCP flags; write those that must be on, like syn,ack, and behind a / those that are compared, \
                 like syn/syn,ack (fin syn rst psh ack urg ece cwr, none, all)"
            }
            Field::Length => {
                "not a length or a range of them; write a number of bytes from 0 to 65535, or two like 0-60"
            }
            Field::Fragment => {
                "not a fragment position; write whole, first, later or piece (first or later)"
            }
        }
    }

    /// Parses a value of the field.
    pub fn read(self, text: &str) -> Option<FieldValue> {
        let numbers =
            |most: u16| text.parse().ok().filter(|range: &NumberRange| range.last() <= most);
        Some(match self {
            Field::SourceIp => FieldValue::SourceIp(text.parse().ok()?),
            Field::DestinationIp => FieldValue::DestinationIp(Some(text.parse().ok()?)),
            Field::Tos => FieldValue::Tos(number(text)?),
            Field::Protocol => FieldValue::Protocol(text.parse().ok()?),
            Field::SourceMac => FieldValue::SourceMac(text.parse().ok()?),
            Field::DestinationMac => FieldValue::DestinationMac(Some(text.parse().ok()?)),
            Field::EtherType => FieldValue::EtherType(text.parse().ok()?),
            Field::TcpSource => FieldValue::TcpSource(text.parse().ok()?),
            Field::TcpDestination => FieldValue::TcpDestination(text.parse().ok()?),
            Field::UdpSource => FieldValue::UdpSource(text.parse().ok()?),
            Field::UdpDestination => FieldValue::UdpDestination(text.parse().ok()?),
            Field::VlanId => FieldValue::VlanId(numbers(4095)?),
            Field::IcmpType => {
                FieldValue::IcmpType(named_range(&ICMP_TYPES, text).or_else(|| numbers(255))?)
            }
            Field::Icmp6Type => {
                FieldValue::Icmp6Type(named_range(&ICMP6_TYPES, text).or_else(|| numbers(255))?)
            }
            Field::IcmpCode => FieldValue::IcmpCode(numbers(255)?),
            Field::Icmp6Code => FieldValue::Icmp6Code(numbers(255)?),
            Field::TcpFlags => FieldValue::TcpFlags(text.parse().ok()?),
            Field::Length => FieldValue::Length(text.parse().ok()?),
            Field::Fragment => FieldValue::Fragment(text.parse().ok()?),
        })
    }

    /// Returns the value that the registration provides.
    pub fn default_value(self) -> Option<FieldValue> {
        match self {
            Field::DestinationIp => Some(FieldValue::DestinationIp(None)),
            Field::DestinationMac => Some(FieldValue::DestinationMac(None)),
            _ => None,
        }
    }
}

impl FieldValue {
    /// Returns the field.
    pub fn field(&self) -> Field {
        match self {
            FieldValue::SourceIp(_) => Field::SourceIp,
            FieldValue::DestinationIp(_) => Field::DestinationIp,
            FieldValue::Tos(_) => Field::Tos,
            FieldValue::Protocol(_) => Field::Protocol,
            FieldValue::SourceMac(_) => Field::SourceMac,
            FieldValue::DestinationMac(_) => Field::DestinationMac,
            FieldValue::EtherType(_) => Field::EtherType,
            FieldValue::TcpSource(_) => Field::TcpSource,
            FieldValue::TcpDestination(_) => Field::TcpDestination,
            FieldValue::UdpSource(_) => Field::UdpSource,
            FieldValue::UdpDestination(_) => Field::UdpDestination,
            FieldValue::VlanId(_) => Field::VlanId,
            FieldValue::IcmpType(_) => Field::IcmpType,
            FieldValue::IcmpCode(_) => Field::IcmpCode,
            FieldValue::Icmp6Type(_) => Field::Icmp6Type,
            FieldValue::Icmp6Code(_) => Field::Icmp6Code,
            FieldValue::TcpFlags(_) => Field::TcpFlags,
            FieldValue::Length(_) => Field::Length,
            FieldValue::Fragment(_) => Field::Fragment,
        }
    }
}

/// Writes the key and, unless the registration provides it, the value: `s 10.0.0.1`, `d`.
impl fmt::Display for FieldValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = self.field().letter();
        let mut key = |value: &dyn fmt::Display| write!(f, "{letter} {value}");
        match self {
            FieldValue::DestinationIp(None) | FieldValue::DestinationMac(None) => {
                write!(f, "{letter}")
            }
            FieldValue::SourceIp(range) | FieldValue::DestinationIp(Some(range)) => key(range),
            FieldValue::Tos(tos) => key(tos),
            FieldValue::Protocol(protocol) => key(protocol),
            FieldValue::SourceMac(mask) => key(mask),
            FieldValue::DestinationMac(Some(mac)) => key(mac),
            FieldValue::EtherType(ether_type) => key(ether_type),
            FieldValue::TcpSource(range)
            | FieldValue::TcpDestination(range)
            | FieldValue::UdpSource(range)
            | FieldValue::UdpDestination(range)
            | FieldValue::VlanId(range)
            | FieldValue::IcmpType(range)
            | FieldValue::IcmpCode(range)
            | FieldValue::Icmp6Type(range)
            | FieldValue::Icmp6Code(range)
            | FieldValue::Length(range) => key(range),
            FieldValue::TcpFlags(flags) => key(flags),
            FieldValue::Fragment(fragment) => key(fragment),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_bits_tell_the_fields_of_a_class_apart() {
        let letters: std::collections::BTreeSet<char> =
            Class::ALL.iter().map(|class| class.letter()).collect();
        assert_eq!(letters.len(), Class::ALL.len());
        for class in Class::ALL {
            let fields = class.fields();
            assert!(fields.iter().all(|field| field.class() == class));
            let keys: std::collections::BTreeSet<char> =
                fields.iter().map(|field| field.letter()).collect();
            assert_eq!(keys.len(), fields.len(), "{class:?}");
            assert_eq!(u32::from(class.all()).count_ones() as usize, fields.len(), "{class:?}");
        }
    }
}
