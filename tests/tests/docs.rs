//! The documentation: the files that it names exist, its links lead somewhere, and the walks of
//! docs/ARCHITECTURE.md are six files each.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

/// The pages of the documentation, with their text.
fn pages() -> Vec<(PathBuf, String)> {
    let mut out = Vec::new();
    for folder in [".", "docs", "docs/decisions"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(&path).unwrap();
                out.push((path, text));
            }
        }
    }
    assert!(out.len() >= 15, "{} pages", out.len());
    out
}

#[test]
fn files_that_the_documentation_names_exist() {
    for (page, text) in pages() {
        assert!(!text.contains("@@"), "{}: a placeholder", page.display());
        // The changelog names files that are gone.
        if page.ends_with("CHANGELOG.md") {
            continue;
        }
        for word in text.split('`').skip(1).step_by(2) {
            let is_path = word.contains('/')
                && !word.starts_with('/')
                && word.split('/').next().is_some_and(|first| root().join(first).is_dir())
                && word.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c));
            if is_path {
                assert!(root().join(word).exists(), "{}: {word}", page.display());
            }
        }
    }
}

/// Commands of a page, in backquotes or behind spaces, parse; `{mac}` stands for any MAC.
#[test]
fn commands_of_the_page_for_newcomers_are_valid() {
    let text = fs::read_to_string(root().join("docs/COMING-FROM.md")).unwrap();
    let is_command = |word: &&str| {
        let mut words = word.split(' ');
        let is_name =
            words.next().is_some_and(|name| ["R", "B", "A", "X", "D", "Q"].contains(&name));
        is_name && word.contains("{mac}") && !word.contains('…')
    };
    let commands: Vec<&str> = text.split('`').skip(1).step_by(2).filter(is_command).collect();
    assert!(commands.len() >= 12, "{commands:?}");
    for command in commands {
        let line = command.replace("{mac}", "12:13:14:15:16:17");
        let parsed = nfqd_shmctl::Command::parse(&line);
        assert!(parsed.is_ok(), "{command}: {parsed:?}");
    }
}

/// Every first word of a problem is explained.
#[test]
fn every_problem_of_the_status_is_in_the_page_on_troubleshooting() {
    let source = fs::read_to_string(root().join("nfqd/src/api/problems.rs")).unwrap();
    let page = fs::read_to_string(root().join("docs/TROUBLESHOOTING.md")).unwrap();
    let is_headline =
        |word: &&str| word.len() > 3 && word.chars().all(|c| c.is_ascii_uppercase() || c == ' ');
    let words: Vec<&str> = source.split('"').skip(1).step_by(2).filter(is_headline).collect();
    assert!(words.len() >= 14, "{words:?}");
    for word in words {
        assert!(page.contains(&format!("`{word}`")), "{word}");
    }
}

/// The anchors of a page's headings, as they are made from their text.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let slug = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

#[test]
fn links_lead_to_files_and_headings() {
    let mut links = 0;
    for (page, text) in pages() {
        for rest in text.split("](").skip(1) {
            let link = rest.split(')').next().unwrap();
            if link.starts_with("http") {
                continue;
            }
            links += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link}", page.display());
            if !anchor.is_empty() {
                let target = fs::read_to_string(&target).unwrap();
                let found = anchors(&target).contains(&anchor.to_string());
                assert!(found, "{}: {link}", page.display());
            }
        }
    }
    assert!(links > 30, "{links} links");
}

#[test]
fn the_readme_is_short() {
    let lines = fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(lines <= 150, "{lines} lines");
}

#[test]
fn each_walk_of_the_architecture_is_six_files_that_open_with_their_subject() {
    let text = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    for heading in ["## The path of a packet", "## The path of a command"] {
        let section = text.split(heading).nth(1).unwrap().split("\n## ").next().unwrap();
        let steps: Vec<&str> =
            section.lines().filter(|line| line.starts_with("| ") && line.contains(".rs")).collect();
        assert_eq!(steps.len(), 6, "{heading}");
        for (number, step) in steps.iter().enumerate() {
            let cells: Vec<&str> = step.split('|').map(str::trim).collect();
            assert_eq!(cells[1], (number + 1).to_string(), "{step}");
            let file = root().join(cells[2].trim_matches('`'));
            let source = fs::read_to_string(&file).unwrap();
            assert!(source.starts_with("//! "), "{}", file.display());
        }
    }
}

