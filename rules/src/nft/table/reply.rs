//! The chains `reply…` and `replies…`: packets from addresses of backends. They are translated where
//! they leave, see [`super::answers`].

use super::{BaseTable, RST, SYN};
use crate::mark::{ID, OURS, Operation};
use crate::nft::dsl::{accept, commented, goto, jump, rule, verdict};
use crate::nft::family::{
    CACHED_PROTOCOLS, CachedProtocol, FAMILIES, IpFamily, PORT_REWRITES, PortRewrite, cached_flows,
    reply_key,
};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Statement, Verdict};

impl BaseTable<'_> {
    pub(super) fn reply_chains(&mut self) {
        for ip in FAMILIES {
            let [replies, unknown] = ["replies", "unknown_reply"].map(|chain| ip.name(chain));
            self.chain(
                &ip.name("reply"),
                vec![rule(vec![jump(&replies)]), rule(vec![goto(&unknown)])],
            );
            self.replies_chain(ip);
            self.unknown_reply_chain(ip);
        }
        for (ip, protocol) in cached_flows() {
            self.translated_chain(ip, protocol);
        }
    }

    /// Accepts cached replies; all others come back.
    fn replies_chain(&mut self, ip: IpFamily) {
        let mut rules = Vec::new();
        for protocol in CACHED_PROTOCOLS {
            let translated = jump(&protocol.name("translated", ip));
            rules.push(rule([protocol.is(ip), vec![translated]].concat()));
        }
        let left_slot = vec![
            Statement::Is(Field::Mark(!ID), Value::Mark(0)),
            Statement::SetMark { keep: 0, set: 0 },
        ];
        rules.push(commented(left_slot, "clear the slot of a cached flow whose backend is gone"));
        self.chain(&ip.name("replies"), rules);
    }

    fn translated_chain(&mut self, ip: IpFamily, protocol: CachedProtocol) {
        let rewrite = |ports| {
            let mut statements = protocol.is_whole_without(ip, SYN | RST);
            statements.extend(mark_reply(ip, protocol.map("replies", ports, ip), ports));
            statements.push(accept());
            commented(statements, "a cached reply, which is translated where it leaves")
        };
        self.chain(&protocol.name("translated", ip), PORT_REWRITES.map(rewrite).to_vec());
    }

    /// Sends packets to the engine that are not known as the backend's own.
    fn unknown_reply_chain(&mut self, ip: IpFamily) {
        let mut rules = Vec::new();
        for protocol in CACHED_PROTOCOLS {
            let bypass = Statement::In(reply_key(ip), protocol.name("bypass", ip));
            // A packet of the backend itself may still be redirected if it goes to a middlebox.
            let back = verdict(Verdict::Return);
            rules.push(rule([protocol.is_whole(ip), vec![bypass, back]].concat()));
        }
        rules.push(rule(vec![goto("engine")]));
        self.chain(&ip.name("unknown_reply"), rules);
    }
}

/// Returns the statements that mark a reply with its slot, if a map has it. One with marks of other
/// programs is the engine's, which keeps them.
pub(super) fn mark_reply(ip: IpFamily, flows: String, ports: PortRewrite) -> [Statement; 2] {
    let is_translated = ports == PortRewrite::Translated;
    [
        Statement::Is(Field::Mark(!OURS), Value::Mark(0)),
        Statement::MarkFlow {
            key: reply_key(ip),
            flows,
            // The map of frontends counts what is translated.
            slots: ip.name("backend_ip"),
            operation: Operation::Reply.bits(is_translated),
        },
    ]
}
