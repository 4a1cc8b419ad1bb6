//! Commands through vsock, over the kernel's loopback, by the CID of this host. VMs that have a vsock device
//! come the same way, with a CID of their own.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::sender::{Patience, SendError};
use nfqd_shmctl::vsock::{Connection, PORT};
use nfqd_tests::daemon::{Daemon, NFQD_GUEST, program};
use nfqd_tests::netns::in_netns;
use nfqd_tests::topology::{Topology, VM_MAC, pings, wait_for};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, VsockAddr, bind, connect, recv, send, setsockopt,
    socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

/// The CID of the loopback (`VMADDR_CID_LOCAL`).
const LOCAL: u32 = 1;
const PATIENCE: Patience<'static> = Patience { timeout: Duration::from_secs(5), interrupted: None };

fn nfqd_guest(arguments: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(program(NFQD_GUEST));
    let output = command.arg(format!("--vsock={LOCAL}")).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_string();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// Connects as a program that has read nothing but the documentation.
fn plain_connection(own_port: Option<u32>) -> OwnedFd {
    let stream =
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&stream, ReceiveTimeout, &TimeVal::new(5, 0)).unwrap();
    if let Some(port) = own_port {
        bind(stream.as_raw_fd(), &VsockAddr::new(u32::MAX, port)).unwrap();
    }
    connect(stream.as_raw_fd(), &VsockAddr::new(LOCAL, PORT)).unwrap();
    stream
}

fn write_all(stream: &OwnedFd, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let length = send(stream.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
        bytes = &bytes[length..];
    }
}

fn read_line(stream: &OwnedFd) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while recv(stream.as_raw_fd(), &mut byte, MsgFlags::empty()).unwrap() == 1 && byte != [b'\n'] {
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

#[test]
#[ignore = "needs vsock_loopback: tests/run.sh uml"]
fn a_guest_commands_by_vsock_what_its_cid_may() {
    in_netns(|| {
        let topology = Topology::new(true);
        let channel = format!("{LOCAL},mac={VM_MAC},to=10.129.126.0/24,rules=2,rate=10000");
        let mut daemon = Daemon::start(&["--vsock", &channel]);
        let status = daemon.status();
        let its = status.channels.iter().find(|channel| channel.transport == "vsock").unwrap();
        assert_eq!(
            (its.path.as_str(), its.connected, its.error.clone()),
            ("vsock 1", Some(false), None)
        );

        // Words, several commands at once, and a rejection.
        let (code, output, _) = nfqd_guest(&["register", "10.129.126.15", "--mac", VM_MAC]);
        assert_eq!((code, output.as_str()), (Some(0), "OK R F 12:13:14:15:16:17 10.129.126.15"));
        assert!(pings(&topology.client, nfqd_tests::topology::VM));
        let (code, output, _) = nfqd_guest(&["deny", "from", "10.129.126.1", "--mac", VM_MAC]);
        assert_eq!(
            (code, output.starts_with("OK A 12:13:14:15:16:17 ")),
            (Some(0), true),
            "{output}"
        );
        wait_for("pings are denied", || !pings(&topology.client, nfqd_tests::topology::VM));
        let (code, _, error) = nfqd_guest(&["R", "F", "2:0:0:0:0:9", "10.129.126.9"]);
        assert_eq!((code, error.starts_with("ERR denied column 5:")), (Some(1), true), "{error}");
        let (code, _, error) = nfqd_guest(&["-w", "@Q@"]);
        assert_eq!((code, error.contains("no mailbox")), (Some(2), true), "{error}");

        // A quota of rules.
        let (code, _, _) = nfqd_guest(&["A", VM_MAC, "#2", "I", "1", "s", "10.9.0.0/16"]);
        assert_eq!(code, Some(0));
        let (code, _, error) = nfqd_guest(&["A", VM_MAC, "#3", "I", "1", "s", "10.8.0.0/16"]);
        assert_eq!((code, error.starts_with("ERR quota ")), (Some(1), true), "{error}");

        // Many over one connection, which a restart ends; the next connection is served.
        let connection = Connection::open(LOCAL, PATIENCE).unwrap();
        let commands: Vec<String> =
            (1..=500).map(|port| format!("A {VM_MAC} #2 T 2 d {port}")).collect();
        let mut replies = Vec::new();
        connection.send(&commands, PATIENCE, &mut replies).unwrap();
        let texts: Vec<String> = replies.iter().map(ToString::to_string).collect();
        assert!(
            texts.iter().zip(&commands).all(|(reply, command)| *reply == format!("OK {command}"))
        );
        let is_connected = |daemon: &Daemon| {
            let channels = daemon.status().channels;
            channels.iter().any(|channel| channel.connected == Some(true))
        };
        assert!(is_connected(&daemon));
        daemon.kill();
        let ended = connection.send(&["Q".to_string()], PATIENCE, &mut replies).unwrap_err();
        assert!(matches!(ended, SendError::Unconfirmed(_)), "{ended}");
        let refused = Connection::open(LOCAL, PATIENCE).unwrap_err();
        assert!(refused.to_string().contains("nobody listens on the host"), "{refused}");
        daemon.restart();
        let connection = Connection::open(LOCAL, PATIENCE).unwrap();
        connection.send(&["Q".to_string()], PATIENCE, &mut replies).unwrap();
        assert!(replies.last().unwrap().to_string().contains("#2 T 2 d 500"));

        // Not everybody in the VM, and not more than a few at once.
        let refusal = read_line(&plain_connection(None));
        assert!(refusal.starts_with("ERR denied ") && refusal.contains("below 1024"), "{refusal}");
        let others: Vec<Connection> =
            (0..7).map(|_| Connection::open(LOCAL, PATIENCE).unwrap()).collect();
        let ninth = Connection::open(LOCAL, PATIENCE).unwrap();
        ninth.send(&["Q".to_string()], PATIENCE, &mut replies).unwrap();
        assert!(replies.last().unwrap().to_string().starts_with("ERR quota "));
        drop((others, ninth, connection));
        wait_for("they are gone", || !is_connected(&daemon));

        // Lines that are no commands.
        let connection = plain_connection(Some(1000));
        let long = "x".repeat(100_000);
        write_all(&connection, format!("{long}\nQ\u{e9}\n\r\nQ 1\r\nQ {VM_MAC}").as_bytes());
        for expected in ["ERR syntax 100000 bytes long", "ERR syntax byte 0xc3", "ERR ", "ERR "] {
            let line = read_line(&connection);
            assert!(line.starts_with(expected), "{line}");
        }
        write_all(&connection, b"\n");
        assert!(read_line(&connection).starts_with("OK 12:13:14:15:16:17 packets"));
        // A VM without a channel.
        drop(daemon);
        let daemon = Daemon::start(&["--vsock", &format!("77,mac={VM_MAC}")]);
        let stranger = Connection::open(LOCAL, PATIENCE).unwrap();
        let _ = stranger.send(&["Q".to_string()], PATIENCE, &mut replies);
        let last = replies.last().unwrap().to_string();
        assert!(last.contains("CID 1, has no channel"), "{last}\n{}", daemon.log());
        let _ = send(plain_connection(None).as_raw_fd(), b"Q\n", MsgFlags::MSG_NOSIGNAL);
    });
}
