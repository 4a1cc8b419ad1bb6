//! The memory that a channel shares with its guest: the mailbox and the rings.

use super::message::Message;
use nfqd_shmctl::mailbox::host::HostMailbox;
use nfqd_shmctl::ring::CounterPage;
use nfqd_shmctl::ring::host::HostRing;
use nfqd_shmctl::{RegionError, RegionFile, Reply};
use std::time::Instant;

/// A region with its mailbox and, if it has room for them, its rings.
pub(super) struct SharedMemory {
    region: RegionFile,
    mailbox: HostMailbox,
    ring: Option<HostRing>,
    /// The number of replies in the mailbox.
    mailbox_replies: u64,
}

impl SharedMemory {
    /// Opens the rings of a region. `doorbell` is what its guest writes to ring, or 0.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub(super) fn open(region: RegionFile, doorbell: u32) -> Result<SharedMemory, RegionError> {
        let ring = HostRing::open(&region, doorbell)?;
        Ok(SharedMemory { region, mailbox: HostMailbox::default(), ring, mailbox_replies: 0 })
    }

    /// Returns the region.
    pub(super) fn region(&self) -> &RegionFile {
        &self.region
    }

    /// Writes the header of the rings again if the guest has overwritten it.
    ///
    /// # Errors
    /// If the region is gone.
    pub(super) fn repair(&self) -> Result<(), RegionError> {
        self.region.check_path()?;
        self.ring.as_ref().map_or(Ok(()), |ring| ring.repair(&self.region))
    }

    /// Follows withdrawals, delivers what has waited for room, and returns the messages that wait, if
    /// there is a budget for them.
    ///
    /// # Errors
    /// If the region cannot be read or written.
    pub(super) fn take(
        &mut self,
        now: Instant,
        has_budget: bool,
    ) -> Result<Vec<Message>, RegionError> {
        if let Some(ring) = &mut self.ring {
            ring.follow(&self.region, now)?;
        }
        if !has_budget {
            return Ok(Vec::new());
        }
        let messages = self.mailbox.take(&self.region, now)?;
        let mut all: Vec<Message> = messages.into_iter().map(Message::Mailbox).collect();
        // One after the other, so that a poll costs no more than MAX_MESSAGES.
        if all.is_empty()
            && let Some(ring) = &self.ring
        {
            all.extend(ring.take(&self.region)?.into_iter().map(Message::Ring));
        }
        Ok(all)
    }

    /// Writes the replies to messages.
    ///
    /// # Errors
    /// If the region cannot be written.
    pub(super) fn reply(&mut self, answered: Vec<(Message, Reply)>) -> Result<(), RegionError> {
        let (mut by_mailbox, mut by_ring) = (Vec::new(), Vec::new());
        for (message, reply) in answered {
            match message {
                Message::Mailbox(message) => by_mailbox.push((message, reply)),
                Message::Ring(request) => by_ring.push((request, reply)),
                // Lines come by vsock.
                Message::Line(_) => {}
            }
        }
        self.mailbox_replies += by_mailbox.len() as u64;
        self.mailbox.reply(&self.region, &by_mailbox)?;
        if let Some(ring) = &mut self.ring
            && !by_ring.is_empty()
        {
            let by_ring = by_ring.iter().map(|(request, reply)| (request, reply));
            ring.reply(&self.region, by_ring)?;
        }
        Ok(())
    }

    /// Returns a number that differs after each change that the guest waits for.
    pub(super) fn version(&self) -> u64 {
        self.ring.as_ref().map_or(0, HostRing::version).wrapping_add(self.mailbox_replies)
    }

    /// Whether there are rings.
    pub(super) fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Whether replies wait until the guest has made room.
    pub(super) fn is_blocked(&self) -> bool {
        self.ring.as_ref().is_some_and(HostRing::is_blocked)
    }

    /// Whether the guest has looked at the counters in the last minute.
    pub(super) fn is_watched(&self, now: Instant) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.is_watched(now))
    }

    /// Writes the counters that the guest reads without asking.
    ///
    /// # Errors
    /// If the region cannot be written.
    pub(super) fn write_counters(&self, page: &CounterPage) -> Result<(), RegionError> {
        self.ring.as_ref().map_or(Ok(()), |ring| ring.write_counters(&self.region, page))
    }

    /// Removes the rings, so that a guest sees that its channel has ended.
    ///
    /// # Errors
    /// If the region cannot be written.
    pub(super) fn remove_ring(&mut self) -> Result<(), RegionError> {
        self.ring.take().map_or(Ok(()), |ring| ring.remove(&self.region))
    }
}
