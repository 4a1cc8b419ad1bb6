//! The observation of many backends: the time until one that dies is found, the ARP packets a second,
//! and the entries in the host's neighbour table.

use crate::print;
use nfqd::api::BackendState;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::netns::{Host, in_netns, run as shell};
use nfqd_tests::topology::wait_for;
use std::time::{Duration, Instant};

const NETWORKS: usize = 8;
const BACKENDS: usize = 128;
const DEATHS: usize = 9;

/// Runs it and prints what came out.
pub(crate) fn run() {
    in_netns(|| {
        let names: Vec<String> = (0..NETWORKS).map(|at| format!("br{at}")).collect();
        let mut hosts = Vec::new();
        for (at, bridge) in names.iter().enumerate() {
            shell(&format!("ip link add {bridge} type bridge mcast_snooping 0"));
            shell(&format!("ip link set {bridge} up"));
            let backends: Vec<String> =
                (0..BACKENDS).map(|n| format!("10.1.{}.{}/16", n / 100, n % 100 + 1)).collect();
            let backends: Vec<&str> = backends.iter().map(String::as_str).collect();
            hosts.push(Host::attach(bridge, &format!("b{at}"), "02:00:00:00:00:0b", &backends));
            hosts.push(Host::attach(
                bridge,
                &format!("m{at}"),
                "02:00:00:00:00:0a",
                &["10.1.200.1/16"],
            ));
        }
        let directory = tempfile::tempdir().expect("a directory");
        let commands = directory.path().join("commands");
        let mut text = String::new();
        for bridge in &names {
            for n in 0..BACKENDS {
                let ip = format!("10.1.{}.{}", n / 100, n % 100 + 1);
                let line = match n {
                    0 => format!("R L 02:00:00:00:00:0a 10.1.200.1:80 rr {ip} check=arp"),
                    _ => format!("B 02:00:00:00:00:0a 10.1.200.1:80 + {ip}"),
                };
                text += &format!("[{bridge}] {line}\n");
            }
        }
        std::fs::write(&commands, text).expect("commands");
        let daemon = Daemon::start(&["--commands", commands.to_str().expect("a path")]);
        let backends = |state: BackendState| {
            let middleboxes = daemon.status().middleboxes;
            let all = middleboxes.iter().flat_map(|m| &m.services).flat_map(|s| &s.backends);
            all.filter(|backend| backend.state == state).count()
        };
        let start = Instant::now();
        wait_for("all backends", || backends(BackendState::Up) == NETWORKS * BACKENDS);
        println!(
            "{NETWORKS} bridges of {BACKENDS} backends; all found after {:.1?}",
            start.elapsed()
        );
        shell("nft add table netdev count");
        for at in 0..NETWORKS {
            let chain = format!(
                "add chain netdev count b{at} {{ type filter hook egress device b{at} priority 0; }}"
            );
            let added = std::process::Command::new("nft").arg(chain).status().expect("nft");
            assert!(added.success());
            shell(&format!("nft add rule netdev count b{at} ether type arp counter"));
        }
        const SECONDS: u64 = 20;
        std::thread::sleep(Duration::from_secs(SECONDS));
        let listed = shell("nft list table netdev count");
        let packets = listed.lines().filter_map(|line| line.split("packets ").nth(1));
        let sum: u64 = packets.filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok()).sum();
        println!("ARP packets a second: {:.0}", sum as f64 / SECONDS as f64);
        println!(
            "entries in the host's neighbour table: {}",
            shell("ip neigh show").lines().count()
        );
        let mut times = Vec::new();
        for at in 0..DEATHS {
            let port = format!("b{}", at % NETWORKS);
            shell(&format!("ip link set {port} down"));
            let start = Instant::now();
            wait_for("the death", || backends(BackendState::Dead) == BACKENDS);
            times.push(start.elapsed().as_secs_f64());
            shell(&format!("ip link set {port} up"));
            wait_for_all(|| backends(BackendState::Up) == NETWORKS * BACKENDS);
        }
        print("until the last of a network's backends is dead", &times, "s");
    });
}

/// Waits for up to two minutes: a backend that comes back is damped.
fn wait_for_all(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < deadline, "they did not come back");
        std::thread::sleep(Duration::from_millis(100));
    }
}
