//! Classifier: finds the first rule that a packet matches without comparing the rules one by one.
//!
//! Every field that rules compare is an axis, cut into intervals at the bounds of the rules'
//! ranges. Each interval has a set of the rules that its values leave possible, as bits in the
//! rules' order. A packet finds its interval on each axis by bisection; the lowest bit that all
//! sets have is its rule. (T. V. Lakshman, D. Stiliadis: "High-speed policy-based packet forwarding
//! using efficient multi-dimensional range matching", SIGCOMM 1998.) Nothing is allocated for a
//! packet.

use super::Conditions;
use crate::packet::Packet;
use nfqd_shmctl::{AddressRange, Fragment, FragmentMatch, NumberRange, RuleId, TcpFlags};
use std::net::IpAddr;

/// The compiled rules of one middlebox.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Classifier {
    /// The rules in order, without those that no packet can match.
    rules: Box<[RuleId]>,
    /// Rules with a condition that is no set of intervals: what the axes leave possible is compared
    /// whole.
    inexact: Box<[u64]>,
    axes: Box<[(Dimension, Axis)]>,
}

/// A field that an axis stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dimension {
    SourceMac,
    Vlan,
    EtherType,
    Source4,
    Source6,
    Destination4,
    Destination6,
    Tos,
    Length,
    Fragment,
    Protocol,
    SourcePort,
    DestinationPort,
    TcpFlags,
    IcmpType,
    IcmpCode,
}

const DIMENSIONS: [Dimension; 16] = [
    Dimension::Destination4,
    Dimension::Destination6,
    Dimension::DestinationPort,
    Dimension::Source4,
    Dimension::Source6,
    Dimension::SourceMac,
    Dimension::Protocol,
    Dimension::SourcePort,
    Dimension::EtherType,
    Dimension::Vlan,
    Dimension::Tos,
    Dimension::Length,
    Dimension::Fragment,
    Dimension::TcpFlags,
    Dimension::IcmpType,
    Dimension::IcmpCode,
];

#[derive(Clone, PartialEq, Eq, Debug)]
struct Axis {
    cuts: Cuts,
    /// The candidate rules of a packet without the field, then of each interval: one word for 64
    /// rules.
    sets: Box<[u64]>,
}

/// The beginnings of the intervals; the first one is 0.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Cuts {
    Narrow(Box<[u64]>),
    /// IPv6 addresses.
    Wide(Box<[u128]>),
}

/// Ranges of values, first to last.
type Interval = (u128, u128);

impl Classifier {
    /// Compiles rules, which are given in order.
    pub fn new(rules: &[(RuleId, Conditions)]) -> Classifier {
        let words = rules.len().div_ceil(64);
        let mut inexact = vec![0; words];
        for (at, _) in rules.iter().enumerate().filter(|(_, (_, wanted))| !is_exact(wanted)) {
            set_bit(&mut inexact, at, true);
        }
        let axis = |dimension: Dimension| Some((dimension, Axis::new(dimension, rules, words)?));
        Classifier {
            rules: rules.iter().map(|(id, _)| *id).collect(),
            inexact: inexact.into(),
            axes: DIMENSIONS.into_iter().filter_map(axis).collect(),
        }
    }

    fn depends_on(&self, wanted: &[Dimension]) -> bool {
        self.axes.iter().any(|(dimension, _)| wanted.contains(dimension))
    }

    /// Whether a rule compares VLAN tags.
    pub fn depends_on_tags(&self) -> bool {
        self.depends_on(&[Dimension::Vlan])
    }

    /// Whether a rule compares the transport header.
    pub fn depends_on_transport(&self) -> bool {
        use Dimension::{DestinationPort, IcmpCode, IcmpType, SourcePort, TcpFlags};
        self.depends_on(&[SourcePort, DestinationPort, TcpFlags, IcmpType, IcmpCode])
    }

