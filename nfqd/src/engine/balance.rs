//! Load balancing: the backend of a packet that a service takes.

use super::flows::{FlowEvent, FlowMatch, FlowState, OriginalTuple, ReplyTuple, UDP_TIMEOUT};
use super::pipeline::{
    NO_PORTS, PacketContext, SnapshotOutdated, cache_action, client_event, reversed,
};
use super::verdict::{AcceptReason, CacheAction, DropReason, Verdict};
use nfqd_rules::packet::{IpHeader, Ports};
use nfqd_rules::pool::{Member, can_serve};
use nfqd_rules::service::Service;
use nfqd_rules::slots::{Liveness, SlotKey};
use nfqd_rules::{MiddleboxKey, SlotId};
use nfqd_shmctl::{Fragment, Frontend, Method, OnDead, OnEmpty, Protocol};

/// Returns the state of a flow that begins with this packet.
fn initial_state(ip: &IpHeader, event: FlowEvent) -> FlowState {
    match (ip.protocol, event) {
        (Protocol::TCP, event) if event.ends() => FlowState::Closing,
        (Protocol::TCP, _) => FlowState::Opening,
        (Protocol::UDP | Protocol::UDPLITE, _) => FlowState::Datagram,
        _ => FlowState::Other,
    }
}

/// Returns the original direction of the flow of a packet to a middlebox.
pub(super) fn original_tuple(middlebox: MiddleboxKey, ip: &IpHeader) -> OriginalTuple {
    OriginalTuple {
        middlebox,
        client: ip.source,
        frontend: ip.destination,
        protocol: ip.protocol,
        ports: ip.ports.unwrap_or(NO_PORTS),
    }
}

