//! Health of backends: the results of checks, damped.
//!
//! A backend is dead after some checks in a row that failed, and alive after some that succeeded.
//! A flapping backend stays dead longer each time.

use nfqd_rules::NetworkId;
use nfqd_rules::service::{Backend, Service};
use nfqd_shmctl::{BackendName, Check};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A check that the host makes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Probe {
    /// ARP or neighbour discovery.
    Neighbour(NetworkId, IpAddr),
    /// A TCP connection.
    Tcp(NetworkId, IpAddr, u16),
}

impl Probe {
    /// Returns the check of a backend of a service on a network; `None` if it is always considered
    /// alive.
    pub fn of(
        network: NetworkId,
        service: &Service,
        name: &BackendName,
        backend: &Backend,
    ) -> Option<Probe> {
        match service.options().check {
            Check::None => None,
            Check::Default if backend.mac.is_some() => None,
            Check::Default | Check::Neighbour => Some(Probe::Neighbour(network, name.ip)),
            Check::Tcp(port) => match port.or(name.port) {
                Some(port) => Some(Probe::Tcp(network, name.ip, port)),
                None => Some(Probe::Neighbour(network, name.ip)),
            },
        }
    }

    /// Returns the network and the backend's address.
    pub fn address(self) -> (NetworkId, IpAddr) {
        match self {
            Probe::Neighbour(network, ip) | Probe::Tcp(network, ip, _) => (network, ip),
        }
    }
}

/// Checks that must fail in a row before a backend is dead.
const FALL: u32 = 3;
/// Checks that must fail in a row before a backend is dead that has never passed one: it is not
/// worth waiting for.
const FALL_UNPROVEN: u32 = 2;
/// Checks that must succeed in a row before a dead backend is alive.
const RISE: u32 = 2;
/// The least time that a backend stays dead; each death soon after the last one doubles it.
const MIN_DOWN_TIME: Duration = Duration::from_secs(2);
/// The limit of that doubling.
const MAX_DOWN_TIME: Duration = Duration::from_secs(64);
/// A backend that was alive for this long has not been flapping.
const STABLE_AFTER: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
struct BackendHealth {
    alive: bool,
    /// Checks in a row that contradict `alive`.
    contradicting: u32,
    /// Whether a check has ever succeeded.
    has_passed: bool,
    since: Instant,
    down_time: Duration,
}

/// The health of all backends that are checked.
#[derive(Clone, Debug, Default)]
pub struct Health {
    backends: BTreeMap<Probe, BackendHealth>,
}

impl Health {
    /// Tracks these checks and no others. A backend is alive until it has been checked.
    pub fn track(&mut self, wanted: &BTreeSet<Probe>, now: Instant) {
        self.backends.retain(|probe, _| wanted.contains(probe));
        for probe in wanted {
            self.backends.entry(*probe).or_insert(BackendHealth {
                alive: true,
                contradicting: 0,
                has_passed: false,
                since: now,
                down_time: MIN_DOWN_TIME,
            });
        }
    }

    /// Records the result of a check. Returns whether the backend has died or come back.
    pub fn record(&mut self, probe: Probe, succeeded: bool, now: Instant) -> bool {
        let Some(health) = self.backends.get_mut(&probe) else { return false };
        health.has_passed |= succeeded;
        if succeeded == health.alive {
            health.contradicting = 0;
            return false;
        }
        health.contradicting += 1;
        let age = now.saturating_duration_since(health.since);
        let fall = if health.has_passed { FALL } else { FALL_UNPROVEN };
        let changes = if health.alive {
            health.contradicting >= fall
        } else {
            health.contradicting >= RISE && age >= health.down_time
        };
        if !changes {
            return false;
        }
        if health.alive {
            let doubled = (health.down_time * 2).min(MAX_DOWN_TIME);
            health.down_time = if age >= STABLE_AFTER { MIN_DOWN_TIME } else { doubled };
        }
        health.alive = !health.alive;
        health.contradicting = 0;
        health.since = now;
        true
    }

    /// Resets the health of a backend whose check the host cannot make any more. Returns whether it
    /// was dead.
    pub fn reset(&mut self, probe: Probe, now: Instant) -> bool {
        let Some(health) = self.backends.get_mut(&probe) else { return false };
        let was_dead = !health.alive;
        *health = BackendHealth {
            alive: true,
            contradicting: 0,
            has_passed: false,
            since: now,
            down_time: health.down_time,
        };
        was_dead
    }

    /// Whether a backend is considered alive.
    pub fn is_alive(&self, probe: Probe) -> bool {
        self.backends.get(&probe).is_none_or(|health| health.alive)
    }

    /// Returns all checks.
    pub fn probes(&self) -> impl Iterator<Item = Probe> {
        self.backends.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBE: Probe = Probe::Tcp(NetworkId::ANY, IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80);

    #[test]
    fn several_checks_decide_about_death_and_recovery() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut health = Health::default();
        health.track(&BTreeSet::from([PROBE]), start);
        assert!(health.is_alive(PROBE), "no check has failed yet");
        assert!(!health.record(PROBE, true, at(1)));
        for (second, died) in [(100, false), (101, false), (102, true)] {
            assert_eq!(health.record(PROBE, false, at(second)), died, "{second}");
        }
        assert!(!health.is_alive(PROBE));
        assert!(!health.record(PROBE, true, at(103)));
        assert!(!health.record(PROBE, false, at(104)), "not in a row");
        assert!(!health.record(PROBE, true, at(105)));
        assert!(!health.record(PROBE, true, at(105)) || health.is_alive(PROBE));
        health.track(&BTreeSet::new(), at(106));
        assert!(health.is_alive(PROBE) && health.probes().next().is_none());
    }

    #[test]
    fn a_backend_that_flaps_stays_dead_longer() {
        let mut health = Health::default();
        let mut now = Instant::now();
        health.track(&BTreeSet::from([PROBE]), now);
        health.record(PROBE, true, now);
        let mut down_times = Vec::new();
        for _ in 0..7 {
            while !health.record(PROBE, false, now) {
                now += Duration::from_secs(1);
            }
            let died = now;
            while !health.record(PROBE, true, now) {
                now += Duration::from_secs(1);
            }
            down_times.push((now - died).as_secs());
        }
        assert_eq!(down_times, [4, 8, 16, 32, 64, 64, 64]);
        now += STABLE_AFTER * 2;
        while !health.record(PROBE, false, now) {}
        assert_eq!(health.backends[&PROBE].down_time, MIN_DOWN_TIME);
    }

    #[test]
    fn a_backend_that_never_answered_is_dead_soon() {
        let now = Instant::now();
        let mut health = Health::default();
        health.track(&BTreeSet::from([PROBE]), now);
        assert!(!health.record(PROBE, false, now) && health.record(PROBE, false, now));
    }
}
