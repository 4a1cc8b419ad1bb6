//! Commands in words for people, which become commands of the language.

mod conditions;

use clap::{Args, Subcommand};
use conditions::fields;
use nfqd_shmctl::{Command, MacAddr};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// The commands in words.
#[derive(Subcommand, Clone, Debug)]
pub(crate) enum Words {
    /// Register this VM, so that its traffic can be filtered
    ///
    /// A registration that is there already is replaced, and its rules are removed.
    Register {
        /// The address of the VM
        ip: String,
        /// Drop what no rule allows
        #[arg(long)]
        deny: bool,
        #[command(flatten)]
        middlebox: Middlebox,
    },
    /// Drop packets that match all of the conditions
    Deny(Rule),
    /// Let packets through that match all of the conditions, before any rule that drops
    Allow(Rule),
    /// Undo a rule, the filters, the balancing, or everything
    Undo {
        /// The registration to undo: a rule, like '#2' or '+1'; filters; balance; or all
        #[arg(value_name = "RULE|filters|balance|all")]
        what: String,
        /// The frontend of the service, with balance
        frontend: Option<String>,
        #[command(flatten)]
        middlebox: Middlebox,
    },
    /// Balance what comes to an address, or a port of it, over backends
    ///
    /// Options are those of the command language, like check=tcp or affinity.
    Balance {
        /// The address, or a port of it, like 10.129.126.15:80 or 10.129.126.15:53/udp
        frontend: String,
        /// static, rr, hash or least
        method: String,
        /// The backends, like 10.129.126.17:8080*3, and options behind them
        #[arg(required = true, value_name = "BACKEND|OPTION")]
        backends: Vec<String>,
        #[command(flatten)]
        middlebox: Middlebox,
    },
    /// Change the backends of a service
    Backend {
        /// The change
        change: Change,
        /// The backends, behind the frontend of the service if there are several services
        #[arg(required = true, value_name = "[FRONTEND] BACKEND")]
        backends: Vec<String>,
        /// The frontend of the service, if the middlebox has several
        #[arg(long)]
        service: Option<String>,
        /// The seconds after which a draining backend loses its flows
        #[arg(long, value_name = "SECONDS")]
        within: Option<u32>,
        #[command(flatten)]
        middlebox: Middlebox,
    },
    /// Show what is registered, with counters
    Status {
        #[command(flatten)]
        middlebox: Middlebox,
        /// Show all middleboxes that this VM may speak for
        #[arg(long)]
        all: bool,
    },
    /// Show the status repeatedly
    Watch {
        #[command(flatten)]
        middlebox: Middlebox,
        /// Seconds between two queries
        #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = crate::seconds)]
        interval: std::time::Duration,
    },
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// A command of the language, like R F 12:13:14:15:16:17 10.129.126.15
    #[command(external_subcommand)]
    Command(Vec<String>),
}

/// The middlebox that a command is about.
#[derive(Args, Clone, Debug)]
pub(crate) struct Middlebox {
    /// The MAC of the middlebox [default: that of this VM's only network interface]
    #[arg(long)]
    mac: Option<MacAddr>,
}

/// A rule in words.
#[derive(Args, Clone, Debug)]
pub(crate) struct Rule {
    /// The number of a rule, which these conditions are added to [default: a new rule]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rule: Option<u16>,
    #[command(flatten)]
    middlebox: Middlebox,
    /// The conditions, like: from 10.0.0.0/8 tcp to-port 80
    #[arg(required = true, value_name = "CONDITION")]
    conditions: Vec<String>,
}

/// A change of backends.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    /// Add them, or change their MAC and weight
    Add,
    /// Remove them
    Remove,
    /// Give them no new flows
    Drain,
    /// Give them new flows again
    Up,
}

/// The reason words do not become commands.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WordsError {
    /// The conditions of a rule.
    #[error(transparent)]
    Conditions(#[from] conditions::ConditionError),
    /// An invalid target of `undo`.
    #[error("'{0}' cannot be undone; write a rule like '#2' or '+1', filters, balance or all")]
    Undo(String),
    /// An argument that the command does not have.
    #[error("'{0}' is not expected here; only 'undo balance' takes a frontend")]
    Extra(String),
    /// An end of a drain for another change.
    #[error("--within is the end of a drain; write it with 'backend drain'")]
    Within,
    /// The host's reply does not show all rules.
    #[error("there are too many rules to find a free number; name one with --rule N")]
    TooManyToTell,
    /// The host has not said which rules there are.
    #[error("{0}")]
    Query(String),
    /// This VM has no network interface, or several.
    #[error("{0}; name the middlebox with --mac")]
    Interfaces(String),
    /// The command that the words make is not valid.
    #[error("{0}")]
    Command(String),
}