    /// Returns the first rule that a packet matches. `whole` compares all conditions of a rule, for
    /// the few that need it.
    pub fn find(&self, packet: &Packet, whole: impl Fn(RuleId) -> bool) -> Option<RuleId> {
        let mut rows: [&[u64]; DIMENSIONS.len()] = [&[]; DIMENSIONS.len()];
        for (row, (dimension, axis)) in rows.iter_mut().zip(&self.axes) {
            *row = axis.row(dimension.of_packet(packet), self.inexact.len());
        }
        let rows = rows.get(..self.axes.len()).unwrap_or_default();
        for (word, &inexact) in self.inexact.iter().enumerate() {
            let left = self.rules.len() - word * 64;
            let all = if left < 64 { (1 << left) - 1 } else { u64::MAX };
            let mut possible =
                rows.iter().fold(all, |set, row| set & row.get(word).copied().unwrap_or(0));
            while possible != 0 {
                let bit = possible.trailing_zeros() as usize;
                let rule = *self.rules.get(word * 64 + bit)?;
                if inexact & 1 << bit == 0 || whole(rule) {
                    return Some(rule);
                }
                possible &= possible - 1;
            }
        }
        None
    }
}

fn set_bit(words: &mut [u64], at: usize, on: bool) {
    if let Some(word) = words.get_mut(at / 64) {
        *word = if on { *word | 1 << (at % 64) } else { *word & !(1 << (at % 64)) };
    }
}

impl Axis {
    /// Returns the axis, if any rule has a condition on it.
    fn new(dimension: Dimension, rules: &[(RuleId, Conditions)], words: usize) -> Option<Axis> {
        // The bounds at which a rule becomes possible, or impossible.
        let mut events: Vec<(u128, usize, bool)> = Vec::new();
        let mut indifferent = vec![0_u64; words];
        let mut any = false;
        for (at, (_, wanted)) in rules.iter().enumerate() {
            match dimension.of_rule(wanted) {
                None => set_bit(&mut indifferent, at, true),
                Some(intervals) => {
                    any = true;
                    for (first, last) in intervals {
                        events.push((first, at, true));
                        events.extend(last.checked_add(1).map(|end| (end, at, false)));
                    }
                }
            }
        }
        if !any {
            return None;
        }
        // If an interval ends where the next of the same rule begins, the rule stays possible.
        events.sort();
        let (mut cuts, mut sets) = (vec![0], indifferent.clone());
        let mut current = indifferent;
        let mut events = events.into_iter().peekable();
        while events
            .next_if(|&(value, at, on)| {
                value == 0 && {
                    set_bit(&mut current, at, on);
                    true
                }
            })
            .is_some()
        {}
        sets.extend(&current);
        while let Some(&(value, ..)) = events.peek() {
            while let Some((_, at, on)) = events.next_if(|event| event.0 == value) {
                set_bit(&mut current, at, on);
            }
            cuts.push(value);
            sets.extend(&current);
        }
        let wide = matches!(dimension, Dimension::Source6 | Dimension::Destination6);
        let cuts = if wide {
            Cuts::Wide(cuts.into())
        } else {
            Cuts::Narrow(cuts.into_iter().filter_map(|cut| u64::try_from(cut).ok()).collect())
        };
        Some(Axis { cuts, sets: sets.into() })
    }

    /// Returns the rules that a value leaves possible.
    fn row(&self, value: Option<u128>, words: usize) -> &[u64] {
        let row = match (value, &self.cuts) {
            (None, _) => 0,
            (Some(value), Cuts::Wide(cuts)) => cuts.partition_point(|&cut| cut <= value),
            (Some(value), Cuts::Narrow(cuts)) => cuts.partition_point(|&cut| cut <= value as u64),
        };
        self.sets.get(row * words..(row + 1) * words).unwrap_or_default()
    }
}

/// Whether all conditions are sets of intervals: MAC masks may have holes.
fn is_exact(wanted: &Conditions) -> bool {
    wanted.source_mac.is_none_or(|mask| is_prefix(number(&mask.mask().0)))
}

fn is_prefix(mask: u128) -> bool {
    const MACS: u128 = 0xffff_ffff_ffff;
    let rest = !mask & MACS;
    rest & (rest + 1) == 0
}

