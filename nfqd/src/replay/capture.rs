//! Reading of captures: pcap and pcapng files of Ethernet frames, compressed by gzip or not.

use super::ReplayError;
use flate2::bufread::MultiGzDecoder;
use pcap_parser::pcapng::{EnhancedPacketBlock, InterfaceDescriptionBlock};
use pcap_parser::traits::PcapNGPacketBlock;
use pcap_parser::{
    Block, Linktype, OptionCode, PcapBlockOwned, PcapError, PcapHeader, create_reader,
};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

/// A packet of a capture.
pub struct Captured<'a> {
    /// The time of capture.
    pub time: Duration,
    /// The bytes of the frame without its checksum (FCS), or the first of them.
    pub frame: &'a [u8],
    /// The full length in bytes.
    pub length: usize,
    /// The link type of its interface (<https://www.tcpdump.org/linktypes.html>).
    pub link: u16,
}

/// The link type of Ethernet frames.
pub const ETHERNET: u16 = 1;

/// The first bytes of a gzip file.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// The size of the reader's buffer in bytes at first, and at most. A block must fit into it.
const BUFFER: (usize, usize) = (1 << 16, 1 << 28);

/// Passes each packet of a pcap or pcapng file to `each`. The file may be a pipe.
///
/// # Errors
/// If the file cannot be read or is not such a capture.
pub fn read_capture(
    path: &Path,
    mut each: impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
) -> Result<(), ReplayError> {
    let io = |source| ReplayError::Io { path: path.display().to_string(), source };
    let mut file = BufReader::new(File::open(path).map_err(io)?);
    let is_compressed = file.fill_buf().map_err(io)?.starts_with(&GZIP_MAGIC);
    let input: Box<dyn Read + Send> =
        if is_compressed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut capture = Capture {
        path,
        packets: 0,
        interfaces: Vec::new(),
        nanoseconds: false,
        is_big_endian: false,
    };
    // A pipe may give less than a header at a time.
    let mut reader =
        create_reader(BUFFER.0, WholeReads(input)).map_err(|error| capture.broken(&error))?;
    let mut size = BUFFER.0;
    loop {
        match reader.next() {
            Ok((used, block)) => {
                capture.block(&block, &mut each)?;
                reader.consume(used);
            }
            Err(PcapError::Eof) => return Ok(()),
            Err(PcapError::Incomplete(_)) => {
                reader.refill().map_err(|error| capture.broken(&error))?;
            }
            Err(PcapError::BufferTooSmall) if size < BUFFER.1 => {
                size *= 2;
                if !reader.grow(size) {
                    return Err(capture.broken(&PcapError::<&[u8]>::BufferTooSmall));
                }
                reader.refill().map_err(|error| capture.broken(&error))?;
            }
            Err(error) => return Err(capture.broken(&error)),
        }
    }
}

/// A reader that gives as much as it is asked for, until the end.
struct WholeReads<R>(R);

impl<R: Read> Read for WholeReads<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut len = 0;
        while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
            match self.0.read(rest) {
                Ok(0) => break,
                Ok(some) => len += some,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(len)
    }
}

/// The state of reading.
struct Capture<'p> {
    path: &'p Path,
    packets: u64,
    interfaces: Vec<Interface>,
    /// Whether a pcap file has nanoseconds.
    nanoseconds: bool,
    /// Whether a pcapng section is in big-endian order.
    is_big_endian: bool,
}

/// An interface of a capture.
#[derive(Clone, Copy)]
struct Interface {
    link: u16,
    /// Bytes of the frame's checksum (FCS) at the end of each frame.
    fcs: usize,
    /// The code of the unit of timestamps (`if_tsresol`).
    resolution: u8,
    /// Seconds to add to timestamps (`if_tsoffset`).
    offset: i64,
    snapshot_length: u32,
}

impl Interface {
    /// The interface of a packet that names one which is not described: Ethernet, microseconds.
    const DEFAULT: Interface =
        Interface { link: ETHERNET, fcs: 0, resolution: 6, offset: 0, snapshot_length: 0 };
}

