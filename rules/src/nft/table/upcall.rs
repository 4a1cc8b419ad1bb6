//! The chain `engine` and the tables of the ip families: the path into the queue.

use super::own::mark_rules;
use super::{BaseTable, QUEUE_PRIORITY};
use crate::mark::{Operation, Origin, UPCALL};
use crate::nft::dsl::{accept, commented, rule, upcall};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Base, Chain, Family, Hook, Queues, Statement, Table};
use crate::nft::options::QueuePath;

impl BaseTable<'_> {
    pub(super) fn upcall_chain(&mut self) {
        let network = Origin::Network(self.network);
        let rules = match self.options.queue_path {
            QueuePath::Native => {
                let queue = Statement::Queue(self.options.queues);
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

/// Returns the table that queues marked packets on their way through br_netfilter.
pub(in crate::nft) fn queueing_table(family: Family, queues: Queues) -> Table {
    let statements = vec![
        Statement::Is(Field::Mark(UPCALL), Value::Mark(Operation::Upcall as u32)),
        Statement::Counter,
        Statement::XtQueue(queues),
    ];
    let rule = commented(statements, "to the engine: xt target NFQUEUE, which nft does not show");
    let mut table = Table::new(family);
    let base = Base { hook: Hook::Prerouting, priority: QUEUE_PRIORITY };
    let chain = Chain { base: Some(base), rules: vec![rule] };
    table.chains.insert("to_engine".to_string(), chain);
    table
}
