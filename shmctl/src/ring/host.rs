//! The host's end of the rings.

use super::{
    CONSUMED, COUNTERS, CounterPage, DOORBELL, FIRST, GUEST, GuestSection, HEADER, MAGIC, MORE,
    PROGRESS, Progress, REPLIES, REQUESTS, RequestError, SIZE, SLOT_HEADER, SLOT_TEXT, SLOTS,
    SlotHeader, command_text, fixed_header, slot, u64_at,
};
use crate::language::parse::MAX_COMMAND;
use crate::language::reply::Reply;
use crate::region::RegionError;
use crate::region_file::RegionFile;
use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

/// The host's end of the rings of one region.
#[derive(Debug)]
pub struct HostRing {
    /// The header as it should be: what the guest makes of it does not matter.
    progress: Progress,
    /// The last number of the guest's `consumed` that was in range.
    consumed: u64,
    /// Parts of replies for which the guest has had no room yet.
    waiting: VecDeque<Part>,
    /// The guest's `sent`, as of the last look.
    sent: u64,
    /// The guest's `watched`, and when it changed.
    watched: (u64, Option<Instant>),
    /// What the guest writes to ring; 0 if it cannot.
    doorbell: u32,
}

/// A request taken out of the ring, which is to be answered.
#[derive(Debug, PartialEq, Eq)]
pub struct RingRequest {
    /// The command.
    pub text: Result<String, RequestError>,
    number: u64,
}

/// A part of a reply, which fits into a slot.
#[derive(Debug)]
struct Part {
    request: u64,
    flags: u32,
    text: Vec<u8>,
}

impl HostRing {
    /// Opens the rings of a region: goes on with those that are there, or makes new ones. Returns `None`
    /// if the region has no room for them. `doorbell` is what the guest writes to ring, or 0.
    ///
    /// # Errors
    /// If the region cannot be read or written.
    pub fn open(region: &RegionFile, doorbell: u32) -> Result<Option<HostRing>, RegionError> {
        if region.size() < SIZE {
            return Ok(None);
        }
        let mut fixed = [0; PROGRESS - HEADER];
        region.read(HEADER, &mut fixed)?;
        let mut progress = [0; Progress::SIZE];
        region.read(PROGRESS, &mut progress)?;
        let found = Progress::parse(&progress);
        let guest = guest_section(region)?;
        let mut ring = HostRing {
            progress: Progress::default(),
            consumed: 0,
            waiting: VecDeque::new(),
            sent: 0,
            watched: (guest.watched, None),
            doorbell,
        };
        if fixed == fixed_header() && is_sound(&found) {
            ring.progress = found;
            ring.consumed = found.written.saturating_sub(SLOTS).max(found.epoch);
            region.write(DOORBELL, &doorbell.to_le_bytes())?;
        } else {
            ring.reset(region, guest.reset)?;
            ring.write_header(region)?;
        }
        // The old page may be about middleboxes that the channel is not bound to any more.
        ring.write_counters(region, &CounterPage::default())?;
        Ok(Some(ring))
    }

    /// Removes the rings, so that guests see that there are none.
    ///
    /// # Errors
    /// If the region cannot be written.
    pub fn remove(self, region: &RegionFile) -> Result<(), RegionError> {
        region.write(HEADER, &[0; MAGIC.len()])
    }

    /// Writes the header again if the guest has overwritten it.
    ///
    /// # Errors
    /// If the region cannot be read or written.
    pub fn repair(&self, region: &RegionFile) -> Result<(), RegionError> {
        let mut found = [0; DOORBELL - HEADER + 4];
        region.read(HEADER, &mut found)?;
        let mut expected = fixed_header().to_vec();
        expected.extend(self.progress.bytes());
        expected.extend(self.doorbell.to_le_bytes());
        if found.as_slice() == expected { Ok(()) } else { self.write_header(region) }
    }

    /// Writes the header, its magic last.
    fn write_header(&self, region: &RegionFile) -> Result<(), RegionError> {
        region.write(HEADER, &[0; MAGIC.len()])?;
        let fixed = fixed_header();
        region.write(HEADER + MAGIC.len(), fixed.get(MAGIC.len()..).unwrap_or_default())?;
        region.write(PROGRESS, &self.progress.bytes())?;
        region.write(DOORBELL, &self.doorbell.to_le_bytes())?;
        region.write(HEADER, MAGIC)
    }

