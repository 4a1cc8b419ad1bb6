//! The state of a daemon.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The state of a daemon.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Status {
    /// The version of nfqd.
    pub version: String,
    /// The process id.
    pub pid: u32,
    /// The path of frames into the queues: `native` or `br-netfilter`.
    pub steer: String,
    /// The share of the work that the kernel does: `full` or `off`.
    pub fast_path: String,
    /// The treatment of queued packets without nfqd: `open` or `closed`.
    pub fail: String,
    /// The queues.
    pub queues: Vec<QueueStatus>,
    /// The shared memory regions.
    pub channels: Vec<ChannelStatus>,
    /// The flow table.
    pub flows: FlowTableStatus,
    /// The number of repairs after another program had changed our tables.
    pub repairs: u64,
    /// The reason our tables are not as they should be at the moment.
    pub repair_error: Option<String>,
    /// The reason frames do not reach the queues at the moment.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub steering_error: Option<String>,
    /// The path of the file of registrations.
    pub state: String,
    /// The files with registrations that an earlier start could not restore.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub rejected: Vec<String>,
    /// The reason registrations are not saved at the moment.
    pub state_error: Option<String>,
    /// The middleboxes. They come last: [`super::StatusLine`] adds one after the other.
    pub middleboxes: Vec<MiddleboxStatus>,
}

/// The flow table.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct FlowTableStatus {
    /// The number of flows.
    pub count: usize,
    /// The largest number of flows.
    pub capacity: usize,
    /// Flows that were evicted for others because the table was full.
    pub evicted: u64,
    /// Established flows among them.
    pub evicted_established: u64,
    /// Packets whose flows the kernel could not cache, by the map. Their flows go through the engine
    /// until it can: a map may be full, or about to be enlarged.
    pub cache_full_packets: BTreeMap<String, u64>,
    /// The maps that were full then.
    #[serde(default)]
    pub full_maps: BTreeSet<String>,
}

/// A queue.
#[derive(Default, Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct QueueStatus {
    /// The number of the queue.
    pub queue: u16,
    /// Whether its worker runs.
    pub alive: bool,
    /// Packets received.
    pub packets: u64,
    /// Packets dropped, by filters or because no backend could take them.
    pub dropped: u64,
    /// Dropped packets whose senders were told that no backend takes them.
    pub rejected: u64,
    /// Packets sent to a backend.
    pub redirected: u64,
    /// Replies of backends that were translated.
    pub reply_translated: u64,
    /// The number of times the receive buffer overran, so that the kernel lost messages.
    pub overruns: u64,
}

/// A middlebox.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct MiddleboxStatus {
    /// The MAC.
    pub mac: String,
    /// The network that it is on, as `BRIDGE` or `BRIDGE vlan ID`; `None` if that is not known.
    #[serde(default)]
    pub network: Option<String>,
    /// The reason its network is not certain, or the middlebox is not enforced.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub network_problem: Option<String>,
    /// The traffic to it that its services do not take, and why.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub not_balanced: Option<String>,
    /// New flows a second, if there are very many: a flood.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub flood: Option<u32>,
    /// The address of the firewall service.
    pub firewall: Option<String>,
    /// Packets to it.
    pub packets: u64,
    /// Bytes to it, from the IP header on.
    pub bytes: u64,
    /// The commands that make its registration.
    pub commands: Vec<String>,
    /// The rules in the order of evaluation, and the default if that denies.
    pub rules: Vec<RuleStatus>,
    /// The load-balanced services.
    pub services: Vec<ServiceStatus>,
}

/// A rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct RuleStatus {
    /// The name: `#1` denies, `+1` allows, `default` is what no rule matches.
    pub rule: String,
    /// Packets that it has matched.
    pub packets: u64,
    /// Bytes that it has matched, from the IP header on.
    pub bytes: u64,
    /// The reason the rule is not in an indexed set, so that each packet of the middlebox is
    /// compared with it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub not_indexed: Option<String>,
}

/// A load-balanced service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ServiceStatus {
    /// The frontend: an address, or a port of one.
    pub vip: String,
    /// The balancing method, as in commands.
    pub method: String,
    /// Whether most backends began to fail their checks at once, so that the checks are doubted:
    /// those that had passed before still get new flows, for at most ten seconds.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub panic: bool,
    /// The backends.
    pub backends: Vec<BackendStatus>,
}

/// A backend of a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BackendStatus {
    /// The address, with the port if the service has one.
    pub backend: String,
    /// The MAC, once it is known.
    pub mac: Option<String>,
    /// The state.
    pub state: BackendState,
    /// The weight: its share of new flows beside the others'.
    pub weight: u16,
    /// Live flows.
    pub flows: u32,
    /// Packets to it.
    pub packets: u64,
    /// Bytes to it, from the IP header on.
    pub bytes: u64,
    /// Replies from it.
    pub reply_packets: u64,
    /// Bytes of replies.
    pub reply_bytes: u64,
    /// The reason the host cannot check whether it is alive.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub health_unknown_reason: Option<String>,
    /// The reason packets do not reach it on the middlebox' network, or not from everybody.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub network_problem: Option<String>,
    /// Whether it fails its checks. One that answers on its flows is not dead nevertheless.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub fails_checks: bool,
}

/// The state of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// The backend gets new flows.
    Up,
    /// The backend keeps its flows and gets no new ones.
    Draining,
    /// The backend fails its checks, but answers on its flows: it keeps them and gets no new ones.
    Failing,
    /// The backend fails its checks and answers nothing.
    Dead,
    /// The time that the backend had for its last flows is over.
    Drained,
    /// The backend's MAC is unknown.
    Unresolved,
}

impl BackendState {
    /// Returns the word for the state.
    pub fn name(self) -> &'static str {
        match self {
            BackendState::Up => "up",
            BackendState::Draining => "draining",
            BackendState::Failing => "failing",
            BackendState::Dead => "dead",
            BackendState::Drained => "drained",
            BackendState::Unresolved => "unresolved",
        }
    }
}

/// A shared memory region.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ChannelStatus {
    /// The path, or `vsock` and the CID.
    pub path: String,
    /// The way by which commands arrive: shm, doorbell or vsock.
    #[serde(default)]
    pub transport: String,
    /// Whether a VM is connected; `None` if that cannot be seen.
    #[serde(default)]
    pub connected: Option<bool>,
    /// The MACs that the guest may speak for; none means every one.
    pub macs: Vec<String>,
    /// The reason the channel is not read.
    pub error: Option<String>,
    /// Commands that its binding did not allow.
    #[serde(default)]
    pub denied: u64,
}
