//! `nfqd explain`: what a command means, in a sentence, and what it becomes in nftables.

use nfqd_rules::nft::build;
use nfqd_rules::nft::model::Queues;
use nfqd_rules::nft::options::{FastPath, QueuePath, RulesetOptions};
use nfqd_rules::slots::Unobserved;
use nfqd_rules::{Desired, Policy};
use nfqd_shmctl::{
    Action, BackendChange, BackendName, Command, CommandError, Destination, Drain, FieldValue,
    FilterRemoval, FilterUpdate, Frontend, MacAddr, Method, RuleId, ServiceSpec, UnregisterScope,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::time::Instant;

/// The address assumed for the middlebox if the command does not contain it.
const EXAMPLE_ADDRESS: &str = "192.0.2.1";

/// Returns the explanation of a command.
///
/// # Errors
/// The fault.
pub(super) fn explain(line: &str) -> Result<String, CommandError> {
    let command = Command::parse(line)?;
    let mut out = format!("{}\n", sentence(&command));
    match difference(&command) {
        Ok(lines) if lines.is_empty() => out.push_str("\nnftables: no change\n"),
        Ok(lines) => {
            let assumed = if matches!(
                command,
                Command::RegisterFirewall { .. } | Command::RegisterService { .. }
            ) {
                String::new()
            } else {
                format!(", if the registered address is {EXAMPLE_ADDRESS}")
            };
            out.push_str(&format!("\nnftables, table bridge nfqd{assumed}:\n"));
            lines.iter().for_each(|line| out.push_str(&format!("  {line}\n")));
        }
        Err(error) => out
            .push_str(&format!("\nnftables: depends on what is registered ({})\n", error.message)),
    }
    Ok(out)
}

/// Returns what a command means, in a sentence.
fn sentence(command: &Command) -> String {
    match command {
        Command::RegisterFirewall { mac, ip, default } => format!(
            "Filters packets to the middlebox {mac}, which has the address {ip}, without rules at first; packets that no rule \
             matches are {}.",
            if *default == Action::Deny { "dropped" } else { "let through" }
        ),
        Command::RegisterService { mac, frontend, spec } => service(*mac, frontend, spec),
        Command::ChangeBackends { mac, frontend, change } => {
            let service = match frontend {
                Some(frontend) => format!("the service {frontend} of the middlebox {mac}"),
                None => format!("the only service of the middlebox {mac}"),
            };
            backends(&service, change)
        }
        Command::Add { mac, rule, update } => add(*mac, *rule, update),
        Command::Delete { mac, rule, removal } => delete(*mac, *rule, removal),
        Command::DeleteRule { mac, rule } => {
            format!("Removes {} of the middlebox {mac}.", rule_name(*rule))
        }
        Command::Unregister { mac, scope } => match scope {
            UnregisterScope::Firewall => format!("Ends the filters of the middlebox {mac}."),
            UnregisterScope::Service(frontend) => {
                format!("Ends the service {frontend} of the middlebox {mac}.")
            }
            UnregisterScope::LoadBalancing => {
                format!("Ends all services of the middlebox {mac}.")
            }
            UnregisterScope::All => {
                format!("Ends the filters and all services of the middlebox {mac}.")
            }
        },
        Command::Query { mac: Some(mac) } => {
            format!("Asks what is registered for the middlebox {mac}, with counters.")
        }
        Command::Query { mac: None } => {
            "Asks what is registered for all middleboxes that the channel may speak for, with counters."
                .to_string()
        }
    }
}

fn rule_name(rule: RuleId) -> String {
    let kind = if rule.action == Action::Deny { "deny" } else { "allow" };
    format!("{kind} rule {}", rule.number)
}

fn join(items: impl IntoIterator<Item = impl Display>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

fn service(mac: MacAddr, frontend: &Frontend, spec: &ServiceSpec) -> String {
    let what = match (frontend.port, frontend.protocol, spec.method) {
        (None, _, Method::Static | Method::Source(_)) if !spec.options.dsr => {
            format!("all IP packets of the family of {} to the middlebox {mac}", frontend.ip)
        }
        (None, ..) => format!("packets to the address {} of the middlebox {mac}", frontend.ip),
        (Some(port), Some(protocol), _) => {
            format!("{protocol} packets to port {port} of {} of the middlebox {mac}", frontend.ip)
        }
        (Some(port), None, _) => {
            format!("TCP and UDP packets to port {port} of {} of the middlebox {mac}", frontend.ip)
        }
    };
    let to = join(&spec.destinations);
    let how = match spec.method {
        Method::Static => format!("Sends {what} to the backend {to}"),
        Method::Source(ip) => format!("Sends {what} that come from {ip} to the backend {to}"),
        Method::RoundRobin => format!("Spreads the flows of {what} over {to} in turn, by weight"),
        Method::Hash => format!("Spreads the flows of {what} over {to} by consistent hashing"),
        Method::Least => {
            format!(
                "Sends each new flow of {what} to the one of {to} with the fewest flows for its weight"
            )
        }
    };
    let options = spec.options.to_string();
    let options = if options.is_empty() { String::new() } else { format!(" (options:{options})") };
    let rewrite = if spec.options.dsr {
        "; only the MAC is rewritten"
    } else {
        "; replies are translated back"
    };
    format!("{how}{rewrite}{options}.")
}

fn backends(service: &str, change: &BackendChange) -> String {
    match change {
        BackendChange::Add(all) => {
            format!(
                "Adds {} to the backends of {service}, or changes their MAC and weight.",
                join(all)
            )
        }
        BackendChange::Remove(names) => {
            format!("Removes {} from {service}; their flows move or are reset.", join(names))
        }
        BackendChange::Drain(names, Drain::Unlimited) => {
            format!("Gives {} no new flows of {service}; existing flows continue.", join(names))
        }
        BackendChange::Drain(names, Drain::For(seconds)) => format!(
            "Gives {} no new flows of {service}, and ends existing ones after {seconds} seconds.",
            join(names)
        ),
        BackendChange::Up(names) => format!("Gives {} new flows of {service} again.", join(names)),
    }
}

fn value(value: &FieldValue) -> String {
    let name = value.field().name();
    match value.to_string().split_once(' ') {
        Some((_, text)) => format!("{name} is {text}"),
        None => format!("{name} is the registered one"),
    }
}

fn add(mac: MacAddr, rule: RuleId, update: &FilterUpdate) -> String {
    let verb = if rule.action == Action::Deny { "drops" } else { "lets through" };
    let is_on = |one: &&FieldValue| update.bits & one.field().bit() != 0;
    let (on, off): (Vec<&FieldValue>, Vec<&FieldValue>) = update.values.iter().partition(is_on);
    let named: BTreeSet<_> = update.values.iter().map(FieldValue::field).collect();
    let fields = update.class.fields().iter();
    let silent: Vec<_> =
        fields.filter(|field| update.bits & field.bit() != 0 && !named.contains(field)).collect();
    let mut conditions: Vec<String> = on.into_iter().map(value).collect();
    conditions.extend(silent.into_iter().map(|field| {
        let whose =
            if field.has_default() { "the registered one" } else { "the value it already has" };
        format!("{} is {whose}", field.name())
    }));
    let mut out = if conditions.is_empty() {
        format!("Changes {} of the middlebox {mac}: no further condition", rule_name(rule))
    } else {
        format!(
            "Adds to {} of the middlebox {mac}, which {verb} packets that meet all of its conditions: {}",
            rule_name(rule),
            conditions.join(", ")
        )
    };
    if !off.is_empty() {
        let stored: Vec<String> = off.into_iter().map(value).collect();
        out.push_str(&format!(
            "; stored and not used, because the bit is off: {}",
            stored.join(", ")
        ));
    }
    out + "."
}

fn delete(mac: MacAddr, rule: RuleId, removal: &FilterRemoval) -> String {
    let fields = removal.class.fields().iter();
    let kept: Vec<&str> =
        fields.filter(|field| removal.keep & field.bit() != 0).map(|field| field.name()).collect();
    let kept = if kept.is_empty() { "none".to_string() } else { kept.join(", ") };
    let mut out = format!(
        "Of the conditions of class {} in {} of the middlebox {mac}, keeps: {kept}",
        removal.class.letter(),
        rule_name(rule)
    );
    if !removal.values.is_empty() {
        let names = removal.values.iter().map(|field| field.name());
        out.push_str(&format!("; forgets the value of {}", join(names)));
    }
    out + "."
}

/// A middlebox that is registered already, so that the parts of the ruleset that all middleboxes share
/// are there.
const OTHERS: [&str; 4] = [
    "R F 02:00:00:00:ff:fe 192.0.2.254",
    "A 02:00:00:00:ff:fe I 1 s 192.0.2.253",
    "R L 02:00:00:00:ff:fe 192.0.2.254:9 rr 192.0.2.252",
    "R L 02:00:00:00:ff:fe [2001:db8::fe]:9 rr 2001:db8::fc",
];

/// Returns the commands that must precede a command.
fn preceding(command: &Command) -> Vec<String> {
    let Some(mac) = command.mac() else { return Vec::new() };
    let register = format!("R F {mac} {EXAMPLE_ADDRESS}");
    match command {
        Command::Delete { rule, removal, .. } => {
            // The values that the rule keeps are examples, as far as they can be.
            vec![register, format!("A {mac} {rule} {} 0", removal.class.letter())]
        }
        Command::DeleteRule { rule, .. } => {
            vec![register, format!("A {mac} {rule} I 1 s 192.0.2.99")]
        }
        Command::ChangeBackends { frontend, change, .. } => {
            let frontend =
                frontend.map_or(EXAMPLE_ADDRESS.to_string(), |frontend| frontend.to_string());
            let text = |name: &BackendName| name.to_string();
            let mut names: Vec<String> = match change {
                BackendChange::Add(_) => Vec::new(),
                BackendChange::Remove(names)
                | BackendChange::Drain(names, _)
                | BackendChange::Up(names) => names.iter().map(text).collect(),
            };
            let is_ipv6 = match change {
                BackendChange::Add(all) => {
                    all.first().is_some_and(|to: &Destination| to.ip.is_ipv6())
                }
                BackendChange::Remove(names)
                | BackendChange::Drain(names, _)
                | BackendChange::Up(names) => names.first().is_some_and(|name| name.ip.is_ipv6()),
            };
            names.push(if is_ipv6 { "2001:db8::99" } else { "192.0.2.99" }.to_string());
            let frontend = if is_ipv6 && frontend == EXAMPLE_ADDRESS {
                "2001:db8::1".to_string()
            } else {
                frontend
            };
            vec![format!("R L {mac} {frontend} rr {}", names.join(" "))]
        }
        Command::Unregister { scope, .. } => {
            let frontend = match scope {
                UnregisterScope::Service(frontend) => frontend.to_string(),
                _ => EXAMPLE_ADDRESS.to_string(),
            };
            let to = if frontend.contains("::") { "2001:db8::99" } else { "192.0.2.99" };
            vec![register, format!("R L {mac} {frontend} rr {to}")]
        }
        Command::Add { .. } => vec![register],
        Command::RegisterFirewall { .. }
        | Command::RegisterService { .. }
        | Command::Query { .. } => Vec::new(),
    }
}

/// Returns the lines of the ruleset that a command adds (`+`) and removes (`-`), below the sets and
/// chains that they are in.
fn difference(command: &Command) -> Result<Vec<String>, CommandError> {
    let others = OTHERS.iter().map(ToString::to_string);
    let lines: Vec<String> = others.chain(preceding(command)).collect();
    let mut policy = Policy::from_lines(&lines)?;
    let before = blocks(&policy);
    policy.apply_line(&command.to_string())?;
    let after = blocks(&policy);
    let mut out = Vec::new();
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for name in names {
        let of =
            |blocks: &BTreeMap<String, Vec<String>>| blocks.get(name).cloned().unwrap_or_default();
        let (old, new) = (of(&before), of(&after));
        let removed =
            old.iter().filter(|line| !new.contains(line)).map(|line| format!("  - {line}"));
        let added = new.iter().filter(|line| !old.contains(line)).map(|line| format!("  + {line}"));
        let changes: Vec<String> = removed.chain(added).collect();
        if !changes.is_empty() {
            out.push(name.clone());
            out.extend(changes);
        }
    }
    Ok(out)
}

/// Returns the lines of each set and chain of a policy's ruleset.
fn blocks(policy: &Policy) -> BTreeMap<String, Vec<String>> {
    let mut desired = Desired { policy: policy.clone(), ..Desired::default() };
    desired.slots.sync_all(&desired.policy, &Unobserved, Instant::now());
    let queues = Queues { first: 0, count: 4, bypass: true };
    let options =
        RulesetOptions { queue_path: QueuePath::Native, fast_path: FastPath::Full, queues };
    let text: String = build::build(&desired, &options).values().map(ToString::to_string).collect();
    let mut out: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && *line != "}") {
        match line.strip_suffix(" {") {
            Some(header) => name = header.to_string(),
            None => {
                // Each element by itself.
                let line = line.strip_prefix("elements = { ").unwrap_or(line);
                let line = line.strip_suffix(" }").unwrap_or(line).trim_end_matches(',');
                out.entry(name.clone()).or_default().push(line.to_string());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_explained_in_a_sentence() {
        for (command, words) in [
            ("R F 2:0:0:0:0:1 10.0.0.1 deny", "which has the address 10.0.0.1"),
            (
                "A 2:0:0:0:0:1 M 5 s 1:2:3:4:5:6 p 8",
                "source MAC is 01:02:03:04:05:06, EtherType is",
            ),
            ("A 2:0:0:0:0:1 +3 I 2 d", "destination address is the registered one"),
            ("A 2:0:0:0:0:1 T 0 d 80", "stored and not used"),
            ("D 2:0:0:0:0:1 M 4 s", "keeps: EtherType; forgets the value of source MAC"),
            ("D 2:0:0:0:0:1 #7", "Removes deny rule 7"),
            (
                "R L 2:0:0:0:0:1 10.0.0.1:80/tcp least 10.0.0.2 10.0.0.3*2",
                "fewest flows for its weight",
            ),
            ("B 2:0:0:0:0:1 = 10.0.0.2 drain=30", "ends existing ones after 30 seconds"),
            ("X 2:0:0:0:0:1 F", "Ends the filters"),
            ("Q", "Asks what is registered"),
        ] {
            let text = explain(command).unwrap();
            assert!(text.contains(words), "{command}: {text}");
            assert!(text.lines().next().unwrap().ends_with('.'), "{text}");
        }
        let denied = explain("A 2:0:0:0:0:1 T 2 d 23").unwrap();
        assert!(denied.contains("\n    + ") && denied.contains("23"), "{denied}");
        assert!(explain("A 2:0:0:0:0:1 Z").is_err());
    }
}
