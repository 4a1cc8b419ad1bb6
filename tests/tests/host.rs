//! `br-netfilter.sh` up, status and down on a host that is a network namespace.
#![allow(clippy::unwrap_used)]

use nfqd_tests::netns::{in_netns, run};
use std::path::{Path, PathBuf};
use std::process::Command;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../br-netfilter.sh")
}

/// Runs the script with these variables; returns exit code and all output.
fn br_netfilter(directory: &Path, job: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let output = Command::new(script())
        .arg(job)
        .env("RECORD", directory.join("record"))
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn up_twice_and_down_leave_the_host_as_it_was() {
    in_netns(|| {
        let dir = tempfile::tempdir().unwrap();
        run("ip tuntap add tap0 mode tap");
        run("ip tuntap add tap1 mode tap");
        let links = || run("ip -o link show");
        let sysctl = "/proc/sys/net/bridge/bridge-nf-filter-vlan-tagged";
        let (before, value) = (links(), std::fs::read_to_string(sysctl).unwrap());
        let variables = [("PORTS", "tap0 tap1"), ("STEER", "br-netfilter")];

        let (code, text) = br_netfilter(dir.path(), "status", &variables);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("bridge kvmbr0: MISSING"), "{text}");
        let (code, text) = br_netfilter(dir.path(), "up", &variables);
        assert_eq!(code, 0, "{text}");
        assert!(
            text.contains("bridge kvmbr0: created") && text.contains("port tap1: on kvmbr0"),
            "{text}"
        );
        let (code, text) = br_netfilter(dir.path(), "up", &variables);
        assert_eq!(code, 0, "{text}");
        assert!(
            text.contains("bridge kvmbr0: already there") && text.contains("port tap1: already"),
            "{text}"
        );
        let (code, text) = br_netfilter(dir.path(), "status", &variables);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("bridge kvmbr0: present, ports: tap0 tap1"), "{text}");
        assert_eq!(std::fs::read_to_string(sysctl).unwrap(), "1\n");

        let (code, text) = br_netfilter(dir.path(), "down", &[]);
        assert_eq!(code, 0, "{text}");
        run("ip link set tap0 down");
        run("ip link set tap1 down");
        let names = |text: &str| {
            text.lines().map(|l| l.split(':').nth(1).unwrap().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(&links()), names(&before));
        assert!(!links().contains("master"));
        assert_eq!(std::fs::read_to_string(sysctl).unwrap(), value);
        assert_eq!(br_netfilter(dir.path(), "down", &[]), (0, "nothing to undo\n".to_string()));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn foreign_objects_stay_and_mistakes_are_named() {
    in_netns(|| {
        let dir = tempfile::tempdir().unwrap();
        run("ip link add br9 type bridge");
        run("ip tuntap add tap0 mode tap");
        run("ip tuntap add tap1 mode tap");
        assert_eq!(br_netfilter(dir.path(), "up", &[("BRIDGE", "br9")]).0, 0);
        run("ip link set tap1 master br9");
        assert_eq!(br_netfilter(dir.path(), "down", &[]).0, 0);
        assert!(run("ip -o link show master br9").contains("tap1"), "an adopted bridge stays");

        for (variables, expected, words) in [
            (("PORTS", "nope"), 1, "there is no interface 'nope'"),
            (("PORTS", "tap1"), 1, "'tap1' is a port of 'br9'"),
            (("BRIDGE", "tap0"), 1, "not a bridge"),
            (("BRIDGE", "a b"), 1, "not an interface name"),
            (("STEER", "magic"), 1, "write auto, native or br-netfilter"),
        ] {
            let (code, text) = br_netfilter(dir.path(), "up", &[variables]);
            assert_eq!(code, expected, "{text}");
            assert!(text.contains(words), "{text}");
        }
        assert!(!dir.path().join("record").exists(), "nothing was half done");
        assert_eq!(br_netfilter(dir.path(), "sideways", &[]).0, 2);
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_chain_that_drops_forwarded_packets_is_named_with_the_rule_that_lets_them_pass() {
    in_netns(|| {
        let dir = tempfile::tempdir().unwrap();
        let variables = [("STEER", "br-netfilter")];
        assert_eq!(br_netfilter(dir.path(), "up", &variables).0, 0);
        assert_eq!(br_netfilter(dir.path(), "status", &variables).0, 0);
        run("ip addr add 10.9.0.1/24 dev kvmbr0");
        let (code, text) = br_netfilter(dir.path(), "status", &variables);
        assert!(code == 0 && text.contains("the host has an address on kvmbr0"), "{text}");
        run("nft add table ip filter");
        let hook = "{ type filter hook forward priority 0; policy drop; }";
        let added = Command::new("nft").arg(format!("add chain ip filter FORWARD {hook}")).status();
        assert!(added.unwrap().success());
        let rule = "nft insert rule ip filter FORWARD iifname kvmbr0 oifname kvmbr0 accept";
        let (code, text) = br_netfilter(dir.path(), "up", &variables);
        assert!(code == 0 && text.contains(rule), "{text}");
        let (code, text) = br_netfilter(dir.path(), "status", &variables);
        assert!(code == 1 && text.contains("MISSING") && text.contains(rule), "{text}");
        run(rule);
        let (code, text) = br_netfilter(dir.path(), "status", &variables);
        assert!(code == 0 && !text.contains("MISSING"), "{text}");
        assert_eq!(br_netfilter(dir.path(), "down", &[]).0, 0);
    });
}
