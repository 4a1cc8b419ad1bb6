//! Random frames and commands from a small world, so that they match each other.

use proptest::prelude::*;
use proptest::sample::select;

/// The middleboxes of the world, which the policies are about.
pub const MIDDLEBOXES: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
/// MACs of hosts: a client and two backends.
pub const HOSTS: [&str; 3] = ["02:00:00:00:00:0c", "02:00:00:00:00:b1", "02:00:00:00:00:b2"];

const PORTS: [u16; 4] = [80, 81, 53, 1000];

fn mac() -> impl Strategy<Value = [u8; 6]> {
    prop_oneof![
        8 => select(vec![1_u8, 2]).prop_map(|last| [2, 0, 0, 0, 0, last]),
        3 => select(vec![0x0c_u8, 0xb1, 0xb2]).prop_map(|last| [2, 0, 0, 0, 0, last]),
        1 => select(vec![[0xff; 6], [1, 0, 0x5e, 0, 0, 1]]),
        1 => Just([2, 9, 9, 9, 9, 9]),
    ]
}

fn source_mac() -> impl Strategy<Value = [u8; 6]> {
    select(vec![0x0c_u8, 0xb1, 0xb2, 1]).prop_map(|last| [2, 0, 0, 0, 0, last])
}

fn ip4() -> impl Strategy<Value = [u8; 4]> {
    select(vec![1_u8, 2, 3, 4, 9]).prop_map(|last| [10, 0, 0, last])
}

fn ip6() -> impl Strategy<Value = [u8; 16]> {
    select(vec![1_u8, 2, 3, 4])
        .prop_map(|last| [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last])
}

/// A protocol and the payload of an IP packet, with correct checksums or wrong ones.
fn transport() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let port = || select(PORTS.to_vec());
    let ports = (port(), port());
    prop_oneof![
        6 => (ports.clone(), any::<[u8; 16]>(), select(vec![0_u8, 2, 0x10, 0x11, 0x12, 8, 0xff]), any::<u8>()).prop_map(|((s, d), rest, flags, more)| {
            let mut out = [s.to_be_bytes(), d.to_be_bytes()].concat();
            out.extend(rest);
            out[13] = flags;
            out.extend(vec![7; usize::from(more)]);
            (6, out)
        }),
        6 => (ports.clone(), any::<bool>(), any::<[u8; 2]>(), 0..90_usize).prop_map(|((s, d), zero, sum, more)| {
            let len = 8 + more as u16;
            let sum = if zero { [0; 2] } else { sum };
            let mut out = [s.to_be_bytes(), d.to_be_bytes(), len.to_be_bytes(), sum].concat();
            out.extend(vec![9; more]);
            (17, out)
        }),
        3 => (select(vec![1_u8, 58]), select(vec![0_u8, 1, 3, 8, 128, 135]), 0..4_u8, any::<[u8; 12]>())
            .prop_map(|(protocol, kind, code, rest)| (protocol, [&[kind, code], &rest[..]].concat())),
        1 => (select(vec![47_u8, 51, 59, 132, 136, 200]), any::<[u8; 24]>()).prop_map(|(p, rest)| (p, rest.to_vec())),
        // Truncated in the L4 header.
        1 => (select(vec![6_u8, 17]), proptest::collection::vec(any::<u8>(), 0..18)),
    ]
}

