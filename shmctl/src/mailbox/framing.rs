//! Framing: where a message in the mailbox begins and ends.

use super::{COMMAND_SIZE, MARK, TAKEN, UNTERMINATED_AFTER};
use crate::language::parse::{MAX_COMMAND, is_command_text};
use crate::language::service::BackendName;
use crate::language::value::MacAddr;

/// A message taken out of the mailbox, which is to be answered.
#[derive(Debug, PartialEq, Eq)]
pub struct MailboxMessage {
    /// The text between the marks, without NUL bytes.
    pub text: Result<String, MessageError>,
    /// The offset of the opening `@`.
    pub(super) open: usize,
    /// The offset of the closing `@`, if there is one.
    pub(super) close: Option<usize>,
    /// The offsets of `$` inside, which would be taken for marks.
    pub(super) dollars: Vec<usize>,
}

/// The reason a message has no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// There is no closing mark.
    #[error(
        "'@' at offset {offset} has no closing '@' within {COMMAND_SIZE} bytes and {} s; write @COMMAND@ with at \
         most {MAX_COMMAND} bytes between the marks",
        UNTERMINATED_AFTER.as_secs()
    )]
    Unterminated {
        /// The offset of the opening mark.
        offset: usize,
    },
    /// A byte is not ASCII text.
    #[error("byte {byte:#04x} at offset {offset} is not printable ASCII; commands are ASCII text")]
    NotText {
        /// The byte.
        byte: u8,
        /// The offset of the byte.
        offset: usize,
    },
}

/// Returns where the mark that closes a message is in its body. A `@` between an IP address and a
/// MAC belongs to a destination (`10.0.0.3:80@02:00:00:00:00:03`), and so does one that seems to:
/// between an IP address and more text, with another mark behind it. One in front of what may still
/// become a MAC leaves the message open.
pub(super) fn closing(body: &[(usize, u8)]) -> Option<usize> {
    let mut from = 0;
    // The first mark in front of a MAC, and whether it is the only one. What an earlier, longer
    // command has left behind the end of a new one may look like further destinations, but the
    // earlier command's taken mark follows. If there is one such mark, it is the end; of several
    // there is no telling which is, and the message is never executed.
    let (mut first, mut only) = (None, true);
    let left_behind = |first: usize, end: usize| {
        body.get(first..end).is_some_and(|bytes| bytes.iter().any(|&(_, byte)| byte == TAKEN))
    };
    loop {
        let rest = body.get(from..)?;
        let Some(mark) = rest.iter().position(|&(_, byte)| byte == MARK).map(|at| from + at) else {
            return first.filter(|&first| only && left_behind(first, body.len()));
        };
        let (before, after) = (body.get(..mark)?, body.get(mark + 1..)?);
        let &(offset, _) = body.get(mark)?;
        let is_text = |byte: u8| byte.is_ascii_graphic() && byte != MARK && byte != TAKEN;
        let glued = after.first().is_some_and(|&(at, byte)| at == offset + 1 && is_text(byte));
        let reversed = before.iter().rev().map(|&(_, byte)| byte).take_while(|&byte| is_text(byte));
        let mut host: Vec<u8> = reversed.collect();
        host.reverse();
        let host =
            std::str::from_utf8(&host).ok().and_then(|text| text.parse::<BackendName>().ok());
        let closes = |mark: usize| match first {
            Some(first) if left_behind(first, mark) => Some(first).filter(|_| only),
            _ => Some(mark),
        };
        if !glued || host.is_none() {
            return closes(mark);
        }
        let word: String = after.iter().take(18).map(|&(_, byte)| char::from(byte)).collect();
        let digits = word.find(|c: char| !c.is_ascii_hexdigit() && c != ':').unwrap_or(word.len());
        let is_mac = word.get(..digits).is_some_and(|text| text.parse::<MacAddr>().is_ok());
        let may_go_on = digits == after.len();
        let mut same_word =
            after.iter().map(|&(_, byte)| byte).take_while(|&byte| is_text(byte) || byte == MARK);
        let another = same_word.any(|byte| byte == MARK);
        if !(is_mac || may_go_on || another) {
            return closes(mark);
        }
        only = first.is_none();
        first = first.or(Some(mark));
        from = mark + 1;
    }
}

/// Returns the text of a message.
pub(super) fn text_of(body: &[(usize, u8)]) -> Result<String, MessageError> {
    match body.iter().find(|&&(_, byte)| !is_command_text(byte)) {
        Some(&(offset, byte)) => Err(MessageError::NotText { byte, offset }),
        None => Ok(body.iter().map(|&(_, byte)| char::from(byte)).collect()),
    }
}
