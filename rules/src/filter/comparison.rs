//! Comparison of a packet with the conditions of a rule, field by field, for people.

use super::Conditions;
use crate::packet::Packet;
use std::fmt::Display;

/// The comparison of one field of a packet with the condition of a rule on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Comparison {
    /// The field.
    pub field: &'static str,
    /// The values that match.
    pub wanted: String,
    /// The packet's value; `None` if it has no such field.
    pub found: Option<String>,
    /// Whether it matches.
    pub matches: bool,
}

impl Conditions {
    /// Compares a packet with all conditions. It meets them if every comparison matches: the same as
    /// [`match_packet`](Conditions::match_packet) says, which is quicker.
    pub fn compare(&self, packet: &Packet) -> Vec<Comparison> {
        let mut out = Vec::new();
        let link = &packet.link;
        field(&mut out, "source MAC", self.source_mac, Some(link.source), |mask, mac| {
            mask.contains(*mac)
        });
        field(&mut out, "VLAN id", self.vlan, link.vlan_id(), |range, id| range.contains(*id));
        equal(&mut out, "EtherType", self.ether_type, link.ether_type);
        let ip = packet.ip.as_ref();
        let source = ip.map(|ip| ip.source);
        field(&mut out, "source address", self.source, source, |range, ip| range.contains(*ip));
        let destination = ip.map(|ip| ip.destination);
        field(&mut out, "destination address", self.destination, destination, |range, ip| {
            range.contains(*ip)
        });
        equal(&mut out, "TOS or traffic class", self.tos, ip.map(|ip| ip.tos));
        field(&mut out, "length", self.length, ip.map(|ip| ip.length), |range, length| {
            u16::try_from(*length).is_ok_and(|length| range.contains(length))
        });
        if let Some(wanted) = self.fragment {
            out.push(Comparison {
                field: "position in a fragmented datagram",
                wanted: wanted.to_string(),
                found: ip.map(|ip| format!("{:?}", ip.nft_fragment).to_lowercase()),
                matches: ip.is_some_and(|ip| wanted.contains(ip.nft_fragment)),
            });
        }
        equal(&mut out, "protocol", self.protocol, ip.map(|ip| ip.protocol));
        let port = ip.and_then(|ip| ip.source_port);
        field(&mut out, "source port", self.source_port, port, |range, port| range.contains(*port));
        let port = ip.and_then(|ip| ip.ports).map(|ports| ports.destination);
        field(&mut out, "destination port", self.destination_port, port, |range, port| {
            range.contains(*port)
        });
        if let Some(wanted) = self.tcp_flags {
            let found = ip.and_then(|ip| ip.tcp_flags);
            out.push(Comparison {
                field: "TCP flags",
                wanted: wanted.to_string(),
                found: found.map(|flags| format!("0x{flags:02x}")),
                matches: found.is_some_and(|flags| wanted.contains(flags)),
            });
        }
        let kind = ip.and_then(|ip| ip.icmp_type).map(u16::from);
        field(&mut out, "ICMP type", self.icmp_type, kind, |range, kind| range.contains(*kind));
        let code = ip.and_then(|ip| ip.icmp_code).map(u16::from);
        field(&mut out, "ICMP code", self.icmp_code, code, |range, code| range.contains(*code));
        out
    }
}

fn field<W: Display, F: Display>(
    out: &mut Vec<Comparison>,
    field: &'static str,
    wanted: Option<W>,
    found: Option<F>,
    is_match: impl Fn(&W, &F) -> bool,
) {
    let Some(wanted) = wanted else { return };
    let matches = found.as_ref().is_some_and(|found| is_match(&wanted, found));
    let (wanted, found) = (wanted.to_string(), found.map(|found| found.to_string()));
    out.push(Comparison { field, wanted, found, matches });
}

fn equal<T: Display + PartialEq>(
    out: &mut Vec<Comparison>,
    name: &'static str,
    wanted: Option<T>,
    found: Option<T>,
) {
    field(out, name, wanted, found, |wanted, found| wanted == found);
}

#[cfg(test)]
mod tests {
    use crate::packet::Packet;
    use crate::policy::Policy;
    use crate::{MiddleboxKey, NetworkId};
    use etherparse::PacketBuilder;
    use nfqd_shmctl::MacAddr;

    /// Every field is compared as `match_packet` compares it: rules that match and that just do not.
    #[test]
    fn a_comparison_agrees_with_the_match() {
        let mac = MacAddr([2, 0, 0, 0, 0, 1]);
        let mut tcp = Vec::new();
        let builder = PacketBuilder::ethernet2([4; 6], mac.0).single_vlan(7.try_into().unwrap());
        let builder = builder.ipv4([10, 0, 0, 1], [10, 0, 0, 9], 9).tcp(1000, 80, 1, 9).syn();
        builder.write(&mut tcp, b"x").unwrap();
        let mut icmp = Vec::new();
        let builder = PacketBuilder::ethernet2([4; 6], mac.0).ipv4([10, 0, 0, 1], [10, 0, 0, 9], 9);
        builder.icmpv4_echo_request(1, 2).write(&mut icmp, b"x").unwrap();
        let mut arp = [mac.0, [4; 6]].concat();
        arp.extend([0x08, 0x06, 0, 1]);
        let frames = [tcp, icmp, arp];
        for (fields, matching) in [
            ("I 1 s 10.0.0.0/8", "110"),
            ("I 1 s 10.0.0.2", "000"),
            ("I 2 d", "110"),
            ("I 4 t 3", "000"),
            ("I 8 p tcp", "100"),
            ("M 1 s 4:4:4:4:4:4", "111"),
            ("M 4 p arp", "001"),
            ("T 2 d 80", "100"),
            ("T 1 s 80", "000"),
            ("V 1 s 7", "100"),
            ("C 1 t echo-request", "010"),
            ("C 2 c 1", "000"),
            ("F 1 f syn/syn,ack", "100"),
            ("F 1 f ack", "000"),
            ("P 1 l 0-41", "110"),
            ("P 2 f whole", "110"),
            ("P 2 f later", "000"),
        ] {
            let mut policy = Policy::default();
            policy.apply_line("R F 2:0:0:0:0:1 10.0.0.9").unwrap();
            policy.apply_line(&format!("A 2:0:0:0:0:1 {fields}")).unwrap();
            let key = MiddleboxKey { network: NetworkId::ANY, mac };
            let firewall = policy.get(key).unwrap().firewall().unwrap();
            let (_, conditions) = firewall.conditions(mac).next().unwrap();
            for (frame, expected) in frames.iter().zip(matching.chars()) {
                let packet = Packet::from_frame(frame).unwrap();
                let compared = conditions.compare(&packet);
                let matches = compared.iter().all(|one| one.matches);
                assert_eq!(matches, conditions.match_packet(&packet), "{fields}: {compared:?}");
                assert_eq!(matches, expected == '1', "{fields}: {compared:?}");
                assert!(!compared.is_empty());
            }
        }
    }
}
