//! The cost of a new flow in the engine by the number of flows: time and allocations.

use crate::print;
use nfqd::engine::flows::OriginalTuple;
use nfqd::engine::verdict::Verdict;
use nfqd::engine::{EngineState, Ingress, Snapshot, decide};
use nfqd_rules::Policy;
use nfqd_rules::packet::Packet;
use nfqd_rules::pool::Pools;
use nfqd_rules::slots::{Slots, Unobserved};
use nfqd_rules::{Desired, MiddleboxKey};
use nfqd_tests::counting::allocations;
use std::time::Instant;

const NEW: usize = 20_000;
const ROUNDS: usize = 7;
const CAPACITY: usize = 1 << 20;

fn snapshot(method: &str) -> Snapshot {
    let mut policy = Policy::default();
    let backends: Vec<String> = (2..12).map(|n| format!("10.0.0.{n}@2:0:0:0:0:{n}")).collect();
    policy
        .apply_line(&format!("R L 2:0:0:0:0:1 10.0.0.1:80 {method} {}", backends.join(" ")))
        .expect("a command");
    let (mut slots, mut pools) = (Slots::default(), Pools::default());
    slots.sync_all(&policy, &Unobserved, Instant::now());
    for (mac, middlebox) in policy.middleboxes() {
        pools.update(*mac, Some(middlebox), &slots);
        pools.prepare(*mac);
    }
    Snapshot::new(Desired { policy, slots, ..Desired::default() }, pools)
}

/// SYNs of flows from the one of this number on.
fn syns(from: usize, count: usize) -> Vec<Packet> {
    let one = |n: usize| {
        let n = n as u32;
        let [a, b, c, d] = (0x0b00_0000 + n / 50_000).to_be_bytes();
        let port = (1024 + n % 50_000) as u16;
        let mut out = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0xee, 8, 0];
        out.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 9, 6, 0, 0, a, b, c, d, 10, 0, 0, 1]);
        out.extend(port.to_be_bytes());
        out.extend([0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]);
        Packet::from_frame(&out).expect("a frame")
    };
    (from..from + count).map(one).collect()
}

/// Runs it and prints what came out.
pub(crate) fn run() {
    for method in ["rr", "hash", "least"] {
        let snapshot = snapshot(method);
        let state = EngineState::new(CAPACITY);
        // All state is touched once.
        for at in (0..CAPACITY).step_by(NEW) {
            let some = syns(at, NEW);
            some.iter().for_each(|packet| {
                let _ = decide(&snapshot, &state, Ingress::ANY, packet, 0);
            });
        }
        state.flows.expire(u32::MAX);
        let mut there = 0;
        for wanted in [1, 1000, 100_000, 1_000_000] {
            while there < wanted {
                let some = syns(there, (wanted - there).min(50_000));
                there += some.len();
                some.iter().for_each(|packet| {
                    let _ = decide(&snapshot, &state, Ingress::ANY, packet, 0);
                });
            }
            let mut costs = Vec::new();
            let mut allocated = 0;
            for round in 0..=ROUNDS {
                let some = syns(2_000_000 + round * NEW, NEW);
                let (before, start) = (allocations(), Instant::now());
                let is_redirect = |packet: &&Packet| {
                    matches!(
                        decide(&snapshot, &state, Ingress::ANY, packet, 0)
                            .decision()
                            .map(|decision| decision.verdict),
                        Some(Verdict::Redirect(_))
                    )
                };
                let redirected = some.iter().filter(is_redirect).count();
                // The first round warms up.
                let (took, more) = (start.elapsed(), allocations() - before);
                if round > 0 {
                    costs.push(took.as_secs_f64() * 1e6 / NEW as f64);
                    allocated += more;
                }
                assert_eq!(redirected, NEW);
                some.iter().for_each(|packet| forget(&state, packet));
            }
            print(&format!("{method}, new flow among {wanted}"), &costs, "us");
            println!(
                "    {allocated} allocations in {} new flows; {} flows stay",
                ROUNDS * NEW,
                state.flows.len()
            );
        }
    }
}

/// Makes room again, so that the table stays as full as it is.
fn forget(state: &EngineState, packet: &Packet) {
    let ip = packet.ip.expect("IP");
    let key = OriginalTuple {
        middlebox: MiddleboxKey::anywhere(packet.link.destination),
        client: ip.source,
        frontend: ip.destination,
        protocol: ip.protocol,
        ports: ip.ports.expect("ports"),
    };
    state.flows.remove(&key);
}
