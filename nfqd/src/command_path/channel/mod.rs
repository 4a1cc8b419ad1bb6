//! A guest's channel: a command arrives here. Its link, which is a region, a doorbell or vsock; its
//! binding, its budget, and when to poll it.

mod doorbell;
mod message;
mod region;
mod resources;
mod schedule;
mod shared_memory;
mod vsock;

pub use doorbell::DoorbellError;
pub use message::{BadMessage, LineRequest, Message};
use resources::vsock_advice;
pub use resources::{ChannelEvent, ChannelResources};
pub use vsock::VsockClient;

use crate::config::{ChannelSpec, Transport};
use crate::rate_limiter::RateLimiter;
use doorbell::DoorbellLink;
use nfqd_shmctl::ring::CounterPage;
use nfqd_shmctl::{CommandError, ErrorCode, MacAddr, ParsedCommand, Place, RegionError, Reply};
use region::RegionLink;
use schedule::{Budget, GRID, MAX_POLL_INTERVAL, Poll, PollSchedule};
use shared_memory::SharedMemory;
use std::rc::Rc;
use std::time::{Duration, Instant};
use vsock::VsockLink;

/// A guest's channel.
pub struct Channel {
    id: u32,
    spec: ChannelSpec,
    link: Link,
    budget: Budget,
    schedule: PollSchedule,
    /// Whether the guest has rung since the last poll.
    is_rung: bool,
    log_limiter: RateLimiter,
    /// Accepted commands since the last one that was logged.
    unlogged: u32,
    /// Commands that the binding does not allow.
    denied: u64,
}

enum Link {
    Region(RegionLink),
    Doorbell(DoorbellLink),
    Vsock(VsockLink),
}

impl Channel {
    /// A channel with its link. What cannot be used is [tried again](Channel::follow).
    pub fn open(spec: &ChannelSpec, resources: &Rc<ChannelResources>) -> Channel {
        if spec.macs.is_empty() && !spec.any_mac {
            log::warn!(
                "{}: bound to no MAC, so its guest may speak for every middlebox; add mac=MAC, or mac=any \
                 if it should",
                spec.transport
            );
        }
        let (id, ownership) = (resources.next_id(), spec.ownership);
        let link = match &spec.transport {
            Transport::Shm(path) => Link::Region(RegionLink::open(path, ownership)),
            Transport::Doorbell(path) => {
                Link::Doorbell(DoorbellLink::open(id, path, ownership, resources.clone()))
            }
            Transport::Vsock(_) => Link::Vsock(VsockLink::open(id, resources.clone())),
        };
        let now = Instant::now();
        Channel {
            id,
            spec: spec.clone(),
            link,
            budget: Budget::new(spec.quotas.rate, now),
            schedule: PollSchedule::new(now),
            is_rung: false,
            log_limiter: RateLimiter::new(LOGGED_PER_SECOND),
            unlogged: 0,
            denied: 0,
        }
    }

    /// Rejects a channel whose path is not a region and will not become one, such as a directory.
    ///
    /// # Errors
    /// The reason the path cannot be a region.
    pub fn refuse_mistake(self) -> Result<Channel, RegionError> {
        let link = match self.link {
            Link::Region(region) => Link::Region(region.refuse_mistake()?),
            other => other,
        };
        Ok(Channel { link, ..self })
    }

    /// Gives the channel other keys, so that a VM that has connected stays so. Returns false if it has to be
    /// opened anew: a region, whose keys tell how it is opened, unless they are the same.
    pub fn rebind(&mut self, spec: &ChannelSpec) -> bool {
        if let Link::Region(region) = &self.link {
            return region.error().is_none() && self.spec == *spec;
        }
        if self.spec != *spec {
            if let Link::Doorbell(doorbell) = &mut self.link {
                doorbell.set_ownership(spec.ownership);
            }
            self.spec = spec.clone();
            self.budget = Budget::new(spec.quotas.rate, self.budget.counted());
        }
        true
    }

