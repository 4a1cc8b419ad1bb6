//! Which tables, chains, sets and elements a policy needs.
//!
//! The frame stands: base chains, maps, what carries out the engine's verdicts. Each middlebox adds its part, which is
//! elements as far as possible. The way of a frame is in `docs/ARCHITECTURE.md`.

use super::field::{Field, Type, Value};
use super::model::{
    Chain, Data, Dynamic, Element, ElementData, Family, Queues, Rule, Set, Statement, Table, Verdict, Write,
};
use super::part::Part;
use crate::mark::{self, INDEX, OPERATION, OURS, Operation};
use crate::packet::{EXTENSIONS, ICMP_ERRORS, ICMP6_ERRORS};
use crate::policy::Policy;
use crate::slots::Slots;
use nfqd_shmctl::{EtherType, Protocol};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Seconds that the kernel remembers a flow towards a backend. It is not refreshed: a live flow shows itself to the
/// engine once in that time and gets the same backend again.
pub const FLOW_TIMEOUT: u32 = 60;
/// Seconds that it remembers the way back of TCP: as long as an established connection may be silent (RFC 5382, REQ-5), so
/// that an engine that starts anew finds all there are. What ends is remembered shorter.
pub const TCP_REPLY_TIMEOUT: u32 = 7440;
/// The same of UDP: shorter than the engine remembers a flow, so that answers alone keep it.
pub const UDP_REPLY_TIMEOUT: u32 = 120;
/// Seconds that it remembers that a backend's flow is its own.
pub const DIRECT_TIMEOUT: u32 = 90;
/// Seconds that it remembers a flow at its end; the engine remembers it longer.
pub const CLOSE_TIMEOUT: u32 = 5;
/// The longest of these.
pub const LONGEST_MEMORY: u32 = TCP_REPLY_TIMEOUT;
/// Flows that each kernel map can hold: as many as the engine.
const FLOWS: u32 = 1 << 20;

/// How frames get into the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Steer {
    /// The `queue` expression in the bridge family.
    Native,
    /// A mark, br_netfilter, and the xt target NFQUEUE in the ip and ip6 families.
    BrNetfilter,
}

/// How much the kernel does without the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FastPath {
    /// Everything it can.
    Full,
    /// Nothing: every frame to a middlebox goes to the engine.
    Off,
}

impl Steer {
    /// As it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Steer::Native => "native",
            Steer::BrNetfilter => "br-netfilter",
        }
    }
}

impl FastPath {
    /// As it is called on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FastPath::Full => "full",
            FastPath::Off => "off",
        }
    }
}

/// What a ruleset depends on besides the policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// How frames get into the queue.
    pub steer: Steer,
    /// How much the kernel does alone.
    pub fast_path: FastPath,
    /// The queues of the engine, and what happens without it.
    pub queues: Queues,
}

/// All tables, by family.
pub type Ruleset = BTreeMap<Family, Table>;

/// Priority of the chain that steers: before br_netfilter (0), before the bridge learns or forwards.
const STEER_PRIORITY: i32 = -300;
/// Priority of the chain that carries out the engine's verdicts: behind br_netfilter's hook.
const LEARN_PRIORITY: i32 = 100;
/// Priority of the ip and ip6 chains that queue: before the host's connection tracking puts pieces of datagrams together
/// (NF_IP_PRI_RAW_BEFORE_DEFRAG), so that the engine sees what the bridge sees.
const ASK_PRIORITY: i32 = -450;

/// The ruleset that a policy needs.
pub fn build(policy: &Policy, slots: &Slots, options: &Options) -> Ruleset {
    build_of(policy, slots, options, |_| {})
}

/// The same; each middlebox' part is shown to `each`.
pub(super) fn build_of(
    policy: &Policy,
    slots: &Slots,
    options: &Options,
    mut each: impl FnMut(&Part),
) -> Ruleset {
    let mut table = frame(options);
    for (mac, middlebox) in policy.middleboxes() {
        let part = Part::new(*mac, middlebox, slots, options);
        each(&part);
        table.add(part);
    }
    let mut out = Ruleset::from([(Family::Bridge, table)]);
    if options.steer == Steer::BrNetfilter {
        out.extend([Family::Ip, Family::Ip6].map(|family| (family, queueing(family, options.queues))));
    }
    out
}

