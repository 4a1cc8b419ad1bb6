//! Counters of each slot: its live flows, and the answers of its backend.

use super::{FlowEvent, FlowState};
use nfqd_rules::SlotId;
use nfqd_rules::ids::MAX_ID;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// The answers of a backend, as far as the engine sees its packets. Times are seconds of the engine's
/// clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SlotAnswers {
    /// The time of the last packet from it that was no reset.
    pub answered: Option<u32>,
    /// The time at which it last answered the beginning of a TCP connection.
    pub accepted_tcp: Option<u32>,
    /// The time at which it last answered the beginning of a flow of another protocol.
    pub accepted_other: Option<u32>,
    /// The time of the first flow since its last answer.
    pub unanswered: Option<u32>,
    /// TCP resets and ICMP errors from it. The kernel never handles one alone, so these are all of them.
    pub refusals: u32,
}

/// The counters of a slot. Times are those of [`SlotAnswers`] plus one; zero is none.
#[derive(Default)]
struct Counters {
    live: AtomicU32,
    answered: AtomicU32,
    accepted_tcp: AtomicU32,
    accepted_other: AtomicU32,
    unanswered: AtomicU32,
    refusals: AtomicU32,
}

/// The counters of all slots. Memory for a block of slots is allocated when one of them is first used.
pub(super) struct SlotCounters {
    blocks: Vec<OnceLock<Box<[Counters]>>>,
}

const BLOCK: usize = 1024;

impl SlotCounters {
    pub(super) fn new() -> SlotCounters {
        let blocks = (MAX_ID as usize + 1).div_ceil(BLOCK);
        SlotCounters { blocks: (0..blocks).map(|_| OnceLock::new()).collect() }
    }

    fn of(&self, slot: SlotId) -> Option<&Counters> {
        let at = slot.get() as usize;
        let block = self.blocks.get(at / BLOCK)?;
        let block = block.get_or_init(|| (0..BLOCK).map(|_| Counters::default()).collect());
        block.get(at % BLOCK)
    }

    /// Counts a flow in this state, if it is live.
    pub(super) fn add(&self, slot: SlotId, state: FlowState) {
        if let Some(counters) = self.of(slot).filter(|_| state.is_live()) {
            counters.live.fetch_add(1, Relaxed);
        }
    }

    /// Stops counting a flow in this state.
    pub(super) fn subtract(&self, slot: SlotId, state: FlowState) {
        if let Some(counters) = self.of(slot).filter(|_| state.is_live()) {
            counters.live.fetch_sub(1, Relaxed);
        }
    }

    /// Returns the number of live flows.
    pub(super) fn live(&self, slot: SlotId) -> u32 {
        self.of(slot).map_or(0, |counters| counters.live.load(Relaxed))
    }

    /// Sets the number of live flows.
    pub(super) fn set_live(&self, slot: SlotId, count: u32) {
        self.of(slot).into_iter().for_each(|counters| counters.live.store(count, Relaxed));
    }

    /// Records that a flow begins, which its backend is to answer.
    pub(super) fn record_begin(&self, slot: SlotId, now: u32) {
        if let Some(counters) = self.of(slot) {
            // If it fails, an earlier flow waits for an answer.
            let time = now.saturating_add(1);
            let _ = counters.unanswered.compare_exchange(0, time, Relaxed, Relaxed);
        }
    }

    /// Records a packet of a backend, of a flow in this state; `is_first` is the first one of its flow.
    pub(super) fn record_reply(
        &self,
        slot: SlotId,
        (state, is_first): (FlowState, bool),
        event: FlowEvent,
        now: u32,
    ) {
        let Some(counters) = self.of(slot) else { return };
        if event == FlowEvent::Rst {
            counters.refusals.fetch_add(1, Relaxed);
            return;
        }
        let time = now.saturating_add(1);
        counters.answered.store(time, Relaxed);
        let is_of_tcp =
            matches!(state, FlowState::Opening | FlowState::Established | FlowState::Closing);
        if is_first || matches!(event, FlowEvent::SynAck(_)) {
            let accepted =
                if is_of_tcp { &counters.accepted_tcp } else { &counters.accepted_other };
            accepted.store(time, Relaxed);
            counters.unanswered.store(0, Relaxed);
        }
    }

    /// Records an ICMP error of a backend.
    pub(super) fn record_refusal(&self, slot: SlotId) {
        self.of(slot).into_iter().for_each(|counters| {
            counters.refusals.fetch_add(1, Relaxed);
        });
    }

    /// Returns the answers of a slot's backend.
    pub(super) fn answers(&self, slot: SlotId) -> SlotAnswers {
        let Some(counters) = self.of(slot) else { return SlotAnswers::default() };
        let time = |counter: &AtomicU32| counter.load(Relaxed).checked_sub(1);
        SlotAnswers {
            answered: time(&counters.answered),
            accepted_tcp: time(&counters.accepted_tcp),
            accepted_other: time(&counters.accepted_other),
            unanswered: time(&counters.unanswered),
            refusals: counters.refusals.load(Relaxed),
        }
    }
}
