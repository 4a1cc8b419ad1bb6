//! Runs a capture through the engine, without root or kernel: the third oracle beside the fast path and the daemon.

use crate::engine::bounded::Seconds;
use crate::engine::judgement::{DropReason, Judged, Judgement, Reason, To};
use crate::engine::{Memory, Snapshot, judge};
use crate::held::Held;
use nfqd_rules::Policy;
use nfqd_rules::packet::{Packet, l3_offset};
use nfqd_rules::rewrite::{Side, set_destination_mac, translate, translate_quoted};
use nfqd_rules::slots::Seen;
use nfqd_shmctl::MacAddr;
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapReader, PcapWriter};
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use pcap_file::{DataLink, PcapError, TsResolution};
use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// What replay says about one packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Line {
    /// Its number in the capture, from 1.
    pub packet: u64,
    /// `accept`, `drop` or `redirect`.
    pub verdict: &'static str,
    /// Why, for people.
    pub reason: String,
    /// The middlebox that it is for.
    pub middlebox: Option<String>,
    /// The deny rule that matched.
    pub rule: Option<u16>,
    /// Where it goes instead.
    pub to: Option<Target>,
    /// The source that it gets, when it is a reply of a redirected flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

/// Where a packet goes instead.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Target {
    /// The backend's MAC; unknown unless the command gave it.
    pub mac: Option<String>,
    /// The backend's address.
    pub ip: String,
    /// The backend's port, when it differs.
    pub port: Option<u16>,
}

/// Why a capture cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The capture is no capture, or broken.
    #[error("{path}: packet {packet}: {source}; a pcap or pcapng capture of Ethernet frames is expected")]
    Capture {
        /// The file.
        path: String,
        /// The packet before which it broke, from 1.
        packet: u64,
        /// What is wrong.
        source: PcapError,
    },
    /// It is not of Ethernet.
    #[error("{path}: link type {link:?}; a capture of Ethernet frames is expected")]
    Link {
        /// The file.
        path: String,
        /// Its link type.
        link: DataLink,
    },
}

/// What became of a packet: what is said about it, and the frame as it leaves; `None` when it does not.
pub type Outcome = (Line, Option<Vec<u8>>);

/// Judges frames one after the other.
pub struct Replay {
    snapshot: Snapshot,
    memory: Memory,
    packets: u64,
    held: Held<(Line, Vec<u8>)>,
}

impl Replay {
    /// A replay under a policy. A backend whose MAC no command gave is taken as reachable, and all as alive.
    pub fn new(policy: &Policy) -> Replay {
        let mut replay = Replay {
            snapshot: Snapshot::default(),
            memory: Memory::new(1 << 20),
            packets: 0,
            held: Held::default(),
        };
        replay.set_policy(policy);
        replay
    }

    /// Goes on under another policy; flows that were seen are remembered, as far as their services stay as they are.
    pub fn set_policy(&mut self, policy: &Policy) {
        let mut desired = self.snapshot.desired().clone();
        desired.policy = policy.clone();
        // Offline there is nobody to ask for a MAC, and none is needed; the pools want one.
        let mac = Some(UNKNOWN);
        desired.slots.follow(policy, |_, _, _, _| Seen { mac, ..Seen::NOTHING }, Instant::now());
        let mut pools = self.snapshot.pools().clone();
        for mac in desired.changed(self.snapshot.desired()) {
            pools.update(mac, policy.get(mac), &desired.slots);
        }
        self.snapshot = Snapshot::new(desired, pools);
    }

    /// Judges a frame and rewrites it as it would leave. What becomes of it comes back, unless it waits, and then of those
    /// that waited for it. Those that have waited too long come first.
    pub fn frame(&mut self, frame: &[u8], now: Seconds) -> Vec<Outcome> {
        self.cut_frame(frame, frame.len(), now)
    }

