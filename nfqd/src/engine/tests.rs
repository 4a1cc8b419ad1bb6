//! What the engine says about single packets and short conversations.

use super::*;
use etherparse::{IpNumber, Ipv4Header, PacketBuilder};
use nfqd_rules::slots::Seen;
use nfqd_shmctl::BackendName;
use std::time::Instant;

const VM: [u8; 6] = [2, 0, 0, 0, 0, 2];
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BACKEND: [u8; 6] = [2, 0, 0, 0, 0, 3];

fn snapshot(lines: &[&str]) -> Snapshot {
    let mut policy = Policy::default();
    for line in lines {
        policy.apply_line(line).unwrap();
    }
    snapshot_of(policy, |_| Seen::NOTHING)
}

fn snapshot_of(policy: Policy, seen: impl Fn(&BackendName) -> Seen) -> Snapshot {
    following(&Snapshot::default(), policy, seen)
}

/// What holds when a policy comes after another one.
fn following(before: &Snapshot, policy: Policy, seen: impl Fn(&BackendName) -> Seen) -> Snapshot {
    let (mut slots, mut pools) = (before.desired().slots.clone(), Pools::default());
    slots.follow(&policy, |_, _, _, name| seen(name), Instant::now());
    for (mac, middlebox) in policy.middleboxes() {
        pools.update(*mac, Some(middlebox), &slots);
    }
    Snapshot::new(Desired { policy, slots }, pools)
}

fn static_to_3() -> Snapshot {
    snapshot(&["R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3"])
}

fn udp(from: [u8; 6], to: [u8; 6], ips: (u8, u8), ports: (u16, u16)) -> Packet {
    let mut out = Vec::new();
    PacketBuilder::ethernet2(from, to)
        .ipv4([10, 0, 0, ips.0], [10, 0, 0, ips.1], 9)
        .udp(ports.0, ports.1)
        .write(&mut out, b"x")
        .unwrap();
    Packet::from_frame(&out).unwrap()
}

fn judged(snapshot: &Snapshot, flows: &Memory, packet: &Packet, now: Seconds) -> Judgement {
    judge(snapshot, flows, packet, now).judgement
}

fn vip_of(judgement: Judgement) -> Option<IpAddr> {
    match judgement {
        Judgement::Reply(to) => Some(to.key.vip.ip),
        _ => None,
    }
}

#[test]
fn a_flow_goes_there_and_comes_back() {
    let (snapshot, flows) = (static_to_3(), Memory::new(100));
    let there = judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    assert!(matches!(there, Judgement::Redirect(To { learn: Learn::Yes, .. })), "{there:?}");
    assert_eq!(there.mark(0x7f), Some(0x1800_017f));
    let back = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 1);
    assert_eq!(vip_of(back), Some(IpAddr::from([10, 0, 0, 2])));
    assert_eq!(back.mark(0), Some(0x3000_0100));
    // The backend's own conversation with the same client is left alone.
    let own = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1001)), 1);
    assert_eq!((own, own.mark(1)), (Judgement::Direct, Some(0x3000_0001)));
    let other = judged(&snapshot, &flows, &udp(CLIENT, BACKEND, (1, 3), (53, 1001)), 1);
    assert_eq!(other, Judgement::Accept(Reason::NotOurs));
}

