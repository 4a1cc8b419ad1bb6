//! Commands as types, and their canonical text.
//!
//! A [`Command`] is well formed, but the policy may still reject it.

use super::field::{Class, Field, FieldValue};
use super::service::{BackendChange, Destination, Frontend, ServiceSpec};
use super::value::{MacAddr, ParseValueError, decimal};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The number of a rule of a middlebox, from 1 to 65535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RuleNumber(u16);

impl RuleNumber {
    /// Returns the number, unless it is 0.
    pub fn new(number: u16) -> Option<RuleNumber> {
        (number != 0).then_some(RuleNumber(number))
    }

    /// Returns the number, from 1 to 65535.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for RuleNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The action for a packet that a rule matches, or that no rule matches.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Action {
    /// The packet passes.
    Allow,
    /// The packet is dropped.
    Deny,
}

/// The name of a rule: `+n` allows, `#n` denies. Rules are evaluated in the order of their names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RuleId {
    /// The action of the rule.
    pub action: Action,
    /// The number among the rules with the same action.
    pub number: RuleNumber,
}

impl RuleId {
    /// The rule of a command that names none, `#1`.
    pub const FIRST: RuleId = RuleId { action: Action::Deny, number: RuleNumber(1) };

    /// Returns the rule with this action and number, unless the number is 0.
    pub fn new(action: Action, number: u16) -> Option<RuleId> {
        RuleNumber::new(number).map(|number| RuleId { action, number })
    }
}

/// Parses `#7` or `+7`.
impl FromStr for RuleId {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, ParseValueError> {
        let (action, digits) = match (text.strip_prefix('#'), text.strip_prefix('+')) {
            (Some(digits), _) => (Action::Deny, digits),
            (_, Some(digits)) => (Action::Allow, digits),
            _ => return Err(ParseValueError),
        };
        RuleId::new(action, decimal(digits).ok_or(ParseValueError)?).ok_or(ParseValueError)
    }
}

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.action {
            Action::Allow => '+',
            Action::Deny => '#',
        };
        write!(f, "{sign}{}", self.number)
    }
}

/// A command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `R F {mac} {ip} [allow|deny]`: register a middlebox for firewall service, with no rules.
    RegisterFirewall {
        /// The middlebox.
        mac: MacAddr,
        /// The middlebox' address, the default of `d` under `I`.
        ip: IpAddr,
        /// The action for packets that no rule matches.
        default: Action,
    },
    /// `R L {mac} {ip}[:port[/tcp|udp]] {type} [{srcip}] {dst}… [options]`: register a
    /// load-balanced service.
    RegisterService {
        /// The middlebox.
        mac: MacAddr,
        /// The address, or the port of one, that clients use.
        frontend: Frontend,
        /// The method, the backends and the options.
        spec: ServiceSpec,
    },
    /// `B {mac} [{ip}[:port[/tcp|udp]]] …`: change the backends of a service.
    ChangeBackends {
        /// The middlebox.
        mac: MacAddr,
        /// The frontend of the service; `None` for the only one.
        frontend: Option<Frontend>,
        /// The change.
        change: BackendChange,
    },
    /// `A {mac} [#n|+n] {class} {value} [key value]…`: switch bits on and store values.
    Add {
        /// The middlebox.
        mac: MacAddr,
        /// The rule.
        rule: RuleId,
        /// The class, the bits and the values.
        update: FilterUpdate,
    },
    /// `D {mac} [#n|+n] {class} {value} [key]…`: keep only the bits of the value, and clear the
    /// keys named.
    Delete {
        /// The middlebox.
        mac: MacAddr,
        /// The rule.
        rule: RuleId,
        /// The class, the bits to keep and the keys to clear.
        removal: FilterRemoval,
    },
    /// `D {mac} #n|+n`: remove a rule.
    DeleteRule {
        /// The middlebox.
        mac: MacAddr,
        /// The rule.
        rule: RuleId,
    },
    /// `X {mac} [F|L|A]`: end the registration.
    Unregister {
        /// The middlebox.
        mac: MacAddr,
        /// The services that end.
        scope: UnregisterScope,
    },
    /// `Q [{mac}]`: show what is registered, with counters.
    Query {
        /// The middlebox; `None` for all that the channel may speak for.
        mac: Option<MacAddr>,
    },
}

