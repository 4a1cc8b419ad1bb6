//! `nfqd top`: the rates of middleboxes, services, backends, rules and queues, the busiest first.
//!
//! On a terminal it is a [`screen`] that takes keys; elsewhere, and with `--once`, it prints text.

mod rows;
mod screen;

use super::Failure;
use crate::api::client::status;
use crate::api::{Status, first_line};
use clap::Args;
use ratatui::crossterm::event::{self, Event};
use rows::{Kind, Rates, Row, Sort, short, sort};
use screen::{Screen, Wish};
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
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
    /// Show only rows of one kind
    #[arg(long, value_enum)]
    kind: Option<Kind>,
    /// The most rows of each kind that are printed
    #[arg(long, value_name = "N", default_value_t = 10)]
    rows: usize,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// A socket of the daemon
    #[arg(long, visible_alias = "control", value_name = "PATH", default_value = crate::config::DEFAULT_OBSERVE)]
    socket: PathBuf,
}

/// Returns the rows of a status with their rates as text.
fn text(status: &Status, rows: &[Row], args: &TopArgs) -> String {
    let mut out = first_line(&status.problems());
    for kind in Kind::ALL.into_iter().filter(|kind| args.kind.is_none_or(|its| its == *kind)) {
        let of_kind = rows.iter().filter(|row| row.kind == kind && row.name.contains(&args.filter));
        let mut shown: Vec<Row> = of_kind.cloned().collect();
        sort(&mut shown, args.sort);
        let more = shown.len().saturating_sub(args.rows);
        shown.truncate(args.rows);
        let width = shown.iter().map(|row| row.name.len()).max().unwrap_or(0).max(40);
        let kind = kind.name();
        // Writing to a String cannot fail.
        let _ =
            writeln!(out, "\n{kind:<width$} {:>9} {:>9} {:>9}", "packets/s", "bytes/s", "packets");
        for row in shown {
            let counts = [row.packet_rate, row.byte_rate, row.packets as f64].map(short);
            let [packets, bytes, total] = counts;
            let (name, note) = (row.name, row.note);
            let _ = writeln!(out, "{name:<width$} {packets:>9} {bytes:>9} {total:>9}  {note}");
        }
        if more > 0 {
            let _ = writeln!(out, "and {more} more");
        }
    }
    out
}

/// Shows rates until interrupted, or once.
pub(super) fn run(args: &TopArgs) -> Result<(), Failure> {
    let look = || {
        status(&args.socket).map(|status| (status, Instant::now())).map_err(|error| {
            let path = args.socket.display();
            format!("{path}: {error}; is nfqd running, and is this one of its sockets?")
        })
    };
    // Without a daemon there is nothing to show.
    let (first, at) = look().map_err(Failure::System)?;
    if !args.once && io::stdout().is_terminal() && io::stdin().is_terminal() {
        let terminal = |error: io::Error| Failure::System(format!("the terminal: {error}"));
        let shown = ratatui::try_init().and_then(|screen| show(screen, args, look, (first, at)));
        ratatui::restore();
        return shown.map_err(terminal);
    }
    let mut rates = Rates::default();
    rates.update(&first, Duration::ZERO);
    let mut before = at;
    loop {
        std::thread::sleep(Duration::from_secs(args.interval));
        let (now, time) = look().map_err(Failure::System)?;
        let text = text(&now, &rates.update(&now, time - before), args);
        before = time;
        let mut out = io::stdout().lock();
        match write!(out, "{text}").and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::System(format!("standard output: {error}"))),
            Ok(()) if args.once => return Ok(()),
            Ok(()) => {}
        }
    }
}

/// Shows the screen until the user quits. A daemon that does not answer is waited for.
fn show(
    mut terminal: ratatui::DefaultTerminal,
    args: &TopArgs,
    look: impl Fn() -> Result<(Status, Instant), String>,
    (first, mut before): (Status, Instant),
) -> io::Result<()> {
    let interval = Duration::from_secs(args.interval);
    let mut screen = Screen::new(args.sort, &args.filter, args.kind);
    screen.update(&first, Duration::ZERO);
    let mut due = Instant::now() + interval;
    loop {
        terminal.draw(|frame| screen.draw(frame))?;
        if event::poll(due.saturating_duration_since(Instant::now()))? {
            match event::read()? {
                Event::Key(key) if key.is_press() && screen.press(key) == Wish::Quit => {
                    return Ok(());
                }
                // A key that is held does not keep the rates from changing.
                _ if Instant::now() < due => continue,
                _ => {}
            }
        }
        match look() {
            Ok((now, time)) => {
                screen.update(&now, time - before);
                before = time;
            }
            Err(reason) => screen.fail(&reason),
        }
        due = Instant::now() + interval;
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
            let mut rates = Rates::default();
            rates.update(&before, Duration::ZERO);
            let rows = rates.update(&now, Duration::from_secs(2));
            let text = text(&now, &rows, &args(line));
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
}
