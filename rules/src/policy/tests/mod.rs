mod decisions;

use super::*;
use crate::limits::MAX_RULES;
use nfqd_shmctl::ErrorCode;

const MAC: &str = "12:13:14:15:16:17";

fn policy(lines: &[&str]) -> Policy {
    let lines: Vec<String> = lines.iter().map(|line| line.replace("MB", MAC)).collect();
    Policy::from_lines(&lines).unwrap()
}

fn printed(policy: &Policy) -> Vec<String> {
    policy.commands().map(|(_, command)| command.to_string().replace(MAC, "MB")).collect()
}

#[test]
fn the_documented_examples_in_order() {
    let mut policy = policy(&[
        "R L MB 10.129.126.15 0 10.129.126.17",
        "R F MB 10.129.126.15",
        "A MB M 5 s 1:2:3:4:5:6 p 8",
    ]);
    assert_eq!(
        printed(&policy),
        [
            "R F MB 10.129.126.15",
            "A MB M 5 s 01:02:03:04:05:06 p 0x0800",
            "R L MB 10.129.126.15 0 10.129.126.17"
        ]
    );
    policy.apply_line("D 12:13:14:15:16:17 M 4 s").unwrap();
    assert_eq!(printed(&policy)[1], "A MB M 4 p 0x0800");
    policy.apply_line("X 12:13:14:15:16:17 F").unwrap();
    assert_eq!(printed(&policy), ["R L MB 10.129.126.15 0 10.129.126.17"]);
    policy.apply_line("X 12:13:14:15:16:17").unwrap();
    assert_eq!(policy, Policy::default());
}

#[test]
fn add_ors_and_delete_ands() {
    let p =
        policy(&["R F MB 10.0.0.9", "A MB I 1 s 10.0.0.1", "A MB I 10 p tcp d", "A MB T 2 d 80"]);
    assert_eq!(printed(&p)[1..], ["A MB I 11 s 10.0.0.1 d p tcp", "A MB T 2 d 80"]);
    let p = policy(&["R F MB 10.0.0.9", "A MB I 9 s 10.0.0.1 p 17", "D MB I 3"]);
    assert_eq!(
        printed(&p)[1],
        "A MB I 1 s 10.0.0.1 p udp",
        "the value of an unused bit stays stored"
    );
    let p = policy(&["R F MB 10.0.0.9", "A MB #3 I 1 s 10.0.0.1", "D MB #3 I 0"]);
    assert_eq!(printed(&p)[1], "A MB #3 I 0 s 10.0.0.1");
}

#[test]
fn registering_again_replaces() {
    let p = policy(&["R F MB 10.0.0.9", "A MB I 1 s 10.0.0.1", "R F MB 10.0.0.8"]);
    assert_eq!(printed(&p), ["R F MB 10.0.0.8"]);
    let p = policy(&[
        "R L MB 10.0.0.9 0 10.0.0.1",
        "R L MB 10.0.0.9 1 10.0.0.5 10.0.0.2",
        "R L MB 10.0.0.8 0 10.0.0.3",
    ]);
    assert_eq!(printed(&p), ["R L MB 10.0.0.8 0 10.0.0.3", "R L MB 10.0.0.9 1 10.0.0.5 10.0.0.2"]);
}

fn assert_refused(before: &Policy, line: &str, place: (ErrorCode, usize), words: &str) {
    let mut after = before.clone();
    let error = after.apply_line(&line.replace("MB", MAC)).expect_err(line);
    assert_eq!((error.code, error.column), place, "{line}: {error}");
    assert!(error.message.contains(words), "{line}: {error}");
    assert_eq!(&after, before, "{line}");
}

#[test]
fn a_rejected_command_changes_nothing() {
    let before =
        policy(&["R F MB 10.0.0.9", "A MB I 1 s 10.0.0.1", "R L 2:0:0:0:0:1 10.0.0.7 0 10.0.0.1"]);
    for (line, code, column, words) in [
        ("A MB I 4", ErrorCode::Value, 23, "t has no value"),
        ("A MB I 3 d 2001:db8::1", ErrorCode::Value, 23, "not of one family"),
        ("A MB T 2 s 5", ErrorCode::Value, 23, "d has no value"),
        ("A MB #2 M 4", ErrorCode::Value, 26, "p has no value"),
        ("A MB #1 I 4", ErrorCode::Value, 26, "t has no value"),
        ("D MB #2 M 4", ErrorCode::Value, 21, "no such rule"),
        ("D MB #2", ErrorCode::Value, 21, "no such rule"),
        ("X MB L", ErrorCode::UnknownMac, 3, "not registered for load balancing"),
        ("X 2:0:0:0:0:1 F", ErrorCode::UnknownMac, 3, "not registered for firewall service"),
        ("X 2:0:0:0:0:9", ErrorCode::UnknownMac, 3, "'2:0:0:0:0:9': not registered"),
        ("A 2:0:0:0:0:1 I 2", ErrorCode::UnknownMac, 3, "first with R F 02:00:00:00:00:01 IP"),
        ("A 2:0:0:0:0:9 I 2", ErrorCode::UnknownMac, 3, "write R F 02:00:00:00:00:09 IP first"),
    ] {
        assert_refused(&before, line, (code, column), words);
    }
}

