use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn slot(number: u32) -> SlotId {
    SlotId::new(number).unwrap()
}

fn original(client: u32, protocol: Protocol) -> OriginalTuple {
    OriginalTuple {
        middlebox: MiddleboxKey::anywhere(nfqd_shmctl::MacAddr([2; 6])),
        client: IpAddr::from(client.to_be_bytes()),
        frontend: IpAddr::from([10, 0, 0, 9]),
        protocol,
        ports: Ports { source: 1000, destination: 80 },
    }
}

fn reply(client: u32, protocol: Protocol) -> ReplyTuple {
    ReplyTuple {
        network: NetworkId::ANY,
        backend: IpAddr::from([10, 0, 0, 3]),
        client: IpAddr::from(client.to_be_bytes()),
        protocol,
        ports: Ports { source: 8080, destination: 1000 },
    }
}

const GOES_ON: FlowEvent = FlowEvent::Segment { acknowledgement: 5 };

fn insert(flows: &FlowTable, client: u32, protocol: Protocol, state: FlowState, now: u32) {
    flows.insert(
        original(client, protocol),
        Some(reply(client, protocol)),
        slot(7),
        (state, UDP_TIMEOUT),
        now,
    );
}

#[test]
fn a_connection_lives_its_states() {
    let flows = FlowTable::new(100);
    let (there, back) = (original(1, Protocol::TCP), reply(1, Protocol::TCP));
    insert(&flows, 1, Protocol::TCP, FlowState::Opening, 0);
    let state = |event: FlowEvent, now: u32| {
        flows.record_original(&there, event, now, Some).map(|found| found.state)
    };
    let back_at =
        |event: FlowEvent, now: u32| flows.record_reply(&back, event, now, Some).unwrap().state;
    assert_eq!(state(FlowEvent::Syn, 10), Some(FlowState::Opening));
    assert_eq!(state(GOES_ON, 10), Some(FlowState::Opening), "the backend has not answered");
    assert_eq!(back_at(FlowEvent::SynAck(6), 11), FlowState::Opening);
    assert_eq!(state(GOES_ON, 11), Some(FlowState::Opening), "not what the backend said");
    assert_eq!(back_at(FlowEvent::SynAck(5), 11), FlowState::Opening);
    assert_eq!(state(GOES_ON, 12), Some(FlowState::Established));
    assert_eq!((state(GOES_ON, 7000), flows.live(slot(7))), (Some(FlowState::Established), 1));
    assert_eq!((state(FlowEvent::Fin, 7001), flows.live(slot(7))), (Some(FlowState::Closing), 0));
    assert_eq!(state(GOES_ON, 7002), Some(FlowState::Closing));
    assert_eq!((state(GOES_ON, 7242), flows.len()), (None, 1), "over, not yet forgotten");
    flows.expire(7242);
    assert_eq!(flows.len(), 0);
    // Half open for too long; reset by the backend.
    insert(&flows, 1, Protocol::TCP, FlowState::Opening, 0);
    assert_eq!(state(GOES_ON, 240), None);
    insert(&flows, 1, Protocol::TCP, FlowState::Established, 0);
    assert_eq!(back_at(FlowEvent::Rst, 1), FlowState::Closing);
    assert_eq!(state(GOES_ON, 240), Some(FlowState::Closing), "it lives as long as it is seen");
    assert_eq!(state(GOES_ON, 479), Some(FlowState::Closing));
    // A client that continues has not sent the RST.
    assert_eq!((back_at(FlowEvent::Reply, 480), flows.live(slot(7))), (FlowState::Established, 1));
    assert_eq!((state(FlowEvent::Rst, 481), flows.live(slot(7))), (Some(FlowState::Closing), 0));
    assert_eq!(back_at(FlowEvent::Reply, 482), FlowState::Closing);
    assert_eq!((state(GOES_ON, 483), flows.live(slot(7))), (Some(FlowState::Established), 1));
    assert_eq!(state(FlowEvent::Fin, 484), Some(FlowState::Closing));
    assert_eq!(
        (state(GOES_ON, 485), back_at(FlowEvent::Reply, 485)),
        (Some(FlowState::Closing), FlowState::Closing)
    );
    assert_eq!(state(FlowEvent::Rst, 486), Some(FlowState::Closing));
    assert_eq!(state(GOES_ON, 487), Some(FlowState::Closing), "it was at its end before");
    // UDP that stays is a stream.
    insert(&flows, 2, Protocol::UDP, FlowState::Datagram, 0);
    let udp = |now: u32| {
        flows
            .record_original(&original(2, Protocol::UDP), FlowEvent::Datagram, now, Some)
            .unwrap()
            .state
    };
    assert_eq!(
        (udp(10), udp(60), udp(61)),
        (FlowState::Datagram, FlowState::Stream, FlowState::Stream)
    );
}

