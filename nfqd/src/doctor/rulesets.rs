//! The base chains of other programs, as `nft list ruleset` prints them.

/// A base chain of another program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hook {
    /// The family: ip, ip6, inet, bridge and so on.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The hook.
    pub hook: String,
    /// Whether its policy is to drop.
    pub drops_by_policy: bool,
    /// Whether a rule of it accepts what is bridged: from and to the same bridge.
    pub accepts_bridged: bool,
    /// Whether a rule of it sets the mark.
    pub sets_mark: bool,
}

/// Returns the base chains of other programs in the families that bridged packets may pass.
pub fn foreign_hooks(ruleset: &str) -> Vec<Hook> {
    let mut out: Vec<Hook> = Vec::new();
    let (mut family, mut table, mut chain) = (String::new(), String::new(), String::new());
    let mut is_in_base = false;
    for line in ruleset.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["table", its_family, its_table, "{"] => {
                (family, table) = (its_family.to_string(), its_table.to_string());
            }
            ["chain", name, "{"] => {
                chain = name.to_string();
                is_in_base = false;
            }
            ["type", _, "hook", hook, ..] => {
                let is_ours = table == "nfqd";
                let is_on_the_way = matches!(family.as_str(), "ip" | "ip6" | "inet" | "bridge");
                is_in_base = !is_ours && is_on_the_way;
                if is_in_base {
                    out.push(Hook {
                        family: family.clone(),
                        table: table.clone(),
                        chain: chain.clone(),
                        hook: hook.to_string(),
                        drops_by_policy: line.contains("policy drop"),
                        accepts_bridged: false,
                        sets_mark: false,
                    });
                }
            }
            [] | ["}"] => {}
            _ if is_in_base => {
                if let Some(hook) = out.last_mut() {
                    hook.accepts_bridged |= accepts_bridged(&words);
                    hook.sets_mark |= line.contains("meta mark set");
                }
            }
            _ => {}
        }
    }
    out
}

/// Whether a rule accepts packets from and to one bridge, or all that enter by it.
fn accepts_bridged(words: &[&str]) -> bool {
    let value = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1).copied()
    };
    let same = value("iifname").is_some() && value("iifname") == value("oifname");
    let by_bridge = value("ibrname").is_some();
    words.contains(&"accept") && (same || by_bridge)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULESET: &str = "\
table bridge nfqd {
    chain steer {
        type filter hook prerouting priority dstnat; policy accept;
        meta mark set 0x00000001
    }
}
table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy drop;
        ct state { established, related } accept
    }
    chain helper {
        meta mark set 0x00000001
    }
}
table ip filter {
    chain FORWARD {
        type filter hook forward priority filter; policy drop;
        iifname \"br0\" oifname \"br0\" counter packets 0 bytes 0 accept
    }
}
table ip mangle {
    chain PREROUTING {
        type filter hook prerouting priority mangle; policy accept;
        meta mark set ct mark
    }
}
";

    #[test]
    fn base_chains_of_others_are_found_with_what_they_do() {
        let found = foreign_hooks(RULESET);
        let all: Vec<(&str, bool, bool, bool)> = found
            .iter()
            .map(|one| {
                (one.chain.as_str(), one.drops_by_policy, one.accepts_bridged, one.sets_mark)
            })
            .collect();
        assert_eq!(
            all,
            [
                ("filter_FORWARD", true, false, false),
                ("FORWARD", true, true, false),
                ("PREROUTING", false, false, true)
            ]
        );
    }
}
