//! What a frame says about itself, read once.
//!
//! Guarantee: any bytes at all give a [`Packet`] or, below an Ethernet header, `None`; what does not hold together is
//! absent from it (`ip`, `ports`), never guessed. It sees exactly what nftables sees in the bridge family, so that the
//! fast path and the engine agree: the EtherType behind one VLAN tag (`skb_vlan_untag` takes off one), an IP header
//! only when version, header length and total length hold together (`nft_set_pktinfo_ipv4_validate`,
//! `nft_set_pktinfo_ipv6_validate`), a protocol behind IPv6 extension headers as `ipv6_find_hdr` walks them.

use etherparse::{Ethernet2HeaderSlice, Ipv4HeaderSlice, Ipv6HeaderSlice};
use nfqd_shmctl::{EtherType, MacAddr, Protocol};
use std::net::IpAddr;

/// The facts of one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The Ethernet header.
    pub link: Link,
    /// The IP header, when it holds together.
    pub ip: Option<Ip>,
}

/// The Ethernet header, and one VLAN tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    /// Destination.
    pub destination: MacAddr,
    /// Source.
    pub source: MacAddr,
    /// The tag control information of the outer tag (IEEE 802.1Q), where there is one and the way in shows it.
    pub vlan: Option<u16>,
    /// The EtherType behind that tag; absent for 802.3 lengths.
    pub ether_type: Option<EtherType>,
}

impl Link {
    /// The id in the outer VLAN tag.
    pub fn vlan_id(&self) -> Option<u16> {
        const ID: u16 = 0x0fff;
        self.vlan.map(|tag| tag & ID)
    }
}

/// An IP header and what is known of the layer behind it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ip {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// The whole TOS or traffic-class byte.
    pub tos: u8,
    /// The packet's length as its header has it, in bytes from the IP header on; of a super-packet, the whole.
    pub length: u32,
    /// The protocol behind any IPv6 extension headers. An authentication header ends the walk, as in the kernel.
    pub protocol: Protocol,
    /// Whether this is a piece of a datagram.
    pub fragment: Fragment,
    /// The same by the first fragment header alone, if there are several: what nftables can compare.
    pub piece: Fragment,
    /// Whether the fragment header of IPv6 is followed by another extension header. nftables cannot tell then whether a
    /// transport header follows, or another fragment header: such packets are dropped where rules look at it.
    pub hides_transport: bool,
    /// The datagram's identification, for pieces.
    pub id: u32,
    /// The ports of TCP, UDP, UDP-Lite, DCCP or SCTP, in the first piece only.
    pub ports: Option<Ports>,
    /// The source port alone, which a packet may have that ends behind it.
    pub source_port: Option<u16>,
    /// The flags of TCP, in the first piece only.
    pub tcp_flags: Option<u8>,
    /// The type of ICMP (over IPv4) or ICMPv6 (over IPv6), in the first piece only.
    pub icmp_type: Option<u8>,
    /// Its code.
    pub icmp_code: Option<u8>,
    /// Where the header begins, in bytes from the start of the IP header.
    pub l4: usize,
    /// The beginning of the packet that a whole ICMP error is about.
    pub quoted: Option<Quoted>,
    /// TCP's sequence numbers, in the first piece only.
    pub tcp_numbers: Option<TcpNumbers>,
    /// Whether the checksum field that an address change must mend is in the packet, or there is none to mend.
    pub mendable: bool,
}

impl Ip {
    /// Forgets what is behind the IP header.
    pub(crate) fn hide_transport(&mut self) {
        (self.ports, self.source_port, self.tcp_flags) = (None, None, None);
        (self.icmp_type, self.icmp_code) = (None, None);
    }
}

/// A pair of ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ports {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
}

/// What an ICMP error quotes of the packet that it is about (RFC 792, RFC 4443): the IP header, of a first or whole packet,
/// and the ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quoted {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The ports of TCP and UDP, and their like.
    pub ports: Option<Ports>,
    /// Where its IP header begins, in bytes from the start of the error's own.
    pub l3: usize,
    /// Where its transport header begins, likewise.
    pub l4: usize,
}

