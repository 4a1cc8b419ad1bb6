//! The doorbell server of the real daemon, and the process that keeps what VMs were given while the daemon is
//! not running. `tests/tests/vm.rs` has a real QEMU.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::ring::guest::send_locked;
use nfqd_shmctl::sender::lock;
use nfqd_shmctl::{Region, Reply};
use nfqd_tests::daemon::{Daemon, NFQD, program};
use nfqd_tests::doorbell::DoorbellClient;
use nfqd_tests::netns::{in_netns, run};
use nfqd_tests::topology::{VM_MAC, wait_for};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Sends commands as a guest that never rings: the host finds them nevertheless.
fn send(memory: &Region, commands: &[&str]) -> Vec<String> {
    let commands: Vec<String> = commands.iter().map(ToString::to_string).collect();
    let lock = lock(memory, TIMEOUT).unwrap();
    let mut replies = Vec::new();
    send_locked(memory, &lock, &commands, TIMEOUT, &mut replies).unwrap();
    replies.iter().map(Reply::to_string).collect()
}

/// Returns the process that keeps descriptors in this network namespace, if there is one.
fn holder() -> Option<u32> {
    let own = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let mut numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.find(|pid: &u32| {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let arguments = std::fs::read_to_string(process.join("cmdline")).unwrap_or_default();
        let namespace = std::fs::metadata(process.join("ns/net")).map(|about| about.ino());
        arguments.ends_with("\0hold\0") && namespace.is_ok_and(|its| its == own)
    })
}

fn connected(daemon: &Daemon) -> Option<bool> {
    let channels = daemon.status().channels;
    channels.iter().find(|channel| channel.transport == "doorbell").unwrap().connected
}

