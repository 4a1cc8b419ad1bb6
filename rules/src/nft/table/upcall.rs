//! The chain `engine` and the tables of the ip families: the path into the queue, and what connection
//! tracking sees of packets that come from there.

use super::own::mark_rules;
use super::{BaseTable, QUEUE_PRIORITY, UNTRACKED_PRIORITY};
use crate::mark::{OPERATION, Operation, Origin, PORT, UPCALL};
use crate::nft::dsl::{accept, commented, rule, upcall, verdict};
use crate::nft::family::{CACHED_PROTOCOLS, IPV4, IPV6, IpFamily};
use crate::nft::field::{Field, Value};
use crate::nft::model::{
    Base, Chain, Family, Hook, Queues, Rule, Statement, Table, Verdict, Write,
};
use crate::nft::options::QueuePath;

impl BaseTable<'_> {
    pub(super) fn upcall_chain(&mut self) {
        let network = Origin::Network(self.network);
        let rules = match self.options.queue_path {
            QueuePath::Native => {
                let queue = Statement::Queue(without_engine(self.options.queues));
                vec![rule(vec![upcall(network), Statement::Counter, queue])]
            }
            QueuePath::BrNetfilter => vec![
                rule(vec![Statement::Vmap(vec![Field::EtherDestination], "upcall".to_string())]),
                rule(vec![upcall(network), Statement::Counter, accept()]),
            ],
        };
        self.chain("engine", [mark_rules(), rules].concat());
    }
}

/// Returns the queues with `bypass` set: without nfqd, packets pass the queue, and the chain
/// `unanswered` decides on them. A full queue still drops, unless it was opened to let packets pass.
fn without_engine(queues: Queues) -> Queues {
    Queues { bypass: true, ..queues }
}

/// Returns the table that queues marked packets on their way through br_netfilter.
pub(in crate::nft) fn queueing_table(family: Family, queues: Queues) -> Table {
    let statements = vec![
        Statement::Is(Field::Mark(UPCALL), Value::Mark(Operation::Upcall as u32)),
        Statement::Counter,
        Statement::XtQueue(without_engine(queues)),
    ];
    let comment = "to the engine: xt target NFQUEUE, which nft does not show";
    let to_queue = commented(statements, comment);
    let mut table = Table::new(family);
    let ip = if family == Family::Ip { IPV4 } else { IPV6 };
    let to_backend = tracked_rules(ip, ["backend_ip", "backend_port"]);
    let mut back = tracked_rules(ip, ["backend_vip", "backend_vport"]);
    back.extend(Operation::TRACKED.map(|operation| {
        let is = Statement::Is(Field::Mark(OPERATION & !PORT), Value::Mark(operation as u32));
        commented(vec![is, verdict(Verdict::Drop)], "its slot has just been removed")
    }));
    // The engine has the chain repeated for packets that are to be rewritten.
    let to_engine = [vec![unmarked(), to_queue], to_backend].concat();
    let back = [vec![unmarked()], back].concat();
    for (name, priority, rules) in
        [("to_engine", QUEUE_PRIORITY, to_engine), ("after_tracking", UNTRACKED_PRIORITY, back)]
    {
        let base = Some(Base { hook: Hook::Prerouting, priority });
        table.chains.insert(name.to_string(), Chain { base, rules });
    }
    table
}

/// Returns the rule that accepts packets without a mark, which are most.
fn unmarked() -> Rule {
    rule(vec![Statement::Is(Field::Mark(u32::MAX), Value::Mark(0)), accept()])
}

/// Returns the rules that write addresses and ports of redirected packets.
///
/// Connection tracking must see the packet as its backend will. But br_netfilter treats a packet whose
/// destination has changed as translated by NAT and routes it (br_nf_pre_routing_finish,
/// net/bridge/br_netfilter_hooks.c), for which the host needs an address. Therefore the original
/// destination is restored after connection tracking, and the bridge table translates the packet.
fn tracked_rules(ip: IpFamily, [addresses, ports]: [&str; 2]) -> Vec<Rule> {
    let address = || Write { field: ip.destination, map: ip.name(addresses) };
    let port = || Write { field: Field::DestinationPort, map: ports.to_string() };
    let is = |bits: u32| Statement::Is(Field::Mark(OPERATION), Value::Mark(bits));
    let mut out = Vec::new();
    for operation in Operation::TRACKED {
        let kept = vec![is(operation.bits(false)), Statement::Rewrite(vec![address()]), accept()];
        out.push(rule(kept));
        for protocol in CACHED_PROTOCOLS {
            let rewrite = vec![Statement::Rewrite(vec![address(), port()]), accept()];
            let is = vec![is(operation.bits(true))];
            out.push(rule([is, protocol.is(ip), rewrite].concat()));
        }
    }
    out
}
