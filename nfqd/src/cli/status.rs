//! The status as text.

use crate::api::{
    BackendState, BackendStatus, FlowTableStatus, QueueStatus, RuleStatus, Status, first_line,
};
use std::fmt::{self, Write};

/// Returns the status as text for people.
pub fn text(status: &Status) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_status(&mut out, status);
    out
}

fn write_status(out: &mut String, status: &Status) -> fmt::Result {
    out.push_str(&first_line(&status.problems()));
    writeln!(
        out,
        "nfqd {} (pid {}): steer {}, fast path {}, fail {}, {} flows",
        status.version, status.pid, status.steer, status.fast_path, status.fail, status.flows.count
    )?;
    write_flow_table(out, &status.flows)?;
    for queue in &status.queues {
        write_queue(out, queue)?;
    }
    for channel in &status.channels {
        let macs = match channel.macs.as_slice() {
            [] => "every MAC".to_string(),
            macs => macs.join(", "),
        };
        let error = suffix("NOT READ", channel.error.as_deref());
        let denied = match channel.denied {
            0 => String::new(),
            count => format!(", {count} commands denied"),
        };
        let connected = match channel.connected {
            None => "",
            Some(true) => ", connected",
            Some(false) => ", no VM connected",
        };
        writeln!(out, "channel {}: may speak for {macs}{connected}{denied}{error}", channel.path)?;
    }
    for middlebox in &status.middleboxes {
        let network = middlebox.network.as_ref().map(|name| format!(" on {name}"));
        let problem = suffix("NETWORK", middlebox.network_problem.as_deref());
        writeln!(
            out,
            "middlebox {}{}: {} packets, {} bytes to it{problem}",
            middlebox.mac,
            network.unwrap_or_default(),
            middlebox.packets,
            middlebox.bytes
        )?;
        if let Some(rate) = middlebox.flood {
            writeln!(out, "    FLOOD: {rate} new flows a second")?;
        }
        if let Some(traffic) = &middlebox.not_balanced {
            writeln!(out, "    NOT BALANCED: {traffic}")?;
        }
        for command in &middlebox.commands {
            writeln!(out, "    {command}")?;
        }
        for rule in &middlebox.rules {
            write_rule(out, rule)?;
        }
        for service in &middlebox.services {
            if service.panic {
                writeln!(
                    out,
                    "    {}: CHECKS DOUBTED: most backends fail at once; new flows still go to all of them",
                    service.vip
                )?;
            }
            for backend in &service.backends {
                write_backend(out, &service.vip, backend)?;
            }
        }
    }
    if status.repairs != 0 {
        writeln!(out, "another program changed nfqd's tables; repairs: {}", status.repairs)?;
    }
    if let Some(error) = &status.steering_error {
        writeln!(out, "NOT STEERED: {error}")?;
    }
    if let Some(error) = &status.repair_error {
        writeln!(out, "NOT ENFORCED: {error}")?;
    }
    for path in &status.rejected {
        writeln!(
            out,
            "NOT RESTORED: registrations in {path}; remove it when you have looked at it"
        )?;
    }
    let error = suffix("NOT SAVED", status.state_error.as_deref());
    writeln!(out, "registrations in {}{error}", status.state)
}

fn suffix(what: &str, reason: Option<&str>) -> String {
    reason.map(|reason| format!(" - {what}: {reason}")).unwrap_or_default()
}

fn write_flow_table(out: &mut String, flows: &FlowTableStatus) -> fmt::Result {
    if flows.evicted != 0 {
        writeln!(
            out,
            "FLOW TABLE FULL: {} of {} flows; {} were evicted for others, {} of them established",
            flows.count, flows.capacity, flows.evicted, flows.evicted_established
        )?;
    }
    for (map, packets) in &flows.cache_full_packets {
        let what = if flows.full_maps.contains(map) { "KERNEL MAP FULL" } else { "not cached yet" };
        writeln!(
            out,
            "{what}: {packets} packets of {map}; their flows go through the engine until they are cached"
        )?;
    }
    Ok(())
}

fn write_queue(out: &mut String, queue: &QueueStatus) -> fmt::Result {
    let state = if queue.alive { "" } else { " - NOT SERVED: its thread ended, see the log" };
    writeln!(
        out,
        "queue {}: {} packets, {} dropped ({} rejected), {} redirected, {} replies translated, {} \
         overruns{state}",
        queue.queue,
        queue.packets,
        queue.dropped,
        queue.rejected,
        queue.redirected,
        queue.reply_translated,
        queue.overruns,
    )
}

fn write_rule(out: &mut String, rule: &RuleStatus) -> fmt::Result {
    let RuleStatus { rule, packets, bytes, not_indexed } = rule;
    let verb = if rule.starts_with('+') { "allowed" } else { "dropped" };
    let reason = not_indexed.as_ref().map(|reason| format!(" - not indexed: {reason}"));
    let reason = reason.unwrap_or_default();
    writeln!(out, "    rule {rule} has {verb} {packets} packets, {bytes} bytes{reason}")
}

