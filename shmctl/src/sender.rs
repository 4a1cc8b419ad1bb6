//! The parts that a guest's senders share: their patience, their errors, and the lock by which they take turns.

use crate::language::parse::MAX_COMMAND;
use crate::language::reply::Reply;
use crate::region::{Region, RegionLock};
use nix::errno::Errno;
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
    /// The command is too long.
    #[error("{0} bytes long; a command has at most {MAX_COMMAND}")]
    TooLong(usize),
    /// An earlier command is still in the mailbox.
    #[error(
        "an earlier command is still waiting in the mailbox; check that nfqd runs on the host with this \
         region as --shm"
    )]
    Busy,
    /// Another process on this side waits for its own reply.
    #[error("another nfqd-guest has been using the channel for {} s; try again", .0.as_secs_f32())]
    Contended(Duration),
    /// The channel cannot be locked.
    #[error("the channel cannot be locked: {0}")]
    Lock(String),
    /// The host reset the rings while a request was outstanding.
    #[error(
        "the host reset the channel before it replied; the command may or may not have taken effect; run 'status' to see what is registered"
    )]
    Reset,
    /// The host has neither answered nor followed the withdrawal.
    #[error(
        "no answer from the host; the command was withdrawn, but takes effect if the host had already started it; check \
         that nfqd runs on the host with this region as --shm"
    )]
    Unanswered,
    /// There is no reply to a command that cannot be withdrawn; with the reason.
    #[error(
        "{0}; the command may or may not have taken effect; run 'status' to see what is registered"
    )]
    Unconfirmed(String),
    /// A message for the mailbox of a way that has none.
    #[error("vsock has no mailbox; write the command without -w and without marks")]
    NoMailbox,
    /// The connection by vsock.
    #[error("vsock: {}", vsock_reason(*.0))]
    Vsock(Errno),
    /// The sender was interrupted, and the command was withdrawn.
    #[error("interrupted; the command was withdrawn")]
    Interrupted,
    /// The host did not accept the command.
    #[error(
        "the host did not accept the command within {} s; check that nfqd runs on the host with this region as --shm",
        .0.as_secs_f32()
    )]
    Timeout(Duration),
    /// The host took the command, but what it wrote is not a reply.
    #[error(
        "the command was taken, but '{0}' is not a reply; do the versions of nfqd and nfqd-guest match?"
    )]
    NotAReply(String),
}

/// Returns what a failure of vsock means, and what to do about it.
fn vsock_reason(errno: Errno) -> String {
    let advice = match errno {
        Errno::EAFNOSUPPORT => {
            "this kernel has no vsock; load its module vmw_vsock_virtio_transport"
        }
        Errno::EACCES => "only root may command the host; run it as root",
        Errno::ENODEV | Errno::ENETUNREACH => {
            "this VM has no vsock device; it needs one in its definition"
        }
        Errno::ECONNRESET | Errno::ECONNREFUSED => {
            "nobody listens on the host; check that nfqd runs there with this VM's --vsock CID"
        }
        Errno::ETIMEDOUT => "the host does not answer",
        _ => "check the VM's vsock device and nfqd on the host",
    };
    format!("{errno}: {advice}")
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
pub(crate) enum GaveUp {
    Timeout,
    Interrupted,
}

impl GaveUp {
    /// Returns the error of a sender whose command was withdrawn.
    pub(crate) fn error(self, timeout: Duration) -> SendError {
        match self {
            GaveUp::Timeout => SendError::Timeout(timeout),
            GaveUp::Interrupted => SendError::Interrupted,
        }
    }
}

impl Patience<'_> {
    /// Waits until a condition holds.
    pub(crate) fn wait_for(
        &self,
        deadline: Instant,
        condition: impl Fn() -> bool,
    ) -> Result<(), GaveUp> {
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

/// Checks that the host can take commands of this length.
pub(crate) fn check_lengths(commands: &[String]) -> Result<(), SendError> {
    let long = commands.iter().find(|command| command.len() > MAX_COMMAND);
    long.map_or(Ok(()), |long| Err(SendError::TooLong(long.len())))
}

/// Parses a reply; the error has its beginning.
pub(crate) fn parse_reply(text: &str) -> Result<Reply, SendError> {
    let start = || text.chars().take(80).flat_map(char::escape_default).collect();
    text.parse().map_err(|_| SendError::NotAReply(start()))
}

/// Locks the channel, so that several senders on this side each get their own reply.
///
/// # Errors
/// If it cannot be locked in time.
pub fn lock<'a>(
    region: &Region,
    patience: impl Into<Patience<'a>>,
) -> Result<RegionLock, SendError> {
    lock_by(|| region.try_lock(), patience.into())
}

/// Waits for a lock that is tried again and again.
pub(crate) fn lock_by(
    try_lock: impl Fn() -> std::io::Result<Option<RegionLock>>,
    patience: Patience<'_>,
) -> Result<RegionLock, SendError> {
    let deadline = Instant::now() + patience.timeout;
    let found = RefCell::new(None);
    let is_locked = || {
        let result = try_lock().transpose();
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
