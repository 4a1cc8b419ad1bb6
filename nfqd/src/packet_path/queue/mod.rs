//! One NFQUEUE: packets in, verdicts out. `message` is its wire format.
//!
//! The kernel (linux/netfilter/nfnetlink_queue.h, net/netfilter/nfnetlink_queue.c) asks for this:
//!
//! * one socket a queue, because a verdict from another socket is rejected;
//! * GSO packets as a whole, because without `NFQA_CFG_F_GSO` they lose their Ethernet header in the
//!   bridge family;
//! * a forced receive buffer, because the default holds some 256 packets whatever the length of the
//!   queue;
//! * verdicts in the order of the packets, because kernels before 7.0 look them up linearly;
//! * `ENOBUFS` is counted and never fatal.

mod message;

pub use message::{Queued, VerdictBatch};

use log::warn;
use message::{MESSAGE_SIZE, config, read_packet};
use nfqd_rules::netlink::{NLM_F_ACK, NLM_F_REQUEST, finish, messages, put};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, NetlinkAddr, SockFlag, SockProtocol, SockType, bind,
    getsockname, recv, recvmmsg, send, setsockopt, socket, sockopt,
};
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Packets received with one system call.
pub const BATCH: usize = 64;
/// Packets that may wait for a verdict: few, see the head of this file.
const QUEUE_LENGTH: u32 = 4096;
const RECEIVE_BUFFER: usize = 32 << 20;

/// The reason a queue cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Another program has bound the queue.
    #[error(
        "queue {0} is in use by another program (its netlink port id is in \
         /proc/net/netfilter/nfnetlink_queue); stop it, or choose other numbers with --queue"
    )]
    Taken(u16),
    /// The kernel does not permit it, and does not say which of two reasons it has.
    #[error(
        "queue {0} is in use by another program, or nfqd lacks CAP_NET_ADMIN. Run it as root, or \
         choose other numbers with --queue"
    )]
    NotPermitted(u16),
    /// The kernel has no NFQUEUE.
    #[error(
        "this kernel has no NFQUEUE ({0}); load the module nfnetlink_queue, or use a kernel with \
         CONFIG_NETFILTER_NETLINK_QUEUE"
    )]
    Unsupported(Errno),
    /// The kernel rejects the request for another reason.
    #[error("queue {queue}: {errno}")]
    Other {
        /// The number of the queue.
        queue: u16,
        /// The kernel's reason.
        errno: Errno,
    },
}

/// An open queue.
pub struct Queue {
    number: u16,
    socket: OwnedFd,
    /// How often the receive buffer overran, so that messages were lost.
    pub overruns: u64,
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Returns the last id that the kernel has given to a packet of a queue, if a socket with this port has
/// the queue (net/netfilter/nfnetlink_queue.c, `seq_show`).
fn last_id(number: u16, port: u32) -> Option<u32> {
    let text = std::fs::read_to_string("/proc/net/netfilter/nfnetlink_queue").ok()?;
    let columns = |line: &str| -> Option<Vec<u32>> {
        line.split_whitespace().map(|word| word.parse().ok()).collect()
    };
    let is_it = |columns: &Vec<u32>| {
        columns.first() == Some(&number.into()) && columns.get(1) == Some(&port)
    };
    text.lines().filter_map(columns).find(is_it)?.get(7).copied()
}

/// The buffers for one batch of packets.
pub struct Inbox {
    headers: MultiHeaders<()>,
    messages: Vec<u8>,
    lengths: Vec<usize>,
}

impl Default for Inbox {
    fn default() -> Inbox {
        Inbox {
            headers: MultiHeaders::preallocate(BATCH, None),
            messages: vec![0; BATCH * MESSAGE_SIZE],
            lengths: Vec::with_capacity(BATCH),
        }
    }
}

impl Inbox {
    /// Returns the packets of the batch.
    pub fn packets(&self) -> impl Iterator<Item = Queued<'_>> {
        let chunks = self.messages.chunks(MESSAGE_SIZE).zip(&self.lengths);
        chunks.filter_map(|(chunk, len)| read_packet(chunk.get(..*len)?))
    }
}

