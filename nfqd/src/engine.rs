//! The engine: a packet, a snapshot of the policy, the flows and the time in; a verdict out. No I/O.

use crate::flows::{FlowKey, Flows, FragmentKey, Seconds};
use nfqd_rules::decide::{filtered, redirected};
use nfqd_rules::mark::{self, Operation};
use nfqd_rules::nft::delta::Desired;
use nfqd_rules::packet::{Fragment, IPV6_LEN, Ip, Packet, Ports};
use nfqd_rules::slots::SlotKey;
use nfqd_rules::{Filtered, Middlebox, Policy};
use nfqd_shmctl::{Action, MacAddr, Protocol, RuleId};

/// Everything that a verdict depends on besides the packet and the flows; made anew for every change of the policy, which
/// costs nothing.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    desired: Desired,
    /// Whether a backend whose MAC is unknown gets packets all the same; offline there is nobody to ask.
    pub redirect_unresolved: bool,
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
    /// A snapshot of what is to hold.
    pub fn new(desired: Desired) -> Snapshot {
        Snapshot { desired, redirect_unresolved: false, learn: true, filters: Filters::All }
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.desired.policy
    }

    /// The middlebox that a mark names, on the way to the engine by br_netfilter.
    pub fn middlebox_of(&self, mark: u32) -> Option<MacAddr> {
        self.desired.slots.middlebox_of(mark::index(mark))
    }

    /// The MAC of a slot's backend, if it is known.
    pub fn mac(&self, key: &SlotKey) -> Option<MacAddr> {
        self.desired.slots.get(key).and_then(|slot| slot.mac)
    }

    fn has(&self, key: &SlotKey) -> bool {
        self.desired.slots.get(key).is_some()
    }

    fn filters(&self, mac: MacAddr, middlebox: &Middlebox) -> bool {
        match self.filters {
            Filters::All => true,
            Filters::WithoutTags => middlebox.firewall().is_some_and(|firewall| !firewall.looks_at_tags(mac)),
            Filters::None => false,
        }
    }
}

/// What the engine says about a packet, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Judged {
    /// What it says.
    pub judgement: Judgement,
    /// The rule of its middlebox that let it pass, or that dropped it.
    pub rule: Option<RuleId>,
}

/// What the engine says about a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// It goes on unchanged.
    Accept(Reason),
    /// The filters of its middlebox drop it.
    Drop,
    /// It goes to a backend.
    Redirect {
        /// The backend.
        slot: SlotKey,
        /// Whether the kernel may remember the flow.
        learn: bool,
    },
    /// It comes back from a backend, and its source becomes the address that the client knows.
    Reply {
        /// The backend.
        slot: SlotKey,
        /// Whether the kernel may remember the flow.
        learn: bool,
    },
    /// It is a backend's own; the kernel may remember that.
    Direct,
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
}

impl Judgement {
    /// The mark that tells the kernel to carry it out; `None` drops the packet.
    pub fn mark(self, old: u32, snapshot: &Snapshot) -> Option<u32> {
        let operation = |redirect: bool, learn: bool| match (redirect, learn) {
            (true, true) => Operation::RedirectLearn,
            (true, false) => Operation::Redirect,
            (false, true) => Operation::ReplyLearn,
            (false, false) => Operation::Reply,
        };
        let index = |slot: &SlotKey| snapshot.desired.slots.get(slot).map(|slot| slot.index);
        match self {
            Judgement::Drop => None,
            Judgement::Accept(_) => Some(mark::cleared(old)),
            Judgement::Direct => Some(mark::with(old, Operation::ReplyLearn, 0)),
            Judgement::Redirect { slot, learn } | Judgement::Reply { slot, learn } => {
                let redirect = matches!(self, Judgement::Redirect { .. });
                Some(match index(&slot) {
                    Some(index) => mark::with(old, operation(redirect, learn), index),
                    None => mark::cleared(old),
                })
            }
        }
    }
}

/// Judges a packet, and remembers the flow of one that it sends to a backend.
pub fn judge(snapshot: &Snapshot, flows: &Flows, packet: &Packet, now: Seconds) -> Judged {
    let middlebox = snapshot.policy().get(packet.link.destination);
    let filters = middlebox.filter(|middlebox| snapshot.filters(packet.link.destination, middlebox));
    let Filtered { action, rule } = filters
        .map_or(Filtered { action: Action::Allow, rule: None }, |middlebox| filtered(middlebox, packet));
    let judgement = match action {
        Action::Deny => Judgement::Drop,
        Action::Allow => forward(snapshot, flows, middlebox, packet, now),
    };
    Judged { judgement, rule }
}

