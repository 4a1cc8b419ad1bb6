//! The policy of nfqd and the fast path in nftables that implements it. No packet I/O.
//!
//! * [`Policy`]: what is registered, changed by one command at a time.
//! * [`packet`]: the parsed headers of a frame.
//! * [`filter`], [`service`]: filter rules and load-balanced services of a middlebox.
//! * [`pool`], [`maglev`]: which backend a new flow goes to.
//! * [`rewrite`]: the frame as it leaves.
//! * [`network`]: the networks of a host, which keep their addresses apart.
//! * [`slots`], [`ids`], [`mark`], [`timeouts`]: what the engine and the kernel share.
//! * [`netlink`]: framing of netlink messages.
//! * [`nft`]: the fast path, which decides in the kernel as the policy says.
//!
//! The modules above `nft` do not depend on it.

pub mod counter;
pub mod desired;
pub mod filter;
pub mod ids;
pub mod limits;
pub mod maglev;
pub mod mark;
pub mod netlink;
pub mod network;
pub mod nft;
pub mod packet;
pub mod policy;
pub mod pool;
pub mod rewrite;
pub mod service;
pub mod slots;
pub mod timeouts;

pub use counter::Counter;
pub use desired::Desired;
pub use ids::{MiddleboxId, SlotId};
pub use network::{MiddleboxKey, Network, NetworkId, Networks};
pub use policy::{FilterDecision, Firewall, Middlebox, Policy, PolicyError};
