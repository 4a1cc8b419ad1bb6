//! Liveness of backends: what checks that fail and answers on flows say together.
//!
//! Answers are evidence of life. A backend that fails its checks gets new flows as long as it answers
//! new flows, or, if only ARP or neighbour discovery fails, any; and keeps those that it has as long as
//! it answers them. If most of a pool begins to fail at once, the fault is probably the host's: the
//! pool panics, as Envoy calls it, and spreads new flows over all of them for a while, unless a
//! backend leaves them unanswered.

use super::health::{Failure, Health, Probe, ProbeKind};
use nfqd_rules::service::Service;
use nfqd_rules::slots::{Liveness, SlotKey};
use nfqd_rules::{Desired, MiddleboxKey, NetworkId};
use nfqd_shmctl::{BackendName, Drain, Frontend};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// The age up to which an answer is evidence of life.
const EVIDENCE_AGE: Duration = Duration::from_secs(5);
/// The time for which a pool may panic.
const PANIC_TIME: Duration = Duration::from_secs(10);
/// The seconds after which a new flow without an answer is evidence of death.
const SILENCE: u32 = 2;

/// The traffic of a backend, as the engine and the kernel have seen it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Activity {
    /// The age in seconds of the last packet from it that was no refusal (TCP reset, ICMP error) and
    /// passed the engine.
    pub answered: Option<u32>,
    /// The age in seconds of the last answer to a new flow of TCP.
    pub accepted_tcp: Option<u32>,
    /// The age in seconds of the last answer to a new flow of another protocol.
    pub accepted_other: Option<u32>,
    /// The age in seconds of the first new flow since the last answer to one.
    pub unanswered: Option<u32>,
    /// The number of packets from the backend, without refusals.
    pub replies: u64,
    /// The time of the last reading of the kernel's counters.
    pub counted: Option<Instant>,
}

impl Activity {
    /// Returns the age of the last answer to a new flow of the kind that a check is about.
    fn accepted(&self, kind: ProbeKind) -> Option<u32> {
        match kind {
            ProbeKind::Tcp(_) => self.accepted_tcp,
            ProbeKind::Udp(_) => self.accepted_other,
            ProbeKind::Neighbour => {
                [self.accepted_tcp, self.accepted_other].into_iter().flatten().min()
            }
        }
    }
}

/// The findings about backends that do not simply pass their checks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Assessment {
    liveness: BTreeMap<SlotKey, Liveness>,
    /// Backends that fail their checks and get new flows nevertheless, because they answer some.
    vouched_for: BTreeSet<SlotKey>,
    panicking: BTreeSet<(MiddleboxKey, Frontend)>,
}

impl Assessment {
    pub(super) fn liveness(&self, key: &SlotKey) -> Liveness {
        self.liveness.get(key).copied().unwrap_or(Liveness::Alive)
    }

    pub(super) fn is_vouched_for(&self, key: &SlotKey) -> bool {
        self.vouched_for.contains(key)
    }

    pub(super) fn is_panicking(&self, middlebox: MiddleboxKey, frontend: &Frontend) -> bool {
        self.panicking.contains(&(middlebox, *frontend))
    }
}

/// The memory between two assessments.
#[derive(Debug, Default)]
pub(super) struct Assessor {
    /// The most packets that were counted from a backend, and the time at which there were more.
    replies: BTreeMap<SlotKey, (u64, Option<Instant>)>,
    /// The drains that have an end, with their beginning.
    drains: BTreeMap<SlotKey, (u32, Instant)>,
}

/// A pool, with what is needed to assess it.
struct Pool<'a> {
    middlebox: MiddleboxKey,
    frontend: &'a Frontend,
    network: NetworkId,
    service: &'a Service,
}

impl Pool<'_> {
    fn key(&self, backend: &BackendName) -> SlotKey {
        SlotKey { middlebox: self.middlebox, frontend: *self.frontend, backend: *backend }
    }
}

impl Assessor {
    /// Begins the drains of a middlebox' backends with these addresses anew.
    pub(super) fn restart_drains(&mut self, middlebox: MiddleboxKey, names: &[BackendName]) {
        self.drains.retain(|key, _| {
            let is_named = names.iter().any(|name| name.ip == key.backend.ip);
            key.middlebox != middlebox || !is_named
        });
    }

