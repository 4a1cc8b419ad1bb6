//! Parsing of `R L` and `B` behind the middlebox.

use super::Word;
use super::error::{CommandError, ErrorCode};
use super::words::{Place, Words};
use super::{check_family, check_unicast, same_family};
use crate::language::command::Command;
use crate::language::service::{
    BackendChange, BackendName, Check, DEFAULT_AFFINITY, Destination, Drain, Frontend,
    MAX_CHECK_INTERVAL, MAX_DRAIN, MAX_TIMEOUT, MAX_WEIGHT, Method, OnDead, OnEmpty,
    ServiceOptions, ServiceSpec,
};
use crate::language::value::{MacAddr, decimal};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

const SERVICE: &str = "not an address or a port of one; write one like 10.129.126.15, 2001:db8::1, \
                       10.129.126.15:80, 10.129.126.15:53/udp or [2001:db8::1]:80";
const TYPE: &str =
    "not a balancing method; write 0 (static), 1 (source), 2 (rr), 3 (hash) or 4 (least)";
const DESTINATION: &str = "not a destination; write an IP address, like 10.129.126.17, or 10.129.126.17@MAC; in full \
                           ip[:port][@mac][*weight], with [ip]:port for IPv6";
const OPTIONS: &str = "dsr, affinity[=SECONDS], seed=N, check=none|arp|tcp[:port]|udp[:port], interval=SECONDS, \
                       rise=N, fall=N, on-dead=move|reset|keep, on-empty=reject|pass, udp-timeout=SECONDS, takeover";

/// Parses `{ip}[:port[/tcp|udp]] {type} [{srcip}] {dst}… [options]`.
pub(super) fn register(words: &mut Words<'_>, mac: MacAddr) -> Result<Command, CommandError> {
    let frontend = frontend(words)?;
    let method = method(words, frontend.ip)?;
    let destinations = destinations(words, Some(frontend), method.is_pool())?;
    let mut options = ServiceOptions::default();
    let mut named = BTreeSet::new();
    let mut interval = None;
    for word in words.by_ref() {
        let name = option(word, method, &mut options)?;
        if !named.insert(name) {
            let expected = "an option that was given before; give each once";
            return Err(CommandError::new(ErrorCode::Syntax, word, expected));
        }
        let ported = destinations.iter().any(|to| to.port.is_some() && to.port != frontend.port);
        if options.dsr && ported {
            let expected = "dsr rewrites only the MAC; omit the backends' ports";
            return Err(CommandError::new(ErrorCode::Value, word, expected));
        }
        let unported = matches!(options.check, Check::Tcp(None) | Check::Udp(None));
        if unported && frontend.port.is_none() {
            let expected = "needs a port, because the service has none; write check=tcp:PORT or check=udp:PORT";
            return Err(CommandError::new(ErrorCode::Value, word, expected));
        }
        if word.text.to_ascii_lowercase().starts_with("interval=") {
            interval = Some(word);
        }
    }
    if let Some(word) = interval.filter(|_| !matches!(options.check, Check::Tcp(_) | Check::Udp(_)))
    {
        let expected = "only TCP and UDP checks have an interval; write check=tcp or check=udp too";
        return Err(CommandError::new(ErrorCode::Value, word, expected));
    }
    Ok(Command::RegisterService {
        mac,
        frontend,
        spec: ServiceSpec { method, destinations, options },
    })
}

/// Parses `[{ip}[:port[/tcp|udp]]] + {dst}…`, `- {dst}…` or `= {dst}… drain|up`.
pub(super) fn change(words: &mut Words<'_>, mac: MacAddr) -> Result<Command, CommandError> {
    let is_sign = |text: &str| matches!(text, "+" | "-" | "=");
    let named = words.peek().is_some_and(|word| !is_sign(word.text));
    let frontend = if named { Some(frontend(words)?) } else { None };
    let expected =
        "not a change; write + (add), - (remove) or = (drain or up), and backends behind it";
    let sign = words
        .expect(ErrorCode::Syntax, expected, |text| is_sign(text).then(|| text.to_string()))?;
    let change = match sign.as_str() {
        "+" => BackendChange::Add(destinations(words, frontend, true)?),
        "-" => BackendChange::Remove(names(destinations(words, frontend, true)?)),
        _ => {
            let backends = names(destinations(words, frontend, true)?);
            let expected = "not a state; write drain (no new flows), drain=SECONDS (0 to 86400, then its \
                            flows end) or up";
            let state = words.expect(ErrorCode::Syntax, expected, |text| {
                let text = text.to_ascii_lowercase();
                match text.split_once('=') {
                    None if text == "drain" => Some(Some(Drain::Unlimited)),
                    None if text == "up" => Some(None),
                    Some(("drain", seconds)) => {
                        let seconds = decimal(seconds).filter(|seconds| *seconds <= MAX_DRAIN)?;
                        Some(Some(Drain::For(seconds)))
                    }
                    _ => None,
                }
            })?;
            match state {
                Some(drain) => BackendChange::Drain(backends, drain),
                None => BackendChange::Up(backends),
            }
        }
    };
    Ok(Command::ChangeBackends { mac, frontend, change })
}

