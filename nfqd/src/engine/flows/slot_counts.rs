//! The number of live flows of each slot.

use super::FlowState;
use nfqd_rules::SlotId;
use nfqd_rules::ids::MAX_ID;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// A counter for each slot. Memory for a block of slots is allocated when one of them is first
/// used.
pub(super) struct SlotCounts {
    blocks: Vec<OnceLock<Box<[AtomicU32]>>>,
}

const BLOCK: usize = 1024;

impl SlotCounts {
    pub(super) fn new() -> SlotCounts {
        let blocks = (MAX_ID as usize + 1).div_ceil(BLOCK);
        SlotCounts { blocks: (0..blocks).map(|_| OnceLock::new()).collect() }
    }

    fn counter(&self, slot: SlotId) -> Option<&AtomicU32> {
        let at = slot.get() as usize;
        let block = self.blocks.get(at / BLOCK)?;
        let block = block.get_or_init(|| (0..BLOCK).map(|_| AtomicU32::new(0)).collect());
        block.get(at % BLOCK)
    }

    /// Counts a flow in this state, if it is live.
    pub(super) fn add(&self, slot: SlotId, state: FlowState) {
        if let Some(counter) = self.counter(slot).filter(|_| state.is_live()) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Stops counting a flow in this state.
    pub(super) fn subtract(&self, slot: SlotId, state: FlowState) {
        if let Some(counter) = self.counter(slot).filter(|_| state.is_live()) {
            counter.fetch_sub(1, Relaxed);
        }
    }

    pub(super) fn get(&self, slot: SlotId) -> u32 {
        self.counter(slot).map_or(0, |counter| counter.load(Relaxed))
    }
}