impl Middlebox {
    fn mac(&self) -> Result<MacAddr, WordsError> {
        match self.mac {
            Some(mac) => Ok(mac),
            None => own_mac(&PathBuf::from("/sys/class/net")),
        }
    }
}

/// Returns the MAC of the only network interface that is a device.
fn own_mac(interfaces: &std::path::Path) -> Result<MacAddr, WordsError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(interfaces).into_iter().flatten().flatten() {
        let path = entry.path();
        let address = std::fs::read_to_string(path.join("address")).unwrap_or_default();
        if path.join("device").exists()
            && let Ok(mac) = address.trim().parse::<MacAddr>()
        {
            found.push((entry.file_name().to_string_lossy().into_owned(), mac));
        }
    }
    match found.as_slice() {
        [(_, mac)] => Ok(*mac),
        [] => Err(WordsError::Interfaces("this VM has no network interface".to_string())),
        several => {
            let names: Vec<String> =
                several.iter().map(|(name, mac)| format!("{name} {mac}")).collect();
            let text = format!("this VM has several network interfaces: {}", names.join(", "));
            Err(WordsError::Interfaces(text))
        }
    }
}

impl Words {
    /// Returns the commands of the language, which belong together. `ask` returns the reply to a query,
    /// by which the number of a new rule is found.
    ///
    /// # Errors
    /// See [`WordsError`].
    pub(crate) fn commands(
        &self,
        ask: impl Fn(&str) -> Result<String, WordsError>,
    ) -> Result<Vec<String>, WordsError> {
        let commands = match self {
            Words::Register { ip, deny, middlebox } => {
                let default = if *deny { " deny" } else { "" };
                vec![format!("R F {} {ip}{default}", middlebox.mac()?)]
            }
            Words::Deny(rule) => rule.commands('#', ask)?,
            Words::Allow(rule) => rule.commands('+', ask)?,
            Words::Undo { what, frontend, middlebox } => {
                vec![undo(what, frontend.as_deref(), middlebox.mac()?)?]
            }
            Words::Balance { frontend, method, backends, middlebox } => {
                let mac = middlebox.mac()?;
                vec![format!("R L {mac} {frontend} {method} {}", backends.join(" "))]
            }
            Words::Backend { change, backends, service, within, middlebox } => {
                if within.is_some() && *change != Change::Drain {
                    return Err(WordsError::Within);
                }
                let (sign, end) = match change {
                    Change::Add => ("+", String::new()),
                    Change::Remove => ("-", String::new()),
                    Change::Up => ("=", " up".to_string()),
                    Change::Drain => (
                        "=",
                        within.map_or(" drain".to_string(), |within| format!(" drain={within}")),
                    ),
                };
                let mac = middlebox.mac()?;
                let service = service.as_ref().map(|service| format!("{service} "));
                let service = service.unwrap_or_default();
                vec![format!("B {mac} {service}{sign} {}{end}", backends.join(" "))]
            }
            Words::Status { all: true, .. } => vec!["Q".to_string()],
            Words::Status { middlebox, .. } | Words::Watch { middlebox, .. } => {
                vec![format!("Q {}", middlebox.mac()?)]
            }
            Words::Completions { .. } => Vec::new(),
            // The host says what is wrong with it.
            Words::Command(words) => return Ok(vec![words.join(" ")]),
        };
        // Nothing is sent if a part is not valid.
        for command in &commands {
            Command::parse(command).map_err(|error| WordsError::Command(error.message))?;
        }
        Ok(commands)
    }
}

impl Rule {
    fn commands(
        &self,
        sign: char,
        ask: impl Fn(&str) -> Result<String, WordsError>,
    ) -> Result<Vec<String>, WordsError> {
        let mac = self.middlebox.mac()?;
        let fields = fields(&self.conditions)?;
        let number = match self.rule {
            Some(number) => number,
            None => next_rule(sign, &ask(&format!("Q {mac}"))?).ok_or(WordsError::TooManyToTell)?,
        };
        Ok(fields.iter().map(|fields| format!("A {mac} {sign}{number} {fields}")).collect())
    }
}

/// Returns the command that removes the rule that a command adds to.
pub(crate) fn removal_of(command: &str) -> Option<String> {
    match Command::parse(command).ok()? {
        Command::Add { mac, rule, .. } => Some(format!("D {mac} {rule}")),
        _ => None,
    }
}

/// Returns the first number that no rule of a kind has in the reply to a query; `None` if the reply does
/// not show all rules.
fn next_rule(sign: char, reply: &str) -> Option<u16> {
    if reply.ends_with("and more, ask for one middlebox") {
        return None;
    }
    let names = reply.split("; ").filter_map(|part| part.split_once(" packets "));
    let numbers = names.filter_map(|(name, _)| name.strip_prefix(sign)?.parse::<u16>().ok());
    let numbers: BTreeSet<u16> = numbers.collect();
    (1..=u16::MAX).find(|number| !numbers.contains(number))
}

