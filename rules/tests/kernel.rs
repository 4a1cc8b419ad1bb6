//! The ruleset in this machine's kernel: loaded, changed, listed by nft. Needs root; the test makes
//! a network namespace of its own.

#![allow(clippy::unwrap_used)]

use nfqd_rules::nft::build::{Ruleset, build};
use nfqd_rules::nft::delta::Installed;
use nfqd_rules::nft::kernel::{Kernel, KernelError};
use nfqd_rules::nft::model::{Family, Queues, Statement};
use nfqd_rules::nft::options::{FastPath, QueuePath, RulesetOptions};
use nfqd_rules::service::BackendRef;
use nfqd_rules::slots::{BackendObservation, Slots, Unobserved};
use nfqd_rules::{Desired, Policy};
use nfqd_shmctl::MacAddr;
use nix::sched::{CloneFlags, unshare};
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

const QUEUES: Queues = Queues { first: 0, count: 4, bypass: true };

/// Runs a test on a thread with a network namespace of its own.
fn in_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; run as root");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn nft(arguments: &[&str]) -> String {
    let output = Command::new("nft").args(arguments).output().unwrap();
    let (out, errors) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "nft {arguments:?}: {errors}");
    out
}

fn policy(lines: &[&str]) -> Policy {
    Policy::from_lines(lines).unwrap()
}

fn ruleset(policy: &Policy, options: &RulesetOptions) -> Ruleset {
    let mut desired = Desired { policy: policy.clone(), ..Desired::default() };
    desired.slots.sync_all(policy, &Unobserved, Instant::now());
    build(&desired, options)
}

/// The queue paths of this kernel: without either, no test here is worth running.
fn queue_paths(kernel: &mut Kernel) -> Vec<QueuePath> {
    let mut out = Vec::new();
    if kernel.supports(Family::Bridge, &Statement::Queue(QUEUES)).unwrap() {
        out.push(QueuePath::Native);
    }
    if kernel.supports(Family::Ip, &Statement::XtQueue(QUEUES)).unwrap() {
        out.push(QueuePath::BrNetfilter);
    }
    assert!(!out.is_empty(), "this kernel has no queue path");
    out
}

