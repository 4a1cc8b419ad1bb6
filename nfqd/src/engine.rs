//! The engine: a packet, a snapshot of the policy, the flows and the time in; a verdict out. No I/O.

use crate::bounded::{Bounded, Seconds};
use crate::flows::{Backward, Event, Flows, Forward, State};
use nfqd_rules::decide::{filtered, service};
use nfqd_rules::mark::{self, Operation};
use nfqd_rules::nft::delta::Desired;
use nfqd_rules::packet::{Fragment, IPV6_LEN, Ip, Packet, Ports};
use nfqd_rules::pool::{Member, Pools, can_serve};
use nfqd_rules::rewrite::Side;
use nfqd_rules::service::Service;
use nfqd_rules::slots::{SlotKey, own_slot};
use nfqd_rules::{Filtered, Middlebox, Policy};
use nfqd_shmctl::{Action, MacAddr, Method, OnDead, OnEmpty, Protocol, RuleId, Vip};
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
        Some(flags) if flags & (flag::FIN | flag::RST) != 0 => Event::Closes,
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
        Some(flags) if flags & flag::RST != 0 => Event::Closes,
        Some(flags) if flags & (flag::SYN | flag::ACK) == flag::SYN | flag::ACK => {
            Event::Accepts(ip.tcp_numbers.map_or(0, |numbers| numbers.sequence.wrapping_add(1)))
        }
        _ => Event::Answer,
    }
}

