//! Prometheus' text format, made from a status.
//!
//! Every metric is in [`METRICS`], which `docs/METRICS.md` lists and a test compares. What guests can make
//! without bound is shown on demand only: rules with `scope=rules`.

use crate::api::{BackendState, BackendStatus, MiddleboxStatus, ServiceStatus, Status};
use std::collections::BTreeSet;
use std::fmt::Write;

/// A part of the metrics.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Scope {
    /// The daemon, its queues and its flow table.
    Global,
    /// The middleboxes.
    Middlebox,
    /// The services and their backends.
    Service,
    /// The rules.
    Rules,
}

impl Scope {
    /// Every scope.
    pub const ALL: [Scope; 4] = [Scope::Global, Scope::Middlebox, Scope::Service, Scope::Rules];
    /// The scopes of a request that names none.
    pub const DEFAULT: [Scope; 3] = [Scope::Global, Scope::Middlebox, Scope::Service];

    /// Returns the word in requests.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Global => "global",
            Scope::Middlebox => "middlebox",
            Scope::Service => "service",
            Scope::Rules => "rules",
        }
    }
}

/// The kind of a metric.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A number that only grows, until nfqd or its tables are made anew.
    Counter,
    /// A number that goes up and down.
    Gauge,
}

impl Kind {
    /// Returns the word in the text format.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        }
    }
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// The name.
    pub name: &'static str,
    /// The kind.
    pub kind: Kind,
    /// The scope.
    pub scope: Scope,
    /// The labels.
    pub labels: &'static [&'static str],
    /// The meaning.
    pub help: &'static str,
}

const fn metric(
    name: &'static str,
    kind: Kind,
    scope: Scope,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric { name, kind, scope, labels, help }
}

const MIDDLEBOX: &[&str] = &["network", "middlebox"];
const BACKEND: &[&str] = &["network", "middlebox", "vip", "backend"];
const RULE: &[&str] = &["network", "middlebox", "rule"];

/// Every metric, in the order of the text.
pub const METRICS: [Metric; 33] = {
    use Kind::{Counter, Gauge};
    use Scope::{Global, Middlebox, Rules, Service};
    [
        metric("nfqd_up", Gauge, Global, &[], "Whether the daemon answers."),
        metric(
            "nfqd_build_info",
            Gauge,
            Global,
            &["version"],
            "The version of the daemon; always 1.",
        ),
        metric(
            "nfqd_problems",
            Gauge,
            Global,
            &[],
            "Problems, as the first line of the status counts them.",
        ),
        metric(
            "nfqd_enforced",
            Gauge,
            Global,
            &[],
            "Whether the kernel's tables are as they should be.",
        ),
        metric("nfqd_steered", Gauge, Global, &[], "Whether frames reach the queues."),
        metric("nfqd_state_saved", Gauge, Global, &[], "Whether registrations are saved."),
        metric(
            "nfqd_repairs_total",
            Counter,
            Global,
            &[],
            "Repairs after another program had changed nfqd's tables.",
        ),
        metric("nfqd_queue_up", Gauge, Global, &["queue"], "Whether the queue is served."),
        metric(
            "nfqd_queue_packets_total",
            Counter,
            Global,
            &["queue"],
            "Packets that the engine received.",
        ),
        metric(
            "nfqd_queue_dropped_packets_total",
            Counter,
            Global,
            &["queue"],
            "Packets that the engine dropped.",
        ),
        metric(
            "nfqd_queue_rejected_packets_total",
            Counter,
            Global,
            &["queue"],
            "Dropped packets that were rejected with a TCP reset or an ICMP error.",
        ),
        metric(
            "nfqd_queue_redirected_packets_total",
            Counter,
            Global,
            &["queue"],
            "Packets that the engine sent to a backend.",
        ),
        metric(
            "nfqd_queue_reply_translated_packets_total",
            Counter,
            Global,
            &["queue"],
            "Replies that the engine translated.",
        ),
        metric(
            "nfqd_queue_overruns_total",
            Counter,
            Global,
            &["queue"],
            "Times that the receive buffer overran.",
        ),
        metric("nfqd_flows", Gauge, Global, &[], "Flows in the flow table."),
        metric(
            "nfqd_flows_capacity",
            Gauge,
            Global,
            &[],
            "Flows that the flow table has room for.",
        ),
        metric(
            "nfqd_flows_evicted_total",
            Counter,
            Global,
            &[],
            "Flows that were evicted for others.",
        ),
        metric(
            "nfqd_flows_evicted_established_total",
            Counter,
            Global,
            &[],
            "Established flows among them.",
        ),
        metric("nfqd_map_full", Gauge, Global, &["map"], "Whether a map of the kernel was full."),
        metric(
            "nfqd_map_not_cached_packets_total",
            Counter,
            Global,
            &["map"],
            "Packets whose flows the kernel could not cache.",
        ),
        metric("nfqd_channel_up", Gauge, Global, &["channel"], "Whether the region is read."),
        metric(
            "nfqd_channel_denied_commands_total",
            Counter,
            Global,
            &["channel"],
            "Commands that the binding did not allow.",
        ),
        metric(
            "nfqd_middlebox_packets_total",
            Counter,
            Middlebox,
            MIDDLEBOX,
            "Packets to the middlebox.",
        ),
        metric(
            "nfqd_middlebox_bytes_total",
            Counter,
            Middlebox,
            MIDDLEBOX,
            "Bytes to the middlebox, from the IP header on.",
        ),
        metric("nfqd_backend_up", Gauge, Service, BACKEND, "Whether the backend gets new flows."),
        metric("nfqd_backend_weight", Gauge, Service, BACKEND, "The weight."),
        metric("nfqd_backend_flows", Gauge, Service, BACKEND, "Live flows."),
        metric(
            "nfqd_backend_sent_packets_total",
            Counter,
            Service,
            BACKEND,
            "Packets to the backend.",
        ),
        metric(
            "nfqd_backend_sent_bytes_total",
            Counter,
            Service,
            BACKEND,
            "Bytes to the backend, from the IP header on.",
        ),
        metric(
            "nfqd_backend_received_packets_total",
            Counter,
            Service,
            BACKEND,
            "Replies of the backend.",
        ),
        metric("nfqd_backend_received_bytes_total", Counter, Service, BACKEND, "Bytes of replies."),
        metric(
            "nfqd_rule_packets_total",
            Counter,
            Rules,
            RULE,
            "Packets that the rule has matched.",
        ),
        metric("nfqd_rule_bytes_total", Counter, Rules, RULE, "Bytes that it has matched."),
    ]
};

