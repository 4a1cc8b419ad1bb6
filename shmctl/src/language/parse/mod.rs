//! The parser: one line becomes a [`Command`], or an error that names the wrong word and what was
//! expected.
//!
//! The parser does not panic on any input, and its work is bounded by [`MAX_COMMAND`].

pub mod error;
mod service;
mod words;

use super::command::{Action, Command, FilterRemoval, FilterUpdate, RuleId, UnregisterScope};
use super::field::{Class, Field};
use super::value::{MacAddr, decimal};
use error::{CommandError, ErrorCode};
use std::net::IpAddr;
pub use words::Place;
use words::{Spans, Words};

/// A word of a line.
#[derive(Clone, Copy)]
struct Word<'a> {
    pub text: &'a str,
    /// Bytes before it in the line.
    pub start: usize,
}

/// The longest command, in bytes: what fits in the mailbox between its two `@`.
pub const MAX_COMMAND: usize = 2046;

/// Whether a byte may be in a command: printable ASCII, or a tab.
pub(crate) fn is_command_text(byte: u8) -> bool {
    byte == b'\t' || (b' '..=b'~').contains(&byte)
}

/// A command, and where its words are in the line that it was read from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParsedCommand<'a> {
    /// The command.
    pub command: Command,
    line: &'a str,
    spans: Spans,
}

impl<'a> ParsedCommand<'a> {
    /// Parses one line. Letters may be in either case, words are separated by blanks.
    ///
    /// # Errors
    /// The first word that is wrong, with its column and what was expected there.
    pub fn parse(line: &'a str) -> Result<ParsedCommand<'a>, CommandError> {
        let mut words = Words::new(line);
        let command = command(&mut words)?;
        Ok(ParsedCommand { command, line, spans: words.into_spans() })
    }

    /// Returns an error about the word at `place`; `expected` says what is wrong and what to write.
    pub fn error(&self, place: Place, code: ErrorCode, expected: &str) -> CommandError {
        CommandError::new(code, self.spans.word(self.line, place), expected)
    }
}

/// Returns the commands of a file with their line numbers from 1, without blank lines and comments
/// (a `#` that does not begin a rule, and what follows it).
pub fn split_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let without_comment = |line: &str| {
        let digit_follows = |at: usize| line.as_bytes().get(at + 1).is_some_and(u8::is_ascii_digit);
        let blank_before =
            |at: usize| at == 0 || line.as_bytes().get(at - 1).is_some_and(u8::is_ascii_whitespace);
        let first_word = |at: usize| line.get(..at).is_some_and(|before| before.trim().is_empty());
        line.match_indices('#')
            .map(|(at, _)| at)
            .find(|&at| first_word(at) || (blank_before(at) && !digit_follows(at)))
            .unwrap_or(line.len())
    };
    text.lines()
        .enumerate()
        .map(move |(index, line)| (index + 1, line.get(..without_comment(line)).unwrap_or(line)))
        .filter(|(_, line)| !line.trim().is_empty())
}

const COMMANDS: &str = "write R (register), A (add filters), D (delete filters), B (change backends), \
                        X (end registration) or Q (query)";
const MAC: &str = "not a MAC address; write six hexadecimal bytes like 12:13:14:15:16:17";
const ADDRESS: &str = "not an IP address; write one like 10.129.126.15 or 2001:db8::1";
const CLASS: &str = "not a filter class; write I (IP fields), M (Ethernet fields), T (TCP ports), U (UDP ports), V (VLAN id), \
                     C (ICMP), N (ICMPv6), F (TCP flags) or P (length and fragments)";

impl Command {
    /// Parses one command, see [`ParsedCommand::parse`].
    ///
    /// # Errors
    /// The first word that is wrong, with its column and what was expected there.
    pub fn parse(line: &str) -> Result<Command, CommandError> {
        ParsedCommand::parse(line).map(|parsed| parsed.command)
    }
}

