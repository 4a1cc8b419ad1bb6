//! The model of a ruleset: values that can be compared, and their text as nft writes it.

use super::field::{Field, Type, Value};
use crate::mark;
use std::collections::BTreeMap;
use std::fmt;

/// The families nfqd has tables in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Family {
    /// `bridge`.
    Bridge,
    /// `ip`: the path into the queue by br_netfilter, for IPv4.
    Ip,
    /// `ip6`: the path into the queue by br_netfilter, for IPv6.
    Ip6,
}

impl Family {
    /// Every family that nfqd has a table in.
    pub const ALL: [Family; 3] = [Family::Bridge, Family::Ip, Family::Ip6];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Bridge => "bridge",
            Family::Ip => "ip",
            Family::Ip6 => "ip6",
        })
    }
}

/// A table with its sets and chains.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// The family; the name is [`TABLE_NAME`].
    pub family: Family,
    /// Sets and maps by name.
    pub sets: BTreeMap<String, Set>,
    /// Chains by name.
    pub chains: BTreeMap<String, Chain>,
}

impl Table {
    /// Returns an empty table.
    pub fn new(family: Family) -> Table {
        Table { family, sets: BTreeMap::new(), chains: BTreeMap::new() }
    }
}

/// The name of every table of nfqd.
pub const TABLE_NAME: &str = "nfqd";

/// The layout of our tables: the names of their maps, and what the marks in those mean. A newer
/// layout is not touched.
pub const TABLE_LAYOUT: u32 = 4;

/// The comment that tells our tables from those of other programs, and their layouts apart. It
/// names the nfqd that made the table: one that takes a table over cannot change its comment.
pub const TABLE_COMMENT: &str = concat!(
    "made by nfqd ",
    env!("CARGO_PKG_VERSION"),
    " (layout 4), which repairs what others change"
);

/// Returns the layout that a table's comment names; `None` if another program made the table.
/// Comments of layout 1 name none.
pub fn layout_of_comment(comment: &str) -> Option<u32> {
    let rest = comment.strip_prefix("made by nfqd")?;
    if rest.starts_with(',') {
        return Some(1);
    }
    rest.split_once("(layout ")?.1.split_once(')')?.0.parse().ok()
}

/// A chain.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Chain {
    /// The hook, for base chains. They are made once and never deleted while nfqd works: deleting any
    /// base chain drops every packet that waits in a queue.
    pub base: Option<Base>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// The hook of a base chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Base {
    /// The hook.
    pub hook: Hook,
    /// The priority in it.
    pub priority: i32,
}

/// A hook, in the bridge family (linux/netfilter_bridge.h) or the ip families.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// Frames that come in.
    Prerouting,
    /// Frames to the host itself.
    Input,
    /// Frames that the host itself sends or routes.
    Output,
    /// Frames that leave by a port.
    Postrouting,
}

impl Hook {
    /// Returns the kernel's number.
    pub(super) fn number(self) -> u32 {
        match self {
            Hook::Prerouting => 0,
            Hook::Input => 1,
            Hook::Output => 3,
            Hook::Postrouting => 4,
        }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::Prerouting => "prerouting",
            Hook::Input => "input",
            Hook::Output => "output",
            Hook::Postrouting => "postrouting",
        })
    }
}

/// A rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rule {
    /// The statements in order.
    pub statements: Vec<Statement>,
    /// The comment, for the reader of `nft list ruleset`.
    pub comment: Option<String>,
}

/// A verdict.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Verdict {
    /// Lets the packet leave this hook.
    Accept,
    /// Drops the packet.
    Drop,
    /// Returns to the calling chain.
    Return,
    /// Calls a chain.
    Jump(String),
    /// Continues in a chain.
    Goto(String),
}

/// An address that a rule writes, from a map keyed by slot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Write {
    /// The field.
    pub field: Field,
    /// The map: mark bits of a slot to an address.
    pub map: String,
}

