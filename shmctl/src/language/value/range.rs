//! Ranges of addresses and of numbers.

use super::{ParseValueError, decimal};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A range of addresses of one family, both ends included: one address, a prefix, or any other
/// range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

impl AddressRange {
    /// Returns the range from `first` to `last`, unless they are of two families or in the wrong
    /// order.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<AddressRange> {
        (first.is_ipv4() == last.is_ipv4() && first <= last).then_some(AddressRange { first, last })
    }

    /// Returns the addresses whose first `length` bits are those of `ip`.
    pub fn prefix(ip: IpAddr, length: u8) -> Option<AddressRange> {
        let length = u32::from(length);
        match ip {
            IpAddr::V4(ip) if length <= 32 => {
                let host = u32::MAX.checked_shr(length).unwrap_or(0);
                let (first, last) = (ip.to_bits() & !host, ip.to_bits() | host);
                AddressRange::new(
                    Ipv4Addr::from_bits(first).into(),
                    Ipv4Addr::from_bits(last).into(),
                )
            }
            IpAddr::V6(ip) if length <= 128 => {
                let host = u128::MAX.checked_shr(length).unwrap_or(0);
                let (first, last) = (ip.to_bits() & !host, ip.to_bits() | host);
                AddressRange::new(
                    Ipv6Addr::from_bits(first).into(),
                    Ipv6Addr::from_bits(last).into(),
                )
            }
            _ => None,
        }
    }

    /// Returns the first address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// Returns the last address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// Whether the addresses are IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.first.is_ipv4()
    }

    /// Whether an address is in the range.
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.is_ipv4() && self.first <= ip && ip <= self.last
    }
}

impl From<IpAddr> for AddressRange {
    fn from(ip: IpAddr) -> AddressRange {
        AddressRange { first: ip, last: ip }
    }
}

/// Parses `10.0.0.1`, `10.0.0.0/8` or `10.0.0.1-10.0.0.9`.
impl FromStr for AddressRange {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let address = |text: &str| text.parse::<IpAddr>().map_err(|_| ParseValueError);
        if let Some((ip, length)) = text.split_once('/') {
            return AddressRange::prefix(address(ip)?, decimal(length).ok_or(ParseValueError)?)
                .ok_or(ParseValueError);
        }
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        AddressRange::new(address(first)?, address(last)?).ok_or(ParseValueError)
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return self.first.fmt(f);
        }
        let same_bits = match (self.first, self.last) {
            (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
            _ => 0,
        };
        let length = u8::try_from(same_bits).unwrap_or_default();
        if AddressRange::prefix(self.first, length) == Some(*self) {
            write!(f, "{}/{length}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// A range of numbers, both ends included: ports, VLAN ids, lengths, ICMP types or codes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NumberRange {
    first: u16,
    last: u16,
}

impl NumberRange {
    /// Returns the range from `first` to `last`, unless they are in the wrong order.
    pub fn new(first: u16, last: u16) -> Option<NumberRange> {
        (first <= last).then_some(NumberRange { first, last })
    }

    /// Returns the first number.
    pub fn first(&self) -> u16 {
        self.first
    }

    /// Returns the last number.
    pub fn last(&self) -> u16 {
        self.last
    }

    /// Whether a number is in the range.
    pub fn contains(&self, number: u16) -> bool {
        (self.first..=self.last).contains(&number)
    }
}

/// Parses `80` or `80-90`.
impl FromStr for NumberRange {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        NumberRange::new(
            decimal(first).ok_or(ParseValueError)?,
            decimal(last).ok_or(ParseValueError)?,
        )
        .ok_or(ParseValueError)
    }
}

impl fmt::Display for NumberRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            self.first.fmt(f)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}
