//! The path of a packet through nfqd: [`queue`] receives it, [`worker`] has the engine decide and
//! sends the verdict. [`fragments`] holds later fragments, [`reject`] writes the answers to
//! rejected packets, and [`inject`] sends them.

pub mod fragments;
pub mod inject;
pub mod queue;
pub mod recorder;
pub mod reject;
pub mod worker;
