//! The daemon's control loop: commands in, policy to the engine and the kernel, registrations to disk.
//!
//! A command's way: mailbox, [`Channel::authorise`], [`Policy::apply_line`], [`Shared::snapshot`], [`Kernel::change`],
//! [`State::save`], reply. When the kernel refuses, the policy is put back and the reply says so.

use crate::channel::Channel;
use crate::config::{Config, FailChoice, SteerChoice};
use crate::engine::Snapshot;
use crate::flows::Flows;
use crate::neighbours::Neighbours;
use crate::queue::{Queue, QueueError};
use crate::state::{State, StateError, apply_file};
use crate::status::{BackendStatus, ChannelStatus, Control, MiddleboxStatus, QueueStatus, Status};
use crate::worker::{Shared, Worker};
use arc_swap::ArcSwap;
use nfqd_rules::Policy;
use nfqd_rules::nft::kernel::{Kernel, KernelError};
use nfqd_rules::nft::model::{Family, Queues, Statement};
use nfqd_rules::nft::ruleset::{FastPath, Options, Ruleset, Steer, build};
use nfqd_rules::slots::Slots;
use nfqd_shmctl::mailbox::Frame;
use nfqd_shmctl::{MacAddr, RegionError};
use nix::errno::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// How often mailboxes are looked at. A guest has no way to ring in this layout.
const TICK: Duration = Duration::from_millis(2);
/// How often neighbours, the kernel's tables and an unsaved state are looked at.
const SLOW_TICK: Duration = Duration::from_secs(1);
/// Flows that the engine remembers.
const FLOWS: usize = 1 << 20;

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// What it was given is wrong.
    #[error("{0}")]
    Input(String),
    /// nftables.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The directory of registrations.
    #[error(transparent)]
    State(#[from] StateError),
    /// A region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// No way into the queue, or not the one asked for.
    #[error("{0}")]
    Steer(&'static str),
    /// Anything else the system refuses.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl StartError {
    /// Whether the input is wrong, rather than the system unwilling.
    pub fn is_input(&self) -> bool {
        matches!(self, StartError::Input(_) | StartError::State(StateError::Content(_)))
    }
}

const NO_NATIVE: &str = "this kernel has no nft queue expression for bridges (CONFIG_NFT_QUEUE; module nft_queue); use \
                         --steer br-netfilter, or --steer auto";
const NO_BR_NETFILTER: &str = "this kernel cannot queue by br_netfilter (CONFIG_BRIDGE_NETFILTER, CONFIG_NFT_COMPAT and \
                               CONFIG_NETFILTER_XT_TARGET_NFQUEUE; modules br_netfilter, nft_compat, xt_NFQUEUE); use \
                               --steer native, or --steer auto";
const NO_WAY: &str = "this kernel has no way into NFQUEUE from a bridge: neither the nft queue expression (module \
                      nft_queue) nor br_netfilter with the xt target NFQUEUE (modules br_netfilter, nft_compat, \
                      xt_NFQUEUE); load one of them, 'br-netfilter.sh up' tries both";
const NOT_CALLED: &str = "br_netfilter is not told to hand bridged packets to nftables: net.bridge.bridge-nf-call-iptables \
                          is not 1 (or the module br_netfilter is not loaded); run 'br-netfilter.sh up'";

/// Finds out how frames can get into the queue.
fn steer(kernel: &mut Kernel, choice: SteerChoice, queues: Queues) -> Result<Steer, StartError> {
    let native =
        choice != SteerChoice::BrNetfilter && kernel.knows(Family::Bridge, &Statement::Queue(queues))?;
    if native {
        return Ok(Steer::Native);
    }
    if choice == SteerChoice::Native {
        return Err(StartError::Steer(NO_NATIVE));
    }
    if !kernel.knows(Family::Ip, &Statement::XtQueue(queues))? {
        let reason = if choice == SteerChoice::Auto { NO_WAY } else { NO_BR_NETFILTER };
        return Err(StartError::Steer(reason));
    }
    for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        let value = std::fs::read_to_string(format!("/proc/sys/net/bridge/{name}")).unwrap_or_default();
        if value.trim() != "1" {
            return Err(StartError::Steer(NOT_CALLED));
        }
    }
    let tagged =
        std::fs::read_to_string("/proc/sys/net/bridge/bridge-nf-filter-vlan-tagged").unwrap_or_default();
    if tagged.trim() != "1" {
        log::warn!(
            "net.bridge.bridge-nf-filter-vlan-tagged is not 1: VLAN-tagged frames do not reach the engine; \
             'br-netfilter.sh up' sets it"
        );
    }
    Ok(Steer::BrNetfilter)
}

