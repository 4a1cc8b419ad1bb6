//! Any command there is.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::{
    Action, AddressRange, Balance, Check, Class, Clear, Command, Destination, Edit, EtherType, Field,
    MAX_WEIGHT, MacAddr, MacMask, Method, NumberRange, OnDead, OnEmpty, Piece, Protocol, RuleId, Services,
    Set, TcpFlags, Terms, Value, Vip,
};
use proptest::option::of;
use proptest::prelude::*;
use std::net::IpAddr;

fn station() -> impl Strategy<Value = MacAddr> {
    any::<[u8; 6]>().prop_map(|mut mac| {
        mac[0] = mac[0] & 0xfe | 2;
        MacAddr(mac)
    })
}

fn host() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<[u8; 3]>().prop_map(|[b, c, d]| IpAddr::from([10, b, c, d])),
        any::<[u16; 6]>().prop_map(|[c, d, e, f, g, h]| IpAddr::from([0x2001, 0xdb8, c, d, e, f, g, h])),
    ]
}

fn hosts() -> impl Strategy<Value = AddressRange> {
    prop_oneof![
        host().prop_map(AddressRange::from),
        (host(), 0u8..=128)
            .prop_filter_map("prefix too long", |(ip, length)| AddressRange::prefix(ip, length)),
        (host(), host()).prop_filter_map("two families", |(a, b)| AddressRange::new(a.min(b), a.max(b))),
    ]
}

fn numbers(most: u16) -> impl Strategy<Value = NumberRange> {
    (0..=most, 0..=most).prop_map(|(a, b)| NumberRange::new(a.min(b), a.max(b)).unwrap())
}

/// Any value of a field.
fn value(field: Field) -> BoxedStrategy<Value> {
    let masks = (any::<[u8; 6]>(), any::<[u8; 6]>())
        .prop_map(|(mac, mask)| MacMask::new(MacAddr(mac), MacAddr(mask)));
    let macs = prop_oneof![station().prop_map(MacMask::from), masks];
    let pieces = prop_oneof![Just(Piece::Whole), Just(Piece::First), Just(Piece::Later), Just(Piece::Any)];
    let flags =
        (any::<u8>(), any::<u8>()).prop_filter_map("no flags", |(on, mask)| TcpFlags::new(on & mask, mask));
    match field {
        Field::SourceIp => hosts().prop_map(Value::SourceIp).boxed(),
        Field::DestinationIp => of(hosts()).prop_map(Value::DestinationIp).boxed(),
        Field::Tos => any::<u8>().prop_map(Value::Tos).boxed(),
        Field::Protocol => any::<u8>().prop_map(|n| Value::Protocol(Protocol(n))).boxed(),
        Field::SourceMac => macs.prop_map(Value::SourceMac).boxed(),
        Field::DestinationMac => of(station()).prop_map(Value::DestinationMac).boxed(),
        Field::EtherType => (0x0600u16..).prop_map(|n| Value::EtherType(EtherType::new(n).unwrap())).boxed(),
        Field::TcpSource => numbers(u16::MAX).prop_map(Value::TcpSource).boxed(),
        Field::TcpDestination => numbers(u16::MAX).prop_map(Value::TcpDestination).boxed(),
        Field::UdpSource => numbers(u16::MAX).prop_map(Value::UdpSource).boxed(),
        Field::UdpDestination => numbers(u16::MAX).prop_map(Value::UdpDestination).boxed(),
        Field::VlanId => numbers(4095).prop_map(Value::VlanId).boxed(),
        Field::IcmpType => numbers(255).prop_map(Value::IcmpType).boxed(),
        Field::IcmpCode => numbers(255).prop_map(Value::IcmpCode).boxed(),
        Field::Icmp6Type => numbers(255).prop_map(Value::Icmp6Type).boxed(),
        Field::Icmp6Code => numbers(255).prop_map(Value::Icmp6Code).boxed(),
        Field::TcpFlags => flags.prop_map(Value::TcpFlags).boxed(),
        Field::Length => numbers(u16::MAX).prop_map(Value::Length).boxed(),
        Field::Piece => pieces.prop_map(Value::Piece).boxed(),
    }
}

fn class() -> impl Strategy<Value = Class> {
    proptest::sample::select(Class::ALL.to_vec())
}

fn set() -> impl Strategy<Value = Set> {
    class().prop_flat_map(|class| {
        let values: Vec<_> = class.fields().iter().map(|&field| of(value(field))).collect();
        (0..=class.all(), values).prop_map(move |(bits, values)| Set {
            class,
            bits,
            values: values.into_iter().flatten().collect(),
        })
    })
}

fn clear() -> impl Strategy<Value = Clear> {
    (class(), any::<u8>(), any::<u8>()).prop_map(|(class, keep, blank)| {
        let keep = keep & class.all();
        // A key may be blanked only where its bit goes off, or where it has a default.
        let may =
            |field: &Field| blank & field.bit() != 0 && (keep & field.bit() == 0 || field.has_default());
        Clear { class, keep, blank: class.fields().iter().copied().filter(may).collect() }
    })
}

