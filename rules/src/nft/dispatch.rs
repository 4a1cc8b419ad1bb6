//! Dispatch: the maps that lead a frame from the port that it came in by to the chains of its
//! network. A frame of a bridge without middleboxes leaves after one look-up. A port that nfqd does
//! not know yet may be of any network, so its frames pass the filters of all.
//!
//! | map or chain | leads to |
//! |---|---|
//! | `ports` | the network of a port, or `BRIDGE/by_vlan` if the bridge is VLAN-aware |
//! | `BRIDGE/vlans` | the network of a tag |
//! | `BRIDGE/untagged` | the network of untagged frames, by port |
//!
//! There is a second set of them for frames that come back from the engine, and a third one for those
//! of the host itself, which are filtered at the port that they leave by.

use super::dsl::{commented, goto, jump, rule, set_of, verdict};
use super::field::{Field, Type, Value};
use super::model::{
    Chain, Data, Element, ElementData, Family, Rule, Set, Statement, Table, Verdict,
};
use super::options::QueuePath;
use super::table::base_chain;
use crate::network::{NetworkId, Networks, PortVlans};
use crate::slots::Slots;
use nfqd_shmctl::EtherType;
use std::collections::{BTreeMap, BTreeSet};

/// A time that a frame is dispatched.
#[derive(Clone, Copy)]
struct Pass {
    /// The end of the names of maps and chains.
    suffix: &'static str,
    /// The chain of a network that the frame is led to.
    entry: &'static str,
    /// The chain for frames that come in by the port of a middlebox with services.
    vm_entry: &'static str,
    /// The chain that only filters, for frames that may be of another network.
    filter_entry: &'static str,
    /// The base chain.
    base: &'static str,
    /// The field of the port.
    port: Field,
}

const PASSES: [Pass; 3] = [
    Pass {
        suffix: "",
        entry: "frames",
        vm_entry: "vm_frames",
        filter_entry: "to_middlebox",
        base: "steer",
        port: Field::InputInterface,
    },
    Pass {
        suffix: "_back",
        entry: "verdicts",
        vm_entry: "verdicts",
        filter_entry: "verdicts",
        base: "learn",
        port: Field::InputInterface,
    },
    Pass {
        suffix: "_out",
        entry: "from_host",
        vm_entry: "from_host",
        filter_entry: "from_host",
        base: "host",
        port: Field::OutputInterface,
    },
];

/// The most ports of all bridges together; a bridge has at most 1024 (BR_MAX_PORTS).
const PORTS: u32 = 1 << 14;

/// Returns the maps from ports, without their elements.
fn port_maps() -> BTreeMap<String, Set> {
    let comment = "port to the chain of its network";
    let map = Set { size: Some(PORTS), ..set_of(&[Type::Interface], Some(Data::Verdict), comment) };
    PASSES.map(|pass| (format!("ports{}", pass.suffix), map.clone())).into()
}

/// Returns the dispatch to the networks that have middleboxes, with the base chains.
pub(super) fn dispatch(networks: &Networks, slots: &Slots, path: QueuePath) -> Table {
    let mut out = Table::new(Family::Bridge);
    out.sets = port_maps();
    for pass in PASSES {
        let vm_ports = networks.vm_ports().collect();
        Dispatch { networks, slots, vm_ports, pass, path, out: &mut out }.fill();
    }
    out
}

struct Dispatch<'a> {
    networks: &'a Networks,
    slots: &'a Slots,
    vm_ports: BTreeSet<(NetworkId, u32)>,
    pass: Pass,
    path: QueuePath,
    out: &'a mut Table,
}

