//! The page of counters that a guest reads without asking.

use super::{COUNTERS_SIZE, array, u64_at};
use crate::language::value::MacAddr;

/// The counters of a channel's middleboxes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CounterPage {
    /// Nanoseconds since 1970.
    pub time: u64,
    /// The middleboxes; those beyond [`CounterPage::MOST`] are left out.
    pub middleboxes: Vec<MiddleboxCounters>,
}

/// The counters of a middlebox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MiddleboxCounters {
    /// The MAC.
    pub mac: MacAddr,
    /// Whether it has a firewall.
    pub has_firewall: bool,
    /// Whether it has services.
    pub has_services: bool,
    /// Packets to it.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that its rules, or its default, have denied.
    pub denied: u64,
    /// Packets that went to backends.
    pub redirected: u64,
    /// The backends of all its services.
    pub backends: u32,
    /// The dead ones among the backends.
    pub dead: u32,
}

const ENTRIES: usize = 64;
const ENTRY_SIZE: usize = 64;

impl CounterPage {
    /// The most middleboxes of a page.
    pub const MOST: usize = (COUNTERS_SIZE - ENTRIES) / ENTRY_SIZE;

    /// Returns the bytes of the page behind its sequence.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let count = self.middleboxes.len().min(CounterPage::MOST);
        let mut out = self.time.to_le_bytes().to_vec();
        out.extend((count as u32).to_le_bytes());
        out.extend(((self.middleboxes.len() - count) as u32).to_le_bytes());
        out.resize(ENTRIES - 8, 0);
        for middlebox in self.middleboxes.iter().take(count) {
            let flags = u16::from(middlebox.has_firewall) | u16::from(middlebox.has_services) << 1;
            out.extend(middlebox.mac.0);
            out.extend(flags.to_le_bytes());
            let MiddleboxCounters { packets, bytes, denied, redirected, .. } = *middlebox;
            let numbers = [packets, bytes, denied, redirected];
            out.extend(numbers.into_iter().flat_map(u64::to_le_bytes));
            out.extend(middlebox.backends.to_le_bytes());
            out.extend(middlebox.dead.to_le_bytes());
            out.extend([0; 16]);
        }
        out.resize(COUNTERS_SIZE - 8, 0);
        out
    }

    /// Parses a copy of the page. Returns `None` if it was being written.
    pub(super) fn parse(page: &[u8; COUNTERS_SIZE], sequence_after: u64) -> Option<CounterPage> {
        let sequence = u64_at(page, 0);
        if sequence != sequence_after || sequence % 2 == 1 {
            return None;
        }
        let count = u32::from_le_bytes(array(page, 16)) as usize;
        let entries = page.get(ENTRIES..).unwrap_or_default().chunks(ENTRY_SIZE).take(count);
        let entry = |entry: &[u8]| {
            let flags = u16::from_le_bytes(array(entry, 6));
            MiddleboxCounters {
                mac: MacAddr(array(entry, 0)),
                has_firewall: flags & 1 != 0,
                has_services: flags & 2 != 0,
                packets: u64_at(entry, 8),
                bytes: u64_at(entry, 16),
                denied: u64_at(entry, 24),
                redirected: u64_at(entry, 32),
                backends: u32::from_le_bytes(array(entry, 40)),
                dead: u32::from_le_bytes(array(entry, 44)),
            }
        };
        Some(CounterPage { time: u64_at(page, 8), middleboxes: entries.map(entry).collect() })
    }
}
