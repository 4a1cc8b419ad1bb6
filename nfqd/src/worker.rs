//! A thread that serves one queue.

use crate::engine::{Judged, Judgement, Snapshot, judge};
use crate::flows::{Flows, Seconds};
use crate::queue::{Buffers, Queue, Queued, Verdict};
use arc_swap::ArcSwap;
use nfqd_rules::nft::kernel::Count;
use nfqd_shmctl::{MacAddr, RuleId};
use std::collections::HashMap;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// What all workers share.
pub struct Shared {
    /// The policy; read once a batch.
    pub snapshot: ArcSwap<Snapshot>,
    /// The flows.
    pub flows: Flows,
    /// Set when the workers are to end.
    pub stop: AtomicBool,
    /// The beginning of the engine's clock.
    pub start: Instant,
}

impl Shared {
    /// Seconds of the engine's clock.
    pub fn now(&self) -> Seconds {
        self.start.elapsed().as_secs() as Seconds
    }
}

/// What a worker has done.
#[derive(Debug, Default)]
pub struct Counts {
    /// Packets taken.
    pub packets: AtomicU64,
    /// Packets dropped by a deny rule.
    pub dropped: AtomicU64,
    /// Packets sent to a backend.
    pub redirected: AtomicU64,
    /// Packets translated on the way back.
    pub replies: AtomicU64,
    /// Times that the kernel lost messages because the receive buffer was full.
    pub overruns: AtomicU64,
    /// Odd while a batch is judged and its verdicts are on their way.
    batches: AtomicU64,
    /// What each rule has matched here; none is for what the default of a middlebox has dropped.
    pub rules: Mutex<HashMap<(MacAddr, Option<RuleId>), Count>>,
}

/// A running worker.
pub struct Worker {
    /// The queue's number.
    pub queue: u16,
    /// What it has done.
    pub counts: Arc<Counts>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts a thread for a queue.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start(mut queue: Queue, shared: Arc<Shared>) -> std::io::Result<Worker> {
        let (number, counts) = (queue.number(), Arc::new(Counts::default()));
        let counted = Arc::clone(&counts);
        let thread = Builder::new().name(format!("queue-{number}")).spawn(move || {
            let mut buffers = Buffers::default();
            while !shared.stop.load(Relaxed) {
                if let Err(errno) = serve(&mut queue, &mut buffers, &shared, &counted) {
                    log::error!("queue {number}: {errno}; its packets are not judged any more");
                    return;
                }
            }
        })?;
        Ok(Worker { queue: number, counts, thread })
    }

    /// Whether its thread still serves.
    pub fn is_alive(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Waits until no packet is on its way that was judged by an older snapshot than the one that was stored last; at most
    /// this long.
    pub fn settle(&self, deadline: Instant) {
        fence(SeqCst);
        let batch = self.counts.batches.load(SeqCst);
        while batch % 2 == 1 && self.counts.batches.load(SeqCst) == batch && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits for the thread to end.
    pub fn join(self) {
        if self.thread.join().is_err() {
            log::error!("queue {}: its thread panicked", self.queue);
        }
    }
}

fn serve(
    queue: &mut Queue,
    buffers: &mut Buffers,
    shared: &Shared,
    counts: &Counts,
) -> Result<(), nix::errno::Errno> {
    let (mut dropped, mut redirected, mut replies) = (0, 0, 0);
    // Loaded at the first packet, not before: the receive may have waited.
    let mut loaded = None;
    let packets = queue.serve(buffers, |queued| {
        let (snapshot, now) = loaded.get_or_insert_with(|| {
            counts.batches.fetch_add(1, SeqCst);
            fence(SeqCst);
            (shared.snapshot.load(), shared.now())
        });
        let (middlebox, Judged { judgement, rule }) = judge_queued(snapshot, &shared.flows, queued, *now);
        if rule.is_some() || judgement == Judgement::Drop {
            let mut rules = counts.rules.lock().unwrap_or_else(PoisonError::into_inner);
            let count = rules.entry((middlebox, rule)).or_default();
            *count = (count.0 + 1, count.1 + queued.length as u64);
        }
        match judgement {
            Judgement::Drop => dropped += 1,
            Judgement::Redirect { .. } => redirected += 1,
            Judgement::Reply { .. } => replies += 1,
            Judgement::Accept(_) | Judgement::Direct => {}
        }
        match judgement.mark(queued.mark, snapshot) {
            Some(mark) => Verdict::Accept { mark },
            None => Verdict::Drop,
        }
    });
    if loaded.is_some() {
        counts.batches.fetch_add(1, SeqCst);
    }
    let packets = packets?;
    for (count, more) in [
        (&counts.packets, packets as u64),
        (&counts.dropped, dropped),
        (&counts.redirected, redirected),
        (&counts.replies, replies),
    ] {
        count.fetch_add(more, Relaxed);
    }
    counts.overruns.store(queue.overruns, Relaxed);
    Ok(())
}

/// By br_netfilter the Ethernet header is not there; the mark names the middlebox.
fn judge_queued(snapshot: &Snapshot, flows: &Flows, queued: &Queued, now: Seconds) -> (MacAddr, Judged) {
    let mut packet = queued.packet;
    if !queued.has_link
        && let Some(mac) = snapshot.middlebox_of(queued.mark)
    {
        packet.link.destination = mac;
    }
    (packet.link.destination, judge(snapshot, flows, &packet, now))
}
