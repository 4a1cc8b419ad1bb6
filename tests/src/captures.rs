//! The corpus of captures in `tests/captures`, and how it is made. Each file is about one thing
//! that parsers get wrong.
//!
//! `cargo run -p nfqd-tests --bin captures` writes the files; a test compares them with this code.

use crate::frames::{HOSTS, MIDDLEBOXES, checksum};

/// A capture's name and its frames.
pub type Capture = (&'static str, Vec<Vec<u8>>);

/// The policies that the captures are replayed under, beside the captures.
pub const POLICIES: [&str; 3] = ["filters", "closed", "balanced"];

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

fn mac(text: &str) -> Vec<u8> {
    text.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("a MAC")).collect()
}

/// A frame from the client to the first middlebox: tags, the EtherType and the payload.
fn frame(tags: &[[u8; 4]], ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = [mac(MIDDLEBOXES[0]), mac(HOSTS[0])].concat();
    tags.iter().for_each(|tag| out.extend(tag));
    out.extend(ether_type.to_be_bytes());
    out.extend(payload);
    out.resize(out.len().max(24), 0);
    out
}

/// An IPv4 packet from 10.0.0.4 to 10.0.0.2 with these flags and offset, and a total length that is
/// `more` too large.
fn ipv4_saying(protocol: u8, fragment: u16, body: &[u8], more: i32) -> Vec<u8> {
    let total = (20 + body.len() as i32 + more) as u16;
    let mut header = vec![0x45, 16];
    header.extend(total.to_be_bytes());
    header.extend([0, 7]);
    header.extend(fragment.to_be_bytes());
    header.extend([64, protocol, 0, 0, 10, 0, 0, 4, 10, 0, 0, 2]);
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum);
    [&header, body].concat()
}

fn ipv4(protocol: u8, body: &[u8]) -> Vec<u8> {
    ipv4_saying(protocol, 0x4000, body, 0)
}

/// An IPv6 packet from 2001:db8::4 to 2001:db8::2 with these extension headers: a number, and bytes
/// of which the first is set to the next header.
fn ipv6(extensions: &[(u8, Vec<u8>)], last: u8, body: &[u8]) -> Vec<u8> {
    let next = |index: usize| extensions.get(index).map_or(last, |(number, _)| *number);
    let mut chain = Vec::new();
    for (index, (_, bytes)) in extensions.iter().enumerate() {
        chain.push(next(index + 1));
        chain.extend(&bytes[1..]);
    }
    let mut out = vec![0x61, 0, 0, 0];
    out.extend(((chain.len() + body.len()) as u16).to_be_bytes());
    out.extend([next(0), 64]);
    for host in [4, 2] {
        out.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host]);
    }
    [out, chain, body.to_vec()].concat()
}

/// The payload of the IP header: ports 81 to 80, SYN; or an echo request.
fn body(protocol: u8, more: usize) -> Vec<u8> {
    let mut out = match protocol {
        TCP => vec![0, 81, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 1, 0, 0x12, 0x34, 0, 0],
        UDP => [&[0, 81, 0, 80][..], &(8 + more as u16).to_be_bytes(), &[0x12, 0x34]].concat(),
        ICMP => vec![8, 0, 0x12, 0x34, 0, 1, 0, 1],
        ICMP6 => vec![128, 0, 0x12, 0x34, 0, 1, 0, 1],
        _ => Vec::new(),
    };
    out.extend(vec![7; more]);
    out
}

/// Options that fill their header of `8 * (len + 1)` bytes with padding.
fn options(len: u8) -> Vec<u8> {
    let mut out = vec![0, len, 1, 4 + len * 8];
    out.resize(8 * (usize::from(len) + 1), 0);
    out
}

fn fragment_header(offset: u16, more: bool) -> (u8, Vec<u8>) {
    (
        44,
        [vec![0, 0], (offset << 3 | u16::from(more)).to_be_bytes().to_vec(), vec![0, 0, 0, 9]]
            .concat(),
    )
}

/// The payloads of the captures behind the tags: IPv4, IPv6 and ARP.
fn payloads() -> Vec<(u16, Vec<u8>)> {
    let arp = [
        vec![0, 1, 8, 0, 6, 4, 0, 1],
        mac(HOSTS[0]),
        vec![10, 0, 0, 4, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2],
    ]
    .concat();
    vec![
        (0x0800, ipv4(TCP, &body(TCP, 9))),
        (0x0800, ipv4(UDP, &body(UDP, 9))),
        (0x0800, ipv4(ICMP, &body(ICMP, 9))),
        (0x86dd, ipv6(&[], TCP, &body(TCP, 9))),
        (0x86dd, ipv6(&[], UDP, &body(UDP, 9))),
        (0x86dd, ipv6(&[], ICMP6, &body(ICMP6, 9))),
        (0x0806, arp),
        (0x88cc, vec![2, 7, 4, 1, 2, 3]),
    ]
}

fn tagged(stacks: &[&[[u8; 4]]]) -> Vec<Vec<u8>> {
    let all = stacks.iter().flat_map(|tags| {
        payloads().into_iter().map(move |(kind, inside)| frame(tags, kind, &inside))
    });
    all.collect()
}

