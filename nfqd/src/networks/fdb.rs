//! The forwarding databases of all bridges: the ports and VLANs that each MAC was seen on.

use crate::rtnetlink::{
    AF_BRIDGE, NEIGHBOUR_HEADER, RTM_DELNEIGH, RTM_GETNEIGH, RTM_NEWNEIGH, RouteSocket,
};
use nfqd_rules::netlink::{HEADER, Message, attributes, bytes_at, u16_at};
use nfqd_shmctl::MacAddr;
use nix::errno::Errno;
use std::collections::{BTreeMap, HashMap};

const NDA_LLADDR: u16 = 2;
const NDA_VLAN: u16 = 5;
const NDA_MASTER: u16 = 9;
/// The state of the entries of the host's own MACs.
const NUD_PERMANENT: u16 = 0x80;
/// The flag of entries of a device below the bridge, such as a VXLAN's own table.
const NTF_SELF: u8 = 2;

/// A segment that a bridge learns MACs on: the index of the bridge, and the VLAN if the bridge is
/// VLAN-aware.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Segment {
    pub bridge: u32,
    pub vlan: Option<u16>,
}

/// The forwarding databases: by MAC, the port of each segment.
#[derive(Debug, Default)]
pub(super) struct ForwardingDatabase(HashMap<MacAddr, BTreeMap<Segment, u32>>);

impl ForwardingDatabase {
    /// Asks the kernel.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub(super) fn read(socket: &RouteSocket) -> Result<ForwardingDatabase, Errno> {
        let mut out = ForwardingDatabase::default();
        // `struct ndmsg` here, or `struct ifinfomsg` in older kernels: zeros but for the family in
        // both, and long enough for either.
        const REQUEST_HEADER: usize = 16;
        let result = socket.dump(RTM_GETNEIGH, AF_BRIDGE, REQUEST_HEADER, &[], |message| {
            out.note(message);
        });
        match result {
            Err(Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT) | Ok(()) => Ok(out),
            Err(errno) => Err(errno),
        }
    }

    /// Notes a change. Returns the MAC that it is about.
    pub(super) fn note(&mut self, message: &Message<'_>) -> Option<MacAddr> {
        let (mac, segment, port) = entry(message.bytes)?;
        match message.kind {
            // A MAC that moves to another port of the bridge is notified once, with the new one.
            RTM_NEWNEIGH => drop(self.0.entry(mac).or_default().insert(segment, port)),
            RTM_DELNEIGH => {
                let segments = self.0.get_mut(&mac)?;
                if segments.get(&segment) == Some(&port) {
                    segments.remove(&segment);
                }
                if segments.is_empty() {
                    self.0.remove(&mac);
                }
            }
            _ => return None,
        }
        Some(mac)
    }

    /// Returns the segments that a MAC was seen on, with the port of each.
    pub(super) fn segments(&self, mac: MacAddr) -> impl Iterator<Item = (Segment, u32)> {
        self.0.get(&mac).into_iter().flatten().map(|(segment, port)| (*segment, *port))
    }
}

/// Reads an entry of a bridge; `None` for other neighbours, and for the host's own MACs.
fn entry(message: &[u8]) -> Option<(MacAddr, Segment, u32)> {
    let [family] = bytes_at(message, HEADER)?;
    let port = u32::from_ne_bytes(bytes_at(message, HEADER + 4)?);
    let state = u16_at(message, HEADER + 8)?;
    let [flags] = bytes_at(message, HEADER + 10)?;
    if family != AF_BRIDGE || state & NUD_PERMANENT != 0 || flags & NTF_SELF != 0 {
        return None;
    }
    let (mut mac, mut vlan, mut bridge) = (None, None, None);
    for (kind, value) in attributes(message.get(HEADER + NEIGHBOUR_HEADER..)?) {
        match kind {
            NDA_LLADDR => mac = bytes_at(value, 0).map(MacAddr),
            NDA_VLAN => vlan = u16_at(value, 0),
            NDA_MASTER => bridge = bytes_at(value, 0).map(u32::from_ne_bytes),
            _ => {}
        }
    }
    Some((mac.filter(|mac| mac.is_station())?, Segment { bridge: bridge?, vlan }, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::netlink::{finish, messages, put};

    fn notification(kind: u16, port: u32, state: u16, bridge: u32, vlan: u16) -> Vec<u8> {
        let mut out = vec![0; 4];
        out.extend(kind.to_ne_bytes());
        out.extend([0; 10]);
        out.extend([AF_BRIDGE, 0, 0, 0]);
        out.extend(port.to_ne_bytes());
        out.extend(state.to_ne_bytes());
        out.extend([0, 0]);
        put(&mut out, NDA_LLADDR, &[2, 0, 0, 0, 0, 1]);
        put(&mut out, NDA_MASTER, &bridge.to_ne_bytes());
        put(&mut out, NDA_VLAN, &vlan.to_ne_bytes());
        finish(&mut out, 0);
        out
    }

    #[test]
    fn a_mac_is_at_one_port_of_a_segment() {
        let mut fdb = ForwardingDatabase::default();
        let mut note = |kind, port, state, vlan| {
            let bytes = notification(kind, port, state, 9, vlan);
            messages(&bytes).for_each(|message| {
                fdb.note(&message);
            });
            let segments = fdb.segments(MacAddr([2, 0, 0, 0, 0, 1]));
            segments.map(|(segment, port)| (segment.vlan, port)).collect::<Vec<_>>()
        };
        assert_eq!(note(RTM_NEWNEIGH, 3, 2, 10), [(Some(10), 3)]);
        assert_eq!(note(RTM_NEWNEIGH, 4, 2, 10), [(Some(10), 4)], "it has moved");
        assert_eq!(note(RTM_NEWNEIGH, 5, 2, 20), [(Some(10), 4), (Some(20), 5)]);
        assert_eq!(note(RTM_NEWNEIGH, 6, NUD_PERMANENT, 30).len(), 2, "the host's own");
        assert_eq!(note(RTM_DELNEIGH, 3, 2, 10).len(), 2, "an old notification");
        assert_eq!(note(RTM_DELNEIGH, 4, 2, 10), [(Some(20), 5)]);
    }
}