/// TCP's numbers, to answer a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpNumbers {
    /// Its sequence number.
    pub sequence: u32,
    /// Its acknowledgement number.
    pub acknowledgement: u32,
    /// How many numbers it takes up: its payload in bytes, and one for each of SYN and FIN.
    pub length: u32,
}

/// Types of ICMP that are errors: unreachable, time exceeded, parameter problem (RFC 1122, 3.2.2).
pub const ICMP_ERRORS: [u8; 3] = [3, 11, 12];
/// Types of ICMPv6 that are errors: unreachable, too big, time exceeded, parameter problem (RFC 4443).
pub const ICMP6_ERRORS: [u8; 4] = [1, 2, 3, 4];

/// Which piece of a datagram a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fragment {
    /// All of it.
    Whole,
    /// The first piece, which has the ports. An IPv6 datagram of one piece with a fragment header is one too.
    First,
    /// A later piece.
    Later,
}

/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
/// Bytes that one VLAN tag adds.
pub const VLAN_LEN: usize = 4;

/// Tags that the kernel takes off (`eth_type_vlan`): 802.1Q and 802.1ad.
pub(crate) const VLAN_TYPES: [u16; 2] = [0x8100, 0x88a8];

/// Where the IP header of a frame begins: behind the Ethernet header and at most one tag.
pub fn l3_offset(frame: &[u8]) -> usize {
    match u16_at(frame, 12) {
        Some(ether_type) if VLAN_TYPES.contains(&ether_type) => ETHERNET_LEN + VLAN_LEN,
        _ => ETHERNET_LEN,
    }
}

impl Packet {
    /// Reads a whole frame, from its destination MAC on. `None` when it has no Ethernet header, or a VLAN tag that is
    /// cut.
    pub fn from_frame(frame: &[u8]) -> Option<Packet> {
        Packet::from_cut_frame(frame, frame.len())
    }

    /// Reads a frame of which `frame` is the beginning, and which was `length` bytes long.
    pub fn from_cut_frame(frame: &[u8], length: usize) -> Option<Packet> {
        let header = Ethernet2HeaderSlice::from_slice(frame.get(..ETHERNET_LEN)?).ok()?;
        let l3 = l3_offset(frame);
        let tagged = l3 != ETHERNET_LEN;
        let link = Link {
            destination: MacAddr(header.destination()),
            source: MacAddr(header.source()),
            vlan: if tagged { Some(u16_at(frame, 14)?) } else { None },
            ether_type: EtherType::new(u16_at(frame, l3 - 2)?),
        };
        let payload = frame.get(l3..).unwrap_or_default();
        let length = length.max(frame.len()).saturating_sub(l3);
        Some(Packet::from_payload(link, payload, length, false))
    }

    /// Reads what is behind the Ethernet header: `payload` is a copy of the first bytes of `length`. A super-packet
    /// (`gso`) may have a total length of 0.
    pub fn from_payload(link: Link, payload: &[u8], length: usize, gso: bool) -> Packet {
        let ip = match link.ether_type {
            Some(EtherType::IPV4) => ipv4(payload, length, gso),
            Some(EtherType::IPV6) => ipv6(payload, length),
            _ => None,
        };
        Packet { link, ip }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(pair.try_into().ok()?))
}

/// The protocols whose first four bytes are ports.
fn has_ports(protocol: Protocol) -> bool {
    matches!(protocol.0, 6 | 17 | 33 | 132 | 136)
}

fn ports(payload: &[u8], protocol: Protocol, l4: usize) -> Option<Ports> {
    if !has_ports(protocol) {
        return None;
    }
    Some(Ports { source: u16_at(payload, l4)?, destination: u16_at(payload, l4 + 2)? })
}

/// What is known of the layer behind the IP header, unless it is a later piece.
struct Transport {
    ports: Option<Ports>,
    source_port: Option<u16>,
    tcp_flags: Option<u8>,
    icmp_type: Option<u8>,
    icmp_code: Option<u8>,
}

