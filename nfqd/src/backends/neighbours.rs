//! The MACs of backends, from the host's neighbour table, which the kernel is asked to fill.
//!
//! An entry with `NTF_USE` makes the kernel resolve an address on a bridge with its own timers and
//! retries, by ARP or neighbour discovery. That needs no address of the host on the bridge (the ARP
//! request then comes from 0.0.0.0) and no packet socket; the loopback device must be up, for
//! without it the kernel takes every IPv4 address for a broadcast one.

use nfqd_rules::netlink::{
    HEADER, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, attributes, bytes_at, finish,
    messages, put,
};
use nfqd_shmctl::MacAddr;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// Bytes of `struct ifinfomsg` and `struct ndmsg`.
const LINK_HEADER: usize = 16;
const NEIGHBOUR_HEADER: usize = 12;

/// States in which the MAC of an entry is valid, or was until recently: reachable, stale, delay,
/// probe, permanent.
const KNOWN: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x80;
/// States in which the neighbour has answered recently, or need not: reachable, permanent.
const ANSWERS: u16 = 0x02 | 0x80;
/// States in which a neighbour may be probed: all that neither an administrator has set nor the
/// kernel is probing.
const PROBABLE: u16 = 0x02 | 0x04 | 0x08;
/// The state in which the kernel probes the neighbour: three times, a second apart, before it gives
/// up.
const PROBE: u16 = 0x10;
/// Flags of entries that other programs maintain: `NTF_EXT_LEARNED`, `NTF_STICKY`.
const FOREIGN: u8 = 0x10 | 0x40;
/// The state in which the kernel has given up; it may be asked again.
const FAILED: u16 = 0x20;
const NTF_USE: u8 = 1;
/// The most addresses that are asked for in one call. Guests name them, and the kernel's table is
/// bounded.
const MAX_PER_CALL: usize = 64;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_REPLACE: u16 = 0x100;

/// The state of a neighbour, as the kernel knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// The MAC is known.
    At {
        /// The MAC.
        mac: MacAddr,
        /// Whether it has answered recently; the kernel may be probing it just now.
        answers: bool,
        /// The bridge.
        bridge: String,
    },
    /// The neighbour has not answered.
    Silent,
    /// Two bridges have it, with different MACs.
    Ambiguous,
}

/// The host's neighbour table, over one socket.
pub(super) struct Neighbours {
    socket: OwnedFd,
    /// The position at which the next round of resolving starts.
    next_to_resolve: usize,
    /// The position at which the next round of probing starts.
    next_to_probe: usize,
}

