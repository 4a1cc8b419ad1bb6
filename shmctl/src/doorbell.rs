//! The doorbell of an ivshmem device: the host as the device's server, and the bells of both sides.
//!
//! A VM with an `ivshmem-doorbell` device connects to its server at its start and receives its memory and
//! its bells as descriptors. Source: QEMU, docs/specs/ivshmem-spec.rst, "Client-Server protocol". A QEMU
//! cannot connect to a server again, but uses what it has received until it ends; so a server that is
//! started anew needs the same descriptors.
//!
//! The guest rings by a write of [`RING`] to its register, see [`Register`](crate::Register).

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::{read, write};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The number of the VM among the device's peers. A device with `master=on` must be the first client.
const VM: i64 = 0;
/// The number of the host.
const HOST: i64 = 1;
/// The version of the server's protocol.
const VERSION: i64 = 0;
/// The number in front of the memory.
const MEMORY: i64 = -1;

/// The number that the guest writes to its register to ring the host: the peer's in the upper half, the
/// vector in the lower.
pub const RING: u32 = (HOST as u32) << 16;

/// A bell, an eventfd: each side waits for its own and rings the other's.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A bell that has not been rung.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn new() -> io::Result<Bell> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Bell(EventFd::from_flags(flags)?.into()))
    }

    /// Rings. A bell that has been rung and not been heard stays rung.
    ///
    /// # Errors
    /// If the other side has made the bell block.
    pub fn ring(&self) -> Result<(), Errno> {
        self.check()?;
        // It fails if it has been rung 2^64 - 2 times.
        let _ = write(&self.0, &1_u64.to_ne_bytes());
        Ok(())
    }

    /// Returns whether the bell has been rung since the last call.
    ///
    /// # Errors
    /// If the other side has made the bell block.
    pub fn take_ring(&self) -> Result<bool, Errno> {
        self.check()?;
        Ok(read(&self.0, &mut [0; 8]).is_ok())
    }

    /// Checks that the bell does not block. Both sides share its flags, and a process that has taken over
    /// the other side could let this one wait for ever.
    fn check(&self) -> Result<(), Errno> {
        let flags = OFlag::from_bits_retain(fcntl(&self.0, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_NONBLOCK) { Ok(()) } else { Err(Errno::EDEADLK) }
    }
}

impl From<OwnedFd> for Bell {
    fn from(descriptor: OwnedFd) -> Bell {
        Bell(descriptor)
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sends a newly connected client its memory and both bells, one for each side.
///
/// # Errors
/// If it does not take them at once: all of them fit into the buffer of a new connection.
pub fn welcome(
    client: BorrowedFd<'_>,
    memory: BorrowedFd<'_>,
    host: &Bell,
    guest: &Bell,
) -> Result<(), Errno> {
    let send = |number: i64, descriptor: Option<BorrowedFd<'_>>| {
        let bytes = number.to_le_bytes();
        let descriptors = descriptor.map(|descriptor| [descriptor.as_raw_fd()]);
        let rights = descriptors.as_ref().map(|these| ControlMessage::ScmRights(these));
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = sendmsg::<()>(
            client.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights.as_slice(),
            flags,
            None,
        )?;
        if sent == bytes.len() { Ok(()) } else { Err(Errno::EMSGSIZE) }
    };
    send(VERSION, None)?;
    send(VM, None)?;
    send(MEMORY, Some(memory))?;
    send(HOST, Some(host.as_fd()))?;
    send(VM, Some(guest.as_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_bell_is_heard_once_however_often_it_was_rung() {
        let bell = Bell::new().unwrap();
        assert!(!bell.take_ring().unwrap());
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert!(bell.take_ring().unwrap() && !bell.take_ring().unwrap());
        // The other side makes it block.
        fcntl(&bell.0, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        assert_eq!((bell.take_ring(), bell.ring()), (Err(Errno::EDEADLK), Err(Errno::EDEADLK)));
    }

    #[test]
    fn a_client_is_the_first_peer_and_knows_the_host_before_its_own_bell() {
        let (server, mut client) = UnixStream::pair().unwrap();
        let memory = tempfile::tempfile().unwrap();
        let bells = (Bell::new().unwrap(), Bell::new().unwrap());
        welcome(server.as_fd(), memory.as_fd(), &bells.0, &bells.1).unwrap();
        let mut bytes = [0; 40];
        client.read_exact(&mut bytes).unwrap();
        let (numbers, _) = bytes.as_chunks::<8>();
        let numbers: Vec<i64> = numbers.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
        assert_eq!(numbers, [0, 0, -1, 1, 0]);
        // A client that does not read blocks nobody.
        let (server, _client) = UnixStream::pair().unwrap();
        let full = (0..100_000)
            .find_map(|_| welcome(server.as_fd(), memory.as_fd(), &bells.0, &bells.1).err());
        assert!(matches!(full, Some(Errno::EAGAIN | Errno::ETOOMANYREFS)), "{full:?}");
    }
}