#[test]
fn guests_cannot_fill_the_host() {
    let mut p = policy(&["R F MB 10.0.0.9"]);
    for n in 1..=MAX_RULES {
        p.apply_line(&format!("A {MAC} #{n} I 2")).unwrap();
    }
    let error = p.apply_line(&format!("A {MAC} #{} I 2", MAX_RULES + 1)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Quota);
    p.apply_line(&format!("A {MAC} #1 T 2 d 80")).unwrap();
    p.apply_line(&format!("D {MAC} #1")).unwrap();
    p.apply_line(&format!("A {MAC} #2000 I 2")).unwrap();
    let error = p.apply_line(&format!("D {MAC} I 0")).unwrap_err();
    assert_eq!(error.code, ErrorCode::Quota, "rule 1 would be one more");
}

const POOL: &str = "R L MB 10.0.0.9:80/tcp rr 10.0.0.1 10.0.0.2:8080*3 affinity";

#[test]
fn backends_come_and_go() {
    let mut p = policy(&[POOL]);
    for (line, now) in [
        ("B MB + 10.0.0.3@2:0:0:0:0:3", "10.0.0.1 10.0.0.2:8080*3 10.0.0.3@02:00:00:00:00:03"),
        ("B MB 10.0.0.9:80 + 10.0.0.1*7", "10.0.0.1*7 10.0.0.2:8080*3 10.0.0.3@02:00:00:00:00:03"),
        ("B MB 10.0.0.9:80/tcp - 10.0.0.3:80 10.0.0.1", "10.0.0.2:8080*3"),
    ] {
        p.apply_line(&line.replace("MB", MAC)).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!(printed(&p), [format!("R L MB 10.0.0.9:80/tcp rr {now} affinity")]);
    }
    p.apply_line(&format!("B {MAC} = 10.0.0.2:8080 drain")).unwrap();
    p.apply_line(&format!("B {MAC} + 10.0.0.2:8080")).unwrap();
    assert_eq!(
        printed(&p)[1..],
        ["B MB 10.0.0.9:80/tcp = 10.0.0.2:8080 drain"],
        "a new weight leaves it so"
    );
    p.apply_line(&format!("B {MAC} = 10.0.0.2:8080 up")).unwrap();
    assert_eq!(printed(&p), ["R L MB 10.0.0.9:80/tcp rr 10.0.0.2:8080 affinity"]);
    p.apply_line(&format!("X {MAC} L 10.0.0.9:80/tcp")).unwrap();
    assert_eq!(p, Policy::default());
}

#[test]
fn a_rejected_change_of_backends_changes_nothing() {
    let before = policy(&[
        POOL,
        "R L MB 10.0.0.8 hash 10.0.0.1",
        "R L 2:0:0:0:0:1 10.0.0.7 0 10.0.0.1",
        "R L 2:0:0:0:0:2 10.0.0.7:80 hash 10.0.0.1 10.0.0.2 dsr",
        "R L 2:0:0:0:0:3 10.0.0.7:53/tcp rr 10.0.0.1",
        "R L 2:0:0:0:0:3 10.0.0.7:53/udp rr 10.0.0.1",
    ]);
    for (line, code, column, words) in [
        (
            "B MB + 10.0.0.3",
            ErrorCode::Value,
            3,
            "name one before the sign: 10.0.0.8, 10.0.0.9:80/tcp",
        ),
        ("B MB 10.0.0.7 + 10.0.0.3", ErrorCode::Value, 21, "no service of this middlebox"),
        ("B MB 10.0.0.9:80 - 10.0.0.1 10.0.0.5", ErrorCode::UnknownBackend, 44, "not a backend"),
        ("B MB 10.0.0.9:80 - 10.0.0.1 10.0.0.2:8080", ErrorCode::Value, 44, "the last backend"),
        ("B MB 10.0.0.9:80 = 10.0.0.2 drain", ErrorCode::UnknownBackend, 35, "not a backend"),
        ("B MB 10.0.0.8 - 10.0.0.1:80", ErrorCode::Value, 32, "the registered address has none"),
        ("B 2:0:0:0:0:1 + 10.0.0.3", ErrorCode::Value, 3, "which takes one destination"),
        ("B 2:0:0:0:0:2 + 10.0.0.7", ErrorCode::Value, 17, "own address"),
        ("B 2:0:0:0:0:2 + 10.0.0.3 10.0.0.4:81", ErrorCode::Value, 26, "only the MAC"),
        ("B 2:0:0:0:0:2 + 2001:db8::1", ErrorCode::Value, 17, "not of the family"),
        ("B 2:0:0:0:0:2 - 10.0.0.1:81", ErrorCode::UnknownBackend, 17, "not a backend"),
        ("B 2:0:0:0:0:9 + 10.0.0.3", ErrorCode::UnknownMac, 3, "not registered for load balancing"),
        ("X MB L 10.0.0.7", ErrorCode::Value, 23, "no service of this middlebox; Q shows them"),
        ("X MB L 10.0.0.9:80", ErrorCode::Value, 23, "there is 10.0.0.9:80/tcp"),
        (
            "B 2:0:0:0:0:3 10.0.0.7:53 + 10.0.0.9",
            ErrorCode::Value,
            15,
            "10.0.0.7:53/tcp or 10.0.0.7:53/udp",
        ),
    ] {
        assert_refused(&before, line, (code, column), words);
    }
}

