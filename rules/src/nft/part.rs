//! What one middlebox adds to the ruleset: elements of the sets that stand, and sets and chains that stand as long as a
//! middlebox uses them.

use super::field::Value;
use super::filters::{filters, own_name};
use super::model::{Chain, Element, ElementData, Rule, Set, Statement, Verdict};
use super::ruleset::{FastPath, Ip, Options, Steer, accept, ask, commented, goto, rule};
use super::steps::RuleList;
use crate::mark::{self, OURS, Operation};
use crate::policy::Middlebox;
use crate::slots::{Slot, SlotKey, Slots};
use nfqd_shmctl::{Balance, MacAddr};
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

    /// Maps from a slot to addresses.
    fn backend(&mut self, key: SlotKey, slot: Slot) {
        let (ip, Slot { index, mac, .. }) = (Ip::of(key.backend), slot);
        let entry = |value: Value| Element {
            data: Some(ElementData::Value(value)),
            comment: Some(slot.comment(key)),
            ..Element::default()
        };
        let slot = vec![Value::Mark(mark::index_bits(index))];
        self.element(&ip.name("backends"), vec![Value::Ip(key.backend)], Element::default());
        self.element(&ip.name("backend_vip"), slot.clone(), entry(Value::Ip(key.vip)));
        // Without a MAC there is no way there: a flow that is cached misses and asks the engine.
        let Some(mac) = mac else { return };
        self.element(&ip.name("backend_ip"), slot.clone(), entry(Value::Ip(key.backend)));
        self.element("backend_mac", slot, entry(Value::Mac(mac)));
    }
}

/// Static redirects work without an engine. One rule a service, those for the packet's own destination address first; see
/// [`crate::decide::redirected`].
fn static_rules(middlebox: MacAddr, of: &Middlebox, slots: &Slots) -> Vec<Rule> {
    let mut own = Vec::new();
    let mut others = Vec::new();
    for (&vip, balance) in of.services() {
        let to = balance.destination();
        let key = SlotKey { middlebox, vip, backend: to.ip };
        let Some(Slot { index, mac: Some(_), .. }) = slots.get(&key) else { continue };
        let ip = Ip::of(vip);
        let mut conditions = vec![ip.is()];
        match balance {
            Balance::Static(_) => conditions.push(Statement::IsNot(ip.source, Value::Ip(to.ip))),
            Balance::Source(source, _) if *source == to.ip => continue,
            Balance::Source(source, _) => conditions.push(Statement::Is(ip.source, Value::Ip(*source))),
        }
        let operation = Operation::RedirectLearn as u32 | mark::index_bits(index);
        let redirect = vec![Statement::SetMark { keep: !OURS, set: operation }, goto("learn_flow")];
        let to_vip = Statement::Is(ip.destination, Value::Ip(vip));
        let comment = format!("R L {middlebox} {vip} {balance}");
        own.push(commented([conditions.clone(), vec![to_vip], redirect.clone()].concat(), &comment));
        others.push(commented([conditions, redirect].concat(), &comment));
    }
    if own.len() > 1 { [own, others].concat() } else { others }
}

impl Options {
    /// Whether the kernel filters at all: without the fast path the engine does, where it sees every frame.
    fn kernel_filters(&self) -> bool {
        self.fast_path == FastPath::Full || self.engine_is_blind()
    }
}
