//! A shard of the flow table: its entries, the chains of both hash tables, and a list for each
//! state.

use super::slot_counters::SlotCounters;
use super::{FlowEvent, FlowMatch, FlowState, OriginalTuple, REINSTALL_AFTER, ReplyTuple, STATES};
use nfqd_rules::SlotId;
use std::ops::Range;

/// The index of no entry.
pub(super) const NONE: u32 = u32::MAX;

/// Half of all sequence numbers are behind a given one (RFC 9293, 3.4).
const WINDOW: u32 = 1 << 31;

/// Seconds after which a UDP flow that is still active is a stream. RFC 4787 has no such state; it
/// is conntrack's, as far as the engine sees the packets.
const STREAM_AFTER: u32 = 50;

#[derive(Clone)]
pub(super) struct Entry {
    pub original: OriginalTuple,
    /// `None` if backends answer clients directly.
    pub reply: Option<ReplyTuple>,
    pub slot: SlotId,
    pub state: FlowState,
    /// The timeout in the states of UDP, in seconds.
    pub udp_timeout: u32,
    pub created: u32,
    pub last_seen: u32,
    /// The number that the client must acknowledge; `None` before the backend has answered.
    pub expected_ack: Option<ExpectedAck>,
    /// The side that has reset the connection when it was established.
    pub reset_by: Option<Sender>,
    /// The earliest time at which the kernel is told of the original direction.
    pub reinstall_original_at: u32,
    /// The earliest time at which the kernel is told of the reply direction.
    pub reinstall_reply_at: u32,
    /// The next entry in the chain of each hash table.
    pub next_original: u32,
    pub next_reply: u32,
    /// The neighbours in the list of the state.
    pub older: u32,
    pub newer: u32,
}

/// The sender of a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    Client,
    Backend,
}

/// The acknowledgement that shows that a client has received the backend's answer.
#[derive(Clone, Copy)]
pub(super) enum ExpectedAck {
    /// A number that only the backend has sent.
    Number(u32),
    /// Any: the beginning of the connection was not seen.
    Any,
}

impl Entry {
    /// Whether an acknowledgement shows that the client has received the backend's answer.
    fn is_answer_acknowledged(&self, acknowledgement: u32) -> bool {
        match self.expected_ack {
            Some(ExpectedAck::Number(number)) => acknowledgement.wrapping_sub(number) < WINDOW,
            Some(ExpectedAck::Any) => true,
            // If backends answer clients directly, their answers are not seen.
            None => self.reply.is_none(),
        }
    }

    /// Returns the state after an event.
    fn next_state(&self, sender: Sender, event: FlowEvent, now: u32) -> FlowState {
        match (self.state, event) {
            (FlowState::Opening | FlowState::Established, event) if event.ends() => {
                FlowState::Closing
            }
            // Sequence numbers are not tracked, so anybody can forge a RST; but a side that has
            // really reset the connection sends nothing more on it.
            (FlowState::Closing, FlowEvent::Segment { .. } | FlowEvent::Reply)
                if self.reset_by == Some(sender) =>
            {
                FlowState::Established
            }
            (FlowState::Opening, FlowEvent::Segment { acknowledgement })
                if self.is_answer_acknowledged(acknowledgement) =>
            {
                FlowState::Established
            }
            (FlowState::Datagram, _) if now >= self.created.saturating_add(STREAM_AFTER) => {
                FlowState::Stream
            }
            (state, _) => state,
        }
    }
}

/// Timeouts of UDP flows in one list differ by a factor below two: by the binary digits of the timeout.
const UDP_LISTS: usize = u32::BITS as usize;

const LISTS: usize = STATES.len() + 2 * UDP_LISTS;

impl Entry {
    /// Returns the list that the entry is in.
    fn list(&self) -> usize {
        let magnitude = self.udp_timeout.checked_ilog2().unwrap_or(0) as usize;
        lists_of(self.state).start
            + if matches!(self.state, FlowState::Datagram | FlowState::Stream) {
                magnitude
            } else {
                0
            }
    }
}

