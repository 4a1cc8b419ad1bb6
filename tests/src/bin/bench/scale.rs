//! Ten thousand middleboxes with ten rules each, beside one with one rule, and beside `nft -f` of
//! an equal ruleset written by hand.

use crate::print;
use nfqd_tests::daemon::{Daemon, program};
use nfqd_tests::netns::{in_netns, run as shell};
use nfqd_tests::tap::Tap;
use nfqd_tests::topology::wait_for;
use nix::sched::{CloneFlags, setns, unshare};
use std::fmt::Write;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

pub(crate) const MIDDLEBOXES: u32 = 10_000;
pub(crate) const RULES: u32 = 10;
const FRAMES: u32 = 150_000;
const PAIRS: usize = 21;
const LOADS: usize = 7;

fn mac(n: u32) -> String {
    let [_, a, b, c] = n.to_be_bytes();
    format!("02:00:00:{a:02x}:{b:02x}:{c:02x}")
}

/// The rules of a middlebox: their commands, and the elements that they are in nftables, with the
/// set's name.
fn rules(n: u32, count: u32, shapes: u32) -> impl Iterator<Item = (String, &'static str, String)> {
    (1..=count).map(move |rule| {
        let (number, mac) = (1000 + rule, mac(n));
        let host = format!("10.9.{}.{rule}", n % 256);
        let (fields, set, key) = match rule % shapes {
            0 => (format!("T 2 d {number}"), "tcp_dport", number.to_string()),
            1 => (format!("I 1 s {host}"), "saddr", host),
            2 => (format!("U 2 d {number}"), "udp_dport", number.to_string()),
            3 => (format!("I 9 s {host} p gre"), "saddr_proto", format!("{host} . gre")),
            _ => (
                format!("M 1 s 02:99:00:00:00:{rule:02x}"),
                "from_ether",
                format!("02:99:00:00:00:{rule:02x}"),
            ),
        };
        (
            format!("A {mac} #{rule} {fields}"),
            set,
            format!("{mac} . {key} comment \"rule #{rule}\""),
        )
    })
}

pub(crate) fn commands(middleboxes: u32, count: u32, shapes: u32) -> String {
    let mut out = String::new();
    for n in 0..middleboxes {
        let _ = writeln!(out, "R F {} 10.8.{}.{}", mac(n), n / 256, n % 256);
        out.extend(rules(n, count, shapes).map(|(command, ..)| format!("{command}\n")));
    }
    out
}

/// An equal ruleset as a careful administrator would write it: sets by shape, counters, comments.
fn by_hand(shapes: u32) -> String {
    let sets = [
        ("tcp_dport", "inet_service", "meta l4proto tcp ether daddr . th dport"),
        ("saddr", "ipv4_addr", "meta protocol ip meta l4proto >= 0 ether daddr . ip saddr"),
        ("udp_dport", "inet_service", "meta l4proto udp ether daddr . th dport"),
        (
            "saddr_proto",
            "ipv4_addr . inet_proto",
            "meta protocol ip ether daddr . ip saddr . meta l4proto",
        ),
        ("from_ether", "ether_addr", "ether daddr . ether saddr"),
    ];
    let mut out =
        "table bridge hand {\n set middleboxes {\n type ether_addr\n counter\n elements = {\n"
            .to_string();
    for n in 0..MIDDLEBOXES {
        let _ = writeln!(out, "{} comment \"10.8.{}.{}\",", mac(n), n / 256, n % 256);
    }
    out.push_str("}\n }\n");
    let used = || sets.iter().take(shapes as usize);
    for (name, types, _) in used() {
        let _ =
            writeln!(out, " set {name} {{\n type ether_addr . {types}\n counter\n elements = {{");
        let of_set = (0..MIDDLEBOXES)
            .flat_map(|n| rules(n, RULES, shapes))
            .filter(|(_, set, _)| set == name);
        out.extend(of_set.map(|(_, _, element)| format!("{element},\n")));
        out.push_str("}\n }\n");
    }
    out.push_str(" chain filters {\n");
    out.extend(used().map(|(name, _, key)| format!("{key} @{name} drop\n")));
    out.push_str(" }\n chain steer {\n type filter hook prerouting priority -300\n");
    out.push_str(" ether daddr @middleboxes jump filters\n }\n}\n");
    out
}

