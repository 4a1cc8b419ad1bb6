//! A middlebox' part of the ruleset: elements of the permanent sets, and the sets and chains that
//! exist while a middlebox uses them.

use super::dsl::{accept, commented, goto, rule, upcall};
use super::family::IpFamily;
use super::field::{Field, Value};
use super::filters::{RuleList, filters};
use super::model::{Chain, Element, ElementData, Rule, Set, Statement, Verdict};
use super::names::own_name;
use super::options::{FastPath, QueuePath, RulesetOptions};
use super::table::MiddleboxKind;
use crate::desired::Desired;
use crate::mark::{self, OURS, Operation, Origin};
use crate::network::{MiddleboxKey, NetworkId};
use crate::policy::Middlebox;
use crate::service::Service;
use crate::slots::{Slot, SlotKey, Slots};
use nfqd_shmctl::{Frontend, MacAddr, Method};
use std::collections::BTreeMap;

/// The part of one middlebox.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct MiddleboxPart {
    /// The network that the middlebox is on.
    pub network: NetworkId,
    /// The beginning of the names of the network's sets and chains.
    pub prefix: String,
    /// Elements of permanent sets, by the set's name.
    pub elements: BTreeMap<String, BTreeMap<Vec<Value>, Element>>,
    /// Sets of its own, and sets that it shares with middleboxes of equal shapes; the elements are
    /// its own.
    pub sets: BTreeMap<String, Set>,
    /// Chains of its own, and chains that it shares in the same way.
    pub chains: BTreeMap<String, Chain>,
}

impl MiddleboxPart {
    /// Returns the part of a middlebox; `None` if it is not registered or on no network.
    pub(super) fn new(
        key: MiddleboxKey,
        desired: &Desired,
        options: &RulesetOptions,
    ) -> Option<MiddleboxPart> {
        let middlebox = desired.policy.get(key)?;
        MiddleboxPart::with(key, &RuleList::new(key.mac, middlebox), desired, options)
    }

    /// Returns the part with other rules than its own, on the way to these.
    pub(super) fn with(
        key: MiddleboxKey,
        rules: &RuleList,
        desired: &Desired,
        options: &RulesetOptions,
    ) -> Option<MiddleboxPart> {
        let network = desired.slots.network_of(key)?;
        let part = MiddleboxPart { network, ..MiddleboxPart::default() };
        let middlebox = desired.policy.get(key)?;
        let part = part.fill(key, middlebox, rules, &desired.slots, options);
        Some(part.with_prefix(&desired.networks.prefix(network)))
    }

    fn fill(
        mut self,
        key: MiddleboxKey,
        middlebox: &Middlebox,
        rules: &RuleList,
        slots: &Slots,
        options: &RulesetOptions,
    ) -> MiddleboxPart {
        let (part, mac) = (&mut self, key.mac);
        let comment = middlebox.ip().map(|ip| ip.to_string());
        let has_filters = part.filters(mac, rules, options);
        let has_services = !middlebox.services().is_empty();
        let entry = MiddleboxKind { has_filters, has_services }.entry(options);
        let data = Some(ElementData::Verdict(entry));
        let element = Element { data, comment, ..Element::default() };
        part.element("middleboxes", vec![Value::Mac(mac)], element);
        let network = part.network;
        for ip in middlebox.addresses().filter(|ip| slots.owner(network, *ip) == Some(key)) {
            let data = Some(ElementData::Value(Value::Mac(mac)));
            let set = IpFamily::of(ip).name("addresses");
            part.element(&set, vec![Value::Ip(ip)], Element { data, ..Element::default() });
        }
        // If the kernel filters, the engine need not know a middlebox without services.
        let asked = options.fast_path == FastPath::Off || !middlebox.services().is_empty();
        if options.queue_path == QueuePath::BrNetfilter
            && asked
            && let Some(id) = slots.middlebox_id(key)
        {
            part.own_chain(
                "upcall",
                mac,
                Some(format!("{id} {key}")),
                vec![rule(vec![upcall(Origin::Middlebox(id)), Statement::Counter, accept()])],
            );
        }
        if !middlebox.services().is_empty() {
            part.element("with_services", vec![Value::Mac(mac)], Element::default());
            for ip in slots.counted(key) {
                let set = IpFamily::of(ip).name("backends");
                part.element(&set, vec![Value::Ip(ip)], Element::default());
            }
            part.own_chain("static_redirects", mac, None, static_rules(key, middlebox, slots));
            middlebox
                .services()
                .iter()
                .for_each(|(frontend, service)| part.service(mac, frontend, service));
        }
        slots.of(key).for_each(|(key, slot)| part.backend(key, slot));
        self
    }

    fn element(&mut self, set: &str, key: Vec<Value>, element: Element) {
        // Two services may name one backend; the first stays.
        self.elements.entry(set.to_string()).or_default().entry(key).or_insert(element);
    }

    fn jump(&mut self, map: &str, mac: MacAddr, comment: Option<String>, chain: &str) {
        let data = Some(ElementData::Verdict(Verdict::Jump(chain.to_string())));
        self.element(map, vec![Value::Mac(mac)], Element { data, comment, ..Element::default() });
    }

    /// A chain of the middlebox alone, which a verdict map leads to.
    fn own_chain(&mut self, map: &str, mac: MacAddr, comment: Option<String>, rules: Vec<Rule>) {
        let chain = own_name(map, mac);
        self.jump(map, mac, comment, &chain);
        self.chains.insert(chain, Chain { base: None, rules });
    }