impl Dispatch<'_> {
    fn fill(&mut self) {
        let ports = format!("ports{}", self.pass.suffix);
        let mut aware: BTreeMap<NetworkId, (EtherType, Vec<(u32, u16)>)> = BTreeMap::new();
        let rules = self.base_rules(&ports);
        let (name, base, mut begin) = base_chain(self.pass.base, self.path);
        begin.extend(rules);
        let chain = Chain { base: Some(base), rules: begin };
        self.out.chains.insert(name.to_string(), chain);
        for (index, port) in self.networks.ports() {
            let chain = match port.vlans {
                PortVlans::Unaware => self.entry_by(port.bridge, index),
                PortVlans::Aware { protocol, untagged } => {
                    let is_inhabited = self.slots.is_inhabited(port.bridge)
                        || self.vlans(port.bridge).next().is_some();
                    if is_inhabited {
                        let ports = aware.entry(port.bridge).or_insert((protocol, Vec::new()));
                        ports.1.extend(untagged.map(|vlan| (index, vlan)));
                    }
                    is_inhabited.then(|| self.name(port.bridge, "by_vlan"))
                }
            };
            let verdict = chain.map_or_else(|| self.elsewhere(), Verdict::Goto);
            self.element(&ports, Value::Interface(index), verdict);
        }
        for (bridge, (protocol, untagged)) in aware {
            self.vlan_aware(bridge, protocol, &untagged);
        }
    }

    /// Returns the verdict on a frame of a network without middleboxes. One that comes back from the
    /// engine was led there by a middlebox on no known network, or by one that is gone.
    fn elsewhere(&self) -> Verdict {
        let back = if self.slots.is_inhabited(NetworkId::ANY) { self.pass.entry } else { "finish" };
        if self.is_back() { Verdict::Goto(back.to_string()) } else { Verdict::Accept }
    }

    fn is_back(&self) -> bool {
        self.pass.base == "learn"
    }

    /// Returns the name of a network's chain of this pass, if the network has middleboxes.
    fn entry(&self, network: NetworkId) -> Option<String> {
        self.slots.is_inhabited(network).then(|| self.chain_of(network))
    }

    /// Returns the same for frames that come in by a port.
    fn entry_by(&self, network: NetworkId, port: u32) -> Option<String> {
        let prefix = self.networks.prefix(network);
        let is_vm = self.vm_ports.contains(&(network, port));
        let entry = if is_vm { self.pass.vm_entry } else { self.pass.entry };
        self.slots.is_inhabited(network).then(|| format!("{prefix}{entry}"))
    }

    /// Whether frames of a VLAN come in untagged by a port.
    fn is_untagged_at(&self, network: NetworkId, port: u32) -> bool {
        let vlan = self.networks.name(network).and_then(|name| name.vlan);
        let port = self.networks.ports().find(|(index, _)| *index == port);
        port.is_some_and(
            |(_, port)| matches!(port.vlans, PortVlans::Aware { untagged, .. } if untagged == vlan),
        )
    }

    fn name(&self, bridge: NetworkId, what: &str) -> String {
        format!("{}{what}{}", self.networks.prefix(bridge), self.pass.suffix)
    }

    /// Returns the VLANs of a bridge that have middleboxes, with their chains.
    fn vlans(&self, bridge: NetworkId) -> impl Iterator<Item = (u16, String)> {
        let vlans = self.networks.vlans(bridge);
        // Tagged frames of a VLAN come in by several ports, one of which may be a middlebox'.
        let entry = |network: NetworkId| {
            let tagged = self
                .vm_ports
                .iter()
                .find(|(of, port)| *of == network && !self.is_untagged_at(network, *port));
            tagged.map_or_else(|| self.entry(network), |(_, port)| self.entry_by(network, *port))
        };
        vlans.filter_map(move |(vlan, network)| Some((vlan, entry(network)?)))
    }

    /// Returns the rules that lead a frame on. Middleboxes on no known network come first.
    fn base_rules(&self, ports: &str) -> Vec<Rule> {
        let mut out = vec![rule(vec![Statement::Vmap(vec![self.pass.port], ports.to_string())])];
        let known: Vec<NetworkId> =
            self.slots.inhabited().filter(|network| *network != NetworkId::ANY).collect();
        let unplaced = self.slots.is_inhabited(NetworkId::ANY);
        if !self.is_back() {
            if unplaced {
                out.insert(0, rule(vec![jump(self.pass.filter_entry)]));
            }
            let lead = |network: &NetworkId, entry: &str| {
                let chain = format!("{}{entry}", self.networks.prefix(*network));
                commented(vec![jump(&chain)], "a port that is not known yet")
            };
            // A frame to a middlebox must not leave for the engine as one from a backend of another
            // network, so the filters of all networks come first.
            if known.len() > 1 {
                out.extend(known.iter().map(|network| lead(network, self.pass.filter_entry)));
            }
            out.extend(known.iter().map(|network| lead(network, self.pass.vm_entry)));
            return out;
        }
        // The verdict is one of the only network there is, or of nobody knows which.
        out.push(match (unplaced, known.as_slice()) {
            (true, _) => rule(vec![goto(self.pass.entry)]),
            (false, [network]) => rule(vec![goto(&self.chain_of(*network))]),
            (false, _) => commented(vec![goto("finish")], "a port that is not known yet"),
        });
        out
    }

    fn chain_of(&self, network: NetworkId) -> String {
        format!("{}{}", self.networks.prefix(network), self.pass.entry)
    }

    /// Adds an element to a verdict map.
    fn element(&mut self, map: &str, key: Value, verdict: Verdict) {
        let data = Some(ElementData::Verdict(verdict));
        if let Some(map) = self.out.sets.get_mut(map) {
            map.elements.insert(vec![key], Element { data, ..Element::default() });
        }
    }

    fn vlan_aware(&mut self, bridge: NetworkId, protocol: EtherType, untagged: &[(u32, u16)]) {
        let vlans: BTreeMap<u16, String> = self.vlans(bridge).collect();
        let (by_tag, by_port) = (self.name(bridge, "vlans"), self.name(bridge, "untagged"));
        let verdicts = Some(Data::Verdict);
        let tags = set_of(&[Type::Port], verdicts, "VLAN of the tag to the chain of its network");
        self.out.sets.insert(by_tag.clone(), tags);
        let comment = "port to the chain of the network of its untagged frames";
        self.out.sets.insert(by_port.clone(), set_of(&[Type::Interface], verdicts, comment));
        for (vlan, chain) in &vlans {
            self.element(&by_tag, Value::Port(*vlan), Verdict::Goto(chain.clone()));
        }
        for (index, vlan) in untagged {
            let network = self.networks.vlans(bridge).find(|(other, _)| other == vlan);
            if let Some(chain) = network.and_then(|(_, network)| self.entry_by(network, *index)) {
                self.element(&by_port, Value::Interface(*index), Verdict::Goto(chain));
            }
        }
        // Middleboxes of which only the bridge is known.
        let unplaced = self.slots.is_inhabited(bridge);
        let first = (unplaced && !self.is_back()).then_some(self.pass.filter_entry);
        let prefix = self.networks.prefix(bridge);
        let first = first.map(|entry| rule(vec![jump(&format!("{prefix}{entry}"))]));
        let mut rules: Vec<Rule> = first.into_iter().collect();
        // A verdict on a frame to one of them, or to one that is gone.
        let last = match self.elsewhere() {
            Verdict::Goto(_) if unplaced => Verdict::Goto(self.chain_of(bridge)),
            other => other,
        };
        let tagged = || Statement::Is(Field::OuterType, Value::EtherType(protocol));
        rules.push(rule(vec![tagged(), Statement::Vmap(vec![Field::VlanId], by_tag)]));
        // The bridge takes a tag without a VLAN for none.
        let is_vlan = Statement::IsNot(Field::VlanId, Value::Port(0));
        let others = vec![tagged(), is_vlan, verdict(last.clone())];
        rules.push(commented(others, "of a VLAN without middleboxes"));
        rules.push(rule(vec![Statement::Vmap(vec![self.pass.port], by_port)]));
        if self.is_back() {
            rules.push(rule(vec![verdict(last)]));
        }
        let name = self.name(bridge, "by_vlan");
        self.out.chains.insert(name, Chain { base: None, rules });
    }
}
