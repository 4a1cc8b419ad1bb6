//! Backend pools: which backend a new flow is assigned to.

use crate::ids::SlotId;
use crate::limits::MAX_BACKENDS;
use crate::maglev;
use crate::network::MiddleboxKey;
use crate::packet::IpHeader;
use crate::policy::Middlebox;
use crate::service::Service;
use crate::slots::{Liveness, SlotKey, Slots};
use imbl::OrdMap;
use nfqd_shmctl::{BackendName, Frontend, MAX_WEIGHT, Method};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A backend that accepts new flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    /// The name.
    pub name: BackendName,
    /// The share of new flows, relative to the others.
    pub weight: u16,
    /// The slot.
    pub slot: SlotId,
}

/// A subset of the members of a pool, by index.
#[derive(Clone, Copy)]
struct Subset([u64; MAX_BACKENDS.div_ceil(64)]);

impl Subset {
    const ALL: Subset = Subset([u64::MAX; MAX_BACKENDS.div_ceil(64)]);
    const NONE: Subset = Subset([0; MAX_BACKENDS.div_ceil(64)]);

    fn insert(&mut self, at: usize) {
        self.0.get_mut(at / 64).into_iter().for_each(|bits| *bits |= 1 << (at % 64));
    }

    fn is_empty(self) -> bool {
        self.0.iter().all(|bits| *bits == 0)
    }

    fn of(members: &[Member], belongs: impl Fn(&Member) -> bool) -> Subset {
        let mut out = Subset([0; MAX_BACKENDS.div_ceil(64)]);
        for (members, bits) in members.chunks(64).zip(&mut out.0) {
            let belong = members.iter().enumerate().filter(|(_, member)| belongs(member));
            *bits = belong.fold(0, |bits, (at, _)| bits | 1 << at);
        }
        out
    }

    fn contains(self, at: usize) -> bool {
        self.0.get(at / 64).is_some_and(|bits| bits >> (at % 64) & 1 != 0)
    }
}

/// The pool of a service, and the state of its balancing method.
#[derive(Debug)]
pub struct Pool {
    method: Method,
    seed: u32,
    affinity: bool,
    members: Vec<Member>,
    /// The table of consistent hashing, made when the first flow needs it.
    table: Arc<OnceLock<Vec<u8>>>,
    /// The credit of each member, for smooth weighted round robin.
    credits: Mutex<Vec<i64>>,
    /// The index at which the search for the least loaded member begins, so that equals take turns.
    start: AtomicUsize,
    /// The slow start of each member, for the method least.
    slow_starts: Vec<SlowStart>,
}

/// The slow start of a member that has joined others: without it, a member with no flows would get all
/// new ones until it has as many as the others. It ends when it has.
#[derive(Debug, Default)]
struct SlowStart {
    is_active: AtomicBool,
    /// The new flows of the pool that count for its next turn.
    credit: AtomicU64,
}

/// The most of its share of new flows that a member gets during its slow start.
const SLOW_START_SHARE: u64 = 2;

impl SlowStart {
    fn new(is_active: bool) -> SlowStart {
        SlowStart { is_active: AtomicBool::new(is_active), credit: AtomicU64::new(0) }
    }

    fn is_active(&self) -> bool {
        self.is_active.load(Relaxed)
    }
}

impl Pool {
    /// The pool of a service: the backends that accept new flows.
    pub fn new(service: &Service, members: Vec<Member>) -> Pool {
        let options = service.options();
        Pool {
            method: service.method(),
            seed: options.seed,
            affinity: options.affinity.is_some(),
            credits: Mutex::new(vec![0; members.len()]),
            members,
            table: Arc::default(),
            start: AtomicUsize::new(0),
            slow_starts: Vec::new(),
        }
    }

    /// Returns a pool of its own with the same state.
    fn copy(&self) -> Pool {
        let credits = self.credits.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let slow_start = |start: &SlowStart| SlowStart {
            is_active: AtomicBool::new(start.is_active()),
            credit: AtomicU64::new(start.credit.load(Relaxed)),
        };
        Pool {
            method: self.method,
            seed: self.seed,
            affinity: self.affinity,
            members: self.members.clone(),
            table: Arc::clone(&self.table),
            credits: Mutex::new(credits),
            start: AtomicUsize::new(self.start.load(Relaxed)),
            slow_starts: self.slow_starts.iter().map(slow_start).collect(),
        }
    }

