//! Observation of the daemon: [`status`] collects its state, [`report`] makes an answer of it, and
//! [`control_socket`] serves it.

pub mod control_socket;
pub mod report;
pub mod status;
