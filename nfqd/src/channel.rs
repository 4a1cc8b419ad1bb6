//! A guest's channel: a region, its mailbox, and the MACs that may be spoken for there.

use crate::config::ShmSpec;
use nfqd_shmctl::mailbox::{Frame, HostMailbox};
use nfqd_shmctl::{Command, CommandError, ErrorCode, MacAddr, Region, RegionError};
use std::time::Instant;

/// One guest's channel.
pub struct Channel {
    spec: ShmSpec,
    region: Result<Region, RegionError>,
    mailbox: HostMailbox,
}

impl Channel {
    /// Opens the region, which is made when it is not there.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open(spec: &ShmSpec) -> Result<Channel, RegionError> {
        let region = Ok(Region::open_or_create(&spec.path)?);
        Ok(Channel { spec: spec.clone(), region, mailbox: HostMailbox::default() })
    }

    /// What was asked for.
    pub fn spec(&self) -> &ShmSpec {
        &self.spec
    }

    /// Why the region cannot be read any more.
    pub fn error(&self) -> Option<&RegionError> {
        self.region.as_ref().err()
    }

    /// The frames that wait. A region whose file was cut is given up before it is touched.
    pub fn take(&mut self, now: Instant) -> Vec<Frame> {
        if let Ok(region) = &self.region
            && let Err(error) = region.check_size()
        {
            log::error!("{error}; its commands are not read any more");
            self.region = Err(error);
        }
        match &self.region {
            Ok(region) => self.mailbox.take(region, now),
            Err(_) => Vec::new(),
        }
    }

    /// Answers frames.
    pub fn reply(&mut self, answered: &[(Frame, String)]) {
        if let Ok(region) = &self.region {
            self.mailbox.reply(region, answered);
        }
    }

    /// Reads a command and checks that this channel may speak for its MAC.
    ///
    /// # Errors
    /// When it is no command, or for a MAC that the channel is not bound to.
    pub fn authorise(&self, line: &str) -> Result<(), CommandError> {
        let mac = Command::parse(line)?.mac();
        if self.spec.macs.is_empty() || self.spec.macs.contains(&mac) {
            return Ok(());
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
    fn a_channel_speaks_for_its_macs_only() {
        let dir = tempfile::tempdir().unwrap();
        let spec = format!("{},mac=2:0:0:0:0:1", dir.path().join("vm").display()).parse().unwrap();
        let channel = Channel::open(&spec).unwrap();
        assert_eq!(channel.authorise("R F 2:0:0:0:0:1 10.0.0.1"), Ok(()));
        for (line, column) in [("R F 2:0:0:0:0:2 10.0.0.1", 5), ("X 2:0:0:0:0:2", 3)] {
            let error = channel.authorise(line).unwrap_err();
            assert_eq!((error.code, error.column), (ErrorCode::Denied, column), "{error}");
            assert!(error.message.contains("only for 02:00:00:00:00:01"), "{error}");
        }
        assert_eq!(channel.authorise("nonsense").unwrap_err().code, ErrorCode::Syntax);
    }
}
