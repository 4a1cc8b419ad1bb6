//! A limit on how often something is done in a second.

/// A limiter that allows a number of events in each second of the engine's clock.
#[derive(Clone, Debug)]
pub(crate) struct RateLimiter {
    per_second: u32,
    second: u32,
    used: u32,
}

impl RateLimiter {
    /// A limiter that allows this many events a second.
    pub(crate) fn new(per_second: u32) -> RateLimiter {
        RateLimiter { per_second, second: 0, used: 0 }
    }

    /// Whether another event is allowed in the second `now`, which is not used up by asking.
    pub(crate) fn has_room(&mut self, now: u32) -> bool {
        if self.second != now {
            (self.second, self.used) = (now, 0);
        }
        self.used < self.per_second
    }

    /// Counts an event in the current second.
    pub(crate) fn count(&mut self) {
        self.used += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_second_has_its_own_events() {
        let mut limiter = RateLimiter::new(2);
        let mut allowed = 0;
        for now in [5, 5, 5, 5, 6] {
            if limiter.has_room(now) {
                limiter.count();
                allowed += 1;
            }
        }
        assert_eq!(allowed, 3);
    }
}
