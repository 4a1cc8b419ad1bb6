//! A balanced service: how it chooses, and its backends.

use crate::packet::{Fragment, Ip};
use nfqd_shmctl::{
    BackendName, Balance, Command, Destination, Edit, ErrorCode, MacAddr, Method, Protocol, Terms, Vip,
};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Most backends that one service may have: the table of consistent hashing has a byte for each place.
pub const MAX_BACKENDS: usize = 255;
/// Backends in one command of a printed policy: few enough for the longest command.
const A_COMMAND: usize = 12;

/// A service as it is registered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    method: Method,
    terms: Terms,
    /// Sorted, so that every host with the same configuration chooses alike. A name has a port if and only if the service
    /// has one.
    backends: BTreeMap<BackendName, Backend>,
}

/// A backend of a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Its MAC, when a command has said it.
    pub mac: Option<MacAddr>,
    /// Its share of new flows beside the others'.
    pub weight: u16,
    /// It gets no new flows.
    pub draining: bool,
}

/// Why a change is refused; `at` counts the backends of the command.
pub(crate) struct Refused {
    pub at: usize,
    pub code: ErrorCode,
    pub expected: String,
}

impl Service {
    /// The service that `R L` registers for `vip`.
    pub fn new(vip: Vip, balance: &Balance) -> Service {
        let backends = balance.destinations.iter().map(|to| entry(vip, to)).collect();
        Service { method: balance.method, terms: balance.terms, backends }
    }

    /// How it chooses.
    pub fn method(&self) -> Method {
        self.method
    }

    /// What it does besides choosing.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Its backends. A name has a port if and only if the service has one.
    pub fn backends(&self) -> &BTreeMap<BackendName, Backend> {
        &self.backends
    }

    /// The one backend of a service that is no pool.
    pub fn only_backend(&self) -> Option<BackendName> {
        self.backends.keys().next().copied().filter(|_| !self.method.is_pool())
    }

    /// Whether this service, registered for `vip`, takes a packet to its middlebox. Without a port, static and source take
    /// all of the address' family, pools TCP and UDP to the address. Of a later fragment the port is not known: it may be
    /// any.
    pub fn takes(&self, vip: &Vip, ip: &Ip) -> bool {
        if vip.ip.is_ipv4() != ip.source.is_ipv4() {
            return false;
        }
        let is_protocol = match vip.protocol {
            Some(protocol) => ip.protocol == protocol,
            // The address is the backend's own: all that is to it.
            None if vip.port.is_none() && !self.method.is_pool() => true,
            None => ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP,
        };
        let by_port = match (vip.port, ip.fragment) {
            (None, _) | (Some(_), Fragment::Later) => true,
            (Some(port), _) => ip.ports.is_some_and(|ports| ports.destination == port),
        };
        let has_flows = ip.fragment == Fragment::Later || ip.ports.is_some();
        let whole = vip.port.is_none() && !self.terms.dsr;
        let own_port = vip.ip == ip.destination && is_protocol && by_port;
        let not_from = |ip: IpAddr| self.only_backend().is_some_and(|backend| backend.ip != ip);
        match self.method {
            // A backend could not answer itself.
            Method::Static => not_from(ip.source) && (whole || own_port),
            Method::Source(source) => source == ip.source && not_from(ip.source) && (whole || own_port),
            _ => own_port && has_flows,
        }
    }

