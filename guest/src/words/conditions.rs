//! The conditions of a rule in words, `from 10.0.0.0/8 tcp to-port 80`, as fields of the command
//! language.

use nfqd_shmctl::Class;
use std::collections::BTreeMap;

/// A word for a condition with one value.
struct Word {
    name: &'static str,
    field: Condition,
    example: &'static str,
}

/// The field that a word sets.
#[derive(Clone, Copy)]
enum Condition {
    /// A field of a class.
    Field(Class, char),
    /// A port, of the transport protocol that is named as well.
    Port(char),
}

const WORDS: [Word; 14] = [
    word("from", Condition::Field(Class::Inet, 's'), "from 10.0.0.0/8"),
    word("to", Condition::Field(Class::Inet, 'd'), "to 10.0.0.9"),
    word("protocol", Condition::Field(Class::Inet, 'p'), "protocol gre"),
    word("tos", Condition::Field(Class::Inet, 't'), "tos 0x10"),
    word("from-mac", Condition::Field(Class::Link, 's'), "from-mac 02:00:00:00:00:01"),
    word("to-mac", Condition::Field(Class::Link, 'd'), "to-mac 12:13:14:15:16:17"),
    word("ethertype", Condition::Field(Class::Link, 'p'), "ethertype arp"),
    word("vlan", Condition::Field(Class::Vlan, 's'), "vlan 100-199"),
    word("icmp-type", Condition::Field(Class::Icmp, 't'), "icmp-type redirect"),
    word("icmp6-type", Condition::Field(Class::Icmp6, 't'), "icmp6-type nd-redirect"),
    word("flags", Condition::Field(Class::Flags, 'f'), "flags syn/syn,ack"),
    word("length", Condition::Field(Class::Packet, 'l'), "length 0-99"),
    word("from-port", Condition::Port('s'), "udp from-port 53"),
    word("to-port", Condition::Port('d'), "tcp to-port 80-89"),
];

const fn word(name: &'static str, field: Condition, example: &'static str) -> Word {
    Word { name, field, example }
}

/// The reason words are no conditions.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum ConditionError {
    /// A word that is none of the conditions.
    #[error("'{0}' is not a condition; write tcp, udp, or one of: {examples}", examples = examples())]
    Unknown(String),
    /// A condition without its value.
    #[error("'{word}' without a value; write one like '{example}'")]
    NoValue {
        /// The word.
        word: String,
        /// An example.
        example: &'static str,
    },
    /// A condition that is given twice.
    #[error("'{0}' twice; give each condition once, and add a second rule for another value")]
    Twice(String),
    /// A port without its protocol, or both protocols.
    #[error("'{0}' needs either tcp or udp beside it, like 'tcp to-port 80'")]
    NoTransport(String),
    /// No condition at all.
    #[error("a rule without a condition would match nothing; write one of: {}", examples())]
    Empty,
}

fn examples() -> String {
    WORDS.map(|word| word.example).join(", ")
}