    /// Begins a new epoch: what is under way is dropped.
    fn reset(&mut self, region: &RegionFile, reset: u64) -> Result<(), RegionError> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        // Numbers are not used again: a slot of an earlier epoch is never taken for a new one.
        let earlier = self.progress.epoch.max(self.progress.taken).max(self.progress.written);
        let now = since.as_ref().map_or(0, Duration::as_nanos) as u64;
        let epoch = now.max(earlier + 2 * SLOTS);
        self.progress = Progress { epoch, taken: epoch, written: epoch, reset };
        self.consumed = epoch;
        self.waiting.clear();
        // A guest that sees its `reset` sees the new epoch.
        let bytes = self.progress.bytes();
        let (counters, reset) = bytes.split_at(bytes.len() - 8);
        region.write(PROGRESS, counters)?;
        region.write(PROGRESS + counters.len(), reset)
    }

    /// Acts on the guest's numbers: resets the rings if it asks for it, and writes replies for which it
    /// has made room.
    ///
    /// # Errors
    /// If the region cannot be read or written.
    pub fn follow(&mut self, region: &RegionFile, now: Instant) -> Result<(), RegionError> {
        let guest = guest_section(region)?;
        self.sent = guest.sent;
        if guest.watched != self.watched.0 {
            self.watched = (guest.watched, Some(now));
        }
        if guest.reset != self.progress.reset {
            return self.reset(region, guest.reset);
        }
        self.write_waiting(region, guest.consumed)
    }

    /// Returns a number that differs after each change that the guest waits for: a reply, a new epoch.
    pub fn version(&self) -> u64 {
        self.progress.written
    }

    /// Whether replies wait for room in the ring.
    pub fn is_blocked(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the guest has looked at the counters in the last minute.
    pub fn is_watched(&self, now: Instant) -> bool {
        const LAST: Duration = Duration::from_secs(60);
        self.watched.1.is_some_and(|at| now.saturating_duration_since(at) < LAST)
    }

    /// Returns the unanswered requests as of the last [`follow`](HostRing::follow) call, oldest first,
    /// at most 16. The list ends with the first query, because a query's reply may be long. It is
    /// empty while replies are waiting for room in the ring.
    ///
    /// All of them must be passed to [`HostRing::reply`] before the next call, or they are returned
    /// again.
    ///
    /// # Errors
    /// If the region cannot be read.
    pub fn take(&self, region: &RegionFile) -> Result<Vec<RingRequest>, RegionError> {
        let taken = self.progress.taken;
        let count = self.sent.checked_sub(taken).filter(|count| *count <= SLOTS).unwrap_or(0);
        let mut requests = Vec::new();
        if !self.waiting.is_empty() {
            return Ok(requests);
        }
        for number in taken + 1..=taken + count {
            let request = self.request(region, number)?;
            let is_query = request.text.as_ref().is_ok_and(|text| is_query(text));
            requests.push(request);
            if is_query {
                break;
            }
        }
        Ok(requests)
    }

    /// Copies a request out of its slot, and parses the copy.
    fn request(&self, region: &RegionFile, number: u64) -> Result<RingRequest, RegionError> {
        let mut copy = [0; SLOT_HEADER + MAX_COMMAND];
        region.read(slot(REQUESTS, self.progress.epoch, number), &mut copy)?;
        let header = SlotHeader::parse(&copy);
        let end = SLOT_HEADER.saturating_add(header.length as usize);
        let text = match copy.get(SLOT_HEADER..end) {
            _ if header.number != number => {
                Err(RequestError::Number { expected: number, found: header.number })
            }
            None => Err(RequestError::Length(header.length)),
            Some(text) => command_text(text),
        };
        Ok(RingRequest { text, number })
    }

    /// Writes the replies to requests, as far as there is room; the rest follows.
    ///
    /// # Errors
    /// If the region cannot be read or written.
    pub fn reply<'a>(
        &mut self,
        region: &RegionFile,
        answered: impl IntoIterator<Item = (&'a RingRequest, &'a Reply)>,
    ) -> Result<(), RegionError> {
        for (request, reply) in answered {
            self.waiting.extend(parts(request.number, &reply.to_string()));
        }
        let mut consumed = [0; 8];
        region.read(CONSUMED, &mut consumed)?;
        self.write_waiting(region, u64_at(&consumed, 0))
    }

    /// Writes parts of replies while the guest has room for them.
    fn write_waiting(&mut self, region: &RegionFile, consumed: u64) -> Result<(), RegionError> {
        if (self.consumed..=self.progress.written).contains(&consumed) {
            self.consumed = consumed;
        }
        while self.progress.written - self.consumed < SLOTS
            && let Some(part) = self.waiting.pop_front()
        {
            let number = self.progress.written + 1;
            let length = part.text.len() as u32;
            let header = SlotHeader { number, length, flags: part.flags, request: part.request };
            let at = slot(REPLIES, self.progress.epoch, number);
            region.write(at, &header.with_text(&part.text))?;
            self.progress.written = number;
            if part.flags & MORE == 0 {
                self.progress.taken = part.request;
            }
            // One write: a restarted host never answers a request twice.
            let bytes = self.progress.bytes();
            region.write(PROGRESS + 8, bytes.get(8..24).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Writes the page of counters.
    ///
    /// # Errors
    /// If the region cannot be written.
    pub fn write_counters(
        &self,
        region: &RegionFile,
        page: &CounterPage,
    ) -> Result<(), RegionError> {
        let mut sequence = [0; 8];
        region.read(COUNTERS, &mut sequence)?;
        let before = u64_at(&sequence, 0) & !1;
        region.write(COUNTERS, &before.wrapping_add(1).to_le_bytes())?;
        region.write(COUNTERS + sequence.len(), &page.bytes())?;
        region.write(COUNTERS, &before.wrapping_add(2).to_le_bytes())
    }
}

fn guest_section(region: &RegionFile) -> Result<GuestSection, RegionError> {
    let mut bytes = [0; GuestSection::SIZE];
    region.read(GUEST, &mut bytes)?;
    Ok(GuestSection::parse(&bytes))
}

/// A number that is far above all that a host uses, and leaves room for all that follow.
const END: u64 = 1 << 62;

/// Whether the host could have left a header with these counters.
fn is_sound(progress: &Progress) -> bool {
    let numbers = progress.epoch..END;
    numbers.contains(&progress.taken) && numbers.contains(&progress.written)
}

fn is_query(text: &str) -> bool {
    text.trim_start().starts_with(['q', 'Q'])
}

/// Cuts a reply into parts.
fn parts(request: u64, text: &str) -> Vec<Part> {
    let chunks: Vec<&[u8]> = text.as_bytes().chunks(SLOT_TEXT).collect();
    let last = chunks.len().saturating_sub(1);
    let part = |(at, text): (usize, &[u8])| {
        let first = if at == 0 { FIRST } else { 0 };
        let more = if at < last { MORE } else { 0 };
        Part { request, flags: first | more, text: text.to_vec() }
    };
    chunks.into_iter().enumerate().map(part).collect()
}
