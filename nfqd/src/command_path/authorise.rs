//! Authorisation: what a channel may ask for.

use super::channel::Channel;
use nfqd_rules::Policy;
use nfqd_shmctl::{CommandError, ErrorCode, MacAddr, ParsedCommand, Place};
use std::net::IpAddr;

/// Checks that a channel may give a command: that it may speak for the MAC and redirect to the
/// destinations, and that these are not middleboxes of other channels, whose replies it could
/// disturb.
///
/// # Errors
/// The word that the channel may not write.
pub fn authorise(
    channels: &[Channel],
    channel: usize,
    policy: &Policy,
    parsed: &ParsedCommand<'_>,
) -> Result<(), CommandError> {
    let Some(own) = channels.get(channel) else { return Ok(()) };
    own.authorise(parsed)?;
    let belongs_to_other = |mac: &MacAddr| {
        let mut others = channels.iter().enumerate().filter(|(at, _)| *at != channel);
        !own.spec().macs.contains(mac) && others.any(|(_, other)| other.spec().macs.contains(mac))
    };
    let is_registered_by_other = |ip: IpAddr| {
        policy.middleboxes().iter().any(|(mac, middlebox)| {
            middlebox.addresses().any(|address| address == ip) && belongs_to_other(mac)
        })
    };
    for (at, to) in parsed.command.destinations().iter().enumerate() {
        if to.mac.as_ref().is_some_and(belongs_to_other) || is_registered_by_other(to.ip) {
            let expected = "a middlebox that another channel speaks for; redirect to another host";
            return Err(parsed.error(Place::Backend(at), ErrorCode::Denied, expected));
        }
    }
    Ok(())
}