    /// Assesses all backends. `activity` returns the traffic of one that has a slot.
    pub(super) fn assess(
        &mut self,
        desired: &Desired,
        health: &Health,
        activity: impl Fn(&SlotKey) -> Option<Activity>,
        now: Instant,
    ) -> Assessment {
        let mut out = Assessment::default();
        let mut watched = BTreeMap::new();
        let mut drains = BTreeMap::new();
        for (key, middlebox) in desired.policy.middleboxes() {
            let network = desired.slots.network_of(*key);
            for (frontend, service) in middlebox.services() {
                let (middlebox, any) = (*key, NetworkId::ANY);
                let pool = Pool { middlebox, frontend, network: network.unwrap_or(any), service };
                for (name, backend) in service.backends() {
                    let Some(Drain::For(seconds)) = backend.drain else { continue };
                    let key = pool.key(name);
                    let before = self.drains.get(&key).copied();
                    let drain = before.filter(|(before, _)| *before == seconds);
                    let (_, start) = *drains.entry(key).or_insert(drain.unwrap_or((seconds, now)));
                    if now >= start + Duration::from_secs(u64::from(seconds)) {
                        out.liveness.insert(key, Liveness::Drained);
                    }
                }
                if network.is_none() {
                    continue;
                }
                self.assess_pool(&pool, health, &activity, now, &mut watched, &mut out);
            }
        }
        (self.replies, self.drains) = (watched, drains);
        out
    }

    fn assess_pool(
        &self,
        pool: &Pool<'_>,
        health: &Health,
        activity: &impl Fn(&SlotKey) -> Option<Activity>,
        now: Instant,
        watched: &mut BTreeMap<SlotKey, (u64, Option<Instant>)>,
        out: &mut Assessment,
    ) {
        let mut silent: Vec<(SlotKey, Failure, Activity)> = Vec::new();
        let (mut takers, mut up) = (0, 0);
        for (name, backend) in pool.service.backends() {
            let key = pool.key(name);
            let probe = Probe::of(pool.network, pool.service, name, backend);
            let doubtful = probe.filter(|probe| health.is_doubtful(*probe));
            let seen = doubtful.and_then(|_| activity(&key)).unwrap_or_default();
            if doubtful.is_some() {
                watched.insert(key, self.count_replies(&key, &seen, now));
            }
            let takes = backend.drain.is_none();
            takers += usize::from(takes);
            let failure = probe.and_then(|probe| Some((probe, health.failure(probe)?)));
            let Some((probe, failure)) = failure else {
                up += usize::from(takes);
                continue;
            };
            if out.liveness.contains_key(&key) {
                continue;
            }
            let is_recent = |age: Option<u32>| {
                age.is_some_and(|age| Duration::from_secs(u64::from(age)) <= EVIDENCE_AGE)
            };
            let counted = watched.get(&key).and_then(|(_, increased)| *increased);
            // Readings are rare if they take long; until the next one, the last one is the newest.
            let is_newest = |at: Instant| seen.counted.is_some_and(|reading| reading <= at);
            let answers = is_recent(seen.answered)
                || counted.is_some_and(|at| now - at <= EVIDENCE_AGE || is_newest(at));
            if is_recent(seen.accepted(probe.kind))
                || (answers && probe.kind == ProbeKind::Neighbour)
            {
                out.vouched_for.insert(key);
                up += usize::from(takes);
            } else if answers {
                out.liveness.insert(key, Liveness::Failing);
            } else {
                silent.push((key, failure, seen));
            }
        }
        let panics = takers > 1 && up * 2 < takers;
        for (key, failure, seen) in silent {
            let is_young = now.saturating_duration_since(failure.since) < PANIC_TIME;
            let is_untried = seen.unanswered.is_none_or(|age| age < SILENCE);
            if panics && failure.has_passed && is_young && is_untried {
                out.panicking.insert((pool.middlebox, *pool.frontend));
            } else {
                out.liveness.insert(key, Liveness::Dead);
            }
        }
    }

