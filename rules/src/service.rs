//! Load-balanced services: a service's method, options and backends.

use crate::limits::MAX_BACKENDS;
use crate::network::MiddleboxKey;
use crate::packet::IpHeader;
use nfqd_shmctl::{
    BackendChange, BackendName, Command, Destination, Drain, ErrorCode, Fragment, Frontend,
    MacAddr, Method, Protocol, ServiceOptions, ServiceSpec,
};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Backends in one command of a printed policy: few enough for the longest command.
const A_COMMAND: usize = 12;

/// A backend of a service in a policy.
#[derive(Clone, Copy, Debug)]
pub struct BackendRef<'p> {
    /// The middlebox.
    pub middlebox: MiddleboxKey,
    /// The frontend of the service.
    pub frontend: &'p Frontend,
    /// The service.
    pub service: &'p Service,
    /// The backend's name.
    pub name: &'p BackendName,
    /// The backend as it is registered.
    pub backend: &'p Backend,
}

/// The reason a change of backends is rejected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct BackendError {
    /// The index of the backend in the command.
    pub at: usize,
    /// The code.
    pub code: ErrorCode,
    /// The message: what is wrong with the backend and what to write.
    pub expected: &'static str,
}

/// A registered service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    method: Method,
    options: ServiceOptions,
    /// The backends, sorted, so that every host with the same configuration chooses alike. A name
    /// has a port if and only if the service has one.
    backends: BTreeMap<BackendName, Backend>,
}

/// A backend of a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backend {
    /// The MAC, if a command gave it.
    pub mac: Option<MacAddr>,
    /// The share of new flows, relative to the others.
    pub weight: u16,
    /// Its drain: it gets no new flows, and loses those that it has at the end.
    pub drain: Option<Drain>,
}

impl Service {
    /// Returns the service that `R L` registers for a frontend.
    pub fn new(frontend: Frontend, spec: &ServiceSpec) -> Service {
        let backends = spec.destinations.iter().map(|to| entry(frontend, to)).collect();
        Service { method: spec.method, options: spec.options, backends }
    }

    /// Returns the balancing method.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Returns the options.
    pub fn options(&self) -> &ServiceOptions {
        &self.options
    }

    /// Returns the backends. A name has a port if and only if the service has one.
    pub fn backends(&self) -> &BTreeMap<BackendName, Backend> {
        &self.backends
    }

    /// Returns the only backend of a service that is not a pool.
    pub fn only_backend(&self) -> Option<BackendName> {
        self.backends.keys().next().copied().filter(|_| !self.method.is_pool())
    }

    /// Whether this service, registered for a frontend, takes a packet to its middlebox. Without a port,
    /// static and source services take all packets of the address' family, pools the TCP and UDP
    /// packets to the address. The port of a later fragment is unknown, so it matches any.
    pub fn takes(&self, frontend: &Frontend, ip: &IpHeader) -> bool {
        if frontend.ip.is_ipv4() != ip.source.is_ipv4() {
            return false;
        }
        let is_protocol = match frontend.protocol {
            Some(protocol) => ip.protocol == protocol,
            // The address belongs to the backend: all that is to it passes.
            None if frontend.port.is_none() && !self.method.is_pool() => true,
            None => ip.protocol == Protocol::TCP || ip.protocol == Protocol::UDP,
        };
        let by_port = match (frontend.port, ip.fragment) {
            (None, _) | (Some(_), Fragment::Later) => true,
            (Some(port), _) => ip.ports.is_some_and(|ports| ports.destination == port),
        };
        let has_flows = ip.fragment == Fragment::Later || ip.ports.is_some();
        let whole = frontend.port.is_none() && !self.options.dsr;
        let own_port = frontend.ip == ip.destination && is_protocol && by_port;
        let not_from = |ip: IpAddr| self.only_backend().is_some_and(|backend| backend.ip != ip);
        match self.method {
            // A backend cannot answer itself.
            Method::Static => not_from(ip.source) && (whole || own_port),
            Method::Source(source) => {
                source == ip.source && not_from(ip.source) && (whole || own_port)
            }
            _ => own_port && has_flows,
        }
    }

