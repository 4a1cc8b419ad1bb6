//! Changes of a whole configuration under traffic: frames that the old and the new one treat alike
//! are never treated otherwise, and none is lost.
#![allow(clippy::unwrap_used)]

use nfqd_tests::daemon::Daemon;
use nfqd_tests::frames::{HOSTS, MIDDLEBOXES};
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::tap::Tap;
use nfqd_tests::topology::wait_for;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

const CHANGES: usize = 30;
const FLOWS: u16 = 40;

/// The purpose of a frame, in its payload.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
enum Kind {
    /// Both configurations let it pass.
    Pass,
    /// Both drop it, each by another rule.
    Drop,
    /// One lets it pass, one drops it.
    Differs,
    /// Both send it to the same backend, one among other services.
    Redirect,
    /// The answer.
    Reply,
}

fn mac(text: &str) -> [u8; 6] {
    text.parse::<nfqd_shmctl::MacAddr>().unwrap().0
}

/// A UDP datagram with its kind and number.
fn datagram(kind: Kind, number: u32) -> Vec<u8> {
    let [one, two] = MIDDLEBOXES.map(mac);
    let [client, backend, _] = HOSTS.map(mac);
    let flow = 2000 + (number % u32::from(FLOWS)) as u16;
    let (from, to, source, destination, ports) = match kind {
        Kind::Pass => (client, one, 4, 2, (flow, 1000)),
        Kind::Drop => (client, one, 4, 2, (flow, 7)),
        Kind::Differs => (client, one, 4, 2, (flow, 8)),
        Kind::Redirect => (client, two, 4, 2, (flow, 53)),
        Kind::Reply => (backend, client, 3, 4, (53, flow)),
    };
    let mut out = Vec::new();
    etherparse::PacketBuilder::ethernet2(from, to)
        .ipv4([10, 0, 0, source], [10, 0, 0, destination], 64)
        .udp(ports.0, ports.1)
        .write(&mut out, &[&[kind as u8], &number.to_be_bytes()[..]].concat())
        .unwrap();
    out
}

fn configuration(which: usize) -> String {
    let [one, two] = MIDDLEBOXES;
    let mut out = format!("X {one}\nX {two}\n");
    // The first change starts from an empty policy.
    if which == 0 {
        out.clear();
    }
    let _ = writeln!(out, "R F {one} 10.0.0.2");
    if which.is_multiple_of(2) {
        let _ = writeln!(out, "A {one} #1 U 2 d 7\nA {one} +1 U 2 d 1000");
        let _ = writeln!(out, "R L {two} 10.0.0.2 0 10.0.0.3@{}", HOSTS[1]);
        out.extend((10..200).map(|n| format!("A {one} #{n} I 1 s 10.1.0.{n}\n")));
    } else {
        let _ =
            writeln!(out, "A {one} #300 U 2 d 5-9\nA {one} +7 U 2 d 900-1100\nA {one} +7 V 0 s 5");
        let _ = writeln!(out, "R L {two} 10.0.0.9 0 10.0.0.7@{}", HOSTS[2]);
        let _ = writeln!(out, "R L {two} 10.0.0.2 0 10.0.0.3@{}", HOSTS[1]);
        out.extend((10..200).map(|n| format!("A {one} #{n} I 1 s 10.{n}.0.0/16\n")));
    }
    out
}

/// Counts the datagrams that arrive at a port, by number, and checks that each is as it must be.
fn take(
    port: &Tap,
    stop: &AtomicBool,
    fits: impl Fn(&[u8], u8) -> bool,
) -> BTreeMap<(u8, u32), usize> {
    let mut out = BTreeMap::new();
    loop {
        let Some(frame) = port.receive(Duration::from_millis(100)) else {
            if stop.load(Relaxed) {
                return out;
            }
            continue;
        };
        let body = &frame[42..];
        let number = u32::from_be_bytes(body[1..5].try_into().unwrap());
        assert!(fits(&frame, body[0]), "kind {}, number {number}: {frame:02x?}", body[0]);
        *out.entry((body[0], number)).or_default() += 1;
    }
}

