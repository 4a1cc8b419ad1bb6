//! The layers of the source: which modules may use which, and no two use each other.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The modules of a crate that a module may not use, with the reason.
const FORBIDDEN: [(&str, &str, &str, &str); 9] = [
    ("rules", "policy", "nft", "the policy is independent of nftables"),
    ("rules", "filter", "nft", "the policy is independent of nftables"),
    ("rules", "service", "nft", "the policy is independent of nftables"),
    ("rules", "slots", "nft", "identifiers are independent of nftables"),
    ("rules", "packet", "policy", "parsing is independent of the policy"),
    ("nfqd", "engine", "packet_path", "the engine decides without I/O"),
    ("nfqd", "engine", "enforce", "the engine decides without I/O"),
    ("nfqd", "packet_path", "command_path", "packets do not wait for commands"),
    ("nfqd", "api", "daemon", "clients share the types of the control protocol"),
];

/// The source of each file of a crate without its tests, by module path: `policy::apply`.
fn modules(package: &str) -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(package).join("src");
    let mut out = BTreeMap::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let relative = path.strip_prefix(&root).unwrap().with_extension("");
            let name = relative.to_str().unwrap().replace('/', "::");
            let name = name.strip_suffix("::mod").unwrap_or(&name).to_string();
            if name == "main" || name == "lib" || name.split("::").any(|part| part == "tests") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            let text =
                text.split("#[cfg(test)]\npub(super) mod tests {").next().unwrap_or_default();
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            out.insert(name, code.collect::<Vec<_>>().join("\n"));
        }
    }
    out
}

/// The paths behind `prefix` in a source, with groups in braces expanded.
fn paths(text: &str, prefix: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (start, _) in text.match_indices(prefix) {
        let is_whole = !text[..start].ends_with(|c: char| c.is_alphanumeric() || "_:".contains(c));
        if !is_whole {
            continue;
        }
        let rest = &text[start + prefix.len()..];
        let is_part = |c: char| c.is_alphanumeric() || "_:".contains(c);
        let path: String = rest.chars().take_while(|c| is_part(*c)).collect();
        match rest[path.len()..].strip_prefix('{') {
            Some(group) => {
                let group = group.split('}').next().unwrap();
                out.extend(group.split(',').map(|item| {
                    let item: String = item.trim().chars().take_while(|c| is_part(*c)).collect();
                    format!("{path}{item}")
                }));
            }
            None => out.push(path),
        }
    }
    out
}

/// The modules that each module uses, by the paths in its source. A folder's own `mod.rs` and the
/// files beside it are one thing to the outside, so a module does not use its parents or children.
fn uses(package: &str) -> BTreeMap<String, BTreeSet<String>> {
    let modules = modules(package);
    let mut out = BTreeMap::new();
    for (name, text) in &modules {
        let mut used = BTreeSet::new();
        let mut add = |parent: &str, path: String| {
            let path = if parent.is_empty() { path } else { format!("{parent}::{path}") };
            let parts: Vec<&str> = path.split("::").collect();
            let prefixes = (1..=parts.len()).rev().map(|count| parts[..count].join("::"));
            used.extend(prefixes.into_iter().find(|path| modules.contains_key(path)));
        };
        for path in paths(text, "crate::") {
            add("", path);
        }
        let (mut parent, mut prefix) = (name.as_str(), "super::".to_string());
        while !parent.is_empty() {
            parent = parent.rsplit_once("::").map_or("", |(parent, _)| parent);
            for path in paths(text, &prefix).into_iter().filter(|path| !path.starts_with("super::"))
            {
                add(parent, path);
            }
            prefix.push_str("super::");
        }
        let is_family = |other: &String| {
            other == name
                || other.starts_with(&format!("{name}::"))
                || name.starts_with(&format!("{other}::"))
        };
        used.retain(|other| !is_family(other));
        out.insert(name.clone(), used);
    }
    out
}

#[test]
fn imports_of_every_form_are_read() {
    let text = "use crate::{api, replay};\nuse super::super::model::Set;\nuse crate::nft::{field::Field, model};";
    assert_eq!(paths(text, "crate::"), ["api", "replay", "nft::field::Field", "nft::model"]);
    assert_eq!(paths(text, "super::super::"), ["model::Set"]);
    let (rules, nfqd) = (uses("rules"), uses("nfqd"));
    assert!(rules["nft::kernel"].contains("nft::model"), "{:?}", rules["nft::kernel"]);
    assert!(rules["policy"].contains("packet"), "{:?}", rules["policy"]);
    assert!(nfqd["cli"].contains("replay"), "{:?}", nfqd["cli"]);
    assert!(nfqd["engine::flows"].iter().all(|used| !used.starts_with("packet_path")));
}

/// The shortest way from one module to another.
fn way(uses: &BTreeMap<String, BTreeSet<String>>, from: &str, to: &str) -> Option<Vec<String>> {
    let mut ways = vec![vec![from.to_string()]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in &uses[way.last().unwrap()] {
                if next == to {
                    return Some([way, vec![next.clone()]].concat());
                }
                if seen.insert(next.clone()) {
                    longer.push([way.clone(), vec![next.clone()]].concat());
                }
            }
        }
        ways = longer;
    }
    None
}

#[test]
fn no_module_uses_itself_through_others() {
    for package in ["shmctl", "rules", "nfqd", "guest", "tests"] {
        let uses = uses(package);
        assert!(uses.values().any(|used| !used.is_empty()) || package == "guest", "{package}");
        for name in uses.keys() {
            assert_eq!(way(&uses, name, name), None, "{package}");
        }
    }
}

#[test]
fn top_modules_use_each_other_one_way() {
    for package in ["shmctl", "rules", "nfqd"] {
        let mut top: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let first = |name: &String| name.split("::").next().unwrap().to_string();
        for (name, used) in uses(package) {
            let entry = top.entry(first(&name)).or_default();
            entry.extend(used.iter().map(first).filter(|other| *other != first(&name)));
        }
        for name in top.keys() {
            assert_eq!(way(&top, name, name), None, "{package}");
        }
    }
}

#[test]
fn modules_keep_to_their_layer() {
    for (package, module, forbidden, reason) in FORBIDDEN {
        let uses = uses(package);
        let inside = |name: &str, of: &str| name == of || name.starts_with(&format!("{of}::"));
        assert!(uses.keys().any(|name| inside(name, module)), "{package} has no {module}");
        for (name, used) in uses.iter().filter(|(name, _)| inside(name, module)) {
            let wrong = used.iter().find(|used| inside(used, forbidden));
            assert_eq!(wrong, None, "{package}: {name}: {reason}");
        }
    }
}