    /// Begins the slow start of members that another pool, which this one replaces, did not have.
    fn slow_down_new(&mut self, before: Option<&Pool>) {
        let Some(before) = before.filter(|before| !before.members.is_empty()) else { return };
        let is_slow = |member: &Member| {
            let at = before.members.iter().position(|old| old.slot == member.slot);
            at.is_none_or(|at| before.slow_starts.get(at).is_some_and(SlowStart::is_active))
        };
        if self.method == Method::Least && self.members.iter().any(is_slow) {
            self.slow_starts = self.members.iter().map(is_slow).map(SlowStart::new).collect();
        }
    }

    /// Returns the members that must skip the next flow because of their slow start. Each skips enough
    /// flows to get at most [`SLOW_START_SHARE`] times its share of them.
    fn slow_members(&self, live: &impl Fn(SlotId) -> u32) -> Subset {
        if !self.slow_starts.iter().any(SlowStart::is_active) {
            return Subset::NONE;
        }
        let load = |member: &Member| {
            u64::from(live(member.slot)) * u64::from(MAX_WEIGHT) / u64::from(member.weight)
        };
        let with_starts = || self.members.iter().zip(&self.slow_starts);
        let others = with_starts().filter(|(_, start)| !start.is_active());
        let lightest = others.map(|(member, _)| load(member)).min();
        let total: u64 = self.members.iter().map(|member| u64::from(member.weight)).sum();
        let mut out = Subset::NONE;
        for (at, (member, start)) in with_starts().enumerate().filter(|(_, (_, s))| s.is_active()) {
            if lightest.is_none_or(|lightest| load(member) >= lightest) {
                start.is_active.store(false, Relaxed);
                continue;
            }
            let gained = SLOW_START_SHARE * u64::from(member.weight);
            if start.credit.fetch_add(gained, Relaxed) + gained < total {
                out.insert(at);
            }
        }
        out
    }

    /// Returns the backends that accept new flows.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Chooses among the members for which `fits` is true. `live` returns the number of flows of a
    /// slot.
    pub fn choose(
        &self,
        ip: &IpHeader,
        live: impl Fn(SlotId) -> u32,
        fits: impl Fn(&Member) -> bool,
    ) -> Option<Member> {
        match self.method {
            Method::RoundRobin => self.next_turn(fits),
            Method::Least => self.least(live, fits),
            Method::Hash => self.hashed(ip, fits),
            Method::Static | Method::Source(_) => self.members.first().copied().filter(fits),
        }
    }

    /// Returns the member that `pick` takes among those that fit. Most often the best of all fits;
    /// if not, each member is tested once, so that a client whom nobody may serve costs no more
    /// than that.
    fn best(
        &self,
        pick: impl Fn(Subset) -> Option<usize>,
        fits: impl Fn(&Member) -> bool,
    ) -> Option<(usize, Subset)> {
        let best = pick(Subset::ALL)?;
        if self.members.get(best).is_some_and(&fits) {
            return Some((best, Subset::ALL));
        }
        let fitting = Subset::of(&self.members, fits);
        pick(fitting).map(|best| (best, fitting))
    }

    /// Smooth weighted round robin: each member's credit grows by its weight; the member with the most
    /// credit is chosen, and its credit is reduced by the total weight (nginx, ngx_http_upstream_get_peer). Members that do not fit are
    /// left out of the round.
    fn next_turn(&self, fits: impl Fn(&Member) -> bool) -> Option<Member> {
        let mut credits = self.credits.lock().unwrap_or_else(PoisonError::into_inner);
        let richest = |among: Subset| {
            let saved = self.members.iter().zip(credits.iter()).enumerate();
            saved
                .filter(|(at, _)| among.contains(*at))
                .map(|(at, (member, credit))| (at, credit + i64::from(member.weight)))
                // Of equals the first.
                .reduce(|best, other| if other.1 > best.1 { other } else { best })
                .map(|(at, _)| at)
        };
        let (best, round) = self.best(richest, fits)?;
        let mut paid = 0;
        for (at, (member, credit)) in self.members.iter().zip(credits.iter_mut()).enumerate() {
            if round.contains(at) {
                *credit += i64::from(member.weight);
                paid += i64::from(member.weight);
            }
        }
        credits.get_mut(best).into_iter().for_each(|credit| *credit -= paid);
        self.members.get(best).copied()
    }

