//! The command language as types, and its canonical text.
//!
//! A value of [`Command`] is well formed, but may still be refused by the policy it is applied to.

use crate::value::{AddressRange, EtherType, MacAddr, MacMask, NumberRange, Protocol};
use std::fmt;
use std::net::IpAddr;

/// The number of a deny rule of a middlebox, from 1 to 65535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RuleNumber(u16);

impl RuleNumber {
    /// The rule that a command without a number means.
    pub const FIRST: RuleNumber = RuleNumber(1);

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

/// What a command asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `R F {mac} {ip}`: firewall service for a middlebox; its rules start empty.
    RegisterFirewall {
        /// The middlebox.
        mac: MacAddr,
        /// Its address, the default of `d` under `I`.
        ip: IpAddr,
    },
    /// `R L {mac} {ip} {type} [{srcip}] {dst}`: load balancing of a middlebox' address.
    RegisterBalance {
        /// The middlebox.
        mac: MacAddr,
        /// The address that clients use.
        ip: IpAddr,
        /// Which traffic goes where.
        balance: Balance,
    },
    /// `A {mac} [#n] {class} {value} [key value]…`: switch bits on and store values.
    Add {
        /// The middlebox.
        mac: MacAddr,
        /// The rule.
        rule: RuleNumber,
        /// The class, the bits and the values.
        set: Set,
    },
    /// `D {mac} [#n] {class} {value} [key]…`: keep only the bits of the value and blank the keys named.
    Delete {
        /// The middlebox.
        mac: MacAddr,
        /// The rule.
        rule: RuleNumber,
        /// The class, the bits to keep and the keys to blank.
        clear: Clear,
    },
    /// `D {mac} #n`: remove a rule.
    DeleteRule {
        /// The middlebox.
        mac: MacAddr,
        /// The rule.
        rule: RuleNumber,
    },
    /// `X {mac} [F|L|A]`: end the registration.
    Unregister {
        /// The middlebox.
        mac: MacAddr,
        /// Which services end.
        services: Services,
    },
    /// `Q [{mac}]`: what is registered, with counters.
    Query {
        /// The middlebox; without one, all that the channel may speak for.
        mac: Option<MacAddr>,
    },
}

/// The balancing types that a registration can name. Source and destination have the family of the registered address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Balance {
    /// Type 0: all IP traffic to the middlebox goes to one destination.
    Static(Destination),
    /// Type 1: only what comes from this address does.
    Source(IpAddr, Destination),
}

impl Balance {
    /// Where the traffic goes.
    pub fn destination(&self) -> &Destination {
        match self {
            Balance::Static(to) | Balance::Source(_, to) => to,
        }
    }
}

/// A backend as a command names it: `ip[@mac]`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Destination {
    /// Its address.
    pub ip: IpAddr,
    /// Its MAC, when the command says it; the host finds it otherwise.
    pub mac: Option<MacAddr>,
}

/// The services of a middlebox that `X` ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Services {
    /// `F`.
    Firewall,
    /// `L`.
    Balance,
    /// `A`, or nothing.
    All,
}

/// A class of filter fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// `I`: bit 0 source IP, 1 destination IP, 2 TOS, 3 protocol.
    Inet,
    /// `M`: bit 0 source MAC, 1 destination MAC, 2 EtherType.
    Link,
    /// `T` and `U`: bit 0 source port, 1 destination port, of TCP or UDP.
    Ports(Transport),
    /// `V`: bit 0 VLAN id.
    Vlan,
}

/// The protocols whose ports have a class.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Transport {
    /// `T`.
    Tcp,
    /// `U`.
    Udp,
}

impl Transport {
    /// The letter of the class.
    pub fn letter(self) -> char {
        match self {
            Transport::Tcp => 'T',
            Transport::Udp => 'U',
        }
    }

    /// The protocol.
    pub fn protocol(self) -> Protocol {
        match self {
            Transport::Tcp => Protocol::TCP,
            Transport::Udp => Protocol::UDP,
        }
    }
}

