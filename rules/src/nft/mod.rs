//! The fast path: the ruleset in nftables that implements the policy.
//!
//! From the bottom up:
//!
//! * [`model`] and [`field`]: tables, sets, chains and statements as values, and their text in nft's
//!   own words. `lower` turns a statement into the kernel's expressions; `sys`, the only module with
//!   `unsafe`, passes those to libnftnl.
//! * [`options`], `family`, `names`, `dsl`: the building blocks of rules.
//! * `table`: the base table and the part of a network, in the order a packet meets them.
//! * `prefix`, `dispatch`: each network's sets and chains, and the maps that lead to them.
//! * [`filters`], `middlebox`: the part of a middlebox, its filters among it.
//! * [`build`], [`delta`]: the ruleset of a desired state, and the difference between two rulesets.
//! * [`kernel`]: loads a ruleset or makes a change, in one transaction each.

pub mod build;
pub mod delta;
mod dispatch;
mod dsl;
mod family;
pub mod field;
pub mod filters;
pub mod kernel;
mod lower;
mod middlebox;
pub mod model;
mod names;
pub mod options;
mod prefix;
mod sys;
mod table;
