//! A guest's channel: a command arrives here. Its region with the mailbox and the rings, its binding,
//! its budget, and when to poll it.

use crate::config::ShmSpec;
use crate::rate_limiter::RateLimiter;
use nfqd_shmctl::mailbox::host::HostMailbox;
use nfqd_shmctl::mailbox::{MAX_MESSAGES, MailboxMessage, MessageError};
use nfqd_shmctl::ring::host::{HostRing, RingRequest};
use nfqd_shmctl::ring::{CounterPage, RequestError};
use nfqd_shmctl::{
    CommandError, ErrorCode, MacAddr, ParsedCommand, Place, RegionError, RegionFile, Reply,
};
use nix::unistd::geteuid;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// A guest's channel.
pub struct Channel {
    spec: ShmSpec,
    /// The users whose file is accepted when the region is opened again, because anybody can create
    /// a file of that name in a world-writable directory.
    owners: Vec<u32>,
    /// The region, or why it is not read.
    region: Result<RegionFile, RegionError>,
    mailbox: HostMailbox,
    /// The rings, if the region has room for them.
    ring: Option<HostRing>,
    budget: Budget,
    schedule: PollSchedule,
    log_limiter: RateLimiter,
    /// Accepted commands since the last one that was logged.
    unlogged: u32,
    /// Commands that the binding does not allow.
    denied: u64,
}

/// A command taken from a channel, which is to be answered where it came from.
pub enum Message {
    /// From the mailbox.
    Mailbox(MailboxMessage),
    /// From the request ring.
    Ring(RingRequest),
}

