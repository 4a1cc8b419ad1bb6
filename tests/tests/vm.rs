//! The whole chain: a virtual machine writes commands into its ivshmem device, and the traffic to
//! it changes.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::Command;
use nfqd_tests::daemon::Daemon;
use nfqd_tests::netns::in_netns;
use nfqd_tests::topology::{
    CLIENT_MAC, Server, Topology, VM, VM_MAC, connect, pings, wait_for, who,
};
use nfqd_tests::vm::{Memory, Vm, directory};
use std::time::{Duration, Instant};

#[test]
#[ignore = "needs root: tests/run.sh vm"]
fn a_virtual_machine_hands_its_work_to_the_host() {
    let files = directory().expect("NFQD_TESTS_VM, a directory of tests/vm/prepare");
    in_netns(move || {
        let topology = Topology::new(false);
        let daemon = Daemon::start(&[]);
        let console = daemon.region().with_file_name("console");
        let memory = Memory::Plain(daemon.region());
        let mut vm = Vm::boot(&files, &memory, VM_MAC, "10.129.126.15/24", &console);
        let server = Server::start(&topology.backend, "backend", 80);
        assert_eq!(vm.run("nc -ll -p 80 -e echo vm > /tmp/nc.log 2>&1 &").0, 0);
        let at_vm = || who(&topology.client, VM, server.port());
        wait_for("the virtual machine answers", || at_vm().as_deref() == Some("vm"));

        let mut send = |message: &str| {
            let (code, output) = vm.run(&format!("nfqd-guest -w '{message}'"));
            assert_eq!(code, 0, "{message}: {output}\n{}", daemon.log());
            assert!(output.starts_with("OK"), "{message}: {output}");
        };
        send("@R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17@");
        wait_for("the backend answers", || at_vm().as_deref() == Some("backend"));
        send("@R F 12:13:14:15:16:17 10.129.126.15@");
        assert_eq!(at_vm().as_deref(), Some("backend"));
        send("@A 12:13:14:15:16:17 M 5 s 1:2:3:4:5:6 p 8@");
        assert_eq!(at_vm().as_deref(), Some("backend"), "another source MAC");
        send(&format!("@A 12:13:14:15:16:17 M 5 s {CLIENT_MAC} p 8@"));
        assert_eq!(at_vm(), None);
        assert_eq!(who(&topology.other, VM, 80).as_deref(), Some("backend"));
        send("@D 12:13:14:15:16:17 M 4 s@");
        assert_eq!(who(&topology.other, VM, 80), None, "all IPv4");
        send("@X 12:13:14:15:16:17 F@");
        let transfer = connect(&topology.client, VM, 80).unwrap();
        assert_eq!(transfer.server, "backend");
        transfer.transfer(256 << 20);
        send("@X 12:13:14:15:16:17@");
        assert_eq!(at_vm().as_deref(), Some("vm"));
        assert!(pings(&topology.client, VM));

        // A command as words; an error; no host that answers.
        let (code, output) = vm.run("nfqd-guest R F 12:13:14:15:16:17 10.129.126.15");
        assert_eq!((code, output.as_str()), (0, "OK R F 12:13:14:15:16:17 10.129.126.15\n"));
        let (code, output) = vm.run("nfqd-guest A 12:13:14:15:16:17 I 99");
        assert_eq!(code, 1);
        assert!(output.starts_with("ERR value column 23: '99'"), "{output}");
        // In words: the MAC is that of the only interface, the number of a rule the next one.
        let mut say = |words: &str| {
            let (code, output) = vm.run(&format!("nfqd-guest {words}"));
            assert_eq!(code, 0, "{words}: {output}");
            output
        };
        say("register 10.129.126.15");
        say("deny from 10.129.126.1 tcp to-port 80");
        assert_eq!(at_vm(), None);
        let rules = say("deny from 10.129.126.99");
        assert!(rules.starts_with("OK A 12:13:14:15:16:17 #2 "), "{rules}");
        say("undo '#1'");
        assert_eq!(at_vm().as_deref(), Some("vm"));
        let status = say("--json status");
        assert!(status.starts_with("{\"replies\":[{\"ok\":true,\"text\":\""), "{status}");
        // Four at once: each gets the reply to its own command.
        let script = "for n in 1 2 3 4; do (for m in 1 2 3 4 5 6 7 8; do nfqd-guest X 2:0:0:0:$n:$m; done) > \
                      /tmp/out.$n 2>&1 & done; wait; for n in 1 2 3 4; do grep -c \"'2:0:0:0:$n:\" /tmp/out.$n; done";
        let (code, output) = vm.run(script);
        assert_eq!((code, output.as_str()), (0, "8\n8\n8\n8\n"));
        drop(daemon);
        let (code, output) = vm.run("nfqd-guest --timeout 0.2 X 12:13:14:15:16:17");
        assert_eq!(code, 3);
        assert!(output.contains("check that nfqd runs on the host"), "{output}");
        let (code, output) = vm.run("nfqd-guest --device 0000:00:1f.0 X 12:13:14:15:16:17");
        assert_eq!(code, 3, "{output}");
    });
}

