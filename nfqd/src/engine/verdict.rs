//! The engine's verdicts, and the marks that tell them to the kernel.

use nfqd_rules::SlotId;
use nfqd_rules::mark::{self, Operation};
use nfqd_rules::rewrite::Side;
use nfqd_rules::slots::SlotKey;
use nfqd_shmctl::RuleId;
use std::net::IpAddr;

/// The engine's decision on a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// The verdict.
    pub verdict: Verdict,
    /// The rule of the packet's middlebox that allowed or denied it.
    pub rule: Option<RuleId>,
}

/// A translation between a frontend and a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The slot.
    pub slot: SlotId,
    /// The backend that the slot stands for.
    pub key: SlotKey,
    /// Whether the port is translated as well.
    pub port: bool,
    /// The change of the kernel's cache.
    pub cache: CacheAction,
    /// Whether connection tracking would see the packet before it is redirected, so that it has to be
    /// redirected there first.
    pub tracked: bool,
}

/// The change of the kernel's cache for the flow of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheAction {
    /// Nothing.
    None,
    /// Add the flow.
    Install,
    /// Add the flow for a few seconds only: it is closing.
    Expire,
    /// Remove the entries of an earlier flow with these addresses and ports.
    Invalidate,
}

/// A translation of the packet that an ICMP error quotes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QuotedTranslation {
    /// The address that changes.
    pub side: Side,
    /// The new address.
    pub ip: IpAddr,
    /// The new port, if it changes.
    pub port: Option<u16>,
}

/// The engine's verdict on a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Accept it unchanged.
    Accept(AcceptReason),
    /// Drop it.
    Drop(DropReason),
    /// Drop it, and tell its sender.
    Reject(DropReason),
    /// Send it to a backend.
    Redirect(Translation),
    /// Translate a packet of a backend, so that it comes from the frontend.
    Reply(Translation),
    /// Translate what an ICMP error about a packet of a flow quotes. The error goes to the backend,
    /// comes from it, or is from a router on the way.
    Error {
        /// The translation of what it quotes.
        quote: QuotedTranslation,
        /// The translation of an error to the backend.
        to: Option<Translation>,
        /// The translation of an error from the backend.
        from: Option<Translation>,
    },
    /// Accept a packet of a flow of a backend itself, and have the kernel cache that.
    Bypass,
    /// Accept a packet of a connection of the middlebox itself, and have the kernel cache that
    /// under this slot of the service.
    Local(SlotId),
    /// Hold a later fragment until the first one arrives.
    AwaitFirstFragment,
}

/// The reason a packet is accepted unchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AcceptReason {
    /// The destination MAC is not a middlebox, and the packet is not a reply.
    NotForMiddlebox,
    /// No rule denies it and no service takes it.
    NoMatch,
    /// The packet belongs to a conversation that the middlebox itself has begun.
    OwnConversation,
    /// The packet belongs to a TCP connection of the middlebox itself, from before the service.
    LocalConnection,
    /// The packet belongs to a flow of a backend itself.
    BackendsOwn,
    /// A service takes it, but the backend's MAC is not known yet.
    BackendUnresolved,
    /// A service takes it but has no backend for it, and passes it to the middlebox in that case.
    NoBackend,
}

/// The reason a packet is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DropReason {
    /// The filters of its middlebox deny it.
    Filtered,
    /// The MACs of the backends are not known yet; the sender will try again.
    BackendUnresolved,
    /// No backend can take a new flow.
    NoBackend,
    /// The backend is dead or was removed, and the service ends flows in that case.
    BackendGone,
    /// The first fragment of its datagram was dropped.
    FirstFragmentDropped,
}

impl Verdict {
    /// Returns the mark that has the kernel carry out the verdict; `None` if the packet is dropped
    /// or held.
    pub fn mark(self, old: u32) -> Option<u32> {
        let redirect = |to: &Translation| {
            let operation = match to.cache {
                CacheAction::None => Operation::Redirect,
                CacheAction::Install => Operation::RedirectInstall,
                CacheAction::Expire => Operation::RedirectExpire,
                CacheAction::Invalidate => Operation::RedirectInvalidate,
            };
            if to.tracked { operation.tracked() } else { operation }
        };
        let reply = |from: &Translation| match from.cache {
            CacheAction::None | CacheAction::Invalidate => Operation::Reply,
            CacheAction::Install => Operation::ReplyInstall,
            CacheAction::Expire => Operation::ReplyExpire,
        };
        match &self {
            Verdict::Drop(_) | Verdict::Reject(_) | Verdict::AwaitFirstFragment => None,
            Verdict::Bypass => Some(mark::with(old, Operation::ReplyInstall, false, None)),
            Verdict::Local(slot) => Some(mark::with(old, Operation::Local, false, Some(*slot))),
            Verdict::Redirect(to) | Verdict::Error { to: Some(to), .. } => {
                Some(mark::with(old, redirect(to), to.port, Some(to.slot)))
            }
            Verdict::Reply(from) | Verdict::Error { from: Some(from), .. } => {
                Some(mark::with(old, reply(from), from.port, Some(from.slot)))
            }
            Verdict::Accept(_) | Verdict::Error { .. } => Some(mark::cleared(old)),
        }
    }
}
