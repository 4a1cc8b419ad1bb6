//! The policy: the registered middleboxes with their rules and services.
//!
//! [`Policy`] is changed by one command at a time, in `apply`: a command is applied as a whole or
//! rejected. The policy does not depend on nftables, text or flows.

mod apply;
mod firewall;
#[cfg(test)]
mod tests;

pub use apply::PolicyError;
pub use firewall::{FilterDecision, Firewall};

use crate::network::{MiddleboxKey, NetworkId};
use crate::packet::Packet;
use crate::service::{BackendRef, Service};
use imbl::OrdMap;
use nfqd_shmctl::{Command, CommandError, Frontend, MacAddr, ParsedCommand, RuleId};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

/// Everything that is registered. A clone is cheap: both share what is equal.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    middleboxes: OrdMap<MiddleboxKey, Arc<Middlebox>>,
}

/// A registered middlebox.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Middlebox {
    firewall: Option<Firewall>,
    services: BTreeMap<Frontend, Service>,
}

impl Middlebox {
    /// Returns the firewall service, if it is registered.
    pub fn firewall(&self) -> Option<&Firewall> {
        self.firewall.as_ref()
    }

    /// Returns the load-balanced services.
    pub fn services(&self) -> &BTreeMap<Frontend, Service> {
        &self.services
    }

    /// Returns the service that a slot belongs to, by its frontend.
    pub fn service(&self, frontend: &Frontend) -> Option<&Service> {
        self.services.get(frontend)
    }

    /// Whether a rule is registered; `None` stands for a default that denies.
    pub fn has_rule(&self, rule: Option<RuleId>) -> bool {
        self.firewall.as_ref().is_some_and(|firewall| match rule {
            Some(rule) => firewall.rules().contains_key(&rule),
            None => firewall.default_action() == nfqd_shmctl::Action::Deny,
        })
    }

    /// Returns the rules in the order of evaluation, and `None` for a default that denies.
    pub fn rules_and_default(&self) -> impl Iterator<Item = Option<RuleId>> {
        let rules = self.firewall.iter().flat_map(|firewall| firewall.rules().keys());
        rules.copied().map(Some).chain(self.has_rule(None).then_some(None))
    }

    /// Returns the commands that make this middlebox, whose MAC is `mac`.
    pub fn commands(&self, mac: MacAddr) -> Vec<Command> {
        let mut out = Vec::new();
        if let Some(firewall) = &self.firewall {
            let (ip, default) = (firewall.ip(), firewall.default_action());
            out.push(Command::RegisterFirewall { mac, ip, default });
            out.extend(firewall.rules().iter().flat_map(|(&id, rule)| rule.commands(mac, id)));
        }
        let services = self.services.iter();
        out.extend(services.flat_map(|(&frontend, service)| service.commands(mac, frontend)));
        out
    }

    /// Returns the address to show for the middlebox.
    pub fn ip(&self) -> Option<IpAddr> {
        let first_service = || self.services.keys().next().map(|frontend| frontend.ip);
        self.firewall.as_ref().map(Firewall::ip).or_else(first_service)
    }

    /// Returns the registered addresses, of the firewall service and the frontends.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ip().into_iter().chain(self.services.keys().map(|frontend| frontend.ip))
    }

    /// Decides on a packet by the filters alone.
    pub fn filter(&self, packet: &Packet) -> FilterDecision {
        self.firewall.as_ref().map_or(FilterDecision::ALLOW, |firewall| firewall.decide(packet))
    }

    /// Returns the service that takes a packet. Of the services with the packet's own destination
    /// address, one with its port and protocol takes precedence over one with its port, and that
    /// over one with the address alone; behind these come services of other addresses, in their
    /// order.
    ///
    /// A packet whose checksum field is cut off cannot be rewritten and is not taken; nor is one
    /// that comes from the only backend, which cannot answer itself.
    pub fn service_for(&self, packet: &Packet) -> Option<(Frontend, &Service)> {
        let ip = packet.ip.filter(|ip| ip.translatable)?;
        let taking =
            self.services.iter().filter(|(frontend, service)| service.takes(frontend, &ip));
        let best = taking.min_by_key(|(frontend, _)| {
            (frontend.ip != ip.destination, frontend.port.is_none(), frontend.protocol.is_none())
        });
        best.map(|(frontend, service)| (*frontend, service))
    }
}

impl Policy {
    /// Returns the middleboxes.
    pub fn middleboxes(&self) -> &OrdMap<MiddleboxKey, Arc<Middlebox>> {
        &self.middleboxes
    }

    /// Returns the middleboxes that differ between two policies; found without visiting what both
    /// share.
    pub fn changed(&self, before: &Policy) -> Vec<MiddleboxKey> {
        use imbl::ordmap::DiffItem::{Add, Remove, Update};
        let item = |item| match item {
            Add(&key, _) | Remove(&key, _) | Update { new: (&key, _), .. } => key,
        };
        before.middleboxes.diff(&self.middleboxes).map(item).collect()
    }

    /// Returns a middlebox.
    pub fn get(&self, key: MiddleboxKey) -> Option<&Middlebox> {
        self.middleboxes.get(&key).map(Arc::as_ref)
    }

    /// Returns every backend of every service.
    pub fn backends(&self) -> impl Iterator<Item = BackendRef<'_>> {
        self.middleboxes.iter().flat_map(|(&middlebox, registered)| {
            registered.services.iter().flat_map(move |(frontend, service)| {
                service.backends().iter().map(move |(name, backend)| BackendRef {
                    middlebox,
                    frontend,
                    service,
                    name,
                    backend,
                })
            })
        })
    }

    /// Returns the policy that these commands make from an empty one.
    ///
    /// # Errors
    /// The error of the first line that is not a command or is rejected.
    pub fn from_lines(lines: &[impl AsRef<str>]) -> Result<Policy, CommandError> {
        let mut policy = Policy::default();
        for line in lines {
            policy.apply_line(line.as_ref())?;
        }
        Ok(policy)
    }

    /// Parses and applies one command about middleboxes that may be anywhere.
    ///
    /// # Errors
    /// If the text is not a command or the policy rejects it; the policy is unchanged then.
    pub fn apply_line(&mut self, line: &str) -> Result<Command, CommandError> {
        let parsed = ParsedCommand::parse(line)?;
        self.apply(NetworkId::ANY, &parsed.command).map_err(|error| error.locate(&parsed))?;
        Ok(parsed.command)
    }

    /// Returns the commands that make this policy from an empty one, with the network of each.
    pub fn commands(&self) -> impl Iterator<Item = (NetworkId, Command)> {
        self.middleboxes.iter().flat_map(|(key, middlebox)| {
            let commands = middlebox.commands(key.mac).into_iter();
            commands.map(|command| (key.network, command))
        })
    }
}