/// Returns the lists of a state.
fn lists_of(state: FlowState) -> Range<usize> {
    let (datagrams, streams) = (STATES.len(), STATES.len() + UDP_LISTS);
    match state {
        FlowState::Datagram => datagrams..streams,
        FlowState::Stream => streams..LISTS,
        other => other as usize..other as usize + 1,
    }
}

/// The ends of a list.
#[derive(Clone, Copy)]
struct List {
    oldest: u32,
    newest: u32,
    len: usize,
}

pub(super) struct Shard {
    pub capacity: usize,
    pub entries: Vec<Entry>,
    /// The first free entry; the others are chained by `next_original`.
    free: u32,
    /// The first entry of each chain, plus one: memory that is zero costs nothing until it is used.
    originals: Vec<u32>,
    replies: Vec<u32>,
    lists: [List; LISTS],
    pub len: usize,
}

/// The hashes of the two tuples of a flow.
#[derive(Clone, Copy)]
pub(super) struct TupleHashes {
    pub original: u64,
    pub reply: Option<u64>,
}

impl Shard {
    pub(super) fn new(capacity: usize) -> Shard {
        let heads = capacity.next_power_of_two();
        Shard {
            capacity,
            entries: Vec::with_capacity(capacity),
            free: NONE,
            originals: vec![0; heads],
            replies: vec![0; heads],
            lists: [List { oldest: NONE, newest: NONE, len: 0 }; LISTS],
            len: 0,
        }
    }

    /// Returns the chain of a hash: its low bits. The shard was chosen by another hash.
    fn chain(heads: &[u32], hash: u64) -> usize {
        hash as usize & (heads.len() - 1)
    }

    pub(super) fn find_original(&self, hash: u64, tuple: &OriginalTuple) -> Option<u32> {
        let mut at = self.originals[Shard::chain(&self.originals, hash)].wrapping_sub(1);
        while at != NONE {
            let entry = &self.entries[at as usize];
            if entry.original == *tuple {
                return Some(at);
            }
            at = entry.next_original;
        }
        None
    }

    pub(super) fn find_reply(&self, hash: u64, tuple: &ReplyTuple) -> Option<u32> {
        let mut at = self.replies[Shard::chain(&self.replies, hash)].wrapping_sub(1);
        while at != NONE {
            let entry = &self.entries[at as usize];
            if entry.reply.as_ref() == Some(tuple) {
                return Some(at);
            }
            at = entry.next_reply;
        }
        None
    }