/// A statement of a rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Statement {
    /// Matches if the field has this value.
    Is(Field, Value),
    /// Matches if the field has another value.
    IsNot(Field, Value),
    /// Matches values from the first to the last.
    Between(Field, Value, Value),
    /// Matches if the field, masked with the first value, equals the second.
    Masked(Field, Value, Value),
    /// Matches if the field is present.
    Present(Field),
    /// Matches if the fields are an element of the set.
    In(Vec<Field>, String),
    /// Takes the verdict that the map has for the fields.
    Vmap(Vec<Field>, String),
    /// Sets the mark to `(mark & keep) | set`; the two do not overlap.
    SetMark {
        /// The bits that are kept.
        keep: u32,
        /// The bits that are set.
        set: u32,
    },
    /// Writes addresses of the slot that the packet's mark names. Nothing is written unless every
    /// map has the slot.
    Rewrite(Vec<Write>),
    /// Writes an address that a map has for a field.
    RewriteBy {
        /// The key.
        key: Field,
        /// The address to write, from a map keyed by `key`.
        write: Write,
    },
    /// Writes addresses of the slot that a map of flows has for the fields, and leaves the mark
    /// unchanged.
    RewriteFlow {
        /// The key of the flow.
        key: Vec<Field>,
        /// The map of flows: key to mark bits of a slot.
        flows: String,
        /// The addresses to write.
        writes: Vec<Write>,
    },
    /// Looks the fields up in a map of flows. If the slot that is found is in a map, the packet is
    /// marked with it and an operation. Bits of the mark that are not ours are lost.
    MarkFlow {
        /// The key of the flow.
        key: Vec<Field>,
        /// The map of flows: key to mark bits of a slot.
        flows: String,
        /// The map that must have the slot.
        slots: String,
        /// The bits of the operation.
        operation: u32,
    },
    /// Updates a map of flows: the slot of the packet's mark becomes the data of the fields.
    Learn {
        /// The key of the flow.
        key: Vec<Field>,
        /// The map.
        map: String,
        /// Lifetime in seconds; without it, the map's.
        timeout: Option<u32>,
    },
    /// Removes the fields from a map of flows, if they are there.
    ForgetFlow {
        /// The key of the flow.
        key: Vec<Field>,
        /// The map.
        map: String,
    },
    /// Updates a map: one field of the packet becomes the data of another.
    Note {
        /// The key.
        key: Field,
        /// The data.
        data: Field,
        /// The map.
        map: String,
    },
    /// Adds the fields to a set, or renews them.
    Remember {
        /// The key of the flow.
        key: Vec<Field>,
        /// The set.
        set: String,
        /// The lifetime in seconds; `None` stands for the set's.
        timeout: Option<u32>,
    },
    /// Removes the fields from a set, if they are there.
    Forget {
        /// The key of the flow.
        key: Vec<Field>,
        /// The set.
        set: String,
    },
    /// Queues the packet (the `queue` expression).
    Queue(Queues),
    /// Queues the packet (the xt target NFQUEUE), which nft cannot print.
    XtQueue(Queues),
    /// Counts packets and bytes.
    Counter,
    /// Ends the rule.
    Verdict(Verdict),
}

/// The queues of the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Queues {
    /// The first number.
    pub first: u16,
    /// The number of queues.
    pub count: u16,
    /// Whether packets pass without an engine, instead of being dropped.
    pub bypass: bool,
}

/// A set or a map.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Set {
    /// The types of the key's parts; nft of Debian 12 lists at most five rightly.
    pub key: Vec<Type>,
    /// The data of a map.
    pub data: Option<Data>,
    /// The lifetime and size of a cache that packets fill.
    pub dynamic: Option<Dynamic>,
    /// The largest number of elements, for a set that is looked up by every frame: the kernel has a
    /// faster kind for those whose size it knows.
    pub size: Option<u32>,
    /// Whether each element counts packets and bytes.
    pub counter: bool,
    /// Whether elements are ranges of keys, which must not overlap.
    pub interval: bool,
    /// The comment, for the reader of `nft list ruleset`.
    pub comment: Option<String>,
    /// The elements that the policy needs; those that packets add are not here.
    pub elements: BTreeMap<Vec<Value>, Element>,
}

/// The kind of data that a map has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Data {
    /// A verdict.
    Verdict,
    /// A value.
    Value(Type),
}

/// The bounds of a set that packets fill.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dynamic {
    /// Lifetime of an element in seconds.
    pub timeout: u32,
    /// The largest number of elements.
    pub size: u32,
}

/// An element of a set.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Element {
    /// The last key of a range; the element's own key is the first.
    pub last: Option<Vec<Value>>,
    /// The data of a map.
    pub data: Option<ElementData>,
    /// The comment, for the reader of `nft list ruleset`.
    pub comment: Option<String>,
}

/// The data of a map's element.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ElementData {
    /// A value.
    Value(Value),
    /// A verdict.
    Verdict(Verdict),
}

impl Set {
    /// Returns a set of the same kind without elements.
    pub fn empty(&self) -> Set {
        let Set { key, data, dynamic, size, counter, interval, comment, elements: _ } = self;
        Set {
            key: key.clone(),
            data: *data,
            dynamic: *dynamic,
            size: *size,
            counter: *counter,
            interval: *interval,
            comment: comment.clone(),
            elements: BTreeMap::new(),
        }
    }