/// A running nfqd with these commands, and the seconds until it was ready.
fn start(directory: &Path, commands: &str) -> (Daemon, f64) {
    let file = directory.join("commands");
    std::fs::write(&file, commands).expect("commands");
    let begin = Instant::now();
    let daemon = Daemon::spawn(&["--commands", file.to_str().expect("a path")], "");
    while !daemon.log().contains("ready:") {
        assert!(begin.elapsed().as_secs() < 120, "not ready\n{}", daemon.log());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    (daemon, begin.elapsed().as_secs_f64())
}

/// A UDP frame to a middlebox that none of its rules matches.
fn frame(n: u32) -> Vec<u8> {
    let [_, a, b, c] = n.to_be_bytes();
    let mut out = vec![2, 0, 0, a, b, c, 2, 0, 0, 0, 0xff, 1, 8, 0];
    out.extend([0x45, 0, 0, 48, 0, 0, 0, 0, 9, 17, 0, 0, 10, 7, 7, 7, 10, 8, 0, 1]);
    let sum: u32 =
        out[14..34].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    out[24..26].copy_from_slice(&sum.to_be_bytes());
    out.extend([0, 99, 0, 99, 0, 28, 0, 0]);
    out.resize(14 + 48, 7);
    out
}

/// A bridge with a port that frames come from and one that takes them all, in a network namespace
/// of its own.
struct Bridge {
    uplink: Tap,
    namespace: File,
    /// The rules come and go with it.
    daemon: Option<Daemon>,
}

impl Bridge {
    /// One with an nfqd that has these commands.
    fn new(directory: &Path, commands: &str) -> Bridge {
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
                shell("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
                shell("ip link set lo up");
                shell("ip link add br0 type bridge mcast_snooping 0");
                shell("ip link set br0 up");
                shell("ip link add out type veth peer name sink");
                shell("ip link set sink up");
                shell("ip link set out master br0 up");
                let uplink = Tap::on_bridge("br0", "uplink", &[]);
                let namespace = File::open("/proc/thread-self/ns/net").expect("a namespace");
                Bridge { uplink, namespace, daemon: Some(start(directory, commands).0) }
            });
            made.join().expect("a bridge")
        })
    }

    /// Frames that have come through.
    fn taken(&self) -> u64 {
        std::thread::scope(|scope| {
            let read = scope.spawn(|| {
                setns(&self.namespace, CloneFlags::CLONE_NEWNET).expect("setns");
                let text =
                    std::fs::read_to_string("/proc/thread-self/net/dev").expect("statistics");
                let line = text
                    .lines()
                    .find_map(|line| line.trim().strip_prefix("sink:"))
                    .expect("the sink");
                line.split_whitespace()
                    .nth(1)
                    .and_then(|packets| packets.parse().ok())
                    .expect("a number")
            });
            read.join().expect("statistics")
        })
    }

    /// Thousands of frames a second through the bridge to these middleboxes, in turn; each write
    /// goes the whole way.
    fn rate(&self, frames: &[Vec<u8>]) -> f64 {
        let (before, start) = (self.taken(), Instant::now());
        for n in 0..FRAMES {
            self.uplink.send(&frames[n as usize % frames.len()]);
        }
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!(self.taken() - before, u64::from(FRAMES), "frames were lost");
        f64::from(FRAMES) / seconds / 1e3
    }
}

/// A process' memory in bytes, and the CPU time that it has used, in seconds.
fn usage(pid: u32) -> (u64, f64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let rss = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|line| line.split_whitespace().next());
    let schedstat = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("schedstat");
    let nanoseconds: f64 =
        schedstat.split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
    (rss.and_then(|kib| kib.parse::<u64>().ok()).expect("VmRSS") << 10, nanoseconds / 1e9)
}

/// The CPU time, in microseconds, that changes of one rule cost nfqd's control thread, one by one.
fn changes(daemon: &Daemon, command: impl Fn(u32) -> String) -> Vec<f64> {
    let pid = daemon.pid();
    // The work that follows the start, such as the file of registrations, is over by then.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let idle = {
        let before = usage(pid).1;
        std::thread::sleep(std::time::Duration::from_millis(500));
        (usage(pid).1 - before) / 0.5
    };
    let one = |n: u32| {
        let (before, start) = (usage(pid).1, Instant::now());
        daemon.must(&command(n));
        (usage(pid).1 - before - idle * start.elapsed().as_secs_f64()) * 1e6
    };
    one(0);
    (1..60).map(one).collect()
}

