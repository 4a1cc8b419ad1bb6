//! Reads one line of the command language into a [`Command`], or says which token is wrong and what was expected.
//!
//! Nothing here panics on any input, and the work is bounded by [`MAX_COMMAND`].

mod balance;

use crate::command::{Action, Clear, Command, RuleId, Services, Set};
use crate::field::{Class, Field};
use crate::value::{MacAddr, decimal};
use std::fmt;
use std::net::IpAddr;

/// The longest command, in bytes: what fits in the mailbox between its two `@`.
pub const MAX_COMMAND: usize = 2046;

/// The code of a refusal, as replies carry it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorCode {
    /// The words do not make a command.
    Syntax,
    /// A word has the right place but a value that cannot be.
    Value,
    /// The MAC is not registered for what the command needs.
    UnknownMac,
    /// The backend is not one of the service.
    UnknownBackend,
    /// The channel may not speak for this MAC.
    Denied,
    /// A limit on registrations or rules is reached.
    Quota,
    /// This version cannot do it.
    Unsupported,
    /// The host failed; the command may be good.
    Internal,
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorCode::Syntax => "syntax",
            ErrorCode::Value => "value",
            ErrorCode::UnknownMac => "unknown-mac",
            ErrorCode::UnknownBackend => "unknown-backend",
            ErrorCode::Denied => "denied",
            ErrorCode::Quota => "quota",
            ErrorCode::Unsupported => "unsupported",
            ErrorCode::Internal => "internal",
        })
    }
}

/// Why a command is refused: the token, its place, and what was expected there.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}")]
pub struct CommandError {
    /// The class of the refusal.
    pub code: ErrorCode,
    /// Where the token begins, in bytes from 1.
    pub column: usize,
    /// What is wrong and what to write, with the token in it.
    pub message: String,
}

impl CommandError {
    /// A refusal of `word`; `expected` says what is wrong with it and what to write.
    fn new(code: ErrorCode, word: Word<'_>, expected: impl fmt::Display) -> CommandError {
        let message = match word.text {
            "" => format!("the command ends here: {expected}"),
            text => format!("'{}': {expected}", printable(text)),
        };
        CommandError { code, column: word.column, message }
    }

    /// A refusal of the word at `index` (0 is the command letter) of a command that parsed.
    pub fn at_word(line: &str, index: usize, code: ErrorCode, expected: impl fmt::Display) -> CommandError {
        CommandError::new(code, Words::new(line).nth(index).unwrap_or(Word::end(line)), expected)
    }

    /// The reply that a channel sends: `ERR {code} column {n}: {message}`.
    pub fn reply(&self) -> String {
        format!("ERR {} column {}: {}", self.code, self.column, self.message)
    }
}

/// The token as a person can read it: no control characters, at most 48 characters.
fn printable(text: &str) -> String {
    let mut out: String = text.chars().take(48).flat_map(char::escape_default).collect();
    if text.chars().nth(48).is_some() {
        out.push('…');
    }
    out
}

/// The commands of a file with their line numbers from 1, without blank lines and comments (a `#` that does not
/// begin a rule number, and what follows it).
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

/// A token and where it begins.
#[derive(Clone, Copy)]
struct Word<'a> {
    text: &'a str,
    column: usize,
}

impl<'a> Word<'a> {
    /// Stands for the missing token behind the last one.
    fn end(line: &str) -> Word<'a> {
        Word { text: "", column: line.trim_end().len() + 1 }
    }
}

/// The tokens of a line, one after the other.
#[derive(Clone)]
struct Words<'a> {
    line: &'a str,
    at: usize,
}

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Words<'a> {
        Words { line, at: 0 }
    }

    fn peek(&self) -> Option<Word<'a>> {
        self.clone().next()
    }

    fn end(&self) -> Word<'a> {
        Word::end(self.line)
    }

    /// The next token through `read`; what is missing or not read is an error of `code`.
    fn expect<T>(
        &mut self,
        code: ErrorCode,
        expected: impl fmt::Display,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, CommandError> {
        let word = self.next();
        match word.and_then(|word| read(word.text)) {
            Some(value) => Ok(value),
            None => {
                let code = if word.is_none() { ErrorCode::Syntax } else { code };
                Err(CommandError::new(code, word.unwrap_or(self.end()), expected))
            }
        }
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = Word<'a>;

    fn next(&mut self) -> Option<Word<'a>> {
        let rest = self.line.get(self.at..)?.trim_ascii_start();
        let text = rest.split_ascii_whitespace().next()?;
        let start = self.line.len() - rest.len();
        self.at = start + text.len();
        Some(Word { text, column: start + 1 })
    }
}

