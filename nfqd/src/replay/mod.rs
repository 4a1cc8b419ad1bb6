//! Replay: runs a capture through the engine, without root or kernel. It is the third oracle beside
//! the fast path and the daemon.

mod capture;
mod own;
#[cfg(test)]
mod tests;

pub use capture::{Captured, ETHERNET, read_capture};

use crate::engine::reason::Reason;
use crate::engine::verdict::{Decision, DropReason, Translation, Verdict};
use crate::engine::{EngineState, Ingress, Snapshot, decide};
use crate::packet_path::fragments::FragmentQueue;
use nfqd_rules::packet::{Packet, l3_offset};
use nfqd_rules::rewrite::{Side, set_destination_mac, translate, translate_quoted};
use nfqd_rules::service::BackendRef;
use nfqd_rules::slots::BackendObservation;
use nfqd_rules::{NetworkId, Policy};
use nfqd_shmctl::MacAddr;
use own::OwnConversations;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

/// The result for one packet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Line {
    /// The number of the packet in the capture, from 1.
    pub packet: u64,
    /// The verdict: `accept`, `drop` or `redirect`.
    pub verdict: &'static str,
    /// The reason, for people.
    pub reason: String,
    /// The middlebox that the packet is sent to.
    pub middlebox: Option<String>,
    /// The deny rule that matched.
    pub rule: Option<u16>,
    /// The backend that the packet is redirected to.
    pub to: Option<Target>,
    /// The new source of a reply of a redirected flow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

/// The backend that a packet is redirected to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Target {
    /// The MAC; unknown unless the command gave it.
    pub mac: Option<String>,
    /// The address.
    pub ip: String,
    /// The port, if it differs.
    pub port: Option<u16>,
}

/// The reason a capture cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The path of the file.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The capture is broken, or is not one.
    #[error(
        "{path}: packet {packet}: {reason}; a pcap or pcapng capture of Ethernet frames is expected"
    )]
    Capture {
        /// The path of the file.
        path: String,
        /// The packet that cannot be read, from 1.
        packet: u64,
        /// The reason.
        reason: &'static str,
    },
    /// The capture is not of Ethernet frames.
    #[error("{path}: link type {link}; a capture of Ethernet frames (link type 1) is expected")]
    Link {
        /// The path of the file.
        path: String,
        /// The link type of the capture.
        link: u16,
    },
}

/// The result for a packet, and the frame as it leaves; `None` if it does not.
pub type Outcome = (Line, Option<Vec<u8>>);

/// A replay: the engine's state between frames.
pub struct Replay {
    snapshot: Snapshot,
    state: EngineState,
    packets: u64,
    fragments: FragmentQueue<(Line, Vec<u8>)>,
    own: OwnConversations,
}

/// Stands for a MAC that no command has given.
const UNKNOWN_MAC: MacAddr = MacAddr([0; 6]);

impl Replay {
    /// A replay under a policy. A backend whose MAC no command gave is considered reachable, and
    /// all are considered alive.
    pub fn new(policy: &Policy) -> Replay {
        let mut replay = Replay {
            snapshot: Snapshot::default(),
            state: EngineState::new(1 << 20),
            packets: 0,
            fragments: FragmentQueue::default(),
            own: OwnConversations::default(),
        };
        replay.set_policy(policy);
        replay
    }

