//! Load-balanced services in the command language: frontends, methods, options and backends.

use super::value::{MacAddr, ParseValueError, Protocol, decimal};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// The address, or the port of one, that clients of a service use.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    /// The address.
    pub ip: IpAddr,
    /// The port; `None` for every port.
    pub port: Option<u16>,
    /// The protocol of the port, TCP or UDP; `None` for both.
    pub protocol: Option<Protocol>,
}

impl Frontend {
    /// The frontend of a whole address.
    pub fn of(ip: IpAddr) -> Frontend {
        Frontend { ip, port: None, protocol: None }
    }

    /// Whether packets that both frontends could take belong to this one: a port takes precedence
    /// over the whole address, a protocol over both.
    pub fn takes_precedence_over(&self, other: &Frontend) -> bool {
        fn meet<T: PartialEq>(one: Option<T>, other: Option<T>) -> bool {
            one.is_none() || other.is_none() || one == other
        }
        let meets = self.ip == other.ip
            && meet(self.port, other.port)
            && meet(self.protocol, other.protocol);
        let place = |frontend: &Frontend| (frontend.port.is_none(), frontend.protocol.is_none());
        meets && place(self) < place(other)
    }
}

/// The name of a backend: how commands refer to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BackendName {
    /// The address.
    pub ip: IpAddr,
    /// The port; `None` for that of the frontend.
    pub port: Option<u16>,
}

/// A backend as a command adds it: `ip[:port][@mac][*weight]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Destination {
    /// The address.
    pub ip: IpAddr,
    /// The port; `None` for that of the frontend.
    pub port: Option<u16>,
    /// The MAC, if the command gives it; the host finds it otherwise.
    pub mac: Option<MacAddr>,
    /// The weight, from 1 to [`MAX_WEIGHT`]: the backend's share of new flows beside the others'.
    pub weight: u16,
}

/// The largest weight of a backend.
pub const MAX_WEIGHT: u16 = 1000;

impl Destination {
    /// Returns the name.
    pub fn name(&self) -> BackendName {
        BackendName { ip: self.ip, port: self.port }
    }
}

/// The method by which a service chooses the backend of a new flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// Type 0: the one backend gets all that the service takes.
    Static,
    /// Type 1: the one backend gets what comes from this address.
    Source(IpAddr),
    /// Type 2: weighted round robin.
    RoundRobin,
    /// Type 3: consistent hashing.
    Hash,
    /// Type 4: the backend with the fewest live flows for its weight.
    Least,
}

impl Method {
    /// Whether there may be several backends, of which each flow keeps its own.
    pub fn is_pool(self) -> bool {
        matches!(self, Method::RoundRobin | Method::Hash | Method::Least)
    }
}

/// The check by which the host learns whether a backend is alive.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Check {
    /// ARP or neighbour discovery; none for a backend whose MAC the command gives.
    #[default]
    Default,
    /// None: the backend is always considered alive.
    None,
    /// ARP or neighbour discovery.
    Neighbour,
    /// A TCP connection from the host to this port, or to the backend's if there is none.
    Tcp(Option<u16>),
    /// A UDP datagram from the host to this port, or to the backend's if there is none, which must
    /// not be answered by ICMP port unreachable.
    Udp(Option<u16>),
}

/// The pace of a service's checks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct CheckPace {
    /// The seconds between two TCP or UDP checks, from 1 to [`MAX_CHECK_INTERVAL`].
    pub interval: u16,
    /// The checks that must succeed in a row before a dead backend is alive.
    pub rise: u8,
    /// The checks that must fail in a row before a backend is dead.
    pub fall: u8,
}

impl Default for CheckPace {
    fn default() -> CheckPace {
        CheckPace { interval: 1, rise: 2, fall: 3 }
    }
}

/// The longest interval of checks, in seconds.
pub const MAX_CHECK_INTERVAL: u16 = 3600;

