//! The base chains `answers` and `answers_in`: replies are translated where they leave, by a port of
//! the bridge or to the host itself.
//!
//! That is the order of the kernel's own NAT, source late: connection tracking, the host's firewall
//! and filters against forged addresses have seen a packet of the backend, as it was sent. The other
//! direction is rewritten before these, in [`super::flow`], [`super::learn`] and [`super::upcall`].

use super::learn::rewriting;
use crate::mark::{OPERATION, Operation, PORT};
use crate::nft::dsl::{accept, clear_mark, commented, goto, rule, set_of};
use crate::nft::family::{IpFamily, PORT_REWRITES, PortRewrite};
use crate::nft::field::{Field, Type, Value};
use crate::nft::model::{
    Base, Chain, Data, Element, ElementData, Hook, Rule, Statement, Table, Verdict,
};

/// Priority of the chains: before libvirt's filters of what a VM gets (NF_BR_PRI_NAT_SRC, 300) and
/// before connections are confirmed (the last one), so that these see what the client will.
const PRIORITY: i32 = 200;

/// The map of operations to chains.
const ANSWERS: &str = "answers";

/// Adds the chains, and the map that they use.
pub(super) fn add_answers(table: &mut Table) {
    let comment = "operation on a reply to the chain that translates it";
    let mut operations = set_of(&[Type::Mark], Some(Data::Verdict), comment);
    for ports in PORT_REWRITES {
        let chain = ports.chain("from_backend");
        for operation in Operation::REPLIES {
            let key = vec![Value::Mark(operation.bits(ports == PortRewrite::Translated))];
            let data = Some(ElementData::Verdict(Verdict::Goto(chain.clone())));
            operations.elements.insert(key, Element { data, ..Element::default() });
        }
        let mut rules = rewriting(ports, IpFamily::reply_writes);
        rules.iter_mut().for_each(|rule| rule.statements.push(goto("finish")));
        // Without a slot there is nothing to translate; the mark may also be another program's.
        rules.push(rule(vec![goto("finish")]));
        table.chains.insert(chain, Chain { base: None, rules });
    }
    table.sets.insert(ANSWERS.to_string(), operations);
    for (name, hook) in [("answers", Hook::Postrouting), ("answers_in", Hook::Input)] {
        let base = Some(Base { hook, priority: PRIORITY });
        table.chains.insert(name.to_string(), Chain { base, rules: rules() });
    }
}

/// Returns the rules for frames of the host itself, which are no replies of backends whatever other
/// programs mark them with.
pub(super) fn no_replies() -> [Rule; 3] {
    Operation::REPLIES.map(|operation| {
        let kind = Value::Mark(operation as u32);
        rule(vec![Statement::Is(Field::Mark(OPERATION & !PORT), kind), clear_mark()])
    })
}

/// Returns the rules of the chains. Most frames have no mark at all, which is tested first.
fn rules() -> Vec<Rule> {
    let unmarked = vec![Statement::Is(Field::Mark(u32::MAX), Value::Mark(0)), accept()];
    let operation = Statement::Vmap(vec![Field::Mark(OPERATION)], ANSWERS.to_string());
    vec![rule(unmarked), commented(vec![operation], "a reply to its translation")]
}
