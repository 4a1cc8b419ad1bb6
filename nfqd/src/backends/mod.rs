//! Observation of backends: their MACs, and whether they are alive.
//!
//! `neighbours` finds MACs with the questions of `probe`, `tcp_check` connects, [`health`] damps the
//! results. Equal addresses on two networks are two backends.

pub mod health;
mod neighbours;
mod probe;
mod tcp_check;

pub(crate) use tcp_check::own_addresses;

use crate::bindings::Bindings;
use crate::networks::HostNetworks;
use health::{Health, Probe};
use neighbours::{Address, Neighbours};
use nfqd_rules::nft::kernel::Neighbour;
use nfqd_rules::service::{Backend, BackendRef, Service};
use nfqd_rules::slots::{BackendObservation, BackendView, SlotKey};
use nfqd_rules::{Desired, MiddleboxKey, NetworkId, Networks};
use nfqd_shmctl::{BackendName, MacAddr};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Instant;
use tcp_check::{Outcome, Target, TcpChecks};

/// The host's view of backends and middleboxes, as far as bindings let a middlebox use it.
pub struct HostView<'a> {
    /// The observations of backends.
    pub backends: &'a Backends,
    /// The networks of the host, and the places of MACs.
    pub host: &'a HostNetworks,
    /// The names of networks.
    pub networks: &'a Networks,
    /// The bindings of the channels.
    pub bindings: &'a Bindings<'a>,
}

impl HostView<'_> {
    /// Returns why nothing is redirected to a MAC that a command gave.
    pub fn misplaced_reason(&self, mac: MacAddr, network: NetworkId) -> Option<&'static str> {
        match self.networks.name(network) {
            None => Some("the middlebox has not been seen on any network yet"),
            Some(name) if self.host.has_vlans(name) => {
                Some("the middlebox has not been seen in any VLAN of its bridge yet")
            }
            Some(name) if self.host.is_elsewhere(mac, name) => {
                Some("the backend's MAC is on another network than the middlebox")
            }
            Some(_) => None,
        }
    }
}

impl BackendView for HostView<'_> {
    /// Returns what is observed of a backend. A MAC that another channel speaks for is left out:
    /// whoever has the address, it is not a backend of this middlebox. So is one that is on another
    /// network: frames to it would be flooded.
    fn observe(&self, backend: &BackendRef<'_>, network: NetworkId) -> BackendObservation {
        let mac = match backend.backend.mac {
            Some(given) => Some(given).filter(|mac| self.misplaced_reason(*mac, network).is_none()),
            None => {
                let found = self.backends.mac((network, backend.name.ip));
                found.filter(|mac| !self.bindings.are_apart(*mac, backend.middlebox))
            }
        };
        let alive = self.backends.is_alive(network, backend.service, backend.name, backend.backend);
        BackendObservation { mac, alive }
    }

    fn network(&self, middlebox: MiddleboxKey) -> NetworkId {
        self.host.network_of(middlebox)
    }
}

/// The backends that a policy names, as the host observes them.
pub struct Backends {
    neighbours: Neighbours,
    tcp_checks: TcpChecks,
    health: Health,
    /// Checks that the host cannot make, and why.
    impossible: BTreeMap<Target, Errno>,
}

impl Backends {
    /// The backends, with MACs that were known before.
    ///
    /// # Errors
    /// If there is no thread for checks.
    pub fn start(macs: BTreeMap<Address, MacAddr>) -> io::Result<Backends> {
        Ok(Backends {
            neighbours: Neighbours::new(macs, Instant::now()),
            tcp_checks: TcpChecks::start()?,
            health: Health::default(),
            impossible: BTreeMap::new(),
        })
    }

    /// Returns the MAC that answers for an address on a network.
    pub fn mac(&self, address: (NetworkId, IpAddr)) -> Option<MacAddr> {
        self.neighbours.mac(address)
    }

    /// Whether a backend of a service is considered alive. Only those of pools are checked.
    pub fn is_alive(
        &self,
        network: NetworkId,
        service: &Service,
        name: &BackendName,
        backend: &Backend,
    ) -> bool {
        let probe = Probe::of(network, service, name, backend);
        let probe = probe.filter(|_| service.method().is_pool());
        probe.is_none_or(|probe| self.health.is_alive(probe))
    }

