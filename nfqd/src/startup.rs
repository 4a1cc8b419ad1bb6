//! Startup: from the configuration to a running daemon.

use crate::backends::{Backends, recovered_macs};
use crate::command_path::attached::AttachedChannels;
use crate::command_path::channel::{Channel, ChannelResources};
use crate::command_path::command_file::{CommandFileError, apply_startup_commands};
use crate::command_path::journal::{Journal, JournalError};
use crate::command_path::{ControlPlane, has_services};
use crate::config::{ChannelSpec, Config, ConfigError, DaemonArgs, FailChoice};
use crate::descriptor_store::DescriptorStore;
use crate::enforce::Enforcer;
use crate::enforce::queue_path::{QueuePathError, detect_queue_path};
use crate::engine::EngineState;
use crate::engine::flows::{FlowState, OriginalTuple, ReplyTuple, UDP_TIMEOUT};
use crate::host_lock::{HostLock, HostLockError};
use crate::limits::{self, LimitError};
use crate::networks::HostNetworks;
use crate::observe::control_socket::ControlSocket;
use crate::packet_path::queue::{Queue, QueueError};
use crate::packet_path::worker::Shared;
use crate::reactor::SignalFd;
use crate::supervisor::Supervisor;
use nfqd_rules::nft::kernel::{CachedReply, Kernel, KernelError};
use nfqd_rules::nft::model::Queues;
use nfqd_rules::nft::options::RulesetOptions;
use nfqd_rules::packet::Ports;
use nfqd_rules::service::BackendRef;
use nfqd_rules::slots::{BackendObservation, BackendView};
use nfqd_rules::{Desired, MiddleboxKey, NetworkId};
use nfqd_shmctl::{Protocol, RegionError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

/// The number of flows in the flow table.
const FLOWS: usize = 1 << 20;

/// The reason the daemon does not start, or stops.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The file of `--commands`.
    #[error(transparent)]
    Commands(#[from] CommandFileError),
    /// nftables.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The directory of registrations.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A limit of the process.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// Another nfqd.
    #[error(transparent)]
    HostLock(#[from] HostLockError),
    /// The path into the queues.
    #[error(transparent)]
    QueuePath(#[from] QueuePathError),
    /// Another error of the system.
    #[error("{what}: {source}")]
    System {
        /// The operation that failed.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
}

impl StartError {
    /// An error of the system.
    pub fn system(what: &str, source: impl Into<io::Error>) -> StartError {
        StartError::System { what: what.to_string(), source: source.into() }
    }

    /// Whether the input is wrong, as opposed to the system.
    pub fn is_input(&self) -> bool {
        matches!(self, StartError::Config(_) | StartError::Commands(_))
    }
}

/// Everything that a running daemon consists of.
pub struct Started {
    /// The configuration.
    pub config: Config,
    /// The control plane.
    pub plane: ControlPlane,
    /// The server of the control protocol.
    pub control: ControlSocket,
    /// SIGTERM, SIGINT and SIGHUP.
    pub signals: SignalFd,
    /// The lock of the network namespace.
    pub lock: HostLock,
    /// The service manager.
    pub supervisor: Supervisor,
}

/// Starts everything: reads the registrations, probes the kernel, binds the queues, loads the
/// ruleset, starts the workers. It takes over from an nfqd that ran before: base chains stay, and
/// cached flows keep their backends.
///
/// # Errors
/// See [`StartError`]. The kernel is as it was before.
pub fn start(args: &DaemonArgs) -> Result<Started, StartError> {
    let config = args.resolve()?;
    let attached = AttachedChannels::load(&config.state);
    limits::check(config.queues.count, config.channels.iter().chain(attached.specs()))?;
    let lock = HostLock::take()?;
    let journal = Journal::open(&config.state)?;
    let mut kernel = Kernel::open()?;
    let recovered = kernel.recover()?;
    // Networks keep their numbers: waiting packets carry them.
    let mut desired = Desired { networks: recovered.networks, ..Desired::default() };
    let errors = journal.load(&mut desired)?;
    for error in errors {
        log::error!("{error}; this registration is not restored");
    }
    apply_startup_commands(&mut desired, config.commands.as_deref())?;
    let resources = ChannelResources::new(DescriptorStore::open())
        .map_err(|errno| StartError::system("channels", errno))?;
    let resources = Rc::new(resources);
    let open = |spec| Channel::open(spec, &resources).refuse_mistake();
    let mut channels = config.channels.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let is_other =
        |spec: &&ChannelSpec| config.channels.iter().all(|its| its.transport != spec.transport);
    let others = attached.specs().filter(is_other);
    channels.extend(others.map(|spec| Channel::open(spec, &resources)));
    let control = ControlSocket::open(&config.sockets)
        .map_err(|error| StartError::system("control socket", error))?;
    let signals = SignalFd::new(&[SIGTERM, SIGINT, SIGHUP])
        .map_err(|error| StartError::system("signals", error))?;
    let queues = Queues {
        first: config.queues.first,
        count: config.queues.count,
        bypass: config.fail == FailChoice::Open,
    };
    let queue_path = detect_queue_path(&mut kernel, config.steer, queues)?;
    let options = RulesetOptions { queue_path, fast_path: config.fast_path, queues };
    let shared = Shared::new(FLOWS).map_err(|errno| StartError::system("event", errno))?;
    let shared = Arc::new(shared);
    // Bound before the ruleset sends packets there, so that none passes without a verdict.
    let supervisor = Supervisor::from_environment();
    let mut bound = Vec::new();
    for number in queues.first..=queues.first + (queues.count - 1) {
        let kept = resources.store().take(&descriptor_name(number));
        let adopted = kept.and_then(|socket| {
            let adopted = Queue::adopt(number, socket, queues.bypass);
            adopted.inspect_err(|error| log::warn!("{error}; the queue is bound anew")).ok()
        });
        let queue = match adopted {
            Some(queue) => queue,
            None => Queue::open(number, queues.bypass)?,
        };
        supervisor.store(&descriptor_name(number), queue.as_fd());
        bound.push(queue);
    }
    let mut host = HostNetworks::open(&config.bridges)
        .map_err(|errno| StartError::system("bridges and their ports", errno))?;
    host.describe(&mut desired.networks);
    let middleboxes: Vec<MiddleboxKey> = desired.policy.middleboxes().keys().copied().collect();
    host.place(middleboxes.iter().copied(), &mut desired.networks);
    for key in middleboxes {
        host.note_port(key, has_services(&desired.policy, key), &mut desired.networks);
    }
    desired.slots = recovered.slots;
    let mut placed = desired.clone();
    placed.slots.sync_all(&placed.policy, &Places(&host), Instant::now());
    let backends = Backends::start(recovered_macs(&placed, &recovered.macs))
        .map_err(|error| StartError::system("checks", error))?;
    let mut plane = ControlPlane {
        channels,
        resources,
        configured: config.channels.iter().map(|spec| spec.transport.clone()).collect(),
        attached,
        desired,
        host,
        backends,
        enforcer: Enforcer::new(kernel, options, shared)?,
        journal,
        unsaved: None,
        lacks_ids: false,
        has_new_backend: false,
        counter_pages: Default::default(),
    };
    plane.warn_about_binding_violations();
    plane.resync_slots();
    for reply in &recovered.replies {
        restore_flow(&plane.desired, plane.enforcer.engine_state(), reply);
    }
    plane.enforcer.begin(&plane.desired)?;
    for queue in bound {
        let what = format!("thread of queue {}", queue.number());
        plane.enforcer.serve(queue).map_err(|error| StartError::system(&what, error))?;
    }
    plane.save();
    if plane.attached.is_complete() {
        plane.resources.store().forget_earlier();
    }
    plane.has_new_backend = true;
    Ok(Started { config, plane, control, signals, lock, supervisor })
}

/// Returns the name under which the service manager keeps the socket of a queue.
fn descriptor_name(queue: u16) -> String {
    format!("queue{queue}")
}

/// A view of the places of middleboxes, before anything is known about backends.
struct Places<'a>(&'a HostNetworks);

impl BackendView for Places<'_> {
    fn observe(&self, _: &BackendRef<'_>, _: NetworkId) -> BackendObservation {
        BackendObservation::UNKNOWN
    }

    fn network(&self, middlebox: MiddleboxKey) -> NetworkId {
        self.0.network_of(middlebox)
    }
}

/// Restores a flow from its reply direction, which the kernel has cached.
fn restore_flow(desired: &Desired, state: &EngineState, cached: &CachedReply) {
    let CachedReply { source, destination: client, protocol, ports, slot, key, opening, closing } =
        *cached;
    let frontend_port = key.ports().map_or(ports.source, |(frontend, _)| frontend);
    let original = OriginalTuple {
        middlebox: key.middlebox,
        client,
        frontend: key.frontend.ip,
        protocol,
        ports: Ports { source: ports.destination, destination: frontend_port },
    };
    let flow_state = match protocol {
        Protocol::TCP if opening => FlowState::Opening,
        Protocol::TCP if closing => FlowState::Closing,
        Protocol::TCP => FlowState::Established,
        _ => FlowState::Datagram,
    };
    // A middlebox that is no longer registered has no flows.
    let Some(network) = desired.slots.network_of(key.middlebox) else { return };
    let reply = ReplyTuple { network, backend: source, client, protocol, ports };
    let its = desired.service(&key).and_then(|service| service.options().udp_timeout);
    let udp_timeout = its.unwrap_or(UDP_TIMEOUT);
    state.flows.insert(original, Some(reply), slot, (flow_state, udp_timeout), 0);
}
