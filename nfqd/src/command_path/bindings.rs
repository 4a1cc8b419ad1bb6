//! What the bindings of all channels together say about middleboxes and backends.

use crate::channel::Channel;
use nfqd_shmctl::MacAddr;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The channels that each MAC is bound to.
pub struct Bindings<'a> {
    channels: BTreeMap<MacAddr, Vec<&'a Channel>>,
}

impl<'a> Bindings<'a> {
    /// The bindings of these channels.
    pub fn new(channels: &'a [Channel]) -> Bindings<'a> {
        let mut out = Bindings { channels: BTreeMap::new() };
        for channel in channels {
            for mac in &channel.spec().macs {
                out.channels.entry(*mac).or_default().push(channel);
            }
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

    /// Whether a channel that a middlebox is bound to may redirect to this address, or it is bound to none.
    pub fn allow(&self, middlebox: MacAddr, ip: IpAddr) -> bool {
        let may = |channel: &&Channel| channel.spec().may_redirect_to(ip);
        self.channels.get(&middlebox).is_none_or(|channels| channels.iter().any(may))
    }
}