const MAC: &str = "not a MAC address; write six hexadecimal bytes like 12:13:14:15:16:17";
const ADDRESS: &str = "not an IP address; write one like 10.129.126.15 or 2001:db8::1";
const CLASS: &str = "not a filter class; write I (IP fields), M (Ethernet fields), T (TCP ports), U (UDP ports), V (VLAN id), \
                     C (ICMP), N (ICMPv6), F (TCP flags) or P (length and fragments)";

impl Command {
    /// Reads one command. Letters may be in either case, tokens are separated by blanks.
    ///
    /// # Errors
    /// The first token that is wrong, with its column and what was expected there.
    pub fn parse(line: &str) -> Result<Command, CommandError> {
        if line.len() > MAX_COMMAND {
            let word = Word { text: line.get(..16).unwrap_or_default(), column: 1 };
            let expected = format!("{} bytes long; a command has at most {MAX_COMMAND}", line.len());
            return Err(CommandError::new(ErrorCode::Syntax, word, expected));
        }
        let mut words = Words::new(line);
        let commands = "write R (register), A (add filters), D (delete filters), B (change backends), X (end registration) or Q (query)";
        let verb = words.next().ok_or_else(|| {
            CommandError::new(ErrorCode::Syntax, Word::end(line), format!("empty; {commands}"))
        })?;
        let command = match verb.text.to_ascii_uppercase().as_str() {
            "R" => register(&mut words)?,
            "A" => add(&mut words)?,
            "D" => delete(&mut words)?,
            "X" => unregister(&mut words)?,
            "Q" => Command::Query { mac: words.peek().map(|_| mac(&mut words)).transpose()? },
            "B" => {
                let mac = mac(&mut words)?;
                balance::edit(&mut words, mac)?
            }
            _ => {
                let expected = format!("not a command; {commands}");
                return Err(CommandError::new(ErrorCode::Syntax, verb, expected));
            }
        };
        match words.next() {
            None => Ok(command),
            Some(extra) => {
                let expected = "unexpected; the command was complete before it";
                Err(CommandError::new(ErrorCode::Syntax, extra, expected))
            }
        }
    }
}

fn mac(words: &mut Words<'_>) -> Result<MacAddr, CommandError> {
    words.expect(ErrorCode::Value, MAC, |text| text.parse().ok())
}

fn address(words: &mut Words<'_>) -> Result<IpAddr, CommandError> {
    words.expect(ErrorCode::Value, ADDRESS, |text| text.parse().ok())
}

/// `F {mac} {ip} [allow|deny]` or `L {mac} …`.
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
        let expected = "names no station: a middlebox has a unicast MAC address";
        return Err(CommandError::new(ErrorCode::Value, word, expected));
    }
    if !firewall {
        return balance::register(words, mac);
    }
    let ip = unicast(words)?;
    let default = match words.peek() {
        None => Action::Allow,
        Some(_) => {
            let expected =
                "not what happens to packets that no rule matches; write allow or deny, or nothing";
            words.expect(ErrorCode::Syntax, expected, |text| match text.to_ascii_lowercase().as_str() {
                "allow" => Some(Action::Allow),
                "deny" => Some(Action::Deny),
                _ => None,
            })?
        }
    };
    Ok(Command::RegisterFirewall { mac, ip, default })
}

/// An address that one host can have.
fn unicast(words: &mut Words<'_>) -> Result<IpAddr, CommandError> {
    let word = words.peek().unwrap_or(words.end());
    let ip = address(words)?;
    check_unicast(word, ip).map(|()| ip)
}

fn check_unicast(word: Word<'_>, ip: IpAddr) -> Result<(), CommandError> {
    let broadcast = ip == IpAddr::from([255, 255, 255, 255]);
    // An IPv4 address in IPv6's clothes is on no wire.
    let mapped = matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || broadcast || mapped {
        let expected = "not an address that one host on the bridge can have; write its unicast address";
        return Err(CommandError::new(ErrorCode::Value, word, expected));
    }
    Ok(())
}

