//! A worker: the thread that serves one queue.
//!
//! The thread receives a batch of packets, has the engine decide on each, and sends the verdicts. The
//! `PacketProcessor` is what happens to one packet, without the queue.

use super::fragments::FragmentQueue;
use super::inject::Injector;
use super::queue::{Inbox, Queue, Queued, VerdictBatch};
use super::recorder::Recorder;
use super::reject;
use crate::engine::verdict::{Decision, DropReason, Verdict};
use crate::engine::{EngineResult, EngineState, Ingress, Snapshot, decide};
use crate::rate_limiter::RateLimiter;
use arc_swap::ArcSwap;
use nfqd_rules::packet::Packet;
use nfqd_rules::rewrite::translate_quoted;
use nfqd_rules::{Counter, MiddleboxKey, mark};
use nfqd_shmctl::{Fragment, RuleId};
use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::HashMap;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The state that all workers share.
pub struct Shared {
    /// The snapshot that the engine decides by, read once a batch.
    pub snapshot: ArcSwap<Snapshot>,
    /// The engine's state between packets.
    pub state: EngineState,
    /// The record of decisions, for observers.
    pub recorder: Recorder,
    /// The start of the engine's clock.
    start: Instant,
    stopping: AtomicBool,
    /// Signalled when a worker ends.
    ended: EventFd,
}

impl Shared {
    /// The state of workers with room for `flows` flows.
    ///
    /// # Errors
    /// If there are no more file descriptors.
    pub fn new(flows: usize) -> Result<Shared, Errno> {
        Ok(Shared {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            state: EngineState::new(flows),
            recorder: Recorder::default(),
            start: Instant::now(),
            stopping: AtomicBool::new(false),
            ended: event()?,
        })
    }

    /// Returns the seconds of the engine's clock.
    pub fn now(&self) -> u32 {
        self.start.elapsed().as_secs() as u32
    }

    /// Returns the event that is signalled when a worker ends.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }
}

fn event() -> Result<EventFd, Errno> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
}

/// The counters of a worker.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// Packets received.
    pub packets: AtomicU64,
    /// Packets dropped, by filters or because no backend could take them.
    pub dropped: AtomicU64,
    /// Packets whose senders were told that no backend takes them.
    pub rejected: AtomicU64,
    /// Packets sent to a backend.
    pub redirected: AtomicU64,
    /// Replies of backends that were translated.
    pub reply_translated: AtomicU64,
    /// The number of times the receive buffer overran, so that the kernel lost messages.
    pub overruns: AtomicU64,
    /// The counter of each rule; `None` stands for the default of a middlebox.
    pub rules: Mutex<HashMap<(MiddleboxKey, Option<RuleId>), Counter>>,
    /// Odd from the first decision of a batch until its verdicts have been sent.
    batch_epoch: AtomicU64,
}

impl QueueCounters {
    fn count(
        &self,
        middlebox: Option<MiddleboxKey>,
        Decision { verdict, rule }: &Decision,
        length: usize,
    ) {
        let matched = rule.is_some() || *verdict == Verdict::Drop(DropReason::Filtered);
        if let Some(middlebox) = middlebox.filter(|_| matched) {
            let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
            *rules.entry((middlebox, *rule)).or_default() += Counter::of_packet(length);
        }
        let counter = match verdict {
            Verdict::Drop(_) | Verdict::Reject(_) => &self.dropped,
            Verdict::Redirect(_) | Verdict::Error { to: Some(_), .. } => &self.redirected,
            Verdict::Reply(_) | Verdict::Error { .. } => &self.reply_translated,
            Verdict::Accept(_)
            | Verdict::Bypass
            | Verdict::Local(_)
            | Verdict::AwaitFirstFragment => return,
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// A batch that is being decided. Its end marks the batch as finished, however it ends.
struct BatchEpoch<'a>(&'a QueueCounters);

impl BatchEpoch<'_> {
    fn begin(counters: &QueueCounters) -> BatchEpoch<'_> {
        counters.batch_epoch.fetch_add(1, SeqCst);
        fence(SeqCst);
        BatchEpoch(counters)
    }
}

impl Drop for BatchEpoch<'_> {
    fn drop(&mut self) {
        self.0.batch_epoch.fetch_add(1, SeqCst);
    }
}

/// A running worker.
pub struct Worker {
    /// The number of its queue.
    pub queue: u16,
    /// The counters.
    pub counters: Arc<QueueCounters>,
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    thread: JoinHandle<()>,
    /// The batch at the last look.
    last_epoch: Option<u64>,
}

