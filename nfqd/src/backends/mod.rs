//! Observation of backends: their MACs and bridges, and whether they are alive.
//!
//! `neighbours` finds MACs, `tcp_check` connects, [`health`] damps the results.

pub mod health;
mod neighbours;
mod tcp_check;

use crate::bindings::Bindings;
use health::{Health, Probe};
use neighbours::{Found, Neighbours};
use nfqd_rules::Policy;
use nfqd_rules::service::BackendRef;
use nfqd_rules::service::{Backend, Service};
use nfqd_rules::slots::{BackendObservation, BackendView};
use nfqd_shmctl::{BackendName, MacAddr};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tcp_check::{Outcome, TcpChecks};

/// The host's view of backends, as far as bindings let a middlebox use it.
pub struct HostView<'a> {
    /// The observations.
    pub backends: &'a Backends,
    /// The bindings of the channels.
    pub bindings: &'a Bindings<'a>,
}

impl BackendView for HostView<'_> {
    /// Returns what is observed of a backend. A MAC that another channel speaks for is left out:
    /// whoever has the address, it is not a backend of this middlebox.
    fn observe(&self, backend: &BackendRef<'_>) -> BackendObservation {
        let mac = self.backends.mac(backend.name.ip);
        BackendObservation {
            mac: mac.filter(|mac| !self.bindings.are_apart(*mac, backend.middlebox)),
            alive: self.backends.is_alive(backend.service, backend.name, backend.backend),
        }
    }
}

/// The interval at which neighbours are probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(3);

/// The backends that a policy names, as the host observes them.
pub struct Backends {
    macs: BTreeMap<IpAddr, MacAddr>,
    bridges: BTreeMap<IpAddr, String>,
    /// Addresses that are on two bridges, with two MACs.
    ambiguous: BTreeSet<IpAddr>,
    neighbours: Neighbours,
    tcp_checks: TcpChecks,
    health: Health,
    /// Checks that the host cannot make, and why.
    impossible: BTreeMap<(IpAddr, u16), Errno>,
    last_probe: Instant,
}

impl Backends {
    /// The backends, with MACs that were known before.
    ///
    /// # Errors
    /// If the neighbour table cannot be read, or there is no thread for checks.
    pub fn start(macs: BTreeMap<IpAddr, MacAddr>) -> io::Result<Backends> {
        Ok(Backends {
            macs,
            bridges: BTreeMap::new(),
            ambiguous: BTreeSet::new(),
            neighbours: Neighbours::open()?,
            tcp_checks: TcpChecks::start()?,
            health: Health::default(),
            impossible: BTreeMap::new(),
            last_probe: Instant::now(),
        })
    }

    /// Returns the MAC that answers for an address.
    pub fn mac(&self, ip: IpAddr) -> Option<MacAddr> {
        self.macs.get(&ip).copied()
    }

    /// Whether a backend of a service is considered alive. Only those of pools are checked.
    pub fn is_alive(&self, service: &Service, name: &BackendName, backend: &Backend) -> bool {
        let probe = Probe::of(service, name, backend).filter(|_| service.method().is_pool());
        probe.is_none_or(|probe| self.health.is_alive(probe))
    }

