//! Sets and maps of the base table.

use super::BaseTable;
use super::learn::OPERATIONS;
use crate::limits::{BACKENDS_OF_NETWORK, MIDDLEBOXES_OF_NETWORK};
use crate::mark::Operation;
use crate::nft::dsl::set_of;
use crate::nft::family::{FAMILIES, PORT_REWRITES, PortRewrite, cached_flows, flow_key, reply_key};
use crate::nft::field::{Field, Type, Value};
use crate::nft::model::{Data, Dynamic, Element, ElementData, Set, Verdict};
use crate::nft::names::NETWORKS;
use crate::nft::options::QueuePath;
use crate::packet::{EXTENSIONS, ICMP_ERRORS, ICMP6_ERRORS};
use crate::timeouts::{
    BYPASS_TIMEOUT, FLOW_TIMEOUT, NEIGHBOUR_TIMEOUT, OPENING_TIMEOUT, OWN_TCP_SHORT_TIMEOUT,
};
use nfqd_shmctl::Protocol;
use std::collections::BTreeMap;

/// The number of flows that each kernel map can hold: as many as the engine.
const CACHED_FLOWS: u32 = 1 << 20;
/// The number of backends of a network whose MACs the kernel notes.
const NEIGHBOURS: u32 = 1 << 16;

impl BaseTable<'_> {
    pub(super) fn sets(&mut self) {
        self.middlebox_sets();
        self.operations();
        self.service_sets();
        self.backend_sets();
        self.flow_caches();
    }

    fn set(&mut self, name: &str, set: Set) {
        self.table.sets.insert(name.to_string(), set);
    }

    /// Sets of middleboxes, and maps to their chains.
    fn middlebox_sets(&mut self) {
        let mac = [Type::Mac];
        let verdicts = Some(Data::Verdict);
        let counting = |comment: &str| Set { counter: true, ..set_of(&mac, None, comment) };
        let comment = "middlebox to the chain of its kind";
        let size = Some(MIDDLEBOXES_OF_NETWORK);
        let middleboxes = Set { counter: true, size, ..set_of(&mac, verdicts, comment) };
        self.set("middleboxes", middleboxes);
        self.set("with_services", set_of(&mac, None, "middleboxes with services"));
        self.set("filters", set_of(&mac, verdicts, "middleboxes with filters"));
        self.set("closed", counting("middleboxes that drop what no rule allows"));
        if self.options.engine_is_blind() {
            let comment = "middleboxes with filters on what the engine does not see";
            self.set("tag_filters", set_of(&mac, verdicts, comment));
        }
        let comment = "redirects that work without the engine";
        self.set("static_redirects", set_of(&mac, verdicts, comment));
        if self.options.queue_path == QueuePath::BrNetfilter {
            let comment = "the mark that names the middlebox to the engine";
            self.set("upcall", set_of(&mac, verdicts, comment));
        }
    }

    /// The map of the engine's verdicts.
    fn operations(&mut self) {
        let comment = "verdict of the engine to the chain that carries it out";
        let mut operations = set_of(&[Type::Mark], Some(Data::Verdict), comment);
        for (operation, chain) in OPERATIONS {
            operations.elements.extend(operation_elements(operation, chain));
        }
        self.set("operations", operations);
    }

    /// Sets of the addresses and ports that services take.
    fn service_sets(&mut self) {
        for ip in FAMILIES {
            let keys = [Type::Mac, ip.address, Type::Port];
            for (name, parts, comment) in [
                ("service_all", 1, "middleboxes with a service that takes all packets"),
                ("service_addresses", 2, "addresses with a service that takes all ports"),
                ("service_ports", 3, "ports that a service takes"),
                ("service_pieces", 2, "addresses of service_ports, for fragments and ICMP"),
            ] {
                self.set(&ip.name(name), set_of(&keys[..parts], None, comment));
            }
        }
    }

    /// Sets of the addresses of middleboxes and backends.
    fn backend_sets(&mut self) {
        for ip in FAMILIES {
            let backends = set_of(&[ip.address], None, "addresses of backends");
            let size = Some(BACKENDS_OF_NETWORK);
            self.set(&ip.name("backends"), Set { size, ..backends });
            let comment = "registered addresses: the MAC of their middlebox";
            let owner = Some(Data::Value(Type::Mac));
            self.set(&ip.name("addresses"), set_of(&[ip.address], owner, comment));
            let comment = "addresses of backends, alive or not";
            self.set(&ip.name("watched"), set_of(&[ip.address], None, comment));
            let neighbours = Set {
                key: vec![ip.address],
                data: Some(Data::Value(Type::Mac)),
                dynamic: Some(Dynamic { timeout: NEIGHBOUR_TIMEOUT, size: NEIGHBOURS }),
                comment: Some("backends' own ARP and neighbour advertisements".to_string()),
                ..Set::default()
            };
            self.set(&ip.name("neighbours"), neighbours);
        }
    }

    /// Maps and sets that packets fill.
    fn flow_caches(&mut self) {
        let slot = Some(Data::Value(Type::Mark));
        for (ip, protocol) in cached_flows() {
            for ports in PORT_REWRITES {
                let flows = cache(flow_key(ip), slot, FLOW_TIMEOUT, "flows to backends: slot");
                let timeout = protocol.reply_timeout;
                let replies = cache(reply_key(ip), slot, timeout, "replies of backends: slot");
                self.set(&protocol.map("flows", ports, ip), flows);
                self.set(&protocol.map("replies", ports, ip), replies);
            }
            let comment = "answers to what middleboxes have begun";
            let own = cache(flow_key(ip), None, protocol.own_timeout, comment);
            self.set(&protocol.name("own", ip), own);
            if protocol.protocol == Protocol::TCP {
                let comment = "answers to what middleboxes have ended";
                let closing = cache(flow_key(ip), None, OWN_TCP_SHORT_TIMEOUT, comment);
                self.set(&protocol.name("own_closing", ip), closing);
                // A flood of SYNs fills these and nothing else.
                let comment = "connections that open, as their clients send them";
                let connecting = cache(flow_key(ip), None, OPENING_TIMEOUT, comment);
                self.set(&protocol.name("connecting", ip), connecting);
                for ports in PORT_REWRITES {
                    let comment = "answers of backends to connections that open: slot";
                    let opening = cache(reply_key(ip), slot, OPENING_TIMEOUT, comment);
                    self.set(&protocol.map("opening", ports, ip), opening);
                }
            }
            let bypass = cache(reply_key(ip), None, BYPASS_TIMEOUT, "the backends' own flows");
            self.set(&protocol.name("bypass", ip), bypass);
        }
    }
}

