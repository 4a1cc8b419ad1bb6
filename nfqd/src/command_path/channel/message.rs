//! A command on its way: taken from a channel, to be answered where it came from.

use nfqd_shmctl::mailbox::{MailboxMessage, MessageError};
use nfqd_shmctl::ring::RequestError;
use nfqd_shmctl::ring::host::RingRequest;

/// A command taken from a channel, which is to be answered where it came from.
pub enum Message {
    /// From the mailbox.
    Mailbox(MailboxMessage),
    /// From the request ring.
    Ring(RingRequest),
    /// A line of a vsock connection.
    Line(LineRequest),
}

/// A command of a vsock connection.
#[derive(Debug)]
pub struct LineRequest {
    /// The command.
    pub(super) text: Result<String, RequestError>,
    /// The number of the connection.
    pub(super) connection: u32,
}

/// The reason a message has no text.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum BadMessage {
    /// The message in the mailbox is bad.
    #[error(transparent)]
    Mailbox(#[from] MessageError),
    /// The request is bad.
    #[error(transparent)]
    Ring(#[from] RequestError),
}

impl Message {
    /// Returns the text of the command.
    ///
    /// # Errors
    /// If it has none.
    pub fn text(&self) -> Result<&str, BadMessage> {
        match self {
            Message::Mailbox(message) => Ok(message.text.as_deref().map_err(|error| *error)?),
            Message::Ring(request) => Ok(request.text.as_deref().map_err(|error| *error)?),
            Message::Line(line) => Ok(line.text.as_deref().map_err(|error| *error)?),
        }
    }

    /// Returns the longest text of a reply that can be delivered, in bytes.
    pub fn reply_limit(&self) -> usize {
        match self {
            // The mailbox has room for little more.
            Message::Mailbox(_) => 1897,
            Message::Ring(_) | Message::Line(_) => 1 << 20,
        }
    }
}