fn names(destinations: Vec<Destination>) -> Vec<BackendName> {
    destinations.iter().map(Destination::name).collect()
}

/// Parses a frontend.
pub(super) fn frontend(words: &mut Words<'_>) -> Result<Frontend, CommandError> {
    words.mark(Place::Frontend);
    let word = words.peek().unwrap_or(words.end());
    let frontend: Frontend = words.expect(ErrorCode::Value, SERVICE, |text| text.parse().ok())?;
    check_unicast(word, frontend.ip).map(|()| frontend)
}

fn method(words: &mut Words<'_>, frontend: IpAddr) -> Result<Method, CommandError> {
    let word = words.next().unwrap_or(words.end());
    Ok(match word.text.to_ascii_lowercase().as_str() {
        "0" | "static" => Method::Static,
        "1" | "source" => Method::Source(same_family(words, frontend)?),
        "2" | "rr" => Method::RoundRobin,
        "3" | "hash" => Method::Hash,
        "4" | "least" => Method::Least,
        text if decimal::<u32>(text).is_some() => {
            return Err(CommandError::new(ErrorCode::Value, word, TYPE));
        }
        _ => return Err(CommandError::new(ErrorCode::Syntax, word, TYPE)),
    })
}

/// Parses one destination, or as many as there are.
fn destinations(
    words: &mut Words<'_>,
    frontend: Option<Frontend>,
    several: bool,
) -> Result<Vec<Destination>, CommandError> {
    let mut out = vec![destination(words, frontend)?];
    while several && words.peek().is_some_and(|word| !begins_option(word.text)) {
        let word = words.peek().unwrap_or(words.end());
        let next = destination(words, frontend)?;
        let port = |to: &Destination| to.port.or(frontend.and_then(|frontend| frontend.port));
        if let Some(first) = out.first() {
            check_family(word, next.ip, first.ip)?;
        }
        if out.iter().any(|before| before.ip == next.ip && port(before) == port(&next)) {
            let expected = "named twice; name each backend once";
            return Err(CommandError::new(ErrorCode::Value, word, expected));
        }
        out.push(next);
    }
    Ok(out)
}

/// Whether a word is behind the destinations. Addresses and MACs contain a `.` or a `:`, and so do
/// words that are mistyped ones; `check=tcp:80` is the exception.
fn begins_option(text: &str) -> bool {
    text.contains('=') || text.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-')
}

/// Parses `ip[:port][@mac][*weight]`, which is not the registered address itself.
fn destination(
    words: &mut Words<'_>,
    frontend: Option<Frontend>,
) -> Result<Destination, CommandError> {
    words.mark(Place::Backend(0));
    let Some(word) = words.next() else {
        return Err(CommandError::new(ErrorCode::Syntax, words.end(), DESTINATION));
    };
    let value = |expected: &str| CommandError::new(ErrorCode::Value, word, expected);
    let (rest, weight) = match word.text.rsplit_once('*') {
        None => (word.text, 1),
        Some((rest, weight)) => {
            let weight = decimal(weight).filter(|weight| (1..=MAX_WEIGHT).contains(weight));
            (
                rest,
                weight.ok_or_else(|| {
                    value("behind the * there is no weight; write one from 1 to 1000")
                })?,
            )
        }
    };
    let (name, mac) = match rest.split_once('@') {
        None => (rest, None),
        Some((name, mac)) => (name, Some(mac)),
    };
    let Ok(BackendName { ip, port }) = name.parse() else { return Err(value(DESTINATION)) };
    check_unicast(word, ip)?;
    if let Some(frontend) = frontend {
        check_family(word, ip, frontend.ip)?;
        if ip == frontend.ip {
            return Err(value("the middlebox' own address; write the address of another host"));
        }
        if frontend.port.is_none() && port.is_some() {
            return Err(value(
                "a port, but the registered address has none; give both a port, or neither",
            ));
        }
    }
    let mac = match mac.map(str::parse::<MacAddr>) {
        None => None,
        Some(Ok(mac)) if mac.is_station() => Some(mac),
        Some(_) => {
            return Err(value(
                "behind the @ there is no unicast MAC address; write one like 12:13:14:15:16:17",
            ));
        }
    };
    Ok(Destination { ip, port, mac, weight })
}

