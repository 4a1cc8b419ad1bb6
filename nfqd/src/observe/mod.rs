//! Observation of the daemon: [`status`] collects its state, [`control_socket`] serves it.

pub mod control_socket;
pub mod status;
