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

impl ObservedDecision {
    /// Returns the time of day (UTC), in milliseconds: `01:02:03.004`.
    pub fn time_of_day(&self) -> String {
        let (seconds, ms) = (self.time_ms / 1000, self.time_ms % 1000);
        let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        format!("{h:02}:{m:02}:{s:02}.{ms:03}")
    }

    /// Returns the reason, with the rule and the backend if there are any.
    pub fn explanation(&self) -> String {
        let rule = self.rule.as_ref().map(|rule| format!(" {rule}")).unwrap_or_default();
        let backend = self.backend.as_ref().map(|name| format!(" -> {name}")).unwrap_or_default();
        format!("{}{rule}{backend}", self.reason)
    }
}