    /// Applies `B`.
    pub(crate) fn edit(&mut self, vip: Vip, edit: &Edit) -> Result<(), Refused> {
        let refuse = |at: usize, code: ErrorCode, expected: &str| {
            Err(Refused { at, code, expected: expected.to_string() })
        };
        // A port that the service has none of names no backend.
        let full = |name: &BackendName| match vip.port {
            Some(_) => BackendName { port: port(vip, name.port), ..*name },
            None => *name,
        };
        let unportable = |name: &BackendName| match (vip.port, name.port) {
            (None, Some(_)) => Some("a port, but the registered address has none"),
            (own, Some(port)) if self.terms.dsr && own != Some(port) => {
                Some("a port, but this service rewrites nothing but the MAC; leave it out")
            }
            _ if name.ip == vip.ip => Some("the middlebox' own address; write the address of another host"),
            _ if name.ip.is_ipv4() != vip.ip.is_ipv4() => {
                Some("not of the family of the registered address; write one of that")
            }
            _ => None,
        };
        match edit {
            Edit::Add(destinations) => {
                let mut backends = self.backends.clone();
                for (at, to) in destinations.iter().enumerate() {
                    if let Some(expected) = unportable(&to.name()) {
                        return refuse(at, ErrorCode::Value, expected);
                    }
                    let (name, mut backend) = entry(vip, to);
                    if let Some(old) = backends.get(&name) {
                        backend.draining = old.draining;
                    }
                    backends.insert(name, backend);
                    if backends.len() > MAX_BACKENDS {
                        return refuse(
                            at,
                            ErrorCode::Quota,
                            "one more than the 255 backends a service may have; remove one first",
                        );
                    }
                }
                self.backends = backends;
            }
            Edit::Remove(names) => {
                let mut backends = self.backends.clone();
                for (at, name) in names.iter().enumerate() {
                    if backends.remove(&full(name)).is_none() {
                        return refuse(
                            at,
                            ErrorCode::UnknownBackend,
                            "not a backend of this service; Q shows them",
                        );
                    }
                    if backends.is_empty() {
                        return refuse(
                            at,
                            ErrorCode::Value,
                            "the last backend; drain it, add another before, or end the service with X",
                        );
                    }
                }
                self.backends = backends;
            }
            Edit::Drain(names) | Edit::Up(names) => {
                let unknown = names.iter().position(|name| !self.backends.contains_key(&full(name)));
                if let Some(at) = unknown {
                    return refuse(
                        at,
                        ErrorCode::UnknownBackend,
                        "not a backend of this service; Q shows them",
                    );
                }
                for name in names {
                    if let Some(backend) = self.backends.get_mut(&full(name)) {
                        backend.draining = matches!(edit, Edit::Drain(_));
                    }
                }
            }
        }
        Ok(())
    }

    /// The commands that make this service of `vip`.
    pub(crate) fn commands(&self, mac: MacAddr, vip: Vip) -> Vec<Command> {
        let destination = |(name, backend): (&BackendName, &Backend)| Destination {
            ip: name.ip,
            port: name.port.filter(|port| Some(*port) != vip.port),
            mac: backend.mac,
            weight: backend.weight,
        };
        let all: Vec<Destination> = self.backends.iter().map(destination).collect();
        let mut chunks = all.chunks(A_COMMAND).map(<[Destination]>::to_vec);
        let destinations = chunks.next().unwrap_or_default();
        let balance = Balance { method: self.method, destinations, terms: self.terms };
        let mut out = vec![Command::RegisterBalance { mac, vip, balance }];
        let edit = |edit: Edit| Command::EditBackends { mac, vip: Some(vip), edit };
        out.extend(chunks.map(Edit::Add).map(edit));
        let draining = self.backends.iter().zip(&all).filter(|((_, backend), _)| backend.draining);
        let names: Vec<BackendName> = draining.map(|(_, to)| to.name()).collect();
        out.extend(names.chunks(A_COMMAND).map(<[BackendName]>::to_vec).map(Edit::Drain).map(edit));
        out
    }
}

fn port(vip: Vip, port: Option<u16>) -> Option<u16> {
    vip.port.and_then(|own| port.or(Some(own)))
}

fn entry(vip: Vip, to: &Destination) -> (BackendName, Backend) {
    let name = BackendName { ip: to.ip, port: port(vip, to.port) };
    (name, Backend { mac: to.mac, weight: to.weight, draining: false })
}
