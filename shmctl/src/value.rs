//! The words of the command language as types that cannot be wrong: MAC addresses, EtherTypes, protocols.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A 48-bit Ethernet address, in the order it has on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether it can name one station: not all zeros, and the group bit (IEEE 802, the lowest bit of the first
    /// byte) is off.
    pub fn is_station(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }

    fn and(self, mask: MacAddr) -> MacAddr {
        let mut out = self.0;
        out.iter_mut().zip(mask.0).for_each(|(byte, mask)| *byte &= mask);
        MacAddr(out)
    }
}

/// Reads six hexadecimal bytes, of one or two digits each, between colons.
impl FromStr for MacAddr {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(())?;
            let digits = matches!(part.len(), 1 | 2) && part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = if digits { u8::from_str_radix(part, 16).map_err(drop)? } else { return Err(()) };
        }
        parts.next().is_none().then_some(MacAddr(bytes)).ok_or(())
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// MAC addresses that have some bits in common.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MacMask {
    bits: MacAddr,
    mask: MacAddr,
}

impl MacMask {
    const EXACT: MacAddr = MacAddr([0xff; 6]);

    /// The addresses that are `mac` where `mask` has ones.
    pub fn new(mac: MacAddr, mask: MacAddr) -> MacMask {
        MacMask { bits: mac.and(mask), mask }
    }

    /// The bits that are looked at.
    pub fn mask(&self) -> MacAddr {
        self.mask
    }

    /// What they must be.
    pub fn bits(&self) -> MacAddr {
        self.bits
    }

    /// The address, when it is one.
    pub fn exact(&self) -> Option<MacAddr> {
        (self.mask == MacMask::EXACT).then_some(self.bits)
    }

    /// Whether an address is one of them.
    pub fn contains(&self, mac: MacAddr) -> bool {
        mac.and(self.mask) == self.bits
    }
}

impl From<MacAddr> for MacMask {
    fn from(mac: MacAddr) -> MacMask {
        MacMask { bits: mac, mask: MacMask::EXACT }
    }
}

/// Reads `02:00:00:00:00:01` or `02:00:00:00:00:00/ff:ff:ff:00:00:00`.
impl FromStr for MacMask {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.split_once('/') {
            Some((mac, mask)) => Ok(MacMask::new(mac.parse()?, mask.parse()?)),
            None => Ok(text.parse::<MacAddr>()?.into()),
        }
    }
}

impl fmt::Display for MacMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bits.fmt(f)?;
        if self.exact().is_some() { Ok(()) } else { write!(f, "/{}", self.mask) }
    }
}

/// An Ethernet protocol number in host order, never below 0x0600 (smaller values are 802.3 lengths).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EtherType(u16);

impl EtherType {
    /// IPv4, 0x0800.
    pub const IPV4: EtherType = EtherType(0x0800);
    /// ARP, 0x0806.
    pub const ARP: EtherType = EtherType(0x0806);
    /// IPv6, 0x86dd.
    pub const IPV6: EtherType = EtherType(0x86dd);

    /// The EtherType of this number, unless it is an 802.3 length.
    pub fn new(number: u16) -> Option<EtherType> {
        (number >= 0x0600).then_some(EtherType(number))
    }

    /// The number, in host order.
    pub fn number(self) -> u16 {
        self.0
    }
}

/// A decimal is the raw field as a little-endian host reads it (8 is 0x0800), as the original took it; hexadecimal
/// numbers and the names `ip`, `arp` and `ip6` mean themselves.
impl FromStr for EtherType {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let lower = text.to_ascii_lowercase();
        match lower.as_str() {
            "ip" => return Ok(EtherType::IPV4),
            "arp" => return Ok(EtherType::ARP),
            "ip6" => return Ok(EtherType::IPV6),
            _ => {}
        }
        let number = match lower.strip_prefix("0x") {
            Some(hex) if hex.len() <= 4 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                u16::from_str_radix(hex, 16).map_err(drop)?
            }
            Some(_) => return Err(()),
            None => decimal::<u16>(&lower).ok_or(())?.swap_bytes(),
        };
        EtherType::new(number).ok_or(())
    }
}

impl fmt::Display for EtherType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#06x}", self.0)
    }
}

/// Addresses of one family from the first to the last, both included; one address, a prefix, or any range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