    /// Whether both are of the same kind, whatever their elements.
    pub fn same_kind(&self, other: &Set) -> bool {
        self.key == other.key
            && self.data == other.data
            && self.dynamic == other.dynamic
            && self.size == other.size
            && self.counter == other.counter
            && self.interval == other.interval
    }
}

/// Writes a duration as nft shows it: `2h4m`.
fn duration_text(seconds: u32) -> String {
    let units = [(86_400, 'd'), (3600, 'h'), (60, 'm'), (1, 's')];
    let mut rest = seconds;
    let mut out = String::new();
    for (length, unit) in units {
        if rest >= length {
            out += &format!("{}{unit}", rest / length);
        }
        rest %= length;
    }
    if out.is_empty() { "0s".to_string() } else { out }
}

fn key_text(fields: &[Field]) -> String {
    fields.iter().map(Field::to_string).collect::<Vec<_>>().join(" . ")
}

/// Writes the table as `nft list` of Debian 12 shows it.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {TABLE_NAME} {{\n\tcomment \"{TABLE_COMMENT}\"", self.family)?;
        for (name, set) in &self.sets {
            writeln!(f, "\t{} {name} {{", if set.data.is_some() { "map" } else { "set" })?;
            set.fmt(f)?;
            writeln!(f, "\t}}\n")?;
        }
        for (name, chain) in &self.chains {
            writeln!(f, "\tchain {name} {{")?;
            if let Some(Base { hook, priority }) = chain.base {
                writeln!(f, "\t\ttype filter hook {hook} priority {priority}; policy accept;")?;
            }
            chain.rules.iter().try_for_each(|rule| writeln!(f, "\t\t{rule}"))?;
            writeln!(f, "\t}}\n")?;
        }
        writeln!(f, "}}")
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key: Vec<String> = self.key.iter().map(Type::to_string).collect();
        write!(f, "\t\ttype {}", key.join(" . "))?;
        match self.data {
            Some(Data::Verdict) => write!(f, " : verdict")?,
            Some(Data::Value(data)) => write!(f, " : {data}")?,
            None => {}
        }
        writeln!(f)?;
        if let Some(Dynamic { timeout, size }) = self.dynamic {
            writeln!(
                f,
                "\t\tsize {size}\n\t\tflags dynamic,timeout\n\t\ttimeout {}",
                duration_text(timeout)
            )?;
        }
        if let Some(size) = self.size {
            writeln!(f, "\t\tsize {size}")?;
        }
        if self.interval {
            writeln!(f, "\t\tflags interval")?;
        }
        if self.counter {
            writeln!(f, "\t\tcounter")?;
        }
        if let Some(comment) = &self.comment {
            writeln!(f, "\t\tcomment \"{comment}\"")?;
        }
        let mut before = "\t\telements = { ";
        for (key, element) in &self.elements {
            let last = element.last.as_ref().unwrap_or(key);
            let key: Vec<String> =
                key.iter().zip(last).map(|(first, last)| Value::range_text(first, last)).collect();
            write!(f, "{before}{}", key.join(" . "))?;
            if let Some(comment) = &element.comment {
                write!(f, " comment \"{comment}\"")?;
            }
            match &element.data {
                Some(ElementData::Value(value)) => write!(f, " : {value}")?,
                Some(ElementData::Verdict(verdict)) => write!(f, " : {verdict}")?,
                None => {}
            }
            before = ",\n\t\t\t     ";
        }
        if self.elements.is_empty() { Ok(()) } else { writeln!(f, " }}") }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Return => f.write_str("return"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let statements: Vec<String> = self.statements.iter().map(Statement::to_string).collect();
        f.write_str(&statements.join(" "))?;
        self.comment.as_ref().map_or(Ok(()), |comment| write!(f, " comment \"{comment}\""))
    }
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Statement::Is(field @ Field::Ip4Tos, Value::Tos(tos)) => {
                write!(f, "{field} {}", Value::tos_text(*tos, "ip"))
            }
            Statement::Is(field @ Field::Ip6TrafficClass, Value::Tos(tos)) => {
                write!(f, "{field} {}", Value::tos_text(*tos, "ip6"))
            }
            Statement::Is(Field::Mark(u32::MAX), value) => write!(f, "meta mark {value}"),
            // nft shows a mask that is a prefix as one.
            Statement::Is(Field::Mark(mask), value)
                if mask.leading_ones() + mask.trailing_zeros() == 32 =>
            {
                write!(f, "meta mark {value}/{}", mask.leading_ones())
            }
            Statement::Is(field @ (Field::Mark(_) | Field::Ip4FragmentOffset(_)), value) => {
                write!(f, "{field} == {value}")
            }
            // nft's own spellings for flags.
            Statement::Is(field @ Field::TcpFlags, Value::Flags(flags)) => {
                write!(f, "{field} == {flags:#x}")
            }
            Statement::Masked(field @ Field::TcpFlags, mask, Value::Flags(0)) => {
                write!(f, "{field} ! {mask}")
            }
            Statement::Masked(field @ Field::TcpFlags, mask @ Value::Flags(flags), bits)
                if mask != bits || flags.count_ones() > 1 =>
            {
                write!(f, "{field} {bits} / {mask}")
            }
            Statement::Is(field, value) => write!(f, "{field} {value}"),
            Statement::IsNot(field, value) => write!(f, "{field} != {value}"),
            Statement::Between(field, first, last) => {
                write!(f, "{field} {}-{}", first.bound_text(), last.bound_text())
            }
            Statement::Masked(field, mask, bits) => write!(f, "{field} & {mask} == {bits}"),
            Statement::Present(Field::L4Protocol) => f.write_str("meta l4proto >= ip"),
            Statement::Present(field) => write!(f, "{field} >= 0"),
            Statement::In(key, set) => write!(f, "{} @{set}", key_text(key)),
            Statement::Vmap(key, map) => write!(f, "{} vmap @{map}", key_text(key)),
            Statement::SetMark { keep, set: 0 } => {
                write!(f, "meta mark set meta mark & {keep:#010x}")
            }
            // nft shows the kernel's (mark & keep) ^ set in this form.
            Statement::SetMark { keep, set } => {
                write!(f, "meta mark set meta mark & {:#010x} | {set:#010x}", keep | set)
            }
            Statement::Rewrite(writes) => {
                let one = |w: &Write| {
                    format!("{} set meta mark & {:#010x} map @{}", w.field, mark::ID, w.map)
                };
                f.write_str(&writes.iter().map(one).collect::<Vec<_>>().join(" "))
            }
            Statement::RewriteBy { key, write } => {
                write!(f, "{} set {key} map @{}", write.field, write.map)
            }
            // The mark carries the slot within this rule only; the second statement restores it.
            Statement::RewriteFlow { key, flows, writes } => {
                write!(f, "meta mark set {} map @{flows} meta mark set meta mark", key_text(key))?;
                writes
                    .iter()
                    .try_for_each(|w| write!(f, " {} set meta mark map @{}", w.field, w.map))
            }
            // nft does not show the look-up whose result nothing uses.
            Statement::MarkFlow { key, flows, operation, .. } => write!(
                f,
                "meta mark set {} map @{flows} meta mark set meta mark | {operation:#010x}",
                key_text(key)
            ),
            Statement::Learn { key, map, timeout } => {
                let (key, slot) = (key_text(key), format!("meta mark & {:#010x}", mark::ID));
                let timeout = timeout
                    .map(|timeout| format!(" timeout {}", duration_text(timeout)))
                    .unwrap_or_default();
                write!(
                    f,
                    "delete @{map} {{ {key} : {slot} }} add @{map} {{ {key}{timeout} : {slot} }}"
                )
            }
            Statement::ForgetFlow { key, map } => {
                write!(f, "delete @{map} {{ {} : meta mark & {:#010x} }}", key_text(key), mark::ID)
            }
            Statement::Note { key, data, map } => {
                let element = format!("{{ {key} : {data} }}");
                write!(f, "delete @{map} {element} add @{map} {element}")
            }
            Statement::Remember { key, set, timeout } => {
                write!(f, "update @{set} {{ {}", key_text(key))?;
                if let Some(timeout) = timeout {
                    write!(f, " timeout {}", duration_text(*timeout))?;
                }
                f.write_str(" }")
            }
            Statement::Forget { key, set } => write!(f, "delete @{set} {{ {} }}", key_text(key)),
            Statement::Queue(queues) => {
                let bypass = if queues.bypass { " flags bypass" } else { "" };
                write!(f, "queue{bypass} to symhash mod {}", queues.count)?;
                if queues.first == 0 { Ok(()) } else { write!(f, " offset {}", queues.first) }
            }
            Statement::XtQueue(queues) => {
                let bypass = if queues.bypass { " --queue-bypass" } else { "" };
                let last = queues.first + (queues.count - 1);
                write!(f, "# xt target NFQUEUE --queue-balance {}:{last}{bypass}", queues.first)
            }
            Statement::Counter => f.write_str("counter"),
            Statement::Verdict(verdict) => verdict.fmt(f),
        }
    }
}
