//! Several networks on one host: the same addresses in each, and nothing of one in another.

#![allow(clippy::unwrap_used)]

use nfqd_tests::daemon::Daemon;
use nfqd_tests::netns::{Host, in_netns, run};
use nfqd_tests::segment::{Guest, PORT, Segment, middlebox_on, wait_for_backends};
use nfqd_tests::topology::{BACKEND, CLIENT, VM, VM_MAC, connect_plain, pings, wait_for, who};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn bridge(name: &str) {
    run(&format!("ip link add {name} type bridge mcast_snooping 0"));
    run(&format!("ip link set {name} up"));
}

fn two_bridges() -> (Segment, Segment) {
    bridge("br0");
    bridge("br1");
    let one = Segment::new("0", ["vm0", "backend0"]);
    let other = Segment::new("1", ["vm1", "backend1"]);
    one.plug("br0");
    other.plug("br1");
    (one, other)
}

/// A daemon with a channel for each network.
struct Bound {
    daemon: Daemon,
    directory: TempDir,
}

impl Bound {
    fn new(networks: &[&str], arguments: &[&str]) -> Bound {
        let directory = tempfile::tempdir().unwrap();
        let shm = |(at, network): (usize, &&str)| {
            format!("{}/{at},{network}", directory.path().display())
        };
        let shms: Vec<String> = networks.iter().enumerate().map(shm).collect();
        let mut all: Vec<&str> = shms.iter().flat_map(|shm| ["--shm", shm.as_str()]).collect();
        all.extend(arguments);
        Bound { daemon: Daemon::start(&all), directory }
    }