impl PacketContext<'_> {
    /// Sends the packet where its service sends it; `None` if no service takes it.
    pub(super) fn redirect(&self, ip: &IpHeader) -> Result<Option<Verdict>, SnapshotOutdated> {
        let Some((middlebox, its)) = self.middlebox else { return Ok(None) };
        match its.service_for(self.packet) {
            None => Ok(None),
            Some((frontend, service)) if service.method().is_pool() => {
                self.balance(middlebox, frontend, service, ip).map(Some)
            }
            Some((frontend, service)) => {
                Ok(self.redirect_to_only(middlebox, frontend, service, ip))
            }
        }
    }

    /// Sends the packet to the one backend of a service with method static or source.
    fn redirect_to_only(
        &self,
        middlebox: MiddleboxKey,
        frontend: Frontend,
        service: &Service,
        ip: &IpHeader,
    ) -> Option<Verdict> {
        let key = SlotKey { middlebox, frontend, backend: service.only_backend()? };
        let slot = self.snapshot.desired().slots.get(&key)?.id;
        if !self.snapshot.is_reachable(&key) {
            return Some(Verdict::Accept(AcceptReason::BackendUnresolved));
        }
        let cache = match ip.fragment {
            Fragment::Later => CacheAction::None,
            Fragment::Whole | Fragment::First => match self.record_only(&key, slot, ip) {
                Some(cache) => cache,
                None => return Some(Verdict::Reject(DropReason::NoBackend)),
            },
        };
        Some(Verdict::Redirect(self.translation(slot, key, ip, cache)))
    }

    /// Records a packet to the one backend of a service, which may begin a flow. `None` if its replies
    /// would be mistaken for those of another flow of the client.
    fn record_only(&self, key: &SlotKey, slot: SlotId, ip: &IpHeader) -> Option<CacheAction> {
        let (event, tuple) = (client_event(ip), original_tuple(key.middlebox, ip));
        let slots = &self.snapshot.desired().slots;
        let found =
            self.state.flows.record_original(&tuple, event, self.now, |slot| slots.current(slot));
        match found {
            Some(found)
                if found.current == Some(slot)
                    && !found.ended_before(event)
                    && !self.is_of_other_kind(&found, key) =>
            {
                Some(if found.may_install {
                    cache_action(found.state, event)
                } else {
                    CacheAction::None
                })
            }
            _ => {
                let is_free = !self.is_taken(self.reply_tuple(key, ip), &tuple);
                is_free.then(|| self.begin_flow(key, slot, ip, event))
            }
        }
    }

    /// Whether the replies of a flow would be mistaken for those of another one.
    fn is_taken(&self, reply: Option<ReplyTuple>, original: &OriginalTuple) -> bool {
        let slots = &self.snapshot.desired().slots;
        let is_in_use = |slot: SlotId| slots.current(slot).is_some();
        let flows = &self.state.flows;
        reply.is_some_and(|reply| flows.is_reply_taken(&reply, original, self.now, is_in_use))
    }

    /// Whether a flow began when its service rewrote MACs only and does not now, or the other way
    /// round: its replies are others.
    fn is_of_other_kind(&self, found: &FlowMatch, key: &SlotKey) -> bool {
        found.state != FlowState::Closing && found.has_reply == self.snapshot.is_dsr(key)
    }

    /// Returns the reply direction of this packet's flow if it goes to a slot; `None` if replies do
    /// not pass us.
    fn reply_tuple(&self, key: &SlotKey, ip: &IpHeader) -> Option<ReplyTuple> {
        if self.snapshot.is_dsr(key) {
            return None;
        }
        let ports = reversed(ip.ports.unwrap_or(NO_PORTS));
        let source = key.ports().map_or(ports.source, |(_, backend)| backend);
        Some(ReplyTuple {
            network: self.ingress.network,
            backend: key.backend.ip,
            client: ip.source,
            protocol: ip.protocol,
            ports: Ports { source, ..ports },
        })
    }

    /// Returns the seconds without a packet after which a UDP flow of a service expires.
    pub(super) fn udp_timeout(&self, key: &SlotKey) -> u32 {
        let service = self.snapshot.desired().service(key);
        service.and_then(|service| service.options().udp_timeout).unwrap_or(UDP_TIMEOUT)
    }

    /// Records a new flow. Returns what the kernel may cache of it.
    fn begin_flow(
        &self,
        key: &SlotKey,
        slot: SlotId,
        ip: &IpHeader,
        event: FlowEvent,
    ) -> CacheAction {
        self.state.new_flows.count(key.middlebox);
        let state = initial_state(ip, event);
        let original = original_tuple(key.middlebox, ip);
        let reply = self.reply_tuple(key, ip);
        let flows = &self.state.flows;
        // The replies of another flow look the same: it stays, here and in the kernel.
        if self.is_taken(reply, &original) {
            return CacheAction::None;
        }
        flows.insert(original, reply, slot, (state, self.udp_timeout(key)), self.now);
        cache_action(state, event)
    }

    /// Sends a packet that a pool takes to the backend of its flow, or to one that is chosen.
    fn balance(
        &self,
        middlebox: MiddleboxKey,
        frontend: Frontend,
        service: &Service,
        ip: &IpHeader,
    ) -> Result<Verdict, SnapshotOutdated> {
        let (event, tuple) = (client_event(ip), original_tuple(middlebox, ip));
        let flows = &self.state.flows;
        let slots = &self.snapshot.desired().slots;
        let found = flows.record_original(&tuple, event, self.now, |slot| slots.current(slot));
        let Some(found) = found else {
            // A connection from before the service, or one that nobody knows any more.
            let is_within = ip.protocol == Protocol::TCP && event != FlowEvent::Syn;
            if is_within && !service.options().takeover {
                return Ok(self.local(middlebox, frontend, event));
            }
            return Ok(self.choose(middlebox, frontend, service, ip, event));
        };
        if found.current.is_none() && self.snapshot.is_unknown(found.slot) {
            return Err(SnapshotOutdated);
        }
        match found.current.and_then(|slot| self.in_use(slot)) {
            Some(_) if found.ended_before(event) => {}
            Some((_, key)) if !self.is_owner_addressed(&key, ip) => {}
            Some((_, key)) if self.leaves_dead(&key, &found, service, event) => {
                flows.remove(&tuple);
            }
            Some((slot, key)) if self.snapshot.is_reachable(&key) => {
                if self.is_of_other_kind(&found, &key) {
                    let cache = self.begin_flow(&key, slot, ip, event);
                    return Ok(Verdict::Redirect(self.translation(slot, key, ip, cache)));
                }
                let cache = if found.may_install {
                    cache_action(found.state, event)
                } else {
                    CacheAction::None
                };
                return Ok(Verdict::Redirect(self.translation(slot, key, ip, cache)));
            }
            Some(_) => return Ok(Verdict::Drop(DropReason::BackendUnresolved)),
            None => {
                flows.remove(&tuple);
                let resets = service.options().on_dead == OnDead::Reset;
                if resets && event != FlowEvent::Syn && ip.protocol == Protocol::TCP {
                    return Ok(Verdict::Reject(DropReason::BackendGone));
                }
            }
        }
        Ok(self.choose(middlebox, frontend, service, ip, event))
    }

    /// Whether a flow leaves its backend, because that is dead and only established connections stay.
    fn leaves_dead(
        &self,
        key: &SlotKey,
        found: &FlowMatch,
        service: &Service,
        event: FlowEvent,
    ) -> bool {
        let slot = self.snapshot.desired().slots.get(key);
        let is_dead = slot.is_some_and(|slot| slot.liveness == Liveness::Dead);
        let is_connection = match found.state {
            FlowState::Established => true,
            FlowState::Opening | FlowState::Closing => event != FlowEvent::Syn,
            FlowState::Datagram | FlowState::Stream | FlowState::Other => false,
        };
        is_dead && !is_connection && service.options().on_dead == OnDead::KeepConnections
    }

    /// Accepts a packet of a connection of the middlebox itself.
    fn local(&self, middlebox: MiddleboxKey, frontend: Frontend, event: FlowEvent) -> Verdict {
        let key = SlotKey::local(middlebox, frontend);
        match self.snapshot.desired().slots.get(&key) {
            Some(slot) if self.is_cacheable() && !event.ends() => Verdict::Local(slot.id),
            _ => Verdict::Accept(AcceptReason::LocalConnection),
        }
    }

    /// Chooses a backend for a new flow.
    fn choose(
        &self,
        middlebox: MiddleboxKey,
        frontend: Frontend,
        service: &Service,
        ip: &IpHeader,
        event: FlowEvent,
    ) -> Verdict {
        let (flows, original) = (&self.state.flows, original_tuple(middlebox, ip));
        let Some(pool) = self.snapshot.pools().get(middlebox, &frontend) else {
            return Verdict::Accept(AcceptReason::NoMatch);
        };
        let key_of = |member: &Member| SlotKey { middlebox, frontend, backend: member.name };
        let is_free =
            |member: &Member| !self.is_taken(self.reply_tuple(&key_of(member), ip), &original);
        let fits = |member: &Member| can_serve(member, ip.source) && is_free(member);
        let affinity = service.options().affinity.filter(|_| service.method() != Method::Hash);
        let client = (middlebox, frontend, ip.source);
        let preferred = affinity.and_then(|_| self.state.affinity.get(&client, self.now));
        let preferred = preferred.and_then(|slot| self.snapshot.desired().slots.current(slot));
        let preferred = preferred.and_then(|slot| {
            pool.members().iter().find(|member| member.slot == slot && fits(member)).copied()
        });
        let chosen = preferred.or_else(|| pool.choose(ip, |slot| flows.live(slot), fits));
        let Some(member) = chosen else {
            return self.without_backend(middlebox, frontend, service, pool.members(), ip);
        };
        if let Some(seconds) = affinity {
            self.state.affinity.insert(client, member.slot, self.now, seconds);
        }
        let key = key_of(&member);
        let cache = self.begin_flow(&key, member.slot, ip, event);
        Verdict::Redirect(self.translation(member.slot, key, ip, cache))
    }

    fn without_backend(
        &self,
        middlebox: MiddleboxKey,
        frontend: Frontend,
        service: &Service,
        members: &[Member],
        ip: &IpHeader,
    ) -> Verdict {
        let slots = &self.snapshot.desired().slots;
        let is_unresolved = service.backends().iter().any(|(name, backend)| {
            let slot = slots.get(&SlotKey { middlebox, frontend, backend: *name });
            slot.is_some_and(|slot| slot.liveness == Liveness::Alive && slot.mac.is_none())
                && backend.drain.is_none()
        });
        // The only backend there is may be the client itself, which cannot answer itself.
        let is_own_client =
            !members.is_empty() && members.iter().all(|member| !can_serve(member, ip.source));
        match service.options().on_empty {
            _ if is_own_client => Verdict::Accept(AcceptReason::NoBackend),
            OnEmpty::Pass => Verdict::Accept(AcceptReason::NoBackend),
            OnEmpty::Reject if is_unresolved => Verdict::Drop(DropReason::BackendUnresolved),
            OnEmpty::Reject => Verdict::Reject(DropReason::NoBackend),
        }
    }
}
