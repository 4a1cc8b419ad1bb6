//! Decisions of the engine, as they happen.

use serde::{Deserialize, Serialize};

/// The decisions since the last request.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Observed {
    /// The number to ask for next.
    pub next: u64,
    /// The decisions, oldest first. A gap in their numbers says that some were lost.
    pub decisions: Vec<ObservedDecision>,
}

/// A decision of the engine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ObservedDecision {
    /// The number.
    pub number: u64,
    /// The time, in milliseconds since 1970.
    pub time_ms: u64,
    /// The queue.
    pub queue: u16,
    /// The network that the packet is on.
    pub network: Option<String>,
    /// The packet in words, as `nfqd trace` reads them.
    pub packet: String,
    /// The MACs: source, destination.
    pub macs: [String; 2],
    /// The addresses: source, destination; empty without an IP packet.
    pub addresses: Vec<String>,
    /// The ports: source, destination; empty without them.
    pub ports: Vec<u16>,
    /// The verdict: `accept`, `drop` or `redirect`.
    pub verdict: String,
    /// The name of the reason, of a closed list.
    pub reason: String,
    /// The rule that has decided.
    pub rule: Option<String>,
    /// The backend that it is sent to, or comes from.
    pub backend: Option<String>,
}