/// Where a packet goes that the filters let pass.
fn forward(
    snapshot: &Snapshot,
    flows: &Flows,
    middlebox: Option<&Middlebox>,
    packet: &Packet,
    now: Seconds,
) -> Judgement {
    let from_backend = packet.ip.filter(|ip| snapshot.desired.slots.is_backend(ip.source));
    if let Some(slot) = from_backend.and_then(|ip| reply(snapshot, flows, &ip, now)) {
        return Judgement::Reply { slot, learn: learnable(snapshot, packet) };
    }
    let redirect = middlebox.and_then(|middlebox| redirect(snapshot, flows, middlebox, packet, now));
    match (redirect, middlebox) {
        (Some(judgement), _) => judgement,
        (None, Some(middlebox)) if !middlebox.services().is_empty() => Judgement::Accept(Reason::NoMatch),
        (None, _) if from_backend.is_some() && learnable(snapshot, packet) => Judgement::Direct,
        (None, Some(_)) => Judgement::Accept(Reason::NoMatch),
        (None, None) => Judgement::Accept(Reason::NotOurs),
    }
}

/// Flows that the kernel's maps can hold: whole packets of TCP and UDP with ports. IPv6 extension headers keep a packet
/// out of the fast path, so there is nothing to remember for it there.
fn learnable(snapshot: &Snapshot, packet: &Packet) -> bool {
    snapshot.learn
        && packet.ip.is_some_and(|ip| {
            let plain = ip.source.is_ipv4() || ip.l4 == IPV6_LEN;
            let known = ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP;
            ip.fragment == Fragment::Whole && ip.ports.is_some() && plain && known && ip.mendable
        })
}

const NO_PORTS: Ports = Ports { source: 0, destination: 0 };

/// The slot that a packet from a backend's address comes back from.
fn reply(snapshot: &Snapshot, flows: &Flows, ip: &Ip, now: Seconds) -> Option<SlotKey> {
    if !ip.mendable {
        return None;
    }
    let fragment =
        FragmentKey { source: ip.source, destination: ip.destination, protocol: ip.protocol, id: ip.id };
    let slot = if ip.fragment == Fragment::Later {
        flows.get_fragment(&fragment, now)?
    } else {
        let key = FlowKey {
            backend: ip.source,
            client: ip.destination,
            protocol: ip.protocol,
            ports: ip.ports.unwrap_or(NO_PORTS),
        };
        let slot = flows.get(&key, now)?;
        // The service may be gone since, and the flow with it: it does not come back when the service does.
        if !snapshot.has(&slot) {
            flows.remove(&key);
        }
        slot
    };
    if !snapshot.has(&slot) {
        return None;
    }
    if ip.fragment == Fragment::First {
        flows.insert_fragment(fragment, slot, now);
    }
    Some(slot)
}

