//! Real hosts on a bridge: what the commands do to real connections, what a large transfer costs, and what happens when
//! nfqd dies, leaves, or is interfered with.
#![allow(clippy::unwrap_used)]

use nfqd_tests::daemon::{Daemon, program};
use nfqd_tests::lab::{BACKEND, CLIENT_MAC, Lab, Server, VM, connect, pings, wait_for, who};
use nfqd_tests::netns::{in_netns, run};
use std::process::Command;
use std::time::Duration;

const STATIC: &str = "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17";

struct Scene {
    lab: Lab,
    daemon: Daemon,
    _vm: Server,
    backend: Server,
}

impl Scene {
    fn new(arguments: &[&str]) -> Scene {
        let lab = Lab::new(true);
        let daemon = Daemon::start(arguments);
        let vm = Server::start(lab.vm.as_ref().unwrap(), "vm", 80);
        let backend = Server::start(&lab.backend, "backend", 80);
        Scene { lab, daemon, _vm: vm, backend }
    }

    /// Who answers the client at the middlebox' address.
    fn at_vm(&self) -> Option<String> {
        who(&self.lab.client, VM, self.backend.port())
    }

    /// Redirects the middlebox' traffic, and waits until the backend's MAC is found.
    fn redirect(&self) {
        self.daemon.must(STATIC);
        wait_for("the backend's MAC", || self.daemon.status().middleboxes[0].backends[0].mac.is_some());
    }
}

fn in_both_modes(test: fn(&Scene)) {
    for mode in ["full", "off"] {
        in_netns(move || test(&Scene::new(&["--fast-path", mode])));
    }
}

#[test]
fn the_documented_examples_do_what_they_say() {
    in_both_modes(|scene| {
        let (daemon, client, other) = (&scene.daemon, &scene.lab.client, &scene.lab.other);
        assert_eq!(scene.at_vm().as_deref(), Some("vm"));

        scene.redirect();
        assert_eq!(scene.at_vm().as_deref(), Some("backend"), "{}", daemon.log());
        assert!(pings(client, VM), "ICMP goes there and comes back as well");
        assert_eq!(who(client, BACKEND, 80).as_deref(), Some("backend"), "the backend by its own address");

        daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        assert_eq!(scene.at_vm().as_deref(), Some("backend"), "no bit set: forward");

        daemon.must("A 12:13:14:15:16:17 M 5 s 1:2:3:4:5:6 p 8");
        assert_eq!(scene.at_vm().as_deref(), Some("backend"), "another source MAC");
        daemon.must(&format!("A 12:13:14:15:16:17 M 5 s {CLIENT_MAC} p 8"));
        assert_eq!(scene.at_vm(), None, "this source MAC, IPv4: dropped");
        assert_eq!(who(other, VM, 80).as_deref(), Some("backend"), "not from another MAC");

        daemon.must("D 12:13:14:15:16:17 M 4 s");
        assert_eq!(who(other, VM, 80), None, "only the EtherType is left: all IPv4 is dropped");
        client.run("ip neigh flush dev eth0");
        assert!(!pings(client, VM));
        assert!(client.run("ip neigh show 10.129.126.15").contains("12:13:14:15:16:17"), "ARP is not");

        daemon.must("X 12:13:14:15:16:17 F");
        assert_eq!(scene.at_vm().as_deref(), Some("backend"));
        daemon.must("X 12:13:14:15:16:17");
        assert_eq!(scene.at_vm().as_deref(), Some("vm"));
    });
}

#[test]
fn filters_on_addresses_ports_and_protocols() {
    in_both_modes(|scene| {
        let (daemon, client, other) = (&scene.daemon, &scene.lab.client, &scene.lab.other);
        daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        daemon.must("A 12:13:14:15:16:17 T 2 d 80");
        assert_eq!((scene.at_vm(), pings(client, VM)), (None, true), "T alone drops, and only that port");
        daemon.must("A 12:13:14:15:16:17 I 1 s 10.129.126.2");
        assert_eq!(scene.at_vm().as_deref(), Some("vm"), "both must match");
        assert_eq!(who(other, VM, 80), None);
        daemon.must("D 12:13:14:15:16:17 T 0");
        assert!(!pings(other, VM), "the source alone");
        daemon.must("D 12:13:14:15:16:17 I 0 s");
        daemon.must("A 12:13:14:15:16:17 #2 I 8 p icmp");
        assert_eq!((scene.at_vm().as_deref(), pings(client, VM)), (Some("vm"), false));
        daemon.must("D 12:13:14:15:16:17 #2");
        assert!(pings(client, VM));
        let reply = daemon.tell("A 12:13:14:15:16:17 I 4");
        assert!(reply.starts_with("ERR value column 23: '4': switches on bit 4"), "{reply}");
    });
}

