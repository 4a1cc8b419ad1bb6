//! The language's reference, `docs/COMMANDS.md`, says what the parser does: every example in it is a command.
#![allow(clippy::unwrap_used)]

use nfqd_shmctl::Command;

#[test]
fn every_example_of_the_reference_parses() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/COMMANDS.md")).unwrap();
    let examples: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .filter(|line| line.contains("12:13:"))
        .collect();
    assert_eq!(examples.len(), 16);
    for example in examples {
        let command = Command::parse(example).unwrap_or_else(|error| panic!("{example}: {error}"));
        assert_eq!(Command::parse(&command.to_string()), Ok(command), "{example}");
    }
}

/// Sentences of the grammar, one for each alternative, made by hand beside it; and one step outside each.
#[test]
fn the_grammar_s_bounds_are_the_parser_s() {
    let mac = "2:0:0:0:0:1";
    for (inside, outside) in [
        ("I 15 s ::1 d t 255 p 255", "I 16"),
        ("I 0 t 0xff", "I 0 t 0x100"),
        ("I 1 s 10.0.0.0/32", "I 1 s 10.0.0.0/33"),
        ("I 1 s ::/128", "I 1 s ::/129"),
        ("M 7 s 0:0:0:0:0:0/0:0:0:0:0:0 d p 0x0600", "M 7 p 0x05ff"),
        ("M 2 d 2:0:0:0:0:9", "M 2 d 2:0:0:0:0"),
        ("T 3 s 0-65535 d 0", "T 3 s 0-65536"),
        ("U 3 d 65535", "U 4"),
        ("V 1 s 0-4095", "V 1 s 4096"),
        ("#65535 V 0", "#65536 V 0"),
        ("#1 T 0", "#0 T 0"),
    ] {
        assert!(Command::parse(&format!("A {mac} {inside}")).is_ok(), "{inside}");
        assert!(Command::parse(&format!("A {mac} {outside}")).is_err(), "{outside}");
    }
}
