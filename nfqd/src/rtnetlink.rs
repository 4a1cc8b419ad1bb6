//! rtnetlink: requests about links and forwarding entries, and notifications of their changes
//! (linux/rtnetlink.h).

use nfqd_rules::netlink::{
    Message, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, finish, messages, put,
};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `RTM_NEWLINK`.
pub(crate) const RTM_NEWLINK: u16 = 16;
/// `RTM_DELLINK`.
pub(crate) const RTM_DELLINK: u16 = 17;
/// `RTM_GETLINK`.
pub(crate) const RTM_GETLINK: u16 = 18;
/// `RTM_NEWNEIGH`.
pub(crate) const RTM_NEWNEIGH: u16 = 28;
/// `RTM_DELNEIGH`.
pub(crate) const RTM_DELNEIGH: u16 = 29;
/// `RTM_GETNEIGH`.
pub(crate) const RTM_GETNEIGH: u16 = 30;
/// `AF_BRIDGE`: links and neighbours as bridges know them.
pub(crate) const AF_BRIDGE: u8 = 7;
/// Bytes of `struct ifinfomsg`.
pub(crate) const LINK_HEADER: usize = 16;
/// Bytes of `struct ndmsg`.
pub(crate) const NEIGHBOUR_HEADER: usize = 12;

/// Size of the buffer for one datagram in bytes; the kernel sends smaller ones.
const DATAGRAM: usize = 1 << 16;
/// Size of the receive buffer of a monitor in bytes: a bridge that learns many addresses at once
/// sends a notification of each.
const MONITOR_BUFFER: usize = 8 << 20;

fn open(flags: SockFlag, groups: u32) -> Result<OwnedFd, Errno> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// A socket for requests.
pub(crate) struct RouteSocket {
    socket: OwnedFd,
    /// The sequence number of the last request.
    sequence: Cell<u32>,
}

impl RouteSocket {
    /// Opens the socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn open() -> Result<RouteSocket, Errno> {
        let socket = open(SockFlag::empty(), 0)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
        Ok(RouteSocket { socket, sequence: Cell::new(0) })
    }

    /// Asks for all objects of a kind in a family, and passes each message of the answer to `each`.
    /// The body is a header of `header` bytes, the first of which is the family, and attributes.
    ///
    /// # Errors
    /// If the kernel cannot be asked; `EINTR` if the objects changed while it answered.
    pub(crate) fn dump(
        &self,
        kind: u16,
        family: u8,
        header: usize,
        attributes: &[(u16, &[u8])],
        mut each: impl FnMut(&Message<'_>),
    ) -> Result<(), Errno> {
        let sequence = self.sequence.get().wrapping_add(1);
        self.sequence.set(sequence);
        let mut request = vec![0; 4];
        request.extend(kind.to_ne_bytes());
        request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        request.extend(sequence.to_ne_bytes());
        request.extend([0; 4]);
        request.push(family);
        request.resize(request.len() + header - 1, 0);
        attributes.iter().for_each(|(kind, value)| put(&mut request, *kind, value));
        finish(&mut request, 0);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let mut is_interrupted = false;
        let mut buffer = vec![0; DATAGRAM];
        loop {
            let len = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            for message in messages(buffer.get(..len).unwrap_or_default()) {
                // The rest of an answer that was not waited for.
                if message.sequence != sequence {
                    continue;
                }
                is_interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                if message.kind == NLMSG_DONE {
                    return if is_interrupted { Err(Errno::EINTR) } else { Ok(()) };
                }
                match message.result() {
                    Some(result) => return result,
                    None => each(&message),
                }
            }
        }
    }
}

/// A socket that receives a notification of every change of links and neighbours.
pub(crate) struct RouteMonitor {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl RouteMonitor {
    /// Opens the socket.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn open() -> Result<RouteMonitor, Errno> {
        // RTNLGRP_LINK is 1 and RTNLGRP_NEIGH is 3, as bits.
        const LINKS_AND_NEIGHBOURS: u32 = 1 | 1 << 2;
        let socket = open(SockFlag::SOCK_NONBLOCK, LINKS_AND_NEIGHBOURS)?;
        // Without the privilege the buffer is smaller, and overruns earlier.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &MONITOR_BUFFER);
        Ok(RouteMonitor { socket, buffer: vec![0; DATAGRAM] })
    }

    /// Passes notifications to `each`, a limited number of datagrams in a call: guests cause them.
    ///
    /// # Errors
    /// `ENOBUFS` if some were lost.
    pub(crate) fn read(&mut self, mut each: impl FnMut(&Message<'_>)) -> Result<(), Errno> {
        const DATAGRAMS: usize = 1024;
        let mut result = Ok(());
        for _ in 0..DATAGRAMS {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(len) => {
                    let bytes = self.buffer.get(..len).unwrap_or_default();
                    messages(bytes).for_each(|message| each(&message));
                }
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => result = Err(Errno::ENOBUFS),
                Err(_) => break,
            }
        }
        result
    }
}

impl AsFd for RouteMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
