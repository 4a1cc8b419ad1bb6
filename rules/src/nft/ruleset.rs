//! Which tables, chains, sets and elements a policy needs.
//!
//! Base chains and rules stand; a policy is elements. Only a new shape of deny rule adds a set and a rule, and only
//! what no set can say (more than five fields, a TOS byte) becomes plain rules, in a chain of its middlebox.
//!
//! The way of a frame is in `docs/ARCHITECTURE.md`.

use super::field::{Field, Type, Value};
use super::model::{
    Chain, Data, Dynamic, Element, ElementData, Family, Queues, Rule, Set, Statement, Table, Verdict, Write,
};
use crate::filter::Conditions;
use crate::mark::{self, INDEX, OPERATION, OURS, Operation};
use crate::packet::VLAN_TYPES;
use crate::policy::{Middlebox, Policy};
use crate::slots::{Slot, SlotKey, Slots};
use nfqd_shmctl::{AddressRange, Balance, EtherType, MacAddr, MacMask, NumberRange, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// Seconds that the kernel remembers a flow towards a backend. It is not refreshed: a live flow shows itself to the
/// engine once in that time and gets the same backend again.
pub const FLOW_TIMEOUT: u32 = 60;
/// Seconds that it remembers the way back: longer, so that the way there is renewed first.
pub const REPLY_TIMEOUT: u32 = 90;
/// Flows that each kernel map can hold.
const FLOWS: u32 = 262_144;

/// Shapes that one middlebox may bring: each is a look-up for every packet to any middlebox. Further rules go into a
/// chain of its own.
const MAX_SHAPES: usize = 4;

/// The parts of a key that nft of Debian 12 lists rightly.
const MAX_KEY: usize = 5;

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
/// Priority of the ip and ip6 chains that queue: before connection tracking ("raw").
const ASK_PRIORITY: i32 = -300;

/// The ruleset that a policy needs.
pub fn build(policy: &Policy, slots: &Slots, options: &Options) -> Ruleset {
    let mut builder = Builder { table: empty(Family::Bridge), policy, slots, options };
    builder.registrations();
    builder.backends();
    builder.caches();
    let shapes = builder.deny_rules();
    builder.steering(&shapes);
    builder.verdicts();
    let mut out = Ruleset::from([(Family::Bridge, builder.table)]);
    if options.steer == Steer::BrNetfilter {
        out.extend([Family::Ip, Family::Ip6].map(|family| (family, queueing(family, options.queues))));
    }
    out
}

fn empty(family: Family) -> Table {
    Table { family, sets: BTreeMap::new(), chains: BTreeMap::new() }
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
    let mut table = empty(family);
    table.chains.insert("ask".to_string(), Chain { priority: Some(ASK_PRIORITY), rules: vec![rule] });
    table
}

fn rule(statements: Vec<Statement>) -> Rule {
    Rule { statements, comment: None }
}

fn commented(statements: Vec<Statement>, comment: &str) -> Rule {
    Rule { statements, comment: Some(comment.to_string()) }
}

fn verdict(verdict: Verdict) -> Statement {
    Statement::Verdict(verdict)
}

fn accept() -> Statement {
    verdict(Verdict::Accept)
}

fn goto(chain: &str) -> Statement {
    verdict(Verdict::Goto(chain.to_string()))
}

fn jump(chain: &str) -> Statement {
    verdict(Verdict::Jump(chain.to_string()))
}

fn set_of(key: &[Type], data: Option<Data>, comment: &str) -> Set {
    Set {
        key: key.to_vec(),
        data,
        dynamic: None,
        counter: false,
        comment: Some(comment.to_string()),
        elements: BTreeMap::new(),
    }
}

/// The name of a middlebox' own chain.
fn own_chain(what: &str, mac: MacAddr) -> String {
    format!("{what}_{}", mac.to_string().replace(':', ""))
}

/// The middlebox that a chain of its own is named for, from the twelve digits behind the name.
pub(super) fn mac_of_chain(digits: &str) -> Option<MacAddr> {
    let bytes: Vec<u8> =
        (0..12).step_by(2).map_while(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()).collect();
    (digits.len() == 12).then(|| bytes.try_into().ok().map(MacAddr))?
}

/// One of the two IP families, with its fields and map names.
#[derive(Clone, Copy)]
struct Ip {
    ether_type: EtherType,
    suffix: char,
    source: Field,
    destination: Field,
    address: Type,
}

const IPV4: Ip = Ip {
    ether_type: EtherType::IPV4,
    suffix: '4',
    source: Field::Ip4Source,
    destination: Field::Ip4Destination,
    address: Type::Ip4,
};
const IPV6: Ip = Ip {
    ether_type: EtherType::IPV6,
    suffix: '6',
    source: Field::Ip6Source,
    destination: Field::Ip6Destination,
    address: Type::Ip6,
};
const IPS: [Ip; 2] = [IPV4, IPV6];

impl Ip {
    fn of(address: IpAddr) -> Ip {
        if address.is_ipv4() { IPV4 } else { IPV6 }
    }

    fn name(self, map: &str) -> String {
        format!("{map}{}", self.suffix)
    }

    fn is(self) -> Statement {
        Statement::Is(Field::EtherType, Value::EtherType(self.ether_type))
    }

    fn redirect_writes(self) -> Vec<Write> {
        vec![
            Write { field: self.destination, map: self.name("backend_ip") },
            Write { field: Field::EtherDestination, map: "backend_mac".to_string() },
        ]
    }

    fn reply_writes(self) -> Vec<Write> {
        vec![Write { field: self.source, map: self.name("backend_vip") }]
    }
}

/// A protocol whose flows the kernel remembers.
#[derive(Clone, Copy)]
struct Transport {
    protocol: Protocol,
    name: &'static str,
    checksum: Field,
}

const TRANSPORTS: [Transport; 2] = [
    Transport { protocol: Protocol::TCP, name: "tcp", checksum: Field::TcpChecksum },
    Transport { protocol: Protocol::UDP, name: "udp", checksum: Field::UdpChecksum },
];

impl Transport {
    fn name(self, map: &str, ip: Ip) -> String {
        format!("{map}_{}{}", self.name, ip.suffix)
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

/// The fields that deny rules of one shape compare, and what holds for all of them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Shape {
    /// Only packets of this EtherType; one of the IP families.
    family: Option<EtherType>,
    /// Only packets whose IP header holds together.
    needs_ip: bool,
    /// Only packets of the protocol whose ports are compared.
    transport: Option<Protocol>,
    /// The fields behind the middlebox' MAC.
    fields: Vec<Field>,
}

impl Shape {
    fn name(&self) -> String {
        let mut name = "deny".to_string();
        match self.family {
            Some(EtherType::IPV4) => name.push('4'),
            Some(_) => name.push('6'),
            None => {}
        }
        name.push_str(match self.transport {
            Some(Protocol::TCP) => "_tcp",
            Some(_) => "_udp",
            None => "",
        });
        for field in &self.fields {
            name.push_str(match field {
                Field::EtherSource => "_ether",
                Field::EtherType => "_type",
                Field::L4Protocol => "_proto",
                Field::SourcePort => "_sport",
                Field::DestinationPort => "_dport",
                Field::Ip4Source | Field::Ip6Source => "_saddr",
                _ => "_daddr",
            });
        }
        name
    }

    /// What a packet must be before the key is looked up.
    fn guards(&self) -> Vec<Statement> {
        let mut out = Vec::new();
        out.extend(self.family.map(|family| Statement::Is(Field::EtherType, Value::EtherType(family))));
        if let Some(protocol) = self.transport {
            out.push(Statement::Is(Field::L4Protocol, Value::Protocol(protocol)));
        } else if self.needs_ip && !self.fields.contains(&Field::L4Protocol) {
            out.push(Statement::Present(Field::L4Protocol));
        }
        out
    }

    fn key(&self) -> Vec<Field> {
        [&[Field::EtherDestination], self.fields.as_slice()].concat()
    }

    fn rule(&self) -> Rule {
        let mut statements = self.guards();
        statements.push(Statement::In(self.key(), self.name()));
        statements.push(verdict(Verdict::Drop));
        rule(statements)
    }

    fn set(&self) -> Set {
        let key: Vec<Type> = self.key().into_iter().filter_map(Field::set_type).collect();
        Set {
            key,
            data: None,
            dynamic: None,
            counter: true,
            comment: Some("denied: a match drops".to_string()),
            elements: BTreeMap::new(),
        }
    }
}

/// What a field must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Test {
    Is(Value),
    Between(Value, Value),
    Masked { mask: Value, bits: Value },
}

impl Test {
    /// The one value, where only one passes.
    fn exact(self) -> Option<Value> {
        match self {
            Test::Is(value) => Some(value),
            _ => None,
        }
    }

    fn between(first: Value, last: Value) -> Test {
        if first == last { Test::Is(first) } else { Test::Between(first, last) }
    }

    fn addresses(range: AddressRange) -> Test {
        Test::between(Value::Ip(range.first()), Value::Ip(range.last()))
    }

    fn numbers(range: NumberRange) -> Test {
        Test::between(Value::Port(range.first()), Value::Port(range.last()))
    }

    fn macs(mask: MacMask) -> Test {
        match mask.exact() {
            Some(mac) => Test::Is(Value::Mac(mac)),
            None => Test::Masked { mask: Value::Mac(mask.mask()), bits: Value::Mac(mask.bits()) },
        }
    }

    fn statement(self, field: Field) -> Statement {
        match self {
            Test::Is(value) => Statement::Is(field, value),
            Test::Between(first, last) => Statement::Between(field, first, last),
            Test::Masked { mask, bits } => Statement::Masked(field, mask, bits),
        }
    }
}

/// The shape of conditions, and the tests behind the middlebox' MAC.
fn shape(conditions: &Conditions) -> (Shape, Vec<(Field, Test)>) {
    let Conditions {
        source_mac,
        vlan,
        ether_type,
        source,
        destination,
        tos,
        protocol,
        source_port,
        destination_port,
    } = *conditions;
    let addresses = source.or(destination);
    let needs_ip = conditions.need_ip();
    let family = match (addresses, ether_type) {
        (Some(range), _) => Some(Ip::of(range.first()).ether_type),
        // Beside fields of the IP header an EtherType can only be one of the two.
        (None, Some(named)) if needs_ip => Some(named),
        // The two families keep their traffic class in different places.
        _ => None,
    };
    let ip = if family == Some(EtherType::IPV6) { IPV6 } else { IPV4 };
    let transport = protocol.filter(|_| conditions.need_ports());
    let tos_field = if ip.suffix == '4' { Field::Ip4Tos } else { Field::Ip6TrafficClass };
    let fields = [
        source_mac.map(|mask| (Field::EtherSource, Test::macs(mask))),
        vlan.map(|ids| (Field::VlanId, Test::numbers(ids))),
        ether_type
            .filter(|_| family.is_none())
            .map(|named| (Field::EtherType, Test::Is(Value::EtherType(named)))),
        source.map(|range| (ip.source, Test::addresses(range))),
        destination.map(|range| (ip.destination, Test::addresses(range))),
        tos.map(|tos| (tos_field, Test::Is(Value::Tos(tos)))),
        protocol
            .filter(|_| transport.is_none())
            .map(|protocol| (Field::L4Protocol, Test::Is(Value::Protocol(protocol)))),
        source_port.map(|range| (Field::SourcePort, Test::numbers(range))),
        destination_port.map(|range| (Field::DestinationPort, Test::numbers(range))),
    ];
    let fields: Vec<(Field, Test)> = fields.into_iter().flatten().collect();
    let names = fields.iter().map(|(field, _)| *field).collect();
    (Shape { family, needs_ip, transport, fields: names }, fields)
}

/// The values of the tests as a set's key holds them, when a set can: exact values of fields that a key can have.
fn exact_values(fields: &[(Field, Test)]) -> Option<Vec<Value>> {
    let value = |(field, test): &(Field, Test)| field.set_type().and_then(|_| test.exact());
    if fields.len() < MAX_KEY { fields.iter().map(value).collect() } else { None }
}

struct Builder<'a> {
    table: Table,
    policy: &'a Policy,
    slots: &'a Slots,
    options: &'a Options,
}

