//! The guest's end of the rings.

use super::{
    CONSUMED, COUNTERS, COUNTERS_SIZE, CounterPage, DOORBELL, FIRST, GUEST, GuestSection, HEADER,
    MORE, PROGRESS, Progress, REPLIES, REQUESTS, SENT, SIZE, SLOT_HEADER, SLOT_SIZE, SLOT_TEXT,
    SLOTS, SlotHeader, WATCHED, fixed_header, slot,
};
use crate::language::reply::Reply;
use crate::region::{Region, RegionLock};
use crate::sender::{GaveUp, Patience, SendError, check_lengths, parse_reply};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The time that the host may take to follow a withdrawal: what it has begun comes first.
const WITHDRAWAL_TIME: Duration = Duration::from_secs(1);

/// Whether a region has rings of this version.
pub fn is_there(region: &Region) -> bool {
    if (region.size() as u64) < SIZE {
        return false;
    }
    let mut fixed = [0; PROGRESS - HEADER];
    region.read(HEADER, &mut fixed);
    fixed == fixed_header()
}

/// Rings the host, if the region has a doorbell.
pub(crate) fn ring_doorbell(region: &Region) {
    if is_there(region) {
        let mut number = [0; 4];
        region.read(DOORBELL, &mut number);
        region.ring(u32::from_le_bytes(number));
    }
}

/// Sends commands, as many at once as the ring holds, and adds their replies to `replies` in the
/// order of the commands. Requests not answered in time are withdrawn, so that they are not executed
/// later. The caller must hold the region's lock and have checked that it [has rings](is_there).
///
/// # Errors
/// See [`SendError`]; `replies` contains those received so far.
pub fn send_locked<'a>(
    region: &Region,
    _lock: &RegionLock,
    commands: &[String],
    patience: impl Into<Patience<'a>>,
    replies: &mut Vec<Reply>,
) -> Result<(), SendError> {
    check_lengths(commands)?;
    let patience = patience.into();
    for commands in commands.chunks(SLOTS as usize) {
        let deadline = Instant::now() + patience.timeout;
        let exchange = Exchange { region, patience, deadline, gave_up: Cell::new(None) };
        exchange.run(commands, replies).inspect_err(|_| exchange.withdraw())?;
    }
    Ok(())
}

/// Returns a copy of the counters, if one can be had, and has the host keep them up to date.
pub fn counters(region: &Region) -> Option<CounterPage> {
    // A page that is being written is complete at the next look.
    const LOOKS: usize = 100;
    let copy = || {
        let before = region.load_u64(COUNTERS);
        let mut page = [0; COUNTERS_SIZE];
        region.read(COUNTERS, &mut page);
        std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
        let after = region.load_u64(COUNTERS);
        CounterPage::parse(&page, after).filter(|_| before == after)
    };
    if !is_there(region) {
        return None;
    }
    region.store_u64(WATCHED, region.load_u64(WATCHED).wrapping_add(1));
    (0..LOOKS).find_map(|_| copy())
}

/// Requests and their replies, at most a ring full.
struct Exchange<'a> {
    region: &'a Region,
    patience: Patience<'a>,
    deadline: Instant,
    /// Why the requests were withdrawn, if they were.
    gave_up: Cell<Option<GaveUp>>,
}

