//! Throughput of a redirected TCP stream beside the plain bridge's.

use crate::print;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::netns::in_netns;
use nfqd_tests::topology::{SINK, Server, Topology, VM, connect, wait_for};
use std::net::Ipv4Addr;

/// A host that nfqd knows nothing of: what goes there is the plain bridge.
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 129, 126, 2);
const PAIRS: usize = 9;
const BYTES: u64 = 2 << 30;

/// Runs it and prints what came out.
pub(crate) fn run() {
    in_netns(|| {
        let topology = Topology::new(true);
        let daemon = Daemon::start(&[]);
        daemon.must("R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17@02:00:00:00:00:17");
        let servers =
            [Server::start(&topology.backend, SINK, 80), Server::start(&topology.other, SINK, 80)];
        wait_for("the backend", || connect(&topology.client, VM, 80).is_some());
        let rate = |to: Ipv4Addr| {
            let connection = connect(&topology.client, to, servers[0].port());
            connection.map_or(0.0, |connection| connection.pour(BYTES) / 1e9)
        };
        // A warm-up pair, then pairs of which the first changes.
        rate(OTHER);
        rate(VM);
        let before = daemon.queued_packets();
        let (mut plain, mut redirected) = (Vec::new(), Vec::new());
        for pair in 0..PAIRS {
            if pair % 2 == 0 {
                plain.push(rate(OTHER));
                redirected.push(rate(VM));
            } else {
                redirected.push(rate(VM));
                plain.push(rate(OTHER));
            }
        }
        let ratios: Vec<f64> =
            redirected.iter().zip(&plain).map(|(redirected, plain)| redirected / plain).collect();
        let status = daemon.status();
        println!("steer {}, {PAIRS} pairs of {} MiB, one TCP stream", status.steer, BYTES >> 20);
        print("plain bridge", &plain, "Gbit/s");
        print("redirected", &redirected, "Gbit/s");
        print("ratio of a pair", &ratios, "");
        println!(
            "packets in user space: {} of {} transfers",
            daemon.queued_packets() - before,
            2 * PAIRS
        );
    });
}