/// Every chain of extension headers in the order of RFC 8200, section 4.1, with and without each.
fn chains() -> Vec<Vec<u8>> {
    let all = [
        (0, options(0)),
        (60, options(1)),
        (43, vec![0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        fragment_header(0, true),
        (51, vec![0, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]),
        (60, options(0)),
    ];
    let mut out = Vec::new();
    for which in 0..1_u8 << all.len() {
        let some = all
            .iter()
            .enumerate()
            .filter(|(at, _)| which & 1 << at != 0)
            .map(|(_, header)| header.clone());
        let chain: Vec<(u8, Vec<u8>)> = some.collect();
        for last in [TCP, UDP, ICMP6, 50, 59, 135] {
            out.push(frame(&[], 0x86dd, &ipv6(&chain, last, &body(last, 12))));
        }
    }
    out
}

fn fragments() -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for protocol in [TCP, UDP, ICMP] {
        // Whole, first, middle, last; one that overlaps the transport header; one so small that it
        // cuts it.
        for fragment in [0, 0x4000, 0x2000, 0x2003, 0x0003, 0x0001, 0x1fff, 0x8000] {
            out.push(frame(&[], 0x0800, &ipv4_saying(protocol, fragment, &body(protocol, 24), 0)));
        }
        out.push(frame(&[], 0x0800, &ipv4_saying(protocol, 0x2000, &body(protocol, 0)[..8], 0)));
        out.push(frame(
            &[[0x81, 0, 0, 2]],
            0x0800,
            &ipv4_saying(protocol, 0x0003, &body(protocol, 24), 0),
        ));
    }
    for protocol in [TCP, UDP, ICMP6] {
        for (offset, more) in
            [(0, false), (0, true), (3, true), (3, false), (1, true), (0x1fff, false)]
        {
            let chains = [vec![], vec![(0, options(0))], vec![(60, options(1))]];
            for before in chains {
                let chain = [before, vec![fragment_header(offset, more)]].concat();
                out.push(frame(&[], 0x86dd, &ipv6(&chain, protocol, &body(protocol, 24))));
            }
        }
        out.push(frame(
            &[],
            0x86dd,
            &ipv6(&[fragment_header(0, true)], protocol, &body(protocol, 0)[..8]),
        ));
        let authentication = (51, vec![0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]);
        let hidden = [authentication.clone(), fragment_header(0, true), (60, options(0))];
        out.push(frame(&[], 0x86dd, &ipv6(&hidden, protocol, &body(protocol, 24))));
        let twice = [fragment_header(0, true), fragment_header(2, true)];
        out.push(frame(&[], 0x86dd, &ipv6(&twice, protocol, &body(protocol, 24))));
        let behind = [authentication, fragment_header(2, true)];
        out.push(frame(&[], 0x86dd, &ipv6(&behind, protocol, &body(protocol, 24))));
    }
    out
}

fn sizes() -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for more in [0, 1, 6, 17, 18, 400, 1400, 1460, 1461, 2020, 2048, 4000, 8900] {
        for (kind, packet) in [
            (0x0800, ipv4(TCP, &body(TCP, more))),
            (0x0800, ipv4(UDP, &body(UDP, more))),
            (0x86dd, ipv6(&[], UDP, &body(UDP, more))),
        ] {
            out.push(frame(&[], kind, &packet));
        }
    }
    // Padding of every length behind a small packet.
    for padding in 0..46 {
        let mut small = frame(&[], 0x0800, &ipv4(UDP, &body(UDP, 0)));
        small.extend(vec![0xee; padding]);
        out.push(small);
    }
    out
}

/// Packets cut at every byte.
fn truncated() -> Vec<Vec<u8>> {
    let long =
        ipv6(&[(0, options(1)), fragment_header(0, true), (60, options(0))], TCP, &body(TCP, 2));
    let whole = [
        (0x0800, ipv4(TCP, &body(TCP, 2))),
        (0x0800, ipv4(ICMP, &body(ICMP, 2))),
        (0x86dd, ipv6(&[], UDP, &body(UDP, 2))),
        (0x86dd, long),
    ];
    let cut = |(kind, packet): &(u16, Vec<u8>)| {
        let (kind, packet) = (*kind, packet.clone());
        (10..=packet.len()).map(move |len| frame(&[], kind, &packet[..len])).collect::<Vec<_>>()
    };
    whole.iter().flat_map(cut).collect()
}

