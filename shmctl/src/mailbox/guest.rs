//! The guest's end of the mailbox.

use super::{COMMAND_SIZE, MARK, REPLY_OFFSET, REPLY_SIZE};
use crate::language::parse::MAX_COMMAND;
use crate::language::reply::Reply;
use crate::region::Region;
use std::time::{Duration, Instant};

/// The reason a guest got no reply.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SendError {
    /// The text is not a message.
    #[error(
        "'{0}' is not a message; write @COMMAND@ with at most {MAX_COMMAND} bytes between the marks"
    )]
    NotAMessage(String),
    /// An earlier command is still in the mailbox.
    #[error(
        "an earlier command is still waiting in the mailbox; check that nfqd runs on the host, with this \
         region as --shm?"
    )]
    Busy,
    /// Nobody took the command.
    #[error(
        "nobody took the command within {} s; check that nfqd runs on the host with this region as --shm",
        .0.as_secs_f32()
    )]
    Timeout(Duration),
    /// The host took the command, but what it wrote is not a reply.
    #[error(
        "the command was taken, but '{0}' is not a reply; do the versions of nfqd and nfqd-guest match?"
    )]
    NotAReply(String),
}

/// The shortest and the longest pause between two looks at whether the host has taken a message.
const MIN_PAUSE: Duration = Duration::from_micros(20);
const MAX_PAUSE: Duration = Duration::from_millis(5);

/// Writes one `@…@` message, waits until the host has taken it, and returns its replies. A message
/// that nobody takes within `timeout` is withdrawn, so that it is not executed later.
///
/// # Errors
/// See [`SendError`].
pub fn send_message(
    region: &Region,
    message: &str,
    timeout: Duration,
) -> Result<Vec<Reply>, SendError> {
    let bytes = message.as_bytes();
    let framed = bytes.len() >= 2 && bytes.first() == Some(&MARK) && bytes.last() == Some(&MARK);
    if !framed || bytes.len() > COMMAND_SIZE {
        return Err(SendError::NotAMessage(message.to_string()));
    }
    let deadline = Instant::now() + timeout;
    let wait_until_taken = |marks: &[usize]| {
        let start = Instant::now();
        while marks.iter().any(|&at| region.load(at) == MARK) {
            if Instant::now() >= deadline {
                return false;
            }
            // A share of the time so far, so that an answer is noticed soon after it is there.
            std::thread::sleep((start.elapsed() / 8).clamp(MIN_PAUSE, MAX_PAUSE));
        }
        true
    };
    if !wait_until_taken(&[0]) {
        return Err(SendError::Busy);
    }
    // Old text behind the message must not be read as part of a later one.
    let mut rest = bytes.get(1..).unwrap_or_default().to_vec();
    rest.resize(COMMAND_SIZE - 1, 0);
    region.store(0, 0);
    region.write(1, &rest);
    region.store(0, MARK);
    let close = bytes.len() - 1;
    if wait_until_taken(&[0, close]) {
        return replies(region);
    }
    if region.replace(0, MARK, 0) {
        region.replace(close, MARK, 0);
        return Err(SendError::Timeout(timeout));
    }
    replies(region)
}

/// Sends one command, see [`send_message`].
///
/// # Errors
/// See [`SendError`].
pub fn send_command(
    region: &Region,
    command: &str,
    timeout: Duration,
) -> Result<Vec<Reply>, SendError> {
    send_message(region, &format!("@{command}@"), timeout)
}

fn replies(region: &Region) -> Result<Vec<Reply>, SendError> {
    let mut bytes = [0; REPLY_SIZE];
    region.read(REPLY_OFFSET, &mut bytes);
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let parsed: Result<Vec<Reply>, _> = text.lines().map(str::parse).collect();
    let not_a_reply =
        || SendError::NotAReply(text.chars().take(80).flat_map(char::escape_default).collect());
    match parsed {
        Ok(replies) if replies.is_empty() => Err(not_a_reply()),
        Ok(replies) => Ok(replies),
        Err(_) => Err(not_a_reply()),
    }
}
