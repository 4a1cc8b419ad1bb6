//! A guest's channel: a region, its mailbox, and the MACs that may be spoken for there.

use crate::config::ShmSpec;
use nfqd_shmctl::mailbox::{Frame, HostMailbox, MAX_FRAMES};
use nfqd_shmctl::{Command, CommandError, ErrorCode, MacAddr, Region, RegionError};
use std::time::{Duration, Instant};

/// One guest's channel.
pub struct Channel {
    spec: ShmSpec,
    region: Result<Region, RegionError>,
    mailbox: HostMailbox,
    budget: f64,
    counted: Instant,
}

/// Commands a second that a channel may send for long, and how many at once. More wait in the mailbox: each costs the
/// host a transaction and a write to disk, which other guests wait for.
const RATE: f64 = 100.0;
const BURST: f64 = 500.0;
/// A command that takes more CPU time than this counts as several: with [`RATE`], a channel gets a tenth of a core.
const COMMAND_TIME: Duration = Duration::from_millis(1);

impl Channel {
    /// Opens the region, which is made when it is not there.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open(spec: &ShmSpec) -> Result<Channel, RegionError> {
        let region = Ok(Region::open_or_create(&spec.path)?);
        let mailbox = HostMailbox::default();
        Ok(Channel { spec: spec.clone(), region, mailbox, budget: BURST, counted: Instant::now() })
    }

    /// What was asked for.
    pub fn spec(&self) -> &ShmSpec {
        &self.spec
    }

    /// Why the region cannot be read any more.
    pub fn error(&self) -> Option<&RegionError> {
        self.region.as_ref().err()
    }

    /// The frames that wait, as many as the channel's budget allows. A region whose file was cut is given up before it is touched.
    pub fn take(&mut self, now: Instant) -> Vec<Frame> {
        self.budget = (self.budget + now.duration_since(self.counted).as_secs_f64() * RATE).min(BURST);
        self.counted = now;
        // All frames of one write are answered by one reply, so their budget must be there.
        if self.budget < MAX_FRAMES as f64 {
            return Vec::new();
        }
        if let Ok(region) = &self.region
            && let Err(error) = region.check_size()
        {
            log::error!("{error}; its commands are not read any more");
            self.region = Err(error);
        }
        match &self.region {
            Ok(region) => {
                let frames = self.mailbox.take(region, now);
                self.budget -= frames.len() as f64;
                frames
            }
            Err(_) => Vec::new(),
        }
    }

    /// Takes from the budget the CPU time that the host has spent on these many commands beyond their share.
    pub fn charge(&mut self, commands: usize, spent: Duration) {
        let share = COMMAND_TIME.as_secs_f64() * commands as f64;
        self.budget -= (spent.as_secs_f64() - share).max(0.0) / COMMAND_TIME.as_secs_f64();
    }

    /// Answers frames.
    pub fn reply(&mut self, answered: &[(Frame, String)]) {
        if let Ok(region) = &self.region {
            self.mailbox.reply(region, answered);
        }
    }

    /// Reads a command and checks that this channel may speak for its MAC, and redirect to its destination.
    ///
    /// # Errors
    /// When it is no command, or one that the channel may not give.
    pub fn authorise(&self, line: &str) -> Result<Command, CommandError> {
        let command = Command::parse(line)?;
        if let Some((word, _)) = command.destinations().find(|(_, to)| !self.spec.may_redirect_to(to.ip)) {
            let may: Vec<String> = self.spec.to.iter().map(ToString::to_string).collect();
            let expected = format!("this channel may not redirect there, only to {}", may.join(", "));
            return Err(CommandError::at_word(line, word, ErrorCode::Denied, expected));
        }
        if self.spec.macs.is_empty() || command.mac().is_none_or(|mac| self.spec.macs.contains(&mac)) {
            return Ok(command);
        }
        let bound: Vec<String> = self.spec.macs.iter().map(MacAddr::to_string).collect();
        let expected = format!("this channel may not speak for it, only for {}", bound.join(", "));
        // The MAC is the word behind the letters: R has two.
        let word = if line.trim_start().starts_with(['R', 'r']) { 2 } else { 1 };
        Err(CommandError::at_word(line, word, ErrorCode::Denied, expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_takes_long_counts_as_several() {
        let dir = tempfile::tempdir().unwrap();
        let spec = format!("{}", dir.path().join("vm").display()).parse().unwrap();
        let mut channel = Channel::open(&spec).unwrap();
        let before = channel.budget;
        channel.charge(10, Duration::from_millis(7));
        assert!((before - channel.budget).abs() < 1e-9, "ten commands in less than their share");
        channel.charge(1, Duration::from_millis(26));
        assert!((before - channel.budget - 25.0).abs() < 1e-6, "{}", channel.budget);
    }

    #[test]
    fn a_channel_that_sends_without_end_waits() {
        let dir = tempfile::tempdir().unwrap();
        let spec = format!("{}", dir.path().join("vm").display()).parse().unwrap();
        let mut channel = Channel::open(&spec).unwrap();
        let guest = Region::open(&spec.path).unwrap();
        let now = channel.counted;
        let mut taken = 0;
        for _ in 0..1000 {
            guest.write(0, b"@X 1:2:3:4:5:6@@X 1:2:3:4:5:6@");
            let frames: Vec<_> = channel.take(now).into_iter().map(|frame| (frame, String::new())).collect();
            taken += frames.len();
            channel.reply(&frames);
        }
        assert!(taken > BURST as usize - 2 * MAX_FRAMES && taken <= BURST as usize, "{taken}");
        assert_eq!(channel.take(now + Duration::from_millis(25)).len(), 2);
    }

    #[test]
    fn a_channel_speaks_for_its_macs_only() {
        let dir = tempfile::tempdir().unwrap();
        let spec =
            format!("{},mac=2:0:0:0:0:1,to=10.0.0.0/24", dir.path().join("vm").display()).parse().unwrap();
        let channel = Channel::open(&spec).unwrap();
        assert!(channel.authorise("R F 2:0:0:0:0:1 10.0.0.1").is_ok());
        assert!(channel.authorise("R L 2:0:0:0:0:1 10.9.9.9 0 10.0.0.3").is_ok());
        let error = channel.authorise("R L 2:0:0:0:0:1 10.9.9.9 0 10.0.1.3").unwrap_err();
        assert_eq!((error.code, error.column), (ErrorCode::Denied, 28), "{error}");
        for (line, column) in [("R F 2:0:0:0:0:2 10.0.0.1", 5), ("X 2:0:0:0:0:2", 3)] {
            let error = channel.authorise(line).unwrap_err();
            assert_eq!((error.code, error.column), (ErrorCode::Denied, column), "{error}");
            assert!(error.message.contains("only for 02:00:00:00:00:01"), "{error}");
        }
        assert_eq!(channel.authorise("nonsense").unwrap_err().code, ErrorCode::Syntax);
    }
}