#[test]
fn a_reply_outlives_nothing_it_should_not() {
    let (before, flows) = (static_to_3(), Memory::new(100));
    judged(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    let reply = udp(BACKEND, CLIENT, (3, 1), (53, 1000));
    let other = snapshot(&["R L 2:0:0:0:0:2 10.0.0.9 0 10.0.0.3@2:0:0:0:0:3"]).policy().clone();
    let after = following(&before, other, |_| Seen::NOTHING);
    assert_eq!(judged(&after, &flows, &reply, 1), Judgement::Direct, "the service is gone");
    assert_eq!(judged(&before, &flows, &reply, 1), Judgement::Direct, "and the flow with it");
    judged(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 2);
    assert!(vip_of(judged(&before, &flows, &reply, 200)).is_some());
    assert_eq!(judged(&before, &flows, &reply, 600), Judgement::Direct, "the flow is too old");
}

#[test]
fn later_fragments_follow_the_first() {
    let (snapshot, flows) = (static_to_3(), Memory::new(100));
    judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    let piece = |first: bool| {
        let mut ip = Ipv4Header::new(16, 9, IpNumber::UDP, [10, 0, 0, 3], [10, 0, 0, 1]).unwrap();
        ip.identification = 77;
        ip.more_fragments = first;
        ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
        let mut out = [&CLIENT[..], &BACKEND, &[8, 0]].concat();
        ip.write(&mut out).unwrap();
        out.extend([0, 53, 0x03, 0xe8, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        Packet::from_frame(&out).unwrap()
    };
    assert_eq!(judged(&snapshot, &flows, &piece(false), 0), Judgement::Hold);
    let first = judged(&snapshot, &flows, &piece(true), 0);
    assert!(matches!(first, Judgement::Reply(To { learn: Learn::No, .. })), "{first:?}");
    assert_eq!(vip_of(judged(&snapshot, &flows, &piece(false), 0)), vip_of(first));
}

#[test]
fn without_the_backends_mac_the_redirect_is_not_made() {
    let (before, flows) = (snapshot(&["R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3"]), Memory::new(100));
    let packet = udp(CLIENT, VM, (1, 2), (1000, 53));
    assert_eq!(judged(&before, &flows, &packet, 0), Judgement::Accept(Reason::BackendUnresolved));
    assert!(flows.flows.is_empty());
    let mac = Some(MacAddr(BACKEND));
    let after = snapshot_of(before.policy().clone(), |_| Seen { mac, ..Seen::NOTHING });
    assert!(matches!(judged(&after, &flows, &packet, 0), Judgement::Redirect(_)));
}

#[test]
fn filters_go_first_even_for_replies() {
    let lines = [
        "R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3",
        "R F 2:0:0:0:0:1 10.0.0.1",
        "A 2:0:0:0:0:1 I 1 s 10.0.0.3",
    ];
    let (snapshot, flows) = (snapshot(&lines), Memory::new(100));
    judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    let back = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 0);
    assert_eq!((back, back.mark(0)), (Judgement::Drop(DropReason::Filtered), None));
}

const POOL: &str =
    "R L 2:0:0:0:0:2 10.0.0.2:80 hash 10.0.0.3:8080@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4 10.0.0.5@2:0:0:0:0:5";

fn tcp(from: [u8; 6], to: [u8; 6], ips: (u8, u8), ports: (u16, u16), flags: u8) -> Packet {
    let mut out = Vec::new();
    PacketBuilder::ethernet2(from, to)
        .ipv4([10, 0, 0, ips.0], [10, 0, 0, ips.1], 9)
        .tcp(ports.0, ports.1, 1, 1)
        .write(&mut out, b"")
        .unwrap();
    out[47] = flags;
    Packet::from_frame(&out).unwrap()
}

fn syn(port: u16) -> Packet {
    tcp(CLIENT, VM, (1, 2), (port, 80), flag::SYN)
}

fn ack(port: u16) -> Packet {
    tcp(CLIENT, VM, (1, 2), (port, 80), flag::ACK)
}

/// The backend accepts, and the client answers; what is said of that.
fn establish(snapshot: &Snapshot, memory: &Memory, port: u16, to_backend: To) -> To {
    let IpAddr::V4(backend) = to_backend.key.backend.ip else { panic!("IPv6") };
    let from = ([2, 0, 0, 0, 0, backend.octets()[3]], backend.octets()[3]);
    let ports = (to_backend.key.backend.port.unwrap(), port);
    let accept = tcp(from.0, CLIENT, (from.1, 1), ports, flag::SYN | flag::ACK);
    assert!(matches!(judged(snapshot, memory, &accept, 1), Judgement::Reply(_)));
    // It has said 1 and so expects 2.
    let mut packet = ack(port);
    if let Some(numbers) = packet.ip.as_mut().and_then(|ip| ip.tcp_numbers.as_mut()) {
        numbers.acknowledgement = 2;
    }
    to(judged(snapshot, memory, &packet, 2))
}

fn to(judgement: Judgement) -> To {
    match judgement {
        Judgement::Redirect(to) => to,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pools_connection_keeps_its_backend_from_end_to_end() {
    let (before, memory) = (snapshot(&[POOL]), Memory::new(1000));
    let first = to(judged(&before, &memory, &syn(1000), 0));
    assert_eq!(first.learn, Learn::Forget, "nothing yet but that it is no other flow");
    assert_eq!(to(judged(&before, &memory, &syn(1000), 1)).slot, first.slot);
    let second = establish(&before, &memory, 1000, first);
    assert_eq!((second.slot, second.learn), (first.slot, Learn::Yes));
    // Others are added and drained; the flow stays, and a drained one gets no new ones.
    let mut policy = before.policy().clone();
    let name = first.key.backend;
    policy.apply_line("B 2:0:0:0:0:2 + 10.0.0.6@2:0:0:0:0:6").unwrap();
    policy.apply_line(&format!("B 2:0:0:0:0:2 = {name} drain")).unwrap();
    let after = following(&before, policy, |_| Seen::NOTHING);
    assert_eq!(to(judged(&after, &memory, &ack(1000), 3)).slot, first.slot);
    for port in 2000..2100 {
        assert_ne!(to(judged(&after, &memory, &syn(port), 3)).slot, first.slot);
    }
    let fin = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::FIN | flag::ACK);
    assert_eq!(to(judged(&after, &memory, &fin, 4)).learn, Learn::Close);
    // The same ports again are a new connection, and may go elsewhere.
    assert_ne!(to(judged(&after, &memory, &syn(1000), 5)).slot, first.slot);
}

#[test]
fn a_connection_outlives_a_forged_reset() {
    let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
    let first = to(judged(&snapshot, &memory, &syn(1000), 0));
    establish(&snapshot, &memory, 1000, first);
    let reset = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::RST);
    assert_eq!(to(judged(&snapshot, &memory, &reset, 3)).learn, Learn::Close);
    let goes_on = to(judged(&snapshot, &memory, &ack(1000), 9));
    assert_eq!((goes_on.slot, goes_on.learn), (first.slot, Learn::Yes), "the kernel has it again");
}

#[test]
fn what_a_backend_answers_comes_from_the_address_and_its_port() {
    let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
    let ported = (1000..1100).find_map(|port| {
        let to = to(judged(&snapshot, &memory, &syn(port), 0));
        to.port.then_some((port, to))
    });
    let (port, there) = ported.unwrap();
    assert_eq!(there.key.backend.to_string(), "10.0.0.3:8080");
    establish(&snapshot, &memory, port, there);
    let back = tcp(BACKEND, CLIENT, (3, 1), (8080, port), flag::ACK);
    let Judgement::Reply(from) = judged(&snapshot, &memory, &back, 9) else { panic!("no reply") };
    assert_eq!((from.slot, from.port, from.learn), (there.slot, true, Learn::Yes));
    let reset = tcp(BACKEND, CLIENT, (3, 1), (8080, port), flag::RST);
    let Judgement::Reply(from) = judged(&snapshot, &memory, &reset, 9) else { panic!("no reply") };
    assert_eq!(from.learn, Learn::Close);
    let other = tcp(BACKEND, CLIENT, (3, 1), (80, port), flag::ACK);
    assert_eq!(judged(&snapshot, &memory, &other, 1), Judgement::Direct, "another port is not its flow");
}

#[test]
fn connections_from_before_are_the_middlebox_own() {
    let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
    let passed = judged(&snapshot, &memory, &ack(1000), 0);
    let Judgement::Pass(slot) = passed else { panic!("{passed:?}") };
    assert_eq!(snapshot.desired().slots.key_of(slot).unwrap().backend.to_string(), "10.0.0.2:80");
    let fin = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::FIN | flag::ACK);
    assert_eq!(judged(&snapshot, &memory, &fin, 0), Judgement::Accept(Reason::NoMatch));
    assert!(memory.flows.is_empty());
    to(judged(&snapshot, &memory, &syn(1000), 0));
}

#[test]
fn a_dead_backends_flows_move_or_end_as_configured() {
    for (option, expected) in [("", "moved"), (" on-dead=reset", "reset"), (" on-dead=keep", "kept")] {
        let (before, memory) = (snapshot(&[&format!("{POOL}{option}")]), Memory::new(1000));
        let first = to(judged(&before, &memory, &syn(1000), 0));
        establish(&before, &memory, 1000, first);
        let dead = first.key.backend;
        let seen = |name: &BackendName| Seen { alive: *name != dead, ..Seen::NOTHING };
        let after = following(&before, before.policy().clone(), seen);
        let became = match judged(&after, &memory, &ack(1000), 1) {
            Judgement::Redirect(to) if to.key.backend == dead => "kept",
            Judgement::Redirect(_) => "moved",
            Judgement::Reject(DropReason::BackendGone) => "reset",
            other => panic!("{other:?}"),
        };
        assert_eq!(became, expected);
        for port in 2000..2050 {
            assert_ne!(to(judged(&after, &memory, &syn(port), 1)).key.backend, dead, "no new flow");
        }
    }
}

#[test]
fn without_a_backend_it_is_refused_or_passed() {
    let memory = Memory::new(1000);
    let nobody = |option: &str, seen: Seen| {
        let line = format!("R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3 10.0.0.4{option}");
        let policy = snapshot(&[&line]).policy().clone();
        judged(&snapshot_of(policy, |_| seen), &memory, &syn(1000), 0)
    };
    let dead = Seen { alive: false, ..Seen::NOTHING };
    assert_eq!(nobody("", dead), Judgement::Reject(DropReason::NoBackend));
    assert_eq!(nobody(" on-empty=pass", dead), Judgement::Accept(Reason::NoBackend));
    assert_eq!(nobody("", Seen::NOTHING), Judgement::Drop(DropReason::BackendUnresolved), "not yet known");
    assert!(memory.flows.is_empty());
}

#[test]
fn a_backend_that_is_a_client_gets_another() {
    let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
    for port in 1000..1100 {
        let packet = tcp(BACKEND, VM, (3, 2), (port, 80), flag::SYN);
        assert_ne!(to(judged(&snapshot, &memory, &packet, 0)).key.backend.ip, IpAddr::from([10, 0, 0, 3]));
    }
    let alone = self::snapshot(&["R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3@2:0:0:0:0:3"]);
    let memory = Memory::new(1000);
    let packet = tcp(BACKEND, VM, (3, 2), (1000, 80), flag::SYN);
    assert_eq!(judged(&alone, &memory, &packet, 0), Judgement::Accept(Reason::NoBackend));
}

#[test]
fn two_services_with_one_backend_do_not_mix_a_clients_port() {
    let lines = [
        "R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3:80@2:0:0:0:0:3 10.0.0.4:80@2:0:0:0:0:4",
        "R L 2:0:0:0:0:2 10.0.0.2:81 rr 10.0.0.3:80@2:0:0:0:0:3 10.0.0.4:80@2:0:0:0:0:4",
        "R L 2:0:0:0:0:2 10.0.0.2:82 rr 10.0.0.3:80@2:0:0:0:0:3",
    ];
    let (snapshot, memory) = (snapshot(&lines), Memory::new(1000));
    let syn = |port: u16| tcp(CLIENT, VM, (1, 2), (1000, port), flag::SYN);
    let first = to(judged(&snapshot, &memory, &syn(80), 0)).key.backend;
    let second = to(judged(&snapshot, &memory, &syn(81), 0)).key.backend;
    assert_ne!(first, second);
    assert_eq!(judged(&snapshot, &memory, &syn(82), 0), Judgement::Reject(DropReason::NoBackend));
    // UDP is another matter.
    let udp = udp(CLIENT, VM, (1, 2), (1000, 82));
    to(judged(&snapshot, &memory, &udp, 0));
}

#[test]
fn affinity_keeps_a_client_with_its_backend() {
    for method in ["rr", "least", "hash"] {
        let line = format!(
            "R L 2:0:0:0:0:2 10.0.0.2:80 {method} 10.0.0.3@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4 affinity"
        );
        let (snapshot, memory) = (snapshot(&[&line]), Memory::new(10_000));
        let backend = |client: u8, port: u16| {
            let packet = tcp(CLIENT, VM, (client, 2), (port, 80), flag::SYN);
            to(judged(&snapshot, &memory, &packet, 0)).key.backend
        };
        let firsts: Vec<BackendName> = (100..140).map(|client| backend(client, 1)).collect();
        assert!(firsts.iter().any(|name| *name != firsts[0]), "{method}: all clients at one");
        for (client, first) in (100..140).zip(&firsts) {
            assert!((2..20).all(|port| backend(client, port) == *first), "{method}");
        }
    }
}

#[test]
fn errors_about_a_flow_are_translated_both_ways() {
    let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
    let ported = (1000..1100).find_map(|port| {
        let to = to(judged(&snapshot, &memory, &syn(port), 0));
        to.port.then_some((port, to))
    });
    let (port, there) = ported.unwrap();
    let error = |link: ([u8; 6], [u8; 6]), ips: (u8, u8), quoted: ([u8; 2], [u16; 2])| {
        let mut inner = Vec::new();
        let ([source, destination], [from, to]) = quoted;
        PacketBuilder::ipv4([10, 0, 0, source], [10, 0, 0, destination], 9)
            .tcp(from, to, 0, 0)
            .write(&mut inner, &[])
            .unwrap();
        let mut out = Vec::new();
        PacketBuilder::ethernet2(link.0, link.1)
            .ipv4([10, 0, 0, ips.0], [10, 0, 0, ips.1], 9)
            .icmpv4_raw(3, 4, [0; 4])
            .write(&mut out, &inner)
            .unwrap();
        judged(&snapshot, &memory, &Packet::from_frame(&out).unwrap(), 1)
    };
    // From the client: what the address sent it was too big.
    let Judgement::Error { quote, to, from } = error((CLIENT, VM), (1, 2), ([2, 1], [80, port])) else {
        panic!("not translated")
    };
    let backend = Quote { side: Side::Source, ip: IpAddr::from([10, 0, 0, 3]), port: Some(8080) };
    assert_eq!((quote, to.map(|to| (to.slot, to.port)), from), (backend, Some((there.slot, false)), None));
    // From the backend, and from a router on the way to it: what the client sent was too big.
    let vip = Quote { side: Side::Destination, ip: IpAddr::from([10, 0, 0, 2]), port: Some(80) };
    for (router, from_backend) in [(3, true), (77, false)] {
        let judged = error((BACKEND, CLIENT), (router, 1), ([1, 3], [port, 8080]));
        let Judgement::Error { quote, to: None, from } = judged else { panic!("not translated") };
        assert_eq!((quote, from.is_some()), (vip, from_backend));
    }
    let other = error((BACKEND, CLIENT), (77, 1), ([1, 3], [port, 80]));
    assert_eq!(other, Judgement::Accept(Reason::NotOurs), "about no flow of ours");
}

#[test]
fn pieces_of_balanced_datagrams_wait_for_the_first() {
    let (snapshot, memory) = (
        snapshot(&["R L 2:0:0:0:0:2 10.0.0.2:53 rr 10.0.0.3:5353@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4"]),
        Memory::new(1000),
    );
    let piece = |id: u16, first: bool| {
        let mut ip = Ipv4Header::new(16, 9, IpNumber::UDP, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
        ip.identification = id;
        ip.more_fragments = first;
        ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
        let mut out = [&VM[..], &CLIENT, &[8, 0]].concat();
        ip.write(&mut out).unwrap();
        out.extend([0x03, 0xe8, 0, 53, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        Packet::from_frame(&out).unwrap()
    };
    for id in 1..10 {
        assert_eq!(judged(&snapshot, &memory, &piece(id, false), 0), Judgement::Hold);
        let first = to(judged(&snapshot, &memory, &piece(id, true), 0));
        let later = to(judged(&snapshot, &memory, &piece(id, false), 0));
        assert_eq!((later.slot, later.port), (first.slot, false));
        assert_eq!(first.port, first.key.backend.port == Some(5353));
    }
    // Pieces of a datagram whose backend goes meanwhile go nowhere, and make no flow of their own.
    let first = to(judged(&snapshot, &memory, &piece(20, true), 0));
    let gone = following(&snapshot, snapshot.policy().clone(), |name| Seen {
        alive: *name != first.key.backend,
        ..Seen::NOTHING
    });
    let flows = memory.flows.len();
    assert_eq!(judged(&gone, &memory, &piece(20, false), 0), Judgement::Drop(DropReason::Piece));
    assert_eq!(memory.flows.len(), flows);
}
