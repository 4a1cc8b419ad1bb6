//! nfqd: enforces on a KVM host's bridge what its middlebox VMs ask for.
//!
//! A packet's way: [`queue`], [`worker`], [`engine`], and back. A command's way: [`channel`], [`daemon`], [`enforce`] (the kernel
//! and the engine's snapshot), [`state`] (the disk). `docs/ARCHITECTURE.md` shows both.

pub mod backends;
pub mod bindings;
pub mod channel;
pub mod config;
pub mod daemon;
pub mod enforce;
pub mod engine;
pub mod held;
pub mod inject;
pub mod netlink;
pub mod queue;
pub mod refusal;
pub mod replay;
pub mod state;
pub mod status;
mod steer;
pub mod watch;
pub mod worker;