/// The reason a message has no text.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum BadMessage {
    /// The message in the mailbox is bad.
    #[error(transparent)]
    Mailbox(#[from] MessageError),
    /// The request in the ring is bad.
    #[error(transparent)]
    Ring(#[from] RequestError),
}

impl Message {
    /// Returns the text of the command.
    ///
    /// # Errors
    /// If it has none.
    pub fn text(&self) -> Result<&str, BadMessage> {
        match self {
            Message::Mailbox(message) => Ok(message.text.as_deref().map_err(|error| *error)?),
            Message::Ring(request) => Ok(request.text.as_deref().map_err(|error| *error)?),
        }
    }

    /// Returns the longest text of a reply that can be delivered, in bytes.
    pub fn reply_limit(&self) -> usize {
        match self {
            // The mailbox has room for little more.
            Message::Mailbox(_) => 1897,
            Message::Ring(_) => 1 << 20,
        }
    }
}

/// Commands a second that a channel may send in the long run, and how many at once. Further ones
/// wait in the mailbox: each costs the host a transaction and a write to disk, for which other
/// guests wait.
const RATE: f64 = 100.0;
const BURST: f64 = 500.0;
/// A command that takes more CPU time than this counts as several. With [`RATE`], a channel gets a
/// tenth of a core.
const COMMAND_TIME: Duration = Duration::from_millis(1);

impl Channel {
    /// A channel with its region, which is made if it does not exist. A region that cannot be used is
    /// [tried again](Channel::follow).
    pub fn open(spec: &ShmSpec) -> Channel {
        if spec.macs.is_empty() && !spec.any_mac {
            log::warn!(
                "{}: bound to no MAC, so its guest may speak for every middlebox; add mac=MAC, or mac=any \
                 if it should",
                spec.path.display()
            );
        }
        let region = RegionFile::open_or_create(&spec.path, spec.ownership).and_then(with_ring);
        let (region, ring) = match region {
            Ok((region, ring)) => (Ok(region), ring),
            Err(error) => (Err(error), None),
        };
        if let Err(error) = &region {
            log::error!("{error}; the commands of this channel are not read until this is fixed");
        }
        let now = Instant::now();
        let first = region.as_ref().ok().map(RegionFile::owner);
        let owners = [0, geteuid().as_raw()].into_iter().chain(spec.ownership.owner).chain(first);
        Channel {
            spec: spec.clone(),
            owners: owners.collect(),
            region,
            mailbox: HostMailbox::default(),
            ring,
            budget: Budget { commands: BURST, counted: now },
            schedule: PollSchedule::new(now),
            log_limiter: RateLimiter::new(LOGGED_PER_SECOND),
            unlogged: 0,
            denied: 0,
        }
    }

    /// Returns the number of commands that the binding did not allow.
    pub fn denied(&self) -> u64 {
        self.denied
    }

    /// Rejects a channel whose path is not a region and will not become one, such as a directory.
    ///
    /// # Errors
    /// The reason the path cannot be a region.
    pub fn refuse_mistake(self) -> Result<Channel, RegionError> {
        let is_mistake = |error: &RegionError| match error {
            RegionError::Kind { .. } => true,
            RegionError::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            RegionError::Size { .. } | RegionError::Owner { .. } | RegionError::Replaced { .. } => {
                false
            }
        };
        match self.region {
            Err(error) if is_mistake(&error) => Err(error),
            region => Ok(Channel { region, ..self }),
        }
    }

    /// Follows the path: a region that a VM's start has made anew, or that could not be used, is
    /// opened again; a header of the rings that the guest has overwritten is written again.
    pub fn follow(&mut self) {
        if let Ok(region) = &self.region {
            let repair = || self.ring.as_ref().map_or(Ok(()), |ring| ring.repair(region));
            let Err(error) = region.check_path().and_then(|()| repair()) else { return };
            self.close(error);
        }
        let opened = RegionFile::open(&self.spec.path).and_then(|region| {
            let (path, owner) = (region.path().to_path_buf(), region.owner());
            let is_known = self.owners.contains(&owner);
            if is_known { with_ring(region) } else { Err(RegionError::Owner { path, owner }) }
        });
        match opened {
            Ok((region, ring)) => {
                self.ring = ring;
                log::info!("{}: its commands are read again", self.spec.path.display());
                self.region = Ok(region);
                self.mailbox = HostMailbox::default();
                self.schedule = PollSchedule::new(Instant::now());
            }
            Err(error) => self.region = Err(error),
        }
    }

    fn close(&mut self, error: RegionError) {
        log::warn!("{error}; the commands of this channel are not read until this is fixed");
        self.region = Err(error);
    }

    /// Returns the specification of the channel.
    pub fn spec(&self) -> &ShmSpec {
        &self.spec
    }

    /// Whether the guests of two channels may be on one network.
    pub fn may_meet(&self, other: &Channel) -> bool {
        let (Some(one), Some(other)) = (&self.spec.network, &other.spec.network) else {
            return true;
        };
        let is_one_vlan = one.vlan.is_none() || other.vlan.is_none() || one.vlan == other.vlan;
        one.bridge == other.bridge && is_one_vlan
    }

    /// Returns why the region is not read any more.
    pub fn error(&self) -> Option<&RegionError> {
        self.region.as_ref().err()
    }

    /// Returns when the mailbox is to be polled next; `None` if it is not read any more.
    pub fn next_poll(&self) -> Option<Instant> {
        self.region.is_ok().then_some(self.schedule.next)
    }

    /// Polls the mailbox and the rings. Returns the messages that wait, if the budget allows. A region
    /// that was cut is closed.
    pub fn poll(&mut self, now: Instant) -> Vec<Message> {
        let messages = self.take(now);
        // Withdrawals and replies that wait for room are not what the budget is for.
        let most = if self.ring.is_some() { MAX_POLL_INTERVAL } else { Duration::MAX };
        self.schedule.polled(now, !messages.is_empty(), now + self.budget.wait().min(most));
        messages
    }

    fn take(&mut self, now: Instant) -> Vec<Message> {
        self.budget.refill(now);
        let has_budget = self.budget.wait() == Duration::ZERO;
        let Ok(region) = &self.region else { return Vec::new() };
        let followed = self.ring.as_mut().map_or(Ok(()), |ring| ring.follow(region, now));
        let taken = followed.and_then(|()| {
            if !has_budget {
                return Ok(Vec::new());
            }
            let messages = self.mailbox.take(region, now)?;
            let mut all: Vec<Message> = messages.into_iter().map(Message::Mailbox).collect();
            // One after the other, so that a poll costs no more than MAX_MESSAGES.
            if all.is_empty()
                && let Some(ring) = &mut self.ring
            {
                all.extend(ring.take(region)?.into_iter().map(Message::Ring));
            }
            Ok(all)
        });
        match taken {
            Ok(messages) => {
                self.budget.commands -= messages.len() as f64;
                messages
            }
            Err(error) => {
                self.close(error);
                Vec::new()
            }
        }
    }

    /// Charges the CPU time that the host has spent on commands beyond their share.
    pub fn charge(&mut self, commands: usize, spent: Duration) {
        let share = COMMAND_TIME.as_secs_f64() * commands as f64;
        let excess = (spent.as_secs_f64() - share).max(0.0);
        self.budget.commands -= excess / COMMAND_TIME.as_secs_f64();
    }

    /// Logs answered messages: accepted commands and those that the binding does not allow, a bounded
    /// number of bounded lines. Other rejections and queries are logged at debug level.
    pub fn log(&mut self, answered: &[(Message, Reply)]) {
        let second = self.budget.counted.saturating_duration_since(*GRID).as_secs() as u32;
        for (message, reply) in answered {
            let text = message.text().unwrap_or("a message that is not text");
            let is_change = reply.is_ok() && !text.trim_start().starts_with(['q', 'Q']);
            let is_denied = reply.code() == Some(ErrorCode::Denied);
            self.denied += u64::from(is_denied);
            let is_noted = is_change || is_denied;
            if is_noted && !self.log_limiter.has_room(second) {
                self.unlogged += u32::from(is_change);
                continue;
            }
            let level = match (is_change, is_denied) {
                (true, _) => log::Level::Info,
                (_, true) => log::Level::Warn,
                _ => log::Level::Debug,
            };
            if is_noted {
                self.log_limiter.count();
                let unlogged = std::mem::take(&mut self.unlogged);
                if unlogged != 0 && is_change {
                    let path = self.spec.path.display();
                    log::info!("{path}: {unlogged} more commands were accepted");
                }
            }
            let (text, reply) = (abridged(text), abridged(&reply.to_string()));
            log::log!(level, "{}: {text}: {reply}", self.spec.path.display());
        }
    }

    /// Writes the replies to messages.
    pub fn reply(&mut self, answered: Vec<(Message, Reply)>) {
        let Ok(region) = &self.region else { return };
        let (mut by_mailbox, mut by_ring) = (Vec::new(), Vec::new());
        for (message, reply) in answered {
            match message {
                Message::Mailbox(message) => by_mailbox.push((message, reply)),
                Message::Ring(request) => by_ring.push((request, reply)),
            }
        }
        let mut written = self.mailbox.reply(region, &by_mailbox);
        if let Some(ring) = &mut self.ring
            && !by_ring.is_empty()
        {
            let by_ring = by_ring.iter().map(|(request, reply)| (request, reply));
            written = written.and_then(|()| ring.reply(region, by_ring));
        }
        if let Err(error) = written {
            self.close(error);
        }
    }

    /// Whether a guest looks at counters here: of the MACs that the channel is bound to.
    pub fn is_watched(&self, now: Instant) -> bool {
        let is_watched = self.ring.as_ref().is_some_and(|ring| ring.is_watched(now));
        is_watched && self.region.is_ok() && !self.spec.macs.is_empty()
    }

    /// Removes the rings, so that a guest sees that its channel has ended.
    pub fn remove_ring(&mut self) {
        if let (Ok(region), Some(ring)) = (&self.region, self.ring.take())
            && let Err(error) = ring.remove(region)
        {
            log::warn!("{error}");
        }
    }

    /// Writes the counters that the guest reads without asking.
    pub fn write_counters(&mut self, page: &CounterPage) {
        if let (Ok(region), Some(ring)) = (&self.region, &self.ring)
            && let Err(error) = ring.write_counters(region, page)
        {
            self.close(error);
        }
    }

    /// Checks that the channel's own binding allows a command.
    ///
    /// # Errors
    /// The word that the channel may not write.
    pub fn authorise(&self, parsed: &ParsedCommand<'_>) -> Result<(), CommandError> {
        for (at, to) in parsed.command.destinations().iter().enumerate() {
            if !self.spec.may_redirect_to(to.ip) {
                let may: Vec<String> = self.spec.to.iter().map(ToString::to_string).collect();
                let expected =
                    format!("this channel may not redirect there, only to {}", may.join(", "));
                return Err(parsed.error(Place::Backend(at), ErrorCode::Denied, &expected));
            }
        }
        let registered = parsed.command.registered_address();
        if registered.is_some_and(|ip| !self.spec.may_register(ip)) {
            let may: Vec<String> = self.spec.ips.iter().map(ToString::to_string).collect();
            let expected = format!("this channel may not register it, only {}", may.join(", "));
            return Err(parsed.error(Place::Frontend, ErrorCode::Denied, &expected));
        }
        let may_speak_for = |mac: MacAddr| self.spec.macs.contains(&mac);
        if self.spec.macs.is_empty() || parsed.command.mac().is_none_or(may_speak_for) {
            return Ok(());
        }
        let bound: Vec<String> = self.spec.macs.iter().map(MacAddr::to_string).collect();
        let expected = format!("this channel may not speak for it, only for {}", bound.join(", "));
        Err(parsed.error(Place::Mac, ErrorCode::Denied, &expected))
    }
}

/// Returns a region with its rings.
fn with_ring(region: RegionFile) -> Result<(RegionFile, Option<HostRing>), RegionError> {
    let ring = HostRing::open(&region)?;
    Ok((region, ring))
}

/// Accepted commands of a channel that are logged in a second; the rest is counted.
const LOGGED_PER_SECOND: u32 = 5;
/// Characters of a command, or of a reply, in the log.
const LOGGED_LENGTH: usize = 200;

/// Returns the beginning of a text.
fn abridged(text: &str) -> String {
    let mut chars = text.chars();
    let start: String = chars.by_ref().take(LOGGED_LENGTH).collect();
    if chars.next().is_some() { start + "…" } else { start }
}

/// The commands that a channel may still send, which are refilled over time.
struct Budget {
    commands: f64,
    counted: Instant,
}

impl Budget {
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.counted).as_secs_f64();
        self.commands = (self.commands + elapsed * RATE).min(BURST);
        self.counted = now;
    }

    /// Returns how long the channel has to wait. All messages of one write are answered by one
    /// reply, so it needs the budget for as many.
    fn wait(&self) -> Duration {
        let missing = (MAX_MESSAGES as f64 - self.commands).max(0.0);
        Duration::from_secs_f64(missing / RATE)
    }
}

