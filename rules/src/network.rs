//! Networks: a bridge, or a VLAN of a VLAN-aware bridge.
//!
//! Everything that a guest registers belongs to one network: its middleboxes, their backends and
//! their flows. Equal addresses on two networks are different addresses.

use crate::ids::MAX_ID;
use imbl::OrdMap;
use nfqd_shmctl::{EtherType, MacAddr, ParseValueError};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The identifier of a network, from 0 to [`MAX_ID`]: marks and the kernel's maps carry it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct NetworkId(u32);

impl NetworkId {
    /// The whole host, as one network. Offline, there is no other one; on a host, it has the
    /// middleboxes of which nobody knows yet where they are.
    pub const ANY: NetworkId = NetworkId(0);

    /// Returns the identifier with this number.
    pub const fn new(number: u32) -> Option<NetworkId> {
        if number > MAX_ID { None } else { Some(NetworkId(number)) }
    }

    /// Returns the number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A middlebox: its MAC, and the network that it is registered for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MiddleboxKey {
    /// The network that its channel is bound to; [`NetworkId::ANY`] if to none.
    pub network: NetworkId,
    /// The MAC.
    pub mac: MacAddr,
}

impl MiddleboxKey {
    /// The middlebox with this MAC, wherever it is.
    pub const fn anywhere(mac: MacAddr) -> MiddleboxKey {
        MiddleboxKey { network: NetworkId::ANY, mac }
    }
}

/// Writes the MAC, and `%` with the number of the network if there is one.
impl fmt::Display for MiddleboxKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.mac.fmt(f)?;
        match self.network {
            NetworkId::ANY => Ok(()),
            NetworkId(number) => write!(f, "%{number}"),
        }
    }
}

impl FromStr for MiddleboxKey {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<MiddleboxKey, ParseValueError> {
        let Some((mac, number)) = text.split_once('%') else {
            return Ok(MiddleboxKey::anywhere(text.parse()?));
        };
        let number = number.parse().map_err(|_| ParseValueError)?;
        let network = NetworkId::new(number).ok_or(ParseValueError)?;
        Ok(MiddleboxKey { network, mac: mac.parse()? })
    }
}

/// The name of a network: `BRIDGE`, or `BRIDGE vlan ID`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Network {
    /// The name of the bridge.
    pub bridge: Arc<str>,
    /// The VLAN, from 1 to 4094, of a VLAN-aware bridge; `None` for a whole bridge.
    pub vlan: Option<u16>,
}

impl Network {
    /// A whole bridge.
    pub fn bridge(name: &str) -> Network {
        Network { bridge: name.into(), vlan: None }
    }

    /// A VLAN of the same bridge.
    pub fn in_vlan(&self, vlan: u16) -> Network {
        Network { bridge: Arc::clone(&self.bridge), vlan: Some(vlan) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.bridge)?;
        self.vlan.map_or(Ok(()), |vlan| write!(f, " vlan {vlan}"))
    }
}

impl FromStr for Network {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Network, ParseValueError> {
        let (bridge, vlan) = match text.split_once(" vlan ") {
            Some((bridge, vlan)) => (bridge, Some(vlan.parse().map_err(|_| ParseValueError)?)),
            None => (text, None),
        };
        let is_name = !bridge.is_empty() && !bridge.contains(['/', ' ']);
        if is_name { Ok(Network { bridge: bridge.into(), vlan }) } else { Err(ParseValueError) }
    }
}

/// A port of a bridge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Port {
    /// The bridge.
    pub bridge: NetworkId,
    /// The VLANs of its frames.
    pub vlans: PortVlans,
}

/// The VLANs of a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortVlans {
    /// The bridge is not VLAN-aware: tagged or not, all frames are of one network.
    Unaware,
    /// The bridge is VLAN-aware.
    Aware {
        /// The bridge's protocol: only tags of this EtherType count.
        protocol: EtherType,
        /// The VLAN of other frames (the port's PVID); they are dropped if there is none.
        untagged: Option<u16>,
    },
}

/// The networks of a host: their names, and the ports that lead to them. A clone is cheap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Networks {
    names: OrdMap<NetworkId, Network>,
    ids: OrdMap<Network, NetworkId>,
    ports: OrdMap<u32, Port>,
    /// The ports of middleboxes with services, whose own conversations are remembered.
    vm_ports: OrdMap<(NetworkId, MacAddr), u32>,
}

impl Networks {
    /// Takes over the identifiers that a table in the kernel has for networks.
    pub fn adopt(&mut self, found: impl IntoIterator<Item = (NetworkId, Network)>) {
        for (id, network) in found {
            if id != NetworkId::ANY && !self.names.contains_key(&id) {
                self.ids.insert(network.clone(), id);
                self.names.insert(id, network);
            }
        }
    }

    /// Returns the identifier of a network, which gets one if it has none. Identifiers are never
    /// given to another network; `None` if they are used up.
    pub fn intern(&mut self, network: &Network) -> Option<NetworkId> {
        if let Some(id) = self.ids.get(network) {
            return Some(*id);
        }
        let next = self.names.get_max().map_or(1, |(id, _)| id.get() + 1);
        let id = NetworkId::new(next)?;
        self.ids.insert(network.clone(), id);
        self.names.insert(id, network.clone());
        Some(id)
    }

    /// Returns the identifier of a network, if it has one.
    pub fn id(&self, network: &Network) -> Option<NetworkId> {
        self.ids.get(network).copied()
    }

    /// Returns the name of a network; `None` for [`NetworkId::ANY`].
    pub fn name(&self, id: NetworkId) -> Option<&Network> {
        self.names.get(&id)
    }