    /// Returns why the host cannot check a backend, if it cannot.
    pub fn health_unknown_reason(
        &self,
        network: NetworkId,
        service: &Service,
        name: &BackendName,
        backend: &Backend,
    ) -> Option<&'static str> {
        let Some(Probe::Tcp(network, ip, port)) = Probe::of(network, service, name, backend) else {
            return None;
        };
        self.impossible.get(&(network, ip, port)).map(|errno| match errno {
            Errno::EADDRNOTAVAIL | Errno::ENODEV => {
                "the host has no address on the backend's network"
            }
            errno => errno.desc(),
        })
    }

    /// Takes what the kernel has noted, asks for the MACs of backends that no command gave one, and
    /// collects the results of checks. Returns whether anything has changed.
    pub fn refresh(
        &mut self,
        desired: &Desired,
        host: &HostNetworks,
        noted: &[(NetworkId, Neighbour)],
    ) -> bool {
        let now = Instant::now();
        let (mut wanted, mut probes) = (BTreeSet::new(), BTreeSet::new());
        for reference in desired.policy.backends() {
            let BackendRef { service, name, backend, .. } = reference;
            let Some(network) = desired.slots.network_of(reference.middlebox) else { continue };
            let probe = Probe::of(network, service, name, backend);
            let probe = probe.filter(|_| service.method().is_pool());
            // Nobody can be asked where nobody knows the way.
            let its_name = desired.networks.name(network);
            if its_name.is_none_or(|name| host.has_vlans(name)) {
                continue;
            }
            if backend.mac.is_none() || matches!(probe, Some(Probe::Neighbour(..))) {
                wanted.insert((network, name.ip));
            }
            probes.extend(probe);
        }
        self.health.track(&probes, now);
        let events = self.neighbours.refresh(&wanted, noted, host, &desired.networks, now);
        let mut changed = !events.moved.is_empty();
        for ((_, ip), mac) in events.moved {
            log::info!("backend {ip} is at {mac}");
        }
        for ((network, ip), answered) in events.answers {
            changed |= self.record_check(Probe::Neighbour(network, ip), answered, now);
            // A backend that does not answer ARP accepts no connection.
            let tcp = Probe::Tcp(network, ip, 0)..=Probe::Tcp(network, ip, u16::MAX);
            for probe in probes.range(tcp).filter(|_| !answered) {
                changed |= self.record_check(*probe, false, now);
            }
        }
        let checked = self.collect_checks(host, &desired.networks, now);
        changed | checked
    }

    fn collect_checks(&mut self, host: &HostNetworks, networks: &Networks, now: Instant) -> bool {
        let mut devices: BTreeMap<NetworkId, Option<String>> = BTreeMap::new();
        let mut targets = BTreeMap::new();
        for probe in self.health.probes() {
            if let Probe::Tcp(network, ip, port) = probe {
                let device = devices.entry(network).or_insert_with(|| {
                    networks.name(network).and_then(|name| host.host_device(name))
                });
                targets.insert((network, ip, port), device.clone());
            }
        }
        self.impossible.retain(|target, _| targets.contains_key(target));
        let mut changed = false;
        for ((network, ip, port), outcome) in self.tcp_checks.exchange(targets) {
            let (probe, target) = (Probe::Tcp(network, ip, port), (network, ip, port));
            match outcome {
                Outcome::Impossible(errno) => {
                    if self.impossible.insert(target, errno).is_none() {
                        log::debug!(
                            "the host cannot check {ip} port {port}: {errno}; it is considered alive"
                        );
                        changed |= self.health.reset(probe, now);
                    }
                }
                Outcome::Answered | Outcome::Failed => {
                    self.impossible.remove(&target);
                    changed |= self.record_check(probe, outcome == Outcome::Answered, now);
                }
            }
        }
        changed
    }

    fn record_check(&mut self, probe: Probe, succeeded: bool, now: Instant) -> bool {
        let changed = self.health.record(probe, succeeded, now);
        if changed {
            let state = if succeeded { "alive again" } else { "dead" };
            match probe {
                Probe::Neighbour(_, ip) => {
                    log::warn!("backend {ip} is {state} (check: ARP or neighbour discovery)");
                }
                Probe::Tcp(_, ip, port) => {
                    log::warn!("backend {ip} is {state} (check: TCP port {port})");
                }
            }
        }
        changed
    }
}

/// Returns the MACs that an earlier nfqd had found itself. One that a command gave is valid for its
/// own service only: whoever may speak for a middlebox must not decide where others find their
/// backends.
pub fn recovered_macs(
    desired: &Desired,
    macs: &BTreeMap<SlotKey, MacAddr>,
) -> BTreeMap<(NetworkId, IpAddr), MacAddr> {
    let address = |(key, mac): (&SlotKey, &MacAddr)| {
        let middlebox = desired.policy.get(key.middlebox)?;
        let backend = middlebox.service(&key.frontend)?.backends().get(&key.backend)?;
        let network = desired.slots.network_of(key.middlebox)?;
        backend.mac.is_none().then_some(((network, key.backend.ip), *mac))
    };
    macs.iter().filter_map(address).collect()
}