fn changes_under_traffic(fast_path: &str) {
    run("ip link add br0 type bridge mcast_snooping 0");
    run("ip link set br0 up");
    let uplink = Tap::on_bridge("br0", "uplink", &[]);
    let port = |name: &str, macs: &[&str]| {
        let tap = Tap::on_bridge("br0", name, macs);
        run(&format!("ip link set {name} txqueuelen 100000"));
        tap
    };
    let vm = port("vm", &MIDDLEBOXES);
    let [client, backend, other] = [0, 1, 2].map(|n| port(&format!("host{n}"), &[HOSTS[n]]));
    let dir = tempfile::tempdir().unwrap();
    let (config, commands) = (dir.path().join("nfqd.toml"), dir.path().join("commands"));
    std::fs::write(&config, format!("commands = \"{}\"\n", commands.display())).unwrap();
    std::fs::write(&commands, configuration(0)).unwrap();
    let daemon = Daemon::start(&["--fast-path", fast_path, "--config", config.to_str().unwrap()]);
    let stop = AtomicBool::new(false);
    let done = AtomicBool::new(false);
    let plain = |_: &[u8], kind: u8| kind == Kind::Pass as u8 || kind == Kind::Differs as u8;
    let redirected =
        |frame: &[u8], kind: u8| kind == Kind::Redirect as u8 && frame[30..34] == [10, 0, 0, 3];
    let translated =
        |frame: &[u8], kind: u8| kind == Kind::Reply as u8 && frame[26..30] == [10, 0, 0, 2];
    let [at_vm, at_client, at_backend, at_other, sent] = std::thread::scope(|scope| {
        let takers = [
            scope.spawn(|| take(&vm, &stop, plain)),
            scope.spawn(|| take(&client, &stop, translated)),
            scope.spawn(|| take(&backend, &stop, redirected)),
            scope.spawn(|| take(&other, &stop, |_, _| false)),
        ];
        let sender = scope.spawn(|| {
            let mut sent: BTreeMap<(u8, u32), usize> = BTreeMap::new();
            let mut number = 0;
            while !done.load(Relaxed) {
                for kind in [Kind::Pass, Kind::Drop, Kind::Differs, Kind::Redirect, Kind::Reply] {
                    // A reply is sent once its flow exists.
                    if kind != Kind::Reply || number > u32::from(FLOWS) {
                        (if kind == Kind::Reply { &backend } else { &uplink })
                            .send(&datagram(kind, number));
                        sent.insert((kind as u8, number), 1);
                    }
                }
                number += 1;
                if number % 16 == 0 {
                    std::thread::sleep(Duration::from_micros(500));
                }
                if number == u32::from(FLOWS) {
                    std::thread::sleep(Duration::from_millis(200));
                }
            }
            sent
        });
        std::thread::sleep(Duration::from_millis(500));
        for change in 1..=CHANGES {
            std::fs::write(&commands, configuration(change)).unwrap();
            daemon.signal(nix::sys::signal::Signal::SIGHUP);
            let marker = if change % 2 == 0 { "#1 U 2 d 7" } else { "#300 U 2 d 5-9" };
            let marker = marker.strip_prefix("#1 ").unwrap_or(marker);
            wait_for("the change", || {
                let status = daemon.status();
                status
                    .middleboxes
                    .first()
                    .is_some_and(|m| m.commands.iter().any(|line| line.ends_with(marker)))
            });
            std::thread::sleep(Duration::from_millis(50));
        }
        done.store(true, Relaxed);
        let sent = sender.join().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        stop.store(true, Relaxed);
        let [vm, client, backend, other] = takers.map(|taker| taker.join().unwrap());
        [vm, client, backend, other, sent]
    });
    let of = |map: &BTreeMap<(u8, u32), usize>, kind: Kind| {
        map.range((kind as u8, 0)..=(kind as u8, u32::MAX)).count()
    };
    let lost = |map: &BTreeMap<(u8, u32), usize>, kind: Kind| of(&sent, kind) - of(map, kind);
    println!(
        "fast path {fast_path}: {} datagrams of each kind, {CHANGES} changes; lost: passing {}, redirected {}, replies {}; \
         {} of those that differ passed; {} queued",
        of(&sent, Kind::Pass),
        lost(&at_vm, Kind::Pass),
        lost(&at_backend, Kind::Redirect),
        lost(&at_client, Kind::Reply),
        of(&at_vm, Kind::Differs),
        daemon.queued_packets(),
    );
    for (map, kind) in
        [(&at_vm, Kind::Pass), (&at_backend, Kind::Redirect), (&at_client, Kind::Reply)]
    {
        assert_eq!(lost(map, kind), 0, "{kind:?}\n{}", daemon.log());
        assert!(map.values().all(|&count| count == 1), "{kind:?} came twice");
    }
    assert!(at_other.is_empty() && of(&at_vm, Kind::Drop) == 0);
    let differ = of(&at_vm, Kind::Differs);
    assert!(differ > 0 && differ < of(&sent, Kind::Differs), "both configurations held: {differ}");
    assert!(of(&sent, Kind::Pass) > 1000);
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn by_the_fast_path() {
    in_netns(|| changes_under_traffic("full"));
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn by_the_engine_alone() {
    in_netns(|| changes_under_traffic("off"));
}