#[test]
fn alerts_and_the_board_use_metrics_and_labels_that_exist() {
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    let metrics = read("docs/METRICS.md");
    let cell =
        |line: &str, at: usize| line.split('|').nth(at).unwrap_or_default().trim().to_string();
    let rows: Vec<&str> = metrics.lines().filter(|line| line.starts_with("| `nfqd_")).collect();
    let known: Vec<String> = rows.iter().map(|row| cell(row, 1)).collect();
    let labels: String = rows.iter().map(|row| cell(row, 3)).collect();
    let words = |text: &str| -> Vec<String> {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        text.split(|c| !is_word(c)).map(str::to_string).collect()
    };
    let (alerts, board) = (read("packaging/alerts.yml"), read("packaging/grafana.json"));
    for (name, text, least) in [("alerts.yml", &alerts, 5), ("grafana.json", &board, 12)] {
        let used: Vec<String> =
            words(text).into_iter().filter(|word| word.starts_with("nfqd_")).collect();
        assert!(used.len() >= least, "{name}: {used:?}");
        for metric in used {
            assert!(known.contains(&format!("`{metric}`")), "{name}: {metric}");
        }
    }
    // The legends of the board, and what sums are made by.
    let shown: Vec<&str> =
        board.split("{{").skip(1).filter_map(|rest| rest.split("}}").next()).collect();
    let sums = board.split("by (").skip(1).filter_map(|rest| rest.split(')').next());
    let by = sums.flat_map(|list| list.split(", "));
    assert!(shown.len() > 10);
    for label in shown.into_iter().chain(by).filter(|label| *label != "instance") {
        assert!(labels.contains(&format!("`{label}`")), "grafana.json: {label}");
    }
    let board: serde_json::Value = serde_json::from_str(&board).unwrap();
    assert_eq!(board["panels"].as_array().unwrap().len(), 13);
}

#[test]
fn the_architecture_names_every_module_with_unsafe() {
    let text = fs::read_to_string(root().join("docs/ARCHITECTURE.md")).unwrap();
    let named =
        text.split("`unsafe` is in").nth(1).unwrap().split("\n\n").next().unwrap().to_string();
    let mut folders =
        vec![root().join("nfqd/src"), root().join("rules/src"), root().join("shmctl/src")];
    folders.extend([root().join("guest/src"), root().join("tests/src")]);
    let mut found = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if fs::read_to_string(&path).unwrap().contains("allow(unsafe_code)") {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                let short = path.file_name().unwrap().to_string_lossy().into_owned();
                let is_named = named.contains(&name)
                    || named.contains("rules/src/nft/sys") && name.starts_with("rules/src/nft/sys")
                    || name.starts_with("tests/") && named.contains(&short);
                assert!(is_named, "{name}");
                found += 1;
            }
        }
    }
    assert!(found >= 6, "{found}");
}

#[test]
#[ignore = "needs virt-xml-validate: tests/run.sh netns"]
fn the_domain_xml_of_the_documentation_is_valid() {
    let text = fs::read_to_string(root().join("docs/GUEST.md")).unwrap();
    // Blocks of indented lines that begin with an element.
    let mut blocks: Vec<String> = vec![String::new()];
    for line in text.lines() {
        match line.strip_prefix("    ") {
            Some(code) => blocks.last_mut().unwrap().push_str(&format!("{code}\n")),
            None => blocks.push(String::new()),
        }
    }
    blocks.retain(|block| block.starts_with('<'));
    assert!(blocks.len() >= 3, "{blocks:?}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("domain.xml");
    let is_valid = |block: &str| {
        let (about, devices) =
            if block.starts_with("<metadata>") { (block, "") } else { ("", block) };
        let domain = format!(
            "<domain type='kvm'><name>fw1</name>{about}<memory unit='MiB'>512</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type></os><devices>{devices}</devices></domain>"
        );
        fs::write(&path, domain).unwrap();
        let output =
            Command::new("virt-xml-validate").arg(&path).output().expect("virt-xml-validate");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for block in blocks {
        let (is_right, error) = is_valid(&block);
        assert!(is_right, "{block}{error}");
    }
    assert!(!is_valid("<shmem><model type='ivshmem-none'/></shmem>").0);
}
