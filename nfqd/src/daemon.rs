//! The daemon's control loop: commands in, policy to the engine and the kernel, registrations to disk.
//!
//! A command's way: mailbox, [`Channel::authorise`], [`Policy::apply_line`], [`Enforcer::enforce`], [`State::append`],
//! reply. When the kernel refuses, the policy is put back and the reply says so.

use crate::backends::Backends;
use crate::bindings::Bindings;
use crate::channel::Channel;
use crate::config::{Config, FailChoice, Options as Flags, ShmSpec};
use crate::enforce::{Enforcer, rules};
use crate::engine::flows::{Backward, Forward, State as FlowState};
use crate::engine::{Memory, Snapshot};
use crate::queue::{Queue, QueueError};
use crate::state::{State, StateError, apply_file};
use crate::status::{
    BackendState, BackendStatus, ChannelStatus, Control, FlowsStatus, MiddleboxStatus, QueueStatus,
    RuleStatus, ServiceStatus, Status,
};
use crate::steer::steer;
use crate::worker::{Shared, Worker};
use arc_swap::ArcSwap;
use nfqd_rules::Policy;
use nfqd_rules::nft::delta::Desired;
use nfqd_rules::nft::filters::one_by_one;
use nfqd_rules::nft::kernel::{Kernel, KernelError, Reply};
use nfqd_rules::nft::model::Queues;
use nfqd_rules::nft::ruleset::{FastPath, Options};
use nfqd_rules::packet::Ports;
use nfqd_rules::service::{Backend, Service};
use nfqd_rules::slots::SlotKey;
use nfqd_shmctl::mailbox::Frame;
use nfqd_shmctl::{
    BackendName, Command, CommandError, Edit, ErrorCode, MacAddr, Protocol, RegionError, RuleId, Vip,
};
use nix::time::{ClockId, clock_gettime};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
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
/// How often neighbours are looked for after a command has named a new backend, and how many times.
const SOON_TICK: Duration = Duration::from_millis(100);
const SOON: u32 = 10;
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

