//! The observed state of backends, as an interface: slots do not depend on how it is found out.

use crate::service::BackendRef;
use nfqd_shmctl::MacAddr;

/// The observed state of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BackendObservation {
    /// The MAC that answers for the backend's address.
    pub mac: Option<MacAddr>,
    /// Whether the backend is considered alive.
    pub alive: bool,
}

impl BackendObservation {
    /// An observation of nothing: a backend is alive until a check says otherwise.
    pub const UNKNOWN: BackendObservation = BackendObservation { mac: None, alive: true };
}

/// A source of observations.
pub trait BackendView {
    /// Returns what has been observed of a backend.
    fn observe(&self, backend: &BackendRef<'_>) -> BackendObservation;
}

impl<F: Fn(&BackendRef<'_>) -> BackendObservation> BackendView for F {
    fn observe(&self, backend: &BackendRef<'_>) -> BackendObservation {
        self(backend)
    }
}

/// A view of a host that observes nothing.
#[derive(Clone, Copy, Debug)]
pub struct Unobserved;

impl BackendView for Unobserved {
    fn observe(&self, _: &BackendRef<'_>) -> BackendObservation {
        BackendObservation::UNKNOWN
    }
}
