//! The enforcer: makes the kernel and the engine enforce the desired state.
//!
//! `reconcile` sends differences to the kernel and repairs what other programs change, which
//! `nft_monitor` notices. `counters` carries counters over changes;
//! `counter_reader` reads them when they are many. [`queue_path`] finds the path
//! of frames into the queues.

mod counter_reader;
mod counters;
mod nft_monitor;
pub mod queue_path;
mod reconcile;

use crate::engine::flows::FlowTable;
use crate::engine::{EngineState, Snapshot};
use crate::packet_path::queue::Queue;
use crate::packet_path::recorder::Recorder;
use crate::packet_path::worker::{Shared, Worker};
use counters::CarriedCounters;
use nfqd_rules::nft::delta::Installed;
use nfqd_rules::nft::kernel::{Kernel, KernelError, Neighbour};
use nfqd_rules::nft::options::RulesetOptions;
use nfqd_rules::packet::Packet;
use nfqd_rules::pool::Pools;
use nfqd_rules::{Desired, MiddleboxKey, NetworkId};
use nfqd_shmctl::Protocol;
use nft_monitor::NftMonitor;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The kernel, the workers, and what both enforce.
pub struct Enforcer {
    kernel: Kernel,
    options: RulesetOptions,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    monitor: NftMonitor,
    /// The state that the engine enforces.
    desired_in_engine: Desired,
    pools: Pools,
    /// The state that the kernel enforces, unless its tables are broken.
    desired_in_kernel: Desired,
    installed: Installed,
    /// Whether the kernel does not have the desired state yet; tried again at every tick.
    is_stale: bool,
    /// The reason the kernel's tables are not as we left them and must be loaded as a whole.
    broken: Option<String>,
    repairs: u64,
    /// The earliest time of the next repair.
    next_repair: Instant,
    /// The current pause between two repairs.
    repair_pause: Duration,
    /// Whether tagged frames reached the queues by br_netfilter at the start.
    calls_tagged: bool,
    /// The reason frames do not reach the queues.
    steering_error: Option<String>,
    counters: CarriedCounters,
    /// The middleboxes with very many new flows, and how many a second.
    floods: Floods,
}

/// New flows a second of middleboxes that have very many, and the time at which they were counted.
#[derive(Debug)]
struct Floods {
    rates: BTreeMap<MiddleboxKey, u32>,
    counted: Instant,
}

/// New flows of a middlebox in a second that are called a flood.
const FLOOD: u32 = 5000;
/// The shortest time in which new flows are counted.
const FLOOD_INTERVAL: Duration = Duration::from_millis(900);

/// Whether a packet begins a conversation and is its own answer: both endpoints are equal.
fn answers_itself(packet: &Packet) -> bool {
    const SYN: u8 = 2;
    /// FIN, SYN, RST and ACK.
    const BEGINS: u8 = 1 | SYN | 4 | 16;
    let (link, Some(ip)) = (&packet.link, packet.ip) else { return false };
    let begins = match ip.tcp_flags {
        Some(flags) => flags & BEGINS == SYN,
        None => ip.protocol == Protocol::UDP,
    };
    let same_ports = ip.ports.is_some_and(|ports| ports.source == ports.destination);
    begins && same_ports && link.source == link.destination && ip.source == ip.destination
}

impl Enforcer {
    /// An enforcer for a kernel that may have the tables of an earlier nfqd.
    ///
    /// # Errors
    /// If there are no more file descriptors.
    pub fn new(
        kernel: Kernel,
        options: RulesetOptions,
        shared: Arc<Shared>,
    ) -> Result<Enforcer, KernelError> {
        let monitor = NftMonitor::new(kernel.port());
        Ok(Enforcer {
            monitor: monitor.map_err(|errno| KernelError::Io(errno.into()))?,
            kernel,
            options,
            shared,
            workers: Vec::new(),
            desired_in_engine: Desired::default(),
            pools: Pools::default(),
            desired_in_kernel: Desired::default(),
            installed: Installed::new(&Desired::default(), &options).0,
            is_stale: false,
            broken: None,
            repairs: 0,
            next_repair: Instant::now(),
            repair_pause: Duration::ZERO,
            calls_tagged: queue_path::calls_tagged(),
            steering_error: None,
            counters: CarriedCounters::new().map_err(KernelError::Io)?,
            floods: Floods { rates: BTreeMap::new(), counted: Instant::now() },
        })
    }

    /// Enforces the desired state for the first time.
    ///
    /// # Errors
    /// If the kernel refuses; its tables are as they were before.
    pub fn begin(&mut self, desired: &Desired) -> Result<(), KernelError> {
        self.counters.begin(self.kernel.earlier_counters(desired)?, &desired.policy);
        self.publish(desired);
        self.load(desired)
    }