/// What stands whatever is registered.
pub(super) fn frame(options: &Options) -> Table {
    let mut frame = Frame { table: Table::new(Family::Bridge), options };
    frame.registrations();
    frame.backends();
    frame.caches();
    frame.steering();
    frame.verdicts();
    frame.table
}

impl Table {
    /// Adds what a middlebox brings.
    pub(super) fn add(&mut self, part: Part) {
        for (name, set) in part.sets {
            self.sets.entry(name).or_insert_with(|| set.empty()).elements.extend(set.elements);
        }
        for (name, elements) in part.elements {
            if let Some(set) = self.sets.get_mut(&name) {
                set.elements.extend(elements);
            }
        }
        self.chains.extend(part.chains);
    }
}

impl Options {
    /// Whether the engine filters and sees neither VLAN tags nor frames that are not IP: the kernel filters these.
    pub fn engine_is_blind(&self) -> bool {
        self.fast_path == FastPath::Off && self.steer == Steer::BrNetfilter
    }
}

/// The table that takes marked packets from the bridge into the queues.
fn queueing(family: Family, queues: Queues) -> Table {
    let rule = commented(
        vec![
            Statement::Is(Field::Mark(OPERATION), Value::Mark(Operation::Ask as u32)),
            Statement::Counter,
            Statement::XtQueue(queues),
        ],
        "to the engine: xt target NFQUEUE, which nft does not show",
    );
    let mut table = Table::new(family);
    table.chains.insert("to_engine".to_string(), Chain { priority: Some(ASK_PRIORITY), rules: vec![rule] });
    table
}

pub(super) fn rule(statements: Vec<Statement>) -> Rule {
    Rule { statements, comment: None }
}

pub(super) fn commented(statements: Vec<Statement>, comment: &str) -> Rule {
    Rule { statements, comment: Some(comment.to_string()) }
}

pub(super) fn verdict(verdict: Verdict) -> Statement {
    Statement::Verdict(verdict)
}

pub(super) fn accept() -> Statement {
    verdict(Verdict::Accept)
}

pub(super) fn goto(chain: &str) -> Statement {
    verdict(Verdict::Goto(chain.to_string()))
}

fn jump(chain: &str) -> Statement {
    verdict(Verdict::Jump(chain.to_string()))
}

/// Marks a packet for the engine, which learns by the index for which middlebox it is.
pub(super) fn ask(index: u32) -> Statement {
    Statement::SetMark { keep: !OURS, set: Operation::Ask as u32 | mark::index_bits(index) }
}

fn set_of(key: &[Type], data: Option<Data>, comment: &str) -> Set {
    Set { key: key.to_vec(), data, comment: Some(comment.to_string()), ..Set::default() }
}

/// One of the two IP families, with its fields and map names.
#[derive(Clone, Copy)]
pub(super) struct Ip {
    pub ether_type: EtherType,
    pub suffix: char,
    pub source: Field,
    pub destination: Field,
    address: Type,
}

pub(super) const IPV4: Ip = Ip {
    ether_type: EtherType::IPV4,
    suffix: '4',
    source: Field::Ip4Source,
    destination: Field::Ip4Destination,
    address: Type::Ip4,
};
pub(super) const IPV6: Ip = Ip {
    ether_type: EtherType::IPV6,
    suffix: '6',
    source: Field::Ip6Source,
    destination: Field::Ip6Destination,
    address: Type::Ip6,
};
pub(super) const IPS: [Ip; 2] = [IPV4, IPV6];

impl Ip {
    pub fn of(address: IpAddr) -> Ip {
        if address.is_ipv4() { IPV4 } else { IPV6 }
    }

    pub fn name(self, map: &str) -> String {
        format!("{map}{}", self.suffix)
    }

    pub fn is(self) -> Statement {
        Statement::Is(Field::EtherType, Value::EtherType(self.ether_type))
    }

