//! nfqd under a service manager that speaks systemd's protocol: the sockets of its queues are kept while
//! it is not running, so that packets wait for it.
#![allow(clippy::unwrap_used)]

use nfqd::api::client::status;
use nfqd_shmctl::mailbox::guest::send_command;
use nfqd_tests::daemon::{NFQD, program, steer};
use nfqd_tests::load::{LoadServer, ask_all, connect_all, shares};
use nfqd_tests::netns::in_netns;
use nfqd_tests::pool::{Fixture, to};
use nfqd_tests::topology::{VM, VM_MAC};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A service manager with one service.
struct Manager {
    directory: TempDir,
    socket: UnixDatagram,
    kept: BTreeMap<String, RawFd>,
    service: Option<Child>,
}

impl Manager {
    fn new() -> Manager {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Manager { directory, socket, kept: BTreeMap::new(), service: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts nfqd, with the descriptors that it had kept, and waits until it is ready.
    fn start(&mut self) {
        let mut script = "export LISTEN_PID=$$; ".to_string();
        for (at, number) in self.kept.values().enumerate() {
            script.push_str(&format!("exec {}<&{number}; ", at + 3));
        }
        script.push_str("exec \"$@\"");
        let names: Vec<&str> = self.kept.keys().map(String::as_str).collect();
        let log =
            std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let child = Command::new("bash")
            .args(["-c", &script, "bash"])
            .arg(program(NFQD))
            .args(["--steer", &steer(), "--state"])
            .arg(self.path("state"))
            .arg("--control")
            .arg(self.path("control"))
            .arg("--shm")
            .arg(self.path("shm"))
            .env("NOTIFY_SOCKET", self.path("notify"))
            .env("WATCHDOG_USEC", "4000000")
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.service = Some(child);
        self.wait_for("READY=1");
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Receives messages until one has this line; keeps descriptors.
    fn wait_for(&mut self, line: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < end, "no {line}\n{}", self.log());
            let mut buffer = [0; 4096];
            let mut space = nix::cmsg_space!([RawFd; 1]);
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let fd = self.socket.as_raw_fd();
            let message =
                recvmsg::<UnixAddr>(fd, &mut slices, Some(&mut space), MsgFlags::empty()).unwrap();
            let mut rights = Vec::new();
            for control in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(numbers) = control {
                    rights.extend(numbers);
                }
            }
            let length = message.bytes;
            let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
            if let (Some(name), Some(number)) = (name, rights.first()) {
                assert!(text.contains("FDSTORE=1") && text.contains("FDPOLL=0"), "{text}");
                self.kept.insert(name.to_string(), *number);
            }
            if text.lines().any(|found| found == line) {
                return;
            }
        }
    }

    fn kill(&mut self) {
        let mut child = self.service.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn must(&self, command: &str) {
        let region = nfqd_shmctl::Region::open(&self.path("shm")).unwrap();
        let replies = send_command(&region, command, Duration::from_secs(10)).unwrap();
        assert!(replies.iter().all(nfqd_shmctl::Reply::is_ok), "{command}: {replies:?}");
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(mut child) = self.service.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The old behaviour: while nfqd was away, new connections went to the middlebox, which refused them.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn what_comes_while_nfqd_is_away_waits_for_it() {
    in_netns(|| {
        let fixture = Fixture::new(2);
        let _servers = [
            LoadServer::start(&fixture.backends[0], b'0', 80),
            LoadServer::start(&fixture.backends[1], b'1', 80),
        ];
        let mut manager = Manager::new();
        manager.start();
        assert_eq!(
            manager.kept.keys().collect::<Vec<_>>(),
            ["queue0", "queue1", "queue2", "queue3"]
        );
        manager.must(&format!("R L {VM_MAC} {VM}:80 rr {} {}", to(0), to(1)));
        let mut members = connect_all(&fixture.client, VM.into(), 80, 100).unwrap();
        manager.wait_for("WATCHDOG=1");
        for _ in 0..3 {
            manager.kill();
            let new = std::thread::scope(|scope| {
                let new = scope.spawn(|| connect_all(&fixture.client, VM.into(), 80, 20));
                // Long enough that a SYN is sent again, and waits as well.
                std::thread::sleep(Duration::from_millis(1500));
                assert!(!new.is_finished(), "nobody answers while nfqd is away");
                manager.start();
                new.join().unwrap()
            });
            let new = new.unwrap_or_else(|error| panic!("{error}\n{}", manager.log()));
            assert_eq!(shares(&new).len(), 2);
            ask_all(&mut members, "nfqd was killed and started again");
            members.extend(new);
        }
        let status = status(&manager.path("control")).unwrap();
        assert!(status.queues.iter().all(|queue| queue.alive));
        let kernel =
            std::fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_queue").unwrap();
        let waiting =
            kernel.lines().map(|line| line.split_whitespace().nth(2).unwrap().to_string());
        assert_eq!(waiting.collect::<Vec<_>>(), ["0"; 4], "nothing waits for ever\n{kernel}");
    });
}
