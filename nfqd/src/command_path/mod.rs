//! The path of a command: [`channel`] takes it from shared memory, [`authorise`] checks what the
//! channel may ask for and `quotas` how much, `transaction` applies it to the policy, has it enforced and saves it in the
//! [`journal`]; the reply goes back. `query` answers `Q`, [`counter_pages`] tells a guest its counters, [`command_file`] applies files, [`attached`] keeps
//! the channels that were added while the daemon ran.

pub mod attached;
pub mod authorise;
pub mod channel;
pub mod command_file;
pub mod counter_pages;
pub mod journal;
mod query;
mod quotas;
mod transaction;

use crate::backends::{Backends, HostView};
use crate::bindings::Bindings;
use crate::config::Transport;
use crate::enforce::Enforcer;
use crate::networks::HostNetworks;
use attached::{AttachError, AttachedChannels};
use channel::{Channel, ChannelResources, VsockClient};
use counter_pages::CounterPages;
use journal::{Journal, JournalError};
use nfqd_rules::service::BackendRef;
use nfqd_rules::slots::SlotKey;
use nfqd_rules::{Desired, MiddleboxKey, NetworkId, Policy};
use nfqd_shmctl::ErrorCode;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Instant;

/// The control plane: everything that commands change, and the means to enforce and save it.
pub struct ControlPlane {
    /// The channels of the guests.
    pub channels: Vec<Channel>,
    /// The resources that the channels share.
    pub resources: Rc<ChannelResources>,
    /// The ways by which the channels of the configuration arrive.
    pub configured: BTreeSet<Transport>,
    /// The channels that were attached to the running daemon.
    pub attached: AttachedChannels,
    /// The desired state.
    pub desired: Desired,
    /// The bridges and VLANs of the host.
    pub host: HostNetworks,
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
    /// The pages of counters in the regions.
    pub counter_pages: CounterPages,
}

/// The most VMs that are accepted by vsock in a row.
const MAX_ACCEPTED: u32 = 16;

/// Whether a middlebox has services.
pub fn has_services(policy: &Policy, key: MiddleboxKey) -> bool {
    policy.get(key).is_some_and(|middlebox| !middlebox.services().is_empty())
}

impl ControlPlane {
    /// Gives every backend and middlebox of the policy a slot and an identifier, because what is
    /// observed of backends has changed.
    pub fn resync_slots(&mut self) {
        let bindings = Bindings::new(self.channels.iter().map(Channel::spec));
        let Desired { policy, slots, networks } = &mut self.desired;
        let (backends, host) = (&self.backends, &self.host);
        let view = HostView { backends, host, networks, bindings: &bindings };
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
        self.resources.store().follow();
        self.channels.iter_mut().for_each(Channel::follow);
        if self.host.is_stale() {
            self.follow_networks();
        }
        let noted = self.enforcer.neighbours(&self.desired);
        // A thread's reading is to be recent when somebody asks.
        if self.backends.needs_activity() || self.enforcer.reads_counters_by_thread() {
            self.enforcer.read_counters();
        }
        let (desired, enforcer) = (&self.desired, &self.enforcer);
        let activity = |key: &SlotKey| Some(enforcer.activity(key, desired.slots.get(key)?.id));
        let is_changed = self.backends.refresh(desired, &self.host, &noted, activity);
        let has_expired = !desired.slots.with_expired_backends(Instant::now()).is_empty();
        if is_changed || has_expired || self.lacks_ids {
            self.follow_observations();
        }
        self.enforcer.expire_flows();
        self.enforcer.meter_new_flows(&self.desired);
        self.enforcer.tick(&self.desired);
        self.write_counter_pages();
        match self.journal.check() {
            Ok(()) if self.unsaved.is_none() => {}
            Ok(()) => self.save(),
            lost => self.record_saved(lost),
        }
    }

    /// Handles what has happened to the links of channels: rings, connections, lines.
    pub fn follow_channels(&mut self, now: Instant) {
        let events = match self.resources.events() {
            Ok(events) => events,
            Err(errno) => {
                log::error!("channels cannot be waited for: {errno}");
                return;
            }
        };
        for event in events {
            if event.is_vsock_connection() {
                // A few at a time: others wait as well.
                (0..MAX_ACCEPTED).all(|_| self.accept_by_vsock(now));
            } else if let Some(channel) = self.channels.iter_mut().find(|its| its.has(event)) {
                channel.handle(event, now);
            }
        }
        self.poll_channels(now);
    }

    /// Ends what belongs to this process alone, before it exits.
    pub fn suspend_channels(&mut self) {
        self.channels.iter_mut().for_each(Channel::suspend);
        // Who has a doorbell and is connected goes on with the next nfqd.
        if self.channels.iter().all(|channel| channel.is_connected() != Some(true)) {
            self.resources.store().release();
        }
    }

    /// Accepts a VM that has connected by vsock. Returns whether there was one.
    fn accept_by_vsock(&mut self, now: Instant) -> bool {
        let Some(stream) = self.resources.accept_by_vsock() else { return false };
        let Ok(client) = VsockClient::new(stream) else { return true };
        let transport = Transport::Vsock(client.cid);
        match self.channels.iter_mut().find(|channel| channel.spec().transport == transport) {
            Some(channel) => channel.accept(client, now),
            None => {
                let cid = client.cid;
                log::debug!("vsock: a VM with CID {cid}, which has no channel, was refused");
                let reason =
                    format!("this VM, CID {cid}, has no channel; start nfqd with --vsock {cid}");
                client.refuse(ErrorCode::Denied, &reason);
            }
        }
        true
    }

