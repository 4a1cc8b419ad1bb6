//! The packet mark: how the fast path and the engine speak to each other, in one documented layout.
//!
//! | bits | what |
//! |---|---|
//! | 27–31 | [`Operation`]; those that rewrite have [`PORT`] with them when the port changes, too |
//! | 8–26 | index: of a middlebox on the way to the engine, of a slot (a backend of a service) on the way back |
//! | 0–7 | not ours: never changed |
//!
//! A frame carries our bits only between the two base chains of the bridge's prerouting hook.

/// The bits that are ours.
pub const OURS: u32 = 0xffff_ff00;
/// The bits of the operation.
pub const OPERATION: u32 = 0xf800_0000;
/// The bits of the index.
pub const INDEX: u32 = 0x07ff_ff00;
/// The largest index. Index 0 means none.
pub const MAX_INDEX: u32 = INDEX >> INDEX_SHIFT;

const INDEX_SHIFT: u32 = 8;

/// What the other side is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Operation {
    /// On its way to the engine. A frame that comes back with it was let through without a verdict.
    Ask = 1 << 27,
    /// Rewrite the destination to the slot's backend.
    Redirect = 2 << 27,
    /// The same, and remember the flow.
    RedirectLearn = 3 << 27,
    /// The same, and remember it for a few seconds only: it is at its end.
    RedirectClose = 4 << 27,
    /// Rewrite the source to the address that the slot's clients know; nothing for slot 0.
    Reply = 5 << 27,
    /// The same, and remember the flow.
    ReplyLearn = 6 << 27,
    /// The same, and forget the flow.
    ReplyClose = 7 << 27,
    /// Rewrite nothing, and remember that the flow is the middlebox' own, which has a slot like a backend.
    Pass = 8 << 27,
    /// Rewrite the destination to the slot's backend, and forget what is remembered of another flow with these addresses and
    /// ports.
    RedirectOpen = 9 << 27,
}

/// With an operation that rewrites: the port, too.
pub const PORT: u32 = 16 << 27;

impl Operation {
    /// Those that rewrite.
    pub const REWRITING: [Operation; 7] = [
        Operation::Redirect,
        Operation::RedirectOpen,
        Operation::RedirectLearn,
        Operation::RedirectClose,
        Operation::Reply,
        Operation::ReplyLearn,
        Operation::ReplyClose,
    ];

    /// Its bits, with those for the port.
    pub fn bits(self, port: bool) -> u32 {
        self as u32 | if port { PORT } else { 0 }
    }
}

/// The bits of an index, as the kernel's maps hold it too.
pub fn index_bits(index: u32) -> u32 {
    (index << INDEX_SHIFT) & INDEX
}

/// The index in a mark.
pub fn index(mark: u32) -> u32 {
    (mark & INDEX) >> INDEX_SHIFT
}

/// `mark` with our bits set to an operation on an index; `port` says whether it rewrites the port, too.
pub fn with(mark: u32, operation: Operation, port: bool, at: u32) -> u32 {
    (mark & !OURS) | operation.bits(port) | index_bits(at)
}

/// `mark` without our bits.
pub fn cleared(mark: u32) -> u32 {
    mark & !OURS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_do_not_overlap_and_foreign_bits_stay() {
        assert_eq!(OPERATION | INDEX, OURS);
        assert_eq!(OPERATION & INDEX, 0);
        let mark = with(0xdead_beef, Operation::ReplyLearn, true, MAX_INDEX);
        assert_eq!(
            (mark & !OURS, index(mark), mark & OPERATION),
            (0xef, MAX_INDEX, Operation::ReplyLearn as u32 | PORT)
        );
        assert_eq!(cleared(mark), 0xef);
        let bits =
            Operation::REWRITING.iter().flat_map(|operation| [operation.bits(false), operation.bits(true)]);
        let all: std::collections::BTreeSet<u32> =
            bits.chain([Operation::Ask as u32, Operation::Pass as u32]).collect();
        assert_eq!(all.len(), 16);
    }
}
