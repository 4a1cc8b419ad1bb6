//! The flow table: the flows that the engine has sent to backends. The kernel's maps are a cache of
//! it.
//!
//! All workers share it. It is divided into shards, each behind a lock; both directions of a flow
//! are in one shard. All memory is allocated at the start, and no operation depends on the number
//! of flows: there are two hash tables with chains, one for each direction, and for each state a
//! list in the order of the last packets (for UDP, one for timeouts of the same magnitude). So the oldest flow is always at hand, to be expired, or
//! to be evicted from a full shard: first of those that are not assured, of the state that has the
//! most of them; last of those that are. A flood of SYNs or of UDP evicts nothing but its own
//! flows.
//!
//! As in conntrack, a flow is *assured* if it is established, or a UDP stream. A connection is
//! established once its client has acknowledged what the backend has sent.

mod shard;
mod slot_counters;
#[cfg(test)]
mod tests;

use nfqd_rules::packet::Ports;
use nfqd_rules::{MiddleboxKey, NetworkId, SlotId};
use nfqd_shmctl::Protocol;
use shard::{Entry, NONE, Sender, Shard, TupleHashes};
pub use slot_counters::SlotAnswers;
use slot_counters::SlotCounters;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash};
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The original direction of a flow: packets from the client.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalTuple {
    /// The middlebox, to which the packets go.
    pub middlebox: MiddleboxKey,
    /// The client's address.
    pub client: IpAddr,
    /// The address that the client uses.
    pub frontend: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The ports, as in packets from the client; both 0 if there are none.
    pub ports: Ports,
}

/// The reply direction of a flow: packets from the backend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ReplyTuple {
    /// The network that the packets are on.
    pub network: NetworkId,
    /// The backend's address.
    pub backend: IpAddr,
    /// The client's address.
    pub client: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The ports, as in packets from the backend; both 0 if there are none.
    pub ports: Ports,
}

/// The state of a flow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FlowState {
    /// TCP: the backend has not answered, or the client has not acknowledged that.
    Opening,
    /// TCP: one side has ended the connection.
    Closing,
    /// Neither TCP nor UDP.
    Other,
    /// UDP.
    Datagram,
    /// UDP that was still active about a minute after its first packet.
    Stream,
    /// TCP: established.
    Established,
}

const STATES: [FlowState; 6] = [
    FlowState::Opening,
    FlowState::Closing,
    FlowState::Other,
    FlowState::Datagram,
    FlowState::Stream,
    FlowState::Established,
];

impl FlowState {
    /// Returns the seconds without a packet after which a flow expires, `udp` of UDP. RFC 5382, REQ-5:
    /// 2 h 4 min for established TCP, 4 min for opening and closing connections; RFC 5508, REQ-2: 60 s
    /// for ICMP, which the kernel does not cache.
    fn timeout(self, udp: u32) -> u32 {
        match self {
            FlowState::Established => 7440,
            FlowState::Opening | FlowState::Closing => 240,
            FlowState::Datagram | FlowState::Stream => udp,
            FlowState::Other => 60,
        }
    }

    /// Whether the flow counts as live.
    fn is_live(self) -> bool {
        self != FlowState::Closing
    }

    fn is_assured(self) -> bool {
        self >= FlowState::Stream
    }
}

/// The event that a packet is for its flow. Only packets that the kernel never handles alone change
/// a state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowEvent {
    /// A client's segment with SYN and without ACK.
    Syn,
    /// A client's segment with FIN.
    Fin,
    /// A segment with RST, of either side.
    Rst,
    /// Any other segment of a client.
    Segment {
        /// The acknowledgement number.
        acknowledgement: u32,
    },
    /// A client's packet of another protocol.
    Datagram,
    /// A backend's segment with SYN and ACK, with the number that the client must acknowledge.
    SynAck(u32),
    /// Any other packet of a backend.
    Reply,
}

impl FlowEvent {
    /// Whether the flow is closing after it.
    pub fn ends(self) -> bool {
        matches!(self, FlowEvent::Fin | FlowEvent::Rst)
    }
}

