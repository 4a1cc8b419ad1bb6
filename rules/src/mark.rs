//! The packet mark, which carries operations and identifiers between the fast path and the engine.
//!
//! | bits | content |
//! |---|---|
//! | 27–31 | [`Operation`]; the rewriting ones carry [`PORT`] as well when the port changes |
//! | 8–26 | identifier: a [`MiddleboxId`] or a [`NetworkId`] on the way to the engine, a [`SlotId`] on the way back |
//! | 0–7 | not ours: never changed |
//!
//! A frame carries our bits between the base chains of the bridge's prerouting hook, and a reply up to
//! its postrouting hook, where it is translated.

use crate::ids::{MAX_ID, MiddleboxId, SlotId};
use crate::network::NetworkId;

/// The bits of the mark that belong to nfqd.
pub const OURS: u32 = 0xffff_ff00;
/// The bits of the operation.
pub const OPERATION: u32 = 0xf800_0000;
/// The bits of the identifier.
pub const ID: u32 = MAX_ID << ID_SHIFT;

const ID_SHIFT: u32 = 8;

/// The operation that the receiver of a mark carries out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Operation {
    /// On its way to the engine. A frame that comes back with it passed without a verdict.
    Upcall = 12 << 27,
    /// Rewrite the destination to the slot's backend.
    Redirect = 2 << 27,
    /// [`Redirect`](Operation::Redirect), and cache the flow.
    RedirectInstall = 3 << 27,
    /// [`Redirect`](Operation::Redirect), and cache the flow for a few seconds only: it is closing.
    RedirectExpire = 4 << 27,
    /// Rewrite the source to the frontend of the slot; without a slot, rewrite nothing.
    Reply = 5 << 27,
    /// [`Reply`](Operation::Reply), and cache the flow.
    ReplyInstall = 6 << 27,
    /// [`Reply`](Operation::Reply), and remove the flow from the cache.
    ReplyExpire = 7 << 27,
    /// Rewrite nothing, and cache that the flow is local: of the middlebox itself, which has a slot
    /// like a backend.
    Local = 8 << 27,
    /// [`Redirect`](Operation::Redirect), and remove from the cache any other flow with these
    /// addresses and ports.
    RedirectInvalidate = 9 << 27,
    /// A [`Redirect`](Operation::Redirect) by br_netfilter of a packet addressed to the slot's frontend;
    /// connection tracking sees the packet already translated.
    TrackedRedirect = 10 << 27,
    /// [`RedirectInstall`](Operation::RedirectInstall), tracked in the same way.
    TrackedRedirectInstall = 11 << 27,
    /// [`RedirectExpire`](Operation::RedirectExpire), tracked in the same way.
    TrackedRedirectExpire = 14 << 27,
    /// [`RedirectInvalidate`](Operation::RedirectInvalidate), tracked in the same way.
    TrackedRedirectInvalidate = 15 << 27,
}

/// The bit beside a rewriting operation that has the port rewritten as well. Beside
/// [`Operation::Upcall`], the identifier is a network's.
pub const PORT: u32 = 16 << 27;
/// The bit beside [`Operation::Upcall`] of a packet of a conversation that the middlebox itself has
/// begun.
pub const OWN: u32 = 1 << 27;
/// The bits of [`Operation::Upcall`], whatever is beside it.
pub const UPCALL: u32 = OPERATION & !(PORT | OWN);

impl Operation {
    /// The redirects of packets that connection tracking is to see as their backends will.
    pub const TRACKED: [Operation; 4] = [
        Operation::TrackedRedirect,
        Operation::TrackedRedirectInstall,
        Operation::TrackedRedirectExpire,
        Operation::TrackedRedirectInvalidate,
    ];
    /// The operations that translate a reply.
    pub const REPLIES: [Operation; 3] =
        [Operation::Reply, Operation::ReplyInstall, Operation::ReplyExpire];
    /// The operations that redirect a packet to a backend, without the tracked ones.
    pub const REDIRECTS: [Operation; 4] = [
        Operation::Redirect,
        Operation::RedirectInvalidate,
        Operation::RedirectInstall,
        Operation::RedirectExpire,
    ];

    /// Returns the operation that also has connection tracking see a redirect as its backend will.
    pub fn tracked(self) -> Operation {
        match self {
            Operation::Redirect => Operation::TrackedRedirect,
            Operation::RedirectInstall => Operation::TrackedRedirectInstall,
            Operation::RedirectExpire => Operation::TrackedRedirectExpire,
            Operation::RedirectInvalidate => Operation::TrackedRedirectInvalidate,
            other => other,
        }
    }