    /// Least connections: the member with the fewest live flows for its weight, the new one
    /// counted.
    fn least(
        &self,
        live: impl Fn(SlotId) -> u32,
        fits: impl Fn(&Member) -> bool,
    ) -> Option<Member> {
        let len = self.members.len().max(1);
        let start = self.start.fetch_add(1, Relaxed) % len;
        let lighter = |a: &(usize, &Member, u64), b: &(usize, &Member, u64)| {
            (a.2 * u64::from(b.1.weight)).cmp(&(b.2 * u64::from(a.1.weight)))
        };
        let lightest = |among: Subset| {
            let from = |from: usize| self.members.iter().enumerate().skip(from);
            let all = from(start).chain(from(0).take(start)).filter(|(at, _)| among.contains(*at));
            let loads = all.map(|(at, member)| (at, member, u64::from(live(member.slot)) + 1));
            loads.min_by(lighter).map(|(at, ..)| at)
        };
        let slow = self.slow_members(&live);
        let is_ready = |member: &Member| {
            let at = self.members.iter().position(|other| other.slot == member.slot);
            fits(member) && !at.is_some_and(|at| slow.contains(at))
        };
        let found = if slow.is_empty() {
            self.best(lightest, &fits)
        } else {
            // If nobody else can serve the client, a slow start must not keep it waiting.
            self.best(lightest, is_ready).or_else(|| self.best(lightest, &fits))
        };
        let (best, _) = found?;
        if let Some(start) = self.slow_starts.get(best) {
            start.credit.store(0, Relaxed);
        }
        self.members.get(best).copied()
    }

    /// Consistent hashing: by the table; if that leads to a member that does not fit, on from there
    /// by a second hash's step.
    fn hashed(&self, ip: &IpHeader, fits: impl Fn(&Member) -> bool) -> Option<Member> {
        const TRIES: usize = 32;
        let table = self.table();
        let hash = maglev::flow(self.seed, self.affinity, ip);
        let (first, step) =
            (hash as usize % maglev::PLACES, 1 + (hash >> 32) as usize % (maglev::PLACES - 1));
        let member = |place: usize| self.members.get(usize::from(*table.get(place)?)).copied();
        let tried = (0..TRIES)
            .find_map(|turn| member((first + turn * step) % maglev::PLACES).filter(&fits));
        tried.or_else(|| self.members.iter().find(|member| fits(member)).copied())
    }

    fn table(&self) -> &[u8] {
        self.table.get_or_init(|| {
            let backends: Vec<(BackendName, u16)> =
                self.members.iter().map(|member| (member.name, member.weight)).collect();
            maglev::table(self.seed, &backends)
        })
    }

    /// Makes the table of consistent hashing, which costs more than a packet should pay.
    pub fn prepare(&self) {
        if self.method == Method::Hash {
            self.table();
        }
    }

    /// Whether both have the same table of consistent hashing, whatever the numbers of their slots.
    fn hashes_like(&self, other: &Pool) -> bool {
        let names = |pool: &Pool| -> Vec<(BackendName, u16)> {
            pool.members.iter().map(|member| (member.name, member.weight)).collect()
        };
        self.seed == other.seed && names(self) == names(other)
    }

    fn chooses_like(&self, other: &Pool) -> bool {
        self.method == other.method
            && self.seed == other.seed
            && self.affinity == other.affinity
            && self.members == other.members
    }
}

/// The pools of all middleboxes. A clone is cheap.
#[derive(Clone, Debug, Default)]
pub struct Pools {
    middleboxes: OrdMap<MiddleboxKey, Arc<BTreeMap<Frontend, Arc<Pool>>>>,
}

impl Pools {
    /// Returns the pool of a service.
    pub fn get(&self, middlebox: MiddleboxKey, frontend: &Frontend) -> Option<&Pool> {
        self.middleboxes.get(&middlebox)?.get(frontend).map(Arc::as_ref)
    }

