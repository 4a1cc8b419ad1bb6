//! The answer to the sender of a packet that no backend takes: a TCP reset, or an ICMP port
//! unreachable.

use etherparse::{
    EtherType, Ethernet2Header, Icmpv4Type, Icmpv6Type, IpNumber, Ipv4Header, Ipv6FlowLabel,
    Ipv6Header, TcpHeader, icmpv4, icmpv6,
};
use nfqd_rules::packet::{IpHeader, Packet};
use nfqd_shmctl::{Fragment, Protocol};
use std::net::IpAddr;

/// The TTL or hop limit of an answer.
const HOPS: u8 = 64;
/// Bytes of a packet that an ICMP error quotes: with both headers they fit into 576 bytes (RFC 1812,
/// 4.3.2.3).
const QUOTED: usize = 528;

/// Returns the frame that answers a packet, whose bytes from the IP header on are `payload`. `None`
/// for packets that are not answered: ICMP errors, resets, later fragments, and packets that are
/// not from one host to one host.
pub fn answer(packet: &Packet, payload: &[u8]) -> Option<Vec<u8>> {
    let ip = packet.ip.filter(|ip| ip.fragment != Fragment::Later)?;
    let unicast = |ip: IpAddr| !ip.is_multicast() && !ip.is_unspecified();
    if !packet.link.source.is_station() || !unicast(ip.source) || !unicast(ip.destination) {
        return None;
    }
    let body = if ip.protocol == Protocol::TCP { reset(&ip)? } else { unreachable(&ip, payload)? };
    let protocol = match (ip.protocol, ip.source) {
        (Protocol::TCP, _) => IpNumber::TCP,
        (_, IpAddr::V4(_)) => IpNumber::ICMP,
        (_, IpAddr::V6(_)) => IpNumber::IPV6_ICMP,
    };
    let ether_type = if ip.source.is_ipv4() { EtherType::IPV4 } else { EtherType::IPV6 };
    let link = Ethernet2Header {
        destination: packet.link.source.0,
        source: packet.link.destination.0,
        ether_type,
    };
    let mut out = link.to_bytes().to_vec();
    if let Some(tag) = packet.link.vlan {
        const ETHER_TYPE: usize = 12;
        out.splice(ETHER_TYPE..ETHER_TYPE, [0x81, 0].into_iter().chain(tag.to_be_bytes()));
    }
    match (ip.destination, ip.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let length = u16::try_from(body.len()).ok()?;
            let mut header =
                Ipv4Header::new(length, HOPS, protocol, from.octets(), to.octets()).ok()?;
            header.header_checksum = header.calc_header_checksum();
            out.extend_from_slice(&header.to_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header = Ipv6Header {
                traffic_class: 0,
                flow_label: Ipv6FlowLabel::ZERO,
                payload_length: u16::try_from(body.len()).ok()?,
                next_header: protocol,
                hop_limit: HOPS,
                source: from.octets(),
                destination: to.octets(),
            };
            out.extend_from_slice(&header.to_bytes());
        }
        _ => return None,
    }
    out.extend_from_slice(&body);
    Some(out)
}

/// Returns a TCP reset (RFC 9293, 3.10.7.1): with the sequence number that was acknowledged, or
/// acknowledging what was received.
fn reset(ip: &IpHeader) -> Option<Vec<u8>> {
    const RST: u8 = 4;
    const ACK: u8 = 16;
    let (ports, flags, numbers) = (ip.ports?, ip.tcp_flags?, ip.tcp_numbers?);
    if flags & RST != 0 {
        return None;
    }
    let acknowledges = flags & ACK != 0;
    let sequence = if acknowledges { numbers.acknowledgement } else { 0 };
    let mut header = TcpHeader::new(ports.destination, ports.source, sequence, 0);
    header.rst = true;
    if !acknowledges {
        header.ack = true;
        header.acknowledgment_number = numbers.sequence.wrapping_add(numbers.length);
    }
    header.checksum = match (ip.destination, ip.source) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            header.calc_checksum_ipv4_raw(from.octets(), to.octets(), &[])
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            header.calc_checksum_ipv6_raw(from.octets(), to.octets(), &[])
        }
        _ => return None,
    }
    .ok()?;
    Some(header.to_bytes().to_vec())
}

