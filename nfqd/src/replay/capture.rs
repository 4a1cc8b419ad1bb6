//! Reading of captures: pcap and pcapng files of Ethernet frames.

use super::ReplayError;
use pcap_file::DataLink;
use pcap_file::TsResolution;
use pcap_file::pcap::PcapReader;
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

/// A frame of a capture.
pub struct Captured<'a> {
    /// The time of capture.
    pub time: Duration,
    /// The bytes of the frame, or the first of them.
    pub frame: &'a [u8],
    /// The full length in bytes.
    pub length: usize,
}

/// The first bytes of a pcapng file.
const PCAPNG_MAGIC: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// Passes each Ethernet frame of a pcap or pcapng file to `each`. The file may be a pipe.
///
/// # Errors
/// If the file cannot be read or is not such a capture.
pub fn read_capture(
    path: &Path,
    each: impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
) -> Result<(), ReplayError> {
    let io = |source| ReplayError::Io { path: path.display().to_string(), source };
    let mut file = BufReader::new(File::open(path).map_err(io)?);
    if file.fill_buf().map_err(io)?.starts_with(&PCAPNG_MAGIC) {
        read_pcapng(path, file, each)
    } else {
        read_pcap(path, file, each)
    }
}

fn broken(path: &Path, packet: u64) -> impl FnOnce(pcap_file::PcapError) -> ReplayError + use<> {
    let path = path.display().to_string();
    move |source| ReplayError::Capture { path, packet, source }
}

fn check_link(path: &Path, link: DataLink) -> Result<(), ReplayError> {
    match link {
        DataLink::ETHERNET => Ok(()),
        link => Err(ReplayError::Link { path: path.display().to_string(), link }),
    }
}

fn read_pcap(
    path: &Path,
    file: BufReader<File>,
    mut each: impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
) -> Result<(), ReplayError> {
    let mut reader = PcapReader::new(file).map_err(broken(path, 1))?;
    check_link(path, reader.header().datalink)?;
    let nanoseconds = match reader.header().ts_resolution {
        TsResolution::MicroSecond => 1000,
        TsResolution::NanoSecond => 1,
    };
    let mut packets = 0;
    while let Some(packet) = reader.next_raw_packet() {
        packets += 1;
        let packet = packet.map_err(broken(path, packets))?;
        let fraction = Duration::from_nanos(u64::from(packet.ts_frac) * nanoseconds);
        let time = Duration::from_secs(u64::from(packet.ts_sec)) + fraction;
        each(&Captured { time, frame: &packet.data, length: packet.orig_len as usize })?;
    }
    Ok(())
}

/// An interface of a pcapng file.
#[derive(Clone, Copy)]
struct Interface {
    link: DataLink,
    /// Nanoseconds of one unit of its timestamps.
    unit: f64,
}

impl Interface {
    /// The interface of a packet that names one which is not described.
    const DEFAULT: Interface = Interface { link: DataLink::ETHERNET, unit: 1000.0 };
}

fn read_pcapng(
    path: &Path,
    file: BufReader<File>,
    mut each: impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
) -> Result<(), ReplayError> {
    let mut reader = PcapNgReader::new(file).map_err(broken(path, 1))?;
    let mut interfaces: Vec<Interface> = Vec::new();
    let mut packets = 0;
    while let Some(block) = reader.next_block() {
        match block.map_err(broken(path, packets + 1))? {
            Block::SectionHeader(_) => interfaces.clear(),
            Block::InterfaceDescription(described) => {
                let mut interface = Interface { link: described.linktype, ..Interface::DEFAULT };
                for option in &described.options {
                    if let InterfaceDescriptionOption::IfTsResol(code) = option {
                        interface.unit = clock_unit(*code);
                    }
                }
                interfaces.push(interface);
            }
            Block::EnhancedPacket(packet) => {
                packets += 1;
                let interface = interfaces.get(packet.interface_id as usize).copied();
                let Interface { link, unit } = interface.unwrap_or(Interface::DEFAULT);
                check_link(path, link)?;
                // pcap-file 2.0 returns the raw count as if it were nanoseconds.
                let time = Duration::from_nanos((packet.timestamp.as_nanos() as f64 * unit) as u64);
                let length = packet.original_len as usize;
                each(&Captured { time, frame: &packet.data, length })?;
            }
            Block::SimplePacket(packet) => {
                packets += 1;
                let interface = interfaces.first().copied().unwrap_or(Interface::DEFAULT);
                check_link(path, interface.link)?;
                let length = packet.original_len as usize;
                each(&Captured { time: Duration::ZERO, frame: &packet.data, length })?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Returns the nanoseconds of one unit, from `if_tsresol` (pcapng, section 4.2): a power of ten, or
/// of two with the top bit set.
fn clock_unit(code: u8) -> f64 {
    let base: f64 = if code & 0x80 == 0 { 10.0 } else { 2.0 };
    1e9 / base.powi(i32::from(code & 0x7f))
}
