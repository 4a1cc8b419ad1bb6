//! Decisions of a policy on packets, without regard to flows.

use super::super::*;
use crate::packet::Packet;
use etherparse::PacketBuilder;
use nfqd_shmctl::Action;

fn frame(source: [u8; 4], sport: u16, dport: u16) -> Packet {
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2([1, 2, 3, 4, 5, 6], [2, 0, 0, 0, 0, 9])
        .ipv4(source, [10, 0, 0, 9], 64)
        .tcp(sport, dport, 0, 0)
        .write(&mut bytes, &[])
        .unwrap();
    Packet::from_frame(&bytes).unwrap()
}

fn verdict(lines: &[&str], packet: &Packet) -> String {
    let lines: Vec<String> = lines.iter().map(|line| line.replace("MB", "2:0:0:0:0:9")).collect();
    let policy = Policy::from_lines(&lines).unwrap();
    let Some(middlebox) = policy.get(MiddleboxKey::anywhere(packet.link.destination)) else {
        return "accept".to_string();
    };
    match (middlebox.filter(packet), middlebox.service_for(packet)) {
        (FilterDecision { action: Action::Deny, rule: Some(rule) }, _) => format!("drop {rule}"),
        (FilterDecision { action: Action::Deny, rule: None }, _) => "drop".to_string(),
        (_, Some((frontend, service))) => {
            let backends: Vec<String> =
                service.backends().keys().map(ToString::to_string).collect();
            format!("{frontend} -> {}", backends.join(" "))
        }
        (_, None) => "accept".to_string(),
    }
}

#[test]
fn all_bits_that_are_on_must_match() {
    let packet = frame([10, 0, 0, 1], 1000, 80);
    for (filter, expected) in [
        ("A MB I 1 s 10.0.0.1", "drop #1"),
        ("A MB I 1 s 10.0.0.2", "accept"),
        ("A MB I 3 s 10.0.0.1 d", "drop #1"),
        ("A MB I 2 d 10.0.0.8", "accept"),
        ("A MB I 4 t 0", "drop #1"),
        ("A MB I 8 p udp", "accept"),
        ("A MB M 5 s 1:2:3:4:5:6 p 8", "drop #1"),
        ("A MB M 5 s 1:2:3:4:5:6 p arp", "accept"),
        ("A MB M 2 d", "drop #1"),
        ("A MB M 2 d 2:0:0:0:0:8", "accept"),
        ("A MB T 2 d 80", "drop #1"),
        ("A MB T 3 s 80 d 80", "accept"),
        ("A MB T 0", "accept"),
        ("A MB M 4 p arp", "accept"),
    ] {
        assert_eq!(verdict(&["R F MB 10.0.0.9", filter], &packet), expected, "{filter}");
    }
    assert_eq!(
        verdict(&["R F MB 10.0.0.9", "A MB T 2 d 81", "A MB #4 I 2", "A MB #3 I 2"], &packet),
        "drop #3"
    );
    assert_eq!(verdict(&["R F MB 10.0.0.9", "A MB T 2 d 80", "A MB I 8 p udp"], &packet), "accept");
}

#[test]
fn filters_go_before_balancing_and_the_own_address_before_others() {
    let packet = frame([10, 0, 0, 1], 1000, 80);
    let balance = "R L MB 10.0.0.9 0 10.0.0.5";
    assert_eq!(verdict(&[balance], &packet), "10.0.0.9 -> 10.0.0.5");
    assert_eq!(verdict(&[balance, "R F MB 10.0.0.9", "A MB T 2 d 80"], &packet), "drop #1");
    assert_eq!(verdict(&["R L MB 10.0.0.7 0 10.0.0.6", balance], &packet), "10.0.0.9 -> 10.0.0.5");
    assert_eq!(verdict(&["R L MB 10.0.0.7 0 10.0.0.6"], &packet), "10.0.0.7 -> 10.0.0.6");
    assert_eq!(verdict(&["R L MB 10.0.0.9 1 10.0.0.1 10.0.0.6"], &packet), "10.0.0.9 -> 10.0.0.6");
    assert_eq!(verdict(&["R L MB 10.0.0.9 1 10.0.0.2 10.0.0.6"], &packet), "accept");
    assert_eq!(
        verdict(&["R L MB 10.0.0.9 0 10.0.0.1"], &packet),
        "accept",
        "from the backend itself"
    );
    assert_eq!(
        verdict(&["R L MB 2001:db8::1 0 2001:db8::2"], &packet),
        "accept",
        "the other family"
    );
}

#[test]
fn the_port_goes_before_the_address_and_pools_take_their_own_only() {
    let packet = frame([10, 0, 0, 1], 1000, 80);
    let all = [
        "R L MB 10.0.0.9 rr 10.0.0.2 10.0.0.3",
        "R L MB 10.0.0.9:80 rr 10.0.0.4:8080",
        "R L MB 10.0.0.9:80/tcp rr 10.0.0.5",
        "R L MB 10.0.0.9:80/udp rr 10.0.0.6",
        "R L MB 10.0.0.8 0 10.0.0.7",
    ];
    for (lines, expected) in [
        (&all[..], "10.0.0.9:80/tcp -> 10.0.0.5:80"),
        (&[all[0], all[1], all[3], all[4]], "10.0.0.9:80 -> 10.0.0.4:8080"),
        (&[all[0], all[3], all[4]], "10.0.0.9 -> 10.0.0.2 10.0.0.3"),
        (&all[3..], "10.0.0.8 -> 10.0.0.7"),
        (&[all[3]], "accept"),
        (&["R L MB 10.0.0.8 rr 10.0.0.7"], "accept"),
        (&["R L MB 10.0.0.8:80 0 10.0.0.7"], "accept"),
        (&["R L MB 10.0.0.9:80 0 10.0.0.7"], "10.0.0.9:80 -> 10.0.0.7:80"),
        (&["R L MB 10.0.0.9:81 0 10.0.0.7", all[4]], "10.0.0.8 -> 10.0.0.7"),
    ] {
        assert_eq!(verdict(lines, &packet), expected, "{lines:?}");
    }
}