    /// Goes on under another policy. Flows are kept as far as their services stay as they are.
    pub fn set_policy(&mut self, policy: &Policy) {
        // Offline nobody can be asked for a MAC, and none is needed; but pools leave out backends
        // without one.
        let view = |_: &BackendRef<'_>| BackendObservation {
            mac: Some(UNKNOWN_MAC),
            ..BackendObservation::UNKNOWN
        };
        self.snapshot = self.snapshot.successor(policy.clone(), &view);
    }

    /// Decides on a frame and rewrites it as it would leave; `now` is in seconds. Returns what
    /// becomes of it, unless it is held, and of the fragments that it releases. Fragments that have
    /// expired come first.
    pub fn frame(&mut self, frame: &[u8], now: u32) -> Vec<Outcome> {
        let packet = Packet::from_cut_frame(frame, frame.len());
        self.packet(packet, frame, now)
    }

    /// Does the same for a packet of a capture, which may have only the beginning of it. One that is
    /// not an Ethernet frame is not decided on, and does not leave as one.
    pub fn captured(&mut self, captured: &Captured<'_>, now: u32) -> Vec<Outcome> {
        if captured.link != ETHERNET {
            self.packets += 1;
            let reason = format!("not decided on: link type {}, not Ethernet", captured.link);
            return vec![(Line { reason, ..self.line() }, None)];
        }
        let packet = Packet::from_captured_frame(captured.frame, captured.length);
        self.packet(packet, captured.frame, now)
    }

    fn line(&self) -> Line {
        Line {
            packet: self.packets,
            verdict: "accept",
            reason: "no Ethernet header".to_string(),
            middlebox: None,
            rule: None,
            to: None,
            from: None,
        }
    }

    fn packet(&mut self, packet: Option<Packet>, frame: &[u8], now: u32) -> Vec<Outcome> {
        self.packets += 1;
        let expired = self.fragments.expired(now);
        let mut out: Vec<Outcome> = expired.into_iter().map(|(line, _)| lost(line)).collect();
        let line = self.line();
        let Some(mut packet) = packet else {
            out.push((line, Some(frame.to_vec())));
            return out;
        };
        let mut frame = frame.to_vec();
        if let Some(owner) = self.owner_of_group_frame(&packet) {
            packet.link.destination = owner;
            set_destination_mac(&mut frame, owner);
        }
        self.remember_own(&packet, now);
        let is_own = self.own.contains(&packet, now);
        let ingress = Ingress { is_own, ..Ingress::ANY };
        match self.decide(line.clone(), ingress, &packet, &frame, now) {
            Some(outcome) => out.push(outcome),
            None => {
                let evicted = self.fragments.push(ingress, &packet, (line, frame), now);
                out.extend(evicted.map(|(line, _)| lost(line)));
            }
        }
        for (ingress, fragment, (line, frame)) in
            self.fragments.released_by(NetworkId::ANY, &packet)
        {
            let outcome = self.decide(line.clone(), ingress, &fragment, &frame, now);
            out.push(outcome.unwrap_or_else(|| lost(line)));
        }
        out
    }

    /// Remembers what a middlebox with services begins itself.
    fn remember_own(&mut self, packet: &Packet, now: u32) {
        let key = self.snapshot.middlebox_at(NetworkId::ANY, packet.link.source);
        let middlebox = key.and_then(|key| self.snapshot.policy().get(key));
        if middlebox.is_some_and(|middlebox| !middlebox.services().is_empty()) {
            self.own.remember(packet, now);
        }
    }

    /// Returns the MAC of the middlebox that a frame to a group goes to, because the packet in it is
    /// to the middlebox' registered address. The kernel does the same before anything else.
    fn owner_of_group_frame(&self, packet: &Packet) -> Option<MacAddr> {
        let ip = packet.ip.filter(|_| packet.link.destination.is_group())?;
        let owner = self.snapshot.desired().slots.owner(NetworkId::ANY, ip.destination)?;
        Some(owner.mac)
    }

    /// Returns what becomes of the fragments that are still held when the capture ends.
    pub fn finish(&mut self) -> Vec<Outcome> {
        self.fragments.drain().into_iter().map(|(line, _)| lost(line)).collect()
    }

    /// Decides on a packet; `None` if it is to be held.
    fn decide(
        &self,
        mut line: Line,
        ingress: Ingress,
        packet: &Packet,
        frame: &[u8],
        now: u32,
    ) -> Option<Outcome> {
        let mut out = frame.to_vec();
        let destination = packet.link.destination;
        let is_registered = self.snapshot.middlebox_at(NetworkId::ANY, destination).is_some();
        line.middlebox = is_registered.then(|| destination.to_string());
        // There is one snapshot, so no flow can have a newer one.
        let decision = decide(&self.snapshot, &self.state, ingress, packet, now).decision()?;
        let Decision { verdict, rule } = decision;
        let default = self.snapshot.default_action(NetworkId::ANY, destination);
        let why = Reason::of(&decision, default);
        match verdict {
            Verdict::Accept(_) | Verdict::Bypass | Verdict::Local(_) => {
                line.reason = why.text().to_string();
            }
            Verdict::AwaitFirstFragment => return None,
            Verdict::Drop(reason) | Verdict::Reject(reason) => {
                line.verdict = "drop";
                line.reason = match rule.filter(|_| why == Reason::DenyRule) {
                    Some(rule) => format!("deny rule {} matches", rule.number),
                    None => why.text().to_string(),
                };
                let denying = rule.filter(|_| reason == DropReason::Filtered);
                line.rule = denying.map(|rule| rule.number.get());
                return Some((line, None));
            }
            Verdict::Redirect(to) => self.redirect(&mut line, &mut out, packet, &to),
            Verdict::Reply(from) => translate_reply(&mut line, &mut out, packet, &from),
            Verdict::Error { quote, to, from } => {
                let l3 = l3_offset(&out);
                let payload = out.get_mut(l3..).unwrap_or_default();
                let is_translated = packet.ip.is_some_and(|ip| {
                    translate_quoted(payload, &ip, quote.side, quote.ip, quote.port)
                });
                match (to, from) {
                    (Some(to), _) if is_translated => {
                        self.redirect(&mut line, &mut out, packet, &to);
                    }
                    (_, Some(from)) if is_translated => {
                        translate_reply(&mut line, &mut out, packet, &from);
                    }
                    _ => line.reason = why.text().to_string(),
                }
            }
        }
        if let Some(rule) = rule {
            line.reason = format!("allow rule {} matches; {}", rule.number, line.reason);
        }
        Some((line, Some(out)))
    }

    fn redirect(&self, line: &mut Line, out: &mut [u8], packet: &Packet, to: &Translation) {
        let mac = self.snapshot.mac(&to.key).filter(|mac| *mac != UNKNOWN_MAC);
        if let Some(mac) = mac {
            set_destination_mac(out, mac);
        }
        let port = to.key.ports().map(|(_, backend)| backend).filter(|_| to.port);
        if !self.snapshot.is_dsr(&to.key) {
            translate(out, packet, Side::Destination, to.key.backend.ip, port);
        }
        line.verdict = "redirect";
        line.reason = format!("service {}", to.key.frontend);
        let mac = mac.map(|mac| mac.to_string());
        line.to = Some(Target { mac, ip: to.key.backend.ip.to_string(), port });
    }
}

