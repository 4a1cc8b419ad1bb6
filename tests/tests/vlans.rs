//! The VLANs of a VLAN-aware bridge as networks of their own. Needs a kernel with VLAN filtering.

#![allow(clippy::unwrap_used)]

use nfqd_tests::daemon::Daemon;
use nfqd_tests::netns::{Host, in_netns, run};
use nfqd_tests::segment::{Guest, PORT, Segment, middlebox_on, wait_for_backends};
use nfqd_tests::topology::{BACKEND, VM, VM_MAC, connect_plain, pings, wait_for, who};

const VLANS: [u16; 3] = [10, 20, 30];

/// A VLAN-aware bridge with the same hosts in three VLANs on access ports, and a trunk to a host that
/// is in all of them.
struct Lab {
    segments: Vec<Segment>,
    trunk: Host,
}

impl Lab {
    fn new() -> Lab {
        run("ip link add br0 type bridge vlan_filtering 1 vlan_default_pvid 0 mcast_snooping 0");
        run("ip link set br0 up");
        let names = [["vm10", "backend10"], ["vm20", "backend20"], ["vm30", "backend30"]];
        let segments = ["10", "20", "30"].into_iter().zip(names);
        let segments: Vec<Segment> =
            segments.map(|(vlan, names)| Segment::new(vlan, names)).collect();
        let trunk = Host::linked("trunk", "02:00:00:00:00:ee", &[]);
        run("ip link set trunk master br0");
        for (segment, vlan) in segments.iter().zip(VLANS) {
            for port in segment.ports() {
                run(&format!("ip link set {port} master br0"));
                run(&format!("bridge vlan add vid {vlan} dev {port} pvid untagged"));
            }
            run(&format!("bridge vlan add vid {vlan} dev trunk"));
            trunk.run(&format!("ip link add link eth0 name v{vlan} type vlan id {vlan}"));
            trunk.run(&format!("ip link set v{vlan} up"));
            segment.client.run(&format!("ping -q -c 1 -W 5 {VM}"));
        }
        Lab { segments, trunk }
    }

    /// Gives the host behind the trunk its address in one VLAN only.
    fn trunk_in(&self, vlan: u16) {
        for other in VLANS {
            self.trunk.run(&format!("ip addr flush dev v{other}"));
        }
        self.trunk.run(&format!("ip addr add 10.129.126.7/24 dev v{vlan}"));
    }
}

#[test]
#[ignore = "needs VLAN filtering: tests/run.sh uml"]
fn vlans_with_the_same_addresses_never_meet() {
    for mode in ["full", "off"] {
        in_netns(move || {
            let lab = Lab::new();
            let directory = tempfile::tempdir().unwrap();
            let path = |vlan: u16| directory.path().join(vlan.to_string());
            let shms: Vec<String> = VLANS
                .iter()
                .map(|vlan| format!("{},bridge=br0,vlan={vlan}", path(*vlan).display()))
                .collect();
            let mut arguments = vec!["--fast-path", mode];
            arguments.extend(shms.iter().flat_map(|shm| ["--shm", shm.as_str()]));
            let daemon = Daemon::start(&arguments);
            let guest = |vlan: u16| Guest(path(vlan));
            guest(10).must(&format!("R L {VM_MAC} {VM}:80 rr {BACKEND} check=arp"));
            guest(20).must(&format!("R L {VM_MAC} {VM} 0 {BACKEND}"));
            guest(30).must(&format!("R F {VM_MAC} {VM}"));
            guest(30).must(&format!("A {VM_MAC} T 2 d 80"));
            for vlan in [10, 20] {
                wait_for_backends(&daemon, &format!("br0 vlan {vlan}"));
            }
            let expected = [Some("backend10"), Some("backend20"), None];
            for ((segment, expected), vlan) in lab.segments.iter().zip(expected).zip(VLANS) {
                assert_eq!(segment.at_vm().as_deref(), expected, "{mode}, VLAN {vlan}");
                lab.trunk_in(vlan);
                let tagged = who(&lab.trunk, VM, PORT);
                assert_eq!(tagged.as_deref(), expected, "{mode}, VLAN {vlan}, tagged");
            }
            assert!(pings(&lab.segments[2].client, VM));
            // The backend of one VLAN dies; those of the others do not.
            run("ip link set b10 down");
            wait_for("its death", || {
                let backend = &middlebox_on(&daemon, "br0 vlan 10").services[0].backends[0];
                backend.state == nfqd::api::BackendState::Dead
            });
            assert_eq!(lab.segments[0].at_vm(), None, "{mode}: refused");
            assert_eq!(lab.segments[1].at_vm().as_deref(), Some("backend20"), "{mode}");
        });
    }
}

#[test]
#[ignore = "needs VLAN filtering: tests/run.sh uml"]
fn an_unbound_middlebox_is_in_the_vlan_where_its_mac_is_seen() {
    in_netns(|| {
        let lab = Lab::new();
        let [_, second, _] = &lab.segments[..] else { panic!() };
        // Only one of the three is left with the MAC.
        for vlan in [10, 30] {
            run(&format!("ip link set m{vlan} nomaster"));
        }
        let daemon = Daemon::start(&[]);
        daemon.must(&format!("R L {VM_MAC} {VM}:80 rr {BACKEND} check=tcp"));
        wait_for_backends(&daemon, "br0 vlan 20");
        assert_eq!(second.at_vm().as_deref(), Some("backend20"));
        // The host cannot connect there, which says nothing about the backend.
        let backend = &middlebox_on(&daemon, "br0 vlan 20").services[0].backends[0];
        assert_eq!(backend.state, nfqd::api::BackendState::Up);
        wait_for("the reason", || {
            let backend = &middlebox_on(&daemon, "br0 vlan 20").services[0].backends[0];
            backend.health_unknown_reason.as_deref().is_some_and(|why| why.contains("no address"))
        });
        // With an address in the VLAN it can.
        run("bridge vlan add vid 20 dev br0 self");
        run("ip link add link br0 name br0.20 type vlan id 20");
        run("ip addr add 10.129.126.250/24 dev br0.20");
        run("ip link set br0.20 up");
        wait_for("a check", || {
            let backend = &middlebox_on(&daemon, "br0 vlan 20").services[0].backends[0];
            backend.health_unknown_reason.is_none()
        });
        assert_eq!(second.at_vm().as_deref(), Some("backend20"));
        // The VLAN of its port changes, and nfqd follows.
        run("bridge vlan del vid 20 dev m20");
        run("bridge vlan add vid 30 dev m20 pvid untagged");
        second.vm.command("arping").output().ok();
        second.vm.command("ping").args(["-c", "1", "-W", "1", "10.129.126.1"]).output().unwrap();
        wait_for("its new VLAN", || {
            daemon.status().middleboxes[0].network.as_deref() == Some("br0 vlan 30")
        });
        assert!(!connect_plain(&second.client, VM.into(), PORT));
    });
}
