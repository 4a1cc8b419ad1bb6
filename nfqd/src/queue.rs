//! One NFQUEUE: packets in, verdicts out.
//!
//! Built as the kernel's traps ask (linux/netfilter/nfnetlink_queue.h, net/netfilter/nfnetlink_queue.c): one socket a
//! queue, because a verdict from another socket is refused; GSO packets are taken whole, because without
//! `NFQA_CFG_F_GSO` they lose their L2 header in the bridge family; a forced receive buffer, because the default holds
//! some 256 packets whatever the queue's length says; verdicts in the order of the packets, because kernels before 7.0
//! look them up one by one; `ENOBUFS` counted, never fatal.

use crate::netlink::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, attributes, bytes_at, finish, put, u16_at};
use nfqd_rules::packet::{Link, Packet};
use nfqd_shmctl::{EtherType, MacAddr};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv,
    recvmmsg, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

/// Bytes of each packet that the kernel copies, from the IP header on: all of a frame of 1500 bytes, so that no chain of
/// extension headers in one is cut.
const COPY_RANGE: u32 = 2048;
/// The copy and its attributes.
const MESSAGE_SIZE: usize = COPY_RANGE as usize + 512;
/// Packets taken with one system call.
pub const BATCH: usize = 64;
/// Packets that may wait for a verdict: short, see the top of the file.
const QUEUE_LENGTH: u32 = 4096;
const RECEIVE_BUFFER: usize = 32 << 20;
/// How long a receive blocks, so that its thread can look whether it is to end.
const PATIENCE: Duration = Duration::from_millis(200);

const QUEUE_SUBSYSTEM: u16 = 3 << 8;
const MSG_PACKET: u16 = QUEUE_SUBSYSTEM;
const MSG_VERDICT: u16 = QUEUE_SUBSYSTEM | 1;
const MSG_CONFIG: u16 = QUEUE_SUBSYSTEM | 2;

/// Attributes of a configuration message.
mod config {
    pub const COMMAND: u16 = 1;
    pub const PARAMETERS: u16 = 2;
    pub const MAXIMUM_LENGTH: u16 = 3;
    pub const MASK: u16 = 4;
    pub const FLAGS: u16 = 5;
    pub const COMMAND_BIND: u8 = 1;
    pub const COPY_PACKET: u8 = 2;
    pub const FAIL_OPEN: u32 = 1;
    pub const GSO: u32 = 4;
}

/// Attributes of a packet or verdict message.
mod attribute {
    pub const PACKET_HEADER: u16 = 1;
    pub const VERDICT_HEADER: u16 = 2;
    pub const MARK: u16 = 3;
    pub const INTERFACE: u16 = 5;
    pub const PORT: u16 = 7;
    pub const HARDWARE_ADDRESS: u16 = 9;
    pub const PAYLOAD: u16 = 10;
    pub const ORIGINAL_LENGTH: u16 = 13;
    pub const SKB_INFO: u16 = 14;
    pub const VLAN: u16 = 19;
    pub const LINK_HEADER: u16 = 20;
    pub const VLAN_TCI: u16 = 2;
    pub const SKB_GSO: u32 = 2;
}

/// Why a queue cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Somebody else reads it.
    #[error(
        "queue {0} is taken by another program; /proc/net/netfilter/nfnetlink_queue shows by which port id. Stop it, or \
         choose other numbers with --queue"
    )]
    Taken(u16),
    /// No such thing in this kernel.
    #[error(
        "this kernel has no NFQUEUE ({0}); load the module nfnetlink_queue, or use a kernel with CONFIG_NETFILTER_NETLINK_QUEUE"
    )]
    Unsupported(Errno),
    /// Anything else.
    #[error("queue {queue}: {errno}")]
    Other {
        /// The queue's number.
        queue: u16,
        /// The kernel's reason.
        errno: Errno,
    },
}

/// A packet that waits for its verdict.
#[derive(Clone, Copy, Debug)]
pub struct Queued<'a> {
    /// The kernel's number for it.
    pub id: u32,
    /// Its mark.
    pub mark: u32,
    /// What it says about itself. In the bridge family the destination MAC is in it; by br_netfilter it is zero, and the
    /// mark names the middlebox.
    pub packet: Packet,
    /// Whether the Ethernet header was there.
    pub has_link: bool,
    /// Its length in bytes, from the IP header on.
    pub length: usize,
    /// Its bytes from there, or the first of them.
    pub payload: &'a [u8],
    /// The index of the port that it came in by, or of the bridge.
    pub interface: u32,
}

