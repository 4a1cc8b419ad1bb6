//! The files in `examples/`: each is valid, and does what its comments say.
#![allow(clippy::unwrap_used)]

use nfqd::command_path::command_file::read_commands;
use nfqd::config::{DaemonArgs, FailChoice};
use nfqd_rules::packet::Packet;
use nfqd_shmctl::Action;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

#[test]
fn every_example_has_its_test() {
    let entries = std::fs::read_dir(examples()).unwrap();
    let names: BTreeSet<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let known = ["balancer.commands", "firewall.commands", "nfqd.toml", "ring_client.py"];
    assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), known);
}

#[test]
fn the_configuration_is_read() {
    let config = Some(examples().join("nfqd.toml"));
    let config = DaemonArgs { config, ..DaemonArgs::default() }.resolve().unwrap();
    assert_eq!(
        (config.queues.count, config.channels.len(), config.fail),
        (4, 2, FailChoice::Closed)
    );
    assert!(config.channels.iter().all(|spec| spec.macs.len() == 1 && spec.to.len() == 1));
}

/// A TCP SYN to the middlebox, from this address to this port.
fn syn(source: [u8; 4], port: u16) -> Packet {
    let mut frame = vec![0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(source);
    frame.extend([10, 129, 126, 15, 0x9c, 0x40]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    Packet::from_frame(&frame).unwrap()
}

#[test]
fn the_firewall_lets_in_what_it_says() {
    let policy = read_commands(&examples().join("firewall.commands")).unwrap().policy;
    let (mac, middlebox) = policy.middleboxes().iter().next().unwrap();
    let firewall = middlebox.firewall().unwrap();
    assert_eq!(mac.to_string(), "12:13:14:15:16:17");
    let passes = |packet: &Packet| firewall.decide(packet).action == Action::Allow;
    for (source, port, expected) in [
        ([203, 0, 113, 9], 80, true),
        ([203, 0, 113, 9], 443, true),
        ([203, 0, 113, 9], 22, false),
        ([192, 0, 2, 9], 22, true),
        ([192, 0, 2, 9], 25, false),
    ] {
        assert_eq!(passes(&syn(source, port)), expected, "{source:?} to {port}");
    }
}

#[test]
fn the_balancer_has_its_services() {
    let policy = read_commands(&examples().join("balancer.commands")).unwrap().policy;
    let (_, middlebox) = policy.middleboxes().iter().next().unwrap();
    let services: Vec<(String, usize, usize)> = middlebox
        .services()
        .iter()
        .map(|(frontend, service)| {
            let draining =
                service.backends().values().filter(|backend| backend.drain.is_some()).count();
            (frontend.to_string(), service.backends().len(), draining)
        })
        .collect();
    assert!(services.contains(&("10.129.126.15:80".to_string(), 3, 1)), "{services:?}");
    assert!(services.contains(&("10.129.126.15:53/udp".to_string(), 2, 0)), "{services:?}");
    assert_eq!(middlebox.firewall().unwrap().rules().len(), 1);
}
