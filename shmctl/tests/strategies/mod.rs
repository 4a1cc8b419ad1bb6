//! Any command there is.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::{
    Action, AddressRange, BackendChange, Check, CheckPace, Class, Command, Destination, Drain,
    EtherType, Field, FieldValue, FilterRemoval, FilterUpdate, FragmentMatch, Frontend, MAX_WEIGHT,
    MacAddr, MacMask, Method, NumberRange, OnDead, OnEmpty, Protocol, RuleId, ServiceOptions,
    ServiceSpec, TcpFlags, UnregisterScope,
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
        any::<[u16; 6]>()
            .prop_map(|[c, d, e, f, g, h]| IpAddr::from([0x2001, 0xdb8, c, d, e, f, g, h])),
    ]
}

fn hosts() -> impl Strategy<Value = AddressRange> {
    prop_oneof![
        host().prop_map(AddressRange::from),
        (host(), 0u8..=128)
            .prop_filter_map("prefix too long", |(ip, length)| AddressRange::prefix(ip, length)),
        (host(), host())
            .prop_filter_map("two families", |(a, b)| AddressRange::new(a.min(b), a.max(b))),
    ]
}

fn numbers(most: u16) -> impl Strategy<Value = NumberRange> {
    (0..=most, 0..=most).prop_map(|(a, b)| NumberRange::new(a.min(b), a.max(b)).unwrap())
}

/// Any value of a field.
fn value(field: Field) -> BoxedStrategy<FieldValue> {
    let masks = (any::<[u8; 6]>(), any::<[u8; 6]>())
        .prop_map(|(mac, mask)| MacMask::new(MacAddr(mac), MacAddr(mask)));
    let macs = prop_oneof![station().prop_map(MacMask::from), masks];
    let fragments = proptest::sample::select(FragmentMatch::ALL.map(|(_, value)| value).to_vec());
    let flags = (any::<u8>(), any::<u8>())
        .prop_filter_map("no flags", |(on, mask)| TcpFlags::new(on & mask, mask));
    match field {
        Field::SourceIp => hosts().prop_map(FieldValue::SourceIp).boxed(),
        Field::DestinationIp => of(hosts()).prop_map(FieldValue::DestinationIp).boxed(),
        Field::Tos => any::<u8>().prop_map(FieldValue::Tos).boxed(),
        Field::Protocol => any::<u8>().prop_map(|n| FieldValue::Protocol(Protocol(n))).boxed(),
        Field::SourceMac => macs.prop_map(FieldValue::SourceMac).boxed(),
        Field::DestinationMac => of(station()).prop_map(FieldValue::DestinationMac).boxed(),
        Field::EtherType => {
            (0x0600u16..).prop_map(|n| FieldValue::EtherType(EtherType::new(n).unwrap())).boxed()
        }
        Field::TcpSource => numbers(u16::MAX).prop_map(FieldValue::TcpSource).boxed(),
        Field::TcpDestination => numbers(u16::MAX).prop_map(FieldValue::TcpDestination).boxed(),
        Field::UdpSource => numbers(u16::MAX).prop_map(FieldValue::UdpSource).boxed(),
        Field::UdpDestination => numbers(u16::MAX).prop_map(FieldValue::UdpDestination).boxed(),
        Field::VlanId => numbers(4095).prop_map(FieldValue::VlanId).boxed(),
        Field::IcmpType => numbers(255).prop_map(FieldValue::IcmpType).boxed(),
        Field::IcmpCode => numbers(255).prop_map(FieldValue::IcmpCode).boxed(),
        Field::Icmp6Type => numbers(255).prop_map(FieldValue::Icmp6Type).boxed(),
        Field::Icmp6Code => numbers(255).prop_map(FieldValue::Icmp6Code).boxed(),
        Field::TcpFlags => flags.prop_map(FieldValue::TcpFlags).boxed(),
        Field::Length => numbers(u16::MAX).prop_map(FieldValue::Length).boxed(),
        Field::Fragment => fragments.prop_map(FieldValue::Fragment).boxed(),
    }
}

