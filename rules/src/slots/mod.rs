//! Slots: the backends of services as the fast path knows them, each with an identifier that packet
//! marks and the kernel's flow caches carry.
//!
//! An identifier is quarantined before another backend gets it, until no cached flow can still
//! carry it.

mod allocator;
mod table;
#[cfg(test)]
mod tests;
mod version;
mod view;

pub use table::{MAX_QUARANTINED, QUARANTINE, Slots};
pub use version::SlotVersion;
pub use view::{BackendObservation, BackendView, Liveness, Unobserved};

use crate::ids::SlotId;
use crate::network::{MiddleboxKey, NetworkId};
use nfqd_shmctl::{BackendName, Frontend, MacAddr, ParseValueError};
use std::fmt;
use std::str::FromStr;

/// The backend of a service that a slot stands for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SlotKey {
    /// The middlebox.
    pub middlebox: MiddleboxKey,
    /// The frontend of the service.
    pub frontend: Frontend,
    /// The backend; it has a port if and only if the frontend has one.
    pub backend: BackendName,
}

impl SlotKey {
    /// Returns the ports of frontend and backend, if they differ and are translated into each
    /// other.
    pub fn ports(&self) -> Option<(u16, u16)> {
        self.frontend.port.zip(self.backend.port).filter(|(frontend, backend)| frontend != backend)
    }
}

impl fmt::Display for SlotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}", self.middlebox, self.frontend, self.backend)
    }
}

impl FromStr for SlotKey {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<SlotKey, ParseValueError> {
        let (service, backend) = text.split_once(" -> ").ok_or(ParseValueError)?;
        let (middlebox, frontend) = service.split_once(' ').ok_or(ParseValueError)?;
        Ok(SlotKey {
            middlebox: middlebox.parse()?,
            frontend: frontend.parse()?,
            backend: backend.parse()?,
        })
    }
}

/// A slot in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// The identifier.
    pub id: SlotId,
    /// The backend's MAC, once it is known.
    pub mac: Option<MacAddr>,
    /// The health of the backend.
    pub liveness: Liveness,
    /// Whether the backend owns the frontend's address, so that only the MAC is rewritten.
    pub dsr: bool,
    /// The network of the middlebox, which its backends are on.
    pub network: NetworkId,
    fingerprint: u32,
}

impl Slot {
    /// Returns the comment of the kernel map elements of this slot, whose key is `key`.
    pub fn comment(self, key: SlotKey) -> String {
        SlotVersion { key, fingerprint: self.fingerprint }.to_string()
    }
}