/// Returns the checksum of an IP header whose checksum field is zero (RFC 1071), in network order.
pub(crate) fn checksum(header: &[u8]) -> [u8; 2] {
    let mut sum: u32 =
        header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// The hosts of a conversation with a balanced address.
#[derive(Clone, Copy, Debug)]
struct Conversation {
    middlebox: u8,
    client: u8,
    frontend: u8,
    cport: u16,
    port: u16,
    v6: bool,
    udp: bool,
}

/// The frames of a conversation.
#[derive(Clone, Copy, Debug)]
enum Said {
    There,
    Back,
    /// An ICMP error from the client's side.
    ErrorThere,
    /// An ICMP error from the backend's side, or from a router before it.
    ErrorBack(bool),
}

/// A packet of a conversation. The backend, its port and the TCP flags are random; so are the
/// checksums of TCP, UDP and ICMP.
#[derive(Clone, Copy, Debug)]
struct Word {
    said: Said,
    backend: u8,
    own_port: bool,
    flags: u8,
    more: usize,
}

fn said(talk: Conversation, word: Word) -> Vec<u8> {
    let Conversation { middlebox, client, frontend, cport, port, v6, udp } = talk;
    let Word { said, backend, own_port, flags, more } = word;
    let transport = |source: u16, destination: u16| -> Vec<u8> {
        let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        if udp {
            let len = (8 + more as u16).to_be_bytes();
            [ports, len.to_vec(), vec![0x12, 0x34], vec![9; more]].concat()
        } else {
            let numbers = vec![0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 1, 0, 0x12, 0x34, 0, 0];
            [ports, numbers, vec![7; more]].concat()
        }
    };
    let ip = |source: u8, destination: u8, protocol: u8, body: &[u8]| -> Vec<u8> {
        let mut out;
        if v6 {
            let address = |last: u8| [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
            out = vec![0x60, 0, 0, 0];
            out.extend((body.len() as u16).to_be_bytes());
            out.extend([protocol, 64]);
            out.extend(address(source));
            out.extend(address(destination));
        } else {
            out = vec![0x45, 0];
            out.extend((20 + body.len() as u16).to_be_bytes());
            out.extend([0, 7, 0x40, 0, 64, protocol, 0, 0]);
            out.extend([10, 0, 0, source, 10, 0, 0, destination]);
            let sum = checksum(&out);
            out[10..12].copy_from_slice(&sum);
        }
        out.extend(body);
        out
    };
    let (protocol, icmp) = (if udp { 17 } else { 6 }, if v6 { 58 } else { 1 });
    let error = |quoted: Vec<u8>| -> Vec<u8> {
        let head = if v6 { [2, 0, 0x55, 0xaa] } else { [3, 4, 0x55, 0xaa] };
        [&head[..], &[0, 0, 5, 0], quoted.get(..28 + more).unwrap_or(&quoted)].concat()
    };
    let backends = if own_port { 81 } else { port };
    let there = |to: u8, port: u16| ip(client, to, protocol, &transport(cport, port));
    let host = |last: u8| [2, 0, 0, 0, 0, last];
    let (to, from, payload) = match said {
        Said::There => (host(middlebox), host(0x0c), there(frontend, port)),
        Said::Back => {
            let back = ip(backend, client, protocol, &transport(backends, cport));
            (host(0x0c), host(0xb0 + backend - 2), back)
        }
        Said::ErrorThere => {
            let quoted = ip(frontend, client, protocol, &transport(port, cport));
            (host(middlebox), host(0x0c), ip(client, frontend, icmp, &error(quoted)))
        }
        Said::ErrorBack(router) => {
            let source = if router { 1 } else { backend };
            let body = ip(source, client, icmp, &error(there(backend, backends)));
            (host(0x0c), host(0xb0 + backend - 2), body)
        }
    };
    let mut out = [to, from].concat();
    out.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    out.extend(payload);
    out.resize(out.len().max(60), 0);
    out
}

/// Some packets of a conversation, whose beginning is a proper one.
fn conversation() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let rarely = || prop::bool::weighted(0.25);
    let ends =
        (prop::bool::weighted(0.85), select(vec![4_u8, 4, 4, 1, 3]), select(vec![2_u8, 2, 2, 9]));
    let ports = (select(vec![1000_u16, 1000, 81]), select(vec![80_u16, 80, 80, 80, 81, 53]));
    let talk = (ends, ports, rarely(), any::<bool>()).prop_map(
        |((first, client, frontend), (cport, port), v6, udp)| {
            let frontend = if v6 { 2 } else { frontend };
            Conversation {
                middlebox: if first { 1 } else { 2 },
                client,
                frontend,
                cport,
                port,
                v6,
                udp,
            }
        },
    );
    let what = prop_oneof![
        4 => Just(Said::There),
        4 => Just(Said::Back),
        1 => Just(Said::ErrorThere),
        2 => any::<bool>().prop_map(Said::ErrorBack),
    ];
    let flags = select(vec![2_u8, 0x12, 0x10, 0x10, 0x10, 0x18, 0x11, 4]);
    let word = (what, select(vec![3_u8, 4]), any::<bool>(), flags, 0..40_usize).prop_map(
        |(said, backend, own_port, flags, more)| Word { said, backend, own_port, flags, more },
    );
    (talk, proptest::collection::vec(word, 1..8)).prop_map(|(talk, words)| {
        let opening = Word { said: Said::There, backend: 3, own_port: false, flags: 2, more: 0 };
        let answer = Word { flags: 0x10, ..opening };
        [opening, answer].into_iter().chain(words).map(|word| said(talk, word)).collect()
    })
}

fn ipv4(base: u16) -> impl Strategy<Value = (u16, Vec<u8>)> {
    let fragment =
        prop_oneof![8 => Just(0x4000_u16), 1 => Just(0x2000), 1 => Just(0x2001), 1 => Just(0x0003)];
    let options = prop_oneof![9 => Just(0_usize), 1 => 1..4_usize];
    (ip4(), ip4(), select(vec![0_u8, 16, 17]), fragment, options, transport(), 1..4_u16).prop_map(
        move |(source, destination, tos, fragment, options, (protocol, body), id)| {
            let mut header = vec![0x45 + options as u8, tos];
            header.extend(((20 + options * 4 + body.len()) as u16).to_be_bytes());
            header.extend((base.wrapping_mul(4) + id).to_be_bytes());
            header.extend(fragment.to_be_bytes());
            header.extend([64, protocol, 0, 0]);
            header.extend(source);
            header.extend(destination);
            // No-operation options.
            header.extend(vec![1; options * 4]);
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum);
            (0x0800, [header, body].concat())
        },
    )
}

