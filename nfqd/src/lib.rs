//! nfqd: enforces on the bridges of a KVM host what its middlebox VMs ask for.
//!
//! * The path of a packet is [`packet_path`], with the pure [`engine`] in the middle.
//! * The path of a command is [`command_path`], and then [`enforce`], which brings the desired state
//!   to the kernel and the engine.
//! * [`networks`] knows the bridges and VLANs, [`backends`] what is on them.
//! * [`startup`] takes the [`host_lock`], checks the process [`limits`], takes over the queues that the
//!   [`supervisor`] has kept, and builds the daemon;
//!   descriptors that outlive it are in the `descriptor_store`, which is the service manager's or a `holder`;
//!   [`daemon`] runs it on the [`reactor`], and `reload` reads its configuration again.
//! * [`api`] is what others ask the daemon, [`observe`] answers, [`cli`] prints.
//! * [`replay`] runs a capture through the engine, [`trace`] tells what would happen to a packet now.
//! * [`doctor`] examines the host and the running daemon, [`hook`] is called by libvirt,
//!   [`serve`] shows the status to browsers and Prometheus.
//!
//! `docs/ARCHITECTURE.md` shows both ways step by step.

pub mod api;
pub mod backends;
pub mod bindings;
pub mod cli;
pub mod command_path;
pub mod config;
pub mod daemon;
pub mod descriptor_store;
pub mod descriptors;
pub mod doctor;
pub mod enforce;
pub mod engine;
pub mod holder;
pub mod hook;
pub mod host_lock;
pub mod limits;
pub mod networks;
pub mod observe;
pub mod packet_path;
mod rate_limiter;
pub mod reactor;
mod reload;
pub mod replay;
mod rtnetlink;
pub mod serve;
pub mod startup;
pub mod supervisor;
pub mod trace;
