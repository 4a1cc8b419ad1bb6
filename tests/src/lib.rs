//! Support for tests that cross crates: network namespaces, TAP devices, a running daemon, random
//! frames.
//!
//! Every topology lives in network namespaces that the test itself makes, and ends with its
//! processes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod captures;
pub mod counting;
pub mod daemon;
pub mod doorbell;
pub mod echo;
pub mod fixture;
pub mod frames;
pub mod fuzz;
pub mod load;
pub mod netns;
pub mod pool;
pub mod segment;
pub mod tap;
pub mod topology;
pub mod vm;
