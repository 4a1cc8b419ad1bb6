//! Collection of the parts of the status.

use crate::api::{
    BackendState, BackendStatus, FlowTableStatus, MiddleboxStatus, QueueStatus, RuleStatus,
    ServiceStatus,
};
use crate::backends::{HostView, own_addresses};
use crate::enforce::Enforcer;
use crate::packet_path::worker::Worker;
use nfqd_rules::nft::filters::linear_rules;
use nfqd_rules::nft::options::FastPath;
use nfqd_rules::service::BackendRef;
use nfqd_rules::service::Service;
use nfqd_rules::slots::{BackendView, Liveness, SlotKey};
use nfqd_rules::{Desired, Middlebox, MiddleboxKey, Network, NetworkId};
use nfqd_shmctl::{Frontend, RuleId};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::sync::atomic::Ordering::Relaxed;

/// The sources of the status.
pub struct StatusSource<'a> {
    desired: &'a Desired,
    enforcer: &'a Enforcer,
    view: HostView<'a>,
    host_devices: &'a BTreeSet<String>,
}

/// Returns the devices by which the host sends packets of its own, or routes.
pub fn host_devices() -> BTreeSet<String> {
    let is_routable = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    };
    let devices = own_addresses().into_iter().filter(|(_, ip)| is_routable(ip));
    devices.map(|(device, _)| device).collect()
}