impl Neighbours {
    /// Opens the socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn open() -> Result<Neighbours, Errno> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
        Ok(Neighbours { socket, next_to_resolve: 0, next_to_probe: 0 })
    }

    /// Returns what the kernel knows on bridges about these addresses. It is asked to resolve those
    /// that it does not know, and to probe those in `probe`: a few at a time, each in its turn.
    /// Entries of other programs are not touched.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub(super) fn resolve(
        &mut self,
        wanted: &BTreeSet<IpAddr>,
        probe: &BTreeSet<IpAddr>,
    ) -> Result<HashMap<IpAddr, Found>, Errno> {
        let bridges = self.bridges()?;
        let mut entries: HashMap<IpAddr, Vec<Neighbour>> = HashMap::new();
        self.request(&dump(RTM_GETNEIGH, NEIGHBOUR_HEADER), |kind, message| {
            let entry = (kind == RTM_NEWNEIGH).then(|| neighbour(message)).flatten();
            let entry = entry.filter(|n| bridges.contains_key(&n.link) && wanted.contains(&n.ip));
            entry.into_iter().for_each(|entry| entries.entry(entry.ip).or_default().push(entry));
        })?;
        let mut found = HashMap::new();
        for (ip, entries) in &entries {
            let known: Vec<(&Neighbour, MacAddr)> = entries
                .iter()
                .filter(|n| n.state & KNOWN != 0)
                .filter_map(|n| Some((n, n.mac.filter(|mac| mac.is_station())?)))
                .collect();
            let one = known.first().filter(|(_, mac)| known.iter().all(|(_, other)| other == mac));
            let silent = entries.iter().all(|n| n.state & FAILED != 0);
            match one {
                Some((n, mac)) => {
                    let bridge = bridges.get(&n.link).cloned().unwrap_or_default();
                    let answers = n.state & ANSWERS != 0;
                    found.insert(*ip, Found::At { mac: *mac, answers, bridge });
                }
                // Two hosts on two bridges have it: there is no telling which is meant.
                None if !known.is_empty() => drop(found.insert(*ip, Found::Ambiguous)),
                None if silent => drop(found.insert(*ip, Found::Silent)),
                None => {}
            }
        }
        let asked = |bridge: i32, ip: &IpAddr| {
            let entries = entries.get(ip).into_iter().flatten();
            entries.into_iter().any(|n| n.link == bridge && n.state & FAILED == 0)
        };
        let unknown: Vec<IpAddr> = wanted
            .iter()
            .filter(|ip| !matches!(found.get(*ip), Some(Found::At { .. } | Found::Ambiguous)))
            .filter(|ip| bridges.keys().any(|bridge| !asked(*bridge, ip)))
            .copied()
            .collect();
        for ip in some_of(&unknown, &mut self.next_to_resolve) {
            for &bridge in bridges.keys().filter(|bridge| !asked(**bridge, &ip)) {
                // A failure on this bridge does not matter for the others.
                let _ = self.request(&use_message(bridge, ip), |_, _| {});
            }
        }
        let unsure: Vec<IpAddr> =
            probe.iter().filter(|ip| entries.contains_key(*ip)).copied().collect();
        for ip in some_of(&unsure, &mut self.next_to_probe) {
            for n in entries.get(&ip).into_iter().flatten() {
                if let Some(mac) =
                    n.mac.filter(|_| n.state & PROBABLE != 0 && n.flags & FOREIGN == 0)
                {
                    let _ = self.request(&state_message(n.link, ip, mac), |_, _| {});
                }
            }
        }
        Ok(found)
    }

    /// Returns the bridges of this network namespace: interface index and name.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub(super) fn bridges(&self) -> Result<BTreeMap<i32, String>, Errno> {
        let mut out = BTreeMap::new();
        self.request(&dump(RTM_GETLINK, LINK_HEADER), |kind, message| {
            out.extend((kind == RTM_NEWLINK).then(|| bridge(message)).flatten());
        })?;
        Ok(out)
    }

    /// Sends a request and passes each message of the answer to `each`, until its end.
    fn request(&self, message: &[u8], mut each: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        send(self.socket.as_raw_fd(), message, MsgFlags::empty())?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            let len = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            for message in messages(buffer.get(..len).unwrap_or_default()) {
                if message.kind == NLMSG_DONE {
                    return Ok(());
                }
                match message.result() {
                    Some(result) => return result,
                    None => each(message.kind, message.bytes),
                }
            }
        }
    }
}

/// Returns some of all addresses, from `next` on, and moves `next` behind them.
fn some_of(all: &[IpAddr], next: &mut usize) -> Vec<IpAddr> {
    let start = next.checked_rem(all.len()).unwrap_or(0);
    let count = all.len().min(MAX_PER_CALL);
    *next = start + count;
    all.iter().cycle().skip(start).take(count).copied().collect()
}

fn begin(kind: u16, flags: u16) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.extend(kind.to_ne_bytes());
    out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    out.extend([0; 8]);
    out
}

fn dump(kind: u16, header: usize) -> Vec<u8> {
    let mut out = begin(kind, NLM_F_DUMP);
    out.resize(out.len() + header, 0);
    finish(&mut out, 0);
    out
}

