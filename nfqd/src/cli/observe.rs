//! `nfqd observe`: the engine's decisions as they happen.

use super::Failure;
use crate::api::client::ask;
use crate::api::{Answer, Observed, ObservedDecision, Request};
use clap::Args;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The arguments of `nfqd observe`.
#[derive(Args, Debug)]
pub(super) struct ObserveArgs {
    /// Show decisions as they happen, until interrupted
    #[arg(short = 'f', long)]
    follow: bool,
    /// The number of past decisions to show first. They are recorded while somebody observes, and for a
    /// minute after
    #[arg(long, value_name = "N", default_value_t = 20)]
    last: usize,
    /// Packets from or to a MAC
    #[arg(long, value_name = "MAC")]
    mac: Option<nfqd_shmctl::MacAddr>,
    /// Packets from or to an address
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<IpAddr>,
    /// Packets from or to a port
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Decisions with a verdict
    #[arg(long, value_name = "accept|drop|redirect")]
    verdict: Option<String>,
    /// Decisions with a reason, as `nfqd trace --json` names it
    #[arg(long, value_name = "REASON")]
    reason: Option<String>,
    /// Decisions by a rule, like '#1' or '+1'
    #[arg(long, value_name = "RULE")]
    rule: Option<String>,
    /// Decisions that do not meet the conditions
    #[arg(long)]
    not: bool,
    /// Print JSON, an object a line
    #[arg(long)]
    json: bool,
    /// A socket of the daemon
    #[arg(long, visible_alias = "control", value_name = "PATH", default_value = crate::config::DEFAULT_OBSERVE)]
    socket: PathBuf,
}

/// The pause between two requests.
const INTERVAL: Duration = Duration::from_millis(200);
/// The most decisions of an answer.
const MOST: usize = 500;

impl ObserveArgs {
    fn wants(&self, one: &ObservedDecision) -> bool {
        let is_same = |wanted: &Option<String>, found: &str| {
            wanted.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(found))
        };
        let meets = self.mac.is_none_or(|mac| one.macs.contains(&mac.to_string()))
            && self.ip.is_none_or(|ip| one.addresses.contains(&ip.to_string()))
            && self.port.is_none_or(|port| one.ports.contains(&port))
            && is_same(&self.verdict, &one.verdict)
            && is_same(&self.reason, &one.reason)
            && is_same(&self.rule, one.rule.as_deref().unwrap_or_default());
        meets != self.not
    }
}

/// Shows decisions until all are shown, or the output has no reader any more.
pub(super) fn run(args: &ObserveArgs) -> Result<(), Failure> {
    if args.follow {
        eprintln!(
            "what the kernel decides alone is counted, not seen here: nfqd status, nfqd trace"
        );
    }
    let mut since = None;
    loop {
        let most = if since.is_none() { args.last.min(MOST) } else { MOST };
        let observed = request(args, since, most)?;
        let mut out = io::stdout().lock();
        for one in observed.decisions.iter().filter(|one| args.wants(one)) {
            let line =
                if args.json { serde_json::to_string(one).unwrap_or_default() } else { text(one) };
            match writeln!(out, "{line}").and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(Failure::System(format!("standard output: {error}"))),
                Ok(()) => {}
            }
        }
        drop(out);
        since = Some(observed.next);
        if !args.follow {
            return Ok(());
        }
        if observed.decisions.len() < MOST {
            std::thread::sleep(INTERVAL);
        }
    }
}

fn request(args: &ObserveArgs, since: Option<u64>, most: usize) -> Result<Observed, Failure> {
    let answer = ask(&args.socket, &Request::Observe { since, most }).map_err(|error| {
        let path = args.socket.display();
        Failure::System(format!(
            "{path}: {error}; is nfqd running, and is this one of its sockets?"
        ))
    })?;
    match answer {
        Answer::Observed(observed) => Ok(*observed),
        Answer::Error(error) => Err(Failure::System(error.to_string())),
        _ => Err(Failure::System("an answer to another request".to_string())),
    }
}

/// Returns a decision as a line: time (UTC), verdict, packet, reason, rule, backend.
fn text(one: &ObservedDecision) -> String {
    format!("{} {:<8} {} {}", one.time_of_day(), one.verdict, one.packet, one.explanation())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ObserveArgs,
    }

    #[test]
    fn decisions_are_filtered_by_their_fields() {
        let one = ObservedDecision {
            time_ms: 3_723_004,
            macs: ["02:00:00:00:00:01".to_string(), "02:00:00:00:00:02".to_string()],
            addresses: vec!["10.0.0.1".to_string(), "10.0.0.2".to_string()],
            ports: vec![1000, 80],
            packet: "tcp 10.0.0.1:1000 > 10.0.0.2:80".to_string(),
            verdict: "drop".to_string(),
            reason: "deny-rule".to_string(),
            rule: Some("#1".to_string()),
            ..ObservedDecision::default()
        };
        for (arguments, wanted) in [
            ("", true),
            ("--mac 2:0:0:0:0:2", true),
            ("--mac 2:0:0:0:0:3", false),
            ("--ip 10.0.0.1 --port 80", true),
            ("--port 81", false),
            ("--verdict DROP --reason deny-rule --rule #1", true),
            ("--verdict accept", false),
            ("--not --verdict accept", true),
            ("--not --port 80", false),
        ] {
            let words = std::iter::once("observe").chain(arguments.split_whitespace());
            assert_eq!(Line::parse_from(words).args.wants(&one), wanted, "{arguments}");
        }
        assert_eq!(
            text(&one),
            "01:02:03.004 drop     tcp 10.0.0.1:1000 > 10.0.0.2:80 deny-rule #1"
        );
    }
}