fn class() -> impl Strategy<Value = Class> {
    proptest::sample::select(Class::ALL.to_vec())
}

fn update() -> impl Strategy<Value = FilterUpdate> {
    class().prop_flat_map(|class| {
        let values: Vec<_> = class.fields().iter().map(|&field| of(value(field))).collect();
        (0..=class.all(), values).prop_map(move |(bits, values)| FilterUpdate {
            class,
            bits,
            values: values.into_iter().flatten().collect(),
        })
    })
}

fn removal() -> impl Strategy<Value = FilterRemoval> {
    (class(), any::<u8>(), any::<u8>()).prop_map(|(class, keep, blank)| {
        let keep = keep & class.all();
        // A key may be blanked only where its bit goes off, or where it has a default.
        let may = |field: &Field| {
            blank & field.bit() != 0 && (keep & field.bit() == 0 || field.has_default())
        };
        FilterRemoval { class, keep, values: class.fields().iter().copied().filter(may).collect() }
    })
}

fn frontend() -> impl Strategy<Value = Frontend> {
    let protocol = of(prop_oneof![Just(Protocol::TCP), Just(Protocol::UDP)]);
    (host(), of((1u16.., protocol))).prop_map(|(ip, port)| Frontend {
        ip,
        port: port.map(|(port, _)| port),
        protocol: port.and_then(|(_, protocol)| protocol),
    })
}

fn options() -> impl Strategy<Value = ServiceOptions> {
    let check = prop_oneof![
        Just(Check::Default),
        Just(Check::None),
        Just(Check::Neighbour),
        of(1u16..).prop_map(Check::Tcp),
        of(1u16..).prop_map(Check::Udp)
    ];
    let on_dead = prop_oneof![
        Just(OnDead::KeepConnections),
        Just(OnDead::Move),
        Just(OnDead::Reset),
        Just(OnDead::Keep)
    ];
    let on_empty = prop_oneof![Just(OnEmpty::Reject), Just(OnEmpty::Pass)];
    let pace = (1..=3600_u16, 1..=u8::MAX, 1..=u8::MAX)
        .prop_map(|(interval, rise, fall)| CheckPace { interval, rise, fall });
    let times = (of(1..=7200_u32), of(1..=7200_u32), any::<bool>());
    (any::<bool>(), any::<u32>(), check, on_dead, on_empty, pace, times).prop_map(
        |(dsr, seed, check, on_dead, on_empty, pace, (affinity, udp_timeout, takeover))| {
            ServiceOptions {
                dsr,
                affinity,
                seed,
                check,
                on_dead,
                on_empty,
                pace,
                udp_timeout,
                takeover,
            }
        },
    )
}

/// Backends for an address: of its family, none twice, with ports only where it has one.
fn destinations(frontend: Frontend) -> impl Strategy<Value = Vec<Destination>> {
    let one = (any::<[u16; 4]>(), of(1u16..), of(station()), 1..=MAX_WEIGHT);
    proptest::collection::vec(one, 1..5).prop_map(move |all| {
        let mut out: Vec<Destination> = Vec::new();
        for ([a, b, c, d], port, mac, weight) in all {
            let ip = match frontend.ip {
                IpAddr::V4(_) => {
                    let ([a, b], [c, _]) = (a.to_be_bytes(), b.to_be_bytes());
                    IpAddr::from([10, a, b, c])
                }
                IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, a, b, c, d]),
            };
            let to =
                Destination { ip, port: port.filter(|_| frontend.port.is_some()), mac, weight };
            if ip != frontend.ip && out.iter().all(|before| before.ip != ip) {
                out.push(to);
            }
        }
        out
    })
}

