//! The MACs of backends: asked for on their networks, and read from what passes.
//!
//! The questions leave by the ports of the network, whatever VLAN that is and whether or not the host
//! has an address there; the host's neighbour table has no part in it. The answers, and every other
//! ARP packet or neighbour advertisement of a backend, are noted by the kernel's tables
//! (`neighbours4` and `neighbours6` in `nft list ruleset`).

use super::probe::{Asker, question};
use crate::networks::HostNetworks;
use crate::packet_path::inject::Injector;
use nfqd_rules::nft::kernel::Neighbour;
use nfqd_rules::{Network, NetworkId, Networks};
use nfqd_shmctl::MacAddr;
use nix::ifaddrs::getifaddrs;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

/// An address on a network.
pub(super) type Address = (NetworkId, IpAddr);

/// The interval at which a backend that answers is asked.
const ASK_INTERVAL: Duration = Duration::from_secs(2);
/// The time that an answer may take. A backend that has not answered is asked again then.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// The interval at which an address is asked for that has never answered: doubled each time, from
/// the first to the second.
const RESOLVE_INTERVALS: (Duration, Duration) = (Duration::from_millis(100), ASK_INTERVAL);
/// A packet that was noted so short a time before a question counts as its answer: the kernel's
/// clock is coarser.
const CLOCK_GRAIN: Duration = Duration::from_millis(50);
/// The questions in a row without an answer after which the MAC is asked of everybody: the address
/// may have moved.
const ASK_ALL_AFTER: u32 = 1;

/// The most questions on a network in a call of [`Neighbours::refresh`], each on every port that it
/// leaves by: guests name the addresses, and a flood of questions would reach everybody.
const MAX_QUESTIONS: usize = 4096;

/// The events of a call of [`Neighbours::refresh`].
#[derive(Debug, Default)]
pub(super) struct Events {
    /// Addresses that are at another MAC than before.
    pub moved: Vec<(Address, MacAddr)>,
    /// Whether an address has answered a question, or not.
    pub answers: Vec<(Address, bool)>,
}

/// The neighbours that are watched.
pub(super) struct Neighbours {
    watched: BTreeMap<Address, Watched>,
    /// `None` if no frames can be sent.
    injector: Option<Injector>,
}

#[derive(Clone, Debug)]
struct Watched {
    mac: Option<MacAddr>,
    /// The question that waits for an answer.
    asked: Option<Instant>,
    next: Instant,
    interval: Duration,
    /// Questions in a row without an answer.
    unanswered: u32,
}

impl Neighbours {
    /// Neighbours with MACs that were known before.
    pub(super) fn new(macs: BTreeMap<Address, MacAddr>, now: Instant) -> Neighbours {
        let injector = Injector::open();
        if let Err(errno) = &injector {
            log::warn!("packet socket: {errno}; backends are found by their own ARP packets only");
        }
        let watched = |mac| Watched { mac: Some(mac), ..Watched::new(now) };
        let watched = macs.into_iter().map(|(address, mac)| (address, watched(mac))).collect();
        Neighbours { watched, injector: injector.ok() }
    }

    /// Returns the MAC of an address.
    pub(super) fn mac(&self, address: Address) -> Option<MacAddr> {
        self.watched.get(&address).and_then(|watched| watched.mac)
    }

    /// Whether an address has not answered the last question.
    pub(super) fn is_silent(&self, address: Address) -> bool {
        self.watched.get(&address).is_some_and(|watched| watched.unanswered > 0)
    }

