//! A part of the flow table, behind a lock: its entries, the chains of both hashes, and a list for each state.

use super::{Backward, Event, Forward, Found, LEARN_AGAIN, Live, STATES, State};
use crate::engine::bounded::Seconds;

/// No entry.
pub(super) const NONE: u32 = u32::MAX;

/// How far behind what it must acknowledge a client's acknowledgement may be: half of all numbers are behind (RFC 9293, 3.4).
const WINDOW: u32 = 1 << 31;

/// Seconds after which a UDP flow that is still there is a stream (RFC 4787 has no states; this is conntrack's idea, with
/// what the engine sees).
const STREAM_AFTER: Seconds = 50;

pub(super) struct Entry {
    pub(super) forward: Forward,
    /// None where backends answer clients themselves.
    pub(super) backward: Option<Backward>,
    pub(super) slot: u32,
    pub(super) state: State,
    pub(super) born: Seconds,
    pub(super) seen: Seconds,
    /// What the client must acknowledge; none before the backend has answered.
    pub(super) expects: Option<Expects>,
    /// Who has reset it, when it was established.
    pub(super) reset_by: Option<Sender>,
    /// When the kernel may be told next, of the way there and of the way back.
    pub(super) learn_forward: Seconds,
    pub(super) learn_backward: Seconds,
    /// The next in the chain of each hash.
    pub(super) next_forward: u32,
    pub(super) next_backward: u32,
    /// Neighbours in the list of its state: seen longer ago, and later.
    pub(super) older: u32,
    pub(super) newer: u32,
}

/// Who sends a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    Client,
    Backend,
}

/// What shows that a client has heard the backend.
#[derive(Clone, Copy)]
pub(super) enum Expects {
    /// A number that only the backend has said.
    Number(u32),
    /// Anything: the beginning was not seen.
    Anything,
}

/// The ends of the list of a state.
#[derive(Clone, Copy)]
struct List {
    oldest: u32,
    newest: u32,
    len: usize,
}

pub(super) struct Shard {
    pub(super) capacity: usize,
    pub(super) entries: Vec<Entry>,
    /// The first free entry, chained by `next_forward`.
    free: u32,
    /// Where each chain begins, one more than the entry: memory that is zero costs nothing until it is used.
    forward: Vec<u32>,
    backward: Vec<u32>,
    lists: [List; STATES.len()],
    pub(super) len: usize,
}

/// Where a flow is, and its two hashes.
#[derive(Clone, Copy)]
pub(super) struct Hashes {
    pub(super) forward: u64,
    pub(super) backward: Option<u64>,
}

impl Shard {
    pub(super) fn new(capacity: usize) -> Shard {
        let heads = capacity.next_power_of_two();
        Shard {
            capacity,
            entries: Vec::with_capacity(capacity),
            free: NONE,
            forward: vec![0; heads],
            backward: vec![0; heads],
            lists: [List { oldest: NONE, newest: NONE, len: 0 }; STATES.len()],
            len: 0,
        }
    }

    /// The low bits choose the chain; the shard was chosen by another hash.
    fn chain(heads: &[u32], hash: u64) -> usize {
        hash as usize & (heads.len() - 1)
    }

    pub(super) fn find_forward(&self, hash: u64, key: &Forward) -> Option<u32> {
        let mut at = self.forward[Shard::chain(&self.forward, hash)].wrapping_sub(1);
        while at != NONE {
            let entry = &self.entries[at as usize];
            if entry.forward == *key {
                return Some(at);
            }
            at = entry.next_forward;
        }
        None
    }

    pub(super) fn find_backward(&self, hash: u64, key: &Backward) -> Option<u32> {
        let mut at = self.backward[Shard::chain(&self.backward, hash)].wrapping_sub(1);
        while at != NONE {
            let entry = &self.entries[at as usize];
            if entry.backward.as_ref() == Some(key) {
                return Some(at);
            }
            at = entry.next_backward;
        }
        None
    }