    /// Adds the filters. Returns whether there are any.
    fn filters(&mut self, mac: MacAddr, rules: &RuleList, options: &RulesetOptions) -> bool {
        if !options.kernel_filters() {
            return false;
        }
        let filters = filters(mac, rules);
        let Some(chain) = &filters.chain else { return false };
        self.jump("filters", mac, None, chain);
        if options.engine_is_blind() && rules.depends_on_tags() {
            self.jump("tag_filters", mac, None, chain);
        }
        if filters.closed {
            let comment = Some("rule default".to_string());
            self.element(
                "closed",
                vec![Value::Mac(mac)],
                Element { comment, ..Element::default() },
            );
        }
        self.sets.extend(filters.sets);
        self.chains.extend(filters.chains);
        true
    }

    /// The elements that send packets to the engine.
    fn service(&mut self, mac: MacAddr, frontend: &Frontend, service: &Service) {
        let ip = IpFamily::of(frontend.ip);
        let (mac, address) = (Value::Mac(mac), Value::Ip(frontend.ip));
        let whole = !service.method().is_pool() && !service.options().dsr;
        let mut add =
            |set: &str, key: Vec<Value>| self.element(&ip.name(set), key, Element::default());
        for name in service.backends().keys() {
            add("watched", vec![Value::Ip(name.ip)]);
        }
        match frontend.port {
            None if whole => add("service_all", vec![mac]),
            None => add("service_addresses", vec![mac, address]),
            Some(port) => {
                add("service_ports", vec![mac, address, Value::Port(port)]);
                add("service_pieces", vec![mac, address]);
            }
        }
    }

    /// The maps from slots to addresses and ports.
    fn backend(&mut self, key: SlotKey, slot: Slot) {
        let (ip, Slot { id, mac, dsr, .. }) = (IpFamily::of(key.backend.ip), slot);
        let entry = |value: Value| Element {
            data: Some(ElementData::Value(value)),
            comment: Some(slot.comment(key)),
            ..Element::default()
        };
        let slot = vec![Value::Mark(mark::slot_bits(id))];
        self.element(&ip.name("backend_vip"), slot.clone(), entry(Value::Ip(key.frontend.ip)));
        // A backend whose MAC is unknown has no element: the look-up of a cached flow misses, and
        // the packet goes to the engine.
        let Some(mac) = mac else { return };
        let address = if dsr { key.frontend.ip } else { key.backend.ip };
        self.element(&ip.name("backend_ip"), slot.clone(), entry(Value::Ip(address)));
        self.element("backend_mac", slot.clone(), entry(Value::Mac(mac)));
        if let Some((vport, port)) = key.ports() {
            self.element("backend_port", slot.clone(), entry(Value::Port(port)));
            self.element("backend_vport", slot, entry(Value::Port(vport)));
        }
    }
}

/// Static redirects work without an engine. Each service is one rule, in the order of precedence;
/// see [`crate::policy`].
fn static_rules(middlebox: MiddleboxKey, of: &Middlebox, slots: &Slots) -> Vec<Rule> {
    let mut ranked = Vec::new();
    let all = of.services();
    let several = all.len() > 1;
    for (&frontend, service) in all {
        let ip = IpFamily::of(frontend.ip);
        let to_vip = Statement::Is(ip.destination, Value::Ip(frontend.ip));
        let mut conditions = vec![ip.is()];
        if let Some(protocol) = frontend.protocol {
            conditions.push(Statement::Is(Field::L4Protocol, Value::Protocol(protocol)));
        }
        if let Some(port) = frontend.port {
            conditions.push(Statement::Is(Field::DestinationPort, Value::Port(port)));
        }
        match service.method() {
            Method::Static => {}
            Method::Source(source) => conditions.push(Statement::Is(ip.source, Value::Ip(source))),
            // Only the engine knows the backend; no later service takes the packet.
            _ => {
                let rank = (false, frontend.port.is_none(), frontend.protocol.is_none());
                conditions.push(to_vip);
                conditions.push(goto("unanswered_pool"));
                ranked.push((rank, rule(conditions)));
                continue;
            }
        }
        let Some(backend) = service.only_backend() else { continue };
        conditions.push(Statement::IsNot(ip.source, Value::Ip(backend.ip)));
        let key = SlotKey { middlebox, frontend, backend };
        let to = slots.get(&key).filter(|slot| slot.mac.is_some());
        let Some(Slot { id, dsr, .. }) = to else { continue };
        let translated = key.ports().is_some();
        let learn = Operation::RedirectInstall.bits(translated) | mark::slot_bits(id);
        let chain = if translated { "learn_flow_port" } else { "learn_flow" };
        let redirect = vec![Statement::SetMark { keep: !OURS, set: learn }, goto(chain)];
        let comment: Vec<String> =
            service.commands(middlebox.mac, frontend).iter().map(ToString::to_string).collect();
        let own = [conditions.clone(), vec![to_vip], redirect.clone()].concat();
        let rank = (false, frontend.port.is_none(), frontend.protocol.is_none());
        let whole = frontend.port.is_none() && !dsr;
        if several || !whole {
            ranked.push((rank, commented(own, &comment.join("; "))));
        }
        if whole {
            let any = [conditions, redirect].concat();
            ranked.push(((true, true, true), commented(any, &comment.join("; "))));
        }
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, rule)| rule).collect()
}