    /// Returns all networks that have an identifier.
    pub fn names(&self) -> impl Iterator<Item = (NetworkId, &Network)> {
        self.names.iter().map(|(id, network)| (*id, network))
    }

    /// Returns the VLANs of a bridge that have an identifier.
    pub fn vlans(&self, bridge: NetworkId) -> impl Iterator<Item = (u16, NetworkId)> {
        let name = self.names.get(&bridge).filter(|name| name.vlan.is_none());
        name.into_iter().flat_map(move |name| {
            let first = name.in_vlan(0);
            let all =
                self.ids.range(first..).take_while(move |(other, _)| other.bridge == name.bridge);
            all.filter_map(|(network, id)| Some((network.vlan?, *id)))
        })
    }

    /// Returns the bridge of a network.
    pub fn bridge_of(&self, id: NetworkId) -> Option<NetworkId> {
        let name = self.names.get(&id)?;
        self.ids.get(&Network { vlan: None, ..name.clone() }).copied()
    }

    /// Replaces the ports, by interface index.
    pub fn set_ports(&mut self, ports: impl IntoIterator<Item = (u32, Port)>) {
        let ports: OrdMap<u32, Port> = ports.into_iter().collect();
        if ports != self.ports {
            self.ports = ports;
        }
    }

    /// Returns the ports, by interface index.
    pub fn ports(&self) -> impl Iterator<Item = (u32, Port)> {
        self.ports.iter().map(|(index, port)| (*index, *port))
    }

    /// Notes the port of a middlebox with services; `None` if it has no services, or its port is not
    /// known.
    pub fn set_vm_port(&mut self, network: NetworkId, mac: MacAddr, port: Option<u32>) {
        match port {
            Some(port) if self.vm_ports.get(&(network, mac)) == Some(&port) => {}
            Some(port) => drop(self.vm_ports.insert((network, mac), port)),
            None => drop(self.vm_ports.remove(&(network, mac))),
        }
    }

    /// Takes the ports of middleboxes from an earlier value.
    pub fn restore_vm_ports(&mut self, before: &Networks) {
        self.vm_ports = before.vm_ports.clone();
    }

    /// Returns the port that [`Networks::set_vm_port`] has noted.
    pub fn vm_port(&self, network: NetworkId, mac: MacAddr) -> Option<u32> {
        self.vm_ports.get(&(network, mac)).copied()
    }

    /// Returns the ports of middleboxes with services, each with its network.
    pub fn vm_ports(&self) -> impl Iterator<Item = (NetworkId, u32)> {
        self.vm_ports.iter().map(|((network, _), port)| (*network, *port))
    }

    /// Whether another value has the same names and ports; found without visiting what both share.
    pub fn is_same(&self, other: &Networks) -> bool {
        (self.names.ptr_eq(&other.names) || self.names == other.names)
            && (self.ports.ptr_eq(&other.ports) || self.ports == other.ports)
            && (self.vm_ports.ptr_eq(&other.vm_ports) || self.vm_ports == other.vm_ports)
    }

    /// Returns the network with a prefix, as [`Networks::prefix`] writes it.
    pub fn id_of_prefix(&self, prefix: &str) -> Option<NetworkId> {
        let Some(name) = prefix.strip_suffix('/') else {
            return prefix.is_empty().then_some(NetworkId::ANY);
        };
        let (bridge, vlan) = match name.split_once('/') {
            Some((bridge, vlan)) => (bridge, Some(vlan.parse().ok()?)),
            None => (name, None),
        };
        self.id(&Network { bridge: bridge.into(), vlan })
    }

    /// Returns the beginning of the names of a network's sets and chains: nothing for
    /// [`NetworkId::ANY`], `BRIDGE/` or `BRIDGE/ID/`. An interface's name has no slash.
    pub fn prefix(&self, id: NetworkId) -> String {
        match self.names.get(&id) {
            None => String::new(),
            Some(Network { bridge, vlan: None }) => format!("{bridge}/"),
            Some(Network { bridge, vlan: Some(vlan) }) => format!("{bridge}/{vlan}/"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_keeps_its_identifier_and_its_vlans_are_found() {
        let mut networks = Networks::default();
        let bridge = Network::bridge("br.5");
        let id = networks.intern(&bridge).unwrap();
        let vlan = networks.intern(&bridge.in_vlan(7)).unwrap();
        networks.intern(&Network::bridge("br.6")).unwrap();
        assert_eq!((networks.intern(&bridge), networks.id(&bridge)), (Some(id), Some(id)));
        assert_eq!(networks.vlans(id).collect::<Vec<_>>(), [(7, vlan)]);
        assert_eq!(networks.bridge_of(vlan), Some(id));
        assert_eq!(
            (networks.prefix(id), networks.prefix(vlan)),
            ("br.5/".into(), "br.5/7/".into())
        );
        for id in [NetworkId::ANY, id, vlan] {
            assert_eq!(networks.id_of_prefix(&networks.prefix(id)), Some(id));
        }
        let mut restarted = Networks::default();
        restarted.adopt(networks.names().map(|(id, name)| (id, name.to_string().parse().unwrap())));
        assert_eq!(restarted, networks);
    }

    #[test]
    fn keys_are_parsed_back() {
        for text in ["02:00:00:00:00:01", "02:00:00:00:00:01%7"] {
            assert_eq!(text.parse::<MiddleboxKey>().unwrap().to_string(), text);
        }
        for bad in ["", "02:00:00:00:00:01%", "02:00:00:00:00:01%524288", "02:00:00:00:00:01%-1"] {
            assert!(bad.parse::<MiddleboxKey>().is_err(), "{bad}");
        }
        for bad in ["", "a/b", "a b", "br vlan x"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