    pub(super) fn is_over(&self, at: u32, now: Seconds) -> bool {
        let entry = &self.entries[at as usize];
        entry.seen.saturating_add(entry.state.timeout()) <= now
    }

    pub(super) fn alive(&self, at: u32, now: Seconds) -> Option<&Entry> {
        (!self.is_over(at, now)).then(|| &self.entries[at as usize])
    }

    /// The oldest flow of a state, when its time is over.
    pub(super) fn over(&self, state: State, now: Seconds) -> Option<u32> {
        let oldest = self.lists[state as usize].oldest;
        (oldest != NONE && self.is_over(oldest, now)).then_some(oldest)
    }

    /// The flow to give up: one whose time is over; or the oldest of those that have proven nothing, of the state that has
    /// most of them, so that a flood of one kind pushes out its own; or the oldest of the rest.
    pub(super) fn victim(&self, now: Seconds) -> Option<(u32, State)> {
        let over = STATES.into_iter().find_map(|state| Some((self.over(state, now)?, state)));
        over.or_else(|| {
            let list = |state: State| self.lists[state as usize];
            let unproven = STATES.into_iter().filter(|state| *state < State::Stream && list(*state).len != 0);
            let most = unproven.max_by_key(|state| list(*state).len);
            let rest = || [State::Stream, State::Established].into_iter().find(|state| list(*state).len != 0);
            most.or_else(rest).map(|state| (list(state).oldest, state))
        })
    }

    /// The oldest of those that have proven something, when these leave less than a sixteenth of the room for others.
    pub(super) fn too_many_proven(&self) -> Option<(u32, State)> {
        let lists = [State::Stream, State::Established].map(|state| (self.lists[state as usize], state));
        let proven: usize = lists.iter().map(|(list, _)| list.len).sum();
        let most = self.capacity - self.capacity / 16;
        let longest = lists.iter().max_by_key(|(list, _)| list.len)?;
        (proven > most).then_some((longest.0.oldest, longest.1))
    }

    /// A packet of a flow; none if its time is over. A flow whose backend has no slot any more is left to its time, whatever
    /// comes: so none has a number longer than that rests.
    pub(super) fn see(
        &mut self,
        at: u32,
        sender: Sender,
        event: Event,
        now: Seconds,
        current: impl Fn(u32) -> Option<u32>,
        live: &Live,
    ) -> Option<Found> {
        if self.is_over(at, now) {
            return None;
        }
        let entry = &mut self.entries[at as usize];
        let (slot, before) = (entry.slot, entry.state);
        // A backend that repeats what it has said begins nothing.
        let is_another = match (entry.state, event, entry.expects) {
            (State::Closing, Event::Accepts(number), Some(Expects::Number(said))) => number != said,
            (State::Closing, Event::Accepts(_), _) => true,
            _ => false,
        };
        let Some(current) = current(slot) else {
            return Some(Found { slot, current: None, state: before, learn: false, is_another });
        };
        match event {
            Event::Accepts(number) => entry.expects = Some(Expects::Number(number)),
            Event::Answer => entry.expects = entry.expects.or(Some(Expects::Anything)),
            _ => {}
        }
        let heard = |acknowledges: u32| match entry.expects {
            Some(Expects::Number(number)) => acknowledges.wrapping_sub(number) < WINDOW,
            Some(Expects::Anything) => true,
            // Where backends answer clients themselves, nobody sees what they say.
            None => entry.backward.is_none(),
        };
        let after = match (before, event) {
            (State::Opening | State::Established, event) if event.ends() => State::Closing,
            // Sequence numbers are not known here, so anybody can forge a RST; but who has reset a connection says nothing
            // more on it.
            (State::Closing, Event::GoesOn { .. } | Event::Answer) if entry.reset_by == Some(sender) => {
                State::Established
            }
            (State::Opening, Event::GoesOn { acknowledges }) if heard(acknowledges) => State::Established,
            (State::Datagram, _) if now >= entry.born.saturating_add(STREAM_AFTER) => State::Stream,
            (before, _) => before,
        };
        entry.reset_by = match event {
            Event::Resets if before == State::Established || entry.reset_by.is_some() => Some(sender),
            Event::Closes => None,
            _ => entry.reset_by.filter(|_| after == State::Closing),
        };
        // What the kernel remembers of another slot is of no use any more.
        if current != slot {
            (entry.learn_forward, entry.learn_backward) = (0, 0);
        }
        let next = match sender {
            Sender::Client => &mut entry.learn_forward,
            Sender::Backend => &mut entry.learn_backward,
        };
        // A turn is always told.
        let learn = now >= *next || before != after;
        if learn {
            *next = now.saturating_add(LEARN_AGAIN);
        }
        self.unlink(at);
        let entry = &mut self.entries[at as usize];
        entry.state = after;
        entry.slot = current;
        entry.seen = now.max(entry.seen);
        self.link(at);
        if before.is_live() != after.is_live() || current != slot {
            live.count(slot, before, false);
            live.count(current, after, true);
        }
        Some(Found { slot, current: Some(current), state: after, learn, is_another })
    }

