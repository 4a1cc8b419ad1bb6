//! The language's reference, `docs/COMMANDS.md`, says what the parser does: its examples are
//! commands, sentences of its grammar are read, and nothing is read that its grammar does not have.
#![allow(clippy::unwrap_used)]

mod strategies;

use nfqd_shmctl::{Command, Protocol, TcpFlags};
use proptest::prelude::*;
use proptest::sample::Index;
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

fn reference() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/COMMANDS.md")).unwrap()
}

#[test]
fn every_example_of_the_reference_parses() {
    let text = reference();
    let examples: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        // A network before the command is a file's, not the language's.
        .filter(|line| line.contains("12:13:") && !line.starts_with('['))
        .collect();
    assert_eq!(examples.len(), 33);
    for example in examples {
        let command = Command::parse(example).unwrap_or_else(|error| panic!("{example}: {error}"));
        assert_eq!(Command::parse(&command.to_string()), Ok(command), "{example}");
    }
}

/// A piece of the grammar.
#[derive(Clone, Debug)]
enum Node {
    Literal(String),
    /// A decimal number from the first to the last.
    Number(u64, u64),
    Rule(String),
    Sequence(Vec<Node>),
    Either(Vec<Node>),
    Maybe(Box<Node>),
    Repeat(Box<Node>),
}

struct Grammar {
    rules: BTreeMap<String, Node>,
    /// Rules whose parts stand together without blanks.
    words: Vec<String>,
}

impl Grammar {
    fn read() -> Grammar {
        let text = reference();
        let section = text.split("## Grammar").nth(1).unwrap().split("\n## ").next().unwrap();
        let (mut rules, mut words) = (BTreeMap::new(), Vec::new());
        let (tokens, word_rules) = section.split_once("Words, without blanks").unwrap();
        for (block, are_words) in [(tokens, false), (word_rules, true)] {
            let mut texts: Vec<(String, String)> = Vec::new();
            for line in block.lines().filter_map(|line| line.strip_prefix("    ")) {
                match line.split_once(" = ") {
                    Some((name, text)) => texts.push((name.trim().to_string(), text.to_string())),
                    None => texts.last_mut().unwrap().1.push_str(line),
                }
            }
            for (name, text) in texts {
                let mut symbols = text.split_whitespace().peekable();
                let node = either(&mut symbols);
                assert_eq!(symbols.next(), None, "{name}");
                words.extend(are_words.then(|| name.clone()));
                rules.insert(name, node);
            }
        }
        Grammar { rules, words }
    }
}

type Symbols<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn either(symbols: &mut Symbols<'_>) -> Node {
    let mut ways = vec![sequence(symbols)];
    while symbols.next_if_eq(&"|").is_some() {
        ways.push(sequence(symbols));
    }
    if ways.len() == 1 { ways.remove(0) } else { Node::Either(ways) }
}

fn sequence(symbols: &mut Symbols<'_>) -> Node {
    let mut parts = Vec::new();
    while let Some(symbol) = symbols.next_if(|symbol| !["|", ")", "]", "}"].contains(symbol)) {
        let mut inside = |close: &str| {
            let node = either(symbols);
            assert_eq!(symbols.next(), Some(close));
            node
        };
        parts.push(match symbol {
            "(" => inside(")"),
            "[" => Node::Maybe(Box::new(inside("]"))),
            "{" => Node::Repeat(Box::new(inside("}"))),
            _ => match (symbol.strip_prefix('"'), symbol.split_once("..")) {
                (Some(literal), _) => Node::Literal(literal.strip_suffix('"').unwrap().to_string()),
                (_, Some((first, last))) => {
                    Node::Number(first.parse().unwrap(), last.parse().unwrap())
                }
                _ => Node::Rule(symbol.to_string()),
            },
        });
    }
    Node::Sequence(parts)
}