/// The number of commands in a row, from `NFQD_TESTS_COMMANDS`.
fn commands() -> u32 {
    let text = std::env::var("NFQD_TESTS_COMMANDS").ok();
    text.map_or(3000, |text| text.parse().expect("a number"))
}

/// Commands of every kind, with every class, key and kind of value, and more rules than a mailbox could tell of.
fn language() -> Vec<String> {
    let mut out = Vec::new();
    for command in [
        "R F {mac} 10.129.126.15 deny",
        "R F {mac} 10.129.126.15",
        "A {mac} I 15 s 10.0.0.0/8 d 10.129.126.15 t 16 p tcp",
        "A {mac} #2 I 1 s 10.0.0.1-10.0.0.9",
        "A {mac} #3 I 3 s 2001:db8::/32 d 2001:db8::f",
        "A {mac} #4 M 7 s 2:0:0:0:0:1/ff:ff:ff:0:0:0 d 1:0:5e:0:0:1 p 0x800",
        "A {mac} #5 T 3 s 1024-65535 d 80",
        "A {mac} #6 U 2 d 53",
        "A {mac} #7 V 1 s 100-200",
        "A {mac} #8 C 1 t echo-request",
        "A {mac} +1 T 2 d 22",
        "D {mac} #5 T 2 s",
        "D {mac} #6",
        "R L {mac} 10.129.126.15 0 10.129.126.17",
        "R L {mac} 10.129.126.15 1 10.129.126.3 10.129.126.17",
        "X {mac} L",
        "R L {mac} 10.129.126.15:80/tcp rr 10.129.126.17 10.129.126.18:8080@2:0:0:0:1:2*3 check=tcp",
        "R L {mac} 10.129.126.15:53/udp hash 10.129.126.17 10.129.126.18 seed=7",
        "R L {mac} 10.129.126.15:443 least 10.129.126.17 10.129.126.18",
        "R L {mac} [2001:db8::f]:80 rr 2001:db8::17",
        "B {mac} 10.129.126.15:443 + 10.129.126.19*2",
        "B {mac} 10.129.126.15:443 = 10.129.126.19 drain",
        "B {mac} 10.129.126.15:443 = 10.129.126.19 up",
        "B {mac} 10.129.126.15:443 - 10.129.126.18",
        "X {mac} L 10.129.126.15:443",
        "X {mac} F",
        "R F {mac} 10.129.126.15",
    ] {
        out.push(command.replace("{mac}", VM_MAC));
    }
    out.extend((1..=1022_u16).map(|number| {
        let [high, low] = number.to_be_bytes();
        format!("A {VM_MAC} #{number} I 1 s 10.0.{high}.{low}")
    }));
    out
}

