//! Decisions of the engine on single packets and short conversations.

use super::pipeline::flag;
use super::verdict::{
    AcceptReason, CacheAction, DropReason, QuotedTranslation, Translation, Verdict,
};
use super::*;
use etherparse::{IpNumber, Ipv4Header, PacketBuilder};
use nfqd_rules::Policy;
use nfqd_rules::packet::Packet;
use nfqd_rules::rewrite::Side;
use nfqd_rules::service::BackendRef;
use nfqd_rules::slots::{BackendObservation, Liveness};
use nfqd_shmctl::BackendName;

const VM: [u8; 6] = [2, 0, 0, 0, 0, 2];
const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BACKEND: [u8; 6] = [2, 0, 0, 0, 0, 3];

fn snapshot(lines: &[&str]) -> Snapshot {
    snapshot_of(Policy::from_lines(lines).unwrap(), |_| BackendObservation::UNKNOWN)
}

fn snapshot_of(policy: Policy, seen: impl Fn(&BackendName) -> BackendObservation) -> Snapshot {
    following(&Snapshot::default(), policy, seen)
}

/// Properties of a change from one policy to another.
fn following(
    before: &Snapshot,
    policy: Policy,
    seen: impl Fn(&BackendName) -> BackendObservation,
) -> Snapshot {
    before.successor(policy, &|backend: &BackendRef<'_>| seen(backend.name))
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

fn decision(snapshot: &Snapshot, flows: &EngineState, packet: &Packet, now: u32) -> Verdict {
    decide(snapshot, flows, Ingress::ANY, packet, now).decision().unwrap().verdict
}

fn frontend_of(verdict: Verdict) -> Option<IpAddr> {
    match verdict {
        Verdict::Reply(to) => Some(to.key.frontend.ip),
        _ => None,
    }
}

#[test]
fn a_flow_is_redirected_both_ways() {
    let (snapshot, flows) = (static_to_3(), EngineState::new(100));
    let there = decision(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    assert!(
        matches!(there, Verdict::Redirect(Translation { cache: CacheAction::Install, .. })),
        "{there:?}"
    );
    assert_eq!(there.mark(0x7f), Some(0x1800_017f));
    let back = decision(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 1);
    assert_eq!(frontend_of(back), Some(IpAddr::from([10, 0, 0, 2])));
    assert_eq!(back.mark(0), Some(0x3000_0100));
    // The backend's own conversation with the same client is left alone.
    let own = decision(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1001)), 1);
    assert_eq!((own, own.mark(1)), (Verdict::Bypass, Some(0x3000_0001)));
    let other = decision(&snapshot, &flows, &udp(CLIENT, BACKEND, (1, 3), (53, 1001)), 1);
    assert_eq!(other, Verdict::Accept(AcceptReason::NotForMiddlebox));
}

#[test]
fn a_reply_does_not_outlive_its_flow() {
    let (before, flows) = (static_to_3(), EngineState::new(100));
    decision(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    let reply = udp(BACKEND, CLIENT, (3, 1), (53, 1000));
    let other = snapshot(&["R L 2:0:0:0:0:2 10.0.0.9 0 10.0.0.3@2:0:0:0:0:3"]).policy().clone();
    let after = following(&before, other, |_| BackendObservation::UNKNOWN);
    assert_eq!(decision(&after, &flows, &reply, 1), Verdict::Bypass, "the service is gone");
    assert_eq!(decision(&before, &flows, &reply, 1), Verdict::Bypass, "and the flow with it");
    decision(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 2);
    assert!(frontend_of(decision(&before, &flows, &reply, 200)).is_some());
    assert_eq!(decision(&before, &flows, &reply, 600), Verdict::Bypass, "the flow is too old");
}

#[test]
fn later_fragments_follow_the_first() {
    let (snapshot, flows) = (static_to_3(), EngineState::new(100));
    decision(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    let fragment = |first: bool| {
        let mut ip = Ipv4Header::new(16, 9, IpNumber::UDP, [10, 0, 0, 3], [10, 0, 0, 1]).unwrap();
        ip.identification = 77;
        ip.more_fragments = first;
        ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
        let mut out = [&CLIENT[..], &BACKEND, &[8, 0]].concat();
        ip.write(&mut out).unwrap();
        out.extend([0, 53, 0x03, 0xe8, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        Packet::from_frame(&out).unwrap()
    };
    assert_eq!(decision(&snapshot, &flows, &fragment(false), 0), Verdict::AwaitFirstFragment);
    let first = decision(&snapshot, &flows, &fragment(true), 0);
    assert!(
        matches!(first, Verdict::Reply(Translation { cache: CacheAction::None, .. })),
        "{first:?}"
    );
    assert_eq!(frontend_of(decision(&snapshot, &flows, &fragment(false), 0)), frontend_of(first));
}

#[test]
fn without_the_backends_mac_nothing_is_redirected() {
    let (before, flows) =
        (snapshot(&["R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3"]), EngineState::new(100));
    let packet = udp(CLIENT, VM, (1, 2), (1000, 53));
    assert_eq!(
        decision(&before, &flows, &packet, 0),
        Verdict::Accept(AcceptReason::BackendUnresolved)
    );
    assert!(flows.flows.is_empty());
    let mac = Some(nfqd_shmctl::MacAddr(BACKEND));
    let after = snapshot_of(before.policy().clone(), |_| BackendObservation {
        mac,
        ..BackendObservation::UNKNOWN
    });
    assert!(matches!(decision(&after, &flows, &packet, 0), Verdict::Redirect(_)));
}

#[test]
fn filters_go_first_even_for_replies() {
    let lines = [
        "R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3",
        "R F 2:0:0:0:0:1 10.0.0.1",
        "A 2:0:0:0:0:1 I 1 s 10.0.0.3",
    ];
    let (snapshot, flows) = (snapshot(&lines), EngineState::new(100));
    decision(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
    let back = decision(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 0);
    assert_eq!((back, back.mark(0)), (Verdict::Drop(DropReason::Filtered), None));
}

const POOL: &str = "R L 2:0:0:0:0:2 10.0.0.2:80 hash 10.0.0.3:8080@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4 10.0.0.5@2:0:0:0:0:5";

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
fn establish(
    snapshot: &Snapshot,
    memory: &EngineState,
    port: u16,
    to_backend: Translation,
) -> Translation {
    let IpAddr::V4(backend) = to_backend.key.backend.ip else { panic!("IPv6") };
    let from = ([2, 0, 0, 0, 0, backend.octets()[3]], backend.octets()[3]);
    let ports = (to_backend.key.backend.port.unwrap(), port);
    let accept = tcp(from.0, CLIENT, (from.1, 1), ports, flag::SYN | flag::ACK);
    assert!(matches!(decision(snapshot, memory, &accept, 1), Verdict::Reply(_)));
    // The client has sent 1 and so expects 2.
    let mut packet = ack(port);
    if let Some(numbers) = packet.ip.as_mut().and_then(|ip| ip.tcp_numbers.as_mut()) {
        numbers.acknowledgement = 2;
    }
    to(decision(snapshot, memory, &packet, 2))
}

fn to(verdict: Verdict) -> Translation {
    match verdict {
        Verdict::Redirect(to) => to,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pools_connection_keeps_its_backend_from_end_to_end() {
    let (before, memory) = (snapshot(&[POOL]), EngineState::new(1000));
    let first = to(decision(&before, &memory, &syn(1000), 0));
    assert_eq!(first.cache, CacheAction::Invalidate, "nothing yet but that it is no other flow");
    assert_eq!(to(decision(&before, &memory, &syn(1000), 1)).slot, first.slot);
    let second = establish(&before, &memory, 1000, first);
    assert_eq!((second.slot, second.cache), (first.slot, CacheAction::Install));
    // Others are added and drained; the flow stays, and a drained one gets no new ones.
    let mut policy = before.policy().clone();
    let name = first.key.backend;
    policy.apply_line("B 2:0:0:0:0:2 + 10.0.0.6@2:0:0:0:0:6").unwrap();
    policy.apply_line(&format!("B 2:0:0:0:0:2 = {name} drain")).unwrap();
    let after = following(&before, policy, |_| BackendObservation::UNKNOWN);
    assert_eq!(to(decision(&after, &memory, &ack(1000), 3)).slot, first.slot);
    for port in 2000..2100 {
        assert_ne!(to(decision(&after, &memory, &syn(port), 3)).slot, first.slot);
    }
    let fin = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::FIN | flag::ACK);
    assert_eq!(to(decision(&after, &memory, &fin, 4)).cache, CacheAction::Expire);
    // A new connection with these ports may go elsewhere.
    assert_ne!(to(decision(&after, &memory, &syn(1000), 5)).slot, first.slot);
}

#[test]
fn a_connection_outlives_a_forged_reset() {
    let (snapshot, memory) = (snapshot(&[POOL]), EngineState::new(1000));
    let first = to(decision(&snapshot, &memory, &syn(1000), 0));
    establish(&snapshot, &memory, 1000, first);
    let reset = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::RST);
    assert_eq!(to(decision(&snapshot, &memory, &reset, 3)).cache, CacheAction::Expire);
    let goes_on = to(decision(&snapshot, &memory, &ack(1000), 9));
    assert_eq!(
        (goes_on.slot, goes_on.cache),
        (first.slot, CacheAction::Install),
        "the kernel has it again"
    );
}

#[test]
fn replies_come_from_the_frontends_address_and_port() {
    let (snapshot, memory) = (snapshot(&[POOL]), EngineState::new(1000));
    let ported = (1000..1100).find_map(|port| {
        let to = to(decision(&snapshot, &memory, &syn(port), 0));
        to.port.then_some((port, to))
    });
    let (port, there) = ported.unwrap();
    assert_eq!(there.key.backend.to_string(), "10.0.0.3:8080");
    establish(&snapshot, &memory, port, there);
    let back = tcp(BACKEND, CLIENT, (3, 1), (8080, port), flag::ACK);
    let Verdict::Reply(from) = decision(&snapshot, &memory, &back, 9) else { panic!("no reply") };
    assert_eq!((from.slot, from.port, from.cache), (there.slot, true, CacheAction::Install));
    let reset = tcp(BACKEND, CLIENT, (3, 1), (8080, port), flag::RST);
    let Verdict::Reply(from) = decision(&snapshot, &memory, &reset, 9) else { panic!("no reply") };
    assert_eq!(from.cache, CacheAction::Expire);
    let other = tcp(BACKEND, CLIENT, (3, 1), (80, port), flag::ACK);
    assert_eq!(
        decision(&snapshot, &memory, &other, 1),
        Verdict::Bypass,
        "another port is not its flow"
    );
}

#[test]
fn earlier_connections_belong_to_the_middlebox() {
    let (snapshot, memory) = (snapshot(&[POOL]), EngineState::new(1000));
    let passed = decision(&snapshot, &memory, &ack(1000), 0);
    let Verdict::Local(slot) = passed else { panic!("{passed:?}") };
    assert_eq!(snapshot.desired().slots.key_of(slot).unwrap().backend.to_string(), "10.0.0.2:80");
    let fin = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::FIN | flag::ACK);
    assert_eq!(
        decision(&snapshot, &memory, &fin, 0),
        Verdict::Accept(AcceptReason::LocalConnection)
    );
    assert!(memory.flows.is_empty());
    to(decision(&snapshot, &memory, &syn(1000), 0));
}

fn dead_if(is_dead: bool) -> Liveness {
    if is_dead { Liveness::Dead } else { Liveness::Alive }
}

#[test]
fn a_dead_backends_flows_move_or_end_as_configured() {
    for (option, expected) in [
        ("", "kept"),
        (" on-dead=move", "moved"),
        (" on-dead=reset", "reset"),
        (" on-dead=keep", "kept"),
    ] {
        let (before, memory) = (snapshot(&[&format!("{POOL}{option}")]), EngineState::new(1000));
        let first = to(decision(&before, &memory, &syn(1000), 0));
        establish(&before, &memory, 1000, first);
        let dead = first.key.backend;
        let seen = |name: &BackendName| BackendObservation {
            liveness: dead_if(*name == dead),
            ..BackendObservation::UNKNOWN
        };
        let after = following(&before, before.policy().clone(), seen);
        let became = match decision(&after, &memory, &ack(1000), 1) {
            Verdict::Redirect(to) if to.key.backend == dead => "kept",
            Verdict::Redirect(_) => "moved",
            Verdict::Reject(DropReason::BackendGone) => "reset",
            other => panic!("{other:?}"),
        };
        assert_eq!(became, expected);
        for port in 2000..2050 {
            assert_ne!(
                to(decision(&after, &memory, &syn(port), 1)).key.backend,
                dead,
                "no new flow"
            );
        }
    }
}

#[test]
fn without_a_backend_packets_are_rejected_or_passed() {
    let memory = EngineState::new(1000);
    let nobody = |option: &str, seen: BackendObservation| {
        let line = format!("R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3 10.0.0.4{option}");
        let policy = snapshot(&[&line]).policy().clone();
        decision(&snapshot_of(policy, |_| seen), &memory, &syn(1000), 0)
    };
    let dead = BackendObservation { mac: None, liveness: Liveness::Dead };
    assert_eq!(nobody("", dead), Verdict::Reject(DropReason::NoBackend));
    assert_eq!(nobody(" on-empty=pass", dead), Verdict::Accept(AcceptReason::NoBackend));
    assert_eq!(
        nobody("", BackendObservation::UNKNOWN),
        Verdict::Drop(DropReason::BackendUnresolved),
        "not yet known"
    );
    assert!(memory.flows.is_empty());
}

#[test]
fn a_backend_that_is_a_client_gets_another() {
    let (snapshot, memory) = (snapshot(&[POOL]), EngineState::new(1000));
    for port in 1000..1100 {
        let packet = tcp(BACKEND, VM, (3, 2), (port, 80), flag::SYN);
        assert_ne!(
            to(decision(&snapshot, &memory, &packet, 0)).key.backend.ip,
            IpAddr::from([10, 0, 0, 3])
        );
    }
    let alone = self::snapshot(&["R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3@2:0:0:0:0:3"]);
    let memory = EngineState::new(1000);
    let packet = tcp(BACKEND, VM, (3, 2), (1000, 80), flag::SYN);
    assert_eq!(decision(&alone, &memory, &packet, 0), Verdict::Accept(AcceptReason::NoBackend));
}

#[test]
fn two_services_with_one_backend_do_not_mix_a_clients_port() {
    let lines = [
        "R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3:80@2:0:0:0:0:3 10.0.0.4:80@2:0:0:0:0:4",
        "R L 2:0:0:0:0:2 10.0.0.2:81 rr 10.0.0.3:80@2:0:0:0:0:3 10.0.0.4:80@2:0:0:0:0:4",
        "R L 2:0:0:0:0:2 10.0.0.2:82 rr 10.0.0.3:80@2:0:0:0:0:3",
    ];
    let (snapshot, memory) = (snapshot(&lines), EngineState::new(1000));
    let syn = |port: u16| tcp(CLIENT, VM, (1, 2), (1000, port), flag::SYN);
    let first = to(decision(&snapshot, &memory, &syn(80), 0)).key.backend;
    let second = to(decision(&snapshot, &memory, &syn(81), 0)).key.backend;
    assert_ne!(first, second);
    assert_eq!(decision(&snapshot, &memory, &syn(82), 0), Verdict::Reject(DropReason::NoBackend));
    // UDP is another matter.
    let udp = udp(CLIENT, VM, (1, 2), (1000, 82));
    to(decision(&snapshot, &memory, &udp, 0));
}

#[test]
fn what_a_dead_backend_still_sends_is_not_passed_untranslated() {
    let before = snapshot(&[&format!("{POOL} on-dead=move")]);
    let memory = EngineState::new(1000);
    let there = to(decision(&before, &memory, &syn(1000), 0));
    let dead = BackendObservation { mac: None, liveness: Liveness::Dead };
    let after = following(&before, before.policy().clone(), |name| {
        if *name == there.key.backend { dead } else { BackendObservation::UNKNOWN }
    });
    let IpAddr::V4(ip) = there.key.backend.ip else { unreachable!("an IPv4 pool") };
    let [.., last] = ip.octets();
    let port = if there.port { there.key.backend.port.unwrap() } else { 80 };
    let late = tcp(BACKEND, CLIENT, (last, 1), (port, 1000), flag::ACK);
    assert_eq!(decision(&after, &memory, &late, 1), Verdict::Drop(DropReason::BackendGone));
    // Nor what one sends that was removed.
    let mut policy = before.policy().clone();
    policy.apply_line(&format!("B 2:0:0:0:0:2 - {}", there.key.backend)).unwrap();
    let removed = following(&before, policy, |_| BackendObservation::UNKNOWN);
    assert_eq!(decision(&removed, &memory, &late, 1), Verdict::Drop(DropReason::BackendGone));
}

#[test]
fn a_client_uses_a_port_through_one_of_two_static_services() {
    let lines = [
        "R L 2:0:0:0:0:2 10.0.0.2:80 0 10.0.0.3:80@2:0:0:0:0:3",
        "R L 2:0:0:0:0:2 10.0.0.2:81 0 10.0.0.3:80@2:0:0:0:0:3",
    ];
    let (both, memory) = (snapshot(&lines), EngineState::new(1000));
    let syn = |port: u16| tcp(CLIENT, VM, (1, 2), (1000, port), flag::SYN);
    to(decision(&both, &memory, &syn(80), 0));
    assert_eq!(decision(&both, &memory, &syn(81), 0), Verdict::Reject(DropReason::NoBackend));
    to(decision(&both, &memory, &syn(80), 0));
    // Without the first service its flow holds nothing.
    let policy = snapshot(&lines[1..]).policy().clone();
    let second = both.successor(policy, &nfqd_rules::slots::Unobserved);
    to(decision(&second, &memory, &syn(81), 0));
}

#[test]
fn a_middlebox_that_was_rebuilt_with_another_mac_serves_at_once() {
    let service = |mac: u8| format!("R L 2:0:0:0:0:{mac} 10.0.0.2:80 rr 10.0.0.3:80@2:0:0:0:0:3");
    let (both, memory) = (snapshot(&[&service(2), &service(9)]), EngineState::new(1000));
    let syn = |to: [u8; 6]| tcp(CLIENT, to, (1, 2), (1000, 80), flag::SYN);
    to(decision(&both, &memory, &syn(VM), 0));
    to(decision(&both, &memory, &syn([2, 0, 0, 0, 0, 9]), 1));
}

#[test]
fn affinity_keeps_a_client_with_its_backend() {
    for method in ["rr", "least", "hash"] {
        let line = format!(
            "R L 2:0:0:0:0:2 10.0.0.2:80 {method} 10.0.0.3@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4 affinity"
        );
        let (snapshot, memory) = (snapshot(&[&line]), EngineState::new(10_000));
        let backend = |client: u8, port: u16| {
            let packet = tcp(CLIENT, VM, (client, 2), (port, 80), flag::SYN);
            to(decision(&snapshot, &memory, &packet, 0)).key.backend
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
    let (snapshot, memory) = (snapshot(&[POOL]), EngineState::new(1000));
    let ported = (1000..1100).find_map(|port| {
        let to = to(decision(&snapshot, &memory, &syn(port), 0));
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
        decision(&snapshot, &memory, &Packet::from_frame(&out).unwrap(), 1)
    };
    // From the client: what the address sent it was too big.
    let Verdict::Error { quote, to, from } = error((CLIENT, VM), (1, 2), ([2, 1], [80, port]))
    else {
        panic!("not translated")
    };
    let backend =
        QuotedTranslation { side: Side::Source, ip: IpAddr::from([10, 0, 0, 3]), port: Some(8080) };
    assert_eq!(
        (quote, to.map(|to| (to.slot, to.port)), from),
        (backend, Some((there.slot, false)), None)
    );
    // From the backend, and from a router on the way to it: what the client sent was too big.
    let frontend = QuotedTranslation {
        side: Side::Destination,
        ip: IpAddr::from([10, 0, 0, 2]),
        port: Some(80),
    };
    for (router, from_backend) in [(3, true), (77, false)] {
        let decision = error((BACKEND, CLIENT), (router, 1), ([1, 3], [port, 8080]));
        let Verdict::Error { quote, to: None, from } = decision else { panic!("not translated") };
        assert_eq!((quote, from.is_some()), (frontend, from_backend));
    }
    let other = error((BACKEND, CLIENT), (77, 1), ([1, 3], [port, 80]));
    assert_eq!(other, Verdict::Accept(AcceptReason::NotForMiddlebox), "about no flow of ours");
}

#[test]
fn fragments_of_balanced_datagrams_wait_for_the_first() {
    let (snapshot, memory) = (
        snapshot(&[
            "R L 2:0:0:0:0:2 10.0.0.2:53 rr 10.0.0.3:5353@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4",
        ]),
        EngineState::new(1000),
    );
    let fragment = |id: u16, first: bool| {
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
        assert_eq!(
            decision(&snapshot, &memory, &fragment(id, false), 0),
            Verdict::AwaitFirstFragment
        );
        let first = to(decision(&snapshot, &memory, &fragment(id, true), 0));
        let later = to(decision(&snapshot, &memory, &fragment(id, false), 0));
        assert_eq!((later.slot, later.port), (first.slot, false));
        assert_eq!(first.port, first.key.backend.port == Some(5353));
    }
    // Fragments of a datagram whose backend goes meanwhile are dropped, and make no flow of their own.
    let first = to(decision(&snapshot, &memory, &fragment(20, true), 0));
    let gone = following(&snapshot, snapshot.policy().clone(), |name| BackendObservation {
        liveness: if *name == first.key.backend { Liveness::Drained } else { Liveness::Alive },
        ..BackendObservation::UNKNOWN
    });
    let flows = memory.flows.len();
    assert_eq!(
        decision(&gone, &memory, &fragment(20, false), 0),
        Verdict::Drop(DropReason::FirstFragmentDropped)
    );
    assert_eq!(memory.flows.len(), flows);
}

/// Another host has served the connection: with `takeover`, the backend that hashing gives it goes on.
#[test]
fn a_connection_of_another_host_goes_to_the_backend_of_its_hash() {
    let pool = format!("{POOL} takeover");
    let (here, memory) = (snapshot(&[&pool]), EngineState::new(1000));
    let (there, its_memory) = (snapshot(&[&pool]), EngineState::new(1000));
    for port in 1000..1100 {
        let first = to(decision(&there, &its_memory, &syn(port), 0));
        let then = to(decision(&here, &memory, &ack(port), 0));
        assert_eq!(then.key.backend, first.key.backend);
        let IpAddr::V4(ip) = first.key.backend.ip else { panic!("IPv6") };
        let from = ip.octets()[3];
        let ports = (first.key.backend.port.unwrap(), port);
        let answer = tcp([2, 0, 0, 0, 0, from], CLIENT, (from, 1), ports, flag::ACK);
        let Verdict::Reply(reply) = decision(&here, &memory, &answer, 0) else {
            panic!("{port}: its reply is not translated")
        };
        assert_eq!(reply.key, then.key);
        assert_eq!(to(decision(&here, &memory, &ack(port), 1)).cache, CacheAction::Install);
    }
    let (without, memory) = (snapshot(&[POOL]), EngineState::new(1000));
    assert!(!matches!(decision(&without, &memory, &ack(1000), 0), Verdict::Redirect(_)));
}

/// Only what is established stays with a dead backend: a SYN that is sent again, and datagrams, find
/// another.
#[test]
fn what_is_not_established_leaves_a_dead_backend() {
    let line = "R L 2:0:0:0:0:2 10.0.0.2:80 hash 10.0.0.3:8080@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4";
    let (before, memory) = (snapshot(&[line]), EngineState::new(1000));
    let datagram = |port: u16| udp(CLIENT, VM, (1, 2), (port, 80));
    let first = to(decision(&before, &memory, &syn(1000), 0));
    let dead = first.key.backend;
    let port = (1..100)
        .find(|port| to(decision(&before, &memory, &datagram(*port), 0)).key.backend == dead)
        .unwrap();
    let after = following(&before, before.policy().clone(), |name| BackendObservation {
        liveness: dead_if(*name == dead),
        ..BackendObservation::UNKNOWN
    });
    assert_ne!(to(decision(&after, &memory, &syn(1000), 1)).key.backend, dead);
    assert_ne!(to(decision(&after, &memory, &datagram(port), 1)).key.backend, dead);
}

/// The kernel does not refresh what it caches of a flow, so one that expires before is not cached.
#[test]
fn a_udp_service_sets_its_timeout() {
    for (option, timeout, is_cached) in
        [("", 300, true), (" udp-timeout=10", 10, false), (" udp-timeout=4000", 4000, true)]
    {
        let line = format!(
            "R L 2:0:0:0:0:2 10.0.0.2:53/udp rr 10.0.0.3@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4{option}"
        );
        let (snapshot, memory) = (snapshot(&[&line]), EngineState::new(1000));
        let packet = udp(CLIENT, VM, (1, 2), (1000, 53));
        let first = to(decision(&snapshot, &memory, &packet, 0));
        assert_eq!(first.cache == CacheAction::Install, is_cached, "{option}");
        let same = to(decision(&snapshot, &memory, &packet, timeout - 1));
        assert_eq!(same.key.backend, first.key.backend, "{option}");
        let other = to(decision(&snapshot, &memory, &packet, 2 * timeout - 1));
        assert_ne!(other.key.backend, first.key.backend, "{option}: in turn");
    }
}
