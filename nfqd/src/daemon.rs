//! The daemon's control loop: commands in, policy to the engine and the kernel, registrations to disk.
//!
//! A command's way: mailbox, [`Channel::authorise`], [`Policy::apply_line`], [`Shared::snapshot`], [`Kernel::change`],
//! [`State::save`], reply. When the kernel refuses, the policy is put back and the reply says so.

use crate::channel::Channel;
use crate::config::{Config, FailChoice, Options as Flags, ShmSpec, SteerChoice};
use crate::engine::{Filters, Snapshot};
use crate::flows::{FlowKey, Flows};
use crate::neighbours::Neighbours;
use crate::queue::{Queue, QueueError};
use crate::state::{State, StateError, apply_file};
use crate::status::{
    BackendStatus, ChannelStatus, Control, MiddleboxStatus, QueueStatus, RuleStatus, Status,
};
use crate::watch::Watch;
use crate::worker::{Shared, Worker};
use arc_swap::ArcSwap;
use nfqd_rules::nft::delta::{Desired, Standing};
use nfqd_rules::nft::filters::one_by_one;
use nfqd_rules::nft::kernel::{Counters, Kernel, KernelError, Made};
use nfqd_rules::nft::model::{Family, Queues, Statement};
use nfqd_rules::nft::ruleset::{FastPath, Options, Steer};
use nfqd_rules::slots::{Slot, SlotKey};
use nfqd_rules::{Middlebox, Policy};
use nfqd_shmctl::mailbox::Frame;
use nfqd_shmctl::{Action, Command, CommandError, ErrorCode, MacAddr, RegionError, RuleId};
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How often mailboxes are looked at. A guest has no way to ring in this layout.
const TICK: Duration = Duration::from_millis(2);
/// How often neighbours, the kernel's tables and an unsaved state are looked at.
const SLOW_TICK: Duration = Duration::from_secs(1);
/// How often neighbours are looked for after a command has named a new backend, and how many times.
const SOON_TICK: Duration = Duration::from_millis(100);
const SOON: u32 = 10;
/// Why tables are broken that another program has changed.
const CHANGED: &str = "our tables were changed by another program";
/// How long packets that are being judged are waited for before old slots go.
const SETTLE: Duration = Duration::from_secs(1);
/// The longest reply to `Q`; the mailbox has room for little more.
const LONGEST_ANSWER: usize = 1900;
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
        matches!(self, StartError::Input(_))
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
    flags: Flags,
    config: Config,
    control: Control,
    signals: Signals,
    /// None while the ruleset is loaded whole: the kernel would tell us of every element.
    watch: Option<Watch>,
    options: Options,
    kernel: Kernel,
    desired: Desired,
    /// What the engine has.
    published: Policy,
    /// What the kernel has, unless it is stale.
    loaded: Desired,
    standing: Standing,
    macs: BTreeMap<IpAddr, MacAddr>,
    neighbours: Neighbours,
    channels: Vec<Channel>,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    state: State,
    unsaved: Option<StateError>,
    /// Looks for neighbours that come soon, after a command has named a new backend.
    soon: u32,
    /// The kernel has not what it should have; tried again every second.
    stale: bool,
    /// The kernel's tables are not as we left them, whoever did it: they must be loaded whole. Why, for people.
    broken: Option<String>,
    repairs: u64,
    /// What was counted before the ruleset that stands was loaded, and in rules that were made anew since.
    kept: Counters,
    counters: Counters,
    /// When the kernel was asked for its counters, and for how long it is not asked again.
    counted: Option<(Instant, Duration)>,
}

