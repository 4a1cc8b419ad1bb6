//! The kernel path in small packets: what nfqd costs those who do not ask for it, and those who do,
//! beside the plain bridge, on one core.

use crate::print;
use nfqd_tests::daemon::{Daemon, steer};
use nfqd_tests::netns::{Host, run as shell};
use nfqd_tests::topology::wait_for;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrIn, bind, sendmmsg,
    setsockopt, socket, sockopt,
};
use nix::unistd::Pid;
use std::fs::File;
use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Instant;

const PACKETS: usize = 100_000;
const PAIRS: usize = 15;
const BATCH: usize = 64;
/// 64 bytes with the headers, without the frame's checksum.
const PAYLOAD: [u8; 22] = [7; 22];

const VM_MAC: &str = "02:00:00:00:00:15";
const VM: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 15);
const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 17);
const BYSTANDER: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 2);
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 2);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 1, 0, 1);
const CLIENT_PORT: u16 = 4000;

/// Two bridges with hosts, in a network namespace of its own.
struct Lab {
    client: Host,
    other_client: Host,
    vm: Host,
    backend: Host,
    bystander: Host,
    elsewhere: Host,
    daemon: Option<Daemon>,
    namespace: File,
    /// Receivers, which are never read: what does not fit is dropped.
    sinks: Vec<UdpSocket>,
}

impl Lab {
    fn new(commands: &[&str]) -> Lab {
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
                shell("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
                shell("ip link set lo up");
                Lab::fill(commands)
            });
            made.join().expect("a lab")
        })
    }

    fn fill(commands: &[&str]) -> Lab {
        for bridge in ["br0", "br1"] {
            shell(&format!("ip link add {bridge} type bridge mcast_snooping 0"));
            shell(&format!("ip link set {bridge} up"));
        }
        let host = |bridge: &str, name: &str, mac: &str, ip: Ipv4Addr| {
            Host::attach(bridge, name, mac, &[&format!("{ip}/24")])
        };
        let mut lab = Lab {
            client: host("br0", "client", "02:00:00:00:00:01", CLIENT),
            other_client: host("br1", "client1", "02:00:00:00:01:01", Ipv4Addr::new(10, 2, 0, 1)),
            vm: host("br0", "vm", VM_MAC, VM),
            backend: host("br0", "backend", "02:00:00:00:00:17", BACKEND),
            bystander: host("br0", "bystander", "02:00:00:00:00:02", BYSTANDER),
            elsewhere: host("br1", "elsewhere", "02:00:00:00:01:02", ELSEWHERE),
            daemon: None,
            namespace: File::open("/proc/thread-self/ns/net").expect("its namespace"),
            sinks: Vec::new(),
        };
        for to in [VM, BACKEND, BYSTANDER] {
            lab.client.run(&format!("ping -q -c 1 -W 5 {to}"));
        }
        lab.other_client.run(&format!("ping -q -c 1 -W 5 {ELSEWHERE}"));
        for port in [53, 54, 55] {
            for host in [&lab.vm, &lab.backend, &lab.bystander, &lab.elsewhere] {
                let sink = host.enter(|| bound((Ipv4Addr::UNSPECIFIED, port)));
                lab.sinks.push(sink);
            }
        }
        // The peer has br_netfilter where that is the way into the queue.
        if commands.is_empty() {
            let on = if steer() == "native" { "0" } else { "1" };
            for name in ["iptables", "ip6tables"] {
                let path = format!("/proc/sys/net/bridge/bridge-nf-call-{name}");
                std::fs::write(path, on).expect("sysctl");
            }
            return lab;
        }
        let daemon = Daemon::start(&[]);
        commands.iter().for_each(|command| daemon.must(command));
        wait_for("the backend", || {
            let middleboxes = daemon.status().middleboxes;
            middleboxes
                .iter()
                .flat_map(|m| &m.services)
                .flat_map(|s| &s.backends)
                .all(|b| b.mac.is_some())
        });
        lab.daemon = Some(daemon);
        lab
    }

    /// Runs code in the namespace of the bridges.
    fn enter<T: Send>(&self, code: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.namespace, CloneFlags::CLONE_NEWNET).expect("setns");
                code()
            });
            thread.join().expect("no panic")
        })
    }
}

/// A stream of packets from one host to an address.
struct Stream {
    name: &'static str,
    aim: f64,
    from: fn(&Lab) -> &Host,
    local: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    /// The address and port of the packets that the plain bridge carries instead.
    plain: (Ipv4Addr, u16),
}

const ANY: (Ipv4Addr, u16) = (Ipv4Addr::UNSPECIFIED, 0);

