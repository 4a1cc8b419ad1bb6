//! The engine allocates nothing for a packet whose rules and flow it has seen before.
#![allow(clippy::unwrap_used)]

use nfqd::engine::verdict::Verdict;
use nfqd::engine::{EngineState, FilterScope, Ingress, Snapshot, decide};
use nfqd_rules::Desired;
use nfqd_rules::Policy;
use nfqd_rules::packet::Packet;
use nfqd_rules::pool::Pools;
use nfqd_rules::slots::{Slots, Unobserved};
use nfqd_tests::captures;
use nfqd_tests::counting::{Counting, allocations};
use std::time::Instant;

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_packet_costs_no_allocation() {
    let mut policy = Policy::default();
    for name in captures::POLICIES {
        let text =
            std::fs::read_to_string(captures::folder().join(format!("{name}.commands"))).unwrap();
        for (_, line) in nfqd_shmctl::split_lines(&text) {
            policy.apply_line(line).unwrap();
        }
    }
    // A rule that must be compared whole.
    policy.apply_line("A 02:00:00:00:00:01 #99 M 1 s 2:0:0:0:0:9/ff:0:0:0:0:0f").unwrap();
    let (mut slots, mut pools) = (Slots::default(), Pools::default());
    slots.sync_all(&policy, &Unobserved, Instant::now());
    for (mac, middlebox) in policy.middleboxes() {
        pools.update(*mac, Some(middlebox), &slots);
    }
    let mut snapshot = Snapshot::new(Desired { policy, slots, ..Desired::default() }, pools);
    snapshot.filter_scope = FilterScope::All;
    let memory = EngineState::new(1 << 12);
    let frames: Vec<Vec<u8>> = captures::all().into_iter().flat_map(|(_, frames)| frames).collect();
    let mut verdicts = [0; 3];
    let mut judge_all = || {
        for frame in &frames {
            let Some(packet) = Packet::from_frame(frame) else { continue };
            let decision = decide(&snapshot, &memory, Ingress::ANY, &packet, 0).decision().unwrap();
            let _ = decision.verdict.mark(0);
            verdicts[match decision.verdict {
                Verdict::Drop(_) | Verdict::Reject(_) | Verdict::AwaitFirstFragment => 0,
                Verdict::Redirect(_) | Verdict::Reply(_) | Verdict::Error { .. } => 1,
                Verdict::Accept(_) | Verdict::Bypass | Verdict::Local(_) => 2,
            }] += 1;
        }
    };
    judge_all();
    let before = allocations();
    assert!(before > 0);
    (0..3).for_each(|_| judge_all());
    assert_eq!(allocations() - before, 0);
    assert!(verdicts.iter().all(|&count| count > 40), "{verdicts:?}");
}

#[test]
fn a_new_flow_costs_no_allocation() {
    for method in ["rr", "hash", "least", "rr affinity"] {
        let (method, option) = method.split_once(' ').unwrap_or((method, ""));
        let mut policy = Policy::default();
        let line = format!(
            "R L 2:0:0:0:0:1 10.0.0.1:80 {method} 10.0.0.2@2:0:0:0:0:2 10.0.0.3:81@2:0:0:0:0:3 {option}"
        );
        policy.apply_line(&line).unwrap();
        let (mut slots, mut pools) = (Slots::default(), Pools::default());
        slots.sync_all(&policy, &Unobserved, Instant::now());
        for (mac, middlebox) in policy.middleboxes() {
            pools.update(*mac, Some(middlebox), &slots);
        }
        let snapshot = Snapshot::new(Desired { policy, slots, ..Desired::default() }, pools);
        let memory = EngineState::new(1 << 12);
        // More flows than there is room for, so that old ones are evicted; clients come back with
        // other ports.
        let flows = |from: u16| {
            for port in from..from + 10_000 {
                let mut frame = vec![
                    2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0xee, 8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 9, 6,
                    0, 0,
                ];
                frame.extend([10, 0, 1, port as u8, 10, 0, 0, 1]);
                frame.extend(port.to_be_bytes());
                frame.extend([0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 0, 0]);
                let packet = Packet::from_frame(&frame).unwrap();
                let before = allocations();
                let decision =
                    decide(&snapshot, &memory, Ingress::ANY, &packet, 0).decision().unwrap();
                assert!(matches!(decision.verdict, Verdict::Redirect(_)), "{decision:?}");
                if from != 0 {
                    assert_eq!(allocations() - before, 0, "{method} {option}, port {port}");
                }
            }
        };
        flows(0);
        flows(20_000);
    }
}
