//! A status in the making: a slice at a time, so that commands do not wait for that of thousands of
//! middleboxes.

use super::control_socket::ClientId;
use super::status::StatusSource;
use crate::api::{Status, StatusLine};
use nfqd_rules::MiddleboxKey;
use std::ops::Bound;
use std::time::{Duration, Instant};

/// The longest slice.
const SLICE: Duration = Duration::from_micros(500);

/// A status in the making, and the clients that wait for it.
pub struct Report {
    clients: Vec<ClientId>,
    line: StatusLine,
    next: Bound<MiddleboxKey>,
    /// The time that the slices have taken.
    pub busy: Duration,
}

impl Report {
    /// Begins with everything but the middleboxes. `size` is the expected length in bytes.
    pub fn new(status: Status, clients: Vec<ClientId>, size: usize) -> Report {
        let line = StatusLine::new(status, size);
        Report { clients, line, next: Bound::Unbounded, busy: Duration::ZERO }
    }

    /// Adds middleboxes for the time of a slice. Returns whether all are there.
    pub fn proceed(&mut self, source: &StatusSource<'_>) -> bool {
        let start = Instant::now();
        let mut is_complete = true;
        for key in source.keys_from(self.next) {
            if let Some(middlebox) = source.middlebox(key) {
                self.line.push(&middlebox);
            }
            self.next = Bound::Excluded(key);
            if start.elapsed() >= SLICE {
                is_complete = false;
                break;
            }
        }
        self.busy += start.elapsed();
        is_complete
    }

    /// Returns the clients that wait for it.
    pub fn clients(&self) -> &[ClientId] {
        &self.clients
    }

    /// Returns the answer as a line of the protocol, and the clients that wait for it.
    pub fn finish(self) -> (Vec<u8>, Vec<ClientId>) {
        (self.line.finish(), self.clients)
    }
}