fn write_backend(out: &mut String, frontend: &str, backend: &BackendStatus) -> fmt::Result {
    let mac = backend.mac.as_ref().map(|mac| format!(" at {mac}")).unwrap_or_default();
    let state = match backend.state {
        BackendState::Up if backend.fails_checks => {
            "up (fails its checks, but answers on its flows)"
        }
        BackendState::Up => "up",
        BackendState::Draining => "DRAINING: gets no new flows",
        BackendState::Failing => {
            "FAILING: fails its checks, but answers on its flows: gets no new ones"
        }
        BackendState::Dead => "DEAD: does not answer checks",
        BackendState::Drained => "DRAINED: gets nothing",
        BackendState::Unresolved => {
            "MAC UNKNOWN: gets nothing until it answers on the middlebox' network, or the command has ip@mac"
        }
    };
    let unchecked = suffix("NOT CHECKED", backend.health_unknown_reason.as_deref());
    let problem = suffix("NETWORK", backend.network_problem.as_deref());
    writeln!(
        out,
        "    {frontend} -> {}{mac} {state}, weight {}, {} flows, {} packets {} bytes sent, {} packets {} \
         bytes received{unchecked}{problem}",
        backend.backend,
        backend.weight,
        backend.flows,
        backend.packets,
        backend.bytes,
        backend.reply_packets,
        backend.reply_bytes
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ChannelStatus, MiddleboxStatus, ServiceStatus};
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn faults_are_in_capitals() {
        let backend = BackendStatus {
            backend: "10.0.0.2:80".to_string(),
            mac: None,
            state: BackendState::Unresolved,
            weight: 3,
            flows: 0,
            packets: 1,
            bytes: 2,
            reply_packets: 3,
            reply_bytes: 4,
            health_unknown_reason: Some("no address".to_string()),
            network_problem: Some("elsewhere".to_string()),
            fails_checks: false,
        };
        let status = Status {
            channels: vec![ChannelStatus {
                path: "/r".to_string(),
                transport: "shm".to_string(),
                connected: None,
                macs: vec![],
                error: Some("cut".to_string()),
                denied: 2,
            }],
            middleboxes: vec![MiddleboxStatus {
                mac: "m".to_string(),
                network: Some("br0 vlan 7".to_string()),
                network_problem: Some("twice".to_string()),
                not_balanced: Some("the host's".to_string()),
                flood: Some(6000),
                firewall: None,
                packets: 0,
                bytes: 0,
                commands: vec![],
                rules: vec![RuleStatus {
                    rule: "#1".to_string(),
                    packets: 5,
                    bytes: 6,
                    not_indexed: Some("nftables has no sets of VLAN ids".to_string()),
                }],
                services: vec![ServiceStatus {
                    vip: "10.0.0.1:80".to_string(),
                    method: "rr".to_string(),
                    panic: true,
                    backends: vec![backend],
                }],
            }],
            flows: FlowTableStatus {
                evicted: 9,
                cache_full_packets: BTreeMap::from([("a".to_string(), 3), ("b".to_string(), 4)]),
                full_maps: BTreeSet::from(["a".to_string()]),
                ..FlowTableStatus::default()
            },
            repair_error: Some("gone".to_string()),
            steering_error: Some("off".to_string()),
            rejected: vec!["/s/commands.rejected.1".to_string()],
            state: "/s".to_string(),
            state_error: Some("disk full".to_string()),
            ..Status::default()
        };
        let text = text(&status);
        assert_eq!(text.lines().next(), Some("NOT ENFORCED: gone (and 11 more)"), "{text}");
        assert!(super::text(&Status::default()).starts_with("OK\nnfqd "));
        for line in [
            "channel /r: may speak for every MAC, 2 commands denied - NOT READ: cut",
            "middlebox m on br0 vlan 7: 0 packets, 0 bytes to it - NETWORK: twice",
            "    NOT BALANCED: the host's",
            "    FLOOD: 6000 new flows a second",
            "    10.0.0.1:80: CHECKS DOUBTED: most backends fail at once; new flows still go to all of them",
            "    rule #1 has dropped 5 packets, 6 bytes - not indexed: nftables has no sets of VLAN ids",
            "FLOW TABLE FULL: 0 of 0 flows; 9 were evicted for others, 0 of them established",
            "KERNEL MAP FULL: 3 packets of a; their flows go through the engine until they are cached",
            "not cached yet: 4 packets of b; their flows go through the engine until they are cached",
            "NOT ENFORCED: gone",
            "NOT STEERED: off",
            "NOT RESTORED: registrations in /s/commands.rejected.1; remove it when you have looked at it",
            "registrations in /s - NOT SAVED: disk full",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(
            text.contains("MAC UNKNOWN")
                && text.contains("- NOT CHECKED: no address - NETWORK: elsewhere"),
            "{text}"
        );
    }
}
