//! The daemon: its event loop, which dispatches what the reactor reports.

use crate::api::{
    self, Answer, ChannelStatus, ErrorCode, Observed, Request, RequestError, Status, Trace,
    TraceRequest,
};
use crate::bindings::Bindings;
use crate::command_path::ControlPlane;
use crate::command_path::channel::Channel;
use crate::config::{Config, DaemonArgs, Transport};
use crate::engine::Ingress;
use crate::host_lock::HostLock;
use crate::observe::control_socket::{ClientId, ControlSocket, Interest, Progress, Socket};
use crate::observe::report::Report;
use crate::observe::status::{StatusSource, flow_table, host_devices, queues};
use crate::packet_path::worker::Worker;
use crate::rate_limiter::RateLimiter;
use crate::reactor::{Reactor, Readiness, SignalFd, Timer};
use crate::reload::reload;
use crate::startup::{StartError, Started, start};
use crate::supervisor::Supervisor;
use crate::trace::words::from_hex;
use crate::trace::{network_of, observed, trace};
use nfqd_rules::nft::options::RulesetOptions;
use nfqd_rules::packet::Packet;
use nfqd_shmctl::MacAddr;
use nix::errno::Errno;
use signal_hook::consts::SIGHUP;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The interval at which backends, the kernel's tables and unsaved registrations are checked.
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// The interval at which backends are resolved after a command has named a new one, and the number
/// of times.
const RESOLVE_INTERVAL: Duration = Duration::from_millis(100);
const RESOLVE_RETRIES: u32 = 10;

/// The token of each source of events.
mod token {
    pub(super) const SIGNALS: u64 = 0;
    pub(super) const TICK: u64 = 1;
    pub(super) const MAILBOXES: u64 = 2;
    pub(super) const NFTABLES: u64 = 3;
    pub(super) const WORKER_ENDED: u64 = 4;
    pub(super) const NETWORKS: u64 = 5;
    pub(super) const CHANNELS: u64 = 6;
    pub(super) const COUNTERS: u64 = 7;
    /// The listeners, by their place in `Socket::ALL`.
    pub(super) const LISTENERS: u64 = 16;
    /// The clients, by their number.
    pub(super) const CLIENTS: u64 = 1 << 32;
}

/// A running daemon.
pub struct Daemon {
    args: DaemonArgs,
    config: Config,
    plane: ControlPlane,
    control: ControlSocket,
    signals: SignalFd,
    reactor: Reactor,
    tick_timer: Timer,
    mailbox_timer: Timer,
    /// Ticks that are to come soon, because a backend is looked for.
    resolve_retries: u32,
    observed: Option<ObservedStatus>,
    /// The clients that have asked for the status, which is begun when the counters have been read.
    status_clients: Vec<ClientId>,
    report: Option<Report>,
    /// The devices of the host, of the time at which the status was begun.
    host_devices: BTreeSet<String>,
    observer_limiter: RateLimiter,
    start: Instant,
    supervisor: Supervisor,
    _lock: HostLock,
}

/// The status that observers get: it is made again when it is [`OBSERVE_AGE`] times as old as its
/// making took, so that they cost at most a tenth of the daemon's time.
struct ObservedStatus {
    line: Arc<Vec<u8>>,
    until: Instant,
}

/// Requests that all observers together may send in a second.
const OBSERVER_REQUESTS: u32 = 200;

/// The requests that a trace counts for.
const TRACE_COST: u32 = 8;

/// The most decisions of an answer.
const MAX_OBSERVED: usize = 500;

/// The age of the status that observers get, as a multiple of the time to make it.
const OBSERVE_AGE: u32 = 9;

impl Daemon {
    /// Starts a daemon, see [`start`].
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(args: &DaemonArgs) -> Result<Daemon, StartError> {
        let Started { config, plane, control, signals, lock, supervisor } = start(args)?;
        let system = |errno: Errno| StartError::system("reactor", errno);
        let daemon = Daemon {
            args: args.clone(),
            config,
            plane,
            control,
            signals,
            reactor: Reactor::new().map_err(system)?,
            tick_timer: Timer::new().map_err(system)?,
            mailbox_timer: Timer::new().map_err(system)?,
            resolve_retries: 0,
            observed: None,
            status_clients: Vec::new(),
            report: None,
            host_devices: BTreeSet::new(),
            observer_limiter: RateLimiter::new(OBSERVER_REQUESTS),
            start: Instant::now(),
            supervisor,
            _lock: lock,
        };
        daemon.register().map_err(system)?;
        Ok(daemon)
    }

