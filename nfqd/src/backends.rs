//! What the host sees of backends: their MACs and bridges, and whether they are alive.

mod checks;
mod health;
mod neighbours;

use crate::bindings::Bindings;
use checks::{Checks, Outcome};
use health::{Health, Probe};
use neighbours::{Found, Neighbours};
use nfqd_rules::Policy;
use nfqd_rules::service::{Backend, Service};
use nfqd_rules::slots::Seen;
use nfqd_shmctl::{BackendName, MacAddr, Vip};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How often neighbours are asked whether they are still there.
const PROBING: Duration = Duration::from_secs(3);

/// The backends that a policy names, as the host sees them.
pub struct Backends {
    macs: BTreeMap<IpAddr, MacAddr>,
    /// The bridges that they are on.
    bridges: BTreeMap<IpAddr, String>,
    /// Those that are on two bridges, with two MACs.
    ambiguous: BTreeSet<IpAddr>,
    neighbours: Neighbours,
    checks: Checks,
    health: Health,
    /// Checks that the host has no way to make, and why.
    no_way: BTreeMap<(IpAddr, u16), Errno>,
    /// When neighbours were last asked whether they are there.
    probed: Instant,
}

impl Backends {
    /// Begins with the MACs that were known before.
    ///
    /// # Errors
    /// When the neighbour table cannot be read, or there can be no thread for checks.
    pub fn start(macs: BTreeMap<IpAddr, MacAddr>) -> io::Result<Backends> {
        Ok(Backends {
            macs,
            bridges: BTreeMap::new(),
            ambiguous: BTreeSet::new(),
            neighbours: Neighbours::open()?,
            checks: Checks::start()?,
            health: Health::default(),
            no_way: BTreeMap::new(),
            probed: Instant::now(),
        })
    }