#[test]
#[ignore = "needs root: tests/run.sh vm"]
fn a_virtual_machine_rings_and_goes_on_while_nfqd_is_killed() {
    let files = directory().expect("NFQD_TESTS_VM, a directory of tests/vm/prepare");
    in_netns(move || {
        let _topology = Topology::new(false);
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vm.sock");
        let channel = format!("{},mac={VM_MAC},rate=1000000", socket.display());
        let mut daemon = Daemon::start(&["--doorbell", &channel]);
        let console = folder.path().join("console");
        let memory = Memory::Doorbell(socket);
        let mut vm = Vm::boot(&files, &memory, VM_MAC, "10.129.126.15/24", &console);
        let connected = |daemon: &Daemon| {
            let channels = daemon.status().channels;
            channels.iter().any(|channel| channel.connected == Some(true))
        };
        assert!(connected(&daemon), "{}", daemon.log());
        let must = |vm: &mut Vm, daemon: &Daemon, command: &str, answer: &str| {
            let (code, output) = vm.run(command);
            assert_eq!((code, output.trim_end()), (0, answer), "{command}\n{}", daemon.log());
        };
        let register = format!("R F {VM_MAC} 10.129.126.15");
        must(&mut vm, &daemon, &format!("nfqd-guest {register}"), &format!("OK {register}"));
        must(&mut vm, &daemon, &format!("nfqd-guest -w '@{register}@'"), &format!("OK {register}"));

        // QEMU connects once. What it was given is kept while nfqd is not there.
        daemon.kill();
        let (code, output) = vm.run("nfqd-guest --timeout 0.5 Q");
        assert_eq!(code, 3, "{output}");
        daemon.restart();
        assert!(connected(&daemon), "{}", daemon.log());
        must(&mut vm, &daemon, &format!("nfqd-guest {register}"), &format!("OK {register}"));

        // The whole language, with its replies.
        let language = language();
        let text = language.join("\\n");
        let (code, output) =
            vm.run(&format!("printf '{text}\\n' > /tmp/language; nfqd-guest -f /tmp/language"));
        let expected: String =
            language.iter().map(|line| format!("OK {}\n", Command::parse(line).unwrap())).collect();
        assert_eq!((code, output), (0, expected));
        let (code, output) = vm.run("nfqd-guest Q");
        assert!(code == 0 && output.starts_with(&format!("OK {VM_MAC} packets ")), "{output}");
        assert!(
            output.contains("#1022 I 1 s 10.0.3.254") && output.len() > 50_000,
            "{}",
            output.len()
        );
        must(&mut vm, &daemon, &format!("nfqd-guest X {VM_MAC}"), &format!("OK X {VM_MAC} A"));
        must(&mut vm, &daemon, &format!("nfqd-guest {register}"), &format!("OK {register}"));

        // Each of many commands is acknowledged once and in order, over kills.
        let count = commands();
        let script = format!(
            "for n in $(seq {count}); do echo \"A {VM_MAC} #2 T 2 d $((n % 65535 + 1))\"; done > /tmp/commands; \
             (nfqd-guest --timeout 60 -f /tmp/commands > /tmp/replies 2>&1; echo $? > /tmp/code) &"
        );
        assert_eq!(vm.run(&script).0, 0);
        let mut kills = 0;
        let deadline = Instant::now() + Duration::from_secs(280);
        while vm.run("test -e /tmp/code").0 != 0 {
            assert!(Instant::now() < deadline, "{}", daemon.log());
            daemon.kill();
            daemon.restart();
            kills += 1;
            std::thread::sleep(Duration::from_millis(700));
        }
        let check = "cat /tmp/code; sed 's/^/OK /' /tmp/commands | cmp - /tmp/replies && wc -l < /tmp/replies";
        let (_, output) = vm.run(check);
        assert_eq!(output, format!("0\n{count}\n"), "{}", vm.run("tail -3 /tmp/replies").1);
        assert!(kills > 1, "{kills}");

        // The next VM has a memory of its own.
        drop(vm);
        wait_for("the VM is gone", || !connected(&daemon));
        let mut vm = Vm::boot(&files, &memory, VM_MAC, "10.129.126.15/24", &console);
        must(&mut vm, &daemon, &format!("nfqd-guest {register}"), &format!("OK {register}"));
    });
}