    fn redirect_writes(self, ports: Ports) -> Vec<Write> {
        let mut out = vec![
            Write { field: self.destination, map: self.name("backend_ip") },
            Write { field: Field::EtherDestination, map: "backend_mac".to_string() },
        ];
        if ports == Ports::Translated {
            out.push(Write { field: Field::DestinationPort, map: "backend_port".to_string() });
        }
        out
    }

    fn reply_writes(self, ports: Ports) -> Vec<Write> {
        let mut out = vec![Write { field: self.source, map: self.name("backend_vip") }];
        if ports == Ports::Translated {
            out.push(Write { field: Field::SourcePort, map: "backend_vport".to_string() });
        }
        out
    }

    /// ICMP of the family, the set of its errors, and the destination that one quotes.
    fn errors(self) -> (Protocol, Field, &'static str, Field) {
        match self.suffix {
            '4' => (Protocol::ICMP, Field::IcmpType, "icmp_errors", Field::QuotedIp4Destination),
            _ => (Protocol::ICMPV6, Field::Icmp6Type, "icmp6_errors", Field::QuotedIp6Destination),
        }
    }
}

/// Whether ports are rewritten, too. Flows of the two kinds have maps of their own: a rule writes all it has to write or
/// nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ports {
    Kept,
    Translated,
}

const PORTS: [Ports; 2] = [Ports::Kept, Ports::Translated];

impl Ports {
    /// A chain's name.
    fn chain(self, name: &str) -> String {
        match self {
            Ports::Kept => name.to_string(),
            Ports::Translated => format!("{name}_port"),
        }
    }
}

/// A protocol whose flows the kernel remembers.
#[derive(Clone, Copy)]
struct Transport {
    protocol: Protocol,
    name: &'static str,
    checksum: Field,
    reply_timeout: u32,
}

const TCP: Transport = Transport {
    protocol: Protocol::TCP,
    name: "tcp",
    checksum: Field::TcpChecksum,
    reply_timeout: TCP_REPLY_TIMEOUT,
};
const UDP: Transport = Transport {
    protocol: Protocol::UDP,
    name: "udp",
    checksum: Field::UdpChecksum,
    reply_timeout: UDP_REPLY_TIMEOUT,
};
const TRANSPORTS: [Transport; 2] = [TCP, UDP];

/// Flags with which TCP connections begin and end: what the engine must see.
const TURNS: u8 = FIN | SYN | RST;
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

impl Transport {
    fn name(self, map: &str, ip: Ip) -> String {
        format!("{map}_{}{}", self.name, ip.suffix)
    }

    /// A map of flows.
    fn map(self, map: &str, ports: Ports, ip: Ip) -> String {
        self.name(&ports.chain(map), ip)
    }

    /// The same as [`Transport::is_whole`], and, if it is TCP, none of these flags is on.
    fn goes_on(self, ip: Ip, without: u8) -> Vec<Statement> {
        let mut out = self.is_whole(ip);
        if self.protocol == Protocol::TCP {
            out.push(Statement::Masked(Field::TcpFlags, Value::Flags(without), Value::Flags(0)));
        }
        out
    }

    /// The packet is of this protocol, whole, and has the checksum that a rewrite mends. Pieces go to the engine, which
    /// keeps them together.
    fn is_whole(self, ip: Ip) -> Vec<Statement> {
        let protocol = Value::Protocol(self.protocol);
        let mut out = vec![ip.is()];
        match ip.suffix {
            '4' => {
                const MORE_OR_OFFSET: u16 = 0x3fff;
                out.push(Statement::Is(Field::Ip4FragmentOffset(MORE_OR_OFFSET), Value::Port(0)));
            }
            _ => out.push(Statement::Is(Field::Ip6NextHeader, protocol)),
        }
        out.push(Statement::Is(Field::L4Protocol, protocol));
        out.push(Statement::Present(self.checksum));
        out
    }
}

