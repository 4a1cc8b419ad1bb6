//! When a channel is polled: its budget of commands, and how often its memory is looked at.

use nfqd_shmctl::mailbox::MAX_MESSAGES;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Commands a second that a channel may send in the long run. Further ones wait: each costs the host a
/// transaction and a write to disk, for which other guests wait.
const RATE: u32 = 100;
/// The commands that a channel may send at once, in seconds of its rate.
const BURST_SECONDS: f64 = 5.0;
/// The most CPU time that is charged at once: three seconds of waiting at the default rate.
const MAX_CHARGE: Duration = Duration::from_millis(300);
/// The share of a core that a channel gets at [`RATE`] or less.
const CPU_SHARE: f64 = 0.1;
/// A command may take this CPU time, in seconds, however high the rate is; one that takes more counts as
/// several.
const MIN_COMMAND_TIME: f64 = 0.001;

/// The commands that a channel may still send, which are refilled over time.
pub(super) struct Budget {
    commands: f64,
    counted: Instant,
    rate: f64,
}

impl Budget {
    /// A full budget, of `rate` commands a second or the default.
    pub(super) fn new(rate: Option<u32>, now: Instant) -> Budget {
        let rate = f64::from(rate.unwrap_or(RATE));
        Budget { commands: burst(rate), counted: now, rate }
    }

    /// Refills it by the time that has passed.
    pub(super) fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.counted).as_secs_f64();
        self.commands = (self.commands + elapsed * self.rate).min(burst(self.rate));
        self.counted = now;
    }

    /// Returns the time of the last refill.
    pub(super) fn counted(&self) -> Instant {
        self.counted
    }

    /// Takes commands out of it.
    pub(super) fn spend(&mut self, commands: usize) {
        self.commands -= commands as f64;
    }

    /// Charges the CPU time that the host has spent on commands beyond their share, up to
    /// [`MAX_CHARGE`]: where the host itself is slow, a guest does not wait for longer than its client does.
    pub(super) fn charge(&mut self, commands: usize, spent: Duration) {
        let spent = spent.min(MAX_CHARGE);
        let command_time = (CPU_SHARE / self.rate).max(MIN_COMMAND_TIME);
        let excess = (spent.as_secs_f64() - command_time * commands as f64).max(0.0);
        self.commands -= excess / command_time;
    }

    /// Returns how long the channel has to wait. All messages of one write are answered by one
    /// reply, so it needs the budget for as many.
    pub(super) fn wait(&self) -> Duration {
        let missing = (MAX_MESSAGES as f64 - self.commands).max(0.0);
        Duration::from_secs_f64(missing / self.rate)
    }
}

fn burst(rate: f64) -> f64 {
    (rate * BURST_SECONDS).max(2.0 * MAX_MESSAGES as f64)
}

/// The poll schedule of a channel's memory: frequent while messages arrive, rare otherwise.
///
/// The interval is a share of the time since the guest's last message. So a message waits at most
/// for that share of the pause before it, and a host with idle guests stays idle. The times of all
/// mailboxes are on one grid, so that one wakeup polls all that are due.
pub(super) struct PollSchedule {
    next: Instant,
    /// The time of the guest's last message; `None` before the first one.
    last_message: Option<Instant>,
    /// Whether the guest rang for its last message, and need not be polled while it may ring.
    rings: bool,
}

/// A poll that is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Poll {
    /// When it was.
    pub now: Instant,
    /// Whether it brought a message.
    pub had_message: bool,
    /// Whether the guest had rung.
    pub was_rung: bool,
    /// Whether its next ring is waited for.
    pub waits_for_ring: bool,
    /// The next poll is not before.
    pub earliest: Instant,
}

/// The interval is the time since the last message divided by this, rounded down to the shortest
/// interval times a power of two.
const PAUSE_SHARE: u32 = 128;
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(1);
pub(super) const MAX_POLL_INTERVAL: Duration = Duration::from_millis(16);
/// The interval of a memory whose guest can ring, in case it does not.
const UNRUNG_POLL_INTERVAL: Duration = Duration::from_millis(256);

/// The origin of the grid of all schedules.
pub(super) static GRID: LazyLock<Instant> = LazyLock::new(Instant::now);

impl PollSchedule {
    /// A schedule whose first poll is due.
    pub(super) fn new(now: Instant) -> PollSchedule {
        LazyLock::force(&GRID);
        PollSchedule { next: now, last_message: None, rings: false }
    }

    /// Returns when the next poll is due.
    pub(super) fn next(&self) -> Instant {
        self.next
    }

    /// Makes a poll due.
    pub(super) fn hasten(&mut self, now: Instant) {
        self.next = self.next.min(now);
    }

    /// Notes a poll.
    pub(super) fn polled(&mut self, poll: Poll) {
        let Poll { now, had_message, was_rung, waits_for_ring, earliest } = poll;
        if had_message {
            (self.last_message, self.rings) = (Some(now), was_rung);
        }
        let longest = if waits_for_ring { UNRUNG_POLL_INTERVAL } else { MAX_POLL_INTERVAL };
        let interval = match self.last_message {
            // More may have come behind it.
            _ if had_message => MIN_POLL_INTERVAL,
            Some(last) if !(self.rings && waits_for_ring) => {
                poll_interval(now.saturating_duration_since(last), longest)
            }
            _ => longest,
        };
        self.next = next_on_grid(now.max(earliest), interval);
    }
}