impl AddressRange {
    /// The range from `first` to `last`, unless they are of two families or the wrong way round.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<AddressRange> {
        (first.is_ipv4() == last.is_ipv4() && first <= last).then_some(AddressRange { first, last })
    }

    /// The addresses whose first `length` bits are those of `ip`.
    pub fn prefix(ip: IpAddr, length: u8) -> Option<AddressRange> {
        let length = u32::from(length);
        match ip {
            IpAddr::V4(ip) if length <= 32 => {
                let host = u32::MAX.checked_shr(length).unwrap_or(0);
                let (first, last) = (ip.to_bits() & !host, ip.to_bits() | host);
                AddressRange::new(Ipv4Addr::from_bits(first).into(), Ipv4Addr::from_bits(last).into())
            }
            IpAddr::V6(ip) if length <= 128 => {
                let host = u128::MAX.checked_shr(length).unwrap_or(0);
                let (first, last) = (ip.to_bits() & !host, ip.to_bits() | host);
                AddressRange::new(Ipv6Addr::from_bits(first).into(), Ipv6Addr::from_bits(last).into())
            }
            _ => None,
        }
    }

    /// The first address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// The last address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// Whether the addresses are IPv4 ones.
    pub fn is_ipv4(&self) -> bool {
        self.first.is_ipv4()
    }

    /// Whether an address is one of them.
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.is_ipv4() && self.first <= ip && ip <= self.last
    }
}

impl From<IpAddr> for AddressRange {
    fn from(ip: IpAddr) -> AddressRange {
        AddressRange { first: ip, last: ip }
    }
}

/// Reads `10.0.0.1`, `10.0.0.0/8` or `10.0.0.1-10.0.0.9`.
impl FromStr for AddressRange {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let address = |text: &str| text.parse::<IpAddr>().map_err(drop);
        if let Some((ip, length)) = text.split_once('/') {
            return AddressRange::prefix(address(ip)?, decimal(length).ok_or(())?).ok_or(());
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        AddressRange::new(address(first)?, address(last)?).ok_or(())
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return self.first.fmt(f);
        }
        let same_bits = match (self.first, self.last) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            _ => 0,
        };
        let length = u8::try_from(same_bits).unwrap_or_default();
        if AddressRange::prefix(self.first, length) == Some(*self) {
            write!(f, "{}/{length}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// Numbers from the first to the last, both included: ports, or VLAN ids.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NumberRange {
    first: u16,
    last: u16,
}

impl NumberRange {
    /// The range from `first` to `last`, unless they are the wrong way round.
    pub fn new(first: u16, last: u16) -> Option<NumberRange> {
        (first <= last).then_some(NumberRange { first, last })
    }

    /// The first number.
    pub fn first(&self) -> u16 {
        self.first
    }

    /// The last number.
    pub fn last(&self) -> u16 {
        self.last
    }

    /// Whether a number is one of them.
    pub fn contains(&self, number: u16) -> bool {
        (self.first..=self.last).contains(&number)
    }
}

/// Reads `80` or `80-90`.
impl FromStr for NumberRange {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        NumberRange::new(decimal(first).ok_or(())?, decimal(last).ok_or(())?).ok_or(())
    }
}

impl fmt::Display for NumberRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// An IP protocol number (IANA "Assigned Internet Protocol Numbers").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Protocol(pub u8);

/// Names that are read and written, with their numbers. The first name of a number is the one written.
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
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let known = PROTOCOLS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        known.map(|&(_, number)| number).or_else(|| number(text)).map(Protocol).ok_or(())
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

/// Names of ICMP types, as nft has them (RFC 792 and IANA "ICMP Type Numbers").
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

/// Names of ICMPv6 types, as nft has them (RFC 4443, RFC 4861 and IANA "ICMPv6 Parameters").
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

/// The one number that a name stands for.
pub(crate) fn named_range(names: &[(&str, u8)], text: &str) -> Option<NumberRange> {
    let (_, number) = names.iter().find(|(name, _)| name.eq_ignore_ascii_case(text))?;
    NumberRange::new(u16::from(*number), u16::from(*number))
}

/// TCP flags (RFC 9293, RFC 3168): those that are looked at, and which of them must be on. Some is always looked at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TcpFlags {
    on: u8,
    mask: u8,
}

/// The flags, from the lowest bit of byte 13 of the TCP header.
const TCP_FLAGS: [&str; 8] = ["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"];

impl TcpFlags {
    /// The flags of `mask` are looked at, and those of `on` must be on; `None` when none is looked at, or one must be
    /// on that is not.
    pub fn new(on: u8, mask: u8) -> Option<TcpFlags> {
        (mask != 0 && on & !mask == 0).then_some(TcpFlags { on, mask })
    }

