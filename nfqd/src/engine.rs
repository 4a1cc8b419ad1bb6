//! The engine: a packet, a snapshot of the policy, the flows and the time in; a verdict out. No I/O.

pub mod bounded;
pub mod flows;
pub mod judgement;
#[cfg(test)]
mod tests;

use bounded::{Bounded, Seconds};
use flows::{Backward, Event, Flows, Forward, State};
use judgement::{DropReason, Judged, Judgement, Learn, Quote, Reason, To};
use nfqd_rules::decide::{filtered, service};
use nfqd_rules::mark;
use nfqd_rules::nft::delta::Desired;
use nfqd_rules::packet::{Fragment, IPV6_LEN, Ip, Packet, Ports};
use nfqd_rules::pool::{Member, Pools, can_serve};
use nfqd_rules::rewrite::Side;
use nfqd_rules::service::Service;
use nfqd_rules::slots::{SlotKey, own_slot};
use nfqd_rules::{Filtered, Middlebox, Policy};
use nfqd_shmctl::{Action, MacAddr, Method, OnDead, OnEmpty, Protocol, Vip};
use std::net::IpAddr;

/// Everything that a verdict depends on besides the packet and the flows; made anew for every change of the policy, which
/// costs nothing.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    desired: Desired,
    pools: Pools,
    /// Whether the kernel may remember flows.
    pub learn: bool,
    /// Which filters are the engine's.
    pub filters: Filters,
}

/// Which filters are the engine's; the kernel has had the others before a packet comes here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Filters {
    /// All.
    #[default]
    All,
    /// Those of middleboxes without a rule about VLAN tags, with which packets do not come here by br_netfilter.
    WithoutTags,
    /// None.
    None,
}

impl Snapshot {
    /// A snapshot of what is to hold; `pools` are those of its services.
    pub fn new(desired: Desired, pools: Pools) -> Snapshot {
        Snapshot { desired, pools, learn: true, filters: Filters::All }
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.desired.policy
    }

    /// What is to hold.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// The pools of its services.
    pub fn pools(&self) -> &Pools {
        &self.pools
    }

    /// The middlebox that a mark names, on the way to the engine by br_netfilter.
    pub fn middlebox_of(&self, mark: u32) -> Option<MacAddr> {
        self.desired.slots.middlebox_of(mark::index(mark))
    }

    /// The MAC of a slot's backend, if it is known.
    pub fn mac(&self, key: &SlotKey) -> Option<MacAddr> {
        self.desired.slots.get(key).and_then(|slot| slot.mac)
    }

    /// Whether a slot's backend owns the address itself.
    pub fn is_dsr(&self, key: &SlotKey) -> bool {
        self.desired.slots.get(key).is_some_and(|slot| slot.dsr)
    }

    fn filters(&self, mac: MacAddr, middlebox: &Middlebox) -> bool {
        match self.filters {
            Filters::All => true,
            Filters::WithoutTags => middlebox.firewall().is_some_and(|firewall| !firewall.looks_at_tags(mac)),
            Filters::None => false,
        }
    }

    /// Whether packets can be sent to a slot's backend.
    fn reaches(&self, key: &SlotKey) -> bool {
        self.mac(key).is_some()
    }
}

/// What the engine remembers.
pub struct Memory {
    /// The flows.
    pub flows: Flows,
    /// Where the first piece of a datagram went.
    fragments: Bounded<FragmentKey, Route>,
    /// Which slot a client's flows go to, for services with affinity.
    affinity: Bounded<(MacAddr, Vip, IpAddr), u32>,
}

/// Seconds that the first piece of a datagram is remembered (RFC 791 reassembly: 15 s and up).
const FRAGMENT_TIMEOUT: Seconds = 30;
/// Seconds that a client keeps its backend without opening a flow.
const AFFINITY_TIMEOUT: Seconds = 300;

impl Memory {
    /// Room for `capacity` flows.
    pub fn new(capacity: usize) -> Memory {
        Memory {
            flows: Flows::new(capacity),
            fragments: Bounded::new(capacity / 16, FRAGMENT_TIMEOUT),
            affinity: Bounded::new(capacity / 4, AFFINITY_TIMEOUT),
        }
    }
}

/// Later pieces of a datagram have no ports; the first one says where they go.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct FragmentKey {
    to: MacAddr,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    id: u32,
}

/// Where a datagram goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Route {
    Redirect(u32),
    Reply(u32),
    Plain,
    Nowhere,
}

