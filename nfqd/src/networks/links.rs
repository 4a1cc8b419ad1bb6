//! The bridges of the host, their ports and their VLANs, as rtnetlink tells them (linux/if_link.h,
//! linux/if_bridge.h).

use crate::rtnetlink::{AF_BRIDGE, LINK_HEADER, RTM_GETLINK, RTM_NEWLINK, RouteSocket};
use nfqd_rules::netlink::{HEADER, Message, attributes, bytes_at, u16_at};
use nfqd_shmctl::{EtherType, MacAddr};
use nix::errno::Errno;
use std::collections::BTreeMap;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFLA_BR_VLAN_PROTOCOL: u16 = 8;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_BRIDGE_VLAN_INFO: u16 = 2;
/// Asks for the VLANs of ports, ranges as ranges.
const RTEXT_FILTER_BRVLAN_COMPRESSED: u32 = 1 << 2;

const VLAN_PVID: u16 = 1 << 1;
const VLAN_UNTAGGED: u16 = 1 << 2;
const VLAN_RANGE_BEGIN: u16 = 1 << 3;
const VLAN_RANGE_END: u16 = 1 << 4;

/// The bridges of a network namespace and what belongs to them, by interface index.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Links {
    pub bridges: BTreeMap<u32, Bridge>,
    pub ports: BTreeMap<u32, BridgePort>,
    /// The VLAN devices: the device below, the VLAN, and the name.
    pub vlan_devices: Vec<(u32, u16, String)>,
}

/// A bridge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Bridge {
    pub name: String,
    pub mac: MacAddr,
    /// The EtherType of tags, if the bridge is VLAN-aware.
    pub vlan_protocol: Option<EtherType>,
    /// The VLANs of the bridge as a device of the host.
    pub vlans: Vlans,
}

/// A port of a bridge.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct BridgePort {
    pub name: String,
    pub bridge: u32,
    /// Whether the port may only talk to ports that are not isolated.
    pub is_isolated: bool,
    pub vlans: Vlans,
}

/// The VLANs of a port.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Vlans {
    /// The VLAN of untagged frames that come in.
    pub pvid: Option<u16>,
    /// First, last, and whether frames leave untagged.
    ranges: Vec<(u16, u16, bool)>,
}

impl Vlans {
    /// Returns whether frames of a VLAN leave untagged; `None` if the port is not in the VLAN.
    pub(super) fn leaves_untagged(&self, vlan: u16) -> Option<bool> {
        let range = self.ranges.iter().find(|(first, last, _)| (*first..=*last).contains(&vlan));
        range.map(|(.., untagged)| *untagged)
    }
}

impl Links {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub(super) fn read(socket: &RouteSocket) -> Result<Links, Errno> {
        let mut out = Links::default();
        socket.dump(RTM_GETLINK, 0, LINK_HEADER, &[], |message| {
            if message.kind == RTM_NEWLINK {
                out.add_link(message);
            }
        })?;
        let mask = RTEXT_FILTER_BRVLAN_COMPRESSED.to_ne_bytes();
        let mask: [(u16, &[u8]); 1] = [(IFLA_EXT_MASK, &mask)];
        let result = socket.dump(RTM_GETLINK, AF_BRIDGE, LINK_HEADER, &mask, |message| {
            if message.kind == RTM_NEWLINK {
                out.add_vlans(message);
            }
        });
        match result {
            // A kernel without bridges.
            Err(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT) => {}
            other => other?,
        }
        Ok(out)
    }

