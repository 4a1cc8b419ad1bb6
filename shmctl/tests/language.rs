//! The command language: what is read, how it is printed, and that nothing breaks the parser.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::{
    Action, AddressRange, Balance, Class, Clear, Command, CommandError, Destination, ErrorCode, EtherType,
    Field, MAX_COMMAND, MacAddr, MacMask, NumberRange, Piece, Protocol, RuleId, Services, Set, TcpFlags,
    Value, split_lines,
};
use proptest::option::of;
use proptest::prelude::*;
use std::net::IpAddr;

fn parsed(line: &str) -> String {
    Command::parse(line).unwrap().to_string()
}

#[test]
fn the_documented_examples() {
    for (line, canonical) in [
        (
            "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17",
            "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17",
        ),
        ("R F 12:13:14:15:16:17 10.129.126.15", "R F 12:13:14:15:16:17 10.129.126.15"),
        ("A 12:13:14:15:16:17 M 5 s 1:2:3:4:5:6 p 8", "A 12:13:14:15:16:17 M 5 s 01:02:03:04:05:06 p 0x0800"),
        ("D 12:13:14:15:16:17 M 4 s", "D 12:13:14:15:16:17 M 4 s"),
        ("X 12:13:14:15:16:17 F", "X 12:13:14:15:16:17 F"),
        ("X 12:13:14:15:16:17", "X 12:13:14:15:16:17 A"),
    ] {
        assert_eq!(parsed(line), canonical);
    }
}

#[test]
fn values_are_optional_where_the_registration_has_them() {
    for (line, canonical) in [
        ("a 2:0:0:0:0:1 i 3 d s 10.0.0.1", "A 02:00:00:00:00:01 I 3 s 10.0.0.1 d"),
        ("A 2:0:0:0:0:1 M 2 d", "A 02:00:00:00:00:01 M 2 d"),
        (
            "A 2:0:0:0:0:1 #7 I 12 d 10.0.0.9 t 0x10 p TCP",
            "A 02:00:00:00:00:01 #7 I 12 d 10.0.0.9 t 16 p tcp",
        ),
        ("D 2:0:0:0:0:1 #7", "D 02:00:00:00:00:01 #7"),
        ("D 2:0:0:0:0:1 +7", "D 02:00:00:00:00:01 +7"),
        ("A 2:0:0:0:0:1 #1 V 0", "A 02:00:00:00:00:01 V 0"),
        ("A 2:0:0:0:0:1 +1 V 0", "A 02:00:00:00:00:01 +1 V 0"),
        ("A 2:0:0:0:0:1 u 3 s 80-90 d 53", "A 02:00:00:00:00:01 U 3 s 80-90 d 53"),
        ("A 2:0:0:0:0:1 I 1 s 10.1.1.1/8", "A 02:00:00:00:00:01 I 1 s 10.0.0.0/8"),
        ("A 2:0:0:0:0:1 c 3 c 0 t echo-request", "A 02:00:00:00:00:01 C 3 t 8 c 0"),
        ("A 2:0:0:0:0:1 N 1 t ND-router-advert", "A 02:00:00:00:00:01 N 1 t 134"),
        ("A 2:0:0:0:0:1 F 1 f ack,syn/all", "A 02:00:00:00:00:01 F 1 f syn,ack/all"),
        ("A 2:0:0:0:0:1 P 3 f later l 0-99", "A 02:00:00:00:00:01 P 3 l 0-99 f later"),
        ("r f 2:0:0:0:0:1 10.0.0.1 DENY", "R F 02:00:00:00:00:01 10.0.0.1 deny"),
        ("R F 2:0:0:0:0:1 10.0.0.1 allow", "R F 02:00:00:00:00:01 10.0.0.1"),
        (
            "R L 2:0:0:0:0:1 2001:db8::1 source 2001:db8::2 2001:db8::3@2:0:0:0:0:3",
            "R L 02:00:00:00:00:01 2001:db8::1 1 2001:db8::2 2001:db8::3@02:00:00:00:00:03",
        ),
    ] {
        assert_eq!(parsed(line), canonical);
    }
}

#[test]
fn comments_and_blank_lines_are_not_commands() {
    let text = "# head\n\n R F a b # tail\nD m #2\n  #5 is a comment at the start\n";
    let lines: Vec<_> = split_lines(text).collect();
    assert_eq!(lines, [(3, " R F a b "), (4, "D m #2")]);
}

#[test]
fn an_error_of_the_policy_points_at_its_word() {
    let error = CommandError::at_word("  X 1:2:3:4:5:6", 1, ErrorCode::UnknownMac, "not registered");
    assert_eq!(error.reply(), "ERR unknown-mac column 5: '1:2:3:4:5:6': not registered");
}

#[test]
fn a_command_has_a_longest_length() {
    let long = Command::parse(&"R".repeat(MAX_COMMAND + 1)).unwrap_err();
    assert!(long.message.contains("2047 bytes long"), "{long}");
}

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

fn balance() -> impl Strategy<Value = (IpAddr, Balance)> {
    let to = (host(), of(station())).prop_map(|(ip, mac)| Destination { ip, mac });
    (host(), of(host()), to).prop_filter_map("family, or the address itself", |(ip, from, to)| {
        let family = |other: IpAddr| other.is_ipv4() == ip.is_ipv4();
        let fits = family(to.ip) && from.is_none_or(family) && to.ip != ip;
        fits.then(|| (ip, from.map_or(Balance::Static(to), |from| Balance::Source(from, to))))
    })
}

fn command() -> impl Strategy<Value = Command> {
    let action = || prop_oneof![Just(Action::Allow), Just(Action::Deny)];
    let rule = (action(), 1u16..).prop_map(|(action, number)| RuleId::new(action, number).unwrap());
    let services = prop_oneof![Just(Services::Firewall), Just(Services::Balance), Just(Services::All)];
    prop_oneof![
        (station(), host(), action()).prop_map(|(mac, ip, default)| Command::RegisterFirewall {
            mac,
            ip,
            default
        }),
        (station(), balance()).prop_map(|(mac, (ip, balance))| Command::RegisterBalance { mac, ip, balance }),
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

proptest! {
    #[test]
    fn what_is_printed_parses_back(command in command()) {
        prop_assert_eq!(Command::parse(&command.to_string()), Ok(command));
    }

    #[test]
    fn no_text_breaks_the_parser(line in "\\PC{0,80}") {
        let _ = Command::parse(&line);
    }

    #[test]
    fn near_commands_do_not_break_it_either(line in "[RADX] ([FLIMTUVCNP0-9:.@#+*a-f/,-]{1,18} ?){0,8}") {
        if let Ok(command) = Command::parse(&line) {
            prop_assert_eq!(Command::parse(&command.to_string()), Ok(command));
        }
    }
}