impl Grammar {
    /// The ends of a word that begins at `at` of `text`.
    fn word_ends(&self, node: &Node, text: &str, at: usize) -> Vec<usize> {
        let rest = &text[at..];
        let prefixes = |fits: &dyn Fn(&str) -> bool| -> Vec<usize> {
            (1..=rest.len())
                .filter(|&len| rest.get(..len).is_some_and(fits))
                .map(|len| at + len)
                .collect()
        };
        let hex = |word: &str| {
            word.to_ascii_lowercase().strip_prefix("0x").map(|hex| u16::from_str_radix(hex, 16))
        };
        match node {
            Node::Literal(literal) => {
                let there = rest
                    .get(..literal.len())
                    .is_some_and(|start| start.eq_ignore_ascii_case(literal));
                there.then_some(at + literal.len()).into_iter().collect()
            }
            Node::Number(first, last) => prefixes(&|word| {
                let digits = word.bytes().all(|byte| byte.is_ascii_digit());
                digits && word.parse().is_ok_and(|number: u64| (*first..=*last).contains(&number))
            }),
            Node::Rule(name) => match name.as_str() {
                "ip4" => prefixes(&|word| word.parse::<Ipv4Addr>().is_ok()),
                "ip6" => prefixes(&|word| word.parse::<Ipv6Addr>().is_ok()),
                "hexdigit" => {
                    prefixes(&|word| word.len() == 1 && word.as_bytes()[0].is_ascii_hexdigit())
                }
                "hex16" => prefixes(&|word| {
                    word.len() <= 6 && hex(word).is_some_and(|n| n.is_ok_and(|n| n >= 0x600))
                }),
                "raw16" => prefixes(&|word| {
                    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
                    digits && word.parse().is_ok_and(|number: u16| number.swap_bytes() >= 0x600)
                }),
                _ => self.word_ends(&self.rules[name], text, at),
            },
            Node::Sequence(parts) => parts.iter().fold(vec![at], |ends, part| {
                ends.into_iter().flat_map(|end| self.word_ends(part, text, end)).collect()
            }),
            Node::Either(ways) => {
                ways.iter().flat_map(|way| self.word_ends(way, text, at)).collect()
            }
            Node::Maybe(inside) => [vec![at], self.word_ends(inside, text, at)].concat(),
            Node::Repeat(inside) => {
                let more = self.word_ends(inside, text, at);
                let more = more
                    .into_iter()
                    .filter(|&end| end > at)
                    .flat_map(|end| self.word_ends(node, text, end));
                [at].into_iter().chain(more).collect()
            }
        }
    }

    /// The numbers of tokens that may have been read behind `at`.
    fn ends(&self, node: &Node, tokens: &[&str], at: usize) -> Vec<usize> {
        let word = || {
            let token = tokens.get(at).copied().unwrap_or_default();
            let whole = !token.is_empty() && self.word_ends(node, token, 0).contains(&token.len());
            whole.then_some(at + 1).into_iter().collect()
        };
        match node {
            Node::Literal(_) | Node::Number(..) => word(),
            Node::Rule(name) if self.words.contains(name) || !self.rules.contains_key(name) => {
                word()
            }
            Node::Rule(name) => self.ends(&self.rules[name], tokens, at),
            Node::Sequence(parts) => parts.iter().fold(vec![at], |ends, part| {
                ends.into_iter().flat_map(|end| self.ends(part, tokens, end)).collect()
            }),
            Node::Either(ways) => ways.iter().flat_map(|way| self.ends(way, tokens, at)).collect(),
            Node::Maybe(inside) => [vec![at], self.ends(inside, tokens, at)].concat(),
            Node::Repeat(inside) => {
                let more = self.ends(inside, tokens, at).into_iter().filter(|&end| end > at);
                [at].into_iter().chain(more.flat_map(|end| self.ends(node, tokens, end))).collect()
            }
        }
    }

    fn has(&self, line: &str) -> bool {
        let tokens: Vec<&str> = line.split_ascii_whitespace().collect();
        self.ends(&self.rules["command"], &tokens, 0).contains(&tokens.len())
    }