    fn register(&self) -> Result<(), Errno> {
        let add = |fd, token| self.reactor.add(fd, Readiness::Readable, token);
        use std::os::fd::AsFd;
        add(self.signals.as_fd(), token::SIGNALS)?;
        add(self.tick_timer.as_fd(), token::TICK)?;
        add(self.mailbox_timer.as_fd(), token::MAILBOXES)?;
        add(self.plane.enforcer.monitor_fd(), token::NFTABLES)?;
        add(self.plane.enforcer.ended_fd(), token::WORKER_ENDED)?;
        add(self.plane.host.as_fd(), token::NETWORKS)?;
        add(self.plane.resources.as_fd(), token::CHANNELS)?;
        add(self.plane.enforcer.counters_fd(), token::COUNTERS)?;
        for (socket, fd) in self.control.listeners() {
            add(fd, token::LISTENERS + socket as u64)?;
        }
        Ok(())
    }

    /// Runs until SIGTERM or SIGINT. The ruleset stays, so the fast path goes on.
    ///
    /// # Errors
    /// If a queue is no longer served: started again, nfqd takes over what is there.
    pub fn run(mut self) -> Result<(), StartError> {
        let RulesetOptions { queue_path, fast_path, queues } = *self.plane.enforcer.options();
        log::info!(
            "ready: steer {}, fast path {}, queues {}-{}, {} middleboxes",
            queue_path.name(),
            fast_path.name(),
            queues.first,
            queues.first + (queues.count - 1),
            self.plane.desired.policy.middleboxes().len()
        );
        let count = self.plane.desired.policy.middleboxes().len();
        self.supervisor.notify(&format!("READY=1\nSTATUS={count} middleboxes"));
        let system = |errno: Errno| StartError::system("reactor", errno);
        self.tick_timer.set(Some(Instant::now() + TICK_INTERVAL)).map_err(system)?;
        loop {
            let next_poll = self.plane.channels.iter().filter_map(Channel::next_poll).min();
            self.mailbox_timer.set(next_poll).map_err(system)?;
            // A report goes on whenever there is nothing else to do, and by a slice when there is.
            let ready =
                if self.report.is_some() { self.reactor.ready() } else { self.reactor.wait() };
            for token in ready.map_err(system)? {
                if !self.dispatch(token)? {
                    self.supervisor.notify("STOPPING=1");
                    self.plane.suspend_channels();
                    self.plane.enforcer.stop();
                    return Ok(());
                }
                self.hasten_tick()?;
            }
            self.proceed_with_report();
        }
    }

    /// Handles an event. Returns false if the daemon is to exit.
    fn dispatch(&mut self, token: u64) -> Result<bool, StartError> {
        match token {
            token::SIGNALS => return Ok(self.handle_signals()),
            token::TICK => self.tick()?,
            token::MAILBOXES => {
                self.mailbox_timer.acknowledge();
                self.plane.poll_channels(Instant::now());
            }
            token::NFTABLES => {
                let plane = &mut self.plane;
                if let Some(wait) = plane.enforcer.repair_changes(&plane.desired) {
                    self.set_tick(wait)?;
                }
            }
            token::WORKER_ENDED => self.check_workers()?,
            token::NETWORKS => self.plane.follow_networks(),
            token::CHANNELS => self.plane.follow_channels(Instant::now()),
            token::COUNTERS => self.plane.enforcer.finish_reading_counters(),
            token if token >= token::CLIENTS => self.serve((token - token::CLIENTS) as ClientId),
            token => {
                for socket in Socket::ALL {
                    if token == token::LISTENERS + socket as u64 {
                        self.accept(socket);
                    }
                }
            }
        }
        Ok(true)
    }