    /// Takes what the kernel has noted, and asks for the addresses that are due.
    pub(super) fn refresh(
        &mut self,
        wanted: &BTreeSet<Address>,
        noted: &[(NetworkId, Neighbour)],
        host: &HostNetworks,
        networks: &Networks,
        now: Instant,
    ) -> Events {
        self.watched.retain(|address, _| wanted.contains(address));
        for address in wanted {
            self.watched.entry(*address).or_insert_with(|| Watched::new(now));
        }
        let mut events = Events::default();
        for (network, Neighbour { ip, mac, age }) in noted {
            let address = (*network, *ip);
            let Some(watched) = self.watched.get_mut(&address) else { continue };
            let seen = now.checked_sub(*age).unwrap_or(now);
            if watched.mac != Some(*mac) {
                watched.mac = Some(*mac);
                events.moved.push((address, *mac));
            }
            if watched.asked.is_some_and(|asked| seen + CLOCK_GRAIN >= asked) {
                watched.answered(now);
                events.answers.push((address, true));
            }
        }
        for (address, watched) in &mut self.watched {
            if watched.asked.is_some_and(|asked| now >= asked + ANSWER_TIMEOUT) {
                watched.asked = None;
                watched.unanswered += 1;
                events.answers.push((*address, false));
            }
        }
        self.ask(host, networks, now);
        events
    }

    fn ask(&mut self, host: &HostNetworks, networks: &Networks, now: Instant) {
        let Some(injector) = &self.injector else { return };
        let mut askers: BTreeMap<NetworkId, Option<(Network, Asker)>> = BTreeMap::new();
        let mut sent: BTreeMap<NetworkId, usize> = BTreeMap::new();
        let mut due: Vec<_> = self.watched.iter_mut().filter(|(_, one)| one.next <= now).collect();
        // The longest wait comes first, so a limit delays all alike.
        due.sort_by_key(|(_, watched)| watched.next);
        for (&(id, ip), watched) in due {
            let sent = sent.entry(id).or_default();
            if *sent >= MAX_QUESTIONS {
                continue;
            }
            let known = watched.mac.filter(|_| watched.unanswered < ASK_ALL_AFTER);
            watched.ask(now);
            let asker = askers.entry(id).or_insert_with(|| {
                let network = networks.name(id)?.clone();
                let asker = asker(host, &network)?;
                Some((network, asker))
            });
            let Some((network, asker)) = asker else { continue };
            for exit in host.exits(network, known) {
                // A port that is down just now does not matter for the others.
                let _ = injector.send(exit.port, &question(*asker, ip, known, exit.tag));
                *sent += 1;
            }
        }
    }
}

impl Watched {
    fn new(now: Instant) -> Watched {
        let interval = RESOLVE_INTERVALS.0;
        Watched { mac: None, asked: None, next: now, interval, unanswered: 0 }
    }

    fn ask(&mut self, now: Instant) {
        // The first question that is not answered counts from its own time on.
        self.asked.get_or_insert(now);
        self.next = now + self.interval;
        let longest = if self.mac.is_some() { ANSWER_TIMEOUT } else { RESOLVE_INTERVALS.1 };
        self.interval = (self.interval * 2).min(longest);
    }

    fn answered(&mut self, now: Instant) {
        (self.asked, self.unanswered) = (None, 0);
        self.next = now + ASK_INTERVAL;
        self.interval = ANSWER_TIMEOUT;
    }
}

/// Returns the sender of questions on a network; `None` if its bridge is gone.
fn asker(host: &HostNetworks, network: &Network) -> Option<Asker> {
    let (_, mac) = host.bridge(network)?;
    let device = host.host_device(network);
    let ip = device.and_then(|device| own_address(&device));
    Some(Asker { mac, ip })
}

/// Returns an IPv4 address of a device.
fn own_address(device: &str) -> Option<Ipv4Addr> {
    let mut all = getifaddrs().ok()?.filter(|one| one.interface_name == device);
    all.find_map(|one| Some(one.address?.as_sockaddr_in()?.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_answer_is_asked_again_soon() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut watched = Watched::new(start);
        let mut asked = Vec::new();
        for ms in (0..8000).step_by(50) {
            if at(ms) >= watched.next {
                watched.ask(at(ms));
                asked.push(ms);
            }
        }
        assert_eq!(asked, [0, 100, 300, 700, 1500, 3100, 5100, 7100]);
        watched.answered(at(8000));
        watched.mac = Some(MacAddr([2; 6]));
        assert_eq!(watched.next, at(10_000));
        watched.ask(at(10_000));
        assert_eq!(watched.next, at(11_000), "no answer within a second");
    }
}
