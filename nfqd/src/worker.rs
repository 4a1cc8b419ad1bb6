//! A thread that serves one queue.

use crate::engine::bounded::Seconds;
use crate::engine::judgement::{DropReason, Judged, Judgement};
use crate::engine::{Memory, Snapshot, judge};
use crate::held::Held;
use crate::inject::Injector;
use crate::queue::{Buffers, Queue, Queued, Verdicts};
use crate::refusal;
use arc_swap::ArcSwap;
use nfqd_rules::mark;
use nfqd_rules::nft::kernel::Count;
use nfqd_rules::packet::{Fragment, Packet};
use nfqd_rules::rewrite::translate_quoted;
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
    /// What the engine remembers.
    pub memory: Memory,
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
    /// Packets dropped, by filters or for want of a backend.
    pub dropped: AtomicU64,
    /// Of those for want of a backend, packets whose senders were told so.
    pub refused: AtomicU64,
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
            let mut buffers = Buffers::new(number);
            let mut desk = Desk::new(shared, counted);
            while !desk.shared.stop.load(Relaxed) {
                if let Err(errno) = desk.serve(&mut queue, &mut buffers) {
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

/// What a thread has at hand.
struct Desk {
    shared: Arc<Shared>,
    counts: Arc<Counts>,
    held: Held<Waiting>,
    /// None where nobody can be told that a packet is refused.
    injector: Option<Injector>,
    /// The second in which senders were told last, and how many.
    told: (Seconds, u32),
}

/// Senders that a worker tells in a second that their packets are refused; further ones find out by waiting.
const TOLD_A_SECOND: u32 = 1000;

/// What is needed to let a packet go that waits.
struct Waiting {
    id: u32,
    mark: u32,
    length: usize,
}

/// What a batch has come to.
#[derive(Default)]
struct Sums {
    dropped: u64,
    redirected: u64,
    replies: u64,
}

impl Desk {
    fn new(shared: Arc<Shared>, counts: Arc<Counts>) -> Desk {
        let injector = Injector::open()
            .map_err(|errno| log::warn!("packet socket: {errno}; packets are refused without an answer"));
        Desk { shared, counts, held: Held::default(), injector: injector.ok(), told: (0, 0) }
    }

    fn serve(&mut self, queue: &mut Queue, buffers: &mut Buffers) -> Result<(), nix::errno::Errno> {
        let Desk { shared, counts, held, injector, told } = self;
        let mut sums = Sums::default();
        let over = held.over(shared.now());
        // Loaded at the first packet, not before: the receive may have waited.
        let mut loaded = None;
        let mut released: Vec<(Packet, Waiting)> = Vec::new();
        let judge_one = |queued: &Queued<'_>, verdicts: &mut Verdicts| {
            let (snapshot, now) = loaded.get_or_insert_with(|| {
                counts.batches.fetch_add(1, SeqCst);
                fence(SeqCst);
                (shared.snapshot.load(), shared.now())
            });
            let packet = with_middlebox(snapshot, queued);
            let mut judged = judge(snapshot, &shared.memory, &packet, *now);
            if judged.judgement == Judgement::Drop(DropReason::Outdated) {
                judged = judge(&shared.snapshot.load(), &shared.memory, &packet, *now);
            }
            counts.add(&packet, &judged, queued.length, &mut sums);
            if judged.judgement == Judgement::Hold {
                let waiting = Waiting { id: queued.id, mark: queued.mark, length: queued.length };
                held.push(&packet, waiting, *now).into_iter().for_each(|old| verdicts.drop(old.id));
                return;
            }
            if told.0 != *now {
                *told = (*now, 0);
            }
            if let Judgement::Reject(_) = judged.judgement
                && told.1 < TOLD_A_SECOND
                && let Some(injector) = injector
                && let Some(frame) = refusal::answer(&packet, queued.payload)
                && injector.send(queued.interface, &frame).is_ok()
            {
                told.1 += 1;
                counts.refused.fetch_add(1, Relaxed);
            }
            give(&judged.judgement, &packet, queued, verdicts);
            if packet.ip.is_some_and(|ip| ip.fragment == Fragment::First) {
                released.extend(held.released_by(&packet));
                for (packet, Waiting { id, mark, length }) in released.drain(..) {
                    let judged = judge(snapshot, &shared.memory, &packet, *now);
                    counts.add(&packet, &judged, length, &mut sums);
                    match judged.judgement.mark(mark) {
                        Some(mark) => verdicts.accept(id, mark),
                        None => verdicts.drop(id),
                    }
                }
            }
        };
        let packets = queue.serve(buffers, judge_one, |verdicts| {
            over.into_iter().for_each(|waiting| verdicts.drop(waiting.id));
        });
        if loaded.is_some() {
            counts.batches.fetch_add(1, SeqCst);
        }
        let packets = packets?;
        for (count, more) in [
            (&counts.packets, packets as u64),
            (&counts.dropped, sums.dropped),
            (&counts.redirected, sums.redirected),
            (&counts.replies, sums.replies),
        ] {
            count.fetch_add(more, Relaxed);
        }
        counts.overruns.store(queue.overruns, Relaxed);
        Ok(())
    }
}

impl Counts {
    fn add(&self, packet: &Packet, Judged { judgement, rule }: &Judged, length: usize, sums: &mut Sums) {
        if rule.is_some() || *judgement == Judgement::Drop(DropReason::Filtered) {
            let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
            let count = rules.entry((packet.link.destination, *rule)).or_default();
            *count = (count.0 + 1, count.1 + length as u64);
        }
        match judgement {
            Judgement::Drop(_) | Judgement::Reject(_) => sums.dropped += 1,
            Judgement::Redirect(_) | Judgement::Error { to: Some(_), .. } => sums.redirected += 1,
            Judgement::Reply(_) | Judgement::Error { .. } => sums.replies += 1,
            Judgement::Accept(_) | Judgement::Direct | Judgement::Pass(_) | Judgement::Hold => {}
        }
    }
}

/// Gives the verdict on a packet.
fn give(judgement: &Judgement, packet: &Packet, queued: &Queued<'_>, verdicts: &mut Verdicts) {
    let Some(mark) = judgement.mark(queued.mark) else { return verdicts.drop(queued.id) };
    let Judgement::Error { quote, .. } = judgement else { return verdicts.accept(queued.id, mark) };
    // What is not here whole cannot be given back.
    let mut payload = queued.payload.to_vec();
    let whole = payload.len() == queued.length;
    match packet.ip {
        Some(ip) if whole && translate_quoted(&mut payload, &ip, quote.side, quote.ip, quote.port) => {
            verdicts.replace(queued.id, mark, &payload);
        }
        _ => verdicts.accept(queued.id, mark::cleared(queued.mark)),
    }
}

/// By br_netfilter the Ethernet header is not there; the mark names the middlebox.
fn with_middlebox(snapshot: &Snapshot, queued: &Queued<'_>) -> Packet {
    let mut packet = queued.packet;
    if !queued.has_link
        && let Some(mac) = snapshot.middlebox_of(queued.mark)
    {
        packet.link.destination = mac;
    }
    packet
}
