//! Counter rates between successive samples of the status.

use std::collections::HashMap;
use std::time::Instant;

/// A counter's value, the time of its sample, and the rate since the sample before.
#[derive(Clone, Copy)]
struct Point {
    value: u64,
    sample: Instant,
    rate: f64,
}

/// The rates of counters, by name.
pub struct Rates {
    sample: Instant,
    points: HashMap<String, Point>,
}

/// The most counters that are followed.
const MAX_COUNTERS: usize = 100_000;

impl Rates {
    /// Rates without any counter yet.
    pub fn new(sample: Instant) -> Rates {
        Rates { sample, points: HashMap::new() }
    }

    /// Sets the sample time of the counters passed to [`Rates::of`] next. All viewers of one sample get
    /// the same rates.
    pub fn set_sample(&mut self, sample: Instant) {
        self.sample = sample;
    }

    /// Returns the rate of a counter that has this value in the sample, as text: `12/s`.
    pub fn of(&mut self, name: &str, value: u64) -> String {
        if self.points.len() >= MAX_COUNTERS {
            self.points.clear();
        }
        let sample = self.sample;
        let first = Point { value, sample, rate: 0.0 };
        let point = self.points.entry(name.to_string()).or_insert(first);
        // A slow viewer may render a sample older than the latest one.
        let elapsed = sample.saturating_duration_since(point.sample).as_secs_f64();
        if elapsed > 0.0 {
            // A counter that has begun again counts from zero.
            let more = value.checked_sub(point.value).unwrap_or(value);
            *point = Point { value, sample, rate: more as f64 / elapsed };
        }
        format!("{:.0}/s", point.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_rate_is_the_difference_of_two_samples_whoever_asks() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut rates = Rates::new(at(0));
        assert_eq!(rates.of("a", 100), "0/s");
        rates.set_sample(at(2000));
        assert_eq!(rates.of("a", 1100), "500/s");
        // The old behaviour: a second viewer of the same sample was shown 0/s.
        assert_eq!(rates.of("a", 1100), "500/s");
        rates.set_sample(at(1000));
        assert_eq!(rates.of("a", 600), "500/s", "an older sample changes nothing");
        rates.set_sample(at(3000));
        assert_eq!(rates.of("a", 5), "5/s", "the counter has begun again");
    }
}
