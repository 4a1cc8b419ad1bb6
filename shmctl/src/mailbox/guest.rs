//! The guest's end of the mailbox.

use super::{COMMAND_SIZE, MARK, REPLY_OFFSET, REPLY_SIZE};
use crate::language::reply::Reply;
use crate::region::{Region, RegionLock};
use crate::ring::guest::ring_doorbell;
use crate::sender::{GaveUp, Patience, SendError, lock};
use std::time::{Duration, Instant};

/// The time that the host may take from the first mark to the last.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

/// Writes one `@…@` message, or several one behind the other, waits until the host has taken them, and
/// returns the replies. What nobody takes in time is withdrawn, so that it is not executed later.
/// Senders on this side take turns.
///
/// # Errors
/// See [`SendError`].
pub fn send_message<'a>(
    region: &Region,
    message: &str,
    patience: impl Into<Patience<'a>>,
) -> Result<Vec<Reply>, SendError> {
    let patience = patience.into();
    check(message)?;
    let start = Instant::now();
    let lock = lock(region, patience)?;
    let timeout = patience.timeout.saturating_sub(start.elapsed());
    send_locked(region, &lock, message, Patience { timeout, ..patience }).map_err(|error| {
        match error {
            // The whole time counts.
            SendError::Timeout(_) => SendError::Timeout(patience.timeout),
            other => other,
        }
    })
}

/// Checks that a text is a message.
fn check(message: &str) -> Result<(), SendError> {
    let bytes = message.as_bytes();
    let framed = bytes.len() >= 2 && bytes.first() == Some(&MARK) && bytes.last() == Some(&MARK);
    if !framed || bytes.len() > COMMAND_SIZE {
        return Err(SendError::NotAMessage(message.to_string()));
    }
    Ok(())
}

/// Sends a message as [`send_message`] does, under a lock that the caller has.
///
/// # Errors
/// See [`SendError`].
pub fn send_locked<'a>(
    region: &Region,
    _lock: &RegionLock,
    message: &str,
    patience: impl Into<Patience<'a>>,
) -> Result<Vec<Reply>, SendError> {
    check(message)?;
    let patience = patience.into();
    let bytes = message.as_bytes();
    let deadline = Instant::now() + patience.timeout;
    match patience.wait_for(deadline, || region.load(0) != MARK) {
        Ok(()) => {}
        Err(GaveUp::Interrupted) => return Err(SendError::Interrupted),
        Err(GaveUp::Timeout) => return Err(SendError::Busy),
    }
    // Old text behind the message must not be read as part of a later one.
    let mut rest = bytes.get(1..).unwrap_or_default().to_vec();
    rest.resize(COMMAND_SIZE - 1, 0);
    region.store(0, 0);
    region.write(1, &rest);
    region.store(0, MARK);
    ring_doorbell(region);
    let close = bytes.len() - 1;
    let is_taken = || [0, close].iter().all(|&at| region.load(at) != MARK);
    let Err(reason) = patience.wait_for(deadline, is_taken) else { return replies(region) };
    if region.replace(0, MARK, 0) {
        for (at, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == MARK) {
            region.replace(at, MARK, 0);
        }
        return Err(reason.error(patience.timeout));
    }
    // The host has begun to take it: the reply is on its way.
    let uninterrupted = Patience { interrupted: None, ..patience };
    let _ = uninterrupted.wait_for(Instant::now() + FINISH_TIMEOUT, is_taken);
    replies(region)
}

/// Sends one command, see [`send_message`].
///
/// # Errors
/// See [`SendError`].
pub fn send_command<'a>(
    region: &Region,
    command: &str,
    patience: impl Into<Patience<'a>>,
) -> Result<Vec<Reply>, SendError> {
    send_message(region, &format!("@{command}@"), patience)
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