    /// Rebuilds the pools of one middlebox from its services. An unchanged pool keeps its state.
    pub fn update(&mut self, key: MiddleboxKey, middlebox: Option<&Middlebox>, slots: &Slots) {
        let Some(middlebox) = middlebox.filter(|middlebox| !middlebox.services().is_empty()) else {
            self.middleboxes.remove(&key);
            return;
        };
        let before = self.middleboxes.get(&key).cloned();
        let pool = |(frontend, service): (&Frontend, &Service)| {
            let member = |(name, backend): (&BackendName, &crate::service::Backend)| {
                let slot =
                    slots.get(&SlotKey { middlebox: key, frontend: *frontend, backend: *name })?;
                let usable = slot.mac.is_some()
                    && slot.liveness == Liveness::Alive
                    && backend.drain.is_none();
                usable.then_some(Member { name: *name, weight: backend.weight, slot: slot.id })
            };
            let mut new =
                Pool::new(service, service.backends().iter().filter_map(member).collect());
            let old = before.as_ref().and_then(|before| before.get(frontend));
            new.slow_down_new(old.map(Arc::as_ref));
            if let Some(old) = old.filter(|old| old.hashes_like(&new)) {
                new.table = Arc::clone(&old.table);
            }
            (
                *frontend,
                old.filter(|old| old.chooses_like(&new)).cloned().unwrap_or_else(|| Arc::new(new)),
            )
        };
        let pools = middlebox.services().iter().map(pool).collect();
        self.middleboxes.insert(key, Arc::new(pools));
    }

    /// Gives a middlebox pools of its own with the same state, so that choosing there changes nothing
    /// elsewhere.
    pub fn detach(&mut self, middlebox: MiddleboxKey) {
        if let Some(pools) = self.middleboxes.get(&middlebox) {
            let copy =
                |(frontend, pool): (&Frontend, &Arc<Pool>)| (*frontend, Arc::new(pool.copy()));
            let copies = pools.iter().map(copy).collect();
            self.middleboxes.insert(middlebox, Arc::new(copies));
        }
    }

    /// Makes the tables that packets of this middlebox would have to wait for.
    pub fn prepare(&self, key: MiddleboxKey) {
        self.middleboxes
            .get(&key)
            .into_iter()
            .flat_map(|pools| pools.values())
            .for_each(|pool| pool.prepare());
    }
}