impl Exchange<'_> {
    fn host(&self) -> Progress {
        let at = |offset| self.region.load_u64(PROGRESS + offset);
        // `reset` first: who sees it, sees the epoch that was written before it.
        let reset = at(24);
        Progress { epoch: at(0), taken: at(8), written: at(16), reset }
    }

    fn own(&self) -> GuestSection {
        let at = |offset| self.region.load_u64(GUEST + offset);
        GuestSection { reset: at(0), sent: at(8), consumed: at(16), watched: at(24) }
    }

    /// Waits until the reply slot is filled or the host starts a new epoch. On timeout or interruption,
    /// withdraws the outstanding requests.
    fn wait_for(&self, is_there: impl Fn() -> bool, epoch: u64) -> Result<(), SendError> {
        let reason = match self.gave_up.get() {
            Some(reason) => reason,
            None => {
                let is_over = || is_there() || self.host().epoch != epoch;
                let waited = self.patience.wait_for(self.deadline, is_over);
                let Err(reason) = waited else { return Ok(()) };
                self.gave_up.set(Some(reason));
                self.withdraw();
                reason
            }
        };
        // Commands that the host had begun to carry out are answered all the same, and then the withdrawal is
        // followed. The new epoch alone says nothing: the host writes it first.
        let is_followed = || self.host().reset == self.own().reset;
        let last_look = Patience { timeout: WITHDRAWAL_TIME, interrupted: None };
        let decided =
            last_look.wait_for(Instant::now() + WITHDRAWAL_TIME, || is_there() || is_followed());
        match decided {
            Err(_) => Err(SendError::Unanswered),
            Ok(()) if is_there() || !is_followed() => Ok(()),
            Ok(()) => Err(reason.error(self.patience.timeout)),
        }
    }

    /// Withdraws what is not answered yet, unless that has been done.
    fn withdraw(&self) {
        let reset = self.own().reset;
        if self.host().reset == reset {
            self.region.store_u64(GUEST, reset.wrapping_add(1));
            ring_doorbell(self.region);
        }
    }

    /// Takes over the rings as they are, or has the host begin anew. Returns the epoch and the number of
    /// the last request.
    fn take_over(&self) -> Result<(u64, u64), SendError> {
        let (host, own) = (self.host(), self.own());
        let is_settled = own.reset == host.reset;
        if is_settled && own.sent == host.taken && own.consumed == host.written {
            return Ok((host.epoch, own.sent));
        }
        let is_new = host.taken == host.epoch && host.written == host.epoch;
        if !(is_settled && is_new && own.sent < host.epoch) {
            let reset = if is_settled { own.reset.wrapping_add(1) } else { own.reset };
            self.region.store_u64(GUEST, reset);
            ring_doorbell(self.region);
            let is_followed = || self.host().reset == reset;
            let waited = self.patience.wait_for(self.deadline, is_followed);
            waited.map_err(|reason| reason.error(self.patience.timeout))?;
        }
        let epoch = self.host().epoch;
        self.region.store_u64(CONSUMED, epoch);
        self.region.store_u64(SENT, epoch);
        Ok((epoch, epoch))
    }

    fn run(&self, commands: &[String], replies: &mut Vec<Reply>) -> Result<(), SendError> {
        let (epoch, before) = self.take_over()?;
        let last = before + commands.len() as u64;
        for (number, command) in (before + 1..=last).zip(commands) {
            let length = command.len() as u32;
            let header = SlotHeader { number, length, flags: 0, request: 0 };
            let slot = slot(REQUESTS, epoch, number);
            self.region.write(slot, &header.with_text(command.as_bytes()));
        }
        self.region.store_u64(SENT, last);
        ring_doorbell(self.region);
        for number in before + 1..=last {
            replies.push(parse_reply(&self.receive(epoch, number)?)?);
        }
        Ok(())
    }

    /// Receives the reply to a request.
    fn receive(&self, epoch: u64, request: u64) -> Result<String, SendError> {
        let mut text = Vec::new();
        loop {
            let number = self.own().consumed.wrapping_add(1);
            let slot = slot(REPLIES, epoch, number);
            let is_there = || {
                // `written` first: who sees it, sees the slot.
                let host = self.host();
                let is_written = host.epoch != epoch || host.written.wrapping_sub(number) < SLOTS;
                is_written && self.region.load_u64(slot) == number
            };
            self.wait_for(is_there, epoch)?;
            if !is_there() {
                return Err(SendError::Reset);
            }
            let mut copy = [0; SLOT_SIZE];
            self.region.read(slot, &mut copy);
            self.region.store_u64(CONSUMED, number);
            let header = SlotHeader::parse(&copy);
            if header.request != request {
                let text = format!("a reply to request {}", header.request);
                return Err(SendError::NotAReply(text));
            }
            if header.flags & FIRST != 0 {
                text.clear();
            }
            let length = (header.length as usize).min(SLOT_TEXT);
            text.extend(copy.iter().skip(SLOT_HEADER).take(length));
            if header.flags & MORE == 0 {
                return Ok(String::from_utf8_lossy(&text).into_owned());
            }
            ring_doorbell(self.region);
        }
    }
}