#[test]
fn a_flood_evicts_only_its_own_entries() {
    let flows = FlowTable::new(6400);
    for client in 0..2000 {
        insert(&flows, client, Protocol::TCP, FlowState::Established, 0);
    }
    for client in 10_000..200_000 {
        insert(&flows, client, Protocol::TCP, FlowState::Opening, 1);
        assert!(
            flows
                .record_original(&original(client, Protocol::TCP), FlowEvent::Syn, 1, Some)
                .is_some(),
            "the newest"
        );
    }
    let kept = (0..2000)
        .filter(|&client| flows.slot_of(&original(client, Protocol::TCP), 2) == Some(slot(7)))
        .count();
    assert_eq!((kept, flows.evictions().established), (2000, 0));
    assert!(flows.len() <= flows.capacity() && flows.evictions().total > 180_000);
    // Full of established flows it takes new ones all the same.
    for client in 10_000..30_000 {
        insert(&flows, client, Protocol::TCP, FlowState::Established, 2);
    }
    assert!(flows.evictions().established > 0 && flows.live(slot(7)) as usize == flows.len());
}

#[test]
fn a_full_table_has_room_for_opening_connections() {
    let flows = FlowTable::new(64_000);
    for client in 0..90_000 {
        insert(&flows, client, Protocol::TCP, FlowState::Established, 0);
    }
    for client in 100_000..100_100 {
        insert(&flows, client, Protocol::TCP, FlowState::Opening, 1);
    }
    let opening =
        (100_000..100_100).filter(|&n| flows.slot_of(&original(n, Protocol::TCP), 1).is_some());
    assert_eq!(opening.count(), 100);
}

#[test]
fn udp_does_not_evict_opening_connections() {
    let flows = FlowTable::new(6400);
    for client in 0..20_000 {
        insert(&flows, client, Protocol::UDP, FlowState::Datagram, 0);
        if client % 100 == 0 {
            insert(&flows, 100_000 + client, Protocol::TCP, FlowState::Opening, 0);
        }
    }
    let opening = (0..20_000).step_by(100);
    let kept = opening
        .filter(|n| flows.slot_of(&original(100_000 + n, Protocol::TCP), 1).is_some())
        .count();
    assert_eq!(kept, 200);
}

#[test]
fn the_kernel_is_updated_at_state_changes_and_otherwise_seldom() {
    let flows = FlowTable::new(100);
    insert(&flows, 1, Protocol::TCP, FlowState::Opening, 0);
    let there = |event: FlowEvent, now: u32| {
        flows.record_original(&original(1, Protocol::TCP), event, now, Some).unwrap().may_install
    };
    let back = |event: FlowEvent, now: u32| {
        flows.record_reply(&reply(1, Protocol::TCP), event, now, Some).unwrap().may_install
    };
    assert!(back(FlowEvent::SynAck(5), 0) && !back(FlowEvent::Reply, 1));
    assert!(there(GOES_ON, 0), "it is established by this");
    assert!(!there(GOES_ON, 1) && !there(FlowEvent::Syn, 4) && there(GOES_ON, 5));
    assert!(there(FlowEvent::Fin, 6));
    assert!((7..11).all(|now| !there(FlowEvent::Fin, now)), "nor does who closes again and again");
}

#[test]
fn a_flow_takes_the_slot_that_its_backend_has_now() {
    let flows = FlowTable::new(100);
    insert(&flows, 1, Protocol::TCP, FlowState::Established, 0);
    let there = original(1, Protocol::TCP);
    let found = flows
        .record_original(&there, GOES_ON, 1, |old| (old == slot(7)).then_some(slot(9)))
        .unwrap();
    assert_eq!(
        (found.slot, found.current, flows.live(slot(7)), flows.live(slot(9))),
        (slot(7), Some(slot(9)), 0, 1)
    );
    assert!(found.may_install, "the kernel remembers another slot");
    assert!(
        flows
            .record_reply(&reply(1, Protocol::TCP), FlowEvent::Reply, 1, Some)
            .unwrap()
            .may_install
    );
    let found = flows.record_original(&there, GOES_ON, 1, |_| None).unwrap();
    assert_eq!((found.slot, found.current, flows.live(slot(9))), (slot(9), None, 1));
    // Without a slot it is left to its time: the number will be another's.
    let back =
        |now: u32| flows.record_reply(&reply(1, Protocol::TCP), FlowEvent::Reply, now, |_| None);
    assert!(back(7000).is_some() && back(7440).is_some());
    assert_eq!((back(7441), flows.record_original(&there, GOES_ON, 7441, Some)), (None, None));
}

