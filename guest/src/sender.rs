//! The sender: through the rings where the host has them, else through the mailbox; or by vsock.

use crate::Interruption;
use nfqd_shmctl::mailbox::guest::{send_locked, send_message};
use nfqd_shmctl::ring;
use nfqd_shmctl::sender::{Patience, SendError, lock};
use nfqd_shmctl::vsock::Connection;
use nfqd_shmctl::{Region, RegionLock, Reply};
use std::cell::OnceCell;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The longest text that is written at once: its replies, which repeat it, must fit as well.
const MAX_TEXT: usize = 1500;
/// The most commands that are written at once.
const MAX_COMMANDS: usize = 32;

/// The way to the host.
pub(crate) enum Link {
    /// A region, with rings or a mailbox alone.
    Region(Region),
    /// A connection by vsock.
    Vsock(Connection),
}

/// A sender of commands.
pub(crate) struct Sender {
    link: Link,
    timeout: Duration,
    interruption: Interruption,
    /// Held while several messages belong together: a query for a free number, and the new rule.
    lock: OnceCell<RegionLock>,
}

impl Sender {
    /// A sender whose commands may take this long.
    pub(crate) fn new(link: Link, timeout: Duration, interruption: Interruption) -> Sender {
        Sender { link, timeout, interruption, lock: OnceCell::new() }
    }

    /// Whether a signal has asked the program to end.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interruption.flag.load(Ordering::Relaxed)
    }

    fn patience(&self) -> Patience<'_> {
        self.interruption.patience(self.timeout)
    }

    /// Keeps other senders of this VM out until this one ends.
    pub(crate) fn lock(&self) -> Result<(), SendError> {
        if self.lock.get().is_none() {
            let lock = match &self.link {
                Link::Region(region) => lock(region, self.patience())?,
                Link::Vsock(_) => Connection::lock(self.patience())?,
            };
            let _ = self.lock.set(lock);
        }
        Ok(())
    }

    /// Sends a message as it is, marks included. By vsock there are no marks.
    pub(crate) fn send(&self, message: &str) -> Result<Vec<Reply>, SendError> {
        match &self.link {
            Link::Region(region) => self.send_by_mailbox(region, message),
            Link::Vsock(_) => Err(SendError::NoMailbox),
        }
    }

    fn send_by_mailbox(&self, region: &Region, message: &str) -> Result<Vec<Reply>, SendError> {
        match self.lock.get() {
            Some(lock) => send_locked(region, lock, message, self.patience()),
            None => send_message(region, message, self.patience()),
        }
    }

    /// Sends commands, several at once, through the rings where the host has them; stops after a
    /// rejection, as soon as what was sent with it is answered.
    pub(crate) fn send_commands(&self, commands: &[String]) -> Result<Vec<Reply>, SendError> {
        let mut replies = Vec::new();
        let mut rest = commands;
        let region = match &self.link {
            Link::Vsock(connection) => {
                let sent = connection.send(commands, self.patience(), &mut replies);
                return with_carried_out(sent, replies);
            }
            Link::Region(region) if ring::guest::is_there(region) => {
                let sent = self.send_by_ring(region, commands, &mut replies);
                return with_carried_out(sent, replies);
            }
            Link::Region(region) => region,
        };
        while !rest.is_empty() {
            let mut length = 0;
            let fit = rest.iter().take(MAX_COMMANDS).take_while(|command| {
                length += command.len() + 2;
                length <= MAX_TEXT
            });
            let count = fit.count().max(1);
            let (now, later) = rest.split_at(count.min(rest.len()));
            let message: String = now.iter().map(|command| format!("@{command}@")).collect();
            match self.send_by_mailbox(region, &message) {
                Ok(more) => replies.extend(more),
                Err(error) => return with_carried_out(Err(error), replies),
            }
            if !replies.iter().all(Reply::is_ok) {
                break;
            }
            rest = later;
        }
        Ok(replies)
    }

    fn send_by_ring(
        &self,
        region: &Region,
        commands: &[String],
        replies: &mut Vec<Reply>,
    ) -> Result<(), SendError> {
        let own;
        let lock = match self.lock.get() {
            Some(lock) => lock,
            None => {
                own = lock(region, self.patience())?;
                &own
            }
        };
        for commands in commands.chunks(ring::SLOTS as usize) {
            let patience = self.patience();
            ring::guest::send_locked(region, lock, commands, patience, replies)?;
            if !replies.iter().all(Reply::is_ok) {
                break;
            }
        }
        Ok(())
    }
}

/// Returns the replies; after an error, what has been carried out before it is printed.
fn with_carried_out(
    sent: Result<(), SendError>,
    replies: Vec<Reply>,
) -> Result<Vec<Reply>, SendError> {
    if sent.is_err() {
        replies.iter().for_each(|reply| println!("{reply}"));
    }
    sent.map(|()| replies)
}
