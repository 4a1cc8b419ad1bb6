//! The networks of this host: which bridges, ports and VLANs there are, and where MACs are seen.
//!
//! `links` and `fdb` are read once and follow the kernel's notifications. A middlebox is on the
//! network that its channel is bound to, else where its MAC is seen.

mod fdb;
mod links;

use crate::rtnetlink::{RTM_DELLINK, RTM_NEWLINK, RouteMonitor, RouteSocket};
use fdb::{ForwardingDatabase, Segment};
use links::Links;
use nfqd_rules::network::{Port, PortVlans};
use nfqd_rules::{MiddleboxKey, Network, NetworkId, Networks};
use nfqd_shmctl::MacAddr;
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};

/// The host's networks, as the kernel tells them.
pub struct HostNetworks {
    socket: RouteSocket,
    monitor: RouteMonitor,
    links: Links,
    fdb: ForwardingDatabase,
    /// The bridges that nfqd is limited to; all if there are none.
    only: Vec<String>,
    placements: BTreeMap<MiddleboxKey, Placement>,
    /// Whether notifications were lost, and what there is could not be read since.
    is_stale: bool,
}

/// The place of a middlebox.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Placement {
    network: NetworkId,
    /// Other networks that its MAC is seen on.
    also_on: BTreeSet<Network>,
}

/// The changes of a host's networks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    /// Whether bridges, ports or VLANs have changed, or nobody knows what has.
    all: bool,
    /// The MACs that are seen elsewhere, or no longer.
    macs: BTreeSet<MacAddr>,
}

impl Changes {
    /// Whether bridges, ports or VLANs may have changed.
    pub fn concern_ports(&self) -> bool {
        self.all
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        !self.all && self.macs.is_empty()
    }

    /// Whether the place of a MAC may be another one now.
    pub fn concern(&self, mac: MacAddr) -> bool {
        self.all || self.macs.contains(&mac)
    }
}

/// A way out of the host to a network: a port, and the tag that frames need.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exit {
    /// The index of the port.
    pub port: u32,
    /// The EtherType and the VLAN of the tag, if frames leave tagged.
    pub tag: Option<(u16, u16)>,
}