impl Daemon {
    /// Starts: reads the registrations, probes the kernel, binds the queues, loads the ruleset, starts the workers. An
    /// nfqd that ran before is taken over: its base chains stand, and cached flows keep their backends.
    ///
    /// # Errors
    /// See [`StartError`]; the kernel is as it was before, but for a ruleset of an nfqd that ran before.
    pub fn start(flags: &Flags) -> Result<Daemon, StartError> {
        let config = flags.resolve().map_err(StartError::Input)?;
        let system = |what: &str| {
            let what = what.to_string();
            move |source| StartError::System { what, source }
        };
        let state = State::open(&config.state)?;
        let (mut policy, lost) = state.load()?;
        lost.iter().for_each(|error| log::error!("{error}; this registration is not taken back"));
        apply_commands(&mut policy, config.commands.as_deref())?;
        let channels = config.shm.iter().map(open_channel).collect::<Result<_, _>>()?;
        let control =
            Control::listen(&config.control).map_err(system(&config.control.display().to_string()))?;
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(system("signals"))?;
        let queues = Queues {
            first: config.queues.first,
            count: config.queues.count,
            bypass: config.fail == FailChoice::Open,
        };
        let mut kernel = Kernel::open()?;
        let steer = steer(&mut kernel, config.steer, queues)?;
        let options = Options { steer, fast_path: config.fast_path, queues };
        let heritage = kernel.heritage()?;
        let kept = kernel.counters()?;
        let neighbours = Neighbours::open().map_err(|errno| system("neighbour table")(errno.into()))?;
        let shared = Arc::new(Shared {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            flows: Flows::new(FLOWS),
            stop: AtomicBool::new(false),
            start: Instant::now(),
        });
        for reply in &heritage.replies {
            let (backend, client) = (reply.source, reply.destination);
            let key = FlowKey { backend, client, protocol: reply.protocol, ports: reply.ports };
            shared.flows.insert(key, reply.slot, 0);
        }
        // Bound before the ruleset sends packets there, so that none is let through without a verdict.
        let open = (0..queues.count).map(|n| Queue::open(queues.first + n, queues.bypass));
        let open: Vec<Queue> = open.collect::<Result<_, _>>()?;
        let mut daemon = Daemon {
            flags: flags.clone(),
            config,
            control,
            signals,
            watch: None,
            options,
            kernel,
            desired: Desired { policy, slots: heritage.slots },
            published: Policy::default(),
            loaded: Desired::default(),
            standing: Standing::new(&Desired::default(), &options).0,
            macs: heritage.macs,
            neighbours,
            channels,
            shared,
            workers: Vec::new(),
            state,
            unsaved: None,
            soon: 0,
            stale: false,
            broken: None,
            repairs: 0,
            kept,
            counters: Counters::default(),
            counted: None,
        };
        daemon.find_neighbours();
        let macs = &daemon.macs;
        daemon.desired.slots.follow(&daemon.desired.policy, |ip| macs.get(&ip).copied(), Instant::now());
        daemon.publish();
        let registered = |mac: &MacAddr, policy: &Policy| policy.get(*mac).is_some();
        let policy = &daemon.desired.policy;
        daemon.kept.middleboxes.retain(|mac, _| registered(mac, policy));
        daemon
            .kept
            .rules
            .retain(|(mac, rule), _| policy.get(*mac).is_some_and(|middlebox| has(middlebox, *rule)));
        daemon.load()?;
        for queue in open {
            let number = queue.number();
            let worker = Worker::start(queue, Arc::clone(&daemon.shared))
                .map_err(system(&format!("thread of queue {number}")))?;
            daemon.workers.push(worker);
        }
        Ok(daemon)
    }

