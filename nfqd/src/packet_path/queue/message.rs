//! The messages of an NFQUEUE: configuration, packets and verdicts
//! (linux/netfilter/nfnetlink_queue.h).

use nfqd_rules::mark::is_tracked;
use nfqd_rules::netlink::{NLM_F_REQUEST, attributes, bytes_at, finish, put, u16_at};
use nfqd_rules::packet::{Link, Packet};
use nfqd_shmctl::{EtherType, MacAddr};

/// Size of a packet message in bytes: the copy of the packet, and its attributes.
pub(super) const MESSAGE_SIZE: usize = config::COPY_RANGE as usize + 512;

const QUEUE_SUBSYSTEM: u16 = 3 << 8;
pub(super) const PACKET: u16 = QUEUE_SUBSYSTEM;
pub(super) const VERDICT: u16 = QUEUE_SUBSYSTEM | 1;
pub(super) const VERDICT_BATCH: u16 = QUEUE_SUBSYSTEM | 3;
pub(super) const CONFIG: u16 = QUEUE_SUBSYSTEM | 2;

/// Attributes and values of a configuration message.
pub(super) mod config {
    /// Bytes of each packet that the kernel copies, from the IP header on: all of a frame of 1500
    /// bytes, so that no chain of extension headers in one is cut.
    pub(crate) const COPY_RANGE: u32 = 2048;
    pub(crate) const COMMAND: u16 = 1;
    pub(crate) const PARAMETERS: u16 = 2;
    pub(crate) const MAXIMUM_LENGTH: u16 = 3;
    pub(crate) const MASK: u16 = 4;
    pub(crate) const FLAGS: u16 = 5;
    pub(crate) const COMMAND_BIND: u8 = 1;
    pub(crate) const COPY_PACKET: u8 = 2;
    pub(crate) const FAIL_OPEN: u32 = 1;
    pub(crate) const GSO: u32 = 4;
}

/// Attributes of packet and verdict messages.
pub(super) mod attribute {
    pub(super) const PACKET_HEADER: u16 = 1;
    pub(crate) const VERDICT_HEADER: u16 = 2;
    pub(super) const MARK: u16 = 3;
    pub(super) const INTERFACE: u16 = 5;
    pub(super) const PORT: u16 = 7;
    pub(super) const HARDWARE_ADDRESS: u16 = 9;
    pub(super) const PAYLOAD: u16 = 10;
    pub(super) const ORIGINAL_LENGTH: u16 = 13;
    pub(super) const SKB_INFO: u16 = 14;
    pub(super) const VLAN: u16 = 19;
    pub(super) const LINK_HEADER: u16 = 20;
    pub(super) const VLAN_TCI: u16 = 2;
    pub(super) const SKB_GSO: u32 = 2;
}

/// A packet that waits for its verdict.
#[derive(Clone, Copy, Debug)]
pub struct Queued<'a> {
    /// The kernel's identifier of the packet.
    pub id: u32,
    /// The mark.
    pub mark: u32,
    /// The parsed headers. In the bridge family they include the Ethernet header; by br_netfilter
    /// the destination MAC is zero, and the mark names the middlebox.
    pub packet: Packet,
    /// Whether the message has the Ethernet header.
    pub has_link: bool,
    /// The length in bytes, from the IP header on.
    pub length: usize,
    /// The bytes from the IP header on, or the first of them.
    pub payload: &'a [u8],
    /// The index of the port that the packet came in by, or of the bridge.
    pub interface: u32,
}

/// A batch of verdicts, as it is sent to the kernel.
pub struct VerdictBatch {
    bytes: Vec<u8>,
    queue: u16,
}

impl VerdictBatch {
    /// An empty batch for the queue with this number.
    pub fn new(queue: u16) -> VerdictBatch {
        VerdictBatch { bytes: Vec::with_capacity(super::BATCH * 48), queue }
    }

    /// Drops a packet.
    pub fn drop(&mut self, id: u32) {
        append_verdict(&mut self.bytes, self.queue, id, None, &[]);
    }

