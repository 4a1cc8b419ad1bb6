//! The three oracles: the fast path in the kernel, the engine alone, and offline replay give the
//! same verdict and the same bytes for every frame. `nfqd trace` is the fourth witness: it tells what then
//! happens.
//!
//! `NFQD_TESTS_POLICIES` sets the number of random policies (60 frames each), `NFQD_TESTS_SEED` the
//! randomness.
#![allow(clippy::unwrap_used)]

use nfqd::api::client::ask;
use nfqd::api::{Answer, Request, Trace, TraceRequest};
use nfqd::engine::reason::Reason;
use nfqd::replay::{Outcome, Replay};
use nfqd::trace::words::to_hex;
use nfqd_rules::Policy;
use nfqd_rules::packet::{Packet, l3_offset};
use nfqd_tests::captures;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::frames::{HOSTS, MIDDLEBOXES, case_frames, policy};
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::tap::Tap;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};
use proptest::{prop_assert, prop_assert_eq};
use std::cell::RefCell;
use std::time::{Duration, Instant};

/// Frames of a case, on average.
const FRAMES: usize = 60;

/// A middlebox whose ICMP goes through the queue in every mode: when its frame has come out, so has
/// everything before it.
const SENTINEL: &str = "R L 02:00:00:00:00:5e 10.0.0.94 0 10.0.0.95@02:00:00:00:00:5f";

struct Topology {
    uplink: Tap,
    /// Ports with the MACs behind them.
    ports: Vec<(Tap, Vec<[u8; 6]>)>,
    sentinel: Tap,
    daemon: Daemon,
    by_br_netfilter: bool,
}

fn bytes(mac: &str) -> [u8; 6] {
    mac.parse::<nfqd_shmctl::MacAddr>().unwrap().0
}

impl Topology {
    fn new(fast_path: &str) -> Topology {
        run("ip link add br0 type bridge mcast_snooping 0");
        run("ip link set br0 up");
        let uplink = Tap::on_bridge("br0", "uplink", &[]);
        let macs: Vec<&str> = MIDDLEBOXES.into_iter().chain(HOSTS).collect();
        let port = |(index, mac): (usize, &&str)| {
            (Tap::on_bridge("br0", &format!("port{index}"), &[mac]), vec![bytes(mac)])
        };
        let ports = macs.iter().enumerate().map(port).collect();
        let sentinel = Tap::on_bridge("br0", "sentinel", &["02:00:00:00:00:5f"]);
        // One queue, so that frames keep their order.
        let daemon = Daemon::start(&["--queue", "7", "--fast-path", fast_path]);
        daemon.must(SENTINEL);
        let by_br_netfilter = daemon.status().steer == "br-netfilter";
        Topology { uplink, ports, sentinel, daemon, by_br_netfilter }
    }

    /// Sends a frame and waits until it is through; returns the frames that came out, by port.
    /// Floods reach the sentinel's port, too.
    fn pass(&self, frame: &[u8]) -> Vec<(usize, Vec<u8>)> {
        match self.port_of_middlebox(frame.get(6..12)) {
            Some(index) => self.ports[index].0.send(frame),
            None => self.uplink.send(frame),
        }
        self.uplink.send(&sentinel_frame());
        loop {
            let out = self.sentinel.receive(Duration::from_secs(10));
            let out = out
                .unwrap_or_else(|| panic!("no sentinel after {frame:02x?}\n{}", self.daemon.log()));
            if out[..6] == bytes("02:00:00:00:00:5f") {
                break;
            }
        }
        let mut seen = Vec::new();
        for (index, (tap, _)) in self.ports.iter().enumerate() {
            seen.extend(std::iter::from_fn(|| tap.try_receive()).map(|frame| (index, frame)));
        }
        seen
    }

    /// Asks the daemon what would happen to a frame; `None` for one without an Ethernet header.
    fn trace(&self, frame: &[u8]) -> Option<Trace> {
        // A request holds the beginning.
        let beginning = &frame[..frame.len().min(1600)];
        let length = Some(frame.len());
        let request = TraceRequest { frame: to_hex(beginning), length, network: None };
        match ask(&self.daemon.control(), &Request::Trace(request)).expect("an answer") {
            Answer::Trace(trace) => Some(*trace),
            other => {
                assert!(Packet::from_frame(frame).is_none(), "{other:?}");
                None
            }
        }
    }

