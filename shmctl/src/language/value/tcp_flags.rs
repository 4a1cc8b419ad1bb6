//! TCP flags as a filter compares them.

use super::ParseValueError;
use std::fmt;
use std::str::FromStr;

/// A test of TCP flags (RFC 9293, RFC 3168): the flags that are compared, at least one, and those
/// of them that must be on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TcpFlags {
    on: u8,
    mask: u8,
}

/// The names of the flags, from the lowest bit of byte 13 of the TCP header.
const TCP_FLAGS: [&str; 8] = ["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr"];

impl TcpFlags {
    /// Returns the test that of the flags in `mask` those in `on` are on; `None` if `mask` is empty
    /// or lacks one of them.
    pub fn new(on: u8, mask: u8) -> Option<TcpFlags> {
        (mask != 0 && on & !mask == 0).then_some(TcpFlags { on, mask })
    }

    /// Returns the flags that must be on.
    pub fn on(&self) -> u8 {
        self.on
    }

    /// Returns the flags that are compared.
    pub fn mask(&self) -> u8 {
        self.mask
    }

    /// Whether the flags of a header pass the test.
    pub fn contains(&self, flags: u8) -> bool {
        flags & self.mask == self.on
    }

    fn read(text: &str) -> Option<u8> {
        match text.to_ascii_lowercase().as_str() {
            "none" => return Some(0),
            "all" => return Some(u8::MAX),
            _ => {}
        }
        text.split(',').try_fold(0, |flags, word| {
            let at = TCP_FLAGS.iter().position(|name| name.eq_ignore_ascii_case(word))?;
            Some(flags | 1 << at)
        })
    }

    fn text(flags: u8) -> String {
        match flags {
            0 => "none".to_string(),
            u8::MAX => "all".to_string(),
            _ => {
                let on = TCP_FLAGS.iter().enumerate().filter(|(at, _)| flags & 1 << at != 0);
                on.map(|(_, name)| *name).collect::<Vec<_>>().join(",")
            }
        }
    }
}

/// Parses `syn,ack` (these are on) or `syn/syn,ack` (of these two, only this one is on). `none`
/// alone means no flag at all.
impl FromStr for TcpFlags {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let (on, mask) = match text.split_once('/') {
            Some((on, mask)) => (
                TcpFlags::read(on).ok_or(ParseValueError)?,
                TcpFlags::read(mask).ok_or(ParseValueError)?,
            ),
            None => {
                let on = TcpFlags::read(text).ok_or(ParseValueError)?;
                (on, if on == 0 { u8::MAX } else { on })
            }
        };
        TcpFlags::new(on, mask).ok_or(ParseValueError)
    }
}

impl fmt::Display for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&TcpFlags::text(self.on))?;
        let short = self.mask == if self.on == 0 { u8::MAX } else { self.on };
        if short { Ok(()) } else { write!(f, "/{}", TcpFlags::text(self.mask)) }
    }
}