    /// The same for a frame of which the capture has only the beginning.
    pub fn cut_frame(&mut self, frame: &[u8], length: usize, now: Seconds) -> Vec<Outcome> {
        self.packets += 1;
        let mut out: Vec<Outcome> =
            self.held.over(now).into_iter().map(|(line, _)| (given_up(line), None)).collect();
        let line = Line {
            packet: self.packets,
            verdict: "accept",
            reason: "no Ethernet header".to_string(),
            middlebox: None,
            rule: None,
            to: None,
            from: None,
        };
        let Some(packet) = Packet::from_cut_frame(frame, length) else {
            out.push((line, Some(frame.to_vec())));
            return out;
        };
        match self.judge(line.clone(), &packet, frame, now) {
            Some(outcome) => out.push(outcome),
            None => {
                let given_up_now = self.held.push(&packet, (line, frame.to_vec()), now);
                out.extend(given_up_now.map(|(line, _)| (given_up(line), None)));
            }
        }
        for (piece, (line, frame)) in self.held.released_by(&packet) {
            let outcome = self.judge(line.clone(), &piece, &frame, now);
            out.push(outcome.unwrap_or_else(|| (given_up(line), None)));
        }
        out
    }

    /// What has become of those that still wait when the capture ends.
    pub fn finish(&mut self) -> Vec<Outcome> {
        self.held.all().into_iter().map(|(line, _)| (given_up(line), None)).collect()
    }

    /// Judges a packet; none for one that is to wait.
    fn judge(&self, mut line: Line, packet: &Packet, frame: &[u8], now: Seconds) -> Option<Outcome> {
        let mut out = frame.to_vec();
        let destination = packet.link.destination;
        let registered = self.snapshot.policy().get(destination).is_some();
        line.middlebox = registered.then(|| destination.to_string());
        let Judged { judgement, rule } = judge(&self.snapshot, &self.memory, packet, now);
        match judgement {
            Judgement::Accept(reason) => {
                line.reason = match reason {
                    Reason::NotOurs => "not for a middlebox",
                    Reason::NoMatch => "no deny rule and no service takes it",
                    Reason::BackendUnresolved => "the backend's MAC is unknown",
                    Reason::NoBackend => "no backend can take it, so the middlebox does",
                }
                .to_string();
            }
            Judgement::Direct => line.reason = "a backend's own traffic".to_string(),
            Judgement::Pass(_) => line.reason = "a connection of the middlebox itself".to_string(),
            Judgement::Hold => return None,
            Judgement::Drop(why) | Judgement::Reject(why) => {
                line.verdict = "drop";
                line.reason = match (why, rule) {
                    (DropReason::Filtered, Some(rule)) => format!("deny rule {} matches", rule.number),
                    (DropReason::Filtered, None) => "no allow rule matches".to_string(),
                    (DropReason::BackendUnresolved, _) => "the backends' MACs are unknown".to_string(),
                    (DropReason::NoBackend, _) => "no backend can take it; refused".to_string(),
                    (DropReason::BackendGone, _) => "its backend is gone; ended".to_string(),
                    (DropReason::Piece | DropReason::Outdated, _) => {
                        "a piece of a datagram that was dropped".to_string()
                    }
                };
                line.rule = rule.filter(|_| why == DropReason::Filtered).map(|rule| rule.number.get());
                return Some((line, None));
            }
            Judgement::Redirect(to) => self.redirect(&mut line, &mut out, packet, &to),
            Judgement::Reply(from) => reply(&mut line, &mut out, packet, &from),
            Judgement::Error { quote, to, from } => {
                let l3 = l3_offset(&out);
                let payload = out.get_mut(l3..).unwrap_or_default();
                let translated = packet
                    .ip
                    .is_some_and(|ip| translate_quoted(payload, &ip, quote.side, quote.ip, quote.port));
                match (to, from) {
                    (Some(to), _) if translated => self.redirect(&mut line, &mut out, packet, &to),
                    (_, Some(from)) if translated => reply(&mut line, &mut out, packet, &from),
                    _ => line.reason = "an error about a flow, from somebody on the way".to_string(),
                }
            }
        }
        if let Some(rule) = rule {
            line.reason = format!("allow rule {} matches; {}", rule.number, line.reason);
        }
        Some((line, Some(out)))
    }

