//! The words of the command language, parsed into types that hold only valid values.

mod fragment;
mod mac;
mod protocol;
mod range;
mod tcp_flags;
#[cfg(test)]
mod tests;

pub use fragment::{Fragment, FragmentMatch};
pub use mac::{MacAddr, MacMask};
pub use protocol::{EtherType, Protocol};
pub(crate) use protocol::{ICMP_TYPES, ICMP6_TYPES, named_range};
pub use range::{AddressRange, NumberRange};
pub use tcp_flags::TcpFlags;

use std::str::FromStr;

/// The error of a word that is not a value of the type it was parsed as. The caller, who knows the
/// word's place in the command, names what was expected.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, thiserror::Error)]
#[error("not a value of this type")]
pub struct ParseValueError;

/// Parses plain decimal digits: no sign, no blanks, nothing that does not fit.
pub(crate) fn decimal<T: FromStr>(text: &str) -> Option<T> {
    (!text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Parses a byte in decimal or, behind `0x`, in hexadecimal.
pub(crate) fn number(text: &str) -> Option<u8> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if hex.len() <= 2 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
            u8::from_str_radix(hex, 16).ok()
        }
        Some(_) => None,
        None => decimal(text),
    }
}
