//! The chains `middlebox` and `closed`: a frame to a middlebox meets the filter rules here.

use super::BaseTable;
use crate::nft::dsl::{goto, rule, verdict};
use crate::nft::family::FAMILIES;
use crate::nft::field::Field;
use crate::nft::model::{Statement, Verdict};
use crate::nft::options::FastPath;

impl BaseTable<'_> {
    /// Without the fast path, the engine filters everything that can reach it: br_netfilter carries
    /// IPv4 and IPv6 only, without their VLAN tags.
    pub(super) fn filter_chains(&mut self) {
        let by_mac = |map: &str| Statement::Vmap(vec![Field::EtherDestination], map.to_string());
        let mut rules = Vec::new();
        if self.options.engine_is_blind() {
            rules.extend(FAMILIES.map(|ip| rule(vec![ip.is(), by_mac("tag_filters")])));
            rules.extend(FAMILIES.map(|ip| rule(vec![ip.is(), goto("engine")])));
        }
        if self.options.fast_path == FastPath::Full || self.options.engine_is_blind() {
            rules.push(rule(vec![by_mac("filters")]));
        }
        self.chain("middlebox", rules);
        let closed = Statement::In(vec![Field::EtherDestination], "closed".to_string());
        self.chain("closed", vec![rule(vec![closed, verdict(Verdict::Drop)])]);
    }
}
