//! Prefixes: every network has sets and chains of its own, which differ in the beginning of their
//! names. What no network owns, such as the maps of slots, has none.

use super::middlebox::MiddleboxPart;
use super::model::{Chain, Element, ElementData, Rule, Set, Statement, Table, Verdict, Write};
use super::names::SLOT_MAPS;
use std::collections::BTreeMap;

/// Sets and chains that all networks share, beside the maps of slots.
const SHARED: [&str; 4] = ["extension_headers", "icmp_errors", "icmp6_errors", "finish"];

fn is_shared(name: &str) -> bool {
    SHARED.contains(&name) || name.starts_with(SLOT_MAPS)
}

/// Returns a name with the prefix of a network, unless all networks share what it names.
fn prefixed(prefix: &str, name: &str) -> String {
    if is_shared(name) { name.to_string() } else { format!("{prefix}{name}") }
}

impl Table {
    /// Returns the table with the prefix of a network.
    pub(super) fn with_prefix(self, prefix: &str) -> Table {
        if prefix.is_empty() {
            return self;
        }
        let Table { family, sets, chains } = self;
        Table { family, sets: sets_with(prefix, sets), chains: chains_with(prefix, chains) }
    }
}

impl MiddleboxPart {
    /// Returns the part with the prefix of a network.
    pub(super) fn with_prefix(self, prefix: &str) -> MiddleboxPart {
        if prefix.is_empty() {
            return self;
        }
        let MiddleboxPart { network, elements, sets, chains, .. } = self;
        let set = |(name, elements): (String, BTreeMap<_, Element>)| {
            let elements =
                elements.into_iter().map(|(key, element)| (key, element_with(prefix, element)));
            (prefixed(prefix, &name), elements.collect())
        };
        MiddleboxPart {
            network,
            prefix: prefix.to_string(),
            elements: elements.into_iter().map(set).collect(),
            sets: sets_with(prefix, sets),
            chains: chains_with(prefix, chains),
        }
    }
}

fn sets_with(prefix: &str, sets: BTreeMap<String, Set>) -> BTreeMap<String, Set> {
    let one = |(name, mut set): (String, Set)| {
        let elements = set.elements.into_iter();
        set.elements =
            elements.map(|(key, element)| (key, element_with(prefix, element))).collect();
        (prefixed(prefix, &name), set)
    };
    sets.into_iter().map(one).collect()
}

fn chains_with(prefix: &str, chains: BTreeMap<String, Chain>) -> BTreeMap<String, Chain> {
    let one = |(name, chain): (String, Chain)| {
        let rules = chain.rules.into_iter().map(|rule| rule_with(prefix, rule)).collect();
        (prefixed(prefix, &name), Chain { rules, ..chain })
    };
    chains.into_iter().map(one).collect()
}

fn element_with(prefix: &str, element: Element) -> Element {
    let data = match element.data {
        Some(ElementData::Verdict(verdict)) => {
            Some(ElementData::Verdict(verdict_with(prefix, verdict)))
        }
        data => data,
    };
    Element { data, ..element }
}

fn rule_with(prefix: &str, rule: Rule) -> Rule {
    let statements = rule.statements.into_iter();
    Rule { statements: statements.map(|one| statement_with(prefix, one)).collect(), ..rule }
}

fn verdict_with(prefix: &str, verdict: Verdict) -> Verdict {
    match verdict {
        Verdict::Jump(chain) => Verdict::Jump(prefixed(prefix, &chain)),
        Verdict::Goto(chain) => Verdict::Goto(prefixed(prefix, &chain)),
        Verdict::Accept | Verdict::Drop | Verdict::Return => verdict,
    }
}

fn statement_with(prefix: &str, statement: Statement) -> Statement {
    let name = |name: String| prefixed(prefix, &name);
    match statement {
        Statement::In(key, set) => Statement::In(key, name(set)),
        Statement::Vmap(key, map) => Statement::Vmap(key, name(map)),
        Statement::RewriteBy { key, write: Write { field, map } } => {
            Statement::RewriteBy { key, write: Write { field, map: name(map) } }
        }
        Statement::RewriteFlow { key, flows, writes } => {
            Statement::RewriteFlow { key, flows: name(flows), writes }
        }
        Statement::MarkFlow { key, flows, slots, operation } => {
            Statement::MarkFlow { key, flows: name(flows), slots, operation }
        }
        Statement::Learn { key, map, timeout } => Statement::Learn { key, map: name(map), timeout },
        Statement::ForgetFlow { key, map } => Statement::ForgetFlow { key, map: name(map) },
        Statement::Note { key, data, map } => Statement::Note { key, data, map: name(map) },
        Statement::Remember { key, set, timeout } => {
            Statement::Remember { key, set: name(set), timeout }
        }
        Statement::Forget { key, set } => Statement::Forget { key, set: name(set) },
        Statement::Verdict(verdict) => Statement::Verdict(verdict_with(prefix, verdict)),
        // The maps of slots are shared.
        Statement::Rewrite(_)
        | Statement::Is(..)
        | Statement::IsNot(..)
        | Statement::Between(..)
        | Statement::Masked(..)
        | Statement::Present(_)
        | Statement::SetMark { .. }
        | Statement::Queue(_)
        | Statement::XtQueue(_)
        | Statement::Counter => statement,
    }
}
