//! Recorder of decisions, for those who observe them. While nobody does, it costs a look at a flag for
//! each batch.

use crate::engine::Ingress;
use crate::engine::verdict::Decision;
use nfqd_rules::packet::Packet;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// The decisions that are kept; older ones are lost.
const CAPACITY: usize = 8192;
/// The time for which decisions are recorded after somebody has asked for them.
const RECORDING_TIME: Duration = Duration::from_secs(60);

/// A decision of the engine.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// The number, which grows by one from decision to decision.
    pub number: u64,
    /// The time.
    pub time: SystemTime,
    /// The queue that the packet came by.
    pub queue: u16,
    /// The origin of the packet.
    pub ingress: Ingress,
    /// The packet.
    pub packet: Packet,
    /// The decision.
    pub decision: Decision,
}

/// The recent decisions of all workers.
#[derive(Debug, Default)]
pub struct Recorder {
    is_recording: AtomicBool,
    record: Mutex<Record>,
}

#[derive(Debug, Default)]
struct Record {
    decisions: VecDeque<Recorded>,
    next: u64,
    until: Option<Instant>,
}

impl Recorder {
    /// Whether decisions are recorded.
    pub fn is_recording(&self) -> bool {
        self.is_recording.load(Relaxed)
    }

    /// Records a decision.
    pub fn push(&self, queue: u16, ingress: Ingress, packet: &Packet, decision: Decision) {
        let mut record = self.lock();
        let number = record.next;
        record.next += 1;
        if record.decisions.len() >= CAPACITY {
            record.decisions.pop_front();
        }
        let time = SystemTime::now();
        let packet = *packet;
        record.decisions.push_back(Recorded { number, time, queue, ingress, packet, decision });
    }

    /// Returns the decisions from a number on, at most so many, and the number of the next one; `None`
    /// stands for the newest. It has them recorded from now on for a minute.
    pub fn since(&self, number: Option<u64>, most: usize) -> (Vec<Recorded>, u64) {
        let mut record = self.lock();
        record.until = Some(Instant::now() + RECORDING_TIME);
        self.is_recording.store(true, Relaxed);
        let first = number.unwrap_or_else(|| record.next.saturating_sub(most as u64));
        let wanted = record.decisions.iter().filter(|one| one.number >= first);
        let out: Vec<Recorded> = wanted.take(most).copied().collect();
        let next = out.last().map_or(record.next.max(first), |last| last.number + 1);
        (out, next)
    }

    /// Ends the recording if nobody has asked for some time.
    pub fn rest(&self, now: Instant) {
        if !self.is_recording() {
            return;
        }
        let mut record = self.lock();
        if record.until.is_none_or(|until| now >= until) {
            self.is_recording.store(false, Relaxed);
            record.decisions = VecDeque::new();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::verdict::{AcceptReason, Verdict};

    #[test]
    fn decisions_are_kept_while_somebody_asks() {
        let recorder = Recorder::default();
        assert!(!recorder.is_recording());
        assert_eq!(recorder.since(None, 10).1, 0);
        assert!(recorder.is_recording());
        let frame = [[2; 6], [4; 6], [8, 6, 0, 0, 0, 0]].concat();
        let packet = Packet::from_frame(&frame).unwrap();
        let decision = Decision { verdict: Verdict::Accept(AcceptReason::NoMatch), rule: None };
        for _ in 0..CAPACITY + 10 {
            recorder.push(3, Ingress::ANY, &packet, decision);
        }
        let (newest, next) = recorder.since(None, 5);
        assert_eq!((newest.len(), next), (5, CAPACITY as u64 + 10));
        let (oldest, next) = recorder.since(Some(0), 5);
        assert_eq!((oldest[0].number, next), (10, 15), "ten were lost");
        assert_eq!(recorder.since(Some(CAPACITY as u64 + 10), 5).0.len(), 0);
        recorder.rest(Instant::now() + RECORDING_TIME / 2);
        assert!(recorder.is_recording());
        recorder.rest(Instant::now() + RECORDING_TIME * 2);
        assert!(!recorder.is_recording());
    }
}
