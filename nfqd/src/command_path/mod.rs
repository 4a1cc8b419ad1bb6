//! The path of a command: [`channel`] takes it from shared memory, [`authorise`] checks what the
//! channel may ask for, `transaction` applies it to the policy, has it enforced and saves it in the
//! [`journal`]; the reply goes back. `query` answers `Q`, [`command_file`] applies files.

pub mod authorise;
pub mod channel;
pub mod command_file;
pub mod journal;
mod query;
mod transaction;

use crate::backends::{Backends, HostView};
use crate::bindings::Bindings;
use crate::enforce::Enforcer;
use channel::Channel;
use journal::{Journal, JournalError};
use nfqd_rules::Desired;
use std::time::Instant;

/// The control plane: everything that commands change, and the means to enforce and save it.
pub struct ControlPlane {
    /// The channels of the guests.
    pub channels: Vec<Channel>,
    /// The desired state.
    pub desired: Desired,
    /// The observed state of backends.
    pub backends: Backends,
    /// The kernel and the engine.
    pub enforcer: Enforcer,
    /// The file of registrations.
    pub journal: Journal,
    /// The reason registrations are not saved at the moment.
    pub unsaved: Option<JournalError>,
    /// Whether there were not enough slot identifiers for all backends; tried again at every tick.
    pub lacks_ids: bool,
    /// Whether a command has named a backend whose MAC is not known yet.
    pub has_new_backend: bool,
}

impl ControlPlane {
    /// Gives every backend and middlebox of the policy a slot and an identifier, because what is
    /// observed of backends has changed.
    pub fn resync_slots(&mut self) {
        let bindings = Bindings::new(self.channels.iter().map(Channel::spec));
        let view = HostView { backends: &self.backends, bindings: &bindings };
        let Desired { policy, slots } = &mut self.desired;
        let is_enough = slots.sync_all(policy, &view, Instant::now());
        if !is_enough && !self.lacks_ids {
            log::error!(
                "too few slot identifiers for all backends; some backends get no packets until \
                 others are free"
            );
        }
        self.lacks_ids = !is_enough;
    }

    /// Does what is due once a second: observes backends, repairs the kernel's tables, and saves
    /// what could not be saved.
    pub fn tick(&mut self) {
        if self.backends.refresh(&self.desired.policy) || self.lacks_ids {
            // The counters of slots that are removed now are carried over from this reading.
            self.enforcer.read_counters();
            self.resync_slots();
            self.enforcer.mark_stale();
        }
        self.enforcer.expire_flows();
        self.enforcer.tick(&self.desired);
        if self.unsaved.is_some() {
            self.save();
        }
    }

    /// Saves all registrations.
    pub fn save(&mut self) {
        let result = self.journal.save(&self.desired.policy);
        self.record_saved(result);
    }

    fn record_saved(&mut self, result: Result<(), JournalError>) {
        if let Err(error) = &result
            && self.unsaved.is_none()
        {
            log::error!(
                "registrations cannot be saved: {error}. They stay in effect until nfqd exits; \
                 retrying every second"
            );
        }
        self.unsaved = result.err();
    }

    /// Warns about registrations that the bindings of the channels would not allow today. They
    /// stay: they may have been allowed when they were made, or be the operator's.
    pub fn warn_about_binding_violations(&self) {
        let bindings = Bindings::new(self.channels.iter().map(Channel::spec));
        for backend in self.desired.policy.backends() {
            let (mac, frontend, name) = (backend.middlebox, backend.frontend, backend.name);
            if !bindings.may_redirect_to(mac, name.ip) {
                log::warn!(
                    "{mac} {frontend} -> {name}: the channel of {mac} may not redirect there; what was \
                     registered before stays, 'X {mac} L {frontend}' ends it"
                );
            }
        }
    }
}
