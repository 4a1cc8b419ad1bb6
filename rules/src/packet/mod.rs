//! What a frame says about itself, read once.
//!
//! Guarantee: any bytes at all give a [`Packet`] or, below an Ethernet header, `None`; what does not hold together is
//! absent from it (`ip`, `ports`), never guessed. It sees exactly what nftables sees in the bridge family, so that the
//! fast path and the engine agree: the EtherType behind one VLAN tag (`skb_vlan_untag` takes off one), an IP header
//! only when version, header length and total length hold together (`nft_set_pktinfo_ipv4_validate`,
//! `nft_set_pktinfo_ipv6_validate`), a protocol behind IPv6 extension headers as `ipv6_find_hdr` walks them.

mod ipv6;
mod parse;
#[cfg(test)]
mod tests;

pub(crate) use ipv6::EXTENSIONS;
pub(crate) use parse::checksum_offset;

use etherparse::Ethernet2HeaderSlice;
use nfqd_shmctl::{EtherType, Fragment, MacAddr, Protocol};
use std::net::IpAddr;

/// The facts of one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// The Ethernet header.
    pub link: Link,
    /// The IP header, when it holds together.
    pub ip: Option<IpHeader>,
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
pub struct IpHeader {
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
    pub nft_fragment: Fragment,
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
    pub translatable: bool,
}

impl IpHeader {
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

/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = 14;
/// Bytes of an IPv6 header without extension headers.
pub const IPV6_LEN: usize = 40;
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
