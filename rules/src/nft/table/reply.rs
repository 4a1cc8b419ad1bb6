//! The chains `reply4` and `reply6`: packets from addresses of backends.

use super::{BaseTable, RST, SYN};
use crate::mark::ID;
use crate::nft::dsl::{accept, commented, goto, jump, rule, verdict};
use crate::nft::family::{CACHED_PROTOCOLS, FAMILIES, IpFamily, PORT_REWRITES, reply_key};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Statement, Verdict};

impl BaseTable<'_> {
    pub(super) fn reply_chains(&mut self) {
        for ip in FAMILIES {
            self.reply_chain(ip);
        }
    }

    fn reply_chain(&mut self, ip: IpFamily) {
        let mut rules = Vec::new();
        for protocol in CACHED_PROTOCOLS {
            for ports in PORT_REWRITES {
                let mut statements = protocol.is_whole_without(ip, SYN | RST);
                statements.push(Statement::RewriteFlow {
                    key: reply_key(ip),
                    flows: protocol.map("replies", ports, ip),
                    writes: ip.reply_writes(ports),
                });
                statements.push(accept());
                rules.push(commented(statements, "a cached reply; the mark is restored"));
            }
        }
        let left_slot = vec![
            Statement::Is(Field::Mark(!ID), Value::Mark(0)),
            Statement::SetMark { keep: 0, set: 0 },
        ];
        rules.push(commented(left_slot, "clear the slot of a cached flow whose backend is gone"));
        for protocol in CACHED_PROTOCOLS {
            let bypass = Statement::In(reply_key(ip), protocol.name("bypass", ip));
            // A packet of the backend itself may still be redirected if it goes to a middlebox.
            let back = verdict(Verdict::Return);
            rules.push(rule([protocol.is_whole(ip), vec![bypass, back]].concat()));
        }
        // The backend may be a client of a middlebox.
        rules.push(rule(vec![
            Statement::In(vec![Field::EtherDestination], "balanced".to_string()),
            jump("known"),
        ]));
        rules.push(rule(vec![goto("engine")]));
        self.chain(&ip.name("reply"), rules);
    }
}