/// A running daemon.
pub struct Daemon {
    flags: Flags,
    config: Config,
    control: Control,
    signals: Signals,
    enforcer: Enforcer,
    desired: Desired,
    backends: Backends,
    /// There were not enough numbers for all backends: tried again.
    unnumbered: bool,
    channels: Vec<Channel>,
    state: State,
    unsaved: Option<StateError>,
    /// Looks for neighbours that come soon, after a command has named a new backend.
    soon: u32,
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
        let shared = Arc::new(Shared {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            memory: Memory::new(FLOWS),
            stop: AtomicBool::new(false),
            start: Instant::now(),
        });
        heritage.replies.iter().for_each(|reply| take_over(&shared.memory, reply));
        // Bound before the ruleset sends packets there, so that none is let through without a verdict.
        let open = (0..queues.count).map(|n| Queue::open(queues.first + n, queues.bypass));
        let open: Vec<Queue> = open.collect::<Result<_, _>>()?;
        let mut daemon = Daemon {
            flags: flags.clone(),
            config,
            control,
            signals,
            enforcer: Enforcer::new(kernel, options, shared)?,
            backends: Backends::start(found_before(&policy, &heritage.macs))
                .map_err(system("neighbour table and checks"))?,
            desired: Desired { policy, slots: heritage.slots },
            unnumbered: false,
            channels,
            state,
            unsaved: None,
            soon: 0,
        };
        daemon.name_those_out_of_bounds();
        daemon.backends.look(&daemon.desired.policy);
        daemon.follow_all();
        daemon.enforcer.begin(&daemon.desired)?;
        for queue in open {
            let number = queue.number();
            daemon.enforcer.serve(queue).map_err(system(&format!("thread of queue {number}")))?;
        }
        Ok(daemon)
    }

    /// Works until SIGTERM or SIGINT. The ruleset stays: what the fast path knows goes on.
    ///
    /// # Errors
    /// When a queue is not served any more: started again, nfqd takes over what is there.
    pub fn run(mut self) -> Result<(), StartError> {
        let Options { steer, fast_path, queues } = *self.enforcer.options();
        log::info!(
            "ready: steer {}, fast path {}, queues {}-{}, {} middleboxes",
            steer.name(),
            fast_path.name(),
            queues.first,
            queues.first + (queues.count - 1),
            self.desired.policy.middleboxes().len()
        );
        self.save();
        let mut slow = Instant::now();
        loop {
            let signals: Vec<i32> = self.signals.pending().collect();
            for signal in signals {
                if signal != SIGHUP {
                    log::info!("leaving; the ruleset stays, 'nfqd flush' removes it");
                    self.enforcer.stop();
                    return Ok(());
                }
                self.reload();
            }
            self.take_commands();
            self.enforcer.listen();
            while let Some(asker) = self.control.accept() {
                asker.answer(&self.status());
            }
            if let Some(worker) = self.enforcer.workers().iter().find(|worker| !worker.is_alive()) {
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
        let bindings = Bindings::new(&self.channels);
        let (seen, now) = (self.backends.seen(&bindings), Instant::now());
        let mut enough = true;
        for mac in policy.changed(before) {
            enough &= slots.update(mac, policy.get(mac), &seen, now);
        }
        enough
    }

    /// The same for all, when what is known of backends has changed.
    fn follow_all(&mut self) {
        let bindings = Bindings::new(&self.channels);
        let seen = self.backends.seen(&bindings);
        let enough = self.desired.slots.follow(&self.desired.policy, seen, Instant::now());
        if !enough && !self.unnumbered {
            log::error!(
                "there are not enough numbers for all backends; some get no packets until others are free"
            );
        }
        self.unnumbered = !enough;
    }

    /// Makes a changed policy hold, or puts the old one back, numbers included; the reply that then replaces each OK.
    fn adopt(&mut self, before: Desired) -> Result<(), String> {
        let enough = self.follow(&before.policy);
        let changed = self.desired.changed(&before);
        // What changes nothing holds already, unless nothing holds.
        if changed.is_empty() && self.enforcer.broken().is_none() {
            return Ok(());
        }
        let result = if enough {
            self.enforcer
                .enforce(&self.desired)
                .map_err(|error| format!("ERR internal the host cannot enforce it: {error}"))
        } else {
            Err("ERR quota this middlebox has changed its services too often; numbers of its backends are free again two hours after each change".to_string())
        };
        match &result {
            Ok(()) => {
                let mut backends = changed.iter().flat_map(|mac| self.desired.slots.of(*mac));
                if backends.any(|(_, slot)| slot.mac.is_none()) {
                    self.soon = SOON;
                }
            }
            Err(error) => {
                // A guest that has used up its numbers is not to fill a disk.
                log::log!(if enough { log::Level::Error } else { log::Level::Debug }, "{error}");
                self.desired.policy = before.policy;
                self.desired.slots.put_back(before.slots, Instant::now());
                self.enforcer.take_back(&self.desired);
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
            let replies = match self.obey(at, &frames) {
                Ok(replies) => replies,
                Err(error) if frames.len() == 1 => vec![error],
                // The one that cannot be made to hold does not take the others with it.
                Err(_) => {
                    let each = frames.iter().map(std::slice::from_ref);
                    each.flat_map(|frame| self.obey(at, frame).unwrap_or_else(|error| vec![error])).collect()
                }
            };
            let answered: Vec<(Frame, String)> = frames.into_iter().zip(replies).collect();
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

    /// Makes commands hold, all at once, and gives the replies; an error if the host cannot enforce them, and then none holds.
    fn obey(&mut self, channel: usize, frames: &[Frame]) -> Result<Vec<String>, String> {
        let before = self.desired.clone();
        let (mut replies, mut obeyed) = (Vec::new(), Vec::new());
        for frame in frames {
            replies.push(match self.command(channel, frame) {
                Ok(Command::Query { mac }) => self.answer(channel, mac),
                Ok(command) => {
                    let reply = format!("OK {command}");
                    obeyed.push(command);
                    reply
                }
                Err(reply) => reply,
            });
        }
        if !obeyed.is_empty() {
            self.adopt(before)?;
            let result = self.state.append(&obeyed, &self.desired.policy);
            self.saved(result);
        }
        Ok(replies)
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
        self.enforcer.count();
        let bound = self.channels.get(channel).map(|channel| channel.spec().macs.clone()).unwrap_or_default();
        let registered = self.desired.policy.middleboxes().keys().copied();
        let wanted: Vec<MacAddr> = match mac {
            Some(mac) => vec![mac],
            None if bound.is_empty() => registered.take(LONGEST_ANSWER).collect(),
            None => bound,
        };
        let mut text = "OK".to_string();
        let bindings = Bindings::new(&self.channels);
        for middlebox in wanted.iter().filter_map(|mac| self.middlebox_status(*mac, &bindings)) {
            let rule =
                |rule: &RuleStatus| format!("{} packets {} bytes {}", rule.rule, rule.packets, rule.bytes);
            let heading =
                format!("{} packets {} bytes {}", middlebox.mac, middlebox.packets, middlebox.bytes);
            let backends = middlebox.services.iter().flat_map(|service| {
                service.backends.iter().map(|backend| {
                    format!(
                        "{} -> {} {} weight {} flows {} packets {} bytes {}",
                        service.vip,
                        backend.backend,
                        backend.state.name(),
                        backend.weight,
                        backend.flows,
                        backend.packets + backend.reply_packets,
                        backend.bytes + backend.reply_bytes
                    )
                })
            });
            let parts =
                [heading].into_iter().chain(middlebox.commands).chain(middlebox.rules.iter().map(rule));
            let parts = parts.chain(backends);
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

    /// What the channel's own binding says, and that it does not redirect to a middlebox of another channel: the replies
    /// of that would be its to disturb.
    fn authorise(&self, at: usize, line: &str) -> Result<(), CommandError> {
        let Some(channel) = self.channels.get(at) else { return Ok(()) };
        let command = channel.authorise(line)?;
        let of_others = |mac: &MacAddr| {
            let others = self.channels.iter().enumerate().filter(|(other, _)| *other != at);
            !channel.spec().macs.contains(mac)
                && others.into_iter().any(|(_, other)| other.spec().macs.contains(mac))
        };
        let is_theirs = |ip: IpAddr| {
            self.desired.policy.middleboxes().iter().any(|(mac, middlebox)| {
                let registered =
                    middlebox.ip() == Some(ip) || middlebox.services().keys().any(|vip| vip.ip == ip);
                registered && of_others(mac)
            })
        };
        let denied =
            command.destinations().find(|(_, to)| to.mac.as_ref().is_some_and(of_others) || is_theirs(to.ip));
        let Some((word, _)) = denied else { return Ok(()) };
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

    fn look_around(&mut self) {
        if self.backends.look(&self.desired.policy) || self.unnumbered {
            // What those have counted that go now.
            self.enforcer.count();
            self.follow_all();
            self.enforcer.refresh();
        }
        self.enforcer.expire();
        self.enforcer.look_around(&self.desired);
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
        self.name_those_out_of_bounds();
    }

    /// Names what bindings would not allow now. It stays: who registered it may have been allowed to, as the operator is.
    fn name_those_out_of_bounds(&self) {
        let bindings = Bindings::new(&self.channels);
        for (mac, vip, _, name, _) in self.desired.policy.backends() {
            if !bindings.allow(mac, name.ip) {
                log::warn!(
                    "{mac} {vip} -> {name}: its channel may not redirect there; what was registered before \
                     stays, 'X {mac} L {vip}' ends it"
                );
            }
        }
    }

    /// The state of one middlebox, if it is registered.
    fn middlebox_status(&self, mac: MacAddr, bindings: &Bindings<'_>) -> Option<MiddleboxStatus> {
        let middlebox = self.desired.policy.get(mac)?;
        let (packets, bytes) = self.enforcer.to_middlebox(mac);
        let firewall = middlebox.firewall();
        let looked_at: BTreeMap<RuleId, String> = firewall
            .filter(|_| self.enforcer.options().fast_path == FastPath::Full)
            .map(|_| {
                one_by_one(mac, middlebox).into_iter().map(|(rule, why)| (rule, why.to_string())).collect()
            })
            .unwrap_or_default();
        let rule = |rule: Option<RuleId>| {
            let (packets, bytes) = self.enforcer.by_rule(mac, rule);
            let name = rule.map_or("default".to_string(), |rule| rule.to_string());
            let one_by_one = rule.and_then(|rule| looked_at.get(&rule).cloned());
            RuleStatus { rule: name, packets, bytes, one_by_one }
        };
        let services = middlebox
            .services()
            .iter()
            .map(|(vip, service)| self.service_status(mac, vip, service, bindings));
        Some(MiddleboxStatus {
            mac: mac.to_string(),
            firewall: firewall.map(|firewall| firewall.ip().to_string()),
            packets,
            bytes,
            commands: middlebox.commands(mac).iter().map(ToString::to_string).collect(),
            rules: rules(middlebox).map(rule).collect(),
            services: services.collect(),
        })
    }

    fn service_status(
        &self,
        middlebox: MacAddr,
        vip: &Vip,
        service: &Service,
        bindings: &Bindings<'_>,
    ) -> ServiceStatus {
        let backend = |(name, backend): (&BackendName, &Backend)| {
            let key = SlotKey { middlebox, vip: *vip, backend: *name };
            let slot = self.desired.slots.get(&key);
            let seen = self.backends.seen(bindings)(middlebox, vip, service, name);
            let ((packets, bytes), (reply_packets, reply_bytes)) = self.enforcer.of_backend(&key);
            let mac = backend.mac.or(seen.mac);
            BackendStatus {
                backend: name.to_string(),
                mac: mac.map(|mac| mac.to_string()),
                state: match () {
                    () if !seen.alive && service.method().is_pool() => BackendState::Dead,
                    () if mac.is_none() => BackendState::Unresolved,
                    () if backend.draining => BackendState::Draining,
                    () => BackendState::Up,
                },
                weight: backend.weight,
                flows: slot.map_or(0, |slot| self.enforcer.flows().live(slot.index)),
                packets,
                bytes,
                reply_packets,
                reply_bytes,
                unchecked: self.backends.unchecked(service, name, backend).map(str::to_string),
            }
        };
        ServiceStatus {
            vip: vip.to_string(),
            method: service.method().to_string(),
            backends: service.backends().iter().map(backend).collect(),
        }
    }

    fn status(&mut self) -> Status {
        self.enforcer.count();
        let bindings = Bindings::new(&self.channels);
        let queue = |worker: &Worker| QueueStatus {
            queue: worker.queue,
            alive: worker.is_alive(),
            packets: worker.counts.packets.load(Relaxed),
            dropped: worker.counts.dropped.load(Relaxed),
            refused: worker.counts.refused.load(Relaxed),
            redirected: worker.counts.redirected.load(Relaxed),
            replies: worker.counts.replies.load(Relaxed),
            overruns: worker.counts.overruns.load(Relaxed),
        };
        let channel = |channel: &Channel| ChannelStatus {
            path: channel.spec().path.display().to_string(),
            macs: channel.spec().macs.iter().map(MacAddr::to_string).collect(),
            error: channel.error().map(ToString::to_string),
        };
        let options = *self.enforcer.options();
        Status {
            version: env!("CARGO_PKG_VERSION").to_string(),
            pid: std::process::id(),
            steer: options.steer.name().to_string(),
            fast_path: options.fast_path.name().to_string(),
            fail: if options.queues.bypass { "open" } else { "closed" }.to_string(),
            queues: self.enforcer.workers().iter().map(queue).collect(),
            middleboxes: (self.desired.policy.middleboxes().keys())
                .filter_map(|mac| self.middlebox_status(*mac, &bindings))
                .collect(),
            channels: self.channels.iter().map(channel).collect(),
            flows: FlowsStatus {
                count: self.enforcer.flows().len(),
                capacity: self.enforcer.flows().capacity(),
                given_up: self.enforcer.flows().evicted().0,
                given_up_established: self.enforcer.flows().evicted().1,
                not_cached: self.enforcer.full_maps().clone(),
            },
            repairs: self.enforcer.repairs(),
            repair_error: self.enforcer.broken().map(str::to_string),
            state: self.state.path().display().to_string(),
            state_error: self.unsaved.as_ref().map(ToString::to_string),
        }
    }
}

/// The MACs that an nfqd before had found itself. One that a command says is good for its own service only: who may speak for a
/// middlebox shall not say where those of others find their backends.
fn found_before(policy: &Policy, macs: &BTreeMap<SlotKey, MacAddr>) -> BTreeMap<IpAddr, MacAddr> {
    let was_found = |key: &SlotKey| {
        let service = policy.get(key.middlebox).and_then(|middlebox| middlebox.services().get(&key.vip));
        let backend = service.and_then(|service| service.backends().get(&key.backend));
        backend.is_some_and(|backend| backend.mac.is_none())
    };
    macs.iter().filter(|(key, _)| was_found(key)).map(|(key, mac)| (key.backend.ip, *mac)).collect()
}

/// Takes over a flow that the kernel remembers.
fn take_over(memory: &Memory, reply: &Reply) {
    let Reply { source, destination: client, protocol, ports, index, slot, ends } = *reply;
    let vport = slot.ports().map_or(ports.source, |(own, _)| own);
    let forward = Forward {
        middlebox: slot.middlebox,
        client,
        vip: slot.vip.ip,
        protocol,
        ports: Ports { source: ports.destination, destination: vport },
    };
    let state = match protocol {
        Protocol::TCP if ends => FlowState::Closing,
        Protocol::TCP => FlowState::Established,
        _ => FlowState::Datagram,
    };
    let backward = Backward { backend: source, client, protocol, ports };
    memory.flows.insert(forward, Some(backward), index, state, 0);
}

/// The CPU time that this thread has used.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
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
/// nothing, nor does `R L` of a pool that chooses in the same way: rules and backends that were added since stay.
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
        // A pool's backends may have been changed since.
        Command::RegisterBalance { mac, vip, balance } if balance.method.is_pool() => {
            let service = policy.get(*mac).and_then(|middlebox| middlebox.services().get(vip));
            service.is_some_and(|service| {
                service.method() == balance.method && *service.terms() == balance.terms
            })
        }
        // What is to go has gone.
        Command::EditBackends { edit: Edit::Remove(_), .. } => {
            policy.clone().obey(command, "").is_err_and(|error| error.code == ErrorCode::UnknownBackend)
        }
        _ => false,
    });
    if !errors.is_empty() {
        return Err(StartError::Input(errors.join("\n")));
    }
    *policy = changed;
    Ok(())
}
