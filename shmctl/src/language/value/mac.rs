//! Ethernet addresses and masks of them.

use super::ParseValueError;
use std::fmt;
use std::str::FromStr;

/// A 48-bit Ethernet address, in the order of the bytes on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether the address can be that of one station: it is not all zeros, and the group bit (IEEE
    /// 802, the lowest bit of the first byte) is off.
    pub fn is_station(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }

    /// Whether this is the address of a group of stations, such as all (IEEE 802, section 8.2).
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    fn and(self, mask: MacAddr) -> MacAddr {
        let mut out = self.0;
        out.iter_mut().zip(mask.0).for_each(|(byte, mask)| *byte &= mask);
        MacAddr(out)
    }
}

/// Parses six hexadecimal bytes, of one or two digits each, between colons.
impl FromStr for MacAddr {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or(ParseValueError)?;
            let digits = matches!(part.len(), 1 | 2) && part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = if digits {
                u8::from_str_radix(part, 16).map_err(|_| ParseValueError)?
            } else {
                return Err(ParseValueError);
            };
        }
        parts.next().is_none().then_some(MacAddr(bytes)).ok_or(ParseValueError)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A set of MAC addresses that have some bits in common.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MacMask {
    bits: MacAddr,
    mask: MacAddr,
}

impl MacMask {
    const EXACT: MacAddr = MacAddr([0xff; 6]);

    /// Returns the addresses that equal `mac` where `mask` has ones.
    pub fn new(mac: MacAddr, mask: MacAddr) -> MacMask {
        MacMask { bits: mac.and(mask), mask }
    }

    /// Returns the bits that are compared.
    pub fn mask(&self) -> MacAddr {
        self.mask
    }

    /// Returns the values of these bits.
    pub fn bits(&self) -> MacAddr {
        self.bits
    }

    /// Returns the address, if there is only one.
    pub fn exact(&self) -> Option<MacAddr> {
        (self.mask == MacMask::EXACT).then_some(self.bits)
    }

    /// Whether an address is in the set.
    pub fn contains(&self, mac: MacAddr) -> bool {
        mac.and(self.mask) == self.bits
    }
}

impl From<MacAddr> for MacMask {
    fn from(mac: MacAddr) -> MacMask {
        MacMask { bits: mac, mask: MacMask::EXACT }
    }
}

/// Parses `02:00:00:00:00:01` or `02:00:00:00:00:00/ff:ff:ff:00:00:00`.
impl FromStr for MacMask {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        match text.split_once('/') {
            Some((mac, mask)) => Ok(MacMask::new(mac.parse()?, mask.parse()?)),
            None => Ok(text.parse::<MacAddr>()?.into()),
        }
    }
}

impl fmt::Display for MacMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bits.fmt(f)?;
        if self.exact().is_some() { Ok(()) } else { write!(f, "/{}", self.mask) }
    }
}