#[test]
fn by_source_only_that_source_is_redirected() {
    in_both_modes(|scene| {
        scene
            .daemon
            .must("R L 12:13:14:15:16:17 10.129.126.15 1 10.129.126.2 10.129.126.17@02:00:00:00:00:17");
        assert_eq!(scene.at_vm().as_deref(), Some("vm"));
        assert_eq!(who(&scene.lab.other, VM, 80).as_deref(), Some("backend"));
    });
}

#[test]
fn a_large_transfer_leaves_user_space_after_its_first_packets() {
    in_netns(|| {
        let scene = Scene::new(&[]);
        scene.redirect();
        let counters = |field: &str| -> Vec<u64> {
            let text = scene.lab.backend.run("cat /proc/net/snmp");
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
            let text = scene.lab.backend.run("ip -s -o link show eth0");
            let numbers: Vec<u64> =
                text.split('\\').nth(3).unwrap().split_whitespace().filter_map(|n| n.parse().ok()).collect();
            (numbers[0], numbers[1])
        };
        let (judged, before) = (scene.daemon.judged(), received());
        let connection = connect(&scene.lab.client, VM, 80).unwrap();
        assert_eq!(connection.server, "backend");
        const TOTAL: u64 = 1 << 30;
        connection.transfer(TOTAL);
        let (judged, after) = (scene.daemon.judged() - judged, received());
        let (bytes, packets) = (after.0 - before.0, after.1 - before.1);
        println!("{bytes} bytes in {packets} packets; {judged} of them went to the engine");
        assert!(
            bytes >= TOTAL && bytes / packets > 5000,
            "large segments stay whole: {bytes} bytes, {packets} packets"
        );
        assert!(judged <= 16, "{judged} packets in user space");
        assert_eq!(counters("InCsumErrors"), [0, 0], "TCP and UDP checksum errors at the receiver");
    });
}

#[test]
fn the_engine_alone_carries_large_segments_too() {
    in_netns(|| {
        let scene = Scene::new(&["--fast-path", "off"]);
        scene.redirect();
        let connection = connect(&scene.lab.client, VM, 80).unwrap();
        assert_eq!(connection.server, "backend");
        connection.transfer(64 << 20);
        assert!(scene.daemon.judged() > 100, "every packet is judged");
    });
}

/// The handles of the base chains: they change when one is made anew.
fn base_chains() -> Vec<String> {
    let text = run("nft -a list table bridge nfqd");
    let chains: Vec<String> = text
        .lines()
        .filter(|l| l.contains("chain steer") || l.contains("chain learn {"))
        .map(str::to_string)
        .collect();
    assert_eq!(chains.len(), 2, "{text}");
    chains
}

#[test]
fn killed_in_the_middle_of_traffic() {
    in_netns(|| {
        let mut scene = Scene::new(&[]);
        scene.redirect();
        scene.daemon.must("R F 12:13:14:15:16:17 10.129.126.15");
        scene.daemon.must("A 12:13:14:15:16:17 T 2 d 81");
        let before = scene.daemon.status();
        let chains = base_chains();
        let mut connection = connect(&scene.lab.client, VM, 80).unwrap();
        let chunk = vec![7; 1 << 20];
        connection.send(&chunk);

        scene.daemon.kill();
        (0..20).for_each(|_| connection.send(&chunk));
        assert_eq!(scene.at_vm().as_deref(), Some("backend"), "a static redirect needs no engine");
        assert_eq!(who(&scene.lab.client, VM, 81), None, "nor does a filter");

        scene.daemon.restart();
        (0..20).for_each(|_| connection.send(&chunk));
        assert!(connection.finish().starts_with(&format!("{} ", 41 << 20)), "the connection outlived it all");
        assert_eq!(base_chains(), chains, "no base chain was made anew");
        let after = scene.daemon.status();
        assert_eq!(after.middleboxes, before.middleboxes, "nothing is registered twice or lost");
        assert_eq!(scene.at_vm().as_deref(), Some("backend"));
    });
}

