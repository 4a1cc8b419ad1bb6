//! The closed list of reasons for which packets are accepted, redirected and dropped.

use super::verdict::{AcceptReason, Decision, DropReason, Verdict};
use nfqd_shmctl::Action;

/// The reason of a decision.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Reason {
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
    /// A service takes it, but the backend's MAC is not known; the middlebox gets it.
    BackendUnresolvedPassed,
    /// A service has no backend for it; the middlebox gets it.
    NoBackendPassed,
    /// A service sends it to a backend.
    Service,
    /// The packet is a reply of a redirected flow.
    Reply,
    /// The packet is an ICMP error about a redirected flow.
    FlowError,
    /// A deny rule matches.
    DenyRule,
    /// No allow rule matches, and the middlebox is closed.
    DefaultDeny,
    /// The packet may hide the fields that rules compare.
    TransportHidden,
    /// The MACs of the backends are not known.
    BackendUnresolved,
    /// No backend can take it.
    NoBackend,
    /// Its backend is dead or was removed.
    BackendGone,
    /// The first fragment of its datagram was dropped.
    FirstFragmentDropped,
    /// The first fragment of its datagram has not come.
    FirstFragmentMissing,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Reason; 18] = [
        Reason::NotForMiddlebox,
        Reason::NoMatch,
        Reason::OwnConversation,
        Reason::LocalConnection,
        Reason::BackendsOwn,
        Reason::BackendUnresolvedPassed,
        Reason::NoBackendPassed,
        Reason::Service,
        Reason::Reply,
        Reason::FlowError,
        Reason::DenyRule,
        Reason::DefaultDeny,
        Reason::TransportHidden,
        Reason::BackendUnresolved,
        Reason::NoBackend,
        Reason::BackendGone,
        Reason::FirstFragmentDropped,
        Reason::FirstFragmentMissing,
    ];

    /// Returns the reason of a decision; `default` is what the middlebox' filters do with packets that no
    /// rule matches.
    pub fn of(decision: &Decision, default: Action) -> Reason {
        match decision.verdict {
            Verdict::Accept(reason) => match reason {
                AcceptReason::NotForMiddlebox => Reason::NotForMiddlebox,
                AcceptReason::NoMatch => Reason::NoMatch,
                AcceptReason::OwnConversation => Reason::OwnConversation,
                AcceptReason::LocalConnection => Reason::LocalConnection,
                AcceptReason::BackendsOwn => Reason::BackendsOwn,
                AcceptReason::BackendUnresolved => Reason::BackendUnresolvedPassed,
                AcceptReason::NoBackend => Reason::NoBackendPassed,
            },
            Verdict::Bypass => Reason::BackendsOwn,
            Verdict::Local(_) => Reason::LocalConnection,
            Verdict::AwaitFirstFragment => Reason::FirstFragmentMissing,
            Verdict::Redirect(_) => Reason::Service,
            Verdict::Reply(_) => Reason::Reply,
            Verdict::Error { .. } => Reason::FlowError,
            Verdict::Drop(reason) | Verdict::Reject(reason) => match reason {
                DropReason::Filtered if decision.rule.is_some() => Reason::DenyRule,
                DropReason::Filtered if default == Action::Deny => Reason::DefaultDeny,
                DropReason::Filtered => Reason::TransportHidden,
                DropReason::BackendUnresolved => Reason::BackendUnresolved,
                DropReason::NoBackend => Reason::NoBackend,
                DropReason::BackendGone => Reason::BackendGone,
                DropReason::FirstFragmentDropped => Reason::FirstFragmentDropped,
            },
        }
    }

    /// Returns the name, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Reason::NotForMiddlebox => "not-for-middlebox",
            Reason::NoMatch => "no-match",
            Reason::OwnConversation => "own-conversation",
            Reason::LocalConnection => "local-connection",
            Reason::BackendsOwn => "backends-own",
            Reason::BackendUnresolvedPassed => "backend-unresolved-passed",
            Reason::NoBackendPassed => "no-backend-passed",
            Reason::Service => "service",
            Reason::Reply => "reply",
            Reason::FlowError => "flow-error",
            Reason::DenyRule => "deny-rule",
            Reason::DefaultDeny => "default-deny",
            Reason::TransportHidden => "transport-hidden",
            Reason::BackendUnresolved => "backend-unresolved",
            Reason::NoBackend => "no-backend",
            Reason::BackendGone => "backend-gone",
            Reason::FirstFragmentDropped => "first-fragment-dropped",
            Reason::FirstFragmentMissing => "first-fragment-missing",
        }
    }

    /// Returns the reason in words.
    pub fn text(self) -> &'static str {
        match self {
            Reason::NotForMiddlebox => "not for a middlebox",
            Reason::NoMatch => "no deny rule matches and no service takes it",
            Reason::OwnConversation => "a conversation of the middlebox itself",
            Reason::LocalConnection => "a connection of the middlebox itself",
            Reason::BackendsOwn => "a backend's own traffic",
            Reason::BackendUnresolvedPassed => "the backend's MAC is unknown",
            Reason::NoBackendPassed => "no backend can take it, so the middlebox does",
            Reason::Service => "a service sends it to a backend",
            Reason::Reply => "a reply of a redirected flow",
            Reason::FlowError => "an ICMP error about a flow, from a router",
            Reason::DenyRule => "a deny rule matches",
            Reason::DefaultDeny => "no allow rule matches",
            Reason::TransportHidden => "the transport header is hidden",
            Reason::BackendUnresolved => "the backends' MACs are unknown",
            Reason::NoBackend => "no backend can take it; rejected",
            Reason::BackendGone => "its backend is gone; ended",
            Reason::FirstFragmentDropped => "a fragment of a datagram that was dropped",
            Reason::FirstFragmentMissing => {
                "a later fragment of a datagram whose first fragment did not come"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_and_texts_tell_reasons_apart() {
        let names: BTreeSet<_> = Reason::ALL.map(Reason::name).into();
        let texts: BTreeSet<_> = Reason::ALL.map(Reason::text).into();
        assert_eq!((names.len(), texts.len()), (Reason::ALL.len(), Reason::ALL.len()));
    }
}
