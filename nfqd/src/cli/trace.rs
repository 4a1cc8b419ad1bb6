//! `nfqd trace`: asks the daemon what would happen to a packet, and prints the answer.

use super::Failure;
use crate::api::client::ask;
use crate::api::{Answer, Request, TargetTrace, Trace, TraceRequest};
use crate::replay::{ETHERNET, read_capture};
use crate::trace::words::{from_hex, parse, to_hex};
use clap::Args;
use nfqd_rules::packet::Packet;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

/// The arguments of `nfqd trace`.
#[derive(Args, Debug)]
pub(super) struct TraceArgs {
    /// The packet in words, like: tcp 10.0.0.9:40000 > 10.129.126.15:80 syn to 12:13:14:15:16:17 vlan 100
    #[arg(
        required_unless_present_any = ["pcap", "hex"],
        conflicts_with_all = ["pcap", "hex"],
        value_name = "PACKET"
    )]
    packet: Vec<String>,
    /// The packet in a capture: its number, from 1 [default: 1]
    #[arg(long, value_name = "FILE[:N]")]
    pcap: Option<String>,
    /// The packet as an Ethernet frame in hexadecimal digits
    #[arg(long, value_name = "BYTES", conflicts_with = "pcap")]
    hex: Option<String>,
    /// The network that it is on [default: that of the middlebox it is sent to]
    #[arg(long, value_name = "BRIDGE[ vlan ID]")]
    on: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
    /// A socket of the daemon
    #[arg(long, visible_alias = "control", value_name = "PATH", default_value = crate::config::DEFAULT_OBSERVE)]
    socket: PathBuf,
}

/// The longest part of a frame that is sent to the daemon: it fits into one request.
const MAX_FRAME: usize = 1600;

/// Asks the daemon about the packet.
pub(super) fn run(args: &TraceArgs) -> Result<Trace, Failure> {
    let request = request(args).map_err(Failure::Input)?;
    let answer = ask(&args.socket, &Request::Trace(request)).map_err(|error| {
        Failure::System(format!(
            "{}: {error}; is nfqd running, and is this one of its sockets?",
            args.socket.display()
        ))
    })?;
    match answer {
        Answer::Trace(trace) => Ok(*trace),
        Answer::Error(error) => Err(Failure::Input(error.to_string())),
        _ => Err(Failure::System("an answer to another request".to_string())),
    }
}

fn request(args: &TraceArgs) -> Result<TraceRequest, String> {
    let (frame, length, network) = match (&args.pcap, &args.hex) {
        (Some(text), _) => {
            let (frame, length) = captured(text)?;
            (frame, length, None)
        }
        (None, Some(hex)) => {
            let frame = from_hex(hex).ok_or("not a sequence of hexadecimal digits, two a byte")?;
            let length = frame.len();
            (frame, length, None)
        }
        (None, None) => {
            let worded = parse(&args.packet.join(" ")).map_err(|error| error.to_string())?;
            (worded.frame.clone(), worded.frame.len(), worded.network)
        }
    };
    if Packet::from_captured_frame(&frame, length).is_none() {
        return Err("the frame is shorter than an Ethernet header".to_string());
    }
    let beginning = frame.get(..frame.len().min(MAX_FRAME)).unwrap_or_default();
    let network = args.on.clone().or(network);
    Ok(TraceRequest { frame: to_hex(beginning), length: Some(length), network })
}

/// Reads a packet of a capture, named as `FILE[:N]`.
fn captured(text: &str) -> Result<(Vec<u8>, usize), String> {
    let (path, number) = match text.rsplit_once(':') {
        Some((path, number)) if !Path::new(text).exists() => {
            let number = number.parse::<u64>().ok().filter(|number| *number != 0);
            (path, number.ok_or_else(|| format!("'{text}': write FILE:N, with N from 1"))?)
        }
        _ => (text, 1),
    };
    let (mut at, mut found) = (0, None);
    let result = read_capture(Path::new(path), |captured| {
        at += 1;
        if at == number {
            let is_ethernet = captured.link == ETHERNET;
            found = Some((captured.frame.to_vec(), captured.length, is_ethernet));
        }
        Ok(())
    });
    match found {
        Some((frame, length, true)) => Ok((frame, length)),
        Some((.., false)) => Err(format!("{path}: packet {number} is not an Ethernet frame")),
        None => {
            result.map_err(|error| error.to_string())?;
            Err(format!("{path} has {at} packets; there is no packet {number}"))
        }
    }
}

/// Returns a trace as text for people. The last line is the verdict.
pub(super) fn text(trace: &Trace) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_trace(&mut out, trace);
    out
}

fn write_trace(out: &mut String, trace: &Trace) -> fmt::Result {
    writeln!(out, "packet     {}", trace.packet)?;
    let network = trace.network.as_deref().unwrap_or("unknown: bridges are not distinguished");
    writeln!(out, "network    {network}")?;
    match &trace.middlebox {
        Some(mac) => writeln!(out, "middlebox  {mac}")?,
        None => writeln!(out, "middlebox  none has the destination MAC on this network")?,
    }
    for (at, name) in trace.kernel.iter().enumerate() {
        writeln!(out, "{:<10} {name}", if at == 0 { "kernel" } else { "" })?;
    }
    for (at, rule) in trace.rules.iter().enumerate() {
        let result = if rule.matches { "matches" } else { "does not match" };
        let title = if at == 0 { "filters" } else { "" };
        writeln!(out, "{title:<10} {} {result}: {}", rule.rule, rule.why)?;
    }
    if let Some(service) = &trace.service {
        writeln!(out, "service    {service}")?;
    }
    if trace.known_flow {
        writeln!(out, "flow       known: it keeps its backend")?;
    }
    if let Some(reply) = &trace.reply {
        writeln!(out, "reply      {reply}")?;
    }
    writeln!(out, "depends on {}", trace.depends_on.join(", "))?;
    let to = trace.to.as_ref().map(target).unwrap_or_default();
    writeln!(out, "{}{to}: {}", trace.verdict, trace.explanation)
}

fn target(to: &TargetTrace) -> String {
    let port = to.port.map(|port| format!(" port {port}")).unwrap_or_default();
    let mac = to.mac.as_deref().unwrap_or("an unknown MAC");
    format!(" to {}{port} at {mac}", to.ip)
}