fn vip() -> impl Strategy<Value = Vip> {
    let protocol = of(prop_oneof![Just(Protocol::TCP), Just(Protocol::UDP)]);
    (host(), of((1u16.., protocol))).prop_map(|(ip, port)| Vip {
        ip,
        port: port.map(|(port, _)| port),
        protocol: port.and_then(|(_, protocol)| protocol),
    })
}

fn terms() -> impl Strategy<Value = Terms> {
    let check = prop_oneof![
        Just(Check::Default),
        Just(Check::None),
        Just(Check::Neighbour),
        of(1u16..).prop_map(Check::Tcp)
    ];
    let on_dead = prop_oneof![Just(OnDead::Move), Just(OnDead::Reset), Just(OnDead::Keep)];
    let on_empty = prop_oneof![Just(OnEmpty::Reject), Just(OnEmpty::Pass)];
    (any::<bool>(), any::<bool>(), any::<u32>(), check, on_dead, on_empty).prop_map(
        |(dsr, affinity, seed, check, on_dead, on_empty)| Terms {
            dsr,
            affinity,
            seed,
            check,
            on_dead,
            on_empty,
        },
    )
}

/// Backends for an address: of its family, none twice, with ports only where it has one.
fn destinations(vip: Vip) -> impl Strategy<Value = Vec<Destination>> {
    let one = (any::<[u16; 4]>(), of(1u16..), of(station()), 1..=MAX_WEIGHT);
    proptest::collection::vec(one, 1..5).prop_map(move |all| {
        let mut out: Vec<Destination> = Vec::new();
        for ([a, b, c, d], port, mac, weight) in all {
            let ip = match vip.ip {
                IpAddr::V4(_) => {
                    let ([a, b], [c, _]) = (a.to_be_bytes(), b.to_be_bytes());
                    IpAddr::from([10, a, b, c])
                }
                IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, a, b, c, d]),
            };
            let to = Destination { ip, port: port.filter(|_| vip.port.is_some()), mac, weight };
            if ip != vip.ip && out.iter().all(|before| before.ip != ip) {
                out.push(to);
            }
        }
        out
    })
}

fn balance() -> impl Strategy<Value = (Vip, Balance)> {
    let method = prop_oneof![
        Just(Method::Static),
        host().prop_map(Method::Source),
        Just(Method::RoundRobin),
        Just(Method::Hash),
        Just(Method::Least)
    ];
    (vip(), method, terms())
        .prop_flat_map(|(vip, method, terms)| (Just((vip, method, terms)), destinations(vip)))
        .prop_filter_map("family, or no backend", |((vip, method, mut terms), mut destinations)| {
            if !method.is_pool() {
                terms = Terms { dsr: terms.dsr, ..Terms::default() };
                destinations.truncate(1);
            }
            if terms.check == Check::Tcp(None) && vip.port.is_none() {
                terms.check = Check::Tcp(Some(80));
            }
            if terms.dsr {
                destinations.iter_mut().for_each(|to| to.port = None);
            }
            let fits = match method {
                Method::Source(from) => from.is_ipv4() == vip.ip.is_ipv4(),
                _ => true,
            };
            (fits && !destinations.is_empty()).then_some((vip, Balance { method, destinations, terms }))
        })
}

fn edit() -> impl Strategy<Value = (Option<Vip>, Edit)> {
    (vip(), any::<bool>(), 0..4_u8)
        .prop_flat_map(|(vip, named, kind)| (Just((vip, named, kind)), destinations(vip)))
        .prop_filter_map("no backend", |((vip, named, kind), destinations)| {
            let names: Vec<_> = destinations.iter().map(Destination::name).collect();
            let edit = match kind {
                0 => Edit::Add(destinations),
                1 => Edit::Remove(names.clone()),
                2 => Edit::Drain(names.clone()),
                _ => Edit::Up(names.clone()),
            };
            (!names.is_empty()).then_some((named.then_some(vip), edit))
        })
}

/// Any command.
pub fn command() -> impl Strategy<Value = Command> {
    let action = || prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    let rule = (action(), 1u16..).prop_map(|(action, number)| RuleId::new(action, number).unwrap());
    let services = prop_oneof![
        Just(Services::Firewall),
        Just(Services::Balance),
        Just(Services::All),
        vip().prop_map(Services::One)
    ];
    prop_oneof![
        (station(), host(), action()).prop_map(|(mac, ip, default)| Command::RegisterFirewall {
            mac,
            ip,
            default
        }),
        (station(), balance()).prop_map(|(mac, (vip, balance))| Command::RegisterBalance {
            mac,
            vip,
            balance
        }),
        (station(), edit()).prop_map(|(mac, (vip, edit))| Command::EditBackends { mac, vip, edit }),
        (station(), rule.clone(), set()).prop_map(|(mac, rule, set)| Command::Add { mac, rule, set }),
        (station(), rule.clone(), clear()).prop_map(|(mac, rule, clear)| Command::Delete {
            mac,
            rule,
            clear
        }),
        (station(), rule).prop_map(|(mac, rule)| Command::DeleteRule { mac, rule }),
        (station(), services).prop_map(|(mac, services)| Command::Unregister { mac, services }),
        of(station()).prop_map(|mac| Command::Query { mac }),
    ]
}
