//! Consistent hashing: how evenly it shares, and how many new flows change their backend when one
//! goes, beside the least possible and beside hashing by the remainder.

use nfqd_rules::maglev::{PLACES, table};
use nfqd_shmctl::BackendName;
use std::net::IpAddr;
use std::time::Instant;

fn backends(count: usize, heavy: u16) -> Vec<(BackendName, u16)> {
    let name = |n: usize| BackendName { ip: IpAddr::from([10, 0, 1, n as u8]), port: Some(80) };
    (0..count).map(|n| (name(n), if n % 2 == 1 { heavy } else { 1 })).collect()
}

/// Runs it and prints what came out.
pub(crate) fn run() {
    println!(
        "{PLACES} places; share: the farthest from its weight's, of all backends and of each that may go"
    );
    for (count, heavy) in [(4, 1), (4, 3), (10, 1), (10, 3), (100, 1), (100, 3)] {
        let all = backends(count, heavy);
        let start = Instant::now();
        let before = table(0, &all);
        let took = start.elapsed();
        let sum: f64 = all.iter().map(|(_, weight)| f64::from(*weight)).sum();
        let off = (0..count).map(|n| {
            let share = before.iter().filter(|at| usize::from(**at) == n).count() as f64;
            let wanted = PLACES as f64 * f64::from(all[n].1) / sum;
            (share - wanted).abs() / wanted * 100.0
        });
        let off = off.fold(0.0, f64::max);
        // Each backend in its turn goes; the mean of what moves.
        let (mut moved, mut ideal, mut modulo) = (0.0, 0.0, 0.0);
        for gone in 0..count {
            let rest = [&all[..gone], &all[gone + 1..]].concat();
            let after = table(0, &rest);
            let differs = before.iter().zip(&after).filter(|(before, after)| {
                all[usize::from(**before)].0 != rest[usize::from(**after)].0
            });
            moved += differs.count() as f64 / PLACES as f64;
            ideal += f64::from(all[gone].1) / sum;
            let other =
                (0..PLACES).filter(|place| all[place % count].0 != rest[place % (count - 1)].0);
            modulo += other.count() as f64 / PLACES as f64;
        }
        let percent = |sum: f64| sum / count as f64 * 100.0;
        println!(
            "{count:>4} backends, every other of weight {heavy}: share off by {off:.2} %; one goes: {:5.2} % move, at least \
             {:5.2} %, by remainder {:5.2} %; the table takes {:.1} ms",
            percent(moved),
            percent(ideal),
            percent(modulo),
            took.as_secs_f64() * 1e3
        );
    }
    println!(
        "established flows move in none of these: they are in the flow table (tests/tests/pools.rs)"
    );
}
