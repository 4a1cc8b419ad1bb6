use super::*;
use crate::policy::Policy;
use crate::service::BackendRef;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

fn policy(line: &str) -> Policy {
    Policy::from_lines(&[line]).unwrap()
}

fn first_frontend(policy: &Policy) -> Frontend {
    *policy
        .get(MiddleboxKey::anywhere(MacAddr([2, 0, 0, 0, 0, 1])))
        .unwrap()
        .services()
        .keys()
        .next()
        .unwrap()
}

fn id(number: u32) -> SlotId {
    SlotId::new(number).unwrap()
}

fn ids(slots: &Slots) -> Vec<u32> {
    slots.iter().map(|(_, slot)| slot.id.get()).collect()
}

#[test]
fn an_id_is_quarantined_before_another_backend_gets_it() {
    let (a, b) = (
        policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2"),
        policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3"),
    );
    let now = Instant::now();
    let mut slots = Slots::default();
    slots.sync_all(&a, &Unobserved, now);
    assert_eq!(ids(&slots), [1]);
    slots.sync_all(&b, &Unobserved, now);
    assert_eq!(ids(&slots), [2]);
    slots.sync_all(&a, &Unobserved, now + QUARANTINE / 2);
    assert_eq!(ids(&slots), [3], "not even the backend that had it");
    slots.sync_all(&b, &Unobserved, now + QUARANTINE * 3);
    assert_eq!(ids(&slots), [1]);
}

#[test]
fn the_ids_of_a_pool_stay_while_other_services_change() {
    let mut policy = policy("R L 2:0:0:0:0:1 10.0.0.1:80 rr 10.0.0.2 10.0.0.3:8080");
    let mut slots = Slots::default();
    let now = Instant::now();
    slots.sync_all(&policy, &Unobserved, now);
    let of_backends = |slots: &Slots| -> Vec<(String, u32)> {
        let backends = slots.iter().filter(|(key, _)| key.backend.ip != key.frontend.ip);
        backends
            .map(|(key, slot)| (format!("{} -> {}", key.frontend, key.backend), slot.id.get()))
            .collect()
    };
    let first = of_backends(&slots);
    assert_eq!(first.len(), 2);
    let own = slots
        .get(&SlotKey::local(
            MiddleboxKey::anywhere(MacAddr([2, 0, 0, 0, 0, 1])),
            first_frontend(&policy),
        ))
        .unwrap()
        .id;
    for line in [
        "B 2:0:0:0:0:1 + 10.0.0.4*5",
        "B 2:0:0:0:0:1 = 10.0.0.2 drain",
        "R L 2:0:0:0:0:1 10.0.0.1 rr 10.0.0.2",
    ] {
        policy.apply_line(line).unwrap();
        slots.sync_all(&policy, &Unobserved, now);
    }
    let all = of_backends(&slots);
    assert!(all.len() == 4 && first.iter().all(|slot| all.contains(slot)), "{first:?} {all:?}");
    assert!(slots.key_of(own).is_some(), "what is the middlebox' own stays so");
    policy.apply_line("R L 2:0:0:0:0:1 10.0.0.1:81 0 10.0.0.9").unwrap();
    slots.sync_all(&policy, &Unobserved, now);
    assert!(
        slots.key_of(own).is_some() && first.iter().all(|slot| of_backends(&slots).contains(slot))
    );
    let of_the_address = all.iter().find(|(name, _)| name.starts_with("10.0.0.1 ->")).unwrap();
    assert!(
        slots.key_of(id(of_the_address.1)).is_none(),
        "some of its flows are another service's now"
    );
    policy.apply_line("R L 2:0:0:0:0:1 10.0.0.1:80/tcp 0 10.0.0.9").unwrap();
    slots.sync_all(&policy, &Unobserved, now);
    assert!(slots.key_of(own).is_none(), "this may be a service's now");
    policy.apply_line("X 2:0:0:0:0:1 L 10.0.0.1:80/tcp").unwrap();
    policy.apply_line("X 2:0:0:0:0:1 L 10.0.0.1:81").unwrap();
    slots.sync_all(&policy, &Unobserved, now);
    let first = of_backends(&slots);
    let number = first.iter().find(|(name, _)| name.ends_with(":8080")).unwrap().1;
    let other = first.iter().find(|(name, _)| name.ends_with(":80")).unwrap().1;
    let key = slots.key_of(id(number)).unwrap();
    assert_eq!((key.ports(), slots.key_of(id(other)).unwrap().ports()), (Some((80, 8080)), None));
    // A backend that is drained has none, and gets another when it is up again.
    let dead = |backend: &BackendRef<'_>| BackendObservation {
        liveness: match backend.name.ip {
            ip if ip == IpAddr::from([10, 0, 0, 3]) => Liveness::Drained,
            _ => Liveness::Alive,
        },
        ..BackendObservation::UNKNOWN
    };
    slots.sync_all(&policy, &dead, now);
    assert_eq!((slots.get(&key), slots.key_of(id(number))), (None, None));
    slots.sync_all(&policy, &Unobserved, now);
    assert!(slots.get(&key).unwrap().id > id(number));
}