    /// Those that must be on.
    pub fn on(&self) -> u8 {
        self.on
    }

    /// Those that are looked at.
    pub fn mask(&self) -> u8 {
        self.mask
    }

    /// Whether a header's flags are as they must be.
    pub fn contains(&self, flags: u8) -> bool {
        flags & self.mask == self.on
    }

    fn read(text: &str) -> Option<u8> {
        match text.to_ascii_lowercase().as_str() {
            "none" => return Some(0),
            "all" => return Some(u8::MAX),
            _ => {}
        }
        text.split(',').try_fold(0, |flags, word| {
            let at = TCP_FLAGS.iter().position(|name| name.eq_ignore_ascii_case(word))?;
            Some(flags | 1 << at)
        })
    }

    fn text(flags: u8) -> String {
        match flags {
            0 => "none".to_string(),
            u8::MAX => "all".to_string(),
            _ => {
                let on = TCP_FLAGS.iter().enumerate().filter(|(at, _)| flags & 1 << at != 0);
                on.map(|(_, name)| *name).collect::<Vec<_>>().join(",")
            }
        }
    }
}

/// Reads `syn,ack` (these are on) or `syn/syn,ack` (of these two, this one only). `none` alone is no flag at all.
impl FromStr for TcpFlags {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (on, mask) = match text.split_once('/') {
            Some((on, mask)) => (TcpFlags::read(on).ok_or(())?, TcpFlags::read(mask).ok_or(())?),
            None => {
                let on = TcpFlags::read(text).ok_or(())?;
                (on, if on == 0 { u8::MAX } else { on })
            }
        };
        TcpFlags::new(on, mask).ok_or(())
    }
}

impl fmt::Display for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&TcpFlags::text(self.on))?;
        let short = self.mask == if self.on == 0 { u8::MAX } else { self.on };
        if short { Ok(()) } else { write!(f, "/{}", TcpFlags::text(self.mask)) }
    }
}

/// Which piece of a datagram a packet may be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Piece {
    /// `whole`: all of it, without an IPv6 fragment header.
    Whole,
    /// `first`: the first piece, or all of it behind an IPv6 fragment header.
    First,
    /// `later`: a later piece.
    Later,
    /// `piece`: first or later.
    Any,
}

const PIECES: [(&str, Piece); 4] =
    [("whole", Piece::Whole), ("first", Piece::First), ("later", Piece::Later), ("piece", Piece::Any)];

impl FromStr for Piece {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let found = PIECES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        found.map(|&(_, piece)| piece).ok_or(())
    }
}

impl fmt::Display for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = PIECES.iter().find(|(_, piece)| piece == self).map(|(name, _)| *name);
        f.write_str(name.unwrap_or_default())
    }
}