/// The poll schedule of a mailbox, which has no doorbell: frequent while messages arrive, rare
/// otherwise.
///
/// The interval is a share of the time since the guest's last message. So a message waits at most
/// for that share of the pause before it, and a host with idle guests stays idle. The times of all
/// mailboxes are on one grid, so that one wakeup polls all that are due.
struct PollSchedule {
    next: Instant,
    /// The time of the guest's last message; `None` before the first one.
    last_message: Option<Instant>,
}

/// The interval is the time since the last message divided by this, rounded down to the shortest
/// interval times a power of two.
const PAUSE_SHARE: u32 = 128;
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(1);
const MAX_POLL_INTERVAL: Duration = Duration::from_millis(16);

/// The origin of the grid of all schedules.
static GRID: LazyLock<Instant> = LazyLock::new(Instant::now);

impl PollSchedule {
    fn new(now: Instant) -> PollSchedule {
        LazyLock::force(&GRID);
        PollSchedule { next: now, last_message: None }
    }

    /// Notes a poll. The next one is not before `earliest`.
    fn polled(&mut self, now: Instant, had_message: bool, earliest: Instant) {
        if had_message {
            self.last_message = Some(now);
        }
        let interval = self
            .last_message
            .map_or(MAX_POLL_INTERVAL, |last| poll_interval(now.saturating_duration_since(last)));
        self.next = next_on_grid(now.max(earliest), interval);
    }
}