/// The chains that carry out what the engine says, for ports that stay and ports that are translated.
const OPERATIONS: [(Operation, &str); 8] = [
    (Operation::Redirect, "redirected"),
    (Operation::RedirectOpen, "opened"),
    (Operation::RedirectLearn, "learn_flow"),
    (Operation::RedirectClose, "close_flow"),
    (Operation::Reply, "replied"),
    (Operation::ReplyLearn, "learn_reply"),
    (Operation::ReplyClose, "close_reply"),
    (Operation::Pass, "pass"),
];

fn operation((operation, chain): (Operation, &str)) -> Vec<(Vec<Value>, Element)> {
    let element = |ports: Ports| {
        let to = ElementData::Verdict(Verdict::Goto(ports.chain(chain)));
        let bits = operation.bits(ports == Ports::Translated);
        (vec![Value::Mark(bits)], Element { data: Some(to), ..Element::default() })
    };
    match operation {
        Operation::Pass => vec![element(Ports::Kept)],
        _ => PORTS.map(element).to_vec(),
    }
}

fn is_protocol(transport: Transport) -> Statement {
    Statement::Is(Field::L4Protocol, Value::Protocol(transport.protocol))
}

fn of_protocol(ip: Ip, transport: Transport, then: Statement) -> Vec<Statement> {
    vec![ip.is(), is_protocol(transport), then]
}

/// Remembers a packet's slot.
fn remember(
    key: fn(Ip) -> Vec<Field>,
    map: &str,
    ports: Ports,
    ip: Ip,
    transport: Transport,
    timeout: Option<u32>,
) -> Statement {
    Statement::Learn { key: key(ip), map: transport.map(map, ports, ip), timeout }
}

/// The beginning of the comment of a rule that counts what could not be remembered.
pub(super) const FULL: &str = "full: ";

/// A statement for each protocol that remembers a packet's flow in a map, and where the packet goes on. A statement fails
/// when its map is full: then the last rule counts the packet.
fn each(map: &str, then: &str, statement: impl Fn(Ip, Transport) -> Statement) -> Vec<Rule> {
    let one = |(ip, transport): (Ip, Transport)| {
        rule([of_protocol(ip, transport, statement(ip, transport)), vec![goto(then)]].concat())
    };
    let full = commented(vec![Statement::Counter, goto(then)], &format!("{FULL}{map}"));
    flows().map(one).chain([full]).collect()
}

/// Every protocol in every family.
fn flows() -> impl Iterator<Item = (Ip, Transport)> {
    IPS.into_iter().flat_map(|ip| TRANSPORTS.into_iter().map(move |transport| (ip, transport)))
}

/// The middlebox is in the key, so that one guest cannot make the kernel believe in a flow of another.
fn flow_key(ip: Ip) -> Vec<Field> {
    vec![Field::EtherDestination, ip.source, ip.destination, Field::SourcePort, Field::DestinationPort]
}

fn reply_key(ip: Ip) -> Vec<Field> {
    vec![ip.source, ip.destination, Field::SourcePort, Field::DestinationPort]
}

/// The reply's key, seen from a packet on its way to the backend.
fn reply_key_backwards(ip: Ip) -> Vec<Field> {
    vec![ip.destination, ip.source, Field::DestinationPort, Field::SourcePort]
}

struct Frame<'a> {
    table: Table,
    options: &'a Options,
}