#[test]
fn one_guest_cannot_use_up_the_ids() {
    let line = |backend: u32| {
        format!("R L 2:0:0:0:0:1 10.0.0.1 0 {}", IpAddr::from(backend.to_be_bytes()))
    };
    let mut slots = Slots::default();
    let now = Instant::now();
    let sync_all = |slots: &mut Slots, n: u32| {
        slots.sync_all(&policy(&line(0x0b00_0000 + n)), &Unobserved, now)
    };
    let changes = (0..MAX_QUARANTINED * 2).take_while(|n| sync_all(&mut slots, *n)).count();
    assert_eq!(changes, MAX_QUARANTINED as usize);
    let other = policy("R L 2:0:0:0:0:2 10.0.0.1 0 10.0.0.2");
    assert!(slots.sync(
        MiddleboxKey::anywhere(MacAddr([2, 0, 0, 0, 0, 2])),
        other.get(MiddleboxKey::anywhere(MacAddr([2, 0, 0, 0, 0, 2]))),
        &Unobserved,
        now
    ));
    let late = now + QUARANTINE * 2;
    assert!(slots.sync_all(&policy(&line(1)), &Unobserved, late));
}

#[test]
fn rolled_back_ids_are_quarantined() {
    let (a, b) = (
        policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2"),
        policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3"),
    );
    let now = Instant::now();
    let mut slots = Slots::default();
    slots.sync_all(&a, &Unobserved, now);
    let before = slots.clone();
    slots.sync_all(&b, &Unobserved, now);
    assert_eq!(ids(&slots), [2]);
    slots.restore(before, now);
    assert_eq!(ids(&slots), [1], "the kernel still has it");
    slots.sync_all(&b, &Unobserved, now);
    assert_eq!(ids(&slots), [3]);
}

#[test]
fn ids_found_in_the_kernel_are_kept() {
    let a = policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2");
    let now = Instant::now();
    let mut first = Slots::default();
    first.sync_all(&a, &Unobserved, now);
    let (key, slot) = first.iter().next().unwrap();
    let version: SlotVersion = slot.comment(key).parse().unwrap();
    let mut second = Slots::default();
    second.adopt([(id(7), version)], now);
    second.sync_all(
        &a,
        &|_: &BackendRef<'_>| BackendObservation {
            mac: Some(MacAddr([2; 6])),
            ..BackendObservation::UNKNOWN
        },
        now,
    );
    let slot = second.get(&key).unwrap();
    assert_eq!((slot.id, slot.mac), (id(7), Some(MacAddr([2; 6]))));
    second.reserve(id(9), now);
    // A backend under other options is another version.
    second.sync_all(&policy("R L 2:0:0:0:0:1 10.0.0.1 1 10.0.0.9 10.0.0.2"), &Unobserved, now);
    assert_eq!(second.get(&key).unwrap().id, id(10), "the kernel may carry any number up to 9");
}

/// A host whose middleboxes are all on one network.
struct OneNetwork(NetworkId);

impl BackendView for OneNetwork {
    fn observe(&self, _: &BackendRef<'_>, _: NetworkId) -> BackendObservation {
        BackendObservation::UNKNOWN
    }

    fn network(&self, _: MiddleboxKey) -> NetworkId {
        self.0
    }
}