/// Runs it and prints what came out.
pub(crate) fn run() {
    assert!(program("nfqd").exists(), "build nfqd first: cargo build --release");
    in_netns(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let ratios = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<_>>();
        for shapes in [1, 2, 5] {
            println!("-- {MIDDLEBOXES} middleboxes, {RULES} rules each, of {shapes} shape(s)");
            let script = directory.path().join("by-hand.nft");
            std::fs::write(&script, by_hand(shapes)).expect("script");
            let all_commands = commands(MIDDLEBOXES, RULES, shapes);
            let (mut load, mut clock_hand) = (Vec::new(), Vec::new());
            for _ in 0..LOADS {
                let begin = Instant::now();
                shell(&format!("nft -f {}", script.display()));
                clock_hand.push(begin.elapsed().as_secs_f64());
                shell("nft delete table bridge hand");
                let (daemon, seconds) = start(directory.path(), &all_commands);
                load.push(seconds);
                drop(daemon);
                shell(&format!("{} flush", program("nfqd").display()));
            }
            print("nft -f of the ruleset written by hand", &clock_hand, "s");
            print("nfqd from its start to ready", &load, "s");
            print("    ratio of a pair", &ratios(&load, &clock_hand), "");
            let one = Bridge::new(directory.path(), &commands(1, 1, 1));
            let all = Bridge::new(directory.path(), &all_commands);
            let to_one = vec![frame(0)];
            let spread: Vec<Vec<u8>> = (0..MIDDLEBOXES).step_by(97).map(frame).collect();
            let (mut one_rate, mut all_rate, mut spread_rate) =
                (Vec::new(), Vec::new(), Vec::new());
            one.rate(&to_one);
            all.rate(&to_one);
            for pair in 0..PAIRS {
                if pair % 2 == 0 {
                    one_rate.push(one.rate(&to_one));
                }
                all_rate.push(all.rate(&to_one));
                spread_rate.push(all.rate(&spread));
                if pair % 2 == 1 {
                    one_rate.push(one.rate(&to_one));
                }
            }
            print("fast path, one middlebox with one rule", &one_rate, "kpps");
            print("fast path, all, traffic to one", &all_rate, "kpps");
            print("    ratio of a pair", &ratios(&all_rate, &one_rate), "");
            print(
                &format!("fast path, all, traffic to {} in turn", spread.len()),
                &spread_rate,
                "kpps",
            );
            print("    ratio of a pair", &ratios(&spread_rate, &one_rate), "");
            drop((one.daemon, all.daemon));
        }
        println!("-- one rule changed");
        let (empty, _) = start(directory.path(), "");
        let base = usage(empty.pid()).0;
        drop(empty);
        let mut medians = Vec::new();
        for middleboxes in [10, MIDDLEBOXES] {
            shell(&format!("{} flush", program("nfqd").display()));
            let (daemon, _) = start(directory.path(), &commands(middleboxes, RULES, 2));
            if middleboxes == MIDDLEBOXES {
                let bytes = (usage(daemon.pid()).0 - base) as f64 / f64::from(MIDDLEBOXES * RULES);
                println!("nfqd's memory: {bytes:.0} bytes a rule over {} KiB", base >> 10);
            }
            let exact = |n: u32| format!("A {} #5 T 2 d {}", mac(3), 5000 + n);
            let name = format!("exact, of {} rules: CPU of nfqd", middleboxes * RULES);
            medians.push(print(&name, &changes(&daemon, exact), "us"));
        }
        println!("    ratio of the medians: {:.2}", medians[1] / medians[0]);
        for ranges in [1, 10, 100, 1000] {
            shell(&format!("{} flush", program("nfqd").display()));
            let mut text = format!("R F {} 10.8.0.1\n", mac(3));
            for n in 2..=ranges {
                let _ = writeln!(text, "A {} #{n} I 1 s 11.{}.{}.0/24", mac(3), n / 256, n % 256);
            }
            let (daemon, _) = start(directory.path(), &text);
            wait_for("status", || daemon.try_status().is_some());
            let change = |n: u32| format!("A {} #1 I 1 s 12.{}.{}.0/24", mac(3), n / 256, n % 256);
            let changed = changes(&daemon, change);
            print(
                &format!("a prefix, of {ranges} in its interval set: CPU of nfqd"),
                &changed,
                "us",
            );
        }
    });
}
