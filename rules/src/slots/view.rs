//! The observed state of backends, as an interface: slots do not depend on how it is found out.

use crate::network::{MiddleboxKey, NetworkId};
use crate::service::BackendRef;
use nfqd_shmctl::MacAddr;

/// The health of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Liveness {
    /// The backend gets new flows.
    Alive,
    /// The backend fails its checks, but answers on its flows: it keeps them and gets no new ones.
    Failing,
    /// The backend fails its checks and answers nothing: the service's `on-dead` decides about its flows.
    Dead,
    /// The time that the backend had for its last flows is over.
    Drained,
}

/// The observed state of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackendObservation {
    /// The MAC that packets to the backend are sent to.
    pub mac: Option<MacAddr>,
    /// The health.
    pub liveness: Liveness,
}

impl BackendObservation {
    /// An observation of nothing: a backend is alive until a check says otherwise.
    pub const UNKNOWN: BackendObservation =
        BackendObservation { mac: None, liveness: Liveness::Alive };
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
