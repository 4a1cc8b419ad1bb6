//! Counters of packets and bytes.

use std::iter::Sum;
use std::ops::{Add, AddAssign};

/// Packets and bytes, from the IP header on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counter {
    /// The number of packets.
    pub packets: u64,
    /// The number of bytes, from the IP header on.
    pub bytes: u64,
}

impl Counter {
    /// A counter of one packet of this length in bytes.
    pub fn of_packet(length: usize) -> Counter {
        Counter { packets: 1, bytes: length as u64 }
    }
}

impl Add for Counter {
    type Output = Counter;

    fn add(self, other: Counter) -> Counter {
        Counter { packets: self.packets + other.packets, bytes: self.bytes + other.bytes }
    }
}

impl AddAssign for Counter {
    fn add_assign(&mut self, other: Counter) {
        *self = *self + other;
    }
}

impl Sum for Counter {
    fn sum<I: Iterator<Item = Counter>>(counters: I) -> Counter {
        counters.fold(Counter::default(), Add::add)
    }
}