    fn handle_signals(&mut self) -> bool {
        for signal in self.signals.pending() {
            if signal != SIGHUP {
                log::info!("exiting; the ruleset stays, 'nfqd flush' removes it");
                return false;
            }
            if let Err(error) = reload(&self.args, &mut self.config, &mut self.plane) {
                log::error!("{error}; the configuration stays as it was");
            }
        }
        true
    }

    fn tick(&mut self) -> Result<(), StartError> {
        self.tick_timer.acknowledge();
        self.plane.tick();
        let enforcer = &mut self.plane.enforcer;
        self.supervisor.keep_alive(Instant::now(), || enforcer.have_workers_moved());
        self.control.drop_stalled(Instant::now());
        if self.control.is_exhausted() {
            self.set_listeners(Readiness::Readable);
        }
        self.resolve_retries = self.resolve_retries.saturating_sub(1);
        let interval = if self.resolve_retries == 0 { TICK_INTERVAL } else { RESOLVE_INTERVAL };
        self.set_tick(interval)
    }

    /// Looks for backends soon if a command has named a new one.
    fn hasten_tick(&mut self) -> Result<(), StartError> {
        if !std::mem::take(&mut self.plane.has_new_backend) {
            return Ok(());
        }
        let is_waiting = self.resolve_retries != 0;
        self.resolve_retries = RESOLVE_RETRIES;
        if is_waiting { Ok(()) } else { self.set_tick(RESOLVE_INTERVAL) }
    }

    fn set_tick(&mut self, interval: Duration) -> Result<(), StartError> {
        let at = Instant::now() + interval;
        self.tick_timer.set(Some(at)).map_err(|errno| StartError::system("timer", errno))
    }

    fn check_workers(&self) -> Result<(), StartError> {
        let workers = self.plane.enforcer.workers();
        match workers.iter().find(|worker: &&Worker| !worker.is_alive()) {
            Some(worker) => {
                let source = std::io::Error::other("its thread ended, see above");
                Err(StartError::system(&format!("queue {}", worker.queue), source))
            }
            None => Ok(()),
        }
    }

    fn accept(&mut self, socket: Socket) {
        let Some(id) = self.control.accept(socket, Instant::now()) else {
            if self.control.is_exhausted() {
                self.set_listeners(Readiness::Paused);
            }
            return;
        };
        if let Some(fd) = self.control.client_fd(id) {
            let token = token::CLIENTS + u64::from(id);
            if let Err(errno) = self.reactor.add(fd, Readiness::Readable, token) {
                // The client is dropped when it has made no progress for some time.
                log::debug!("control socket: {errno}");
            }
        }
        self.serve(id);
    }

    /// Pauses the listeners, or ends that.
    fn set_listeners(&self, readiness: Readiness) {
        for (socket, fd) in self.control.listeners() {
            // The listeners were added at the start, so this does not fail.
            let _ = self.reactor.modify(fd, readiness, token::LISTENERS + socket as u64);
        }
    }

    /// Serves a ready client: one request at a time, so that it cannot keep others waiting.
    fn serve(&mut self, id: ClientId) {
        let now = Instant::now();
        let readiness = match self.control.proceed(id, now) {
            Progress::Asks(request) => {
                let is_observer = self.control.socket_of(id) == Some(Socket::Observe);
                let answer = if is_observer {
                    self.answer_observer(request)
                } else {
                    self.answer(request).map(|answer| line(&answer))
                };
                match answer {
                    Some(line) => {
                        self.control.answer(id, line, now);
                        Readiness::Writable
                    }
                    None => {
                        self.status_clients.push(id);
                        Readiness::Paused
                    }
                }
            }
            Progress::WantsStatus => {
                let status = api::legacy::status(&self.status());
                self.control.answer(id, Arc::new(status.into_bytes()), now);
                Readiness::Writable
            }
            Progress::Waits(Interest::Read) => Readiness::Readable,
            Progress::Waits(Interest::Write) => Readiness::Writable,
            Progress::Gone => return,
        };
        self.wait_for_client(id, readiness);
    }

