//! Pools with real hosts: connections keep their backend whatever happens to others, errors and
//! fragments find their way, and clients without a backend are told.
//!
//! `NFQD_TESTS_CONNECTIONS` sets the number of simultaneous connections (10 000).
#![allow(clippy::unwrap_used)]

use nfqd::api::BackendState;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::load::{LoadServer, Member, allow_files, ask_all, connect_all, shares};
use nfqd_tests::netns::{Host, in_netns, run};
use nfqd_tests::pool::{Fixture, backend_ip, backend_mac, backends, register, to};
use nfqd_tests::topology::{CLIENT, Server, VM, VM_MAC, connect, ip6, wait_for, who};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

/// Opens new connections to the service.
fn load(fixture: &Fixture, daemon: &Daemon, count: usize) -> Vec<Member> {
    connect_all(&fixture.client, VM.into(), 80, count).unwrap_or_else(|error| {
        panic!("{error}\n{}\n{}", daemon.log(), nfqd::cli::status::text(&daemon.status()))
    })
}

/// Ten thousand connections while backends are added, drained and lost, and nfqd is killed again
/// and again.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn connections_keep_their_backend_whatever_happens_to_others() {
    in_netns(|| {
        allow_files();
        let count: usize =
            std::env::var("NFQD_TESTS_CONNECTIONS").map_or(10_000, |text| text.parse().unwrap());
        let mut fixture = Fixture::new(5);
        let mut crowds: Vec<Option<LoadServer>> = (0..5)
            .map(|n| Some(LoadServer::start(&fixture.backends[usize::from(n)], b'0' + n, 80)))
            .collect();
        // A burst that fills the queue is dropped and sent again, instead of going to the
        // middlebox, which has no server.
        let mut daemon = Daemon::start(&["--fail", "closed"]);
        let four: Vec<String> = (0..4).map(to).collect();
        register(&daemon, &format!("{VM}:80 rr {} check=tcp on-dead=reset", four.join(" ")));
        let mut members = load(&fixture, &daemon, count);
        let share = shares(&members);
        assert_eq!(share.len(), 4, "{share:?}");
        assert!(share.values().all(|share| share.abs_diff(count / 4) <= 1), "by turns: {share:?}");
        ask_all(&mut members, "at rest");
        let live: u32 = backends(&daemon).values().map(|backend| backend.flows).sum();
        assert_eq!(live as usize, count);

        daemon.must(&format!("B {VM_MAC} + {}", to(4)));
        ask_all(&mut members, "a backend more");
        let new = load(&fixture, &daemon, 100);
        assert_eq!(shares(&new).len(), 5);
        drop(new);

        daemon.must(&format!("B {VM_MAC} = {} drain", backend_ip(1)));
        ask_all(&mut members, "one draining");
        let new = load(&fixture, &daemon, 100);
        assert_eq!(shares(&new).get(&b'1'), None, "a draining backend gets no new connections");
        drop(new);

        daemon.kill();
        ask_all(&mut members, "without nfqd");
        daemon.restart();
        ask_all(&mut members, "nfqd killed and started again");
        let new = load(&fixture, &daemon, 100);
        assert_eq!(shares(&new).get(&b'1'), None, "it is still draining");
        drop(new);
        // Everything goes through the engine, which has all flows from the kernel's cache.
        daemon.kill();
        daemon.set_arguments(&["--fail", "closed", "--fast-path", "off"]);
        daemon.restart();
        let queued = daemon.queued_packets();
        ask_all(&mut members, "killed, and without the fast path");
        assert!(daemon.queued_packets() - queued >= 2 * count as u64, "every packet was queued");
        daemon.kill();
        daemon.set_arguments(&["--fail", "closed"]);
        daemon.restart();
        ask_all(&mut members, "killed, and with it again");

        // A backend is removed for good.
        fixture.backends.remove(2);
        drop(crowds[2].take());
        wait_for("the checks", || {
            backends(&daemon)[&format!("{}:80", backend_ip(2))].state == BackendState::Dead
        });
        let (lost, mut rest): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|member| member.server == b'2');
        ask_all(&mut rest, "another backend died");
        for mut member in lost {
            let error = member.ask().expect_err("its backend is dead");
            assert!(
                matches!(
                    error.kind(),
                    std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::UnexpectedEof
                ),
                "told so, not left alone: {error}"
            );
        }
        let new = load(&fixture, &daemon, 100);
        assert_eq!(shares(&new).get(&b'2'), None, "a dead backend gets no new connections");
        drop(new);

        // The draining backend has finished its connections, and is removed.
        let (finished, mut rest): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|member| member.server == b'1');
        drop(finished);
        wait_for("the end of its connections", || {
            backends(&daemon)[&format!("{}:80", backend_ip(1))].flows == 0
        });
        daemon.must(&format!("B {VM_MAC} - {}", backend_ip(1)));
        ask_all(&mut rest, "the drained one was removed");
        assert!(daemon.status().flows.full_maps.is_empty(), "{:?}", daemon.status().flows);
        println!(
            "{count} connections; {} were left at the end; flows {:?}",
            rest.len(),
            daemon.status().flows
        );
    });
}