fn translate_reply(line: &mut Line, out: &mut [u8], packet: &Packet, from: &Translation) {
    let port = from.key.ports().map(|(frontend, _)| frontend).filter(|_| from.port);
    translate(out, packet, Side::Source, from.key.frontend.ip, port);
    line.reason = format!("reply of service {}", from.key.frontend);
    line.from = Some(from.key.frontend.ip.to_string());
}

/// Returns the outcome of a later fragment whose first one did not come.
fn lost(mut line: Line) -> Outcome {
    line.verdict = "drop";
    line.reason = Reason::FirstFragmentMissing.text().to_string();
    (line, None)
}

/// Replays a capture: a line of text or JSON a packet to `out`, and the frames as they leave to
/// `write`.
///
/// # Errors
/// If a file cannot be read or written; what came before is out.
pub fn replay(
    capture: &Path,
    policy: &Policy,
    json: bool,
    write: Option<&Path>,
    out: &mut dyn Write,
) -> Result<(), ReplayError> {
    if let (Ok(from), Some(Ok(to))) = (capture.canonicalize(), write.map(Path::canonicalize))
        && from == to
    {
        let message = "is the capture itself; write to another file";
        let error = io::Error::new(io::ErrorKind::InvalidInput, message);
        return Err(io_error(capture)(error));
    }
    let mut replay = Replay::new(policy);
    let mut output = Output {
        frames: write.map(FrameWriter::create).transpose()?,
        pending: BTreeMap::new(),
        next: 1,
        json,
        out,
    };
    let mut start = None;
    read_capture(capture, |captured| {
        let start = *start.get_or_insert(captured.time);
        let elapsed = captured.time.saturating_sub(start).as_secs();
        let now = elapsed.min(u64::from(u32::MAX)) as u32;
        let outcomes = replay.captured(captured, now);
        output.add(outcomes, captured.time, captured.length)
    })?;
    output.add(replay.finish(), Duration::ZERO, 0)?;
    output.frames.map_or(Ok(()), FrameWriter::finish)
}