fn end(pid: u32) {
    run(&format!("kill -9 {pid}"));
    wait_for("the end of a process", || {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        state.map_or(true, |state| state.contains(") Z"))
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn what_a_vm_was_given_outlives_the_daemon_and_its_holder() {
    in_netns(|| {
        run("ip link add br0 type bridge");
        run("ip link set br0 up");
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vm.sock");
        let channel = format!("{},mac={VM_MAC},mode=0666", socket.display());
        let mut daemon = Daemon::start(&["--doorbell", &channel]);
        let vm = DoorbellClient::connect(&socket);
        let register = format!("R F {VM_MAC} 10.129.126.15");
        let answer = vec![format!("OK {register}")];
        assert_eq!(send(&vm.memory, &[&register]), answer);
        wait_for("a ring", || vm.own.take_ring().unwrap());
        assert_eq!(connected(&daemon), Some(true));

        // Killed, stopped in order, and upgraded while nobody looks: it goes on with the same memory.
        daemon.kill();
        let first = holder().expect("a holder");
        daemon.restart();
        assert_eq!(
            (send(&vm.memory, &[&register]), connected(&daemon)),
            (answer.clone(), Some(true))
        );
        daemon.terminate();
        daemon.restart();
        assert_eq!(send(&vm.memory, &[&register]), answer);
        assert_eq!(holder(), Some(first));
        // What belongs to nfqd alone is not passed on: its table and its queues would outlive it.
        let kept = std::fs::read_dir(format!("/proc/{first}/fd")).unwrap().flatten();
        let kept: Vec<String> = kept
            .map(|entry| std::fs::read_link(entry.path()).unwrap().display().to_string())
            .collect();
        assert!(kept.iter().any(|name| name.contains("memfd:nfqd")), "{kept:?}");
        let sockets = kept.iter().filter(|name| name.starts_with("socket:")).count();
        // Its own, nfqd's connection, the listener, the VM's connection.
        assert!(sockets <= 4, "{kept:?}");

        // A holder that is killed is replaced, and is given everything again.
        end(first);
        wait_for("another holder", || holder().is_some_and(|pid| pid != first));
        std::thread::sleep(Duration::from_millis(1500));
        daemon.kill();
        daemon.restart();
        assert_eq!(
            (send(&vm.memory, &[&register]), connected(&daemon)),
            (answer.clone(), Some(true))
        );

        // A VM that ends while nfqd is away takes what it was given with it.
        daemon.kill();
        drop(vm);
        std::thread::sleep(Duration::from_millis(1500));
        daemon.restart();
        assert_eq!(connected(&daemon), Some(false));
        let vm = DoorbellClient::connect(&socket);
        assert_eq!(send(&vm.memory, &[&register]), answer);
        drop(vm);
        wait_for("the VM is gone", || connected(&daemon) == Some(false));

        // In the end nothing is left.
        daemon.terminate();
        wait_for("no holder", || holder().is_none());
        assert!(!socket.exists());
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn doorbells_are_attached_and_detached_and_their_keys_are_read_again() {
    in_netns(|| {
        let folder = tempfile::tempdir().unwrap();
        let (socket, other) = (folder.path().join("vm.sock"), folder.path().join("other.sock"));
        let config = folder.path().join("nfqd.toml");
        let write = |keys: &str| {
            let text = format!("doorbell = [\"{}{keys}\"]\n", socket.display());
            std::fs::write(&config, text).unwrap();
        };
        write(",mode=0600");
        let daemon = Daemon::start(&["--config", config.to_str().unwrap()]);
        let vm = DoorbellClient::connect(&socket);
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(&socket), 0o600);
        // With other keys, the VM stays connected.
        write(&format!(",mode=0660,mac={VM_MAC}"));
        run(&format!("kill -HUP {}", daemon.pid()));
        wait_for("the new mode", || mode(&socket) == 0o660);
        let refused = send(&vm.memory, &["R F 2:0:0:0:0:9 10.0.0.9"]);
        assert!(refused[0].starts_with("ERR denied "), "{refused:?}");
        assert_eq!(connected(&daemon), Some(true));

        let control = daemon.control();
        let nfqd = |job: &str, channel: &str| {
            let mut command = Command::new(program(NFQD));
            command.args([job, channel, "--control"]).arg(&control).output().unwrap()
        };
        let channel = format!("doorbell:{},mac=2:0:0:0:0:2,rules=1", other.display());
        assert!(nfqd("attach", &channel).status.success());
        let second = DoorbellClient::connect(&other);
        let replies = send(
            &second.memory,
            &["R F 2:0:0:0:0:2 10.0.0.2", "A 2:0:0:0:0:2 #2 T 2 d 80", "A 2:0:0:0:0:2 #3 T 2 d 81"],
        );
        assert!(
            replies[2].starts_with("ERR quota ") && replies[1].starts_with("OK"),
            "{replies:?}"
        );
        // Once the configuration has it too, detaching it changes nothing.
        let path = channel.strip_prefix("doorbell:").unwrap();
        let both =
            format!("doorbell = [\"{},mac={VM_MAC},mode=0660\", \"{path}\"]\n", socket.display());
        std::fs::write(&config, &both).unwrap();
        let reload = || {
            run(&format!("kill -HUP {}", daemon.pid()));
            let answered = daemon.status();
            assert!(answered.channels.iter().all(|channel| channel.error.is_none()));
        };
        reload();
        let detach = || nfqd("detach", &format!("doorbell:{}", other.display())).status.success();
        assert!(detach() && !detach());
        assert!(send(&second.memory, &["Q"])[0].starts_with("OK"));
        write(&format!(",mode=0660,mac={VM_MAC}"));
        reload();
        wait_for("the end of the second socket", || !other.exists());
        assert!(nfqd("attach", &channel).status.success());
        assert!(detach() && !other.exists());
        // Where nobody can listen, nothing is attached.
        std::fs::write(&other, "a file").unwrap();
        let refused = nfqd("attach", &channel);
        let error = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(
            (refused.status.code(), error.contains("not a socket")),
            (Some(1), true),
            "{error}"
        );
        assert_eq!(daemon.status().channels.len(), 2);
        // Taken out of the configuration, it ends.
        std::fs::write(&config, "").unwrap();
        run(&format!("kill -HUP {}", daemon.pid()));
        wait_for("the end of the socket", || UnixStream::connect(&socket).is_err());
    });
}
