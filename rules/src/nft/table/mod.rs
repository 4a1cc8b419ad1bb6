//! The base table: the part in the bridge family that does not depend on the policy, and the part
//! of each network.
//!
//! The files follow a packet's order: [`own`] for one of a middlebox, [`steer`], [`filter`],
//! [`reply`], [`flow`], [`upcall`], behind the engine [`learn`], and where it leaves [`answers`]. Base chains are made once and stay, because deleting one drops
//! every packet that waits in a queue. `docs/ARCHITECTURE.md` draws the path of a packet.

mod answers;
mod filter;
mod flow;
mod learn;
mod own;
mod reply;
mod sets;
mod steer;
mod upcall;

pub(super) use steer::MiddleboxKind;
pub(super) use upcall::queueing_table;

use super::model::{Base, Chain, Family, Hook, Rule, TABLE_LAYOUT, Table};
use super::names::layout_chain;
use super::options::{FastPath, QueuePath, RulesetOptions};
use crate::network::NetworkId;

/// Priority of the chains `steer` and `host`: before br_netfilter (0), and before the bridge learns or
/// forwards.
const STEER_PRIORITY: i32 = -300;
/// Priority of the chain `learn`: behind br_netfilter's hook, in which the queue is.
const LEARN_PRIORITY: i32 = 100;
/// Priority of the same chain where the queue is in the bridge: before connection tracking (-200) and
/// br_netfilter (0) see the packet.
const LEARN_NATIVE_PRIORITY: i32 = -250;
/// Priority of the ip and ip6 chains that queue: before the host's connection tracking reassembles
/// fragments (NF_IP_PRI_RAW_BEFORE_DEFRAG), so that the engine sees what the bridge sees.
const QUEUE_PRIORITY: i32 = -450;
/// Priority of the ip and ip6 chains that take back what connection tracking was shown: right behind it
/// (-200), before other programs change marks (NF_IP_PRI_MANGLE, -150).
const UNTRACKED_PRIORITY: i32 = -199;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
/// The flags of TCP segments that begin or end a connection, which the engine must see.
const CONNECTION_FLAGS: u8 = FIN | SYN | RST;

/// The part of a network while it is being built.
struct BaseTable<'a> {
    table: Table,
    options: &'a RulesetOptions,
    network: NetworkId,
}

/// Returns the part that all networks share, without the dispatch to them.
pub(super) fn base_table() -> Table {
    let mut table = Table::new(Family::Bridge);
    table.sets = sets::shared_sets();
    table.chains.insert("finish".to_string(), learn::finish_chain());
    answers::add_answers(&mut table);
    table.chains.insert(layout_chain(TABLE_LAYOUT), Chain::default());
    table
}

/// Returns the name and the hook of a base chain, and the rules before the dispatch to networks.
pub(super) fn base_chain(name: &'static str, path: QueuePath) -> (&'static str, Base, Vec<Rule>) {
    let learn = || learn::nothing_to_do().to_vec();
    let (name, hook, priority, rules) = match (name, path) {
        ("learn", QueuePath::BrNetfilter) => (name, Hook::Prerouting, LEARN_PRIORITY, learn()),
        ("learn", QueuePath::Native) => {
            ("learn_early", Hook::Prerouting, LEARN_NATIVE_PRIORITY, learn())
        }
        ("host", _) => (name, Hook::Output, STEER_PRIORITY, answers::no_replies().to_vec()),
        _ => (name, Hook::Prerouting, STEER_PRIORITY, Vec::new()),
    };
    (name, Base { hook, priority }, rules)
}

/// Returns the part of a network, without its prefix.
pub(super) fn network_table(network: NetworkId, options: &RulesetOptions) -> Table {
    let mut base = BaseTable { table: Table::new(Family::Bridge), options, network };
    base.sets();
    base.frames_chain();
    base.filter_chains();
    if options.fast_path == FastPath::Full {
        base.reply_chains();
        base.flow_chains();
    }
    base.own_chains();
    base.upcall_chain();
    base.verdict_chains();
    base.table
}

impl BaseTable<'_> {
    fn chain(&mut self, name: &str, rules: Vec<Rule>) {
        self.table.chains.insert(name.to_string(), Chain { base: None, rules });
    }
}
