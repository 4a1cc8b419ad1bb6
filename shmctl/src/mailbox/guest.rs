//! The guest's end of the mailbox.

use super::{COMMAND_SIZE, MARK, REPLY_OFFSET, REPLY_SIZE};
use crate::language::parse::MAX_COMMAND;
use crate::language::reply::Reply;
use crate::region::{Region, RegionLock};
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// Another process on this side waits for its own reply.
    #[error("another nfqd-guest has been using the mailbox for {} s; try again", .0.as_secs_f32())]
    Contended(Duration),
    /// The mailbox cannot be locked.
    #[error("the mailbox cannot be locked: {0}")]
    Lock(String),
    /// The sender was interrupted, and the command was withdrawn.
    #[error("interrupted; the command was withdrawn")]
    Interrupted,
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

/// How long a sender waits.
#[derive(Clone, Copy, Debug)]
pub struct Patience<'a> {
    /// The time that everything may take.
    pub timeout: Duration,
    /// Set when the sender is to give up before that.
    pub interrupted: Option<&'a AtomicBool>,
}

impl From<Duration> for Patience<'_> {
    fn from(timeout: Duration) -> Self {
        Patience { timeout, interrupted: None }
    }
}

/// The reason a wait ended before its condition was met.
#[derive(Clone, Copy, PartialEq, Eq)]
enum GaveUp {
    Timeout,
    Interrupted,
}

impl Patience<'_> {
    /// Waits until a condition holds.
    fn wait_for(&self, deadline: Instant, condition: impl Fn() -> bool) -> Result<(), GaveUp> {
        let start = Instant::now();
        while !condition() {
            if self.interrupted.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(GaveUp::Interrupted);
            }
            if Instant::now() >= deadline {
                return Err(GaveUp::Timeout);
            }
            // A share of the time so far, so that an answer is noticed soon after it is there.
            std::thread::sleep((start.elapsed() / 8).clamp(MIN_PAUSE, MAX_PAUSE));
        }
        Ok(())
    }
}

/// Locks the mailbox, so that several senders on this side each get their own reply. What is sent by
/// [`send_locked`] meanwhile belongs together.
///
/// # Errors
/// If it cannot be locked in time.
pub fn lock<'a>(
    region: &Region,
    patience: impl Into<Patience<'a>>,
) -> Result<RegionLock, SendError> {
    let patience = patience.into();
    let deadline = Instant::now() + patience.timeout;
    let found = RefCell::new(None);
    let is_locked = || {
        let result = region.try_lock().transpose();
        let is_over = result.is_some();
        found.replace(result);
        is_over
    };
    match patience.wait_for(deadline, is_locked) {
        Ok(()) => {}
        Err(GaveUp::Interrupted) => return Err(SendError::Interrupted),
        Err(GaveUp::Timeout) => return Err(SendError::Contended(patience.timeout)),
    }
    match found.into_inner() {
        Some(Ok(lock)) => Ok(lock),
        Some(Err(error)) => Err(SendError::Lock(error.to_string())),
        None => Err(SendError::Contended(patience.timeout)),
    }
}

/// The shortest and the longest pause between two looks at whether the host has taken a message.
const MIN_PAUSE: Duration = Duration::from_micros(20);
const MAX_PAUSE: Duration = Duration::from_millis(5);
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
    let close = bytes.len() - 1;
    let is_taken = || [0, close].iter().all(|&at| region.load(at) != MARK);
    let Err(reason) = patience.wait_for(deadline, is_taken) else { return replies(region) };
    if region.replace(0, MARK, 0) {
        for (at, _) in bytes.iter().enumerate().filter(|(_, byte)| **byte == MARK) {
            region.replace(at, MARK, 0);
        }
        return Err(match reason {
            GaveUp::Timeout => SendError::Timeout(patience.timeout),
            GaveUp::Interrupted => SendError::Interrupted,
        });
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