    /// The port that the frames of a middlebox come in by.
    fn port_of_middlebox(&self, source: Option<&[u8]>) -> Option<usize> {
        let is_middlebox = |mac: &[u8; 6]| MIDDLEBOXES.iter().any(|known| bytes(known) == *mac);
        let is_source = |mac: &[u8; 6]| source == Some(&mac[..]) && is_middlebox(mac);
        self.ports.iter().position(|(_, macs)| macs.iter().any(is_source))
    }

    /// The expected frames by port, if `leaves` leaves the middle of the bridge. None leaves by the
    /// port that it came in by.
    fn expected(&self, leaves: Option<Vec<u8>>) -> Vec<(usize, Vec<u8>)> {
        let Some(frame) = leaves else { return Vec::new() };
        let ingress = self.port_of_middlebox(frame.get(6..12));
        let Some(frame) = (if self.by_br_netfilter { br_netfilter(&frame) } else { Some(frame) })
        else {
            return Vec::new();
        };
        let at =
            self.ports.iter().position(|(_, macs)| macs.iter().any(|mac| frame[..6] == mac[..]));
        match at {
            Some(index) if Some(index) == ingress => Vec::new(),
            Some(index) => vec![(index, frame)],
            None => {
                let others = (0..self.ports.len()).filter(|index| Some(*index) != ingress);
                others.map(|index| (index, frame.clone())).collect()
            }
        }
    }
}

/// An ICMP echo request to the sentinel.
fn sentinel_frame() -> Vec<u8> {
    let mut out = [bytes("02:00:00:00:00:5e"), bytes("02:00:00:00:00:5d")].concat();
    out.extend([8, 0]);
    etherparse::PacketBuilder::ipv4([10, 0, 0, 93], [10, 0, 0, 94], 9)
        .icmpv4_echo_request(1, 2)
        .write(&mut out, &[])
        .unwrap();
    out
}

/// The checks of br_netfilter on every bridged IP packet (net/bridge/br_netfilter_hooks.c,
/// br_validate_ipv4 and br_validate_ipv6): inconsistent packets are dropped, and bytes behind the
/// packet are cut off.
fn br_netfilter(frame: &[u8]) -> Option<Vec<u8>> {
    let l3 = l3_offset(frame);
    let payload = frame.get(l3..).unwrap_or_default();
    let word = |at: usize| {
        payload.get(at..at + 2).map(|pair| usize::from(pair[0]) << 8 | usize::from(pair[1]))
    };
    let ether_type = [frame[l3 - 2], frame[l3 - 1]];
    let length = match ether_type {
        [8, 0] => {
            let header_len = usize::from(payload.first()? & 15) * 4;
            let header =
                payload.get(..header_len).filter(|_| payload[0] >> 4 == 4 && header_len >= 20)?;
            let mut sum: u32 =
                header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            let total = word(2)?;
            (sum == 0xffff && total >= header_len && total <= payload.len()).then_some(total)?
        }
        [0x86, 0xdd] => {
            let total = word(4)? + 40;
            let options = payload.get(6) != Some(&0) || hop_by_hop_holds(payload.get(40..)?);
            (payload.len() >= 40 && payload[0] >> 4 == 6 && total <= payload.len() && options)
                .then_some(total)?
        }
        _ => payload.len(),
    };
    Some(frame[..l3 + length].to_vec())
}

/// `nf_ip6_check_hbh_len`: the options fill their header.
fn hop_by_hop_holds(header: &[u8]) -> bool {
    let Some(&len) = header.get(1) else { return false };
    let Some(mut options) = header.get(2..(usize::from(len) + 1) * 8) else { return false };
    while let Some(&kind) = options.first() {
        let len = if kind == 0 { Some(1) } else { options.get(1).map(|&len| usize::from(len) + 2) };
        match len.and_then(|len| options.get(len..)) {
            Some(rest) => options = rest,
            None => return false,
        }
    }
    true
}

