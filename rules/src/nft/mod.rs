//! The fast path: the policy as nftables.
//!
//! * [`ruleset`] says what tables, chains, sets and elements a policy needs: a frame that stands, and what each middlebox
//!   adds to it (`part`), its filters among that ([`filters`]); pure.
//! * `steps` are the way from one list of rules to another.
//! * [`delta`] says what a change of the policy changes there, from the changed middleboxes alone; pure.
//! * [`model`] is what such a ruleset is made of, and its text in nft's own words.
//! * [`field`] names the packet fields and the values they are compared with.
//! * `lower` turns a statement into the kernel's expressions, as data.
//! * `sys` is the only module with `unsafe`: it hands that data to libnftnl.
//! * [`kernel`] loads a ruleset, or makes a change, in one transaction.

pub mod delta;
pub mod field;
pub mod filters;
pub mod kernel;
mod lower;
pub mod model;
mod part;
pub mod ruleset;
mod steps;
mod sys;
