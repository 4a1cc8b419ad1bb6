//! The pages of counters that guests read in their regions without a command.

use super::ControlPlane;
use super::channel::Channel;
use crate::backends::HostView;
use crate::bindings::Bindings;
use nfqd_rules::service::BackendRef;
use nfqd_rules::slots::{BackendView, Liveness, SlotKey};
use nfqd_rules::{MiddleboxKey, NetworkId};
use nfqd_shmctl::ring::{CounterPage, MiddleboxCounters};
use nfqd_shmctl::{Action, RuleId};
use std::time::{Duration, Instant, SystemTime};

/// The schedule of the updates; `due` is the earliest time of the next one.
#[derive(Debug, Default)]
pub struct CounterPages {
    due: Option<Instant>,
}

/// The minimum pause between updates, as a multiple of the duration of the last one, because commands
/// wait while the counters of many rules are read.
const PAUSE_FACTOR: u32 = 50;

impl ControlPlane {
    /// Writes the pages if they are due.
    pub(super) fn write_counter_pages(&mut self) {
        let start = Instant::now();
        let is_due = self.counter_pages.due.is_none_or(|due| due <= start);
        if !is_due || !self.channels.iter().any(|channel| channel.is_watched(start)) {
            return;
        }
        self.enforcer.read_counters();
        // A thread may still be at the first reading.
        let Some(age) = self.enforcer.counters_age() else { return };
        let read = SystemTime::now().checked_sub(age);
        let since = read.and_then(|read| read.duration_since(SystemTime::UNIX_EPOCH).ok());
        let time = since.unwrap_or_default().as_nanos() as u64;
        let networks: Vec<NetworkId> =
            (0..self.channels.len()).map(|at| self.network_of_channel(at)).collect();
        let bindings = Bindings::new(self.channels.iter().map(Channel::spec));
        let view = self.view(&bindings);
        let page = |(channel, network): (&Channel, NetworkId)| {
            if !channel.is_watched(start) {
                return None;
            }
            let keys = channel.spec().macs.iter().map(|mac| MiddleboxKey { network, mac: *mac });
            let middleboxes = keys.filter_map(|key| self.counters_of(&view, key)).collect();
            Some(CounterPage { time, middleboxes })
        };
        let pages: Vec<Option<CounterPage>> =
            self.channels.iter().zip(networks).map(page).collect();
        for (channel, page) in self.channels.iter_mut().zip(pages) {
            if let Some(page) = page {
                channel.write_counters(&page);
            }
        }
        let pause = (start.elapsed() * PAUSE_FACTOR).max(Duration::from_millis(500));
        self.counter_pages.due = Some(Instant::now() + pause);
    }

    /// Returns the counters of a middlebox, if it is registered.
    fn counters_of(&self, view: &HostView<'_>, key: MiddleboxKey) -> Option<MiddleboxCounters> {
        let middlebox = self.desired.policy.get(key)?;
        let network = self.desired.slots.network_of(key).unwrap_or(NetworkId::ANY);
        let counter = self.enforcer.middlebox_counter(key);
        let denies = |rule: &Option<RuleId>| rule.is_none_or(|rule| rule.action == Action::Deny);
        let rules = middlebox.rules_and_default().filter(denies);
        let mut out = MiddleboxCounters {
            mac: key.mac,
            has_firewall: middlebox.firewall().is_some(),
            has_services: !middlebox.services().is_empty(),
            packets: counter.packets,
            bytes: counter.bytes,
            denied: rules.map(|rule| self.enforcer.rule_counter(key, rule).packets).sum(),
            redirected: 0,
            backends: 0,
            dead: 0,
        };
        for (frontend, service) in middlebox.services() {
            for (name, backend) in service.backends() {
                let slot = SlotKey { middlebox: key, frontend: *frontend, backend: *name };
                out.redirected += self.enforcer.backend_counters(&slot).sent.packets;
                let reference = BackendRef { middlebox: key, frontend, service, name, backend };
                out.backends += 1;
                let liveness = view.observe(&reference, network).liveness;
                out.dead += u32::from(liveness == Liveness::Dead);
            }
        }
        Some(out)
    }
}