fn command(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let line = words.line();
    if line.len() > MAX_COMMAND {
        let word = Word { text: line.get(..16).unwrap_or_default(), start: 0 };
        let expected = format!("{} bytes long; a command has at most {MAX_COMMAND}", line.len());
        return Err(CommandError::new(ErrorCode::Syntax, word, expected));
    }
    let verb = words.next().ok_or_else(|| {
        CommandError::new(ErrorCode::Syntax, words.end(), format!("empty; {COMMANDS}"))
    })?;
    let command = match verb.text.to_ascii_uppercase().as_str() {
        "R" => register(words)?,
        "A" => add(words)?,
        "D" => delete(words)?,
        "X" => unregister(words)?,
        "Q" => Command::Query { mac: words.peek().map(|_| mac(words)).transpose()? },
        "B" => {
            let mac = mac(words)?;
            service::change(words, mac)?
        }
        _ => {
            let expected = format!("not a command; {COMMANDS}");
            return Err(CommandError::new(ErrorCode::Syntax, verb, expected));
        }
    };
    match words.next() {
        None => Ok(command),
        Some(extra) => {
            let expected = "unexpected; the command is complete without it, remove it";
            Err(CommandError::new(ErrorCode::Syntax, extra, expected))
        }
    }
}

fn mac(words: &mut Words<'_>) -> Result<MacAddr, CommandError> {
    words.mark(Place::Mac);
    words.expect(ErrorCode::Value, MAC, |text| text.parse().ok())
}

fn address(words: &mut Words<'_>) -> Result<IpAddr, CommandError> {
    words.expect(ErrorCode::Value, ADDRESS, |text| text.parse().ok())
}

/// Parses `F {mac} {ip} [allow|deny]` or `L {mac} …`.
fn register(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let expected = "not a service; write F (firewall) or L (load balancing)";
    let firewall = words.expect(ErrorCode::Syntax, expected, |text| match text {
        "F" | "f" => Some(true),
        "L" | "l" => Some(false),
        _ => None,
    })?;
    let mac_word = words.peek();
    let mac = mac(words)?;
    if let Some(word) = mac_word.filter(|_| !mac.is_station()) {
        let expected =
            "not a unicast MAC address; write that of the middlebox, like 12:13:14:15:16:17";
        return Err(CommandError::new(ErrorCode::Value, word, expected));
    }
    if !firewall {
        return service::register(words, mac);
    }
    words.mark(Place::Frontend);
    let ip = unicast(words)?;
    let default = match words.peek() {
        None => Action::Allow,
        Some(_) => {
            let expected = "not a default; write allow or deny, or nothing";
            words.expect(ErrorCode::Syntax, expected, |text| {
                match text.to_ascii_lowercase().as_str() {
                    "allow" => Some(Action::Allow),
                    "deny" => Some(Action::Deny),
                    _ => None,
                }
            })?
        }
    };
    Ok(Command::RegisterFirewall { mac, ip, default })
}

/// Parses an address that one host can have.
fn unicast(words: &mut Words<'_>) -> Result<IpAddr, CommandError> {
    let word = words.peek().unwrap_or(words.end());
    let ip = address(words)?;
    check_unicast(word, ip).map(|()| ip)
}

fn check_unicast(word: Word<'_>, ip: IpAddr) -> Result<(), CommandError> {
    let broadcast = ip == IpAddr::from([255, 255, 255, 255]);
    // An IPv4-mapped address is on no wire.
    let mapped = matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || broadcast || mapped {
        let expected =
            "not an address that one host on the bridge can have; write its unicast address";
        return Err(CommandError::new(ErrorCode::Value, word, expected));
    }
    Ok(())
}

/// Parses an address of the family of `ip`.
fn same_family(words: &mut Words<'_>, ip: IpAddr) -> Result<IpAddr, CommandError> {
    let word = words.peek().unwrap_or(words.end());
    let other = unicast(words)?;
    check_family(word, other, ip).map(|()| other)
}

fn check_family(word: Word<'_>, other: IpAddr, ip: IpAddr) -> Result<(), CommandError> {
    if other.is_ipv4() == ip.is_ipv4() {
        return Ok(());
    }
    let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
    let expected =
        format!("not of the family of the registered address {ip}; write an {family} address");
    Err(CommandError::new(ErrorCode::Value, word, expected))
}

/// Parses `{mac} [#n|+n]`, the beginning of `A` and `D`.
fn mac_and_rule(words: &mut Words<'_>) -> Result<(MacAddr, Option<RuleId>), CommandError> {
    let mac = mac(words)?;
    words.mark(Place::Rule);
    if !words.peek().is_some_and(|word| word.text.starts_with(['#', '+'])) {
        return Ok((mac, None));
    }
    let expected =
        "not a rule; write #1 to #65535 for one that denies, +1 to +65535 for one that allows";
    let rule = words.expect(ErrorCode::Value, expected, |text| text.parse().ok())?;
    Ok((mac, Some(rule)))
}