fn transport(payload: &[u8], protocol: Protocol, icmp: Protocol, fragment: Fragment, l4: usize) -> Transport {
    const TCP_FLAGS: usize = 13;
    let first = fragment != Fragment::Later;
    let byte = |wanted: bool, at: usize| payload.get(l4 + at).copied().filter(|_| first && wanted);
    Transport {
        ports: if first { ports(payload, protocol, l4) } else { None },
        source_port: if first && has_ports(protocol) { u16_at(payload, l4) } else { None },
        tcp_flags: byte(protocol == Protocol::TCP, TCP_FLAGS),
        icmp_type: byte(protocol == icmp, 0),
        icmp_code: byte(protocol == icmp, 1),
    }
}

/// Where the checksum that covers the addresses stands behind the L4 header's start: the protocols that
/// `nft_payload_l4csum_offset` mends.
pub(crate) fn checksum_offset(protocol: Protocol) -> Option<usize> {
    match protocol {
        Protocol::TCP => Some(16),
        Protocol::UDP | Protocol::UDPLITE => Some(6),
        Protocol::ICMPV6 => Some(2),
        _ => None,
    }
}

/// Reads what an ICMP error quotes; `l4` is where its ICMP header begins.
fn quoted(payload: &[u8], l4: usize, v4: bool) -> Option<Quoted> {
    const ICMP_HEADER: usize = 8;
    let l3 = l4 + ICMP_HEADER;
    let inner = payload.get(l3..)?;
    let (source, destination, protocol, len, later) = if v4 {
        let header = Ipv4HeaderSlice::from_slice(inner).ok()?;
        let later = header.fragments_offset().value() != 0;
        let (source, destination) = (header.source_addr().into(), header.destination_addr().into());
        (source, destination, Protocol(header.protocol().0), usize::from(header.ihl()) * 4, later)
    } else {
        let header = Ipv6HeaderSlice::from_slice(inner).ok()?;
        let (source, destination) = (header.source_addr().into(), header.destination_addr().into());
        (source, destination, Protocol(header.next_header().0), IPV6_LEN, false)
    };
    // Of a later piece it cannot be told whose it was; nor behind extension headers.
    if later || EXTENSIONS.contains(&protocol.0) && !v4 {
        return None;
    }
    let l4 = l3 + len;
    Some(Quoted { source, destination, protocol, ports: ports(payload, protocol, l4), l3, l4 })
}