    fn redirect(&self, line: &mut Line, out: &mut [u8], packet: &Packet, to: &To) {
        let mac = self.snapshot.mac(&to.key).filter(|mac| *mac != UNKNOWN);
        if let Some(mac) = mac {
            set_destination_mac(out, mac);
        }
        let port = to.key.ports().map(|(_, backends)| backends).filter(|_| to.port);
        let dsr = self.snapshot.is_dsr(&to.key);
        if !dsr {
            translate(out, packet, Side::Destination, to.key.backend.ip, port);
        }
        line.verdict = "redirect";
        line.reason = format!("service {}", to.key.vip);
        let mac = mac.map(|mac: MacAddr| mac.to_string());
        line.to = Some(Target { mac, ip: to.key.backend.ip.to_string(), port });
    }
}

/// Stands for a MAC that no command has given.
const UNKNOWN: MacAddr = MacAddr([0; 6]);

fn reply(line: &mut Line, out: &mut [u8], packet: &Packet, from: &To) {
    let port = from.key.ports().map(|(own, _)| own).filter(|_| from.port);
    translate(out, packet, Side::Source, from.key.vip.ip, port);
    line.reason = format!("reply of service {}", from.key.vip);
    line.from = Some(from.key.vip.ip.to_string());
}

fn given_up(mut line: Line) -> Line {
    line.verdict = "drop";
    line.reason = "a later piece of a datagram whose first piece did not come".to_string();
    line
}

/// A frame of a capture.
pub struct Captured<'a> {
    /// When it was seen.
    pub time: Duration,
    /// Its bytes, or the first of them.
    pub frame: &'a [u8],
    /// How long it was.
    pub length: usize,
}

