//! Health of backends: the results of checks, damped.
//!
//! A backend fails after some checks in a row that failed, and passes after some that succeeded. One
//! that flaps fails longer each time. What a failure means for its service, `liveness`
//! decides.

use nfqd_rules::NetworkId;
use nfqd_rules::service::{Backend, Service};
use nfqd_shmctl::{BackendName, Check, CheckPace};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A check that the host makes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Probe {
    /// The network of the backend.
    pub network: NetworkId,
    /// The address of the backend.
    pub ip: IpAddr,
    /// The question.
    pub kind: ProbeKind,
    /// The pace.
    pub pace: CheckPace,
}

/// The question of a check.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ProbeKind {
    /// ARP or neighbour discovery.
    Neighbour,
    /// A TCP connection to a port.
    Tcp(u16),
    /// A UDP datagram to a port.
    Udp(u16),
}

impl fmt::Display for ProbeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbeKind::Neighbour => f.write_str("ARP or neighbour discovery"),
            ProbeKind::Tcp(port) => write!(f, "TCP port {port}"),
            ProbeKind::Udp(port) => write!(f, "UDP port {port}"),
        }
    }
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
        if !service.method().is_pool() {
            return None;
        }
        let on_port = |port: Option<u16>, kind: fn(u16) -> ProbeKind| {
            port.or(name.port).map_or(ProbeKind::Neighbour, kind)
        };
        let kind = match service.options().check {
            Check::None => return None,
            Check::Default if backend.mac.is_some() => return None,
            Check::Default | Check::Neighbour => ProbeKind::Neighbour,
            Check::Tcp(port) => on_port(port, ProbeKind::Tcp),
            Check::Udp(port) => on_port(port, ProbeKind::Udp),
        };
        Some(Probe { network, ip: name.ip, kind, pace: service.options().pace })
    }

    /// Returns a probe that sorts before all probes of an address.
    pub fn first_of(network: NetworkId, ip: IpAddr) -> Probe {
        let pace = CheckPace { interval: 0, rise: 0, fall: 0 };
        Probe { network, ip, kind: ProbeKind::Neighbour, pace }
    }
}

/// Checks that must fail in a row before a backend fails that has never passed one: it is not worth
/// waiting for.
const FALL_UNPROVEN: u8 = 2;
/// The least time that a backend fails; each failure soon after the last one doubles it.
const MIN_DOWN_TIME: Duration = Duration::from_secs(2);
/// The limit of that doubling.
const MAX_DOWN_TIME: Duration = Duration::from_secs(64);
/// A backend that has passed for this long has not been flapping.
const STABLE_AFTER: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
struct BackendHealth {
    passes: bool,
    /// Checks in a row that contradict `passes`.
    contradicting: u8,
    /// Whether a check has ever succeeded.
    has_passed: bool,
    since: Instant,
    down_time: Duration,
}

/// A failure of a backend's checks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The time at which it began.
    pub since: Instant,
    /// Whether the backend has ever passed a check.
    pub has_passed: bool,
}

/// The health of all backends that are checked.
#[derive(Clone, Debug, Default)]
pub struct Health {
    backends: BTreeMap<Probe, BackendHealth>,
}

impl Health {
    /// Tracks these checks and no others. A backend passes until it has been checked.
    pub fn track(&mut self, wanted: &BTreeSet<Probe>, now: Instant) {
        self.backends.retain(|probe, _| wanted.contains(probe));
        for probe in wanted {
            self.backends.entry(*probe).or_insert(BackendHealth {
                passes: true,
                contradicting: 0,
                has_passed: false,
                since: now,
                down_time: MIN_DOWN_TIME,
            });
        }
    }

