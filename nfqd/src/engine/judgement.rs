//! What the engine says about a packet, and the mark that tells the kernel.

use nfqd_rules::mark::{self, Operation};
use nfqd_rules::rewrite::Side;
use nfqd_rules::slots::SlotKey;
use nfqd_shmctl::RuleId;
use std::net::IpAddr;

/// What the engine says about a packet, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judged {
    /// What it says.
    pub judgement: Judgement,
    /// The rule of its middlebox that let it pass, or that dropped it.
    pub rule: Option<RuleId>,
}

/// A backend's side of a translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct To {
    /// The slot's number.
    pub slot: u32,
    /// What it stands for.
    pub key: SlotKey,
    /// Whether the port is translated, too.
    pub port: bool,
    /// What the kernel may remember.
    pub learn: Learn,
}

/// What the kernel may remember of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Learn {
    /// Nothing.
    No,
    /// The flow.
    Yes,
    /// That it ends.
    Close,
    /// Nothing, and what it remembers of another flow with these addresses and ports is to be forgotten.
    Forget,
}

/// How the packet that an ICMP error quotes is rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Quote {
    /// Which of its addresses.
    pub side: Side,
    /// The address it gets.
    pub ip: IpAddr,
    /// The port it gets.
    pub port: Option<u16>,
}

/// What the engine says about a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// It goes on unchanged.
    Accept(Reason),
    /// It is dropped.
    Drop(DropReason),
    /// It is dropped, and its sender is told so.
    Reject(DropReason),
    /// It goes to a backend.
    Redirect(To),
    /// It comes back from a backend, and its source becomes the address that the client knows.
    Reply(To),
    /// It is an ICMP error about a packet of a flow: what it quotes is translated. It goes to the backend, comes from it,
    /// or is from somebody on the way.
    Error {
        /// How what it quotes is rewritten.
        quote: Quote,
        /// To the backend.
        to: Option<To>,
        /// From the backend.
        from: Option<To>,
    },
    /// It is a backend's own; the kernel may remember that.
    Direct,
    /// It is of a connection that the middlebox has itself, in the service of this slot; the kernel may remember that.
    Pass(u32),
    /// It is a later piece of a datagram whose first piece has not come: it waits for that.
    Hold,
}

/// Why a packet goes on unchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// Its destination MAC is no middlebox', and it is no reply.
    NotOurs,
    /// No deny rule matches and no service takes it.
    NoMatch,
    /// A service takes it, but the backend's MAC is not known yet.
    BackendUnresolved,
    /// A service takes it, but has no backend for it, and says that the middlebox gets it then.
    NoBackend,
}

/// Why a packet is dropped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DropReason {
    /// The filters of its middlebox say so.
    Filtered,
    /// The MACs of the backends are not known yet; who sends it will try again.
    BackendUnresolved,
    /// No backend can take a new flow.
    NoBackend,
    /// Its backend is dead or was removed, and its service ends flows then.
    BackendGone,
    /// The datagram that it is a piece of was dropped.
    Piece,
    /// Another worker has looked at its flow by a newer snapshot than this one: it is to be judged by that.
    Outdated,
}

impl Judgement {
    /// The mark that tells the kernel to carry it out; `None` drops the packet, or lets it wait.
    pub fn mark(self, old: u32) -> Option<u32> {
        let redirect = |to: &To| match to.learn {
            Learn::No => Operation::Redirect,
            Learn::Yes => Operation::RedirectLearn,
            Learn::Close => Operation::RedirectClose,
            Learn::Forget => Operation::RedirectOpen,
        };
        let reply = |to: &To| match to.learn {
            Learn::No | Learn::Forget => Operation::Reply,
            Learn::Yes => Operation::ReplyLearn,
            Learn::Close => Operation::ReplyClose,
        };
        match &self {
            Judgement::Drop(_) | Judgement::Reject(_) | Judgement::Hold => None,
            Judgement::Direct => Some(mark::with(old, Operation::ReplyLearn, false, 0)),
            Judgement::Pass(slot) => Some(mark::with(old, Operation::Pass, false, *slot)),
            Judgement::Redirect(to) | Judgement::Error { to: Some(to), .. } => {
                Some(mark::with(old, redirect(to), to.port, to.slot))
            }
            Judgement::Reply(to) | Judgement::Error { from: Some(to), .. } => {
                Some(mark::with(old, reply(to), to.port, to.slot))
            }
            Judgement::Accept(_) | Judgement::Error { .. } => Some(mark::cleared(old)),
        }
    }
}
