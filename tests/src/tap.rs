//! A TAP device as a port of a bridge: frames go in and come out unchanged, as a virtual machine's
//! do.
#![allow(unsafe_code)]

use crate::netns::run;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

/// An open TAP device.
pub struct Tap {
    file: File,
}

impl Tap {
    /// Makes a TAP device in the namespace of this thread and puts it on a bridge, without
    /// learning: the test says where a MAC is.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn on_bridge(bridge: &str, name: &str, macs: &[&str]) -> Tap {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .expect("/dev/net/tun");
        // struct ifreq: a name of 16 bytes, then the flags.
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
        request[16..18].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: needed because no safe interface makes a TAP device; TUNSETIFF reads and writes
        // one struct ifreq, which is 40 bytes, and the buffer outlives the call.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        assert_eq!(result, 0, "TUNSETIFF {name}: {}", std::io::Error::last_os_error());
        // Room for the largest frames of the captures.
        run(&format!("ip link set {name} mtu 9000"));
        run(&format!("ip link set {name} master {bridge} up"));
        run(&format!("bridge link set dev {name} learning off"));
        for mac in macs {
            run(&format!("bridge fdb add {mac} dev {name} master static"));
        }
        Tap { file }
    }

    /// Sends a frame, as the machine behind the device would.
    ///
    /// # Panics
    /// If the kernel does not take it.
    pub fn send(&self, frame: &[u8]) {
        (&self.file).write_all(frame).expect("tap write");
    }

    /// Returns the next frame that has arrived.
    ///
    /// # Panics
    /// If the device fails.
    pub fn try_receive(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        match (&self.file).read(&mut buffer) {
            Ok(len) => {
                buffer.truncate(len);
                Some(buffer)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("tap read: {error}"),
        }
    }

    /// Waits for the next frame.
    ///
    /// # Panics
    /// If the device fails.
    pub fn receive(&self, patience: Duration) -> Option<Vec<u8>> {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).expect("timeout");
        poll(&mut fds, timeout).expect("poll");
        self.try_receive()
    }
}
