//! Changes addresses in a frame the way the fast path does: destination MAC, an IP address, and the checksums over it.
//!
//! Checksums are mended by difference (RFC 1624), not made anew, so a wrong one stays wrong; a result of 0 is written
//! as 0xffff, as `nft_csum_replace` does.

use crate::packet::{Fragment, Ip, Packet, checksum_offset, l3_offset};
use nfqd_shmctl::{MacAddr, Protocol};
use std::net::IpAddr;

/// Which address of the packet changes.
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

/// Writes an address of `packet`, which was read from `frame`, and mends the checksums. Says whether it could: the
/// address must be of the packet's family, and the checksums inside the frame.
pub fn set_address(frame: &mut [u8], packet: &Packet, side: Side, new: IpAddr) -> bool {
    let Some(ip) = packet.ip.filter(|ip| ip.mendable && ip.source.is_ipv4() == new.is_ipv4()) else {
        return false;
    };
    let l3 = l3_offset(frame);
    let old = match side {
        Side::Source => ip.source,
        Side::Destination => ip.destination,
    };
    let (offset, old, new) = match (old, new) {
        (IpAddr::V4(old), IpAddr::V4(new)) => (12, old.octets().to_vec(), new.octets().to_vec()),
        (IpAddr::V6(old), IpAddr::V6(new)) => (8, old.octets().to_vec(), new.octets().to_vec()),
        _ => return false,
    };
    let at = l3 + offset + if side == Side::Destination { new.len() } else { 0 };
    let Some(bytes) = frame.get_mut(at..at + new.len()) else { return false };
    bytes.copy_from_slice(&new);
    if new.len() == 4 {
        mend(frame, l3 + 10, &old, &new);
    }
    if let Some(checksum) = l4_checksum(frame, &ip, l3) {
        mend(frame, checksum, &old, &new);
    }
    true
}

/// Where the L4 checksum to mend is: none in later fragments, none in UDP packets that carry none.
fn l4_checksum(frame: &[u8], ip: &Ip, l3: usize) -> Option<usize> {
    if ip.fragment == Fragment::Later {
        return None;
    }
    let at = l3 + ip.l4 + checksum_offset(ip.protocol)?;
    let absent = ip.protocol == Protocol::UDP && frame.get(at..at + 2)? == [0, 0];
    (!absent).then_some(at)
}

/// RFC 1624, equation 3: HC' = ~(~HC + ~m + m'), in ones' complement.
fn mend(frame: &mut [u8], at: usize, old: &[u8], new: &[u8]) {
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
    let mended = match !(sum as u16) {
        0 => 0xffff,
        mended => mended,
    };
    field.copy_from_slice(&mended.to_be_bytes());
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

    /// Whether etherparse, computing anew, agrees with all checksums of the frame.
    fn checksums_hold(frame: &[u8]) -> bool {
        let sliced = LaxSlicedPacket::from_ethernet(frame).unwrap();
        let transport = sliced.transport.unwrap();
        // In ones' complement 0 and 0xffff are one number; TCP may write either.
        let same = |a: u16, b: u16| a % 0xffff == b % 0xffff;
        match sliced.net.unwrap() {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header().to_header();
                header.calc_header_checksum() == header.header_checksum
                    && match transport {
                        TransportSlice::Tcp(tcp) => {
                            let computed = tcp.calc_checksum_ipv4(header.source, header.destination);
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
                        udp.to_header().calc_checksum_ipv6(&header, udp.payload()).unwrap() == udp.checksum()
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
            v6: bool, udp: bool, source: bool, address: [u8; 16], payload in proptest::collection::vec(any::<u8>(), 0..40)
        ) {
            let mut bytes = frame(v6, udp, &payload);
            prop_assert!(checksums_hold(&bytes));
            let packet = Packet::from_frame(&bytes).unwrap();
            let new = if v6 { IpAddr::from(address) } else { IpAddr::from([address[0], address[1], address[2], address[3]]) };
            let side = if source { Side::Source } else { Side::Destination };
            prop_assert!(set_address(&mut bytes, &packet, side, new));
            prop_assert!(checksums_hold(&bytes));
            let ip = Packet::from_frame(&bytes).unwrap().ip.unwrap();
            prop_assert_eq!(if source { ip.source } else { ip.destination }, new);
        }
    }

    #[test]
    fn an_absent_udp_checksum_stays_absent_and_a_wrong_one_wrong() {
        let mut bytes = frame(false, true, b"x");
        let packet = Packet::from_frame(&bytes).unwrap();
        bytes[40..42].fill(0);
        assert!(set_address(&mut bytes, &packet, Side::Destination, IpAddr::from([10, 0, 0, 9])));
        assert_eq!(bytes[40..42], [0, 0]);
        let mut bytes = frame(false, true, b"x");
        bytes[40] ^= 1;
        assert!(set_address(&mut bytes, &packet, Side::Destination, IpAddr::from([10, 0, 0, 9])));
        assert!(!checksums_hold(&bytes));
    }

    #[test]
    fn the_other_family_is_refused_and_nothing_changes() {
        let bytes = frame(false, true, b"x");
        let packet = Packet::from_frame(&bytes).unwrap();
        let mut changed = bytes.clone();
        assert!(!set_address(&mut changed, &packet, Side::Source, IpAddr::from([1; 16])));
        assert_eq!(changed, bytes);
    }
}
