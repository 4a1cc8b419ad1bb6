//! The engine allocates nothing for a packet, once it has seen the rules and the flow.
#![allow(clippy::unwrap_used, unsafe_code)]

use nfqd::engine::{Filters, Judgement, Memory, Snapshot, judge};
use nfqd_rules::Policy;
use nfqd_rules::nft::delta::Desired;
use nfqd_rules::packet::Packet;
use nfqd_rules::pool::Pools;
use nfqd_rules::slots::{Seen, Slots};
use nfqd_tests::captures;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Instant;

thread_local! {
    /// Allocations of this thread.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: needed to see allocations; every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_packet_costs_no_allocation() {
    let mut policy = Policy::default();
    for name in captures::POLICIES {
        let text = std::fs::read_to_string(captures::folder().join(format!("{name}.commands"))).unwrap();
        for (_, line) in nfqd_shmctl::split_lines(&text) {
            policy.apply_line(line).unwrap();
        }
    }
    // A rule that must be looked at whole.
    policy.apply_line("A 02:00:00:00:00:01 #99 M 1 s 2:0:0:0:0:9/ff:0:0:0:0:0f").unwrap();
    let (mut slots, mut pools) = (Slots::default(), Pools::default());
    slots.follow(&policy, |_, _, _| Seen::NOTHING, Instant::now());
    for (mac, middlebox) in policy.middleboxes() {
        pools.update(*mac, Some(middlebox), &slots);
    }
    let mut snapshot = Snapshot::new(Desired { policy, slots }, pools);
    snapshot.filters = Filters::All;
    let memory = Memory::new(1 << 12);
    let frames: Vec<Vec<u8>> = captures::all().into_iter().flat_map(|(_, frames)| frames).collect();
    let mut verdicts = [0; 3];
    let mut judge_all = || {
        for frame in &frames {
            let Some(packet) = Packet::from_frame(frame) else { continue };
            let judged = judge(&snapshot, &memory, &packet, 0);
            let _ = judged.judgement.mark(0);
            verdicts[match judged.judgement {
                Judgement::Drop(_) | Judgement::Reject(_) | Judgement::Hold => 0,
                Judgement::Redirect(_) | Judgement::Reply(_) | Judgement::Error { .. } => 1,
                Judgement::Accept(_) | Judgement::Direct | Judgement::Pass(_) => 2,
            }] += 1;
        }
    };
    judge_all();
    let before = ALLOCATIONS.get();
    assert!(before > 0);
    (0..3).for_each(|_| judge_all());
    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert!(verdicts.iter().all(|&count| count > 40), "{verdicts:?}");
}
