//! The control thread: its CPU time and wakeups while guests are silent, and the latency of commands.
//!
//! `NFQD_BENCH_PEER` names another nfqd, such as that of an earlier version, which takes turns with
//! this one.

use crate::print;
use nfqd_shmctl::doorbell::Bell;
use nfqd_shmctl::mailbox::guest::send_command;
use nfqd_shmctl::vsock::Connection;
use nfqd_shmctl::{Region, Reply, ring, sender};
use nfqd_tests::daemon::{NFQD, program};
use nfqd_tests::doorbell::DoorbellClient;
use nfqd_tests::netns::{in_netns, run as shell};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket,
};
use nix::sys::time::TimeVal;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
/// The numbers of plain regions and of doorbells with a connected VM.
const CHANNELS: [(usize, usize); 5] = [(0, 0), (1, 0), (100, 0), (200, 0), (0, 100)];
/// The time over which a silent daemon is observed.
const OBSERVED: Duration = Duration::from_secs(5);
const TALKING: usize = 400;
const AFTER_PAUSE: usize = 40;
/// The pause between commands of a guest that talks: below the rate that a channel may have.
pub(crate) const TALK_PAUSE: Duration = Duration::from_millis(12);
const PAUSE: Duration = Duration::from_millis(500);
const AFTER_SILENCE: usize = 10;
/// A pause after which a guest counts as silent.
const SILENCE: Duration = Duration::from_secs(10);
/// The CID of the loopback (`VMADDR_CID_LOCAL`).
const LOCAL_CID: u32 = 1;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A running nfqd, which may be of another version.
pub(crate) struct Peer {
    child: Child,
    directory: tempfile::TempDir,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        shell("nft flush ruleset");
    }
}

impl Peer {
    pub(crate) fn start(nfqd: &Path, regions: usize, doorbells: usize, arguments: &[&str]) -> Peer {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let mut command = Command::new(nfqd);
        command.arg("--state").arg(at("state")).arg("--control").arg(at("control"));
        command.args(arguments);
        for number in 0..regions {
            command.arg("--shm").arg(region(directory.path(), number));
        }
        for number in 0..doorbells {
            command.arg("--doorbell").arg(doorbell(directory.path(), number));
        }
        let log = File::create(at("log")).expect("a log");
        let child = command.stdin(Stdio::null()).stderr(log).spawn().expect("nfqd");
        let deadline = Instant::now() + Duration::from_secs(30);
        while !fs::read_to_string(at("log")).unwrap_or_default().contains("ready") {
            assert!(Instant::now() < deadline, "{} is not ready", nfqd.display());
            std::thread::sleep(Duration::from_millis(10));
        }
        Peer { child, directory }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn region(&self, number: usize) -> Region {
        Region::open(&region(self.directory.path(), number)).expect("a region")
    }

    /// Returns the CPU time of all threads in seconds, and the number of times that they have slept.
    fn usage(&self) -> (f64, f64) {
        let tasks = format!("/proc/{}/task", self.child.id());
        let (mut seconds, mut sleeps) = (0.0, 0.0);
        for task in fs::read_dir(tasks).expect("tasks") {
            let task = task.expect("a task").path();
            let read = |name: &str| fs::read_to_string(task.join(name)).expect("statistics");
            let number = |text: Option<&str>| text.and_then(|n| n.parse().ok()).unwrap_or(0.0);
            seconds += number(read("schedstat").split_whitespace().next()) / 1e9;
            let status = read("status");
            let line =
                status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sleeps += number(line.map(str::trim));
        }
        (seconds, sleeps)
    }

    /// Returns the share of a core and the wakeups a second while nothing happens.
    fn idle(&self, doorbells: usize) -> (f64, f64) {
        let connect = |number| DoorbellClient::connect(&doorbell(self.directory.path(), number));
        let _vms: Vec<DoorbellClient> = (0..doorbells).map(connect).collect();
        // The work that follows the start is over by then.
        std::thread::sleep(Duration::from_secs(2));
        let (before, start) = (self.usage(), Instant::now());
        std::thread::sleep(OBSERVED);
        let (after, seconds) = (self.usage(), start.elapsed().as_secs_f64());
        ((after.0 - before.0) / seconds * 100.0, (after.1 - before.1) / seconds)
    }
}

fn doorbell(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("bell{number}"))
}