/// Every kind of element and rule.
const RICH: &[&str] = &[
    "R F 2:0:0:0:0:1 10.0.0.1",
    "A 2:0:0:0:0:1 M 5 s 1:2:3:4:5:6 p arp",
    "A 2:0:0:0:0:1 #2 I 9 s 10.0.0.9 p udp",
    "A 2:0:0:0:0:1 #3 I 3 s 2001:db8::1 d 2001:db8::2",
    "A 2:0:0:0:0:1 #3 T 3 s 1 d 2",
    "A 2:0:0:0:0:1 #4 T 2 d 80",
    "A 2:0:0:0:0:1 #5 I 4 t 17",
    "A 2:0:0:0:0:1 #6 I 15 s 10.0.0.9 d t 1 p 6",
    "A 2:0:0:0:0:1 #6 T 3 s 1 d 2",
    "A 2:0:0:0:0:1 #6 M 1 s 2:2:2:2:2:2",
    "A 2:0:0:0:0:1 #7 M 1 s 2:2:2:2:2:2",
    "A 2:0:0:0:0:1 #8 I 8 p icmp",
    "A 2:0:0:0:0:1 #9 I 1 s 10.0.0.0/8",
    "A 2:0:0:0:0:1 #9 T 2 d 80-90",
    "A 2:0:0:0:0:1 #10 U 3 s 53 d 1000-2000",
    "A 2:0:0:0:0:1 #11 M 1 s 2:0:0:0:0:0/ff:ff:ff:0:0:0",
    "A 2:0:0:0:0:1 #12 V 1 s 7",
    "A 2:0:0:0:0:1 #13 V 1 s 100-199",
    "A 2:0:0:0:0:1 #13 I 2 d 2001:db8::/32",
    "A 2:0:0:0:0:1 #14 U 2 d 53",
    "A 2:0:0:0:0:1 #15 I 1 s 10.1.0.0/16",
    "A 2:0:0:0:0:1 #15 T 2 d 80-85",
    "A 2:0:0:0:0:1 #16 I 1 s 11.0.0.0/8",
    "A 2:0:0:0:0:1 #16 T 2 d 80-90",
    "A 2:0:0:0:0:1 #17 I 3 s 2001:db8::-2001:db8::7 d 2001:db8::1",
    "A 2:0:0:0:0:1 #18 M 5 s 2:0:0:0:0:0/ff:ff:ff:0:0:0 p arp",
    "A 2:0:0:0:0:1 #19 M 1 s 2:0:0:0:0:0/ff:00:ff:0:0:0",
    "A 2:0:0:0:0:1 #20 C 3 t 3 c 3",
    "A 2:0:0:0:0:1 #21 C 1 t 8",
    "A 2:0:0:0:0:1 #22 C 1 t 13-18",
    "A 2:0:0:0:0:1 #23 N 1 t 135",
    "A 2:0:0:0:0:1 #24 N 3 t 1 c 3-4",
    "A 2:0:0:0:0:1 #25 F 1 f syn/syn,ack",
    "A 2:0:0:0:0:1 #26 F 1 f none",
    "A 2:0:0:0:0:1 #32 F 1 f none/fin,rst",
    "A 2:0:0:0:0:1 #33 F 1 f syn,ack",
    "A 2:0:0:0:0:1 #34 F 1 f ack",
    "A 2:0:0:0:0:1 #35 F 1 f all",
    "A 2:0:0:0:0:1 #36 F 1 f fin,ece/all",
    "A 2:0:0:0:0:1 #27 P 1 l 0-99",
    "A 2:0:0:0:0:1 #28 P 3 l 1000 f whole",
    "A 2:0:0:0:0:1 #29 P 2 f first",
    "A 2:0:0:0:0:1 #30 P 2 f later",
    "A 2:0:0:0:0:1 #31 P 2 f piece",
    "A 2:0:0:0:0:1 #31 I 1 s 2001:db8::1",
    "A 2:0:0:0:0:1 +1 I 1 s 10.9.9.9",
    "A 2:0:0:0:0:1 +2 T 2 d 443",
    "A 2:0:0:0:0:1 +3 U 2 d 1-3",
    "R F 2:0:0:0:0:5 10.0.0.5 deny",
    "A 2:0:0:0:0:5 +1 T 2 d 443",
    "R F 2:0:0:0:0:6 10.0.0.6 deny",
    "R F 2:0:0:0:0:7 10.0.0.7 deny",
    "A 2:0:0:0:0:7 #1 T 2 d 443",
    "R F 2:0:0:0:0:4 10.0.0.4",
    "A 2:0:0:0:0:4 M 1 s 2:2:2:2:2:2",
    "A 2:0:0:0:0:4 #2 I 8 p icmp",
    "A 2:0:0:0:0:4 #3 M 5 s 2:2:2:2:2:2 p arp",
    "A 2:0:0:0:0:4 #4 T 2 d 80",
    "R L 2:0:0:0:0:2 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3",
    "R L 2:0:0:0:0:2 10.0.0.4 1 10.0.0.7 10.0.0.5@2:0:0:0:0:5",
    "R L 2:0:0:0:0:2 2001:db8::2 0 2001:db8::3@2:0:0:0:0:3",
    "R L 2:0:0:0:0:1 10.0.0.11 0 10.0.0.12",
    "R L 2:0:0:0:0:4 10.0.0.4:80 rr 10.0.0.40:8080@2:0:0:0:0:40*2 10.0.0.41@2:0:0:0:0:41",
    "R L 2:0:0:0:0:4 [2001:db8::4]:53/udp hash [2001:db8::40]:5353@2:0:0:0:0:40",
    "R L 2:0:0:0:0:4 10.0.0.4 least 10.0.0.42@2:0:0:0:0:42 dsr",
    "R L 2:0:0:0:0:4 10.0.0.4:81/tcp 0 10.0.0.40:82@2:0:0:0:0:40",
];

