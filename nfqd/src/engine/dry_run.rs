//! A decision without a side effect: by copies of what the live state knows about the packet.

use super::balance::original_tuple;
use super::flows::{FlowTable, ReplyTuple};
use super::pipeline::{NO_PORTS, PacketContext};
use super::{EngineResult, EngineState, Ingress, Snapshot, decide};
use nfqd_rules::packet::{IpHeader, Packet};
use nfqd_rules::{Middlebox, MiddleboxKey};
use nfqd_shmctl::Frontend;
use std::net::IpAddr;

/// The room for flows of a dry run: those of one client's port.
const ROOM: usize = 1 << 12;
/// The lifetime of what is copied, in seconds: longer than the dry run.
const LIFETIME: u32 = 60;

/// The result of a dry run.
pub struct DryRun {
    /// The engine's result.
    pub result: EngineResult,
    /// Whether the packet belongs to a flow that is known.
    pub is_of_known_flow: bool,
}

/// Decides on a packet as [`decide`] would, all filters included. Nothing of the live state changes,
/// neither flows nor the turns of a pool.
pub fn dry_run(
    snapshot: &Snapshot,
    state: &EngineState,
    ingress: Ingress,
    packet: &Packet,
    now: u32,
) -> DryRun {
    let copy = EngineState::new(ROOM);
    let key = snapshot.middlebox_at(ingress.network, packet.link.destination);
    let middlebox = key.and_then(|key| Some((key, snapshot.policy().get(key)?)));
    let mut is_of_known_flow = false;
    if let Some(ip) = &packet.ip {
        copy_flows(&state.flows, &copy.flows, ip);
        let context = PacketContext { snapshot, state, ingress, middlebox, packet, now };
        let datagram = context.fragment_key(ip);
        if let Some(route) = state.fragments.get(&datagram, now) {
            copy.fragments.insert(datagram, route, now, LIFETIME);
        }
        let known = |key| state.flows.slot_of(&original_tuple(key, ip), now).is_some();
        is_of_known_flow = key.is_some_and(known);
        let reply = ReplyTuple {
            network: ingress.network,
            backend: ip.source,
            client: ip.destination,
            protocol: ip.protocol,
            ports: ip.ports.unwrap_or(NO_PORTS),
        };
        is_of_known_flow |= state.flows.slot_of_reply(&reply, now).is_some();
        let frontends = |(key, its): (MiddleboxKey, &'_ Middlebox)| {
            let all: Vec<Frontend> = its.services().keys().copied().collect();
            all.into_iter().map(move |frontend| (key, frontend, ip.source))
        };
        for client in middlebox.into_iter().flat_map(frontends) {
            if let Some(slot) = state.affinity.get(&client, now) {
                copy.affinity.insert(client, slot, now, LIFETIME);
            }
        }
    }
    for (_, slot) in key.into_iter().flat_map(|key| snapshot.desired().slots.of(key)) {
        copy.flows.set_live(slot.id, state.flows.live(slot.id));
    }
    let result = decide(&snapshot.detached(key), &copy, ingress, packet, now);
    DryRun { result, is_of_known_flow }
}

/// Copies the flows that a packet may belong to, and those whose replies a new flow's could be mistaken
/// for: all of its client's port.
fn copy_flows(from: &FlowTable, to: &FlowTable, ip: &IpHeader) {
    let copy = |client: IpAddr, port: u16| from.copy_flows_of(client, port, ip.protocol, to);
    let ports = ip.ports.unwrap_or(NO_PORTS);
    copy(ip.source, ports.source);
    copy(ip.destination, ports.destination);
    if let Some(quoted) = ip.quoted {
        let ports = quoted.ports.unwrap_or(NO_PORTS);
        from.copy_flows_of(quoted.source, ports.source, quoted.protocol, to);
        from.copy_flows_of(quoted.destination, ports.destination, quoted.protocol, to);
    }
}
