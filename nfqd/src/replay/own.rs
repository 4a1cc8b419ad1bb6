//! The conversations that middleboxes themselves have begun, as the kernel remembers them (`own_…` in
//! `nft list ruleset`).

use nfqd_rules::packet::{IPV6_LEN, IpHeader, Packet, Ports};
use nfqd_rules::timeouts::{OWN_TCP_SHORT_TIMEOUT, OWN_TCP_TIMEOUT, OWN_UDP_TIMEOUT};
use nfqd_shmctl::{Fragment, MacAddr, Protocol};
use std::collections::HashMap;
use std::net::IpAddr;

/// The conversations.
#[derive(Default)]
pub(super) struct OwnConversations(HashMap<Conversation, Lifetime>);

/// The seconds at which a conversation is forgotten: one that goes on, and one that has ended.
#[derive(Clone, Copy, Default)]
struct Lifetime {
    open: u32,
    closing: u32,
}

impl Lifetime {
    fn is_over(self, now: u32) -> bool {
        now >= self.open && now >= self.closing
    }
}

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
    /// Remembers the conversation of a middlebox' own packet. TCP begins with a SYN, and ends with a
    /// FIN or RST.
    pub(super) fn remember(&mut self, packet: &Packet, now: u32) {
        const FIN: u8 = 1;
        const SYN: u8 = 2;
        const RST: u8 = 4;
        const ACK: u8 = 16;
        let Some((ip, ports)) = header(packet) else { return };
        let answers = Conversation {
            middlebox: packet.link.source,
            source: ip.destination,
            destination: ip.source,
            protocol: ip.protocol,
            ports: Ports { source: ports.destination, destination: ports.source },
        };
        let mut lifetime = self.0.get(&answers).copied().unwrap_or_default();
        let (is_open, is_closing) = (now < lifetime.open, now < lifetime.closing);
        let flags = ip.tcp_flags.filter(|_| ip.protocol == Protocol::TCP);
        let after = |seconds| now.saturating_add(seconds);
        match flags {
            None if ip.protocol == Protocol::TCP => return,
            None => lifetime.open = after(OWN_UDP_TIMEOUT),
            Some(flags) if flags & (SYN | ACK) == SYN => {
                lifetime.open = after(OWN_TCP_SHORT_TIMEOUT);
            }
            Some(flags) if flags & (FIN | RST) == 0 && is_open => {
                lifetime.open = after(OWN_TCP_TIMEOUT);
            }
            Some(_) if is_open || is_closing => {
                lifetime = Lifetime { open: 0, closing: after(OWN_TCP_SHORT_TIMEOUT) };
            }
            Some(_) => return,
        }
        self.0.insert(answers, lifetime);
        if self.0.len() == self.0.capacity() {
            self.0.retain(|_, lifetime| !lifetime.is_over(now));
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
        self.0.get(&answers).is_some_and(|lifetime| !lifetime.is_over(now))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment of the middlebox (`from` is 1) or to it, with these flags.
    fn segment(from: u8, flags: u8) -> Packet {
        let to = 3 - from;
        let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0, 0x45, 0, 0, 40];
        frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, from, 10, 0, 0, to]);
        let [port, other] = if from == 1 { [[0x80, 0], [0, 80]] } else { [[0, 80], [0x80, 0]] };
        frame.extend(port);
        frame.extend(other);
        frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        Packet::from_frame(&frame).unwrap()
    }

    const FIN_ACK: u8 = 17;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;

    /// Returns whether an answer at a time is one of the middlebox, after its segments.
    fn is_own(segments: &[(u32, u8)], now: u32) -> bool {
        let mut own = OwnConversations::default();
        for (at, flags) in segments {
            own.remember(&segment(1, *flags), *at);
        }
        own.contains(&segment(2, ACK), now)
    }

    #[test]
    fn a_conversation_is_kept_for_long_only_between_its_beginning_and_its_end() {
        assert!(!is_own(&[(0, ACK)], 0) && !is_own(&[(0, FIN_ACK)], 0) && !is_own(&[(0, RST)], 0));
        assert!(is_own(&[(0, SYN)], 119) && !is_own(&[(0, SYN)], 120));
        assert!(!is_own(&[(0, SYN), (100, SYN)], 220), "a second SYN opens nothing");
        assert!(is_own(&[(0, SYN), (1, ACK)], 7440) && !is_own(&[(0, SYN), (1, ACK)], 7441));
        for end in [FIN_ACK, RST] {
            let ended = [(0, SYN), (1, ACK), (50, end)];
            assert!(is_own(&ended, 169) && !is_own(&ended, 170), "{end}");
            // The last segment, or those of a half-closed connection.
            let acknowledged = [&ended[..], &[(51, ACK), (150, ACK)]].concat();
            assert!(is_own(&acknowledged, 269) && !is_own(&acknowledged, 270), "{end}");
            // The same addresses and ports again.
            let again = [&ended[..], &[(60, SYN), (61, ACK)]].concat();
            assert!(is_own(&again, 7000), "{end}");
            let ended_again = [&again[..], &[(70, end)]].concat();
            assert!(is_own(&ended_again, 189) && !is_own(&ended_again, 190), "{end}");
        }
    }
}