/// Returns the sets that all networks share: those that do not depend on the policy, and the maps of
/// slots.
pub(super) fn shared_sets() -> BTreeMap<String, Set> {
    let mut out = slot_maps();
    let comment = "may hide a transport header behind a fragment header";
    let mut extensions = set_of(&[Type::Protocol], None, comment);
    for header in EXTENSIONS {
        let key = vec![Value::Protocol(Protocol(header))];
        extensions.elements.insert(key, Element::default());
    }
    out.insert("extension_headers".to_string(), extensions);
    let icmp = ICMP_ERRORS.map(Value::IcmpType).to_vec();
    let icmp6 = ICMP6_ERRORS.map(Value::Icmp6Type).to_vec();
    for (name, of, types) in
        [("icmp_errors", Type::IcmpType, icmp), ("icmp6_errors", Type::Icmp6Type, icmp6)]
    {
        let mut set = set_of(&[of], None, "errors, which quote the packet that they are about");
        set.elements = types.into_iter().map(|kind| (vec![kind], Element::default())).collect();
        out.insert(name.to_string(), set);
    }
    let comment = "names of networks; nfqd keeps their numbers";
    out.insert(NETWORKS.to_string(), set_of(&[Type::Mark], None, comment));
    out
}

/// Returns the maps from slots to addresses and ports.
fn slot_maps() -> BTreeMap<String, Set> {
    let map = |data: Type, comment: &str| set_of(&[Type::Mark], Some(Data::Value(data)), comment);
    let counting = |set: Set| Set { counter: true, ..set };
    let mut out = BTreeMap::new();
    for ip in FAMILIES {
        out.insert(ip.name("backend_ip"), map(ip.address, "slot to the backend's address"));
        let comment = "slot to the frontend's address; counts packets from the backend";
        out.insert(ip.name("backend_vip"), counting(map(ip.address, comment)));
    }
    let comment = "slot to the backend's MAC; counts packets to the backend";
    out.insert("backend_mac".to_string(), counting(map(Type::Mac, comment)));
    out.insert("backend_port".to_string(), map(Type::Port, "slot to the backend's port"));
    out.insert("backend_vport".to_string(), map(Type::Port, "slot to the frontend's port"));
    out
}

fn cache(key: Vec<Field>, data: Option<Data>, timeout: u32, comment: &str) -> Set {
    Set {
        key: key.into_iter().filter_map(Field::set_type).collect(),
        data,
        dynamic: Some(Dynamic { timeout, size: CACHED_FLOWS }),
        comment: Some(comment.to_string()),
        ..Set::default()
    }
}

/// Returns the elements of the map of operations for one of them.
fn operation_elements(operation: Operation, chain: &str) -> Vec<(Vec<Value>, Element)> {
    let element = |ports: PortRewrite| {
        let data = Some(ElementData::Verdict(Verdict::Goto(ports.chain(chain))));
        let bits = operation.bits(ports == PortRewrite::Translated);
        (vec![Value::Mark(bits)], Element { data, ..Element::default() })
    };
    match operation {
        Operation::Local => vec![element(PortRewrite::Kept)],
        _ => PORT_REWRITES.map(element).to_vec(),
    }
}