/// An address of the family of `ip`.
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
    let expected = format!("not of the family of the registered address {ip}; write an {family} address");
    Err(CommandError::new(ErrorCode::Value, word, expected))
}

/// `{mac} [#n|+n]`, the beginning of `A` and `D`.
fn mac_and_rule(words: &mut Words<'_>) -> Result<(MacAddr, Option<RuleId>), CommandError> {
    let mac = mac(words)?;
    if !words.peek().is_some_and(|word| word.text.starts_with(['#', '+'])) {
        return Ok((mac, None));
    }
    let expected = "not a rule; write #1 to #65535 for one that denies, +1 to +65535 for one that allows";
    let rule = words.expect(ErrorCode::Value, expected, |text| text.parse().ok())?;
    Ok((mac, Some(rule)))
}

/// `{class} {value}`.
fn class_and_bits(words: &mut Words<'_>) -> Result<(Class, u8), CommandError> {
    let class = words.expect(ErrorCode::Syntax, CLASS, |text| {
        let letter = only_char(text)?.to_ascii_uppercase();
        Class::ALL.into_iter().find(|class| class.letter() == letter)
    })?;
    let all = class.all();
    let expected = format!("not a bit value of this class; write a number from 0 to {all}");
    let bits = words.expect(ErrorCode::Value, expected, |text| decimal(text).filter(|&bits| bits <= all))?;
    Ok((class, bits))
}

fn only_char(text: &str) -> Option<char> {
    let mut chars = text.chars();
    chars.next().filter(|_| chars.next().is_none())
}

/// The field of the class whose key a token is.
fn key(class: Class, text: &str) -> Option<Field> {
    let letter = only_char(text)?.to_ascii_lowercase();
    class.fields().iter().copied().find(|field| field.letter() == letter)
}

/// The next key of the class; each may be named once.
fn next_key<'a>(
    words: &mut Words<'a>,
    class: Class,
    seen: &mut Vec<Field>,
) -> Result<Option<(Field, Word<'a>)>, CommandError> {
    let Some(word) = words.next() else { return Ok(None) };
    let Some(field) = key(class, word.text) else {
        let keys: Vec<String> = class.fields().iter().map(|field| field.letter().to_string()).collect();
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
        // What the registration has a value for may stand alone: another key, or the end, follows.
        let alone = words.peek().is_none_or(|word| key(class, word.text).is_some());
        values.push(match field.default_value().filter(|_| alone) {
            Some(value) => value,
            None => words.expect(ErrorCode::Value, field.expected(), |text| field.read(text))?,
        });
    }
    values.sort();
    Ok(Command::Add { mac, rule: rule.unwrap_or(RuleId::FIRST), set: Set { class, bits, values } })
}

fn delete(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let (mac, rule) = mac_and_rule(words)?;
    if let (Some(rule), None) = (rule, words.peek()) {
        return Ok(Command::DeleteRule { mac, rule });
    }
    let (class, keep) = class_and_bits(words)?;
    let mut blank = Vec::new();
    // A blanked key whose bit stays on would leave a bit on without a value.
    while let Some((field, word)) = next_key(words, class, &mut blank)? {
        let bit = field.bit();
        if keep & bit != 0 && !field.has_default() {
            let expected = format!(
                "blanked while its bit {bit} stays on in {keep}; leave the key out, or {bit} out of the value"
            );
            return Err(CommandError::new(ErrorCode::Value, word, expected));
        }
    }
    blank.sort();
    Ok(Command::Delete { mac, rule: rule.unwrap_or(RuleId::FIRST), clear: Clear { class, keep, blank } })
}

fn unregister(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let mac = mac(words)?;
    let services = match words.peek() {
        None => Services::All,
        Some(_) => {
            let expected = "not a service; write F (firewall), L (load balancing) or A (both)";
            words.expect(ErrorCode::Syntax, expected, |text| match text {
                "F" | "f" => Some(Services::Firewall),
                "L" | "l" => Some(Services::Balance),
                "A" | "a" => Some(Services::All),
                _ => None,
            })?
        }
    };
    let services = match services {
        Services::Balance if words.peek().is_some() => Services::One(balance::vip(words)?),
        services => services,
    };
    Ok(Command::Unregister { mac, services })
}
