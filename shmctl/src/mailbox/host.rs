//! The host's end of the mailbox.

use super::framing::{MailboxMessage, MessageError, closing, text_of};
use super::{
    COMMAND_SIZE, MARK, MAX_MESSAGES, REPLY_OFFSET, REPLY_SIZE, TAKEN, UNTERMINATED_AFTER,
};
use crate::language::parse::error::{CommandError, ErrorCode};
use crate::language::reply::Reply;
use crate::region::RegionError;
use crate::region_file::RegionFile;
use std::time::Instant;

/// The host's end of a mailbox.
#[derive(Debug, Default)]
pub struct HostMailbox {
    /// An opening mark without a closing one: its offset and when it was first seen.
    unterminated: Option<(usize, Instant)>,
}

impl HostMailbox {
    /// Returns the complete messages, oldest first, at most [`MAX_MESSAGES`]. An opening mark
    /// without a closing one is waited for; by `now` that wait ends.
    ///
    /// Each message must be passed to [`HostMailbox::reply`] before the next call, or it is
    /// returned again.
    ///
    /// # Errors
    /// If the region cannot be read.
    pub fn take(
        &mut self,
        region: &RegionFile,
        now: Instant,
    ) -> Result<Vec<MailboxMessage>, RegionError> {
        let mut copy = [0; COMMAND_SIZE];
        region.read(0, &mut copy)?;
        Ok(self.find(copy, now))
    }

    /// Finds the messages in a copy of the command area.
    fn find(&mut self, copy: [u8; COMMAND_SIZE], now: Instant) -> Vec<MailboxMessage> {
        // By far the most common case costs no allocation.
        if !copy.contains(&MARK) {
            self.unterminated = None;
            return Vec::new();
        }
        let bytes: Vec<(usize, u8)> =
            copy.into_iter().enumerate().filter(|&(_, byte)| byte != 0).collect();
        let mut messages = Vec::new();
        let mut rest = bytes.as_slice();
        // Messages follow each other from the start, with blanks between them. Anything else is
        // left alone: a writer may have written a body whose opening mark it writes last.
        while let Some((&(open, mark), body)) = rest.split_first() {
            match mark {
                TAKEN => {
                    let Some(end) = body.iter().position(|&(_, byte)| byte == TAKEN) else { break };
                    rest = body.get(end + 1..).unwrap_or_default();
                }
                MARK if messages.len() < MAX_MESSAGES => {
                    let Some(end) = closing(body) else {
                        messages.extend(self.unterminated(open, now));
                        return messages;
                    };
                    let (text, after) = body.split_at(end);
                    let close = after.first().map(|&(offset, _)| offset);
                    let dollars =
                        text.iter().filter(|&&(_, byte)| byte == TAKEN).map(|&(offset, _)| offset);
                    messages.push(MailboxMessage {
                        text: text_of(text),
                        open,
                        close,
                        dollars: dollars.collect(),
                    });
                    rest = after.get(1..).unwrap_or_default();
                }
                blank if blank.is_ascii_whitespace() => rest = body,
                _ => break,
            }
        }
        self.unterminated = None;
        messages
    }

    /// Returns a message to reject if an opening mark has been without a closing one for too long.
    fn unterminated(&mut self, open: usize, now: Instant) -> Option<MailboxMessage> {
        let since =
            self.unterminated.filter(|&(offset, _)| offset == open).map_or(now, |(_, since)| since);
        let expired = now.duration_since(since) >= UNTERMINATED_AFTER;
        self.unterminated = (!expired).then_some((open, since));
        expired.then(|| MailboxMessage {
            text: Err(MessageError::Unterminated { offset: open }),
            open,
            close: None,
            dollars: Vec::new(),
        })
    }

    /// Writes the replies, one line a message, then marks the messages as taken. A reply that fits
    /// in part is cut; for those that do not fit, the last line tells their number.
    ///
    /// # Errors
    /// If the region cannot be written.
    pub fn reply(
        &mut self,
        region: &RegionFile,
        answered: &[(MailboxMessage, Reply)],
    ) -> Result<(), RegionError> {
        if answered.is_empty() {
            return Ok(());
        }
        let mut text = reply_text(answered.iter().map(|(_, reply)| reply));
        text.push(0);
        region.write(REPLY_OFFSET, &text)?;
        // The closing marks go first: a writer that waits for its opening mark finds all of the
        // message free.
        for (message, _) in answered {
            for &offset in &message.dollars {
                region.replace(offset, TAKEN, b'.')?;
            }
            if let Some(close) = message.close {
                region.replace(close, MARK, TAKEN)?;
            }
            region.replace(message.open, MARK, TAKEN)?;
        }
        Ok(())
    }
}

fn reply_text<'a>(replies: impl Iterator<Item = &'a Reply>) -> Vec<u8> {
    // A cut reply must still be one: `ERR unknown-backend` and some of its text.
    const SHORTEST_REPLY: usize = 32;
    // Room for the last line, which tells how many replies are missing.
    const RESERVED: usize = 48;
    let lines: Vec<String> = replies.map(Reply::to_string).collect();
    let total: usize = lines.iter().map(|line| line.len() + 1).sum();
    let reserved = if total > REPLY_SIZE { RESERVED } else { 0 };
    let mut left = lines.len();
    let mut out = Vec::new();
    for line in lines {
        let reserved = if left > 1 { reserved } else { 0 };
        let room = (REPLY_SIZE - 1).saturating_sub(out.len() + 1 + reserved);
        if room < line.len().min(SHORTEST_REPLY) {
            let missing = CommandError {
                code: ErrorCode::Internal,
                column: 1,
                message: format!("{left} replies did not fit"),
            };
            out.push(b'\n');
            out.extend(Reply::from(missing).to_string().bytes());
            break;
        }
        if !out.is_empty() {
            out.push(b'\n');
        }
        out.extend(line.bytes().take(room));
        left -= 1;
    }
    out
}