/// Whether br_netfilter's cut changes what a packet says (bytes of the padding): such a frame has
/// no single answer there.
fn ambiguous_by_br_netfilter(frame: &[u8]) -> bool {
    br_netfilter(frame).is_some_and(|cut| Packet::from_frame(&cut) != Packet::from_frame(frame))
}

/// Whether a trace tells what replay says of the same frame. Fragments that the frame releases are no
/// concern of its own.
fn agrees(trace: Option<&Trace>, outcomes: &[Outcome]) -> Result<(), String> {
    let Some(trace) = trace else { return Ok(()) };
    let Some((line, _)) = outcomes.first() else {
        let is_held = trace.reason == Reason::FirstFragmentMissing.name();
        return if is_held { Ok(()) } else { Err("the frame is held".to_string()) };
    };
    // Fragments that have expired come first.
    if outcomes.len() > 1 {
        return Ok(());
    }
    let rule = trace.rule.as_ref().and_then(|rule| rule.strip_prefix('#')?.parse::<u16>().ok());
    let to = trace.to.as_ref().map(|to| (to.ip.clone(), to.port));
    let its_to = line.to.as_ref().map(|to| (to.ip.clone(), to.port));
    if trace.verdict != line.verdict || rule != line.rule || to != its_to {
        return Err(line.text());
    }
    if trace.explanation != line.reason {
        return Err(format!("{} is not {}", trace.explanation, line.reason));
    }
    Ok(())
}

