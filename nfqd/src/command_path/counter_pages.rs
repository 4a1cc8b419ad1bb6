//! The pages of counters that guests read in their regions without asking.

use super::ControlPlane;
use super::channel::Channel;
use crate::bindings::Bindings;
use nfqd_rules::service::BackendRef;
use nfqd_rules::slots::{BackendView, Liveness, SlotKey};
use nfqd_rules::{MiddleboxKey, NetworkId};
use nfqd_shmctl::ring::{CounterPage, MiddleboxCounters};
use std::time::{Duration, Instant, SystemTime};

/// When the pages are written next.
#[derive(Debug, Default)]
pub struct CounterPages {
    due: Option<Instant>,
}

/// The share of the time that is spent on the pages, as a divisor: with many rules, reading their
/// counters takes long, and commands wait meanwhile.
const TIME_SHARE: u32 = 50;

impl ControlPlane {
    /// Writes the pages if they are due.
    pub(super) fn write_counter_pages(&mut self) {
        let start = Instant::now();
        let is_due = self.counter_pages.due.is_none_or(|due| due <= start);
        if !is_due || !self.channels.iter().any(Channel::has_counters) {
            return;
        }
        self.enforcer.read_counters(&self.desired);
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let time = since.map_or(0, |since| since.as_nanos() as u64);
        for at in 0..self.channels.len() {
            let network = self.network_of_channel(at);
            let Some(channel) = self.channels.get(at).filter(|channel| channel.has_counters())
            else {
                continue;
            };
            let keys = channel.spec().macs.iter().map(|mac| MiddleboxKey { network, mac: *mac });
            let middleboxes = keys.filter_map(|key| self.counters_of(key)).collect();
            if let Some(channel) = self.channels.get_mut(at) {
                channel.write_counters(&CounterPage { time, middleboxes });
            }
        }
        let pause = (start.elapsed() * TIME_SHARE).max(Duration::from_millis(500));
        self.counter_pages.due = Some(Instant::now() + pause);
    }

    /// Returns the counters of a middlebox, if it is registered.
    fn counters_of(&self, key: MiddleboxKey) -> Option<MiddleboxCounters> {
        let middlebox = self.desired.policy.get(key)?;
        let bindings = Bindings::new(self.channels.iter().map(Channel::spec));
        let view = self.view(&bindings);
        let network = self.desired.slots.network_of(key).unwrap_or(NetworkId::ANY);
        let counter = self.enforcer.middlebox_counter(key);
        let rules = middlebox.rules_and_default();
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
