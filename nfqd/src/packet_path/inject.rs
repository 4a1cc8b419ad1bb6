//! Sending of frames out of a port of the bridge.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::{AsRawFd, OwnedFd};

/// A packet socket that only sends. It needs CAP_NET_RAW.
pub struct Injector {
    socket: OwnedFd,
}

impl Injector {
    /// Opens the socket.
    ///
    /// # Errors
    /// If this user is not privileged.
    pub fn open() -> Result<Injector, Errno> {
        // Protocol 0: nothing is received.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Packet, SockType::Raw, flags, None).map(|socket| Injector { socket })
    }

    /// Sends a frame out of the interface of this index.
    ///
    /// # Errors
    /// If it cannot be sent now.
    pub fn send(&self, interface: u32, frame: &[u8]) -> Result<(), Errno> {
        // SAFETY: needed because nix cannot make this address; a structure of integers, for which
        // zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = interface as i32;
        let len = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: needed to send to such an address; the frame and the address live through the
        // call, with their lengths.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                len,
            )
        };
        Errno::result(sent).map(drop)
    }
}
