//! Rewriting of a frame as the fast path does it: destination MAC, an IP address, a port, and the
//! checksums over them; also in the packet that an ICMP error quotes, which the fast path leaves to
//! the engine.
//!
//! Checksums are updated incrementally (RFC 1624), not recomputed, so a wrong one stays wrong; a
//! result of 0 is written as 0xffff, as `nft_csum_replace` does.

use crate::packet::{IpHeader, Packet, Quoted, checksum_offset, l3_offset};
use nfqd_shmctl::{Fragment, MacAddr, Protocol};
use std::net::IpAddr;

/// The address of the packet that is rewritten.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The source address.
    Source,
    /// The destination address.
    Destination,
}

/// Writes the destination MAC of a frame.
pub fn set_destination_mac(frame: &mut [u8], mac: MacAddr) {
    if let Some(bytes) = frame.get_mut(..6) {
        bytes.copy_from_slice(&mac.0);
    }
}

/// Writes an address of `packet`, which was read from `frame`, and with `port` its port, and
/// updates the checksums. Returns whether it could: the address must be of the packet's family, and
/// every byte to change must be inside the frame.
pub fn translate(
    frame: &mut [u8],
    packet: &Packet,
    side: Side,
    new: IpAddr,
    port: Option<u16>,
) -> bool {
    let Some(ip) = packet.ip.filter(|ip| ip.translatable && ip.source.is_ipv4() == new.is_ipv4())
    else {
        return false;
    };
    let l3 = l3_offset(frame);
    let checksum = l4_checksum(frame, &ip, l3);
    let Some(changes) =
        changes(&ip, side, new, port.filter(|_| ip.ports.is_some()), l3, l3 + ip.l4)
    else {
        return false;
    };
    if changes.iter().any(|change| frame.get(change.range()).is_none()) {
        return false;
    }
    for change in changes {
        let old = change.apply(frame);
        if change.part == EditedField::Address4 {
            update_checksum(frame, l3 + 10, &old, &change.new);
        }
        if let Some(checksum) = checksum {
            update_checksum(frame, checksum, &old, &change.new);
        }
    }
    true
}

/// Writes an address of the packet that an ICMP error quotes, and with `port` its port; updates the
/// quoted checksums, as far as they are quoted, and the error's own. `payload` begins with the IP
/// header of the error, which `ip` was read from.
pub fn translate_quoted(
    payload: &mut [u8],
    ip: &IpHeader,
    side: Side,
    new: IpAddr,
    port: Option<u16>,
) -> bool {
    let Some(quoted) = ip.quoted.filter(|quoted| quoted.source.is_ipv4() == new.is_ipv4()) else {
        return false;
    };
    let port = port.filter(|_| quoted.ports.is_some());
    let Some(changes) = changes(&quoted, side, new, port, quoted.l3, quoted.l4) else {
        return false;
    };
    if changes.iter().any(|change| payload.get(change.range()).is_none()) {
        return false;
    }
    let error = ip.l4 + 2;
    let transport = checksum_offset(quoted.protocol).map(|offset| quoted.l4 + offset);
    let transport = transport.filter(|&at| match payload.get(at..at + 2) {
        Some([0, 0]) => quoted.protocol != Protocol::UDP,
        Some(_) => true,
        None => false,
    });
    for change in changes {
        let old = change.apply(payload);
        update_checksum(payload, error, &old, &change.new);
        let header = (change.part == EditedField::Address4).then_some(quoted.l3 + 10);
        for at in header.into_iter().chain(transport) {
            let before = payload.get(at..at + 2).map(<[u8]>::to_vec).unwrap_or_default();
            update_checksum(payload, at, &old, &change.new);
            let after = payload.get(at..at + 2).map(<[u8]>::to_vec).unwrap_or_default();
            update_checksum(payload, error, &before, &after);
        }
    }
    true
}

/// The source and destination addresses of a packet, whole or quoted.
trait Addressed {
    fn address(&self, side: Side) -> IpAddr;
}

impl Addressed for IpHeader {
    fn address(&self, side: Side) -> IpAddr {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }
}