fn region(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("vm{number}"))
}

/// A way for a command, and its name.
pub(crate) type Way = (&'static str, fn(&Region, &str) -> Vec<Reply>);

const MAILBOX: Way =
    ("mailbox", |guest, command| send_command(guest, command, TIMEOUT).expect("a reply"));
pub(crate) const RING: Way = ("ring", |guest, command| {
    let lock = sender::lock(guest, TIMEOUT).expect("the lock");
    let mut replies = Vec::new();
    let commands = [command.to_string()];
    ring::guest::send_locked(guest, &lock, &commands, TIMEOUT, &mut replies).expect("a reply");
    replies
});

/// Sends commands with a pause before each; returns the latencies in milliseconds.
pub(crate) fn latencies(
    guest: &Region,
    way: Way,
    mac: u8,
    count: usize,
    pause: Duration,
) -> Vec<f64> {
    let send = |command: &str| {
        let replies = way.1(guest, command);
        assert!(replies.iter().all(Reply::is_ok), "{command}: {replies:?}");
    };
    send(&format!("R F 2:0:0:0:0:{mac} 10.0.0.{mac}"));
    let one = |number: usize| {
        std::thread::sleep(pause);
        let start = Instant::now();
        send(&format!("A 2:0:0:0:0:{mac} T 2 d {}", 1000 + number));
        start.elapsed().as_secs_f64() * 1e3
    };
    (0..count).map(one).collect()
}

/// A guest that changes its rules as fast as the host takes the commands.
#[derive(Default)]
struct Flood {
    is_over: AtomicBool,
}

impl Flood {
    fn run(&self, guest: &Region) {
        let mut port = 0_u16;
        while !self.is_over.load(Ordering::Relaxed) {
            port = port.wrapping_add(1);
            // A timeout is not a failure of the flood.
            let _ = send_command(guest, "R F 2:0:0:0:0:9 10.0.0.9", TIMEOUT);
            let _ = send_command(guest, &format!("A 2:0:0:0:0:9 T 2 d {port}"), TIMEOUT);
        }
    }
}

impl Flood {
    /// Rings a bell 20 000 times a second.
    fn ring(&self, bell: &Bell) {
        while !self.is_over.load(Ordering::Relaxed) {
            bell.ring().expect("a bell");
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Ends a flood when it is dropped, also by a panic.
struct EndOfFlood<'a>(&'a Flood);

impl Drop for EndOfFlood<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

pub(crate) fn print_percentiles(name: &str, values: &mut [f64]) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    println!("{name:<52} p50 {:7.2} ms  p99 {:7.2} ms  max {:7.2} ms", at(0.5), at(0.99), at(1.0));
}

/// Returns this nfqd and its peer, with their names.
fn contestants() -> Vec<(&'static str, PathBuf)> {
    let mut out = vec![("nfqd", program(NFQD))];
    out.extend(std::env::var_os("NFQD_BENCH_PEER").map(|path| ("peer", PathBuf::from(path))));
    out
}

/// Runs it and prints what came out.
pub(crate) fn idle() {
    in_bridge_netns(measure_idle);
}

/// Runs it and prints what came out.
pub(crate) fn latency() {
    in_bridge_netns(measure_latency);
}

fn measure_idle() {
    for (regions, doorbells) in CHANNELS {
        let contestants = contestants();
        let mut results = vec![(Vec::new(), Vec::new()); contestants.len()];
        for _ in 0..ROUNDS {
            for ((_, path), (cpu, wakeups)) in contestants.iter().zip(&mut results) {
                let (share, rate) = Peer::start(path, regions, doorbells, &[]).idle(doorbells);
                cpu.push(share);
                wakeups.push(rate);
            }
        }
        for ((name, _), (cpu, wakeups)) in contestants.iter().zip(&results) {
            let channels = format!("{regions} silent regions, {doorbells} doorbells, {name}");
            print(&format!("{channels}: CPU"), cpu, "% of one");
            print(&format!("{channels}: wakeups"), wakeups, "a second");
        }
    }
}

fn measure_latency() {
    for (name, path) in contestants() {
        let peer = Peer::start(&path, 2, 0, &[]);
        let (guest, other) = (peer.region(0), peer.region(1));
        let ways = [Some(MAILBOX), ring::guest::is_there(&guest).then_some(RING)];
        for way in ways.into_iter().flatten() {
            let name = format!("{name}, {}", way.0);
            let mut talking = latencies(&guest, way, 1, TALKING, TALK_PAUSE);
            print_percentiles(&format!("{name}: a command every 12 ms"), &mut talking);
            let mut paused = latencies(&guest, way, 1, AFTER_PAUSE, PAUSE);
            print_percentiles(&format!("{name}: a command every 500 ms"), &mut paused);
            let mut silent = latencies(&guest, way, 1, AFTER_SILENCE, SILENCE);
            print_percentiles(&format!("{name}: a command every 10 s"), &mut silent);
            let flood = Flood::default();
            std::thread::scope(|scope| {
                let _end = EndOfFlood(&flood);
                scope.spawn(|| flood.run(&other));
                let mut flooded = latencies(&guest, way, 1, TALKING, TALK_PAUSE);
                print_percentiles(
                    &format!("{name}: a command every 12 ms, another guest floods"),
                    &mut flooded,
                );
            });
        }
    }
    print_percentiles("a process of nft every 12 ms", &mut nft_latencies());
}

/// Runs it and prints what came out.
pub(crate) fn enforcement() {
    in_bridge_netns(measure_enforcement);
}

type Sender<'a> = &'a dyn Fn(&str);

/// The time from a guest's write until the kernel has the change, by each way of a command, and by a
/// process of nft that adds a rule.
fn measure_enforcement() {
    let peer = Peer::start(&program(NFQD), 1, 2, &["--vsock", &format!("{LOCAL_CID},mac=any")]);
    let plain = peer.region(0);
    let connect = |number| DoorbellClient::connect(&doorbell(peer.directory.path(), number));
    let (vm, other) = (connect(0), connect(1));
    let by_doorbell = |command: &str| {
        let reply = vm.send(command);
        assert!(reply.starts_with("OK"), "{command}: {reply}");
    };
    let by = |way: Way| {
        let plain = &plain;
        move |command: &str| {
            let replies = way.1(plain, command);
            assert!(replies.iter().all(Reply::is_ok), "{command}: {replies:?}");
        }
    };
    let (by_ring, by_mailbox) = (by(RING), by(MAILBOX));
    // Over the kernel's loopback, where there is one.
    let connection = Connection::open(LOCAL_CID, TIMEOUT);
    let by_vsock = |command: &str| {
        let mut replies = Vec::new();
        let connection = connection.as_ref().expect("vsock");
        connection.send(&[command.to_string()], TIMEOUT, &mut replies).expect("a reply");
        assert!(replies.iter().all(Reply::is_ok), "{command}: {replies:?}");
    };
    for pause in [TALK_PAUSE, PAUSE] {
        let count = if pause == PAUSE { AFTER_PAUSE } else { TALKING };
        let ways: [(&str, Sender<'_>); 4] = [
            ("doorbell", &by_doorbell),
            ("ring of a plain region", &by_ring),
            ("mailbox of a plain region", &by_mailbox),
            ("vsock", &by_vsock),
        ];
        for (name, send) in ways {
            if let ("vsock", Err(error)) = (name, &connection) {
                println!("{name}: not measured: {error}");
                continue;
            }
            send("R F 2:0:0:0:0:1 10.0.0.1");
            let change = |number: usize| send(&format!("A 2:0:0:0:0:1 T 2 d {}", 1000 + number));
            let mut times = until_enforced(count, pause, &change);
            print_percentiles(&format!("{name}, every {pause:?}, until enforced"), &mut times);
        }
        shell("nft add table bridge peer");
        shell("nft add chain bridge peer rules");
        let by_nft = |number: usize| {
            shell(&format!("nft add rule bridge peer rules tcp dport {} drop", 1000 + number));
        };
        let mut times = until_enforced(count, pause, &by_nft);
        print_percentiles(
            &format!("a process of nft, every {pause:?}, until enforced"),
            &mut times,
        );
        shell("nft delete table bridge peer");
    }
    let change = |number: usize| by_doorbell(&format!("A 2:0:0:0:0:1 T 2 d {}", 1000 + number));
    let flood = Flood::default();
    std::thread::scope(|scope| {
        let _end = EndOfFlood(&flood);
        scope.spawn(|| flood.run(&plain));
        let mut times = until_enforced(TALKING, TALK_PAUSE, &change);
        print_percentiles("doorbell, another guest floods with commands", &mut times);
    });
    let storm = Flood::default();
    std::thread::scope(|scope| {
        let _end = EndOfFlood(&storm);
        scope.spawn(|| storm.ring(&other.host));
        let mut times = until_enforced(TALKING, TALK_PAUSE, &change);
        print_percentiles("doorbell, another guest rings without end", &mut times);
    });
}

/// Makes changes with a pause before each; returns the milliseconds until each was in the kernel, which
/// tells so at the end of its transaction.
fn until_enforced(count: usize, pause: Duration, change: &dyn Fn(usize)) -> Vec<f64> {
    let notifications = notifications();
    let one = |number: usize| {
        std::thread::sleep(pause);
        while recv(notifications.as_raw_fd(), &mut [0; 65536], MsgFlags::MSG_DONTWAIT).is_ok() {}
        let told = std::thread::scope(|scope| {
            let told = scope.spawn(|| {
                recv(notifications.as_raw_fd(), &mut [0; 65536], MsgFlags::empty())
                    .expect("nftables");
                Instant::now()
            });
            // The other thread waits by then.
            std::thread::sleep(Duration::from_millis(1));
            let start = Instant::now();
            change(number);
            told.join().expect("a notification").saturating_duration_since(start)
        });
        told.as_secs_f64() * 1e3
    };
    (0..count).map(one).collect()
}

/// Subscribes to the notifications of nftables (include/uapi/linux/netfilter/nfnetlink.h,
/// `NFNLGRP_NFTABLES`).
fn notifications() -> OwnedFd {
    const GROUP: u32 = 1 << (7 - 1);
    let protocol = SockProtocol::NetlinkNetFilter;
    let opened = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol);
    let opened = opened.expect("a netlink socket");
    bind(opened.as_raw_fd(), &NetlinkAddr::new(0, GROUP)).expect("a subscription");
    setsockopt(&opened, ReceiveTimeout, &TimeVal::new(5, 0)).expect("a timeout");
    opened
}

/// Adds a rule by a process of nft each time; returns the latencies in milliseconds.
fn nft_latencies() -> Vec<f64> {
    shell("nft add table bridge peer");
    shell("nft add chain bridge peer rules");
    let one = |number: usize| {
        std::thread::sleep(TALK_PAUSE);
        let start = Instant::now();
        shell(&format!("nft add rule bridge peer rules tcp dport {} drop", 1000 + number));
        start.elapsed().as_secs_f64() * 1e3
    };
    (0..TALKING).map(one).collect()
}

pub(crate) fn in_bridge_netns(measure: fn()) {
    in_netns(move || {
        shell("ip link add br0 type bridge");
        shell("ip link set br0 up");
        measure();
    });
}
