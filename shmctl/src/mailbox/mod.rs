//! The mailbox at offset 0: the original's `@…@` messages, and a reply.
//!
//! Guarantee: whatever bytes the guest writes, the host copies them out once, does bounded work,
//! and answers each message once. The layout is in the [crate]'s documentation.

mod framing;
pub mod guest;
pub mod host;
#[cfg(test)]
mod tests;

pub use framing::{MailboxMessage, MessageError};

use std::time::Duration;

/// Size of the command area, in bytes from offset 0.
pub const COMMAND_SIZE: usize = 2048;
/// Offset of the reply, in bytes.
pub const REPLY_OFFSET: usize = 2048;
/// Size of the reply in bytes, its NUL included.
pub const REPLY_SIZE: usize = 2048;

/// Messages taken in one scan: a guest that fills the mailbox with `@` costs the host no more than
/// this. Further messages of the same write are taken by the next scan, whose reply overwrites this
/// one's.
pub const MAX_MESSAGES: usize = 16;

/// The time for which an opening `@` may lack a closing one before it is rejected.
const UNTERMINATED_AFTER: Duration = Duration::from_secs(1);

/// The byte before and behind a message.
const MARK: u8 = b'@';
/// The byte that the host writes over both marks of a message that it has taken.
const TAKEN: u8 = b'$';
