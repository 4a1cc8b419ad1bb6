//! Benchmarks, each beside a peer in the same run: medians, quartiles, ratios.
//!
//! Run as root: `cargo build --release && target/release/bench [NAME...]`; all without a name. The
//! benchmark `peers` is behind the feature `peers`: `cargo build --release -p nfqd-tests --features
//! peers` needs libclang.

mod balance;
mod classifier;
mod control;
mod flows;
mod maglev;
mod neighbours;
mod observers;
mod path;
#[cfg(feature = "peers")]
mod peers;
mod scale;
mod throughput;

use nfqd_tests::counting::Counting;
use std::process::ExitCode;

#[global_allocator]
static COUNTING: Counting = Counting;

/// Prints the median of some measurements and the distance of their quartiles; returns the median.
fn print(name: &str, values: &[f64], unit: &str) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    println!(
        "{name:<44} median {:10.2} {unit:<8} quartiles {:.2} apart",
        at(0.5),
        at(0.75) - at(0.25)
    );
    at(0.5)
}

/// Every benchmark, by name.
const ALL: &[(&str, fn())] = &[
    ("throughput", throughput::run),
    ("path", path::run),
    ("neighbours", neighbours::run),
    ("balance", balance::run),
    ("maglev", maglev::run),
    ("flows", flows::run),
    ("scale", scale::run),
    ("classifier", classifier::run),
    ("idle", control::idle),
    ("latency", control::latency),
    ("enforcement", control::enforcement),
    ("observers", observers::run),
    #[cfg(feature = "peers")]
    ("peers", peers::run),
];

fn main() -> ExitCode {
    let named: Vec<String> = std::env::args().skip(1).collect();
    if let Some(wrong) = named.iter().find(|name| ALL.iter().all(|(known, _)| known != name)) {
        let names: Vec<&str> = ALL.iter().map(|(name, _)| *name).collect();
        eprintln!("bench: '{wrong}' is not a benchmark; write one of {}", names.join(", "));
        return ExitCode::from(2);
    }
    let is_wanted = |name: &str| named.is_empty() || named.iter().any(|wanted| wanted == name);
    for (name, run) in ALL.iter().filter(|(name, _)| is_wanted(name)) {
        println!("== {name}");
        run();
    }
    ExitCode::SUCCESS
}