impl Worker {
    /// Starts a worker for a queue.
    ///
    /// # Errors
    /// If there are no more threads or file descriptors.
    pub fn start(queue: Queue, shared: Arc<Shared>) -> std::io::Result<Worker> {
        let (number, counters) = (queue.number(), Arc::new(QueueCounters::default()));
        let stop = Arc::new(event()?);
        let processor = PacketProcessor::new(number, Arc::clone(&shared), Arc::clone(&counters));
        let (its_shared, its_stop) = (Arc::clone(&shared), Arc::clone(&stop));
        let thread = Builder::new().name(format!("queue-{number}")).spawn(move || {
            let _ended = SignalEnd(&its_shared);
            let worker = QueueWorker { queue, inbox: Inbox::default(), processor };
            if let Err(errno) = worker.run(&its_stop) {
                log::error!("queue {number}: {errno}; the queue is no longer served");
            }
        })?;
        Ok(Worker { queue: number, counters, shared, stop, thread, last_epoch: None })
    }

    /// Whether the worker is not stuck in the batch that it was in at the last call.
    pub fn has_moved(&mut self) -> bool {
        let epoch = self.counters.batch_epoch.load(SeqCst);
        let before = self.last_epoch.replace(epoch);
        epoch.is_multiple_of(2) || before != Some(epoch)
    }

    /// Whether the thread still serves its queue.
    pub fn is_alive(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Waits until no packet is on its way that was decided by an older snapshot than the one that
    /// was stored last, but no longer than until the deadline.
    pub fn wait_for_batch(&self, deadline: Instant) {
        fence(SeqCst);
        let epoch = self.counters.batch_epoch.load(SeqCst);
        let is_running = || self.counters.batch_epoch.load(SeqCst) == epoch;
        while epoch % 2 == 1 && is_running() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Stops the worker.
    pub fn stop(self) {
        self.shared.stopping.store(true, Relaxed);
        if let Err(errno) = self.stop.write(1) {
            log::error!("queue {}: cannot be stopped: {errno}", self.queue);
            return;
        }
        if self.thread.join().is_err() {
            log::error!("queue {}: its thread panicked", self.queue);
        }
    }
}

/// Signals the end of a thread, also if it panics.
struct SignalEnd<'a>(&'a Shared);

impl Drop for SignalEnd<'_> {
    fn drop(&mut self) {
        // Writing fails only if the counter is full, and then the event is signalled already.
        let _ = self.0.ended.write(1);
    }
}

/// The thread's own state.
struct QueueWorker {
    queue: Queue,
    inbox: Inbox,
    processor: PacketProcessor,
}

impl QueueWorker {
    fn run(mut self, stop: &EventFd) -> Result<(), Errno> {
        let shared = Arc::clone(&self.processor.shared);
        while !shared.stopping.load(Relaxed) {
            self.queue.wait(stop, self.processor.timeout())?;
            self.serve()?;
        }
        Ok(())
    }

    /// Serves one batch: receive, decide, send.
    fn serve(&mut self) -> Result<(), Errno> {
        let QueueWorker { queue, inbox, processor } = self;
        queue.receive(inbox)?;
        let counters = Arc::clone(&processor.counters);
        let _epoch = BatchEpoch::begin(&counters);
        processor.begin_batch();
        for queued in inbox.packets() {
            processor.process(&queued);
        }
        processor.drop_expired_fragments();
        counters.overruns.store(queue.overruns, Relaxed);
        queue.send(&processor.verdicts)
    }
}

/// The most senders that a worker tells in a second that their packets are rejected; others learn
/// it by waiting.
const REJECTS_PER_SECOND: u32 = 1000;

/// The processing of a packet, apart from its queue.
struct PacketProcessor {
    shared: Arc<Shared>,
    counters: Arc<QueueCounters>,
    /// The snapshot and the time of the current batch.
    snapshot: Arc<Snapshot>,
    now: u32,
    is_recording: bool,
    queue: u16,
    verdicts: VerdictBatch,
    fragments: FragmentQueue<PendingPacket>,
    /// `None` if no frames can be sent.
    injector: Option<Injector>,
    reject_limiter: RateLimiter,
}

/// The data for the verdict on a packet that is held.
struct PendingPacket {
    id: u32,
    mark: u32,
    length: usize,
}

