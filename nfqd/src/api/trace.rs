//! The trace of a packet: what would happen to it, and why.

use serde::{Deserialize, Serialize};

/// A packet to trace.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct TraceRequest {
    /// The Ethernet frame, or its beginning, in hexadecimal digits.
    pub frame: String,
    /// The length of the whole frame in bytes, if it is longer.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub length: Option<usize>,
    /// The network that it is on, as `BRIDGE` or `BRIDGE vlan ID`; that of the middlebox with its
    /// destination MAC if there is none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub network: Option<String>,
}

/// The treatment that a packet would get now, and the reason.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Trace {
    /// The packet in words.
    pub packet: String,
    /// The network that it is on.
    pub network: Option<String>,
    /// The MAC of the registered middlebox that it is sent to.
    pub middlebox: Option<String>,
    /// The names in `nft list ruleset` that it meets in the kernel, with what they do.
    pub kernel: Vec<String>,
    /// The rules that were looked at, in order, up to the one that matches.
    pub rules: Vec<RuleTrace>,
    /// The service that takes it, and why, or why none does.
    pub service: Option<String>,
    /// Whether it belongs to a flow that is known.
    pub known_flow: bool,
    /// The backend that it is sent to.
    pub to: Option<TargetTrace>,
    /// The translation of the replies, or of this one.
    pub reply: Option<String>,
    /// The fields that mattered: a packet that has the same gets the same answer.
    pub depends_on: Vec<String>,
    /// The verdict: `accept`, `drop` or `redirect`.
    pub verdict: String,
    /// The name of the reason, of a closed list.
    pub reason: String,
    /// The reason in words.
    pub explanation: String,
    /// The rule that has decided: `#1` denies, `+1` allows.
    pub rule: Option<String>,
}

/// A rule that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RuleTrace {
    /// The name: `#1` denies, `+1` allows, `default` is what no rule matches.
    pub rule: String,
    /// Whether it matches.
    pub matches: bool,
    /// The reason.
    pub why: String,
}

/// The backend of a packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TargetTrace {
    /// The MAC.
    pub mac: Option<String>,
    /// The address.
    pub ip: String,
    /// The port, if it differs.
    pub port: Option<u16>,
}
