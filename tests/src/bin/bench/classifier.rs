//! The cost of the engine's filters per packet by the number of rules, compared with a linear scan.

use crate::print;
use nfqd_rules::packet::Packet;
use nfqd_rules::{MiddleboxKey, Policy};
use std::hint::black_box;
use std::time::Instant;

const PACKETS: usize = 200_000;
const PAIRS: usize = 9;

fn policy(rules: u16, ranges: bool) -> Policy {
    let mut policy = Policy::default();
    let mut apply = |line: String| drop(policy.apply_line(&line).expect("a command"));
    apply("R F 2:0:0:0:0:1 10.0.0.1".to_string());
    for n in 0..rules {
        let source = if ranges {
            format!("10.{}.{}.0/24", n / 256, n % 256)
        } else {
            format!("10.1.{}.{}", n / 256, n % 256)
        };
        apply(format!("A 2:0:0:0:0:1 #{} I 1 s {source}", n + 1));
        apply(format!("A 2:0:0:0:0:1 #{} T 2 d {}", n + 1, 1000 + n));
    }
    policy
}

/// Packets that hardly a rule matches.
fn packets() -> Vec<Packet> {
    let one = |n: u16| {
        let mut out = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        out.extend([
            0x45,
            0,
            0,
            40,
            0,
            0,
            0,
            0,
            9,
            6,
            0,
            0,
            10,
            1,
            (n / 256) as u8,
            n as u8,
            10,
            0,
            0,
            1,
        ]);
        out.extend([0, 99]);
        out.extend((999 + n).to_be_bytes());
        out.extend([0; 16]);
        Packet::from_frame(&out).expect("a frame")
    };
    (0..1000).map(one).collect()
}

/// Runs it and prints what came out.
pub(crate) fn run() {
    let packets = packets();
    let mac = "2:0:0:0:0:1".parse().expect("a MAC");
    for ranges in [false, true] {
        for rules in [1, 10, 100, 1024] {
            let policy = policy(rules, ranges);
            let firewall = policy
                .get(MiddleboxKey::anywhere(mac))
                .and_then(|middlebox| middlebox.firewall())
                .expect("a firewall");
            let conditions: Vec<_> = firewall.conditions(mac).collect();
            let nanoseconds = |decide: &dyn Fn(&Packet) -> bool| {
                let start = Instant::now();
                let matched =
                    (0..PACKETS).filter(|n| black_box(decide(&packets[n % packets.len()]))).count();
                (start.elapsed().as_nanos() as f64 / PACKETS as f64, matched)
            };
            let (mut indexed, mut scanned, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..PAIRS {
                let (index, found) = nanoseconds(&|packet| firewall.decide(packet).rule.is_some());
                let (scan, matched) = nanoseconds(&|packet| {
                    conditions.iter().any(|(_, wanted)| wanted.match_packet(packet))
                });
                assert_eq!(found, matched);
                indexed.push(index);
                scanned.push(scan);
                ratios.push(scan / index);
            }
            let kind = if ranges { "prefixes" } else { "exact rules" };
            print(&format!("{rules} {kind}: the index"), &indexed, "ns");
            print(&format!("{rules} {kind}: one by one"), &scanned, "ns");
            print(&format!("{rules} {kind}: ratio of a pair"), &ratios, "");
        }
    }
}