/// Returns a message that makes the kernel resolve an address.
fn use_message(link: i32, ip: IpAddr) -> Vec<u8> {
    let mut out = entry_message(NLM_F_ACK | NLM_F_CREATE, link, ip, 0, NTF_USE);
    finish(&mut out, 0);
    out
}

/// Returns a message that makes the kernel probe a neighbour.
fn state_message(link: i32, ip: IpAddr, mac: MacAddr) -> Vec<u8> {
    let mut out = entry_message(NLM_F_ACK | NLM_F_REPLACE, link, ip, PROBE, 0);
    put(&mut out, NDA_LLADDR, &mac.0);
    finish(&mut out, 0);
    out
}

fn entry_message(flags: u16, link: i32, ip: IpAddr, state: u16, entry_flags: u8) -> Vec<u8> {
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    let mut out = begin(RTM_NEWNEIGH, flags);
    out.extend([if ip.is_ipv4() { AF_INET } else { AF_INET6 }, 0, 0, 0]);
    out.extend(link.to_ne_bytes());
    out.extend(state.to_ne_bytes());
    out.extend([entry_flags, 0]);
    match ip {
        IpAddr::V4(ip) => put(&mut out, NDA_DST, &ip.octets()),
        IpAddr::V6(ip) => put(&mut out, NDA_DST, &ip.octets()),
    }
    out
}

/// Reads the interface index and name of a link message, if the link is a bridge.
fn bridge(message: &[u8]) -> Option<(i32, String)> {
    let index = i32::from_ne_bytes(bytes_at(message, HEADER + 4)?);
    let (_, info) = attributes(message.get(HEADER + LINK_HEADER..)?)
        .find(|(kind, _)| *kind == IFLA_LINKINFO)?;
    let (_, name) = attributes(info).find(|(kind, _)| *kind == IFLA_INFO_KIND)?;
    if name.split(|&byte| byte == 0).next() != Some(b"bridge") {
        return None;
    }
    let (_, name) =
        attributes(message.get(HEADER + LINK_HEADER..)?).find(|(kind, _)| *kind == IFLA_IFNAME)?;
    let name = name.split(|&byte| byte == 0).next()?;
    Some((index, String::from_utf8_lossy(name).into_owned()))
}

/// An entry of the neighbour table.
struct Neighbour {
    link: i32,
    ip: IpAddr,
    state: u16,
    flags: u8,
    mac: Option<MacAddr>,
}

fn neighbour(message: &[u8]) -> Option<Neighbour> {
    let link = i32::from_ne_bytes(bytes_at(message, HEADER + 4)?);
    let state = u16::from_ne_bytes(bytes_at(message, HEADER + 8)?);
    let [flags] = bytes_at(message, HEADER + 10)?;
    let (mut ip, mut mac) = (None, None);
    for (kind, value) in attributes(message.get(HEADER + NEIGHBOUR_HEADER..)?) {
        match (kind, value.len()) {
            (NDA_DST, 4) => ip = bytes_at::<4>(value, 0).map(IpAddr::from),
            (NDA_DST, 16) => ip = bytes_at::<16>(value, 0).map(IpAddr::from),
            (NDA_LLADDR, 6) => mac = bytes_at(value, 0).map(MacAddr),
            _ => {}
        }
    }
    Some(Neighbour { link, ip: ip?, state, flags, mac })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_gets_its_turn() {
        for count in [1, 63, 64, 96, 128, 200, 256] {
            let all: Vec<IpAddr> =
                (0..count).map(|n: u32| IpAddr::from((0x0a00_0000 + n).to_be_bytes())).collect();
            let mut next = 0;
            let rounds = (count as usize).div_ceil(MAX_PER_CALL);
            let asked: BTreeSet<IpAddr> =
                (0..rounds).flat_map(|_| some_of(&all, &mut next)).collect();
            assert_eq!(asked.len(), all.len(), "{count}");
        }
        assert!(some_of(&[], &mut 7).is_empty());
    }
}
