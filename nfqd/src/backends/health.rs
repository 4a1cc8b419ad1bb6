//! Which backends are alive: what checks say, made steady.
//!
//! A backend is dead after some checks that failed in a row, alive after some that succeeded. One that goes up and down
//! stays down longer each time.

use nfqd_rules::service::{Backend, Service};
use nfqd_shmctl::{BackendName, Check};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// A check that the host makes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Probe {
    /// ARP or neighbour discovery.
    Neighbour(IpAddr),
    /// A TCP connection.
    Tcp(IpAddr, u16),
}

impl Probe {
    /// The check of a backend of a service; none where it is taken as alive.
    pub fn of(service: &Service, name: &BackendName, backend: &Backend) -> Option<Probe> {
        match service.terms().check {
            Check::None => None,
            Check::Default if backend.mac.is_some() => None,
            Check::Default | Check::Neighbour => Some(Probe::Neighbour(name.ip)),
            Check::Tcp(port) => match port.or(name.port) {
                Some(port) => Some(Probe::Tcp(name.ip, port)),
                None => Some(Probe::Neighbour(name.ip)),
            },
        }
    }

    /// Checks that fail in a row until the backend is dead. The kernel has asked three times before it says that a
    /// neighbour does not answer.
    fn fall(self) -> u32 {
        match self {
            Probe::Neighbour(_) => 1,
            Probe::Tcp(..) => 3,
        }
    }

    /// The address.
    pub fn ip(self) -> IpAddr {
        match self {
            Probe::Neighbour(ip) | Probe::Tcp(ip, _) => ip,
        }
    }
}

/// Checks that succeed in a row until a dead backend is alive.
const RISE: u32 = 2;
/// How long a backend stays dead that was alive for long before; each time that it dies again soon doubles it.
const SHORTEST_DEATH: Duration = Duration::from_secs(2);
const LONGEST_DEATH: Duration = Duration::from_secs(64);
/// A backend that was alive for so long has not been flapping.
const STEADY: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
struct Track {
    alive: bool,
    /// Checks in a row that speak against that.
    against: u32,
    /// Whether a check has ever succeeded.
    proven: bool,
    since: Instant,
    death: Duration,
}

/// What all checks have said.
#[derive(Clone, Debug, Default)]
pub struct Health {
    tracks: BTreeMap<Probe, Track>,
}

impl Health {
    /// Checks these, and forgets others. What was never checked is taken as alive.
    pub fn watch(&mut self, wanted: &BTreeSet<Probe>, now: Instant) {
        self.tracks.retain(|probe, _| wanted.contains(probe));
        for probe in wanted {
            self.tracks.entry(*probe).or_insert(Track {
                alive: true,
                against: 0,
                proven: false,
                since: now,
                death: SHORTEST_DEATH,
            });
        }
    }

    /// Takes the result of a check. True when the backend died or came back by it.
    pub fn take(&mut self, probe: Probe, succeeded: bool, now: Instant) -> bool {
        let Some(track) = self.tracks.get_mut(&probe) else { return false };
        track.proven |= succeeded;
        if succeeded == track.alive {
            track.against = 0;
            return false;
        }
        track.against += 1;
        let age = now.saturating_duration_since(track.since);
        let turns = if track.alive {
            // What has never answered is not worth waiting for.
            track.against >= if track.proven { probe.fall() } else { probe.fall().min(2) }
        } else {
            track.against >= RISE && age >= track.death
        };
        if !turns {
            return false;
        }
        if track.alive {
            track.death = if age >= STEADY { SHORTEST_DEATH } else { (track.death * 2).min(LONGEST_DEATH) };
        }
        track.alive = !track.alive;
        track.against = 0;
        track.since = now;
        true
    }

    /// Begins anew with a check that cannot be made any more. True when the backend was dead by it.
    pub fn forget(&mut self, probe: Probe, now: Instant) -> bool {
        let Some(track) = self.tracks.get_mut(&probe) else { return false };
        let was_dead = !track.alive;
        *track = Track { alive: true, against: 0, proven: false, since: now, death: track.death };
        was_dead
    }

    /// Whether a backend is taken as alive.
    pub fn is_alive(&self, probe: Probe) -> bool {
        self.tracks.get(&probe).is_none_or(|track| track.alive)
    }

    /// All checks.
    pub fn probes(&self) -> impl Iterator<Item = Probe> {
        self.tracks.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBE: Probe = Probe::Tcp(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80);

    #[test]
    fn it_takes_several_checks_to_die_and_to_come_back() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut health = Health::default();
        health.watch(&BTreeSet::from([PROBE]), start);
        assert!(health.is_alive(PROBE), "nothing speaks against it yet");
        assert!(!health.take(PROBE, true, at(1)));
        let failures = [(100, false), (101, false), (102, true)];
        for (second, turned) in failures {
            assert_eq!(health.take(PROBE, false, at(second)), turned, "{second}");
        }
        assert!(!health.is_alive(PROBE));
        assert!(!health.take(PROBE, true, at(103)));
        assert!(!health.take(PROBE, false, at(104)), "not in a row");
        assert!(!health.take(PROBE, true, at(105)));
        assert!(!health.take(PROBE, true, at(105)) || health.is_alive(PROBE));
        health.watch(&BTreeSet::new(), at(106));
        assert!(health.is_alive(PROBE) && health.probes().next().is_none());
    }

    #[test]
    fn what_goes_up_and_down_stays_down_longer() {
        let mut health = Health::default();
        let mut now = Instant::now();
        health.watch(&BTreeSet::from([PROBE]), now);
        health.take(PROBE, true, now);
        let mut deaths = Vec::new();
        for _ in 0..7 {
            while !health.take(PROBE, false, now) {
                now += Duration::from_secs(1);
            }
            let died = now;
            while !health.take(PROBE, true, now) {
                now += Duration::from_secs(1);
            }
            deaths.push((now - died).as_secs());
        }
        assert_eq!(deaths, [4, 8, 16, 32, 64, 64, 64]);
        now += STEADY * 2;
        while !health.take(PROBE, false, now) {}
        assert_eq!(health.tracks[&PROBE].death, SHORTEST_DEATH);
    }

    #[test]
    fn what_never_answered_is_dead_soon() {
        let now = Instant::now();
        let mut health = Health::default();
        health.watch(&BTreeSet::from([PROBE]), now);
        assert!(!health.take(PROBE, false, now) && health.take(PROBE, false, now));
    }
}
