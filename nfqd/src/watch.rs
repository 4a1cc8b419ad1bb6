//! Notices when another program changes our tables: nftables tells every change to those who listen.

use crate::netlink::{HEADER, attributes, bytes_at, messages};
use nfqd_rules::nft::model::TABLE_NAME;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};
use std::os::fd::{AsRawFd, OwnedFd};

/// The multicast group of nftables (NFNLGRP_NFTABLES is 7), as a bit.
const GROUP: u32 = 1 << 6;
const NFTABLES_SUBSYSTEM: u8 = 10;
/// The message that ends each transaction's notifications; it names no table.
const NEWGEN: u16 = 15;
/// Bytes of `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
/// The attribute that names the table: the first of tables, chains, rules, sets and elements alike.
const TABLE: u16 = 1;

/// Bytes of notifications that may wait: our own of the largest change that a guest can ask for are among them.
const BUFFER: usize = 64 << 20;

/// Bytes of one datagram; the kernel sends smaller ones.
const MESSAGES: usize = 1 << 16;

/// A socket that hears of every change.
pub struct Watch {
    socket: OwnedFd,
    /// The port of the socket that our own changes come from.
    own: u32,
    buffer: Vec<u8>,
}

impl Watch {
    /// Begins to listen. `own` is the port of the socket that our own changes come from.
    ///
    /// # Errors
    /// When there is no such socket to be had.
    pub fn open(own: u32) -> Result<Watch, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?;
        // Without the privilege it is smaller, and overruns sooner.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER);
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
        Ok(Watch { socket, own, buffer: vec![0; MESSAGES] })
    }

    /// Whether another program has changed our tables since this was asked last. When messages were lost it may have.
    pub fn changed(&mut self) -> bool {
        let mut changed = false;
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(len) => {
                    let bytes = self.buffer.get(..len).unwrap_or_default();
                    changed |= messages(bytes).any(|(kind, message)| foreign(kind, message, self.own));
                }
                Err(Errno::ENOBUFS) => changed = true,
                Err(Errno::EINTR) => {}
                Err(_) => return changed,
            }
        }
    }
}

/// Whether a notification is of somebody else's change of a table of our name.
fn foreign(kind: u16, message: &[u8], own: u32) -> bool {
    let port = bytes_at(message, 12).map(u32::from_ne_bytes);
    let [kind, subsystem] = kind.to_le_bytes();
    if subsystem != NFTABLES_SUBSYSTEM || u16::from(kind) == NEWGEN || port == Some(own) {
        return false;
    }
    let mut named = attributes(message.get(HEADER + FAMILY_HEADER..).unwrap_or_default());
    named.any(|(kind, name)| kind == TABLE && name.strip_suffix(&[0]) == Some(TABLE_NAME.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{finish, put};

    #[test]
    fn only_others_changes_of_our_tables_count() {
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
        let judge = |bytes: &[u8]| messages(bytes).any(|(kind, message)| foreign(kind, message, 77));
        assert!(judge(&message(6, 99, "nfqd")));
        assert!(!judge(&message(6, 77, "nfqd")), "our own");
        assert!(!judge(&message(6, 99, "nfqd2")), "another table");
        assert!(!judge(&message(15, 99, "nfqd")), "the end of a transaction");
        assert!(!judge(&[0; 40]));
    }
}