    /// Returns the bits of the operation; with `port` it rewrites the port as well.
    pub fn bits(self, port: bool) -> u32 {
        self as u32 | if port { PORT } else { 0 }
    }
}

/// Whether a mark says that connection tracking is to see a redirect as its backend will.
pub fn is_tracked(mark: u32) -> bool {
    Operation::TRACKED.iter().any(|operation| *operation as u32 == mark & OPERATION & !PORT)
}

/// Returns the bits of a slot, which are also its key in the kernel's maps.
pub fn slot_bits(slot: SlotId) -> u32 {
    slot.get() << ID_SHIFT
}

/// The origin of a packet on its way to the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// The middlebox that the packet goes to, which the queue does not show otherwise.
    Middlebox(MiddleboxId),
    /// The network that the packet is on.
    Network(NetworkId),
}

/// Returns the bits of a packet on its way to the engine.
pub fn upcall_bits(origin: Origin) -> u32 {
    let upcall = Operation::Upcall as u32;
    match origin {
        Origin::Middlebox(id) => upcall | id.get() << ID_SHIFT,
        Origin::Network(NetworkId::ANY) => upcall,
        Origin::Network(id) => upcall | PORT | id.get() << ID_SHIFT,
    }
}

/// Whether a packet on its way to the engine is of a conversation that the middlebox itself has begun.
pub fn is_own(mark: u32) -> bool {
    mark & OWN != 0
}

/// Returns the origin of a packet on its way to the engine.
pub fn origin(mark: u32) -> Origin {
    let number = (mark & ID) >> ID_SHIFT;
    let middlebox = MiddleboxId::new(number).filter(|_| mark & PORT == 0);
    match middlebox {
        Some(id) => Origin::Middlebox(id),
        None => Origin::Network(NetworkId::new(number).unwrap_or(NetworkId::ANY)),
    }
}

/// Returns the slot that a mark names.
pub fn slot(mark: u32) -> Option<SlotId> {
    SlotId::new((mark & ID) >> ID_SHIFT)
}

/// Returns `mark` with our bits set to an operation on a slot; with `port` it rewrites the port as
/// well.
pub fn with(mark: u32, operation: Operation, port: bool, slot: Option<SlotId>) -> u32 {
    (mark & !OURS) | operation.bits(port) | slot.map_or(0, slot_bits)
}

/// Returns `mark` without our bits.
pub fn cleared(mark: u32) -> u32 {
    mark & !OURS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_do_not_overlap_and_foreign_bits_stay() {
        assert_eq!((OPERATION | ID, OPERATION & ID), (OURS, 0));
        let last = SlotId::new(MAX_ID).unwrap();
        let mark = with(0xdead_beef, Operation::ReplyInstall, true, Some(last));
        assert_eq!(
            (mark & !OURS, slot(mark), mark & OPERATION),
            (0xef, Some(last), Operation::ReplyInstall as u32 | PORT)
        );
        assert_eq!((cleared(mark), slot(0xff)), (0xef, None));
        let network = |number| Origin::Network(NetworkId::new(number).unwrap());
        let middlebox = Origin::Middlebox(MiddleboxId::new(7).unwrap());
        for found in [network(0), network(7), network(MAX_ID), middlebox] {
            let bits = upcall_bits(found);
            assert_eq!((origin(bits), bits & UPCALL), (found, Operation::Upcall as u32));
            assert!(!is_own(bits) && is_own(bits | OWN) && origin(bits | OWN) == found);
        }
        let rewriting = Operation::REDIRECTS.into_iter().chain(Operation::REPLIES);
        let rewriting = rewriting.chain(Operation::TRACKED);
        let rewriting = rewriting.flat_map(|op| [op.bits(false), op.bits(true)]);
        let all: std::collections::BTreeSet<u32> =
            rewriting.chain([Operation::Upcall as u32, Operation::Local as u32]).collect();
        assert_eq!(all.len(), 24);
        let is_upcall = |bits: &&u32| **bits & UPCALL == Operation::Upcall as u32;
        assert_eq!(all.iter().filter(is_upcall).count(), 1);
        assert_eq!(all.iter().filter(|bits| is_tracked(**bits | 0x1ff)).count(), 8);
        assert_eq!(
            Operation::REDIRECTS.map(Operation::tracked),
            [10, 15, 11, 14].map(|code| {
                Operation::TRACKED.into_iter().find(|op| *op as u32 == code << 27).unwrap()
            })
        );
    }

    #[test]
    fn identifiers_are_from_one_to_the_largest() {
        assert_eq!((SlotId::new(0), SlotId::new(MAX_ID + 1)), (None, None));
        assert_eq!(MiddleboxId::new(MAX_ID).map(MiddleboxId::get), Some(MAX_ID));
    }
}
