//! Collection of the parts of the status.

use crate::api::{
    BackendState, BackendStatus, FlowTableStatus, MiddleboxStatus, QueueStatus, RuleStatus,
    ServiceStatus,
};
use crate::backends::{Backends, HostView};
use crate::bindings::Bindings;
use crate::enforce::Enforcer;
use crate::packet_path::worker::Worker;
use nfqd_rules::nft::filters::linear_rules;
use nfqd_rules::nft::options::FastPath;
use nfqd_rules::service::BackendRef;
use nfqd_rules::service::Service;
use nfqd_rules::slots::{BackendView, SlotKey};
use nfqd_rules::{Desired, Middlebox};
use nfqd_shmctl::{Frontend, MacAddr, RuleId};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

/// The sources of the status.
pub struct StatusSource<'a> {
    desired: &'a Desired,
    enforcer: &'a Enforcer,
    view: HostView<'a>,
}

impl<'a> StatusSource<'a> {
    /// The sources.
    pub fn new(
        desired: &'a Desired,
        enforcer: &'a Enforcer,
        backends: &'a Backends,
        bindings: &'a Bindings<'a>,
    ) -> StatusSource<'a> {
        StatusSource { desired, enforcer, view: HostView { backends, bindings } }
    }

    /// Returns the status of the queues.
    pub fn queues(&self) -> Vec<QueueStatus> {
        self.enforcer.workers().iter().map(queue_status).collect()
    }

    /// Returns the status of the flow table.
    pub fn flow_table(&self) -> FlowTableStatus {
        let flows = self.enforcer.flows();
        let evictions = flows.evictions();
        FlowTableStatus {
            count: flows.len(),
            capacity: flows.capacity(),
            evicted: evictions.total,
            evicted_established: evictions.established,
            cache_full_packets: self.enforcer.cache_full_packets().clone(),
        }
    }

    /// Returns the status of all middleboxes.
    pub fn middleboxes(&self) -> Vec<MiddleboxStatus> {
        let macs = self.desired.policy.middleboxes().keys();
        macs.filter_map(|mac| self.middlebox(*mac)).collect()
    }

    /// Returns the status of a middlebox, if it is registered.
    pub fn middlebox(&self, mac: MacAddr) -> Option<MiddleboxStatus> {
        let middlebox = self.desired.policy.get(mac)?;
        let counter = self.enforcer.middlebox_counter(mac);
        let services = middlebox.services().iter();
        Some(MiddleboxStatus {
            mac: mac.to_string(),
            firewall: middlebox.firewall().map(|firewall| firewall.ip().to_string()),
            packets: counter.packets,
            bytes: counter.bytes,
            commands: middlebox.commands(mac).iter().map(ToString::to_string).collect(),
            rules: self.rules(mac, middlebox),
            services: services.map(|(frontend, its)| self.service(mac, frontend, its)).collect(),
        })
    }

    fn rules(&self, mac: MacAddr, middlebox: &Middlebox) -> Vec<RuleStatus> {
        let mut reasons: BTreeMap<RuleId, String> = BTreeMap::new();
        if self.enforcer.options().fast_path == FastPath::Full {
            for (rule, reason) in linear_rules(mac, middlebox) {
                reasons.insert(rule, reason.to_string());
            }
        }
        let mut out = Vec::new();
        for rule in middlebox.rules_and_default() {
            let counter = self.enforcer.rule_counter(mac, rule);
            out.push(RuleStatus {
                rule: rule.map_or("default".to_string(), |rule| rule.to_string()),
                packets: counter.packets,
                bytes: counter.bytes,
                not_indexed: rule.and_then(|rule| reasons.remove(&rule)),
            });
        }
        out
    }

    fn service(&self, middlebox: MacAddr, frontend: &Frontend, service: &Service) -> ServiceStatus {
        let mut backends = Vec::new();
        for (name, backend) in service.backends() {
            let reference = BackendRef { middlebox, frontend, service, name, backend };
            backends.push(self.backend(&reference));
        }
        ServiceStatus { vip: frontend.to_string(), method: service.method().to_string(), backends }
    }

    fn backend(&self, reference: &BackendRef<'_>) -> BackendStatus {
        let BackendRef { middlebox, frontend, service, name, backend } = *reference;
        let key = SlotKey { middlebox, frontend: *frontend, backend: *name };
        let slot = self.desired.slots.get(&key);
        let observed = self.view.observe(reference);
        let counters = self.enforcer.backend_counters(&key);
        let mac = backend.mac.or(observed.mac);
        let state = if !observed.alive && service.method().is_pool() {
            BackendState::Dead
        } else if mac.is_none() {
            BackendState::Unresolved
        } else if backend.draining {
            BackendState::Draining
        } else {
            BackendState::Up
        };
        let unknown = self.view.backends.health_unknown_reason(service, name, backend);
        BackendStatus {
            backend: name.to_string(),
            mac: mac.map(|mac| mac.to_string()),
            state,
            weight: backend.weight,
            flows: slot.map_or(0, |slot| self.enforcer.flows().live(slot.id)),
            packets: counters.sent.packets,
            bytes: counters.sent.bytes,
            reply_packets: counters.received.packets,
            reply_bytes: counters.received.bytes,
            health_unknown_reason: unknown.map(str::to_string),
        }
    }
}

fn queue_status(worker: &Worker) -> QueueStatus {
    let counters = &worker.counters;
    QueueStatus {
        queue: worker.queue,
        alive: worker.is_alive(),
        packets: counters.packets.load(Relaxed),
        dropped: counters.dropped.load(Relaxed),
        rejected: counters.rejected.load(Relaxed),
        redirected: counters.redirected.load(Relaxed),
        reply_translated: counters.reply_translated.load(Relaxed),
        overruns: counters.overruns.load(Relaxed),
    }
}
