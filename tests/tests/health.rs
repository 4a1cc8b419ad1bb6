//! Health of backends: what checks that fail mean for connections, and the ends of drains.
#![allow(clippy::unwrap_used)]

use nfqd::api::BackendState;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::echo::{Asker, Echo};
use nfqd_tests::load::{LoadServer, Member, ask_all, connect_all, shares};
use nfqd_tests::netns::{Host, in_netns, run};
use nfqd_tests::pool::{Fixture, backend_ip, backend_mac, backends, register, to};
use nfqd_tests::topology::{VM, VM_MAC, wait_for};
use std::time::{Duration, Instant};

fn servers(fixture: &Fixture) -> Vec<LoadServer> {
    let hosts = fixture.backends.iter().zip(b'0'..);
    hosts.map(|(host, name)| LoadServer::start(host, name, 80)).collect()
}

fn load(fixture: &Fixture, count: usize) -> Vec<Member> {
    connect_all(&fixture.client, VM.into(), 80, count).unwrap()
}

fn key(n: u8) -> String {
    format!("{}:80", backend_ip(n))
}

fn state(daemon: &Daemon, n: u8) -> BackendState {
    backends(daemon)[&key(n)].state
}

fn is_panicking(daemon: &Daemon) -> bool {
    daemon.status().middleboxes[0].services[0].panic
}

/// Has a backend ignore ARP requests, or answer them again.
fn set_arp(host: &Host, is_answered: bool) {
    let ignore = if is_answered { 0 } else { 8 };
    host.run(&format!("sysctl -qw net.ipv4.conf.all.arp_ignore={ignore}"));
}

/// A pool of two that are found by ARP, with a connection to each and more.
fn arp_pool(fixture: &Fixture, daemon: &Daemon, options: &str) -> Vec<Member> {
    register(daemon, &format!("{VM}:80 rr {} {} {options}", backend_ip(0), backend_ip(1)));
    wait_for("the MACs", || backends(daemon).values().all(|b| b.state == BackendState::Up));
    let members = load(fixture, 20);
    assert_eq!(shares(&members).len(), 2);
    members
}

/// The old behaviour: after three lost ARP answers the backend was dead, and its connections ended.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_backend_that_answers_on_its_flows_is_not_dead() {
    in_netns(|| {
        let fixture = Fixture::new(2);
        let _servers = servers(&fixture);
        let daemon = Daemon::start(&[]);
        let mut members = arp_pool(&fixture, &daemon, "on-dead=reset");
        set_arp(&fixture.backends[0], false);
        let end = Instant::now() + Duration::from_secs(10);
        let mut failed = false;
        while Instant::now() < end {
            ask_all(&mut members, "ARP answers are lost");
            assert_eq!(state(&daemon, 0), BackendState::Up, "{}", daemon.log());
            failed |= backends(&daemon)[&key(0)].fails_checks;
            std::thread::sleep(Duration::from_millis(300));
        }
        assert!(failed, "the check has failed: {}", daemon.log());
        assert_eq!(shares(&load(&fixture, 20)).len(), 2, "it gets new connections");
        // Without answers it is dead, and `on-dead` applies.
        wait_for("death", || state(&daemon, 0) == BackendState::Dead);
        set_arp(&fixture.backends[0], true);
        wait_for("return", || state(&daemon, 0) == BackendState::Up);
    });
}

/// The old behaviour: when all checks failed at once, all connections were reset and new ones refused.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn checks_that_all_fail_at_once_end_no_connection() {
    in_netns(|| {
        let fixture = Fixture::new(2);
        let _servers = servers(&fixture);
        let daemon = Daemon::start(&[]);
        let mut members = arp_pool(&fixture, &daemon, "");
        fixture.backends.iter().for_each(|host| set_arp(host, false));
        wait_for("panic", || is_panicking(&daemon));
        let text = nfqd::cli::status::text(&daemon.status());
        assert!(text.contains("CHECKS DOUBTED"), "{text}");
        let mut new = load(&fixture, 20);
        assert_eq!(shares(&new).len(), 2, "new connections are still spread");
        drop(std::mem::take(&mut new));
        // Nobody uses the pool, so nothing speaks for its backends.
        wait_for("death", || (0..2).all(|n| state(&daemon, n) == BackendState::Dead));
        assert!(!is_panicking(&daemon));
        ask_all(&mut members, "their backends are said to be dead");
        wait_for("evidence", || (0..2).all(|n| state(&daemon, n) == BackendState::Up));
    });
}