/// The lines of a listing in one spelling: without counts, without what nft leaves out because a
/// later field implies it, and with every port as `th`.
fn normal(listing: &str) -> Vec<String> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut out: Vec<&str> = Vec::new();
        let mut at = 0;
        while let Some(&word) = words.get(at) {
            let next = |n: usize| words.get(at + n).copied().unwrap_or_default();
            let port = matches!(next(1), "sport" | "dport");
            match word {
                "meta" if next(1) == "protocol" && matches!(next(2), "ip" | "ip6" | "arp") => {
                    at += 2;
                }
                "meta"
                    if next(1) == "l4proto"
                        && matches!(next(2), "tcp" | "udp" | "icmp" | "ipv6-icmp") =>
                {
                    at += 2;
                }
                // Of the two kinds of VLAN tag nft shows the usual one never, the other one
                // sometimes.
                "ether" if next(1) == "type" && matches!(next(2), "8021q" | "8021ad") => at += 2,
                "packets" | "bytes" if next(1).parse::<u64>().is_ok() => at += 1,
                "tcp" | "udp" if port => out.push("th"),
                _ => out.push(word),
            }
            at += 1;
        }
        out.join(" ")
    };
    listing.lines().map(line).collect()
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn the_printed_ruleset_equals_the_kernels() {
    in_netns(|| {
        let mut kernel = Kernel::open().unwrap();
        let (policy, queue_paths) = (policy(RICH), queue_paths(&mut kernel));
        for queue_path in queue_paths {
            for fast_path in [FastPath::Full, FastPath::Off] {
                let options = RulesetOptions { queue_path, fast_path, queues: QUEUES };
                let wanted = ruleset(&policy, &options);
                kernel.load(&wanted).unwrap();
                let listed = normal(&nft(&["list", "table", "bridge", "nfqd"]));
                // Chains and rules come out in nft's order; each line of ours must be there.
                for (name, chain) in &wanted[&Family::Bridge].chains {
                    assert!(listed.contains(&format!("chain {name} {{")), "{name}");
                    for rule in &chain.rules {
                        let line = normal(&rule.to_string()).remove(0);
                        assert!(listed.contains(&line), "{name}: {line}\n{}", listed.join("\n"));
                    }
                }
                // A name that is a word of nft's language cannot be asked for.
                for name in wanted[&Family::Bridge].chains.keys() {
                    nft(&["list", "chain", "bridge", "nfqd", name]);
                }
                for (name, set) in &wanted[&Family::Bridge].sets {
                    nft(&[
                        "list",
                        if set.data.is_some() { "map" } else { "set" },
                        "bridge",
                        "nfqd",
                        name,
                    ]);
                    assert!(listed.iter().any(|l| l.ends_with(&format!(" {name} {{"))), "{name}");
                }
            }
        }
    });
}

/// Chains with their rules in order, sets with their elements in any.
fn objects(listing: &str) -> BTreeMap<String, Vec<String>> {
    let mut out: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut name = String::new();
    for line in normal(listing) {
        let begins = ["chain ", "set ", "map "].iter().any(|kind| line.starts_with(kind));
        if begins && line.ends_with(" {") {
            name = line;
            out.insert(name.clone(), Vec::new());
        } else if let Some(lines) = out.get_mut(&name) {
            let element =
                line.trim_start_matches("elements = { ").trim_end_matches([',', '}', ' ']);
            lines.push(element.to_string());
        }
    }
    for (_, lines) in out.iter_mut().filter(|(name, _)| !name.starts_with("chain ")) {
        lines.sort();
    }
    out
}

fn listed() -> BTreeMap<String, Vec<String>> {
    objects(&nft(&["list", "table", "bridge", "nfqd"]))
}

/// Makes one policy after the other hold by changes, and compares with a load whenever `check` says
/// so.
fn follow(
    kernel: &mut Kernel,
    options: &RulesetOptions,
    policies: impl Iterator<Item = Policy>,
    check: impl Fn(usize) -> bool,
) {
    let mut state = Desired::default();
    let (mut installed, empty) = Installed::new(&state, options);
    kernel.load(&empty).unwrap();
    for (step, policy) in policies.enumerate() {
        let mut new = Desired { policy, ..state.clone() };
        // A backend whose MAC no command says is found in every other step.
        let mac = (step % 2 == 0).then_some(MacAddr([2, 0, 0, 0, 0, 0x99]));
        let view = |_: &BackendRef<'_>| BackendObservation { mac, ..BackendObservation::UNKNOWN };
        new.slots.sync_all(&new.policy, &view, Instant::now());
        let change = installed.change(&state, &new);
        kernel.change(&change, &state).unwrap_or_else(|(error, _)| panic!("{step}: {error}"));
        kernel.finish(&change).unwrap();
        installed.done(change);
        if check(step) {
            kernel.remove_retired(Duration::ZERO).unwrap();
            let (by_change, ruleset) = (listed(), build(&new, options));
            assert!(kernel.is_intact(&ruleset).unwrap());
            kernel.load(&ruleset).unwrap();
            assert_eq!(by_change, listed(), "{step}");
        }
        state = new;
    }
    assert!(kernel.remove().unwrap());
    assert!(!kernel.remove().unwrap());
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_change_makes_what_a_load_makes() {
    in_netns(|| {
        let mut kernel = Kernel::open().unwrap();
        for queue_path in queue_paths(&mut kernel) {
            let options = RulesetOptions { queue_path, fast_path: FastPath::Full, queues: QUEUES };
            let ends = (0..=RICH.len()).chain((0..RICH.len()).rev());
            // In user-mode Linux, nft takes a second for a listing.
            let every = if queue_path == QueuePath::Native { 5 } else { 1 };
            follow(&mut kernel, &options, ends.map(|end| policy(&RICH[..end])), |step| {
                step % every == 0
            });
        }
    });
}

/// Whole configurations, each of any of the commands, so that a change goes through all its steps.
#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn any_change_makes_what_a_load_makes() {
    in_netns(|| {
        let mut kernel = Kernel::open().unwrap();
        let mut random = 7_u64;
        let mut next = move || {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            random >> 33
        };
        let mut any = move |_| {
            let mut policy = Policy::default();
            for line in RICH {
                let line = if next().is_multiple_of(5) {
                    line.replace('#', "+")
                } else {
                    line.to_string()
                };
                if !next().is_multiple_of(3) {
                    // A command that depends on an omitted one is rejected.
                    let _ = policy.apply_line(&line);
                }
            }
            policy
        };
        for queue_path in queue_paths(&mut kernel) {
            for fast_path in [FastPath::Full, FastPath::Off] {
                let options = RulesetOptions { queue_path, fast_path, queues: QUEUES };
                follow(&mut kernel, &options, (0..60).map(&mut any), |step| step % 4 == 0);
            }
        }
    });
}

