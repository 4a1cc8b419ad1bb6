//! Netlink framing: messages and attributes as bytes (linux/netlink.h). Reading never goes past the
//! end, whatever the lengths in the bytes say.

use nix::errno::Errno;

/// `NLMSG_ERROR`: an acknowledgement, or an error.
pub const NLMSG_ERROR: u16 = 2;
/// `NLMSG_DONE`: the end of a dump.
pub const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST`.
pub const NLM_F_REQUEST: u16 = 1;
/// `NLM_F_ACK`.
pub const NLM_F_ACK: u16 = 4;
/// `NLM_F_DUMP_INTR`: the objects changed during a dump.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// `NLM_F_DUMP`.
pub const NLM_F_DUMP: u16 = 0x300;
/// Size of a message header (`struct nlmsghdr`) in bytes.
pub const HEADER: usize = 16;

/// Appends an attribute, padded to four bytes.
pub fn put(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend((value.len() as u16 + 4).to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// Writes the length of the message that begins at `start`.
pub fn finish(out: &mut [u8], start: usize) {
    let len = (out.len() - start) as u32;
    if let Some(field) = out.get_mut(start..start + 4) {
        field.copy_from_slice(&len.to_ne_bytes());
    }
}

/// Returns the bytes at an offset, if there are that many.
pub fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// Returns the number at an offset, in host order.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_ne_bytes)
}

/// Returns the attributes of a message or of a nested attribute: type and value.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const TYPE_MASK: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..len)?;
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// A message.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The type.
    pub kind: u16,
    /// The flags.
    pub flags: u16,
    /// The sequence number.
    pub sequence: u32,
    /// All bytes of the message, header included.
    pub bytes: &'a [u8],
}

impl Message<'_> {
    /// Returns the result that the message carries, if it is an acknowledgement or an error.
    pub fn result(&self) -> Option<Result<(), Errno>> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let code = bytes_at(self.bytes, HEADER).map(i32::from_ne_bytes)?;
        Some(if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) })
    }
}

/// Returns the messages of a datagram.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(bytes_at(bytes, 0)?) as usize;
        let message = bytes.get(..len).filter(|message| message.len() >= HEADER)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        let sequence = u32::from_ne_bytes(bytes_at(message, 8)?);
        let (kind, flags) = (u16_at(message, 4)?, u16_at(message, 6)?);
        Some(Message { kind, flags, sequence, bytes: message })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn written_commands_are_restored() {
        let mut out = vec![0; 4];
        out.extend(7_u16.to_ne_bytes());
        out.extend([0; 2]);
        out.extend(9_u32.to_ne_bytes());
        out.extend([0; 4]);
        put(&mut out, 3, b"abc");
        put(&mut out, 0x8004, &[]);
        finish(&mut out, 0);
        let all: Vec<Message<'_>> = messages(&out).collect();
        assert_eq!((all.len(), all[0].kind, all[0].sequence, all[0].bytes), (1, 7, 9, &out[..]));
        let found: Vec<_> = attributes(&out[HEADER..]).collect();
        assert_eq!(found, [(3, &b"abc"[..]), (4, &[][..])]);
        assert!(all[0].result().is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                let _ = message.result();
                prop_assert!(attributes(message.bytes).count() <= message.bytes.len());
            }
        }
    }
}