fn tcp_numbers(payload: &[u8], length: usize, l4: usize) -> Option<TcpNumbers> {
    let word = |at: usize| {
        let bytes = payload.get(l4 + at..l4 + at + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let &[data_offset, flags] = payload.get(l4 + 12..l4 + 14)? else { return None };
    let header = usize::from(data_offset >> 4) * 4;
    let turns = u32::from(flags & 1) + u32::from(flags >> 1 & 1);
    let length = length.saturating_sub(l4 + header) as u32 + turns;
    Some(TcpNumbers { sequence: word(4)?, acknowledgement: word(8)?, length })
}

fn mendable(payload: &[u8], protocol: Protocol, fragment: Fragment, l4: usize) -> bool {
    match checksum_offset(protocol) {
        Some(offset) if fragment != Fragment::Later => u16_at(payload, l4 + offset).is_some(),
        _ => true,
    }
}

fn ipv4(payload: &[u8], length: usize, gso: bool) -> Option<Ip> {
    let header = Ipv4HeaderSlice::from_slice(payload).ok()?;
    let header_len = usize::from(header.ihl()) * 4;
    let total_len = match usize::from(header.total_len()) {
        0 if gso => length,
        total_len => total_len,
    };
    if total_len > length || total_len < header_len {
        return None;
    }
    let protocol = Protocol(header.protocol().0);
    let fragment = match (header.fragments_offset().value(), header.more_fragments()) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    };
    let Transport { ports, source_port, tcp_flags, icmp_type, icmp_code } =
        transport(payload, protocol, Protocol::ICMP, fragment, header_len);
    Some(Ip {
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        tos: *payload.get(1)?,
        length: u32::from(header.total_len()),
        protocol,
        fragment,
        piece: fragment,
        hides_transport: false,
        id: u32::from(header.identification()),
        ports,
        source_port,
        tcp_flags,
        icmp_type,
        icmp_code,
        l4: header_len,
        quoted: icmp_type
            .filter(|kind| ICMP_ERRORS.contains(kind) && fragment == Fragment::Whole)
            .and_then(|_| quoted(payload, header_len, true)),
        tcp_numbers: tcp_flags.and_then(|_| tcp_numbers(payload, total_len, header_len)),
        mendable: mendable(payload, protocol, fragment, header_len),
    })
}

/// IPv6 extension headers (`ipv6_ext_hdr`), without the authentication header, at which nftables stops.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// What may not follow a fragment header of a later piece, besides the four above: it would be walked, too.
const AUTHENTICATION: u8 = 51;

/// The extension headers that nftables walks over.
pub(crate) const EXTENSIONS: [u8; 4] = [HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION];

/// Bytes of an IPv6 header.
pub const IPV6_LEN: usize = 40;

/// A fragment header.
struct FragmentHeader {
    next: u8,
    offset: u16,
    id: u32,
}

/// The first fragment header of a chain, authentication headers included, as `ipv6_find_hdr` looks for one.
fn fragment_behind(payload: &[u8], mut next: u8, mut at: usize) -> Option<FragmentHeader> {
    loop {
        let &[following, len] = payload.get(at..at + 2)? else { return None };
        let len = usize::from(len);
        at += match next {
            FRAGMENT => {
                let half = |at: usize| u32::from(u16_at(payload, at).unwrap_or(0));
                let id = half(at + 4) << 16 | half(at + 6);
                return Some(FragmentHeader { next: following, offset: u16_at(payload, at + 2)? & !7, id });
            }
            // Its length counts in fours, less two (RFC 4302).
            AUTHENTICATION => (len + 2) * 4,
            ROUTING => {
                payload.get(at..at + 4)?;
                (len + 1) * 8
            }
            HOP_BY_HOP | DESTINATION => (len + 1) * 8,
            _ => return None,
        };
        next = following;
    }
}

fn ipv6(payload: &[u8], length: usize) -> Option<Ip> {
    let header = Ipv6HeaderSlice::from_slice(payload).ok()?;
    if usize::from(header.payload_length()) + IPV6_LEN > length {
        return None;
    }
    let mut next = header.next_header().0;
    let mut at = IPV6_LEN;
    let mut fragment = Fragment::Whole;
    let mut piece = None;
    let mut hides_transport = false;
    let mut id = 0;
    // Each turn moves on by at least 8 bytes.
    while EXTENSIONS.contains(&next) {
        let &[following, len] = payload.get(at..at + 2)? else { return None };
        if next == ROUTING {
            payload.get(at..at + 4)?;
        }
        if next != FRAGMENT {
            next = following;
            at += (usize::from(len) + 1) * 8;
            continue;
        }
        let offset = u16_at(payload, at + 2)? & !7;
        id = u32::from(u16_at(payload, at + 4).unwrap_or(0)) << 16
            | u32::from(u16_at(payload, at + 6).unwrap_or(0));
        next = following;
        at += 8;
        let this = if offset == 0 { Fragment::First } else { Fragment::Later };
        hides_transport |= piece.is_none() && EXTENSIONS.contains(&next);
        piece.get_or_insert(this);
        if offset != 0 {
            fragment = Fragment::Later;
            // The kernel gives up on a later piece whose next header is an extension header.
            if EXTENSIONS.contains(&next) || next == AUTHENTICATION {
                return None;
            }
            break;
        }
        fragment = Fragment::First;
    }
    if next == AUTHENTICATION && fragment == Fragment::Whole {
        // nftables stops here for the protocol, but looks on for a fragment header (`nft_exthdr_ipv6_eval`).
        if let Some(found) = fragment_behind(payload, next, at) {
            fragment = if found.offset == 0 { Fragment::First } else { Fragment::Later };
            hides_transport = EXTENSIONS.contains(&found.next);
            id = found.id;
        }
    }
    // `thoff > U16_MAX` in the kernel.
    if at > usize::from(u16::MAX) {
        return None;
    }
    let protocol = Protocol(next);
    let Transport { ports, source_port, tcp_flags, icmp_type, icmp_code } =
        transport(payload, protocol, Protocol::ICMPV6, fragment, at);
    Some(Ip {
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        tos: header.traffic_class(),
        length: u32::from(header.payload_length()) + IPV6_LEN as u32,
        protocol,
        fragment,
        piece: piece.unwrap_or(fragment),
        hides_transport,
        id,
        ports,
        source_port,
        tcp_flags,
        icmp_type,
        icmp_code,
        l4: at,
        quoted: icmp_type
            .filter(|kind| ICMP6_ERRORS.contains(kind) && fragment == Fragment::Whole)
            .and_then(|_| quoted(payload, at, false)),
        tcp_numbers: tcp_flags
            .and_then(|_| tcp_numbers(payload, usize::from(header.payload_length()) + IPV6_LEN, at)),
        mendable: mendable(payload, protocol, fragment, at),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    fn tcp4() -> Vec<u8> {
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(1234, 80, 7, 1000);
        let mut frame = Vec::new();
        builder.write(&mut frame, b"hello").unwrap();
        frame
    }

    fn ip(frame: &[u8]) -> Option<Ip> {
        Packet::from_frame(frame).and_then(|packet| packet.ip)
    }

    /// An IPv6 packet of these extension headers (number, bytes) and this protocol and payload.
    fn ipv6_frame(extensions: &[(u8, Vec<u8>)], last: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
        let mut chain: Vec<u8> = Vec::new();
        for (index, (_, bytes)) in extensions.iter().enumerate() {
            let next = extensions.get(index + 1).map_or(last, |(number, _)| *number);
            chain.push(next);
            chain.extend(&bytes[1..]);
        }
        let first = extensions.first().map_or(last, |(number, _)| *number);
        let len = (chain.len() + body.len()) as u16;
        frame.extend([0x6a, 0xb0, 0, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend([first, 64]);
        frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        frame.extend(chain);
        frame.extend(body);
        frame
    }

    #[test]
    fn a_tcp_packet() {
        let packet = Packet::from_frame(&tcp4()).unwrap();
        assert_eq!(packet.link.ether_type, Some(EtherType::IPV4));
        let ip = packet.ip.unwrap();
        assert_eq!(
            (ip.protocol, ip.l4, ip.fragment, ip.mendable),
            (Protocol::TCP, 20, Fragment::Whole, true)
        );
        assert_eq!(ip.ports, Some(Ports { source: 1234, destination: 80 }));
    }

    #[test]
    fn one_tag_is_looked_through_and_two_are_not() {
        let plain = tcp4();
        let tagged = [&plain[..12], &[0x81, 0, 0, 7], &plain[12..]].concat();
        let packet = Packet::from_frame(&tagged).unwrap();
        assert_eq!((packet.link.vlan, packet.link.ether_type), (Some(7), Some(EtherType::IPV4)));
        assert_eq!(packet.ip, ip(&plain));
        let twice = [&tagged[..12], &[0x88, 0xa8, 0, 9], &tagged[12..]].concat();
        let packet = Packet::from_frame(&twice).unwrap();
        assert_eq!((packet.link.vlan, packet.link.ether_type), (Some(9), EtherType::new(0x8100)));
        assert_eq!(packet.ip, None);
    }

    #[test]
    fn what_does_not_hold_together_is_no_ip() {
        let good = tcp4();
        let broken = |at: usize, value: u8| {
            let mut frame = good.clone();
            frame[at] = value;
            ip(&frame)
        };
        assert!(ip(&good).is_some());
        assert!(broken(14, 0x65).is_none(), "version 6");
        assert!(broken(14, 0x44).is_none(), "header of 16 bytes");
        assert!(broken(14, 0x4f).is_none(), "header longer than the packet");
        assert!(broken(16, 0xff).is_none(), "total length beyond the frame");
        assert!(broken(17, 19).is_none(), "total length below the header");
        assert!(ip(&good[..good.len() - 1]).is_none(), "cut frame");
        let captured = Packet::from_cut_frame(&good[..good.len() - 1], good.len()).unwrap();
        assert_eq!(captured.ip, ip(&good), "cut by the capture only");
        // Padding behind the packet is no harm, and a wrong checksum is the receiver's matter.
        assert_eq!(ip(&[&good[..], &[0; 9]].concat()), ip(&good));
        assert!(broken(24, 0).is_some());
    }

    #[test]
    fn fragments() {
        let with = |flags: u8, offset: u8| {
            let mut frame = tcp4();
            (frame[20], frame[21]) = (flags, offset);
            ip(&frame).unwrap()
        };
        assert_eq!(with(0x40, 0).fragment, Fragment::Whole);
        assert_eq!((with(0x20, 0).fragment, with(0x20, 0).ports.is_some()), (Fragment::First, true));
        assert_eq!((with(0x20, 1).fragment, with(0, 1).ports), (Fragment::Later, None));
    }

    #[test]
    fn a_short_l4_header_has_no_checksum_to_mend() {
        let mut frame = tcp4();
        frame.truncate(14 + 20 + 17);
        frame[17] = 37;
        let ip = ip(&frame).unwrap();
        assert!(ip.ports.is_some() && !ip.mendable);
    }

    #[test]
    fn ipv6_extension_headers() {
        let udp = [0x12, 0x34, 0, 53, 0, 8, 0, 1];
        let options = |n: u8| [vec![0, n], vec![0; 6 + usize::from(n) * 8]].concat();
        let chain = [(0, options(0)), (60, options(1)), (43, options(0))];
        let ip_of = ip(&ipv6_frame(&chain, 17, &udp)).unwrap();
        assert_eq!((ip_of.protocol, ip_of.l4, ip_of.tos), (Protocol::UDP, 40 + 8 + 16 + 8, 0xab));
        assert_eq!(ip_of.ports, Some(Ports { source: 0x1234, destination: 53 }));
        // An authentication header is where nftables stops.
        assert_eq!(ip(&ipv6_frame(&[(51, options(1))], 17, &udp)).unwrap().protocol, Protocol(51));
        // First, atomic and later fragments; a later one before another extension header is given up.
        let piece = |offset: u16| vec![0, 0, (offset >> 8) as u8, offset as u8, 0, 0, 0, 5];
        let first = ip(&ipv6_frame(&[(44, piece(1))], 17, &udp)).unwrap();
        assert_eq!((first.fragment, first.id, first.ports.is_some()), (Fragment::First, 5, true));
        let later = ip(&ipv6_frame(&[(44, piece(8))], 17, &udp)).unwrap();
        assert_eq!((later.fragment, later.ports, later.protocol), (Fragment::Later, None, Protocol::UDP));
        assert!(ip(&ipv6_frame(&[(44, piece(8))], 60, &udp)).is_none());
        // A chain that leaves the packet.
        assert!(ip(&ipv6_frame(&[(0, options(3))], 17, &udp)[..60]).is_none());
        // No next header is a protocol like another.
        assert_eq!(ip(&ipv6_frame(&[], 59, &[])).unwrap().protocol, Protocol(59));
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..120), v6: bool) {
            let mut frame = bytes;
            if frame.len() > 15 {
                frame[12..15].copy_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x45] });
            }
            let packet = Packet::from_frame(&frame);
            prop_assert_eq!(packet.is_some(), frame.len() >= 14 && (l3_offset(&frame) == 14 || frame.len() >= 18));
        }
    }
}