impl Builder<'_> {
    fn set(&mut self, name: &str, set: Set) {
        self.table.sets.insert(name.to_string(), set);
    }

    fn element(&mut self, set: &str, key: Vec<Value>, element: Element) {
        if let Some(set) = self.table.sets.get_mut(set) {
            // Two rules of one middlebox may ask for the same; the first stays.
            set.elements.entry(key).or_insert(element);
        }
    }

    fn chain(&mut self, name: &str, rules: Vec<Rule>) {
        self.table.chains.insert(name.to_string(), Chain { priority: None, rules });
    }

    fn middleboxes(&self) -> impl Iterator<Item = (MacAddr, &Middlebox)> {
        self.policy.middleboxes().iter().map(|(&mac, middlebox)| (mac, middlebox.as_ref()))
    }

    /// Sets of MACs, and the chains that middleboxes have of their own.
    fn registrations(&mut self) {
        let mac = [Type::Mac];
        let verdicts = Some(Data::Verdict);
        let mut middleboxes = set_of(&mac, None, "registered middleboxes");
        middleboxes.counter = true;
        let mut balanced = set_of(&mac, None, "middleboxes with balanced addresses");
        for (mac, middlebox) in self.middleboxes() {
            let comment = middlebox.ip().map(|ip| ip.to_string());
            middleboxes.elements.insert(vec![Value::Mac(mac)], Element { data: None, comment });
            if !middlebox.services().is_empty() {
                balanced.elements.insert(vec![Value::Mac(mac)], Element::default());
            }
        }
        self.set("middleboxes", middleboxes);
        self.set("balanced", balanced);
        self.set("deny_rules", set_of(&mac, verdicts, "middleboxes with deny rules that no set can hold"));
        if self.engine_is_blind() {
            self.set(
                "link_rules",
                set_of(&mac, verdicts, "middleboxes with deny rules about what the engine does not see"),
            );
        }
        self.set("static_redirects", set_of(&mac, verdicts, "what happens without an engine"));
        if self.options.steer == Steer::BrNetfilter {
            self.set("ask", set_of(&mac, verdicts, "the mark by which the engine knows the middlebox"));
        }
    }

    /// Gives a middlebox a chain of its own, which a map of verdicts leads to.
    fn own_chain(&mut self, map: &str, mac: MacAddr, comment: Option<String>, rules: Vec<Rule>) {
        let chain = own_chain(map, mac);
        let data = Some(ElementData::Verdict(Verdict::Jump(chain.clone())));
        self.element(map, vec![Value::Mac(mac)], Element { data, comment });
        self.chain(&chain, rules);
    }

    /// Maps from slots to addresses.
    fn backends(&mut self) {
        let map = |data: Type, comment: &str| set_of(&[Type::Mark], Some(Data::Value(data)), comment);
        for ip in IPS {
            self.set(&ip.name("backends"), set_of(&[ip.address], None, "addresses of backends"));
            self.set(&ip.name("backend_ip"), map(ip.address, "slot to the backend's address"));
            self.set(&ip.name("backend_vip"), map(ip.address, "slot to the address that clients use"));
        }
        self.set("backend_mac", map(Type::Mac, "slot to the backend's MAC"));
        let slots: Vec<(SlotKey, Slot)> = self.slots.iter().collect();
        for (key, slot) in slots {
            let (ip, Slot { index, mac, .. }) = (Ip::of(key.backend), slot);
            let entry = |value: Value| Element {
                data: Some(ElementData::Value(value)),
                comment: Some(slot.comment(key)),
            };
            let slot = vec![Value::Mark(mark::index_bits(index))];
            self.element(&ip.name("backends"), vec![Value::Ip(key.backend)], Element::default());
            self.element(&ip.name("backend_vip"), slot.clone(), entry(Value::Ip(key.vip)));
            // Without a MAC there is no way there: a flow that is cached misses and asks the engine.
            let Some(mac) = mac else { continue };
            self.element(&ip.name("backend_ip"), slot.clone(), entry(Value::Ip(key.backend)));
            self.element("backend_mac", slot, entry(Value::Mac(mac)));
        }
    }

    /// Maps that packets fill.
    fn caches(&mut self) {
        let cache = |key: Vec<Field>, data: Option<Data>, timeout: u32, comment: &str| Set {
            key: key.into_iter().filter_map(Field::set_type).collect(),
            data,
            dynamic: Some(Dynamic { timeout, size: FLOWS }),
            counter: false,
            comment: Some(comment.to_string()),
            elements: BTreeMap::new(),
        };
        let slot = Some(Data::Value(Type::Mark));
        for (ip, transport) in flows() {
            let flows = cache(flow_key(ip), slot, FLOW_TIMEOUT, "flows to backends, by slot");
            let replies = cache(reply_key(ip), slot, REPLY_TIMEOUT, "flows back from backends, by slot");
            let direct = cache(reply_key(ip), None, REPLY_TIMEOUT, "a backend's own flows");
            self.set(&transport.name("flows", ip), flows);
            self.set(&transport.name("replies", ip), replies);
            self.set(&transport.name("direct", ip), direct);
        }
    }

    /// Sets by shape with their elements, and plain rules for the rest. The shapes come back.
    fn deny_rules(&mut self) -> BTreeSet<Shape> {
        let mut shapes = BTreeSet::new();
        let mut plain: BTreeMap<MacAddr, Vec<(bool, Rule)>> = BTreeMap::new();
        let mut tagged: BTreeMap<MacAddr, Vec<(bool, Rule)>> = BTreeMap::new();
        let mut elements = Vec::new();
        for (mac, middlebox) in self.middleboxes() {
            let mut own: BTreeSet<Shape> = BTreeSet::new();
            for (number, conditions) in middlebox.firewall().into_iter().flat_map(|f| f.conditions()) {
                let comment = format!("rule {number}");
                let (shape, fields) = shape(conditions);
                let room = own.contains(&shape) || own.len() < MAX_SHAPES;
                if let Some(values) = exact_values(&fields).filter(|_| room) {
                    own.insert(shape.clone());
                    let key = [vec![Value::Mac(mac)], values].concat();
                    elements.push((shape.name(), key, comment));
                    shapes.insert(shape);
                } else {
                    let rules = plain_rules(&shape, &fields, &comment);
                    let rules = rules.into_iter().map(|rule| (shape.transport.is_some(), rule));
                    if self.engine_is_blind() && (conditions.vlan.is_some() || !shape.needs_ip) {
                        tagged.entry(mac).or_default().extend(rules);
                    } else {
                        plain.entry(mac).or_default().extend(rules);
                    }
                }
            }
        }
        for shape in &shapes {
            self.set(&shape.name(), shape.set());
        }
        for (set, key, comment) in elements {
            self.element(&set, key, Element { data: None, comment: Some(comment) });
        }
        for (map, plain) in [("deny_rules", plain), ("link_rules", tagged)] {
            for (mac, rules) in plain {
                let (with_ports, without): (Vec<_>, Vec<_>) =
                    rules.into_iter().partition(|(ports, _)| *ports);
                let mut chain: Vec<Rule> = without.into_iter().map(|(_, rule)| rule).collect();
                if !with_ports.is_empty() {
                    chain.extend(later_fragments_return());
                    chain.extend(with_ports.into_iter().map(|(_, rule)| rule));
                }
                self.own_chain(map, mac, None, chain);
            }
        }
        shapes
    }

    /// Whether the engine decides and sees neither VLAN tags nor frames that are not IP: rules about these stay in the
    /// kernel.
    fn engine_is_blind(&self) -> bool {
        self.options.fast_path == FastPath::Off && self.options.steer == Steer::BrNetfilter
    }

    /// The chain that steers, and what it leads to.
    fn steering(&mut self, shapes: &BTreeSet<Shape>) {
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
        if full {
            steer.push(rule(vec![to_middlebox("balanced"), goto("balance")]));
        }
        let steer = Chain { priority: Some(STEER_PRIORITY), rules: steer };
        self.table.chains.insert("steer".to_string(), steer);
        self.middlebox_chain(shapes, full);
        self.engine_chain();
        if full {
            self.fast_chains();
        }
    }

    /// Deny rules. Without the fast path the engine applies them, to everything that can reach it: br_netfilter carries
    /// IPv4 and IPv6 only.
    fn middlebox_chain(&mut self, shapes: &BTreeSet<Shape>, full: bool) {
        let mut rules: Vec<Rule> = Vec::new();
        if full {
            let (with_ports, without): (Vec<&Shape>, Vec<&Shape>) =
                shapes.iter().partition(|shape| shape.transport.is_some());
            rules.extend(without.into_iter().map(Shape::rule));
            rules.push(rule(vec![Statement::Vmap(vec![Field::EtherDestination], "deny_rules".to_string())]));
            if !with_ports.is_empty() {
                rules.extend(later_fragments_return());
                rules.extend(with_ports.into_iter().map(Shape::rule));
            }
        } else if self.engine_is_blind() {
            rules.push(rule(vec![Statement::Vmap(vec![Field::EtherDestination], "link_rules".to_string())]));
            rules.extend(IPS.map(|ip| rule(vec![ip.is(), goto("engine")])));
            rules.extend(shapes.iter().filter(|shape| !shape.needs_ip).map(Shape::rule));
        }
        self.chain("middlebox", rules);
    }

    /// The way into the queue.
    fn engine_chain(&mut self) {
        let ask = |index: u32| Statement::SetMark {
            keep: !OURS,
            set: Operation::Ask as u32 | mark::index_bits(index),
        };
        let rules = match self.options.steer {
            Steer::Native => {
                vec![rule(vec![ask(0), Statement::Counter, Statement::Queue(self.options.queues)])]
            }
            Steer::BrNetfilter => {
                for (mac, index) in self.slots.middleboxes() {
                    let rules = vec![rule(vec![ask(index), Statement::Counter, accept()])];
                    self.own_chain("ask", mac, Some(index.to_string()), rules);
                }
                vec![
                    rule(vec![Statement::Vmap(vec![Field::EtherDestination], "ask".to_string())]),
                    rule(vec![ask(0), Statement::Counter, accept()]),
                ]
            }
        };
        self.chain("engine", rules);
    }

    /// Known flows, there and back.
    fn fast_chains(&mut self) {
        let mut redirect = Vec::new();
        for (ip, transport) in flows() {
            let known = Statement::RewriteFlow {
                key: flow_key(ip),
                flows: transport.name("flows", ip),
                writes: ip.redirect_writes(),
            };
            redirect.push(commented(
                [transport.is_whole(ip), vec![known, accept()]].concat(),
                "a known flow; the mark is put back",
            ));
        }
        redirect.extend(IPS.map(|ip| rule(vec![ip.is(), goto("engine")])));
        self.chain("balance", redirect);
        for ip in IPS {
            let mut reply = Vec::new();
            for transport in TRANSPORTS {
                let known = Statement::RewriteFlow {
                    key: reply_key(ip),
                    flows: transport.name("replies", ip),
                    writes: ip.reply_writes(),
                };
                let direct = Statement::In(reply_key(ip), transport.name("direct", ip));
                reply.push(commented(
                    [transport.is_whole(ip), vec![known, accept()]].concat(),
                    "the way back; the mark is put back",
                ));
                // What a backend says of itself to a balanced middlebox may still be redirected.
                reply.push(rule([transport.is_whole(ip), vec![direct, verdict(Verdict::Return)]].concat()));
            }
            reply.push(rule(vec![
                Statement::In(vec![Field::EtherDestination], "balanced".to_string()),
                verdict(Verdict::Return),
            ]));
            reply.push(rule(vec![goto("engine")]));
            self.chain(&ip.name("reply"), reply);
        }
    }

    /// The chain that carries out the engine's verdicts, and what happens without one.
    fn verdicts(&mut self) {
        let is = |operation: Operation| Statement::Is(Field::Mark(OPERATION), Value::Mark(operation as u32));
        let learn = vec![
            commented(
                vec![Statement::Is(Field::Mark(OPERATION), Value::Mark(0)), accept()],
                "not from the engine, or nothing to do",
            ),
            rule(vec![is(Operation::RedirectLearn), goto("learn_flow")]),
            rule(vec![is(Operation::ReplyLearn), goto("learn_reply")]),
            rule(vec![is(Operation::Redirect), goto("redirected")]),
            rule(vec![is(Operation::Reply), goto("replied")]),
            commented(vec![goto("unanswered")], "no engine, or its queue was full"),
        ];
        let learn = Chain { priority: Some(LEARN_PRIORITY), rules: learn };
        self.table.chains.insert("learn".to_string(), learn);
        let finish = vec![Statement::SetMark { keep: !OURS, set: 0 }, accept()];
        self.chain("finish", vec![commented(finish, "no bit of ours leaves")]);
        self.chain("replied", vec![rule(vec![jump("from_backend")]), rule(vec![goto("finish")])]);
        self.chain(
            "to_backend",
            IPS.map(|ip| rule(vec![ip.is(), Statement::Rewrite(ip.redirect_writes())])).to_vec(),
        );
        self.chain(
            "from_backend",
            IPS.map(|ip| rule(vec![ip.is(), Statement::Rewrite(ip.reply_writes())])).to_vec(),
        );

        // A rule that learns may fail when its map is full; the packet goes on all the same.
        let is_protocol = |ip: Ip, transport: Transport| {
            vec![ip.is(), Statement::Is(Field::L4Protocol, Value::Protocol(transport.protocol))]
        };
        let learns = |key: fn(Ip) -> Vec<Field>, map: &str| -> Vec<Rule> {
            let one = |(ip, transport): (Ip, Transport)| {
                let learn = Statement::Learn { key: key(ip), map: transport.name(map, ip) };
                rule([is_protocol(ip, transport), vec![learn]].concat())
            };
            flows().map(one).collect()
        };
        // What is a flow to the backend now was not the backend's own conversation.
        let forgets: Vec<Rule> = flows()
            .map(|(ip, transport)| {
                let forget =
                    Statement::Forget { key: reply_key_backwards(ip), set: transport.name("direct", ip) };
                rule([is_protocol(ip, transport), vec![forget]].concat())
            })
            .collect();
        let redirected =
            [vec![rule(vec![jump("to_backend")])], forgets.clone(), vec![rule(vec![goto("finish")])]];
        self.chain("redirected", redirected.concat());

        let mut learn_flow = learns(flow_key, "flows");
        learn_flow.push(rule(vec![jump("to_backend")]));
        learn_flow.extend(learns(reply_key_backwards, "replies"));
        learn_flow.extend(forgets);
        learn_flow.push(rule(vec![goto("finish")]));
        self.chain("learn_flow", learn_flow);

        let none = Statement::Is(Field::Mark(INDEX), Value::Mark(0));
        let mut learn_reply = vec![rule(vec![none, goto("learn_direct")])];
        learn_reply.extend(learns(reply_key, "replies"));
        learn_reply.push(rule(vec![jump("from_backend")]));
        learn_reply.push(rule(vec![goto("finish")]));
        self.chain("learn_reply", learn_reply);

        let mut learn_direct: Vec<Rule> = flows()
            .map(|(ip, transport)| {
                let set = transport.name("direct", ip);
                let remember = Statement::Remember { key: reply_key(ip), set };
                rule([is_protocol(ip, transport), vec![remember]].concat())
            })
            .collect();
        learn_direct.push(rule(vec![goto("finish")]));
        self.chain("learn_direct", learn_direct);
        self.static_chains();
    }

    /// Static redirects work without an engine, for whole TCP and UDP packets: anything else would need what only the
    /// engine knows.
    fn static_chains(&mut self) {
        let to_static = || Statement::Vmap(vec![Field::EtherDestination], "static_redirects".to_string());
        let mut unanswered: Vec<Rule> = flows()
            .map(|(ip, transport)| rule([transport.is_whole(ip), vec![to_static()]].concat()))
            .collect();
        unanswered.push(rule(vec![goto("finish")]));
        self.chain("unanswered", unanswered);
        let mut chains = Vec::new();
        for (mac, middlebox) in self.middleboxes() {
            if !middlebox.services().is_empty() {
                chains.push((mac, self.static_rules(mac, middlebox)));
            }
        }
        for (mac, rules) in chains {
            self.own_chain("static_redirects", mac, None, rules);
        }
    }

    /// One rule a service, those for the packet's own destination address first; see [`crate::decide::redirected`].
    fn static_rules(&self, middlebox: MacAddr, of: &Middlebox) -> Vec<Rule> {
        let mut own = Vec::new();
        let mut others = Vec::new();
        for (&vip, balance) in of.services() {
            let to = balance.destination();
            let key = SlotKey { middlebox, vip, backend: to.ip };
            let Some(Slot { index, mac: Some(_), .. }) = self.slots.get(&key) else { continue };
            let ip = Ip::of(vip);
            let mut conditions = vec![ip.is()];
            match balance {
                Balance::Static(_) => conditions.push(Statement::IsNot(ip.source, Value::Ip(to.ip))),
                Balance::Source(source, _) if *source == to.ip => continue,
                Balance::Source(source, _) => conditions.push(Statement::Is(ip.source, Value::Ip(*source))),
            }
            let operation = Operation::RedirectLearn as u32 | mark::index_bits(index);
            let redirect = vec![Statement::SetMark { keep: !OURS, set: operation }, goto("learn_flow")];
            let to_vip = Statement::Is(ip.destination, Value::Ip(vip));
            let comment = format!("R L {middlebox} {vip} {balance}");
            own.push(commented([conditions.clone(), vec![to_vip], redirect.clone()].concat(), &comment));
            others.push(commented([conditions, redirect].concat(), &comment));
        }
        if own.len() > 1 { [own, others].concat() } else { others }
    }
}