    fn guest(&self, at: usize) -> Guest {
        Guest(self.directory.path().join(at.to_string()))
    }
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn tenants_with_the_same_addresses_on_two_bridges_never_meet() {
    for mode in ["full", "off"] {
        in_netns(move || {
            let (one, other) = two_bridges();
            let mut bound = Bound::new(&["bridge=br0", "bridge=br1"], &["--fast-path", mode]);
            let (first, second) = (bound.guest(0), bound.guest(1));
            let pool = format!("R L {VM_MAC} {VM}:80 rr {BACKEND} check=arp");
            first.must(&pool);
            second.must(&format!("R F {VM_MAC} {VM}"));
            wait_for_backends(&bound.daemon, "br0");
            assert_eq!(one.at_vm().as_deref(), Some("backend0"), "{mode}");
            assert_eq!(other.at_vm().as_deref(), Some("vm1"), "{mode}");
            second.must(&format!("A {VM_MAC} I 8 p icmp"));
            assert!(pings(&one.client, VM) && !pings(&other.client, VM), "{mode}");
            second.must(&format!("R L {VM_MAC} {VM} 0 {BACKEND}"));
            wait_for_backends(&bound.daemon, "br1");
            assert_eq!(other.at_vm().as_deref(), Some("backend1"), "{mode}");
            // Neither sees nor ends what the other has registered.
            assert!(!second.tell("Q").contains("rr"), "{}", second.tell("Q"));
            first.must(&format!("X {VM_MAC}"));
            assert!(first.tell(&format!("X {VM_MAC}")).starts_with("ERR unknown-mac"));
            assert_eq!(one.at_vm().as_deref(), Some("vm0"), "{mode}");
            assert_eq!(other.at_vm().as_deref(), Some("backend1"), "{mode}");
            assert!(pings(&one.client, VM) && !pings(&other.client, VM), "{mode}");
            first.must(&pool);
            wait_for_backends(&bound.daemon, "br0");
            let before = (middlebox_on(&bound.daemon, "br0"), middlebox_on(&bound.daemon, "br1"));
            bound.daemon.kill();
            bound.daemon.restart();
            let after = (middlebox_on(&bound.daemon, "br0"), middlebox_on(&bound.daemon, "br1"));
            assert_eq!(before.0.commands, after.0.commands);
            assert_eq!(before.1.commands, after.1.commands);
            // The engine's own counters end with it.
            let kept = mode == "off" || after.1.rules[0].packets >= before.1.rules[0].packets;
            assert!(kept, "{before:?} {after:?}");
            assert_eq!(one.at_vm().as_deref(), Some("backend0"), "{mode}");
            assert_eq!(other.at_vm().as_deref(), Some("backend1"), "{mode}");
            assert_eq!((one.servers(), other.servers()), (2, 2));
        });
    }
}

/// Counts the frames to these MACs that leave by a port.
fn count_at(port: &str, macs: &[&str]) {
    run("nft add table bridge seen");
    let hook = "{ type filter hook postrouting priority 0; }";
    run_nft(&format!("add chain bridge seen {port} {hook}"));
    for mac in macs {
        run_nft(&format!("add rule bridge seen {port} oifname {port} ether daddr {mac} counter"));
    }
}

fn run_nft(line: &str) {
    let status = std::process::Command::new("nft").arg(line).status().unwrap();
    assert!(status.success(), "{line}");
}

fn counted(port: &str) -> u64 {
    let listed = run(&format!("nft list chain bridge seen {port}"));
    let packets = listed.lines().filter_map(|line| line.split("packets ").nth(1));
    packets.map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_backend_on_another_bridge_is_said_and_its_traffic_stays_with_the_vm() {
    in_netns(|| {
        bridge("br0");
        bridge("br1");
        let segment = Segment::new("0", ["vm", "backend"]);
        segment.plug("br0");
        let stranger = Host::attach("br0", "stranger", "02:00:00:00:00:99", &["10.129.126.99/24"]);
        let far = Host::attach("br1", "far", "02:00:00:00:00:28", &["10.129.126.40/24"]);
        let neighbour = Host::attach("br1", "next", "02:00:00:00:00:29", &["10.129.126.41/24"]);
        neighbour.run("ping -q -c 1 -W 5 10.129.126.40");
        count_at("stranger", &["02:00:00:00:00:28"]);
        let bound = Bound::new(&["bridge=br0"], &[]);
        let guest = bound.guest(0);
        for destination in ["10.129.126.40", "10.129.126.40@02:00:00:00:00:28"] {
            for service in ["0", "rr"] {
                let port = if service == "0" { "" } else { ":80" };
                guest.must(&format!(
                    "R L {VM_MAC} {VM}{port} {service} {destination} {}",
                    if service == "0" { "" } else { "on-empty=pass" }
                ));
                std::thread::sleep(Duration::from_millis(500));
                assert_eq!(segment.at_vm().as_deref(), Some("vm"), "{destination} {service}");
                let backend = &middlebox_on(&bound.daemon, "br0").services[0].backends[0];
                assert_eq!(backend.mac, None, "{destination} {service}");
                if destination.contains('@') {
                    let problem = backend.network_problem.as_deref().unwrap();
                    assert!(problem.contains("another network"), "{problem}");
                }
                guest.must(&format!("X {VM_MAC}"));
            }
        }
        assert_eq!(counted("stranger"), 0, "flooded frames");
        drop((stranger, far));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn an_unbound_middlebox_is_where_its_mac_is_seen() {
    in_netns(|| {
        bridge("br0");
        bridge("br1");
        let daemon = Daemon::start(&[]);
        daemon.must(&format!("R F {VM_MAC} {VM}"));
        daemon.must(&format!("A {VM_MAC} T 2 d 80"));
        let status = daemon.status();
        assert_eq!(status.middleboxes[0].network, None);
        assert!(status.middleboxes[0].network_problem.is_some());
        let segment = Segment::new("0", ["vm", "backend"]);
        // Filtered from the first packet on, although nobody knew where it would be.
        for port in segment.ports() {
            run(&format!("ip link set {port} master br1"));
        }
        assert!(!connect_plain(&segment.client, VM.into(), PORT));
        wait_for("its network", || {
            daemon.status().middleboxes[0].network.as_deref() == Some("br1")
        });
        assert_eq!(daemon.status().middleboxes[0].network_problem, None);
        assert!(!connect_plain(&segment.client, VM.into(), PORT) && pings(&segment.client, VM));
        for port in segment.ports() {
            run(&format!("ip link set {port} master br0"));
        }
        assert!(pings(&segment.client, VM));
        wait_for("its new network", || {
            daemon.status().middleboxes[0].network.as_deref() == Some("br0")
        });
        assert!(!connect_plain(&segment.client, VM.into(), PORT));
        // The status names the other bridge that the MAC is seen on, and nothing else changes.
        let double = Host::attach("br1", "double", VM_MAC, &["10.129.126.15/24"]);
        let other = Host::attach("br1", "other", "02:00:00:00:00:09", &["10.129.126.9/24"]);
        assert!(pings(&other, VM));
        wait_for("the double", || daemon.status().middleboxes[0].network_problem.is_some());
        assert_eq!(daemon.status().middleboxes[0].network.as_deref(), Some("br0"));
        assert!(!connect_plain(&segment.client, VM.into(), PORT));
        drop(double);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_port_is_filtered_from_its_first_frame_on_even_without_nfqd() {
    in_netns(|| {
        let (one, _other) = two_bridges();
        let mut bound = Bound::new(&["bridge=br0"], &[]);
        bound.guest(0).must(&format!("R F {VM_MAC} {VM} deny"));
        bound.daemon.kill();
        let late = Host::attach("br0", "late", "02:00:00:00:00:44", &["10.129.126.44/24"]);
        late.run(&format!("ip neigh add {VM} lladdr {VM_MAC} dev eth0"));
        assert!(!pings(&late, VM) && !connect_plain(&late, VM.into(), PORT));
        late.run("ping -q -c 1 -W 5 10.129.126.17");
        bound.daemon.restart();
        assert!(!pings(&late, VM) && one.at_vm().is_none());
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn backends_of_a_middlebox_that_nobody_has_seen_are_no_way_around_filters() {
    in_netns(|| {
        let (one, other) = two_bridges();
        let bound = Bound::new(&["bridge=br1"], &[]);
        bound.guest(0).must(&format!("R F {VM_MAC} {VM} deny"));
        assert!(one.at_vm().is_some() && other.at_vm().is_none());
        bound.daemon.must(&format!("R L 02:00:00:00:00:99 10.9.9.9 rr {CLIENT}"));
        assert!(one.at_vm().is_some() && other.at_vm().is_none());
        assert!(!pings(&other.client, VM));
        assert!(run("nft list chain bridge nfqd steer").contains("jump to_middlebox"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn bridges_that_nfqd_is_not_to_serve_are_left_alone() {
    in_netns(|| {
        let (one, other) = two_bridges();
        let daemon = Daemon::start(&["--bridge", "br1"]);
        daemon.must(&format!("R F {VM_MAC} {VM} deny"));
        wait_for("its network", || {
            daemon.status().middleboxes[0].network.as_deref() == Some("br1")
        });
        assert_eq!((one.at_vm().as_deref(), other.at_vm()), (Some("vm0"), None));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_backend_that_changes_its_mac_is_followed_within_seconds() {
    in_netns(|| {
        bridge("br0");
        let segment = Segment::new("0", ["vm", "backend"]);
        segment.plug("br0");
        let bound = Bound::new(&["bridge=br0"], &[]);
        bound.guest(0).must(&format!("R L {VM_MAC} {VM}:80 rr {BACKEND} check=arp"));
        wait_for_backends(&bound.daemon, "br0");
        assert_eq!(segment.at_vm().as_deref(), Some("backend"));
        // Without a gratuitous ARP packet.
        segment.backend.run("sysctl -qw net.ipv4.conf.all.arp_notify=0");
        segment.backend.run("ip link set eth0 address 02:00:00:00:00:77");
        let start = Instant::now();
        wait_for("the new MAC", || {
            let backend = &middlebox_on(&bound.daemon, "br0").services[0].backends[0];
            backend.mac.as_deref() == Some("02:00:00:00:00:77")
        });
        assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
        assert_eq!(who(&segment.client, VM, PORT).as_deref(), Some("backend"));
    });
}

/// Answers every datagram with its own content.
fn echo(host: &Host, port: u16) -> std::net::UdpSocket {
    let socket = host.enter(|| std::net::UdpSocket::bind(("0.0.0.0", port)).unwrap());
    let its = socket.try_clone().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((len, from)) = its.recv_from(&mut buffer) {
            let _ = its.send_to(&buffer[..len], from);
        }
    });
    socket
}

/// Whether a datagram from one host is answered.
fn is_answered(host: &Host, from: u16, to: (std::net::Ipv4Addr, u16)) -> bool {
    let socket = host.enter(|| std::net::UdpSocket::bind(("0.0.0.0", from)).unwrap());
    socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    socket.send_to(b"question", to).unwrap();
    socket.recv(&mut [0; 100]).is_ok()
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn what_the_vm_begins_comes_back_to_it() {
    for mode in ["full", "off"] {
        in_netns(move || {
            bridge("br0");
            let segment = Segment::new("0", ["vm", "backend"]);
            segment.plug("br0");
            let server = Host::attach("br0", "server", "02:00:00:00:00:53", &["10.129.126.53/24"]);
            let address = std::net::Ipv4Addr::new(10, 129, 126, 53);
            let _servers = [echo(&server, 53), echo(&server, 123), echo(&segment.backend, 123)];
            let _web = nfqd_tests::topology::Server::start(&server, "server", 8080);
            let bound = Bound::new(&["bridge=br0"], &["--fast-path", mode]);
            for service in [
                format!("R L {VM_MAC} {VM} 0 {BACKEND}"),
                format!("R L {VM_MAC} {VM} rr {BACKEND}"),
                format!("R L {VM_MAC} {VM}:123/udp rr {BACKEND}"),
            ] {
                bound.guest(0).must(&service);
                wait_for_backends(&bound.daemon, "br0");
                for (from, port) in [(0, 53), (0, 123), (123, 123)] {
                    let answered = is_answered(&segment.vm, from, (address, port));
                    assert!(answered, "{mode}, {service}: UDP {from} to {port}");
                }
                let tcp = who(&segment.vm, address, 8080);
                assert_eq!(tcp.as_deref(), Some("server"), "{mode}, {service}");
                // The connection has ended, so it is not kept for as long as an open one.
                let elements = |set: &str| {
                    let listed = run(&format!("nft list set bridge nfqd br0/{set}"));
                    listed.matches(" . 8080 . ").count()
                };
                assert_eq!(elements("own_tcp4"), 0, "{mode}, {service}");
                assert!(elements("own_closing_tcp4") > 0, "{mode}, {service}");
                assert!(pings(&segment.vm, address), "{mode}, {service}: ping");
                // Fragmented answers.
                let big = segment
                    .vm
                    .command("ping")
                    .args(["-qc1", "-W1", "-s", "3000", "10.129.126.53"])
                    .output()
                    .unwrap();
                assert!(big.status.success(), "{mode}, {service}: large ping");
                // Clients are still balanced.
                assert!(is_answered(&segment.client, 0, (VM, 123)), "{mode}, {service}");
                bound.guest(0).must(&format!("X {VM_MAC}"));
            }
        });
    }
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_group_address_is_no_way_around_the_filters() {
    for mode in ["full", "off"] {
        in_netns(move || {
            bridge("br0");
            let segment = Segment::new("0", ["vm", "backend"]);
            segment.plug("br0");
            let _echo = [echo(&segment.vm, 5000), echo(&segment.vm, 5001)];
            let bound = Bound::new(&["bridge=br0"], &["--fast-path", mode]);
            bound.guest(0).must(&format!("R F {VM_MAC} {VM} deny"));
            bound.guest(0).must(&format!("A {VM_MAC} +1 U 2 d 5001"));
            for mac in [VM_MAC, "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "33:33:00:00:00:01"] {
                segment.client.run(&format!("ip neigh replace {VM} lladdr {mac} dev eth0"));
                assert!(!is_answered(&segment.client, 0, (VM, 5000)), "{mode}, {mac}");
                assert!(is_answered(&segment.client, 0, (VM, 5001)), "{mode}, {mac}: allowed");
            }
        });
    }
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn what_the_host_sends_and_routes_is_filtered() {
    in_netns(|| {
        bridge("br0");
        bridge("wan");
        let segment = Segment::new("0", ["vm", "backend"]);
        segment.plug("br0");
        run("ip addr add 10.129.126.254/24 dev br0");
        run("ip addr add 10.9.0.254/24 dev wan");
        run("sysctl -qw net.ipv4.ip_forward=1");
        let remote = Host::attach("wan", "remote", "02:00:00:00:09:01", &["10.9.0.1/24"]);
        remote.run("ip route add default via 10.9.0.254");
        segment.vm.run("ip route add default via 10.129.126.254");
        let from_host = || {
            let address = std::net::SocketAddr::from((VM, PORT));
            std::net::TcpStream::connect_timeout(&address, Duration::from_millis(800)).is_ok()
        };
        assert!(from_host() && connect_plain(&remote, VM.into(), PORT));
        let bound = Bound::new(&["bridge=br0"], &[]);
        bound.guest(0).must(&format!("R F {VM_MAC} {VM}"));
        bound.guest(0).must(&format!("A {VM_MAC} T 2 d 80"));
        assert!(!from_host() && !connect_plain(&remote, VM.into(), PORT));
        assert!(pings(&remote, VM) && !connect_plain(&segment.client, VM.into(), PORT));
        bound.guest(0).must(&format!("D {VM_MAC} #1"));
        assert!(from_host() && connect_plain(&remote, VM.into(), PORT));
        // It is not balanced, and the status says so.
        let not_balanced = || bound.daemon.status().middleboxes[0].not_balanced.clone();
        assert_eq!(not_balanced(), None, "no services");
        bound.guest(0).must(&format!("R L {VM_MAC} {VM} rr {BACKEND}"));
        assert!(not_balanced().is_some_and(|text| text.contains("an address on br0")));
        // Marks of other programs are no replies of backends.
        for slot in 1..5_u32 {
            let mark = (5 << 27) | (slot << 8);
            run(&format!("ping -q -c 1 -W 2 -m {mark} {CLIENT}"));
        }
        run("ip addr del 10.129.126.254/24 dev br0");
        assert_eq!(not_balanced(), None);
    });
}

/// Random policies and frames on two bridges, with hosts of equal addresses, while backends and ports
/// come and go: frames of one bridge carry another source than those of the other.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn no_frame_of_one_network_gets_into_another() {
    use nfqd_tests::frames::{HOSTS, MIDDLEBOXES, case_frames, policy};
    use nfqd_tests::tap::Tap;
    use proptest::strategy::{Strategy, ValueTree};
    use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
    in_netns(|| {
        let taps = |bridge_name: &str, at: usize| -> Vec<Tap> {
            bridge(bridge_name);
            let macs = MIDDLEBOXES.iter().chain(&HOSTS).enumerate();
            let port = |(n, mac): (usize, &&str)| {
                Tap::on_bridge(bridge_name, &format!("t{at}{n}"), &[mac])
            };
            let mut taps: Vec<Tap> = macs.map(port).collect();
            taps.push(Tap::on_bridge(bridge_name, &format!("t{at}u"), &[]));
            taps
        };
        let networks = [taps("br0", 0), taps("br1", 1)];
        let bound = Bound::new(&["bridge=br0", "bridge=br1"], &[]);
        let seed = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
        let mut runner = TestRunner::new_with_rng(Default::default(), seed);
        let (mut sent, mut received) = ([0, 0], [0, 0]);
        for round in 0..20 {
            for at in [0, 1] {
                for mac in MIDDLEBOXES {
                    bound.guest(at).tell(&format!("X {mac}"));
                }
                for command in policy().new_tree(&mut runner).unwrap().current() {
                    bound.guest(at).tell(&command);
                }
            }
            // A port leaves its bridge and comes back; a MAC moves to another port.
            run("ip link set t02 nomaster");
            run(&format!("bridge fdb replace {} dev t{}4 master static", HOSTS[1], round % 2));
            for (at, taps) in networks.iter().enumerate() {
                for frame in case_frames(20..=60).new_tree(&mut runner).unwrap().current() {
                    // The source tells the network; the rest is the same in both.
                    let mut frame = frame;
                    if let Some(mark) = frame.get_mut(7) {
                        *mark = 0xa0 + at as u8;
                    }
                    taps.last().unwrap().send(&frame);
                    sent[at] += 1;
                }
            }
            std::thread::sleep(Duration::from_millis(50));
            for (at, taps) in networks.iter().enumerate() {
                for frame in taps.iter().flat_map(|tap| std::iter::from_fn(|| tap.try_receive())) {
                    // Anything else is a question of nfqd's own, or of the host.
                    if let Some(0xa0 | 0xa1) = frame.get(7) {
                        assert_eq!(frame[7], 0xa0 + at as u8, "round {round}: {frame:02x?}");
                        received[at] += 1;
                    }
                }
            }
            run("ip link set t02 master br0");
        }
        assert!(sent.iter().chain(&received).all(|count| *count > 300), "{sent:?} {received:?}");
    });
}
