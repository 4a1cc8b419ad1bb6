//! Framing: where a message in the mailbox begins and ends.

use super::{COMMAND_SIZE, MARK, TAKEN, UNTERMINATED_AFTER};
use crate::language::parse::MAX_COMMAND;
use crate::language::service::BackendName;
use crate::language::value::MacAddr;

/// A command taken out of the mailbox, to be answered.
#[derive(Debug, PartialEq, Eq)]
pub struct MailboxMessage {
    /// The text between the marks, NUL bytes left out.
    pub text: Result<String, MessageError>,
    /// The offset of the opening `@`.
    pub(super) open: usize,
    /// The offset of the closing `@`, where there is one.
    pub(super) close: Option<usize>,
    /// Offsets of `$` inside: they would be taken for marks.
    pub(super) dollars: Vec<usize>,
}

/// Why a frame has no text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// No closing mark came.
    #[error(
        "'@' at offset {offset} has no closing '@' within {COMMAND_SIZE} bytes and {} s; write @COMMAND@ with at \
         most {MAX_COMMAND} bytes between the marks",
        UNTERMINATED_AFTER.as_secs()
    )]
    Unterminated {
        /// Where the opening mark stands.
        offset: usize,
    },
    /// There are bytes that are no ASCII text.
    #[error("byte {byte:#04x} at offset {offset} is not printable ASCII; commands are ASCII text")]
    NotText {
        /// The byte.
        byte: u8,
        /// Where it stands.
        offset: usize,
    },
}

/// Where the mark that closes a frame stands in its body. A `@` between an IP address and a MAC belongs to a destination
/// (`10.0.0.3:80@02:00:00:00:00:03`), and so does one that only wants to: glued to an IP address and to more text, with
/// another mark behind it. One before what may become a MAC when the writer goes on leaves the frame open.
pub(super) fn closing(body: &[(usize, u8)]) -> Option<usize> {
    let mut from = 0;
    // Marks that stand before MACs. What an earlier, longer command has left behind a new one's end may look like destinations
    // that go on, but is followed by the earlier one's taken mark. Then the only such mark is the end; of several nobody can
    // tell which, and the frame is never obeyed.
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

/// The text of a frame.
pub(super) fn text_of(body: &[(usize, u8)]) -> Result<String, MessageError> {
    let is_text = |byte: u8| byte == b'\t' || (b' '..=b'~').contains(&byte);
    match body.iter().find(|&&(_, byte)| !is_text(byte)) {
        Some(&(offset, byte)) => Err(MessageError::NotText { byte, offset }),
        None => Ok(body.iter().map(|&(_, byte)| char::from(byte)).collect()),
    }
}
