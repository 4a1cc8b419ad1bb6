//! `nfqd top`: the rates of middleboxes, backends, rules and queues, the busiest first.

use super::Failure;
use crate::api::client::status;
use crate::api::{Status, first_line};
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The arguments of `nfqd top`.
#[derive(Args, Debug)]
pub(super) struct TopArgs {
    /// Print the rates of one interval and exit
    #[arg(long)]
    once: bool,
    /// The order of the rows
    #[arg(long, value_enum, default_value_t = Sort::Rate)]
    sort: Sort,
    /// Show only rows that contain this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// The most rows of each kind
    #[arg(long, value_name = "N", default_value_t = 10)]
    rows: usize,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// A socket of the daemon
    #[arg(long, visible_alias = "control", value_name = "PATH", default_value = crate::config::DEFAULT_OBSERVE)]
    socket: PathBuf,
}

/// The order of rows.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
enum Sort {
    /// Packets a second, most first
    Rate,
    /// Packets in all, most first
    Packets,
    /// The name
    Name,
}

/// A counted thing: its kind, its name, packets and bytes so far, and a note.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Row {
    kind: &'static str,
    name: String,
    packets: u64,
    bytes: u64,
    note: String,
}

/// The kinds of rows, in their order.
const KINDS: [&str; 4] = ["middlebox", "backend", "rule", "queue"];

fn rows(status: &Status) -> Vec<Row> {
    let mut out = Vec::new();
    for middlebox in &status.middleboxes {
        let mac = &match &middlebox.network {
            Some(network) => format!("{} on {network}", middlebox.mac),
            None => middlebox.mac.clone(),
        };
        let (packets, bytes) = (middlebox.packets, middlebox.bytes);
        out.push(Row { kind: "middlebox", name: mac.clone(), packets, bytes, note: String::new() });
        for service in &middlebox.services {
            for backend in &service.backends {
                out.push(Row {
                    kind: "backend",
                    name: format!("{mac} {} -> {}", service.vip, backend.backend),
                    packets: backend.packets + backend.reply_packets,
                    bytes: backend.bytes + backend.reply_bytes,
                    note: format!("{}, {} flows", backend.state.name(), backend.flows),
                });
            }
        }
        for rule in &middlebox.rules {
            let (packets, bytes) = (rule.packets, rule.bytes);
            let name = format!("{mac} {}", rule.rule);
            out.push(Row { kind: "rule", name, packets, bytes, note: String::new() });
        }
    }
    for queue in &status.queues {
        let note = format!("{} dropped, {} overruns", queue.dropped, queue.overruns);
        let name = queue.queue.to_string();
        out.push(Row { kind: "queue", name, packets: queue.packets, bytes: 0, note });
    }
    out
}

/// Returns a text for a count a second or a number of bytes: 1234, 12.3k, 4.5M.
fn short(value: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut value = value;
    let mut unit = 0;
    while value >= 10_000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 { 0 } else { 1 };
    format!("{value:.digits$}{}", UNITS.get(unit).copied().unwrap_or_default())
}

/// Returns the rates from one status to the next as text.
fn text(before: &Status, now: &Status, elapsed: Duration, args: &TopArgs) -> String {
    let old: BTreeMap<(&str, String), (u64, u64)> = rows(before)
        .into_iter()
        .map(|row| ((row.kind, row.name), (row.packets, row.bytes)))
        .collect();
    let seconds = elapsed.as_secs_f64().max(0.001);
    let rate = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now) as f64 / seconds;
    let mut out = first_line(&now.problems());
    let all = rows(now);
    for kind in KINDS {
        let of_kind = all.iter().filter(|row| row.kind == kind && row.name.contains(&args.filter));
        let mut shown: Vec<(&Row, f64, f64)> = of_kind
            .map(|row| {
                // Answers that have come meanwhile count from their first value.
                let first = (row.packets, row.bytes);
                let (packets, bytes) =
                    old.get(&(row.kind, row.name.clone())).copied().unwrap_or(first);
                (row, rate(row.packets, packets), rate(row.bytes, bytes))
            })
            .collect();
        match args.sort {
            Sort::Rate => shown.sort_by(|a, b| b.1.total_cmp(&a.1)),
            Sort::Packets => shown.sort_by_key(|(row, ..)| std::cmp::Reverse(row.packets)),
            Sort::Name => shown.sort_by(|a, b| a.0.name.cmp(&b.0.name)),
        }
        let more = shown.len().saturating_sub(args.rows);
        // Writing to a String cannot fail.
        let _ = writeln!(out, "\n{kind:<48} {:>9} {:>9} {:>9}", "packets/s", "bytes/s", "packets");
        for (row, packets, bytes) in shown.into_iter().take(args.rows) {
            let (packets, bytes, total) = (short(packets), short(bytes), short(row.packets as f64));
            let _ =
                writeln!(out, "{:<48} {packets:>9} {bytes:>9} {total:>9}  {}", row.name, row.note);
        }
        if more > 0 {
            let _ = writeln!(out, "and {more} more");
        }
    }
    out
}

/// Shows rates until interrupted, or once.
pub(super) fn run(args: &TopArgs) -> Result<(), Failure> {
    const CLEAR: &str = "\x1b[H\x1b[2J";
    let look = || {
        status(&args.socket).map(|status| (status, Instant::now())).map_err(|error| {
            let path = args.socket.display();
            Failure::System(format!(
                "{path}: {error}; is nfqd running, and is this one of its sockets?"
            ))
        })
    };
    let (mut before, mut at) = look()?;
    loop {
        std::thread::sleep(Duration::from_secs(args.interval));
        let (now, time) = look()?;
        let text = text(&before, &now, time - at, args);
        let clear = if args.once { "" } else { CLEAR };
        let mut out = io::stdout().lock();
        match write!(out, "{clear}{text}").and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::System(format!("standard output: {error}"))),
            Ok(()) if args.once => return Ok(()),
            Ok(()) => {}
        }
        drop(out);
        (before, at) = (now, time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::QueueStatus;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: TopArgs,
    }

    fn status_of(packets: [u64; 3]) -> Status {
        let queue = |(number, packets): (usize, u64)| QueueStatus {
            queue: number as u16,
            packets,
            ..QueueStatus::default()
        };
        Status { queues: packets.into_iter().enumerate().map(queue).collect(), ..Status::default() }
    }

    #[test]
    fn the_busiest_come_first() {
        let args = |line: &str| Line::parse_from(line.split_whitespace()).args;
        let (before, now) = (status_of([5, 5, 500]), status_of([25, 105, 500]));
        let shown = |line: &str| -> Vec<String> {
            let text = text(&before, &now, Duration::from_secs(2), &args(line));
            let queues = text.split("\nqueue ").nth(1).unwrap().lines().skip(1);
            queues
                .map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
                .collect()
        };
        assert_eq!(shown("top"), ["1 50", "0 10", "2 0"]);
        assert_eq!(shown("top --sort packets"), ["2 0", "1 50", "0 10"]);
        assert_eq!(shown("top --sort name --rows 2"), ["0 10", "1 50", "and 1"]);
        assert_eq!(shown("top --filter 2"), ["2 0"]);
    }

    #[test]
    fn numbers_are_short() {
        let texts = [0.4, 9999.0, 12_345.0, 7_654_321.0, 1e15].map(short);
        assert_eq!(texts, ["0", "9999", "12.3k", "7654.3k", "1000.0T"]);
    }
}
