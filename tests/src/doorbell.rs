//! A VM as a doorbell's server sees it: the client's side of the protocol, without a VM.

use nfqd::descriptors::receive;
use nfqd_shmctl::Region;
use nfqd_shmctl::doorbell::{Bell, RING};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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

    /// Sends a command through the rings, by the tables of the documentation of `nfqd_shmctl::ring`: rings,
    /// and waits for the host's ring. Returns the reply, which has to fit into a slot.
    ///
    /// # Panics
    /// If there is none within five seconds.
    pub fn send(&self, command: &str) -> String {
        const EPOCH: usize = 4136;
        const WRITTEN: usize = 4152;
        const DOORBELL: usize = 4168;
        const SENT: usize = 8200;
        const CONSUMED: usize = 8208;
        let memory = &self.memory;
        let epoch = memory.load_u64(EPOCH);
        let number = memory.load_u64(SENT).max(epoch) + 1;
        let slot = |ring: usize| ring + (number - epoch - 1) as usize % 16 * 4096;
        let mut request = number.to_le_bytes().to_vec();
        request.extend((command.len() as u32).to_le_bytes());
        request.extend([0; 12]);
        request.extend(command.bytes());
        memory.write(slot(12288), &request);
        memory.store_u64(CONSUMED, number - 1);
        memory.store_u64(SENT, number);
        let mut doorbell = [0; 4];
        memory.read(DOORBELL, &mut doorbell);
        assert_eq!(u32::from_le_bytes(doorbell), RING);
        self.host.ring().expect("a bell");
        while memory.load_u64(WRITTEN) < number {
            let mut rung = [PollFd::new(self.own.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut rung, PollTimeout::from(5000_u16)), Ok(1), "no ring");
            self.own.take_ring().expect("a bell");
        }
        let mut reply = vec![0; 4096];
        memory.read(slot(77824), &mut reply);
        memory.store_u64(CONSUMED, number);
        let length = u32::from_le_bytes([reply[8], reply[9], reply[10], reply[11]]) as usize;
        String::from_utf8_lossy(&reply[24..24 + length]).into_owned()
    }
}
