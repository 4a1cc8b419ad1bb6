//! Trace: what would happen to a packet now, and why. The enforcing engine decides, by the live policy
//! and flow table, without side effects; the reasons are derived separately.

pub mod words;

use crate::api::{ObservedDecision, RuleTrace, TargetTrace, Trace};
use crate::engine::dry_run::{DryRun, dry_run};
use crate::engine::reason::Reason;
use crate::engine::verdict::{Decision, Translation, Verdict};
use crate::engine::{EngineState, Ingress, Snapshot};
use crate::packet_path::recorder::Recorded;
use nfqd_rules::packet::Packet;
use nfqd_rules::slots::SlotKey;
use nfqd_rules::{Middlebox, MiddleboxKey, NetworkId};
use nfqd_shmctl::{Action, Protocol, RuleId};
use std::collections::BTreeSet;
use words::ether_type_name;

/// Traces a packet on a network.
pub fn trace(
    snapshot: &Snapshot,
    state: &EngineState,
    ingress: Ingress,
    packet: &Packet,
    now: u32,
) -> Trace {
    let mac = packet.link.destination;
    let key = snapshot.middlebox_at(ingress.network, mac);
    let middlebox = key.and_then(|key| Some((key, snapshot.policy().get(key)?)));
    let DryRun { result, is_of_known_flow } = dry_run(snapshot, state, ingress, packet, now);
    // The snapshot is the newest there is.
    let undecided = Decision { verdict: Verdict::AwaitFirstFragment, rule: None };
    let decision = result.decision().unwrap_or(undecided);
    let reason = Reason::of(&decision, snapshot.default_action(ingress.network, mac));
    let mut fields = BTreeSet::from(["destination MAC"]);
    let rules = middlebox.map(|(_, its)| rules(its, packet, &decision, &mut fields));
    let is_filtered = matches!(decision.verdict, Verdict::Drop(_))
        && matches!(reason, Reason::DenyRule | Reason::DefaultDeny | Reason::TransportHidden);
    let service = middlebox.filter(|_| !is_filtered);
    let service = service.and_then(|(_, its)| service_text(its, ingress, packet, &mut fields));
    if is_of_known_flow {
        fields.extend(["source address", "destination address", "protocol", "ports"]);
    }
    let networks = &snapshot.desired().networks;
    let name = networks.name(ingress.network).map(ToString::to_string);
    let prefix = networks.prefix(ingress.network);
    let mut out = Trace {
        packet: describe(packet),
        network: name,
        middlebox: key.map(|key| key.mac.to_string()),
        kernel: kernel_names(&prefix, middlebox, packet, ingress),
        rules: rules.unwrap_or_default(),
        service,
        known_flow: is_of_known_flow,
        depends_on: fields.into_iter().map(str::to_string).collect(),
        verdict: verdict_name(&decision.verdict).to_string(),
        reason: reason.name().to_string(),
        explanation: explanation(reason, &decision),
        rule: decision.rule.map(|rule| rule.to_string()),
        ..Trace::default()
    };
    match decision.verdict {
        Verdict::Redirect(to) | Verdict::Error { to: Some(to), .. } => {
            out.to = Some(target(snapshot, &to));
            out.reply = reply_of(snapshot, &to.key);
        }
        Verdict::Reply(from) | Verdict::Error { from: Some(from), .. } => {
            out.reply = reply_of(snapshot, &from.key);
        }
        _ => {}
    }
    out
}

/// Returns a recorded decision for an observer.
pub fn observed(snapshot: &Snapshot, recorded: &Recorded) -> ObservedDecision {
    let Recorded { number, time, queue, ingress, packet, decision } = recorded;
    let link = &packet.link;
    let default = snapshot.default_action(ingress.network, link.destination);
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let backend = match decision.verdict {
        Verdict::Redirect(one)
        | Verdict::Reply(one)
        | Verdict::Error { to: Some(one), .. }
        | Verdict::Error { from: Some(one), .. } => Some(one.key.backend.to_string()),
        _ => None,
    };
    ObservedDecision {
        number: *number,
        time_ms: since.as_millis() as u64,
        queue: *queue,
        network: snapshot.desired().networks.name(ingress.network).map(ToString::to_string),
        packet: describe(packet),
        macs: [link.source.to_string(), link.destination.to_string()],
        addresses: packet
            .ip
            .map_or(Vec::new(), |ip| vec![ip.source.to_string(), ip.destination.to_string()]),
        ports: packet
            .ip
            .and_then(|ip| ip.ports)
            .map_or(Vec::new(), |ports| vec![ports.source, ports.destination]),
        verdict: verdict_name(&decision.verdict).to_string(),
        reason: Reason::of(decision, default).name().to_string(),
        rule: decision.rule.map(|rule| rule.to_string()),
        backend,
    }
}

