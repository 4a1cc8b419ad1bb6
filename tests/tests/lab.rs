//! Real hosts on a bridge: the effect of commands on real connections, and the cost of a large
//! transfer.
#![allow(clippy::unwrap_used)]

use nfqd::api::BackendState;
use nfqd::cli::status::text;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::fixture::{Fixture, in_both_modes};
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::topology::{BACKEND, CLIENT_MAC, VM, connect, ip6, pings, wait_for, who};
use std::time::Duration;

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn the_documented_examples_do_what_they_say() {
    in_both_modes(|fixture| {
        let (daemon, client, other) =
            (&fixture.daemon, &fixture.topology.client, &fixture.topology.other);
        assert_eq!(fixture.at_vm().as_deref(), Some("vm"));

        fixture.redirect();
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"), "{}", daemon.log());
        assert!(pings(client, VM), "ICMP goes there and comes back as well");
        assert_eq!(
            who(client, BACKEND, 80).as_deref(),
            Some("backend"),
            "the backend by its own address"
        );

        daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"), "no bit set: forward");

        daemon.must("A 12:13:14:15:16:17 M 5 s 1:2:3:4:5:6 p 8");
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"), "another source MAC");
        daemon.must(&format!("A 12:13:14:15:16:17 M 5 s {CLIENT_MAC} p 8"));
        assert_eq!(fixture.at_vm(), None, "this source MAC, IPv4: dropped");
        assert_eq!(who(other, VM, 80).as_deref(), Some("backend"), "not from another MAC");

        daemon.must("D 12:13:14:15:16:17 M 4 s");
        assert_eq!(who(other, VM, 80), None, "only the EtherType is left: all IPv4 is dropped");
        client.run("ip neigh flush dev eth0");
        assert!(!pings(client, VM));
        assert!(
            client.run("ip neigh show 10.129.126.15").contains("12:13:14:15:16:17"),
            "ARP is not"
        );

        daemon.must("X 12:13:14:15:16:17 F");
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        daemon.must("X 12:13:14:15:16:17");
        assert_eq!(fixture.at_vm().as_deref(), Some("vm"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn filters_on_addresses_ports_and_protocols() {
    in_both_modes(|fixture| {
        let (daemon, client, other) =
            (&fixture.daemon, &fixture.topology.client, &fixture.topology.other);
        daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        daemon.must("A 12:13:14:15:16:17 T 2 d 80");
        assert_eq!(
            (fixture.at_vm(), pings(client, VM)),
            (None, true),
            "T alone drops, and only that port"
        );
        daemon.must("A 12:13:14:15:16:17 I 1 s 10.129.126.2");
        assert_eq!(fixture.at_vm().as_deref(), Some("vm"), "both must match");
        assert_eq!(who(other, VM, 80), None);
        daemon.must("D 12:13:14:15:16:17 T 0");
        assert!(!pings(other, VM), "the source alone");
        daemon.must("D 12:13:14:15:16:17 I 0 s");
        daemon.must("A 12:13:14:15:16:17 #2 I 8 p icmp");
        assert_eq!((fixture.at_vm().as_deref(), pings(client, VM)), (Some("vm"), false));
        daemon.must("D 12:13:14:15:16:17 #2");
        assert!(pings(client, VM));
        let reply = daemon.tell("A 12:13:14:15:16:17 I 4");
        assert!(reply.starts_with("ERR value column 23: '4': sets bit 4"), "{reply}");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_closed_middlebox_lets_in_what_is_allowed() {
    in_both_modes(|fixture| {
        let (daemon, client, other) =
            (&fixture.daemon, &fixture.topology.client, &fixture.topology.other);
        daemon.must("R F 12:13:14:15:16:17 10.129.126.15 deny");
        client.run("ip neigh flush dev eth0");
        assert!(!pings(client, VM), "not even ARP");
        daemon.must("A 12:13:14:15:16:17 +1 M 4 p arp");
        assert_eq!((fixture.at_vm(), pings(client, VM)), (None, false));
        daemon.must("A 12:13:14:15:16:17 +2 T 2 d 80");
        assert_eq!((fixture.at_vm().as_deref(), pings(client, VM)), (Some("vm"), false));
        daemon.must("A 12:13:14:15:16:17 +3 C 1 t echo-request");
        assert!(pings(client, VM));
        // Allow rules precede deny rules.
        daemon.must("A 12:13:14:15:16:17 #1 I 1 s 10.129.126.0/24");
        assert_eq!((fixture.at_vm().as_deref(), pings(client, VM)), (Some("vm"), true));
        daemon.must("D 12:13:14:15:16:17 +3");
        daemon.must("A 12:13:14:15:16:17 +2 I 1 s 10.129.126.2");
        assert_eq!((fixture.at_vm(), pings(client, VM)), (None, false));
        assert_eq!(who(other, VM, 80).as_deref(), Some("vm"));
        // Allowed packets are balanced all the same.
        fixture.redirect();
        assert_eq!((fixture.at_vm(), who(other, VM, 80).as_deref()), (None, Some("backend")));
        let rules = daemon.status().middleboxes[0].rules.clone();
        let names: Vec<&str> = rules.iter().map(|rule| rule.rule.as_str()).collect();
        assert_eq!(names, ["+1", "+2", "#1", "default"]);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn status_tells_which_rules_are_not_indexed() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        for rule in [
            "#1 T 2 d 80",
            "#2 T 2 d 80-90",
            "#3 T 2 d 85-95",
            "#4 V 1 s 7",
            "#5 M 1 s 2:0:0:0:0:0/ff:0:ff:0:0:0",
        ] {
            fixture.daemon.must(&format!("A 12:13:14:15:16:17 {rule}"));
        }
        let status = fixture.daemon.status();
        let why: Vec<Option<&str>> =
            status.middleboxes[0].rules.iter().map(|rule| rule.not_indexed.as_deref()).collect();
        assert_eq!(
            why,
            [
                None,
                None,
                Some("its ranges overlap those of rule #2"),
                Some("nftables has no sets of VLAN ids"),
                Some("its MAC mask has holes")
            ]
        );
        assert!(
            text(&status)
                .contains("rule #4 has dropped 0 packets, 0 bytes - not indexed: nftables has")
        );
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn changes_of_a_guest_are_not_interference() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        // Each command rebuilds the chain of all of them, which the kernel reports rule by rule.
        for n in 1..=120 {
            fixture.daemon.must(&format!("A 12:13:14:15:16:17 #{n} V 1 s {n}"));
        }
        std::thread::sleep(Duration::from_millis(1500));
        let status = fixture.daemon.status();
        assert_eq!((status.repairs, status.repair_error), (0, None), "{}", fixture.daemon.log());
        assert_eq!(run("nft list table bridge nfqd").matches("comment \"rule #").count(), 240);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_repair_that_fails_is_tried_again() {
    in_netns(|| {
        let fixture = Fixture::unprotected();
        fixture.redirect();
        let script = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(script.path(), "delete table bridge nfqd\nadd table bridge nfqd\n").unwrap();
        run(&format!("nft -f {}", script.path().display()));
        wait_for("the complaint", || {
            let error = fixture.daemon.status().repair_error;
            error.is_some_and(|error| error.contains("that nfqd did not make"))
        });
        assert!(
            text(&fixture.daemon.status()).contains("NOT ENFORCED: there is a table 'bridge nfqd'")
        );
        assert_eq!(fixture.daemon.status().repairs, 0);
        let reply = fixture.daemon.tell("R F 12:13:14:15:16:17 10.129.126.15");
        assert!(reply.starts_with("ERR internal the command cannot be enforced"), "{reply}");
        // Each of two messages gets its own reply.
        let replies = fixture.daemon.tell("R F 12:13:14:15:16:17 10.129.126.15@@Q");
        let (first, second) = replies.split_once('\n').expect("two replies");
        assert!(first.starts_with("ERR internal") && second.starts_with("OK"), "{replies}");
        run("nft delete table bridge nfqd");
        wait_for("the repair", || fixture.daemon.status().repair_error.is_none());
        assert_eq!(fixture.daemon.status().repairs, 1);
        assert_eq!(fixture.at_vm().as_deref(), Some("backend"));
        fixture.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn rules_and_middleboxes_count_what_they_see() {
    in_both_modes(|fixture| {
        let (daemon, client) = (&fixture.daemon, &fixture.topology.client);
        daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        // An exact rule is an element of a set, a range a plain rule.
        daemon.must("A 12:13:14:15:16:17 I 8 p icmp");
        daemon.must("A 12:13:14:15:16:17 #2 U 2 d 5000-5001");
        assert!(!pings(client, VM));
        let socket = client.enter(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap());
        for port in [5000, 5001, 5002] {
            socket.send_to(&[7; 100], (VM, port)).unwrap();
        }
        let rules = || {
            let rules = daemon.status().middleboxes[0].rules.clone();
            rules
                .iter()
                .map(|rule| (rule.rule.clone(), rule.packets, rule.bytes))
                .collect::<Vec<_>>()
        };
        // A ping of 56 bytes and two datagrams of 100, with their headers.
        wait_for("the counts", || {
            rules() == [("#1".to_string(), 1, 84), ("#2".to_string(), 2, 256)]
        });
        let middlebox = daemon.status().middleboxes[0].clone();
        assert!(middlebox.packets >= 4 && middlebox.bytes >= 84 + 3 * 128, "{middlebox:?}");
        let reply = daemon.tell("Q 12:13:14:15:16:17");
        assert!(reply.starts_with("OK 12:13:14:15:16:17 packets "), "{reply}");
        let expected = "; R F 12:13:14:15:16:17 10.129.126.15; A 12:13:14:15:16:17 I 8 p icmp; \
                        A 12:13:14:15:16:17 #2 U 2 d 5000-5001; #1 packets 1 bytes 84; #2 packets 2 bytes 256";
        assert!(reply.ends_with(expected), "{reply}");
        assert_eq!(daemon.tell("Q 2:0:0:0:0:9"), "ERR unknown-mac '2:0:0:0:0:9': not registered");
        daemon.must("X 12:13:14:15:16:17");
        assert_eq!(daemon.tell("Q"), "OK nothing registered");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn by_source_only_that_source_is_redirected() {
    in_both_modes(|fixture| {
        fixture.daemon.must(
            "R L 12:13:14:15:16:17 10.129.126.15 1 10.129.126.2 10.129.126.17@02:00:00:00:00:17",
        );
        assert_eq!(fixture.at_vm().as_deref(), Some("vm"));
        assert_eq!(who(&fixture.topology.other, VM, 80).as_deref(), Some("backend"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn ipv6_is_filtered_and_redirected_as_well() {
    in_both_modes(|fixture| {
        let (daemon, client, vm) = (&fixture.daemon, &fixture.topology.client, ip6(VM));
        assert_eq!(who(client, vm, 80).as_deref(), Some("vm"));
        daemon.must(&format!("R L 12:13:14:15:16:17 {vm} 0 {}@02:00:00:00:00:17", ip6(BACKEND)));
        let connection = connect(client, vm, 80).unwrap();
        assert_eq!(connection.server, "backend");
        connection.transfer(32 << 20);
        assert_eq!(fixture.at_vm().as_deref(), Some("vm"), "the other family is left alone");
        daemon.must(&format!("R F 12:13:14:15:16:17 {vm}"));
        daemon.must("A 12:13:14:15:16:17 I 10 d p tcp");
        assert_eq!((who(client, vm, 80), fixture.at_vm().as_deref()), (None, Some("vm")));
    });
}

/// UDP datagrams of 4000 bytes go as fragments, there and back.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn fragmented_datagrams_are_redirected_both_ways() {
    in_both_modes(|fixture| {
        fixture.redirect();
        let bind = |host: &nfqd_tests::netns::Host, port: u16| {
            let socket = host.enter(|| std::net::UdpSocket::bind(("0.0.0.0", port)).unwrap());
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            socket
        };
        let (client, backend) =
            (bind(&fixture.topology.client, 5000), bind(&fixture.topology.backend, 53));
        client.connect((VM, 53)).unwrap();
        let mut buffer = [0; 9000];
        for size in [10, 4000, 8000] {
            client.send(&vec![7; size]).unwrap();
            let (len, from) = backend.recv_from(&mut buffer).unwrap();
            assert_eq!(len, size);
            backend.send_to(&vec![9; size], from).unwrap();
            // The socket is connected: an answer from another address is not received.
            assert_eq!(
                client.recv(&mut buffer).unwrap(),
                size,
                "fast path {}",
                fixture.daemon.status().fast_path
            );
        }
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_large_transfer_leaves_user_space_after_its_first_packets() {
    in_netns(|| {
        let fixture = Fixture::new(&[]);
        fixture.redirect();
        let counters = |field: &str| -> Vec<u64> {
            let text = fixture.topology.backend.run("cat /proc/net/snmp");
            let lines: Vec<Vec<&str>> = text
                .lines()
                .filter(|l| l.starts_with("Tcp:") || l.starts_with("Udp:"))
                .map(|l| l.split_whitespace().collect())
                .collect();
            lines
                .chunks(2)
                .filter_map(|pair| pair[1][pair[0].iter().position(|n| *n == field)?].parse().ok())
                .collect()
        };
        let received = || -> (u64, u64) {
            let text = fixture.topology.backend.run("ip -s -o link show eth0");
            let numbers: Vec<u64> = text
                .split('\\')
                .nth(3)
                .unwrap()
                .split_whitespace()
                .filter_map(|n| n.parse().ok())
                .collect();
            (numbers[0], numbers[1])
        };
        let (queued, before) = (fixture.daemon.queued_packets(), received());
        let connection = connect(&fixture.topology.client, VM, 80).unwrap();
        assert_eq!(connection.server, "backend");
        const TOTAL: u64 = 1 << 30;
        connection.transfer(TOTAL);
        let (queued, after) = (fixture.daemon.queued_packets() - queued, received());
        let (bytes, packets) = (after.0 - before.0, after.1 - before.1);
        println!("{bytes} bytes in {packets} packets; {queued} of them went to the engine");
        assert!(
            bytes >= TOTAL && bytes / packets > 5000,
            "large segments stay whole: {bytes} bytes, {packets} packets"
        );
        assert!(queued <= 16, "{queued} packets in user space");
        assert_eq!(counters("InCsumErrors"), [0, 0], "TCP and UDP checksum errors at the receiver");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn the_engine_alone_carries_large_segments_too() {
    in_netns(|| {
        let fixture = Fixture::new(&["--fast-path", "off"]);
        fixture.redirect();
        let connection = connect(&fixture.topology.client, VM, 80).unwrap();
        assert_eq!(connection.server, "backend");
        connection.transfer(64 << 20);
        assert!(fixture.daemon.queued_packets() > 100, "every packet is queued");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_guest_does_not_disturb_another() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("second");
        let second = format!("{},mac=02:00:00:00:00:02,to=10.0.0.0/24", path.display());
        let daemon = Daemon::start_bound(&["--shm", &second], "02:00:00:00:00:01");
        let region = || nfqd_shmctl::Region::open(&path).unwrap();
        let tell = |command: &str| {
            nfqd_shmctl::mailbox::guest::send_command(&region(), command, Duration::from_secs(5))
                .unwrap()[0]
                .to_string()
        };
        daemon.must("R F 02:00:00:00:00:01 10.0.0.1");
        for (command, expected) in [
            (
                "X 02:00:00:00:00:01",
                "ERR denied column 3: '02:00:00:00:00:01': this channel may not speak for it",
            ),
            (
                "R L 02:00:00:00:00:02 10.0.0.2 0 10.0.0.1",
                "ERR denied column 34: '10.0.0.1': a middlebox that another",
            ),
            ("R L 02:00:00:00:00:02 10.0.0.2 0 10.0.0.9@02:00:00:00:00:01", "ERR denied column 34"),
            (
                "R L 02:00:00:00:00:02 10.0.0.2 0 10.0.1.9",
                "ERR denied column 34: '10.0.1.9': this channel may not redirect",
            ),
            ("R L 02:00:00:00:00:02 10.0.0.2 0 10.0.0.9", "OK"),
        ] {
            let reply = tell(command);
            assert!(reply.starts_with(expected), "{command}: {reply}");
        }
        // A megabyte of garbage, again and again: the other guest is served all the same.
        let garbage: Vec<u8> =
            (0..1_u32 << 20).map(|n| (n.wrapping_mul(0x9e37_79b1) >> 13) as u8).collect();
        for _ in 0..20 {
            region().write(0, &garbage);
            region().store(0, b'@');
            daemon.must("A 02:00:00:00:00:01 T 2 d 80");
        }
        region().write(0, &vec![b'@'; 1 << 20]);
        daemon.must("D 02:00:00:00:00:01 T 0");
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_mac_from_one_guest_is_not_used_for_others_after_a_restart() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        let mut daemon = Daemon::start(&[]);
        let backend = |daemon: &Daemon, frontend: &str| {
            let status = daemon.status();
            let services = status.middleboxes.iter().flat_map(|middlebox| &middlebox.services);
            let service = services.into_iter().find(|service| service.vip == frontend).unwrap();
            (service.backends[0].state, service.backends[0].mac.clone())
        };
        daemon.must("R L 02:00:00:00:00:02 10.0.0.2 0 10.0.0.7@02:ee:ee:ee:ee:ee");
        daemon.must("R L 02:00:00:00:00:01 10.0.0.1 0 10.0.0.7");
        for _ in 0..2 {
            assert_eq!(backend(&daemon, "10.0.0.1"), (BackendState::Unresolved, None));
            assert_eq!(backend(&daemon, "10.0.0.2").0, BackendState::Up);
            daemon.kill();
            // The channel is bound more tightly now: registrations outside the binding are named.
            let region = format!(
                "{},mac=02:00:00:00:00:02,to=10.0.1.0/24",
                daemon.region().with_extension("2").display()
            );
            daemon.set_arguments(&["--shm", &region]);
            daemon.restart();
        }
        assert!(
            daemon.log().contains(
                "10.0.0.2 -> 10.0.0.7: the channel of 02:00:00:00:00:02 may not redirect there"
            ),
            "{}",
            daemon.log()
        );
    });
}
