//! What one middlebox adds to the ruleset: elements of the sets that stand, and sets and chains that stand as long as a
//! middlebox uses them.

use super::field::{Field, Value};
use super::filters::{filters, own_name};
use super::model::{Chain, Element, ElementData, Rule, Set, Statement, Verdict};
use super::ruleset::{FastPath, Ip, Options, Steer, accept, ask, commented, goto, rule};
use super::steps::RuleList;
use crate::mark::{self, OURS, Operation};
use crate::policy::Middlebox;
use crate::service::Service;
use crate::slots::{Slot, SlotKey, Slots};
use nfqd_shmctl::{MacAddr, Method, Vip};
use std::collections::BTreeMap;

/// What one middlebox adds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Part {
    /// Elements of sets that stand, by the set's name.
    pub elements: BTreeMap<String, BTreeMap<Vec<Value>, Element>>,
    /// Sets of its own and sets that it shares with middleboxes of equal shapes; the elements are its own.
    pub sets: BTreeMap<String, Set>,
    /// Chains of its own, and chains that it shares in the same way.
    pub chains: BTreeMap<String, Chain>,
}

impl Part {
    /// What `middlebox`, whose MAC is `mac`, adds.
    pub(super) fn new(mac: MacAddr, middlebox: &Middlebox, slots: &Slots, options: &Options) -> Part {
        Part::with(mac, middlebox, &RuleList::new(mac, middlebox), slots, options)
    }

    /// The same with other rules than its own, on the way to these.
    pub(super) fn with(
        mac: MacAddr,
        middlebox: &Middlebox,
        rules: &RuleList,
        slots: &Slots,
        options: &Options,
    ) -> Part {
        let mut part = Part::default();
        let comment = middlebox.ip().map(|ip| ip.to_string());
        part.element("middleboxes", vec![Value::Mac(mac)], Element { comment, ..Element::default() });
        part.filters(mac, rules, options);
        // Where the kernel filters, the engine need not know a middlebox that balances nothing.
        let asked = options.fast_path == FastPath::Off || !middlebox.services().is_empty();
        if options.steer == Steer::BrNetfilter
            && asked
            && let Some(index) = slots.middlebox(mac)
        {
            part.own_chain(
                "ask",
                mac,
                Some(index.to_string()),
                vec![rule(vec![ask(index), Statement::Counter, accept()])],
            );
        }
        if !middlebox.services().is_empty() {
            part.element("balanced", vec![Value::Mac(mac)], Element::default());
            part.own_chain("static_redirects", mac, None, static_rules(mac, middlebox, slots));
            middlebox.services().iter().for_each(|(vip, service)| part.service(mac, vip, service));
        }
        slots.of(mac).for_each(|(key, slot)| part.backend(key, slot));
        part
    }

    fn element(&mut self, set: &str, key: Vec<Value>, element: Element) {
        // Two services may name one backend; the first stays.
        self.elements.entry(set.to_string()).or_default().entry(key).or_insert(element);
    }

    fn jump(&mut self, map: &str, mac: MacAddr, comment: Option<String>, chain: &str) {
        let data = Some(ElementData::Verdict(Verdict::Jump(chain.to_string())));
        self.element(map, vec![Value::Mac(mac)], Element { data, comment, ..Element::default() });
    }

    /// A chain of its own, which a map of verdicts leads to.
    fn own_chain(&mut self, map: &str, mac: MacAddr, comment: Option<String>, rules: Vec<Rule>) {
        let chain = own_name(map, mac);
        self.jump(map, mac, comment, &chain);
        self.chains.insert(chain, Chain { priority: None, rules });
    }

    fn filters(&mut self, mac: MacAddr, rules: &RuleList, options: &Options) {
        if !options.kernel_filters() {
            return;
        }
        let filters = filters(mac, rules);
        let Some(chain) = &filters.chain else { return };
        self.jump("filters", mac, None, chain);
        if options.engine_is_blind() && rules.looks_at_tags() {
            self.jump("tag_filters", mac, None, chain);
        }
        if filters.closed {
            let comment = Some("rule default".to_string());
            self.element("closed", vec![Value::Mac(mac)], Element { comment, ..Element::default() });
        }
        self.sets.extend(filters.sets);
        self.chains.extend(filters.chains);
    }

