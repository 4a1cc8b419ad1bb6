//! What the bindings of channels say about backends, whoever has named them and whenever: a registration may be older than a
//! binding, or than the middlebox whose address it names.

use crate::channel::Channel;
use nfqd_rules::Policy;
use nfqd_shmctl::MacAddr;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The bindings of all channels, under a policy.
pub struct Bindings<'a> {
    channels: BTreeMap<MacAddr, Vec<&'a Channel>>,
    /// The addresses that bound middleboxes have registered.
    registered: BTreeMap<IpAddr, Vec<MacAddr>>,
}

impl<'a> Bindings<'a> {
    /// The bindings of these channels.
    pub fn new(channels: &'a [Channel], policy: &Policy) -> Bindings<'a> {
        let mut out = Bindings { channels: BTreeMap::new(), registered: BTreeMap::new() };
        for channel in channels {
            for mac in &channel.spec().macs {
                out.channels.entry(*mac).or_default().push(channel);
            }
        }
        for mac in out.channels.keys() {
            let addresses = policy.get(*mac).into_iter().flat_map(|middlebox| middlebox.addresses());
            addresses.for_each(|ip| out.registered.entry(ip).or_default().push(*mac));
        }
        out
    }

    /// Whether both are bound, and no channel speaks for both.
    pub fn are_apart(&self, one: MacAddr, other: MacAddr) -> bool {
        match (self.channels.get(&one), self.channels.get(&other)) {
            (Some(its), Some(_)) => !its.iter().any(|channel| channel.spec().macs.contains(&other)),
            _ => false,
        }
    }

    /// Whether a middlebox' traffic may be redirected to this address, at this MAC if one is said: as its channel's `to=`
    /// says, and not to a middlebox of another channel, whose answers would be this one's to disturb.
    pub fn allow(&self, middlebox: MacAddr, ip: IpAddr, mac: Option<MacAddr>) -> bool {
        let within = |channel: &&Channel| channel.spec().may_redirect_to(ip);
        let is_within = self.channels.get(&middlebox).is_none_or(|channels| channels.iter().any(within));
        let mut owners = self.registered.get(&ip).into_iter().flatten().copied().chain(mac);
        is_within && !owners.any(|owner| self.are_apart(owner, middlebox))
    }
}