impl PacketProcessor {
    fn new(queue: u16, shared: Arc<Shared>, counters: Arc<QueueCounters>) -> PacketProcessor {
        let injector = match Injector::open() {
            Ok(injector) => Some(injector),
            Err(errno) => {
                log::warn!("packet socket: {errno}; packets are rejected without an answer");
                None
            }
        };
        PacketProcessor {
            snapshot: shared.snapshot.load_full(),
            now: shared.now(),
            is_recording: false,
            queue,
            shared,
            counters,
            verdicts: VerdictBatch::new(queue),
            fragments: FragmentQueue::default(),
            injector,
            reject_limiter: RateLimiter::new(REJECTS_PER_SECOND),
        }
    }

    /// Returns how long the worker may wait for packets: without end, unless fragments expire.
    fn timeout(&self) -> PollTimeout {
        const SECOND: u16 = 1000;
        if self.fragments.is_empty() { PollTimeout::NONE } else { PollTimeout::from(SECOND) }
    }

    fn begin_batch(&mut self) {
        self.snapshot = self.shared.snapshot.load_full();
        self.now = self.shared.now();
        self.is_recording = self.shared.recorder.is_recording();
        self.verdicts.clear();
    }

    /// Has the engine decide on a packet. If it asks for a newer snapshot, that one is used for the
    /// rest of the batch, because fragments that the packet releases have the same flow.
    fn decide(&mut self, ingress: Ingress, packet: &Packet, length: usize) -> Decision {
        let decision = self.decide_by_snapshot(ingress, packet);
        if self.is_recording {
            self.shared.recorder.push(self.queue, ingress, packet, decision);
        }
        let middlebox = self.snapshot.middlebox_at(ingress.network, packet.link.destination);
        self.counters.count(middlebox, &decision, length);
        decision
    }

    fn decide_by_snapshot(&mut self, ingress: Ingress, packet: &Packet) -> Decision {
        for _ in 0..2 {
            match decide(&self.snapshot, &self.shared.state, ingress, packet, self.now) {
                EngineResult::Decided(decision) => return decision,
                EngineResult::RetryWithNewerSnapshot => {
                    self.snapshot = self.shared.snapshot.load_full();
                }
            }
        }
        // The snapshot is stored before any packet is decided by it, so the second try cannot ask
        // for a newer one, unless a third one is stored just now. The sender will try again.
        Decision { verdict: Verdict::Drop(DropReason::BackendGone), rule: None }
    }

    fn process(&mut self, queued: &Queued<'_>) {
        self.counters.packets.fetch_add(1, Relaxed);
        let (ingress, packet) = with_origin(&self.snapshot, queued);
        let decision = self.decide(ingress, &packet, queued.length);
        match decision.verdict {
            Verdict::AwaitFirstFragment => self.hold(ingress, &packet, queued),
            Verdict::Reject(_) => {
                self.answer_sender(&packet, queued);
                self.verdicts.drop(queued.id);
            }
            verdict => give(&verdict, &packet, queued, &mut self.verdicts),
        }
        if packet.ip.is_some_and(|ip| ip.fragment == Fragment::First) {
            self.release_fragments(ingress, &packet);
        }
    }

    fn hold(&mut self, ingress: Ingress, packet: &Packet, queued: &Queued<'_>) {
        let pending = PendingPacket { id: queued.id, mark: queued.mark, length: queued.length };
        if let Some(evicted) = self.fragments.push(ingress, packet, pending, self.now) {
            self.verdicts.drop(evicted.id);
        }
    }

    fn release_fragments(&mut self, ingress: Ingress, first: &Packet) {
        for (ingress, packet, pending) in self.fragments.released_by(ingress.network, first) {
            let decision = self.decide(ingress, &packet, pending.length);
            match decision.verdict.mark(pending.mark) {
                Some(mark) => self.verdicts.accept(pending.id, mark),
                None => self.verdicts.drop(pending.id),
            }
        }
    }

    fn drop_expired_fragments(&mut self) {
        for pending in self.fragments.expired(self.now) {
            self.verdicts.drop(pending.id);
        }
    }

    /// Tells the sender of a packet that it is rejected.
    fn answer_sender(&mut self, packet: &Packet, queued: &Queued<'_>) {
        if !self.reject_limiter.has_room(self.now) {
            return;
        }
        let Some(injector) = &self.injector else { return };
        let Some(frame) = reject::answer(packet, queued.payload) else { return };
        if injector.send(queued.interface, &frame).is_ok() {
            self.reject_limiter.count();
            self.counters.rejected.fetch_add(1, Relaxed);
        }
    }
}

