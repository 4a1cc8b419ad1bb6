//! Benchmarks, each beside a peer in the same run: medians, quartiles, ratios.
//!
//! Run as root: `cargo build --release && target/release/bench [throughput] [balance] [maglev]
//! [flows] [scale] [classifier]`; all without a name.

mod balance;
mod classifier;
mod flows;
mod maglev;
mod scale;
mod throughput;

use nfqd_tests::counting::Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

/// Prints the middle of some measurements and how far the quartiles are apart; the middle comes
/// back.
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

fn main() {
    let all: [(&str, fn()); 6] = [
        ("throughput", throughput::run),
        ("balance", balance::run),
        ("maglev", maglev::run),
        ("flows", flows::run),
        ("scale", scale::run),
        ("classifier", classifier::run),
    ];
    let named: Vec<String> = std::env::args().skip(1).collect();
    if let Some(wrong) = named.iter().find(|name| all.iter().all(|(known, _)| known != name)) {
        eprintln!(
            "bench: '{wrong}': no such benchmark; there are throughput, balance, maglev, flows, scale and classifier"
        );
        std::process::exit(2);
    }
    for (name, run) in
        all.iter().filter(|(name, _)| named.is_empty() || named.iter().any(|wanted| wanted == name))
    {
        println!("== {name}");
        run();
    }
}
