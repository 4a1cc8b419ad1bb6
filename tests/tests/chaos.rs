//! Chaos: everything that goes wrong on a host, at random, under load.
//!
//! Established connections to living backends go on, what is denied stays denied, nothing reaches a
//! client untranslated or a host that it is not for, and `status` names what is wrong within a second.
//!
//! `NFQD_TESTS_CHAOS_SECONDS` is the length (60; `tests/run.sh chaos` takes 600), `NFQD_TESTS_SEED` the seed
//! of the events, `NFQD_TESTS_CHAOS_CONNECTIONS` the number of TCP connections (2000).
#![allow(clippy::unwrap_used)]

use etherparse::PacketBuilder;
use nfqd_rules::packet::{IpHeader, Packet};
use nfqd_shmctl::MacAddr;
use nfqd_tests::daemon::{Daemon, steer};
use nfqd_tests::echo::{Asker, Echo};
use nfqd_tests::load::{LoadServer, Member, allow_files, connect_all};
use nfqd_tests::netns::{Host, in_netns, run};
use nfqd_tests::pool::{Fixture, backend_ip, backends};
use nfqd_tests::topology::{CLIENT_MAC, VM, VM_MAC, wait_for};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
    setsockopt, socket, sockopt,
};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

const BACKENDS: u8 = 4;
/// A host that has nothing to do with all this.
const BYSTANDER: Ipv4Addr = Ipv4Addr::new(10, 129, 126, 4);
const BYSTANDER_MAC: &str = "02:00:00:00:03:02";
const SYN: u8 = 2;
/// The port of the middlebox that is denied.
const DENIED: u16 = 23;
/// The time that an answer may take: nfqd may be absent, and TCP waits longer each time it sends again.
/// After an outage of 28 s its next one is up to 51 s away.
const PATIENCE: Duration = Duration::from_secs(90);
/// The time in which `status` must name what is wrong.
const NOTICED_WITHIN: Duration = Duration::from_secs(1);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A sequence of random numbers (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// A watch for packets that a host must not get.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Watch {
    /// Watches the packets to a host with this MAC.
    fn start(host: &Host, mac: MacAddr, is_wrong: fn(&IpHeader) -> bool) -> Watch {
        let socket = host.enter(|| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket =
                socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap();
            setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20)).unwrap();
            let timeout = nix::sys::time::TimeVal::new(0, 100_000);
            setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).unwrap();
            socket
        });
        let stop = Arc::new(AtomicBool::new(false));
        let its_stop = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut wrong, mut buffer) = (Vec::new(), vec![0; 70_000]);
            while !its_stop.load(Relaxed) {
                let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) else {
                    continue;
                };
                let packet = Packet::from_frame(&buffer[..length]);
                let packet = packet.filter(|packet| packet.link.destination == mac);
                if let Some(packet) =
                    packet.filter(|packet| packet.ip.as_ref().is_some_and(is_wrong))
                {
                    wrong.push(format!("{packet:?}"));
                    wrong.truncate(5);
                }
            }
            wrong
        });
        Watch { stop, thread }
    }

    /// Returns some of the packets that the host has got and must not.
    fn finish(self) -> Vec<String> {
        self.stop.store(true, Relaxed);
        self.thread.join().unwrap()
    }
}

/// A small disk in place of a directory, with the files that it had.
struct Disk(PathBuf);