/// The treatment of the flows of a backend that is dead or was removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnDead {
    /// Established TCP connections stay with a dead backend, because it may only fail its checks;
    /// all other flows move, and so do those of a backend that was removed.
    #[default]
    KeepConnections,
    /// The connections move to other backends, which reset connections that they do not know.
    Move,
    /// TCP connections are reset at their next packet; other flows move.
    Reset,
    /// They stay with a dead backend, in case it comes back.
    Keep,
}

/// The treatment of a new flow that no backend can take.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnEmpty {
    /// The packet is rejected: TCP with a reset, other protocols with an ICMP error.
    #[default]
    Reject,
    /// The packet goes to the middlebox.
    Pass,
}

/// The options of a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ServiceOptions {
    /// Whether only the MAC is rewritten: backends own the address, and answer clients directly.
    pub dsr: bool,
    /// Whether all flows from one client address go to the same backend, and for how many seconds after
    /// the last new one, up to [`MAX_TIMEOUT`].
    pub affinity: Option<u32>,
    /// The seed of consistent hashing.
    pub seed: u32,
    /// The check of the backends.
    pub check: Check,
    /// The treatment of the flows of a dead backend.
    pub on_dead: OnDead,
    /// The treatment of new flows without a backend.
    pub on_empty: OnEmpty,
    /// The pace of the checks.
    pub pace: CheckPace,
    /// The seconds without a packet after which a UDP flow expires, from 1 to [`MAX_TIMEOUT`]; `None`
    /// for 300 (RFC 4787, REQ-5).
    pub udp_timeout: Option<u32>,
    /// Whether a TCP segment of an unknown connection goes to the backend that consistent hashing gives
    /// it, because another host has served the connection before.
    pub takeover: bool,
}

/// The seconds of affinity if the command gives none.
pub const DEFAULT_AFFINITY: u32 = 300;
/// The longest timeout that a service may set, in seconds.
pub const MAX_TIMEOUT: u32 = 7200;
/// The longest time that a backend may be draining before its flows end, in seconds.
pub const MAX_DRAIN: u32 = 86_400;

/// The end of a drain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Drain {
    /// The flows of the backend last as long as they are used.
    Unlimited,
    /// The flows end after so many seconds, at most [`MAX_DRAIN`].
    For(u32),
}

/// A service as `R L` registers it. All addresses are of one family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceSpec {
    /// The method.
    pub method: Method,
    /// The backends: one, or for pools one or more, none of them twice.
    pub destinations: Vec<Destination>,
    /// The options.
    pub options: ServiceOptions,
}

/// A change of a pool's backends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BackendChange {
    /// `+`: add these backends, or change their MAC and weight.
    Add(Vec<Destination>),
    /// `-`: remove these backends.
    Remove(Vec<BackendName>),
    /// `= … drain`: these backends get no new flows, and lose those that they have at the end.
    Drain(Vec<BackendName>, Drain),
    /// `= … up`: these backends get new flows again.
    Up(Vec<BackendName>),
}

/// Parses an address with a port: `10.0.0.1:80` or `[2001:db8::1]:80`.
pub(crate) fn with_port(text: &str) -> Option<(IpAddr, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let port = decimal(port).filter(|port| *port != 0)?;
    let ip = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(host) => IpAddr::V6(host.parse::<Ipv6Addr>().ok()?),
        None => IpAddr::V4(host.parse().ok()?),
    };
    Some((ip, port))
}

impl FromStr for Frontend {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Frontend, ParseValueError> {
        if let Ok(ip) = text.parse() {
            return Ok(Frontend::of(ip));
        }
        let (address, protocol) = match text.split_once('/') {
            None => (text, None),
            Some((address, name)) if name.eq_ignore_ascii_case("tcp") => {
                (address, Some(Protocol::TCP))
            }
            Some((address, name)) if name.eq_ignore_ascii_case("udp") => {
                (address, Some(Protocol::UDP))
            }
            Some(_) => return Err(ParseValueError),
        };
        let (ip, port) = with_port(address).ok_or(ParseValueError)?;
        Ok(Frontend { ip, port: Some(port), protocol })
    }
}

impl FromStr for BackendName {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<BackendName, ParseValueError> {
        if let Ok(ip) = text.parse() {
            return Ok(BackendName { ip, port: None });
        }
        let (ip, port) = with_port(text).ok_or(ParseValueError)?;
        Ok(BackendName { ip, port: Some(port) })
    }
}

