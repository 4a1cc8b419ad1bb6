//! The chains `vm_frames` and `remember…`: a frame enters its network here by the port of a middlebox
//! with services. What the middlebox itself begins is remembered, so that the answers stay its own.

use super::BaseTable;
use crate::mark::{OURS, OWN};
use crate::nft::dsl::{accept, commented, goto, jump, rule, verdict};
use crate::nft::family::{
    CachedProtocol, FAMILIES, IpFamily, PORT_REWRITES, TCP, UDP, cached_flows, flow_key, own_key,
};
use crate::nft::field::{Field, Value};
use crate::nft::model::{Rule, Statement, Verdict};
use crate::nft::names::CACHE_FULL;
use crate::timeouts::OWN_TCP_SHORT_TIMEOUT;
use nfqd_shmctl::Protocol;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
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
            self.take_over_chain(ip, protocol);
        }
        for ip in FAMILIES {
            self.chain(&TCP.name("remember", ip), tcp_rules(ip));
            self.chain(&UDP.name("remember", ip), udp_rules(ip));
            let own = Statement::Forget { key: own_key(ip), set: TCP.name("own", ip) };
            let mut rules = vec![rule([TCP.is(ip), vec![own]].concat())];
            rules.extend(remember_or_full("own_closing", ip, TCP, None));
            self.chain(&TCP.name("end", ip), rules);
        }
    }

    /// A conversation that begins takes over what a client may have had with the same addresses and
    /// ports.
    fn take_over_chain(&mut self, ip: IpFamily, protocol: CachedProtocol) {
        let forget = |ports| {
            let map = protocol.map("flows", ports, ip);
            rule([protocol.is(ip), vec![Statement::ForgetFlow { key: own_key(ip), map }]].concat())
        };
        let is_tcp = protocol.protocol == Protocol::TCP;
        let timeout = is_tcp.then_some(OWN_TCP_SHORT_TIMEOUT);
        let mut rules = PORT_REWRITES.map(forget).to_vec();
        rules.extend(remember_or_full("own", ip, protocol, timeout));
        self.chain(&protocol.name("take_over", ip), rules);
    }
}

/// A TCP conversation begins with a SYN and ends with a FIN or RST. It is kept for long only in
/// between: a middlebox that begins many must not fill the set.
fn tcp_rules(ip: IpFamily) -> Vec<Rule> {
    let flags =
        |mask, value| Statement::Masked(Field::TcpFlags, Value::Flags(mask), Value::Flags(value));
    let is = |statements: Vec<Statement>| rule([TCP.is(ip), statements].concat());
    let goes_on = flags(FIN | RST, 0);
    let known = Statement::In(own_key(ip), TCP.name("own", ip));
    let renew_closing = renew(ip, TCP, "own_closing");
    vec![
        is(vec![flags(SYN | ACK, SYN), goto(&TCP.name("take_over", ip))]),
        is([vec![goes_on.clone()], renew(ip, TCP, "own")].concat()),
        is([vec![goes_on.clone()], renew_closing.clone()].concat()),
        is(vec![goes_on, verdict(Verdict::Return)]),
        is(vec![known, goto(&TCP.name("end", ip))]),
        is(renew_closing),
    ]
}

fn udp_rules(ip: IpFamily) -> Vec<Rule> {
    vec![
        rule([UDP.is(ip), renew(ip, UDP, "own")].concat()),
        rule([UDP.is(ip), vec![goto(&UDP.name("take_over", ip))]].concat()),
    ]
}

/// Renews a conversation that is in a set.
fn renew(ip: IpFamily, protocol: CachedProtocol, set: &str) -> Vec<Statement> {
    let (key, set) = (own_key(ip), protocol.name(set, ip));
    let known = Statement::In(key.clone(), set.clone());
    vec![known, Statement::Remember { key, set, timeout: None }, verdict(Verdict::Return)]
}

/// Returns the rules that add a conversation to a set, and count those for which it has no room.
fn remember_or_full(
    set: &str,
    ip: IpFamily,
    protocol: CachedProtocol,
    timeout: Option<u32>,
) -> [Rule; 2] {
    let remember = Statement::Remember { key: own_key(ip), set: protocol.name(set, ip), timeout };
    let back = verdict(Verdict::Return);
    [
        rule([protocol.is(ip), vec![remember, back]].concat()),
        commented(vec![Statement::Counter], &format!("{CACHE_FULL}{set}")),
    ]
}

/// Returns the rules that let answers to the middlebox itself pass.
pub(super) fn own_rules(ip: IpFamily) -> Vec<Rule> {
    let of = |(protocol, set)| rule([is_own(ip, protocol, set), vec![accept()]].concat());
    OWN_SETS.map(of).to_vec()
}

/// Returns the rules that tell the engine which packets are answers to the middlebox itself.
pub(super) fn mark_rules() -> Vec<Rule> {
    let mark = |(ip, (protocol, set)): (IpFamily, (CachedProtocol, &str))| {
        let own = Statement::SetMark { keep: !OURS, set: OWN };
        commented([is_own(ip, protocol, set), vec![own]].concat(), "the middlebox has begun it")
    };
    FAMILIES.into_iter().flat_map(|ip| OWN_SETS.map(|set| (ip, set))).map(mark).collect()
}

/// The sets of conversations, in the order in which they are looked up.
const OWN_SETS: [(CachedProtocol, &str); 3] = [(TCP, "own"), (TCP, "own_closing"), (UDP, "own")];

fn is_own(ip: IpFamily, protocol: CachedProtocol, set: &str) -> Vec<Statement> {
    let own = Statement::In(flow_key(ip), protocol.name(set, ip));
    [protocol.has_header(ip), vec![own]].concat()
}

/// Returns the rules that let DHCP answers pass: they come to an address that the middlebox has not
/// used before.
pub(super) fn dhcp_rules(then: &Statement) -> [Rule; 2] {
    FAMILIES.map(|ip| {
        let (server, client) = if ip.is_ipv4() { (67, 68) } else { (547, 546) };
        let ports = vec![
            Statement::Is(Field::SourcePort, Value::Port(server)),
            Statement::Is(Field::DestinationPort, Value::Port(client)),
            then.clone(),
        ];
        rule([UDP.is_whole(ip), ports].concat())
    })
}