impl<'a> StatusSource<'a> {
    /// The sources; `host_devices` are those of [`host_devices`].
    pub fn new(
        desired: &'a Desired,
        enforcer: &'a Enforcer,
        view: HostView<'a>,
        host_devices: &'a BTreeSet<String>,
    ) -> StatusSource<'a> {
        StatusSource { desired, enforcer, view, host_devices }
    }

    /// Returns the status of all middleboxes.
    pub fn middleboxes(&self) -> Vec<MiddleboxStatus> {
        self.keys_from(Bound::Unbounded).filter_map(|key| self.middlebox(key)).collect()
    }

    /// Returns the registered middleboxes from one on, in their order.
    pub fn keys_from(&self, first: Bound<MiddleboxKey>) -> impl Iterator<Item = MiddleboxKey> {
        let all = self.desired.policy.middleboxes();
        all.range((first, Bound::Unbounded)).map(|(key, _)| *key)
    }

    /// Returns the status of a middlebox, if it is registered.
    pub fn middlebox(&self, key: MiddleboxKey) -> Option<MiddleboxStatus> {
        let middlebox = self.desired.policy.get(key)?;
        let counter = self.enforcer.middlebox_counter(key);
        let network = self.desired.slots.network_of(key);
        let name = network.and_then(|network| self.desired.networks.name(network));
        let services = middlebox.services().iter();
        Some(MiddleboxStatus {
            mac: key.mac.to_string(),
            network: name.map(ToString::to_string),
            network_problem: self.network_problem(key, network),
            not_balanced: self.not_balanced(middlebox, name),
            flood: self.enforcer.flood_of(key),
            firewall: middlebox.firewall().map(|firewall| firewall.ip().to_string()),
            packets: counter.packets,
            bytes: counter.bytes,
            commands: middlebox.commands(key.mac).iter().map(ToString::to_string).collect(),
            rules: self.rules(key, middlebox),
            services: services.map(|(frontend, its)| self.service(key, frontend, its)).collect(),
        })
    }

    /// Returns what of a middlebox' traffic its services do not take. For what the host itself sends,
    /// the bridge has chosen the port before any hook could choose a backend.
    fn not_balanced(&self, middlebox: &Middlebox, network: Option<&Network>) -> Option<String> {
        let device = self.view.host.host_device(network?)?;
        let is_host_there = self.host_devices.contains(&device);
        let has_services = !middlebox.services().is_empty();
        (is_host_there && has_services).then(|| {
            format!("the host has an address on {device}: what it sends or routes is filtered, not balanced")
        })
    }

    /// Returns what is wrong with the network of a middlebox.
    fn network_problem(&self, key: MiddleboxKey, network: Option<NetworkId>) -> Option<String> {
        let others: Vec<String> = self.view.host.also_on(key).map(ToString::to_string).collect();
        match network {
            None => Some("another channel has registered this MAC on the same network".to_string()),
            Some(NetworkId::ANY) => Some(
                "not seen on any network yet: filtered on all, and nothing is redirected"
                    .to_string(),
            ),
            Some(_) if !others.is_empty() => Some(format!(
                "its MAC is seen on {} as well; bind its channel with bridge= and vlan=",
                others.join(", ")
            )),
            Some(_) => None,
        }
    }

    fn rules(&self, key: MiddleboxKey, middlebox: &Middlebox) -> Vec<RuleStatus> {
        let mut reasons: BTreeMap<RuleId, String> = BTreeMap::new();
        if self.enforcer.options().fast_path == FastPath::Full {
            for (rule, reason) in linear_rules(key.mac, middlebox) {
                reasons.insert(rule, reason.to_string());
            }
        }
        let mut out = Vec::new();
        for rule in middlebox.rules_and_default() {
            let counter = self.enforcer.rule_counter(key, rule);
            out.push(RuleStatus {
                rule: rule.map_or("default".to_string(), |rule| rule.to_string()),
                packets: counter.packets,
                bytes: counter.bytes,
                not_indexed: rule.and_then(|rule| reasons.remove(&rule)),
            });
        }
        out
    }

    fn service(
        &self,
        middlebox: MiddleboxKey,
        frontend: &Frontend,
        service: &Service,
    ) -> ServiceStatus {
        let mut backends = Vec::new();
        for (name, backend) in service.backends() {
            let reference = BackendRef { middlebox, frontend, service, name, backend };
            backends.push(self.backend(&reference));
        }
        ServiceStatus {
            vip: frontend.to_string(),
            method: service.method().to_string(),
            panic: self.view.backends.is_panicking(middlebox, frontend),
            backends,
        }
    }

    fn backend(&self, reference: &BackendRef<'_>) -> BackendStatus {
        let BackendRef { middlebox, frontend, service, name, backend } = *reference;
        let key = SlotKey { middlebox, frontend: *frontend, backend: *name };
        let slot = self.desired.slots.get(&key);
        let network = self.desired.slots.network_of(middlebox).unwrap_or(NetworkId::ANY);
        let observed = self.view.observe(reference, network);
        let counters = self.enforcer.backend_counters(&key);
        let mac = observed.mac;
        let state = match observed.liveness {
            Liveness::Dead => BackendState::Dead,
            Liveness::Failing => BackendState::Failing,
            Liveness::Drained => BackendState::Drained,
            Liveness::Alive if mac.is_none() => BackendState::Unresolved,
            Liveness::Alive if backend.drain.is_some() => BackendState::Draining,
            Liveness::Alive => BackendState::Up,
        };
        let given = backend.mac.filter(|_| mac.is_none());
        let misplaced = given.and_then(|given| self.view.misplaced_reason(given, network));
        let isolated = mac
            .zip(self.desired.networks.name(network))
            .filter(|(mac, network)| self.view.host.is_isolated(network, *mac));
        let problem = misplaced.or(isolated.map(|_| ISOLATED));
        let unknown = self.view.backends.health_unknown_reason(network, service, name, backend);
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
            network_problem: problem.map(str::to_string),
            fails_checks: observed.liveness != Liveness::Drained
                && (state == BackendState::Dead
                    || state == BackendState::Failing
                    || self.view.backends.is_vouched_for(&key)),
        }
    }
}

/// The note about a backend behind an isolated port.
const ISOLATED: &str = "its port is isolated: clients behind isolated ports cannot reach it (bridge link set isolated)";

/// Returns the status of the queues.
pub fn queues(enforcer: &Enforcer) -> Vec<QueueStatus> {
    enforcer.workers().iter().map(queue_status).collect()
}

/// Returns the status of the flow table.
pub fn flow_table(enforcer: &Enforcer) -> FlowTableStatus {
    let flows = enforcer.flows();
    let evictions = flows.evictions();
    FlowTableStatus {
        count: flows.len(),
        capacity: flows.capacity(),
        evicted: evictions.total,
        evicted_established: evictions.established,
        cache_full_packets: enforcer.cache_full_packets().clone(),
        full_maps: enforcer.full_maps().clone(),
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