    /// Returns what packets have told the kernel about backends, by network.
    pub fn neighbours(&mut self, desired: &Desired) -> Vec<(NetworkId, Neighbour)> {
        let mut out = Vec::new();
        for network in desired.slots.inhabited() {
            let prefix = desired.networks.prefix(network);
            match self.kernel.neighbours(&prefix) {
                Ok(found) => out.extend(found.into_iter().map(|found| (network, found))),
                Err(error) => log::warn!("neighbours: {error}"),
            }
        }
        out
    }

    /// Starts a worker for a queue.
    ///
    /// # Errors
    /// If there are no more threads or file descriptors.
    pub fn serve(&mut self, queue: Queue) -> io::Result<()> {
        self.workers.push(Worker::start(queue, Arc::clone(&self.shared))?);
        Ok(())
    }

    /// Returns the workers.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Whether no worker is stuck.
    pub fn have_workers_moved(&mut self) -> bool {
        // No short circuit: each call also records the batch that the next one compares with.
        self.workers.iter_mut().fold(true, |all, worker| worker.has_moved() & all)
    }

    /// Stops the workers. The ruleset stays.
    pub fn stop(&mut self) {
        self.workers.drain(..).for_each(Worker::stop);
    }

    /// Returns the options of the ruleset.
    pub fn options(&self) -> &RulesetOptions {
        &self.options
    }

    /// Returns the flow table.
    pub fn flows(&self) -> &FlowTable {
        &self.shared.state.flows
    }

    /// Returns the engine's state between packets.
    pub fn engine_state(&self) -> &EngineState {
        &self.shared.state
    }

    /// Returns the snapshot that the engine decides by.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// Returns the seconds of the engine's clock.
    pub fn now(&self) -> u32 {
        self.shared.now()
    }

    /// Whether a packet answers a conversation that its middlebox has begun, as the kernel remembers.
    pub fn has_begun(&mut self, snapshot: &Snapshot, network: NetworkId, packet: &Packet) -> bool {
        // A packet from a middlebox to itself may begin the conversation that it answers.
        let key = snapshot.middlebox_at(network, packet.link.source);
        let middlebox = key.and_then(|key| snapshot.policy().get(key));
        if middlebox.is_some_and(|its| !its.services().is_empty()) && answers_itself(packet) {
            return true;
        }
        let prefix = snapshot.desired().networks.prefix(network);
        let begun = self.kernel.has_begun(&prefix, packet);
        begun.unwrap_or_else(|error| {
            log::debug!("conversations of middleboxes: {error}");
            false
        })
    }

    /// Counts the new flows of the last second.
    pub fn meter_new_flows(&mut self, desired: &Desired) {
        let (now, before) = (Instant::now(), self.floods.counted);
        let elapsed = now.duration_since(before);
        if elapsed < FLOOD_INTERVAL {
            return;
        }
        let seconds = elapsed.as_secs_f64();
        let least = (f64::from(FLOOD) * seconds) as u32;
        let keys = desired.policy.middleboxes().keys().copied();
        let found = self.shared.state.new_flows.take(keys, least);
        let rates: BTreeMap<MiddleboxKey, u32> = found
            .into_iter()
            .map(|(key, count)| (key, (f64::from(count) / seconds) as u32))
            .collect();
        for (key, rate) in rates.iter().filter(|(key, _)| !self.floods.rates.contains_key(key)) {
            log::warn!("{}: {rate} new flows a second", key.mac);
        }
        self.floods = Floods { rates, counted: now };
    }

    /// Returns the new flows a second of a middlebox that has very many.
    pub fn flood_of(&self, middlebox: MiddleboxKey) -> Option<u32> {
        self.floods.rates.get(&middlebox).copied()
    }

    /// Returns the record of decisions.
    pub fn recorder(&self) -> &Recorder {
        &self.shared.recorder
    }

    /// Removes expired flows, and ends the recording of decisions that nobody asks for.
    pub fn expire_flows(&self) {
        self.shared.recorder.rest(Instant::now());
        self.shared.state.flows.expire(self.shared.now());
    }

    /// Returns how often our tables were found changed by another program, and repaired.
    pub fn repairs(&self) -> u64 {
        self.repairs
    }

    /// Returns why our tables are not as they should be at the moment.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Returns why frames do not reach the queues at the moment.
    pub fn steering_error(&self) -> Option<&str> {
        self.steering_error.as_deref()
    }

    /// Returns the descriptor that is readable when nftables has changed.
    pub fn monitor_fd(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }

    /// Returns the descriptor that is readable when a worker has ended.
    pub fn ended_fd(&self) -> BorrowedFd<'_> {
        self.shared.ended().as_fd()
    }
}