    /// Works until SIGTERM or SIGINT. The ruleset stays: what the fast path knows goes on.
    ///
    /// # Errors
    /// When a queue is not served any more: started again, nfqd takes over what is there.
    pub fn run(mut self) -> Result<(), StartError> {
        log::info!(
            "ready: steer {}, fast path {}, queues {}-{}, {} middleboxes",
            self.steer_name(),
            self.fast_path_name(),
            self.options.queues.first,
            self.options.queues.first + (self.options.queues.count - 1),
            self.desired.policy.middleboxes().len()
        );
        self.save();
        let mut slow = Instant::now();
        loop {
            let signals: Vec<i32> = self.signals.pending().collect();
            for signal in signals {
                if signal != SIGHUP {
                    log::info!("leaving; the ruleset stays, 'nfqd flush' removes it");
                    self.shared.stop.store(true, Relaxed);
                    self.workers.drain(..).for_each(Worker::join);
                    return Ok(());
                }
                self.reload();
            }
            self.take_commands();
            self.listen();
            while let Some(asker) = self.control.accept() {
                asker.answer(&self.status());
            }
            if let Some(worker) = self.workers.iter().find(|worker| !worker.is_alive()) {
                let source = std::io::Error::other("its thread ended, see above");
                return Err(StartError::System { what: format!("queue {}", worker.queue), source });
            }
            let tick = if self.soon == 0 { SLOW_TICK } else { SOON_TICK };
            if slow.elapsed() >= tick {
                slow = Instant::now();
                self.soon = self.soon.saturating_sub(1);
                self.look_around();
            }
            std::thread::sleep(TICK);
        }
    }

    /// Gives what the policy names its numbers and MACs, where it differs from `before`. False when there are not enough
    /// numbers.
    fn follow(&mut self, before: &Policy) -> bool {
        let Desired { policy, slots } = &mut self.desired;
        let (macs, now) = (&self.macs, Instant::now());
        let mut enough = true;
        for mac in policy.changed(before) {
            enough &= slots.update(mac, policy.get(mac), |ip| macs.get(&ip).copied(), now);
        }
        enough
    }

    /// Gives the engine what is to hold now.
    fn publish(&mut self) {
        let mut snapshot = Snapshot::new(self.desired.clone());
        snapshot.learn = self.options.fast_path == FastPath::Full;
        snapshot.filters = match (self.options.fast_path, self.options.steer) {
            (FastPath::Full, _) => Filters::None,
            (FastPath::Off, Steer::BrNetfilter) => Filters::WithoutTags,
            (FastPath::Off, Steer::Native) => Filters::All,
        };
        if snapshot.filters != Filters::None {
            // Here, where it is charged to the guest that asked for the rules, not to the queue that meets them first.
            for mac in self.desired.policy.changed(&self.published) {
                let firewall = self.desired.policy.get(mac).and_then(Middlebox::firewall);
                firewall.into_iter().for_each(|firewall| firewall.prepare(mac));
            }
        }
        self.published = self.desired.policy.clone();
        self.shared.snapshot.store(Arc::new(snapshot));
    }

    /// Makes the kernel's tables what they should be, whatever they are.
    fn load(&mut self) -> Result<(), KernelError> {
        let (standing, ruleset) = Standing::new(&self.desired, &self.options);
        self.watch = None;
        let loaded = self.kernel.load(&ruleset);
        match Watch::open(self.kernel.port()) {
            Ok(watch) => self.watch = Some(watch),
            Err(errno) => log::error!("notifications: {errno}; changes by other programs are not noticed"),
        }
        loaded?;
        self.standing = standing;
        self.loaded = self.desired.clone();
        self.stale = false;
        // What another program did before we listened again.
        self.broken = if self.kernel.stands(&ruleset)? { None } else { Some(CHANGED.to_string()) };
        Ok(())
    }

    /// The same for tables that are not as we left them. What they have counted is kept. Tried again every second until it
    /// succeeds.
    fn repair(&mut self) -> Result<(), KernelError> {
        let counted = self.kernel.counters();
        let loaded = counted.and_then(|counted| self.load().map(|()| counted));
        match loaded {
            Ok(counted) => {
                self.repairs += 1;
                self.kept.add(&counted);
                (self.counters, self.counted) = (Counters::default(), None);
                Ok(())
            }
            Err(error) => {
                let why = error.to_string();
                if self.broken.as_ref() != Some(&why) {
                    log::error!("our tables cannot be loaded: {why}; tried again every second");
                }
                self.broken = Some(why);
                Err(error)
            }
        }
    }

    /// Looks whether another program has changed our tables.
    fn listen(&mut self) {
        if self.watch.as_ref().is_some_and(Watch::changed) && self.broken.is_none() {
            self.broken = Some(CHANGED.to_string());
        }
    }