impl Capture<'_> {
    fn broken<I: std::fmt::Debug>(&self, error: &PcapError<I>) -> ReplayError {
        let reason = match error {
            PcapError::HeaderNotRecognized => "it does not begin as a capture does",
            PcapError::Eof | PcapError::UnexpectedEof | PcapError::Incomplete(_) => {
                "it ends in the middle of a packet"
            }
            PcapError::BufferTooSmall => "a packet is larger than any frame",
            PcapError::ReadError => "it cannot be read on, or its compression is broken",
            PcapError::NomError(..) | PcapError::OwnedNomError(..) => {
                "its structure is broken here"
            }
        };
        let path = self.path.display().to_string();
        ReplayError::Capture { path, packet: self.packets + 1, reason }
    }

    fn block(
        &mut self,
        block: &PcapBlockOwned<'_>,
        each: &mut impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
    ) -> Result<(), ReplayError> {
        match block {
            PcapBlockOwned::LegacyHeader(header) => {
                self.nanoseconds = header.is_nanosecond_precision();
                let interface = pcap_interface(header);
                self.interfaces = vec![interface];
                if interface.link != ETHERNET {
                    let path = self.path.display().to_string();
                    return Err(ReplayError::Link { path, link: interface.link });
                }
                Ok(())
            }
            PcapBlockOwned::Legacy(packet) => {
                let unit = if self.nanoseconds { 1 } else { 1000 };
                let fraction = Duration::from_nanos(u64::from(packet.ts_usec) * unit);
                let time = Duration::from_secs(u64::from(packet.ts_sec)) + fraction;
                self.packet(0, None, time, packet.data, packet.origlen, each)
            }
            PcapBlockOwned::NG(Block::SectionHeader(section)) => {
                self.interfaces.clear();
                self.is_big_endian = section.big_endian();
                Ok(())
            }
            PcapBlockOwned::NG(Block::InterfaceDescription(described)) => {
                self.interfaces.push(pcapng_interface(described));
                Ok(())
            }
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                let interface = self.interface(packet.if_id);
                let ticks = u64::from(packet.ts_high) << 32 | u64::from(packet.ts_low);
                let time = time(ticks, interface);
                let (fcs, data) = (fcs_of_packet(packet), packet.packet_data());
                self.packet(packet.if_id, fcs, time, data, packet.origlen, each)
            }
            PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                let limit = match self.interface(0).snapshot_length {
                    0 => usize::MAX,
                    limit => limit as usize,
                };
                let data = packet.packet_data();
                let data = data.get(..data.len().min(limit)).unwrap_or_default();
                self.packet(0, None, Duration::ZERO, data, packet.origlen, each)
            }
            PcapBlockOwned::NG(Block::Unknown(block)) if is_packet_block(block.block_type) => {
                self.packet_block(block.data, each)
            }
            // Statistics, names, and what this version does not know.
            PcapBlockOwned::NG(_) => Ok(()),
        }
    }

    /// Reads a packet block, which old programs write (pcapng, appendix A, obsolete blocks).
    fn packet_block(
        &mut self,
        body: &[u8],
        each: &mut impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
    ) -> Result<(), ReplayError> {
        const HEADER: usize = 20;
        let word = |at: usize| {
            let bytes: [u8; 4] = body.get(at..at + 4)?.try_into().ok()?;
            let from = if self.is_big_endian { u32::from_be_bytes } else { u32::from_le_bytes };
            Some(from(bytes))
        };
        let fields = || Some((word(0)?, word(4)?, word(8)?, word(12)? as usize, word(16)?));
        let whole = fields().and_then(|(numbers, high, low, captured, length)| {
            let data = body.get(HEADER..)?.get(..captured)?;
            // The number of the interface and that of lost packets, of 16 bits each.
            let id = if self.is_big_endian { numbers >> 16 } else { numbers & 0xffff };
            Some((id, u64::from(high) << 32 | u64::from(low), data, length))
        });
        let Some((id, ticks, data, length)) = whole else {
            return Err(self.broken::<&[u8]>(&PcapError::Incomplete(0)));
        };
        let time = time(ticks, self.interface(id));
        self.packet(id, None, time, data, length, each)
    }

    fn interface(&self, id: u32) -> Interface {
        self.interfaces.get(id as usize).copied().unwrap_or(Interface::DEFAULT)
    }

    fn packet(
        &mut self,
        interface: u32,
        fcs: Option<usize>,
        time: Duration,
        data: &[u8],
        length: u32,
        each: &mut impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
    ) -> Result<(), ReplayError> {
        self.packets += 1;
        let interface = self.interface(interface);
        let fcs = fcs.unwrap_or(interface.fcs);
        // Only the end of the whole frame is its checksum: a truncated one may have lost it.
        let length = (length as usize).max(data.len()).saturating_sub(fcs);
        let frame = data.get(..data.len().min(length)).unwrap_or_default();
        each(&Captured { time, frame, length, link: interface.link })
    }
}

