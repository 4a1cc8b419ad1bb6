//! The questions by which backends are found: ARP requests (RFC 826) and neighbour solicitations
//! (RFC 4861), as frames.

use nfqd_shmctl::MacAddr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The sender of a question.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Asker {
    /// The MAC of the bridge.
    pub mac: MacAddr,
    /// An IPv4 address of the host on the network, if it has one.
    pub ip: Option<Ipv4Addr>,
}

/// The sender's address where the host has none: the IPv4 dummy address (RFC 7600). 0.0.0.0 would
/// make the question a probe of duplicate address detection (RFC 5227), and a backend that is just
/// starting give up its address.
const DUMMY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);

/// Returns a question for the MAC of an address. It goes to `known` alone if a MAC is known; `tag` is
/// the EtherType and the VLAN of the tag.
pub(super) fn question(
    asker: Asker,
    ip: IpAddr,
    known: Option<MacAddr>,
    tag: Option<(u16, u16)>,
) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => arp_request(asker, ip, known, tag),
        IpAddr::V6(ip) => solicitation(asker, ip, known, tag),
    }
}

/// Returns an Ethernet header.
fn ethernet(to: MacAddr, from: MacAddr, tag: Option<(u16, u16)>, ether_type: u16) -> Vec<u8> {
    let mut out = [to.0, from.0].concat();
    if let Some((protocol, vlan)) = tag {
        out.extend(protocol.to_be_bytes());
        out.extend(vlan.to_be_bytes());
    }
    out.extend(ether_type.to_be_bytes());
    out
}

fn arp_request(
    Asker { mac, ip: from }: Asker,
    ip: Ipv4Addr,
    known: Option<MacAddr>,
    tag: Option<(u16, u16)>,
) -> Vec<u8> {
    const REQUEST_OF_IPV4_ON_ETHERNET: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    /// The shortest Ethernet frame without its checksum.
    const SHORTEST: usize = 60;
    let mut out = ethernet(known.unwrap_or(MacAddr([0xff; 6])), mac, tag, 0x0806);
    out.extend(REQUEST_OF_IPV4_ON_ETHERNET);
    out.extend(mac.0);
    out.extend(from.unwrap_or(DUMMY).octets());
    out.extend([0; 6]);
    out.extend(ip.octets());
    out.resize(out.len().max(SHORTEST), 0);
    out
}

fn solicitation(
    Asker { mac, .. }: Asker,
    ip: Ipv6Addr,
    known: Option<MacAddr>,
    tag: Option<(u16, u16)>,
) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    let [.., a, b, c] = ip.octets();
    let (to_mac, to) = match known {
        Some(known) => (known, ip),
        None => {
            let group = Ipv6Addr::new(
                0xff02,
                0,
                0,
                0,
                0,
                1,
                0xff00 | u16::from(a),
                u16::from_be_bytes([b, c]),
            );
            (MacAddr([0x33, 0x33, 0xff, a, b, c]), group)
        }
    };
    // Type, code, checksum, reserved; the target; the option with the sender's MAC.
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(ip.octets());
    message.extend([1, 1]);
    message.extend(mac.0);
    let from = link_local(mac);
    let checksum = icmp6_checksum(from, to, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    let mut out = ethernet(to_mac, mac, tag, 0x86dd);
    out.extend([0x60, 0, 0, 0]);
    out.extend((message.len() as u16).to_be_bytes());
    out.extend([ICMPV6, 255]);
    out.extend(from.octets());
    out.extend(to.octets());
    out.extend(message);
    out
}

/// Returns the link-local address that a MAC makes (RFC 4291, appendix A).
fn link_local(MacAddr([a, b, c, d, e, f]): MacAddr) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// Returns the checksum of an ICMPv6 message (RFC 4443, section 2.3).
fn icmp6_checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let mut bytes = [from.octets(), to.octets()].concat();
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, 58]);
    bytes.extend(message);
    let words = bytes.chunks(2).map(|word| match *word {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        [high] => u32::from(high) << 8,
        _ => 0,
    });
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !(((folded & 0xffff) + (folded >> 16)) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{Icmpv6Type, SlicedPacket, TransportSlice};

    const ASKER: Asker = Asker { mac: MacAddr([2, 0, 0, 0, 0, 9]), ip: None };

    #[test]
    fn a_question_is_no_probe_of_duplicate_address_detection() {
        let frame = question(ASKER, IpAddr::from([10, 0, 0, 3]), None, Some((0x8100, 100)));
        assert_eq!(
            frame[..18],
            [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 0x81, 0, 0, 100, 8, 6]
        );
        assert_eq!(frame[18..26], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[32..36], [192, 0, 0, 8]);
        assert_eq!(frame[42..46], [10, 0, 0, 3]);
        let own = Asker { ip: Some(Ipv4Addr::new(10, 0, 0, 1)), ..ASKER };
        let known = MacAddr([2, 0, 0, 0, 0, 3]);
        let frame = question(own, IpAddr::from([10, 0, 0, 3]), Some(known), None);
        assert_eq!((&frame[..6], &frame[28..32]), (&known.0[..], &[10, 0, 0, 1][..]));
        assert_eq!(frame.len(), 60);
    }

    #[test]
    fn a_solicitation_is_valid() {
        let ip: Ipv6Addr = "2001:db8::12:3456".parse().unwrap();
        let frame = question(ASKER, ip.into(), None, None);
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0x12, 0x34, 0x56]);
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(TransportSlice::Icmpv6(icmp)) = packet.transport else { panic!("{packet:?}") };
        let (from, to) = (link_local(ASKER.mac), "ff02::1:ff12:3456".parse::<Ipv6Addr>().unwrap());
        assert!(icmp.is_checksum_valid(from.octets(), to.octets()));
        assert_eq!(from, "fe80::ff:fe00:9".parse::<Ipv6Addr>().unwrap());
        assert!(
            matches!(icmp.icmp_type(), Icmpv6Type::NeighborSolicitation),
            "{:?}",
            icmp.icmp_type()
        );
    }
}