/// Judges a packet, and remembers the flow of one that it sends to a backend.
pub fn judge(snapshot: &Snapshot, memory: &Memory, packet: &Packet, now: Seconds) -> Judged {
    let middlebox = snapshot.policy().get(packet.link.destination);
    let filters = middlebox.filter(|middlebox| snapshot.filters(packet.link.destination, middlebox));
    let Filtered { action, rule } = filters
        .map_or(Filtered { action: Action::Allow, rule: None }, |middlebox| filtered(middlebox, packet));
    let judgement = match action {
        Action::Deny => Judgement::Drop(DropReason::Filtered),
        Action::Allow => Look { snapshot, memory, middlebox, packet, now }.forward(),
    };
    Judged { judgement, rule }
}

const NO_PORTS: Ports = Ports { source: 0, destination: 0 };

fn turned(ports: Ports) -> Ports {
    Ports { source: ports.destination, destination: ports.source }
}

/// TCP flags.
mod flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// What a client's packet does to its flow.
fn event(ip: &Ip) -> Event {
    match ip.tcp_flags {
        Some(flags) if flags & flag::RST != 0 => Event::Resets,
        Some(flags) if flags & flag::FIN != 0 => Event::Closes,
        Some(flags) if flags & (flag::SYN | flag::ACK) == flag::SYN => Event::Opens,
        _ if ip.protocol == Protocol::TCP => {
            Event::GoesOn { acknowledges: ip.tcp_numbers.map_or(0, |numbers| numbers.acknowledgement) }
        }
        _ => Event::Datagram,
    }
}

/// What a backend's packet does to its flow.
fn answer(ip: &Ip) -> Event {
    match ip.tcp_flags {
        Some(flags) if flags & flag::RST != 0 => Event::Resets,
        Some(flags) if flags & (flag::SYN | flag::ACK) == flag::SYN | flag::ACK => {
            Event::Accepts(ip.tcp_numbers.map_or(0, |numbers| numbers.sequence.wrapping_add(1)))
        }
        _ => Event::Answer,
    }
}

/// The state that a flow begins with.
fn beginning(ip: &Ip, event: Event) -> State {
    match (ip.protocol, event) {
        (Protocol::TCP, event) if event.ends() => State::Closing,
        (Protocol::TCP, _) => State::Opening,
        (Protocol::UDP | Protocol::UDPLITE, _) => State::Datagram,
        _ => State::Other,
    }
}

/// A packet that the filters let pass, and what is looked at to say where it goes.
struct Look<'a> {
    snapshot: &'a Snapshot,
    memory: &'a Memory,
    middlebox: Option<&'a Middlebox>,
    packet: &'a Packet,
    now: Seconds,
}

