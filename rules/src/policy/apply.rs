//! Application of commands: the policy changes as a whole here, or the command is rejected.

use super::firewall::Firewall;
use super::{Middlebox, Policy};
use crate::filter::FilterRule;
use crate::limits::{MAX_RULES, MAX_SERVICES, TOO_MANY_BACKENDS, first_backend_over_limit};
use crate::network::{MiddleboxKey, NetworkId};
use crate::service::Service;
use nfqd_shmctl::{
    BackendChange, Command, CommandError, ErrorCode, Frontend, MacAddr, ParsedCommand, Place,
    RuleId, ServiceSpec, UnregisterScope,
};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The reason the policy rejects a command.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{expected}")]
pub struct PolicyError {
    /// The word that is wrong.
    pub place: Place,
    /// The code of the reply.
    pub code: ErrorCode,
    /// The message: what is wrong with the word and what to write.
    pub expected: String,
}

impl PolicyError {
    fn new(place: Place, code: ErrorCode, expected: impl Into<String>) -> PolicyError {
        PolicyError { place, code, expected: expected.into() }
    }

    /// Returns the error with the place of its word in the line.
    pub fn locate(&self, parsed: &ParsedCommand<'_>) -> CommandError {
        parsed.error(self.place, self.code, &self.expected)
    }
}

fn reject<T>(place: Place, code: ErrorCode, expected: impl Into<String>) -> Result<T, PolicyError> {
    Err(PolicyError::new(place, code, expected))
}

const NO_SERVICE: &str = "no service of this middlebox; Q shows them";

impl Policy {
    /// Applies one command about the middleboxes that are registered for a network.
    ///
    /// # Errors
    /// If the policy rejects it; the policy is unchanged then.
    pub fn apply(&mut self, network: NetworkId, command: &Command) -> Result<(), PolicyError> {
        let at = |mac: &MacAddr| MiddleboxKey { network, mac: *mac };
        match command {
            Command::RegisterFirewall { mac, ip, default } => {
                self.edit(at(mac)).firewall = Some(Firewall::new(*ip, *default));
                Ok(())
            }
            Command::RegisterService { mac, frontend, spec } => {
                self.register_service(at(mac), *frontend, spec)
            }
            Command::ChangeBackends { mac, frontend, change } => {
                self.change_backends(at(mac), *frontend, change)
            }
            Command::Add { mac, rule: id, update } => {
                let firewall = self.firewall(at(mac))?;
                check_room_for_rule(firewall, *id)?;
                let old = firewall.rules().get(id).cloned().unwrap_or_default();
                let new = old
                    .with(update, firewall.ip())
                    .or_else(|error| reject(Place::Bits, ErrorCode::Value, error.to_string()))?;
                self.set_rule(at(mac), *id, new);
                Ok(())
            }
            Command::Delete { mac, rule: id, removal } => {
                let firewall = self.firewall(at(mac))?;
                // Rule #1 always exists, as the original's one rule did.
                let old = match firewall.rules().get(id) {
                    Some(old) => old.clone(),
                    None if *id == RuleId::FIRST => FilterRule::default(),
                    None => {
                        return reject(Place::Rule, ErrorCode::Value, "no such rule; A makes one");
                    }
                };
                check_room_for_rule(firewall, *id)?;
                let new = old
                    .without(removal, firewall.ip())
                    .or_else(|error| reject(Place::Bits, ErrorCode::Value, error.to_string()))?;
                self.set_rule(at(mac), *id, new);
                Ok(())
            }
            Command::DeleteRule { mac, rule: id } => {
                if !self.firewall(at(mac))?.rules().contains_key(id) {
                    return reject(Place::Rule, ErrorCode::Value, "no such rule");
                }
                if let Some(firewall) = &mut self.edit(at(mac)).firewall {
                    firewall.remove_rule(*id);
                }
                Ok(())
            }
            Command::Unregister { mac, scope } => self.unregister(at(mac), *scope),
            Command::Query { mac: Some(mac) } if self.get(at(mac)).is_none() => {
                reject(Place::Mac, ErrorCode::UnknownMac, "not registered")
            }
            Command::Query { .. } => Ok(()),
        }
    }

    fn edit(&mut self, key: MiddleboxKey) -> &mut Middlebox {
        Arc::make_mut(self.middleboxes.entry(key).or_default())
    }

    fn firewall(&self, key: MiddleboxKey) -> Result<&Firewall, PolicyError> {
        let expected = match self.get(key).map(Middlebox::firewall) {
            Some(Some(firewall)) => return Ok(firewall),
            Some(None) => format!("has no filters; register them first with R F {} IP", key.mac),
            None => format!("not registered; write R F {} IP first", key.mac),
        };
        reject(Place::Mac, ErrorCode::UnknownMac, expected)
    }

    fn set_rule(&mut self, key: MiddleboxKey, id: RuleId, rule: FilterRule) {
        if let Some(firewall) = &mut self.edit(key).firewall {
            firewall.set_rule(id, rule);
        }
    }

    fn register_service(
        &mut self,
        key: MiddleboxKey,
        frontend: Frontend,
        spec: &ServiceSpec,
    ) -> Result<(), PolicyError> {
        let services = self.get(key).map(Middlebox::services);
        let is_full =
            services.is_some_and(|s| s.len() >= MAX_SERVICES && !s.contains_key(&frontend));
        if is_full {
            let expected = format!(
                "one more than the {MAX_SERVICES} services that a middlebox may have; end one \
                 first, by X"
            );
            return reject(Place::Frontend, ErrorCode::Quota, expected);
        }
        let others = self.backends_of_other_services(key, &frontend);
        if let Some(at) = first_backend_over_limit(others, spec.destinations.len()) {
            return reject(Place::Backend(at), ErrorCode::Quota, TOO_MANY_BACKENDS);
        }
        self.edit(key).services.insert(frontend, Service::new(frontend, spec));
        Ok(())
    }

