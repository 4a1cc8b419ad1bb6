//! Names of chains and sets, and comments, which are parsed back from the kernel.

use nfqd_shmctl::{MacAddr, RuleId};

/// The beginning of the names of maps from slots to addresses and ports.
pub(super) const SLOT_MAPS: &str = "backend_";

/// The map of middleboxes, whose elements count what goes to them.
pub(super) const MIDDLEBOXES: &str = "middleboxes";

/// The set that tells the numbers of networks: its elements' comments are the names.
pub(super) const NETWORKS: &str = "networks";

/// The beginning of the comment of a rule that counts packets whose flow could not be cached.
pub(super) const CACHE_FULL: &str = "cache full: ";

/// The beginning of the name of the chain that tells the layout of a table. It is empty; every load
/// makes it anew, while a table's comment stays as it was made.
const LAYOUT: &str = "layout_";

/// Returns the name of the chain that tells the layout.
pub(super) fn layout_chain(layout: u32) -> String {
    format!("{LAYOUT}{layout}")
}

/// Returns the layout that a chain tells, if it is one that does.
pub(super) fn layout_of_chain(name: &str) -> Option<u32> {
    name.strip_prefix(LAYOUT)?.parse().ok()
}

/// Returns the comment of the elements and rules that count for a rule.
pub(super) fn rule_comment(rule: RuleId) -> String {
    format!("rule {rule}")
}

/// Returns the name of a middlebox' own set or chain.
pub(super) fn own_name(what: &str, mac: MacAddr) -> String {
    format!("{what}_{}", mac.to_string().replace(':', ""))
}

/// Splits the name of a set or chain into its network's prefix and the rest.
pub(super) fn split_prefix(name: &str) -> (&str, &str) {
    name.split_at(name.rfind('/').map_or(0, |at| at + 1))
}

/// Returns the middlebox whose own chain of filters has this name: the prefix of its network, and
/// its MAC.
pub(super) fn middlebox_of_chain(chain: &str) -> Option<(&str, MacAddr)> {
    let (prefix, name) = split_prefix(chain);
    Some((prefix, mac_of_chain(name)?))
}

fn mac_of_chain(chain: &str) -> Option<MacAddr> {
    let digits = chain.strip_prefix("filters_")?;
    let byte = |at: usize| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..12).step_by(2).map(byte).collect();
    bytes?.try_into().ok().map(MacAddr)
}
