//! The fast path: the policy as nftables.
//!
//! * [`ruleset`] says what tables, chains, sets and elements a policy needs; pure.
//! * [`model`] is what such a ruleset is made of, and its text in nft's own words.
//! * [`field`] names the packet fields and the values they are compared with.
//! * `lower` turns a statement into the kernel's expressions, as data.
//! * `sys` is the only module with `unsafe`: it hands that data to libnftnl.
//! * [`kernel`] loads a ruleset, and the difference between two, in one transaction each.

pub mod field;
pub mod kernel;
mod lower;
pub mod model;
pub mod ruleset;
mod sys;