fn write_address(f: &mut fmt::Formatter<'_>, ip: IpAddr, port: Option<u16>) -> fmt::Result {
    match (ip, port) {
        (ip, None) => write!(f, "{ip}"),
        (IpAddr::V4(ip), Some(port)) => write!(f, "{ip}:{port}"),
        (IpAddr::V6(ip), Some(port)) => write!(f, "[{ip}]:{port}"),
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_address(f, self.ip, self.port)?;
        self.protocol.map_or(Ok(()), |protocol| write!(f, "/{protocol}"))
    }
}

impl fmt::Display for BackendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_address(f, self.ip, self.port)
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)?;
        self.mac.map_or(Ok(()), |mac| write!(f, "@{mac}"))?;
        if self.weight == 1 { Ok(()) } else { write!(f, "*{}", self.weight) }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Method::Static => f.write_str("0"),
            Method::Source(ip) => write!(f, "1 {ip}"),
            Method::RoundRobin => f.write_str("rr"),
            Method::Hash => f.write_str("hash"),
            Method::Least => f.write_str("least"),
        }
    }
}

/// Writes each option that is not the default, with a blank in front of it.
impl fmt::Display for ServiceOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.dsr {
            f.write_str(" dsr")?;
        }
        match self.affinity {
            None => {}
            Some(DEFAULT_AFFINITY) => f.write_str(" affinity")?,
            Some(seconds) => write!(f, " affinity={seconds}")?,
        }
        if self.seed != 0 {
            write!(f, " seed={}", self.seed)?;
        }
        match self.check {
            Check::Default => {}
            Check::None => f.write_str(" check=none")?,
            Check::Neighbour => f.write_str(" check=arp")?,
            Check::Tcp(None) => f.write_str(" check=tcp")?,
            Check::Tcp(Some(port)) => write!(f, " check=tcp:{port}")?,
            Check::Udp(None) => f.write_str(" check=udp")?,
            Check::Udp(Some(port)) => write!(f, " check=udp:{port}")?,
        }
        let (pace, usual) = (self.pace, CheckPace::default());
        if pace.interval != usual.interval {
            write!(f, " interval={}", pace.interval)?;
        }
        if pace.rise != usual.rise {
            write!(f, " rise={}", pace.rise)?;
        }
        if pace.fall != usual.fall {
            write!(f, " fall={}", pace.fall)?;
        }
        match self.on_dead {
            OnDead::KeepConnections => {}
            OnDead::Move => f.write_str(" on-dead=move")?,
            OnDead::Reset => f.write_str(" on-dead=reset")?,
            OnDead::Keep => f.write_str(" on-dead=keep")?,
        }
        match self.on_empty {
            OnEmpty::Reject => {}
            OnEmpty::Pass => f.write_str(" on-empty=pass")?,
        }
        if let Some(seconds) = self.udp_timeout {
            write!(f, " udp-timeout={seconds}")?;
        }
        if self.takeover { f.write_str(" takeover") } else { Ok(()) }
    }
}

impl fmt::Display for ServiceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.method.fmt(f)?;
        self.destinations.iter().try_for_each(|to| write!(f, " {to}"))?;
        self.options.fmt(f)
    }
}

impl fmt::Display for BackendChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = |sign: char, names: &[BackendName], state: &str| {
            write!(f, "{sign}")?;
            names.iter().try_for_each(|name| write!(f, " {name}"))?;
            f.write_str(state)
        };
        match self {
            BackendChange::Remove(names) => words('-', names, ""),
            BackendChange::Drain(names, Drain::Unlimited) => words('=', names, " drain"),
            BackendChange::Drain(names, Drain::For(seconds)) => {
                words('=', names, &format!(" drain={seconds}"))
            }
            BackendChange::Up(names) => words('=', names, " up"),
            BackendChange::Add(destinations) => {
                f.write_str("+")?;
                destinations.iter().try_for_each(|to| write!(f, " {to}"))
            }
        }
    }
}
