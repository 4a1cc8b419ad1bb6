//! Together with the host's firewall: connection tracking, filters of forwarded packets and filters
//! against forged addresses see packets that they know, whatever nfqd redirects.
#![allow(clippy::unwrap_used)]

use nfqd_tests::fixture::Fixture;
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::topology::{BACKEND, CLIENT, Server, VM, VM_MAC, connect, ip6, wait_for};
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

/// What hardening guides, firewalld and Docker do with forwarded packets.
const FORWARD: &str = r#"
table ip fw {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state invalid counter drop comment "invalid"
        ct state established,related counter accept comment "known"
        ip daddr 10.129.126.17 ct state new meta l4proto { tcp, udp } th dport { 80, 8080, 7000 } accept
        counter reject comment "rejected"
    }
}
table ip6 fw {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state invalid counter drop comment "invalid"
        ct state established,related counter accept comment "known"
        ip6 daddr 2001:db8::11 ct state new meta l4proto { tcp, udp } th dport { 80, 8080, 7000 } accept
        meta l4proto ipv6-icmp accept
        counter reject comment "rejected"
    }
}
"#;
/// What libvirt's clean-traffic does with packets that a VM sends (priority -300), and Neutron with
/// those between its ports.
const PORTS: &str = r#"
table bridge fw {
    chain clean_traffic {
        type filter hook prerouting priority -300;
        iifname backend ip saddr != 10.129.126.17 counter drop comment "forged"
        iifname backend ip6 saddr 2001:db8::/64 ip6 saddr != 2001:db8::11 counter drop comment "forged"
        iifname client ip saddr != 10.129.126.1 counter drop comment "forged"
    }
    chain ports {
        type filter hook forward priority 0;
        iifname backend ip saddr != 10.129.126.17 counter drop comment "forged"
        iifname backend ip6 saddr 2001:db8::/64 ip6 saddr != 2001:db8::11 counter drop comment "forged"
    }
}
"#;

fn load(rules: &str) {
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(script.path(), rules).unwrap();
    run(&format!("nft -f {}", script.path().display()));
}

/// The packets that the rules with a comment have counted.
fn counted(comment: &str) -> u64 {
    let text = run("nft list ruleset");
    let lines = text.lines().filter(|line| line.contains(&format!("comment \"{comment}\"")));
    let packets = |line: &str| {
        let mut words = line.split_whitespace().skip_while(|word| *word != "packets");
        words.nth(1).unwrap().parse::<u64>().unwrap()
    };
    lines.map(packets).sum()
}

fn assert_nothing_dropped(when: &str) {
    for comment in ["invalid", "rejected", "forged"] {
        assert_eq!(counted(comment), 0, "{when}: {comment}\n{}", run("nft list ruleset"));
    }
}

/// A conversation by UDP, which ends with an error from the client's side.
fn udp(fixture: &Fixture, vm: IpAddr, backend: IpAddr, client: IpAddr) {
    let server = fixture.topology.backend.enter(|| UdpSocket::bind((backend, 7000)).unwrap());
    let socket = fixture.topology.client.enter(|| UdpSocket::bind((client, 0)).unwrap());
    for socket in [&server, &socket] {
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    }
    socket.connect((vm, 7000)).unwrap();
    let mut buffer = [0; 8192];
    // Connection tracking reassembles fragments.
    for len in [1, 2, 3, 4000, 4] {
        socket.send(&vec![7; len]).unwrap();
        let (received, from) = server.recv_from(&mut buffer).unwrap();
        server.send_to(&buffer[..received], from).unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap(), len, "from the service's address");
    }
    server.connect(socket.local_addr().unwrap()).unwrap();
    drop(socket);
    server.send(b"late").unwrap();
    let error = server.recv(&mut buffer).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "the client's ICMP error");
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_stateful_firewall_knows_every_packet() {
    for fast_path in ["full", "off"] {
        in_netns(move || {
            let fixture = Fixture::new(&["--fast-path", fast_path]);
            let _port = Server::start(&fixture.topology.backend, "backend", 8080);
            load(PORTS);
            // Natively, the host's own chains need not see bridged packets; one kernel has none.
            let is_tracked = fixture.daemon.status().steer == "br-netfilter";
            if is_tracked {
                load(FORWARD);
            }
            let (vm6, backend6) = (ip6(VM), ip6(BACKEND));
            let services = [
                (format!("{VM} 0 {BACKEND}"), IpAddr::from(VM)),
                (format!("{VM} rr {BACKEND}"), IpAddr::from(VM)),
                (format!("{VM}:80 hash {BACKEND}:8080"), IpAddr::from(VM)),
                (format!("{VM}:7000/udp 0 {BACKEND}"), IpAddr::from(VM)),
                (format!("{vm6} 0 {backend6}"), IpAddr::from(vm6)),
                (format!("[{vm6}]:80 rr [{backend6}]:8080"), IpAddr::from(vm6)),
                (format!("{vm6} least {backend6}"), IpAddr::from(vm6)),
            ];
            for (service, vm) in services {
                fixture.daemon.must(&format!("R L {VM_MAC} {service}"));
                wait_for("the backend's MAC", || {
                    let status = fixture.daemon.status();
                    status.middleboxes[0].services[0].backends[0].mac.is_some()
                });
                let has_tcp = !service.contains("/udp");
                for _ in 0..3 * u8::from(has_tcp) {
                    let connection = connect(&fixture.topology.client, vm, 80);
                    let connection = connection.unwrap_or_else(|| panic!("{service}"));
                    assert_eq!(connection.server, "backend", "{service}");
                    connection.transfer(8 << 20);
                }
                if !service.contains(":80 ") {
                    let (backend, client) = match vm {
                        IpAddr::V4(_) => (IpAddr::from(BACKEND), IpAddr::from(CLIENT)),
                        IpAddr::V6(_) => (IpAddr::from(backend6), IpAddr::from(ip6(CLIENT))),
                    };
                    udp(&fixture, vm, backend, client);
                }
                assert_nothing_dropped(&service);
                fixture.daemon.must(&format!("X {VM_MAC} L"));
            }
            assert_eq!(counted("known") > 100, is_tracked);
        });
    }
}