    /// What the engine is asked about.
    fn service(&mut self, mac: MacAddr, vip: &Vip, service: &Service) {
        let ip = Ip::of(vip.ip);
        let (mac, address) = (Value::Mac(mac), Value::Ip(vip.ip));
        let whole = !service.method().is_pool() && !service.terms().dsr;
        let mut add = |set: &str, key: Vec<Value>| self.element(&ip.name(set), key, Element::default());
        match vip.port {
            None if whole => add("service_all", vec![mac]),
            None => add("service_addresses", vec![mac, address]),
            Some(port) => {
                add("service_ports", vec![mac, address, Value::Port(port)]);
                add("service_pieces", vec![mac, address]);
            }
        }
    }

    /// Maps from a slot to addresses and ports.
    fn backend(&mut self, key: SlotKey, slot: Slot) {
        let (ip, Slot { index, mac, dsr, .. }) = (Ip::of(key.backend.ip), slot);
        let entry = |value: Value| Element {
            data: Some(ElementData::Value(value)),
            comment: Some(slot.comment(key)),
            ..Element::default()
        };
        let slot = vec![Value::Mark(mark::index_bits(index))];
        if !dsr {
            self.element(&ip.name("backends"), vec![Value::Ip(key.backend.ip)], Element::default());
        }
        self.element(&ip.name("backend_vip"), slot.clone(), entry(Value::Ip(key.vip.ip)));
        // Without a MAC there is no way there: a flow that is cached misses and asks the engine.
        let Some(mac) = mac else { return };
        let address = if dsr { key.vip.ip } else { key.backend.ip };
        self.element(&ip.name("backend_ip"), slot.clone(), entry(Value::Ip(address)));
        self.element("backend_mac", slot.clone(), entry(Value::Mac(mac)));
        if let Some((vport, port)) = key.ports() {
            self.element("backend_port", slot.clone(), entry(Value::Port(port)));
            self.element("backend_vport", slot, entry(Value::Port(vport)));
        }
    }
}

/// Static redirects work without an engine. One rule a service, those that go before others first; see
/// [`crate::decide::service`].
fn static_rules(middlebox: MacAddr, of: &Middlebox, slots: &Slots) -> Vec<Rule> {
    let mut ranked = Vec::new();
    let all = of.services();
    let several = all.len() > 1;
    for (&vip, service) in all {
        let ip = Ip::of(vip.ip);
        let to_vip = Statement::Is(ip.destination, Value::Ip(vip.ip));
        let mut conditions = vec![ip.is()];
        if let Some(protocol) = vip.protocol {
            conditions.push(Statement::Is(Field::L4Protocol, Value::Protocol(protocol)));
        }
        if let Some(port) = vip.port {
            conditions.push(Statement::Is(Field::DestinationPort, Value::Port(port)));
        }
        match service.method() {
            Method::Static => {}
            Method::Source(source) => conditions.push(Statement::Is(ip.source, Value::Ip(source))),
            // Which backend is the engine's to say; it is not another service's packet.
            _ => {
                let rank = (false, vip.port.is_none(), vip.protocol.is_none());
                conditions.push(to_vip);
                conditions.push(goto("finish"));
                ranked.push((rank, rule(conditions)));
                continue;
            }
        }
        let Some(backend) = service.only_backend() else { continue };
        conditions.push(Statement::IsNot(ip.source, Value::Ip(backend.ip)));
        let key = SlotKey { middlebox, vip, backend };
        let to = slots.get(&key).filter(|slot| slot.mac.is_some());
        let Some(Slot { index, dsr, .. }) = to else { continue };
        let translated = key.ports().is_some();
        let learn = Operation::RedirectLearn.bits(translated) | mark::index_bits(index);
        let chain = if translated { "learn_flow_port" } else { "learn_flow" };
        let redirect = vec![Statement::SetMark { keep: !OURS, set: learn }, goto(chain)];
        let comment: Vec<String> = service.commands(middlebox, vip).iter().map(ToString::to_string).collect();
        let own = [conditions.clone(), vec![to_vip], redirect.clone()].concat();
        let rank = (false, vip.port.is_none(), vip.protocol.is_none());
        let whole = vip.port.is_none() && !dsr;
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

impl Options {
    /// Whether the kernel filters at all: without the fast path the engine does, where it sees every frame.
    fn kernel_filters(&self) -> bool {
        self.fast_path == FastPath::Full || self.engine_is_blind()
    }
}