/// The backend is behind a router and a link with a small MTU: large packets cause errors, which
/// must name the address that the client talks to.
fn path_mtu(v6: bool) {
    let fixture = Fixture::new(1);
    let router = &fixture.backends[0];
    // The backend's host is now a router to a network behind it, whose far end is the backend.
    let far = router.enter(|| Host::linked("far", "02:00:00:00:02:01", &[]));
    router.run("ip link set far mtu 1300");
    let (near_ip, far_ip, prefix) = if v6 {
        ("2001:db8:1::1", "2001:db8:1::2", "/64 nodad")
    } else {
        ("10.200.0.1", "10.200.0.2", "/24")
    };
    router.run(&format!("ip addr add {near_ip}{prefix} dev far"));
    router.run("sysctl -qw net.ipv4.ip_forward=1");
    router.run("sysctl -qw net.ipv6.conf.all.forwarding=1");
    far.run(&format!("ip addr add {far_ip}{prefix} dev eth0"));
    far.run(&format!("ip route add default via {near_ip}"));
    let gateway = if v6 { ip6(backend_ip(0)).to_string() } else { backend_ip(0).to_string() };
    let frontend: IpAddr = if v6 { ip6(VM).into() } else { VM.into() };
    let daemon = Daemon::start(&[]);
    let named =
        |ip: &str, port: u16| if v6 { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") };
    register(
        &daemon,
        &format!(
            "{} hash {}@{}",
            named(&frontend.to_string(), 80),
            named(far_ip, 8080),
            backend_mac(0)
        ),
    );
    let _server = Server::start(&far, "far", 8080);
    let _vm = Server::start(&fixture.vm, "vm", 80);
    fixture.client.run(&format!(
        "ip route add {} via {}",
        if v6 { "2001:db8:1::/64" } else { "10.200.0.0/24" },
        gateway
    ));
    // Link-local addresses take a moment to be usable.
    let client = if v6 { ip6(CLIENT).to_string() } else { CLIENT.to_string() };
    wait_for("the route back", || {
        far.command("ping")
            .args(["-q", "-c", "1", "-W", "1", &client])
            .output()
            .unwrap()
            .status
            .success()
    });
    // Both ends think that 1500 bytes go through; the client's segments are too large for the link
    // behind the router.
    let connection =
        connect(&fixture.client, frontend, 80).unwrap_or_else(|| panic!("{}", daemon.log()));
    assert_eq!(connection.server, "far");
    connection.transfer(4 << 20);
    let route = fixture.client.run(&format!("ip route get {frontend}"));
    assert!(route.contains("mtu 1300"), "the client has learnt the path's MTU: {route}");
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn path_mtu_discovery_works_through_the_translation() {
    in_netns(|| path_mtu(false));
    in_netns(|| path_mtu(true));
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn clients_without_a_backend_are_rejected_or_passed() {
    in_netns(|| {
        let fixture = Fixture::new(2);
        let _vm = Server::start(&fixture.vm, "vm", 80);
        let daemon = Daemon::start(&[]);
        // No server listens at the backends: by TCP checks they are dead.
        let both: Vec<String> = (0..2).map(to).collect();
        register(&daemon, &format!("{VM}:80 rr {} check=tcp", both.join(" ")));
        register(&daemon, &format!("{VM}:53/udp rr {} check=tcp:80", both.join(" ")));
        wait_for("the checks", || {
            backends(&daemon).values().all(|b| b.state == BackendState::Dead)
        });
        let refused = fixture.client.enter(|| {
            TcpStream::connect_timeout(&SocketAddr::new(VM.into(), 80), Duration::from_secs(3))
                .unwrap_err()
        });
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{}", daemon.log());
        let told = fixture.client.enter(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            socket.connect((VM, 53)).unwrap();
            socket.send(b"?").unwrap();
            socket.recv(&mut [0; 8]).unwrap_err()
        });
        assert_eq!(told.kind(), std::io::ErrorKind::ConnectionRefused, "by ICMP: {told}");
        assert!(daemon.status().queues.iter().map(|queue| queue.rejected).sum::<u64>() >= 2);
        // Passed to the middlebox, if the service says so.
        register(&daemon, &format!("{VM}:80 rr {} check=tcp on-empty=pass", both.join(" ")));
        wait_for("the checks", || who(&fixture.client, VM, 80).as_deref() == Some("vm"));
        // One backend becomes alive.
        let _server = Server::start(&fixture.backends[1], "one", 80);
        wait_for("life", || who(&fixture.client, VM, 80).as_deref() == Some("one"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn no_mark_of_ours_leaves_when_a_backend_goes() {
    in_netns(|| {
        let fixture = Fixture::new(1);
        let daemon = Daemon::start(&[]);
        register(&daemon, &format!("{VM}:53/udp rr {}", to(0)));
        register(&daemon, &format!("{VM}:99/udp rr {}", to(0)));
        run("nft add table bridge watch");
        run("nft add chain bridge watch leaves { type filter hook postrouting priority 300 ; }");
        run("nft add rule bridge watch leaves meta mark & 0xffffff00 != 0 counter comment marked");
        run(&format!(
            "nft add rule bridge watch leaves ip saddr {} counter comment seen",
            backend_ip(0)
        ));
        let counted = |comment: &str| -> u32 {
            let listed = run("nft list table bridge watch");
            let line = listed.lines().find(|line| line.contains(comment)).unwrap().to_string();
            let packets = line.split("packets ").nth(1).unwrap().split(' ').next().unwrap();
            packets.parse().unwrap()
        };
        let bind =
            |host: &Host, port: u16| host.enter(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
        let (backend, client) = (bind(&fixture.backends[0], 53), bind(&fixture.client, 1000));
        for socket in [&backend, &client] {
            socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        }
        // One packet each way through the engine, then by the kernel.
        for _ in 0..5 {
            client.send_to(b"ask", (VM, 53)).unwrap();
            let (_, from) = backend.recv_from(&mut [0; 8]).unwrap();
            backend.send_to(b"answer", from).unwrap();
            assert_eq!(client.recv_from(&mut [0; 8]).unwrap().1.ip(), IpAddr::from(VM));
        }
        assert_eq!(counted("marked"), 0);
        // Marks that others set behind us stay.
        run("nft add chain bridge watch marks { type filter hook prerouting priority 0 ; }");
        run("nft add rule bridge watch marks icmp type echo-request meta mark set 0x4000");
        run("nft insert rule bridge watch leaves meta mark 0x4000 counter accept comment theirs");
        fixture.client.run(&format!("ping -q -c 1 -W 2 {}", backend_ip(0)));
        assert_eq!(counted("theirs"), 1);
        daemon.must(&format!("X {VM_MAC} L {VM}:53/udp"));
        let before = counted("seen");
        for _ in 0..5 {
            backend.send_to(b"more", (CLIENT, 1000)).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(
            (counted("seen") - before, counted("marked")),
            (5, 0),
            "{}",
            run("nft list table bridge watch")
        );
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_host_that_cannot_check_says_so_and_takes_the_backend_as_alive() {
    in_netns(|| {
        let fixture = Fixture::new(1);
        let _server = Server::start(&fixture.backends[0], "zero", 80);
        // An address in another network cannot be used: no answer would come to the bridge.
        run("ip addr flush dev br0");
        run("ip addr add 192.0.2.1/32 dev lo");
        let daemon = Daemon::start(&[]);
        register(&daemon, &format!("{VM}:80 rr {} check=tcp", backend_ip(0)));
        let key = format!("{}:80", backend_ip(0));
        wait_for("that it says so", || backends(&daemon)[&key].health_unknown_reason.is_some());
        // Longer than three checks take.
        std::thread::sleep(Duration::from_millis(4500));
        assert_eq!(backends(&daemon)[&key].state, BackendState::Up, "{}", daemon.log());
        assert_eq!(who(&fixture.client, VM, 80).as_deref(), Some("zero"));
        // The check works as soon as there is an address, whatever its label.
        run("ip addr add 10.129.126.254/24 dev br0 label br0:1");
        wait_for("the check", || backends(&daemon)[&key].health_unknown_reason.is_none());
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_backend_that_does_not_answer_arp_is_dead_and_its_flows_end_as_configured() {
    for option in ["on-dead=reset", "on-dead=move"] {
        in_netns(move || {
            let fixture = Fixture::new(2);
            let _servers = [
                Server::start(&fixture.backends[0], "zero", 80),
                Server::start(&fixture.backends[1], "one", 80),
            ];
            let daemon = Daemon::start(&[]);
            // Without MACs the host finds them, and checks whether they answer.
            register(
                &daemon,
                &format!("{VM}:80 least {} {} {option}", backend_ip(0), backend_ip(1)),
            );
            wait_for("the MACs", || {
                backends(&daemon).values().all(|b| b.state == BackendState::Up)
            });
            let mut connections: Vec<_> =
                (0..8).map(|_| connect(&fixture.client, VM, 80).unwrap()).collect();
            let of = |name: &str| connections.iter().filter(|c| c.server == name).count();
            assert_eq!((of("zero"), of("one")), (4, 4), "the least loaded by turns");
            let zero = || backends(&daemon).remove(&format!("{}:80", backend_ip(0))).unwrap();
            wait_for("the counters", || zero().packets > 0 && zero().reply_packets > 0);
            let counted = zero();
            run("ip link set b0 down");
            wait_for("death", || zero().state == BackendState::Dead);
            let dead = zero();
            assert!(
                dead.packets >= counted.packets && dead.reply_bytes >= counted.reply_bytes,
                "{dead:?}"
            );
            for connection in &mut connections {
                if connection.server == "one" {
                    connection.send(b"more");
                } else {
                    assert!(connection.try_send(b"more").is_err(), "{option}: ended");
                }
            }
        });
    }
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn connections_of_the_middlebox_itself_go_on() {
    in_netns(|| {
        let fixture = Fixture::new(1);
        let _vm = Server::start(&fixture.vm, "vm", 80);
        let _backend = Server::start(&fixture.backends[0], "zero", 80);
        let client = Server::start(&fixture.client, "client", 81);
        let daemon = Daemon::start(&[]);
        let mut before = connect(&fixture.client, VM, 80).unwrap();
        assert_eq!(before.server, "vm");
        // All TCP and UDP to the address.
        register(&daemon, &format!("{VM} rr {}", to(0)));
        for _ in 0..20 {
            before.send(&[7; 10_000]);
        }
        assert_eq!(who(&fixture.client, VM, 80).as_deref(), Some("zero"));
        assert!(before.finish().starts_with("200000 "), "the connection from before");
        // Answers to the middlebox' own requests come back to it.
        let own = connect(&fixture.vm, CLIENT, client.port()).unwrap();
        assert_eq!(own.server, "client");
        own.transfer(8 << 20);
    });
}

/// TCP and UDP with the same ports, a backend that is a client, several services with ports of
/// their own, and IPv6.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn services_and_clients_of_all_kinds_do_not_mix() {
    for mode in ["full", "off"] {
        in_netns(move || {
            let fixture = Fixture::new(3);
            let name = ["zero", "one", "two"];
            let web: Vec<Server> =
                (0..3).map(|n| Server::start(&fixture.backends[n], name[n], 8080)).collect();
            let daemon = Daemon::start(&["--fast-path", mode]);
            let ported = |n: u8| format!("{}:8080@{}", backend_ip(n), backend_mac(n));
            register(&daemon, &format!("{VM}:80/tcp rr {} {}", ported(0), ported(1)));
            register(&daemon, &format!("{VM}:80/udp rr {}:5353@{}", backend_ip(2), backend_mac(2)));
            register(&daemon, &format!("{VM}:81 0 {}", ported(2)));
            let six = |n: u8| format!("[{}]:8080@{}", ip6(backend_ip(n)), backend_mac(n));
            register(&daemon, &format!("[{}]:80 hash {} {} {}", ip6(VM), six(0), six(1), six(2)));
            let udp = fixture.backends[2].enter(|| UdpSocket::bind(("0.0.0.0", 5353)).unwrap());
            udp.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            for round in 0..4_u16 {
                let port = 30_000 + round;
                // One client port through both protocols at once.
                let mut tcp = connect_from(&fixture.client, port, VM.into(), 80);
                let socket = fixture.client.enter(|| UdpSocket::bind(("0.0.0.0", port)).unwrap());
                socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
                socket.connect((VM, 80)).unwrap();
                let mut buffer = [0; 9000];
                for size in [10, 4000, 8000] {
                    socket.send(&vec![round as u8; size]).unwrap();
                    let (len, from) = udp.recv_from(&mut buffer).unwrap();
                    assert_eq!((len, from.port()), (size, port), "{mode}: fragments and ports");
                    udp.send_to(&vec![9; size], from).unwrap();
                    assert_eq!(
                        socket.recv(&mut buffer).unwrap(),
                        size,
                        "{mode}: from where it was sent to"
                    );
                }
                assert!(["zero", "one"].contains(&greeting(&mut tcp).as_str()));
            }
            assert_eq!(who(&fixture.client, VM, 81).as_deref(), Some("two"));
            let answers: std::collections::BTreeSet<String> =
                (0..40).filter_map(|_| who(&fixture.client, ip6(VM), 80)).collect();
            assert_eq!(answers.len(), 3, "{mode}: {answers:?}");
            // A backend connects to the service that it is a backend of: the other one answers.
            for _ in 0..4 {
                assert_eq!(who(&fixture.backends[0], VM, 80).as_deref(), Some("one"), "{mode}");
            }
            // A backend is reached by its own address as well.
            assert_eq!(who(&fixture.client, backend_ip(1), web[1].port()).as_deref(), Some("one"));
            wait_for("the counts", || {
                let two = backends(&daemon).remove(&format!("{}:5353", backend_ip(2))).unwrap();
                two.packets > 10 && two.reply_bytes > 40_000
            });
        });
    }
}

/// A TCP connection from a port of the client's choice.
fn connect_from(host: &Host, port: u16, to: IpAddr, dport: u16) -> TcpStream {
    host.enter(|| {
        use nix::sys::socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, setsockopt, socket,
            sockopt,
        };
        use std::os::fd::AsRawFd;
        let IpAddr::V4(to) = to else { panic!("IPv4") };
        let socket =
            socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
        bind(socket.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port)).unwrap();
        let [a, b, c, d] = to.octets();
        connect(socket.as_raw_fd(), &SockaddrIn::new(a, b, c, d, dport)).unwrap();
        TcpStream::from(socket)
    })
}

fn greeting(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let mut out = String::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        out.push(char::from(byte[0]));
    }
    stream.write_all(b"bye").unwrap();
    out
}

/// Direct server return: backends own the address and answer clients themselves.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn with_dsr_only_the_mac_is_rewritten() {
    in_netns(|| {
        let fixture = Fixture::new(1);
        let backend = &fixture.backends[0];
        backend.run("sysctl -qw net.ipv4.conf.all.arp_ignore=1");
        backend.run("sysctl -qw net.ipv4.conf.all.arp_announce=2");
        backend.run(&format!("ip addr add {VM}/32 dev lo"));
        let _server = Server::start(&fixture.backends[0], "zero", 80);
        let daemon = Daemon::start(&[]);
        register(&daemon, &format!("{VM}:80 hash {} dsr", to(0)));
        let connection = connect(&fixture.client, VM, 80).unwrap();
        assert_eq!(connection.server, "zero");
        connection.transfer(16 << 20);
        assert_eq!(
            backends(&daemon)[&format!("{}:80", backend_ip(0))].reply_packets,
            0,
            "they do not pass us"
        );
    });
}