/// Goes before rules that load ports: later fragments have none. nft's slow path knows that, but the fast one
/// (`nft_payload_fast_eval`, seen in 6.18) reads whatever stands there.
fn later_fragments_return() -> [Rule; 2] {
    const OFFSET: u16 = 0x1fff;
    [(IPV4, Field::Ip4FragmentOffset(OFFSET)), (IPV6, Field::Ip6FragmentOffset)].map(|(ip, offset)| {
        rule(vec![ip.is(), Statement::IsNot(offset, Value::Port(0)), verdict(Verdict::Return)])
    })
}

/// A deny rule that no set holds: one rule; one a family when the TOS byte has no family, one a kind of VLAN tag.
fn plain_rules(shape: &Shape, fields: &[(Field, Test)], comment: &str) -> Vec<Rule> {
    let has = |wanted: &[Field]| fields.iter().any(|(field, _)| wanted.contains(field));
    let families: Vec<Option<Ip>> = match shape.family {
        None if has(&[Field::Ip4Tos, Field::Ip6TrafficClass]) => IPS.map(Some).to_vec(),
        None => vec![None],
        Some(EtherType::IPV6) => vec![Some(IPV6)],
        Some(_) => vec![Some(IPV4)],
    };
    let tags: Vec<Option<EtherType>> =
        if has(&[Field::VlanId]) { VLAN_TYPES.map(EtherType::new).to_vec() } else { vec![None] };
    let one = |ip: Option<Ip>, tag: Option<EtherType>| {
        let is_family = |guard: &Statement| matches!(guard, Statement::Is(Field::EtherType, _));
        let is_tag = tag.map(|tag| Statement::Is(Field::OuterType, Value::EtherType(tag)));
        let mut statements: Vec<Statement> = is_tag.into_iter().chain(ip.map(Ip::is)).collect();
        statements.extend(shape.guards().into_iter().filter(|guard| !is_family(guard)));
        for &(field, test) in fields {
            let field = match field {
                Field::Ip4Tos if ip.is_some_and(|ip| ip.suffix == '6') => Field::Ip6TrafficClass,
                field => field,
            };
            statements.push(test.statement(field));
        }
        statements.push(Statement::Counter);
        statements.push(verdict(Verdict::Drop));
        commented(statements, comment)
    };
    families
        .iter()
        .flat_map(|&ip| tags.iter().map(move |&tag| (ip, tag)))
        .map(|(ip, tag)| one(ip, tag))
        .collect()
}