fn spec() -> impl Strategy<Value = (Frontend, ServiceSpec)> {
    let method = prop_oneof![
        Just(Method::Static),
        host().prop_map(Method::Source),
        Just(Method::RoundRobin),
        Just(Method::Hash),
        Just(Method::Least)
    ];
    (frontend(), method, options())
        .prop_flat_map(|(frontend, method, options)| {
            (Just((frontend, method, options)), destinations(frontend))
        })
        .prop_filter_map(
            "family, or no backend",
            |((frontend, method, mut options), mut destinations)| {
                if !method.is_pool() {
                    options = ServiceOptions { dsr: options.dsr, ..ServiceOptions::default() };
                    destinations.truncate(1);
                }
                match options.check {
                    Check::Tcp(None) if frontend.port.is_none() => {
                        options.check = Check::Tcp(Some(80));
                    }
                    Check::Udp(None) if frontend.port.is_none() => {
                        options.check = Check::Udp(Some(53));
                    }
                    Check::Tcp(_) | Check::Udp(_) => {}
                    _ => options.pace.interval = 1,
                }
                if method == Method::Hash {
                    options.affinity = options.affinity.and(Some(300));
                } else {
                    options.takeover = false;
                }
                if options.dsr {
                    destinations.iter_mut().for_each(|to| to.port = None);
                }
                let fits = match method {
                    Method::Source(from) => from.is_ipv4() == frontend.ip.is_ipv4(),
                    _ => true,
                };
                (fits && !destinations.is_empty())
                    .then_some((frontend, ServiceSpec { method, destinations, options }))
            },
        )
}

fn change() -> impl Strategy<Value = (Option<Frontend>, BackendChange)> {
    (frontend(), any::<bool>(), 0..5_u8)
        .prop_flat_map(|(frontend, named, kind)| {
            (Just((frontend, named, kind)), destinations(frontend))
        })
        .prop_filter_map("no backend", |((frontend, named, kind), destinations)| {
            let names: Vec<_> = destinations.iter().map(Destination::name).collect();
            let weight = destinations.first().map_or(0, |to| to.weight);
            let change = match kind {
                0 => BackendChange::Add(destinations),
                1 => BackendChange::Remove(names.clone()),
                2 => BackendChange::Drain(names.clone(), Drain::Unlimited),
                3 => BackendChange::Drain(names.clone(), Drain::For(u32::from(weight))),
                _ => BackendChange::Up(names.clone()),
            };
            (!names.is_empty()).then_some((named.then_some(frontend), change))
        })
}

/// Any command.
pub(crate) fn command() -> impl Strategy<Value = Command> {
    let action = || prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    let rule = (action(), 1u16..).prop_map(|(action, number)| RuleId::new(action, number).unwrap());
    let scope = prop_oneof![
        Just(UnregisterScope::Firewall),
        Just(UnregisterScope::LoadBalancing),
        Just(UnregisterScope::All),
        frontend().prop_map(UnregisterScope::Service)
    ];
    prop_oneof![
        (station(), host(), action()).prop_map(|(mac, ip, default)| Command::RegisterFirewall {
            mac,
            ip,
            default
        }),
        (station(), spec()).prop_map(|(mac, (frontend, spec))| Command::RegisterService {
            mac,
            frontend,
            spec
        }),
        (station(), change()).prop_map(|(mac, (frontend, change))| Command::ChangeBackends {
            mac,
            frontend,
            change
        }),
        (station(), rule.clone(), update()).prop_map(|(mac, rule, update)| Command::Add {
            mac,
            rule,
            update
        }),
        (station(), rule.clone(), removal()).prop_map(|(mac, rule, removal)| Command::Delete {
            mac,
            rule,
            removal
        }),
        (station(), rule).prop_map(|(mac, rule)| Command::DeleteRule { mac, rule }),
        (station(), scope).prop_map(|(mac, scope)| Command::Unregister { mac, scope }),
        of(station()).prop_map(|mac| Command::Query { mac }),
    ]
}