fn poll_interval(pause: Duration, longest: Duration) -> Duration {
    let mut interval = longest;
    while interval > MIN_POLL_INTERVAL && interval > pause / PAUSE_SHARE {
        interval /= 2;
    }
    interval
}

/// Returns the first multiple of the interval since the origin of the grid that is after `time`.
fn next_on_grid(time: Instant, interval: Duration) -> Instant {
    let since = time.saturating_duration_since(*GRID);
    let rest = Duration::from_nanos((since.as_nanos() % interval.as_nanos()) as u64);
    time + (interval - rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll(now: Instant, had_message: bool) -> Poll {
        Poll { now, had_message, was_rung: false, waits_for_ring: false, earliest: now }
    }

    #[test]
    fn a_command_that_takes_long_counts_as_several() {
        let mut budget = Budget::new(None, Instant::now());
        let before = budget.commands;
        budget.charge(10, Duration::from_millis(7));
        assert!((before - budget.commands).abs() < 1e-9, "ten in less than their share");
        budget.charge(1, Duration::from_millis(26));
        assert!((before - budget.commands - 25.0).abs() < 1e-6);
        let before = budget.commands;
        budget.charge(1, Duration::from_secs(5));
        assert!((before - budget.commands - 299.0).abs() < 1e-6, "a host that is slow itself");
        // A low rate is no smaller share of a core.
        let mut seldom = Budget::new(Some(1), Instant::now());
        let before = seldom.commands;
        seldom.charge(1, Duration::from_millis(100));
        assert!((before - seldom.commands).abs() < 1e-9);
    }

    #[test]
    fn a_rate_of_its_own_is_what_a_channel_gets_in_the_long_run() {
        let start = Instant::now();
        let mut budget = Budget::new(Some(10), start);
        let mut taken = 0;
        for tick in 0..1000 {
            budget.refill(start + Duration::from_millis(100 * tick));
            while budget.wait() == Duration::ZERO {
                budget.spend(1);
                taken += 1;
            }
        }
        // A hundred seconds, and what may be sent at once.
        assert!((1000..=1050).contains(&taken), "{taken}");
    }

    #[test]
    fn a_mailbox_is_polled_often_while_the_guest_talks_and_seldom_when_it_is_silent() {
        let ms = Duration::from_millis;
        let mut schedule = PollSchedule::new(Instant::now());
        let start = schedule.next;
        let mut interval_after = |pause: Duration, had_message: bool| {
            let now = start + pause;
            schedule.polled(poll(now, had_message));
            schedule.next - now
        };
        assert!(interval_after(ms(1), true) <= MIN_POLL_INTERVAL);
        assert!(interval_after(ms(513), false) <= ms(4), "at most a 128th of the pause");
        assert!(interval_after(ms(60_000), false) <= MAX_POLL_INTERVAL);
        assert!(interval_after(ms(60_001), true) <= MIN_POLL_INTERVAL, "it talks again");
        assert_eq!(poll_interval(ms(512), MAX_POLL_INTERVAL), ms(4));
        assert_eq!(poll_interval(ms(60_000), MAX_POLL_INTERVAL), MAX_POLL_INTERVAL);
    }

    #[test]
    fn a_guest_that_rings_is_polled_seldom_and_one_that_does_not_is_still_found() {
        let ms = Duration::from_millis;
        let mut schedule = PollSchedule::new(Instant::now());
        let start = schedule.next;
        let rung = |now, had_message| Poll {
            was_rung: had_message,
            waits_for_ring: true,
            ..poll(now, had_message)
        };
        schedule.polled(rung(start, true));
        assert!(schedule.next - start <= MIN_POLL_INTERVAL, "more may have come behind it");
        let later = start + ms(2);
        schedule.polled(rung(later, false));
        assert!(schedule.next - later > MAX_POLL_INTERVAL);
        // A message without a ring: polled as any other.
        let found = start + ms(1000);
        schedule.polled(Poll { was_rung: false, ..rung(found, true) });
        schedule.polled(rung(found + ms(2), false));
        assert!(schedule.next - found <= ms(4));
        // A ring that brought nothing is not waited for again at once.
        schedule.polled(rung(found + ms(4), true));
        let empty = found + ms(6);
        schedule.polled(Poll { was_rung: true, waits_for_ring: false, ..poll(empty, false) });
        let pause = schedule.next - empty;
        assert!(pause > Duration::ZERO && pause <= MAX_POLL_INTERVAL, "{pause:?}");
    }

    #[test]
    fn silent_mailboxes_are_polled_by_one_wakeup() {
        let ms = Duration::from_millis;
        let (mut one, mut other) =
            (PollSchedule::new(Instant::now()), PollSchedule::new(Instant::now()));
        let later = one.next + ms(60_000);
        one.polled(poll(later, false));
        other.polled(Poll { earliest: later, ..poll(later + Duration::from_micros(1), false) });
        let apart = other.next - one.next;
        assert!(apart == Duration::ZERO || apart == MAX_POLL_INTERVAL, "{apart:?}");
        one.polled(Poll { earliest: later + ms(100), ..poll(later, false) });
        assert!(one.next > later + ms(100), "a channel without a budget is not polled");
    }
}
