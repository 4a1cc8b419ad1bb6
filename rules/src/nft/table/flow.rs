//! The chains `balanced…` and `known…`: a client's packet to a middlebox with services is redirected
//! here if its flow is cached, and sent to the engine otherwise.

use super::own::own_rules;
use super::steer::{by_family, from_backend};
use super::{BaseTable, CONNECTION_FLAGS};
use crate::nft::dsl::{accept, commented, goto, jump, rule};
use crate::nft::family::{
    CACHED_PROTOCOLS, CachedProtocol, FAMILIES, IpFamily, PORT_REWRITES, cached_flows, flow_key,
};
use crate::nft::field::Field;
use crate::nft::model::{Rule, Statement};

/// Returns the rules for packets to a middlebox with services.
pub(super) fn balanced() -> [Rule; 3] {
    by_family("balanced")
}

impl BaseTable<'_> {
    pub(super) fn flow_chains(&mut self) {
        self.chain("balanced", balanced().to_vec());
        for ip in FAMILIES {
            self.balanced_chain(ip);
            self.service_chain(ip);
        }
        for (ip, protocol) in cached_flows() {
            self.known_chain(ip, protocol);
        }
    }

    /// A packet of a backend may be a reply to the middlebox, or the backend its client.
    fn balanced_chain(&mut self, ip: IpFamily) {
        let known = |protocol: CachedProtocol| {
            let known = jump(&protocol.name("known", ip));
            rule([protocol.is(ip), vec![known]].concat())
        };
        let (known, own) = (CACHED_PROTOCOLS.map(known).to_vec(), own_rules(ip));
        let service = rule(vec![goto(&ip.name("service"))]);
        let client = ip.name("client_is_backend");
        let is_backend = rule([from_backend(ip), vec![goto(&client)]].concat());
        // A flow that is cached is none of the middlebox' own: those take over.
        let first = vec![ip.icmp_rule(), is_backend];
        let rules = [first, known.clone(), own.clone(), vec![service.clone()]];
        self.chain(&ip.name("balanced"), rules.concat());
        let jump = |chain: &str| rule(vec![jump(&ip.name(chain))]);
        let rules = [own, vec![jump("replies")], known, vec![jump("unknown_reply"), service]];
        self.chain(&client, rules.concat());
    }

    /// Rewrites packets of cached flows. Packets that begin or end a connection go to the engine.
    fn known_chain(&mut self, ip: IpFamily, protocol: CachedProtocol) {
        let rewrite = |ports| {
            let mut statements = protocol.is_whole_without(ip, CONNECTION_FLAGS);
            statements.push(Statement::RewriteFlow {
                key: flow_key(ip),
                flows: protocol.map("flows", ports, ip),
                writes: ip.redirect_writes(ports),
            });
            statements.push(accept());
            commented(statements, "a cached flow; the mark is restored")
        };
        self.chain(&protocol.name("known", ip), PORT_REWRITES.map(rewrite).to_vec());
    }

    /// Sends the packets that a service takes to the engine.
    fn service_chain(&mut self, ip: IpFamily) {
        let address = vec![Field::EtherDestination, ip.destination];
        let port = [address.clone(), vec![Field::DestinationPort]].concat();
        let upcall_if_in = |key: Vec<Field>, set: &str| {
            rule(vec![ip.is(), Statement::In(key, ip.name(set)), goto("engine")])
        };
        let mut rules = vec![
            upcall_if_in(vec![Field::EtherDestination], "service_all"),
            upcall_if_in(address.clone(), "service_addresses"),
        ];
        for protocol in CACHED_PROTOCOLS {
            let taken = Statement::In(port.clone(), ip.name("service_ports"));
            rules.push(rule([protocol.is_whole(ip), vec![taken, goto("engine")]].concat()));
            // A cached flow whose backend is gone has left its slot in the mark.
            rules.push(rule([protocol.is_whole(ip), vec![goto("finish")]].concat()));
        }
        rules.push(upcall_if_in(address, "service_pieces"));
        self.chain(&ip.name("service"), rules);
    }
}
