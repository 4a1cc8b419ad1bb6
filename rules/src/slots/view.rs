//! The observed state of backends, as an interface: slots do not depend on how it is found out.

use crate::network::{MiddleboxKey, NetworkId};
use crate::service::BackendRef;
use nfqd_shmctl::MacAddr;

/// The observed state of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackendObservation {
    /// The MAC that packets to the backend are sent to.
    pub mac: Option<MacAddr>,
    /// Whether the backend is considered alive.
    pub alive: bool,
}

impl BackendObservation {
    /// An observation of nothing: a backend is alive until a check says otherwise.
    pub const UNKNOWN: BackendObservation = BackendObservation { mac: None, alive: true };
}

/// A source of observations of backends and middleboxes.
pub trait BackendView {
    /// Returns what has been observed of a backend; `network` is its middlebox'.
    fn observe(&self, backend: &BackendRef<'_>, network: NetworkId) -> BackendObservation;

    /// Returns the network that a middlebox is on. Without anything known about that, it is the one
    /// that it is registered for.
    fn network(&self, middlebox: MiddleboxKey) -> NetworkId {
        middlebox.network
    }
}

impl<F: Fn(&BackendRef<'_>) -> BackendObservation> BackendView for F {
    fn observe(&self, backend: &BackendRef<'_>, _: NetworkId) -> BackendObservation {
        let observed = self(backend);
        BackendObservation { mac: backend.backend.mac.or(observed.mac), ..observed }
    }
}

/// A view of a host that observes nothing: backends are where commands say.
#[derive(Clone, Copy, Debug)]
pub struct Unobserved;

impl BackendView for Unobserved {
    fn observe(&self, backend: &BackendRef<'_>, _: NetworkId) -> BackendObservation {
        BackendObservation { mac: backend.backend.mac, ..BackendObservation::UNKNOWN }
    }
}
