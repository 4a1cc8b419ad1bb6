//! The bindings of all channels together, and what they allow.

use crate::config::ChannelSpec;
use nfqd_rules::MiddleboxKey;
use nfqd_shmctl::MacAddr;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The channels that each MAC is bound to.
pub struct Bindings<'a> {
    channels: BTreeMap<MacAddr, Vec<&'a ChannelSpec>>,
}

impl<'a> Bindings<'a> {
    /// The bindings of channels with these specifications.
    pub fn new(specs: impl Iterator<Item = &'a ChannelSpec>) -> Bindings<'a> {
        let mut out = Bindings { channels: BTreeMap::new() };
        for spec in specs {
            for mac in &spec.macs {
                out.channels.entry(*mac).or_default().push(spec);
            }
        }
        out
    }

    /// Whether both MACs are bound, and no channel speaks for both.
    pub fn are_apart(&self, one: MacAddr, middlebox: MiddleboxKey) -> bool {
        let other = middlebox.mac;
        match (self.channels.get(&one), self.channels.get(&other)) {
            (Some(its), Some(_)) => !its.iter().any(|spec| spec.macs.contains(&other)),
            _ => false,
        }
    }

    /// Whether a channel that a middlebox is bound to may redirect to an address, or it is bound to
    /// none.
    pub fn may_redirect_to(&self, middlebox: MiddleboxKey, ip: IpAddr) -> bool {
        let Some(specs) = self.channels.get(&middlebox.mac) else { return true };
        specs.iter().any(|spec| spec.may_redirect_to(ip))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_that_several_channels_speak_for_may_do_what_any_of_them_may() {
        let specs: Vec<ChannelSpec> = [
            "/a,mac=2:0:0:0:0:1,mac=2:0:0:0:0:2,to=10.0.0.0/24",
            "/b,mac=2:0:0:0:0:2,to=10.1.0.0/24",
            "/c,mac=2:0:0:0:0:3",
        ]
        .map(|spec| ChannelSpec::shm(spec).unwrap())
        .to_vec();
        let bindings = Bindings::new(specs.iter());
        let mac = |last: u8| MacAddr([2, 0, 0, 0, 0, last]);
        let key = |last: u8| MiddleboxKey::anywhere(mac(last));
        assert!(!bindings.are_apart(mac(1), key(2)) && bindings.are_apart(mac(1), key(3)));
        assert!(!bindings.are_apart(mac(1), key(9)), "unbound");
        let may = |last: u8, ip: [u8; 4]| bindings.may_redirect_to(key(last), IpAddr::from(ip));
        assert!(may(2, [10, 0, 0, 1]) && may(2, [10, 1, 0, 1]) && !may(1, [10, 1, 0, 1]));
        assert!(may(3, [10, 9, 9, 9]) && may(9, [10, 9, 9, 9]));
    }
}
