//! The flows that the engine has sent to backends. This table is the truth; the kernel's maps are a cache of it.
//!
//! It is shared by all workers and divided into shards, each behind a lock; a flow's two directions are in one shard. All
//! memory is there from the start, and what an operation costs does not depend on how many flows there are: two hash
//! tables of chains, one for each direction, and for each state a list in the order in which flows were seen last. So the
//! oldest is always at hand, to be forgotten in time or given up in a full shard: first of those that have proven nothing, of
//! which there are most; last those that are established. A flood of SYNs, or of UDP, pushes out nothing but its own.
//! Established is a connection whose client has acknowledged what its backend has said.

mod shard;

use super::bounded::Seconds;
use nfqd_rules::packet::Ports;
use nfqd_shmctl::{MacAddr, Protocol};
use shard::{Entry, Hashes, NONE, Sender, Shard};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The way there of a flow, as its packets show it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Forward {
    /// The middlebox, to which they go.
    pub middlebox: MacAddr,
    /// The client, which sends them.
    pub client: IpAddr,
    /// The address that the client uses.
    pub vip: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// Ports as in packets from the client; both 0 where there are none.
    pub ports: Ports,
}

/// The way back of a flow, as its packets show it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Backward {
    /// The backend, which sends them.
    pub backend: IpAddr,
    /// The client, to which they go.
    pub client: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// Ports as in packets from the backend; both 0 where there are none.
    pub ports: Ports,
}

/// Where a flow is in its life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum State {
    /// TCP: the client has spoken, and the backend not yet answered, or the client not yet answered that.
    Opening,
    /// TCP: one side has ended it.
    Closing,
    /// Neither TCP nor UDP.
    Other,
    /// UDP.
    Datagram,
    /// UDP that was there a minute later.
    Stream,
    /// TCP: both sides talk.
    Established,
}

const STATES: [State; 6] =
    [State::Opening, State::Closing, State::Other, State::Datagram, State::Stream, State::Established];

impl State {
    /// Seconds without a packet after which a flow is forgotten. RFC 5382, REQ-5: 2 h 4 min for established TCP, 4 min for
    /// what opens or closes; RFC 4787, REQ-5: 5 min for UDP; RFC 5508, REQ-2: 60 s for ICMP, which the kernel does not
    /// remember.
    fn timeout(self) -> Seconds {
        match self {
            State::Established => 7440,
            State::Opening | State::Closing => 240,
            State::Datagram | State::Stream => 300,
            State::Other => 60,
        }
    }

    /// Whether the flow counts as live.
    fn is_live(self) -> bool {
        self != State::Closing
    }
}

/// What a packet does to its flow. Only what the kernel never hides from the engine changes a state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A client's TCP packet with SYN alone.
    Opens,
    /// One with FIN.
    Closes,
    /// A TCP packet with RST, of either side.
    Resets,
    /// A client's TCP packet without them.
    GoesOn {
        /// Its acknowledgement number.
        acknowledges: u32,
    },
    /// A client's packet of another protocol.
    Datagram,
    /// A backend's TCP packet with SYN and ACK: what its client must acknowledge.
    Accepts(u32),
    /// A backend's packet that ends nothing.
    Answer,
}

impl Event {
    /// Whether it says that the flow ends.
    pub fn ends(self) -> bool {
        matches!(self, Event::Closes | Event::Resets)
    }
}

/// A flow that was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// Its slot, as it was found.
    pub slot: u32,
    /// The slot that it has now, if its backend still has one.
    pub current: Option<u32>,
    /// Its state behind the packet.
    pub state: State,
    /// Whether the kernel may be told of it: not again so soon.
    pub learn: bool,
    /// Whether it has ended and the packet begins another one between the same two.
    pub is_another: bool,
}

/// Seconds before the kernel is told again of the same direction of a flow: each time costs it an insertion, and who sends
/// packets that change nothing shall not have them.
const LEARN_AGAIN: Seconds = 5;