impl Addressed for Quoted {
    fn address(&self, side: Side) -> IpAddr {
        match side {
            Side::Source => self.source,
            Side::Destination => self.destination,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EditedField {
    Address4,
    Address6,
    Port,
}

/// Bytes to replace: an even number, at an even distance from the start of what a checksum covers.
struct ByteEdit {
    part: EditedField,
    at: usize,
    new: Vec<u8>,
}

impl ByteEdit {
    fn range(&self) -> std::ops::Range<usize> {
        self.at..self.at + self.new.len()
    }

    /// Replaces the bytes and returns the old ones.
    fn apply(&self, bytes: &mut [u8]) -> Vec<u8> {
        let Some(field) = bytes.get_mut(self.range()) else { return self.new.clone() };
        let old = field.to_vec();
        field.copy_from_slice(&self.new);
        old
    }
}

fn changes(
    of: &impl Addressed,
    side: Side,
    new: IpAddr,
    port: Option<u16>,
    l3: usize,
    l4: usize,
) -> Option<Vec<ByteEdit>> {
    let second = usize::from(side == Side::Destination);
    let address = match (of.address(side), new) {
        (IpAddr::V4(_), IpAddr::V4(new)) => ByteEdit {
            part: EditedField::Address4,
            at: l3 + 12 + 4 * second,
            new: new.octets().to_vec(),
        },
        (IpAddr::V6(_), IpAddr::V6(new)) => ByteEdit {
            part: EditedField::Address6,
            at: l3 + 8 + 16 * second,
            new: new.octets().to_vec(),
        },
        _ => return None,
    };
    let port = port.map(|port| ByteEdit {
        part: EditedField::Port,
        at: l4 + 2 * second,
        new: port.to_be_bytes().to_vec(),
    });
    Some([address].into_iter().chain(port).collect())
}

/// Returns the offset of the L4 checksum to update: none in later fragments, and none in UDP
/// packets without one.
fn l4_checksum(frame: &[u8], ip: &IpHeader, l3: usize) -> Option<usize> {
    if ip.fragment == Fragment::Later {
        return None;
    }
    let at = l3 + ip.l4 + checksum_offset(ip.protocol)?;
    let absent = ip.protocol == Protocol::UDP && frame.get(at..at + 2)? == [0, 0];
    (!absent).then_some(at)
}

/// RFC 1624, equation 3: HC' = ~(~HC + ~m + m'), in ones' complement.
fn update_checksum(frame: &mut [u8], at: usize, old: &[u8], new: &[u8]) {
    let Some(field) = frame.get_mut(at..at + 2) else { return };
    let words = |bytes: &[u8]| -> u32 {
        bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum()
    };
    let complement: Vec<u8> = old.iter().map(|byte| !byte).collect();
    let checksum = u16::from_be_bytes([field[0], field[1]]);
    let mut sum = u32::from(!checksum) + words(&complement) + words(new);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let updated = match !(sum as u16) {
        0 => 0xffff,
        updated => updated,
    };
    field.copy_from_slice(&updated.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{LaxNetSlice, LaxSlicedPacket, PacketBuilder, TransportSlice};
    use proptest::prelude::*;

    fn frame(v6: bool, udp: bool, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let builder = PacketBuilder::ethernet2([2; 6], [4; 6]);
        let builder = if v6 {
            builder.ipv6([1; 16], [2; 16], 9)
        } else {
            builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9)
        };
        if udp {
            builder.udp(53, 54).write(&mut out, payload)
        } else {
            builder.tcp(53, 54, 1, 2).write(&mut out, payload)
        }
        .unwrap();
        out
    }

    /// Whether etherparse, which computes them anew, agrees with all checksums of the frame.
    fn checksums_hold(frame: &[u8]) -> bool {
        let sliced = LaxSlicedPacket::from_ethernet(frame).unwrap();
        let transport = sliced.transport.unwrap();
        // In ones' complement 0 and 0xffff are equal; TCP may write either.
        let same = |a: u16, b: u16| a % 0xffff == b % 0xffff;
        match sliced.net.unwrap() {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header().to_header();
                header.calc_header_checksum() == header.header_checksum
                    && match transport {
                        TransportSlice::Tcp(tcp) => {
                            let computed =
                                tcp.calc_checksum_ipv4(header.source, header.destination);
                            same(computed.unwrap(), tcp.checksum())
                        }
                        TransportSlice::Udp(udp) => {
                            udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap()
                                == udp.checksum()
                        }
                        _ => false,
                    }
            }
            LaxNetSlice::Ipv6(ip) => {
                let header = ip.header().to_header();
                match transport {
                    TransportSlice::Tcp(tcp) => {
                        let computed = tcp.calc_checksum_ipv6(header.source, header.destination);
                        same(computed.unwrap(), tcp.checksum())
                    }
                    TransportSlice::Udp(udp) => {
                        udp.to_header().calc_checksum_ipv6(&header, udp.payload()).unwrap()
                            == udp.checksum()
                    }
                    _ => false,
                }
            }
            LaxNetSlice::Arp(_) => false,
        }
    }

    proptest! {
        #[test]
        fn mended_checksums_are_those_computed_anew(
            v6: bool, udp: bool, source: bool, address: [u8; 16], port: Option<u16>, payload in proptest::collection::vec(any::<u8>(), 0..40)
        ) {
            let mut bytes = frame(v6, udp, &payload);
            prop_assert!(checksums_hold(&bytes));
            let packet = Packet::from_frame(&bytes).unwrap();
            let new = if v6 { IpAddr::from(address) } else { IpAddr::from([address[0], address[1], address[2], address[3]]) };
            let side = if source { Side::Source } else { Side::Destination };
            prop_assert!(translate(&mut bytes, &packet, side, new, port));
            prop_assert!(checksums_hold(&bytes));
            let ip = Packet::from_frame(&bytes).unwrap().ip.unwrap();
            prop_assert_eq!(if source { ip.source } else { ip.destination }, new);
            let ports = ip.ports.unwrap();
            let (same, other) = if source { (ports.source, ports.destination) } else { (ports.destination, ports.source) };
            prop_assert_eq!((same, other), (port.unwrap_or(if source { 53 } else { 54 }), if source { 54 } else { 53 }));
        }
    }

    #[test]
    fn an_absent_udp_checksum_stays_absent_and_a_wrong_one_wrong() {
        let mut bytes = frame(false, true, b"x");
        let packet = Packet::from_frame(&bytes).unwrap();
        bytes[40..42].fill(0);
        assert!(translate(
            &mut bytes,
            &packet,
            Side::Destination,
            IpAddr::from([10, 0, 0, 9]),
            Some(7)
        ));
        assert_eq!(bytes[40..42], [0, 0]);
        let mut bytes = frame(false, true, b"x");
        bytes[40] ^= 1;
        assert!(translate(
            &mut bytes,
            &packet,
            Side::Destination,
            IpAddr::from([10, 0, 0, 9]),
            Some(7)
        ));
        assert!(!checksums_hold(&bytes));
    }

    #[test]
    fn the_other_family_is_rejected_and_nothing_changes() {
        let bytes = frame(false, true, b"x");
        let packet = Packet::from_frame(&bytes).unwrap();
        let mut changed = bytes.clone();
        assert!(!translate(&mut changed, &packet, Side::Source, IpAddr::from([1; 16]), None));
        assert_eq!(changed, bytes);
    }

    /// An error that quotes a whole packet, with all checksums right.
    fn error(v6: bool, quoted: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let builder = PacketBuilder::ethernet2([4; 6], [2; 6]);
        if v6 {
            builder.ipv6([3; 16], [1; 16], 9).icmpv6_raw(2, 0, [0, 0, 5, 0]).write(&mut out, quoted)
        } else {
            builder
                .ipv4([10, 0, 0, 3], [10, 0, 0, 1], 9)
                .icmpv4_raw(3, 4, [0, 0, 5, 0])
                .write(&mut out, quoted)
        }
        .unwrap();
        out
    }

    proptest! {
        #[test]
        fn quoted_packets_are_translated_as_packets_are(
            v6: bool, udp: bool, source: bool, address: [u8; 16], port: Option<u16>, cut in 8..40_usize
        ) {
            // A checksum that is cut in half cannot be updated.
            prop_assume!(cut != 17);
            let inner = frame(v6, udp, &[7; 30]);
            let new = if v6 { IpAddr::from(address) } else { IpAddr::from([address[0], address[1], address[2], address[3]]) };
            let side = if source { Side::Source } else { Side::Destination };
            let l4 = if v6 { 40 } else { 20 };
            let end = (14 + l4 + cut).min(inner.len());
            let mut bytes = error(v6, &inner[14..end]);
            let packet = Packet::from_frame(&bytes).unwrap();
            prop_assert!(translate_quoted(&mut bytes[14..], &packet.ip.unwrap(), side, new, port));
            let mut translated = inner.clone();
            let whole = Packet::from_frame(&inner).unwrap();
            prop_assert!(translate(&mut translated, &whole, side, new, port));
            prop_assert_eq!(&bytes[14 + l4 + 8..], &translated[14..end], "as the packet itself would be");
            // The error's own checksum is correct as well.
            let expected = error(v6, &translated[14..end]);
            let sum = |frame: &[u8]| u16::from_be_bytes([frame[14 + l4 + 2], frame[14 + l4 + 3]]) % 0xffff;
            prop_assert_eq!(sum(&bytes), sum(&expected));
            let quoted = Packet::from_frame(&bytes).unwrap().ip.unwrap().quoted.unwrap();
            prop_assert_eq!(if source { quoted.source } else { quoted.destination }, new);
        }
    }

    #[test]
    fn errors_without_a_quoted_packet_are_left_alone() {
        let bytes = error(false, &[1, 2, 3]);
        let mut changed = bytes.clone();
        let ip = Packet::from_frame(&bytes).unwrap().ip.unwrap();
        assert!(!translate_quoted(
            &mut changed[14..],
            &ip,
            Side::Source,
            IpAddr::from([10, 0, 0, 9]),
            None
        ));
        assert_eq!(changed, bytes);
    }
}