impl Class {
    /// The largest bit value: every field of the class on.
    pub fn all(self) -> u8 {
        match self {
            Class::Inet => 15,
            Class::Link => 7,
            Class::Ports(_) => 3,
            Class::Vlan => 1,
        }
    }

    /// The letters of the keys, in the order of the bits.
    pub fn keys(self) -> &'static str {
        match self {
            Class::Inet => "sdtp",
            Class::Link => "sdp",
            Class::Ports(_) => "sd",
            Class::Vlan => "s",
        }
    }
}

/// What `A` brings: bits to switch on and values to store. A field without a value keeps what it had.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Set {
    /// Class `I`.
    Inet(InetSet),
    /// Class `M`.
    Link(LinkSet),
    /// Class `T` or `U`.
    Ports(Transport, PortSet),
    /// Class `V`.
    Vlan(VlanSet),
}

/// Values for class `I`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct InetSet {
    /// Bits to switch on, 0 to 15.
    pub bits: u8,
    /// `s`: the source addresses.
    pub source: Option<AddressRange>,
    /// `d`: the destination addresses; `Some(None)` is `d` without a value, the registered address.
    pub destination: Option<Option<AddressRange>>,
    /// `t`: the whole TOS or traffic-class byte.
    pub tos: Option<u8>,
    /// `p`: the protocol behind any IPv6 extension headers.
    pub protocol: Option<Protocol>,
}

/// Values for class `M`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkSet {
    /// Bits to switch on, 0 to 7.
    pub bits: u8,
    /// `s`: the source MAC, or the bits of it that matter.
    pub source: Option<MacMask>,
    /// `d`: the destination MAC; `Some(None)` is `d` without a value, the registered MAC.
    pub destination: Option<Option<MacAddr>>,
    /// `p`: the EtherType, behind one VLAN tag.
    pub ether_type: Option<EtherType>,
}

/// Values for class `T` or `U`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortSet {
    /// Bits to switch on, 0 to 3.
    pub bits: u8,
    /// `s`: the source ports.
    pub source: Option<NumberRange>,
    /// `d`: the destination ports.
    pub destination: Option<NumberRange>,
}

/// Values for class `V`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VlanSet {
    /// Bits to switch on, 0 or 1.
    pub bits: u8,
    /// `s`: the ids of the outer VLAN tag.
    pub id: Option<NumberRange>,
}

/// What `D` takes away: the bits to keep, and the keys whose values are blanked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Clear {
    /// Class `I`.
    Inet(InetClear),
    /// Class `M`.
    Link(LinkClear),
    /// Class `T` or `U`.
    Ports(Transport, PortClear),
    /// Class `V`.
    Vlan(VlanClear),
}

/// Bits to keep and keys to blank in class `I`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct InetClear {
    /// Bits to keep, 0 to 15.
    pub keep: u8,
    /// `s` is blanked.
    pub source: bool,
    /// `d` is blanked, back to the registered address.
    pub destination: bool,
    /// `t` is blanked.
    pub tos: bool,
    /// `p` is blanked.
    pub protocol: bool,
}

/// Bits to keep and keys to blank in class `M`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkClear {
    /// Bits to keep, 0 to 7.
    pub keep: u8,
    /// `s` is blanked.
    pub source: bool,
    /// `d` is blanked, back to the registered MAC.
    pub destination: bool,
    /// `p` is blanked.
    pub ether_type: bool,
}

/// Bits to keep and keys to blank in class `T` or `U`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortClear {
    /// Bits to keep, 0 to 3.
    pub keep: u8,
    /// `s` is blanked.
    pub source: bool,
    /// `d` is blanked.
    pub destination: bool,
}

/// Bits to keep and keys to blank in class `V`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VlanClear {
    /// Bits to keep, 0 or 1.
    pub keep: u8,
    /// `s` is blanked.
    pub id: bool,
}