const SHARDS: usize = 64;

/// The table.
pub struct Flows {
    hash: RandomState,
    shards: Vec<Mutex<Shard>>,
    live: Live,
    evicted: AtomicU64,
    evicted_established: AtomicU64,
}

/// Live flows of each slot. Pieces come when they are needed.
struct Live {
    pieces: Vec<OnceLock<Box<[AtomicU32]>>>,
}

impl Live {
    const PIECE: usize = 1024;

    fn new() -> Live {
        let pieces = (nfqd_rules::mark::MAX_INDEX as usize + 1).div_ceil(Live::PIECE);
        Live { pieces: (0..pieces).map(|_| OnceLock::new()).collect() }
    }

    fn of(&self, slot: u32) -> Option<&AtomicU32> {
        let piece = self.pieces.get(slot as usize / Live::PIECE)?;
        let piece = piece.get_or_init(|| (0..Live::PIECE).map(|_| AtomicU32::new(0)).collect());
        piece.get(slot as usize % Live::PIECE)
    }

    fn count(&self, slot: u32, state: State, more: bool) {
        let counter = self.of(slot).filter(|_| state.is_live());
        if let Some(counter) = counter {
            if more {
                counter.fetch_add(1, Relaxed)
            } else {
                counter.fetch_sub(1, Relaxed)
            };
        }
    }
}

