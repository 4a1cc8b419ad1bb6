//! The options that a ruleset depends on besides the policy.

use super::model::{Family, Queues};

/// The path of frames from the bridge into the engine's queues.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QueuePath {
    /// The `queue` expression in the bridge family.
    Native,
    /// A mark, br_netfilter, and the xt target NFQUEUE in the ip and ip6 families.
    BrNetfilter,
}

impl QueuePath {
    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            QueuePath::Native => "native",
            QueuePath::BrNetfilter => "br-netfilter",
        }
    }
}

/// The share of the work that the kernel does without the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FastPath {
    /// Everything that the kernel can do.
    Full,
    /// Nothing: every frame to a middlebox goes to the engine.
    Off,
}

impl FastPath {
    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FastPath::Full => "full",
            FastPath::Off => "off",
        }
    }
}

/// The options of a ruleset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RulesetOptions {
    /// The path of frames into the queues.
    pub queue_path: QueuePath,
    /// The share of the work that the kernel does.
    pub fast_path: FastPath,
    /// The queues of the engine, and the treatment of packets without it.
    pub queues: Queues,
}

impl RulesetOptions {
    /// Whether the engine filters although it sees neither VLAN tags nor frames that are not IP.
    /// The kernel then filters where rules depend on these.
    pub fn engine_is_blind(&self) -> bool {
        self.fast_path == FastPath::Off && self.queue_path == QueuePath::BrNetfilter
    }

    /// Returns the families of the tables that queue bridged packets.
    pub(super) fn queueing_families(&self) -> &'static [Family] {
        match self.queue_path {
            QueuePath::Native => &[],
            QueuePath::BrNetfilter => &[Family::Ip, Family::Ip6],
        }
    }

    /// Whether the kernel filters at all: without the fast path the engine does, where it sees
    /// every frame.
    pub(super) fn kernel_filters(&self) -> bool {
        self.fast_path == FastPath::Full || self.engine_is_blind()
    }
}
