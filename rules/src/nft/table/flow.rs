//! The chains `balance` and `known`: a client's packet to a middlebox with services is redirected
//! here if its flow is cached, and sent to the engine otherwise.

use super::{BaseTable, CONNECTION_FLAGS};
use crate::nft::dsl::{accept, commented, goto, jump, rule};
use crate::nft::family::IpFamily;
use crate::nft::family::{CACHED_PROTOCOLS, FAMILIES, PORT_REWRITES, cached_flows, flow_key};
use crate::nft::field::Field;
use crate::nft::model::{Rule, Statement};

impl BaseTable<'_> {
    /// Rewrites packets of cached flows. Packets that begin or end a connection go to the engine.
    pub(super) fn known_chain(&mut self) {
        let mut rules = Vec::new();
        for (ip, protocol) in cached_flows() {
            for ports in PORT_REWRITES {
                let mut statements = protocol.is_whole_without(ip, CONNECTION_FLAGS);
                statements.push(Statement::RewriteFlow {
                    key: flow_key(ip),
                    flows: protocol.map("flows", ports, ip),
                    writes: ip.redirect_writes(ports),
                });
                statements.push(accept());
                rules.push(commented(statements, "a cached flow; the mark is restored"));
            }
        }
        self.chain("known", rules);
    }

    /// Sends the packets that a service takes to the engine, unless their flow is cached.
    pub(super) fn balance_chain(&mut self) {
        let mut rules = vec![rule(vec![jump("known")])];
        for ip in FAMILIES {
            let address = vec![Field::EtherDestination, ip.destination];
            let port = [address.clone(), vec![Field::DestinationPort]].concat();
            rules.push(upcall_if_in(ip, vec![Field::EtherDestination], "service_all"));
            rules.push(upcall_if_in(ip, address.clone(), "service_addresses"));
            for protocol in CACHED_PROTOCOLS {
                let taken = Statement::In(port.clone(), ip.name("service_ports"));
                rules.push(rule([protocol.is_whole(ip), vec![taken, goto("engine")]].concat()));
                // A cached flow whose backend is gone has left its slot in the mark.
                rules.push(rule([protocol.is_whole(ip), vec![goto("finish")]].concat()));
            }
            rules.push(upcall_if_in(ip, address, "service_pieces"));
        }
        self.chain("balance", rules);
    }
}

fn upcall_if_in(ip: IpFamily, key: Vec<Field>, set: &str) -> Rule {
    rule(vec![ip.is(), Statement::In(key, ip.name(set)), goto("engine")])
}
