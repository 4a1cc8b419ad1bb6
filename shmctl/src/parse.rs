//! Reads one line of the command language into a [`Command`], or says which token is wrong and what was expected.
//!
//! Nothing here panics on any input, and the work is bounded by [`MAX_COMMAND`].

use crate::command::{
    Balance, Class, Clear, Command, Destination, InetClear, InetSet, LinkClear, LinkSet, PortClear, PortSet,
    RuleNumber, Services, Set, Transport, VlanClear, VlanSet,
};
use crate::value::{AddressRange, EtherType, MacAddr, MacMask, NumberRange, Protocol, decimal, number};
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

    fn is(self, letter: &str) -> bool {
        self.text.eq_ignore_ascii_case(letter)
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
        let rest = self.line.get(self.at..)?;
        let text = rest.split_ascii_whitespace().next()?;
        let start = self.at + rest.find(text)?;
        self.at = start + text.len();
        Some(Word { text, column: start + 1 })
    }
}

const MAC: &str = "not a MAC address; write six hexadecimal bytes like 12:13:14:15:16:17";
const ADDRESS: &str = "not an IP address; write one like 10.129.126.15 or 2001:db8::1";
const CLASS: &str = "not a filter class; write I (IP fields), M (Ethernet fields), T (TCP ports), U (UDP ports) or V (VLAN id)";

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
        let commands =
            "write R (register), A (add filters), D (delete filters), X (end registration) or Q (query)";
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
                let expected = "this version does not have this command yet; it has R, A, D, X and Q";
                return Err(CommandError::new(ErrorCode::Unsupported, verb, expected));
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

/// `F {mac} {ip}` or `L {mac} {ip} {type} [{srcip}] {dst}`.
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
    let ip = unicast(words)?;
    if firewall {
        return Ok(Command::RegisterFirewall { mac, ip });
    }
    let expected = "not a balancing type; write 0 (static) or 1 (source)";
    let kind = words.peek().unwrap_or(words.end());
    let by_source = match words.next().map(|word| word.text.to_ascii_lowercase()).as_deref() {
        Some("0" | "static") => false,
        Some("1" | "source") => true,
        Some("2" | "rr" | "3" | "hash" | "4" | "least") => {
            let expected = "this version has no pools yet; write 0 (static) or 1 (source)";
            return Err(CommandError::new(ErrorCode::Unsupported, kind, expected));
        }
        Some(text) if decimal::<u32>(text).is_some() => {
            return Err(CommandError::new(ErrorCode::Value, kind, expected));
        }
        _ => return Err(CommandError::new(ErrorCode::Syntax, kind, expected)),
    };
    let balance = if by_source {
        Balance::Source(same_family(words, ip)?, destination(words, ip)?)
    } else {
        Balance::Static(destination(words, ip)?)
    };
    Ok(Command::RegisterBalance { mac, ip, balance })
}

/// An address that one host can have.
fn unicast(words: &mut Words<'_>) -> Result<IpAddr, CommandError> {
    let word = words.peek().unwrap_or(words.end());
    let ip = address(words)?;
    check_unicast(word, ip).map(|()| ip)
}