    /// Gives slots anew, because observations have changed; the kernel follows at the next tick.
    fn follow_observations(&mut self) {
        // The counters of slots that are removed now are carried over from the last reading: this one, unless a
        // thread makes it.
        self.enforcer.read_counters();
        self.resync_slots();
        self.enforcer.mark_stale();
    }

    /// Follows changes of the host's networks: ports, bridges, VLANs, and where MACs are seen.
    pub fn follow_networks(&mut self) {
        let changes = match self.host.follow() {
            Ok(changes) => changes,
            Err(errno) => {
                log::error!("bridges and their ports cannot be read: {errno}");
                return;
            }
        };
        if changes.is_empty() {
            return;
        }
        let before = self.desired.networks.clone();
        if changes.concern_ports() {
            self.host.describe(&mut self.desired.networks);
        }
        let policy = &self.desired.policy;
        let middleboxes: Vec<MiddleboxKey> = policy.middleboxes().keys().copied().collect();
        let concerns = |key: &MiddleboxKey| changes.concern(key.mac);
        let given = |backend: BackendRef<'_>| backend.backend.mac;
        let is_concerned = middleboxes.iter().any(concerns)
            || policy.backends().filter_map(given).any(|mac| changes.concern(mac));
        if !is_concerned {
            return;
        }
        let Desired { policy, networks, .. } = &mut self.desired;
        let is_moved = self.host.place(middleboxes.iter().copied(), networks);
        for key in middleboxes.iter().filter(|key| changes.concern(key.mac)) {
            self.host.note_port(*key, has_services(policy, *key), networks);
        }
        self.follow_observations();
        if is_moved || !before.is_same(&self.desired.networks) {
            // A new port must not wait; a failure is logged and tried again.
            self.enforcer.tick(&self.desired);
        }
    }

    /// Adds a channel, `NAME[,KEY=VALUE]…`, and keeps it over a restart. One that is there already with
    /// the same keys stays as it is.
    ///
    /// # Errors
    /// If it is not valid, or its region cannot be used; nothing is changed then.
    pub fn attach(&mut self, text: &str) -> Result<(), AttachError> {
        let (text, spec) = AttachedChannels::parse(text)?;
        let there = self.channels.iter().find(|its| its.spec().transport == spec.transport);
        match there.map(Channel::spec) {
            Some(its) if *its == spec => return Ok(()),
            Some(_) => return Err(AttachError::Taken(spec.transport)),
            None => {}
        }
        let channel = Channel::open(&spec, &self.resources).refuse_mistake();
        let channel = channel.map_err(|error| AttachError::Region(error.to_string()))?;
        let mut channel = channel;
        let added = match channel.error() {
            // A VM would not start without its server. A region, or vsock, may come later.
            Some(error) if matches!(spec.transport, Transport::Doorbell(_)) => {
                Err(AttachError::Region(error))
            }
            _ => self.attached.add(text, spec),
        };
        if let Err(error) = added {
            channel.end();
            return Err(error);
        }
        log::info!("{}: attached", channel.spec().transport);
        self.channels.push(channel);
        self.warn_about_binding_violations();
        Ok(())
    }

    /// Removes a channel that was attached. What its guest has registered stays. With keys behind the
    /// name, only a channel with these keys is removed.
    ///
    /// # Errors
    /// If there is none of this name, or it has other keys.
    pub fn detach(&mut self, text: &str) -> Result<(), AttachError> {
        let asked = AttachedChannels::parse(text)?.1;
        let transport = asked.transport.clone();
        let spec = self.attached.specs().find(|spec| spec.transport == transport).cloned();
        let spec = spec.ok_or_else(|| AttachError::Unknown(transport.clone()))?;
        if text.contains(',') && asked != spec {
            return Err(AttachError::OtherKeys(transport));
        }
        self.attached.remove(&transport)?;
        let is_configured = self.configured.contains(&transport);
        self.channels.retain_mut(|channel| {
            let stays = is_configured || channel.spec().transport != transport;
            if !stays {
                channel.end();
            }
            stays
        });
        log::info!("{transport}: detached");
        Ok(())
    }

    /// Returns the view of the host that slots and the status are made from.
    pub fn view<'a>(&'a self, bindings: &'a Bindings<'a>) -> HostView<'a> {
        let ControlPlane { backends, host, desired, .. } = self;
        HostView { backends, host, networks: &desired.networks, bindings }
    }

    /// Returns the network that a channel is bound to.
    pub fn network_of_channel(&mut self, channel: usize) -> NetworkId {
        let network = self.channels.get(channel).and_then(|channel| channel.spec().network.clone());
        let id = network.and_then(|network| self.desired.networks.intern(&network));
        id.unwrap_or(NetworkId::ANY)
    }

    /// Saves all registrations.
    pub fn save(&mut self) {
        let result = self.journal.save(&self.desired);
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
            let (key, frontend, name) = (backend.middlebox, backend.frontend, backend.name);
            let mac = key.mac;
            if !bindings.may_redirect_to(key, name.ip) {
                log::warn!(
                    "{mac} {frontend} -> {name}: the channel of {mac} may not redirect there; what was \
                     registered before stays, 'X {mac} L {frontend}' ends it"
                );
            }
        }
    }
}
