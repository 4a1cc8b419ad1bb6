//! Parsing of IPv6 headers and extension headers, as nftables walks them.

use super::parse::{TransportHeader, quoted, tcp_numbers, translatable, transport};
use super::{
    DESTINATION, EXTENSIONS, FRAGMENT, HOP_BY_HOP, ICMP6_ERRORS, IPV6_LEN, IpHeader, ROUTING,
    u16_at,
};
use etherparse::Ipv6HeaderSlice;
use nfqd_shmctl::{Fragment, Protocol};

/// A header that may not follow the fragment header of a later fragment, besides [`EXTENSIONS`]: it
/// would be walked, too.
const AUTHENTICATION: u8 = 51;

/// A fragment header.
struct FragmentHeader {
    next: u8,
    offset: u16,
    id: u32,
}

/// The first fragment header of a chain, authentication headers included, as `ipv6_find_hdr` looks
/// for one.
fn fragment_behind(payload: &[u8], mut next: u8, mut at: usize) -> Option<FragmentHeader> {
    loop {
        let &[following, len] = payload.get(at..at + 2)? else { return None };
        let len = usize::from(len);
        at += match next {
            FRAGMENT => {
                let half = |at: usize| u32::from(u16_at(payload, at).unwrap_or(0));
                let id = half(at + 4) << 16 | half(at + 6);
                return Some(FragmentHeader {
                    next: following,
                    offset: u16_at(payload, at + 2)? & !7,
                    id,
                });
            }
            // The length of an authentication header is in units of four bytes, less two (RFC
            // 4302).
            AUTHENTICATION => (len + 2) * 4,
            ROUTING => {
                payload.get(at..at + 4)?;
                (len + 1) * 8
            }
            HOP_BY_HOP | DESTINATION => (len + 1) * 8,
            _ => return None,
        };
        next = following;
    }
}

pub(super) fn ipv6(payload: &[u8], length: usize) -> Option<IpHeader> {
    let header = Ipv6HeaderSlice::from_slice(payload).ok()?;
    if usize::from(header.payload_length()) + IPV6_LEN > length {
        return None;
    }
    let mut next = header.next_header().0;
    let mut at = IPV6_LEN;
    let mut fragment = Fragment::Whole;
    let mut nft_fragment = None;
    let mut hides_transport = false;
    let mut id = 0;
    // Each iteration advances by at least 8 bytes.
    while EXTENSIONS.contains(&next) {
        let &[following, len] = payload.get(at..at + 2)? else { return None };
        if next == ROUTING {
            payload.get(at..at + 4)?;
        }
        if next != FRAGMENT {
            next = following;
            at += (usize::from(len) + 1) * 8;
            continue;
        }
        let offset = u16_at(payload, at + 2)? & !7;
        id = u32::from(u16_at(payload, at + 4).unwrap_or(0)) << 16
            | u32::from(u16_at(payload, at + 6).unwrap_or(0));
        next = following;
        at += 8;
        let this = if offset == 0 { Fragment::First } else { Fragment::Later };
        hides_transport |= nft_fragment.is_none() && EXTENSIONS.contains(&next);
        nft_fragment.get_or_insert(this);
        if offset != 0 {
            fragment = Fragment::Later;
            // The kernel does not parse a later fragment whose next header is an extension header.
            if EXTENSIONS.contains(&next) || next == AUTHENTICATION {
                return None;
            }
            break;
        }
        fragment = Fragment::First;
    }
    if next == AUTHENTICATION && fragment == Fragment::Whole {
        // nftables stops here for the protocol, but searches on for a fragment header
        // (`nft_exthdr_ipv6_eval`).
        if let Some(found) = fragment_behind(payload, next, at) {
            fragment = if found.offset == 0 { Fragment::First } else { Fragment::Later };
            hides_transport = EXTENSIONS.contains(&found.next);
            id = found.id;
        }
    }
    // `thoff > U16_MAX` in the kernel.
    if at > usize::from(u16::MAX) {
        return None;
    }
    let protocol = Protocol(next);
    let TransportHeader { ports, source_port, tcp_flags, icmp_type, icmp_code } =
        transport(payload, protocol, Protocol::ICMPV6, fragment, at);
    Some(IpHeader {
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        tos: header.traffic_class(),
        length: u32::from(header.payload_length()) + IPV6_LEN as u32,
        protocol,
        fragment,
        nft_fragment: nft_fragment.unwrap_or(fragment),
        hides_transport,
        id,
        ports,
        source_port,
        tcp_flags,
        icmp_type,
        icmp_code,
        l4: at,
        quoted: icmp_type
            .filter(|kind| ICMP6_ERRORS.contains(kind) && fragment == Fragment::Whole)
            .and_then(|_| quoted(payload, at, false)),
        tcp_numbers: tcp_flags.and_then(|_| {
            tcp_numbers(payload, usize::from(header.payload_length()) + IPV6_LEN, at)
        }),
        translatable: translatable(payload, protocol, fragment, at),
    })
}