/// A shard is never left half changed, so that a panic elsewhere does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flows {
    /// A table for `capacity` flows, rounded up.
    pub fn new(capacity: usize) -> Flows {
        let capacity = capacity.div_ceil(SHARDS).max(1);
        Flows {
            hash: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::new(capacity))).collect(),
            live: Live::new(),
            evicted: AtomicU64::new(0),
            evicted_established: AtomicU64::new(0),
        }
    }

    /// Both directions have the client, its port and the protocol.
    fn shard(&self, client: IpAddr, port: u16, protocol: Protocol) -> MutexGuard<'_, Shard> {
        let at = self.hash.hash_one((client, port, protocol)) as usize % SHARDS;
        lock(&self.shards[at])
    }

    fn shard_of(&self, key: &Forward) -> MutexGuard<'_, Shard> {
        self.shard(key.client, key.ports.source, key.protocol)
    }

    fn hash(&self, key: impl Hash) -> u64 {
        self.hash.hash_one(key)
    }

    /// The flow of a packet from a client, which is seen by this. `current` says which slot stands for the backend of a
    /// slot now; the flow has that from then on.
    pub fn forward(
        &self,
        key: &Forward,
        event: Event,
        now: Seconds,
        current: impl Fn(u32) -> Option<u32>,
    ) -> Option<Found> {
        let mut guard = self.shard_of(key);
        let shard = &mut *guard;
        let at = shard.find_forward(self.hash(key), key)?;
        let found = shard.see(at, Sender::Client, event, now, current, &self.live);
        self.make_room(shard);
        found
    }

    /// Leaves room for flows that begin: without it each would push out the one before it. Those that have proven something
    /// give way to others that have, the oldest first; no flood of packets that prove nothing does this.
    fn make_room(&self, shard: &mut Shard) {
        if let Some((at, state)) = shard.too_many_proven() {
            self.evicted.fetch_add(1, Relaxed);
            self.evicted_established.fetch_add(u64::from(state == State::Established), Relaxed);
            self.take(shard, at);
        }
    }

    /// The flow of a packet from a backend.
    pub fn backward(
        &self,
        key: &Backward,
        event: Event,
        now: Seconds,
        current: impl Fn(u32) -> Option<u32>,
    ) -> Option<Found> {
        let mut shard = self.shard(key.client, key.ports.destination, key.protocol);
        let at = shard.find_backward(self.hash(key), key)?;
        shard.see(at, Sender::Backend, event, now, current, &self.live)
    }

    /// The slot of a flow that an ICMP error from the client's side is about; the flow is not seen by this.
    pub fn slot_of(&self, key: &Forward, now: Seconds) -> Option<u32> {
        let shard = self.shard_of(key);
        let at = shard.find_forward(self.hash(key), key)?;
        shard.alive(at, now).map(|entry| entry.slot)
    }

    /// The same for one from the backend's side.
    pub fn slot_of_backward(&self, key: &Backward, now: Seconds) -> Option<u32> {
        let shard = self.shard(key.client, key.ports.destination, key.protocol);
        let at = shard.find_backward(self.hash(key), key)?;
        shard.alive(at, now).map(|entry| entry.slot)
    }

    /// Whether packets from a backend would be taken for those of another flow: two cannot come back the same way.
    pub fn is_taken(&self, backward: &Backward, forward: &Forward, now: Seconds) -> bool {
        let shard = self.shard_of(forward);
        let at = shard.find_backward(self.hash(backward), backward);
        at.and_then(|at| shard.alive(at, now))
            .is_some_and(|entry| entry.forward != *forward && entry.state.is_live())
    }

    /// Whether packets from a backend are those of another middlebox' live flow.
    pub fn is_others(&self, backward: &Backward, forward: &Forward, now: Seconds) -> bool {
        let shard = self.shard_of(forward);
        let at = shard.find_backward(self.hash(backward), backward);
        at.and_then(|at| shard.alive(at, now))
            .is_some_and(|entry| entry.forward.middlebox != forward.middlebox && entry.state.is_live())
    }

    /// Remembers a flow. Flows of the same keys are replaced; a full shard gives up another.
    pub fn insert(
        &self,
        forward: Forward,
        backward: Option<Backward>,
        slot: u32,
        state: State,
        now: Seconds,
    ) {
        let hashes = Hashes { forward: self.hash(forward), backward: backward.map(|key| self.hash(key)) };
        let mut guard = self.shard_of(&forward);
        let shard = &mut *guard;
        if let Some(at) = shard.find_forward(hashes.forward, &forward) {
            self.take(shard, at);
        }
        if let Some((hash, key)) = hashes.backward.zip(backward)
            && let Some(at) = shard.find_backward(hash, &key)
        {
            self.take(shard, at);
        }
        if shard.len == shard.capacity
            && let Some((at, state)) = shard.victim(now)
        {
            if !shard.is_over(at, now) {
                self.evicted.fetch_add(1, Relaxed);
                if state == State::Established {
                    self.evicted_established.fetch_add(1, Relaxed);
                }
            }
            self.take(shard, at);
        }
        let entry = Entry {
            forward,
            backward,
            slot,
            state,
            born: now,
            seen: now,
            expects: None,
            reset_by: None,
            learn_forward: now.saturating_add(LEARN_AGAIN),
            learn_backward: 0,
            next_forward: NONE,
            next_backward: NONE,
            older: NONE,
            newer: NONE,
        };
        shard.put(entry, hashes);
        self.live.count(slot, state, true);
        self.make_room(shard);
    }

    /// Forgets a flow.
    pub fn remove(&self, key: &Forward) {
        let mut guard = self.shard_of(key);
        if let Some(at) = guard.find_forward(self.hash(key), key) {
            self.take(&mut guard, at);
        }
    }

    /// Forgets a flow by its way back.
    pub fn remove_backward(&self, key: &Backward) {
        let mut guard = self.shard(key.client, key.ports.destination, key.protocol);
        if let Some(at) = guard.find_backward(self.hash(key), key) {
            self.take(&mut guard, at);
        }
    }

    fn take(&self, shard: &mut Shard, at: u32) {
        let entry = &shard.entries[at as usize];
        let hashes =
            Hashes { forward: self.hash(entry.forward), backward: entry.backward.map(|key| self.hash(key)) };
        self.live.count(entry.slot, entry.state, false);
        shard.take(at, hashes);
    }

    /// Forgets what has not been seen for too long, so that it is counted no more.
    pub fn expire(&self, now: Seconds) {
        for shard in &self.shards {
            let mut guard = lock(shard);
            for state in STATES {
                while let Some(at) = guard.over(state, now) {
                    self.take(&mut guard, at);
                }
            }
        }
    }

    /// How many live flows a slot has.
    pub fn live(&self, slot: u32) -> u32 {
        self.live.of(slot).map_or(0, |counter| counter.load(Relaxed))
    }

    /// How many flows are remembered; those that are too old but not yet forgotten count.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many there may be.
    pub fn capacity(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).capacity).sum()
    }

    /// How many flows were given up for others because a shard was full; of these, established ones.
    pub fn evicted(&self) -> (u64, u64) {
        (self.evicted.load(Relaxed), self.evicted_established.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn forward(client: u32, protocol: Protocol) -> Forward {
        Forward {
            middlebox: MacAddr([2; 6]),
            client: IpAddr::from(client.to_be_bytes()),
            vip: IpAddr::from([10, 0, 0, 9]),
            protocol,
            ports: Ports { source: 1000, destination: 80 },
        }
    }

    fn backward(client: u32, protocol: Protocol) -> Backward {
        Backward {
            backend: IpAddr::from([10, 0, 0, 3]),
            client: IpAddr::from(client.to_be_bytes()),
            protocol,
            ports: Ports { source: 8080, destination: 1000 },
        }
    }

    const GOES_ON: Event = Event::GoesOn { acknowledges: 5 };

    fn insert(flows: &Flows, client: u32, protocol: Protocol, state: State, now: Seconds) {
        flows.insert(forward(client, protocol), Some(backward(client, protocol)), 7, state, now);
    }

    #[test]
    fn a_connection_lives_its_states() {
        let flows = Flows::new(100);
        let (there, back) = (forward(1, Protocol::TCP), backward(1, Protocol::TCP));
        insert(&flows, 1, Protocol::TCP, State::Opening, 0);
        let state =
            |event: Event, now: Seconds| flows.forward(&there, event, now, Some).map(|found| found.state);
        let back_at = |event: Event, now: Seconds| flows.backward(&back, event, now, Some).unwrap().state;
        assert_eq!(state(Event::Opens, 10), Some(State::Opening));
        assert_eq!(state(GOES_ON, 10), Some(State::Opening), "the backend has not answered");
        assert_eq!(back_at(Event::Accepts(6), 11), State::Opening);
        assert_eq!(state(GOES_ON, 11), Some(State::Opening), "not what the backend said");
        assert_eq!(back_at(Event::Accepts(5), 11), State::Opening);
        assert_eq!(state(GOES_ON, 12), Some(State::Established));
        assert_eq!((state(GOES_ON, 7000), flows.live(7)), (Some(State::Established), 1));
        assert_eq!((state(Event::Closes, 7001), flows.live(7)), (Some(State::Closing), 0));
        assert_eq!(state(GOES_ON, 7002), Some(State::Closing));
        assert_eq!((state(GOES_ON, 7242), flows.len()), (None, 1), "over, not yet forgotten");
        flows.expire(7242);
        assert_eq!(flows.len(), 0);
        // Half open for too long; reset by the backend.
        insert(&flows, 1, Protocol::TCP, State::Opening, 0);
        assert_eq!(state(GOES_ON, 240), None);
        insert(&flows, 1, Protocol::TCP, State::Established, 0);
        assert_eq!(back_at(Event::Resets, 1), State::Closing);
        assert_eq!(state(GOES_ON, 240), Some(State::Closing), "it lives as long as it is seen");
        assert_eq!(state(GOES_ON, 479), Some(State::Closing));
        // Who goes on has not sent the RST.
        assert_eq!((back_at(Event::Answer, 480), flows.live(7)), (State::Established, 1));
        assert_eq!((state(Event::Resets, 481), flows.live(7)), (Some(State::Closing), 0));
        assert_eq!(back_at(Event::Answer, 482), State::Closing);
        assert_eq!((state(GOES_ON, 483), flows.live(7)), (Some(State::Established), 1));
        assert_eq!(state(Event::Closes, 484), Some(State::Closing));
        assert_eq!(
            (state(GOES_ON, 485), back_at(Event::Answer, 485)),
            (Some(State::Closing), State::Closing)
        );
        assert_eq!(state(Event::Resets, 486), Some(State::Closing));
        assert_eq!(state(GOES_ON, 487), Some(State::Closing), "it was at its end before");
        // UDP that stays is a stream.
        insert(&flows, 2, Protocol::UDP, State::Datagram, 0);
        let udp = |now: Seconds| {
            flows.forward(&forward(2, Protocol::UDP), Event::Datagram, now, Some).unwrap().state
        };
        assert_eq!((udp(10), udp(60), udp(61)), (State::Datagram, State::Stream, State::Stream));
    }

    #[test]
    fn a_flood_pushes_out_nothing_but_its_own() {
        let flows = Flows::new(6400);
        for client in 0..2000 {
            insert(&flows, client, Protocol::TCP, State::Established, 0);
        }
        for client in 10_000..200_000 {
            insert(&flows, client, Protocol::TCP, State::Opening, 1);
            assert!(
                flows.forward(&forward(client, Protocol::TCP), Event::Opens, 1, Some).is_some(),
                "the newest"
            );
        }
        let kept =
            (0..2000).filter(|&client| flows.slot_of(&forward(client, Protocol::TCP), 2) == Some(7)).count();
        assert_eq!((kept, flows.evicted().1), (2000, 0));
        assert!(flows.len() <= flows.capacity() && flows.evicted().0 > 180_000);
        // Full of established flows it takes new ones all the same.
        for client in 10_000..30_000 {
            insert(&flows, client, Protocol::TCP, State::Established, 2);
        }
        assert!(flows.evicted().1 > 0 && flows.live(7) as usize == flows.len());
    }

    #[test]
    fn a_table_full_of_connections_has_room_for_those_that_open() {
        let flows = Flows::new(64_000);
        for client in 0..90_000 {
            insert(&flows, client, Protocol::TCP, State::Established, 0);
        }
        for client in 100_000..100_100 {
            insert(&flows, client, Protocol::TCP, State::Opening, 1);
        }
        let opening = (100_000..100_100).filter(|&n| flows.slot_of(&forward(n, Protocol::TCP), 1).is_some());
        assert_eq!(opening.count(), 100);
    }

    #[test]
    fn udp_does_not_push_out_those_that_open() {
        let flows = Flows::new(6400);
        for client in 0..20_000 {
            insert(&flows, client, Protocol::UDP, State::Datagram, 0);
            if client % 100 == 0 {
                insert(&flows, 100_000 + client, Protocol::TCP, State::Opening, 0);
            }
        }
        let opening = (0..20_000).step_by(100);
        let kept =
            opening.filter(|n| flows.slot_of(&forward(100_000 + n, Protocol::TCP), 1).is_some()).count();
        assert_eq!(kept, 200);
    }

    #[test]
    fn the_kernel_is_told_of_turns_and_otherwise_seldom() {
        let flows = Flows::new(100);
        insert(&flows, 1, Protocol::TCP, State::Opening, 0);
        let there = |event: Event, now: Seconds| {
            flows.forward(&forward(1, Protocol::TCP), event, now, Some).unwrap().learn
        };
        let back = |event: Event, now: Seconds| {
            flows.backward(&backward(1, Protocol::TCP), event, now, Some).unwrap().learn
        };
        assert!(back(Event::Accepts(5), 0) && !back(Event::Answer, 1));
        assert!(there(GOES_ON, 0), "it is established by this");
        assert!(!there(GOES_ON, 1) && !there(Event::Opens, 4) && there(GOES_ON, 5));
        assert!(there(Event::Closes, 6));
        assert!((7..11).all(|now| !there(Event::Closes, now)), "nor does who closes again and again");
    }

    #[test]
    fn a_flow_takes_the_slot_that_its_backend_has_now() {
        let flows = Flows::new(100);
        insert(&flows, 1, Protocol::TCP, State::Established, 0);
        let there = forward(1, Protocol::TCP);
        let found = flows.forward(&there, GOES_ON, 1, |slot| (slot == 7).then_some(9)).unwrap();
        assert_eq!((found.slot, found.current, flows.live(7), flows.live(9)), (7, Some(9), 0, 1));
        assert!(found.learn, "the kernel remembers another slot");
        assert!(flows.backward(&backward(1, Protocol::TCP), Event::Answer, 1, Some).unwrap().learn);
        let found = flows.forward(&there, GOES_ON, 1, |_| None).unwrap();
        assert_eq!((found.slot, found.current, flows.live(9)), (9, None, 1));
        // Without a slot it is left to its time: the number will be another's.
        let back = |now: Seconds| flows.backward(&backward(1, Protocol::TCP), Event::Answer, now, |_| None);
        assert!(back(7000).is_some() && back(7440).is_some());
        assert_eq!((back(7441), flows.forward(&there, GOES_ON, 7441, Some)), (None, None));
    }

    #[test]
    fn two_flows_cannot_come_back_the_same_way() {
        let flows = Flows::new(100);
        insert(&flows, 1, Protocol::TCP, State::Established, 0);
        let mut other = forward(1, Protocol::TCP);
        other.vip = IpAddr::from([10, 0, 0, 8]);
        let back = backward(1, Protocol::TCP);
        assert!(flows.is_taken(&back, &other, 1));
        assert!(!flows.is_taken(&back, &forward(1, Protocol::TCP), 1), "it is the same");
        assert!(!flows.is_taken(&backward(1, Protocol::UDP), &other, 1), "another protocol");
        flows.forward(&forward(1, Protocol::TCP), Event::Closes, 2, Some);
        assert!(!flows.is_taken(&back, &other, 3), "it is at its end");
        flows.insert(other, Some(back), 9, State::Opening, 3);
        assert_eq!((flows.slot_of_backward(&back, 3), flows.len()), (Some(9), 1));
        assert_eq!(flows.slot_of(&forward(1, Protocol::TCP), 3), None);
    }

    proptest! {
        /// Against a map: what is inserted is found by both keys until it is removed or over.
        #[test]
        fn the_table_is_a_map(steps in proptest::collection::vec((0..4_u8, 0..40_u32, 0..3_u32), 1..300)) {
            let flows = Flows::new(1 << 12);
            let mut model: BTreeMap<u32, (u32, Seconds)> = BTreeMap::new();
            let mut now = 0;
            for (step, client, pass) in steps {
                now += pass * 50;
                model.retain(|_, (_, seen)| *seen + State::Datagram.timeout() > now);
                let (there, back) = (forward(client, Protocol::UDP), backward(client, Protocol::UDP));
                match step {
                    0 => {
                        flows.insert(there, Some(back), client, State::Datagram, now);
                        model.insert(client, (client, now));
                    }
                    1 => {
                        let found = flows.forward(&there, Event::Datagram, now, Some).map(|found| found.slot);
                        prop_assert_eq!(found, model.get(&client).map(|(slot, _)| *slot));
                        model.entry(client).and_modify(|(_, seen)| *seen = now);
                    }
                    2 => {
                        prop_assert_eq!(flows.slot_of_backward(&back, now), model.get(&client).map(|(slot, _)| *slot));
                    }
                    _ => {
                        flows.remove(&there);
                        model.remove(&client);
                    }
                }
                flows.expire(now);
                prop_assert_eq!(flows.len(), model.len());
                let live: u32 = (0..40).map(|slot| flows.live(slot)).sum();
                prop_assert_eq!(live as usize, model.len());
            }
        }
    }
}
