//! The command language: what is read, how it is printed, and that nothing breaks the parser.
#![allow(clippy::unwrap_used)]

mod strategies;

use nfqd_shmctl::{Command, ErrorCode, MAX_COMMAND, ParsedCommand, Place, split_lines};
use proptest::prelude::*;
use strategies::command;

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
    for (line, canonical) in [
        ("a 2:0:0:0:0:1 i 3 d s 10.0.0.1", "A 02:00:00:00:00:01 I 3 s 10.0.0.1 d"),
        ("A 2:0:0:0:0:1 M 2 d", "A 02:00:00:00:00:01 M 2 d"),
        (
            "A 2:0:0:0:0:1 #7 I 12 d 10.0.0.9 t 0x10 p TCP",
            "A 02:00:00:00:00:01 #7 I 12 d 10.0.0.9 t 16 p tcp",
        ),
        ("D 2:0:0:0:0:1 #7", "D 02:00:00:00:00:01 #7"),
        ("D 2:0:0:0:0:1 +7", "D 02:00:00:00:00:01 +7"),
        ("A 2:0:0:0:0:1 #1 V 0", "A 02:00:00:00:00:01 V 0"),
        ("A 2:0:0:0:0:1 +1 V 0", "A 02:00:00:00:00:01 +1 V 0"),
        ("A 2:0:0:0:0:1 u 3 s 80-90 d 53", "A 02:00:00:00:00:01 U 3 s 80-90 d 53"),
        ("A 2:0:0:0:0:1 I 1 s 10.1.1.1/8", "A 02:00:00:00:00:01 I 1 s 10.0.0.0/8"),
        ("A 2:0:0:0:0:1 c 3 c 0 t echo-request", "A 02:00:00:00:00:01 C 3 t 8 c 0"),
        ("A 2:0:0:0:0:1 N 1 t ND-router-advert", "A 02:00:00:00:00:01 N 1 t 134"),
        ("A 2:0:0:0:0:1 F 1 f ack,syn/all", "A 02:00:00:00:00:01 F 1 f syn,ack/all"),
        ("A 2:0:0:0:0:1 P 3 f later l 0-99", "A 02:00:00:00:00:01 P 3 l 0-99 f later"),
        ("r f 2:0:0:0:0:1 10.0.0.1 DENY", "R F 02:00:00:00:00:01 10.0.0.1 deny"),
        ("R F 2:0:0:0:0:1 10.0.0.1 allow", "R F 02:00:00:00:00:01 10.0.0.1"),
        (
            "R L 2:0:0:0:0:1 2001:db8::1 source 2001:db8::2 2001:db8::3@2:0:0:0:0:3",
            "R L 02:00:00:00:00:01 2001:db8::1 1 2001:db8::2 2001:db8::3@02:00:00:00:00:03",
        ),
    ] {
        assert_eq!(parsed(line), canonical);
    }
}

#[test]
fn comments_and_blank_lines_are_not_commands() {
    let text = "# head\n\n R F a b # tail\nD m #2\n  #5 is a comment at the start\n";
    let lines: Vec<_> = split_lines(text).collect();
    assert_eq!(lines, [(3, " R F a b "), (4, "D m #2")]);
}

#[test]
fn an_error_of_the_policy_names_its_column() {
    for (line, place, word, column) in [
        ("  X 1:2:3:4:5:6", Place::Mac, "1:2:3:4:5:6", 5),
        ("X 1:2:3:4:5:6 L 10.0.0.9:80", Place::Frontend, "10.0.0.9:80", 17),
        ("A 1:2:3:4:5:6  #7 T 2 d 80", Place::Rule, "#7", 16),
        ("A 1:2:3:4:5:6 T 2 d 80", Place::Rule, "T", 15),
        ("D 1:2:3:4:5:6 +7 I 3", Place::Bits, "3", 20),
        ("R L 2:2:3:4:5:6 10.0.0.9 1 10.0.0.5 10.0.0.2", Place::Backend(0), "10.0.0.2", 37),
        ("B 1:2:3:4:5:6 + 10.0.0.2 10.0.0.3*7", Place::Backend(1), "10.0.0.3*7", 26),
        ("B 1:2:3:4:5:6 10.0.0.9 = 10.0.0.2 drain", Place::Frontend, "10.0.0.9", 15),
        // A word that the command leaves out: the MAC stands in for it.
        ("B 1:2:3:4:5:6 = 10.0.0.2 drain", Place::Frontend, "1:2:3:4:5:6", 3),
    ] {
        let parsed = ParsedCommand::parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        let error = parsed.error(place, ErrorCode::Value, "wrong");
        assert_eq!((error.column, error.message), (column, format!("'{word}': wrong")), "{line}");
    }
}

#[test]
fn the_length_of_a_command_is_bounded() {
    let long = Command::parse(&"R".repeat(MAX_COMMAND + 1)).unwrap_err();
    assert!(long.message.contains("2047 bytes long"), "{long}");
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
    fn near_commands_do_not_break_it_either(line in "[RADX] ([FLIMTUVCNP0-9:.@#+*a-f/,-]{1,18} ?){0,8}") {
        if let Ok(command) = Command::parse(&line) {
            prop_assert_eq!(Command::parse(&command.to_string()), Ok(command));
        }
    }
}