/// Returns the fields behind `A mac rule` that make these conditions, one text per class: all of them
/// must hold for a packet to match.
///
/// # Errors
/// See [`ConditionError`].
pub(crate) fn fields(words: &[String]) -> Result<Vec<String>, ConditionError> {
    let mut values: BTreeMap<(Class, char), &str> = BTreeMap::new();
    let mut ports: Vec<(&str, char, &str)> = Vec::new();
    let mut transport: Option<&str> = None;
    let mut words = words.iter().map(String::as_str);
    while let Some(text) = words.next() {
        if let "tcp" | "udp" = text {
            if transport.replace(text).is_some() {
                return Err(ConditionError::Twice(text.to_string()));
            }
            continue;
        }
        let word = WORDS.iter().find(|word| word.name == text);
        let word = word.ok_or_else(|| ConditionError::Unknown(text.to_string()))?;
        let no_value = || ConditionError::NoValue { word: text.to_string(), example: word.example };
        let value = words.next().ok_or_else(no_value)?;
        let is_second = match word.field {
            Condition::Field(class, key) => values.insert((class, key), value).is_some(),
            Condition::Port(key) => {
                let is_second = ports.iter().any(|(_, other, _)| *other == key);
                ports.push((text, key, value));
                is_second
            }
        };
        if is_second {
            return Err(ConditionError::Twice(text.to_string()));
        }
    }
    let class = match transport {
        Some("tcp") => Some(Class::Tcp),
        Some(_) => Some(Class::Udp),
        None => None,
    };
    for (name, key, value) in &ports {
        let class = class.ok_or_else(|| ConditionError::NoTransport(name.to_string()))?;
        values.insert((class, *key), value);
    }
    if let Some(protocol) = transport.filter(|_| ports.is_empty())
        && values.insert((Class::Inet, 'p'), protocol).is_some()
    {
        return Err(ConditionError::Twice(protocol.to_string()));
    }
    if values.is_empty() {
        return Err(ConditionError::Empty);
    }
    let mut classes: BTreeMap<Class, (u8, String)> = BTreeMap::new();
    for ((class, key), value) in values {
        let field = class.fields().iter().find(|field| field.letter() == key);
        let (bits, text) = classes.entry(class).or_default();
        *bits |= field.map_or(0, |field| field.bit());
        text.push_str(&format!(" {key} {value}"));
    }
    let text =
        |(class, (bits, text)): (Class, (u8, String))| format!("{} {bits}{text}", class.letter());
    Ok(classes.into_iter().map(text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_shmctl::Command;

    fn of(text: &str) -> Result<Vec<String>, ConditionError> {
        let words: Vec<String> = text.split_whitespace().map(str::to_string).collect();
        fields(&words)
    }

    #[test]
    fn conditions_become_the_fields_of_one_rule() {
        for (words, expected) in [
            ("from 10.0.0.0/8", vec!["I 1 s 10.0.0.0/8"]),
            ("tcp to-port 80", vec!["T 2 d 80"]),
            ("udp", vec!["I 8 p udp"]),
            (
                "udp from 10.0.0.1 from-port 53 to-port 1024-65535 vlan 7",
                vec!["I 1 s 10.0.0.1", "T", "V"],
            ),
            ("from-mac 2:0:0:0:0:1 ethertype arp", vec!["M 5 p arp s 2:0:0:0:0:1"]),
        ] {
            let found = of(words).unwrap();
            assert_eq!(found.len(), expected.len(), "{words}: {found:?}");
            for fields in &found {
                let command = format!("A 2:0:0:0:0:9 #3 {fields}");
                assert!(Command::parse(&command).is_ok(), "{command}");
            }
            if expected.iter().all(|text| text.len() > 1) {
                assert_eq!(found, expected);
            }
        }
        let both = of("udp from 10.0.0.1 from-port 53 to-port 1024-65535 vlan 7").unwrap();
        assert_eq!(both, ["I 1 s 10.0.0.1", "U 3 d 1024-65535 s 53", "V 1 s 7"]);
    }

    #[test]
    fn every_example_is_a_condition() {
        for Word { example, .. } in WORDS {
            for fields in of(example).unwrap() {
                let command = format!("A 2:0:0:0:0:9 {fields}");
                assert!(Command::parse(&command).is_ok(), "{example}: {command}");
            }
        }
    }

    #[test]
    fn what_is_no_condition_is_named() {
        for (words, expected) in [
            ("", "would match nothing"),
            ("frm 10.0.0.1", "'frm' is not a condition"),
            ("from", "write one like 'from 10.0.0.0/8'"),
            ("from 10.0.0.1 from 10.0.0.2", "'from' twice"),
            ("to-port 80", "needs either tcp or udp"),
            ("tcp udp to-port 80", "'udp' twice"),
            ("tcp protocol gre", "'tcp' twice"),
        ] {
            let error = of(words).unwrap_err().to_string();
            assert!(error.contains(expected), "{words}: {error}");
        }
    }
}
