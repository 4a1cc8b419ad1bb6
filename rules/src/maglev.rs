//! Maglev: consistent hashing by a table, so that backends get even shares and few flows move when
//! one leaves.
//!
//! After Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4. Each backend has a permutation of the table's entries; in turns, as often as its
//! weight allows, each takes the next free entry of its permutation. The table depends only on the
//! backends' names and weights and the seed.
//!
//! All hashes are SipHash-1-3 with the seed as the first key and the purpose as the second:
//!
//! | purpose | of |
//! |---|---|
//! | 0 | a flow: client address (16 bytes, IPv4 mapped), and without affinity its port, the address and the port it uses (16, 2, 2 bytes) and the protocol (1); numbers in network order |
//! | 1, 2 | a backend: address (16 bytes), port (2 bytes, 0 for none); where its permutation begins, and its step |

use crate::packet::{IpHeader, Ports};
use nfqd_shmctl::BackendName;
use siphasher::sip::SipHasher13;
use std::net::IpAddr;

/// Entries of a table: a prime, so that every step but 0 makes a permutation; large compared with
/// the number of backends, so that shares are even.
pub const PLACES: usize = 65537;

/// The longest input of a hash, in bytes.
const LONGEST: usize = 37;

fn bytes(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn hash(seed: u32, purpose: u64, bytes: &[u8]) -> u64 {
    SipHasher13::new_with_keys(u64::from(seed), purpose).hash(bytes)
}

/// Returns the hash of a flow towards a service; with `affinity`, of its client's address alone.
pub fn flow(seed: u32, affinity: bool, ip: &IpHeader) -> u64 {
    let mut text = [0; LONGEST];
    let (client, rest) = text.split_at_mut(16);
    client.copy_from_slice(&bytes(ip.source));
    if affinity {
        return hash(seed, 0, client);
    }
    let Ports { source, destination } = ip.ports.unwrap_or(Ports { source: 0, destination: 0 });
    rest[..2].copy_from_slice(&source.to_be_bytes());
    rest[2..18].copy_from_slice(&bytes(ip.destination));
    rest[18..20].copy_from_slice(&destination.to_be_bytes());
    rest[20] = ip.protocol.0;
    hash(seed, 0, &text)
}

/// Returns the table for backends with these names and weights, at most 255: the backend of each
/// entry. Empty without backends.
pub fn table(seed: u32, backends: &[(BackendName, u16)]) -> Vec<u8> {
    const NOBODY: u8 = u8::MAX;
    let heaviest = backends.iter().map(|(_, weight)| u64::from(*weight)).max().unwrap_or(0);
    if heaviest == 0 {
        return Vec::new();
    }
    struct Turns {
        next: usize,
        step: usize,
        weight: u64,
        credit: u64,
    }
    let mut turns: Vec<Turns> = backends
        .iter()
        .map(|(name, weight)| {
            let mut text = [0; 18];
            text[..16].copy_from_slice(&bytes(name.ip));
            text[16..].copy_from_slice(&name.port.unwrap_or(0).to_be_bytes());
            let at = |purpose: u64, of: usize| (hash(seed, purpose, &text) % of as u64) as usize;
            Turns {
                next: at(1, PLACES),
                step: at(2, PLACES - 1) + 1,
                weight: u64::from(*weight),
                credit: 0,
            }
        })
        .collect();
    let mut out = vec![NOBODY; PLACES];
    let mut taken = 0;
    while taken < PLACES {
        for (backend, turn) in turns.iter_mut().enumerate() {
            turn.credit += turn.weight;
            if turn.credit < heaviest {
                continue;
            }
            turn.credit -= heaviest;
            while out[turn.next] != NOBODY {
                turn.next = (turn.next + turn.step) % PLACES;
            }
            out[turn.next] = backend as u8;
            taken += 1;
            if taken == PLACES {
                break;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backends(count: u8, weight: impl Fn(u8) -> u16) -> Vec<(BackendName, u16)> {
        let name = |n: u8| BackendName { ip: IpAddr::from([10, 0, 0, n]), port: Some(80) };
        (1..=count).map(|n| (name(n), weight(n))).collect()
    }

    #[test]
    fn shares_are_within_one_percent_of_the_weights() {
        for (count, weights) in
            [(1, [1, 1]), (4, [1, 1]), (10, [1, 3]), (100, [1, 1]), (100, [7, 10]), (255, [1, 2])]
        {
            let all = backends(count, |n| weights[usize::from(n % 2)]);
            let table = table(7, &all);
            let sum: f64 = all.iter().map(|(_, weight)| f64::from(*weight)).sum();
            for (backend, (_, weight)) in all.iter().enumerate() {
                let share = table.iter().filter(|at| usize::from(**at) == backend).count() as f64;
                let wanted = PLACES as f64 * f64::from(*weight) / sum;
                assert!(
                    (share - wanted).abs() <= wanted * 0.01 + 1.0,
                    "{count}: {share} of {wanted}"
                );
            }
        }
        assert!(table(7, &[]).is_empty());
    }

    #[test]
    fn few_entries_move_when_a_backend_leaves() {
        for count in [4, 10, 100] {
            let all = backends(count, |_| 1);
            let gone = usize::from(count / 2);
            let rest = [&all[..gone], &all[gone + 1..]].concat();
            let (before, after) = (table(1, &all), table(1, &rest));
            let moved = before
                .iter()
                .zip(&after)
                .filter(|(before, after)| all[usize::from(**before)] != rest[usize::from(**after)]);
            let moved = moved.count() as f64 / PLACES as f64;
            let ideal = 1.0 / f64::from(count);
            assert!(moved >= ideal * 0.98 && moved < ideal + 0.02, "{count}: {moved}");
        }
    }

    /// Other hosts and later versions must make the same table.
    #[test]
    fn the_table_is_the_same_everywhere() {
        let table = table(42, &backends(5, u16::from));
        let sum =
            table.iter().fold(0_u64, |sum, at| sum.wrapping_mul(31).wrapping_add(u64::from(*at)));
        assert_eq!((sum, &table[..8]), (10_171_114_403_380_122_792, &[4, 3, 3, 3, 1, 4, 4, 2][..]));
    }
}