    /// Returns why the host cannot check a backend, if it cannot.
    pub fn health_unknown_reason(
        &self,
        service: &Service,
        name: &BackendName,
        backend: &Backend,
    ) -> Option<&'static str> {
        let Some(Probe::Tcp(ip, port)) = Probe::of(service, name, backend) else { return None };
        self.impossible.get(&(ip, port)).map(|errno| match errno {
            Errno::EADDRNOTAVAIL => "the host has no address on the backend's bridge",
            errno => errno.desc(),
        })
    }

    /// Asks the kernel for the MACs of backends that no command gave one, and collects the results
    /// of checks. Returns whether anything has changed.
    pub fn refresh(&mut self, policy: &Policy) -> bool {
        let now = Instant::now();
        let (mut unknown, mut probes) = (BTreeSet::new(), BTreeSet::new());
        for reference in policy.backends() {
            if reference.backend.mac.is_none() {
                unknown.insert(reference.name.ip);
            }
            if reference.service.method().is_pool() {
                probes.extend(Probe::of(reference.service, reference.name, reference.backend));
            }
        }
        self.health.track(&probes, now);
        let neighbours = self.refresh_neighbours(unknown, &probes, now);
        let checked = self.collect_checks(now);
        neighbours | checked
    }

    fn refresh_neighbours(
        &mut self,
        unknown: BTreeSet<IpAddr>,
        probes: &BTreeSet<Probe>,
        now: Instant,
    ) -> bool {
        // The bridge of a neighbour tells where a TCP check goes.
        let checked = probes.iter().map(|probe| probe.ip());
        let wanted: BTreeSet<IpAddr> = unknown.into_iter().chain(checked).collect();
        if wanted.is_empty() {
            self.macs.clear();
            self.bridges.clear();
            return false;
        }
        let is_due = now.duration_since(self.last_probe) >= PROBE_INTERVAL;
        let mut probed = BTreeSet::new();
        if is_due {
            self.last_probe = now;
            let by_arp = probes.iter().filter(|probe| matches!(probe, Probe::Neighbour(_)));
            probed.extend(by_arp.map(|probe| probe.ip()));
        }
        let found = match self.neighbours.resolve(&wanted, &probed) {
            Ok(found) => found,
            Err(errno) => {
                log::warn!("neighbour table: {errno}");
                return false;
            }
        };
        // A MAC that is not observed any more is kept: the backend may just be silent, and its
        // flows have no better place.
        self.macs.retain(|ip, _| wanted.contains(ip));
        self.bridges.retain(|ip, _| wanted.contains(ip));
        self.ambiguous.retain(|ip| wanted.contains(ip));
        let mut changed = false;
        for (ip, found) in found {
            changed |= self.record_neighbour(ip, found, probes, now);
        }
        changed
    }

    fn record_neighbour(
        &mut self,
        ip: IpAddr,
        found: Found,
        probes: &BTreeSet<Probe>,
        now: Instant,
    ) -> bool {
        let probe = Probe::Neighbour(ip);
        let mut changed = false;
        match found {
            Found::At { mac, answers, bridge } => {
                if self.macs.insert(ip, mac) != Some(mac) {
                    log::info!("backend {ip} is at {mac}");
                    changed = true;
                }
                self.bridges.insert(ip, bridge);
                self.ambiguous.remove(&ip);
                if answers {
                    changed |= self.record_check(probe, true, now);
                }
            }
            Found::Silent => {
                self.bridges.remove(&ip);
                changed |= self.record_check(probe, false, now);
                // A backend that does not answer ARP accepts no connection.
                for probe in probes {
                    if matches!(probe, Probe::Tcp(other, _) if *other == ip) {
                        changed |= self.record_check(*probe, false, now);
                    }
                }
            }
            Found::Ambiguous => {
                changed |= self.macs.remove(&ip).is_some();
                if self.ambiguous.insert(ip) {
                    log::warn!(
                        "{ip} is on two bridges, with two MACs; nothing is redirected to it without \
                         ip@mac"
                    );
                }
                self.bridges.remove(&ip);
            }
        }
        changed
    }

    fn collect_checks(&mut self, now: Instant) -> bool {
        let mut targets = BTreeMap::new();
        for probe in self.health.probes() {
            if let Probe::Tcp(ip, port) = probe {
                targets.insert((ip, port), self.bridges.get(&ip).cloned());
            }
        }
        self.impossible.retain(|target, _| targets.contains_key(target));
        let mut changed = false;
        for ((ip, port), outcome) in self.tcp_checks.exchange(targets) {
            let probe = Probe::Tcp(ip, port);
            match outcome {
                // The backend has not been found yet, or is on two bridges: nothing is known.
                Outcome::Impossible(Errno::ENODEV) => {}
                Outcome::Impossible(errno) => {
                    if self.impossible.insert((ip, port), errno).is_none() {
                        log::debug!(
                            "the host cannot check {ip} port {port}: {errno}; it is considered alive"
                        );
                        changed |= self.health.reset(probe, now);
                    }
                }
                Outcome::Answered | Outcome::Failed => {
                    self.impossible.remove(&(ip, port));
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
                Probe::Neighbour(ip) => {
                    log::warn!("backend {ip} is {state} (check: ARP or neighbour discovery)");
                }
                Probe::Tcp(ip, port) => {
                    log::warn!("backend {ip} is {state} (check: TCP port {port})");
                }
            }
        }
        changed
    }
}
