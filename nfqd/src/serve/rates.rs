//! Rates of counters, from one look at the status to the next.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Instant;

/// A counter's value, when it was seen, and the rate from the value before.
#[derive(Clone, Copy)]
struct Point {
    value: u64,
    seen: Instant,
    rate: f64,
}

/// The rates of counters, by name.
#[derive(Default)]
pub struct Rates {
    points: RefCell<HashMap<String, Point>>,
}

/// The most counters that are followed.
const MAX_COUNTERS: usize = 100_000;
/// Counters that were read within this time are of one look.
const ONE_LOOK: f64 = 0.5;

impl Rates {
    /// Returns the rate of a counter that has this value now, as text: `12/s`.
    pub fn of(&self, name: &str, value: u64) -> String {
        let mut points = self.points.borrow_mut();
        if points.len() >= MAX_COUNTERS {
            points.clear();
        }
        let now = Instant::now();
        let point = points.entry(name.to_string()).or_insert(Point { value, seen: now, rate: 0.0 });
        let elapsed = now.duration_since(point.seen).as_secs_f64();
        if elapsed > ONE_LOOK {
            // A counter that has begun again counts from zero.
            let more = value.checked_sub(point.value).unwrap_or(value);
            *point = Point { value, seen: now, rate: more as f64 / elapsed };
        }
        format!("{:.0}/s", point.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_the_difference_of_two_looks() {
        let rates = Rates::default();
        assert_eq!(
            (rates.of("a", 100), rates.of("a", 200)),
            ("0/s".to_string(), "0/s".to_string())
        );
        std::thread::sleep(std::time::Duration::from_millis(1000));
        let rate: f64 = rates.of("a", 1100).trim_end_matches("/s").parse().unwrap();
        assert!((600.0..=1000.0).contains(&rate), "{rate}");
        std::thread::sleep(std::time::Duration::from_millis(600));
        assert_ne!(rates.of("a", 5), "0/s", "it has begun again");
    }
}
