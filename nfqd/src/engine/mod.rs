//! The engine: a packet, a snapshot of the policy, the flows and the time in; a verdict out. No
//! I/O.
//!
//! `pipeline` is the path of a packet: filters, ICMP errors, fragments, replies, services.
//! `balance` chooses backends. [`snapshot`] is what a verdict depends on, [`verdict`] what comes
//! out, [`reason`] why, [`flows`] the flow table; [`dry_run`] decides without a side effect.

mod balance;
pub mod dry_run;
pub mod expiring_map;
pub mod flow_meter;
pub mod flows;
mod pipeline;
pub mod reason;
pub mod snapshot;
#[cfg(test)]
mod tests;
pub mod verdict;

pub use pipeline::decide;
pub use snapshot::{FilterScope, Snapshot};

use expiring_map::ExpiringMap;
use flow_meter::FlowMeter;
use flows::FlowTable;
use nfqd_rules::{MiddleboxKey, NetworkId, SlotId};
use nfqd_shmctl::{Frontend, Protocol};
use std::net::IpAddr;
use verdict::Decision;

/// The engine's state between packets, which all workers share.
pub struct EngineState {
    /// The flow table.
    pub flows: FlowTable,
    /// The meter of new flows.
    pub new_flows: FlowMeter,
    /// The route of the first fragment of a datagram.
    fragments: ExpiringMap<FragmentKey, FragmentRoute>,
    /// The slot that the flows of a client go to, for services with affinity.
    affinity: ExpiringMap<(MiddleboxKey, Frontend, IpAddr), SlotId>,
}

/// Seconds that the route of a first fragment is remembered (RFC 791, reassembly: 15 s and up).
pub(super) const FRAGMENT_TIMEOUT: u32 = 30;

impl EngineState {
    /// A state with room for `capacity` flows.
    pub fn new(capacity: usize) -> EngineState {
        EngineState {
            flows: FlowTable::new(capacity),
            new_flows: FlowMeter::default(),
            fragments: ExpiringMap::new(capacity / 16),
            affinity: ExpiringMap::new(capacity / 4),
        }
    }
}

/// The datagram that a fragment belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct FragmentKey {
    network: NetworkId,
    /// The middlebox with services that the datagram goes to.
    middlebox: Option<MiddleboxKey>,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    id: u32,
}

/// The route of a first fragment: later fragments have no ports and follow it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FragmentRoute {
    Redirect(SlotId),
    Reply(SlotId),
    Unchanged,
    Dropped,
}

/// The origin of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ingress {
    /// The network that it is on.
    pub network: NetworkId,
    /// Whether it is of a conversation that the middlebox itself has begun.
    pub is_own: bool,
}

impl Ingress {
    /// A packet of the only network there is, of no conversation of the middlebox itself.
    pub const ANY: Ingress = Ingress { network: NetworkId::ANY, is_own: false };
}

/// The result of [`decide`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EngineResult {
    /// The decision on the packet.
    Decided(Decision),
    /// Another worker has handled the packet's flow under a newer snapshot than this one, which the
    /// packet must be decided by.
    RetryWithNewerSnapshot,
}

impl EngineResult {
    /// Returns the decision, unless the snapshot was outdated.
    pub fn decision(self) -> Option<Decision> {
        match self {
            EngineResult::Decided(decision) => Some(decision),
            EngineResult::RetryWithNewerSnapshot => None,
        }
    }
}
