//! Packet parsing: the headers of a frame, read once.
//!
//! Any bytes at all give a [`Packet`] or, below an Ethernet header, `None`. Headers that are not
//! consistent are absent (`ip`, `ports`), never guessed. The parser sees exactly what nftables sees
//! in the bridge family, so that the fast path and the engine agree: the EtherType behind one VLAN
//! tag (`skb_vlan_untag` removes one), an IP header only if version, header length and total length
//! are consistent (`nft_set_pktinfo_ipv4_validate`, `nft_set_pktinfo_ipv6_validate`), a protocol
//! behind IPv6 extension headers as `ipv6_find_hdr` walks them.

mod ipv6;
mod parse;
#[cfg(test)]
mod tests;

pub(crate) use parse::checksum_offset;

use etherparse::Ethernet2HeaderSlice;
use nfqd_shmctl::{EtherType, Fragment, MacAddr, Protocol};
use std::net::IpAddr;

/// The parsed headers of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The Ethernet header.
    pub link: Link,
    /// The IP header, if it is consistent.
    pub ip: Option<IpHeader>,
}

/// An Ethernet header, and one VLAN tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    /// Destination.
    pub destination: MacAddr,
    /// Source.
    pub source: MacAddr,
    /// The tag control information of the outer tag (IEEE 802.1Q), if there is one and the queue
    /// path shows it.
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

/// An IP header, and the parsed part of the layer behind it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IpHeader {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// The whole TOS or traffic-class byte.
    pub tos: u8,
    /// The packet's length by its header, in bytes from the IP header on; of a GSO super-packet,
    /// the whole length.
    pub length: u32,
    /// The protocol behind any IPv6 extension headers. An authentication header ends the walk, as
    /// in the kernel.
    pub protocol: Protocol,
    /// The position in a fragmented datagram.
    pub fragment: Fragment,
    /// The position by the first fragment header alone, if there are several: nftables can compare
    /// no other.
    pub nft_fragment: Fragment,
    /// Whether the fragment header of IPv6 is followed by another extension header. nftables cannot
    /// tell then whether a transport header follows, or another fragment header: such packets are
    /// dropped where rules compare it.
    pub hides_transport: bool,
    /// The datagram's identification, for fragments.
    pub id: u32,
    /// The ports of TCP, UDP, UDP-Lite, DCCP or SCTP, in a first fragment or a whole packet.
    pub ports: Option<Ports>,
    /// The source port alone, which a packet may have that ends behind it.
    pub source_port: Option<u16>,
    /// The TCP flags, in a first fragment or a whole packet.
    pub tcp_flags: Option<u8>,
    /// The type of ICMP (over IPv4) or ICMPv6 (over IPv6), in a first fragment or a whole packet.
    pub icmp_type: Option<u8>,
    /// The ICMP or ICMPv6 code.
    pub icmp_code: Option<u8>,
    /// The offset of the transport header, in bytes from the start of the IP header.
    pub l4: usize,
    /// The beginning of the packet that an unfragmented ICMP error quotes.
    pub quoted: Option<Quoted>,
    /// The sequence numbers of TCP, in a first fragment or a whole packet.
    pub tcp_numbers: Option<TcpNumbers>,
    /// Whether the checksum that an address change must update is in the packet, or there is none
    /// to update.
    pub translatable: bool,
}

impl IpHeader {
    /// Removes what was parsed behind the IP header.
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

/// The packet that an ICMP error quotes (RFC 792, RFC 4443), whole or a first fragment: its IP
/// header and ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quoted {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The ports of TCP, UDP and similar protocols.
    pub ports: Option<Ports>,
    /// The offset of its IP header, in bytes from the start of the error's own.
    pub l3: usize,
    /// The offset of its transport header, from the same start.
    pub l4: usize,
}

/// The sequence numbers of a TCP segment, to answer it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpNumbers {
    /// The sequence number.
    pub sequence: u32,
    /// The acknowledgement number.
    pub acknowledgement: u32,
    /// The length in sequence numbers: the payload in bytes, and one for each of SYN and FIN.
    pub length: u32,
}

/// Types of ICMP that are errors: unreachable, time exceeded, parameter problem (RFC 1122, 3.2.2).
pub const ICMP_ERRORS: [u8; 3] = [3, 11, 12];
/// Types of ICMPv6 that are errors: unreachable, too big, time exceeded, parameter problem (RFC
/// 4443).
pub const ICMP6_ERRORS: [u8; 4] = [1, 2, 3, 4];

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;

/// The IPv6 extension headers that nftables walks over (`ipv6_ext_hdr`): it stops at the
/// authentication header.
pub(crate) const EXTENSIONS: [u8; 4] = [HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION];

/// Length of an Ethernet header in bytes.
pub const ETHERNET_LEN: usize = 14;
/// Length of an IPv6 header without extension headers in bytes.
pub const IPV6_LEN: usize = 40;
/// Length of a VLAN tag in bytes.
pub const VLAN_LEN: usize = 4;

/// EtherTypes of the tags that the kernel removes (`eth_type_vlan`): 802.1Q and 802.1ad.
pub(crate) const VLAN_TYPES: [u16; 2] = [0x8100, 0x88a8];

/// Returns the offset of the IP header of a frame: behind the Ethernet header and at most one tag.
pub fn l3_offset(frame: &[u8]) -> usize {
    match u16_at(frame, 12) {
        Some(ether_type) if VLAN_TYPES.contains(&ether_type) => ETHERNET_LEN + VLAN_LEN,
        _ => ETHERNET_LEN,
    }
}

impl Packet {
    /// Parses a whole frame, from its destination MAC on. `None` if it has no Ethernet header, or a
    /// truncated VLAN tag.
    pub fn from_frame(frame: &[u8]) -> Option<Packet> {
        Packet::from_cut_frame(frame, frame.len())
    }

    /// Parses a frame of `length` bytes, of which `frame` is the beginning.
    pub fn from_cut_frame(frame: &[u8], length: usize) -> Option<Packet> {
        Packet::from_link(frame, length, false)
    }

    /// Parses a frame of a capture, which may have been taken before segmentation: a TCP packet with
    /// a total length of 0 is then as long as its frame (`iph_totlen` in linux/ip.h).
    pub fn from_captured_frame(frame: &[u8], length: usize) -> Option<Packet> {
        Packet::from_link(frame, length, true)
    }

    fn from_link(frame: &[u8], length: usize, gso: bool) -> Option<Packet> {
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
        Some(Packet::from_payload(link, payload, length, gso))
    }

    /// Parses what follows an Ethernet header: `payload` is a copy of the first bytes of `length`.
    /// A GSO super-packet (`gso`) may have a total length of 0.
    pub fn from_payload(link: Link, payload: &[u8], length: usize, gso: bool) -> Packet {
        let ip = match link.ether_type {
            Some(EtherType::IPV4) => parse::ipv4(payload, length, gso),
            Some(EtherType::IPV6) => ipv6::ipv6(payload, length),
            _ => None,
        };
        Packet { link, ip }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(pair.try_into().ok()?))
}