impl Queue {
    /// Binds a queue. With `fail_open`, packets pass when it is full, instead of being dropped.
    ///
    /// # Errors
    /// If another program has it, or this kernel has none.
    pub fn open(number: u16, fail_open: bool) -> Result<Queue, QueueError> {
        let other = |errno| QueueError::Other { queue: number, errno };
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)
            .map_err(QueueError::Unsupported)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(other)?;
        // Forcing it needs CAP_NET_ADMIN on the host (net/core/sock.c, sk_setsockopt), which root
        // of a user namespace lacks; the buffer is then as large as net.core.rmem_max allows.
        let forced = setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_ok();
        if !forced {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER).map_err(other)?;
        }
        let queue = Queue { number, socket, overruns: 0 };
        // The kernel answers EPERM both if another socket has the queue and without the privilege.
        let bound = queue.configure(config::COMMAND, &[config::COMMAND_BIND, 0, 0, 0]);
        bound.map_err(|errno| match errno {
            Errno::EPERM if !forced => QueueError::NotPermitted(number),
            Errno::EPERM | Errno::EBUSY => QueueError::Taken(number),
            Errno::EINVAL | Errno::EOPNOTSUPP => QueueError::Unsupported(errno),
            errno => other(errno),
        })?;
        if !forced {
            warn!(
                "queue {number}: the receive buffer could not be forced to {RECEIVE_BUFFER} bytes: \
                 it is limited by net.core.rmem_max"
            );
        }
        let copy = [&config::COPY_RANGE.to_be_bytes()[..], &[config::COPY_PACKET]].concat();
        queue.configure(config::PARAMETERS, &copy).map_err(other)?;
        queue.configure(config::MAXIMUM_LENGTH, &QUEUE_LENGTH.to_be_bytes()).map_err(other)?;
        let flags = config::GSO | if fail_open { config::FAIL_OPEN } else { 0 };
        let mut request = queue.config_request();
        put(&mut request, config::FLAGS, &flags.to_be_bytes());
        put(&mut request, config::MASK, &(config::GSO | config::FAIL_OPEN).to_be_bytes());
        queue.transact(request).map_err(other)?;
        Ok(queue)
    }

    /// Takes over a queue's socket from an earlier nfqd, with the packets that wait in it. Packets that
    /// the earlier nfqd had received without a verdict are dropped, because their contents are lost;
    /// TCP retransmits them.
    ///
    /// # Errors
    /// If the socket is not that of the queue.
    pub fn adopt(number: u16, socket: OwnedFd, fail_open: bool) -> Result<Queue, QueueError> {
        let other = |errno| QueueError::Other { queue: number, errno };
        let queue = Queue { number, socket, overruns: 0 };
        let port = getsockname::<NetlinkAddr>(queue.socket.as_raw_fd()).map_err(other)?.pid();
        // Read before the socket, so that a packet that arrives in between does not count as old.
        let sequence = last_id(number, port).ok_or(QueueError::Taken(number))?;
        let old = match queue.first_waiting().map_err(other)? {
            Some(first) => first.checked_sub(1),
            None => Some(sequence),
        };
        if let Some(last) = old.filter(|last| *last != 0) {
            queue.settle(last).map_err(other)?;
        }
        let flags = config::GSO | if fail_open { config::FAIL_OPEN } else { 0 };
        // Without an acknowledgement: it would be among the packets that wait.
        let mut request = Vec::with_capacity(64);
        message::begin(&mut request, message::CONFIG, NLM_F_REQUEST, number);
        put(&mut request, config::FLAGS, &flags.to_be_bytes());
        put(&mut request, config::MASK, &(config::GSO | config::FAIL_OPEN).to_be_bytes());
        finish(&mut request, 0);
        send(queue.socket.as_raw_fd(), &request, MsgFlags::empty()).map_err(other)?;
        Ok(queue)
    }

    /// Returns the id of the first packet that waits in the socket.
    fn first_waiting(&self) -> Result<Option<u32>, Errno> {
        let mut buffer = vec![0; MESSAGE_SIZE];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, flags) {
                Ok(len) => {
                    let message = buffer.get(..len).unwrap_or_default();
                    if let Some(packet) = read_packet(message) {
                        return Ok(Some(packet.id));
                    }
                    // An answer to a request of the earlier nfqd.
                    recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
                }
                Err(Errno::EAGAIN) => return Ok(None),
                // Messages were lost, which this call has reported once for all.
                Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Drops all packets up to an id that have no verdict yet.
    fn settle(&self, last: u32) -> Result<(), Errno> {
        const NF_DROP: u32 = 0;
        let mut request = Vec::with_capacity(64);
        message::begin(&mut request, message::VERDICT_BATCH, NLM_F_REQUEST, self.number);
        let verdict = [NF_DROP.to_be_bytes(), last.to_be_bytes()].concat();
        put(&mut request, message::attribute::VERDICT_HEADER, &verdict);
        finish(&mut request, 0);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty()).map(drop)
    }

    /// Returns the number of the queue.
    pub fn number(&self) -> u16 {
        self.number
    }

    fn config_request(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        message::begin(&mut out, message::CONFIG, NLM_F_REQUEST | NLM_F_ACK, self.number);
        out
    }

    fn configure(&self, attribute: u16, value: &[u8]) -> Result<(), Errno> {
        let mut request = self.config_request();
        put(&mut request, attribute, value);
        self.transact(request)
    }

    /// Sends a configuration message and waits for its acknowledgement. Packets that arrive before
    /// it are lost; none is expected before the queue is configured.
    fn transact(&self, mut request: Vec<u8>) -> Result<(), Errno> {
        finish(&mut request, 0);
        send(self.socket.as_raw_fd(), &request, MsgFlags::empty())?;
        let mut buffer = [0; MESSAGE_SIZE];
        for _ in 0..QUEUE_LENGTH {
            let len = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let bytes = buffer.get(..len).unwrap_or_default();
            if let Some(result) = messages(bytes).find_map(|message| message.result()) {
                return result;
            }
        }
        Err(Errno::EPROTO)
    }

    /// Waits for packets, for the event `stop`, or for the end of the timeout.
    ///
    /// # Errors
    /// If the descriptors cannot be polled.
    pub fn wait(&self, stop: &EventFd, timeout: PollTimeout) -> Result<(), Errno> {
        let mut polled = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Receives the packets that have arrived, at most [`BATCH`], without waiting.
    ///
    /// # Errors
    /// If the socket fails for another reason than lost messages, which are counted.
    pub fn receive(&mut self, inbox: &mut Inbox) -> Result<(), Errno> {
        inbox.lengths.clear();
        let chunks = inbox.messages.chunks_mut(MESSAGE_SIZE);
        let mut slices: Vec<[IoSliceMut<'_>; 1]> =
            chunks.map(|chunk| [IoSliceMut::new(chunk)]).collect();
        let (socket, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        match recvmmsg(socket, &mut inbox.headers, slices.iter_mut(), flags, None) {
            Ok(received) => inbox.lengths.extend(received.map(|message| message.bytes)),
            Err(Errno::ENOBUFS) => self.overruns += 1,
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Sends verdicts as one datagram.
    ///
    /// # Errors
    /// If the socket fails.
    pub fn send(&self, verdicts: &VerdictBatch) -> Result<(), Errno> {
        if verdicts.bytes().is_empty() {
            return Ok(());
        }
        loop {
            match send(self.socket.as_raw_fd(), verdicts.bytes(), MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                // A packet that is gone with its device needs no verdict.
                Err(Errno::ENOENT) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }
}