    /// Brings what is to hold to the kernel, then to the engine. In between the engine still sends packets to slots of
    /// before; so these stay in the kernel until no such packet is on its way.
    fn enforce(&mut self) -> Result<(), KernelError> {
        if self.broken.is_some() {
            let repaired = self.repair_and_publish();
            self.stale = repaired.is_err();
            return repaired;
        }
        let change = self.standing.change(&self.loaded, &self.desired);
        let result = match self.kernel.change(&change) {
            Ok(lost) => {
                // What is kept now must not count twice, as long as the kernel is not asked again.
                self.counters.rules.retain(|rule, _| !lost.rules.contains_key(rule));
                self.kept.add(&lost);
                self.publish();
                let finished = if change.has_leftovers() {
                    let deadline = Instant::now() + SETTLE;
                    self.workers.iter().for_each(|worker| worker.settle(deadline));
                    self.kernel.finish(&change)
                } else {
                    Ok(())
                };
                self.standing.done(change);
                self.forget_counts();
                self.loaded = self.desired.clone();
                // What holds now is right but for slots too many.
                finished.or_else(|error| {
                    log::warn!("old backends are not removed ({error}); loading the ruleset again");
                    self.repair()
                })
            }
            // Somebody else has changed our tables: what is there is replaced whole.
            Err((error, _))
                if matches!(error.errno(), Some(Errno::ENOENT | Errno::EEXIST | Errno::EBUSY)) =>
            {
                log::warn!("our tables were changed by another program ({error}); repairing them");
                self.repair_and_publish()
            }
            Err((error, Made::Nothing)) => Err(error),
            // Back to before in one transaction.
            Err((error, Made::Part)) => {
                let wanted = std::mem::replace(&mut self.desired, self.loaded.clone());
                let back = self.repair();
                self.desired = wanted;
                Err(back.err().unwrap_or(error))
            }
        };
        // Our own notifications, of which a large change makes many.
        self.listen();
        self.stale = result.is_err();
        result
    }

    fn repair_and_publish(&mut self) -> Result<(), KernelError> {
        self.forget_counts();
        let repaired = self.repair();
        self.publish();
        repaired
    }

    /// Forgets what rules have counted that are gone.
    fn forget_counts(&mut self) {
        let (before, now) = (&self.loaded.policy, &self.desired.policy);
        for mac in now.changed(before) {
            let (Some(old), new) = (before.get(mac), now.get(mac)) else { continue };
            if new.is_none() {
                self.kept.middleboxes.remove(&mac);
                self.counters.middleboxes.remove(&mac);
            }
            for rule in rules(old).filter(|rule| new.is_none_or(|new| !has(new, *rule))) {
                self.kept.rules.remove(&(mac, rule));
                self.counters.rules.remove(&(mac, rule));
                for worker in &self.workers {
                    worker.counts.rules.lock().unwrap_or_else(PoisonError::into_inner).remove(&(mac, rule));
                }
            }
        }
    }

