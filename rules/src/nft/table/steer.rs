//! The chain `frames`: a frame enters its network here, led by the base chain `steer`.
//!
//! Frames to a middlebox go on in the chain of its kind: with or without filters and services. What
//! comes from a backend, or is an ICMP error about one, goes on as a reply; all others leave. The
//! look-ups are in the order of how many frames need them.

use super::BaseTable;
use crate::nft::dsl::{commented, goto, jump, rule};
use crate::nft::family::{FAMILIES, IPV4, IPV6, IpFamily};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Rule, Statement, Verdict, Write};
use crate::nft::options::{FastPath, QueuePath, RulesetOptions};
use nfqd_shmctl::{EtherType, MacAddr};

/// The kinds of middleboxes, by what their frames pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::nft) struct MiddleboxKind {
    pub has_filters: bool,
    pub has_services: bool,
}

impl MiddleboxKind {
    /// Returns the verdict that leads frames to a middlebox of this kind on.
    pub(in crate::nft) fn entry(self, options: &RulesetOptions) -> Verdict {
        let chain = match (options.fast_path, options.queue_path) {
            (FastPath::Off, QueuePath::Native) => "engine",
            (FastPath::Off, QueuePath::BrNetfilter) => "blind",
            (FastPath::Full, _) => match (self.has_filters, self.has_services) {
                (false, false) => "others",
                (true, false) => "filtered",
                (false, true) => "balanced",
                (true, true) => "filtered_balanced",
            },
        };
        Verdict::Goto(chain.to_string())
    }
}

/// The bit of group addresses (IEEE 802, section 8.2).
const GROUP: Value = Value::Mac(MacAddr([1, 0, 0, 0, 0, 0]));

impl BaseTable<'_> {
    pub(super) fn frames_chain(&mut self) {
        let to_middlebox =
            || Statement::Vmap(vec![Field::EtherDestination], "middleboxes".to_string());
        let is_group = Statement::Masked(Field::EtherDestination, GROUP, GROUP);
        let frames = vec![rule(vec![to_middlebox()]), rule(vec![is_group, jump("group")])];
        self.chain("to_middlebox", vec![rule(vec![to_middlebox()])]);
        self.chain("frames", [frames, others().to_vec()].concat());
        self.chain("others", others().to_vec());
        let to_owner = |ip: IpFamily| {
            let owner = Write { field: Field::EtherDestination, map: ip.name("addresses") };
            let write = Statement::RewriteBy { key: ip.destination, write: owner };
            rule(vec![ip.is(), Statement::Present(Field::L4Protocol), write, to_middlebox()])
        };
        let comment =
            "a group address at layer 2 is no way around the filters of a unicast address";
        let mut group = FAMILIES.map(to_owner).to_vec();
        group[0].comment = Some(comment.to_string());
        self.chain("group", group);
        self.neighbour_chains();
        for ip in FAMILIES {
            self.source_chain(ip);
        }
    }

    /// Packets that go to no middlebox with services.
    fn source_chain(&mut self, ip: IpFamily) {
        let full = self.options.fast_path == FastPath::Full;
        let target = if full { goto(&ip.name("reply")) } else { goto("engine") };
        let rules = vec![ip.icmp_rule(), rule([from_backend(ip), vec![target]].concat())];
        self.chain(&ip.name("from"), rules);
    }

    /// Notes where the backends' own ARP packets and neighbour advertisements come from, and finds
    /// ICMP errors about packets to backends.
    fn neighbour_chains(&mut self) {
        let note = |ip: IpFamily, key: Field, data: Field| {
            let watched = Statement::In(vec![key], ip.name("watched"));
            vec![watched, Statement::Note { key, data, map: ip.name("neighbours") }]
        };
        let arp = [vec![is_arp()], note(IPV4, Field::ArpSenderIp, Field::ArpSenderMac)].concat();
        self.chain("arp_packets", vec![rule(arp)]);
        const ADVERTISEMENT: u8 = 136;
        let is_advertisement = Statement::Is(Field::Icmp6Type, Value::Icmp6Type(ADVERTISEMENT));
        // Nobody beyond a router may send one (RFC 4861, section 7.1.2).
        let is_from_link = Statement::Is(Field::Ip6HopLimit, Value::HopLimit(255));
        let guards = [IPV6.is_icmp(), vec![is_advertisement, is_from_link]].concat();
        let advertisement = [guards, note(IPV6, Field::AdvertisedIp6, Field::EtherSource)].concat();
        self.chain("icmp6", vec![rule(advertisement), icmp_error_rule(IPV6)]);
        self.chain("icmp4", vec![icmp_error_rule(IPV4)]);
    }
}

impl IpFamily {
    /// Matches ICMP of the family.
    pub(super) fn is_icmp(self) -> Vec<Statement> {
        let (icmp, ..) = self.icmp_errors();
        vec![self.is(), Statement::Is(Field::L4Protocol, Value::Protocol(icmp))]
    }

    /// Leads ICMP packets to their chain, from where they come back.
    pub(super) fn icmp_rule(self) -> Rule {
        rule([self.is_icmp(), vec![jump(&self.name("icmp"))]].concat())
    }
}

/// Matches packets from the address of a backend.
pub(super) fn from_backend(ip: IpFamily) -> Vec<Statement> {
    vec![
        ip.is(),
        Statement::Present(Field::L4Protocol),
        Statement::In(vec![ip.source], ip.name("backends")),
    ]
}

fn is_arp() -> Statement {
    Statement::Is(Field::EtherType, Value::EtherType(EtherType::ARP))
}

/// Returns the rules for packets that go to no middlebox with services.
pub(super) fn others() -> [Rule; 3] {
    by_family("from")
}

/// Returns the rules that lead packets to the chain of their family.
pub(super) fn by_family(chain: &str) -> [Rule; 3] {
    let [ip4, ip6] = FAMILIES.map(|ip| rule(vec![ip.is(), goto(&ip.name(chain))]));
    [ip4, ip6, rule(vec![is_arp(), goto("arp_packets")])]
}

/// ICMP errors about packets to backends may come from any router on the way.
fn icmp_error_rule(ip: IpFamily) -> Rule {
    let (_, kind, errors, quoted) = ip.icmp_errors();
    let about_backend = vec![
        Statement::In(vec![kind], errors.to_string()),
        Statement::In(vec![quoted], ip.name("backends")),
        goto("engine"),
    ];
    commented([ip.is_icmp(), about_backend].concat(), "about a packet to a backend")
}