/// Whether a backend can answer this client: a backend that is itself the client cannot.
pub fn can_serve(member: &Member, client: IpAddr) -> bool {
    member.name.ip != client
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Packet;
    use etherparse::PacketBuilder;
    use nfqd_shmctl::Command;
    use std::cell::Cell;

    fn id(number: u32) -> SlotId {
        SlotId::new(number).unwrap()
    }

    fn service(line: &str) -> Service {
        let Ok(Command::RegisterService { frontend, spec, .. }) = Command::parse(line) else {
            panic!("{line}")
        };
        Service::new(frontend, &spec)
    }

    fn pool(line: &str) -> Pool {
        let service = service(line);
        let member = |(at, (name, backend)): (usize, (&BackendName, &crate::service::Backend))| {
            Member { name: *name, weight: backend.weight, slot: id(at as u32 + 1) }
        };
        let members = service.backends().iter().enumerate().map(member).collect();
        Pool::new(&service, members)
    }

    fn packet(port: u16) -> IpHeader {
        let mut out = Vec::new();
        PacketBuilder::ethernet2([2; 6], [4; 6])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 9], 9)
            .udp(port, 53)
            .write(&mut out, b"x")
            .unwrap();
        Packet::from_frame(&out).unwrap().ip.unwrap()
    }

    #[test]
    fn round_robin_is_smooth_and_weighted() {
        let pool = pool("R L 2:0:0:0:0:1 10.0.0.9 rr 10.0.0.2*3 10.0.0.3 10.0.0.4");
        let turns: Vec<u32> =
            (0..10).map(|_| pool.choose(&packet(1), |_| 0, |_| true).unwrap().slot.get()).collect();
        assert_eq!(turns, [1, 2, 1, 3, 1, 1, 2, 1, 3, 1]);
        let without: Vec<u32> = (0..4)
            .map(|_| {
                pool.choose(&packet(1), |_| 0, |member| member.slot != id(1)).unwrap().slot.get()
            })
            .collect();
        assert_eq!(without.iter().filter(|slot| **slot == 2).count(), 2);
        assert!(pool.choose(&packet(1), |_| 0, |_| false).is_none());
    }

    /// Counted, not timed: if nobody may be chosen, each member is tested once or twice, however
    /// many there are.
    #[test]
    fn a_client_that_nobody_may_serve_is_not_expensive() {
        let name = |n: u8| BackendName { ip: IpAddr::from([10, 0, 1, n]), port: None };
        let members: Vec<Member> = (0..255)
            .map(|n| Member { name: name(n), weight: 1, slot: id(u32::from(n) + 1) })
            .collect();
        for method in ["rr", "least", "hash"] {
            let service = service(&format!("R L 2:0:0:0:0:1 10.0.0.9 {method} 10.0.1.0"));
            let pool = Pool::new(&service, members.clone());
            let (asked, counted) = (Cell::new(0), Cell::new(0));
            let count = |cell: &Cell<u32>| cell.set(cell.get() + 1);
            let live = |_| {
                count(&counted);
                0
            };
            let nobody = |_: &Member| {
                count(&asked);
                false
            };
            assert_eq!(pool.choose(&packet(1), live, nobody), None);
            assert!(
                asked.get() <= 2 * 255 && counted.get() <= 2 * 255,
                "{method}: {asked:?} {counted:?}"
            );
            // The last remaining member is found.
            let last = pool.members()[254];
            assert_eq!(
                pool.choose(&packet(1), |_| 0, |member| *member == last),
                Some(last),
                "{method}"
            );
        }
    }

    #[test]
    fn the_least_loaded_is_chosen_and_equals_take_turns() {
        let pool = pool("R L 2:0:0:0:0:1 10.0.0.9 least 10.0.0.2*2 10.0.0.3 10.0.0.4");
        let live = |slot: SlotId| [0, 9, 4, 5][slot.get() as usize];
        // 10/2, 5/1, 6/1: the first two are equal.
        let chosen: Vec<u32> =
            (0..6).map(|_| pool.choose(&packet(1), live, |_| true).unwrap().slot.get()).collect();
        assert!(chosen.contains(&1) && chosen.contains(&2) && !chosen.contains(&3), "{chosen:?}");
    }

    /// A member that joins others with many flows gets at most twice its share until it has as many.
    #[test]
    fn a_member_that_joins_starts_slowly() {
        let line = "R L 2:0:0:0:0:1 10.0.0.9 least 10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5";
        let mut pool = pool(line);
        let mut before = self::pool(line);
        before.members.truncate(3);
        pool.slow_down_new(Some(&before));
        let mut flows = [100_u32, 100, 100, 0];
        let mut choose = |pool: &Pool| {
            let live = |slot: SlotId| flows[slot.get() as usize - 1];
            let at = pool.choose(&packet(1), live, |_| true).unwrap().slot.get() as usize - 1;
            flows[at] += 1;
            at
        };
        let taken = (0..100).filter(|_| choose(&pool) == 3).count();
        assert_eq!(taken, 50, "twice a quarter");
        // The slow start goes on in a pool that replaces this one, and ends.
        let mut next = self::pool(line);
        next.slow_down_new(Some(&pool));
        let more = (0..100).filter(|_| choose(&next) == 3).count();
        assert_eq!(more, 50);
        for _ in 0..1000 {
            choose(&next);
        }
        assert!(!next.slow_starts.iter().any(SlowStart::is_active));
        // A client that only this member can serve does not wait.
        let mut alone = self::pool(line);
        alone.slow_down_new(Some(&before));
        let last = alone.members[3];
        for _ in 0..8 {
            let live = |slot: SlotId| if slot == last.slot { 0 } else { 100 };
            assert_eq!(alone.choose(&packet(1), live, |member| *member == last), Some(last));
        }
        // A pool that is the first of its service starts at once.
        let mut first = self::pool(line);
        first.slow_down_new(None);
        assert!(first.slow_starts.is_empty());
    }

    #[test]
    fn hashing_keeps_a_flow_and_skips_members_that_do_not_fit() {
        let pool = pool("R L 2:0:0:0:0:1 10.0.0.9 hash 10.0.0.2 10.0.0.3 10.0.0.4 seed=5");
        for port in 0..500 {
            let first = pool.choose(&packet(port), |_| 0, |_| true).unwrap();
            assert_eq!(pool.choose(&packet(port), |_| 0, |_| true), Some(first));
            let other = pool.choose(&packet(port), |_| 0, |member| *member != first).unwrap();
            assert_ne!(other, first);
        }
        let affine =
            self::pool("R L 2:0:0:0:0:1 10.0.0.9 hash 10.0.0.2 10.0.0.3 10.0.0.4 affinity");
        let chosen = |port: u16| affine.choose(&packet(port), |_| 0, |_| true);
        assert!((0..500).all(|port| chosen(port) == chosen(0)));
    }
}
