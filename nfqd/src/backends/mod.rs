//! Observation of backends: their MACs, and whether they are alive.
//!
//! `neighbours` finds MACs with the questions of `probe`, `port_check` connects, [`health`] damps the
//! results, and `liveness` weighs them against what flows show. Equal addresses on two networks are
//! two backends.

pub mod health;
mod liveness;
mod neighbours;
mod port_check;
mod probe;

pub use liveness::Activity;
pub(crate) use port_check::own_addresses;

use crate::bindings::Bindings;
use crate::networks::HostNetworks;
use health::{Health, Probe, ProbeKind};
use liveness::{Assessment, Assessor};
use neighbours::{Address, Neighbours};
use nfqd_rules::nft::kernel::Neighbour;
use nfqd_rules::service::{Backend, BackendRef, Service};
use nfqd_rules::slots::{BackendObservation, BackendView, Liveness, SlotKey};
use nfqd_rules::{Desired, MiddleboxKey, NetworkId, Networks};
use nfqd_shmctl::{BackendName, Frontend, MacAddr};
use nix::errno::Errno;
use port_check::{Outcome, PortChecks};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Instant;

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
        let BackendRef { middlebox, frontend, name, .. } = *backend;
        let key = SlotKey { middlebox, frontend: *frontend, backend: *name };
        BackendObservation { mac, liveness: self.backends.liveness(&key) }
    }

    fn network(&self, middlebox: MiddleboxKey) -> NetworkId {
        self.host.network_of(middlebox)
    }
}

/// The backends that a policy names, as the host observes them.
pub struct Backends {
    neighbours: Neighbours,
    port_checks: PortChecks,
    health: Health,
    /// Checks that the host cannot make, and why.
    impossible: BTreeMap<Probe, Errno>,
    assessor: Assessor,
    assessment: Assessment,
}

impl Backends {
    /// The backends, with MACs that were known before.
    ///
    /// # Errors
    /// If there is no thread for checks.
    pub fn start(macs: BTreeMap<Address, MacAddr>) -> io::Result<Backends> {
        Ok(Backends {
            neighbours: Neighbours::new(macs, Instant::now()),
            port_checks: PortChecks::start()?,
            health: Health::default(),
            impossible: BTreeMap::new(),
            assessor: Assessor::default(),
            assessment: Assessment::default(),
        })
    }

    /// Returns the MAC that answers for an address on a network.
    pub fn mac(&self, address: (NetworkId, IpAddr)) -> Option<MacAddr> {
        self.neighbours.mac(address)
    }

    /// Returns the liveness of a backend of a service.
    pub fn liveness(&self, key: &SlotKey) -> Liveness {
        self.assessment.liveness(key)
    }

    /// Begins the drains of a middlebox' backends anew, because a command has named them.
    pub fn restart_drains(&mut self, middlebox: MiddleboxKey, names: &[BackendName]) {
        self.assessor.restart_drains(middlebox, names);
    }

    /// Whether a backend fails its checks, and is considered alive because it answers on its flows.
    pub fn is_vouched_for(&self, key: &SlotKey) -> bool {
        self.assessment.is_vouched_for(key)
    }

    /// Whether most backends of a service fail their checks at once, so that the checks are doubted.
    pub fn is_panicking(&self, middlebox: MiddleboxKey, frontend: &Frontend) -> bool {
        self.assessment.is_panicking(middlebox, frontend)
    }

    /// Whether the traffic of backends is needed to know which of them are alive.
    pub fn needs_activity(&self) -> bool {
        self.health.probes().any(|probe| self.health.is_doubtful(probe))
    }