    fn wait_for_client(&self, id: ClientId, readiness: Readiness) {
        if let Some(fd) = self.control.client_fd(id) {
            // This fails only for a client that could not be added, which is dropped in time.
            let _ = self.reactor.modify(fd, readiness, token::CLIENTS + u64::from(id));
        }
    }

    /// Returns the answer to a request; `None` for the status, which takes longer.
    fn answer(&mut self, request: Request) -> Option<Answer> {
        Some(match request {
            Request::Status => return None,
            Request::Trace(request) => match self.trace(&request) {
                Ok(trace) => Answer::Trace(Box::new(trace)),
                Err(error) => Answer::Error(error),
            },
            Request::Observe { since, most } => {
                Answer::Observed(Box::new(self.observe(since, most.min(MAX_OBSERVED))))
            }
            Request::Attach { channel } => match self.plane.attach(&channel) {
                Ok(()) => Answer::Attached {},
                Err(error) => {
                    Answer::Error(RequestError::new(ErrorCode::Failed, error.to_string()))
                }
            },
            Request::Detach { name } => match self.plane.detach(&name) {
                Ok(()) => Answer::Detached {},
                Err(error) => {
                    Answer::Error(RequestError::new(ErrorCode::Failed, error.to_string()))
                }
            },
            Request::Reload => match reload(&self.args, &mut self.config, &mut self.plane) {
                Ok(()) => Answer::Reloaded {},
                Err(error) => {
                    log::error!("{error}; the configuration stays as it was");
                    Answer::Error(RequestError::new(ErrorCode::Failed, error.to_string()))
                }
            },
        })
    }

    /// Answers an observer, or rejects its request if all of them together ask too often.
    /// `None` stands for the status, unless there is one that is new enough.
    fn answer_observer(&mut self, request: Request) -> Option<Arc<Vec<u8>>> {
        let now = self.start.elapsed().as_secs() as u32;
        if !self.observer_limiter.has_room(now) {
            let message = format!("more than {OBSERVER_REQUESTS} requests a second; ask later");
            return Some(line(&Answer::Error(RequestError::new(ErrorCode::Busy, message))));
        }
        self.observer_limiter.count();
        // A trace takes longer than another answer.
        for _ in 1..if matches!(request, Request::Trace(_)) { TRACE_COST } else { 1 } {
            self.observer_limiter.count();
        }
        if request != Request::Status {
            return self.answer(request).map(|answer| line(&answer));
        }
        let is_new = |observed: &&ObservedStatus| Instant::now() < observed.until;
        self.observed.as_ref().filter(is_new).map(|observed| Arc::clone(&observed.line))
    }

    /// Begins the report that clients have asked for, or makes a slice of it.
    fn proceed_with_report(&mut self) {
        let now = Instant::now();
        if self.report.is_none() && !self.status_clients.is_empty() {
            self.plane.enforcer.read_counters();
            if self.plane.enforcer.is_reading_counters() {
                self.status_clients.iter().for_each(|id| self.control.grant_time(*id, now));
                return;
            }
            self.host_devices = host_devices();
            let clients = std::mem::take(&mut self.status_clients);
            let size = self.observed.as_ref().map_or(0, |observed| observed.line.len());
            self.report = Some(Report::new(self.status_head(), clients, size));
        }
        let Some(report) = &mut self.report else { return };
        let plane = &self.plane;
        let bindings = Bindings::new(plane.channels.iter().map(Channel::spec));
        let view = plane.view(&bindings);
        let source = StatusSource::new(&plane.desired, &plane.enforcer, view, &self.host_devices);
        if !report.proceed(&source) {
            report.clients().iter().for_each(|id| self.control.grant_time(*id, now));
            return;
        }
        let Some(report) = self.report.take() else { return };
        let busy = report.busy;
        let (line, clients) = report.finish();
        let line = Arc::new(line);
        for id in clients {
            self.control.answer(id, Arc::clone(&line), now);
            self.wait_for_client(id, Readiness::Writable);
        }
        self.observed = Some(ObservedStatus { line, until: Instant::now() + busy * OBSERVE_AGE });
    }