    pub(super) fn put(&mut self, mut entry: Entry, hashes: Hashes) {
        let chain = Shard::chain(&self.forward, hashes.forward);
        entry.next_forward = self.forward[chain].wrapping_sub(1);
        let back = hashes.backward.map(|hash| Shard::chain(&self.backward, hash));
        entry.next_backward = back.map_or(NONE, |back| self.backward[back].wrapping_sub(1));
        let at = if self.free != NONE {
            let at = self.free;
            self.free = self.entries[at as usize].next_forward;
            self.entries[at as usize] = entry;
            at
        } else {
            self.entries.push(entry);
            self.entries.len() as u32 - 1
        };
        self.forward[chain] = at + 1;
        if let Some(back) = back {
            self.backward[back] = at + 1;
        }
        self.link(at);
        self.len += 1;
    }

    pub(super) fn take(&mut self, at: u32, hashes: Hashes) {
        self.unlink(at);
        let Entry { next_forward, next_backward, .. } = self.entries[at as usize];
        let chain = Shard::chain(&self.forward, hashes.forward);
        match self.before(self.forward[chain], at, |entry| entry.next_forward) {
            None => self.forward[chain] = next_forward.wrapping_add(1),
            Some(before) => self.entries[before as usize].next_forward = next_forward,
        }
        if let Some(hash) = hashes.backward {
            let chain = Shard::chain(&self.backward, hash);
            match self.before(self.backward[chain], at, |entry| entry.next_backward) {
                None => self.backward[chain] = next_backward.wrapping_add(1),
                Some(before) => self.entries[before as usize].next_backward = next_backward,
            }
        }
        self.entries[at as usize].next_forward = self.free;
        self.free = at;
        self.len -= 1;
    }

    /// The entry before another in a chain that begins at `head`; none for the first.
    fn before(&self, head: u32, at: u32, next: impl Fn(&Entry) -> u32) -> Option<u32> {
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

    /// Puts an entry at the newest end of its state's list.
    fn link(&mut self, at: u32) {
        let state = self.entries[at as usize].state as usize;
        self.lists[state].len += 1;
        let newest = self.lists[state].newest;
        let entry = &mut self.entries[at as usize];
        (entry.older, entry.newer) = (newest, NONE);
        if newest == NONE {
            self.lists[state].oldest = at;
        } else {
            self.entries[newest as usize].newer = at;
        }
        self.lists[state].newest = at;
    }

    fn unlink(&mut self, at: u32) {
        let Entry { state, older, newer, .. } = self.entries[at as usize];
        let list = &mut self.lists[state as usize];
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