impl Command {
    /// The middlebox that the command speaks for; `Q` may speak for none.
    pub fn mac(&self) -> Option<MacAddr> {
        match *self {
            Command::Query { mac } => mac,
            Command::RegisterFirewall { mac, .. }
            | Command::RegisterBalance { mac, .. }
            | Command::Add { mac, .. }
            | Command::Delete { mac, .. }
            | Command::DeleteRule { mac, .. }
            | Command::Unregister { mac, .. } => Some(mac),
        }
    }
}

/// Writes ` #n`, which rule 1 does not need.
struct Number(RuleNumber);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == RuleNumber::FIRST { Ok(()) } else { write!(f, " #{}", self.0) }
    }
}

/// Writes ` k v` where there is a value.
fn key(f: &mut fmt::Formatter<'_>, letter: char, value: Option<impl fmt::Display>) -> fmt::Result {
    value.map_or(Ok(()), |value| write!(f, " {letter} {value}"))
}

/// Writes ` d` or ` d v`.
fn own_key(f: &mut fmt::Formatter<'_>, value: Option<Option<impl fmt::Display>>) -> fmt::Result {
    match value {
        None => Ok(()),
        Some(None) => f.write_str(" d"),
        Some(value) => key(f, 'd', value),
    }
}

/// The canonical text, which parses back to an equal command.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::RegisterFirewall { mac, ip } => write!(f, "R F {mac} {ip}"),
            Command::RegisterBalance { mac, ip, balance } => write!(f, "R L {mac} {ip} {balance}"),
            Command::Add { mac, rule, set } => write!(f, "A {mac}{} {set}", Number(*rule)),
            Command::Delete { mac, rule, clear } => write!(f, "D {mac}{} {clear}", Number(*rule)),
            Command::DeleteRule { mac, rule } => write!(f, "D {mac} #{rule}"),
            Command::Unregister { mac, services } => write!(f, "X {mac} {services}"),
            Command::Query { mac: None } => f.write_str("Q"),
            Command::Query { mac: Some(mac) } => write!(f, "Q {mac}"),
        }
    }
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Balance::Static(to) => write!(f, "0 {to}"),
            Balance::Source(from, to) => write!(f, "1 {from} {to}"),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip.fmt(f)?;
        self.mac.map_or(Ok(()), |mac| write!(f, "@{mac}"))
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Services::Firewall => "F",
            Services::Balance => "L",
            Services::All => "A",
        })
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Set::Inet(set) => {
                write!(f, "I {}", set.bits)?;
                key(f, 's', set.source)?;
                own_key(f, set.destination)?;
                key(f, 't', set.tos)?;
                key(f, 'p', set.protocol)
            }
            Set::Link(set) => {
                write!(f, "M {}", set.bits)?;
                key(f, 's', set.source)?;
                own_key(f, set.destination)?;
                key(f, 'p', set.ether_type)
            }
            Set::Vlan(set) => {
                write!(f, "V {}", set.bits)?;
                key(f, 's', set.id)
            }
            Set::Ports(transport, set) => {
                write!(f, "{} {}", transport.letter(), set.bits)?;
                key(f, 's', set.source)?;
                key(f, 'd', set.destination)
            }
        }
    }
}

impl fmt::Display for Clear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (class, keep, keys): (_, _, &[(bool, &str)]) = match self {
            Clear::Inet(c) => {
                ('I', c.keep, &[(c.source, "s"), (c.destination, "d"), (c.tos, "t"), (c.protocol, "p")])
            }
            Clear::Link(c) => ('M', c.keep, &[(c.source, "s"), (c.destination, "d"), (c.ether_type, "p")]),
            Clear::Vlan(c) => ('V', c.keep, &[(c.id, "s")]),
            Clear::Ports(transport, c) => {
                (transport.letter(), c.keep, &[(c.source, "s"), (c.destination, "d")])
            }
        };
        write!(f, "{class} {keep}")?;
        keys.iter().filter(|(named, _)| *named).try_for_each(|(_, key)| write!(f, " {key}"))
    }
}