/// Backends that accept no connection any more, but go on serving those that they have.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_backend_that_accepts_nothing_keeps_its_connections() {
    in_netns(|| {
        let fixture = Fixture::new(2);
        let _servers = servers(&fixture);
        let daemon = Daemon::start(&[]);
        register(&daemon, &format!("{VM}:80 rr {} {} check=tcp on-dead=reset", to(0), to(1)));
        let mut members = load(&fixture, 20);
        // On the bridge, before nfqd: not every kernel has tables of the ip family.
        run("nft add table bridge lose");
        run("nft add chain bridge lose c { type filter hook prerouting priority -400 ; }");
        let mac = backend_mac(0);
        run(&format!(
            "nft add rule bridge lose c ether saddr {mac} tcp flags & (syn|ack) == syn|ack drop"
        ));
        let end = Instant::now() + Duration::from_secs(20);
        while state(&daemon, 0) != BackendState::Failing {
            ask_all(&mut members, "SYN answers are lost");
            assert!(Instant::now() < end, "{}", daemon.log());
            std::thread::sleep(Duration::from_millis(200));
        }
        let new = load(&fixture, 20);
        assert_eq!(shares(&new).get(&b'0'), None, "it gets no new connection");
        ask_all(&mut members, "it only accepts nothing");
        run("nft delete table bridge lose");
        wait_for("return", || state(&daemon, 0) == BackendState::Up);
    });
}

/// The old behaviours: a client that never stopped kept a drain from ending, and was refused for ever
/// if only the server's process died.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_udp_client_that_never_stops_moves_when_its_backend_ends() {
    in_netns(|| {
        let fixture = Fixture::new(2);
        let start = |n: u8| Echo::start(&fixture.backends[usize::from(n)], b'0' + n, 53);
        let mut echoes = [Some(start(0)), Some(start(1))];
        let daemon = Daemon::start(&[]);
        register(&daemon, &format!("{VM}:53/udp rr {} {} check=udp", to(0), to(1)));
        let client = Asker::new(&fixture.client, 4000, 53);
        wait_for("an answer", || client.ask().is_some());
        let first = client.ask().unwrap();
        let other = b'0' + b'1' - first;
        let n = first - b'0';
        daemon.must(&format!("B {VM_MAC} = {} drain=3", backend_ip(n)));
        let drained = Instant::now();
        let moved = |after: Instant, from: u8| {
            let end = after + Duration::from_secs(20);
            loop {
                match client.ask() {
                    Some(name) if name != from => return after.elapsed(),
                    _ => assert!(Instant::now() < end, "{}", daemon.log()),
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        };
        let took = moved(drained, first);
        assert!(took >= Duration::from_secs(2), "it had three seconds: {took:?}");
        let drained = format!("{}:53", backend_ip(n));
        assert_eq!(backends(&daemon)[&drained].state, BackendState::Drained);
        daemon.must(&format!("B {VM_MAC} = {} up", backend_ip(n)));
        wait_for("the way back", || backends(&daemon)[&drained].state == BackendState::Up);
        // Its process dies; its host is alive and says so (ICMP port unreachable).
        assert_eq!(client.ask(), Some(other), "what is up does not move");
        drop(echoes[usize::from(other - b'0')].take());
        moved(Instant::now(), other);
    });
}

/// Another host has had the connections: nothing is known of them, neither here nor in the kernel.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn connections_of_another_host_go_on_with_takeover() {
    in_netns(|| {
        let fixture = Fixture::new(3);
        let _servers = servers(&fixture);
        let mut daemon = Daemon::start(&[]);
        let line = format!("{VM}:80 hash {} {} {} takeover", to(0), to(1), to(2));
        register(&daemon, &line);
        let mut members = load(&fixture, 60);
        assert_eq!(shares(&members).len(), 3);
        daemon.kill();
        run("nft flush ruleset");
        daemon.restart();
        ask_all(&mut members, "on a host that knows nothing of them");
        assert!(daemon.status().flows.count >= 60);
    });
}
