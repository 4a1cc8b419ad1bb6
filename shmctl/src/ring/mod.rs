//! The ring layout: numbered requests and replies, each acknowledged once and in order.
//!
//! Guarantee: whatever bytes the guest writes, the host copies each of them out once, does bounded
//! work, and uses no offset from the region. Only the guest's own channel can suffer.
//!
//! # Layout
//!
//! Offsets and sizes are in bytes, from the start of the region; numbers are little-endian and
//! unsigned. A region of less than 147456 bytes has no rings. Each section has one writer; the other
//! side only reads it.
//!
//! ## Header, at 4096, written by the host
//!
//! | offset | size | field | value |
//! |---|---|---|---|
//! | 4096 | 8 | magic | `NFQDRING`; written last |
//! | 4104 | 4 | version | 1 |
//! | 4108 | 4 | slot size | 4096 |
//! | 4112 | 4 | slots in each ring | 16 |
//! | 4116 | 4 | offset of the guest's section | 8192 |
//! | 4120 | 4 | offset of the request ring | 12288 |
//! | 4124 | 4 | offset of the reply ring | 77824 |
//! | 4128 | 4 | offset of the counters | 143360 |
//! | 4132 | 4 | size of the counters | 4096 |
//! | 4136 | 8 | epoch | a number that increases at each reset of the rings |
//! | 4144 | 8 | taken | the number of the last request answered |
//! | 4152 | 8 | written | the number of the last reply slot written |
//! | 4160 | 8 | reset | the guest's `reset` value that the host last acted on |
//! | 4168 | 4 | doorbell | what the guest writes to ring the host; 0 if the device has no doorbell |
//!
//! ## Guest's section, at 8192, written by the guest
//!
//! | offset | size | field | value |
//! |---|---|---|---|
//! | 8192 | 8 | reset | changed by the guest to reset the rings |
//! | 8200 | 8 | sent | the number of the last request that is complete |
//! | 8208 | 8 | consumed | the number of the last reply slot that the guest has read |
//! | 8216 | 8 | watched | changed by the guest each time it reads the counters |
//!
//! These numbers are written by one aligned store of 8 bytes each, and read in the same way.
//!
//! ## Slots, 4096 bytes each
//!
//! | offset in the slot | size | field | value |
//! |---|---|---|---|
//! | 0 | 8 | number | the slot's number |
//! | 8 | 4 | length | bytes of text: of a request at most 2046, of a reply slot at most 4072 |
//! | 12 | 4 | flags | of a reply: bit 0, more of it follows; bit 1, it begins here. Of a request: 0 |
//! | 16 | 8 | request | of a reply: the number of the request that it answers. Of a request: 0 |
//! | 24 | … | text | a command, without marks; a reply, or a part of one |
//!
//! The requests of an epoch have the numbers epoch + 1, epoch + 2, …; so have its reply slots. Number
//! `n` is in slot (n - epoch - 1) mod 16 of its ring.
//!
//! ## How a guest sends
//!
//! 1. **Take over.** If `reset` is equal in both sections, `sent` = `taken`, and `consumed` =
//!    `written`, no request is outstanding, and the guest can send at once. If `reset` is equal,
//!    `taken` = `written` = `epoch`, and `sent` is less than `epoch`, the host has reset the rings:
//!    write `epoch` to `consumed`, then to `sent`. Otherwise reset them: change the guest's `reset`
//!    unless it already differs from the header's, wait until the two are equal, then read `epoch`
//!    and write it to `consumed`, then to `sent`.
//! 2. **Send.** Fill the slots of the next numbers, with at most 16 requests outstanding, then write
//!    the last number to `sent` with release ordering, so that the host sees the slots before it.
//! 3. **Receive.** Poll `written`; the host polls for requests every millisecond while a guest is
//!    active, and every 16 ms otherwise. While `written` exceeds `consumed` by 1 to 16 and the slot
//!    for number `consumed` + 1 contains that number, copy the slot, then add 1 to `consumed`. Load
//!    `written` with acquire ordering before reading the slot. A slot with bit 1 set starts a reply;
//!    the text of later slots is appended to it; a slot with bit 0 clear ends it. If `epoch` has
//!    changed, the host has reset the rings, and an unanswered request may or may not have been
//!    executed.
//! 4. **Withdraw.** To withdraw unanswered requests, change `reset`. Requests that the host has not
//!    started to execute are dropped, even if the host is not running. Requests that it has started
//!    are answered first. Once the header's `reset` equals the guest's, a reply has arrived if its
//!    slot contains the expected number; otherwise the request was not executed, unless the host was
//!    killed in between.
//!
//! A reply is one line of ASCII text: `OK`, `OK {text}` or `ERR {code} {text}`, see [`Reply`].
//!
//! ## Doorbells
//!
//! If `doorbell` is not 0, the region is that of an ivshmem-doorbell device, and the guest rings the host
//! by writing its value, as one aligned store of 4 bytes, to offset 12 of the device's BAR 0: after each change
//! of `reset` and of `sent`, after a message in the mailbox, and after a change of `consumed` if more of
//! a reply follows. The host then looks at once; without a ring it looks every 256 ms. A ring that
//! brings nothing new is answered by a pause of up to 16 ms.
//!
//! The host rings the guest, by vector 0 of the device, after each reply and each reset. A guest that
//! takes no interrupts polls.
//!
//! Several programs of one guest take turns by a lock of their own, such as `flock` on the device's
//! file.
//!
//! ## What the host does
//!
//! The host answers requests in order, at a sustained rate of at most 100 per second by default; resets and the
//! delivery of pending replies do not count toward the limit. It writes a reply slot, then `written`;
//! for the last slot of a reply it updates `taken` in the same write. While the reply ring is full, it
//! accepts no requests. After a restart, it resumes from the existing header and executes every
//! unanswered request, even one that it had already executed before the restart, against the
//! registrations at that moment. The guest gets exactly one reply per request. Out-of-range values of
//! `sent` and `consumed` are ignored, and a header that the guest has overwritten is restored within a
//! second.
//!
//! ## Counters, at 143360, written by the host
//!
//! The page is updated about once a second for a minute after each change of `watched`, less often if
//! reading the kernel's counters takes long. Reading it needs no command and no lock.
//!
//! | offset in the page | size | field | value |
//! |---|---|---|---|
//! | 0 | 8 | sequence | odd while the page is being written |
//! | 8 | 8 | time | when they were read, in nanoseconds since 1970 (CLOCK_REALTIME); 0: not yet |
//! | 16 | 4 | entries | middleboxes that follow, at most 63 |
//! | 20 | 4 | left out | middleboxes for which there is no room |
//! | 64 | 64 each | entries | one for each registered middlebox whose MAC the channel is bound to (`mac=`) |
//!
//! | offset in the entry | size | field | value |
//! |---|---|---|---|
//! | 0 | 6 | MAC | of the middlebox |
//! | 6 | 2 | flags | bit 0: it has a firewall; bit 1: it has services |
//! | 8 | 8 | packets | that came for it |
//! | 16 | 8 | bytes | of those packets |
//! | 24 | 8 | denied | packets that its rules, or its default, have denied |
//! | 32 | 8 | redirected | packets that went to backends |
//! | 40 | 4 | backends | of all its services |
//! | 44 | 4 | dead | those of them that are dead |
//! | 48 | 16 | – | 0 |
//!
//! A reader copies `sequence`, the page, and `sequence` again, in this order: the copy is good if both are
//! the same and even. A host that was killed may leave it odd until it is back.
//!
//! [`Reply`]: crate::Reply