fn poll_interval(pause: Duration) -> Duration {
    let mut interval = MAX_POLL_INTERVAL;
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
    use nfqd_shmctl::Region;

    fn channel(binding: &str) -> (tempfile::TempDir, Channel) {
        let dir = tempfile::tempdir().unwrap();
        let spec = format!("{}{binding}", dir.path().join("vm").display()).parse().unwrap();
        let channel = Channel::open(&spec);
        (dir, channel)
    }

    #[test]
    fn a_command_that_takes_long_counts_as_several() {
        let (_dir, mut channel) = channel("");
        let before = channel.budget.commands;
        channel.charge(10, Duration::from_millis(7));
        assert!((before - channel.budget.commands).abs() < 1e-9, "ten in less than their share");
        channel.charge(1, Duration::from_millis(26));
        assert!((before - channel.budget.commands - 25.0).abs() < 1e-6);
    }

    #[test]
    fn a_channel_that_never_stops_sending_waits() {
        let (_dir, mut channel) = channel("");
        let guest = Region::open(&channel.spec.path).unwrap();
        let now = channel.budget.counted;
        let mut taken = 0;
        for _ in 0..1000 {
            guest.write(0, b"@X 1:2:3:4:5:6@@X 1:2:3:4:5:6@");
            let messages: Vec<_> =
                channel.poll(now).into_iter().map(|message| (message, Reply::ok(""))).collect();
            taken += messages.len();
            channel.reply(messages);
        }
        assert!(taken > BURST as usize - 2 * MAX_MESSAGES && taken <= BURST as usize, "{taken}");
        assert_eq!(channel.poll(now + Duration::from_millis(25)).len(), 2);
    }

    #[test]
    fn a_withdrawal_does_not_wait_for_the_budget() {
        // `reset` in the guest's section and in the host's header, by the layout's documentation.
        const GUEST_RESET: usize = 8192;
        const HOST_RESET: usize = 4160;
        let (_dir, mut channel) = channel("");
        let guest = Region::open(&channel.spec.path).unwrap();
        let now = channel.budget.counted;
        channel.charge(1, Duration::from_secs(10));
        guest.write(0, b"@Q@");
        guest.store_u64(GUEST_RESET, 7);
        assert!(channel.poll(now).is_empty(), "no command without a budget");
        assert_eq!(guest.load_u64(HOST_RESET), 7);
        assert!(channel.next_poll().unwrap() <= now + 2 * MAX_POLL_INTERVAL);
    }

    #[test]
    fn a_region_that_is_made_anew_is_followed() {
        let (_dir, mut channel) = channel("");
        let path = channel.spec.path.clone();
        std::fs::remove_file(&path).unwrap();
        channel.follow();
        assert!(channel.error().is_some_and(|error| error.to_string().contains("No such file")));
        assert_eq!(channel.next_poll(), None);
        std::fs::write(&path, vec![0; 8192]).unwrap();
        channel.follow();
        assert!(channel.error().is_none() && channel.next_poll().is_some());
        Region::open(&path).unwrap().write(0, b"@Q@");
        let later = Instant::now() + Duration::from_secs(1);
        assert_eq!(channel.poll(later).len(), 1);
        // Cut, and grown again.
        std::fs::write(&path, [0; 100]).unwrap();
        assert!(channel.poll(later).is_empty());
        channel.follow();
        assert!(channel.error().is_some_and(|error| error.to_string().contains("100 bytes")));
        std::fs::write(&path, vec![0; 4096]).unwrap();
        channel.follow();
        assert!(channel.error().is_none());
        // Anybody may make a file in /dev/shm.
        channel.owners.clear();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, vec![0; 4096]).unwrap();
        channel.follow();
        assert!(channel.error().is_some_and(|error| error.to_string().contains("add owner=")));
    }

    #[test]
    fn a_mailbox_is_polled_often_while_the_guest_talks_and_seldom_when_it_is_silent() {
        let ms = Duration::from_millis;
        let mut schedule = PollSchedule::new(Instant::now());
        let start = schedule.next;
        let mut interval_after = |pause: Duration, had_message: bool| {
            let now = start + pause;
            schedule.polled(now, had_message, now);
            schedule.next - now
        };
        assert!(interval_after(ms(1), true) <= MIN_POLL_INTERVAL);
        assert!(interval_after(ms(513), false) <= ms(4), "at most a 128th of the pause");
        assert!(interval_after(ms(60_000), false) <= MAX_POLL_INTERVAL);
        assert!(interval_after(ms(60_001), true) <= MIN_POLL_INTERVAL, "it talks again");
        assert_eq!(poll_interval(ms(512)), ms(4));
        assert_eq!(poll_interval(ms(60_000)), MAX_POLL_INTERVAL);
    }

    #[test]
    fn silent_mailboxes_are_polled_by_one_wakeup() {
        let ms = Duration::from_millis;
        let (mut one, mut other) =
            (PollSchedule::new(Instant::now()), PollSchedule::new(Instant::now()));
        let later = one.next + ms(60_000);
        one.polled(later, false, later);
        other.polled(later + Duration::from_micros(1), false, later);
        let apart = other.next - one.next;
        assert!(apart == Duration::ZERO || apart == MAX_POLL_INTERVAL, "{apart:?}");
        one.polled(later, false, later + ms(100));
        assert!(one.next > later + ms(100), "a channel without a budget is not polled");
    }

    #[test]
    fn a_channel_speaks_for_its_macs_only() {
        let (_dir, channel) = channel(",mac=2:0:0:0:0:1,to=10.0.0.0/24,ip=10.0.0.1,ip=10.9.0.0/16");
        let authorise = |line: &str| channel.authorise(&ParsedCommand::parse(line).unwrap());
        assert!(authorise("R F 2:0:0:0:0:1 10.0.0.1").is_ok());
        assert!(authorise("R L 2:0:0:0:0:1 10.9.9.9 0 10.0.0.3").is_ok() && authorise("Q").is_ok());
        for (line, column, words) in [
            ("R L 2:0:0:0:0:1 10.9.9.9 0 10.0.1.3", 28, "only to 10.0.0.0/24"),
            ("B 2:0:0:0:0:1 + 10.0.0.3 10.0.1.3", 26, "only to 10.0.0.0/24"),
            ("R F 2:0:0:0:0:1 10.0.0.2", 17, "only 10.0.0.1, 10.9.0.0/16"),
            ("R L 2:0:0:0:0:1 10.8.0.1:80 rr 10.0.0.3", 17, "only 10.0.0.1, 10.9.0.0/16"),
            ("R F 2:0:0:0:0:2 10.0.0.1", 5, "only for 02:00:00:00:00:01"),
            ("X 2:0:0:0:0:2", 3, "only for 02:00:00:00:00:01"),
        ] {
            let error = authorise(line).unwrap_err();
            assert_eq!((error.code, error.column), (ErrorCode::Denied, column), "{error}");
            assert!(error.message.contains(words), "{error}");
        }
    }
}