/// Gives each Ethernet frame of a pcap or pcapng file to `each`. The file may be a pipe.
///
/// # Errors
/// When the file cannot be read, or is no such capture.
pub fn read_capture(
    path: &Path,
    mut each: impl FnMut(&Captured<'_>) -> Result<(), ReplayError>,
) -> Result<(), ReplayError> {
    let name = path.display().to_string();
    let io = |source| ReplayError::Io { path: name.clone(), source };
    let mut file = BufReader::new(File::open(path).map_err(io)?);
    let next_generation = file.fill_buf().map_err(io)?.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]);
    let mut packets = 0;
    let broken = |packet: u64| {
        let path = name.clone();
        move |source| ReplayError::Capture { path, packet, source }
    };
    let ethernet = |link: DataLink| match link {
        DataLink::ETHERNET => Ok(()),
        link => Err(ReplayError::Link { path: name.clone(), link }),
    };
    if !next_generation {
        let mut reader = PcapReader::new(file).map_err(broken(1))?;
        ethernet(reader.header().datalink)?;
        let unit = match reader.header().ts_resolution {
            TsResolution::MicroSecond => 1000,
            TsResolution::NanoSecond => 1,
        };
        while let Some(packet) = reader.next_raw_packet() {
            packets += 1;
            let packet = packet.map_err(broken(packets))?;
            let fraction = Duration::from_nanos(u64::from(packet.ts_frac) * unit);
            let time = Duration::from_secs(u64::from(packet.ts_sec)) + fraction;
            each(&Captured { time, frame: &packet.data, length: packet.orig_len as usize })?;
        }
        return Ok(());
    }
    let mut reader = PcapNgReader::new(file).map_err(broken(1))?;
    // Link type, and nanoseconds that one unit of its clock has.
    let mut interfaces: Vec<(DataLink, f64)> = Vec::new();
    const MICROSECONDS: f64 = 1000.0;
    while let Some(block) = reader.next_block() {
        match block.map_err(broken(packets + 1))? {
            Block::SectionHeader(_) => interfaces.clear(),
            Block::InterfaceDescription(interface) => {
                let unit = interface.options.iter().find_map(|option| match option {
                    InterfaceDescriptionOption::IfTsResol(code) => Some(clock_unit(*code)),
                    _ => None,
                });
                interfaces.push((interface.linktype, unit.unwrap_or(MICROSECONDS)));
            }
            Block::EnhancedPacket(packet) => {
                packets += 1;
                let interface = interfaces.get(packet.interface_id as usize).copied();
                let (link, unit) = interface.unwrap_or((DataLink::ETHERNET, MICROSECONDS));
                ethernet(link)?;
                // pcap-file 2.0 gives the raw count as if it were nanoseconds.
                let time = Duration::from_nanos((packet.timestamp.as_nanos() as f64 * unit) as u64);
                each(&Captured { time, frame: &packet.data, length: packet.original_len as usize })?;
            }
            Block::SimplePacket(packet) => {
                packets += 1;
                ethernet(interfaces.first().map_or(DataLink::ETHERNET, |(link, _)| *link))?;
                let length = packet.original_len as usize;
                each(&Captured { time: Duration::ZERO, frame: &packet.data, length })?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Nanoseconds of one unit, from `if_tsresol` (pcapng, section 4.2): a power of ten, or of two with the top bit set.
fn clock_unit(code: u8) -> f64 {
    let base: f64 = if code & 0x80 == 0 { 10.0 } else { 2.0 };
    1e9 / base.powi(i32::from(code & 0x7f))
}

/// Replays a capture: a line of text or JSON a packet to `out`, and the frames as they leave to `write`.
///
/// # Errors
/// When a file cannot be read or written; what came before is out.
pub fn replay(
    capture: &Path,
    policy: &Policy,
    json: bool,
    write: Option<&Path>,
    out: &mut dyn Write,
) -> Result<(), ReplayError> {
    let io = |path: &Path| {
        let path = path.display().to_string();
        move |source| ReplayError::Io { path, source }
    };
    if let (Ok(from), Some(Ok(to))) = (capture.canonicalize(), write.map(Path::canonicalize))
        && from == to
    {
        let error =
            io::Error::new(io::ErrorKind::InvalidInput, "is the capture itself; write to another file");
        return Err(io(capture)(error));
    }
    let mut replay = Replay::new(policy);
    let mut writer = match write {
        None => None,
        Some(path) => {
            let file = BufWriter::new(File::create(path).map_err(io(path))?);
            let header = PcapHeader { ts_resolution: TsResolution::NanoSecond, ..PcapHeader::default() };
            Some((path, PcapWriter::with_header(file, header).map_err(pcap(path))?))
        }
    };
    // Lines come in the packets' order; some packets wait for others.
    let mut pending: BTreeMap<u64, Line> = BTreeMap::new();
    let mut next = 1;
    let mut take = |outcomes: Vec<Outcome>, time: Duration, length: usize| -> Result<(), ReplayError> {
        for (line, leaves) in outcomes {
            if let (Some((path, writer)), Some(frame)) = (&mut writer, leaves) {
                let length = length.max(frame.len()) as u32;
                let packet = PcapPacket::new(time, length, &frame);
                writer.write_packet(&packet).map_err(pcap(path))?;
            }
            pending.insert(line.packet, line);
        }
        while let Some(line) = pending.remove(&next) {
            next += 1;
            let text = if json { serde_json::to_string(&line).unwrap_or_default() } else { line.text() };
            writeln!(out, "{text}").map_err(io(Path::new("standard output")))?;
        }
        Ok(())
    };
    let mut start = None;
    read_capture(capture, |captured| {
        let start = *start.get_or_insert(captured.time);
        let now = captured.time.saturating_sub(start).as_secs().min(u64::from(Seconds::MAX)) as Seconds;
        let outcomes = replay.cut_frame(captured.frame, captured.length, now);
        take(outcomes, captured.time, captured.length)
    })?;
    take(replay.finish(), Duration::ZERO, 0)?;
    if let Some((path, writer)) = writer {
        writer.into_writer().flush().map_err(io(path))?;
    }
    Ok(())
}

fn pcap(path: &Path) -> impl FnOnce(PcapError) -> ReplayError + use<> {
    let path = path.display().to_string();
    move |source| ReplayError::Capture { path, packet: 0, source }
}

impl Line {
    /// The line for people.
    pub fn text(&self) -> String {
        let to = match &self.to {
            Some(Target { mac, ip, port }) => {
                let port = port.map(|port| format!(" port {port}")).unwrap_or_default();
                let mac = mac.as_deref().unwrap_or("a MAC not known here");
                Cow::Owned(format!(" to {ip}{port} at {mac}"))
            }
            None => Cow::Borrowed(""),
        };
        format!("{}: {}{to}: {}", self.packet, self.verdict, self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;
    use pcap_file::pcapng::PcapNgWriter;
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketBlock;
    use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;

    fn frames() -> Vec<Vec<u8>> {
        let (vm, client, backend) = ([2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 3]);
        let tcp = |from, to, source: u8, destination: u8, sport, dport| {
            let mut out = Vec::new();
            PacketBuilder::ethernet2(from, to)
                .ipv4([10, 0, 0, source], [10, 0, 0, destination], 64)
                .tcp(sport, dport, 1, 2)
                .write(&mut out, b"hello")
                .unwrap();
            out
        };
        vec![
            tcp(client, vm, 1, 2, 1000, 81),
            tcp(client, vm, 1, 2, 1000, 80),
            tcp(backend, client, 3, 1, 80, 1000),
            tcp(client, backend, 1, 3, 7, 8),
            vec![1, 2, 3],
        ]
    }

    fn policy() -> Policy {
        let mut policy = Policy::default();
        for line in [
            "R F 2:0:0:0:0:2 10.0.0.2",
            "A 2:0:0:0:0:2 #4 T 2 d 81",
            "R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3",
        ] {
            policy.apply_line(line).unwrap();
        }
        policy
    }

    fn write_pcap(path: &Path) {
        let mut writer = PcapWriter::new(File::create(path).unwrap()).unwrap();
        for frame in frames() {
            writer
                .write_packet(&PcapPacket::new(Duration::new(9, 123_456_000), frame.len() as u32, &frame))
                .unwrap();
        }
    }

    fn write_pcapng(path: &Path) {
        let mut writer = PcapNgWriter::new(File::create(path).unwrap()).unwrap();
        let interface =
            InterfaceDescriptionBlock { linktype: DataLink::ETHERNET, snaplen: 0, options: vec![] };
        writer.write_pcapng_block(interface).unwrap();
        for frame in frames() {
            let packet = EnhancedPacketBlock {
                interface_id: 0,
                // The crate writes nanoseconds as they are; the interface's unit is a microsecond.
                timestamp: Duration::from_nanos(9_123_456),
                original_len: frame.len() as u32,
                data: Cow::Owned(frame),
                options: vec![],
            };
            writer.write_pcapng_block(packet).unwrap();
        }
    }

    /// A later piece whose first one comes after it, and is denied by its ports: nothing says where it goes.
    #[test]
    fn every_packet_has_its_line() {
        let mut policy = Policy::default();
        for line in [
            "R L 2:0:0:0:0:2 10.0.0.2:53 rr 10.0.0.3@2:0:0:0:0:3 10.0.0.4@2:0:0:0:0:4",
            "R F 2:0:0:0:0:2 10.0.0.2",
            "A 2:0:0:0:0:2 U 1 s 99",
        ] {
            policy.apply_line(line).unwrap();
        }
        let piece = |id: u16, first: bool, sport: u8| {
            let mut ip =
                etherparse::Ipv4Header::new(16, 9, etherparse::IpNumber::UDP, [10, 0, 0, 1], [10, 0, 0, 2])
                    .unwrap();
            ip.identification = id;
            ip.more_fragments = first;
            ip.fragment_offset = if first { 0_u16 } else { 2 }.try_into().unwrap();
            let mut out = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
            ip.write(&mut out).unwrap();
            out.extend([0, sport, 0, 53, 0, 40, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            out
        };
        let mut replay = Replay::new(&policy);
        let seen = |outcomes: Vec<Outcome>| -> Vec<(u64, &str)> {
            outcomes.iter().map(|(line, _)| (line.packet, line.verdict)).collect()
        };
        assert_eq!(seen(replay.frame(&piece(1, false, 98), 0)), []);
        assert_eq!(seen(replay.frame(&piece(1, true, 98), 0)), [(2, "redirect"), (1, "redirect")]);
        assert_eq!(seen(replay.frame(&piece(2, false, 99), 0)), []);
        assert_eq!(seen(replay.frame(&piece(2, true, 99), 0)), [(4, "drop"), (3, "drop")]);
        assert_eq!(seen(replay.frame(&piece(3, false, 98), 0)), []);
        assert_eq!(seen(replay.frame(&piece(4, false, 98), 9)), [(5, "drop")], "it has waited long enough");
        assert_eq!(seen(replay.finish()), [(6, "drop")]);
    }

    #[test]
    fn both_formats_give_the_contract_s_lines_and_frames() {
        let dir = tempfile::tempdir().unwrap();
        let (pcap, pcapng, written) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("out"));
        write_pcap(&pcap);
        write_pcapng(&pcapng);
        for capture in [pcap, pcapng] {
            let mut out = Vec::new();
            replay(&capture, &policy(), true, Some(&written), &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(
                lines,
                [
                    r#"{"packet":1,"verdict":"drop","reason":"deny rule 4 matches","middlebox":"02:00:00:00:00:02","rule":4,"to":null}"#,
                    r#"{"packet":2,"verdict":"redirect","reason":"service 10.0.0.2","middlebox":"02:00:00:00:00:02","rule":null,"to":{"mac":"02:00:00:00:00:03","ip":"10.0.0.3","port":null}}"#,
                    r#"{"packet":3,"verdict":"accept","reason":"reply of service 10.0.0.2","middlebox":null,"rule":null,"to":null,"from":"10.0.0.2"}"#,
                    r#"{"packet":4,"verdict":"accept","reason":"not for a middlebox","middlebox":null,"rule":null,"to":null}"#,
                    r#"{"packet":5,"verdict":"accept","reason":"no Ethernet header","middlebox":null,"rule":null,"to":null}"#,
                ]
            );
            let mut leaving = Vec::new();
            read_capture(&written, |captured| {
                assert_eq!(captured.time, Duration::new(9, 123_456_000));
                leaving.push(captured.frame.to_vec());
                Ok(())
            })
            .unwrap();
            assert_eq!(leaving.len(), 4);
            assert_eq!(
                (&leaving[0][..6], &leaving[0][30..34]),
                (&[2, 0, 0, 0, 0, 3][..], &[10, 0, 0, 3][..])
            );
            assert_eq!(&leaving[1][26..30], &[10, 0, 0, 2]);
            assert_eq!(leaving[2..], frames()[3..]);
        }
    }

    #[test]
    fn the_capture_is_not_written_over_and_a_cut_packet_is_judged() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_pcap(&path);
        let before = std::fs::read(&path).unwrap();
        let error = replay(&path, &policy(), false, Some(&path), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("is the capture itself"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        let frame = &frames()[0];
        let (line, _) = Replay::new(&policy()).cut_frame(&frame[..40], frame.len(), 0).remove(0);
        assert_eq!((line.verdict, line.rule), ("drop", Some(4)));
    }

    #[test]
    fn what_is_no_capture_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        for content in [&b""[..], b"GIF89a", &[0x0a, 0x0d, 0x0d, 0x0a, 1, 2]] {
            std::fs::write(&path, content).unwrap();
            let error = replay(&path, &policy(), false, None, &mut Vec::new()).unwrap_err().to_string();
            assert!(error.contains("pcap or pcapng"), "{error}");
        }
        assert!(replay(&dir.path().join("none"), &policy(), false, None, &mut Vec::new()).is_err());
    }
}