/// Extension headers that hold together: hop-by-hop, destination options, routing, fragment, in any
/// order but that hop-by-hop is first.
fn extensions(base: u16) -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let padding = |len: u8| {
        let mut out = vec![0, len, 1, 4 + len * 8];
        out.resize(8 + usize::from(len) * 8, 0);
        out
    };
    let one = prop_oneof![
        2 => (0..3_u8).prop_map(move |len| (60_u8, padding(len))),
        1 => Just((43, vec![0, 0, 0, 0, 0, 0, 0, 0])),
        1 => Just((51, vec![0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1])),
        2 => (select(vec![0_u16, 1, 8, 17]), 1..4_u8).prop_map(move |(offset, id)| {
            let [a, b] = base.to_be_bytes();
            (44, [vec![0, 0], offset.to_be_bytes().to_vec(), vec![0, a, b, id]].concat())
        }),
    ];
    let hop = (0..2_u8).prop_map(move |len| (0_u8, padding(len)));
    (proptest::option::weighted(0.3, hop), proptest::collection::vec(one, 0..3))
        .prop_map(|(hop, rest)| hop.into_iter().chain(rest).collect())
}

fn ipv6(base: u16) -> impl Strategy<Value = (u16, Vec<u8>)> {
    let extensions = prop_oneof![6 => Just(Vec::new()), 4 => extensions(base)];
    (ip6(), ip6(), select(vec![0_u8, 16, 17]), extensions, transport()).prop_map(
        |(source, destination, class, extensions, (protocol, body))| {
            let following =
                |index: usize| extensions.get(index).map_or(protocol, |(kind, _)| *kind);
            let mut chain = Vec::new();
            for (index, (_, bytes)) in extensions.iter().enumerate() {
                chain.push(following(index + 1));
                chain.extend(&bytes[1..]);
            }
            let mut out = vec![0x60 | class >> 4, class << 4, 0, 0];
            out.extend(((chain.len() + body.len()) as u16).to_be_bytes());
            out.extend([following(0), 64]);
            out.extend(source);
            out.extend(destination);
            (0x86dd, [out, chain, body].concat())
        },
    )
}