/// Whether the sender of a packet with this reason may be told of its end.
fn is_refusal(reason: &str) -> bool {
    ["rejected", "ended"].iter().any(|word| reason.ends_with(word))
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Commands of a policy, and frames under it.
type Case = (Vec<String>, Vec<Vec<u8>>);

/// The number of comparisons.
#[derive(Debug, Default)]
struct Tally {
    accepted: usize,
    dropped: usize,
    redirected: usize,
    /// Answers that were translated, among those accepted.
    replies: usize,
    /// Answers to the middlebox itself.
    own: usize,
    /// ICMP errors about flows, from routers before the backend.
    errors: usize,
    /// Later fragments that had to wait.
    held: usize,
    /// Frames that have no single answer by br_netfilter.
    skipped: usize,
}

/// A topology and a replay, which see the same frames under the same policies at the same time.
struct Oracles {
    topology: Topology,
    replay: Replay,
    start: Instant,
    tally: Tally,
}

impl Oracles {
    fn new(fast_path: &str) -> Oracles {
        let topology = Topology::new(fast_path);
        Oracles {
            topology,
            replay: Replay::new(&Policy::default()),
            start: Instant::now(),
            tally: Tally::default(),
        }
    }

    /// Applies a policy on both sides, step by step: services that are registered anew have no
    /// flows.
    fn set_policy(&mut self, commands: &[String]) -> Result<(), TestCaseError> {
        let daemon = &self.topology.daemon;
        let mut policy = Policy::default();
        for mac in MIDDLEBOXES {
            let reply = daemon.tell(&format!("X {mac}"));
            prop_assert!(reply.starts_with("OK") || reply.contains("unknown-mac"), "{}", reply);
        }
        policy.apply_line(SENTINEL).unwrap();
        self.replay.set_policy(&policy);
        for command in commands {
            let expected = policy.apply_line(command);
            let reply = daemon.tell(command);
            prop_assert_eq!(
                reply.starts_with("OK"),
                expected.is_ok(),
                "{}: {}\n{}",
                command,
                reply,
                daemon.log()
            );
            self.replay.set_policy(&policy);
        }
        Ok(())
    }

    /// Runs a case through the topology and through replay.
    fn compare(&mut self, (commands, frames): &Case) -> Result<(), TestCaseError> {
        self.set_policy(commands)?;
        let mut history = Vec::new();
        for frame in frames {
            if self.topology.by_br_netfilter && ambiguous_by_br_netfilter(frame) {
                self.tally.skipped += 1;
                continue;
            }
            // A frame that br_netfilter drops on its way to the engine leaves no state there.
            if self.topology.by_br_netfilter && br_netfilter(frame).is_none() {
                // One of a middlebox is remembered before that, as what the middlebox has begun.
                if self.topology.port_of_middlebox(frame.get(6..12)).is_some() {
                    continue;
                }
                let seen = self.topology.pass(frame);
                prop_assert!(
                    seen.is_empty(),
                    "br_netfilter let {:02x?} through: {:02x?}",
                    frame,
                    seen
                );
                continue;
            }
            let traced = self.topology.trace(frame);
            let now = self.start.elapsed().as_secs() as u32;
            let outcomes = self.replay.frame(frame, now);
            if let Err(difference) = agrees(traced.as_ref(), &outcomes) {
                prop_assert!(
                    false,
                    "trace and replay disagree: {}\nframe {:02x?}\n{:#?}\n{}\nbefore\n{}",
                    difference,
                    frame,
                    traced,
                    commands.join("\n"),
                    history.join("\n")
                );
            }
            let mut expected = Vec::new();
            for (line, leaves) in &outcomes {
                *match line.verdict {
                    "accept" => &mut self.tally.accepted,
                    "drop" => &mut self.tally.dropped,
                    _ => &mut self.tally.redirected,
                } += 1;
                let balanced = line.to.is_some() || line.from.is_some();
                self.tally.errors += usize::from(line.reason.contains("about a flow"));
                self.tally.replies += usize::from(balanced && line.from.is_some());
                self.tally.own += usize::from(line.reason.contains("of the middlebox itself"));
                expected.extend(self.topology.expected(leaves.clone()));
            }
            self.tally.held += usize::from(outcomes.is_empty());
            let mut seen = self.topology.pass(frame);
            // The bridge sends nothing back to where it came from; a refusal goes there.
            if outcomes.iter().any(|(line, _)| is_refusal(&line.reason)) {
                let ingress = self.topology.port_of_middlebox(frame.get(6..12));
                seen.retain(|(port, _)| Some(*port) != ingress);
            }
            // The frames of one port are in order; those of several ports are not.
            expected.sort_by_key(|(port, _)| *port);
            seen.sort_by_key(|(port, _)| *port);
            let line = outcomes.iter().map(|(line, _)| line.text()).collect::<Vec<_>>().join("; ");
            history.push(format!("{line}: {frame:02x?}"));
            prop_assert!(
                seen == expected,
                "replay and kernel disagree\nframe    {:02x?}\nreplay   {}\nexpected {:02x?}\nseen     {:02x?}\n\
                 policy\n{}\nbefore\n{}\n{}\n{}",
                frame,
                line,
                expected,
                seen,
                commands.join("\n"),
                history.join("\n"),
                run("nft list table bridge nfqd"),
                self.topology.daemon.log().lines().rev().take(30).collect::<Vec<_>>().join("\n"),
            );
        }
        Ok(())
    }
}

/// A UDP packet between addresses 10.0.0.x, to a MAC of the world.
fn udp(to: &str, from: &str, source: u8, destination: u8, sport: u16, dport: u16) -> Vec<u8> {
    let mut out = Vec::new();
    etherparse::PacketBuilder::ethernet2(bytes(from), bytes(to))
        .ipv4([10, 0, 0, source], [10, 0, 0, destination], 64)
        .udp(sport, dport)
        .write(&mut out, &[9; 20])
        .unwrap();
    out
}

/// A TCP segment between addresses 10.0.0.x, to a MAC of the world; either a reset or without flags.
fn segment(
    to: &str,
    from: &str,
    [source, destination]: [u8; 2],
    ports: [u16; 2],
    rst: bool,
) -> Vec<u8> {
    let mut out = Vec::new();
    let segment = etherparse::PacketBuilder::ethernet2(bytes(from), bytes(to))
        .ipv4([10, 0, 0, source], [10, 0, 0, destination], 64)
        .tcp(ports[0], ports[1], 1, 256);
    let segment = if rst { segment.rst() } else { segment };
    segment.write(&mut out, &[]).unwrap();
    out
}

/// An ICMP error about an IPv4 packet, from the host that it was sent to.
fn unreachable(to: &str, from: &str, [source, destination]: [u8; 2], about: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let port = etherparse::icmpv4::DestUnreachableHeader::Port;
    etherparse::PacketBuilder::ethernet2(bytes(from), bytes(to))
        .ipv4([10, 0, 0, source], [10, 0, 0, destination], 64)
        .icmpv4(etherparse::Icmpv4Type::DestinationUnreachable(port))
        .write(&mut out, &about[14..])
        .unwrap();
    out
}

/// Disagreements that were found earlier.
fn found_before() -> Vec<Case> {
    let commands = |lines: &[&str]| lines.iter().map(ToString::to_string).collect::<Vec<_>>();
    let ([one, two], [client, backend, other]) = (MIDDLEBOXES, HOSTS);
    // nft's fast path reads ports out of a later fragment: 00 51 here, which is 81.
    let mut later = [bytes(one), bytes(backend)].concat();
    later.extend([8, 0, 0x45, 0, 0, 32, 0, 2, 0x20, 1, 64, 6, 0, 0, 10, 0, 0, 3, 10, 0, 0, 3]);
    later.extend([0x00, 0x51, 0x03, 0xe8, 1, 2, 3, 4, 5, 6, 7, 8]);
    let sum: u32 =
        later[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    later[24..26].copy_from_slice(&sum.to_be_bytes());
    // A flow outlives its service, is taken for the backend's own, and the service is registered
    // again.
    let service = format!("R L {two} 10.0.0.9 0 10.0.0.3@{backend}");
    let elsewhere = format!("R L {one} 10.0.0.2 0 10.0.0.3@{backend}");
    let there = udp(two, client, 4, 9, 53, 80);
    let back = udp(client, backend, 3, 4, 80, 53);
    // By br_netfilter the engine does not see a tag that the kernel has let pass.
    let closed =
        [&format!("R F {two} 10.0.0.9 deny"), &format!("A {two} +3 V 1 s 0-4095"), &service];
    let plain = udp(two, client, 4, 9, 53, 80);
    let through = udp(one, client, 4, 2, 2001, 81);
    let seen_by_backend = udp(backend, client, 4, 3, 2001, 81);
    let to_other = udp(one, client, 1, 9, 2002, 80);
    let reset = segment(two, client, [4, 9], [2003, 80], true);
    let answer = |to: &str| segment(to, backend, [3, 4], [80, 2003], false);
    let tagged = [&plain[..12], &[0x88, 0xa8, 0, 2], &plain[12..]].concat();
    vec![
        (commands(&closed.map(String::as_str)), vec![tagged]),
        (commands(&[&format!("R F {one} 10.0.0.2"), &format!("A {one} #5 T 1 s 81")]), vec![later]),
        (commands(&[&service]), vec![there.clone(), back.clone()]),
        (commands(&[&elsewhere]), vec![back.clone(), back.clone()]),
        (commands(&[&service]), vec![back.clone(), back.clone(), there, back.clone(), back]),
        // The answer to what a middlebox has begun looks like the reply of another one's service.
        (
            commands(&[&elsewhere, &format!("R L {two} 10.0.0.9:80 rr 10.0.0.4@{other}")]),
            vec![
                udp(one, two, 9, 2, 2000, 80),
                udp(backend, two, 9, 3, 2000, 80),
                udp(two, backend, 3, 9, 80, 2000),
            ],
        ),
        // An error about a flow from before its backend has come to own the frontend's address.
        (commands(&[&elsewhere]), vec![through.clone()]),
        (
            commands(&[&format!("R L {one} 10.0.0.2 rr 10.0.0.3@{backend} dsr")]),
            vec![unreachable(client, backend, [3, 4], &seen_by_backend)],
        ),
        // A flow of another address goes through the service of the whole host, which then serves
        // its own address only.
        (commands(&[&format!("R L {one} 10.0.0.2 0 10.0.0.4@{other}")]), vec![to_other.clone()]),
        (
            commands(&[
                &format!("R L {one} 10.0.0.9:80 rr 10.0.0.3:81@{backend}"),
                &format!("R L {one} 10.0.0.2 rr 10.0.0.4@{other} dsr"),
            ]),
            vec![to_other],
        ),
        // A flow that ends with its first segment takes over what was the backend's own.
        (commands(&[&service]), vec![answer(client), reset]),
        (commands(&[&elsewhere]), vec![answer(client)]),
        (commands(&[&service]), vec![answer(two)]),
    ]
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn earlier_disagreements_stay_fixed() {
    for fast_path in ["full", "off"] {
        in_netns(move || {
            let mut oracles = Oracles::new(fast_path);
            for case in found_before() {
                oracles.compare(&case).unwrap_or_else(|error| panic!("{error}"));
            }
            let Tally { accepted, dropped, redirected, skipped, .. } = oracles.tally;
            assert_eq!((accepted + dropped + redirected, skipped), (22, 0));
        });
    }
}

/// The captures under each of the policies beside them.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn the_oracles_agree_about_the_captures() {
    for (name, frames) in captures::all() {
        let file = captures::folder().join(format!("{name}.pcap"));
        let kept = std::fs::read(&file).unwrap();
        assert!(
            kept == captures::pcap(&frames),
            "{name}.pcap: write it anew, cargo run -p nfqd-tests --bin captures"
        );
    }
    for fast_path in ["full", "off"] {
        in_netns(move || {
            let mut oracles = Oracles::new(fast_path);
            for policy in captures::POLICIES {
                let file = captures::folder().join(format!("{policy}.commands"));
                let text = std::fs::read_to_string(file).unwrap();
                let commands: Vec<String> =
                    nfqd_shmctl::split_lines(&text).map(|(_, line)| line.to_string()).collect();
                // Fragments that have waited since the last time have expired by then.
                std::thread::sleep(Duration::from_secs(4));
                for (name, frames) in captures::all() {
                    let case = (commands.clone(), frames);
                    oracles
                        .compare(&case)
                        .unwrap_or_else(|error| panic!("{name} under {policy}: {error}"));
                }
            }
            println!("captures, fast path {fast_path}: {:?}", oracles.tally);
            let Tally { accepted, dropped, redirected, .. } = oracles.tally;
            assert!(accepted.min(dropped).min(redirected) > 200, "{:?}", oracles.tally);
        });
    }
}

/// The policies that one topology sees. Engine and replay have clocks of their own, by which a flow
/// may expire in one of them a second earlier, so it has to end before the shortest timeout of a
/// flow: a minute.
const POLICIES_OF_TOPOLOGY: u64 = 40;

/// Random policies and frames.
fn random(fast_path: &'static str) {
    let (all, seed) = (setting("NFQD_TESTS_POLICIES", 60), setting("NFQD_TESTS_SEED", 1));
    for (number, first) in (0..all).step_by(POLICIES_OF_TOPOLOGY as usize).enumerate() {
        let policies = POLICIES_OF_TOPOLOGY.min(all - first);
        random_policies(fast_path, policies, seed * 1000 + number as u64);
    }
}

/// Random policies in one topology. A disagreement is reduced, frame by frame and command by
/// command, before it is shown.
fn random_policies(fast_path: &'static str, policies: u64, seed_number: u64) {
    in_netns(move || {
        let oracles = RefCell::new(Oracles::new(fast_path));
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(&seed_number.to_le_bytes());
        let config = Config {
            cases: policies as u32,
            max_shrink_iters: 400,
            failure_persistence: None,
            ..Config::default()
        };
        let mut runner =
            TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
        let result = runner.run(&(policy(), case_frames(1..=2 * FRAMES)), |case| {
            oracles.borrow_mut().compare(&case)
        });
        if let Err(error) = result {
            panic!("{error}");
        }
        let Oracles { topology, tally, .. } = &*oracles.borrow();
        println!(
            "fast path {fast_path}, {}, seed {seed_number}: {policies} policies, {tally:?}, {} went to \
             the engine",
            topology.daemon.status().steer,
            topology.daemon.queued_packets()
        );
        let least = tally.accepted.min(tally.dropped).min(tally.redirected);
        assert!(least > policies as usize, "a verdict hardly came up: {tally:?}");
        assert!(
            tally.held.min(tally.errors).min(tally.replies).min(tally.own) > policies as usize / 20,
            "hardly came up: {tally:?}"
        );
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn the_fast_path_and_replay_agree() {
    random("full");
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn the_engine_alone_and_replay_agree() {
    random("off");
}
