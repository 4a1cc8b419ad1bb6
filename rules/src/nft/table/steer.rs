//! The chain `steer`: a frame enters here. Frames to a middlebox, from a backend, or with an ICMP
//! error about either go on to the other chains; all others leave after three look-ups.

use super::BaseTable;
use super::STEER_PRIORITY;
use crate::nft::dsl::{commented, goto, jump, rule};
use crate::nft::family::{FAMILIES, IpFamily};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Chain, Rule, Statement};
use crate::nft::options::{FastPath, QueuePath};

impl BaseTable<'_> {
    pub(super) fn steer_chain(&mut self) {
        let full = self.options.fast_path == FastPath::Full;
        let to_middlebox =
            |set: &str| Statement::In(vec![Field::EtherDestination], set.to_string());
        let target = match (full, self.options.queue_path) {
            (false, QueuePath::Native) => goto("engine"),
            _ => jump("middlebox"),
        };
        let mut rules = vec![rule(vec![to_middlebox("middleboxes"), target])];
        for ip in FAMILIES {
            let target = if full { jump(&ip.name("reply")) } else { goto("engine") };
            rules.push(rule(vec![
                ip.is(),
                Statement::Present(Field::L4Protocol),
                Statement::In(vec![ip.source], ip.name("backends")),
                target,
            ]));
        }
        rules.extend(FAMILIES.map(icmp_error_rule));
        if full {
            rules.push(rule(vec![to_middlebox("balanced"), goto("balance")]));
        }
        let steer = Chain { priority: Some(STEER_PRIORITY), rules };
        self.table.chains.insert("steer".to_string(), steer);
    }
}

/// ICMP errors about packets to backends may come from any router on the way.
fn icmp_error_rule(ip: IpFamily) -> Rule {
    let (icmp, kind, errors, quoted) = ip.icmp_errors();
    let statements = vec![
        ip.is(),
        Statement::Is(Field::L4Protocol, Value::Protocol(icmp)),
        Statement::In(vec![kind], errors.to_string()),
        Statement::In(vec![quoted], ip.name("backends")),
        goto("engine"),
    ];
    commented(statements, "about a packet to a backend")
}
