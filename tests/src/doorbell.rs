//! A VM as a doorbell's server sees it: the client's side of the protocol, without a VM.

use nfqd::descriptors::receive;
use nfqd_shmctl::Region;
use nfqd_shmctl::doorbell::Bell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A client that has connected, and what it was given.
pub struct DoorbellClient {
    /// The connection; its end is the VM's.
    pub connection: UnixStream,
    /// The memory.
    pub memory: Region,
    /// The host's bell.
    pub host: Bell,
    /// The bell that the host rings.
    pub own: Bell,
}

impl DoorbellClient {
    /// Connects to a server.
    ///
    /// # Panics
    /// If it does not keep to the protocol.
    pub fn connect(path: &Path) -> DoorbellClient {
        let connection = UnixStream::connect(path).expect("a server");
        let next = || {
            let mut bytes = [0; 8];
            let (length, descriptor) = receive(connection.as_fd(), &mut bytes).expect("a message");
            assert_eq!(length, 8);
            (i64::from_le_bytes(bytes), descriptor)
        };
        let expect = |number: i64| {
            let (found, descriptor) = next();
            assert_eq!(found, number);
            descriptor
        };
        let expect_descriptor = |number: i64| -> OwnedFd { expect(number).expect("a descriptor") };
        // The protocol's version, and the number of the first peer.
        assert!(expect(0).is_none() && expect(0).is_none());
        let memory = expect_descriptor(-1);
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let memory = Region::open(Path::new(&path)).expect("a region");
        let (host, own) = (expect_descriptor(1).into(), expect_descriptor(0).into());
        DoorbellClient { connection, memory, host, own }
    }
}