impl Look<'_> {
    fn forward(&self) -> Judgement {
        let Some(ip) = self.packet.ip.filter(|ip| ip.mendable) else { return self.plain(false) };
        let from_backend = self.snapshot.desired.slots.is_backend(ip.source);
        let balanced = self.middlebox.is_some_and(|middlebox| !middlebox.services().is_empty());
        if let Some(judgement) = self.error(&ip) {
            return judgement;
        }
        if ip.fragment == Fragment::Later
            && (from_backend || balanced)
            && let Some(judgement) = self.later(&ip)
        {
            return judgement;
        }
        let reply = if from_backend { self.reply(&ip) } else { None };
        let judgement = reply.or_else(|| self.redirect(&ip)).unwrap_or_else(|| self.plain(from_backend));
        if ip.fragment == Fragment::First && (from_backend || balanced) {
            let route = match judgement {
                Judgement::Redirect(to) => Route::Redirect(to.slot),
                Judgement::Reply(to) => Route::Reply(to.slot),
                Judgement::Drop(_) | Judgement::Reject(_) => Route::Nowhere,
                _ => Route::Plain,
            };
            self.memory.fragments.insert(self.fragment(&ip), route, self.now);
        }
        judgement
    }

    /// What nothing else takes.
    fn plain(&self, from_backend: bool) -> Judgement {
        match self.middlebox {
            _ if from_backend && self.learnable() => Judgement::Direct,
            Some(_) => Judgement::Accept(Reason::NoMatch),
            None => Judgement::Accept(Reason::NotOurs),
        }
    }

    /// Flows that the kernel's maps can hold: whole packets of TCP and UDP with ports. IPv6 extension headers keep a
    /// packet out of the fast path, so there is nothing to remember for it there.
    fn learnable(&self) -> bool {
        self.snapshot.learn
            && self.packet.ip.is_some_and(|ip| {
                let plain = ip.source.is_ipv4() || ip.l4 == IPV6_LEN;
                let known = ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP;
                ip.fragment == Fragment::Whole && ip.ports.is_some() && plain && known && ip.mendable
            })
    }

    fn to(&self, slot: u32, key: SlotKey, ip: &Ip, learn: Learn) -> To {
        let transport = ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP;
        let port = key.ports().is_some() && transport && ip.fragment != Fragment::Later && ip.ports.is_some();
        To { slot, key, port, learn: if self.learnable() { learn } else { Learn::No } }
    }

    fn key_of(&self, slot: u32) -> Option<SlotKey> {
        self.snapshot.desired.slots.key_of(slot)
    }

    /// Whether this snapshot has never known a number, so that a later one has given it.
    fn is_newer(&self, slot: u32) -> bool {
        let slots = &self.snapshot.desired.slots;
        slots.key_of(slot).is_none() && slots.former_key_of(slot).is_none()
    }

    fn fragment(&self, ip: &Ip) -> FragmentKey {
        FragmentKey {
            to: self.packet.link.destination,
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            id: ip.id,
        }
    }

    /// A later piece goes where the first one went.
    fn later(&self, ip: &Ip) -> Option<Judgement> {
        // Without its backend the datagram is lost: its pieces alone would go anywhere.
        let follow = |slot: u32, judgement: fn(To) -> Judgement| {
            let current = self.snapshot.desired.slots.current(slot);
            let to = current.and_then(|slot| Some(self.to(slot, self.key_of(slot)?, ip, Learn::No)));
            Some(to.map_or(Judgement::Drop(DropReason::Piece), judgement))
        };
        match self.memory.fragments.get(&self.fragment(ip), self.now) {
            Some(Route::Redirect(slot)) => follow(slot, Judgement::Redirect),
            Some(Route::Reply(slot)) => follow(slot, Judgement::Reply),
            Some(Route::Plain) => Some(self.plain(false)),
            Some(Route::Nowhere) => Some(Judgement::Drop(DropReason::Piece)),
            None if self.snapshot.desired.slots.is_backend(ip.source) || self.needs_ports(ip) => {
                Some(Judgement::Hold)
            }
            None => None,
        }
    }

    /// Whether what the middlebox does with packets to this address depends on their ports.
    fn needs_ports(&self, ip: &Ip) -> bool {
        let services = self.middlebox.into_iter().flat_map(Middlebox::services);
        services.into_iter().any(|(vip, service)| {
            vip.ip == ip.destination && (vip.port.is_some() || service.method().is_pool())
        })
    }

    /// The flow that a packet from a backend's address comes back from.
    fn reply(&self, ip: &Ip) -> Option<Judgement> {
        let key = Backward {
            backend: ip.source,
            client: ip.destination,
            protocol: ip.protocol,
            ports: ip.ports.unwrap_or(NO_PORTS),
        };
        let (flows, slots, event) = (&self.memory.flows, &self.snapshot.desired.slots, answer(ip));
        let found = flows.backward(&key, event, self.now, |slot| slots.current(slot))?;
        if found.is_another {
            // The flow has ended; this begins one that the client has made with the backend itself.
            flows.remove_backward(&key);
            return None;
        }
        if found.current.is_none() && self.is_newer(found.slot) {
            return Some(Judgement::Drop(DropReason::Outdated));
        }
        let Some((slot, key_now)) = found.current.and_then(|slot| Some((slot, self.key_of(slot)?))) else {
            let former = slots.former_key_of(found.slot);
            let service =
                former.and_then(|key| self.snapshot.policy().get(key.middlebox)?.services().get(&key.vip));
            // While its service is there, the client's next packet says what becomes of the flow.
            if service.is_some() {
                return Some(Judgement::Drop(DropReason::BackendGone));
            }
            // The service is gone, and the flow with it: it does not come back when the service does.
            flows.remove_backward(&key);
            return None;
        };
        let learn = match (event, found.state) {
            (event, _) if event.ends() => Learn::Close,
            (_, State::Opening | State::Closing) => Learn::No,
            _ => Learn::Yes,
        };
        let learn = if found.learn { learn } else { Learn::No };
        Some(Judgement::Reply(self.to(slot, key_now, ip, learn)))
    }

    /// An ICMP error about a packet of a flow (RFC 5508, section 4).
    fn error(&self, ip: &Ip) -> Option<Judgement> {
        let quoted = ip.quoted?;
        let ports = quoted.ports.unwrap_or(NO_PORTS);
        let (flows, slots, now) = (&self.memory.flows, &self.snapshot.desired.slots, self.now);
        // From the client's side: about what the backend sent, as the client saw it.
        if self.middlebox.is_some() {
            let key = Forward {
                middlebox: self.packet.link.destination,
                client: quoted.destination,
                vip: quoted.source,
                protocol: quoted.protocol,
                ports: turned(ports),
            };
            let slot = flows.slot_of(&key, now).and_then(|slot| slots.current(slot));
            let found = slot.and_then(|slot| Some((slot, self.key_of(slot)?)));
            if let Some((slot, key)) = found.filter(|(_, key)| self.snapshot.reaches(key)) {
                let to = self.to(slot, key, ip, Learn::No);
                if self.snapshot.is_dsr(&key) {
                    return Some(Judgement::Redirect(to));
                }
                let port = key.ports().map(|(_, backends)| backends);
                let quote = Quote { side: Side::Source, ip: key.backend.ip, port };
                return Some(Judgement::Error { quote, to: Some(to), from: None });
            }
        }
        // From the backend's side: about what the client sent, as the backend saw it.
        let key = Backward {
            backend: quoted.destination,
            client: quoted.source,
            protocol: quoted.protocol,
            ports: turned(ports),
        };
        let slot = flows.slot_of_backward(&key, now).and_then(|slot| slots.current(slot))?;
        let key = self.key_of(slot)?;
        let port = key.ports().map(|(own, _)| own);
        let quote = Quote { side: Side::Destination, ip: key.vip.ip, port };
        let from = (ip.source == key.backend.ip).then(|| self.to(slot, key, ip, Learn::No));
        Some(Judgement::Error { quote, to: None, from })
    }

    /// Where the packet's service sends it; none if no service takes it.
    fn redirect(&self, ip: &Ip) -> Option<Judgement> {
        let (vip, service) = service(self.middlebox?, self.packet)?;
        if service.method().is_pool() {
            return Some(self.balance(vip, service, ip));
        }
        let middlebox = self.packet.link.destination;
        let key = SlotKey { middlebox, vip, backend: service.only_backend()? };
        let slot = self.snapshot.desired.slots.get(&key)?;
        if !self.snapshot.reaches(&key) {
            return Some(Judgement::Accept(Reason::BackendUnresolved));
        }
        let event = event(ip);
        let mut learn = Learn::No;
        if ip.fragment != Fragment::Later {
            let forward = self.forward_key(ip);
            let flows = &self.memory.flows;
            let slots = &self.snapshot.desired.slots;
            let found =
                flows.forward(&forward, event, self.now, |slot| slots.current(slot)).filter(|found| {
                    found.current == Some(slot.index)
                        && !(found.state == State::Closing && event == Event::Opens)
                });
            learn = match found {
                Some(found) if found.learn => learning(found.state, event),
                Some(_) => Learn::No,
                None => self.begin(&key, slot.index, ip, event),
            };
        }
        Some(Judgement::Redirect(self.to(slot.index, key, ip, learn)))
    }

    fn forward_key(&self, ip: &Ip) -> Forward {
        Forward {
            middlebox: self.packet.link.destination,
            client: ip.source,
            vip: ip.destination,
            protocol: ip.protocol,
            ports: ip.ports.unwrap_or(NO_PORTS),
        }
    }

    /// The way back of this packet's flow, if it goes to this slot; none where it is not by us.
    fn backward_key(&self, key: &SlotKey, ip: &Ip) -> Option<Backward> {
        let ports = turned(ip.ports.unwrap_or(NO_PORTS));
        let source = key.ports().map_or(ports.source, |(_, backends)| backends);
        let ports = Ports { source, ..ports };
        let backward = Backward { backend: key.backend.ip, client: ip.source, protocol: ip.protocol, ports };
        (!self.snapshot.is_dsr(key)).then_some(backward)
    }

    /// Remembers a new flow; what the kernel may.
    fn begin(&self, key: &SlotKey, slot: u32, ip: &Ip, event: Event) -> Learn {
        let state = beginning(ip, event);
        let (forward, backward) = (self.forward_key(ip), self.backward_key(key, ip));
        let flows = &self.memory.flows;
        // A flow of another middlebox comes back the same way: it stays, here and in the kernel.
        if backward.is_some_and(|backward| flows.is_others(&backward, &forward, self.now)) {
            return Learn::No;
        }
        flows.insert(forward, backward, slot, state, self.now);
        learning(state, event)
    }

    /// A packet that a pool takes: to the backend of its flow, or to one that is chosen.
    fn balance(&self, vip: Vip, service: &Service, ip: &Ip) -> Judgement {
        let event = event(ip);
        let forward = self.forward_key(ip);
        let flows = &self.memory.flows;
        let slots = &self.snapshot.desired.slots;
        match flows.forward(&forward, event, self.now, |slot| slots.current(slot)) {
            Some(found) if found.current.is_none() && self.is_newer(found.slot) => {
                return Judgement::Drop(DropReason::Outdated);
            }
            Some(found) => match found.current.and_then(|slot| Some((slot, self.key_of(slot)?))) {
                Some(_) if found.state == State::Closing && event == Event::Opens => {}
                Some((slot, key)) if self.snapshot.reaches(&key) => {
                    let learn = if found.learn { learning(found.state, event) } else { Learn::No };
                    return Judgement::Redirect(self.to(slot, key, ip, learn));
                }
                Some(_) => return Judgement::Drop(DropReason::BackendUnresolved),
                None => {
                    flows.remove(&forward);
                    let ends = service.terms().on_dead == OnDead::Reset && event != Event::Opens;
                    if ends && ip.protocol == Protocol::TCP {
                        return Judgement::Reject(DropReason::BackendGone);
                    }
                }
            },
            // A connection that was there before the service was, or that nobody knows any more.
            None if ip.protocol == Protocol::TCP && event != Event::Opens => {
                let own = self.snapshot.desired.slots.get(&own_slot(self.packet.link.destination, vip));
                return match own.filter(|_| self.learnable() && !event.ends()) {
                    Some(own) => Judgement::Pass(own.index),
                    None => Judgement::Accept(Reason::NoMatch),
                };
            }
            None => {}
        }
        self.choose(vip, service, ip, event, &forward)
    }

    /// A backend for a new flow.
    fn choose(&self, vip: Vip, service: &Service, ip: &Ip, event: Event, forward: &Forward) -> Judgement {
        let middlebox = self.packet.link.destination;
        let flows = &self.memory.flows;
        let Some(pool) = self.snapshot.pools.get(middlebox, &vip) else {
            return Judgement::Accept(Reason::NoMatch);
        };
        let key = |member: &Member| SlotKey { middlebox, vip, backend: member.name };
        let is_free = |member: &Member| {
            let backward = self.backward_key(&key(member), ip);
            backward.is_none_or(|backward| !flows.is_taken(&backward, forward, self.now))
        };
        let fits = |member: &Member| can_serve(member, ip.source) && is_free(member);
        let affine = service.terms().affinity && service.method() != Method::Hash;
        let client = (middlebox, vip, ip.source);
        let before = if affine { self.memory.affinity.get(&client, self.now) } else { None };
        let kept = before.and_then(|slot| self.snapshot.desired.slots.current(slot)).and_then(|slot| {
            pool.members().iter().find(|member| member.slot == slot && fits(member)).copied()
        });
        let Some(member) = kept.or_else(|| pool.choose(ip, |slot| flows.live(slot), fits)) else {
            return self.without_backend(vip, service, pool.members(), ip);
        };
        if affine {
            self.memory.affinity.insert(client, member.slot, self.now);
        }
        let key = key(&member);
        let learn = self.begin(&key, member.slot, ip, event);
        Judgement::Redirect(self.to(member.slot, key, ip, learn))
    }

    fn without_backend(&self, vip: Vip, service: &Service, members: &[Member], ip: &Ip) -> Judgement {
        let middlebox = self.packet.link.destination;
        let slots = &self.snapshot.desired.slots;
        let waits = service.backends().iter().any(|(name, backend)| {
            let slot = slots.get(&SlotKey { middlebox, vip, backend: *name });
            slot.is_some_and(|slot| slot.alive && slot.mac.is_none()) && !backend.draining
        });
        match service.terms().on_empty {
            // The only backend there is has asked: it could not answer itself.
            _ if !members.is_empty() && members.iter().all(|member| !can_serve(member, ip.source)) => {
                Judgement::Accept(Reason::NoBackend)
            }
            OnEmpty::Pass => Judgement::Accept(Reason::NoBackend),
            OnEmpty::Reject if waits => Judgement::Drop(DropReason::BackendUnresolved),
            OnEmpty::Reject => Judgement::Reject(DropReason::NoBackend),
        }
    }
}

/// What the kernel may remember of a flow in this state, whose packet does this.
fn learning(state: State, event: Event) -> Learn {
    match (state, event) {
        (_, event) if event.ends() => Learn::Close,
        (State::Closing, _) => Learn::Close,
        // Whatever the kernel remembers, the engine must see the backend's answer.
        (State::Opening, _) => Learn::Forget,
        _ => Learn::Yes,
    }
}