/// Returns a port unreachable (RFC 792, RFC 4443), unless the packet is ICMP itself.
fn unreachable(ip: &IpHeader, payload: &[u8]) -> Option<Vec<u8>> {
    if ip.protocol == Protocol::ICMP || ip.protocol == Protocol::ICMPV6 {
        return None;
    }
    let quoted = payload.get(..payload.len().min(QUOTED))?;
    let mut out = match (ip.destination, ip.source) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            let kind = Icmpv4Type::DestinationUnreachable(icmpv4::DestUnreachableHeader::Port);
            etherparse::Icmpv4Header::with_checksum(kind, quoted).to_bytes().to_vec()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let kind = Icmpv6Type::DestinationUnreachable(icmpv6::DestUnreachableCode::Port);
            let header =
                etherparse::Icmpv6Header::with_checksum(kind, from.octets(), to.octets(), quoted);
            header.ok()?.to_bytes().to_vec()
        }
        _ => return None,
    };
    out.extend_from_slice(quoted);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
    use nfqd_shmctl::MacAddr;

    fn answered(frame: &[u8], tag: bool) -> Option<Vec<u8>> {
        let mut packet = Packet::from_frame(frame).unwrap();
        packet.link.vlan = tag.then_some(7);
        answer(&packet, &frame[14..])
    }

    #[test]
    fn a_syn_is_reset_in_the_name_of_its_destination() {
        for v6 in [false, true] {
            let mut frame = Vec::new();
            let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
            let builder = if v6 {
                builder.ipv6([1; 16], [9; 16], 9)
            } else {
                builder.ipv4([10, 0, 0, 1], [10, 0, 0, 9], 9)
            };
            builder.tcp(1000, 80, u32::MAX, 9).syn().write(&mut frame, &[]).unwrap();
            let out = answered(&frame, false).unwrap();
            let link = Packet::from_frame(&out).unwrap().link;
            assert_eq!((link.destination, link.source), (MacAddr([2; 6]), MacAddr([4; 6])));
            let sliced = SlicedPacket::from_ethernet(&out).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = sliced.transport else { panic!("no TCP") };
            assert!(tcp.rst() && tcp.ack() && !tcp.syn());
            assert_eq!((tcp.source_port(), tcp.destination_port()), (80, 1000));
            assert_eq!(
                (tcp.sequence_number(), tcp.acknowledgment_number()),
                (0, 0),
                "one more than the SYN's"
            );
            let computed = match sliced.net.unwrap() {
                NetSlice::Ipv4(ip) => {
                    let header = ip.header().to_header();
                    assert_eq!(header.calc_header_checksum(), header.header_checksum);
                    tcp.to_header().calc_checksum_ipv4(&header, &[])
                }
                NetSlice::Ipv6(ip) => {
                    tcp.to_header().calc_checksum_ipv6(&ip.header().to_header(), &[])
                }
                NetSlice::Arp(_) => panic!("ARP"),
            };
            assert_eq!(computed.unwrap(), tcp.checksum());
        }
    }

    #[test]
    fn data_is_reset_at_the_acknowledged_number_and_resets_are_not_answered() {
        let tcp = |rst: bool| {
            let mut frame = Vec::new();
            let builder =
                PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 9], 9);
            let builder = builder.tcp(1000, 80, 5, 9).ack(77);
            let builder = if rst { builder.rst() } else { builder };
            builder.write(&mut frame, b"data").unwrap();
            frame
        };
        let out = answered(&tcp(false), true).unwrap();
        let packet = Packet::from_frame(&out).unwrap();
        assert_eq!(
            (packet.link.vlan, packet.ip.unwrap().tcp_numbers.unwrap().sequence),
            (Some(7), 77)
        );
        assert_eq!(answered(&tcp(true), false), None);
    }

    #[test]
    fn a_datagram_is_answered_with_port_unreachable() {
        let mut frame = Vec::new();
        let builder =
            PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 9], 9);
        builder.udp(1000, 53).write(&mut frame, &[7; 900]).unwrap();
        let out = answered(&frame, false).unwrap();
        assert_eq!(out.len(), 14 + 20 + 8 + QUOTED);
        let ip = Packet::from_frame(&out).unwrap().ip.unwrap();
        assert_eq!((ip.icmp_type, ip.icmp_code), (Some(3), Some(3)));
        assert_eq!(ip.quoted.unwrap().ports.unwrap().destination, 53);
        // An error is not answered by an error.
        assert_eq!(answered(&out, false), None);
    }
}