/// Returns the word for what becomes of a packet.
fn verdict_name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Drop(_) | Verdict::Reject(_) | Verdict::AwaitFirstFragment => "drop",
        Verdict::Redirect(_) | Verdict::Error { to: Some(_), .. } => "redirect",
        Verdict::Accept(_)
        | Verdict::Reply(_)
        | Verdict::Bypass
        | Verdict::Local(_)
        | Verdict::Error { .. } => "accept",
    }
}

fn explanation(reason: Reason, decision: &Decision) -> String {
    let text = match decision.verdict {
        Verdict::Redirect(to) | Verdict::Error { to: Some(to), .. } => {
            format!("service {}", to.key.frontend)
        }
        Verdict::Reply(from) | Verdict::Error { from: Some(from), .. } => {
            format!("reply of service {}", from.key.frontend)
        }
        _ => reason.text().to_string(),
    };
    match decision.rule {
        Some(rule) if reason == Reason::DenyRule => format!("deny rule {} matches", rule.number),
        Some(rule) => format!("allow rule {} matches; {text}", rule.number),
        None => text,
    }
}

fn target(snapshot: &Snapshot, to: &Translation) -> TargetTrace {
    let port = to.key.ports().map(|(_, backend)| backend).filter(|_| to.port);
    let mac = snapshot.mac(&to.key).map(|mac| mac.to_string());
    TargetTrace { mac, ip: to.key.backend.ip.to_string(), port }
}

/// Returns how the replies of a backend are translated.
fn reply_of(snapshot: &Snapshot, key: &SlotKey) -> Option<String> {
    if snapshot.is_dsr(key) {
        return Some(format!("{} answers clients directly", key.backend));
    }
    let port = key.ports().map(|(frontend, _)| format!(", port {frontend}")).unwrap_or_default();
    Some(format!("from {} leaves as from {}{port}", key.backend, key.frontend.ip))
}

/// Returns the rules up to the one that decides, each with the reason, and adds the fields that they
/// depend on.
fn rules(
    middlebox: &Middlebox,
    packet: &Packet,
    decision: &Decision,
    fields: &mut BTreeSet<&'static str>,
) -> Vec<RuleTrace> {
    let Some(firewall) = middlebox.firewall() else { return Vec::new() };
    let mac = packet.link.destination;
    let mut out = Vec::new();
    for (id, rule) in firewall.rules() {
        let Some(conditions) = rule.conditions(mac, firewall.ip()) else {
            let why = "matches nothing: no bit is on, or its conditions contradict each other";
            out.push(rule_trace(*id, false, why.to_string()));
            continue;
        };
        let compared = conditions.compare(packet);
        let text = |one: &nfqd_rules::filter::Comparison, verb: &str| {
            let found = one.found.as_deref().unwrap_or("none");
            format!("{} {found} {verb} {}", one.field, one.wanted)
        };
        match compared.iter().find(|one| !one.matches) {
            Some(one) => {
                fields.insert(one.field);
                out.push(rule_trace(*id, false, text(one, "is not")));
            }
            None => {
                fields.extend(compared.iter().map(|one| one.field));
                let all: Vec<String> = compared.iter().map(|one| text(one, "is")).collect();
                let why = if all.is_empty() { "any packet".to_string() } else { all.join(", ") };
                out.push(rule_trace(*id, true, why));
            }
        }
        if decision.rule == Some(*id) {
            return out;
        }
    }
    if firewall.default_action() == Action::Deny {
        let why = "the middlebox is closed: what no rule allows is dropped".to_string();
        let matches = decision.rule.is_none();
        out.push(RuleTrace { rule: "default".to_string(), matches, why });
    }
    out
}

fn rule_trace(id: RuleId, matches: bool, why: String) -> RuleTrace {
    RuleTrace { rule: id.to_string(), matches, why }
}

fn service_text(
    middlebox: &Middlebox,
    ingress: Ingress,
    packet: &Packet,
    fields: &mut BTreeSet<&'static str>,
) -> Option<String> {
    if middlebox.services().is_empty() {
        return None;
    }
    if ingress.is_own {
        return Some("none: the middlebox has begun this conversation itself".to_string());
    }
    fields.extend(["destination address", "protocol"]);
    let has_ports = middlebox.services().keys().any(|frontend| frontend.port.is_some());
    if has_ports {
        fields.insert("destination port");
    }
    let sources = middlebox.services().values();
    if sources.into_iter().any(|service| !service.method().is_pool()) {
        fields.insert("source address");
    }
    Some(match middlebox.service_for(packet) {
        Some((frontend, service)) => format!("{frontend} ({})", service.method()),
        None => {
            let all: Vec<String> = middlebox.services().keys().map(ToString::to_string).collect();
            format!("none of {} takes it", all.join(", "))
        }
    })
}