    /// Returns all flows.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.lists.iter().flat_map(|list| {
            std::iter::successors(self.entries.get(list.oldest as usize), |entry| {
                self.entries.get(entry.newer as usize)
            })
        })
    }

    pub(super) fn is_expired(&self, at: u32, now: u32) -> bool {
        let entry = &self.entries[at as usize];
        entry.last_seen.saturating_add(entry.state.timeout(entry.udp_timeout)) <= now
    }

    pub(super) fn unexpired(&self, at: u32, now: u32) -> Option<&Entry> {
        (!self.is_expired(at, now)).then(|| &self.entries[at as usize])
    }

    /// Returns a flow in a state that has expired, the oldest of its list.
    pub(super) fn oldest_expired(&self, state: FlowState, now: u32) -> Option<u32> {
        let oldest = self.lists[lists_of(state)].iter().map(|list| list.oldest);
        oldest.into_iter().find(|oldest| *oldest != NONE && self.is_expired(*oldest, now))
    }

    /// Returns the number of flows in a state.
    fn count(&self, state: FlowState) -> usize {
        self.lists[lists_of(state)].iter().map(|list| list.len).sum()
    }

    /// Returns the oldest flow of the longest list of a state.
    fn oldest(&self, state: FlowState) -> Option<u32> {
        let longest = self.lists[lists_of(state)].iter().max_by_key(|list| list.len)?;
        (longest.oldest != NONE).then_some(longest.oldest)
    }

    /// Returns the flow to evict: an expired one; or the oldest that is not assured, of the state
    /// that has the most of them, so that a flood of one kind evicts its own; or the oldest of the
    /// rest.
    pub(super) fn eviction_candidate(&self, now: u32) -> Option<(u32, FlowState)> {
        let is_used = |state: &FlowState| self.count(*state) != 0;
        for state in STATES {
            if let Some(at) = self.oldest_expired(state, now) {
                return Some((at, state));
            }
        }
        let unassured = STATES.into_iter().filter(|state| !state.is_assured() && is_used(state));
        let most = unassured.max_by_key(|state| self.count(*state));
        let assured = || STATES.into_iter().find(|state| state.is_assured() && is_used(state));
        let state = most.or_else(assured)?;
        Some((self.oldest(state)?, state))
    }

    /// Returns the oldest assured flow, if the assured ones leave less than a sixteenth of the room
    /// to others.
    pub(super) fn excess_assured(&self) -> Option<(u32, FlowState)> {
        let states = [FlowState::Stream, FlowState::Established];
        let assured: usize = states.iter().map(|state| self.count(*state)).sum();
        let most = self.capacity - self.capacity / 16;
        if assured <= most {
            return None;
        }
        let state = states.into_iter().max_by_key(|state| self.count(*state))?;
        Some((self.oldest(state)?, state))
    }

    /// Records a packet of a flow; `None` if the flow has expired. A flow whose backend has no slot
    /// any more is left to expire whatever arrives, so that none refers to a slot for longer than
    /// its quarantine.
    pub(super) fn record(
        &mut self,
        at: u32,
        sender: Sender,
        event: FlowEvent,
        now: u32,
        current: impl Fn(SlotId) -> Option<SlotId>,
        slots: &SlotCounters,
    ) -> Option<FlowMatch> {
        if self.is_expired(at, now) {
            return None;
        }
        let entry = &mut self.entries[at as usize];
        let (slot, before) = (entry.slot, entry.state);
        let has_reply = entry.reply.is_some();
        let is_first_reply = sender == Sender::Backend && entry.expected_ack.is_none();
        // A backend that repeats its SYN-ACK begins nothing.
        let is_new_connection = match (entry.state, event, entry.expected_ack) {
            (FlowState::Closing, FlowEvent::SynAck(number), Some(ExpectedAck::Number(known))) => {
                number != known
            }
            (FlowState::Closing, FlowEvent::SynAck(_), _) => true,
            _ => false,
        };
        let Some(current) = current(slot) else {
            return Some(FlowMatch {
                slot,
                current: None,
                state: before,
                has_reply,
                may_install: false,
                is_first_reply,
                is_new_connection,
            });
        };
        match event {
            FlowEvent::SynAck(number) => entry.expected_ack = Some(ExpectedAck::Number(number)),
            FlowEvent::Reply => entry.expected_ack = entry.expected_ack.or(Some(ExpectedAck::Any)),
            _ => {}
        }
        let after = entry.next_state(sender, event, now);
        let was_established = before == FlowState::Established || entry.reset_by.is_some();
        entry.reset_by = match event {
            FlowEvent::Rst if was_established => Some(sender),
            FlowEvent::Fin => None,
            _ => entry.reset_by.filter(|_| after == FlowState::Closing),
        };
        // An entry that the kernel has cached under another slot is stale.
        if current != slot {
            (entry.reinstall_original_at, entry.reinstall_reply_at) = (0, 0);
        }
        let reinstall_at = match sender {
            Sender::Client => &mut entry.reinstall_original_at,
            Sender::Backend => &mut entry.reinstall_reply_at,
        };
        // The kernel is told of every change of state.
        let may_install = now >= *reinstall_at || before != after;
        if may_install {
            *reinstall_at = now.saturating_add(REINSTALL_AFTER);
        }
        self.unlink(at);
        let entry = &mut self.entries[at as usize];
        entry.state = after;
        entry.slot = current;
        entry.last_seen = now.max(entry.last_seen);
        self.link(at);
        if before.is_live() != after.is_live() || current != slot {
            slots.subtract(slot, before);
            slots.add(current, after);
        }
        Some(FlowMatch {
            slot,
            current: Some(current),
            state: after,
            has_reply,
            may_install,
            is_first_reply,
            is_new_connection,
        })
    }

    pub(super) fn insert(&mut self, mut entry: Entry, hashes: TupleHashes) {
        let original = Shard::chain(&self.originals, hashes.original);
        entry.next_original = self.originals[original].wrapping_sub(1);
        let reply = hashes.reply.map(|hash| Shard::chain(&self.replies, hash));
        entry.next_reply = reply.map_or(NONE, |chain| self.replies[chain].wrapping_sub(1));
        let at = if self.free != NONE {
            let at = self.free;
            self.free = self.entries[at as usize].next_original;
            self.entries[at as usize] = entry;
            at
        } else {
            self.entries.push(entry);
            self.entries.len() as u32 - 1
        };
        self.originals[original] = at + 1;
        if let Some(chain) = reply {
            self.replies[chain] = at + 1;
        }
        self.link(at);
        self.len += 1;
    }

    pub(super) fn remove(&mut self, at: u32, hashes: TupleHashes) {
        self.unlink(at);
        let Entry { next_original, .. } = self.entries[at as usize];
        let chain = Shard::chain(&self.originals, hashes.original);
        match self.predecessor(self.originals[chain], at, |entry| entry.next_original) {
            None => self.originals[chain] = next_original.wrapping_add(1),
            Some(before) => self.entries[before as usize].next_original = next_original,
        }
        if let Some(hash) = hashes.reply {
            self.detach_reply(at, hash);
        }
        self.entries[at as usize].next_original = self.free;
        self.free = at;
        self.len -= 1;
    }

    /// Removes the reply direction of a flow, which has this hash.
    pub(super) fn detach_reply(&mut self, at: u32, hash: u64) {
        let next_reply = self.entries[at as usize].next_reply;
        let chain = Shard::chain(&self.replies, hash);
        match self.predecessor(self.replies[chain], at, |entry| entry.next_reply) {
            None => self.replies[chain] = next_reply.wrapping_add(1),
            Some(before) => self.entries[before as usize].next_reply = next_reply,
        }
        let entry = &mut self.entries[at as usize];
        entry.reply = None;
        // The flow stays closing: without its reply direction it must not go on.
        entry.reset_by = None;
    }

    /// Returns the entry before another in a chain that begins at `head`; `None` for the first.
    fn predecessor(&self, head: u32, at: u32, next: impl Fn(&Entry) -> u32) -> Option<u32> {
        let mut before = head.wrapping_sub(1);
        if before == at {
            return None;
        }
        while before != NONE {
            let following = next(&self.entries[before as usize]);
            if following == at {
                return Some(before);
            }
            before = following;
        }
        None
    }

    /// Appends an entry to the list of its state, as the newest.
    fn link(&mut self, at: u32) {
        let list = self.entries[at as usize].list();
        self.lists[list].len += 1;
        let newest = self.lists[list].newest;
        let entry = &mut self.entries[at as usize];
        (entry.older, entry.newer) = (newest, NONE);
        if newest == NONE {
            self.lists[list].oldest = at;
        } else {
            self.entries[newest as usize].newer = at;
        }
        self.lists[list].newest = at;
    }

    fn unlink(&mut self, at: u32) {
        let Entry { older, newer, .. } = self.entries[at as usize];
        let list = &mut self.lists[self.entries[at as usize].list()];
        list.len -= 1;
        if older == NONE {
            list.oldest = newer;
        }
        if newer == NONE {
            list.newest = older;
        }
        if older != NONE {
            self.entries[older as usize].newer = newer;
        }
        if newer != NONE {
            self.entries[newer as usize].older = older;
        }
    }
}