/// A value with its labels.
type Sample = (Vec<(&'static str, String)>, u64);

/// Returns the metrics of some scopes; without a status, the daemon is down. `middlebox` limits those that
/// have such a label.
pub fn text(status: Option<&Status>, scopes: &BTreeSet<Scope>, middlebox: Option<&str>) -> String {
    let mut out = String::new();
    for metric in METRICS.iter().filter(|metric| scopes.contains(&metric.scope)) {
        let samples = match status {
            None if metric.name == "nfqd_up" => vec![(Vec::new(), 0)],
            None => continue,
            Some(status) => samples(metric.name, status, middlebox),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {} {}", metric.name, metric.help);
        let _ = writeln!(out, "# TYPE {} {}", metric.name, metric.kind.name());
        for (labels, value) in samples {
            let labels: Vec<String> = labels
                .iter()
                .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
                .collect();
            let labels =
                if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(out, "{}{labels} {value}", metric.name);
        }
    }
    out
}

/// Escapes a label's value (Prometheus' text-based format).
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn samples(name: &str, status: &Status, middlebox: Option<&str>) -> Vec<Sample> {
    let one = |value: u64| vec![(Vec::new(), value)];
    let is = |value: bool| one(u64::from(value));
    let flows = &status.flows;
    match name {
        "nfqd_up" => one(1),
        "nfqd_build_info" => vec![(vec![("version", status.version.clone())], 1)],
        "nfqd_problems" => one(status.problems().len() as u64),
        "nfqd_enforced" => is(status.repair_error.is_none()),
        "nfqd_steered" => is(status.steering_error.is_none()),
        "nfqd_state_saved" => is(status.state_error.is_none()),
        "nfqd_repairs_total" => one(status.repairs),
        "nfqd_flows" => one(flows.count as u64),
        "nfqd_flows_capacity" => one(flows.capacity as u64),
        "nfqd_flows_evicted_total" => one(flows.evicted),
        "nfqd_flows_evicted_established_total" => one(flows.evicted_established),
        "nfqd_map_full" => {
            let full = flows.full_maps.iter();
            full.map(|map| (vec![("map", map.clone())], 1)).collect()
        }
        "nfqd_map_not_cached_packets_total" => {
            let maps = flows.cache_full_packets.iter();
            maps.map(|(map, packets)| (vec![("map", map.clone())], *packets)).collect()
        }
        _ if name.starts_with("nfqd_queue_") => queues(name, status),
        _ if name.starts_with("nfqd_channel_") => channels(name, status),
        _ => {
            let all = status.middleboxes.iter();
            let wanted = all.filter(|one| middlebox.is_none_or(|mac| one.mac == mac));
            wanted.flat_map(|one| of_middlebox(name, one)).collect()
        }
    }
}

fn queues(name: &str, status: &Status) -> Vec<Sample> {
    let value = |queue: &crate::api::QueueStatus| match name {
        "nfqd_queue_up" => u64::from(queue.alive),
        "nfqd_queue_packets_total" => queue.packets,
        "nfqd_queue_dropped_packets_total" => queue.dropped,
        "nfqd_queue_rejected_packets_total" => queue.rejected,
        "nfqd_queue_redirected_packets_total" => queue.redirected,
        "nfqd_queue_reply_translated_packets_total" => queue.reply_translated,
        _ => queue.overruns,
    };
    let sample =
        |queue: &crate::api::QueueStatus| (vec![("queue", queue.queue.to_string())], value(queue));
    status.queues.iter().map(sample).collect()
}

fn channels(name: &str, status: &Status) -> Vec<Sample> {
    let value = |channel: &crate::api::ChannelStatus| match name {
        "nfqd_channel_up" => u64::from(channel.error.is_none()),
        _ => channel.denied,
    };
    let all = status.channels.iter();
    all.map(|channel| (vec![("channel", channel.path.clone())], value(channel))).collect()
}

fn of_middlebox(name: &str, middlebox: &MiddleboxStatus) -> Vec<Sample> {
    // Tenants on two networks may have equal MACs and addresses.
    let whose = || {
        let network = middlebox.network.clone().unwrap_or_default();
        vec![("network", network), ("middlebox", middlebox.mac.clone())]
    };
    let with = |labels: Vec<(&'static str, String)>| [whose(), labels].concat();
    match name {
        "nfqd_middlebox_packets_total" => vec![(whose(), middlebox.packets)],
        "nfqd_middlebox_bytes_total" => vec![(whose(), middlebox.bytes)],
        "nfqd_rule_packets_total" | "nfqd_rule_bytes_total" => {
            let is_packets = name == "nfqd_rule_packets_total";
            let rules = middlebox.rules.iter();
            let value =
                |rule: &crate::api::RuleStatus| if is_packets { rule.packets } else { rule.bytes };
            rules.map(|rule| (with(vec![("rule", rule.rule.clone())]), value(rule))).collect()
        }
        _ => {
            let of_service = |service: &ServiceStatus| -> Vec<Sample> {
                let labels = |backend: &BackendStatus| {
                    with(vec![("vip", service.vip.clone()), ("backend", backend.backend.clone())])
                };
                let backends = service.backends.iter();
                backends.map(|backend| (labels(backend), of_backend(name, backend))).collect()
            };
            middlebox.services.iter().flat_map(of_service).collect()
        }
    }
}

fn of_backend(name: &str, backend: &BackendStatus) -> u64 {
    match name {
        "nfqd_backend_up" => u64::from(backend.state == BackendState::Up),
        "nfqd_backend_weight" => u64::from(backend.weight),
        "nfqd_backend_flows" => u64::from(backend.flows),
        "nfqd_backend_sent_packets_total" => backend.packets,
        "nfqd_backend_sent_bytes_total" => backend.bytes,
        "nfqd_backend_received_packets_total" => backend.reply_packets,
        _ => backend.reply_bytes,
    }
}

/// Returns `docs/METRICS.md`.
pub fn reference() -> String {
    let mut out = String::from(
        "# Metrics\n\n`nfqd serve` shows them at `/metrics`, in Prometheus' text format. `?scope=` takes `global`, `middlebox`, `service` and \
         `rules`,\nseparated by commas; by default all but `rules`. `?middlebox=MAC` selects one middlebox. Kernel counters are read at most once a\n\
         second, less often for a large ruleset. Generated from `nfqd/src/serve/metrics.rs`; a test compares the two.\n\
         Alert rules are in `packaging/alerts.yml`, a Grafana board in `packaging/grafana.json`.\n",
    );
    for scope in Scope::ALL {
        let _ = write!(
            out,
            "\n## scope={}\n\n| metric | kind | labels | |\n|---|---|---|---|\n",
            scope.name()
        );
        for metric in METRICS.iter().filter(|metric| metric.scope == scope) {
            let labels: Vec<String> =
                metric.labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(
                out,
                "| `{}` | {} | {} | {} |",
                metric.name,
                metric.kind.name(),
                labels.join(", "),
                metric.help
            );
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ChannelStatus, QueueStatus, RuleStatus};
    use std::collections::BTreeMap;

    fn status() -> Status {
        let backend = BackendStatus {
            backend: "10.0.0.2:80".to_string(),
            mac: None,
            state: BackendState::Up,
            weight: 3,
            flows: 4,
            packets: 5,
            bytes: 6,
            reply_packets: 7,
            reply_bytes: 8,
            health_unknown_reason: None,
            network_problem: None,
            fails_checks: false,
        };
        Status {
            version: "1".to_string(),
            queues: vec![QueueStatus {
                queue: 2,
                packets: 9,
                alive: true,
                ..QueueStatus::default()
            }],
            channels: vec![ChannelStatus {
                path: "/dev/shm/\"odd\\name\n".to_string(),
                transport: "shm".to_string(),
                connected: None,
                macs: vec![],
                error: None,
                denied: 1,
            }],
            middleboxes: vec![MiddleboxStatus {
                mac: "02:00:00:00:00:01".to_string(),
                network: None,
                network_problem: None,
                not_balanced: None,
                flood: None,
                firewall: None,
                packets: 10,
                bytes: 11,
                commands: vec![],
                rules: vec![RuleStatus {
                    rule: "#1".to_string(),
                    packets: 12,
                    bytes: 13,
                    not_indexed: None,
                }],
                services: vec![ServiceStatus {
                    vip: "10.0.0.1:80".to_string(),
                    method: "rr".to_string(),
                    panic: false,
                    backends: vec![backend],
                }],
            }],
            flows: crate::api::FlowTableStatus {
                full_maps: BTreeSet::from(["m".to_string()]),
                cache_full_packets: BTreeMap::from([("m".to_string(), 2)]),
                ..crate::api::FlowTableStatus::default()
            },
            ..Status::default()
        }
    }

    #[test]
    fn every_metric_has_a_series_with_its_labels() {
        let scopes = BTreeSet::from(Scope::ALL);
        let text = text(Some(&status()), &scopes, None);
        for metric in METRICS {
            let line = text
                .lines()
                .find(|line| {
                    line.starts_with(metric.name)
                        && line[metric.name.len()..].starts_with(['{', ' '])
                })
                .unwrap_or_else(|| panic!("{}: no series\n{text}", metric.name));
            let shown: Vec<&str> = line
                .split_once('{')
                .map(|(_, labels)| {
                    labels.split("\",").filter_map(|part| part.split('=').next()).collect()
                })
                .unwrap_or_default();
            assert_eq!(shown, metric.labels, "{line}");
            let is_total = metric.name.ends_with("_total");
            assert_eq!(is_total, metric.kind == Kind::Counter, "{}", metric.name);
        }
        assert!(text.contains("channel=\"/dev/shm/\\\"odd\\\\name\\n\""), "{text}");
        assert!(text.contains("\nnfqd_backend_received_bytes_total{network=\"\",middlebox=\"02:00:00:00:00:01\",vip=\"10.0.0.1:80\",backend=\"10.0.0.2:80\"} 8\n"));
    }

    #[test]
    fn rules_and_other_middleboxes_are_shown_on_demand() {
        let default = BTreeSet::from(Scope::DEFAULT);
        assert!(!text(Some(&status()), &default, None).contains("nfqd_rule_"));
        let other = text(Some(&status()), &default, Some("02:00:00:00:00:02"));
        assert!(!other.contains("nfqd_backend_up{") && other.contains("nfqd_up 1"));
        assert!(text(None, &default, None).ends_with("\nnfqd_up 0\n"));
    }

    /// With `NFQD_WRITE_DOCS=1` it writes the page first.
    #[test]
    fn the_reference_lists_what_there_is() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/METRICS.md");
        if std::env::var_os("NFQD_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(path).unwrap_or_default(),
            reference(),
            "NFQD_WRITE_DOCS=1 cargo test -p nfqd metrics"
        );
    }
}
