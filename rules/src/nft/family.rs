//! The IP families, and the kinds of flows that the kernel caches, with their fields and map names.

use super::field::{Field, Type, Value};
use super::model::{Statement, Write};
use crate::timeouts::{OWN_TCP_TIMEOUT, OWN_UDP_TIMEOUT, TCP_REPLY_TIMEOUT, UDP_REPLY_TIMEOUT};
use nfqd_shmctl::{EtherType, Protocol};
use std::net::IpAddr;

/// An IP family, with its fields and the suffix of its sets.
#[derive(Clone, Copy)]
pub(super) struct IpFamily {
    pub ether_type: EtherType,
    pub suffix: char,
    pub source: Field,
    pub destination: Field,
    pub address: Type,
}

pub(super) const IPV4: IpFamily = IpFamily {
    ether_type: EtherType::IPV4,
    suffix: '4',
    source: Field::Ip4Source,
    destination: Field::Ip4Destination,
    address: Type::Ip4,
};
pub(super) const IPV6: IpFamily = IpFamily {
    ether_type: EtherType::IPV6,
    suffix: '6',
    source: Field::Ip6Source,
    destination: Field::Ip6Destination,
    address: Type::Ip6,
};
pub(super) const FAMILIES: [IpFamily; 2] = [IPV4, IPV6];

impl IpFamily {
    pub(super) fn of(address: IpAddr) -> IpFamily {
        if address.is_ipv4() { IPV4 } else { IPV6 }
    }

    pub(super) fn is_ipv4(self) -> bool {
        self.suffix == '4'
    }

    /// Returns the name of the family's set of this kind.
    pub(super) fn name(self, set: &str) -> String {
        format!("{set}{}", self.suffix)
    }

    /// Matches packets of the family.
    pub(super) fn is(self) -> Statement {
        Statement::Is(Field::EtherType, Value::EtherType(self.ether_type))
    }

    /// Returns the writes that send a packet to the backend of its slot.
    pub(super) fn redirect_writes(self, ports: PortRewrite) -> Vec<Write> {
        let mut out = vec![
            Write { field: self.destination, map: self.name("backend_ip") },
            Write { field: Field::EtherDestination, map: "backend_mac".to_string() },
        ];
        if ports == PortRewrite::Translated {
            out.push(Write { field: Field::DestinationPort, map: "backend_port".to_string() });
        }
        out
    }

    /// Returns the writes that make a packet of a backend one of its slot's frontend.
    pub(super) fn reply_writes(self, ports: PortRewrite) -> Vec<Write> {
        let mut out = vec![Write { field: self.source, map: self.name("backend_vip") }];
        if ports == PortRewrite::Translated {
            out.push(Write { field: Field::SourcePort, map: "backend_vport".to_string() });
        }
        out
    }

    /// Returns ICMP of the family, the field of its type, the set of its error types, and the
    /// destination address in an error's quoted packet.
    pub(super) fn icmp_errors(self) -> (Protocol, Field, &'static str, Field) {
        if self.is_ipv4() {
            (Protocol::ICMP, Field::IcmpType, "icmp_errors", Field::QuotedIp4Destination)
        } else {
            (Protocol::ICMPV6, Field::Icmp6Type, "icmp6_errors", Field::QuotedIp6Destination)
        }
    }
}

/// Whether ports are rewritten beside addresses. The two kinds of flows have maps of their own,
/// because a rule performs all of its writes or none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PortRewrite {
    Kept,
    Translated,
}

pub(super) const PORT_REWRITES: [PortRewrite; 2] = [PortRewrite::Kept, PortRewrite::Translated];

impl PortRewrite {
    /// Returns the name of the chain for this kind.
    pub(super) fn chain(self, name: &str) -> String {
        match self {
            PortRewrite::Kept => name.to_string(),
            PortRewrite::Translated => format!("{name}_port"),
        }
    }

    pub(super) fn other(self) -> PortRewrite {
        match self {
            PortRewrite::Kept => PortRewrite::Translated,
            PortRewrite::Translated => PortRewrite::Kept,
        }
    }
}

/// A protocol whose flows the kernel caches.
#[derive(Clone, Copy)]
pub(super) struct CachedProtocol {
    pub protocol: Protocol,
    pub name: &'static str,
    pub checksum: Field,
    pub reply_timeout: u32,
    /// Lifetime of a conversation of the middlebox itself.
    pub own_timeout: u32,
}