/// The output of a replay: lines in the order of the packets, though some packets wait for others.
struct Output<'a> {
    frames: Option<FrameWriter<'a>>,
    pending: BTreeMap<u64, Line>,
    next: u64,
    json: bool,
    out: &'a mut dyn Write,
}

impl Output<'_> {
    fn add(
        &mut self,
        outcomes: Vec<Outcome>,
        time: Duration,
        length: usize,
    ) -> Result<(), ReplayError> {
        for (line, leaving) in outcomes {
            if let (Some(frames), Some(frame)) = (&mut self.frames, leaving) {
                frames.write(time, length, &frame)?;
            }
            self.pending.insert(line.packet, line);
        }
        while let Some(line) = self.pending.remove(&self.next) {
            self.next += 1;
            let text = match self.json {
                // A line has string keys only, so it serializes.
                true => serde_json::to_string(&line).unwrap_or_default(),
                false => line.text(),
            };
            writeln!(self.out, "{text}").map_err(io_error(Path::new("standard output")))?;
        }
        Ok(())
    }
}

/// A writer of the frames that leave: a pcap file with nanoseconds.
struct FrameWriter<'a> {
    path: &'a Path,
    file: BufWriter<File>,
}

/// The magic number of a pcap file with nanoseconds, in the order of its writer.
const PCAP_NANOSECONDS: u32 = 0xa1b2_3c4d;
/// The longest frame that programs read from a capture (MAXIMUM_SNAPLEN of libpcap); longer ones are
/// truncated, with their full length noted.
const LONGEST_FRAME: usize = 262_144;

impl FrameWriter<'_> {
    fn create(path: &Path) -> Result<FrameWriter<'_>, ReplayError> {
        let mut file = BufWriter::new(File::create(path).map_err(io_error(path))?);
        // Version 2.4, time zone, accuracy, longest frame, link type.
        let version = 2_u32 | 4 << 16;
        let header = [PCAP_NANOSECONDS, version, 0, 0, LONGEST_FRAME as u32, u32::from(ETHERNET)];
        file.write_all(&words(&header)).map_err(io_error(path))?;
        Ok(FrameWriter { path, file })
    }

    fn write(&mut self, time: Duration, length: usize, frame: &[u8]) -> Result<(), ReplayError> {
        let length = u32::try_from(length.max(frame.len())).unwrap_or(u32::MAX);
        let frame = frame.get(..frame.len().min(LONGEST_FRAME)).unwrap_or_default();
        // The format ends in 2106; later times are written as its end.
        let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        let header = words(&[seconds, time.subsec_nanos(), frame.len() as u32, length]);
        let written = self.file.write_all(&header).and_then(|()| self.file.write_all(frame));
        written.map_err(io_error(self.path))
    }

    fn finish(mut self) -> Result<(), ReplayError> {
        self.file.flush().map_err(io_error(self.path))
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> ReplayError + use<> {
    let path = path.display().to_string();
    move |source| ReplayError::Io { path, source }
}

impl Line {
    /// Returns the line for people.
    pub fn text(&self) -> String {
        let to = match &self.to {
            Some(Target { mac, ip, port }) => {
                let port = port.map(|port| format!(" port {port}")).unwrap_or_default();
                let mac = mac.as_deref().unwrap_or("an unknown MAC");
                format!(" to {ip}{port} at {mac}")
            }
            None => String::new(),
        };
        format!("{}: {}{to}: {}", self.packet, self.verdict, self.reason)
    }
}
