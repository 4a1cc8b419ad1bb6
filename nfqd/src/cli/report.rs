//! `nfqd report`: what a report of a bug needs, in one archive. It has no secrets; it has addresses and MACs.

use super::Failure;
use crate::{api, doctor};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

/// The commands whose output is in the archive, by file name.
const COMMANDS: [(&str, &[&str]); 7] = [
    ("uname.txt", &["uname", "-a"]),
    ("ruleset.txt", &["nft", "list", "ruleset"]),
    ("links.txt", &["ip", "-d", "link", "show"]),
    ("vlans.txt", &["bridge", "vlan", "show"]),
    ("fdb.txt", &["bridge", "fdb", "show"]),
    ("journal.txt", &["journalctl", "-u", "nfqd", "-n", "500", "--no-pager"]),
    ("sysctls.txt", &["sysctl", "-a", "-r", "^net\\.bridge\\.|^net\\.core\\.rmem"]),
];

/// The files that are in the archive.
const FILES: [&str; 3] =
    ["/proc/net/netfilter/nfnetlink_queue", "/proc/modules", "/etc/os-release"];

/// The longest output of a command that is kept, in bytes.
const MAX_OUTPUT: usize = 8 << 20;

/// Writes the archive. It is readable for its owner only, and does not replace a file.
pub(super) fn run(file: &Path, socket: &Path) -> Result<(), Failure> {
    let system = |error: io::Error| Failure::System(format!("{}: {error}", file.display()));
    let out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    let mut archive = tar::Builder::new(out.map_err(system)?);
    let mut add = |name: &str, content: &[u8]| -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, format!("nfqd-report/{name}"), content)
    };
    let mut parts: Vec<(String, Vec<u8>)> = Vec::new();
    parts.push(("version.txt".to_string(), format!("nfqd {}\n", env!("CARGO_PKG_VERSION")).into()));
    let status = match api::client::status(socket) {
        Ok(status) => status.to_json(),
        Err(error) => format!("{}: {error}\n", socket.display()),
    };
    parts.push(("status.json".to_string(), status.into()));
    let findings = doctor::text(&doctor::examine(socket));
    parts.push(("doctor.txt".to_string(), findings.into()));
    for (name, command) in COMMANDS {
        parts.push((name.to_string(), output(command)));
    }
    for path in FILES {
        let name = format!("files{}", path.replace('/', "_"));
        let content = fs::read(path).unwrap_or_else(|error| format!("{path}: {error}\n").into());
        parts.push((name, content));
    }
    for (name, content) in parts {
        add(&name, &content).map_err(system)?;
    }
    archive.finish().map_err(system)?;
    println!("wrote {}; it has addresses and MACs of this host and its VMs", file.display());
    Ok(())
}

/// Returns what a command prints, or why it could not.
fn output(command: &[&str]) -> Vec<u8> {
    let [program, arguments @ ..] = command else { return Vec::new() };
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            let mut text = output.stdout;
            text.extend(output.stderr);
            text.truncate(MAX_OUTPUT);
            text
        }
        Err(error) => format!("{program}: {error}\n").into(),
    }
}
