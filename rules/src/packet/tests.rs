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

fn ip(frame: &[u8]) -> Option<IpHeader> {
    Packet::from_frame(frame).and_then(|packet| packet.ip)
}

/// An IPv6 packet with these extension headers (number, bytes) and this protocol and payload.
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
        (ip.protocol, ip.l4, ip.fragment, ip.translatable),
        (Protocol::TCP, 20, Fragment::Whole, true)
    );
    assert_eq!(ip.ports, Some(Ports { source: 1234, destination: 80 }));
}

#[test]
fn one_vlan_tag_is_parsed_through_and_two_are_not() {
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
fn inconsistent_headers_are_absent() {
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
    // Padding behind the packet does no harm, and a wrong checksum is left to the receiver.
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
fn a_short_l4_header_has_no_checksum_to_update() {
    let mut frame = tcp4();
    frame.truncate(14 + 20 + 17);
    frame[17] = 37;
    let ip = ip(&frame).unwrap();
    assert!(ip.ports.is_some() && !ip.translatable);
}

#[test]
fn ipv6_extension_headers() {
    let udp = [0x12, 0x34, 0, 53, 0, 8, 0, 1];
    let options = |n: u8| [vec![0, n], vec![0; 6 + usize::from(n) * 8]].concat();
    let chain = [(0, options(0)), (60, options(1)), (43, options(0))];
    let ip_of = ip(&ipv6_frame(&chain, 17, &udp)).unwrap();
    assert_eq!((ip_of.protocol, ip_of.l4, ip_of.tos), (Protocol::UDP, 40 + 8 + 16 + 8, 0xab));
    assert_eq!(ip_of.ports, Some(Ports { source: 0x1234, destination: 53 }));
    // nftables stops at an authentication header.
    assert_eq!(ip(&ipv6_frame(&[(51, options(1))], 17, &udp)).unwrap().protocol, Protocol(51));
    // First, atomic and later fragments; a later one before another extension header is not parsed.
    let nft_fragment = |offset: u16| vec![0, 0, (offset >> 8) as u8, offset as u8, 0, 0, 0, 5];
    let first = ip(&ipv6_frame(&[(44, nft_fragment(1))], 17, &udp)).unwrap();
    assert_eq!((first.fragment, first.id, first.ports.is_some()), (Fragment::First, 5, true));
    let later = ip(&ipv6_frame(&[(44, nft_fragment(8))], 17, &udp)).unwrap();
    assert_eq!(
        (later.fragment, later.ports, later.protocol),
        (Fragment::Later, None, Protocol::UDP)
    );
    assert!(ip(&ipv6_frame(&[(44, nft_fragment(8))], 60, &udp)).is_none());
    // A chain that runs past the packet.
    assert!(ip(&ipv6_frame(&[(0, options(3))], 17, &udp)[..60]).is_none());
    // "No next header" is a protocol like any other.
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