/// A running daemon.
pub struct Daemon {
    config: Config,
    options: Options,
    kernel: Kernel,
    loaded: Ruleset,
    policy: Policy,
    slots: Slots,
    macs: HashMap<IpAddr, MacAddr>,
    neighbours: Neighbours,
    channels: Vec<Channel>,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    state: State,
    unsaved: Option<StateError>,
    repairs: u64,
}

impl Daemon {
    /// Starts: reads the registrations, probes the kernel, binds the queues, loads the ruleset, starts the workers. An
    /// nfqd that ran before is taken over: its base chains stand, and cached flows keep their backends.
    ///
    /// # Errors
    /// See [`StartError`]; the kernel is as it was before, but for a ruleset of an nfqd that ran before.
    pub fn start(config: Config) -> Result<Daemon, StartError> {
        let state = State::open(&config.state)?;
        let mut policy = state.load()?;
        apply_commands(&mut policy, config.commands.as_deref())?;
        let mut channels = Vec::new();
        for spec in &config.shm {
            channels.push(Channel::open(spec)?);
            if spec.macs.is_empty() {
                log::warn!(
                    "{}: bound to no MAC, its guest may speak for every middlebox; add mac=",
                    spec.path.display()
                );
            }
        }
        let queues = Queues {
            first: config.queues.first,
            count: config.queues.count,
            bypass: config.fail == FailChoice::Open,
        };
        let mut kernel = Kernel::open()?;
        let mut slots = kernel.slots()?;
        let steer = steer(&mut kernel, config.steer, queues)?;
        let options = Options { steer, fast_path: config.fast_path, queues };
        let neighbours = Neighbours::open().map_err(|errno| StartError::System {
            what: "neighbour table".to_string(),
            source: errno.into(),
        })?;
        slots.follow(&policy, |_| None, Instant::now());
        let shared = Arc::new(Shared {
            snapshot: ArcSwap::from_pointee(snapshot(&policy, &slots, &options)),
            flows: Flows::new(FLOWS),
            stop: AtomicBool::new(false),
            start: Instant::now(),
        });
        // Bound before the ruleset sends packets there, so that none is let through without a verdict.
        let open = (0..queues.count).map(|n| Queue::open(queues.first + n, queues.bypass));
        let open: Vec<Queue> = open.collect::<Result<_, _>>()?;
        let mut daemon = Daemon {
            config,
            options,
            kernel,
            loaded: Ruleset::new(),
            policy,
            slots,
            macs: HashMap::new(),
            neighbours,
            channels,
            shared,
            workers: Vec::new(),
            state,
            unsaved: None,
            repairs: 0,
        };
        daemon.find_neighbours();
        daemon.publish();
        let wanted = daemon.wanted();
        daemon.kernel.load(&wanted)?;
        daemon.loaded = wanted;
        for queue in open {
            let number = queue.number();
            let worker = Worker::start(queue, Arc::clone(&daemon.shared))
                .map_err(|source| StartError::System { what: format!("thread of queue {number}"), source })?;
            daemon.workers.push(worker);
        }
        daemon.save();
        Ok(daemon)
    }

    /// Works until SIGTERM or SIGINT. The ruleset stays: what the fast path knows goes on.
    ///
    /// # Errors
    /// When the control socket or the signals cannot be had.
    pub fn run(mut self) -> Result<(), StartError> {
        let system = |what: String| move |source| StartError::System { what, source };
        let control = Control::listen(&self.config.control)
            .map_err(system(format!("{}", self.config.control.display())))?;
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(system("signals".to_string()))?;
        log::info!(
            "ready: steer {}, fast path {}, queues {}-{}, {} middleboxes",
            self.steer_name(),
            self.fast_path_name(),
            self.options.queues.first,
            self.options.queues.first + (self.options.queues.count - 1),
            self.policy.middleboxes().len()
        );
        let mut slow = Instant::now();
        loop {
            for signal in signals.pending() {
                match signal {
                    SIGHUP => self.reload(),
                    _ => {
                        log::info!("leaving; the ruleset stays, 'nfqd flush' removes it");
                        self.shared.stop.store(true, Relaxed);
                        self.workers.drain(..).for_each(Worker::join);
                        return Ok(());
                    }
                }
            }
            self.take_commands();
            control.serve(|| self.status());
            if slow.elapsed() >= SLOW_TICK {
                slow = Instant::now();
                self.look_around();
            }
            std::thread::sleep(TICK);
        }
    }

