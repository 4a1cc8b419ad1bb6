//! Later pieces of datagrams that came before the first one, which says where they go.

use crate::engine::bounded::Seconds;
use nfqd_rules::packet::{Fragment, Packet};
use std::collections::VecDeque;

/// Pieces that wait at most: who floods us with them loses the oldest.
const MOST: usize = 256;
/// Seconds that a piece waits: pieces of a datagram are sent together.
const PATIENCE: Seconds = 2;

/// Packets that wait, each with what is needed to let it go.
pub struct Held<T> {
    waiting: VecDeque<(Seconds, Packet, T)>,
}

impl<T> Default for Held<T> {
    fn default() -> Held<T> {
        Held { waiting: VecDeque::new() }
    }
}

impl<T> Held<T> {
    /// Lets a packet wait; one that has no room any more comes back.
    pub fn push(&mut self, packet: &Packet, with: T, now: Seconds) -> Option<T> {
        let given_up = if self.waiting.len() >= MOST { self.waiting.pop_front() } else { None };
        self.waiting.push_back((now, *packet, with));
        given_up.map(|(_, _, with)| with)
    }

    /// Those that waited for this first piece, in their order.
    pub fn released_by(&mut self, first: &Packet) -> Vec<(Packet, T)> {
        let Some(ip) = first.ip.filter(|ip| ip.fragment == Fragment::First) else { return Vec::new() };
        let is_piece = |packet: &Packet| {
            packet.link.destination == first.link.destination
                && packet.ip.is_some_and(|piece| {
                    (piece.source, piece.destination, piece.protocol, piece.id)
                        == (ip.source, ip.destination, ip.protocol, ip.id)
                })
        };
        self.take(|(_, packet, _)| is_piece(packet))
            .into_iter()
            .map(|(_, packet, with)| (packet, with))
            .collect()
    }

    /// Those that have waited long enough.
    pub fn over(&mut self, now: Seconds) -> Vec<T> {
        let late = |(since, _, _): &(Seconds, Packet, T)| since.saturating_add(PATIENCE) <= now;
        self.take(late).into_iter().map(|(_, _, with)| with).collect()
    }

    /// All of them.
    pub fn all(&mut self) -> Vec<T> {
        self.waiting.drain(..).map(|(_, _, with)| with).collect()
    }

    fn take(&mut self, wanted: impl Fn(&(Seconds, Packet, T)) -> bool) -> Vec<(Seconds, Packet, T)> {
        if !self.waiting.iter().any(&wanted) {
            return Vec::new();
        }
        let (out, rest) = self.waiting.drain(..).partition(wanted);
        self.waiting = rest;
        Vec::from(out)
    }
}