#[test]
fn guests_cannot_have_backends_without_end() {
    let mut p = Policy::default();
    let all = |from: u32, count: u32| -> String {
        (from..from + count).map(|n| format!(" 10.1.{}.{}", n / 256, n % 256)).collect()
    };
    p.apply_line(&format!("R L {MAC} 10.0.0.1 rr{}", all(0, 150))).unwrap();
    p.apply_line(&format!("B {MAC} +{}", all(150, 105))).unwrap();
    let error = p.apply_line(&format!("B {MAC} + 10.2.0.0")).unwrap_err();
    assert_eq!(error.code, ErrorCode::Quota, "{error}");
    p.apply_line(&format!("R L {MAC} 10.0.0.2 rr{}", all(0, 150))).unwrap();
    let error = p.apply_line(&format!("R L {MAC} 10.0.0.3 rr{}", all(0, 150))).unwrap_err();
    assert_eq!(error.code, ErrorCode::Quota, "{error}");
    assert!(error.message.starts_with("'10.1.0.107'"), "the first that is too many: {error}");
    let mut again = Policy::default();
    for (_, command) in p.commands() {
        again.apply_line(&command.to_string()).unwrap();
    }
    assert_eq!(again, p);
}

#[test]
fn removing_values_may_not_leave_a_contradiction() {
    let mut p = policy(&["R F MB 10.0.0.9", "A MB I 3 s 2001:db8::1 d 2001:db8::2"]);
    let error = p.apply_line(&format!("D {MAC} I 3 d")).unwrap_err();
    assert!(error.message.contains("not of one family"), "{error}");
}

proptest::proptest! {
    /// The policy must be restored from its printed form, whatever guests have written.
    #[test]
    fn any_accepted_commands_are_taken_back(
        lines in proptest::collection::vec("(R F|A|D|X|R L) MB( #[1-3])?( [IMT] [0-9]{1,2}| 10.0.0.[1-3]| 2001:db8::[12])( 0 10.0.0.[1-5]| s 10.0.0.1| d 2001:db8::2| d 10.0.0.2| s 2001:db8::1| s 80| d 80| d| s| t 1| p 6){0,4}", 1..24)
    ) {
        let mut p = policy(&["R F MB 10.0.0.9"]);
        for line in lines {
            let _ = p.apply_line(&line.replace("MB", MAC));
        }
        let mut again = Policy::default();
        for (_, command) in p.commands() {
            proptest::prop_assert!(again.apply_line(&command.to_string()).is_ok(), "{}", command);
        }
        proptest::prop_assert_eq!(again, p);
    }
}

#[test]
fn the_printed_policy_makes_the_same_policy() {
    let p = policy(&[
        "R F MB 10.0.0.9",
        "A MB I 15 s 10.0.0.1 t 16 p 6",
        "A MB M 7 s 2:2:2:2:2:2 d p ip",
        "A MB #9 T 3 s 5 d 6",
        "A MB #10 M 0",
        "R L MB 2001:db8::9 1 2001:db8::8 2001:db8::7@2:0:0:0:0:7",
    ]);
    let mut again = Policy::default();
    for (_, command) in p.commands() {
        again.apply_line(&command.to_string()).unwrap();
    }
    assert_eq!(again, p);
}