/// Reads plain decimal digits: no sign, no blanks, nothing that does not fit.
pub(crate) fn decimal<T: FromStr>(text: &str) -> Option<T> {
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Reads a byte written in decimal or, behind `0x`, in hexadecimal.
pub(crate) fn number(text: &str) -> Option<u8> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if hex.len() <= 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u8::from_str_radix(hex, 16).ok()
        }
        Some(_) => None,
        None => decimal(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_macs_are_the_same() {
        let mac: MacAddr = "1:2:3:4:5:6".parse().unwrap();
        assert_eq!(mac, "01:02:03:04:05:06".parse().unwrap());
        assert_eq!(mac.to_string(), "01:02:03:04:05:06");
        for bad in
            ["", "1:2:3:4:5", "1:2:3:4:5:6:7", "001:2:3:4:5:6", "1:2:3:4:5:g", "+1:2:3:4:5:6", "1::3:4:5:6"]
        {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn masks_of_macs() {
        let mask: MacMask = "02:ff:00:01:02:03/ff:00:00:00:00:00".parse().unwrap();
        assert_eq!(mask.to_string(), "02:00:00:00:00:00/ff:00:00:00:00:00");
        assert!(mask.contains(MacAddr([2, 9, 9, 9, 9, 9])) && !mask.contains(MacAddr([4; 6])));
        assert_eq!(
            "2:0:0:0:0:1".parse::<MacMask>().map(|m| m.to_string()),
            Ok("02:00:00:00:00:01".to_string())
        );
        assert!("2:0:0:0:0:1/24".parse::<MacMask>().is_err());
    }

    #[test]
    fn a_group_address_names_no_station() {
        assert!(MacAddr([2, 0, 0, 0, 0, 1]).is_station());
        assert!(!MacAddr([1, 0, 0x5e, 0, 0, 1]).is_station());
        assert!(!MacAddr([0; 6]).is_station());
    }

    #[test]
    fn decimal_ethertypes_are_the_raw_field_of_a_little_endian_host() {
        for (text, number) in
            [("8", 0x0800), ("1544", 0x0806), ("56710", 0x86dd), ("0x88CC", 0x88cc), ("ARP", 0x0806)]
        {
            assert_eq!(text.parse(), Ok(EtherType(number)), "{text}");
        }
        for bad in ["2048x", "5", "0x05ff", "0x", "0x10800", "65536", "-8", "0x+800", ""] {
            assert!(bad.parse::<EtherType>().is_err(), "{bad}");
        }
        // 2048 raw is 0x0008: a length, not a type; what was meant is 8 or 0x0800.
        assert!("2048".parse::<EtherType>().is_err());
    }

    #[test]
    fn ranges_of_addresses_and_ports() {
        for (text, canonical) in [
            ("10.0.0.1", "10.0.0.1"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("10.0.0.0-10.255.255.255", "10.0.0.0/8"),
            ("10.0.0.1-10.0.0.9", "10.0.0.1-10.0.0.9"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("10.0.0.1/32", "10.0.0.1"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("::/0", "::/0"),
            ("2001:db8::1-2001:db8::3", "2001:db8::1-2001:db8::3"),
        ] {
            let range: AddressRange = text.parse().unwrap();
            assert_eq!(range.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(range));
        }
        for bad in [
            "10.0.0.0/33",
            "::/129",
            "10.0.0.9-10.0.0.1",
            "10.0.0.1-::1",
            "10.0.0.1-",
            "/8",
            "10.0.0.0/-1",
            "10.0.0.0/+8",
        ] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
        let range: AddressRange = "10.0.0.0/8".parse().unwrap();
        let may = |ip: &str| range.contains(ip.parse().unwrap());
        assert!(may("10.0.0.0") && may("10.255.255.255") && !may("11.0.0.0") && !may("::ffff:10.0.0.1"));
        assert_eq!(
            "80-90".parse::<NumberRange>().map(|range| (range.contains(90), range.contains(91))),
            Ok((true, false))
        );
        assert!("90-80".parse::<NumberRange>().is_err() && "80-65536".parse::<NumberRange>().is_err());
    }

    #[test]
    fn tcp_flags_and_pieces() {
        for (text, on, mask, canonical) in [
            ("syn", 2, 2, "syn"),
            ("ACK,SYN", 0x12, 0x12, "syn,ack"),
            ("syn/syn,ack", 2, 0x12, "syn/syn,ack"),
            ("none", 0, 255, "none"),
            ("none/rst,fin", 0, 5, "none/fin,rst"),
            ("all", 255, 255, "all"),
            ("fin/all", 1, 255, "fin/all"),
            ("syn/syn", 2, 2, "syn"),
        ] {
            let flags: TcpFlags = text.parse().unwrap();
            assert_eq!(
                (flags.on(), flags.mask(), flags.to_string().as_str()),
                (on, mask, canonical),
                "{text}"
            );
            assert_eq!(canonical.parse(), Ok(flags));
        }
        for bad in ["", "syn,", "sin", "ack/syn", "none/none", "syn/", "/syn", "2", "syn/ack/syn"] {
            assert!(bad.parse::<TcpFlags>().is_err(), "{bad}");
        }
        for (name, piece) in PIECES {
            assert_eq!((name.parse(), piece.to_string().as_str()), (Ok(piece), name));
        }
        assert!("any".parse::<Piece>().is_err());
        assert!(
            TcpFlags::new(2, 0x12).unwrap().contains(0xc2) && !TcpFlags::new(2, 0x12).unwrap().contains(0x12)
        );
    }

    #[test]
    fn protocols_by_name_and_number() {
        assert_eq!("TCP".parse(), Ok(Protocol::TCP));
        assert_eq!("ipv6-icmp".parse::<Protocol>().map(|p| p.to_string()), Ok("icmp6".to_string()));
        assert_eq!("0x11".parse(), Ok(Protocol::UDP));
        assert_eq!("200".parse::<Protocol>().map(|p| p.to_string()), Ok("200".to_string()));
        assert!("256".parse::<Protocol>().is_err());
        assert!("0x+6".parse::<Protocol>().is_err());
    }
}