    /// A sentence, by choices. What the grammar does not say is kept by the choice of words.
    fn say(&self, node: &Node, glue: &str, choices: &mut impl FnMut(usize) -> usize) -> String {
        let join = |parts: Vec<String>| {
            parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(glue)
        };
        match node {
            Node::Literal(literal) if choices(2) == 0 => literal.to_ascii_lowercase(),
            Node::Literal(literal) => literal.clone(),
            Node::Number(first, last) => {
                (first + choices((last - first + 1) as usize) as u64).to_string()
            }
            Node::Rule(name) => match name.as_str() {
                "ip4" => format!("10.0.{}.{}", choices(256), choices(256)),
                "ip6" => format!("2001:db8::{:x}", choices(65536)),
                // The words of one command are of one family.
                "ip" => self.say(&Node::Rule("ip4".to_string()), "", choices),
                "ip6port" => self.say(&Node::Rule("ip4port".to_string()), "", choices),
                "mac" => format!("2:{:x}:0:0:{:02X}:1", choices(256), choices(256)),
                "hexdigit" => format!("{:x}", choices(16)),
                "hex16" => format!("{:#x}", 0x600 + choices(0xfa00)),
                "raw16" => ((0x600 + choices(0xfa00)) as u16).swap_bytes().to_string(),
                "ports" | "vlans" | "codes" => {
                    let most = match name.as_str() {
                        "ports" => 65535,
                        "vlans" => 4095,
                        _ => 255,
                    };
                    let (a, b) = (choices(most + 1), choices(most + 1));
                    if choices(2) == 0 {
                        a.to_string()
                    } else {
                        format!("{}-{}", a.min(b), a.max(b))
                    }
                }
                "ips" => match choices(6) {
                    0 => "10.1.2.3".to_string(),
                    1 => format!("10.1.2.3/{}", choices(33)),
                    2 => "10.1.2.3-10.1.2.9".to_string(),
                    3 => "2001:DB8::1".to_string(),
                    4 => format!("2001:db8::1/{}", choices(129)),
                    _ => "::-2001:db8::1".to_string(),
                },
                "flags" => {
                    let (on, mask) = (choices(256) as u8, 1 + choices(255) as u8);
                    TcpFlags::new(on & mask, mask).unwrap().to_string()
                }
                _ if self.words.contains(name) => self.say(&self.rules[name], "", choices),
                _ => self.say(&self.rules[name], glue, choices),
            },
            Node::Sequence(parts) => {
                join(parts.iter().map(|part| self.say(part, glue, choices)).collect())
            }
            Node::Either(ways) => self.say(&ways[choices(ways.len())], glue, choices),
            Node::Maybe(_) if choices(2) == 0 => String::new(),
            Node::Maybe(inside) => self.say(inside, glue, choices),
            // Each way once.
            Node::Repeat(inside) => {
                let ways = if let Node::Either(ways) = inside.as_ref() {
                    ways.as_slice()
                } else {
                    std::slice::from_ref(&**inside)
                };
                let mut chosen: Vec<&Node> = ways.iter().filter(|_| choices(2) == 0).collect();
                if choices(2) == 0 {
                    chosen.reverse();
                }
                join(chosen.into_iter().map(|way| self.say(way, glue, choices)).collect())
            }
        }
    }
}

/// Choices that proptest makes, and makes smaller.
fn sentence(grammar: &Grammar, indexes: &[Index]) -> String {
    let mut next = indexes.iter().cycle();
    grammar.say(&grammar.rules["command"], " ", &mut |of| next.next().unwrap().index(of))
}

#[test]
fn the_grammar_has_every_protocol() {
    let grammar = Grammar::read();
    for protocol in (0..=255).map(Protocol) {
        let line = format!("A 2:0:0:0:0:1 I 8 p {protocol}");
        assert!(grammar.has(&line) && Command::parse(&line).is_ok(), "{line}");
    }
}

proptest! {
    #[test]
    fn the_grammar_has_every_command(command in strategies::command()) {
        prop_assert!(Grammar::read().has(&command.to_string()), "{}", command);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn every_sentence_of_the_grammar_is_read(indexes in proptest::collection::vec(any::<Index>(), 40)) {
        let grammar = Grammar::read();
        let line = sentence(&grammar, &indexes);
        prop_assert!(grammar.has(&line), "{}", line);
        match Command::parse(&line) {
            Ok(_) => {}
            // A key whose bit stays on, or the registered address as destination: what the grammar
            // does not say.
            Err(error) => {
                let said = [
                    "stays on",
                    "own address",
                    "registered address has none",
                    "only the MAC",
                    "named twice",
                    "needs a port",
                    "check=udp too",
                    "only for the method hash",
                    "does not expire",
                ]
                .iter().any(|words| error.message.contains(words));
                prop_assert!(said, "{}: {}", line, error);
            }
        }
    }

    /// Sentences with a word that is changed, left out, doubled, or cut.
    #[test]
    fn nothing_else_is_read(
        indexes in proptest::collection::vec(any::<Index>(), 40),
        at in any::<Index>(),
        other in prop_oneof![
            "[a-zA-Z0-9.:/@#+,-]{0,6}",
            proptest::sample::select(vec![
                "s", "d", "t", "p", "c", "f", "l", "I", "0", "15", "#1", "+2", "0x00ff", "deny", "80-81", "+", "=", "drain",
                "dsr", "10.0.0.1:80", "10.0.0.9*3", "[::1]:80", "seed=7", "check=tcp:0", "on-dead=up", "drain=9", "affinity=8", "takeover",
            ])
                .prop_map(str::to_string),
        ],
        way in 0..5_u8,
    ) {
        let grammar = Grammar::read();
        let line = sentence(&grammar, &indexes);
        let mut words: Vec<String> = line.split(' ').map(str::to_string).collect();
        let at = at.index(words.len());
        match way {
            0 => words[at] = other,
            1 => drop(words.remove(at)),
            2 => words.insert(at, words[at].clone()),
            3 => words.insert(at, other),
            _ => drop(words[at].pop()),
        }
        let line = words.join(" ");
        if Command::parse(&line).is_ok() {
            prop_assert!(grammar.has(&line), "{}: read, but not in the grammar", line);
        }
    }
}