    /// Applies a change of the backends of a pool.
    ///
    /// # Errors
    /// The reason a backend cannot be changed; nothing is changed then.
    pub(crate) fn change_backends(
        &mut self,
        frontend: Frontend,
        change: &BackendChange,
    ) -> Result<(), BackendError> {
        let mut backends = self.backends.clone();
        // Returns the full name. A frontend without a port leaves a port in it, which no backend
        // has.
        let full = |name: &BackendName| match frontend.port {
            Some(_) => BackendName { port: port(frontend, name.port), ..*name },
            None => *name,
        };
        let unknown = |at: usize| {
            let expected = "not a backend of this service; Q shows them";
            BackendError { at, code: ErrorCode::UnknownBackend, expected }
        };
        let value = |at: usize, expected| BackendError { at, code: ErrorCode::Value, expected };
        match change {
            BackendChange::Add(destinations) => {
                for (at, to) in destinations.iter().enumerate() {
                    self.check_name(&frontend, &to.name())
                        .map_err(|expected| value(at, expected))?;
                    let (name, mut backend) = entry(frontend, to);
                    if let Some(old) = backends.get(&name) {
                        backend.drain = old.drain;
                    }
                    backends.insert(name, backend);
                    if backends.len() > MAX_BACKENDS {
                        let expected =
                            "one more than the 255 backends a service may have; remove one first";
                        return Err(BackendError { at, code: ErrorCode::Quota, expected });
                    }
                }
            }
            BackendChange::Remove(names) => {
                for (at, name) in names.iter().enumerate() {
                    if backends.remove(&full(name)).is_none() {
                        return Err(unknown(at));
                    }
                    if backends.is_empty() {
                        let expected = "the last backend; drain it, add another before, or end the \
                                        service with X";
                        return Err(value(at, expected));
                    }
                }
            }
            BackendChange::Drain(names, _) | BackendChange::Up(names) => {
                for (at, name) in names.iter().enumerate() {
                    let backend = backends.get_mut(&full(name)).ok_or_else(|| unknown(at))?;
                    backend.drain = match change {
                        BackendChange::Drain(_, drain) => Some(*drain),
                        _ => None,
                    };
                }
            }
        }
        self.backends = backends;
        Ok(())
    }

    /// Returns what is wrong with the name of a new backend.
    fn check_name(&self, frontend: &Frontend, name: &BackendName) -> Result<(), &'static str> {
        match (frontend.port, name.port) {
            (None, Some(_)) => Err("a port, but the registered address has none"),
            (own, Some(port)) if self.options.dsr && own != Some(port) => {
                Err("a port, but this service rewrites only the MAC; omit the port")
            }
            _ if name.ip == frontend.ip => {
                Err("the middlebox' own address; write the address of another host")
            }
            _ if name.ip.is_ipv4() != frontend.ip.is_ipv4() => {
                Err("not of the family of the registered address; write one of that")
            }
            _ => Ok(()),
        }
    }

    /// Returns the commands that make this service for a frontend.
    pub(crate) fn commands(&self, mac: MacAddr, frontend: Frontend) -> Vec<Command> {
        let destination = |(name, backend): (&BackendName, &Backend)| Destination {
            ip: name.ip,
            port: name.port.filter(|port| Some(*port) != frontend.port),
            mac: backend.mac,
            weight: backend.weight,
        };
        let all: Vec<Destination> = self.backends.iter().map(destination).collect();
        let mut chunks = all.chunks(A_COMMAND).map(<[Destination]>::to_vec);
        let destinations = chunks.next().unwrap_or_default();
        let spec = ServiceSpec { method: self.method, destinations, options: self.options };
        let mut out = vec![Command::RegisterService { mac, frontend, spec }];
        let change = |change: BackendChange| Command::ChangeBackends {
            mac,
            frontend: Some(frontend),
            change,
        };
        out.extend(chunks.map(BackendChange::Add).map(change));
        let mut draining: BTreeMap<Drain, Vec<BackendName>> = BTreeMap::new();
        for (backend, to) in self.backends.values().zip(&all) {
            if let Some(drain) = backend.drain {
                draining.entry(drain).or_default().push(to.name());
            }
        }
        for (drain, names) in draining {
            let some = names.chunks(A_COMMAND).map(<[BackendName]>::to_vec);
            out.extend(some.map(|names| change(BackendChange::Drain(names, drain))));
        }
        out
    }
}

fn port(frontend: Frontend, port: Option<u16>) -> Option<u16> {
    frontend.port.and_then(|own| port.or(Some(own)))
}

fn entry(frontend: Frontend, to: &Destination) -> (BackendName, Backend) {
    let name = BackendName { ip: to.ip, port: port(frontend, to.port) };
    (name, Backend { mac: to.mac, weight: to.weight, drain: None })
}