    /// Returns why the host cannot check a backend, if it cannot.
    pub fn health_unknown_reason(
        &self,
        network: NetworkId,
        service: &Service,
        name: &BackendName,
        backend: &Backend,
    ) -> Option<&'static str> {
        let probe = Probe::of(network, service, name, backend)?;
        self.impossible.get(&probe).map(|errno| match errno {
            Errno::EADDRNOTAVAIL | Errno::ENODEV => {
                "the host has no address on the backend's network"
            }
            errno => errno.desc(),
        })
    }

    /// Takes what the kernel has noted, asks for the MACs of backends that no command gave one, and
    /// collects the results of checks; `activity` returns the traffic of a backend that has a slot.
    /// Returns whether anything has changed.
    pub fn refresh(
        &mut self,
        desired: &Desired,
        host: &HostNetworks,
        noted: &[(NetworkId, Neighbour)],
        activity: impl Fn(&SlotKey) -> Option<Activity>,
    ) -> bool {
        let now = Instant::now();
        let (mut wanted, mut probes) = (BTreeSet::new(), BTreeSet::new());
        for reference in desired.policy.backends() {
            let BackendRef { service, name, backend, .. } = reference;
            let Some(network) = desired.slots.network_of(reference.middlebox) else { continue };
            let probe = Probe::of(network, service, name, backend);
            // Nobody can be asked where nobody knows the way.
            let its_name = desired.networks.name(network);
            if its_name.is_none_or(|name| host.has_vlans(name)) {
                continue;
            }
            // A UDP server may have nothing to say, so that its host must answer at least.
            let is_asked = probe.is_some_and(|probe| !matches!(probe.kind, ProbeKind::Tcp(_)));
            if backend.mac.is_none() || is_asked {
                wanted.insert((network, name.ip));
            }
            probes.extend(probe);
        }
        self.health.track(&probes, now);
        let events = self.neighbours.refresh(&wanted, noted, host, &desired.networks, now);
        let has_moved = !events.moved.is_empty();
        for ((_, ip), mac) in events.moved {
            log::info!("backend {ip} is at {mac}");
        }
        for ((network, ip), answered) in events.answers {
            let its = probes.range(Probe::first_of(network, ip)..);
            for probe in its.take_while(|probe| (probe.network, probe.ip) == (network, ip)) {
                // A backend that does not answer ARP accepts no connection.
                if probe.kind == ProbeKind::Neighbour || !answered {
                    self.record_check(*probe, answered, now);
                }
            }
        }
        self.collect_checks(host, &desired.networks, now);
        let assessment = self.assessor.assess(desired, &self.health, activity, now);
        let is_same = assessment == self.assessment;
        self.assessment = assessment;
        has_moved || !is_same
    }

    fn collect_checks(&mut self, host: &HostNetworks, networks: &Networks, now: Instant) {
        let mut devices: BTreeMap<NetworkId, Option<String>> = BTreeMap::new();
        let mut targets = BTreeMap::new();
        for probe in self.health.probes().filter(|probe| probe.kind != ProbeKind::Neighbour) {
            let device = devices.entry(probe.network).or_insert_with(|| {
                networks.name(probe.network).and_then(|name| host.host_device(name))
            });
            targets.insert(probe, device.clone());
        }
        self.impossible.retain(|probe, _| targets.contains_key(probe));
        for (probe, outcome) in self.port_checks.exchange(targets) {
            match outcome {
                Outcome::Impossible(errno) => {
                    if self.impossible.insert(probe, errno).is_none() {
                        log::debug!(
                            "the host cannot check {} ({}): {errno}; it is considered alive",
                            probe.ip,
                            probe.kind
                        );
                        self.health.reset(probe, now);
                    }
                }
                Outcome::Answered
                    if matches!(probe.kind, ProbeKind::Udp(_))
                        && self.neighbours.is_silent((probe.network, probe.ip)) => {}
                Outcome::Answered | Outcome::Failed => {
                    self.impossible.remove(&probe);
                    self.record_check(probe, outcome == Outcome::Answered, now);
                }
            }
        }
    }

    fn record_check(&mut self, probe: Probe, succeeded: bool, now: Instant) {
        if self.health.record(probe, succeeded, now) {
            let result = if succeeded { "passes its checks again" } else { "fails its checks" };
            log::warn!("backend {} {result} ({})", probe.ip, probe.kind);
        }
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