/// Lengths that do not match the packet.
fn lengths() -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for protocol in [TCP, UDP, ICMP] {
        let inside = body(protocol, 10);
        for more in [-60, -31, -30, -21, -20, -12, -10, -1, 0, 1, 10, 1000] {
            out.push(frame(&[], 0x0800, &ipv4_saying(protocol, 0x4000, &inside, more)));
        }
        for first in [0x05, 0x35, 0x40, 0x44, 0x46, 0x4a, 0x4f, 0x55, 0x65, 0xf5] {
            let mut packet = ipv4(protocol, &inside);
            packet[0] = first;
            out.push(frame(&[], 0x0800, &packet));
        }
        let mut wrong = ipv4(protocol, &inside);
        wrong[11] ^= 1;
        out.push(frame(&[], 0x0800, &wrong));
    }
    for protocol in [TCP, UDP, ICMP6] {
        for says in [0_u16, 1, 7, 8, 17, 18, 19, 30, 1000, 65535] {
            for chain in [vec![], vec![(60, options(0))]] {
                let mut packet = ipv6(&chain, protocol, &body(protocol, 10));
                packet[4..6].copy_from_slice(&says.to_be_bytes());
                out.push(frame(&[], 0x86dd, &packet));
            }
        }
        for len in [1, 2, 4, 255] {
            let mut packet = ipv6(&[(60, options(0))], protocol, &body(protocol, 10));
            packet[41] = len;
            out.push(frame(&[], 0x86dd, &packet));
        }
    }
    // UDP whose length differs from its packet's.
    for says in [0_u16, 7, 8, 17, 19, 65535] {
        let mut inside = body(UDP, 10);
        inside[4..6].copy_from_slice(&says.to_be_bytes());
        out.push(frame(&[], 0x0800, &ipv4(UDP, &inside)));
        out.push(frame(&[], 0x86dd, &ipv6(&[], UDP, &inside)));
    }
    out
}

/// Conversations with the second middlebox, which is balanced, and the replies of its backends.
fn conversations() -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for (protocol, v6) in [(TCP, false), (UDP, false), (ICMP, false), (TCP, true), (UDP, true)] {
        let address = |host: u8| -> Vec<u8> {
            if v6 {
                [&[0x20, 1, 0xd, 0xb8][..], &[0; 11], &[host]].concat()
            } else {
                vec![10, 0, 0, host]
            }
        };
        let mut packet = |from: &str, to: &str, hosts: (u8, u8), swap: bool| {
            let mut inside = body(protocol, 5);
            if swap && protocol != ICMP {
                inside.swap(1, 3);
            }
            if swap && protocol == ICMP {
                inside[0] = 0;
            }
            let mut bytes = if v6 { ipv6(&[], protocol, &inside) } else { ipv4(protocol, &inside) };
            let at = if v6 { 8 } else { 12 };
            let addresses = [address(hosts.0), address(hosts.1)].concat();
            bytes[at..at + addresses.len()].copy_from_slice(&addresses);
            if !v6 {
                bytes[10..12].fill(0);
                let sum = checksum(&bytes[..20]);
                bytes[10..12].copy_from_slice(&sum);
            }
            let kind: u16 = if v6 { 0x86dd } else { 0x0800 };
            out.push([mac(to), mac(from), kind.to_be_bytes().to_vec(), bytes].concat());
        };
        let [client, backend, _] = HOSTS;
        packet(client, MIDDLEBOXES[1], (4, 2), false);
        packet(backend, client, (3, 4), true);
        packet(client, MIDDLEBOXES[1], (4, 2), false);
        packet(backend, client, (3, 4), true);
        packet(client, backend, (4, 3), false);
        packet(backend, client, (3, 9), true);
    }
    out
}

/// All captures.
pub fn all() -> Vec<Capture> {
    let q = |kind: u8, id: u16| {
        [
            if kind == 0 { 0x81 } else { 0x88 },
            if kind == 0 { 0 } else { 0xa8 },
            (id >> 8) as u8,
            id as u8,
        ]
    };
    let one: Vec<Vec<[u8; 4]>> = [q(0, 2), q(0, 0), q(0, 0xefff), q(0, 0x3064), q(1, 2), q(1, 100)]
        .into_iter()
        .map(|tag| vec![tag])
        .collect();
    let two = [[q(1, 2), q(0, 3)], [q(0, 2), q(0, 2)], [q(0, 7), q(1, 2)], [q(1, 1), q(1, 2)]];
    let three = [q(1, 2), q(1, 3), q(0, 4)];
    let mut vlan: Vec<&[[u8; 4]]> = vec![&[]];
    vlan.extend(one.iter().map(Vec::as_slice));
    let mut stacked: Vec<&[[u8; 4]]> = two.iter().map(<[[u8; 4]; 2]>::as_slice).collect();
    stacked.push(&three);
    vec![
        ("vlan", tagged(&vlan)),
        ("qinq", tagged(&stacked)),
        ("ipv6-extensions", chains()),
        ("fragments", fragments()),
        ("sizes", sizes()),
        ("truncated", truncated()),
        ("lengths", lengths()),
        ("conversations", conversations()),
    ]
}

/// The file of a capture, as bytes of a pcap.
pub fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
    // Magic, version 2.4, zone, accuracy, longest frame, link type Ethernet; all little-endian.
    let mut out = [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65535, 1].map(u32::to_le_bytes).concat();
    for (at, frame) in frames.iter().enumerate() {
        let (at, len) = (at as u32, frame.len() as u32);
        out.extend([at / 1000, at % 1000 * 1000, len, len].map(u32::to_le_bytes).concat());
        out.extend(frame);
    }
    out
}

/// The directory of the captures.
pub fn folder() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("captures")
}
