//! Monitor of nftables: notices when another program changes our tables.

use nfqd_rules::netlink::{HEADER, Message, attributes, bytes_at, messages};
use nfqd_rules::nft::model::TABLE_NAME;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt,
    socket, sockopt,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The multicast group of nftables (NFNLGRP_NFTABLES is 7), as a bit.
const GROUP: u32 = 1 << 6;
const NFTABLES_SUBSYSTEM: u8 = 10;
/// The message that ends the notifications of a transaction; it names no table.
const NEWGEN: u16 = 15;
/// Size of `struct nfgenmsg` in bytes.
const FAMILY_HEADER: usize = 4;
/// The attribute that names the table: the first one of tables, chains, rules, sets and elements.
const TABLE: u16 = 1;

/// Size of the receive buffer in bytes. Our own notifications of the largest change that a guest
/// can ask for must fit as well.
const RECEIVE_BUFFER: usize = 64 << 20;
/// Size of the buffer for one datagram in bytes; the kernel sends smaller ones.
const DATAGRAM: usize = 1 << 16;

/// A socket that receives a notification of every change of nftables.
///
/// Pausing it closes the socket. Its descriptor, which becomes readable with a
/// notification, stays the same all the same: it is an epoll instance with the socket in it.
pub(super) struct NftMonitor {
    epoll: Epoll,
    socket: Option<OwnedFd>,
    /// The port of the socket that makes our own changes.
    own_port: u32,
    buffer: Vec<u8>,
}

impl NftMonitor {
    /// A paused monitor. `own_port` is the port of the socket that makes our own changes.
    ///
    /// # Errors
    /// If there are no more file descriptors.
    pub(super) fn new(own_port: u32) -> Result<NftMonitor, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(NftMonitor { epoll, socket: None, own_port, buffer: vec![0; DATAGRAM] })
    }

    /// Pauses the monitor. Notifications until [`NftMonitor::resume`] are lost.
    pub(super) fn pause(&mut self) {
        // Closing the socket removes it from the epoll instance.
        self.socket = None;
    }

    /// Subscribes to notifications, unless it has.
    ///
    /// # Errors
    /// If the kernel refuses the socket.
    pub(super) fn resume(&mut self) -> Result<(), Errno> {
        if self.socket.is_some() {
            return Ok(());
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let protocol = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        // Without the privilege the buffer is smaller, and overruns earlier.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        self.socket = Some(socket);
        Ok(())
    }

    /// Whether another program has changed our tables since the last call. It may have if
    /// notifications were lost.
    pub(super) fn has_foreign_change(&mut self) -> bool {
        let Some(socket) = &self.socket else { return false };
        let mut found = false;
        loop {
            match recv(socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(len) => {
                    let bytes = self.buffer.get(..len).unwrap_or_default();
                    let own_port = self.own_port;
                    found |= messages(bytes).any(|message| is_foreign_change(&message, own_port));
                }
                Err(Errno::ENOBUFS) => found = true,
                Err(Errno::EINTR) => {}
                Err(_) => return found,
            }
        }
    }
}

impl AsFd for NftMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

/// Whether a notification is about a change of a table with our name by another program.
fn is_foreign_change(message: &Message<'_>, own_port: u32) -> bool {
    let port = bytes_at(message.bytes, 12).map(u32::from_ne_bytes);
    let [kind, subsystem] = message.kind.to_le_bytes();
    let is_end = u16::from(kind) == NEWGEN;
    if subsystem != NFTABLES_SUBSYSTEM || is_end || port == Some(own_port) {
        return false;
    }
    let body = message.bytes.get(HEADER + FAMILY_HEADER..).unwrap_or_default();
    attributes(body)
        .any(|(kind, name)| kind == TABLE && name.strip_suffix(&[0]) == Some(TABLE_NAME.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::netlink::{finish, put};

    #[test]
    fn only_changes_of_our_tables_by_others_count() {
        let message = |kind: u8, port: u32, table: &str| {
            let mut out = vec![0; 4];
            out.extend([kind, NFTABLES_SUBSYSTEM, 0, 0]);
            out.extend([0; 4]);
            out.extend(port.to_ne_bytes());
            out.extend([7, 0, 0, 0]);
            put(&mut out, TABLE, format!("{table}\0").as_bytes());
            finish(&mut out, 0);
            out
        };
        let found = |bytes: &[u8]| messages(bytes).any(|message| is_foreign_change(&message, 77));
        assert!(found(&message(6, 99, "nfqd")));
        assert!(!found(&message(6, 77, "nfqd")), "our own");
        assert!(!found(&message(6, 99, "nfqd2")), "another table");
        assert!(!found(&message(15, 99, "nfqd")), "the end of a transaction");
        assert!(!found(&[0; 40]));
    }
}