/// Parses an option into `options`, and returns its name.
fn option(
    word: Word<'_>,
    method: Method,
    options: &mut ServiceOptions,
) -> Result<String, CommandError> {
    let syntax = |expected: String| CommandError::new(ErrorCode::Syntax, word, expected);
    let value = |expected: &str| CommandError::new(ErrorCode::Value, word, expected);
    let (name, argument) = match word.text.split_once('=') {
        None => (word.text, None),
        Some((name, argument)) => (name, Some(argument)),
    };
    let unknown = || {
        if method.is_pool() {
            syntax(format!(
                "not a destination and not an option; options are {OPTIONS}, behind all destinations"
            ))
        } else {
            syntax(
                "unexpected; methods static and source take one destination, then only dsr"
                    .to_string(),
            )
        }
    };
    let lower = |text: &str| text.to_ascii_lowercase();
    if lower(name) == "dsr" && argument.is_none() {
        options.dsr = true;
        return Ok(lower(name));
    }
    if !method.is_pool() {
        return Err(unknown());
    }
    match (lower(name).as_str(), argument.map(lower).as_deref()) {
        ("affinity", None) => options.affinity = Some(DEFAULT_AFFINITY),
        ("affinity", Some(_)) if method == Method::Hash => {
            return Err(value("affinity of the method hash does not expire; write affinity"));
        }
        ("affinity", Some(seconds)) => {
            let expected = "not a time; write affinity=SECONDS, from 1 to 7200";
            options.affinity = Some(number(word, seconds, (1, MAX_TIMEOUT), expected)?);
        }
        ("seed", Some(seed)) => {
            let expected = "has no seed behind it; write a number from 0 to 4294967295";
            options.seed = number(word, seed, (0, u32::MAX), expected)?;
        }
        ("check", Some(kind)) => {
            let expected = "not a check; write check=none, check=arp, check=tcp, check=tcp:PORT, check=udp or \
                            check=udp:PORT";
            options.check = check(kind).ok_or_else(|| value(expected))?;
        }
        ("interval", Some(seconds)) => {
            let expected = "not an interval of checks; write interval=SECONDS, from 1 to 3600";
            options.pace.interval = number(word, seconds, (1, MAX_CHECK_INTERVAL), expected)?;
        }
        ("rise", Some(count)) => {
            let expected = "not a number of checks; write rise=N, from 1 to 255";
            options.pace.rise = number(word, count, (1, u8::MAX), expected)?;
        }
        ("fall", Some(count)) => {
            let expected = "not a number of checks; write fall=N, from 1 to 255";
            options.pace.fall = number(word, count, (1, u8::MAX), expected)?;
        }
        ("on-dead", Some(what)) => {
            options.on_dead = match what {
                "move" => OnDead::Move,
                "reset" => OnDead::Reset,
                "keep" => OnDead::Keep,
                _ => return Err(value("not an on-dead action; write move, reset or keep")),
            };
        }
        ("on-empty", Some(what)) => {
            options.on_empty = match what {
                "reject" => OnEmpty::Reject,
                "pass" => OnEmpty::Pass,
                _ => return Err(value("not an on-empty action; write reject or pass")),
            };
        }
        ("udp-timeout", Some(seconds)) => {
            let expected = "not a time; write udp-timeout=SECONDS, from 1 to 7200";
            options.udp_timeout = Some(number(word, seconds, (1, MAX_TIMEOUT), expected)?);
        }
        ("takeover", None) if method == Method::Hash => options.takeover = true,
        ("takeover", None) => {
            return Err(value("only for the method hash, which chooses alike on every host"));
        }
        _ => return Err(unknown()),
    }
    Ok(lower(name))
}

/// Parses the value of `check=`.
fn check(text: &str) -> Option<Check> {
    let (kind, port) = match text.split_once(':') {
        None => (text, None),
        Some((kind, port)) => (kind, Some(decimal(port).filter(|port| *port != 0)?)),
    };
    match (kind, port) {
        ("none", None) => Some(Check::None),
        ("arp", None) => Some(Check::Neighbour),
        ("tcp", port) => Some(Check::Tcp(port)),
        ("udp", port) => Some(Check::Udp(port)),
        _ => None,
    }
}

/// Parses the value of an option as a number from `least` to `most`.
fn number<T: FromStr + PartialOrd>(
    word: Word<'_>,
    text: &str,
    (least, most): (T, T),
    expected: &str,
) -> Result<T, CommandError> {
    let number = decimal(text).filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| CommandError::new(ErrorCode::Value, word, expected))
}