fn number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte))
}

fn address(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

fn fragment(fragment: Fragment) -> u128 {
    match fragment {
        Fragment::Whole => 0,
        Fragment::First => 1,
        Fragment::Later => 2,
    }
}

/// Returns the runs of header bytes whose flags match.
fn flag_bytes(flags: TcpFlags) -> Vec<Interval> {
    let fitting = (0..=u8::MAX)
        .filter(|&byte| flags.contains(byte))
        .map(|byte| (u128::from(byte), u128::from(byte)));
    fitting.collect()
}

impl Dimension {
    /// Returns the ranges of the field that a rule allows; `None` if the rule does not compare it.
    fn of_rule(self, wanted: &Conditions) -> Option<Vec<Interval>> {
        let numbers = |range: Option<NumberRange>| {
            range.map(|range| vec![(u128::from(range.first()), u128::from(range.last()))])
        };
        let one = |value: Option<u128>| value.map(|value| vec![(value, value)]);
        // A rule for one family does not use the other's axis; on its own the axis leaves no packet
        // of the other.
        let addresses = |range: Option<AddressRange>, v4: bool| {
            let range = range.filter(|range| range.is_ipv4() == v4)?;
            Some(vec![(address(range.first()), address(range.last()))])
        };
        match self {
            Dimension::SourceMac => wanted.source_mac.filter(|_| is_exact(wanted)).map(|mask| {
                let (bits, mask) = (number(&mask.bits().0), number(&mask.mask().0));
                vec![(bits, bits | (!mask & 0xffff_ffff_ffff))]
            }),
            Dimension::Vlan => numbers(wanted.vlan),
            Dimension::EtherType => one(wanted.ether_type.map(|named| u128::from(named.number()))),
            Dimension::Source4 => addresses(wanted.source, true),
            Dimension::Source6 => addresses(wanted.source, false),
            Dimension::Destination4 => addresses(wanted.destination, true),
            Dimension::Destination6 => addresses(wanted.destination, false),
            Dimension::Tos => one(wanted.tos.map(u128::from)),
            Dimension::Length => numbers(wanted.length),
            Dimension::Fragment => wanted.fragment.map(|wanted| {
                vec![match wanted {
                    FragmentMatch::Is(position) => (fragment(position), fragment(position)),
                    FragmentMatch::Any => (fragment(Fragment::First), fragment(Fragment::Later)),
                }]
            }),
            Dimension::Protocol => one(wanted.protocol.map(|protocol| u128::from(protocol.0))),
            Dimension::SourcePort => numbers(wanted.source_port),
            Dimension::DestinationPort => numbers(wanted.destination_port),
            Dimension::TcpFlags => wanted.tcp_flags.map(flag_bytes),
            Dimension::IcmpType => numbers(wanted.icmp_type),
            Dimension::IcmpCode => numbers(wanted.icmp_code),
        }
    }

    /// Returns the packet's value of the field.
    fn of_packet(self, packet: &Packet) -> Option<u128> {
        let (link, ip) = (&packet.link, packet.ip.as_ref());
        let of_family =
            |wanted: bool, ip: IpAddr| Some(address(ip)).filter(|_| ip.is_ipv4() == wanted);
        match self {
            Dimension::SourceMac => Some(number(&link.source.0)),
            Dimension::Vlan => link.vlan_id().map(u128::from),
            Dimension::EtherType => link.ether_type.map(|found| u128::from(found.number())),
            Dimension::Source4 => ip.and_then(|ip| of_family(true, ip.source)),
            Dimension::Source6 => ip.and_then(|ip| of_family(false, ip.source)),
            Dimension::Destination4 => ip.and_then(|ip| of_family(true, ip.destination)),
            Dimension::Destination6 => ip.and_then(|ip| of_family(false, ip.destination)),
            Dimension::Tos => ip.map(|ip| u128::from(ip.tos)),
            Dimension::Length => ip.map(|ip| u128::from(ip.length)),
            Dimension::Fragment => ip.map(|ip| fragment(ip.nft_fragment)),
            Dimension::Protocol => ip.map(|ip| u128::from(ip.protocol.0)),
            Dimension::SourcePort => ip.and_then(|ip| ip.source_port).map(u128::from),
            Dimension::DestinationPort => {
                ip.and_then(|ip| ip.ports).map(|ports| u128::from(ports.destination))
            }
            Dimension::TcpFlags => ip.and_then(|ip| ip.tcp_flags).map(u128::from),
            Dimension::IcmpType => ip.and_then(|ip| ip.icmp_type).map(u128::from),
            Dimension::IcmpCode => ip.and_then(|ip| ip.icmp_code).map(u128::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Policy;
    use crate::packet::Packet;
    use proptest::prelude::*;

    /// Rules from a small domain, so that they share bounds.
    fn rule() -> impl Strategy<Value = String> {
        let fields = [
            "I 1 s 10.0.0.1",
            "I 1 s 10.0.0.0/30",
            "I 1 s 10.0.0.2-10.0.0.9",
            "I 1 s 0.0.0.0/0",
            "I 1 s ::/0",
            "I 2 d 2001:db8::2-2001:db8::9",
            "I 2 d",
            "I 4 t 0",
            "I 8 p tcp",
            "M 1 s 2:0:0:0:0:1",
            "M 1 s 2:0:0:0:0:0/ff:0:0:0:0:0",
            "M 1 s 2:0:0:0:0:1/ff:0:0:0:0:ff",
            "M 4 p ip",
            "M 4 p arp",
            "T 2 d 80",
            "T 2 d 79-81",
            "T 1 s 0-65535",
            "U 2 d 80",
            "V 1 s 0-9",
            "C 1 t 0-9",
            "F 1 f syn/syn,ack",
            "F 1 f none",
            "P 1 l 0-40",
            "P 2 f whole",
        ];
        (
            proptest::sample::select(vec!['#', '+']),
            1..99_u16,
            proptest::sample::select(fields.to_vec()),
        )
            .prop_map(|(sign, number, fields)| format!("A 2:0:0:0:0:2 {sign}{number} {fields}"))
    }

    fn packet() -> impl Strategy<Value = Packet> {
        (any::<bool>(), 0..4_u8, 0..3_u8, 78..83_u16, any::<[u8; 20]>()).prop_map(
            |(v6, host, kind, port, noise)| {
                let mut out = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, host];
                let protocol = [6, 17, 1][usize::from(kind)];
                let body = [&[1, 1], &port.to_be_bytes()[..], &noise].concat();
                if v6 {
                    out.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, protocol, 9]);
                    out.extend(
                        [[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host]; 2].concat(),
                    );
                } else {
                    out.extend([
                        8, 0, 0x45, 0, 0, 44, 0, 0, 0, 0, 9, protocol, 0, 0, 10, 0, 0, host, 10, 0,
                        0, 2,
                    ]);
                }
                out.extend(body);
                Packet::from_frame(&out).unwrap()
            },
        )
    }

    proptest! {
        /// The result of comparing the rules one by one.
        #[test]
        fn the_first_rule_that_matches_is_found(
            lines in proptest::collection::vec(rule(), 0..200),
            packets in proptest::collection::vec(packet(), 20),
        ) {
            let mut policy = Policy::default();
            policy.apply_line("R F 2:0:0:0:0:2 10.0.0.2").unwrap();
            for line in lines {
                // Two families in one rule are rejected.
                let _ = policy.apply_line(&line);
            }
            let mac = "2:0:0:0:0:2".parse().unwrap();
            let firewall = policy.get(crate::MiddleboxKey::anywhere(mac)).and_then(|middlebox| middlebox.firewall()).unwrap();
            for packet in packets {
                let mut rules = firewall.conditions(mac);
                let expected = rules.find(|(_, wanted)| wanted.match_packet(&packet)).map(|(id, _)| id);
                prop_assert_eq!(firewall.decide(&packet).rule, expected, "{:?}", packet);
            }
        }
    }
}