/// Verdicts, as they are sent to the kernel.
pub struct Verdicts {
    bytes: Vec<u8>,
    queue: u16,
}

impl Verdicts {
    /// The packet is gone.
    pub fn drop(&mut self, id: u32) {
        append(&mut self.bytes, self.queue, id, None, &[]);
    }

    /// The packet goes on with this mark.
    pub fn accept(&mut self, id: u32, mark: u32) {
        append(&mut self.bytes, self.queue, id, Some(mark), &[]);
    }

    /// The same, with other bytes from the IP header on. Whoever changes them mends the checksums: the kernel does not.
    pub fn replace(&mut self, id: u32, mark: u32, payload: &[u8]) {
        append(&mut self.bytes, self.queue, id, Some(mark), payload);
    }
}

/// An open queue.
pub struct Queue {
    number: u16,
    socket: OwnedFd,
    /// Times that messages were lost because the receive buffer was full.
    pub overruns: u64,
}

/// Room for one batch of messages and verdicts; it belongs to the thread that serves.
pub struct Buffers {
    headers: MultiHeaders<()>,
    messages: Vec<u8>,
    verdicts: Verdicts,
}

impl Buffers {
    /// Room for a queue of this number.
    pub fn new(queue: u16) -> Buffers {
        Buffers {
            headers: MultiHeaders::preallocate(BATCH, None),
            messages: vec![0; BATCH * MESSAGE_SIZE],
            verdicts: Verdicts { bytes: Vec::with_capacity(BATCH * 48), queue },
        }
    }
}