/// Adds a verdict to the batch.
fn give(verdict: &Verdict, packet: &Packet, queued: &Queued<'_>, verdicts: &mut VerdictBatch) {
    let Some(mark) = verdict.mark(queued.mark) else { return verdicts.drop(queued.id) };
    let Verdict::Error { quote, .. } = verdict else { return verdicts.accept(queued.id, mark) };
    // Only a packet that is here as a whole can be sent back changed.
    let mut payload = queued.payload.to_vec();
    let is_whole = payload.len() == queued.length;
    match packet.ip {
        Some(ip)
            if is_whole
                && translate_quoted(&mut payload, &ip, quote.side, quote.ip, quote.port) =>
        {
            verdicts.replace(queued.id, mark, &payload);
        }
        _ => verdicts.accept(queued.id, mark::cleared(queued.mark)),
    }
}

/// Returns the origin of a packet, and the packet with its destination MAC. By br_netfilter the
/// Ethernet header is not in the message; the mark names the middlebox.
fn with_origin(snapshot: &Snapshot, queued: &Queued<'_>) -> (Ingress, Packet) {
    let mut packet = queued.packet;
    let (ingress, mac) = snapshot.origin_of(queued.mark);
    if let Some(mac) = mac.filter(|_| !queued.has_link) {
        packet.link.destination = mac;
    }
    (ingress, packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::Policy;
    use nfqd_rules::slots::Unobserved;

    const POOL: &str = "R L 2:0:0:0:0:2 10.0.0.2:53/udp rr 10.0.0.3@2:0:0:0:0:3";

    /// A fragment of a UDP datagram to the pool.
    fn fragment(first: bool) -> Packet {
        let udp = etherparse::IpNumber::UDP;
        let mut ip = etherparse::Ipv4Header::new(16, 9, udp, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
        (ip.identification, ip.more_fragments) = (7, first);
        ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
        ip.write(&mut frame).unwrap();
        frame.extend([0, 99, 0, 53, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        Packet::from_frame(&frame).unwrap()
    }

    fn queued(id: u32, packet: Packet) -> Queued<'static> {
        Queued { id, mark: 0, packet, has_link: true, length: 36, payload: &[], interface: 1 }
    }

    /// The first fragment has a flow that another worker has begun under a newer snapshot. The
    /// later fragment that it releases must be decided by that one as well, or it is lost.
    #[test]
    fn a_newer_snapshot_is_kept_for_the_rest_of_the_batch() {
        let shared = Arc::new(Shared::new(1000).unwrap());
        let mut policy = Policy::default();
        policy.apply_line("R L 2:0:0:0:0:2 10.0.0.2:53/udp rr 10.0.0.9@2:0:0:0:0:9").unwrap();
        let old = Snapshot::default().successor(policy.clone(), &Unobserved);
        policy.apply_line(POOL).unwrap();
        let new = old.successor(policy, &Unobserved);
        // Another worker begins the flow.
        let result = decide(&new, &shared.state, Ingress::ANY, &fragment(true), 0);
        let Some(Verdict::Redirect(to)) = result.decision().map(|decision| decision.verdict) else {
            panic!("{result:?}");
        };
        assert!(old.desired().slots.key_of(to.slot).is_none());
        // The fragments of the next datagram arrive here, in the wrong order.
        let of_next_datagram = |mut packet: Packet| {
            packet.ip.as_mut().unwrap().id = 8;
            packet
        };
        let (first, later) = (of_next_datagram(fragment(true)), of_next_datagram(fragment(false)));
        shared.snapshot.store(Arc::new(old));
        let counters = Arc::new(QueueCounters::default());
        let mut processor = PacketProcessor::new(0, Arc::clone(&shared), counters);
        processor.begin_batch();
        processor.process(&queued(1, later));
        assert_eq!(processor.verdicts.verdicts(), [], "it waits");
        shared.snapshot.store(Arc::new(new));
        processor.process(&queued(2, first));
        let verdicts = processor.verdicts.verdicts();
        let slots: Vec<_> =
            verdicts.iter().map(|(id, mark)| (*id, mark.and_then(mark::slot))).collect();
        assert_eq!(slots, [(2, Some(to.slot)), (1, Some(to.slot))]);
        assert_eq!(shared.state.flows.live(to.slot), 1);
    }
}