mod counters;
pub mod guest;
pub mod host;
#[cfg(test)]
mod tests;

pub use counters::{CounterPage, MiddleboxCounters};

use crate::language::parse::{MAX_COMMAND, is_command_text};

/// The size of a region with rings, in bytes, at least.
pub const SIZE: u64 = 147_456;
/// The number of slots of each ring.
pub const SLOTS: u64 = 16;

const MAGIC: &[u8; 8] = b"NFQDRING";
const VERSION: u32 = 1;
const HEADER: usize = 4096;
/// Where the header's counters begin: epoch, taken, written, reset.
const PROGRESS: usize = HEADER + 40;
/// Where the header's number to ring by is.
const DOORBELL: usize = PROGRESS + Progress::SIZE;
const GUEST: usize = 8192;
const SENT: usize = GUEST + 8;
const CONSUMED: usize = GUEST + 16;
const WATCHED: usize = GUEST + 24;
const REQUESTS: usize = 12288;
const REPLIES: usize = 77824;
const COUNTERS: usize = 143_360;
const COUNTERS_SIZE: usize = 4096;
const SLOT_SIZE: usize = 4096;
/// The bytes of a slot in front of its text.
const SLOT_HEADER: usize = 24;
/// The most text of a slot.
const SLOT_TEXT: usize = SLOT_SIZE - SLOT_HEADER;
/// The flag of a reply slot whose reply goes on in the next one.
const MORE: u32 = 1;
/// The flag of a reply slot in which a reply begins.
const FIRST: u32 = 2;

