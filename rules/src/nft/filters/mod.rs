//! Filter rules of a middlebox in nftables.
//!
//! Rules that compare the same fields have the same *shape*. Exact rules of all middleboxes are
//! elements of one hash set per shape, whose key begins with the middlebox' MAC. Rules with
//! prefixes or ranges are elements of an interval set per shape and middlebox: the kernel clones an
//! interval set for every transaction on it and searches all its elements at once
//! (nft_set_pipapo.c), so that a common one would make each middlebox pay for all others. Rules
//! that no set can hold are *linear*: rules in a chain of their middlebox.
//!
//! A packet meets only the shapes of its own middlebox: a map leads to a chain of look-ups, which
//! middleboxes of equal shapes share.
//!
//! `shape` finds the shape of a rule, `interval` what an interval set can hold, `placement`
//! where each rule of a `rule_list` goes. `chains` makes the sets and chains of that,
//! `transition` the steps from one rule list to another.

mod chains;
mod interval;
mod placement;
mod rule_list;
mod shape;
mod transition;

pub(super) use chains::filters;
pub use placement::{LinearReason, linear_rules};
pub(super) use rule_list::RuleList;