impl Frame<'_> {
    fn set(&mut self, name: &str, set: Set) {
        self.table.sets.insert(name.to_string(), set);
    }

    fn chain(&mut self, name: &str, rules: Vec<Rule>) {
        self.table.chains.insert(name.to_string(), Chain { priority: None, rules });
    }

    /// Sets of MACs, and maps to the chains of their middleboxes.
    fn registrations(&mut self) {
        let mac = [Type::Mac];
        let verdicts = Some(Data::Verdict);
        let counting = |comment: &str| Set { counter: true, ..set_of(&mac, None, comment) };
        self.set("middleboxes", counting("registered middleboxes"));
        self.set("balanced", set_of(&mac, None, "middleboxes with balanced addresses"));
        self.set("filters", set_of(&mac, verdicts, "middleboxes with filters"));
        let mut extensions =
            set_of(&[Type::Protocol], None, "what may hide a transport header behind a fragment header");
        let element = |header: u8| (vec![Value::Protocol(Protocol(header))], Element::default());
        extensions.elements = EXTENSIONS.into_iter().map(element).collect();
        self.set("extension_headers", extensions);
        self.set("closed", counting("middleboxes for which nothing passes that no rule allows"));
        if self.options.engine_is_blind() {
            self.set(
                "tag_filters",
                set_of(&mac, verdicts, "middleboxes with filters on what the engine does not see"),
            );
        }
        let mut operations =
            set_of(&[Type::Mark], verdicts, "what the engine says, and the chain that carries it out");
        operations.elements = OPERATIONS.into_iter().flat_map(operation).collect();
        self.set("operations", operations);
        for (name, of, types) in [
            ("icmp_errors", Type::IcmpType, ICMP_ERRORS.map(Value::IcmpType).to_vec()),
            ("icmp6_errors", Type::Icmp6Type, ICMP6_ERRORS.map(Value::Icmp6Type).to_vec()),
        ] {
            let mut set = set_of(&[of], None, "errors, which quote the packet that they are about");
            set.elements = types.into_iter().map(|kind| (vec![kind], Element::default())).collect();
            self.set(name, set);
        }
        for ip in IPS {
            let keys = [Type::Mac, ip.address, Type::Port];
            for (name, parts, comment) in [
                ("service_all", 1, "middleboxes with a service that takes all packets"),
                ("service_addresses", 2, "addresses with a service that takes all ports"),
                ("service_ports", 3, "ports that a service takes"),
                ("service_pieces", 2, "addresses of these: of pieces and ICMP the port is not known"),
            ] {
                self.set(&ip.name(name), set_of(&keys[..parts], None, comment));
            }
        }
        self.set("static_redirects", set_of(&mac, verdicts, "what happens without an engine"));
        if self.options.steer == Steer::BrNetfilter {
            self.set("ask", set_of(&mac, verdicts, "the mark by which the engine knows the middlebox"));
        }
    }

    /// Maps from slots to addresses and ports.
    fn backends(&mut self) {
        let map = |data: Type, comment: &str| set_of(&[Type::Mark], Some(Data::Value(data)), comment);
        let counting = |set: Set| Set { counter: true, ..set };
        for ip in IPS {
            self.set(&ip.name("backends"), set_of(&[ip.address], None, "addresses of backends"));
            self.set(&ip.name("backend_ip"), map(ip.address, "slot to the backend's address"));
            let vip =
                map(ip.address, "slot to the address that clients use; counts what comes from the backend");
            self.set(&ip.name("backend_vip"), counting(vip));
        }
        let mac = map(Type::Mac, "slot to the backend's MAC; counts what goes to the backend");
        self.set("backend_mac", counting(mac));
        self.set("backend_port", map(Type::Port, "slot to the backend's port"));
        self.set("backend_vport", map(Type::Port, "slot to the port that clients use"));
    }

    /// Maps that packets fill.
    fn caches(&mut self) {
        let cache = |key: Vec<Field>, data: Option<Data>, timeout: u32, comment: &str| Set {
            key: key.into_iter().filter_map(Field::set_type).collect(),
            data,
            dynamic: Some(Dynamic { timeout, size: FLOWS }),
            comment: Some(comment.to_string()),
            ..Set::default()
        };
        let slot = Some(Data::Value(Type::Mark));
        for (ip, transport) in flows() {
            for ports in PORTS {
                let flows = cache(flow_key(ip), slot, FLOW_TIMEOUT, "flows to backends, by slot");
                let timeout = transport.reply_timeout;
                let replies = cache(reply_key(ip), slot, timeout, "flows back from backends, by slot");
                self.set(&transport.map("flows", ports, ip), flows);
                self.set(&transport.map("replies", ports, ip), replies);
            }
            let direct = cache(reply_key(ip), None, DIRECT_TIMEOUT, "a backend's own flows");
            self.set(&transport.name("direct", ip), direct);
        }
    }

    /// The chain that steers, and what it leads to.
    fn steering(&mut self) {
        let to_middlebox = |set: &str| Statement::In(vec![Field::EtherDestination], set.to_string());
        let from_backend = |ip: Ip| {
            vec![
                ip.is(),
                Statement::Present(Field::L4Protocol),
                Statement::In(vec![ip.source], ip.name("backends")),
            ]
        };
        let full = self.options.fast_path == FastPath::Full;
        let mut steer = vec![rule(vec![
            to_middlebox("middleboxes"),
            match (full, self.options.steer) {
                (false, Steer::Native) => goto("engine"),
                _ => jump("middlebox"),
            },
        ])];
        for ip in IPS {
            let target = if full { jump(&ip.name("reply")) } else { goto("engine") };
            steer.push(rule([from_backend(ip), vec![target]].concat()));
        }
        for ip in IPS {
            let (icmp, kind, errors, quoted) = ip.errors();
            let is_error = vec![
                ip.is(),
                Statement::Is(Field::L4Protocol, Value::Protocol(icmp)),
                Statement::In(vec![kind], errors.to_string()),
                Statement::In(vec![quoted], ip.name("backends")),
                goto("engine"),
            ];
            steer.push(commented(is_error, "about a packet to a backend"));
        }
        if full {
            steer.push(rule(vec![to_middlebox("balanced"), goto("balance")]));
        }
        let steer = Chain { priority: Some(STEER_PRIORITY), rules: steer };
        self.table.chains.insert("steer".to_string(), steer);
        self.middlebox_chain(full);
        self.engine_chain();
        if full {
            self.fast_chains();
        }
    }

    /// Filters. Without the fast path the engine has them, for everything that can reach it: br_netfilter carries IPv4
    /// and IPv6 only, without their VLAN tags.
    fn middlebox_chain(&mut self, full: bool) {
        let by_mac = |map: &str| rule(vec![Statement::Vmap(vec![Field::EtherDestination], map.to_string())]);
        let mut rules = Vec::new();
        if self.options.engine_is_blind() {
            let tags = || Statement::Vmap(vec![Field::EtherDestination], "tag_filters".to_string());
            rules.extend(IPS.map(|ip| rule(vec![ip.is(), tags()])));
            rules.extend(IPS.map(|ip| rule(vec![ip.is(), goto("engine")])));
        }
        if full || self.options.engine_is_blind() {
            rules.push(by_mac("filters"));
        }
        self.chain("middlebox", rules);
        let closed = Statement::In(vec![Field::EtherDestination], "closed".to_string());
        self.chain("closed", vec![rule(vec![closed, verdict(Verdict::Drop)])]);
    }

    /// The way into the queue.
    fn engine_chain(&mut self) {
        let rules = match self.options.steer {
            Steer::Native => {
                vec![rule(vec![ask(0), Statement::Counter, Statement::Queue(self.options.queues)])]
            }
            Steer::BrNetfilter => vec![
                rule(vec![Statement::Vmap(vec![Field::EtherDestination], "ask".to_string())]),
                rule(vec![ask(0), Statement::Counter, accept()]),
            ],
        };
        self.chain("engine", rules);
    }

    /// Known flows, there and back. Packets with which a connection begins or ends go to the engine.
    fn fast_chains(&mut self) {
        let known = |key: Vec<Field>, flows: String, writes: Vec<Write>| {
            vec![Statement::RewriteFlow { key, flows, writes }, accept()]
        };
        let mut flow = Vec::new();
        for (ip, transport) in flows() {
            let goes_on = || transport.goes_on(ip, TURNS);
            for ports in PORTS {
                let flows = transport.map("flows", ports, ip);
                let known = known(flow_key(ip), flows, ip.redirect_writes(ports));
                flow.push(commented([goes_on(), known].concat(), "a known flow; the mark is put back"));
            }
        }
        self.chain("known", flow);
        let mut redirect = vec![rule(vec![jump("known")])];
        for ip in IPS {
            let address = vec![Field::EtherDestination, ip.destination];
            let port = [address.clone(), vec![Field::DestinationPort]].concat();
            let asked = |key: Vec<Field>, set: &str| {
                rule(vec![ip.is(), Statement::In(key, ip.name(set)), goto("engine")])
            };
            redirect.push(asked(vec![Field::EtherDestination], "service_all"));
            redirect.push(asked(address.clone(), "service_addresses"));
            for transport in TRANSPORTS {
                let taken = Statement::In(port.clone(), ip.name("service_ports"));
                redirect.push(rule([transport.is_whole(ip), vec![taken, goto("engine")]].concat()));
                // A known flow whose backend has gone has left its slot in the mark.
                redirect.push(rule([transport.is_whole(ip), vec![goto("finish")]].concat()));
            }
            redirect.push(asked(address, "service_pieces"));
        }
        self.chain("balance", redirect);
        for ip in IPS {
            let mut reply = Vec::new();
            for transport in TRANSPORTS {
                for ports in PORTS {
                    let replies = transport.map("replies", ports, ip);
                    let known = known(reply_key(ip), replies, ip.reply_writes(ports));
                    reply.push(commented(
                        [transport.goes_on(ip, SYN | RST), known].concat(),
                        "the way back; the mark is put back",
                    ));
                }
            }
            reply.push(commented(
                vec![
                    Statement::Is(Field::Mark(!INDEX), Value::Mark(0)),
                    Statement::SetMark { keep: 0, set: 0 },
                ],
                "a known flow whose backend has gone has left its slot",
            ));
            for transport in TRANSPORTS {
                let direct = Statement::In(reply_key(ip), transport.name("direct", ip));
                // What a backend says of itself to a balanced middlebox may still be redirected.
                reply.push(rule([transport.is_whole(ip), vec![direct, verdict(Verdict::Return)]].concat()));
            }
            // It may be a client itself.
            reply.push(rule(vec![
                Statement::In(vec![Field::EtherDestination], "balanced".to_string()),
                jump("known"),
            ]));
            reply.push(rule(vec![goto("engine")]));
            self.chain(&ip.name("reply"), reply);
        }
    }

    /// The chain that carries out the engine's verdicts, and what happens without one.
    fn verdicts(&mut self) {
        let operation = Field::Mark(OPERATION);
        let learn = vec![
            commented(
                vec![Statement::Is(operation, Value::Mark(0)), accept()],
                "not from the engine, or nothing to do",
            ),
            rule(vec![Statement::Vmap(vec![operation], "operations".to_string())]),
            commented(vec![goto("unanswered")], "no engine, or its queue was full"),
        ];
        let learn = Chain { priority: Some(LEARN_PRIORITY), rules: learn };
        self.table.chains.insert("learn".to_string(), learn);
        let finish = vec![Statement::SetMark { keep: !OURS, set: 0 }, accept()];
        self.chain("finish", vec![commented(finish, "no bit of ours leaves")]);
        PORTS.into_iter().for_each(|ports| self.carry_out(ports));
        let learn_direct = each("direct", "finish", |ip, transport| Statement::Remember {
            key: reply_key(ip),
            set: transport.name("direct", ip),
        });
        self.chain("learn_direct", learn_direct);
        let pass = each("flows", "finish", |ip, transport| {
            remember(flow_key, "flows", Ports::Kept, ip, transport, Some(CLOSE_TIMEOUT))
        });
        self.chain("pass", pass);
        self.static_chains();
    }

    /// Rewriting and remembering.
    fn carry_out(&mut self, ports: Ports) {
        let name = |chain: &str| ports.chain(chain);
        let writing = |writes: fn(Ip, Ports) -> Vec<Write>| -> Vec<Rule> {
            let of = |ip: Ip, transport: Transport| {
                of_protocol(ip, transport, Statement::Rewrite(writes(ip, ports)))
            };
            match ports {
                Ports::Kept => {
                    IPS.map(|ip| rule(vec![ip.is(), Statement::Rewrite(writes(ip, ports))])).to_vec()
                }
                Ports::Translated => flows().map(|(ip, transport)| rule(of(ip, transport))).collect(),
            }
        };
        self.chain(&name("to_backend"), writing(Ip::redirect_writes));
        self.chain(&name("from_backend"), writing(Ip::reply_writes));
        let learn = |key: fn(Ip) -> Vec<Field>, map: &str, timeout: Option<u32>, then: &str| {
            each(&name(map), then, |ip, transport| remember(key, map, ports, ip, transport, timeout))
        };
        let each_protocol = |statement: &dyn Fn(Ip, Transport) -> Statement| -> Vec<Rule> {
            flows()
                .map(|(ip, transport)| rule(of_protocol(ip, transport, statement(ip, transport))))
                .collect()
        };
        // A flow has one kind of ports: a rule that finds it in the maps of the other writes half of what it should.
        let other = if ports == Ports::Kept { Ports::Translated } else { Ports::Kept };
        let forget = |key: fn(Ip) -> Vec<Field>, map: &'static str, ports: Ports| {
            each_protocol(&|ip, transport| Statement::ForgetFlow {
                key: key(ip),
                map: transport.map(map, ports, ip),
            })
        };
        // What is a flow to a backend now was not the backend's own.
        let undirect = || {
            each_protocol(&|ip, transport| Statement::Forget {
                key: reply_key_backwards(ip),
                set: transport.name("direct", ip),
            })
        };
        let to_backend = || vec![rule(vec![jump(&name("to_backend"))])];
        let finish = || vec![rule(vec![goto("finish")])];

        // What is remembered of these addresses and ports is of another flow, though this one is not learnt yet.
        let there = PORTS.map(|ports| forget(flow_key, "flows", ports)).concat();
        let back = PORTS.map(|ports| forget(reply_key_backwards, "replies", ports)).concat();
        self.chain(&name("opened"), [there, to_backend(), undirect(), back, finish()].concat());
        self.chain(&name("redirected"), [to_backend(), undirect(), finish()].concat());
        let learned = name("learned_flow");
        let there = [forget(flow_key, "flows", other), learn(flow_key, "flows", None, &learned)];
        self.chain(&name("learn_flow"), there.concat());
        let back = learn(reply_key_backwards, "replies", None, "finish");
        let unlearn = forget(reply_key_backwards, "replies", other);
        self.chain(&learned, [to_backend(), undirect(), unlearn, back].concat());
        let closed = name("closed_flow");
        self.chain(&name("close_flow"), learn(flow_key, "flows", Some(CLOSE_TIMEOUT), &closed));
        let back = learn(reply_key_backwards, "replies", Some(CLOSE_TIMEOUT), "finish");
        self.chain(&closed, [to_backend(), back].concat());

        let replied = name("replied");
        self.chain(&replied, [vec![rule(vec![jump(&name("from_backend"))])], finish()].concat());
        let none = Statement::Is(Field::Mark(INDEX), Value::Mark(0));
        let direct = match ports {
            Ports::Kept => vec![rule(vec![none, goto("learn_direct")])],
            Ports::Translated => Vec::new(),
        };
        let back =
            [forget(reply_key, "replies", other), learn(reply_key, "replies", None, &replied)].concat();
        self.chain(&name("learn_reply"), [direct, back].concat());
        let mut close = forget(reply_key, "replies", ports);
        close.push(rule(vec![goto(&replied)]));
        self.chain(&name("close_reply"), close);
    }

    /// Static redirects work without an engine, for whole TCP and UDP packets: anything else would need what only the
    /// engine knows.
    fn static_chains(&mut self) {
        let to_static = || Statement::Vmap(vec![Field::EtherDestination], "static_redirects".to_string());
        let mut unanswered = Vec::new();
        // An answer that begins or ends a connection would have gone to the engine.
        for ip in IPS {
            for ports in PORTS {
                let back = Statement::RewriteFlow {
                    key: reply_key(ip),
                    flows: TCP.map("replies", ports, ip),
                    writes: ip.reply_writes(ports),
                };
                unanswered.push(rule([TCP.is_whole(ip), vec![back, goto("finish")]].concat()));
            }
        }
        unanswered.extend(
            flows().map(|(ip, transport)| rule([transport.is_whole(ip), vec![to_static()]].concat())),
        );
        unanswered.push(rule(vec![goto("finish")]));
        self.chain("unanswered", unanswered);
    }
}