fn other() -> impl Strategy<Value = (u16, Vec<u8>)> {
    let arp = (ip4(), ip4()).prop_map(|(source, target)| {
        let mut out = vec![0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 0x0c];
        out.extend(source);
        out.extend([0; 6]);
        out.extend(target);
        (0x0806, out)
    });
    let random = (
        select(vec![0x88cc_u16, 0x0800, 0x86dd, 0x0042, 0x9000]),
        proptest::collection::vec(any::<u8>(), 0..80),
    );
    prop_oneof![2 => arp, 1 => random]
}

/// VLAN tags: none, one or two, of both kinds.
fn tags() -> impl Strategy<Value = Vec<[u8; 4]>> {
    let tag =
        (select(vec![[0x81_u8, 0], [0x88, 0xa8]]), 1..4_u8).prop_map(|([a, b], id)| [a, b, 0, id]);
    prop_oneof![
        7 => Just(Vec::new()),
        2 => tag.clone().prop_map(|tag| vec![tag]),
        1 => (tag.clone(), tag).prop_map(|(a, b)| vec![a, b]),
    ]
}

/// Damage: a byte changed, or the frame truncated.
fn damage() -> impl Strategy<Value = Option<(bool, usize, u8)>> {
    proptest::option::weighted(0.15, (any::<bool>(), 0..60_usize, any::<u8>()))
}

/// A frame: Ethernet, VLAN, ARP, IPv4, IPv6, TCP, UDP, ICMP, fragments, cut and broken ones. At
/// least 24 bytes, so that the kernel does not drop it for want of a VLAN tag. Pieces of
/// datagrams have identifications near `base`.
fn any_frame(base: u16) -> impl Strategy<Value = Vec<u8>> {
    let payload = prop_oneof![6 => ipv4(base), 5 => ipv6(base), 1 => other()];
    (mac(), source_mac(), tags(), payload, damage(), any::<bool>()).prop_map(
        |(destination, source, tags, (ether_type, payload), damage, pad)| {
            let mut out = [destination, source].concat();
            tags.iter().for_each(|tag| out.extend(tag));
            out.extend(ether_type.to_be_bytes());
            out.extend(payload);
            match damage {
                // The MACs stay: a frame of another source is the bridge's matter.
                Some((true, at, byte)) => {
                    if let Some(old) = out.get_mut(12 + at) {
                        *old = byte;
                    }
                }
                Some((false, at, _)) => out.truncate(14 + at),
                None => {}
            }
            let least = if pad { 60 } else { 24 };
            out.resize(out.len().max(least), 0);
            out
        },
    )
}