const STREAMS: &[Stream] = &[
    Stream {
        name: "bystander",
        aim: 0.98,
        from: |lab| &lab.client,
        local: ANY,
        to: (BYSTANDER, 53),
        plain: (BYSTANDER, 53),
    },
    Stream {
        name: "bystander on another bridge",
        aim: 0.99,
        from: |lab| &lab.other_client,
        local: ANY,
        to: (ELSEWHERE, 53),
        plain: (ELSEWHERE, 53),
    },
    Stream {
        name: "known redirected flow",
        aim: 0.90,
        from: |lab| &lab.client,
        local: (CLIENT, CLIENT_PORT),
        to: (VM, 53),
        plain: (BACKEND, 53),
    },
    Stream {
        name: "its replies",
        aim: 0.90,
        from: |lab| &lab.backend,
        local: (BACKEND, 53),
        to: (CLIENT, CLIENT_PORT),
        plain: (CLIENT, CLIENT_PORT),
    },
    Stream {
        name: "to the middlebox, passing",
        aim: 0.92,
        from: |lab| &lab.client,
        local: ANY,
        to: (VM, 54),
        plain: (VM, 54),
    },
    Stream {
        name: "to the middlebox, dropped by a rule",
        aim: 1.3,
        from: |lab| &lab.client,
        local: ANY,
        to: (VM, 55),
        plain: (VM, 55),
    },
];

/// Returns a socket that shares its port with others.
fn bound((ip, port): (Ipv4Addr, u16)) -> UdpSocket {
    let (kind, flags) = (SockType::Datagram, SockFlag::SOCK_CLOEXEC);
    let socket = socket(AddressFamily::Inet, kind, flags, None).expect("a socket");
    setsockopt(&socket, sockopt::ReuseAddr, &true).expect("a shared port");
    let address = SockaddrIn::from(SocketAddrV4::new(ip, port));
    bind(socket.as_raw_fd(), &address).expect("a port");
    UdpSocket::from(socket)
}

/// Sends packets from a host; returns packets a second.
fn rate(lab: &Lab, from: fn(&Lab) -> &Host, local: (Ipv4Addr, u16), to: (Ipv4Addr, u16)) -> f64 {
    lab.enter(|| {
        from(lab).enter(|| {
            let mut core = CpuSet::new();
            core.set(0).expect("a core");
            sched_setaffinity(Pid::from_raw(0), &core).expect("a core of its own");
            let socket = bound(local);
            socket.connect(SocketAddr::from(to)).expect("connect");
            let payload = [IoSlice::new(&PAYLOAD)];
            let batch = [payload; BATCH];
            let mut headers: MultiHeaders<()> = MultiHeaders::preallocate(BATCH, None);
            // The first packet may have to ask the engine.
            let _ = socket.send(&PAYLOAD);
            std::thread::sleep(std::time::Duration::from_millis(5));
            let start = Instant::now();
            let mut sent = 0;
            while sent < PACKETS {
                let addresses = [None; BATCH];
                let flags = MsgFlags::empty();
                match sendmmsg(socket.as_raw_fd(), &mut headers, &batch, addresses, [], flags) {
                    Ok(results) => sent += results.count(),
                    // A port that is not open answers once.
                    Err(nix::errno::Errno::ECONNREFUSED) => {}
                    Err(errno) => panic!("sendmmsg: {errno}"),
                }
            }
            sent as f64 / start.elapsed().as_secs_f64()
        })
    })
}

/// Runs it and prints what came out.
pub(crate) fn run() {
    let plain = Lab::new(&[]);
    let pool = format!("R L {VM_MAC} {VM}:53/udp rr {BACKEND}");
    let filters = format!("R F {VM_MAC} {VM}");
    let rule = format!("A {VM_MAC} U 2 d 55");
    let lab = Lab::new(&[&pool, &filters, &rule]);
    let daemon = lab.daemon.as_ref().expect("a daemon");
    println!(
        "steer {}, {PAIRS} pairs of {PACKETS} UDP packets of 64 bytes, one core",
        daemon.status().steer
    );
    for stream in STREAMS {
        let ours = || rate(&lab, stream.from, stream.local, stream.to);
        let peers = || rate(&plain, stream.from, stream.local, stream.plain);
        ours();
        peers();
        let before = daemon.queued_packets();
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for pair in 0..PAIRS {
            if pair % 2 == 0 {
                with.push(ours());
                without.push(peers());
            } else {
                without.push(peers());
                with.push(ours());
            }
        }
        let ratios: Vec<f64> =
            with.iter().zip(&without).map(|(with, without)| with / without).collect();
        let queued = daemon.queued_packets() - before;
        println!("{}: aim {}, {queued} packets in user space", stream.name, stream.aim);
        let scaled = |rates: &[f64]| rates.iter().map(|rate| rate / 1000.0).collect::<Vec<_>>();
        print("    plain", &scaled(&without), "kpps");
        print("    with nfqd", &scaled(&with), "kpps");
        print("    ratio of a pair", &ratios, "");
    }
}