/// Whether a block is a packet block; the parser leaves its type in the section's byte order.
fn is_packet_block(kind: u32) -> bool {
    const PACKET_BLOCK: u32 = 2;
    kind == PACKET_BLOCK || kind == PACKET_BLOCK.swap_bytes()
}

/// Returns the interface of a pcap file. The upper half of the link type tells whether frames have
/// their checksum, in words of two bytes (pcap/pcap-inttypes, LT_FCS_LENGTH_PRESENT).
fn pcap_interface(header: &PcapHeader) -> Interface {
    const FCS_PRESENT: u32 = 0x0400_0000;
    let Linktype(network) = header.network;
    let network = network as u32;
    let words = if network & FCS_PRESENT == 0 { 0 } else { network >> 28 };
    Interface { link: network as u16, fcs: 2 * words as usize, ..Interface::DEFAULT }
}

fn pcapng_interface(described: &InterfaceDescriptionBlock<'_>) -> Interface {
    const FCS_LENGTH: OptionCode = OptionCode(13);
    let Linktype(link) = described.linktype;
    let option = described.options.iter().find(|option| option.code == FCS_LENGTH);
    let length = option.and_then(|option| option.value().first()).copied().unwrap_or(0);
    // The specification says bits; some programs write bytes.
    let fcs = usize::from(if length >= 8 { length / 8 } else { length });
    Interface {
        link: link as u16,
        fcs,
        resolution: described.if_tsresol,
        offset: described.if_tsoffset,
        snapshot_length: described.snaplen,
    }
}

/// Returns the bytes of a packet's checksum, if its own flags tell (bits 5 to 8 of `epb_flags`).
fn fcs_of_packet(packet: &EnhancedPacketBlock<'_>) -> Option<usize> {
    const FLAGS: OptionCode = OptionCode(2);
    let option = packet.options.iter().find(|option| option.code == FLAGS)?;
    let bytes: [u8; 4] = option.value().get(..4)?.try_into().ok()?;
    let flags =
        if packet.big_endian() { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) };
    let length = (flags >> 5 & 15) as usize;
    (length != 0).then_some(length)
}

/// Returns the time of a count of units: a power of ten, or of two with the top bit set.
fn time(ticks: u64, interface: Interface) -> Duration {
    let exponent = u32::from(interface.resolution & 0x7f);
    let base: u128 = if interface.resolution & 0x80 == 0 { 10 } else { 2 };
    // A unit that is too short to be counted makes all times equal.
    let Some(units) = base.checked_pow(exponent) else { return Duration::ZERO };
    let nanoseconds = u128::from(ticks).saturating_mul(1_000_000_000) / units;
    let seconds = i128::try_from(nanoseconds / 1_000_000_000).unwrap_or(i128::MAX);
    let seconds = seconds.saturating_add(i128::from(interface.offset)).max(0);
    let rest = (nanoseconds % 1_000_000_000) as u32;
    Duration::new(u64::try_from(seconds).unwrap_or(u64::MAX), rest)
}
