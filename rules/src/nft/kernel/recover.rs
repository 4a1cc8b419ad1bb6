//! Recovery of the state that an earlier nfqd has left in the kernel.

use super::super::model::Family;
use super::super::names::{NETWORKS, split_prefix};
use super::super::sys::{DumpRequest, FoundSet};
use super::{Kernel, KernelError};
use crate::ids::{MiddleboxId, SlotId};
use crate::mark::{self, Origin};
use crate::network::{MiddleboxKey, Networks};
use crate::packet::Ports;
use crate::slots::{SlotKey, SlotVersion, Slots};
use crate::timeouts::CLOSE_TIMEOUT;
use nfqd_shmctl::{MacAddr, Protocol};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

/// The state of an earlier nfqd, as far as the kernel remembers it.
#[derive(Debug, Default)]
pub struct RecoveredState {
    /// The networks, with their identifiers.
    pub networks: Networks,
    /// The slots, with their identifiers.
    pub slots: Slots,
    /// The MACs of backends, whether they were found or a command gave them.
    pub macs: BTreeMap<SlotKey, MacAddr>,
    /// The cached replies.
    pub replies: Vec<CachedReply>,
}

/// The reply direction of a flow, as the kernel caches it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CachedReply {
    /// The backend's address.
    pub source: IpAddr,
    /// The client's address.
    pub destination: IpAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The ports, as in packets of the backend.
    pub ports: Ports,
    /// The slot.
    pub slot: SlotId,
    /// The backend that the slot stands for.
    pub key: SlotKey,
    /// Whether the flow is opening.
    pub opening: bool,
    /// Whether the flow is closing.
    pub closing: bool,
}

/// The suffixes of the maps of flows and replies, with their protocols.
const FLOW_MAPS: [(&str, Protocol); 8] = [
    ("tcp4", Protocol::TCP),
    ("tcp6", Protocol::TCP),
    ("udp4", Protocol::UDP),
    ("udp6", Protocol::UDP),
    ("port_tcp4", Protocol::TCP),
    ("port_tcp6", Protocol::TCP),
    ("port_udp4", Protocol::UDP),
    ("port_udp6", Protocol::UDP),
];

/// The names of the map that tells the engine the middlebox: today's, and that of layout 1.
const UPCALL_MAPS: [&str; 2] = ["upcall", "ask"];

