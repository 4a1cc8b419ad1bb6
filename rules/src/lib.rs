//! The policy of nfqd, without any packet I/O.
//!
//! * [`Policy`]: what is registered, changed by one command at a time.
//! * [`packet`]: what a frame says about itself.
//! * [`decide`]: what a packet deserves; pure.
//! * [`service`], [`pool`], [`maglev`]: load balancing, and which backend a new flow goes to.
//! * [`rewrite`]: how a redirected frame looks.
//! * [`mark`], [`slots`], [`nft`]: the fast path in nftables, which says the same in the kernel.

mod classifier;
pub mod decide;
pub mod filter;
pub mod maglev;
pub mod mark;
pub mod nft;
pub mod packet;
mod policy;
pub mod pool;
pub mod rewrite;
pub mod service;
pub mod slots;

pub use policy::{Filtered, Firewall, MAX_RULES, MAX_SERVICES, Middlebox, Policy};