/// Returns the sets and chains of `table bridge nfqd` that the packet meets.
fn kernel_names(
    prefix: &str,
    middlebox: Option<(MiddleboxKey, &Middlebox)>,
    packet: &Packet,
    ingress: Ingress,
) -> Vec<String> {
    let mut out = vec![format!("chain {prefix}frames: a frame of this network")];
    let Some((key, its)) = middlebox else {
        out.push(format!("map {prefix}middleboxes: {} is not in it", packet.link.destination));
        return out;
    };
    out.push(format!("map {prefix}middleboxes: {} leads to its chains", key.mac));
    if its.firewall().is_some_and(|firewall| !firewall.rules().is_empty()) {
        out.push(format!("map {prefix}filters: its rules"));
    }
    if its.firewall().is_some_and(|firewall| firewall.default_action() == Action::Deny) {
        out.push(format!("set {prefix}closed: drops what no rule allows"));
    }
    let Some(ip) = packet.ip.filter(|_| !its.services().is_empty()) else { return out };
    let family = if ip.source.is_ipv4() { 4 } else { 6 };
    let protocol = match ip.protocol {
        Protocol::TCP => "tcp",
        Protocol::UDP => "udp",
        _ => return out,
    };
    let is_own = if ingress.is_own { "present" } else { "absent" };
    out.push(format!("set {prefix}own_{protocol}{family}: the middlebox's own flows; {is_own}"));
    out.push(format!(
        "maps {prefix}flows_{protocol}{family}, {prefix}flows_port_{protocol}{family}: cached flows"
    ));
    out
}

/// Returns a packet in words, as [`words::parse`] reads them.
fn describe(packet: &Packet) -> String {
    let link = &packet.link;
    let tag = link.vlan_id().map(|id| format!(" vlan {id}")).unwrap_or_default();
    let link_text = format!("to {} from {}{tag}", link.destination, link.source);
    let Some(ip) = packet.ip else {
        let kind = link
            .ether_type
            .map_or("no IP packet".to_string(), |ether_type| ether_type_name(ether_type.number()));
        return format!("{kind} {link_text}");
    };
    let address = |ip: std::net::IpAddr, port: Option<u16>| match (ip, port) {
        (ip, None) => ip.to_string(),
        (std::net::IpAddr::V4(ip), Some(port)) => format!("{ip}:{port}"),
        (std::net::IpAddr::V6(ip), Some(port)) => format!("[{ip}]:{port}"),
    };
    let flags = ip.tcp_flags.map(flag_names).unwrap_or_default();
    let icmp = ip.icmp_type.map(|kind| format!(" type {kind} code {}", ip.icmp_code.unwrap_or(0)));
    format!(
        "{} {} > {}{flags}{} {link_text}",
        ip.protocol,
        address(ip.source, ip.ports.map(|ports| ports.source)),
        address(ip.destination, ip.ports.map(|ports| ports.destination)),
        icmp.unwrap_or_default(),
    )
}

fn flag_names(flags: u8) -> String {
    const NAMES: [(u8, &str); 6] =
        [(2, "syn"), (16, "ack"), (1, "fin"), (4, "rst"), (8, "psh"), (32, "urg")];
    let on: Vec<&str> =
        NAMES.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect();
    if on.is_empty() { String::new() } else { format!(" {}", on.join(",")) }
}

/// Returns the network of a packet that does not name one: that of the middlebox with its destination
/// MAC, of the backend that sends it, or the only one there is.
pub fn network_of(snapshot: &Snapshot, packet: &Packet) -> NetworkId {
    let slots = &snapshot.desired().slots;
    let keys = snapshot.policy().middleboxes().keys();
    let with_mac = keys.filter(|key| key.mac == packet.link.destination);
    let home = with_mac.filter_map(|key| slots.network_of(*key)).next();
    let inhabited: Vec<NetworkId> = slots.inhabited().collect();
    let of_backend = || {
        let ip = packet.ip?.source;
        inhabited.iter().copied().find(|network| slots.is_backend(*network, ip))
    };
    let only = || inhabited.first().copied();
    home.or_else(of_backend).or_else(only).unwrap_or(NetworkId::ANY)
}
