//! The conversations that middleboxes themselves have begun, as the kernel remembers them (`own_…` in
//! `nft list ruleset`).

use nfqd_rules::packet::{IPV6_LEN, IpHeader, Packet, Ports};
use nfqd_rules::timeouts::{OWN_TCP_TIMEOUT, OWN_UDP_TIMEOUT};
use nfqd_shmctl::{Fragment, MacAddr, Protocol};
use std::collections::HashMap;
use std::net::IpAddr;

/// The conversations, with the second at which each is forgotten.
#[derive(Default)]
pub(super) struct OwnConversations(HashMap<Conversation, u32>);

/// The answers of a conversation.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Conversation {
    middlebox: MacAddr,
    source: IpAddr,
    destination: IpAddr,
    protocol: Protocol,
    ports: Ports,
}

impl OwnConversations {
    /// Remembers the conversation of a middlebox' own packet. TCP begins with a SYN.
    pub(super) fn remember(&mut self, packet: &Packet, now: u32) {
        const SYN: u8 = 2;
        const ACK: u8 = 16;
        let Some((ip, ports)) = header(packet) else { return };
        let answers = Conversation {
            middlebox: packet.link.source,
            source: ip.destination,
            destination: ip.source,
            protocol: ip.protocol,
            ports: Ports { source: ports.destination, destination: ports.source },
        };
        let is_tcp = ip.protocol == Protocol::TCP;
        let begins = ip.tcp_flags.is_some_and(|flags| flags & (SYN | ACK) == SYN) || !is_tcp;
        if begins || self.is_known(&answers, now) {
            let timeout = if is_tcp { OWN_TCP_TIMEOUT } else { OWN_UDP_TIMEOUT };
            self.0.insert(answers, now.saturating_add(timeout));
            if self.0.len() == self.0.capacity() {
                self.0.retain(|_, until| now < *until);
            }
        }
    }

    /// Whether a packet is an answer.
    pub(super) fn contains(&self, packet: &Packet, now: u32) -> bool {
        let Some((ip, ports)) = header(packet) else { return false };
        let answers = Conversation {
            middlebox: packet.link.destination,
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            ports,
        };
        self.is_known(&answers, now)
    }

    fn is_known(&self, answers: &Conversation, now: u32) -> bool {
        self.0.get(answers).is_some_and(|until| now < *until)
    }
}

/// Returns the headers of a packet of TCP or UDP that has them: whole, or a first fragment, without
/// IPv6 extension headers.
fn header(packet: &Packet) -> Option<(IpHeader, Ports)> {
    let ip = packet.ip?;
    let is_cached = ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP;
    let no_extensions = ip.source.is_ipv4() || ip.l4 == IPV6_LEN;
    let has_header =
        is_cached && no_extensions && ip.translatable && ip.fragment != Fragment::Later;
    ip.ports.filter(|_| has_header).map(|ports| (ip, ports))
}
