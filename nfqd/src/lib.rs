//! nfqd: enforces on a KVM host's bridge what its middlebox VMs ask for.
//!
//! A packet's way: [`queue`], [`worker`], [`engine`], and back. A command's way: [`channel`], [`daemon`], and from there
//! to the engine's snapshot, the kernel and the disk. `docs/ARCHITECTURE.md` shows both.

pub mod channel;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod flows;
pub mod neighbours;
pub mod netlink;
pub mod queue;
pub mod replay;
pub mod state;
pub mod status;
pub mod watch;
pub mod worker;