    /// Notes the packets that were counted from a backend. They are counted in two places, one after
    /// the other, so only more than there have ever been are new.
    fn count_replies(
        &self,
        key: &SlotKey,
        seen: &Activity,
        now: Instant,
    ) -> (u64, Option<Instant>) {
        let count = seen.replies;
        match self.replies.get(key).copied() {
            None => (count, None),
            Some((most, _)) if count > most => (count, Some(now)),
            Some(known) => known,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::Policy;
    use nfqd_rules::slots::Unobserved;
    use std::cell::Cell;

    const POOL: &str = "R L 2:0:0:0:0:2 10.0.0.2:80 rr 10.0.0.3 10.0.0.4 10.0.0.5 10.0.0.6";

    struct Fixture {
        desired: Desired,
        health: Health,
        assessor: Assessor,
        start: Instant,
        probes: Vec<Probe>,
    }

    /// A pool whose backends have all passed a check.
    fn fixture(line: &str) -> Fixture {
        let mut policy = Policy::default();
        policy.apply_line(line).unwrap();
        let mut desired = Desired { policy, ..Desired::default() };
        let start = Instant::now();
        desired.slots.sync_all(&desired.policy, &Unobserved, start);
        let probes: Vec<Probe> = desired
            .policy
            .backends()
            .filter_map(|one| Probe::of(NetworkId::ANY, one.service, one.name, one.backend))
            .collect();
        let mut health = Health::default();
        health.track(&probes.iter().copied().collect(), start);
        for probe in &probes {
            health.record(*probe, true, start);
        }
        Fixture { desired, health, assessor: Assessor::default(), start, probes }
    }

    impl Fixture {
        fn fail(&mut self, backend: usize) {
            for _ in 0..3 {
                self.health.record(self.probes[backend], false, self.start);
            }
        }

        /// The liveness of all backends some seconds after the start.
        fn assess(&mut self, second: u64, seen: Activity) -> (Vec<Liveness>, bool) {
            let now = self.start + Duration::from_secs(second);
            let out = self.assessor.assess(&self.desired, &self.health, |_| Some(seen), now);
            let keys: Vec<SlotKey> = self
                .desired
                .slots
                .iter()
                .map(|(key, _)| key)
                .filter(|key| !key.is_local())
                .collect();
            (keys.iter().map(|key| out.liveness(key)).collect(), !out.panicking.is_empty())
        }
    }

    use Liveness::{Alive, Dead, Failing};

    #[test]
    fn answers_are_evidence_of_life() {
        let nothing = Activity::default();
        let answers = Activity { answered: Some(3), ..nothing };
        let accepts = Activity { accepted_tcp: Some(3), answered: Some(3), ..nothing };
        let by_udp = Activity { accepted_other: Some(3), answered: Some(3), ..nothing };
        let long_ago = Activity { accepted_tcp: Some(9), answered: Some(9), ..nothing };
        for (option, seen, expected) in [
            ("", nothing, Dead),
            ("", answers, Alive),
            (" check=tcp", answers, Failing),
            (" check=tcp", accepts, Alive),
            (" check=tcp", by_udp, Failing),
            (" check=udp", accepts, Failing),
            (" check=udp", by_udp, Alive),
            (" check=tcp", long_ago, Dead),
        ] {
            let mut fixture = fixture(&format!("{POOL}{option}"));
            fixture.fail(1);
            let found = fixture.assess(1, seen);
            assert_eq!(found, (vec![Alive, expected, Alive, Alive], false), "{option} {seen:?}");
        }
    }

    #[test]
    fn replies_that_only_the_kernel_has_seen_are_evidence() {
        let mut fixture = fixture(POOL);
        fixture.fail(1);
        let replies = Cell::new(100);
        let mut after = |second: u64, more: u64| {
            replies.set(replies.get() + more);
            fixture.assess(second, Activity { replies: replies.get(), ..Activity::default() }).0[1]
        };
        let found = [after(1, 0), after(2, 1), after(7, 0), after(8, 0), after(9, 5)];
        assert_eq!(found, [Dead, Alive, Alive, Dead, Alive]);
    }

    #[test]
    fn a_pool_whose_backends_fail_at_once_panics_for_a_while() {
        let mut fixture = fixture(POOL);
        fixture.fail(0);
        fixture.fail(1);
        let nothing = Activity::default();
        assert_eq!(fixture.assess(1, nothing), (vec![Dead, Dead, Alive, Alive], false));
        fixture.fail(2);
        assert_eq!(fixture.assess(1, nothing), (vec![Alive; 4], true));
        let unanswered = Activity { unanswered: Some(SILENCE), ..nothing };
        assert_eq!(fixture.assess(2, unanswered).0, [Dead, Dead, Dead, Alive]);
        assert_eq!(fixture.assess(10, nothing), (vec![Dead, Dead, Dead, Alive], false));
    }

    #[test]
    fn a_drain_ends() {
        let mut fixture = fixture(POOL);
        let first = |found: (Vec<Liveness>, bool)| found.0[0];
        let seen = Activity::default();
        fixture.desired.policy.apply_line("B 2:0:0:0:0:2 = 10.0.0.3 drain=7").unwrap();
        assert_eq!(first(fixture.assess(0, seen)), Alive);
        assert_eq!(first(fixture.assess(6, seen)), Alive);
        assert_eq!(first(fixture.assess(7, seen)), Liveness::Drained);
        // Another time begins anew, and so does a new drain.
        fixture.desired.policy.apply_line("B 2:0:0:0:0:2 = 10.0.0.3 drain=9").unwrap();
        assert_eq!(first(fixture.assess(8, seen)), Alive);
        fixture.desired.policy.apply_line("B 2:0:0:0:0:2 = 10.0.0.3 up").unwrap();
        assert_eq!(first(fixture.assess(17, seen)), Alive);
        fixture.desired.policy.apply_line("B 2:0:0:0:0:2 = 10.0.0.3 drain=0").unwrap();
        assert_eq!(first(fixture.assess(18, seen)), Liveness::Drained);
        // The same command again, before anybody has looked, begins anew as well.
        fixture.desired.policy.apply_line("B 2:0:0:0:0:2 = 10.0.0.3 drain=7").unwrap();
        assert_eq!(first(fixture.assess(20, seen)), Alive);
        let middlebox = *fixture.desired.policy.middleboxes().keys().next().unwrap();
        let name = BackendName { ip: std::net::IpAddr::from([10, 0, 0, 3]), port: None };
        fixture.assessor.restart_drains(middlebox, &[name]);
        assert_eq!(first(fixture.assess(28, seen)), Alive);
        assert_eq!(first(fixture.assess(35, seen)), Liveness::Drained);
    }
}
