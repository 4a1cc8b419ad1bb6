//! The pipeline of the engine: a packet, the policy and the flow table go in, a verdict comes out.

use super::flows::{FlowEvent, FlowState, OriginalTuple, ReplyTuple};
use super::verdict::{
    AcceptReason, CacheAction, Decision, DropReason, QuotedTranslation, Translation, Verdict,
};
use super::{
    EngineResult, EngineState, FRAGMENT_TIMEOUT, FragmentKey, FragmentRoute, Ingress, Snapshot,
};
use nfqd_rules::packet::{IPV6_LEN, IpHeader, Packet, Ports};
use nfqd_rules::rewrite::Side;
use nfqd_rules::slots::SlotKey;
use nfqd_rules::timeouts::UDP_REPLY_TIMEOUT;
use nfqd_rules::{FilterDecision, Middlebox, MiddleboxKey, SlotId};
use nfqd_shmctl::{Action, Fragment, Protocol};
use std::net::IpAddr;

/// Decides on a packet, and records the flow of one that it sends to a backend. `now` is
/// in seconds of the engine's clock.
pub fn decide(
    snapshot: &Snapshot,
    state: &EngineState,
    ingress: Ingress,
    packet: &Packet,
    now: u32,
) -> EngineResult {
    let (network, mac) = (ingress.network, packet.link.destination);
    let key = snapshot.middlebox_at(network, mac);
    let middlebox = key.and_then(|key| Some((key, snapshot.policy().get(key)?)));
    let filtered = match middlebox.filter(|(_, middlebox)| snapshot.filters(mac, middlebox)) {
        Some((_, middlebox)) => middlebox.filter(packet),
        None => FilterDecision::ALLOW,
    };
    let verdict = match filtered.action {
        Action::Deny => Ok(Verdict::Drop(DropReason::Filtered)),
        Action::Allow => {
            PacketContext { snapshot, state, ingress, middlebox, packet, now }.forward()
        }
    };
    match verdict {
        Ok(verdict) => EngineResult::Decided(Decision { verdict, rule: filtered.rule }),
        Err(SnapshotOutdated) => EngineResult::RetryWithNewerSnapshot,
    }
}

/// The packet's flow has a slot that only a newer snapshot knows.
pub(super) struct SnapshotOutdated;

/// The ports of a packet without ports, as a part of flow keys.
pub(super) const NO_PORTS: Ports = Ports { source: 0, destination: 0 };

pub(super) fn reversed(ports: Ports) -> Ports {
    Ports { source: ports.destination, destination: ports.source }
}

/// TCP flags.
pub(super) mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;
    pub(crate) const RST: u8 = 4;
    pub(crate) const ACK: u8 = 16;
}

/// Returns the event that a client's packet is for its flow.
pub(super) fn client_event(ip: &IpHeader) -> FlowEvent {
    match ip.tcp_flags {
        Some(flags) if flags & flag::RST != 0 => FlowEvent::Rst,
        Some(flags) if flags & flag::FIN != 0 => FlowEvent::Fin,
        Some(flags) if flags & (flag::SYN | flag::ACK) == flag::SYN => FlowEvent::Syn,
        _ if ip.protocol == Protocol::TCP => FlowEvent::Segment {
            acknowledgement: ip.tcp_numbers.map_or(0, |numbers| numbers.acknowledgement),
        },
        _ => FlowEvent::Datagram,
    }
}

/// Returns the event that a backend's packet is for its flow.
fn backend_event(ip: &IpHeader) -> FlowEvent {
    match ip.tcp_flags {
        Some(flags) if flags & flag::RST != 0 => FlowEvent::Rst,
        Some(flags) if flags & (flag::SYN | flag::ACK) == flag::SYN | flag::ACK => {
            let next = ip.tcp_numbers.map_or(0, |numbers| numbers.sequence.wrapping_add(1));
            FlowEvent::SynAck(next)
        }
        _ => FlowEvent::Reply,
    }
}

/// Returns what the kernel does with a flow in this state after this event of the client.
pub(super) fn cache_action(state: FlowState, event: FlowEvent) -> CacheAction {
    match (state, event) {
        (_, event) if event.ends() => CacheAction::Expire,
        (FlowState::Closing, _) => CacheAction::Expire,
        // The engine must see the backend's answer, even if the flow is cached.
        (FlowState::Opening, _) => CacheAction::Invalidate,
        _ => CacheAction::Install,
    }
}

