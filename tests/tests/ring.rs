//! The rings of the real daemon, used by nfqd-guest and by a client that was made from their
//! documentation.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::Region;
use nfqd_shmctl::ring::guest::counters;
use nfqd_tests::daemon::{Daemon, NFQD_GUEST, program};
use nfqd_tests::netns::in_netns;
use nfqd_tests::topology::{Server, Topology, VM, VM_MAC, wait_for, who};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs the client in `examples/`, with these commands.
fn client(region: &Path, arguments: &[&str], input: &str) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/ring_client.py");
    let mut child = Command::new("python3")
        .arg(script)
        .arg(region)
        .args(arguments)
        .env("RING_TIMEOUT", "60")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python3");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn lines(output: &Output) -> Vec<String> {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.is_empty(), "{error}");
    String::from_utf8_lossy(&output.stdout).lines().map(str::to_string).collect()
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_client_made_from_the_documentation_is_served() {
    in_netns(|| {
        let topology = Topology::new(true);
        let daemon = Daemon::start_bound(&[], VM_MAC);
        let server = Server::start(topology.vm.as_ref().unwrap(), "vm", 80);
        let at_vm = || who(&topology.client, VM, server.port());
        wait_for("the VM answers", || at_vm().as_deref() == Some("vm"));

        let tell = |commands: &[&str]| client(&daemon.region(), commands, "");
        let register = format!("R F {VM_MAC} {VM}");
        let deny = format!("A {VM_MAC} I 8 p 6");
        let replies = tell(&[&register, &deny, "R F 2:0:0:0:0:9 10.0.0.1", "nonsense"]);
        assert_eq!(replies.status.code(), Some(1));
        let replies = lines(&replies);
        assert_eq!(replies[..2], [format!("OK {register}"), format!("OK A {VM_MAC} I 8 p tcp")]);
        assert!(replies[2].starts_with("ERR denied column 5: "), "{}", replies[2]);
        assert!(replies[3].starts_with("ERR syntax column 1: 'nonsense'"), "{}", replies[3]);
        assert_eq!(at_vm(), None, "what was acknowledged is enforced");

        // The counters come without a command.
        let region = Region::open(&daemon.region()).unwrap();
        let denied = || counters(&region).and_then(|page| page.middleboxes.first().copied());
        wait_for("the denied packets are in the region", || {
            denied().is_some_and(|middlebox| middlebox.denied > 0 && middlebox.has_firewall)
        });
        let printed = lines(&tell(&["--counters"]));
        assert_eq!(printed.len(), 1);
        assert!(printed[0].starts_with(&format!("{VM_MAC} packets ")), "{printed:?}");

        // A packet that an allow rule lets pass is not denied.
        let before = denied().unwrap();
        lines(&tell(&[&format!("A {VM_MAC} +1 I 1 s 10.129.126.1")]));
        assert_eq!(at_vm().as_deref(), Some("vm"));
        wait_for("packets that pass are counted", || {
            denied().is_some_and(|now| now.packets > before.packets)
        });
        assert_eq!(denied().unwrap().denied, before.denied);

        // A query about hundreds of rules arrives whole; the mailbox has its end cut.
        let rules =
            |rule: usize| format!("A {VM_MAC} #{rule} I 2 d 10.1.{}.{}", rule / 256, rule % 256);
        let commands: Vec<String> = (2..=500).map(rules).collect();
        let replies = lines(&client(&daemon.region(), &["-"], &commands.join("\n")));
        assert!(replies.len() == 499 && replies.iter().all(|reply| reply.starts_with("OK A ")));
        let query = lines(&tell(&["Q"]));
        assert_eq!(query.len(), 1);
        assert!((2..=500).all(|rule| query[0].contains(&format!(" #{rule} "))), "{}", query[0]);
        assert!(!query[0].contains("and more"), "{}", query[0]);
        assert!(daemon.tell("Q").ends_with("and more, ask for one middlebox"));
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn commands_are_acknowledged_once_and_in_order_while_the_daemon_is_killed() {
    in_netns(|| {
        let _topology = Topology::new(false);
        let mut daemon = Daemon::start_bound(&[], VM_MAC);
        let register = format!("R F {VM_MAC} {VM}");
        assert_eq!(lines(&client(&daemon.region(), &[&register], "")), [format!("OK {register}")]);
        let command =
            |number: usize| format!("A {VM_MAC} #{} I 8 p {}", number % 7 + 2, number % 256);
        let commands: Vec<String> = (0..500).map(command).collect();
        let region = daemon.region();
        let sent = commands.join("\n");
        let sender = std::thread::spawn(move || lines(&client(&region, &["-"], &sent)));
        for _ in 0..4 {
            std::thread::sleep(std::time::Duration::from_millis(700));
            daemon.kill();
            daemon.restart();
        }
        let replies = sender.join().unwrap();
        assert_eq!(replies.len(), commands.len());
        for (number, reply) in replies.iter().enumerate() {
            let expected = format!("OK A {VM_MAC} #{} I 8 p ", number % 7 + 2);
            assert!(reply.starts_with(&expected), "{number}: {reply}");
        }
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn nfqd_guest_sends_through_the_rings_what_the_mailbox_cannot_hold() {
    in_netns(|| {
        let _topology = Topology::new(false);
        let mut daemon = Daemon::start_bound(&[], VM_MAC);
        let guest = |arguments: &[&str]| {
            let mut command = Command::new(program(NFQD_GUEST));
            command.arg("--shm").arg(daemon.region()).args(arguments).output().unwrap()
        };
        let output = guest(&["R", "F", VM_MAC, &VM.to_string()]);
        assert_eq!(lines(&output), [format!("OK R F {VM_MAC} {VM}")]);
        // Nothing of it went through the mailbox.
        let region = Region::open(&daemon.region()).unwrap();
        assert_eq!(region.load(0), 0);
        let output = guest(&["-w", &format!("@R F {VM_MAC} {VM}@")]);
        assert_eq!((region.load(0), output.status.code()), (b'$', Some(0)));
        let file = daemon.region().with_file_name("commands");
        let rules = (1..=100).map(|rule| format!("A {VM_MAC} #{rule} I 8 p {rule}\n"));
        std::fs::write(&file, rules.collect::<String>()).unwrap();
        assert_eq!(lines(&guest(&["-f", file.to_str().unwrap()])).len(), 100);
        let query = lines(&guest(&["Q"]));
        assert!(query[0].contains(" #100 "), "{}", query[0]);
        // Nobody takes it, and it is not carried out later.
        daemon.kill();
        let withdrawn = Command::new(program(NFQD_GUEST))
            .arg("--shm")
            .arg(daemon.region())
            .args(["--timeout", "0.2", "X", VM_MAC])
            .output()
            .unwrap();
        assert_eq!(withdrawn.status.code(), Some(3));
        daemon.restart();
        let query = daemon.tell(&format!("Q {VM_MAC}"));
        assert!(query.contains(&format!("R F {VM_MAC}")), "{query}");
    });
}