#[test]
#[ignore = "needs root: tests/run.sh netns"]
fn a_restart_finds_its_slots_and_a_foreign_table_is_left_alone() {
    in_netns(|| {
        let mut kernel = Kernel::open().unwrap();
        let queue_path = queue_paths(&mut kernel)[0];
        let options = RulesetOptions { queue_path, fast_path: FastPath::Full, queues: QUEUES };
        let policy = policy(RICH);
        let mut slots = Slots::default();
        // Something else had the first numbers.
        slots.sync_all(
            &self::policy(&["R L 2:0:0:0:0:9 10.0.0.2 0 10.0.0.3@2:0:0:0:0:3"]),
            &Unobserved,
            Instant::now(),
        );
        slots.sync_all(&policy, &Unobserved, Instant::now());
        let desired =
            Desired { policy: policy.clone(), slots: slots.clone(), ..Desired::default() };
        kernel.load(&build(&desired, &options)).unwrap();
        let recovered = Kernel::open().unwrap().recover().unwrap();
        assert_eq!(recovered.macs.len(), 8, "the MACs of backends, by service");
        let mut found = recovered.slots;
        found.sync_all(&policy, &Unobserved, Instant::now());
        let indexes =
            |slots: &Slots| slots.iter().map(|(key, slot)| (key, slot.id)).collect::<Vec<_>>();
        assert_eq!(indexes(&found), indexes(&slots));
        if queue_path == QueuePath::BrNetfilter {
            // If the kernel filters, the engine must know the middleboxes that balance.
            let numbers = |slots: &Slots| slots.middlebox_id("2:0:0:0:0:2".parse().unwrap());
            assert_eq!(numbers(&found), numbers(&slots));
        }

        assert!(kernel.remove().unwrap());
        nft(&["add", "table", "bridge", "nfqd"]);
        let error = kernel.load(&ruleset(&policy, &options)).unwrap_err();
        assert!(matches!(error, KernelError::Foreign { family: Family::Bridge }), "{error}");
        assert!(error.to_string().contains("nft delete table bridge nfqd"), "{error}");
        assert!(kernel.remove().is_err());
        assert_eq!(nft(&["list", "table", "bridge", "nfqd"]), "table bridge nfqd {\n}\n");
        nft(&["delete", "table", "bridge", "nfqd"]);

        // The table of a newer nfqd is not taken over, but may be removed.
        let newer =
            "{ comment \"made by nfqd 9.0.0 (layout 5), which repairs what others change\"; }";
        nft(&["add", "table", "bridge", "nfqd", newer]);
        let error = kernel.load(&ruleset(&policy, &options)).unwrap_err();
        assert!(matches!(error, KernelError::Newer { layout: 5, .. }), "{error}");
        assert!(kernel.recover().is_err() && kernel.remove().unwrap());
        let older = "{ comment \"made by nfqd, which repairs what others change here\"; }";
        nft(&["add", "table", "bridge", "nfqd", older]);
        kernel.load(&ruleset(&policy, &options)).unwrap();
        // The comment is still the old one; a chain that loading has made tells the layout.
        assert!(nft(&["list", "table", "bridge", "nfqd"]).contains("chain layout_4 {"));
        nft(&["add", "chain", "bridge", "nfqd", "layout_5"]);
        let error = kernel.load(&ruleset(&policy, &options)).unwrap_err();
        assert!(matches!(error, KernelError::Newer { layout: 5, .. }), "{error}");
        assert!(kernel.remove().unwrap());
    });
}