impl Queue {
    /// Binds a queue. `fail_open` lets packets go on when it is full, instead of dropping them.
    ///
    /// # Errors
    /// When it is taken, or this kernel has none.
    pub fn open(number: u16, fail_open: bool) -> Result<Queue, QueueError> {
        let other = |errno| QueueError::Other { queue: number, errno };
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)
            .map_err(QueueError::Unsupported)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(other)?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).map_err(other)?;
        let patience = TimeVal::milliseconds(PATIENCE.as_millis() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience).map_err(other)?;
        let queue = Queue { number, socket, overruns: 0 };
        // nfqnl answers EPERM when another socket holds the queue; that this user may configure is known by then, for
        // the ruleset has been loaded.
        queue.configure(config::COMMAND, &[config::COMMAND_BIND, 0, 0, 0]).map_err(|errno| match errno {
            Errno::EPERM | Errno::EBUSY => QueueError::Taken(number),
            Errno::EINVAL | Errno::EOPNOTSUPP => QueueError::Unsupported(errno),
            errno => other(errno),
        })?;
        let parameters = [&COPY_RANGE.to_be_bytes()[..], &[config::COPY_PACKET]].concat();
        queue.configure(config::PARAMETERS, &parameters).map_err(other)?;
        queue.configure(config::MAXIMUM_LENGTH, &QUEUE_LENGTH.to_be_bytes()).map_err(other)?;
        let flags = config::GSO | if fail_open { config::FAIL_OPEN } else { 0 };
        let mut message = queue.message(MSG_CONFIG, NLM_F_REQUEST | NLM_F_ACK);
        put(&mut message, config::FLAGS, &flags.to_be_bytes());
        put(&mut message, config::MASK, &(config::GSO | config::FAIL_OPEN).to_be_bytes());
        queue.transact(message).map_err(other)?;
        Ok(queue)
    }

    /// The queue's number.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// A message with its headers: nlmsghdr, nfgenmsg.
    fn message(&self, kind: u16, flags: u16) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        begin(&mut out, kind, flags, self.number);
        out
    }

    fn configure(&self, attribute: u16, value: &[u8]) -> Result<(), Errno> {
        let mut message = self.message(MSG_CONFIG, NLM_F_REQUEST | NLM_F_ACK);
        put(&mut message, attribute, value);
        self.transact(message)
    }

    /// Sends a configuration message and waits for its acknowledgement; packets may come before it, and none is wanted
    /// before the queue is configured.
    fn transact(&self, mut message: Vec<u8>) -> Result<(), Errno> {
        finish(&mut message, 0);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut answer = [0; MESSAGE_SIZE];
        for _ in 0..QUEUE_LENGTH {
            let len = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
            let answer = answer.get(..len).unwrap_or_default();
            if u16_at(answer, 4) == Some(NLMSG_ERROR) {
                let code = i32::from_ne_bytes(bytes_at(answer, 16).ok_or(Errno::EPROTO)?);
                return if code == 0 { Ok(()) } else { Err(Errno::from_raw(-code)) };
            }
        }
        Err(Errno::EPROTO)
    }

    /// Waits up to 200 ms for packets, gives each to `judge`, then lets `then` add verdicts on packets of before, and sends
    /// all verdicts in that order. Says how many packets there were.
    ///
    /// # Errors
    /// When the socket fails for another reason than lost messages, which are counted.
    pub fn serve(
        &mut self,
        buffers: &mut Buffers,
        mut judge: impl FnMut(&Queued<'_>, &mut Verdicts),
        then: impl FnOnce(&mut Verdicts),
    ) -> Result<usize, Errno> {
        let lengths = match self.receive(buffers) {
            Ok(lengths) => lengths,
            Err(Errno::ENOBUFS) => {
                self.overruns += 1;
                Vec::new()
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Vec::new(),
            Err(errno) => return Err(errno),
        };
        buffers.verdicts.bytes.clear();
        let mut packets = 0;
        for (chunk, len) in buffers.messages.chunks(MESSAGE_SIZE).zip(lengths) {
            let Some(queued) = chunk.get(..len).and_then(read) else { continue };
            packets += 1;
            judge(&queued, &mut buffers.verdicts);
        }
        then(&mut buffers.verdicts);
        self.answer(&buffers.verdicts.bytes)?;
        Ok(packets)
    }

    /// Waits for messages; the lengths of those that are in the buffer now.
    fn receive(&self, buffers: &mut Buffers) -> Result<Vec<usize>, Errno> {
        let slice = |chunk| [IoSliceMut::new(chunk)];
        let mut slices: Vec<[IoSliceMut<'_>; 1]> =
            buffers.messages.chunks_mut(MESSAGE_SIZE).map(slice).collect();
        let (socket, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_WAITFORONE);
        let received = recvmmsg(socket, &mut buffers.headers, slices.iter_mut(), flags, None)?;
        Ok(received.map(|message| message.bytes).collect())
    }

    /// Sends what verdicts there are, as one datagram.
    fn answer(&self, verdicts: &[u8]) -> Result<(), Errno> {
        if verdicts.is_empty() {
            return Ok(());
        }
        loop {
            match send(self.socket.as_raw_fd(), verdicts, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                // A packet that went away with its device has no verdict to take.
                Err(Errno::ENOENT) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }
}

fn begin(out: &mut Vec<u8>, kind: u16, flags: u16, queue: u16) {
    out.extend(0_u32.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]);
    // nfgenmsg: family, version, queue.
    out.extend([0, 0]);
    out.extend(queue.to_be_bytes());
}

/// A verdict: with a mark the packet goes on, without one it is gone; with bytes they take the place of its own.
fn append(out: &mut Vec<u8>, queue: u16, id: u32, mark: Option<u32>, payload: &[u8]) {
    const NF_DROP: u32 = 0;
    const NF_ACCEPT: u32 = 1;
    let start = out.len();
    begin(out, MSG_VERDICT, NLM_F_REQUEST, queue);
    let number = if mark.is_some() { NF_ACCEPT } else { NF_DROP };
    let header = (u64::from(number) << 32 | u64::from(id)).to_be_bytes();
    put(out, attribute::VERDICT_HEADER, &header);
    if let Some(mark) = mark {
        put(out, attribute::MARK, &mark.to_be_bytes());
    }
    if !payload.is_empty() {
        put(out, attribute::PAYLOAD, payload);
    }
    finish(out, start);
}

/// Reads a packet message of the kernel. `None` for other messages.
fn read(message: &[u8]) -> Option<Queued<'_>> {
    const HEADERS: usize = 20;
    if u16_at(message, 4)? != MSG_PACKET {
        return None;
    }
    let len = u32::from_ne_bytes(bytes_at(message, 0)?) as usize;
    let body = message.get(HEADERS..len.min(message.len()))?;
    let (mut id, mut ether_type, mut mark, mut info) = (None, 0, 0, 0);
    let (mut payload, mut length, mut vlan): (&[u8], _, _) = (&[], None, None);
    let (mut destination, mut port, mut interface) = (None, None, 0);
    let mut source = MacAddr([0; 6]);
    for (kind, value) in attributes(body) {
        match kind {
            attribute::PACKET_HEADER => {
                id = Some(u32::from_be_bytes(bytes_at(value, 0)?));
                ether_type = u16::from_be_bytes(bytes_at(value, 4)?);
            }
            attribute::PORT => port = Some(u32::from_be_bytes(bytes_at(value, 0)?)),
            attribute::INTERFACE => interface = u32::from_be_bytes(bytes_at(value, 0)?),
            attribute::MARK => mark = u32::from_be_bytes(bytes_at(value, 0)?),
            attribute::HARDWARE_ADDRESS => source = MacAddr(bytes_at(value, 4)?),
            attribute::PAYLOAD => payload = value,
            attribute::ORIGINAL_LENGTH => length = Some(u32::from_be_bytes(bytes_at(value, 0)?) as usize),
            attribute::SKB_INFO => info = u32::from_be_bytes(bytes_at(value, 0)?),
            attribute::VLAN => {
                let tci = attributes(value).find(|(kind, _)| *kind == attribute::VLAN_TCI);
                vlan = tci.and_then(|(_, tci)| bytes_at(tci, 0)).map(u16::from_be_bytes);
            }
            attribute::LINK_HEADER if value.len() >= 12 => {
                destination = Some(MacAddr(bytes_at(value, 0)?));
                source = MacAddr(bytes_at(value, 6)?);
            }
            _ => {}
        }
    }
    let link = Link {
        destination: destination.unwrap_or(MacAddr([0; 6])),
        source,
        vlan,
        ether_type: EtherType::new(ether_type),
    };
    let length = length.unwrap_or(payload.len());
    let packet = Packet::from_payload(link, payload, length, info & attribute::SKB_GSO != 0);
    let (has_link, interface) = (destination.is_some(), port.unwrap_or(interface));
    Some(Queued { id: id?, mark, packet, has_link, length, payload, interface })
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    fn packet_message(payload: &[u8], link_header: Option<&[u8]>) -> Vec<u8> {
        let mut out = Vec::new();
        begin(&mut out, MSG_PACKET, 0, 3);
        put(&mut out, attribute::PACKET_HEADER, &[0, 0, 0, 9, 8, 0, 1]);
        put(&mut out, attribute::MARK, &0x1234_5678_u32.to_be_bytes());
        put(&mut out, attribute::HARDWARE_ADDRESS, &[0, 6, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0]);
        if let Some(header) = link_header {
            put(&mut out, attribute::LINK_HEADER, header);
            let mut tag = Vec::new();
            put(&mut tag, 1, &[0x81, 0]);
            put(&mut tag, attribute::VLAN_TCI, &[0, 7]);
            put(&mut out, attribute::VLAN | 0x8000, &tag);
        }
        put(&mut out, attribute::PAYLOAD, payload);
        finish(&mut out, 0);
        out
    }

    fn udp() -> Vec<u8> {
        let mut out = Vec::new();
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9).udp(1, 2).write(&mut out, b"x").unwrap();
        out
    }

    #[test]
    fn both_ways_in_are_read() {
        let message = packet_message(&udp(), None);
        let queued = read(&message).unwrap();
        assert_eq!((queued.id, queued.mark, queued.has_link), (9, 0x1234_5678, false));
        assert_eq!(queued.packet.link.source, MacAddr([4; 6]));
        assert!(queued.packet.ip.unwrap().ports.is_some());
        let header = [2, 2, 2, 2, 2, 2, 6, 6, 6, 6, 6, 6, 8, 0];
        let message = packet_message(&udp(), Some(&header));
        let queued = read(&message).unwrap();
        assert!(queued.has_link);
        assert_eq!(
            (queued.packet.link.destination, queued.packet.link.source),
            (MacAddr([2; 6]), MacAddr([6; 6]))
        );
        assert_eq!(queued.packet.link.vlan, Some(7));
    }

    #[test]
    fn a_verdict_is_laid_out_as_the_kernel_reads_it() {
        let mut out = Vec::new();
        append(&mut out, 3, 9, Some(0x3000_0100), &[]);
        append(&mut out, 3, 10, None, &[]);
        let first = u32::from_ne_bytes(bytes_at(&out, 0).unwrap()) as usize;
        assert_eq!((first, out.len()), (40, 40 + 32));
        assert_eq!(out[16..20], [0, 0, 0, 3]);
        assert_eq!(out[20..32], [12, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 9]);
        assert_eq!(out[32..40], [8, 0, 3, 0, 0x30, 0, 1, 0]);
        assert_eq!(out[60..72], [12, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 10]);
    }

    proptest! {
        #[test]
        fn no_message_breaks_the_reader(cut in 0usize..200, at in 0usize..200, byte: u8) {
            let mut message = packet_message(&udp(), Some(&[2; 14]));
            if let Some(field) = message.get_mut(at) {
                *field = byte;
            }
            message.truncate(cut.max(4));
            let _ = read(&message);
        }
    }
}