impl HostNetworks {
    /// The networks as they are now; `only` are the bridges to serve, all if it is empty.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn open(only: &[String]) -> Result<HostNetworks, Errno> {
        let socket = RouteSocket::open()?;
        // Opened before the first reading, so that no change is missed.
        let monitor = RouteMonitor::open()?;
        let (links, fdb) =
            (consistent(|| Links::read(&socket))?, ForwardingDatabase::read(&socket)?);
        let only = only.to_vec();
        Ok(HostNetworks {
            socket,
            monitor,
            links,
            fdb,
            only,
            placements: BTreeMap::new(),
            is_stale: false,
        })
    }

    /// Returns the descriptor that is readable when something has changed.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }

    /// Follows the kernel's notifications.
    ///
    /// # Errors
    /// If the kernel cannot be asked what has changed.
    pub fn follow(&mut self) -> Result<Changes, Errno> {
        let HostNetworks { monitor, fdb, .. } = self;
        let mut changes = Changes::default();
        let result = monitor.read(|message| match message.kind {
            RTM_NEWLINK | RTM_DELLINK => changes.all = true,
            _ => changes.macs.extend(fdb.note(message)),
        });
        let is_lost = result.is_err() || self.is_stale;
        if is_lost || changes.all {
            // Until it is read, whatever comes of it.
            self.is_stale = true;
            if is_lost {
                self.socket = RouteSocket::open()?;
                self.fdb = ForwardingDatabase::read(&self.socket)?;
            }
            let links = consistent(|| Links::read(&self.socket))?;
            self.is_stale = false;
            changes.all = is_lost || links != self.links;
            self.links = links;
        }
        Ok(changes)
    }

    /// Whether notifications were lost, and must be made up for.
    pub fn is_stale(&self) -> bool {
        self.is_stale
    }

    /// Whether a network is a bridge whose VLANs are networks of their own.
    pub fn has_vlans(&self, network: &Network) -> bool {
        let mut bridges = self.links.bridges.values();
        network.vlan.is_none()
            && bridges
                .any(|bridge| *bridge.name == *network.bridge && bridge.vlan_protocol.is_some())
    }

    /// Returns the bridges: the name, the names of the ports, and whether it is VLAN-aware.
    pub fn bridges(&self) -> impl Iterator<Item = (&str, Vec<&str>, bool)> {
        self.links.bridges.iter().map(|(index, bridge)| {
            let ports = self.links.ports.values().filter(|port| port.bridge == *index);
            let names = ports.map(|port| port.name.as_str()).collect();
            (bridge.name.as_str(), names, bridge.vlan_protocol.is_some())
        })
    }

    fn serves(&self, bridge: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == bridge)
    }

    /// Brings ports and bridges into the names of networks, which the kernel's tables have.
    pub fn describe(&self, networks: &mut Networks) {
        let mut ports = BTreeMap::new();
        for (index, port) in &self.links.ports {
            let Some(bridge) = self.links.bridges.get(&port.bridge) else { continue };
            let Some(id) = networks.intern(&Network::bridge(&bridge.name)) else { continue };
            let vlans = match bridge.vlan_protocol {
                Some(protocol) => PortVlans::Aware { protocol, untagged: port.vlans.pvid },
                None => PortVlans::Unaware,
            };
            ports.insert(*index, Port { bridge: id, vlans });
        }
        networks.set_ports(ports);
    }

    /// Places these middleboxes. Returns whether any has another network than before.
    pub fn place(
        &mut self,
        middleboxes: impl Iterator<Item = MiddleboxKey>,
        networks: &mut Networks,
    ) -> bool {
        let mut placements = BTreeMap::new();
        for key in middleboxes {
            let placement = self.placement(key, networks);
            if let Some(before) = self.placements.get(&key).filter(|before| **before != placement) {
                report_move(key, before, &placement, networks);
                if before.network != placement.network {
                    networks.set_vm_port(before.network, key.mac, None);
                }
            }
            placements.insert(key, placement);
        }
        let is_moved = |(key, placement): (&MiddleboxKey, &Placement)| {
            let before = self.placements.get(key);
            before.is_none_or(|before| before.network != placement.network)
        };
        let moved = placements.iter().any(is_moved);
        self.placements = placements;
        moved
    }

    /// Places one middlebox, which a command has registered or changed.
    pub fn place_one(&mut self, key: MiddleboxKey, networks: &mut Networks) {
        let placement = self.placement(key, networks);
        self.placements.insert(key, placement);
    }

    /// Forgets a middlebox that is not registered any more.
    pub fn forget(&mut self, key: MiddleboxKey, networks: &mut Networks) {
        networks.set_vm_port(self.network_of(key), key.mac, None);
        self.placements.remove(&key);
    }

    fn placement(&self, key: MiddleboxKey, networks: &mut Networks) -> Placement {
        let at = |network| Placement { network, also_on: BTreeSet::new() };
        let scope = networks.name(key.network).cloned();
        let bridge = scope.as_ref().map(|scope| Network::bridge(&scope.bridge));
        if scope.as_ref().is_some_and(|scope| !self.has_vlans(scope)) {
            return at(key.network);
        }
        let mut seen = self.networks_of(key.mac);
        seen.retain(|network| bridge.as_ref().is_none_or(|bridge| bridge.bridge == network.bridge));
        let before = self.placements.get(&key).map(|placement| placement.network);
        let known = before.filter(|network| *network != key.network);
        let stays = known.and_then(|id| networks.name(id).cloned());
        let home = match (stays, seen.first()) {
            (Some(stays), _) if seen.is_empty() || seen.contains(&stays) => Some(stays),
            (_, first) => first.cloned().or_else(|| self.only_network(bridge.is_some())),
        };
        let Some(home) = home else { return at(key.network) };
        let network = networks.intern(&home).unwrap_or(key.network);
        seen.remove(&home);
        Placement { network, also_on: seen }
    }

    /// Returns the one network there is, if there is only one.
    fn only_network(&self, is_bound: bool) -> Option<Network> {
        let mut bridges = self.links.bridges.values().filter(|bridge| self.serves(&bridge.name));
        let bridge = bridges.next().filter(|_| !is_bound)?;
        bridges.next().is_none().then(|| Network::bridge(&bridge.name))
    }

    /// Notes the port of a middlebox, whose own conversations are remembered if it has services.
    pub fn note_port(&self, key: MiddleboxKey, has_services: bool, networks: &mut Networks) {
        let network = self.network_of(key);
        let name = networks.name(network).filter(|_| has_services).cloned();
        let seen = name.and_then(|name| {
            let mut segments = self.fdb.segments(key.mac);
            segments.find(|(segment, _)| self.network(*segment).as_ref() == Some(&name))
        });
        // The bridge forgets a MAC that is silent, but its next frame comes by the same port.
        let before = networks
            .vm_port(network, key.mac)
            .filter(|port| has_services && self.links.ports.contains_key(port));
        networks.set_vm_port(network, key.mac, seen.map(|(_, port)| port).or(before));
    }

    /// Returns the network that a MAC is on; [`NetworkId::ANY`] if that is not known.
    pub fn network_of(&self, key: MiddleboxKey) -> NetworkId {
        self.placements.get(&key).map_or(key.network, |placement| placement.network)
    }

    /// Returns the other networks that a middlebox' MAC is seen on.
    pub fn also_on(&self, key: MiddleboxKey) -> impl Iterator<Item = &Network> {
        self.placements.get(&key).into_iter().flat_map(|placement| &placement.also_on)
    }

    /// Returns the networks that a MAC was seen on.
    fn networks_of(&self, mac: MacAddr) -> BTreeSet<Network> {
        let segments = self.fdb.segments(mac).filter_map(|(segment, _)| self.network(segment));
        segments.collect()
    }

    fn network(&self, segment: Segment) -> Option<Network> {
        let bridge = self.links.bridges.get(&segment.bridge)?;
        let whole = self.serves(&bridge.name).then(|| Network::bridge(&bridge.name))?;
        match (bridge.vlan_protocol, segment.vlan) {
            (Some(_), Some(vlan)) => Some(whole.in_vlan(vlan)),
            (Some(_), None) => None,
            (None, _) => Some(whole),
        }
    }

    /// Whether a MAC was seen on other networks, and not on this one.
    pub fn is_elsewhere(&self, mac: MacAddr, network: &Network) -> bool {
        let seen = self.networks_of(mac);
        !seen.is_empty() && !seen.contains(network)
    }

    /// Returns the index and the MAC of the bridge of a network.
    pub fn bridge(&self, network: &Network) -> Option<(u32, MacAddr)> {
        let mut bridges = self.links.bridges.iter();
        let (index, bridge) = bridges.find(|(_, bridge)| *bridge.name == *network.bridge)?;
        Some((*index, bridge.mac))
    }

    /// Returns the ways out to a network: those ports of it that a MAC was seen on, all of them if
    /// it was on none or there is no MAC.
    pub fn exits(&self, network: &Network, mac: Option<MacAddr>) -> Vec<Exit> {
        let Some((index, _)) = self.bridge(network).filter(|_| !self.has_vlans(network)) else {
            return Vec::new();
        };
        let all: Vec<Exit> = self
            .links
            .ports
            .iter()
            .filter_map(|(port, its)| {
                if its.bridge != index {
                    return None;
                }
                let tag = match network.vlan {
                    None => None,
                    Some(vlan) => {
                        let protocol = self.links.bridges.get(&index)?.vlan_protocol?;
                        let untagged = its.vlans.leaves_untagged(vlan)?;
                        (!untagged).then_some((protocol.number(), vlan))
                    }
                };
                Some(Exit { port: *port, tag })
            })
            .collect();
        let segment = Segment { bridge: index, vlan: network.vlan };
        let seen = mac.and_then(|mac| self.fdb.segments(mac).find(|(other, _)| *other == segment));
        match seen {
            Some((_, port)) if all.iter().any(|exit| exit.port == port) => {
                all.into_iter().filter(|exit| exit.port == port).collect()
            }
            _ => all,
        }
    }

    /// Returns the name of the device by which the host itself is on a network, if it has one: the
    /// bridge, or a VLAN device on it.
    pub fn host_device(&self, network: &Network) -> Option<String> {
        let (index, _) = self.bridge(network)?;
        let bridge = self.links.bridges.get(&index).filter(|_| !self.has_vlans(network))?;
        let Some(vlan) = network.vlan else { return Some(bridge.name.clone()) };
        if bridge.vlans.pvid == Some(vlan) {
            return Some(bridge.name.clone());
        }
        let mut devices = self.links.vlan_devices.iter();
        let device = devices.find(|(below, id, _)| (*below, *id) == (index, vlan));
        device.map(|(.., name)| name.clone())
    }

    /// Whether the port that a MAC was seen on may only talk to ports that are not isolated.
    pub fn is_isolated(&self, network: &Network, mac: MacAddr) -> bool {
        let Some((index, _)) = self.bridge(network) else { return false };
        let segment = Segment { bridge: index, vlan: network.vlan };
        let seen = self.fdb.segments(mac).find(|(other, _)| *other == segment);
        let port = seen.and_then(|(_, port)| self.links.ports.get(&port));
        port.is_some_and(|port| port.is_isolated)
    }
}

/// Reads something again that has changed meanwhile, a few times.
fn consistent<T>(read: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    const TRIES: usize = 10;
    let mut results = (0..TRIES).map(|_| read());
    results.find(|result| !matches!(result, Err(Errno::EINTR))).unwrap_or(Err(Errno::EINTR))
}

fn report_move(key: MiddleboxKey, before: &Placement, now: &Placement, networks: &Networks) {
    let name = |id: NetworkId| networks.name(id).map(ToString::to_string);
    if before.network != now.network {
        let from = name(before.network).unwrap_or_else(|| "no known network".to_string());
        let to = name(now.network).unwrap_or_else(|| "no known network".to_string());
        log::warn!("middlebox {} has moved from {from} to {to}", key.mac);
    }
    for network in now.also_on.difference(&before.also_on) {
        let own = name(now.network).unwrap_or_default();
        log::warn!(
            "the MAC of middlebox {} is seen on {network} as well; it stays on {own}: bind its \
             channel with bridge= and vlan=",
            key.mac
        );
    }
}
