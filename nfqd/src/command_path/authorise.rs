//! Authorisation: what a channel may ask for.

use super::channel::Channel;
use nfqd_rules::{Desired, MiddleboxKey, NetworkId};
use nfqd_shmctl::{CommandError, ErrorCode, MacAddr, ParsedCommand, Place};
use std::net::IpAddr;

/// Checks that a channel may give a command: that it may speak for the MAC and redirect to the
/// destinations, and that these are not middleboxes of other channels, whose replies it could
/// disturb. Middleboxes on another network do not count.
///
/// # Errors
/// The word that the channel may not write.
pub fn authorise(
    channels: &[Channel],
    channel: usize,
    desired: &Desired,
    network: NetworkId,
    parsed: &ParsedCommand<'_>,
) -> Result<(), CommandError> {
    let Some(own) = channels.get(channel) else { return Ok(()) };
    own.authorise(parsed)?;
    let belongs_to_other = |mac: &MacAddr| {
        let others = channels.iter().enumerate().filter(|(at, _)| *at != channel);
        let mut others = others.filter(|(_, other)| own.may_meet(other));
        !own.spec().macs.contains(mac) && others.any(|(_, other)| other.spec().macs.contains(mac))
    };
    let slots = &desired.slots;
    let mac = parsed.command.mac();
    let home = mac.and_then(|mac| slots.network_of(MiddleboxKey { network, mac }));
    // Before the first registration, the network that the channel is bound to.
    let home = home.or(Some(network).filter(|network| *network != NetworkId::ANY));
    let is_registered_by_other = |ip: IpAddr| {
        desired.policy.middleboxes().iter().any(|(key, middlebox)| {
            let is_near = home.is_none() || slots.network_of(*key) == home;
            let has_address = || middlebox.addresses().any(|address| address == ip);
            is_near && has_address() && belongs_to_other(&key.mac)
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