impl Kernel {
    /// Reads the state that an earlier nfqd has left in the kernel: nothing, if there is no table
    /// of ours.
    ///
    /// # Errors
    /// If the kernel cannot be asked, or a table of our name belongs to another program or to a
    /// newer nfqd.
    pub fn recover(&mut self) -> Result<RecoveredState, KernelError> {
        let (mut out, now) = (RecoveredState::default(), Instant::now());
        if !self.owns_table(Family::Bridge)? {
            return Ok(out);
        }
        self.check_layout(Family::Bridge)?;
        let mut versions: BTreeMap<SlotId, SlotVersion> = BTreeMap::new();
        for (map, address_len) in [("backend_vip4", 4), ("backend_vip6", 16)] {
            for element in self.elements(Family::Bridge, map)? {
                let version: Option<SlotVersion> =
                    element.comment.as_ref().and_then(|text| text.parse().ok());
                let version = version.filter(|_| element.data.len() == address_len);
                versions.extend(slot(&element.key).zip(version));
            }
        }
        let key_of = |id: SlotId| versions.get(&id).map(SlotVersion::key);
        for element in self.elements(Family::Bridge, "backend_mac")? {
            let Some(id) = slot(&element.key) else { continue };
            // Slots that only replies on their way still carry are in no such map.
            out.slots.adopt(versions.get(&id).map(|version| (id, *version)), now);
            let key = key_of(id).filter(|key| !key.is_local());
            let mac: Option<[u8; 6]> = element.data.try_into().ok();
            out.macs.extend(key.zip(mac.map(MacAddr)));
        }
        for (id, version) in &versions {
            out.slots.adopt([(*id, *version)], now);
            out.slots.reserve(*id, now);
        }
        for element in self.elements(Family::Bridge, NETWORKS)? {
            let id =
                <[u8; 4]>::try_from(element.key).ok().map(u32::from_ne_bytes).map(mark::origin);
            let name = element.comment.and_then(|text| text.parse().ok());
            if let (Some(Origin::Network(id)), Some(name)) = (id, name) {
                out.networks.adopt([(id, name)]);
            }
        }
        let sets = self.dump(&DumpRequest::Sets(Family::Bridge))?.sets;
        for set in sets.keys().filter(|name| UPCALL_MAPS.contains(&split_prefix(name).1)) {
            for element in self.elements(Family::Bridge, set)? {
                // Earlier versions wrote the number alone.
                let comment = element.comment.unwrap_or_default();
                let (number, key) = comment.split_once(' ').unwrap_or((&comment, ""));
                let id = number.parse().ok().and_then(MiddleboxId::new);
                let mac: Option<[u8; 6]> = element.key.try_into().ok();
                let anywhere = mac.map(|mac| MiddleboxKey::anywhere(MacAddr(mac)));
                out.slots.adopt_middleboxes(id.zip(key.parse().ok().or(anywhere)), now);
            }
        }
        let (flows, replies) = (caches("flows", &sets), caches("replies", &sets));
        // A connection that has been established since is among the replies as well, which come later.
        let opening = caches("opening", &sets).into_iter().map(|found| (found, true));
        let replies = opening.chain(replies.into_iter().map(|found| (found, false)));
        for (set, _) in flows {
            for element in self.elements(Family::Bridge, &set)? {
                if let Some(id) = slot(&element.data) {
                    out.slots.reserve(id, now);
                }
            }
        }
        for ((set, protocol), opening) in replies {
            for element in self.elements(Family::Bridge, &set)? {
                let Some(id) = slot(&element.data) else { continue };
                out.slots.reserve(id, now);
                // Only a closing flow is cached for so short a time.
                let short = u64::from(CLOSE_TIMEOUT) * 1000;
                let closing = element.timeout_ms.is_some_and(|timeout| timeout <= short);
                let reply =
                    key_of(id).and_then(|key| cached_reply(&element.key, protocol, id, key));
                out.replies.extend(reply.map(|reply| CachedReply { opening, closing, ..reply }));
            }
        }
        Ok(out)
    }
}

/// Returns the maps of one kind that packets fill, in all networks, with their protocols.
fn caches(kind: &str, sets: &BTreeMap<String, FoundSet>) -> Vec<(String, Protocol)> {
    let protocol = |name: &String| {
        let suffix = split_prefix(name).1.strip_prefix(kind)?.strip_prefix('_')?;
        let (_, protocol) = FLOW_MAPS.into_iter().find(|(known, _)| *known == suffix)?;
        Some((name.clone(), protocol))
    };
    sets.keys().filter_map(protocol).collect()
}

/// Reads the slot of a key or data of a map, in host order.
fn slot(bytes: &[u8]) -> Option<SlotId> {
    mark::slot(u32::from_ne_bytes(bytes.try_into().ok()?))
}

/// Reads the key of a map of replies: two addresses, then two ports of two bytes padded to four.
fn cached_reply(
    key: &[u8],
    protocol: Protocol,
    slot: SlotId,
    slot_key: SlotKey,
) -> Option<CachedReply> {
    let address = |bytes: &[u8]| match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    let (addresses, ports) = key.split_at_checked(key.len().checked_sub(8)?)?;
    let (source, destination) = addresses.split_at(addresses.len() / 2);
    let &[a, b, _, _, c, d, _, _] = ports else { return None };
    Some(CachedReply {
        source: address(source)?,
        destination: address(destination)?,
        protocol,
        ports: Ports {
            source: u16::from_be_bytes([a, b]),
            destination: u16::from_be_bytes([c, d]),
        },
        slot,
        key: slot_key,
        opening: false,
        closing: false,
    })
}