impl Disk {
    fn mount(directory: &Path) -> Disk {
        let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        let files: Vec<(PathBuf, Vec<u8>)> =
            files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
        run(&format!("mount -t tmpfs -o size=512k,mode=0700 tmpfs {}", directory.display()));
        for (path, content) in files {
            std::fs::write(path, content).unwrap();
        }
        Disk(directory.to_path_buf())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A fault injected into the host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Event {
    Kill,
    Terminate,
    Flush,
    DeleteTable,
    Sysctl,
    LoseBackend,
    ChangeRules,
    ChangeBackends,
    ForeignChain,
    CutRegion,
    RemakeRegion,
    FillDisk,
    Flood,
}

const EVENTS: [Event; 16] = [
    Event::Kill,
    Event::Kill,
    Event::Kill,
    Event::Terminate,
    Event::Flush,
    Event::DeleteTable,
    Event::Sysctl,
    Event::LoseBackend,
    Event::ChangeRules,
    Event::ChangeBackends,
    Event::ChangeBackends,
    Event::ForeignChain,
    Event::CutRegion,
    Event::RemakeRegion,
    Event::FillDisk,
    Event::Flood,
];

struct Chaos {
    flooder: Host,
    daemon: Daemon,
    /// The region of another guest, which is cut and made again.
    other_region: PathBuf,
    disk: Disk,
    random: Random,
    lost: Option<(u8, Instant)>,
    last_lost: Option<u8>,
    counts: BTreeMap<Event, u32>,
    late: Vec<String>,
}

impl Chaos {
    /// Waits until `status` names a fault.
    fn expect(&mut self, fault: &str, is_said: impl Fn(&nfqd::api::Status) -> bool) {
        let start = Instant::now();
        while !self.daemon.try_status().is_some_and(|status| is_said(&status)) {
            if start.elapsed() > NOTICED_WITHIN {
                self.late.push(fault.to_string());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn happen(&mut self, event: Event) {
        *self.counts.entry(event).or_default() += 1;
        match event {
            Event::Kill => {
                self.daemon.kill();
                self.daemon.restart();
            }
            Event::Terminate => {
                self.daemon.terminate();
                self.daemon.restart();
            }
            Event::Flush => {
                let before = self.daemon.status().repairs;
                run("nft flush ruleset");
                self.expect_tables(before);
            }
            Event::DeleteTable => {
                let before = self.daemon.status().repairs;
                // The kernel may protect the table from that.
                let deleted = Command::new("nft")
                    .args(["delete", "table", "bridge", "nfqd"])
                    .stderr(std::process::Stdio::null())
                    .status();
                deleted.unwrap();
                self.expect_tables(before);
            }
            Event::Sysctl => {
                let path = "/proc/sys/net/bridge/bridge-nf-call-iptables";
                if steer() != "native" && std::fs::write(path, "0").is_ok() {
                    let is_set = || std::fs::read_to_string(path).is_ok_and(|text| text == "1\n");
                    let end = Instant::now() + 2 * NOTICED_WITHIN;
                    while !is_set() && Instant::now() < end {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    assert!(is_set(), "the sysctl is set again");
                }
            }
            Event::LoseBackend => self.lose_backend(),
            Event::ChangeRules => {
                let port = 1000 + self.random.below(1000);
                self.daemon.must(&format!("A {VM_MAC} #2 T 2 d {port}"));
                self.daemon.must(&format!("D {VM_MAC} #2"));
            }
            Event::ChangeBackends => {
                let n = self.random.below(BACKENDS.into()) as u8;
                let (ip, ports) = (backend_ip(n), [format!("{VM}:80"), format!("{VM}:53")]);
                for port in &ports {
                    self.daemon.must(&format!("B {VM_MAC} {port} = {ip} drain"));
                    self.daemon.must(&format!("B {VM_MAC} {port} = {ip} up"));
                }
                let weight = 1 + self.random.below(9);
                self.daemon.must(&format!("B {VM_MAC} {VM}:80 + {ip}*{weight}"));
            }
            Event::ForeignChain => {
                run("nft add table bridge foreign");
                run(
                    "nft add chain bridge foreign c { type filter hook prerouting priority -10 ; }",
                );
                run("nft delete table bridge foreign");
            }
            Event::CutRegion => {
                std::fs::File::create(&self.other_region).unwrap();
                let path = self.other_region.display().to_string();
                self.expect("a region that was cut", |status| {
                    status.channels.iter().any(|one| one.path == path && one.error.is_some())
                });
            }
            Event::RemakeRegion => {
                let _ = std::fs::remove_file(&self.other_region);
                std::fs::write(&self.other_region, vec![0; 1 << 20]).unwrap();
            }
            Event::FillDisk => {
                let full = self.disk.0.join("full");
                // Until there is no room.
                let _ = std::fs::write(&full, vec![1; 8 << 20]);
                let _ = std::fs::write(self.disk.0.join("rest"), vec![1; 64 << 10]);
                for n in 0..120 {
                    self.daemon.must(&format!("A {VM_MAC} #9 I 1 s 192.0.2.{n}"));
                }
                self.expect("a full disk", |status| status.state_error.is_some());
                std::fs::remove_file(full).unwrap();
                let _ = std::fs::remove_file(self.disk.0.join("rest"));
                self.daemon.must(&format!("D {VM_MAC} #9"));
            }
            Event::Flood => self.flood(),
        }
    }

    /// Waits until the tables are there, by protection or by repair.
    fn expect_tables(&mut self, repairs: u64) {
        let start = Instant::now();
        loop {
            let list = run("nft list tables bridge");
            let status = self.daemon.status();
            if list.contains("nfqd") && status.repair_error.is_none() {
                return;
            }
            let is_said = status.repairs > repairs || status.repair_error.is_some();
            if start.elapsed() > NOTICED_WITHIN && !is_said {
                self.late.push("tables that were deleted".to_string());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn lose_backend(&mut self) {
        if self.lost.is_none() {
            let n = self.random.below(BACKENDS.into()) as u8;
            let seconds = 2 + self.random.below(8);
            // Of two outages in a row, TCP's pauses between retransmissions make one of a minute.
            if self.last_lost == Some(n) {
                return;
            }
            run(&format!("ip link set b{n} down"));
            self.last_lost = Some(n);
            self.lost = Some((n, Instant::now() + Duration::from_secs(seconds)));
        }
    }

    fn return_backend(&mut self, now: Instant) {
        if let Some((n, _)) = self.lost.filter(|(_, until)| now >= *until) {
            run(&format!("ip link set b{n} up"));
            self.lost = None;
        }
    }

    /// SYNs and datagrams of new flows, from one port of the bridge, for half a second.
    fn flood(&mut self) {
        let seed = self.random.below(1 << 32);
        self.flooder.enter(|| {
            let raw = SockFlag::SOCK_CLOEXEC;
            let protocol = SockProtocol::Raw;
            let socket = socket(AddressFamily::Inet, SockType::Raw, raw, protocol).unwrap();
            let [a, b, c, d] = VM.octets();
            let to = SockaddrIn::new(a, b, c, d, 0);
            let mut random = Random(seed);
            let end = Instant::now() + Duration::from_millis(500);
            let mut sent = 0;
            while Instant::now() < end {
                let source = Ipv4Addr::new(10, 129, 127, random.below(256) as u8);
                let port = 1024 + random.below(60_000) as u16;
                let builder = PacketBuilder::ipv4(source.octets(), VM.octets(), 9);
                let mut packet = Vec::new();
                if random.below(2) == 0 {
                    builder.tcp(port, 80, 1, 1000).syn().write(&mut packet, &[]).unwrap();
                } else {
                    builder.udp(port, 53).write(&mut packet, b"?").unwrap();
                }
                // A full socket drops it.
                let _ = sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty());
                sent += 1;
                if sent % 16 == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
    }
}

/// Asks all connections over and over; each must be answered by its server.
fn keep_asking(members: &mut [Member], stop: &AtomicBool) -> Result<u64, String> {
    let mut asked = 0;
    while !stop.load(Relaxed) {
        for member in members.iter_mut() {
            let server = char::from(member.server);
            let answer =
                member.ask().map_err(|error| format!("a connection to {server}: {error}"))?;
            if answer != member.server {
                return Err(format!("a connection to {server} has moved"));
            }
            asked += 1;
        }
    }
    Ok(asked)
}

/// Asks by UDP over and over. A datagram may be lost; a flow that is used stays where it is, unless its
/// backend was lost meanwhile. Returns the answers.
fn keep_asking_by_udp(askers: &[Asker], stop: &AtomicBool) -> u64 {
    let mut answers = 0;
    while !stop.load(Relaxed) {
        for asker in askers {
            answers += u64::from(asker.ask().is_some());
        }
    }
    answers
}

/// Sends what is denied over and over.
fn keep_trying_what_is_denied(host: &Host, stop: &AtomicBool) -> u64 {
    host.enter(|| {
        let socket = std::net::UdpSocket::bind(("0.0.0.0", 0)).unwrap();
        let mut sent = 0;
        while !stop.load(Relaxed) {
            // After a refusal, the next datagram is sent.
            let _ = socket.send_to(b"!", (VM, DENIED));
            sent += 1;
            std::thread::sleep(Duration::from_millis(5));
        }
        sent
    })
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The resident memory of a process in kB.
fn memory(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn whatever_happens_nothing_is_lost_nobody_is_locked_out_and_nothing_is_silent() {
    in_netns(|| {
        allow_files();
        let seconds = setting("NFQD_TESTS_CHAOS_SECONDS", 60);
        let count = setting("NFQD_TESTS_CHAOS_CONNECTIONS", 2000) as usize;
        let seed = setting("NFQD_TESTS_SEED", 1);
        let fixture = Fixture::new(BACKENDS);
        let folder = tempfile::tempdir().unwrap();
        let other_region = folder.path().join("other");
        std::fs::write(&other_region, vec![0; 1 << 20]).unwrap();
        let flooder = Host::attach("br0", "flood", "02:00:00:00:03:01", &["10.129.126.3/24"]);
        let bystander = Host::attach("br0", "other", BYSTANDER_MAC, &["10.129.126.4/24"]);
        let names = || (0..BACKENDS).map(|n| b'0' + n);
        let _servers: Vec<LoadServer> = fixture
            .backends
            .iter()
            .zip(names())
            .map(|(host, name)| LoadServer::start(host, name, 80))
            .collect();
        let _echoes: Vec<Echo> = fixture
            .backends
            .iter()
            .zip(names())
            .map(|(host, name)| Echo::start(host, name, 53))
            .collect();
        let mac = |text: &str| text.parse::<MacAddr>().unwrap();
        let is_denied_or_within = |ip: &IpHeader| {
            let to = ip.ports.map(|ports| ports.destination);
            let is_within = ip.tcp_flags.is_some_and(|flags| flags & SYN == 0);
            to == Some(DENIED) || (to == Some(80) && is_within)
        };
        let is_of_backend = |ip: &IpHeader| {
            (0..BACKENDS).any(|n| ip.source == std::net::IpAddr::from(backend_ip(n)))
        };
        let is_of_others = |ip: &IpHeader| {
            let own = std::net::IpAddr::from(BYSTANDER);
            ip.destination.is_ipv4() && !ip.destination.is_multicast() && ip.destination != own
        };
        let watches = [
            ("the middlebox", Watch::start(&fixture.vm, mac(VM_MAC), is_denied_or_within)),
            ("the client", Watch::start(&fixture.client, mac(CLIENT_MAC), is_of_backend)),
            ("a bystander", Watch::start(&bystander, mac(BYSTANDER_MAC), is_of_others)),
        ];

        let other = other_region.display().to_string();
        let mut daemon = Daemon::start(&["--shm", &format!("{other},mac=02:00:00:00:09:09")]);
        daemon.must(&format!("R F {VM_MAC} {VM}"));
        daemon.must(&format!("A {VM_MAC} U 2 d {DENIED}"));
        let all: Vec<String> = (0..BACKENDS).map(|n| backend_ip(n).to_string()).collect();
        daemon.must(&format!("R L {VM_MAC} {VM}:80/tcp rr {}", all.join(" ")));
        daemon.must(&format!("R L {VM_MAC} {VM}:53/udp rr {}", all.join(" ")));
        // A small disk for the registrations.
        daemon.terminate();
        let disk = Disk::mount(&daemon.state());
        daemon.restart();
        wait_for("the MACs", || backends(&daemon).values().all(|backend| backend.mac.is_some()));
        let mut members = connect_all(&fixture.client, VM.into(), 80, count).unwrap();
        members.iter().for_each(|member| member.set_patience(PATIENCE));
        members.sort_by_key(|member| member.server);
        let askers: Vec<Asker> =
            (0..200).map(|n| Asker::new(&fixture.client, 20_000 + n, 53)).collect();
        let is_protected = run("nft list table bridge nfqd").contains("flags owner");
        let at_start = (descriptors(daemon.pid()), memory(daemon.pid()));

        let stop = AtomicBool::new(false);
        let random = Random(seed);
        let (counts, late) = (BTreeMap::new(), Vec::new());
        let mut chaos = Chaos {
            flooder,
            daemon,
            other_region,
            disk,
            random,
            lost: None,
            last_lost: None,
            counts,
            late,
        };
        let probing = Host::attach("br0", "probe", "02:00:00:00:03:03", &["10.129.126.5/24"]);
        std::thread::scope(|scope| {
            let mut asking = Vec::new();
            // A backend that is lost for a while must not keep the others from asking.
            for group in members.chunk_by_mut(|a, b| a.server == b.server) {
                let stop = &stop;
                asking.push(scope.spawn(move || keep_asking(group, stop)));
            }
            let by_udp = scope.spawn(|| keep_asking_by_udp(&askers, &stop));
            let denied = scope.spawn(|| keep_trying_what_is_denied(&probing, &stop));
            let end = Instant::now() + Duration::from_secs(seconds);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                while Instant::now() < end && asking.iter().all(|one| !one.is_finished()) {
                    let event = EVENTS[chaos.random.below(EVENTS.len() as u64) as usize];
                    // Kernels before 6.9 cannot protect a table: what passes until it is repaired is
                    // reset by the middlebox. The tests of the daemon's life bound that.
                    let is_foreign = matches!(event, Event::Flush | Event::DeleteTable);
                    chaos.happen(if is_foreign && !is_protected { Event::Kill } else { event });
                    let pause = 100 + chaos.random.below(900);
                    std::thread::sleep(Duration::from_millis(pause));
                    chaos.return_backend(Instant::now());
                }
                chaos.return_backend(end + Duration::from_secs(60));
                std::thread::sleep(Duration::from_secs(3));
            }));
            stop.store(true, Relaxed);
            let asked: Vec<Result<u64, String>> =
                asking.into_iter().map(|one| one.join().unwrap()).collect();
            let (answers, tried) = (by_udp.join().unwrap(), denied.join().unwrap());
            println!("{seconds} s, seed {seed}: {:?}", chaos.counts);
            println!("{asked:?} answers by TCP, {answers} by UDP; {tried} denied packets");
            if let Err(panic) = outcome {
                std::panic::resume_unwind(panic);
            }
            let log = chaos.daemon.log();
            let log: Vec<&str> = log.lines().rev().take(60).collect();
            assert!(asked.iter().all(Result::is_ok), "{asked:?}\n{log:#?}");
            assert!(answers > 0 && tried > 100);
        });
        for (name, watch) in watches {
            assert_eq!(watch.finish(), Vec::<String>::new(), "{name}");
        }
        assert_eq!(chaos.late, Vec::<String>::new(), "not in status within a second");
        // In the end everything is well again, and the connections are all there.
        let daemon = &chaos.daemon;
        let is_well = |status: &nfqd::api::Status| {
            status.repair_error.is_none()
                && status.steering_error.is_none()
                && status.state_error.is_none()
        };
        wait_for("recovery", || daemon.try_status().is_some_and(|status| is_well(&status)));
        for member in &mut members {
            assert_eq!(member.ask().unwrap(), member.server);
        }
        let at_end = (descriptors(daemon.pid()), memory(daemon.pid()));
        println!("descriptors, kB: {at_start:?} at the start, {at_end:?} at the end");
        assert!(at_end.0 <= at_start.0 + 2, "{at_start:?} {at_end:?}");
        assert!(at_end.1 <= at_start.1 + at_start.1 / 2 + 16_384, "{at_start:?} {at_end:?}");
    });
}