    fn observe(&self, since: Option<u64>, most: usize) -> Observed {
        let snapshot = self.plane.enforcer.snapshot();
        let (recorded, next) = self.plane.enforcer.recorder().since(since, most);
        let decisions = recorded.iter().map(|one| observed(&snapshot, one)).collect();
        Observed { next, decisions }
    }

    fn trace(&mut self, request: &TraceRequest) -> Result<Trace, RequestError> {
        let wrong = |message: &str| RequestError::new(ErrorCode::Syntax, message);
        let frame = from_hex(&request.frame).ok_or_else(|| {
            wrong("the frame is not a sequence of hexadecimal digits, two a byte")
        })?;
        let length = request.length.unwrap_or(frame.len()).max(frame.len());
        let mut packet = Packet::from_captured_frame(&frame, length)
            .ok_or_else(|| wrong("the frame is shorter than an Ethernet header"))?;
        let snapshot = self.plane.enforcer.snapshot();
        let network = match &request.network {
            None => network_of(&snapshot, &packet),
            Some(name) => {
                let names = snapshot.desired().networks.names();
                let found =
                    names.filter(|(_, its)| its.to_string() == *name).map(|(id, _)| id).next();
                found.ok_or_else(|| {
                    let message = format!(
                        "'{name}' is no network that nfqd knows; write BRIDGE or BRIDGE vlan ID"
                    );
                    RequestError::new(ErrorCode::Failed, message)
                })?
            }
        };
        // The kernel sends a packet to a registered address in a frame to a group to its middlebox.
        if let Some(ip) = packet.ip.filter(|_| packet.link.destination.is_group())
            && let Some(owner) = snapshot.desired().slots.owner(network, ip.destination)
        {
            packet.link.destination = owner.mac;
        }
        let is_own = self.plane.enforcer.has_begun(&snapshot, network, &packet);
        let ingress = Ingress { network, is_own };
        let (state, now) = (self.plane.enforcer.engine_state(), self.plane.enforcer.now());
        Ok(trace(&snapshot, state, ingress, &packet, now))
    }

    /// Returns the whole status at once, for clients of the earlier protocol.
    fn status(&mut self) -> Status {
        self.plane.enforcer.read_counters();
        let plane = &self.plane;
        let bindings = Bindings::new(plane.channels.iter().map(Channel::spec));
        let devices = host_devices();
        let view = plane.view(&bindings);
        let source = StatusSource::new(&plane.desired, &plane.enforcer, view, &devices);
        Status { middleboxes: source.middleboxes(), ..self.status_head() }
    }

    /// Returns the status without middleboxes.
    fn status_head(&self) -> Status {
        let plane = &self.plane;
        let options = plane.enforcer.options();
        Status {
            version: env!("CARGO_PKG_VERSION").to_string(),
            pid: std::process::id(),
            steer: options.queue_path.name().to_string(),
            fast_path: options.fast_path.name().to_string(),
            fail: if options.queues.bypass { "open" } else { "closed" }.to_string(),
            queues: queues(&plane.enforcer),
            channels: plane.channels.iter().map(channel_status).collect(),
            flows: flow_table(&plane.enforcer),
            repairs: plane.enforcer.repairs(),
            steering_error: plane.enforcer.steering_error().map(str::to_string),
            repair_error: plane.enforcer.broken().map(str::to_string),
            state: plane.journal.path().display().to_string(),
            rejected: plane
                .journal
                .rejected()
                .iter()
                .map(|path| path.display().to_string())
                .collect(),
            state_error: plane.unsaved.as_ref().map(ToString::to_string),
            middleboxes: Vec::new(),
        }
    }
}

fn line(answer: &Answer) -> Arc<Vec<u8>> {
    Arc::new(answer.to_line().into_bytes())
}

fn channel_status(channel: &Channel) -> ChannelStatus {
    ChannelStatus {
        path: channel.spec().transport.to_string(),
        transport: match &channel.spec().transport {
            Transport::Shm(_) => "shm",
            Transport::Doorbell(_) => "doorbell",
            Transport::Vsock(_) => "vsock",
        }
        .to_string(),
        connected: channel.is_connected(),
        macs: channel.spec().macs.iter().map(MacAddr::to_string).collect(),
        error: channel.error(),
        denied: channel.denied(),
    }
}