fn check_unicast(word: Word<'_>, ip: IpAddr) -> Result<(), CommandError> {
    let broadcast = ip == IpAddr::from([255, 255, 255, 255]);
    if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || broadcast {
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

/// `ip[@mac]`, not the registered address itself.
fn destination(words: &mut Words<'_>, vip: IpAddr) -> Result<Destination, CommandError> {
    let word = words.next();
    let expected = "not a destination; write an IP address, like 10.129.126.17, or 10.129.126.17@MAC";
    let Some(word) = word else {
        return Err(CommandError::new(ErrorCode::Syntax, words.end(), expected));
    };
    let (ip_text, mac_text) = match word.text.split_once('@') {
        Some((ip, mac)) => (ip, Some(mac)),
        None => (word.text, None),
    };
    let Ok(ip) = ip_text.parse::<IpAddr>() else {
        let weight_or_port = ip_text.contains('*')
            || ip_text.starts_with('[')
            || ip_text.split_once(':').is_some_and(|(host, _)| host.contains('.'));
        let (code, expected) = if weight_or_port {
            (ErrorCode::Unsupported, "this version takes no port or weight yet; write ip or ip@mac")
        } else {
            (ErrorCode::Value, expected)
        };
        return Err(CommandError::new(code, word, expected));
    };
    check_unicast(word, ip)?;
    check_family(word, ip, vip)?;
    if ip == vip {
        let expected = "the middlebox' own address; write the address of another host";
        return Err(CommandError::new(ErrorCode::Value, word, expected));
    }
    let mac = match mac_text.map(str::parse::<MacAddr>) {
        None => None,
        Some(Ok(mac)) if mac.is_station() => Some(mac),
        Some(_) => {
            let expected = "behind the @ there is no unicast MAC address; write one like 12:13:14:15:16:17";
            return Err(CommandError::new(ErrorCode::Value, word, expected));
        }
    };
    Ok(Destination { ip, mac })
}

/// `{mac} [#n]`, the beginning of `A` and `D`.
fn mac_and_rule(words: &mut Words<'_>) -> Result<(MacAddr, Option<RuleNumber>), CommandError> {
    let mac = mac(words)?;
    if !words.peek().is_some_and(|word| word.text.starts_with('#')) {
        return Ok((mac, None));
    }
    let expected = "not a rule number; write #1 to #65535";
    let rule = words.expect(ErrorCode::Value, expected, |text| {
        decimal(text.strip_prefix('#')?).and_then(RuleNumber::new)
    })?;
    Ok((mac, Some(rule)))
}

/// `{class} {value}`.
fn class_and_bits(words: &mut Words<'_>) -> Result<(Class, u8), CommandError> {
    let class_word = words.peek();
    let class = match class_word.map(|word| word.text.to_ascii_uppercase()).as_deref() {
        Some("I") => Class::Inet,
        Some("M") => Class::Link,
        Some("T") => Class::Ports(Transport::Tcp),
        Some("U") => Class::Ports(Transport::Udp),
        Some("V") => Class::Vlan,
        _ => return Err(CommandError::new(ErrorCode::Syntax, class_word.unwrap_or(words.end()), CLASS)),
    };
    words.next();
    let all = class.all();
    let expected = format!("not a bit value of this class; write a number from 0 to {all}");
    let bits = words.expect(ErrorCode::Value, expected, |text| decimal(text).filter(|&bits| bits <= all))?;
    Ok((class, bits))
}

/// The next key letter of the class; each may be named once.
fn next_key<'a>(
    words: &mut Words<'a>,
    class: Class,
    seen: &mut String,
) -> Result<Option<(char, Word<'a>)>, CommandError> {
    let Some(word) = words.next() else { return Ok(None) };
    let letter = match word.text.as_bytes() {
        [byte] => char::from(byte.to_ascii_lowercase()),
        _ => ' ',
    };
    if !class.keys().contains(letter) {
        let keys: Vec<String> = class.keys().chars().map(String::from).collect();
        let expected = format!("not a key of this class; its keys are {}", keys.join(", "));
        return Err(CommandError::new(ErrorCode::Syntax, word, expected));
    }
    if seen.contains(letter) {
        let expected = "named twice; name each key once";
        return Err(CommandError::new(ErrorCode::Syntax, word, expected));
    }
    seen.push(letter);
    Ok(Some((letter, word)))
}

/// The value behind `d`, unless the next token is another key or the end.
fn own_value<T>(
    words: &mut Words<'_>,
    read: impl FnOnce(&mut Words<'_>) -> Result<T, CommandError>,
) -> Result<Option<Option<T>>, CommandError> {
    match words.peek() {
        Some(word) if !["s", "d", "t", "p"].iter().any(|key| word.is(key)) => read(words).map(Some).map(Some),
        _ => Ok(Some(None)),
    }
}

fn add(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let (mac, rule) = mac_and_rule(words)?;
    let (class, bits) = class_and_bits(words)?;
    let mut seen = String::new();
    let set = match class {
        Class::Inet => {
            let mut set = InetSet { bits, ..InetSet::default() };
            while let Some((key, _)) = next_key(words, class, &mut seen)? {
                match key {
                    's' => set.source = Some(addresses(words)?),
                    'd' => set.destination = own_value(words, addresses)?,
                    't' => set.tos = Some(tos(words)?),
                    _ => set.protocol = Some(protocol(words)?),
                }
            }
            Set::Inet(set)
        }
        Class::Link => {
            let mut set = LinkSet { bits, ..LinkSet::default() };
            while let Some((key, _)) = next_key(words, class, &mut seen)? {
                match key {
                    's' => set.source = Some(mac_mask(words)?),
                    'd' => set.destination = own_value(words, self::mac)?,
                    _ => set.ether_type = Some(ether_type(words)?),
                }
            }
            Set::Link(set)
        }
        Class::Vlan => {
            let mut set = VlanSet { bits, ..VlanSet::default() };
            while next_key(words, class, &mut seen)?.is_some() {
                set.id = Some(vlans(words)?);
            }
            Set::Vlan(set)
        }
        Class::Ports(transport) => {
            let mut set = PortSet { bits, ..PortSet::default() };
            while let Some((key, _)) = next_key(words, class, &mut seen)? {
                match key {
                    's' => set.source = Some(ports(words)?),
                    _ => set.destination = Some(ports(words)?),
                }
            }
            Set::Ports(transport, set)
        }
    };
    Ok(Command::Add { mac, rule: rule.unwrap_or(RuleNumber::FIRST), set })
}

fn mac_mask(words: &mut Words<'_>) -> Result<MacMask, CommandError> {
    let expected = "not a MAC address; write one like 12:13:14:15:16:17, or with a mask 12:13:14:00:00:00/ff:ff:ff:00:00:00";
    words.expect(ErrorCode::Value, expected, |text| text.parse().ok())
}

fn vlans(words: &mut Words<'_>) -> Result<NumberRange, CommandError> {
    let expected = "not a VLAN id or a range of them; write a number from 0 to 4095, or two like 100-199";
    let valid = |text: &str| text.parse().ok().filter(|range: &NumberRange| range.last() < 4096);
    words.expect(ErrorCode::Value, expected, valid)
}

fn tos(words: &mut Words<'_>) -> Result<u8, CommandError> {
    words.expect(ErrorCode::Value, "not a TOS byte; write a number from 0 to 255", number)
}

fn protocol(words: &mut Words<'_>) -> Result<Protocol, CommandError> {
    let expected = "not an IP protocol; write a number from 0 to 255 or a name like tcp, udp, icmp, icmp6";
    words.expect(ErrorCode::Value, expected, |text| text.parse().ok())
}

fn addresses(words: &mut Words<'_>) -> Result<AddressRange, CommandError> {
    let expected = "not an IP address, prefix or range; write one like 10.129.126.15, 10.0.0.0/8, 2001:db8::/32 or \
                    10.0.0.1-10.0.0.9";
    words.expect(ErrorCode::Value, expected, |text| text.parse().ok())
}

fn ports(words: &mut Words<'_>) -> Result<NumberRange, CommandError> {
    let expected = "not a port or a range of them; write a number from 0 to 65535, or two like 80-90";
    words.expect(ErrorCode::Value, expected, |text| text.parse().ok())
}

fn ether_type(words: &mut Words<'_>) -> Result<EtherType, CommandError> {
    let expected = "not an EtherType; write ip, arp, ip6 or a hexadecimal number from 0x0600 up (a decimal is \
                    the field in network order read on a little-endian host: 8 is 0x0800)";
    words.expect(ErrorCode::Value, expected, |text| text.parse().ok())
}

fn delete(words: &mut Words<'_>) -> Result<Command, CommandError> {
    let (mac, rule) = mac_and_rule(words)?;
    if let (Some(rule), None) = (rule, words.peek()) {
        return Ok(Command::DeleteRule { mac, rule });
    }
    let (class, keep) = class_and_bits(words)?;
    let mut seen = String::new();
    // A blanked key whose bit stays on would leave a bit on without a value.
    while let Some((key, word)) = next_key(words, class, &mut seen)? {
        let bit = class.keys().find(key).map_or(0, |index| 1 << index);
        let has_default = key == 'd' && matches!(class, Class::Inet | Class::Link);
        if keep & bit != 0 && !has_default {
            let expected = format!(
                "blanked while its bit {bit} stays on in {keep}; leave the key out, or {bit} out of the value"
            );
            return Err(CommandError::new(ErrorCode::Value, word, expected));
        }
    }
    let named = |key: char| seen.contains(key);
    let clear = match class {
        Class::Inet => Clear::Inet(InetClear {
            keep,
            source: named('s'),
            destination: named('d'),
            tos: named('t'),
            protocol: named('p'),
        }),
        Class::Link => Clear::Link(LinkClear {
            keep,
            source: named('s'),
            destination: named('d'),
            ether_type: named('p'),
        }),
        Class::Vlan => Clear::Vlan(VlanClear { keep, id: named('s') }),
        Class::Ports(transport) => {
            Clear::Ports(transport, PortClear { keep, source: named('s'), destination: named('d') })
        }
    };
    Ok(Command::Delete { mac, rule: rule.unwrap_or(RuleNumber::FIRST), clear })
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
    Ok(Command::Unregister { mac, services })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(line: &str) -> String {
        Command::parse(line).unwrap().to_string()
    }

    #[test]
    fn the_documented_examples() {
        for (line, canonical) in [
            (
                "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17",
                "R L 12:13:14:15:16:17 10.129.126.15 0 10.129.126.17",
            ),
            ("R F 12:13:14:15:16:17 10.129.126.15", "R F 12:13:14:15:16:17 10.129.126.15"),
            (
                "A 12:13:14:15:16:17 M 5 s 1:2:3:4:5:6 p 8",
                "A 12:13:14:15:16:17 M 5 s 01:02:03:04:05:06 p 0x0800",
            ),
            ("D 12:13:14:15:16:17 M 4 s", "D 12:13:14:15:16:17 M 4 s"),
            ("X 12:13:14:15:16:17 F", "X 12:13:14:15:16:17 F"),
            ("X 12:13:14:15:16:17", "X 12:13:14:15:16:17 A"),
        ] {
            assert_eq!(parsed(line), canonical);
        }
    }

    #[test]
    fn values_are_optional_where_the_registration_has_them() {
        assert_eq!(parsed("a 2:0:0:0:0:1 i 3 d s 10.0.0.1"), "A 02:00:00:00:00:01 I 3 s 10.0.0.1 d");
        assert_eq!(parsed("A 2:0:0:0:0:1 M 2 d"), "A 02:00:00:00:00:01 M 2 d");
        assert_eq!(
            parsed("A 2:0:0:0:0:1 #7 I 12 d 10.0.0.9 t 0x10 p TCP"),
            "A 02:00:00:00:00:01 #7 I 12 d 10.0.0.9 t 16 p tcp"
        );
        assert_eq!(parsed("D 2:0:0:0:0:1 #7"), "D 02:00:00:00:00:01 #7");
        assert_eq!(parsed("A 2:0:0:0:0:1 u 3 s 80-90 d 53"), "A 02:00:00:00:00:01 U 3 s 80-90 d 53");
        assert_eq!(parsed("A 2:0:0:0:0:1 I 1 s 10.1.1.1/8"), "A 02:00:00:00:00:01 I 1 s 10.0.0.0/8");
        assert_eq!(
            parsed("R L 2:0:0:0:0:1 2001:db8::1 source 2001:db8::2 2001:db8::3@2:0:0:0:0:3"),
            "R L 02:00:00:00:00:01 2001:db8::1 1 2001:db8::2 2001:db8::3@02:00:00:00:00:03"
        );
    }

    /// Every row: the line, its code, the column, and words that the message must have.
    #[test]
    fn bad_commands_name_the_token_the_place_and_the_remedy() {
        use ErrorCode::{Syntax, Unsupported, Value};
        for (line, code, column, words) in [
            ("", Syntax, 1, "empty"),
            ("   ", Syntax, 1, "empty"),
            ("Z 1:2:3:4:5:6", Syntax, 1, "'Z': not a command"),
            ("R", Syntax, 2, "F (firewall)"),
            ("R G 2:0:0:0:0:1 10.0.0.1", Syntax, 3, "'G': not a service"),
            ("R F", Syntax, 4, "MAC"),
            ("R F 12:13:14:15:16 10.0.0.1", Value, 5, "'12:13:14:15:16': not a MAC"),
            ("R F 1:0:0:0:0:1 10.0.0.1", Value, 5, "unicast MAC"),
            ("R F 2:0:0:0:0:1", Syntax, 16, "IP address"),
            ("R F 2:0:0:0:0:1 10.0.0.256", Value, 17, "'10.0.0.256': not an IP"),
            ("R F 2:0:0:0:0:1 224.0.0.1", Value, 17, "unicast"),
            ("R F 2:0:0:0:0:1 10.0.0.1 x", Syntax, 26, "'x': unexpected"),
            ("R L 2:0:0:0:0:1 10.0.0.1", Syntax, 25, "balancing type"),
            ("R L 2:0:0:0:0:1 10.0.0.1 7 10.0.0.2", Value, 26, "'7': not a balancing type"),
            ("R L 2:0:0:0:0:1 10.0.0.1 rr 10.0.0.2", Unsupported, 26, "'rr'"),
            ("R L 2:0:0:0:0:1 10.0.0.1 0", Syntax, 27, "destination"),
            ("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.1", Value, 28, "own address"),
            ("R L 2:0:0:0:0:1 10.0.0.1 0 2001:db8::1", Value, 28, "IPv4 address"),
            ("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2@1:2:3", Value, 28, "behind the @"),
            ("R L 2:0:0:0:0:1 10.0.0.1 0 224.0.0.2@2:2:3:4:5:6", Value, 28, "unicast"),
            ("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2:80", Unsupported, 28, "port"),
            ("R L 2:0:0:0:0:1 10.0.0.1 0 10.0.0.2 10.0.0.3", Syntax, 37, "'10.0.0.3': unexpected"),
            ("R L 2:0:0:0:0:1 10.0.0.1 1 10.0.0.2", Syntax, 36, "destination"),
            ("A 2:0:0:0:0:1", Syntax, 14, "class"),
            ("A 2:0:0:0:0:1 Q 1", Syntax, 15, "'Q': not a filter class"),
            ("A 2:0:0:0:0:1 V 2", Value, 17, "0 to 1"),
            ("A 2:0:0:0:0:1 V 1 s 4096", Value, 21, "0 to 4095"),
            ("A 2:0:0:0:0:1 V 1 d 5", Syntax, 19, "its keys are s"),
            ("D 2:0:0:0:0:1 V 1 s", Value, 19, "its bit 1 stays on"),
            ("A 2:0:0:0:0:1 M 1 s 2:0:0:0:0:1/24", Value, 21, "or with a mask"),
            ("A 2:0:0:0:0:1 U 4", Value, 17, "0 to 3"),
            ("A 2:0:0:0:0:1 U 1 s 90-80", Value, 21, "'90-80': not a port or a range"),
            (
                "A 2:0:0:0:0:1 I 1 s 10.0.0.0/33",
                Value,
                21,
                "'10.0.0.0/33': not an IP address, prefix or range",
            ),
            ("A 2:0:0:0:0:1 I 1 s 10.0.0.9-10.0.0.1", Value, 21, "10.0.0.1-10.0.0.9"),
            ("A 2:0:0:0:0:1 I 1 s 10.0.0.1-2001:db8::1", Value, 21, "prefix or range"),
            ("A 2:0:0:0:0:1 I", Syntax, 16, "0 to 15"),
            ("A 2:0:0:0:0:1 I 16", Value, 17, "'16': not a bit value"),
            ("A 2:0:0:0:0:1 M 8", Value, 17, "0 to 7"),
            ("A 2:0:0:0:0:1 T 4", Value, 17, "0 to 3"),
            ("A 2:0:0:0:0:1 I -1", Value, 17, "'-1'"),
            ("A 2:0:0:0:0:1 #0 I 1", Value, 15, "'#0': not a rule number"),
            ("A 2:0:0:0:0:1 #x I 1", Value, 15, "'#x'"),
            ("A 2:0:0:0:0:1 T 1 t 5", Syntax, 19, "keys are s, d"),
            ("A 2:0:0:0:0:1 T 1 s", Syntax, 20, "port"),
            ("A 2:0:0:0:0:1 T 2 d", Syntax, 20, "port"),
            ("A 2:0:0:0:0:1 T 1 s 65536", Value, 21, "'65536': not a port"),
            ("A 2:0:0:0:0:1 I 1 s 10.0.0.1 s 10.0.0.2", Syntax, 30, "named twice"),
            ("A 2:0:0:0:0:1 I 4 t 256", Value, 21, "TOS"),
            ("A 2:0:0:0:0:1 I 8 p http", Value, 21, "'http': not an IP protocol"),
            ("A 2:0:0:0:0:1 M 4 p 2048", Value, 21, "8 is 0x0800"),
            ("A 2:0:0:0:0:1 M 1 s 1:2", Value, 21, "'1:2': not a MAC"),
            ("D 2:0:0:0:0:1 M 5 s", Value, 19, "its bit 1 stays on"),
            ("D 2:0:0:0:0:1 T 2 d", Value, 19, "its bit 2 stays on"),
            ("D 2:0:0:0:0:1 M 4 s 1:2:3:4:5:6", Syntax, 21, "not a key"),
            ("X", Syntax, 2, "MAC"),
            ("X 2:0:0:0:0:1 Z", Syntax, 15, "'Z': not a service"),
            ("B 2:0:0:0:0:1 + 10.0.0.1", Unsupported, 1, "'B'"),
            ("Q 1:2", Value, 3, "'1:2': not a MAC"),
            ("Q 2:0:0:0:0:1 F", Syntax, 15, "'F': unexpected"),
            ("R F \u{1b}[31m 10.0.0.1", Value, 5, "\\u{1b}[31m"),
        ] {
            let error = Command::parse(line).expect_err(line);
            assert_eq!((error.code, error.column), (code, column), "{line}: {error}");
            assert!(error.message.contains(words), "{line}: {error}");
        }
        let long = Command::parse(&"R".repeat(MAX_COMMAND + 1)).unwrap_err();
        assert!(long.message.contains("2047 bytes long"), "{long}");
    }

    #[test]
    fn comments_and_blank_lines_are_not_commands() {
        let text = "# head\n\n R F a b # tail\nD m #2\n  #5 is a comment at the start\n";
        let lines: Vec<_> = split_lines(text).collect();
        assert_eq!(lines, [(3, " R F a b "), (4, "D m #2")]);
    }

    #[test]
    fn an_error_of_the_policy_points_at_its_word() {
        let error = CommandError::at_word("  X 1:2:3:4:5:6", 1, ErrorCode::UnknownMac, "not registered");
        assert_eq!(error.reply(), "ERR unknown-mac column 5: '1:2:3:4:5:6': not registered");
    }

    fn station() -> impl Strategy<Value = MacAddr> {
        any::<[u8; 6]>().prop_map(|mut mac| {
            mac[0] = mac[0] & 0xfe | 2;
            MacAddr(mac)
        })
    }

    fn host4() -> impl Strategy<Value = IpAddr> {
        (1u8..127, any::<[u8; 3]>())
            .prop_map(|(a, [b, c, d])| IpAddr::from([a, b, c, d]))
            .prop_filter("unicast", |ip| !ip.is_loopback())
    }

    fn host6() -> impl Strategy<Value = IpAddr> {
        any::<[u16; 7]>().prop_map(|[b, c, d, e, f, g, h]| IpAddr::from([0x2001, b, c, d, e, f, g, h]))
    }

    fn host() -> impl Strategy<Value = IpAddr> {
        prop_oneof![host4(), host6()]
    }

    fn hosts() -> impl Strategy<Value = AddressRange> {
        let range = |(a, b): (IpAddr, IpAddr)| AddressRange::new(a.min(b), a.max(b)).unwrap();
        let prefix = |(ip, length): (IpAddr, u8)| AddressRange::prefix(ip, length).unwrap();
        prop_oneof![
            host().prop_map(AddressRange::from),
            (host4(), 0u8..33).prop_map(prefix),
            (host6(), 0u8..129).prop_map(prefix),
            (host4(), host4()).prop_map(range),
            (host6(), host6()).prop_map(range),
        ]
    }

    fn mac_mask() -> impl Strategy<Value = MacMask> {
        let mask = prop_oneof![Just([0xff; 6]), any::<[u8; 6]>()];
        (station(), mask).prop_map(|(mac, mask)| MacMask::new(mac, MacAddr(mask)))
    }

    fn ports() -> impl Strategy<Value = NumberRange> {
        any::<(u16, u16)>().prop_map(|(a, b)| NumberRange::new(a.min(b), a.max(b)).unwrap())
    }

    fn transport() -> impl Strategy<Value = Transport> {
        prop_oneof![Just(Transport::Tcp), Just(Transport::Udp)]
    }

    fn balance() -> impl Strategy<Value = (IpAddr, Balance)> {
        let to = |ip, mac| Destination { ip, mac };
        let family = prop_oneof![(host4(), host4(), host4()).boxed(), (host6(), host6(), host6()).boxed()];
        (family, proptest::option::of(station()), any::<bool>())
            .prop_filter("another host", |((vip, _, dst), _, _)| vip != dst)
            .prop_map(move |((vip, src, dst), mac, by_source)| {
                let dst = to(dst, mac);
                (vip, if by_source { Balance::Source(src, dst) } else { Balance::Static(dst) })
            })
    }

    fn set() -> impl Strategy<Value = Set> {
        use proptest::option::of;
        let ether_type = (0x0600u16..).prop_map(|n| EtherType::new(n).unwrap());
        prop_oneof![
            (0u8..16, of(hosts()), of(of(hosts())), of(any::<u8>()), of(any::<u8>().prop_map(Protocol)))
                .prop_map(|(bits, source, destination, tos, protocol)| {
                    Set::Inet(InetSet { bits, source, destination, tos, protocol })
                }),
            (0u8..8, of(mac_mask()), of(of(station())), of(ether_type)).prop_map(
                |(bits, source, destination, ether_type)| {
                    Set::Link(LinkSet { bits, source, destination, ether_type })
                }
            ),
            (0u8..2, of((0u16..4096, 0u16..4096))).prop_map(|(bits, ids)| {
                let id = ids.map(|(a, b)| NumberRange::new(a.min(b), a.max(b)).unwrap());
                Set::Vlan(VlanSet { bits, id })
            }),
            (transport(), 0u8..4, of(ports()), of(ports())).prop_map(
                |(transport, bits, source, destination)| {
                    Set::Ports(transport, PortSet { bits, source, destination })
                }
            ),
        ]
    }

    fn clear() -> impl Strategy<Value = Clear> {
        // A key may be blanked only where its bit goes off, or where it has a default.
        (any::<[bool; 4]>(), 0u8..16, 0..4, transport()).prop_map(|([s, d, t, p], keep, class, of)| {
            match class {
                0 => Clear::Inet(InetClear {
                    keep,
                    source: s && keep & 1 == 0,
                    destination: d,
                    tos: t && keep & 4 == 0,
                    protocol: p && keep & 8 == 0,
                }),
                1 => Clear::Link(LinkClear {
                    keep: keep & 7,
                    source: s && keep & 1 == 0,
                    destination: d,
                    ether_type: p && keep & 4 == 0,
                }),
                2 => Clear::Vlan(VlanClear { keep: keep & 1, id: s && keep & 1 == 0 }),
                _ => Clear::Ports(
                    of,
                    PortClear { keep: keep & 3, source: s && keep & 1 == 0, destination: d && keep & 2 == 0 },
                ),
            }
        })
    }

    fn command() -> impl Strategy<Value = Command> {
        let rule = (1u16..).prop_map(|n| RuleNumber::new(n).unwrap());
        let services = prop_oneof![Just(Services::Firewall), Just(Services::Balance), Just(Services::All)];
        prop_oneof![
            (station(), host()).prop_map(|(mac, ip)| Command::RegisterFirewall { mac, ip }),
            (station(), balance()).prop_map(|(mac, (ip, balance))| Command::RegisterBalance {
                mac,
                ip,
                balance
            }),
            (station(), rule.clone(), set()).prop_map(|(mac, rule, set)| Command::Add { mac, rule, set }),
            (station(), rule.clone(), clear()).prop_map(|(mac, rule, clear)| Command::Delete {
                mac,
                rule,
                clear
            }),
            (station(), rule).prop_map(|(mac, rule)| Command::DeleteRule { mac, rule }),
            (station(), services).prop_map(|(mac, services)| Command::Unregister { mac, services }),
            proptest::option::of(station()).prop_map(|mac| Command::Query { mac }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_printed_parses_back(command in command()) {
            prop_assert_eq!(Command::parse(&command.to_string()), Ok(command));
        }

        #[test]
        fn no_text_breaks_the_parser(line in "\\PC{0,80}") {
            let _ = Command::parse(&line);
        }

        #[test]
        fn near_commands_do_not_break_it_either(line in "[RADX] ([FLIMT0-9:.@#*a-f]{1,18} ?){0,8}") {
            if let Ok(command) = Command::parse(&line) {
                prop_assert_eq!(Command::parse(&command.to_string()), Ok(command));
            }
        }
    }
}