    fn wanted(&self) -> Ruleset {
        build(&self.policy, &self.slots, &self.options)
    }

    /// Gives the engine the policy of now.
    fn publish(&mut self) {
        let macs = &self.macs;
        self.slots.follow(&self.policy, |ip| macs.get(&ip).copied(), Instant::now());
        self.shared.snapshot.store(Arc::new(snapshot(&self.policy, &self.slots, &self.options)));
    }

    /// Brings the policy to the engine, then to the kernel. The engine goes first: it must know what the kernel sends it.
    fn enforce(&mut self) -> Result<(), KernelError> {
        self.publish();
        let wanted = self.wanted();
        let result = match self.kernel.change(&self.loaded, &wanted) {
            // Somebody else has changed our tables: what is there is replaced whole.
            Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::EEXIST | Errno::EBUSY)) => {
                log::warn!("our tables were changed by another program ({error}); repairing them");
                self.repairs += 1;
                self.kernel.load(&wanted)
            }
            other => other,
        };
        if result.is_ok() {
            self.loaded = wanted;
        }
        result
    }

    /// Makes a changed policy hold, or puts the old one back.
    fn adopt(&mut self, before: Policy) -> Result<(), KernelError> {
        if self.policy == before {
            return Ok(());
        }
        if self.policy.destinations().count() != 0 {
            self.find_neighbours();
        }
        let result = self.enforce();
        match &result {
            Ok(()) => self.save(),
            Err(error) => {
                log::error!("{error}");
                self.policy = before;
                self.publish();
            }
        }
        result
    }

    fn take_commands(&mut self) {
        for at in 0..self.channels.len() {
            let Some(channel) = self.channels.get_mut(at) else { continue };
            let frames = channel.take(Instant::now());
            if frames.is_empty() {
                continue;
            }
            let before = self.policy.clone();
            let mut answered: Vec<(Frame, String)> = Vec::new();
            for frame in frames {
                let reply = self.command(at, &frame);
                answered.push((frame, reply));
            }
            if let Err(error) = self.adopt(before) {
                for (_, reply) in answered.iter_mut().filter(|(_, reply)| reply.starts_with("OK")) {
                    *reply = format!("ERR internal the host cannot enforce it: {error}");
                }
            }
            if let Some(channel) = self.channels.get_mut(at) {
                for (frame, reply) in &answered {
                    let text = frame.text.as_deref().unwrap_or("a frame that is no text");
                    log::info!("{}: {text}: {reply}", channel.spec().path.display());
                }
                channel.reply(&answered);
            }
        }
    }

    /// Applies one command to the policy; the reply for it.
    fn command(&mut self, channel: usize, frame: &Frame) -> String {
        let line = match &frame.text {
            Ok(line) => line,
            Err(error) => return format!("ERR syntax {error}"),
        };
        let allowed = self.channels.get(channel).map_or(Ok(()), |channel| channel.authorise(line));
        match allowed.and_then(|()| self.policy.apply_line(line)) {
            Ok(command) => format!("OK {command}"),
            Err(error) => error.reply(),
        }
    }

    fn save(&mut self) {
        let result = self.state.save(&self.policy);
        if let Err(error) = &result
            && self.unsaved.is_none()
        {
            log::error!("{error}; registrations hold until nfqd ends, and are tried again");
        }
        self.unsaved = result.err();
    }

    /// Asks the kernel for the MACs of backends that no command gave one. True when something is new.
    fn find_neighbours(&mut self) -> bool {
        let wanted: BTreeSet<IpAddr> = self
            .policy
            .destinations()
            .filter(|(_, _, to)| to.mac.is_none())
            .map(|(_, _, to)| to.ip)
            .collect();
        if wanted.is_empty() {
            return false;
        }
        match self.neighbours.resolve(&wanted) {
            Ok(found) => {
                // A MAC that is not seen any more stays: the backend may be silent, and the flow has no better place.
                let new: HashMap<IpAddr, MacAddr> =
                    found.into_iter().filter(|(ip, mac)| self.macs.get(ip) != Some(mac)).collect();
                for (ip, mac) in &new {
                    log::info!("backend {ip} is at {mac}");
                }
                self.macs.retain(|ip, _| wanted.contains(ip));
                let any = !new.is_empty();
                self.macs.extend(new);
                any
            }
            Err(errno) => {
                log::warn!("neighbour table: {errno}");
                false
            }
        }
    }

    fn look_around(&mut self) {
        if self.find_neighbours()
            && let Err(error) = self.enforce()
        {
            log::error!("{error}");
        }
        match self.kernel.stands() {
            Ok(true) => {}
            Ok(false) => {
                log::warn!("our table was removed by another program; loading it again");
                self.repairs += 1;
                let wanted = self.wanted();
                match self.kernel.load(&wanted) {
                    Ok(()) => self.loaded = wanted,
                    Err(error) => log::error!("{error}"),
                }
            }
            Err(error) => log::error!("{error}"),
        }
        if self.unsaved.is_some() {
            self.save();
        }
    }

    /// SIGHUP: the file of `--commands` is applied again, and regions that are new are opened.
    fn reload(&mut self) {
        log::info!("reading the configuration again");
        let before = self.policy.clone();
        match apply_commands(&mut self.policy, self.config.commands.as_deref()) {
            Ok(()) => drop(self.adopt(before)),
            Err(error) => {
                log::error!("{error}; the policy stays as it was");
                self.policy = before;
            }
        }
        for channel in &mut self.channels {
            if channel.error().is_some() {
                match Channel::open(channel.spec()) {
                    Ok(open) => *channel = open,
                    Err(error) => log::error!("{error}"),
                }
            }
        }
    }

    fn steer_name(&self) -> &'static str {
        match self.options.steer {
            Steer::Native => "native",
            Steer::BrNetfilter => "br-netfilter",
        }
    }

    fn fast_path_name(&self) -> &'static str {
        match self.options.fast_path {
            FastPath::Full => "full",
            FastPath::Off => "off",
        }
    }

    fn status(&self) -> Status {
        let commands = self.policy.commands();
        let middlebox = |mac: &MacAddr| {
            let registered = self.policy.get(*mac);
            let backends = self.slots.iter().filter(|(key, _)| key.middlebox == *mac);
            MiddleboxStatus {
                mac: mac.to_string(),
                firewall: registered.and_then(|m| m.firewall()).map(|firewall| firewall.ip().to_string()),
                commands: commands.iter().filter(|c| c.mac() == *mac).map(ToString::to_string).collect(),
                backends: backends
                    .map(|(key, slot)| BackendStatus {
                        service: key.vip.to_string(),
                        ip: key.backend.to_string(),
                        mac: slot.mac.map(|mac| mac.to_string()),
                    })
                    .collect(),
            }
        };
        let queue = |worker: &Worker| QueueStatus {
            queue: worker.queue,
            alive: worker.is_alive(),
            packets: worker.counts.packets.load(Relaxed),
            dropped: worker.counts.dropped.load(Relaxed),
            redirected: worker.counts.redirected.load(Relaxed),
            replies: worker.counts.replies.load(Relaxed),
            overruns: worker.counts.overruns.load(Relaxed),
        };
        let channel = |channel: &Channel| ChannelStatus {
            path: channel.spec().path.display().to_string(),
            macs: channel.spec().macs.iter().map(MacAddr::to_string).collect(),
            error: channel.error().map(ToString::to_string),
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_string(),
            pid: std::process::id(),
            steer: self.steer_name().to_string(),
            fast_path: self.fast_path_name().to_string(),
            fail: if self.options.queues.bypass { "open" } else { "closed" }.to_string(),
            queues: self.workers.iter().map(queue).collect(),
            middleboxes: self.policy.middleboxes().keys().map(middlebox).collect(),
            channels: self.channels.iter().map(channel).collect(),
            flows: self.shared.flows.len(),
            repairs: self.repairs,
            state: self.state.path().display().to_string(),
            state_error: self.unsaved.as_ref().map(ToString::to_string),
        }
    }
}

fn snapshot(policy: &Policy, slots: &Slots, options: &Options) -> Snapshot {
    Snapshot::new(policy, slots, options.fast_path == FastPath::Full)
}

/// Applies the file of `--commands`, all of it or nothing.
fn apply_commands(policy: &mut Policy, path: Option<&Path>) -> Result<(), StartError> {
    let Some(path) = path else { return Ok(()) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| StartError::Input(format!("{}: {error}", path.display())))?;
    let mut changed = policy.clone();
    let errors = apply_file(&mut changed, path, &text);
    if !errors.is_empty() {
        return Err(StartError::Input(errors.join("\n")));
    }
    *policy = changed;
    Ok(())
}