#[test]
fn replies_of_two_flows_cannot_be_confused() {
    let flows = FlowTable::new(100);
    insert(&flows, 1, Protocol::TCP, FlowState::Established, 0);
    let mut other = original(1, Protocol::TCP);
    other.frontend = IpAddr::from([10, 0, 0, 8]);
    let back = reply(1, Protocol::TCP);
    let is_taken = |back: &ReplyTuple, original: &OriginalTuple, now: u32| {
        flows.is_reply_taken(back, original, now, |_| true)
    };
    assert!(is_taken(&back, &other, 1));
    assert!(!flows.is_reply_taken(&back, &other, 1, |_| false), "its service is gone");
    let mut rebuilt = original(1, Protocol::TCP);
    assert!(!is_taken(&back, &rebuilt, 1), "it is the same");
    rebuilt.middlebox = MiddleboxKey::anywhere(nfqd_shmctl::MacAddr([9; 6]));
    assert!(!is_taken(&back, &rebuilt, 1), "the middlebox has another MAC now");
    assert!(!is_taken(&reply(1, Protocol::UDP), &other, 1), "another protocol");
    flows.record_original(&original(1, Protocol::TCP), FlowEvent::Fin, 2, Some);
    assert!(!is_taken(&back, &other, 3), "it is at its end");
    flows.insert(other, Some(back), slot(9), (FlowState::Opening, UDP_TIMEOUT), 3);
    assert_eq!((flows.slot_of_reply(&back, 3), flows.len()), (Some(slot(9)), 2));
    let first = flows.record_original(&original(1, Protocol::TCP), FlowEvent::Fin, 3, Some);
    assert!(first.is_some_and(|found| !found.has_reply), "the kernel may still have it");
}

proptest! {
    /// Against a map: what is inserted is found by both keys until it is removed or over.
    #[test]
    fn the_table_is_a_map(steps in proptest::collection::vec((0..4_u8, 0..40_u32, 0..3_u32), 1..300)) {
        let flows = FlowTable::new(1 << 12);
        let mut model: BTreeMap<u32, (SlotId, u32)> = BTreeMap::new();
        let mut now = 0;
        for (step, client, pass) in steps {
            now += pass * 50;
            model.retain(|_, (_, seen)| *seen + UDP_TIMEOUT > now);
            let (there, back) = (original(client, Protocol::UDP), reply(client, Protocol::UDP));
            match step {
                0 => {
                    flows.insert(there, Some(back), slot(client + 1), (FlowState::Datagram, UDP_TIMEOUT), now);
                    model.insert(client, (slot(client + 1), now));
                }
                1 => {
                    let found = flows.record_original(&there, FlowEvent::Datagram, now, Some).map(|found| found.slot);
                    prop_assert_eq!(found, model.get(&client).map(|(found, _)| *found));
                    model.entry(client).and_modify(|(_, seen)| *seen = now);
                }
                2 => {
                    prop_assert_eq!(flows.slot_of_reply(&back, now), model.get(&client).map(|(found, _)| *found));
                }
                _ => {
                    flows.remove(&there);
                    model.remove(&client);
                }
            }
            flows.expire(now);
            prop_assert_eq!(flows.len(), model.len());
            let live: u32 = (1..=40).map(|number| flows.live(slot(number))).sum();
            prop_assert_eq!(live as usize, model.len());
        }
    }
}

/// Flows with long timeouts do not keep those with short ones from being removed.
#[test]
fn each_udp_flow_expires_after_its_own_time() {
    let flows = FlowTable::new(1000);
    let (short, long) = (10, 4000);
    for client in 0..100_u32 {
        let timeout = if client % 2 == 0 { long } else { short };
        let state = (FlowState::Datagram, timeout);
        flows.insert(original(client, Protocol::UDP), None, slot(7), state, 0);
    }
    let found =
        |client: u32, now: u32| flows.slot_of(&original(client, Protocol::UDP), now).is_some();
    assert!(found(1, short - 1) && !found(1, short) && found(2, short));
    flows.expire(short);
    assert_eq!((flows.len(), flows.live(slot(7))), (50, 50));
    assert!(found(2, long - 1) && !found(2, long));
    flows.expire(long);
    assert!(flows.is_empty());
}
