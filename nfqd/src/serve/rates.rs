//! Rates of counters, from one look at the status to the next.

use std::collections::HashMap;
use std::time::Instant;

/// A counter's value, the look at which it was read, and the rate since the look before.
#[derive(Clone, Copy)]
struct Point {
    value: u64,
    look: Instant,
    rate: f64,
}

/// The rates of counters, by name.
pub struct Rates {
    look: Instant,
    points: HashMap<String, Point>,
}

/// The most counters that are followed.
const MAX_COUNTERS: usize = 100_000;

impl Rates {
    /// Rates without any counter yet.
    pub fn new(look: Instant) -> Rates {
        Rates { look, points: HashMap::new() }
    }

    /// Sets the time at which the counters that follow were read. Several viewers are shown one look,
    /// and the same rates.
    pub fn look_at(&mut self, look: Instant) {
        self.look = look;
    }

    /// Returns the rate of a counter that has this value at this look, as text: `12/s`.
    pub fn of(&mut self, name: &str, value: u64) -> String {
        if self.points.len() >= MAX_COUNTERS {
            self.points.clear();
        }
        let look = self.look;
        let first = Point { value, look, rate: 0.0 };
        let point = self.points.entry(name.to_string()).or_insert(first);
        // A viewer may be slow, and show a look that is older than the last one.
        let elapsed = look.saturating_duration_since(point.look).as_secs_f64();
        if elapsed > 0.0 {
            // A counter that has begun again counts from zero.
            let more = value.checked_sub(point.value).unwrap_or(value);
            *point = Point { value, look, rate: more as f64 / elapsed };
        }
        format!("{:.0}/s", point.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_rate_is_the_difference_of_two_looks_whoever_asks() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut rates = Rates::new(at(0));
        assert_eq!(rates.of("a", 100), "0/s");
        rates.look_at(at(2000));
        assert_eq!(rates.of("a", 1100), "500/s");
        // The old behaviour: a second viewer of the same look was shown 0/s.
        assert_eq!(rates.of("a", 1100), "500/s");
        rates.look_at(at(1000));
        assert_eq!(rates.of("a", 600), "500/s", "an older look changes nothing");
        rates.look_at(at(3000));
        assert_eq!(rates.of("a", 5), "5/s", "the counter has begun again");
    }
}