pub(super) const TCP: CachedProtocol = CachedProtocol {
    protocol: Protocol::TCP,
    name: "tcp",
    checksum: Field::TcpChecksum,
    reply_timeout: TCP_REPLY_TIMEOUT,
    own_timeout: OWN_TCP_TIMEOUT,
};
pub(super) const UDP: CachedProtocol = CachedProtocol {
    protocol: Protocol::UDP,
    name: "udp",
    checksum: Field::UdpChecksum,
    reply_timeout: UDP_REPLY_TIMEOUT,
    own_timeout: OWN_UDP_TIMEOUT,
};
pub(super) const CACHED_PROTOCOLS: [CachedProtocol; 2] = [TCP, UDP];

impl CachedProtocol {
    /// Returns the name of the set of this kind for the protocol.
    pub(super) fn name(self, set: &str, ip: IpFamily) -> String {
        format!("{set}_{}{}", self.name, ip.suffix)
    }

    /// Returns the name of a map of flows.
    pub(super) fn map(self, map: &str, ports: PortRewrite, ip: IpFamily) -> String {
        self.name(&ports.chain(map), ip)
    }

    /// Matches whole packets of the protocol, as [`CachedProtocol::is_whole`] does; TCP only with
    /// none of these flags.
    pub(super) fn is_whole_without(self, ip: IpFamily, flags: u8) -> Vec<Statement> {
        let mut out = self.is_whole(ip);
        if self.protocol == Protocol::TCP {
            out.push(Statement::Masked(Field::TcpFlags, Value::Flags(flags), Value::Flags(0)));
        }
        out
    }

    /// Matches whole packets of the protocol that have the checksum which a rewrite updates.
    /// Fragments go to the engine, which keeps them together.
    pub(super) fn is_whole(self, ip: IpFamily) -> Vec<Statement> {
        let protocol = Value::Protocol(self.protocol);
        let mut out = vec![ip.is()];
        if ip.is_ipv4() {
            const MORE_OR_OFFSET: u16 = 0x3fff;
            out.push(Statement::Is(Field::Ip4FragmentOffset(MORE_OR_OFFSET), Value::Port(0)));
        } else {
            out.push(Statement::Is(Field::Ip6NextHeader, protocol));
        }
        out.push(Statement::Is(Field::L4Protocol, protocol));
        out.push(Statement::Present(self.checksum));
        out
    }

    /// Matches packets of the protocol that have its header, checksum included: whole ones and first
    /// fragments, without IPv6 extension headers.
    pub(super) fn has_header(self, ip: IpFamily) -> Vec<Statement> {
        const OFFSET: u16 = 0x1fff;
        let first = if ip.is_ipv4() {
            Statement::Is(Field::Ip4FragmentOffset(OFFSET), Value::Port(0))
        } else {
            Statement::Is(Field::Ip6NextHeader, Value::Protocol(self.protocol))
        };
        let is_protocol = Statement::Is(Field::L4Protocol, Value::Protocol(self.protocol));
        vec![ip.is(), first, is_protocol, Statement::Present(self.checksum)]
    }

    /// Matches packets of the protocol.
    pub(super) fn is(self, ip: IpFamily) -> Vec<Statement> {
        vec![ip.is(), Statement::Is(Field::L4Protocol, Value::Protocol(self.protocol))]
    }
}

/// Returns every cached protocol in every family.
pub(super) fn cached_flows() -> impl Iterator<Item = (IpFamily, CachedProtocol)> {
    let of = |ip: IpFamily| CACHED_PROTOCOLS.into_iter().map(move |protocol| (ip, protocol));
    FAMILIES.into_iter().flat_map(of)
}

/// Returns the key of a flow towards its backend. The middlebox is part of it, so that one guest
/// cannot make the kernel believe in a flow of another.
pub(super) fn flow_key(ip: IpFamily) -> Vec<Field> {
    vec![
        Field::EtherDestination,
        ip.source,
        ip.destination,
        Field::SourcePort,
        Field::DestinationPort,
    ]
}

/// Returns the key of a conversation of the middlebox itself, in its own packet: the [`flow_key`] of
/// the answers.
pub(super) fn own_key(ip: IpFamily) -> Vec<Field> {
    vec![Field::EtherSource, ip.destination, ip.source, Field::DestinationPort, Field::SourcePort]
}

/// Returns the key of a reply, in a packet of the backend.
pub(super) fn reply_key(ip: IpFamily) -> Vec<Field> {
    vec![ip.source, ip.destination, Field::SourcePort, Field::DestinationPort]
}

/// Returns the key of the reply, in a packet that has been rewritten on its way to the backend.
pub(super) fn reply_key_of_request(ip: IpFamily) -> Vec<Field> {
    vec![ip.destination, ip.source, Field::DestinationPort, Field::SourcePort]
}