    /// Returns the specification of the channel.
    pub fn spec(&self) -> &ChannelSpec {
        &self.spec
    }

    /// Returns the number of commands that the binding did not allow.
    pub fn denied(&self) -> u64 {
        self.denied
    }

    /// Whether an event is one of this channel.
    pub fn has(&self, event: ChannelEvent) -> bool {
        self.id == event.channel
    }

    /// Returns why commands are not read.
    pub fn error(&self) -> Option<String> {
        match &self.link {
            Link::Region(region) => region.error().map(ToString::to_string),
            Link::Doorbell(doorbell) => doorbell.error().map(ToString::to_string),
            Link::Vsock(vsock) => vsock.error().map(vsock_advice),
        }
    }

    /// Whether a VM is connected; `None` if that cannot be seen.
    pub fn is_connected(&self) -> Option<bool> {
        match &self.link {
            Link::Region(_) => None,
            Link::Doorbell(doorbell) => Some(doorbell.memory().is_some()),
            Link::Vsock(vsock) => Some(vsock.is_connected()),
        }
    }

    /// Follows what the link is made of: a region or a socket that was made anew, or could not be used, is
    /// opened again.
    pub fn follow(&mut self) {
        match &mut self.link {
            Link::Region(region) => {
                if region.follow() {
                    self.schedule = PollSchedule::new(Instant::now());
                }
            }
            Link::Doorbell(doorbell) => doorbell.follow(),
            Link::Vsock(vsock) => vsock.follow(),
        }
    }

    /// Handles an event of the link; the channel is polled next if there is something to take.
    pub fn handle(&mut self, event: ChannelEvent, now: Instant) {
        let has_memory = self.memory().is_some();
        let is_rung = match &mut self.link {
            Link::Region(_) => false,
            Link::Doorbell(doorbell) => doorbell.handle(event, second_of(now)),
            Link::Vsock(vsock) => {
                vsock.handle(event);
                true
            }
        };
        if !has_memory && self.memory().is_some() {
            self.schedule = PollSchedule::new(now);
        }
        if is_rung {
            self.is_rung = true;
            self.schedule.hasten(now);
        }
    }

    /// Takes a connection of a VM with the CID of this channel. It counts as a command.
    pub fn accept(&mut self, client: VsockClient, now: Instant) {
        // First, so that other users of the VM cannot use up what root may send.
        if !client.is_root() {
            let reason = "connect from a port below 1024, which only root of the VM may use";
            client.refuse(ErrorCode::Denied, reason);
            return;
        }
        self.budget.refill(now);
        if self.budget.wait() != Duration::ZERO {
            client.refuse(ErrorCode::Quota, "too many commands and connections; try again later");
            return;
        }
        self.budget.spend(1);
        if let Link::Vsock(vsock) = &mut self.link {
            vsock.accept(client);
        }
    }

    fn memory(&self) -> Option<&SharedMemory> {
        match &self.link {
            Link::Region(region) => region.memory(),
            Link::Doorbell(doorbell) => doorbell.memory(),
            Link::Vsock(_) => None,
        }
    }

    fn memory_mut(&mut self) -> Option<&mut SharedMemory> {
        match &mut self.link {
            Link::Region(region) => region.memory_mut(),
            Link::Doorbell(doorbell) => doorbell.memory_mut(),
            Link::Vsock(_) => None,
        }
    }

    fn close(&mut self, error: RegionError) {
        match &mut self.link {
            Link::Region(region) => region.close(error),
            Link::Doorbell(doorbell) => doorbell.close(error),
            Link::Vsock(_) => {}
        }
    }

    /// Returns when the channel is to be polled next; `None` if there is nothing to poll.
    pub fn next_poll(&self) -> Option<Instant> {
        let has_something = match &self.link {
            Link::Vsock(vsock) => vsock.is_waiting(),
            _ => self.memory().is_some(),
        };
        has_something.then(|| self.schedule.next())
    }