    /// What is known of a backend of a middlebox' service. A MAC that another channel speaks for is none: whoever has that
    /// address, it is no backend of this middlebox.
    pub fn seen<'a>(
        &'a self,
        bindings: &'a Bindings<'a>,
    ) -> impl Fn(MacAddr, &Vip, &Service, &BackendName) -> Seen + 'a {
        move |middlebox, _, service, name| {
            let backend = service.backends().get(name);
            let probe = backend.and_then(|backend| Probe::of(service, name, backend));
            let probe = probe.filter(|_| service.method().is_pool());
            let mac = self.macs.get(&name.ip).copied();
            Seen {
                mac: mac.filter(|mac| !bindings.are_apart(*mac, middlebox)),
                alive: probe.is_none_or(|probe| self.health.is_alive(probe)),
            }
        }
    }

    /// Why the host cannot check whether a backend is alive.
    pub fn unchecked(
        &self,
        service: &Service,
        name: &BackendName,
        backend: &Backend,
    ) -> Option<&'static str> {
        let Some(Probe::Tcp(ip, port)) = Probe::of(service, name, backend) else { return None };
        self.no_way.get(&(ip, port)).map(|errno| match errno {
            Errno::EADDRNOTAVAIL => "the host has no address on its bridge to ask from",
            errno => errno.desc(),
        })
    }

    /// Asks the kernel for the MACs of backends that no command gave one, and looks at what checks have found. True when
    /// something is new.
    pub fn look(&mut self, policy: &Policy) -> bool {
        let now = Instant::now();
        let (mut unknown, mut probes) = (BTreeSet::new(), BTreeSet::new());
        for (_, _, service, name, backend) in policy.backends() {
            if backend.mac.is_none() {
                unknown.insert(name.ip);
            }
            probes.extend(Probe::of(service, name, backend).filter(|_| service.method().is_pool()));
        }
        self.health.watch(&probes, now);
        let neighbours = self.find_neighbours(unknown, &probes, now);
        let checked = self.take_checks(now);
        neighbours | checked
    }

    fn find_neighbours(&mut self, unknown: BTreeSet<IpAddr>, probes: &BTreeSet<Probe>, now: Instant) -> bool {
        // Where a TCP check goes is known by the neighbour's bridge.
        let wanted: BTreeSet<IpAddr> =
            unknown.into_iter().chain(probes.iter().map(|probe| probe.ip())).collect();
        if wanted.is_empty() {
            self.macs.clear();
            self.bridges.clear();
            return false;
        }
        let asked = probes.iter().filter(|probe| matches!(probe, Probe::Neighbour(_)));
        let asked: BTreeSet<IpAddr> = asked.map(|probe| probe.ip()).collect();
        let is_time = now.duration_since(self.probed) >= PROBING;
        if is_time {
            self.probed = now;
        }
        let nobody = BTreeSet::new();
        let found = match self.neighbours.resolve(&wanted, if is_time { &asked } else { &nobody }) {
            Ok(found) => found,
            Err(errno) => {
                log::warn!("neighbour table: {errno}");
                return false;
            }
        };
        // A MAC that is not seen any more stays: the backend may be silent, and the flow has no better place.
        self.macs.retain(|ip, _| wanted.contains(ip));
        self.bridges.retain(|ip, _| wanted.contains(ip));
        self.ambiguous.retain(|ip| wanted.contains(ip));
        let mut any = false;
        for (ip, found) in found {
            let probe = Probe::Neighbour(ip);
            match found {
                Found::At { mac, answers, bridge } => {
                    if self.macs.insert(ip, mac) != Some(mac) {
                        log::info!("backend {ip} is at {mac}");
                        any = true;
                    }
                    self.bridges.insert(ip, bridge);
                    self.ambiguous.remove(&ip);
                    if answers {
                        any |= self.take_result(probe, true, now);
                    }
                }
                Found::Silent => {
                    self.bridges.remove(&ip);
                    any |= self.take_result(probe, false, now);
                    // Who does not even answer ARP takes no connection.
                    for probe in
                        probes.iter().filter(|probe| matches!(probe, Probe::Tcp(other, _) if *other == ip))
                    {
                        any |= self.take_result(*probe, false, now);
                    }
                }
                Found::Ambiguous => {
                    any |= self.macs.remove(&ip).is_some();
                    if self.ambiguous.insert(ip) {
                        log::warn!(
                            "{ip} is on two bridges, with two MACs; it is not redirected to without ip@mac"
                        );
                    }
                    self.bridges.remove(&ip);
                }
            }
        }
        any
    }

    fn take_checks(&mut self, now: Instant) -> bool {
        let targets = self.health.probes().filter_map(|probe| match probe {
            Probe::Tcp(ip, port) => Some(((ip, port), self.bridges.get(&ip).cloned())),
            Probe::Neighbour(_) => None,
        });
        let targets: BTreeMap<_, _> = targets.collect();
        self.no_way.retain(|target, _| targets.contains_key(target));
        let mut any = false;
        for ((ip, port), outcome) in self.checks.exchange(targets) {
            let probe = Probe::Tcp(ip, port);
            match outcome {
                // It has not been found yet, or is on two bridges: that says nothing.
                Outcome::NoWay(Errno::ENODEV) => {}
                Outcome::NoWay(errno) => {
                    if self.no_way.insert((ip, port), errno).is_none() {
                        log::debug!("the host cannot check {ip} port {port}: {errno}; it is taken as alive");
                        any |= self.health.forget(probe, now);
                    }
                }
                outcome => {
                    self.no_way.remove(&(ip, port));
                    any |= self.take_result(probe, outcome == Outcome::Answered, now);
                }
            }
        }
        any
    }

    fn take_result(&mut self, probe: Probe, succeeded: bool, now: Instant) -> bool {
        let turned = self.health.take(probe, succeeded, now);
        if turned {
            let state = if succeeded { "alive again" } else { "dead" };
            match probe {
                Probe::Neighbour(ip) => log::warn!("backend {ip} is {state}, by ARP or neighbour discovery"),
                Probe::Tcp(ip, port) => log::warn!("backend {ip} is {state}, by TCP port {port}"),
            }
        }
        turned
    }
}