/// The reason a request has no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The slot has another number.
    #[error(
        "the slot of request {expected} has the number {found}; fill it before 'sent' counts it"
    )]
    Number {
        /// The number that it must have.
        expected: u64,
        /// The number in the slot.
        found: u64,
    },
    /// The text is too long.
    #[error("{0} bytes long; a command has at most {MAX_COMMAND}")]
    Length(u32),
    /// A byte is not ASCII text.
    #[error("byte {byte:#04x} at {at} is not printable ASCII; commands are ASCII text")]
    NotText {
        /// The byte.
        byte: u8,
        /// The place of the byte in the text, from 0.
        at: usize,
    },
}

/// Returns the text of a command, which is ASCII.
///
/// # Errors
/// The first byte that is not.
pub fn command_text(bytes: &[u8]) -> Result<String, RequestError> {
    match bytes.iter().enumerate().find(|(_, byte)| !is_command_text(**byte)) {
        Some((at, byte)) => Err(RequestError::NotText { byte: *byte, at }),
        None => Ok(bytes.iter().map(|&byte| char::from(byte)).collect()),
    }
}

/// The part of the header that stays the same.
fn fixed_header() -> [u8; PROGRESS - HEADER] {
    let mut out = [0; PROGRESS - HEADER];
    let numbers = [
        VERSION,
        SLOT_SIZE as u32,
        SLOTS as u32,
        GUEST as u32,
        REQUESTS as u32,
        REPLIES as u32,
        COUNTERS as u32,
        COUNTERS_SIZE as u32,
    ];
    let bytes = MAGIC.iter().copied().chain(numbers.into_iter().flat_map(u32::to_le_bytes));
    out.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
    out
}

/// The part of the header that changes.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Progress {
    epoch: u64,
    taken: u64,
    written: u64,
    reset: u64,
}

impl Progress {
    const SIZE: usize = 32;

    fn parse(bytes: &[u8; Progress::SIZE]) -> Progress {
        Progress {
            epoch: u64_at(bytes, 0),
            taken: u64_at(bytes, 8),
            written: u64_at(bytes, 16),
            reset: u64_at(bytes, 24),
        }
    }

    fn bytes(self) -> Vec<u8> {
        let numbers = [self.epoch, self.taken, self.written, self.reset];
        numbers.into_iter().flat_map(u64::to_le_bytes).collect()
    }
}

/// The guest's section.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct GuestSection {
    reset: u64,
    sent: u64,
    consumed: u64,
    watched: u64,
}

impl GuestSection {
    const SIZE: usize = 32;

    fn parse(bytes: &[u8; GuestSection::SIZE]) -> GuestSection {
        let at = |offset| u64_at(bytes, offset);
        GuestSection { reset: at(0), sent: at(8), consumed: at(16), watched: at(24) }
    }
}

/// The fields of a slot in front of its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SlotHeader {
    number: u64,
    length: u32,
    flags: u32,
    request: u64,
}

impl SlotHeader {
    fn parse(bytes: &[u8]) -> SlotHeader {
        SlotHeader {
            number: u64_at(bytes, 0),
            length: u32::from_le_bytes(array(bytes, 8)),
            flags: u32::from_le_bytes(array(bytes, 12)),
            request: u64_at(bytes, 16),
        }
    }

    /// Returns the bytes of a slot with this text.
    fn with_text(self, text: &[u8]) -> Vec<u8> {
        let mut out = self.number.to_le_bytes().to_vec();
        out.extend(self.length.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        out.extend(self.request.to_le_bytes());
        out.extend(text);
        out
    }
}

/// Returns the offset of the slot of a number that is greater than the epoch.
fn slot(ring: usize, epoch: u64, number: u64) -> usize {
    let index = number.wrapping_sub(epoch).wrapping_sub(1) % SLOTS;
    ring + index as usize * SLOT_SIZE
}

/// Returns bytes at an offset, zeros where there are none.
fn array<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut out = [0; N];
    let from = bytes.get(offset..).unwrap_or_default();
    out.iter_mut().zip(from).for_each(|(to, byte)| *to = *byte);
    out
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(array(bytes, offset))
}