#[test]
fn a_middlebox_that_names_its_network_takes_the_place_of_one_that_was_seen_there() {
    let network = NetworkId::new(1).unwrap();
    let mac = MacAddr([2, 0, 0, 0, 0, 1]);
    let (seen, named) = (MiddleboxKey::anywhere(mac), MiddleboxKey { network, mac });
    let view = OneNetwork(network);
    let now = Instant::now();
    let mut policy = policy("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2");
    let mut slots = Slots::default();
    slots.sync_all(&policy, &view, now);
    assert_eq!(slots.middlebox_at(network, mac), Some(seen));
    let command = nfqd_shmctl::Command::parse("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.3").unwrap();
    policy.apply(network, &command).unwrap();
    slots.sync(named, policy.get(named), &view, now);
    slots.sync(seen, policy.get(seen), &view, now);
    let places = |slots: &Slots| (slots.network_of(named), slots.network_of(seen));
    assert_eq!(places(&slots), (Some(network), None));
    assert_eq!((slots.of(named).count(), slots.of(seen).count()), (1, 0));
    slots.sync_all(&policy, &view, now);
    assert_eq!(places(&slots), (Some(network), None));
    slots.sync(named, None, &view, now);
    slots.sync(seen, policy.get(seen), &view, now);
    assert_eq!(places(&slots), (None, Some(network)));
    assert_eq!((slots.of(named).count(), slots.of(seen).count()), (0, 1));
}

#[test]
fn a_network_has_no_more_backends_than_the_kernel_has_room_for() {
    use crate::limits::BACKENDS_OF_NETWORK;
    let mut policy = Policy::default();
    let backends = |middlebox: u32| {
        let names = (0..100).map(|n| format!("10.{}.{}.{}", middlebox / 200, middlebox % 200, n));
        names.collect::<Vec<_>>().join(" ")
    };
    for n in 0..90_u32 {
        let line = format!("R L 2:0:0:0:0:{n:x} 192.0.2.{n}:80 rr {}", backends(n));
        policy.apply_line(&line).unwrap();
    }
    let now = Instant::now();
    let mut slots = Slots::default();
    assert!(!slots.sync_all(&policy, &Unobserved, now));
    let all: BTreeSet<IpAddr> = slots.iter().map(|(key, _)| key.backend.ip).collect();
    let backends = all.iter().filter(|ip| slots.is_backend(NetworkId::ANY, **ip)).count();
    assert_eq!(backends, BACKENDS_OF_NETWORK as usize);
    // A middlebox that leaves makes room, and one that shares its backends needs none.
    let all = policy.middleboxes().clone();
    let (key, first) = all.iter().next().unwrap();
    assert!(slots.sync(*key, Some(first), &Unobserved, now));
    slots.sync(*key, None, &Unobserved, now);
    let (last, its) = all.iter().next_back().unwrap();
    assert!(slots.sync(*last, Some(its), &Unobserved, now));
    assert_eq!(slots.of(*last).count(), 101, "its own address is one");
}

/// The answers that a removed backend still sends on its flows must not pass untranslated.
#[test]
fn a_removed_backend_is_known_for_some_time() {
    let mut policy = policy("R L 2:0:0:0:0:1 10.0.0.1:80 rr 10.0.0.2 10.0.0.3");
    let (mut slots, now) = (Slots::default(), Instant::now());
    let ip = IpAddr::from([10, 0, 0, 2]);
    slots.sync_all(&policy, &Unobserved, now);
    let before = slots.clone();
    policy.apply_line("B 2:0:0:0:0:1 - 10.0.0.2").unwrap();
    slots.sync_all(&policy, &Unobserved, now);
    assert!(
        slots.is_backend(NetworkId::ANY, ip) && slots.iter().all(|(key, _)| key.backend.ip != ip)
    );
    assert_eq!(slots.changed(&before).len(), 1);
    let later = now + Duration::from_secs(959);
    assert!(slots.with_expired_backends(later).is_empty());
    let over = now + Duration::from_secs(960);
    assert_eq!(slots.with_expired_backends(over).len(), 1);
    let before = slots.clone();
    slots.sync_all(&policy, &Unobserved, over);
    assert!(!slots.is_backend(NetworkId::ANY, ip) && slots.with_expired_backends(over).is_empty());
    assert_eq!(slots.changed(&before).len(), 1, "the kernel follows");
}