    /// Makes a changed policy hold, or puts the old one back, numbers included; the reply that then replaces each OK.
    fn adopt(&mut self, before: Desired) -> Result<(), String> {
        let enough = self.follow(&before.policy);
        let changed = self.desired.changed(&before);
        if changed.is_empty() {
            return Ok(());
        }
        let result = if enough {
            self.enforce().map_err(|error| format!("ERR internal the host cannot enforce it: {error}"))
        } else {
            Err("ERR quota the host has no numbers left for backends; try again in two minutes".to_string())
        };
        match &result {
            Ok(()) => {
                let mut backends = changed.iter().flat_map(|mac| self.desired.slots.of(*mac));
                if backends.any(|(_, slot)| slot.mac.is_none()) {
                    self.soon = SOON;
                }
            }
            Err(error) => {
                log::error!("{error}");
                self.desired.policy = before.policy;
                self.desired.slots.put_back(before.slots, Instant::now());
                self.publish();
                // What was tried may hold in part: the next look around makes sure.
                self.stale = true;
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
            let start = cpu_time();
            let before = self.desired.clone();
            let (mut answered, mut obeyed): (Vec<(Frame, String)>, Vec<Command>) = (Vec::new(), Vec::new());
            for frame in frames {
                let reply = match self.command(at, &frame) {
                    Ok(Command::Query { mac }) => self.answer(at, mac),
                    Ok(command) => {
                        let reply = format!("OK {command}");
                        obeyed.push(command);
                        reply
                    }
                    Err(reply) => reply,
                };
                answered.push((frame, reply));
            }
            match self.adopt(before) {
                Ok(()) if obeyed.is_empty() => {}
                Ok(()) => {
                    let result = self.state.append(&obeyed, &self.desired.policy);
                    self.saved(result);
                }
                Err(error) => {
                    let accepted = answered.iter_mut().filter(|(_, reply)| reply.starts_with("OK"));
                    accepted.for_each(|(_, reply)| reply.clone_from(&error));
                }
            }
            if let Some(channel) = self.channels.get_mut(at) {
                for (frame, reply) in &answered {
                    let text = frame.text.as_deref().unwrap_or("a frame that is no text");
                    // What is refused is the guest's matter, and a guest can fill a disk with it.
                    let level = if reply.starts_with("OK") { log::Level::Info } else { log::Level::Debug };
                    log::log!(level, "{}: {text}: {reply}", channel.spec().path.display());
                }
                channel.charge(answered.len(), cpu_time().saturating_sub(start));
                channel.reply(&answered);
            }
        }
    }

    /// Applies one command to the policy; a refusal is the reply.
    fn command(&mut self, channel: usize, frame: &Frame) -> Result<Command, String> {
        let line = frame.text.as_ref().map_err(|error| format!("ERR syntax {error}"))?;
        self.authorise(channel, line)
            .and_then(|()| self.desired.policy.apply_line(line))
            .map_err(|error| error.reply())
    }

    /// The reply to `Q`: each registration as a command, with what it has counted, in one line. Without a MAC it is about
    /// all middleboxes that the channel may speak for.
    fn answer(&mut self, channel: usize, mac: Option<MacAddr>) -> String {
        let counters = self.counters();
        let bound = self.channels.get(channel).map(|channel| channel.spec().macs.clone()).unwrap_or_default();
        let registered = self.desired.policy.middleboxes().keys().copied();
        let wanted: Vec<MacAddr> = match mac {
            Some(mac) => vec![mac],
            None if bound.is_empty() => registered.take(LONGEST_ANSWER).collect(),
            None => bound,
        };
        let mut text = "OK".to_string();
        for middlebox in wanted.iter().filter_map(|mac| self.middlebox_status(*mac, &counters)) {
            let rule =
                |rule: &RuleStatus| format!("{} packets {} bytes {}", rule.rule, rule.packets, rule.bytes);
            let heading =
                format!("{} packets {} bytes {}", middlebox.mac, middlebox.packets, middlebox.bytes);
            let parts =
                [heading].into_iter().chain(middlebox.commands).chain(middlebox.rules.iter().map(rule));
            for part in parts {
                text.push_str(if text.len() == 2 { " " } else { "; " });
                text.push_str(&part);
            }
            if text.len() > LONGEST_ANSWER {
                let end =
                    text.get(..LONGEST_ANSWER).and_then(|text| text.rfind("; ")).unwrap_or(LONGEST_ANSWER);
                text.truncate(end);
                text.push_str("; and more, ask for one middlebox");
                return text;
            }
        }
        if text.len() == 2 { "OK nothing registered".to_string() } else { text }
    }

    /// What the fast path and the engine have counted. The kernel is asked at most once a second, and seldom enough that
    /// it takes no more than a twentieth of the time: guests may ask, and its answer is as long as the ruleset.
    fn counters(&mut self) -> Counters {
        if self.counted.is_none_or(|(counted, pause)| counted.elapsed() >= pause) {
            let start = Instant::now();
            match self.kernel.counters() {
                Ok(counters) => self.counters = counters,
                Err(error) => log::warn!("counters: {error}"),
            }
            self.counted = Some((Instant::now(), SLOW_TICK.max(start.elapsed() * 20)));
        }
        let mut out = self.counters.clone();
        out.add(&self.kept);
        for worker in &self.workers {
            let rules = worker.counts.rules.lock().unwrap_or_else(PoisonError::into_inner);
            rules.iter().for_each(|(&(mac, rule), &counted)| out.add_rule(mac, rule, counted));
        }
        out
    }

    /// What the channel's own binding says, and that it does not redirect to a middlebox of another channel: the replies
    /// of that would be its to disturb.
    fn authorise(&self, at: usize, line: &str) -> Result<(), CommandError> {
        let Some(channel) = self.channels.get(at) else { return Ok(()) };
        let Command::RegisterBalance { balance, .. } = channel.authorise(line)? else { return Ok(()) };
        let to = balance.destination();
        let of_others = |mac: &MacAddr| {
            let others = self.channels.iter().enumerate().filter(|(other, _)| *other != at);
            !channel.spec().macs.contains(mac)
                && others.into_iter().any(|(_, other)| other.spec().macs.contains(mac))
        };
        let by_mac = to.mac.as_ref().is_some_and(of_others);
        let by_address = self.desired.policy.middleboxes().iter().any(|(mac, middlebox)| {
            let registered = middlebox.ip() == Some(to.ip) || middlebox.services().contains_key(&to.ip);
            registered && of_others(mac)
        });
        if !(by_mac || by_address) {
            return Ok(());
        }
        let word = line.split_ascii_whitespace().count() - 1;
        let expected = "a middlebox that another channel speaks for; redirect to another host";
        Err(CommandError::at_word(line, word, ErrorCode::Denied, expected))
    }

    fn save(&mut self) {
        let result = self.state.save(&self.desired.policy);
        self.saved(result);
    }

    fn saved(&mut self, result: Result<(), StateError>) {
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
            .desired
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
                let new: BTreeMap<IpAddr, MacAddr> =
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
        if self.find_neighbours() {
            let macs = &self.macs;
            self.desired.slots.follow(&self.desired.policy, |ip| macs.get(&ip).copied(), Instant::now());
            self.stale = true;
        }
        self.listen();
        if self.broken.as_deref() == Some(CHANGED) {
            log::warn!("{CHANGED}; loading them again");
        }
        if self.broken.is_some() {
            // Said by itself.
            let _ = self.repair_and_publish();
        } else if self.stale
            && let Err(error) = self.enforce()
        {
            log::error!("{error}; trying again");
        }
        if self.unsaved.is_some() {
            self.save();
        }
    }

    /// SIGHUP: reads the file of `--config` again, opens and closes regions as it says, and applies the file of
    /// `--commands`. What is wrong leaves everything as it was.
    fn reload(&mut self) {
        log::info!("reading the configuration again");
        let config = match self.flags.resolve() {
            Ok(config) => config,
            Err(error) => return log::error!("{error}; the configuration stays as it was"),
        };
        let before = self.desired.clone();
        if let Err(error) = apply_commands(&mut self.desired.policy, config.commands.as_deref()) {
            self.desired = before;
            return log::error!("{error}; the configuration stays as it was");
        }
        if self.adopt(before).is_err() {
            return;
        }
        self.save();
        self.channels.retain(|channel| channel.error().is_none() && config.shm.contains(channel.spec()));
        for spec in &config.shm {
            if self.channels.iter().all(|channel| channel.spec() != spec) {
                match open_channel(spec) {
                    Ok(channel) => self.channels.push(channel),
                    Err(error) => log::error!("{error}"),
                }
            }
        }
        let restart =
            Config { shm: config.shm.clone(), commands: config.commands.clone(), ..self.config.clone() };
        if restart != config {
            log::warn!("shm and commands are taken over; the rest of the configuration needs a restart");
        }
        self.config = Config { shm: config.shm, commands: config.commands, ..self.config.clone() };
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

    /// The state of one middlebox, if it is registered.
    fn middlebox_status(&self, mac: MacAddr, counters: &Counters) -> Option<MiddleboxStatus> {
        let middlebox = self.desired.policy.get(mac)?;
        let (packets, bytes) = counters.middleboxes.get(&mac).copied().unwrap_or_default();
        let firewall = middlebox.firewall();
        let looked_at: BTreeMap<RuleId, String> = firewall
            .filter(|_| self.options.fast_path == FastPath::Full)
            .map(|_| {
                one_by_one(mac, middlebox).into_iter().map(|(rule, why)| (rule, why.to_string())).collect()
            })
            .unwrap_or_default();
        let rule = |rule: Option<RuleId>| {
            let (packets, bytes) = counters.rules.get(&(mac, rule)).copied().unwrap_or_default();
            let name = rule.map_or("default".to_string(), |rule| rule.to_string());
            let one_by_one = rule.and_then(|rule| looked_at.get(&rule).cloned());
            RuleStatus { rule: name, packets, bytes, one_by_one }
        };
        let backend = |(key, slot): (SlotKey, Slot)| BackendStatus {
            service: key.vip.to_string(),
            ip: key.backend.to_string(),
            mac: slot.mac.map(|mac| mac.to_string()),
        };
        Some(MiddleboxStatus {
            mac: mac.to_string(),
            firewall: firewall.map(|firewall| firewall.ip().to_string()),
            packets,
            bytes,
            commands: middlebox.commands(mac).iter().map(ToString::to_string).collect(),
            rules: rules(middlebox).map(rule).collect(),
            backends: self.desired.slots.of(mac).map(backend).collect(),
        })
    }

    fn status(&mut self) -> Status {
        let counters = self.counters();
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
            middleboxes: (self.desired.policy.middleboxes().keys())
                .filter_map(|mac| self.middlebox_status(*mac, &counters))
                .collect(),
            channels: self.channels.iter().map(channel).collect(),
            flows: self.shared.flows.len(),
            repairs: self.repairs,
            repair_error: self.broken.clone(),
            state: self.state.path().display().to_string(),
            state_error: self.unsaved.as_ref().map(ToString::to_string),
        }
    }
}

/// The CPU time that this thread has used.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// The rules of a middlebox in the order they are looked at; none for its default, when that denies.
fn rules(middlebox: &Middlebox) -> impl Iterator<Item = Option<RuleId>> {
    let rules =
        middlebox.firewall().into_iter().flat_map(|firewall| firewall.rules().keys().copied().map(Some));
    rules.chain(has(middlebox, None).then_some(None))
}

fn has(middlebox: &Middlebox, rule: Option<RuleId>) -> bool {
    middlebox.firewall().is_some_and(|firewall| match rule {
        Some(rule) => firewall.rules().contains_key(&rule),
        None => firewall.default_action() == Action::Deny,
    })
}

fn open_channel(spec: &ShmSpec) -> Result<Channel, RegionError> {
    if spec.macs.is_empty() {
        log::warn!(
            "{}: bound to no MAC, its guest may speak for every middlebox; add mac=",
            spec.path.display()
        );
    }
    Channel::open(spec)
}

/// Applies the file of `--commands`, all of it or nothing. `R F` of what is registered with that address already changes
/// nothing: the rules that guests have added since stay.
fn apply_commands(policy: &mut Policy, path: Option<&Path>) -> Result<(), StartError> {
    let Some(path) = path else { return Ok(()) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| StartError::Input(format!("{}: {error}", path.display())))?;
    let mut changed = policy.clone();
    let errors = apply_file(&mut changed, path, &text, |policy, command| match command {
        Command::RegisterFirewall { mac, ip, default } => {
            let firewall = policy.get(*mac).and_then(|middlebox| middlebox.firewall());
            firewall.is_some_and(|firewall| firewall.ip() == *ip && firewall.default_action() == *default)
        }
        _ => false,
    });
    if !errors.is_empty() {
        return Err(StartError::Input(errors.join("\n")));
    }
    *policy = changed;
    Ok(())
}