    fn add_link(&mut self, message: &Message<'_>) -> Option<()> {
        let index = bytes_at(message.bytes, HEADER + 4).map(u32::from_ne_bytes)?;
        let body = message.bytes.get(HEADER + LINK_HEADER..)?;
        let name = text(find(body, IFLA_IFNAME)?);
        let number = |kind: u16| find(body, kind).and_then(|value| bytes_at(value, 0));
        let info = find(body, IFLA_LINKINFO).unwrap_or_default();
        let data = find(info, IFLA_INFO_DATA).unwrap_or_default();
        match find(info, IFLA_INFO_KIND).map(text).as_deref() {
            Some("bridge") => {
                let is_aware = find(data, IFLA_BR_VLAN_FILTERING).is_some_and(|on| on == [1]);
                let protocol =
                    find(data, IFLA_BR_VLAN_PROTOCOL).and_then(|value| bytes_at(value, 0));
                const VLAN: u16 = 0x8100;
                let protocol = EtherType::new(protocol.map_or(VLAN, u16::from_be_bytes));
                let mac = find(body, IFLA_ADDRESS).and_then(|value| bytes_at(value, 0));
                let bridge = Bridge {
                    name: name.clone(),
                    mac: MacAddr(mac.unwrap_or_default()),
                    vlan_protocol: protocol.filter(|_| is_aware),
                    vlans: Vlans::default(),
                };
                self.bridges.insert(index, bridge);
            }
            Some("vlan") => {
                let below = number(IFLA_LINK).map(u32::from_ne_bytes)?;
                let id = u16_at(find(data, IFLA_VLAN_ID)?, 0)?;
                self.vlan_devices.push((below, id, name.clone()));
            }
            _ => {}
        }
        if find(info, IFLA_INFO_SLAVE_KIND).map(text).as_deref() == Some("bridge") {
            let slave = find(info, IFLA_INFO_SLAVE_DATA).unwrap_or_default();
            let port = BridgePort {
                name,
                bridge: number(IFLA_MASTER).map(u32::from_ne_bytes)?,
                is_isolated: find(slave, IFLA_BRPORT_ISOLATED).is_some_and(|on| on == [1]),
                vlans: Vlans::default(),
            };
            self.ports.insert(index, port);
        }
        Some(())
    }

    fn add_vlans(&mut self, message: &Message<'_>) -> Option<()> {
        let index = bytes_at(message.bytes, HEADER + 4).map(u32::from_ne_bytes)?;
        let specification = find(message.bytes.get(HEADER + LINK_HEADER..)?, IFLA_AF_SPEC)?;
        let vlans = vlans(specification);
        if let Some(port) = self.ports.get_mut(&index) {
            port.vlans = vlans;
        } else if let Some(bridge) = self.bridges.get_mut(&index) {
            bridge.vlans = vlans;
        }
        Some(())
    }
}

fn find(body: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(body).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned()
}

/// Reads the VLANs of a port: `struct bridge_vlan_info`, flags and id.
fn vlans(specification: &[u8]) -> Vlans {
    let mut out = Vlans::default();
    let mut first = None;
    for (kind, value) in attributes(specification) {
        let (IFLA_BRIDGE_VLAN_INFO, Some(flags), Some(id)) =
            (kind, u16_at(value, 0), u16_at(value, 2))
        else {
            continue;
        };
        if flags & VLAN_PVID != 0 {
            out.pvid = Some(id);
        }
        if flags & VLAN_RANGE_BEGIN != 0 {
            first = Some(id);
            continue;
        }
        let begin = first.take().filter(|_| flags & VLAN_RANGE_END != 0).unwrap_or(id);
        out.ranges.push((begin, id, flags & VLAN_UNTAGGED != 0));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::netlink::put;

    #[test]
    fn vlans_and_ranges_of_them_are_read() {
        let mut specification = Vec::new();
        for (flags, id) in [
            (VLAN_PVID | VLAN_UNTAGGED, 1_u16),
            (VLAN_RANGE_BEGIN, 100),
            (VLAN_RANGE_END, 199),
            (0, 300),
        ] {
            let value = [flags.to_ne_bytes(), id.to_ne_bytes()].concat();
            put(&mut specification, IFLA_BRIDGE_VLAN_INFO, &value);
        }
        let found = vlans(&specification);
        assert_eq!(found.pvid, Some(1));
        let untagged = |vlan| found.leaves_untagged(vlan);
        assert_eq!((untagged(1), untagged(150), untagged(200)), (Some(true), Some(false), None));
        assert_eq!(
            (untagged(100), untagged(199), untagged(300)),
            (Some(false), Some(false), Some(false))
        );
        assert_eq!(vlans(&[1, 2, 3]), Vlans::default());
    }
}