/// A flow that was found for a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlowMatch {
    /// The slot of the flow before the packet.
    pub slot: SlotId,
    /// The slot of the flow now; `None` if its backend has none any more.
    pub current: Option<SlotId>,
    /// The state after the packet.
    pub state: FlowState,
    /// Whether the flow has a reply direction: its backend does not own the frontend's address.
    pub has_reply: bool,
    /// Whether the kernel may be told of the flow now: the rate is limited.
    pub may_install: bool,
    /// Whether its backend has not sent anything before this packet.
    pub is_first_reply: bool,
    /// Whether the flow has ended, and the packet belongs to a new connection between the same two.
    pub is_new_connection: bool,
}

impl FlowMatch {
    /// Whether the flow had ended before an event that begins a new one.
    pub fn ended_before(&self, event: FlowEvent) -> bool {
        self.state == FlowState::Closing && event == FlowEvent::Syn
    }
}

/// Seconds before the kernel is told again of the same direction of a flow. Each time costs it an
/// insertion, which a sender of packets that change nothing must not be able to cause at will.
const REINSTALL_AFTER: u32 = 5;

/// Seconds without a packet after which a UDP flow expires, unless its service says otherwise (RFC 4787,
/// REQ-5).
pub const UDP_TIMEOUT: u32 = 300;

const SHARDS: usize = 64;

/// The flow table.
pub struct FlowTable {
    hash: RandomState,
    shards: Vec<Mutex<Shard>>,
    slots: SlotCounters,
    evicted: AtomicU64,
    evicted_established: AtomicU64,
}

/// The flows that were evicted because a shard was full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Evictions {
    /// All of them.
    pub total: u64,
    /// The established ones among them.
    pub established: u64,
}

