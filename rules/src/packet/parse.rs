//! Parsing of IPv4 headers, transport headers, and what ICMP errors quote.

use super::{EXTENSIONS, ICMP_ERRORS, IPV6_LEN, IpHeader, Ports, Quoted, TcpNumbers, u16_at};
use etherparse::{Ipv4HeaderSlice, Ipv6HeaderSlice};
use nfqd_shmctl::{Fragment, Protocol};

/// The protocols whose first four bytes are ports.
fn has_ports(protocol: Protocol) -> bool {
    matches!(protocol.0, 6 | 17 | 33 | 132 | 136)
}

fn ports(payload: &[u8], protocol: Protocol, l4: usize) -> Option<Ports> {
    if !has_ports(protocol) {
        return None;
    }
    Some(Ports { source: u16_at(payload, l4)?, destination: u16_at(payload, l4 + 2)? })
}

/// Parses the layer behind the IP header, unless it is a later fragment.
pub(super) struct TransportHeader {
    pub ports: Option<Ports>,
    pub source_port: Option<u16>,
    pub tcp_flags: Option<u8>,
    pub icmp_type: Option<u8>,
    pub icmp_code: Option<u8>,
}

pub(super) fn transport(
    payload: &[u8],
    protocol: Protocol,
    icmp: Protocol,
    fragment: Fragment,
    l4: usize,
) -> TransportHeader {
    const TCP_FLAGS: usize = 13;
    let first = fragment != Fragment::Later;
    let byte = |wanted: bool, at: usize| payload.get(l4 + at).copied().filter(|_| first && wanted);
    TransportHeader {
        ports: if first { ports(payload, protocol, l4) } else { None },
        source_port: if first && has_ports(protocol) { u16_at(payload, l4) } else { None },
        tcp_flags: byte(protocol == Protocol::TCP, TCP_FLAGS),
        icmp_type: byte(protocol == icmp, 0),
        icmp_code: byte(protocol == icmp, 1),
    }
}

/// Returns the offset in the L4 header of the checksum that covers the addresses, for the protocols
/// that `nft_payload_l4csum_offset` updates.
pub(crate) fn checksum_offset(protocol: Protocol) -> Option<usize> {
    match protocol {
        Protocol::TCP => Some(16),
        Protocol::UDP | Protocol::UDPLITE => Some(6),
        Protocol::ICMPV6 => Some(2),
        _ => None,
    }
}

/// Parses the packet that an ICMP error quotes; `l4` is the offset of its ICMP header.
pub(super) fn quoted(payload: &[u8], l4: usize, v4: bool) -> Option<Quoted> {
    const ICMP_HEADER: usize = 8;
    let l3 = l4 + ICMP_HEADER;
    let inner = payload.get(l3..)?;
    let (source, destination, protocol, len, later) = if v4 {
        let header = Ipv4HeaderSlice::from_slice(inner).ok()?;
        let later = header.fragments_offset().value() != 0;
        let (source, destination) = (header.source_addr().into(), header.destination_addr().into());
        (source, destination, Protocol(header.protocol().0), usize::from(header.ihl()) * 4, later)
    } else {
        let header = Ipv6HeaderSlice::from_slice(inner).ok()?;
        let (source, destination) = (header.source_addr().into(), header.destination_addr().into());
        (source, destination, Protocol(header.next_header().0), IPV6_LEN, false)
    };
    // The flow of a later fragment is unknown; so is one behind extension headers.
    if later || EXTENSIONS.contains(&protocol.0) && !v4 {
        return None;
    }
    let l4 = l3 + len;
    Some(Quoted { source, destination, protocol, ports: ports(payload, protocol, l4), l3, l4 })
}

pub(super) fn tcp_numbers(payload: &[u8], length: usize, l4: usize) -> Option<TcpNumbers> {
    let word = |at: usize| {
        let bytes = payload.get(l4 + at..l4 + at + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let &[data_offset, flags] = payload.get(l4 + 12..l4 + 14)? else { return None };
    let header = usize::from(data_offset >> 4) * 4;
    let turns = u32::from(flags & 1) + u32::from(flags >> 1 & 1);
    let length = length.saturating_sub(l4 + header) as u32 + turns;
    Some(TcpNumbers { sequence: word(4)?, acknowledgement: word(8)?, length })
}

pub(super) fn translatable(
    payload: &[u8],
    protocol: Protocol,
    fragment: Fragment,
    l4: usize,
) -> bool {
    match checksum_offset(protocol) {
        Some(offset) if fragment != Fragment::Later => u16_at(payload, l4 + offset).is_some(),
        _ => true,
    }
}

pub(super) fn ipv4(payload: &[u8], length: usize, gso: bool) -> Option<IpHeader> {
    let header = Ipv4HeaderSlice::from_slice(payload).ok()?;
    let header_len = usize::from(header.ihl()) * 4;
    let total_len = match usize::from(header.total_len()) {
        0 if gso => length,
        total_len => total_len,
    };
    if total_len > length || total_len < header_len {
        return None;
    }
    let protocol = Protocol(header.protocol().0);
    let fragment = match (header.fragments_offset().value(), header.more_fragments()) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    };
    let TransportHeader { ports, source_port, tcp_flags, icmp_type, icmp_code } =
        transport(payload, protocol, Protocol::ICMP, fragment, header_len);
    Some(IpHeader {
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        tos: *payload.get(1)?,
        length: u32::from(header.total_len()),
        protocol,
        fragment,
        nft_fragment: fragment,
        hides_transport: false,
        id: u32::from(header.identification()),
        ports,
        source_port,
        tcp_flags,
        icmp_type,
        icmp_code,
        l4: header_len,
        quoted: icmp_type
            .filter(|kind| ICMP_ERRORS.contains(kind) && fragment == Fragment::Whole)
            .and_then(|_| quoted(payload, header_len, true)),
        tcp_numbers: tcp_flags.and_then(|_| tcp_numbers(payload, total_len, header_len)),
        translatable: translatable(payload, protocol, fragment, header_len),
    })
}