/// Frames that go one after the other: any at all, and those of conversations. Fragments
/// wait for each other, so those of one case are no others'.
pub fn case_frames(count: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<Vec<u8>>> {
    (any::<u16>(), count).prop_flat_map(move |(base, count)| {
        let some =
            prop_oneof![4 => any_frame(base).prop_map(|frame| vec![frame]), 1 => conversation()];
        proptest::collection::vec(some, count / 2).prop_map(|some| some.concat())
    })
}

/// Commands of a policy for the middleboxes of the world; some are rejected, which is part of the
/// world.
pub fn policy() -> impl Strategy<Value = Vec<String>> {
    let ip = || {
        prop_oneof![3 => select(vec![1_u8, 2, 3, 4, 9]).prop_map(|n| format!("10.0.0.{n}")),
                            1 => select(vec![1_u8, 2, 3, 4]).prop_map(|n| format!("2001:db8::{n}"))]
    };
    let host = || select(HOSTS.to_vec()).prop_map(str::to_string);
    let port = || select(PORTS.to_vec()).prop_map(|port| port.to_string());
    let hosts = || {
        let wide = select(vec![
            "10.0.0.0/30",
            "10.0.0.2-10.0.0.4",
            "0.0.0.0/0",
            "2001:db8::/126",
            "2001:db8::3-2001:db8::4",
        ]);
        prop_oneof![3 => ip(), 2 => wide.prop_map(str::to_string)]
    };
    let ports = || prop_oneof![3 => port(), 1 => select(vec!["80-81", "0-65535", "54-999"]).prop_map(str::to_string)];
    let stations = || {
        let masked = select(vec![
            "02:00:00:00:00:b0/ff:ff:ff:ff:ff:f0",
            "02:00:00:00:00:00/01:00:00:00:00:00",
        ]);
        prop_oneof![3 => host(), 1 => masked.prop_map(str::to_string)]
    };
    let tags = select(vec!["1", "2", "2-3", "0-4095"]).prop_map(str::to_string);
    let key = |letter: char, value: BoxedStrategy<String>| {
        proptest::option::weighted(0.7, value.prop_map(move |v| format!(" {letter} {v}")))
            .prop_map(Option::unwrap_or_default)
    };
    let tos = select(vec!["0", "16", "17"]).prop_map(str::to_string).boxed();
    let protocol =
        select(vec!["tcp", "udp", "icmp", "58", "47", "51"]).prop_map(str::to_string).boxed();
    let types = select(vec!["ip", "ip6", "arp", "0x88cc", "0x8100", "0x9000"])
        .prop_map(str::to_string)
        .boxed();
    let inet = (
        0..16_u8,
        key('s', hosts().boxed()),
        key('d', hosts().boxed()),
        key('t', tos),
        key('p', protocol),
    )
        .prop_map(|(bits, s, d, t, p)| format!("I {bits}{s}{d}{t}{p}"));
    let link = (
        0..8_u8,
        key('s', stations().boxed()),
        key('d', select(MIDDLEBOXES.to_vec()).prop_map(str::to_string).boxed()),
        key('p', types),
    )
        .prop_map(|(bits, s, d, p)| format!("M {bits}{s}{d}{p}"));
    let transport =
        (select(vec!['T', 'U']), 0..4_u8, key('s', ports().boxed()), key('d', ports().boxed()))
            .prop_map(|(class, bits, s, d)| format!("{class} {bits}{s}{d}"));
    let vlan = (0..2_u8, key('s', tags.boxed())).prop_map(|(bits, s)| format!("V {bits}{s}"));
    let words = |words: &[&'static str]| select(words.to_vec()).prop_map(str::to_string).boxed();
    let icmp = (
        select(vec!['C', 'N']),
        0..4_u8,
        key('t', words(&["0", "1", "8", "0-127", "128-255", "128", "3"])),
        key('c', words(&["0", "0-3", "1-255"])),
    )
        .prop_map(|(class, bits, t, c)| format!("{class} {bits}{t}{c}"));
    let flags = (
        0..2_u8,
        key('f', words(&["syn", "syn/syn,ack", "none", "none/rst", "ack,fin", "psh/all", "all"])),
    )
        .prop_map(|(bits, f)| format!("F {bits}{f}"));
    let whole = (
        0..4_u8,
        key('l', words(&["0-39", "0-60", "44", "48-100", "61-65535", "20", "40-44"])),
        key('f', words(&["whole", "first", "later", "piece"])),
    )
        .prop_map(|(bits, l, f)| format!("P {bits}{l}{f}"));
    let middlebox = || select(MIDDLEBOXES.to_vec());
    let filter = prop_oneof![8 => inet, 6 => link, 8 => transport, 3 => vlan, 3 => icmp, 2 => flags, 3 => whole];
    let backend =
        select(vec![("10.0.0.3", "02:00:00:00:00:b1"), ("10.0.0.4", "02:00:00:00:00:b2")]);
    let backend6 =
        select(vec![("2001:db8::3", "02:00:00:00:00:b1"), ("2001:db8::4", "02:00:00:00:00:b2")]);
    let vip4 = select(vec!["10.0.0.2", "10.0.0.9"]);
    let frontends = select(vec![
        "10.0.0.2",
        "10.0.0.2:80",
        "10.0.0.2:80",
        "10.0.0.9:80",
        "10.0.0.2:53/udp",
        "10.0.0.2:80/tcp",
        "2001:db8::2",
        "[2001:db8::2]:80",
    ]);
    let pools = select(vec![
        "rr 10.0.0.3@02:00:00:00:00:b1 10.0.0.4@02:00:00:00:00:b2*2",
        "hash 10.0.0.3:81@02:00:00:00:00:b1 10.0.0.4@02:00:00:00:00:b2",
        "least 10.0.0.3:81@02:00:00:00:00:b1 10.0.0.4:53@02:00:00:00:00:b2",
        "rr 10.0.0.3:81@02:00:00:00:00:b1",
        "0 10.0.0.4:81@02:00:00:00:00:b2",
    ]);
    let options = select(vec![
        "",
        "",
        "",
        " dsr",
        " affinity",
        " on-empty=pass",
        " on-dead=reset",
        " seed=3",
    ]);
    let edits = select(vec![
        "+ 10.0.0.4@02:00:00:00:00:b2",
        "- 10.0.0.3",
        "- 10.0.0.3:81",
        "10.0.0.2:80 = 10.0.0.4 drain",
        "= 10.0.0.4 drain",
        "10.0.0.2:80 = 10.0.0.4 up",
    ]);
    let mostly = select(vec![MIDDLEBOXES[0], MIDDLEBOXES[0], MIDDLEBOXES[0], MIDDLEBOXES[1]]);
    let pool = (mostly, frontends, pools, options)
        .prop_map(|(mac, frontend, pool, option)| {
            let (port, v6) =
                (frontend.ends_with(":80") || frontend.contains('/'), frontend.contains("2001"));
            let pool =
                if port { pool.to_string() } else { pool.replace(":81", "").replace(":53", "") };
            let pool = if v6 { pool.replace("10.0.0.", "2001:db8::") } else { pool };
            let pool = if v6 && port { bracketed(&pool) } else { pool };
            format!("R L {mac} {frontend} {pool}{option}")
        })
        .boxed();
    let edit = (middlebox(), edits).prop_map(|(mac, edit)| format!("B {mac} {edit}")).boxed();
    let balancing =
        proptest::collection::vec(prop_oneof![4 => pool.clone(), 1 => edit.clone()], 3..10);
    let command = prop_oneof![
        12 => (middlebox(), select(vec!['#', '#', '+']), 1..6_u16, filter)
            .prop_map(|(mac, sign, n, filter)| format!("A {mac} {sign}{n} {filter}")),
        1 => (middlebox(), select(vec!['#', '+']), 1..6_u16).prop_map(|(mac, sign, n)| format!("D {mac} {sign}{n}")),
        2 => (middlebox(), vip4.clone(), backend.clone())
            .prop_map(|(mac, frontend, (ip, at))| format!("R L {mac} {frontend} 0 {ip}@{at}")),
        1 => (middlebox(), vip4, ip(), backend)
            .prop_map(|(mac, frontend, from, (ip, at))| format!("R L {mac} {frontend} 1 {from} {ip}@{at}")),
        4 => pool.clone(),
        2 => edit.clone(),
        1 => (middlebox(), backend6)
            .prop_map(|(mac, (ip, at))| format!("R L {mac} 2001:db8::2 0 {ip}@{at}")),
    ];
    let closed = (prop::bool::weighted(0.2), prop::bool::weighted(0.2));
    let mixed =
        (closed, proptest::collection::vec(command, 0..16)).prop_map(|((a, b), commands)| {
            let register = |(mac, closed): (&str, bool)| {
                let default = if closed { " deny" } else { "" };
                format!("R F {mac} 10.0.0.2{default}")
            };
            MIDDLEBOXES.into_iter().zip([a, b]).map(register).chain(commands).collect()
        });
    prop_oneof![mixed, balancing]
}

/// IPv6 addresses that have a port in brackets.
fn bracketed(pool: &str) -> String {
    let word = |word: &str| match word.split_once('@') {
        Some((name, rest)) => {
            match [":81", ":53"].iter().find_map(|port| Some((name.strip_suffix(port)?, port))) {
                Some((ip, port)) => format!("[{ip}]{port}@{rest}"),
                None => word.to_string(),
            }
        }
        None => word.to_string(),
    };
    pool.split(' ').map(word).collect::<Vec<_>>().join(" ")
}
