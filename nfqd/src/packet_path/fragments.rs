//! Later fragments of datagrams that arrived before the first one, which decides where they go.

use crate::engine::Ingress;
use nfqd_rules::NetworkId;
use nfqd_rules::packet::Packet;
use nfqd_shmctl::Fragment;
use std::collections::VecDeque;

/// The most fragments that are held. A flood evicts the oldest.
const MAX_PENDING: usize = 256;
/// Seconds that a fragment is held: the fragments of a datagram are sent together.
const FRAGMENT_WAIT: u32 = 2;

/// The fragments that are held, each with what is needed to release it.
pub struct FragmentQueue<T> {
    pending: VecDeque<PendingFragment<T>>,
}

struct PendingFragment<T> {
    since: u32,
    ingress: Ingress,
    packet: Packet,
    release: T,
}

impl<T> Default for FragmentQueue<T> {
    fn default() -> FragmentQueue<T> {
        FragmentQueue { pending: VecDeque::new() }
    }
}

impl<T> FragmentQueue<T> {
    /// Holds a fragment. Returns the one that is evicted for it, if there are too many.
    pub fn push(&mut self, ingress: Ingress, packet: &Packet, release: T, now: u32) -> Option<T> {
        let is_full = self.pending.len() >= MAX_PENDING;
        let evicted = if is_full { self.pending.pop_front() } else { None };
        self.pending.push_back(PendingFragment { since: now, ingress, packet: *packet, release });
        evicted.map(|fragment| fragment.release)
    }

    /// Returns the fragments that waited for this first fragment, in the order of their arrival. One
    /// to another MAC may be among them, which the engine lets wait again.
    pub fn released_by(&mut self, network: NetworkId, first: &Packet) -> Vec<(Ingress, Packet, T)> {
        let Some(ip) = first.ip.filter(|ip| ip.fragment == Fragment::First) else {
            return Vec::new();
        };
        let datagram = (ip.source, ip.destination, ip.protocol, ip.id);
        let released = self.take(|fragment| {
            let same_network = fragment.ingress.network == network;
            let same_datagram = fragment
                .packet
                .ip
                .is_some_and(|ip| (ip.source, ip.destination, ip.protocol, ip.id) == datagram);
            same_network && same_datagram
        });
        released
            .into_iter()
            .map(|fragment| (fragment.ingress, fragment.packet, fragment.release))
            .collect()
    }

    /// Returns the fragments that have waited for too long.
    pub fn expired(&mut self, now: u32) -> Vec<T> {
        let expired = self.take(|fragment| fragment.since.saturating_add(FRAGMENT_WAIT) <= now);
        expired.into_iter().map(|fragment| fragment.release).collect()
    }

    /// Returns all fragments.
    pub fn drain(&mut self) -> Vec<T> {
        self.pending.drain(..).map(|fragment| fragment.release).collect()
    }

    /// Whether no fragment is held.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    fn take(
        &mut self,
        wanted: impl Fn(&PendingFragment<T>) -> bool,
    ) -> VecDeque<PendingFragment<T>> {
        if !self.pending.iter().any(&wanted) {
            return VecDeque::new();
        }
        let (taken, rest) = self.pending.drain(..).partition(wanted);
        self.pending = rest;
        taken
    }
}