fn undo(what: &str, frontend: Option<&str>, mac: MacAddr) -> Result<String, WordsError> {
    if let Some(frontend) = frontend.filter(|_| what != "balance") {
        return Err(WordsError::Extra(frontend.to_string()));
    }
    match what {
        "filters" => Ok(format!("X {mac} F")),
        "balance" => Ok(format!("X {mac} L {}", frontend.unwrap_or_default()).trim().to_string()),
        "all" => Ok(format!("X {mac}")),
        rule if rule.starts_with(['#', '+']) => Ok(format!("D {mac} {rule}")),
        other => Err(WordsError::Undo(other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        words: Words,
    }

    fn commands(line: &str) -> Result<Vec<String>, String> {
        let words = std::iter::once("nfqd-guest").chain(line.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        let rules = "02:00:00:00:00:09 packets 0 bytes 0; #1 packets 1 bytes 2; #2 packets 1 \
             bytes 2; #65535 packets 0 bytes 0; +1 packets 0 bytes 0";
        line.words.commands(|_| Ok(rules.to_string())).map_err(|error| error.to_string())
    }

    #[test]
    fn words_become_commands() {
        for (words, expected) in [
            ("register 10.0.0.9", "R F MB 10.0.0.9"),
            ("register 10.0.0.9 --deny", "R F MB 10.0.0.9 deny"),
            ("deny from 10.1.0.0/16", "A MB #3 I 1 s 10.1.0.0/16"),
            ("allow from 10.1.0.0/16", "A MB +2 I 1 s 10.1.0.0/16"),
            ("allow --rule 7 tcp to-port 22", "A MB +7 T 2 d 22"),
            (
                "deny --rule 2 from 10.1.0.0/16 udp to-port 53",
                "A MB #2 I 1 s 10.1.0.0/16; A MB #2 U 2 d 53",
            ),
            ("undo #2", "D MB #2"),
            ("undo +7", "D MB +7"),
            ("undo filters", "X MB F"),
            ("undo balance", "X MB L"),
            ("undo balance 10.0.0.9:80", "X MB L 10.0.0.9:80"),
            ("undo all", "X MB"),
            (
                "balance 10.0.0.9:80 least 10.0.0.3 10.0.0.4*2 check=tcp",
                "R L MB 10.0.0.9:80 least 10.0.0.3 10.0.0.4*2 check=tcp",
            ),
            ("backend add 10.0.0.5", "B MB + 10.0.0.5"),
            ("backend remove 10.0.0.5 --service 10.0.0.9:80", "B MB 10.0.0.9:80 - 10.0.0.5"),
            ("backend drain 10.0.0.5 --within 30", "B MB = 10.0.0.5 drain=30"),
            ("backend up 10.0.0.5", "B MB = 10.0.0.5 up"),
            ("status", "Q MB"),
        ] {
            let found = commands(&format!("{words} --mac 2:0:0:0:0:9")).unwrap();
            assert_eq!(found.join("; ").replace("02:00:00:00:00:09", "MB"), expected, "{words}");
        }
        assert_eq!(commands("status --all").unwrap(), ["Q"]);
        assert_eq!(commands("b 2:0:0:0:0:9 - 10.0.0.5").unwrap(), ["b 2:0:0:0:0:9 - 10.0.0.5"]);
    }

    #[test]
    fn wrong_words_send_nothing() {
        for (words, expected) in [
            ("deny from 10.0.0.300", "not an IP address, prefix or range"),
            ("undo everything", "cannot be undone"),
            ("undo all 10.0.0.9", "only 'undo balance'"),
            ("backend up 10.0.0.5 --within 3", "--within is the end of a drain"),
            ("balance 10.0.0.9:80 fastest 10.0.0.3", "not a balancing method"),
        ] {
            let error = commands(&format!("{words} --mac 2:0:0:0:0:9")).unwrap_err();
            assert!(error.contains(expected), "{words}: {error}");
        }
    }

    #[test]
    fn the_only_interface_that_is_a_device_is_this_vms() {
        let dir = tempfile::tempdir().unwrap();
        let add = |name: &str, mac: &str, is_device: bool| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.join(if is_device { "device" } else { "other" })).unwrap();
            std::fs::write(path.join("address"), format!("{mac}\n")).unwrap();
        };
        add("lo", "00:00:00:00:00:00", false);
        assert!(own_mac(dir.path()).unwrap_err().to_string().contains("no network interface"));
        add("eth0", "12:13:14:15:16:17", true);
        assert_eq!(own_mac(dir.path()).unwrap().to_string(), "12:13:14:15:16:17");
        add("eth1", "12:13:14:15:16:18", true);
        let error = own_mac(dir.path()).unwrap_err().to_string();
        assert!(error.contains("eth1 12:13:14:15:16:18"), "{error}");
    }
}