/// Parses `{class} {value}`.
fn class_and_bits(words: &mut Words<'_>) -> Result<(Class, u8), CommandError> {
    let class = words.expect(ErrorCode::Syntax, CLASS, |text| {
        let letter = only_char(text)?.to_ascii_uppercase();
        Class::ALL.into_iter().find(|class| class.letter() == letter)
    })?;
    let all = class.all();
    let expected = format!("not a bit value of this class; write a number from 0 to {all}");
    words.mark(Place::Bits);
    let bits = words
        .expect(ErrorCode::Value, expected, |text| decimal(text).filter(|&bits| bits <= all))?;
    Ok((class, bits))
}

fn only_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// Returns the field of the class whose key a word is.
fn key(class: Class, text: &str) -> Option<Field> {
    let letter = only_char(text)?.to_ascii_lowercase();
    class.fields().iter().copied().find(|field| field.letter() == letter)
}

/// Parses the next key of the class; each may be named once.
fn next_key<'a>(
    words: &mut Words<'a>,
    class: Class,
    seen: &mut Vec<Field>,
) -> Result<Option<(Field, Word<'a>)>, CommandError> {
    let Some(word) = words.next() else { return Ok(None) };
    let Some(field) = key(class, word.text) else {
        let keys: Vec<String> =
            class.fields().iter().map(|field| field.letter().to_string()).collect();
        let expected = format!("not a key of this class; its keys are {}", keys.join(", "));
        return Err(CommandError::new(ErrorCode::Syntax, word, expected));
    };
    if seen.contains(&field) {
        let expected = "named twice; name each key once";
        return Err(CommandError::new(ErrorCode::Syntax, word, expected));
    }
    seen.push(field);
    Ok(Some((field, word)))
}

fn add(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let (mac, rule) = mac_and_rule(words)?;
    let (class, bits) = class_and_bits(words)?;
    let (mut seen, mut values) = (Vec::new(), Vec::new());
    while let Some((field, _)) = next_key(words, class, &mut seen)? {
        // A key whose value the registration provides may be alone: another key, or the end,
        // follows.
        let alone = words.peek().is_none_or(|word| key(class, word.text).is_some());
        values.push(match field.default_value().filter(|_| alone) {
            Some(value) => value,
            None => words.expect(ErrorCode::Value, field.expected(), |text| field.read(text))?,
        });
    }
    values.sort();
    Ok(Command::Add {
        mac,
        rule: rule.unwrap_or(RuleId::FIRST),
        update: FilterUpdate { class, bits, values },
    })
}

fn delete(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let (mac, rule) = mac_and_rule(words)?;
    if let (Some(rule), None) = (rule, words.peek()) {
        return Ok(Command::DeleteRule { mac, rule });
    }
    let (class, keep) = class_and_bits(words)?;
    let mut values = Vec::new();
    // Removing a key whose bit stays on would leave a bit on without a value.
    while let Some((field, word)) = next_key(words, class, &mut values)? {
        let bit = field.bit();
        if keep & bit != 0 && !field.has_default() {
            let expected = format!(
                "cannot be removed while its bit {bit} stays on in {keep}; omit the key, or clear {bit} in the value"
            );
            return Err(CommandError::new(ErrorCode::Value, word, expected));
        }
    }
    values.sort();
    Ok(Command::Delete {
        mac,
        rule: rule.unwrap_or(RuleId::FIRST),
        removal: FilterRemoval { class, keep, values },
    })
}

fn unregister(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let mac = mac(words)?;
    let scope = match words.peek() {
        None => UnregisterScope::All,
        Some(_) => {
            let expected = "not a service; write F (firewall), L (load balancing) or A (both)";
            words.expect(ErrorCode::Syntax, expected, |text| match text {
                "F" | "f" => Some(UnregisterScope::Firewall),
                "L" | "l" => Some(UnregisterScope::LoadBalancing),
                "A" | "a" => Some(UnregisterScope::All),
                _ => None,
            })?
        }
    };
    let scope = match scope {
        UnregisterScope::LoadBalancing if words.peek().is_some() => {
            UnregisterScope::Service(service::frontend(words)?)
        }
        scope => scope,
    };
    Ok(Command::Unregister { mac, scope })
}
