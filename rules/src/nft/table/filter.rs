//! The chains `filtered`, `filtered_balanced`, `blind`, `from_host` and `closed`: a frame to a
//! middlebox meets the filter rules here.

use super::BaseTable;
use super::flow::balanced;
use super::steer::others;
use crate::nft::dsl::{goto, rule, verdict};
use crate::nft::family::FAMILIES;
use crate::nft::field::Field;
use crate::nft::model::{Statement, Verdict};
use crate::nft::options::FastPath;

impl BaseTable<'_> {
    /// Without the fast path, the engine filters everything that can reach it: br_netfilter carries
    /// IPv4 and IPv6 only, without their VLAN tags.
    pub(super) fn filter_chains(&mut self) {
        let by_mac =
            |map: &str| rule(vec![Statement::Vmap(vec![Field::EtherDestination], map.to_string())]);
        if self.options.fast_path == FastPath::Full {
            self.chain("filtered", [vec![by_mac("filters")], others().to_vec()].concat());
            let rules = [vec![by_mac("filters")], balanced().to_vec()].concat();
            self.chain("filtered_balanced", rules);
        }
        if self.options.engine_is_blind() {
            let tagged =
                |map: &str| Statement::Vmap(vec![Field::EtherDestination], map.to_string());
            let mut rules = FAMILIES.map(|ip| rule(vec![ip.is(), tagged("tag_filters")])).to_vec();
            rules.extend(FAMILIES.map(|ip| rule(vec![ip.is(), goto("engine")])));
            rules.push(by_mac("filters"));
            rules.extend(others());
            self.chain("blind", rules);
        }
        // The kernel alone filters frames that the host itself sends or routes.
        let from_host = self.options.kernel_filters().then(|| by_mac("filters"));
        self.chain("from_host", from_host.into_iter().collect());
        let closed = Statement::In(vec![Field::EtherDestination], "closed".to_string());
        self.chain("closed", vec![rule(vec![closed, verdict(Verdict::Drop)])]);
    }
}
