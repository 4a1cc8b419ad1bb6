//! The command language as types, and its canonical text.
//!
//! A value of [`Command`] is well formed, but may still be refused by the policy it is applied to.

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
    /// The rule of this number; there is no rule 0.
    pub fn new(number: u16) -> Option<RuleNumber> {
        (number != 0).then_some(RuleNumber(number))
    }

    /// The number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for RuleNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What happens to a packet that a rule matches, or that none does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Action {
    /// It goes on.
    Allow,
    /// It is dropped.
    Deny,
}

/// The name of a rule: `+n` allows, `#n` denies. In this order they are looked at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RuleId {
    /// What it does.
    pub action: Action,
    /// Its number among the rules that do the same.
    pub number: RuleNumber,
}

impl RuleId {
    /// The rule that a command without a number means, `#1`.
    pub const FIRST: RuleId = RuleId { action: Action::Deny, number: RuleNumber(1) };

    /// The rule of this name.
    pub fn new(action: Action, number: u16) -> Option<RuleId> {
        RuleNumber::new(number).map(|number| RuleId { action, number })
    }
}

/// Reads `#7` or `+7`.
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

/// What a command asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `R F {mac} {ip} [allow|deny]`: firewall service for a middlebox; its rules start empty.
    RegisterFirewall {
        /// The middlebox.
        mac: MacAddr,
        /// Its address, the default of `d` under `I`.
        ip: IpAddr,
        /// What happens to packets that no rule matches.
        default: Action,
    },
    /// `R L {mac} {ip}[:port[/tcp|udp]] {type} [{srcip}] {dst}… [options]`: load balancing of a middlebox' address.
    RegisterService {
        /// The middlebox.
        mac: MacAddr,
        /// What clients use.
        frontend: Frontend,
        /// Which traffic goes where.
        spec: ServiceSpec,
    },
    /// `B {mac} [{ip}[:port[/tcp|udp]]] …`: change the backends of a service.
    ChangeBackends {
        /// The middlebox.
        mac: MacAddr,
        /// The service; without one, the only one.
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
    /// `D {mac} [#n|+n] {class} {value} [key]…`: keep only the bits of the value and blank the keys named.
    Delete {
        /// The middlebox.
        mac: MacAddr,
        /// The rule.
        rule: RuleId,
        /// The class, the bits to keep and the keys to blank.
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
        /// Which services end.
        scope: UnregisterScope,
    },
    /// `Q [{mac}]`: what is registered, with counters.
    Query {
        /// The middlebox; without one, all that the channel may speak for.
        mac: Option<MacAddr>,
    },
}

/// The services of a middlebox that `X` ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnregisterScope {
    /// `F`.
    Firewall,
    /// `L`: all services.
    LoadBalancing,
    /// `L` and an address: that one.
    Service(Frontend),
    /// `A`, or nothing.
    All,
}

/// What `A` brings: bits to switch on and values to store. A field without a value keeps what it had.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilterUpdate {
    /// The class.
    pub class: Class,
    /// Bits to switch on, at most the class' [`Class::all`].
    pub bits: u8,
    /// Values of fields of the class, each at most once, in the order of the bits.
    pub values: Vec<FieldValue>,
}

/// What `D` takes away.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilterRemoval {
    /// The class.
    pub class: Class,
    /// Bits that stay on, at most the class' [`Class::all`].
    pub keep: u8,
    /// Fields of the class whose values are blanked, in the order of the bits.
    pub blank: Vec<Field>,
}

impl Command {
    /// The middlebox that the command speaks for; `Q` may speak for none.
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
    /// The backends that the command adds, in its order.
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

/// Writes ` #n`, which rule 1 does not need.
struct Named(RuleId);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == RuleId::FIRST { Ok(()) } else { write!(f, " {}", self.0) }
    }
}

/// The canonical text, which parses back to an equal command.
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
        self.blank.iter().try_for_each(|field| write!(f, " {}", field.letter()))
    }
}