    /// Polls the link. Returns the messages that wait, if the budget allows. A region that was cut is
    /// closed.
    pub fn poll(&mut self, now: Instant) -> Vec<Message> {
        self.budget.refill(now);
        let has_budget = self.budget.wait() == Duration::ZERO;
        let taken = match &mut self.link {
            Link::Vsock(vsock) if has_budget => Ok(vsock.take()),
            Link::Vsock(_) => Ok(Vec::new()),
            _ => self.memory_mut().map_or(Ok(Vec::new()), |memory| memory.take(now, has_budget)),
        };
        let messages = taken.unwrap_or_else(|error| {
            self.close(error);
            Vec::new()
        });
        self.budget.spend(messages.len());
        let was_rung = std::mem::take(&mut self.is_rung);
        let had_message = !messages.is_empty();
        // A guest that rings without need is not waited for at once, so that it cannot keep the host busy.
        let may_ring = (had_message || !was_rung) && self.budget.wait() == Duration::ZERO;
        let waits_for_ring = match &mut self.link {
            Link::Doorbell(doorbell) => {
                doorbell.ring_guest();
                may_ring && doorbell.arm()
            }
            Link::Vsock(vsock) => {
                vsock.arm(may_ring);
                false
            }
            Link::Region(_) => false,
        };
        // Withdrawals and replies that wait for room are not what the budget is for.
        let memory = self.memory();
        let has_ring = memory.is_some_and(SharedMemory::has_ring);
        let is_blocked = memory.is_some_and(SharedMemory::is_blocked);
        let most = if has_ring { MAX_POLL_INTERVAL } else { Duration::MAX };
        let earliest = now + self.budget.wait().min(most);
        let waits_for_ring = waits_for_ring && !is_blocked;
        self.schedule.polled(Poll { now, had_message, was_rung, waits_for_ring, earliest });
        messages
    }

    /// Charges the CPU time that the host has spent on commands beyond their share.
    pub fn charge(&mut self, commands: usize, spent: Duration) {
        self.budget.charge(commands, spent);
    }

