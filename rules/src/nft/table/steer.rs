//! The chain `frames`: a frame enters its network here, led by the base chain `steer`. Frames to a
//! middlebox, from a backend, or with an ICMP error about either go on to the other chains; all
//! others leave.

use super::BaseTable;
use crate::nft::dsl::{commented, goto, jump, rule};
use crate::nft::family::{FAMILIES, IPV4, IPV6, IpFamily};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Rule, Statement};
use crate::nft::options::{FastPath, QueuePath};
use nfqd_shmctl::{EtherType, Protocol};

impl BaseTable<'_> {
    pub(super) fn frames_chain(&mut self) {
        let full = self.options.fast_path == FastPath::Full;
        let to_middlebox =
            |set: &str| Statement::In(vec![Field::EtherDestination], set.to_string());
        let target = match (full, self.options.queue_path) {
            (false, QueuePath::Native) => goto("engine"),
            _ => jump("middlebox"),
        };
        let is_arp = Statement::Is(Field::EtherType, Value::EtherType(EtherType::ARP));
        let mut rules = vec![
            rule(vec![is_arp, jump("arp_packets")]),
            rule(vec![to_middlebox("middleboxes"), target]),
        ];
        for ip in FAMILIES {
            let target = if full { jump(&ip.name("reply")) } else { goto("engine") };
            rules.push(rule(vec![
                ip.is(),
                Statement::Present(Field::L4Protocol),
                Statement::In(vec![ip.source], ip.name("backends")),
                target,
            ]));
        }
        rules.push(icmp_error_rule(IPV4));
        let is_icmp6 = Statement::Is(Field::L4Protocol, Value::Protocol(Protocol::ICMPV6));
        rules.push(rule(vec![IPV6.is(), is_icmp6, jump("icmp6_packets")]));
        if full {
            rules.push(rule(vec![to_middlebox("balanced"), goto("balance")]));
        }
        self.chain("frames", rules);
        self.neighbour_chains();
    }
}

impl BaseTable<'_> {
    /// Notes where the backends' own ARP packets and neighbour advertisements come from.
    fn neighbour_chains(&mut self) {
        let note = |ip: IpFamily, key: Field, data: Field| {
            let watched = Statement::In(vec![key], ip.name("watched"));
            vec![watched, Statement::Note { key, data, map: ip.name("neighbours") }]
        };
        let is_arp = Statement::Is(Field::EtherType, Value::EtherType(EtherType::ARP));
        let arp = [vec![is_arp], note(IPV4, Field::ArpSenderIp, Field::ArpSenderMac)].concat();
        self.chain("arp_packets", vec![rule(arp)]);
        let is_icmp6 = Statement::Is(Field::L4Protocol, Value::Protocol(Protocol::ICMPV6));
        const ADVERTISEMENT: u8 = 136;
        let is_advertisement = Statement::Is(Field::Icmp6Type, Value::Icmp6Type(ADVERTISEMENT));
        let guards = vec![IPV6.is(), is_icmp6, is_advertisement];
        let advertisement = [guards, note(IPV6, Field::AdvertisedIp6, Field::EtherSource)].concat();
        self.chain("icmp6_packets", vec![rule(advertisement), icmp_error_rule(IPV6)]);
    }
}

/// ICMP errors about packets to backends may come from any router on the way.
fn icmp_error_rule(ip: IpFamily) -> Rule {
    let (icmp, kind, errors, quoted) = ip.icmp_errors();
    let statements = vec![
        ip.is(),
        Statement::Is(Field::L4Protocol, Value::Protocol(icmp)),
        Statement::In(vec![kind], errors.to_string()),
        Statement::In(vec![quoted], ip.name("backends")),
        goto("engine"),
    ];
    commented(statements, "about a packet to a backend")
}