    /// Accepts a packet with this mark.
    pub fn accept(&mut self, id: u32, mark: u32) {
        append_verdict(&mut self.bytes, self.queue, id, Some(mark), &[]);
    }

    /// Accepts a packet with this mark and other bytes from the IP header on, whose checksums are
    /// right: the kernel does not update them.
    pub fn replace(&mut self, id: u32, mark: u32, payload: &[u8]) {
        append_verdict(&mut self.bytes, self.queue, id, Some(mark), payload);
    }

    /// Removes all verdicts, which have been sent.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the verdicts in the batch: the packet, and its mark if it is accepted.
    #[cfg(test)]
    pub(crate) fn verdicts(&self) -> Vec<(u32, Option<u32>)> {
        let verdict = |message: nfqd_rules::netlink::Message<'_>| {
            let all: Vec<_> = attributes(&message.bytes[20..]).collect();
            let find = |wanted: u16| all.iter().find(|(kind, _)| *kind == wanted).map(|(_, v)| *v);
            let header = find(attribute::VERDICT_HEADER).unwrap();
            let mark =
                find(attribute::MARK).map(|mark| u32::from_be_bytes(mark.try_into().unwrap()));
            (u32::from_be_bytes(bytes_at(header, 4).unwrap()), mark)
        };
        nfqd_rules::netlink::messages(&self.bytes).map(verdict).collect()
    }
}

/// Begins a message: `struct nlmsghdr`, whose length is written at the end, and `struct nfgenmsg`.
pub(super) fn begin(out: &mut Vec<u8>, kind: u16, flags: u16, queue: u16) {
    out.extend(0_u32.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend([0; 8]);
    // Family, version, queue.
    out.extend([0, 0]);
    out.extend(queue.to_be_bytes());
}

/// Appends a verdict. With a mark the packet is accepted, without one it is dropped; `payload`
/// replaces its bytes.
fn append_verdict(out: &mut Vec<u8>, queue: u16, id: u32, mark: Option<u32>, payload: &[u8]) {
    const NF_DROP: u32 = 0;
    const NF_ACCEPT: u32 = 1;
    const NF_REPEAT: u32 = 4;
    let start = out.len();
    begin(out, VERDICT, NLM_F_REQUEST, queue);
    let number = match mark {
        None => NF_DROP,
        // The chain that queued the packet rewrites it.
        Some(mark) if is_tracked(mark) => NF_REPEAT,
        Some(_) => NF_ACCEPT,
    };
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

/// Parses a packet message of the kernel; `None` for other messages.
pub(super) fn read_packet(message: &[u8]) -> Option<Queued<'_>> {
    const HEADERS: usize = 20;
    if u16_at(message, 4)? != PACKET {
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
            attribute::ORIGINAL_LENGTH => {
                length = Some(u32::from_be_bytes(bytes_at(value, 0)?) as usize);
            }
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
        begin(&mut out, PACKET, 0, 3);
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
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9)
            .udp(1, 2)
            .write(&mut out, b"x")
            .unwrap();
        out
    }

    #[test]
    fn messages_of_both_queue_paths_are_parsed() {
        let message = packet_message(&udp(), None);
        let queued = read_packet(&message).unwrap();
        assert_eq!((queued.id, queued.mark, queued.has_link), (9, 0x1234_5678, false));
        assert_eq!(queued.packet.link.source, MacAddr([4; 6]));
        assert!(queued.packet.ip.unwrap().ports.is_some());
        let header = [2, 2, 2, 2, 2, 2, 6, 6, 6, 6, 6, 6, 8, 0];
        let message = packet_message(&udp(), Some(&header));
        let queued = read_packet(&message).unwrap();
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
        append_verdict(&mut out, 3, 9, Some(0x3000_0100), &[]);
        append_verdict(&mut out, 3, 10, None, &[]);
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
            let _ = read_packet(&message);
        }
    }
}