/// The services of a middlebox that `X` ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnregisterScope {
    /// `F`: the firewall service.
    Firewall,
    /// `L`: all services.
    LoadBalancing,
    /// `L` and a frontend: that service.
    Service(Frontend),
    /// `A`, or nothing: all services.
    All,
}

/// The change of a rule by `A`: bits to switch on and values to store. A field without a value
/// keeps its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilterUpdate {
    /// The class.
    pub class: Class,
    /// The bits to switch on, at most [`Class::all`].
    pub bits: u8,
    /// The values of fields of the class, each at most once, in the order of the bits.
    pub values: Vec<FieldValue>,
}

/// The change of a rule by `D`: bits to keep and values to clear.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilterRemoval {
    /// The class.
    pub class: Class,
    /// The bits that stay on, at most [`Class::all`].
    pub keep: u8,
    /// The fields of the class whose values are removed, in the order of the bits.
    pub values: Vec<Field>,
}

impl Command {
    /// Returns the middlebox that the command is about; `Q` may be about all.
    pub fn mac(&self) -> Option<MacAddr> {
        match *self {
            Command::Query { mac } => mac,
            Command::RegisterFirewall { mac, .. }
            | Command::RegisterService { mac, .. }
            | Command::ChangeBackends { mac, .. }
            | Command::Add { mac, .. }
            | Command::Delete { mac, .. }
            | Command::DeleteRule { mac, .. }
            | Command::Unregister { mac, .. } => Some(mac),
        }
    }
}

impl Command {
    /// Returns the address that the command registers.
    pub fn registered_address(&self) -> Option<IpAddr> {
        match self {
            Command::RegisterFirewall { ip, .. } => Some(*ip),
            Command::RegisterService { frontend, .. } => Some(frontend.ip),
            _ => None,
        }
    }

    /// Returns the backends that the command adds, in its order.
    pub fn destinations(&self) -> &[Destination] {
        match self {
            Command::RegisterService { spec, .. } => &spec.destinations,
            Command::ChangeBackends { change: BackendChange::Add(destinations), .. } => {
                destinations
            }
            _ => &[],
        }
    }
}

/// Writes ` #n`, which is left out for rule #1.
struct Named(RuleId);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == RuleId::FIRST { Ok(()) } else { write!(f, " {}", self.0) }
    }
}

/// Writes the canonical text, which parses back to an equal command.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::RegisterFirewall { mac, ip, default: Action::Allow } => {
                write!(f, "R F {mac} {ip}")
            }
            Command::RegisterFirewall { mac, ip, default: Action::Deny } => {
                write!(f, "R F {mac} {ip} deny")
            }
            Command::RegisterService { mac, frontend, spec } => {
                write!(f, "R L {mac} {frontend} {spec}")
            }
            Command::ChangeBackends { mac, frontend: None, change } => {
                write!(f, "B {mac} {change}")
            }
            Command::ChangeBackends { mac, frontend: Some(frontend), change } => {
                write!(f, "B {mac} {frontend} {change}")
            }
            Command::Add { mac, rule, update } => write!(f, "A {mac}{} {update}", Named(*rule)),
            Command::Delete { mac, rule, removal } => {
                write!(f, "D {mac}{} {removal}", Named(*rule))
            }
            Command::DeleteRule { mac, rule } => write!(f, "D {mac} {rule}"),
            Command::Unregister { mac, scope } => write!(f, "X {mac} {scope}"),
            Command::Query { mac: None } => f.write_str("Q"),
            Command::Query { mac: Some(mac) } => write!(f, "Q {mac}"),
        }
    }
}

impl fmt::Display for UnregisterScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UnregisterScope::Firewall => f.write_str("F"),
            UnregisterScope::LoadBalancing => f.write_str("L"),
            UnregisterScope::Service(frontend) => write!(f, "L {frontend}"),
            UnregisterScope::All => f.write_str("A"),
        }
    }
}

impl fmt::Display for FilterUpdate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.class.letter(), self.bits)?;
        self.values.iter().try_for_each(|value| write!(f, " {value}"))
    }
}

impl fmt::Display for FilterRemoval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.class.letter(), self.keep)?;
        self.values.iter().try_for_each(|field| write!(f, " {}", field.letter()))
    }
}