/// A packet that the filters allow, with everything that decides where it goes.
pub(super) struct PacketContext<'a> {
    pub snapshot: &'a Snapshot,
    pub state: &'a EngineState,
    pub ingress: Ingress,
    pub middlebox: Option<(MiddleboxKey, &'a Middlebox)>,
    pub packet: &'a Packet,
    pub now: u32,
}

impl PacketContext<'_> {
    fn forward(&self) -> Result<Verdict, SnapshotOutdated> {
        let Some(ip) = self.packet.ip.filter(|ip| ip.translatable) else {
            return Ok(self.unchanged(false));
        };
        let from_backend = self.is_backend(ip.source);
        let balanced =
            self.middlebox.is_some_and(|(_, middlebox)| !middlebox.services().is_empty());
        if let Some(verdict) = self.icmp_error(&ip) {
            return Ok(verdict);
        }
        if ip.fragment == Fragment::Later
            && (from_backend || balanced)
            && let Some(verdict) = self.later_fragment(&ip)
        {
            return Ok(verdict);
        }
        // A conversation of the middlebox takes over the addresses and ports of a client's flow.
        let is_begun = balanced && self.ingress.is_own;
        let reply = if from_backend && !is_begun { self.reply(&ip)? } else { None };
        let verdict = match reply {
            Some(verdict) => verdict,
            None if balanced && self.is_own(&ip) => Verdict::Accept(AcceptReason::OwnConversation),
            None => self.redirect(&ip)?.unwrap_or_else(|| self.unchanged(from_backend)),
        };
        if ip.fragment == Fragment::First && (from_backend || balanced) {
            let route = match verdict {
                Verdict::Redirect(to) => FragmentRoute::Redirect(to.slot),
                Verdict::Reply(from) => FragmentRoute::Reply(from.slot),
                Verdict::Drop(_) | Verdict::Reject(_) => FragmentRoute::Dropped,
                _ => FragmentRoute::Unchanged,
            };
            self.state.fragments.insert(self.fragment_key(&ip), route, self.now, FRAGMENT_TIMEOUT);
        }
        Ok(verdict)
    }

    /// Whether an address on the packet's network is a backend's.
    fn is_backend(&self, ip: IpAddr) -> bool {
        self.snapshot.desired().slots.is_backend(self.ingress.network, ip)
    }

    /// Whether a packet belongs to the middlebox itself, whatever its services take: it is of a
    /// conversation that the middlebox has begun, or answers what only the owner of an address asks.
    fn is_own(&self, ip: &IpHeader) -> bool {
        const ECHO_REPLY: u8 = 0;
        const ECHO_REPLY_6: u8 = 129;
        /// Router and neighbour discovery (RFC 4861).
        const DISCOVERY: std::ops::RangeInclusive<u8> = 133..=137;
        let is_dhcp = ip.protocol == Protocol::UDP
            && ip.ports.is_some_and(|ports| {
                matches!((ports.source, ports.destination), (67, 68) | (547, 546))
            });
        let kind = ip.icmp_type;
        let is_answer = match ip.protocol {
            Protocol::ICMP => kind == Some(ECHO_REPLY),
            Protocol::ICMPV6 => {
                kind.is_some_and(|kind| kind == ECHO_REPLY_6 || DISCOVERY.contains(&kind))
            }
            _ => false,
        };
        // An error about a packet of no flow is about one of the middlebox.
        self.ingress.is_own || is_dhcp || is_answer || ip.quoted.is_some()
    }

    /// Returns the verdict on a packet that nothing else takes.
    fn unchanged(&self, from_backend: bool) -> Verdict {
        match self.middlebox {
            _ if from_backend && self.is_cacheable() => Verdict::Bypass,
            _ if from_backend => Verdict::Accept(AcceptReason::BackendsOwn),
            Some(_) => Verdict::Accept(AcceptReason::NoMatch),
            None => Verdict::Accept(AcceptReason::NotForMiddlebox),
        }
    }

    /// Whether the kernel's maps can hold the packet's flow: whole packets of TCP and UDP. IPv6
    /// extension headers keep a packet out of the fast path, so there is nothing to cache for it.
    pub(super) fn is_cacheable(&self) -> bool {
        self.snapshot.cache_flows
            && self.packet.ip.is_some_and(|ip| {
                let no_extensions = ip.source.is_ipv4() || ip.l4 == IPV6_LEN;
                let cached = ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP;
                let whole = ip.fragment == Fragment::Whole && ip.ports.is_some();
                whole && no_extensions && cached && ip.translatable
            })
    }

    pub(super) fn translation(
        &self,
        slot: SlotId,
        key: SlotKey,
        ip: &IpHeader,
        cache: CacheAction,
    ) -> Translation {
        let transport = ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP;
        let has_ports = ip.fragment != Fragment::Later && ip.ports.is_some();
        let port = key.ports().is_some() && transport && has_ports;
        // The engine must see the flow more often than it expires: the kernel's entries are not refreshed.
        let expires_early = ip.protocol == Protocol::UDP
            && cache != CacheAction::None
            && self.udp_timeout(&key) <= UDP_REPLY_TIMEOUT;
        let is_cached = self.is_cacheable() && !expires_early;
        let cache = if is_cached { cache } else { CacheAction::None };
        // Behind connection tracking, the frontend's address is restored and no other.
        let to_frontend = ip.destination == key.frontend.ip && !self.snapshot.is_dsr(&key);
        let tracked = self.snapshot.tracked_first && to_frontend;
        Translation { slot, key, port, cache, tracked }
    }

    /// Returns the slot that now stands for a slot's backend, and the backend.
    pub(super) fn current(&self, slot: SlotId) -> Option<(SlotId, SlotKey)> {
        self.in_use(self.snapshot.desired().slots.current(slot)?)
    }

    /// Returns a slot in use with its backend.
    pub(super) fn in_use(&self, slot: SlotId) -> Option<(SlotId, SlotKey)> {
        Some((slot, self.snapshot.desired().slots.key_of(slot)?))
    }

    /// Whether a packet of a flow can be sent to the backend of a slot: the backend's MAC is known, and
    /// if the backend now owns the frontend's address, the packet is addressed to that address.
    fn can_take(&self, key: &SlotKey, ip: &IpHeader) -> bool {
        self.snapshot.is_reachable(key) && self.is_owner_addressed(key, ip)
    }

    /// Whether the backend of a slot does not own the frontend's address (`dsr`), or the packet is
    /// addressed to it: packets to an owner are not translated.
    pub(super) fn is_owner_addressed(&self, key: &SlotKey, ip: &IpHeader) -> bool {
        !self.snapshot.is_dsr(key) || key.frontend.ip == ip.destination
    }

    pub(super) fn fragment_key(&self, ip: &IpHeader) -> FragmentKey {
        // By br_netfilter no other destination is known.
        let balanced = self.middlebox.filter(|(_, middlebox)| !middlebox.services().is_empty());
        FragmentKey {
            network: self.ingress.network,
            middlebox: balanced.map(|(key, _)| key),
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            id: ip.id,
        }
    }

    /// Sends a later fragment where the first one went.
    fn later_fragment(&self, ip: &IpHeader) -> Option<Verdict> {
        // Without its backend the datagram is lost: the fragment alone is of no use anywhere.
        let follow = |to: Option<(SlotId, SlotKey)>, verdict: fn(Translation) -> Verdict| {
            Some(match to {
                Some((slot, key)) => verdict(self.translation(slot, key, ip, CacheAction::None)),
                None => Verdict::Drop(DropReason::FirstFragmentDropped),
            })
        };
        match self.state.fragments.get(&self.fragment_key(ip), self.now) {
            Some(FragmentRoute::Redirect(slot)) => {
                let to = self.current(slot).filter(|(_, key)| self.can_take(key, ip));
                follow(to, Verdict::Redirect)
            }
            Some(FragmentRoute::Reply(slot)) => follow(self.current(slot), Verdict::Reply),
            Some(FragmentRoute::Unchanged) => Some(self.unchanged(false)),
            Some(FragmentRoute::Dropped) => Some(Verdict::Drop(DropReason::FirstFragmentDropped)),
            None => {
                let waits = self.is_backend(ip.source) || self.depends_on_ports(ip);
                waits.then_some(Verdict::AwaitFirstFragment)
            }
        }
    }

    /// Whether the services of the middlebox tell packets to this address apart by their ports.
    fn depends_on_ports(&self, ip: &IpHeader) -> bool {
        let Some((_, middlebox)) = self.middlebox else { return false };
        middlebox.services().iter().any(|(frontend, service)| {
            frontend.ip == ip.destination && (frontend.port.is_some() || service.method().is_pool())
        })
    }

    /// Translates a packet from a backend's address if it is a reply of a flow.
    fn reply(&self, ip: &IpHeader) -> Result<Option<Verdict>, SnapshotOutdated> {
        let tuple = ReplyTuple {
            network: self.ingress.network,
            backend: ip.source,
            client: ip.destination,
            protocol: ip.protocol,
            ports: ip.ports.unwrap_or(NO_PORTS),
        };
        let (flows, slots) = (&self.state.flows, &self.snapshot.desired().slots);
        let event = backend_event(ip);
        let found = flows.record_reply(&tuple, event, self.now, |slot| slots.current(slot));
        let Some(found) = found else { return Ok(None) };
        if found.is_new_connection {
            // The flow has ended; the client has made a new connection with the backend itself.
            flows.detach_reply(&tuple);
            return Ok(None);
        }
        if found.current.is_none() && self.snapshot.is_unknown(found.slot) {
            return Err(SnapshotOutdated);
        }
        let Some((slot, key)) = found.current.and_then(|slot| self.in_use(slot)) else {
            let former = slots.former_key_of(found.slot);
            let service = former.and_then(|key| self.snapshot.desired().service(&key));
            // As long as the service exists, the client's next packet decides about the flow.
            if service.is_some() {
                return Ok(Some(Verdict::Drop(DropReason::BackendGone)));
            }
            // The flow ends with its service, and does not come back with it.
            flows.remove_reply(&tuple);
            return Ok(None);
        };
        let cache = match (event, found.state) {
            _ if !found.may_install => CacheAction::None,
            (event, _) if event.ends() => CacheAction::Expire,
            (_, FlowState::Opening | FlowState::Closing) => CacheAction::None,
            _ => CacheAction::Install,
        };
        Ok(Some(Verdict::Reply(self.translation(slot, key, ip, cache))))
    }

    /// Translates an ICMP error about a packet of a flow (RFC 5508, section 4).
    fn icmp_error(&self, ip: &IpHeader) -> Option<Verdict> {
        let quoted = ip.quoted?;
        let ports = quoted.ports.unwrap_or(NO_PORTS);
        let (flows, now) = (&self.state.flows, self.now);
        // From the client's side: about what the backend sent, as the client saw it.
        if let Some((middlebox, _)) = self.middlebox {
            let tuple = OriginalTuple {
                middlebox,
                client: quoted.destination,
                frontend: quoted.source,
                protocol: quoted.protocol,
                ports: reversed(ports),
            };
            let found = flows.slot_of(&tuple, now).and_then(|slot| self.current(slot));
            if let Some((slot, key)) = found.filter(|(_, key)| self.can_take(key, ip)) {
                let to = self.translation(slot, key, ip, CacheAction::None);
                if self.snapshot.is_dsr(&key) {
                    return Some(Verdict::Redirect(to));
                }
                let port = key.ports().map(|(_, backend)| backend);
                let quote = QuotedTranslation { side: Side::Source, ip: key.backend.ip, port };
                return Some(Verdict::Error { quote, to: Some(to), from: None });
            }
        }
        // From the backend's side: about what the client sent, as the backend saw it. The backend
        // may have come to own the frontend's address since: its packets are no longer translated.
        if !self.is_backend(quoted.destination) {
            return None;
        }
        let tuple = ReplyTuple {
            network: self.ingress.network,
            backend: quoted.destination,
            client: quoted.source,
            protocol: quoted.protocol,
            ports: reversed(ports),
        };
        let (slot, key) = self.current(flows.slot_of_reply(&tuple, now)?)?;
        let port = key.ports().map(|(frontend, _)| frontend);
        let quote = QuotedTranslation { side: Side::Destination, ip: key.frontend.ip, port };
        let from_backend = ip.source == key.backend.ip;
        if from_backend {
            flows.record_refusal(slot);
        }
        let from = from_backend.then(|| self.translation(slot, key, ip, CacheAction::None));
        Some(Verdict::Error { quote, to: None, from })
    }
}