fn redirect(
    snapshot: &Snapshot,
    flows: &Flows,
    middlebox: &Middlebox,
    packet: &Packet,
    now: Seconds,
) -> Option<Judgement> {
    let (vip, to) = redirected(middlebox, packet)?;
    let ip = packet.ip?;
    let slot = SlotKey { middlebox: packet.link.destination, vip, backend: to.ip };
    if !snapshot.has(&slot) {
        return None;
    }
    if snapshot.mac(&slot).is_none() && !snapshot.redirect_unresolved {
        return Some(Judgement::Accept(Reason::BackendUnresolved));
    }
    if ip.fragment != Fragment::Later {
        let ports = ip.ports.unwrap_or(NO_PORTS);
        let key = FlowKey {
            backend: to.ip,
            client: ip.source,
            protocol: ip.protocol,
            ports: Ports { source: ports.destination, destination: ports.source },
        };
        flows.insert(key, slot, now);
    }
    Some(Judgement::Redirect { slot, learn: learnable(snapshot, packet) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{IpNumber, Ipv4Header, PacketBuilder};
    use nfqd_rules::slots::Slots;
    use std::net::IpAddr;
    use std::time::Instant;

    const VM: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const CLIENT: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const BACKEND: [u8; 6] = [2, 0, 0, 0, 0, 3];

    fn snapshot(lines: &[&str]) -> Snapshot {
        let mut policy = Policy::default();
        for line in lines {
            policy.apply_line(line).unwrap();
        }
        let mut slots = Slots::default();
        slots.follow(&policy, |_| None, Instant::now());
        Snapshot::new(Desired { policy, slots })
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

    fn judged(snapshot: &Snapshot, flows: &Flows, packet: &Packet, now: Seconds) -> Judgement {
        judge(snapshot, flows, packet, now).judgement
    }

    fn vip_of(judgement: Judgement) -> Option<IpAddr> {
        match judgement {
            Judgement::Reply { slot, .. } => Some(slot.vip),
            _ => None,
        }
    }

    #[test]
    fn a_flow_goes_there_and_comes_back() {
        let (snapshot, flows) = (static_to_3(), Flows::new(100));
        let there = judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
        assert!(matches!(there, Judgement::Redirect { learn: true, .. }), "{there:?}");
        assert_eq!(there.mark(0x7f, &snapshot), Some(0x3000_017f));
        let back = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 1);
        assert_eq!(vip_of(back), Some(IpAddr::from([10, 0, 0, 2])));
        assert_eq!(back.mark(0, &snapshot), Some(0x5000_0100));
        // The backend's own conversation with the same client is left alone.
        let own = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1001)), 1);
        assert_eq!((own, own.mark(1, &snapshot)), (Judgement::Direct, Some(0x5000_0001)));
        let other = judged(&snapshot, &flows, &udp(CLIENT, BACKEND, (1, 3), (53, 1001)), 1);
        assert_eq!(other, Judgement::Accept(Reason::NotOurs));
    }

    #[test]
    fn a_reply_outlives_nothing_it_should_not() {
        let (before, flows) = (static_to_3(), Flows::new(100));
        judged(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
        let reply = udp(BACKEND, CLIENT, (3, 1), (53, 1000));
        let after = snapshot(&["R L 2:0:0:0:0:2 10.0.0.9 0 10.0.0.3@2:0:0:0:0:3"]);
        assert_eq!(judged(&after, &flows, &reply, 1), Judgement::Direct, "the service is gone");
        assert_eq!(judged(&before, &flows, &reply, 1), Judgement::Direct, "and the flow with it");
        judged(&before, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 2);
        assert!(vip_of(judged(&before, &flows, &reply, 200)).is_some());
        assert_eq!(judged(&before, &flows, &reply, 600), Judgement::Direct, "the flow is too old");
    }

    #[test]
    fn later_fragments_follow_the_first() {
        let (snapshot, flows) = (static_to_3(), Flows::new(100));
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
        assert!(matches!(judged(&snapshot, &flows, &piece(false), 0), Judgement::Accept(_)));
        let first = judged(&snapshot, &flows, &piece(true), 0);
        assert!(matches!(first, Judgement::Reply { learn: false, .. }), "{first:?}");
        assert_eq!(vip_of(judged(&snapshot, &flows, &piece(false), 0)), vip_of(first));
    }

    #[test]
    fn without_the_backends_mac_the_redirect_is_not_made() {
        let (mut snapshot, flows) = (snapshot(&["R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3"]), Flows::new(100));
        let packet = udp(CLIENT, VM, (1, 2), (1000, 53));
        assert_eq!(judged(&snapshot, &flows, &packet, 0), Judgement::Accept(Reason::BackendUnresolved));
        assert!(flows.is_empty());
        snapshot.redirect_unresolved = true;
        assert!(matches!(judged(&snapshot, &flows, &packet, 0), Judgement::Redirect { .. }));
    }

    #[test]
    fn filters_go_first_even_for_replies() {
        let lines = [
            "R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3",
            "R F 2:0:0:0:0:1 10.0.0.1",
            "A 2:0:0:0:0:1 I 1 s 10.0.0.3",
        ];
        let (snapshot, flows) = (snapshot(&lines), Flows::new(100));
        judged(&snapshot, &flows, &udp(CLIENT, VM, (1, 2), (1000, 53)), 0);
        let back = judged(&snapshot, &flows, &udp(BACKEND, CLIENT, (3, 1), (53, 1000)), 0);
        assert_eq!(back, Judgement::Drop);
        assert_eq!(back.mark(0, &snapshot), None);
    }
}