    fn backends_of_other_services(&self, key: MiddleboxKey, frontend: &Frontend) -> usize {
        let services = self.get(key).into_iter().flat_map(Middlebox::services);
        let others = services.filter(|(other, _)| *other != frontend);
        others.map(|(_, service)| service.backends().len()).sum()
    }

    fn change_backends(
        &mut self,
        key: MiddleboxKey,
        named: Option<Frontend>,
        change: &BackendChange,
    ) -> Result<(), PolicyError> {
        let services = self.get(key).map(Middlebox::services).filter(|all| !all.is_empty());
        let Some(services) = services else {
            let expected =
                "not registered for load balancing; write R L first, or Q to see what is";
            return reject(Place::Mac, ErrorCode::UnknownMac, expected);
        };
        let (frontend, service) = match (named, services.first_key_value()) {
            (Some(frontend), _) => find_service(services, frontend)
                .or_else(|expected| reject(Place::Frontend, ErrorCode::Value, expected))?,
            (None, Some((frontend, service))) if services.len() == 1 => (*frontend, service),
            _ => {
                let all: Vec<String> = services.keys().map(Frontend::to_string).collect();
                let expected =
                    format!("has several services; name one before the sign: {}", all.join(", "));
                return reject(Place::Mac, ErrorCode::Value, expected);
            }
        };
        if !service.method().is_pool() {
            let expected = "registered with method static or source, which takes one destination; \
                            register it anew";
            // Without a frontend in the command, this is about its MAC.
            return reject(Place::Frontend, ErrorCode::Value, expected);
        }
        let mut changed = service.clone();
        changed.change_backends(frontend, change).map_err(|error| {
            PolicyError::new(Place::Backend(error.at), error.code, error.expected)
        })?;
        let others = self.backends_of_other_services(key, &frontend);
        if first_backend_over_limit(others, changed.backends().len()).is_some() {
            return reject(Place::Backend(0), ErrorCode::Quota, TOO_MANY_BACKENDS);
        }
        self.edit(key).services.insert(frontend, changed);
        Ok(())
    }

    fn unregister(&mut self, key: MiddleboxKey, scope: UnregisterScope) -> Result<(), PolicyError> {
        let Some(middlebox) = self.get(key) else {
            return reject(Place::Mac, ErrorCode::UnknownMac, "not registered; Q shows what is");
        };
        let (has_firewall, has_services) =
            (middlebox.firewall.is_some(), !middlebox.services.is_empty());
        let missing = match scope {
            UnregisterScope::Firewall if !has_firewall => Some("firewall service"),
            UnregisterScope::LoadBalancing if !has_services => Some("load balancing"),
            UnregisterScope::Service(frontend) if !middlebox.services.contains_key(&frontend) => {
                // The command may be a repetition: it must not end a similar service instead.
                let expected = match same_address_and_port(&middlebox.services, frontend)[..] {
                    [other, ..] => format!("no service of this middlebox; there is {other}"),
                    [] => NO_SERVICE.to_string(),
                };
                return reject(Place::Frontend, ErrorCode::Value, expected);
            }
            _ => None,
        };
        if let Some(service) = missing {
            let expected = format!("not registered for {service}; Q shows what is");
            return reject(Place::Mac, ErrorCode::UnknownMac, expected);
        }
        let edited = self.edit(key);
        match scope {
            UnregisterScope::Firewall => edited.firewall = None,
            UnregisterScope::LoadBalancing => edited.services.clear(),
            UnregisterScope::Service(frontend) => drop(edited.services.remove(&frontend)),
            UnregisterScope::All => *edited = Middlebox::default(),
        }
        if edited.firewall.is_none() && edited.services.is_empty() {
            self.middleboxes.remove(&key);
        }
        Ok(())
    }
}

fn check_room_for_rule(firewall: &Firewall, id: RuleId) -> Result<(), PolicyError> {
    if firewall.rules().len() < MAX_RULES || firewall.rules().contains_key(&id) {
        return Ok(());
    }
    let expected = format!("one more than the {MAX_RULES} rules that a middlebox may have");
    reject(Place::Rule, ErrorCode::Quota, expected)
}

/// Returns the service that a change of backends names. A port without a protocol may stand for the
/// one service that has both.
fn find_service(
    services: &BTreeMap<Frontend, Service>,
    frontend: Frontend,
) -> Result<(Frontend, &Service), String> {
    if let Some(service) = services.get(&frontend) {
        return Ok((frontend, service));
    }
    match same_address_and_port(services, frontend)[..] {
        [found] => match services.get(&found) {
            Some(service) => Ok((found, service)),
            None => Err(NO_SERVICE.to_string()),
        },
        [] => Err(NO_SERVICE.to_string()),
        [tcp, udp, ..] => Err(format!("two services have this port; name {tcp} or {udp}")),
    }
}

/// Returns the frontends that differ from this one by having a protocol.
fn same_address_and_port(
    services: &BTreeMap<Frontend, Service>,
    frontend: Frontend,
) -> Vec<Frontend> {
    let same = |other: &Frontend| Frontend { protocol: None, ..*other } == frontend;
    services.keys().copied().filter(same).collect()
}
