//! The observed state of backends, as an interface: slots do not depend on how it is found out.

use crate::service::{Backend, Service};
use nfqd_shmctl::{BackendName, Frontend, MacAddr};

/// A backend of a service in a policy.
#[derive(Clone, Copy, Debug)]
pub struct BackendRef<'p> {
    /// The middlebox.
    pub middlebox: MacAddr,
    /// The frontend of the service.
    pub frontend: &'p Frontend,
    /// The service.
    pub service: &'p Service,
    /// The backend's name.
    pub name: &'p BackendName,
    /// The backend as it is registered.
    pub backend: &'p Backend,
}

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