    /// Logs answered messages: accepted commands and those that the binding does not allow, a bounded
    /// number of bounded lines. Other rejections and queries are logged at debug level.
    pub fn log(&mut self, answered: &[(Message, Reply)]) {
        let second = second_of(self.budget.counted());
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
                    let name = &self.spec.transport;
                    log::info!("{name}: {unlogged} more commands were accepted");
                }
            }
            let (text, reply) = (abridged(text), abridged(&reply.to_string()));
            log::log!(level, "{}: {text}: {reply}", self.spec.transport);
        }
    }

    /// Writes the replies to messages.
    pub fn reply(&mut self, answered: Vec<(Message, Reply)>) {
        if let Link::Vsock(vsock) = &mut self.link {
            vsock.reply(answered);
            vsock.arm(self.budget.wait() == Duration::ZERO);
            return;
        }
        let written = self.memory_mut().map_or(Ok(()), |memory| memory.reply(answered));
        if let Err(error) = written {
            self.close(error);
        }
        if let Link::Doorbell(doorbell) = &mut self.link {
            doorbell.ring_guest();
        }
    }

    /// Whether a guest looks at counters here: of the MACs that the channel is bound to.
    pub fn is_watched(&self, now: Instant) -> bool {
        !self.spec.macs.is_empty() && self.memory().is_some_and(|memory| memory.is_watched(now))
    }

    /// Ends the link for good, so that a guest sees that its channel has ended.
    pub fn end(&mut self) {
        if let Some(Err(error)) = self.memory_mut().map(SharedMemory::remove_ring) {
            log::warn!("{error}");
        }
        if let Link::Doorbell(doorbell) = &mut self.link {
            doorbell.end();
        }
    }

    /// Ends the link of a daemon that exits, unless the next one goes on with it.
    pub fn suspend(&mut self) {
        if let Link::Doorbell(doorbell) = &mut self.link {
            doorbell.suspend();
        }
    }

    /// Writes the counters that the guest reads without asking.
    pub fn write_counters(&mut self, page: &CounterPage) {
        if let Some(Err(error)) = self.memory().map(|memory| memory.write_counters(page)) {
            self.close(error);
        }
    }

    /// Whether the guests of two channels may be on one network.
    pub fn may_meet(&self, other: &Channel) -> bool {
        let (Some(one), Some(other)) = (&self.spec.network, &other.spec.network) else {
            return true;
        };
        let is_one_vlan = one.vlan.is_none() || other.vlan.is_none() || one.vlan == other.vlan;
        one.bridge == other.bridge && is_one_vlan
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

/// Returns the second of a time, on the clock that limits are counted by.
fn second_of(time: Instant) -> u32 {
    time.saturating_duration_since(*GRID).as_secs() as u32
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor_store::DescriptorStore;
    use nfqd_shmctl::Region;
    use nfqd_shmctl::mailbox::MAX_MESSAGES;
    use std::path::PathBuf;

    fn resources() -> Rc<ChannelResources> {
        Rc::new(ChannelResources::new(DescriptorStore::none()).unwrap())
    }

    fn channel(binding: &str) -> (tempfile::TempDir, Channel) {
        let dir = tempfile::tempdir().unwrap();
        let spec = format!("{}{binding}", dir.path().join("vm").display());
        let channel = Channel::open(&ChannelSpec::shm(&spec).unwrap(), &resources());
        (dir, channel)
    }

    fn path_of(channel: &Channel) -> PathBuf {
        PathBuf::from(channel.spec.transport.to_string())
    }

    #[test]
    fn a_channel_that_never_stops_sending_waits() {
        let (_dir, mut channel) = channel(",rate=100");
        let guest = Region::open(&path_of(&channel)).unwrap();
        let now = channel.budget.counted();
        let mut taken = 0;
        for _ in 0..1000 {
            guest.write(0, b"@X 1:2:3:4:5:6@@X 1:2:3:4:5:6@");
            let messages: Vec<_> =
                channel.poll(now).into_iter().map(|message| (message, Reply::ok(""))).collect();
            taken += messages.len();
            channel.reply(messages);
        }
        assert!(taken > 500 - 2 * MAX_MESSAGES && taken <= 500, "{taken}");
        assert_eq!(channel.poll(now + Duration::from_millis(25)).len(), 2);
    }

    #[test]
    fn a_withdrawal_does_not_wait_for_the_budget() {
        // `reset` in the guest's section and in the host's header, by the layout's documentation.
        const GUEST_RESET: usize = 8192;
        const HOST_RESET: usize = 4160;
        let (_dir, mut channel) = channel("");
        let guest = Region::open(&path_of(&channel)).unwrap();
        let now = channel.budget.counted();
        // More than the burst, which one charge cannot exceed.
        (0..4).for_each(|_| channel.charge(1, Duration::from_secs(10)));
        guest.write(0, b"@Q@");
        guest.store_u64(GUEST_RESET, 7);
        assert!(channel.poll(now).is_empty(), "no command without a budget");
        assert_eq!(guest.load_u64(HOST_RESET), 7);
        assert!(channel.next_poll().unwrap() <= now + 2 * MAX_POLL_INTERVAL);
    }

    #[test]
    fn a_region_that_is_made_anew_is_followed() {
        let (_dir, mut channel) = channel("");
        let path = path_of(&channel);
        std::fs::remove_file(&path).unwrap();
        channel.follow();
        assert!(channel.error().is_some_and(|error| error.contains("No such file")));
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
        assert!(channel.error().is_some_and(|error| error.contains("100 bytes")));
        std::fs::write(&path, vec![0; 4096]).unwrap();
        channel.follow();
        assert!(channel.error().is_none());
        // Anybody may make a file in /dev/shm.
        let Link::Region(region) = &mut channel.link else { unreachable!("a region") };
        region.forget_owners();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, vec![0; 4096]).unwrap();
        channel.follow();
        assert!(channel.error().is_some_and(|error| error.contains("add owner=")));
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