    /// Records the result of a check. Returns whether the backend now fails or passes that did not
    /// before.
    pub fn record(&mut self, probe: Probe, succeeded: bool, now: Instant) -> bool {
        let Some(health) = self.backends.get_mut(&probe) else { return false };
        health.has_passed |= succeeded;
        if succeeded == health.passes {
            health.contradicting = 0;
            return false;
        }
        health.contradicting = health.contradicting.saturating_add(1);
        let age = now.saturating_duration_since(health.since);
        let CheckPace { rise, fall, .. } = probe.pace;
        let fall = if health.has_passed { fall } else { fall.min(FALL_UNPROVEN) };
        let changes = if health.passes {
            health.contradicting >= fall
        } else {
            health.contradicting >= rise && age >= health.down_time
        };
        if !changes {
            return false;
        }
        if health.passes {
            let doubled = (health.down_time * 2).min(MAX_DOWN_TIME);
            health.down_time = if age >= STABLE_AFTER { MIN_DOWN_TIME } else { doubled };
        }
        health.passes = !health.passes;
        health.contradicting = 0;
        health.since = now;
        true
    }

    /// Resets the health of a backend whose check the host cannot make any more. Returns whether it
    /// failed.
    pub fn reset(&mut self, probe: Probe, now: Instant) -> bool {
        let Some(health) = self.backends.get_mut(&probe) else { return false };
        let failed = !health.passes;
        *health = BackendHealth {
            passes: true,
            contradicting: 0,
            has_passed: false,
            since: now,
            down_time: health.down_time,
        };
        failed
    }

    /// Returns the failure of a check, if it fails.
    pub fn failure(&self, probe: Probe) -> Option<Failure> {
        let health = self.backends.get(&probe).filter(|health| !health.passes)?;
        Some(Failure { since: health.since, has_passed: health.has_passed })
    }

    /// Whether a check fails, or has failed the last time.
    pub fn is_doubtful(&self, probe: Probe) -> bool {
        self.backends.get(&probe).is_some_and(|health| !health.passes || health.contradicting > 0)
    }

    /// Returns all checks.
    pub fn probes(&self) -> impl Iterator<Item = Probe> {
        self.backends.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBE: Probe = Probe {
        network: NetworkId::ANY,
        ip: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        kind: ProbeKind::Tcp(80),
        pace: CheckPace { interval: 1, rise: 2, fall: 3 },
    };

    #[test]
    fn several_checks_decide_about_death_and_recovery() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut health = Health::default();
        health.track(&BTreeSet::from([PROBE]), start);
        assert!(health.failure(PROBE).is_none(), "no check has failed yet");
        assert!(!health.record(PROBE, true, at(1)));
        for (second, died) in [(100, false), (101, false), (102, true)] {
            assert_eq!(health.record(PROBE, false, at(second)), died, "{second}");
        }
        assert!(health.failure(PROBE).is_some());
        assert!(!health.record(PROBE, true, at(103)));
        assert!(!health.record(PROBE, false, at(104)), "not in a row");
        assert!(!health.record(PROBE, true, at(105)));
        assert!(!health.record(PROBE, true, at(105)) || health.failure(PROBE).is_none());
        health.track(&BTreeSet::new(), at(106));
        assert!(health.failure(PROBE).is_none() && health.probes().next().is_none());
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
    fn a_service_sets_how_many_checks_decide() {
        let pace = CheckPace { interval: 1, rise: 5, fall: 7 };
        let probe = Probe { pace, ..PROBE };
        let start = Instant::now();
        let mut health = Health::default();
        health.track(&BTreeSet::from([probe]), start);
        assert!(!health.record(probe, true, start));
        let until = |health: &mut Health, succeeded: bool, at: Instant| {
            (1..20).find(|_| health.record(probe, succeeded, at))
        };
        assert_eq!(until(&mut health, false, start), Some(7));
        assert_eq!(until(&mut health, true, start + MAX_DOWN_TIME), Some(5));
    }

    #[test]
    fn a_backend_that_never_answered_is_dead_soon() {
        let now = Instant::now();
        let mut health = Health::default();
        health.track(&BTreeSet::from([PROBE]), now);
        assert!(!health.record(PROBE, false, now) && health.record(PROBE, false, now));
    }
}