/// The state that a flow begins with.
fn beginning(ip: &Ip, event: Event) -> State {
    match (ip.protocol, event) {
        (Protocol::TCP, Event::Closes) => State::Closing,
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
            (Event::Closes, _) => Learn::Close,
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
                return match own.filter(|_| self.learnable() && event != Event::Closes) {
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
        (_, Event::Closes) | (State::Closing, _) => Learn::Close,
        // Whatever the kernel remembers, the engine must see the backend's answer.
        (State::Opening, _) => Learn::Forget,
        _ => Learn::Yes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{IpNumber, Ipv4Header, PacketBuilder};
    use nfqd_rules::slots::Seen;
    use nfqd_shmctl::BackendName;
    use std::time::Instant;

    const VM: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const BACKEND: [u8; 6] = [2, 0, 0, 0, 0, 3];

    fn snapshot(lines: &[&str]) -> Snapshot {
        let mut policy = Policy::default();
        for line in lines {
            policy.apply_line(line).unwrap();
        }
        snapshot_of(policy, |_| Seen::NOTHING)
    }

    fn snapshot_of(policy: Policy, seen: impl Fn(&BackendName) -> Seen) -> Snapshot {
        following(&Snapshot::default(), policy, seen)
    }

    /// What holds when a policy comes after another one.
    fn following(before: &Snapshot, policy: Policy, seen: impl Fn(&BackendName) -> Seen) -> Snapshot {
        let (mut slots, mut pools) = (before.desired().slots.clone(), Pools::default());
        slots.follow(&policy, |_, _, _, name| seen(name), Instant::now());
        for (mac, middlebox) in policy.middleboxes() {
            pools.update(*mac, Some(middlebox), &slots);
        }
        Snapshot::new(Desired { policy, slots }, pools)
    }

    fn static_to_3() -> Snapshot {
        snapshot(&["R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3"])
    }

    fn udp(from: [u8; 6], to: [u8; 6], ips: (u8, u8), ports: (u16, u16)) -> Packet {
        let mut out = Vec::new();
        PacketBuilder::ethernet2(from, to)
            .ipv4([10, 0, 0, ips.0], [10, 0, 0, ips.1], 9)
            .udp(ports.0, ports.1)
            .write(&mut out, b"x")
            .unwrap();
        Packet::from_frame(&out).unwrap()
    }

    fn judged(snapshot: &Snapshot, flows: &Memory, packet: &Packet, now: Seconds) -> Judgement {
        judge(snapshot, flows, packet, now).judgement
    }

    fn vip_of(judgement: Judgement) -> Option<IpAddr> {
        match judgement {
            Judgement::Reply(to) => Some(to.key.vip.ip),
            _ => None,
        }
    }

    #[test]
    fn a_flow_goes_there_and_comes_back() {
        let (snapshot, flows) = (static_to_3(), Memory::new(100));
        let there = judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
        assert!(matches!(there, Judgement::Redirect(To { learn: Learn::Yes, .. })), "{there:?}");
        assert_eq!(there.mark(0x7f), Some(0x1800_017f));
        let back = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 1);
        assert_eq!(vip_of(back), Some(IpAddr::from([10, 0, 0, 2])));
        assert_eq!(back.mark(0), Some(0x3000_0100));
        // The backend's own conversation with the same client is left alone.
        let own = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1001)), 1);
        assert_eq!((own, own.mark(1)), (Judgement::Direct, Some(0x3000_0001)));
        let other = judged(&snapshot, &flows, &udp(CLIENT, BACKEND, (1, 3), (53, 1001)), 1);
        assert_eq!(other, Judgement::Accept(Reason::NotOurs));
    }

    #[test]
    fn a_reply_outlives_nothing_it_should_not() {
        let (before, flows) = (static_to_3(), Memory::new(100));
        judged(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
        let reply = udp(BACKEND, CLIENT, (3, 1), (53, 1000));
        let other = snapshot(&["R L 2:0:0:0:0:2 10.0.0.9 0 10.0.0.3@2:0:0:0:0:3"]).policy().clone();
        let after = following(&before, other, |_| Seen::NOTHING);
        assert_eq!(judged(&after, &flows, &reply, 1), Judgement::Direct, "the service is gone");
        assert_eq!(judged(&before, &flows, &reply, 1), Judgement::Direct, "and the flow with it");
        judged(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 2);
        assert!(vip_of(judged(&before, &flows, &reply, 200)).is_some());
        assert_eq!(judged(&before, &flows, &reply, 600), Judgement::Direct, "the flow is too old");
    }

    #[test]
    fn later_fragments_follow_the_first() {
        let (snapshot, flows) = (static_to_3(), Memory::new(100));
        judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
        let piece = |first: bool| {
            let mut ip = Ipv4Header::new(16, 9, IpNumber::UDP, [10, 0, 0, 3], [10, 0, 0, 1]).unwrap();
            ip.identification = 77;
            ip.more_fragments = first;
            ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
            let mut out = [&CLIENT[..], &BACKEND, &[8, 0]].concat();
            ip.write(&mut out).unwrap();
            out.extend([0, 53, 0x03, 0xe8, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            Packet::from_frame(&out).unwrap()
        };
        assert_eq!(judged(&snapshot, &flows, &piece(false), 0), Judgement::Hold);
        let first = judged(&snapshot, &flows, &piece(true), 0);
        assert!(matches!(first, Judgement::Reply(To { learn: Learn::No, .. })), "{first:?}");
        assert_eq!(vip_of(judged(&snapshot, &flows, &piece(false), 0)), vip_of(first));
    }

    #[test]
    fn without_the_backends_mac_the_redirect_is_not_made() {
        let (before, flows) = (snapshot(&["R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3"]), Memory::new(100));
        let packet = udp(CLIENT, VM, (1, 2), (1000, 53));
        assert_eq!(judged(&before, &flows, &packet, 0), Judgement::Accept(Reason::BackendUnresolved));
        assert!(flows.flows.is_empty());
        let mac = Some(MacAddr(BACKEND));
        let after = snapshot_of(before.policy().clone(), |_| Seen { mac, alive: true });
        assert!(matches!(judged(&after, &flows, &packet, 0), Judgement::Redirect(_)));
    }

    #[test]
    fn filters_go_first_even_for_replies() {
        let lines = [
            "R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3",
            "R F 2:0:0:0:0:1 10.0.0.1",
            "A 2:0:0:0:0:1 I 1 s 10.0.0.3",
        ];
        let (snapshot, flows) = (snapshot(&lines), Memory::new(100));
        judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
        let back = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 0);
        assert_eq!((back, back.mark(0)), (Judgement::Drop(DropReason::Filtered), None));
    }

    const POOL: &str = "R L 2:0:0:0:0:2 10.0.0.2:80 hash 10.0.0.3:8080@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4 10.0.0.5@2:0:0:0:0:5";

    fn tcp(from: [u8; 6], to: [u8; 6], ips: (u8, u8), ports: (u16, u16), flags: u8) -> Packet {
        let mut out = Vec::new();
        PacketBuilder::ethernet2(from, to)
            .ipv4([10, 0, 0, ips.0], [10, 0, 0, ips.1], 9)
            .tcp(ports.0, ports.1, 1, 1)
            .write(&mut out, b"")
            .unwrap();
        out[47] = flags;
        Packet::from_frame(&out).unwrap()
    }

    fn syn(port: u16) -> Packet {
        tcp(CLIENT, VM, (1, 2), (port, 80), flag::SYN)
    }

    fn ack(port: u16) -> Packet {
        tcp(CLIENT, VM, (1, 2), (port, 80), flag::ACK)
    }

    /// The backend accepts, and the client answers; what is said of that.
    fn establish(snapshot: &Snapshot, memory: &Memory, port: u16, to_backend: To) -> To {
        let IpAddr::V4(backend) = to_backend.key.backend.ip else { panic!("IPv6") };
        let from = ([2, 0, 0, 0, 0, backend.octets()[3]], backend.octets()[3]);
        let ports = (to_backend.key.backend.port.unwrap(), port);
        let accept = tcp(from.0, CLIENT, (from.1, 1), ports, flag::SYN | flag::ACK);
        assert!(matches!(judged(snapshot, memory, &accept, 1), Judgement::Reply(_)));
        // It has said 1 and so expects 2.
        let mut packet = ack(port);
        if let Some(numbers) = packet.ip.as_mut().and_then(|ip| ip.tcp_numbers.as_mut()) {
            numbers.acknowledgement = 2;
        }
        to(judged(snapshot, memory, &packet, 2))
    }

    fn to(judgement: Judgement) -> To {
        match judgement {
            Judgement::Redirect(to) => to,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_pools_connection_keeps_its_backend_from_end_to_end() {
        let (before, memory) = (snapshot(&[POOL]), Memory::new(1000));
        let first = to(judged(&before, &memory, &syn(1000), 0));
        assert_eq!(first.learn, Learn::Forget, "nothing yet but that it is no other flow");
        assert_eq!(to(judged(&before, &memory, &syn(1000), 1)).slot, first.slot);
        let second = establish(&before, &memory, 1000, first);
        assert_eq!((second.slot, second.learn), (first.slot, Learn::Yes));
        // Others are added and drained; the flow stays, and a drained one gets no new ones.
        let mut policy = before.policy().clone();
        let name = first.key.backend;
        policy.apply_line("B 2:0:0:0:0:2 + 10.0.0.6@2:0:0:0:0:6").unwrap();
        policy.apply_line(&format!("B 2:0:0:0:0:2 = {name} drain")).unwrap();
        let after = following(&before, policy, |_| Seen::NOTHING);
        assert_eq!(to(judged(&after, &memory, &ack(1000), 3)).slot, first.slot);
        for port in 2000..2100 {
            assert_ne!(to(judged(&after, &memory, &syn(port), 3)).slot, first.slot);
        }
        let fin = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::FIN | flag::ACK);
        assert_eq!(to(judged(&after, &memory, &fin, 4)).learn, Learn::Close);
        // The same ports again are a new connection, and may go elsewhere.
        assert_ne!(to(judged(&after, &memory, &syn(1000), 5)).slot, first.slot);
    }

    #[test]
    fn what_a_backend_answers_comes_from_the_address_and_its_port() {
        let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
        let ported = (1000..1100).find_map(|port| {
            let to = to(judged(&snapshot, &memory, &syn(port), 0));
            to.port.then_some((port, to))
        });
        let (port, there) = ported.unwrap();
        assert_eq!(there.key.backend.to_string(), "10.0.0.3:8080");
        establish(&snapshot, &memory, port, there);
        let back = tcp(BACKEND, CLIENT, (3, 1), (8080, port), flag::ACK);
        let Judgement::Reply(from) = judged(&snapshot, &memory, &back, 9) else { panic!("no reply") };
        assert_eq!((from.slot, from.port, from.learn), (there.slot, true, Learn::Yes));
        let reset = tcp(BACKEND, CLIENT, (3, 1), (8080, port), flag::RST);
        let Judgement::Reply(from) = judged(&snapshot, &memory, &reset, 9) else { panic!("no reply") };
        assert_eq!(from.learn, Learn::Close);
        let other = tcp(BACKEND, CLIENT, (3, 1), (80, port), flag::ACK);
        assert_eq!(judged(&snapshot, &memory, &other, 1), Judgement::Direct, "another port is not its flow");
    }

    #[test]
    fn connections_from_before_are_the_middlebox_own() {
        let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
        let passed = judged(&snapshot, &memory, &ack(1000), 0);
        let Judgement::Pass(slot) = passed else { panic!("{passed:?}") };
        assert_eq!(snapshot.desired().slots.key_of(slot).unwrap().backend.to_string(), "10.0.0.2:80");
        let fin = tcp(CLIENT, VM, (1, 2), (1000, 80), flag::FIN | flag::ACK);
        assert_eq!(judged(&snapshot, &memory, &fin, 0), Judgement::Accept(Reason::NoMatch));
        assert!(memory.flows.is_empty());
        to(judged(&snapshot, &memory, &syn(1000), 0));
    }

    #[test]
    fn a_dead_backends_flows_move_or_end_as_configured() {
        for (option, expected) in [("", "moved"), (" on-dead=reset", "reset"), (" on-dead=keep", "kept")] {
            let (before, memory) = (snapshot(&[&format!("{POOL}{option}")]), Memory::new(1000));
            let first = to(judged(&before, &memory, &syn(1000), 0));
            establish(&before, &memory, 1000, first);
            let dead = first.key.backend;
            let seen = |name: &BackendName| Seen { mac: None, alive: *name != dead };
            let after = following(&before, before.policy().clone(), seen);
            let became = match judged(&after, &memory, &ack(1000), 1) {
                Judgement::Redirect(to) if to.key.backend == dead => "kept",
                Judgement::Redirect(_) => "moved",
                Judgement::Reject(DropReason::BackendGone) => "reset",
                other => panic!("{other:?}"),
            };
            assert_eq!(became, expected);
            for port in 2000..2050 {
                assert_ne!(to(judged(&after, &memory, &syn(port), 1)).key.backend, dead, "no new flow");
            }
        }
    }

    #[test]
    fn without_a_backend_it_is_refused_or_passed() {
        let memory = Memory::new(1000);
        let nobody = |option: &str, seen: Seen| {
            let line = format!("R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3 10.0.0.4{option}");
            let policy = snapshot(&[&line]).policy().clone();
            judged(&snapshot_of(policy, |_| seen), &memory, &syn(1000), 0)
        };
        let dead = Seen { mac: None, alive: false };
        assert_eq!(nobody("", dead), Judgement::Reject(DropReason::NoBackend));
        assert_eq!(nobody(" on-empty=pass", dead), Judgement::Accept(Reason::NoBackend));
        assert_eq!(
            nobody("", Seen::NOTHING),
            Judgement::Drop(DropReason::BackendUnresolved),
            "not yet known"
        );
        assert!(memory.flows.is_empty());
    }

    #[test]
    fn a_backend_that_is_a_client_gets_another() {
        let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
        for port in 1000..1100 {
            let packet = tcp(BACKEND, VM, (3, 2), (port, 80), flag::SYN);
            assert_ne!(
                to(judged(&snapshot, &memory, &packet, 0)).key.backend.ip,
                IpAddr::from([10, 0, 0, 3])
            );
        }
        let alone = self::snapshot(&["R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3@2:0:0:0:0:3"]);
        let memory = Memory::new(1000);
        let packet = tcp(BACKEND, VM, (3, 2), (1000, 80), flag::SYN);
        assert_eq!(judged(&alone, &memory, &packet, 0), Judgement::Accept(Reason::NoBackend));
    }

    #[test]
    fn two_services_with_one_backend_do_not_mix_a_clients_port() {
        let lines = [
            "R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3:80@2:0:0:0:0:3 10.0.0.4:80@2:0:0:0:0:4",
            "R L 2:0:0:0:0:2 10.0.0.2:81 rr 10.0.0.3:80@2:0:0:0:0:3 10.0.0.4:80@2:0:0:0:0:4",
            "R L 2:0:0:0:0:2 10.0.0.2:82 rr 10.0.0.3:80@2:0:0:0:0:3",
        ];
        let (snapshot, memory) = (snapshot(&lines), Memory::new(1000));
        let syn = |port: u16| tcp(CLIENT, VM, (1, 2), (1000, port), flag::SYN);
        let first = to(judged(&snapshot, &memory, &syn(80), 0)).key.backend;
        let second = to(judged(&snapshot, &memory, &syn(81), 0)).key.backend;
        assert_ne!(first, second);
        assert_eq!(judged(&snapshot, &memory, &syn(82), 0), Judgement::Reject(DropReason::NoBackend));
        // UDP is another matter.
        let udp = udp(CLIENT, VM, (1, 2), (1000, 82));
        to(judged(&snapshot, &memory, &udp, 0));
    }

    #[test]
    fn affinity_keeps_a_client_with_its_backend() {
        for method in ["rr", "least", "hash"] {
            let line = format!(
                "R L 2:0:0:0:0:2 10.0.0.2:80 {method} 10.0.0.3@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4 affinity"
            );
            let (snapshot, memory) = (snapshot(&[&line]), Memory::new(10_000));
            let backend = |client: u8, port: u16| {
                let packet = tcp(CLIENT, VM, (client, 2), (port, 80), flag::SYN);
                to(judged(&snapshot, &memory, &packet, 0)).key.backend
            };
            let firsts: Vec<BackendName> = (100..140).map(|client| backend(client, 1)).collect();
            assert!(firsts.iter().any(|name| *name != firsts[0]), "{method}: all clients at one");
            for (client, first) in (100..140).zip(&firsts) {
                assert!((2..20).all(|port| backend(client, port) == *first), "{method}");
            }
        }
    }

    #[test]
    fn errors_about_a_flow_are_translated_both_ways() {
        let (snapshot, memory) = (snapshot(&[POOL]), Memory::new(1000));
        let ported = (1000..1100).find_map(|port| {
            let to = to(judged(&snapshot, &memory, &syn(port), 0));
            to.port.then_some((port, to))
        });
        let (port, there) = ported.unwrap();
        let error = |link: ([u8; 6], [u8; 6]), ips: (u8, u8), quoted: ([u8; 2], [u16; 2])| {
            let mut inner = Vec::new();
            let ([source, destination], [from, to]) = quoted;
            PacketBuilder::ipv4([10, 0, 0, source], [10, 0, 0, destination], 9)
                .tcp(from, to, 0, 0)
                .write(&mut inner, &[])
                .unwrap();
            let mut out = Vec::new();
            PacketBuilder::ethernet2(link.0, link.1)
                .ipv4([10, 0, 0, ips.0], [10, 0, 0, ips.1], 9)
                .icmpv4_raw(3, 4, [0; 4])
                .write(&mut out, &inner)
                .unwrap();
            judged(&snapshot, &memory, &Packet::from_frame(&out).unwrap(), 1)
        };
        // From the client: what the address sent it was too big.
        let Judgement::Error { quote, to, from } = error((CLIENT, VM), (1, 2), ([2, 1], [80, port])) else {
            panic!("not translated")
        };
        let backend = Quote { side: Side::Source, ip: IpAddr::from([10, 0, 0, 3]), port: Some(8080) };
        assert_eq!(
            (quote, to.map(|to| (to.slot, to.port)), from),
            (backend, Some((there.slot, false)), None)
        );
        // From the backend, and from a router on the way to it: what the client sent was too big.
        let vip = Quote { side: Side::Destination, ip: IpAddr::from([10, 0, 0, 2]), port: Some(80) };
        for (router, from_backend) in [(3, true), (77, false)] {
            let judged = error((BACKEND, CLIENT), (router, 1), ([1, 3], [port, 8080]));
            let Judgement::Error { quote, to: None, from } = judged else { panic!("not translated") };
            assert_eq!((quote, from.is_some()), (vip, from_backend));
        }
        let other = error((BACKEND, CLIENT), (77, 1), ([1, 3], [port, 80]));
        assert_eq!(other, Judgement::Accept(Reason::NotOurs), "about no flow of ours");
    }

    #[test]
    fn pieces_of_balanced_datagrams_wait_for_the_first() {
        let (snapshot, memory) = (
            snapshot(&["R L 2:0:0:0:0:2 10.0.0.2:53 rr 10.0.0.3:5353@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4"]),
            Memory::new(1000),
        );
        let piece = |id: u16, first: bool| {
            let mut ip = Ipv4Header::new(16, 9, IpNumber::UDP, [10, 0, 0, 1], [10, 0, 0, 2]).unwrap();
            ip.identification = id;
            ip.more_fragments = first;
            ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
            let mut out = [&VM[..], &CLIENT, &[8, 0]].concat();
            ip.write(&mut out).unwrap();
            out.extend([0x03, 0xe8, 0, 53, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            Packet::from_frame(&out).unwrap()
        };
        for id in 1..10 {
            assert_eq!(judged(&snapshot, &memory, &piece(id, false), 0), Judgement::Hold);
            let first = to(judged(&snapshot, &memory, &piece(id, true), 0));
            let later = to(judged(&snapshot, &memory, &piece(id, false), 0));
            assert_eq!((later.slot, later.port), (first.slot, false));
            assert_eq!(first.port, first.key.backend.port == Some(5353));
        }
        // Pieces of a datagram whose backend goes meanwhile go nowhere, and make no flow of their own.
        let first = to(judged(&snapshot, &memory, &piece(20, true), 0));
        let gone = following(&snapshot, snapshot.policy().clone(), |name| Seen {
            mac: None,
            alive: *name != first.key.backend,
        });
        let flows = memory.flows.len();
        assert_eq!(judged(&gone, &memory, &piece(20, false), 0), Judgement::Drop(DropReason::Piece));
        assert_eq!(memory.flows.len(), flows);
    }
}