/// Locks a mutex. Shards are consistent between any two statements, so that a panic of another
/// thread does no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FlowTable {
    /// A table for `capacity` flows, rounded up.
    pub fn new(capacity: usize) -> FlowTable {
        let capacity = capacity.div_ceil(SHARDS).max(1);
        FlowTable {
            hash: RandomState::new(),
            shards: (0..SHARDS).map(|_| Mutex::new(Shard::new(capacity))).collect(),
            slots: SlotCounters::new(),
            evicted: AtomicU64::new(0),
            evicted_established: AtomicU64::new(0),
        }
    }

    /// Locks the shard of a flow: both directions share the client, its port and the protocol.
    fn shard(&self, client: IpAddr, port: u16, protocol: Protocol) -> MutexGuard<'_, Shard> {
        let at = self.hash.hash_one((client, port, protocol)) as usize % SHARDS;
        lock(&self.shards[at])
    }

    fn shard_of(&self, tuple: &OriginalTuple) -> MutexGuard<'_, Shard> {
        self.shard(tuple.client, tuple.ports.source, tuple.protocol)
    }

    fn shard_of_reply(&self, tuple: &ReplyTuple) -> MutexGuard<'_, Shard> {
        self.shard(tuple.client, tuple.ports.destination, tuple.protocol)
    }

    fn hash(&self, tuple: impl Hash) -> u64 {
        self.hash.hash_one(tuple)
    }

    /// Finds the flow of a packet from a client, and records the packet. `current` returns the slot
    /// that now stands for a slot's backend, which the flow then has.
    pub fn record_original(
        &self,
        tuple: &OriginalTuple,
        event: FlowEvent,
        now: u32,
        current: impl Fn(SlotId) -> Option<SlotId>,
    ) -> Option<FlowMatch> {
        let mut guard = self.shard_of(tuple);
        let shard = &mut *guard;
        let at = shard.find_original(self.hash(tuple), tuple)?;
        let found = shard.record(at, Sender::Client, event, now, current, &self.slots);
        self.evict_excess_assured(shard);
        found
    }

    /// Finds the flow of a packet from a backend, and records the packet.
    pub fn record_reply(
        &self,
        tuple: &ReplyTuple,
        event: FlowEvent,
        now: u32,
        current: impl Fn(SlotId) -> Option<SlotId>,
    ) -> Option<FlowMatch> {
        let mut shard = self.shard_of_reply(tuple);
        let at = shard.find_reply(self.hash(tuple), tuple)?;
        let found = shard.record(at, Sender::Backend, event, now, current, &self.slots)?;
        if let Some(slot) = found.current {
            self.slots.record_reply(slot, (found.state, found.is_first_reply), event, now);
        }
        Some(found)
    }

    /// Leaves room for new flows: without it each would evict the one before it. Assured flows give
    /// way to other assured ones, the oldest first; a flood of packets cannot cause that.
    fn evict_excess_assured(&self, shard: &mut Shard) {
        if let Some((at, state)) = shard.excess_assured() {
            self.count_eviction(state);
            self.remove_at(shard, at);
        }
    }

    fn count_eviction(&self, state: FlowState) {
        self.evicted.fetch_add(1, Relaxed);
        self.evicted_established.fetch_add(u64::from(state == FlowState::Established), Relaxed);
    }

    /// Returns the slot of the flow that an ICMP error from the client's side is about. That is no
    /// packet of the flow.
    pub fn slot_of(&self, tuple: &OriginalTuple, now: u32) -> Option<SlotId> {
        let shard = self.shard_of(tuple);
        let at = shard.find_original(self.hash(tuple), tuple)?;
        shard.unexpired(at, now).map(|entry| entry.slot)
    }

    /// Returns the slot of the flow that an ICMP error from the backend's side is about.
    pub fn slot_of_reply(&self, tuple: &ReplyTuple, now: u32) -> Option<SlotId> {
        let shard = self.shard_of_reply(tuple);
        let at = shard.find_reply(self.hash(tuple), tuple)?;
        shard.unexpired(at, now).map(|entry| entry.slot)
    }

    /// Whether another live flow already has this reply tuple. A flow whose slot is no longer in use
    /// does not count, nor does a flow with the same original tuple through another middlebox,
    /// because the new flow replaces it.
    pub fn is_reply_taken(
        &self,
        reply: &ReplyTuple,
        original: &OriginalTuple,
        now: u32,
        is_in_use: impl Fn(SlotId) -> bool,
    ) -> bool {
        let shard = self.shard_of_reply(reply);
        let Some(at) = shard.find_reply(self.hash(reply), reply) else { return false };
        let entry = shard.unexpired(at, now).filter(|entry| entry.state.is_live());
        entry.is_some_and(|entry| {
            let here = OriginalTuple { middlebox: original.middlebox, ..entry.original };
            here != *original && is_in_use(entry.slot)
        })
    }

    /// Inserts a flow. A flow with the same original tuple is replaced, and one with the same reply
    /// tuple loses that; a full shard evicts another one. `udp_timeout` is in seconds.
    pub fn insert(
        &self,
        original: OriginalTuple,
        reply: Option<ReplyTuple>,
        slot: SlotId,
        (state, udp_timeout): (FlowState, u32),
        now: u32,
    ) {
        let hashes = TupleHashes {
            original: self.hash(original),
            reply: reply.map(|tuple| self.hash(tuple)),
        };
        let mut guard = self.shard_of(&original);
        let shard = &mut *guard;
        if let Some(at) = shard.find_original(hashes.original, &original) {
            self.remove_at(shard, at);
        }
        if let Some((hash, tuple)) = hashes.reply.zip(reply)
            && let Some(at) = shard.find_reply(hash, &tuple)
        {
            // That flow may still be in the kernel's cache. Its next packet here takes the replies
            // back.
            shard.detach_reply(at, hash);
        }
        if shard.len == shard.capacity
            && let Some((at, state)) = shard.eviction_candidate(now)
        {
            if !shard.is_expired(at, now) {
                self.count_eviction(state);
            }
            self.remove_at(shard, at);
        }
        let entry = Entry {
            original,
            reply,
            slot,
            state,
            udp_timeout,
            created: now,
            last_seen: now,
            expected_ack: None,
            reset_by: None,
            reinstall_original_at: now.saturating_add(REINSTALL_AFTER),
            reinstall_reply_at: 0,
            next_original: NONE,
            next_reply: NONE,
            older: NONE,
            newer: NONE,
        };
        shard.insert(entry, hashes);
        self.slots.add(slot, state);
        if reply.is_some() && !matches!(state, FlowState::Closing | FlowState::Established) {
            self.slots.record_begin(slot, now);
        }
        self.evict_excess_assured(shard);
    }

    /// Copies the flows of a client's port to another table.
    pub fn copy_flows_of(&self, client: IpAddr, port: u16, protocol: Protocol, to: &FlowTable) {
        let shard = self.shard(client, port, protocol);
        let is_of = |entry: &&Entry| {
            let tuple = &entry.original;
            (tuple.client, tuple.ports.source, tuple.protocol) == (client, port, protocol)
        };
        for entry in shard.iter().filter(is_of) {
            let hashes = TupleHashes {
                original: to.hash(entry.original),
                reply: entry.reply.map(|tuple| to.hash(tuple)),
            };
            let mut its = to.shard_of(&entry.original);
            if its.len < its.capacity
                && its.find_original(hashes.original, &entry.original).is_none()
            {
                its.insert(entry.clone(), hashes);
            }
        }
    }

    /// Sets the number of live flows of a slot.
    pub fn set_live(&self, slot: SlotId, count: u32) {
        self.slots.set_live(slot, count);
    }

    /// Removes a flow.
    pub fn remove(&self, tuple: &OriginalTuple) {
        let mut guard = self.shard_of(tuple);
        if let Some(at) = guard.find_original(self.hash(tuple), tuple) {
            self.remove_at(&mut guard, at);
        }
    }

    /// Removes the reply direction of a flow that has ended: the backend's packets are of a new
    /// connection with the client, which is none of ours.
    pub fn detach_reply(&self, tuple: &ReplyTuple) {
        let mut guard = self.shard_of_reply(tuple);
        let hash = self.hash(tuple);
        if let Some(at) = guard.find_reply(hash, tuple) {
            guard.detach_reply(at, hash);
        }
    }

    /// Removes the flow of a reply.
    pub fn remove_reply(&self, tuple: &ReplyTuple) {
        let mut guard = self.shard_of_reply(tuple);
        if let Some(at) = guard.find_reply(self.hash(tuple), tuple) {
            self.remove_at(&mut guard, at);
        }
    }

    fn remove_at(&self, shard: &mut Shard, at: u32) {
        let entry = &shard.entries[at as usize];
        let hashes = TupleHashes {
            original: self.hash(entry.original),
            reply: entry.reply.map(|tuple| self.hash(tuple)),
        };
        self.slots.subtract(entry.slot, entry.state);
        shard.remove(at, hashes);
    }

    /// Removes all expired flows, so that they are no longer counted.
    pub fn expire(&self, now: u32) {
        for shard in &self.shards {
            let mut guard = lock(shard);
            for state in STATES {
                while let Some(at) = guard.oldest_expired(state, now) {
                    self.remove_at(&mut guard, at);
                }
            }
        }
    }

    /// Returns the number of live flows of a slot.
    pub fn live(&self, slot: SlotId) -> u32 {
        self.slots.live(slot)
    }

    /// Records an ICMP error of a slot's backend about one of its flows.
    pub fn record_refusal(&self, slot: SlotId) {
        self.slots.record_refusal(slot);
    }

    /// Returns the answers of a slot's backend.
    pub fn answers(&self, slot: SlotId) -> SlotAnswers {
        self.slots.answers(slot)
    }

    /// Returns the number of flows, those included that have expired and are not removed yet.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len).sum()
    }

    /// Whether there are no flows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the largest number of flows.
    pub fn capacity(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).capacity).sum()
    }

    /// Returns how many flows were evicted.
    pub fn evictions(&self) -> Evictions {
        Evictions {
            total: self.evicted.load(Relaxed),
            established: self.evicted_established.load(Relaxed),
        }
    }
}
