//! The chains `vm_frames` and `remember…`: a frame enters its network here by the port of a middlebox
//! with services. What the middlebox itself begins is remembered, so that the answers stay its own.

use super::BaseTable;
use crate::mark::{OURS, OWN};
use crate::nft::dsl::{accept, commented, goto, jump, rule, verdict};
use crate::nft::family::{
    CachedProtocol, IpFamily, PORT_REWRITES, TCP, UDP, cached_flows, flow_key, own_key,
};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Rule, Statement, Verdict};
use nfqd_shmctl::Protocol;

const SYN: u8 = 2;
const ACK: u8 = 16;

impl BaseTable<'_> {
    pub(super) fn own_chains(&mut self) {
        let from_middlebox = Statement::In(vec![Field::EtherSource], "with_services".to_string());
        let rules = vec![rule(vec![from_middlebox, jump("remember")]), rule(vec![goto("frames")])];
        self.chain("vm_frames", rules);
        let remember = |(ip, protocol): (IpFamily, CachedProtocol)| {
            let chain = protocol.name("remember", ip);
            rule([protocol.has_header(ip), vec![goto(&chain)]].concat())
        };
        self.chain("remember", cached_flows().map(remember).collect());
        for (ip, protocol) in cached_flows() {
            self.remember_chain(ip, protocol);
        }
    }

    /// A TCP conversation begins with a SYN; UDP with any datagram. It takes over what a client may
    /// have had with the same addresses and ports.
    fn remember_chain(&mut self, ip: IpFamily, protocol: CachedProtocol) {
        let set = protocol.name("own", ip);
        let is = || protocol.is(ip);
        let known = Statement::In(own_key(ip), set.clone());
        let remember = Statement::Remember { key: own_key(ip), set };
        let back = verdict(Verdict::Return);
        let mut rules = vec![rule([is(), vec![known, remember.clone(), back.clone()]].concat())];
        if protocol.protocol == Protocol::TCP {
            let begins =
                Statement::Masked(Field::TcpFlags, Value::Flags(SYN | ACK), Value::Flags(SYN));
            rules.push(rule([is(), vec![begins, jump(&protocol.name("take_over", ip))]].concat()));
        } else {
            rules.push(rule([is(), vec![jump(&protocol.name("take_over", ip))]].concat()));
        }
        self.chain(&protocol.name("remember", ip), rules);
        let mut rules: Vec<Rule> = PORT_REWRITES
            .map(|ports| {
                let map = protocol.map("flows", ports, ip);
                rule([is(), vec![Statement::ForgetFlow { key: own_key(ip), map }]].concat())
            })
            .to_vec();
        rules.push(rule([is(), vec![remember]].concat()));
        self.chain(&protocol.name("take_over", ip), rules);
    }
}

/// Returns the rules that let answers to the middlebox itself pass.
pub(super) fn own_rules(ip: IpFamily) -> [Rule; 2] {
    [TCP, UDP].map(|protocol| rule([is_own(ip, protocol), vec![accept()]].concat()))
}

/// Returns the rules that tell the engine which packets are answers to the middlebox itself.
pub(super) fn mark_rules() -> Vec<Rule> {
    let mark = |(ip, protocol): (IpFamily, CachedProtocol)| {
        let own = Statement::SetMark { keep: !OURS, set: OWN };
        commented([is_own(ip, protocol), vec![own]].concat(), "the middlebox has begun it")
    };
    cached_flows().map(mark).collect()
}

fn is_own(ip: IpFamily, protocol: CachedProtocol) -> Vec<Statement> {
    let own = Statement::In(flow_key(ip), protocol.name("own", ip));
    [protocol.has_header(ip), vec![own]].concat()
}

/// Returns the rules that let DHCP answers pass: they come to an address that the middlebox has not
/// used before.
pub(super) fn dhcp_rules(then: &Statement) -> [Rule; 2] {
    crate::nft::family::FAMILIES.map(|ip| {
        let (server, client) = if ip.is_ipv4() { (67, 68) } else { (547, 546) };
        let ports = vec![
            Statement::Is(Field::SourcePort, Value::Port(server)),
            Statement::Is(Field::DestinationPort, Value::Port(client)),
            then.clone(),
        ];
        rule([UDP.is_whole(ip), ports].concat())
    })
}