#[test]
fn leaving_in_order_keeps_the_rules_and_flush_removes_them() {
    in_netns(|| {
        let mut scene = Scene::new(&[]);
        scene.redirect();
        assert!(scene.daemon.terminate().success());
        assert_eq!(scene.at_vm().as_deref(), Some("backend"));
        let flush = Command::new(program("nfqd")).arg("flush").output().unwrap();
        assert!(flush.status.success());
        assert!(!run("nft list tables").contains("nfqd"));
        assert_eq!(scene.at_vm().as_deref(), Some("vm"));
    });
}

#[test]
fn fail_closed_drops_what_nobody_judges() {
    in_netns(|| {
        let mut scene = Scene::new(&["--fail", "closed"]);
        scene.redirect();
        assert_eq!(scene.at_vm().as_deref(), Some("backend"));
        scene.daemon.kill();
        assert_eq!(scene.at_vm(), None);
        scene.daemon.restart();
        assert_eq!(scene.at_vm().as_deref(), Some("backend"));
    });
}

#[test]
fn another_program_removes_the_table() {
    in_netns(|| {
        let scene = Scene::new(&[]);
        scene.redirect();
        run("nft delete table bridge nfqd");
        wait_for("the table again", || run("nft list tables").contains("bridge nfqd"));
        assert_eq!(scene.at_vm().as_deref(), Some("backend"));
        assert_eq!(scene.daemon.status().repairs, 1);
        // What it empties is noticed at the next command.
        run("nft flush set bridge nfqd middleboxes");
        scene.daemon.must("X 12:13:14:15:16:17");
        assert_eq!(scene.at_vm().as_deref(), Some("vm"));
    });
}

/// Runs nfqd where it must refuse to start; its exit code and message.
fn refused(arguments: &[&str]) -> (Option<i32>, String) {
    let state = tempfile::tempdir().unwrap();
    let output = Command::new("timeout")
        .arg("10")
        .arg(program("nfqd"))
        .arg("--state")
        .arg(state.path())
        .arg("--control")
        .arg(state.path().join("control"))
        .args(arguments)
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn what_keeps_it_from_starting_is_said() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        let daemon = Daemon::start(&["--queue", "5-6"]);
        let (code, message) = refused(&["--queue", "6-7"]);
        assert_eq!(code, Some(3), "{message}");
        assert!(message.contains("queue 6 is taken") && message.contains("--queue"), "{message}");
        drop(daemon);
        assert!(Command::new(program("nfqd")).arg("flush").status().unwrap().success());

        run("nft add table bridge nfqd");
        let (code, message) = refused(&[]);
        assert_eq!(code, Some(3), "{message}");
        assert!(message.contains("nft delete table bridge nfqd"), "{message}");
        run("nft delete table bridge nfqd");

        let (code, message) = refused(&["--shm", "/dev"]);
        assert_eq!(code, Some(3), "{message}");
        assert!(message.contains("/dev"), "{message}");

        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "R F 2:0:0:0:0:1 10.0.0.1\nA 2:0:0:0:0:1 I 99\n").unwrap();
        let (code, message) = refused(&["--commands", file.path().to_str().unwrap()]);
        assert_eq!(code, Some(1), "{message}");
        assert!(message.contains(":2:17: '99': not a bit value"), "{message}");
        assert!(!run("nft list tables").contains("nfqd"), "nothing was loaded");

        let (code, message) = refused(&["--queue", "3-1"]);
        assert_eq!(code, Some(2), "{message}");
        // Without the privilege.
        let output = Command::new("setpriv")
            .args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin", "--"])
            .arg(program("nfqd"))
            .args(["--state", "/tmp/nfqd-refused", "--control", "/tmp/nfqd-refused.sock"])
            .output()
            .unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{message}");
        assert!(message.contains("CAP_NET_ADMIN"), "{message}");
        let _ = std::fs::remove_dir_all("/tmp/nfqd-refused");
    });
}

#[test]
fn a_full_disk_is_said_and_the_policy_holds() {
    in_netns(|| {
        let scene = Scene::new(&[]);
        let state = scene.daemon.status().state;
        // A directory where the new file goes fails as a full disk does, and goes away as one is emptied.
        let obstacle = format!("{state}.new");
        std::fs::create_dir(&obstacle).unwrap();
        scene.redirect();
        assert!(scene.daemon.status().state_error.is_some());
        assert_eq!(scene.at_vm().as_deref(), Some("backend"));
        std::fs::remove_dir(&obstacle).unwrap();
        wait_for("the state is saved again", || scene.daemon.status().state_error.is_none());
        assert!(std::fs::read_to_string(&state).unwrap().contains(STATIC));
        std::thread::sleep(Duration::from_millis(1));
    });
}
