//! The doctor: examines the host and the running daemon, and names a command that fixes each fault.
//!
//! [`rulesets`] reads other programs' nftables chains.

pub mod rulesets;

use crate::api::{self, Status};
use crate::config::SteerChoice;
use crate::enforce::queue_path::{CALL_TAGGED, CALLS, QueuePathError, detect_queue_path, is_set};
use crate::networks::HostNetworks;
use nfqd_rules::nft::kernel::Kernel;
use nfqd_rules::nft::model::Queues;
use nfqd_rules::nft::options::QueuePath;
use rulesets::{Hook, foreign_hooks};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The result of an examination.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Grade {
    /// All is well.
    Pass,
    /// A limitation or an early warning, or a check that could not be made.
    Warn,
    /// A fault.
    Fail,
}

impl Grade {
    /// Returns the word.
    pub fn name(self) -> &'static str {
        match self {
            Grade::Pass => "PASS",
            Grade::Warn => "WARN",
            Grade::Fail => "FAIL",
        }
    }
}

/// One examination.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// The part of the host.
    pub area: &'static str,
    /// The name of the check.
    pub check: String,
    /// The result.
    pub grade: Grade,
    /// The fault, or the state that was found.
    pub detail: String,
    /// The command that mends it.
    pub fix: Option<String>,
}

/// The findings so far.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, area: &'static str, check: impl Into<String>, result: Result<String, Fault>) {
        let check = check.into();
        self.0.push(match result {
            Ok(detail) => Finding { area, check, grade: Grade::Pass, detail, fix: None },
            Err(Fault { grade, detail, fix }) => Finding { area, check, grade, detail, fix },
        });
    }
}

/// A finding that is not a pass.
struct Fault {
    grade: Grade,
    detail: String,
    fix: Option<String>,
}

fn fail(detail: impl Into<String>, fix: &str) -> Fault {
    Fault { grade: Grade::Fail, detail: detail.into(), fix: Some(fix.to_string()) }
}

fn warn(detail: impl Into<String>, fix: &str) -> Fault {
    Fault { grade: Grade::Warn, detail: detail.into(), fix: Some(fix.to_string()) }
}

fn note(detail: impl Into<String>) -> Fault {
    Fault { grade: Grade::Warn, detail: detail.into(), fix: None }
}

/// Examines the host, and the daemon whose socket is at `socket`.
pub fn examine(socket: &Path) -> Vec<Finding> {
    let mut out = Findings::default();
    let status = api::client::status(socket);
    let path = examine_kernel(&mut out, status.as_ref().ok());
    if path == Some(QueuePath::BrNetfilter) {
        examine_sysctls(&mut out);
    }
    examine_bridges(&mut out);
    examine_queues(&mut out, status.as_ref().ok());
    examine_foreign_chains(&mut out, path);
    match &status {
        Ok(status) => examine_daemon(&mut out, status),
        Err(error) => {
            let detail = format!("no answer at {}: {error}", socket.display());
            let fix = "systemctl start nfqd, or: nfqd --queue 0-3 --shm PATH,mac=MAC";
            out.add("nfqd", "running", Err(fail(detail, fix)));
        }
    }
    out.0
}

fn examine_kernel(out: &mut Findings, status: Option<&Status>) -> Option<QueuePath> {
    let mut kernel = match Kernel::open() {
        Ok(kernel) => kernel,
        Err(error) => {
            let fix = "sudo nfqd doctor; sudo modprobe nf_tables";
            out.add("kernel", "nftables", Err(fail(error.to_string(), fix)));
            return None;
        }
    };
    out.add("kernel", "nftables", Ok("answers".to_string()));
    let queues = Queues { first: 0, count: 1, bypass: true };
    // A running nfqd has found its own.
    let running = status.and_then(|status| match status.steer.as_str() {
        "native" => Some(QueuePath::Native),
        "br-netfilter" => Some(QueuePath::BrNetfilter),
        _ => None,
    });
    let found = match running {
        Some(path) => Ok(path),
        None => detect_queue_path(&mut kernel, SteerChoice::Auto, queues),
    };
    let path = found.as_ref().ok().copied();
    let result = match found {
        Ok(path) => Ok(path.name().to_string()),
        Err(error @ QueuePathError::NotCalled) => {
            Err(fail(error.to_string(), "sudo br-netfilter.sh up"))
        }
        Err(error) => Err(fail(error.to_string(), "sudo br-netfilter.sh up")),
    };
    out.add("kernel", "path of frames into the queues", result);
    path
}

fn examine_sysctls(out: &mut Findings) {
    for name in CALLS.into_iter().chain([CALL_TAGGED]) {
        let fix = format!("sudo sysctl -w net.bridge.{name}=1");
        let result = match is_set(name) {
            true => Ok("1".to_string()),
            false if name == CALL_TAGGED => {
                Err(warn("it is not 1: VLAN-tagged frames do not reach the engine", &fix))
            }
            false => Err(fail("it is not 1: no packet reaches the engine", &fix)),
        };
        out.add("sysctls", format!("net.bridge.{name}"), result);
    }
}

fn examine_bridges(out: &mut Findings) {
    let host = match HostNetworks::open(&[]) {
        Ok(host) => host,
        Err(errno) => {
            out.add("bridges", "rtnetlink", Err(warn(errno.desc(), "sudo nfqd doctor")));
            return;
        }
    };
    if host.bridges().next().is_none() {
        let fix = "sudo BRIDGE=kvmbr0 PORTS=\"tap0 eth1\" br-netfilter.sh up";
        out.add("bridges", "a bridge", Err(fail("this host has none", fix)));
    }
    for (bridge, ports, is_vlan_aware) in host.bridges() {
        let vlans = if is_vlan_aware { ", VLAN-aware" } else { "" };
        let result = if ports.is_empty() {
            Err(warn("it has no ports", &format!("sudo ip link set PORT master {bridge}")))
        } else {
            Ok(format!("ports {}{vlans}", ports.join(", ")))
        };
        out.add("bridges", bridge, result);
    }
}

/// The columns of /proc/net/netfilter/nfnetlink_queue that are of interest.
struct KernelQueue {
    number: u16,
    owner: u32,
    dropped: u64,
}

fn kernel_queues() -> Vec<KernelQueue> {
    let text = fs::read_to_string("/proc/net/netfilter/nfnetlink_queue").unwrap_or_default();
    let queue = |line: &str| {
        let words: Vec<u64> =
            line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let (&number, &owner) = (words.first()?, words.get(1)?);
        let dropped = words.get(5)? + words.get(6)?;
        Some(KernelQueue {
            number: u16::try_from(number).ok()?,
            owner: u32::try_from(owner).ok()?,
            dropped,
        })
    };
    text.lines().filter_map(queue).collect()
}

fn examine_queues(out: &mut Findings, status: Option<&Status>) {
    let queues = kernel_queues();
    match status {
        Some(status) => {
            for queue in &status.queues {
                let kernel = queues.iter().find(|found| found.number == queue.queue);
                let dropped = kernel.map_or(0, |found| found.dropped);
                let result = match (queue.alive, kernel) {
                    (false, _) => Err(fail("its thread has ended", "systemctl restart nfqd")),
                    (true, None) => {
                        Err(fail("the kernel has no such queue", "systemctl restart nfqd"))
                    }
                    (true, Some(_)) if dropped > 0 => Err(note(format!(
                        "the kernel has dropped {dropped} packets because it was full"
                    ))),
                    (true, Some(_)) => Ok("served".to_string()),
                };
                out.add("queues", format!("queue {}", queue.queue), result);
            }
        }
        None => {
            let default = 0..4;
            for queue in queues.iter().filter(|queue| default.contains(&queue.number)) {
                let detail = format!("taken by another program (netlink port {})", queue.owner);
                let fix = "end that program, or: nfqd --queue N-M with other numbers";
                out.add("queues", format!("queue {}", queue.number), Err(fail(detail, fix)));
            }
        }
    }
}

fn examine_foreign_chains(out: &mut Findings, path: Option<QueuePath>) {
    let list = Command::new("nft").args(["list", "ruleset"]).output();
    let text = match list {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
        Ok(output) => {
            let detail = String::from_utf8_lossy(&output.stderr).trim().to_string();
            out.add("other firewalls", "nft list ruleset", Err(warn(detail, "sudo nfqd doctor")));
            return;
        }
        Err(error) => {
            let fix = "sudo apt-get install nftables";
            out.add("other firewalls", "nft list ruleset", Err(warn(error.to_string(), fix)));
            return;
        }
    };
    let is_called = path == Some(QueuePath::BrNetfilter);
    let mut is_clear = true;
    for Hook { family, table, chain, hook, drops_by_policy, accepts_bridged, sets_mark } in
        foreign_hooks(&text)
    {
        let name = format!("{family} {table} {chain} ({hook})");
        let mut add = |fault: Fault| {
            is_clear = false;
            out.add("other firewalls", name.clone(), Err(fault));
        };
        let is_ip = family != "bridge";
        if is_ip && is_called && hook == "forward" && drops_by_policy && !accepts_bridged {
            let fix = format!(
                "sudo nft insert rule {family} {table} {chain} meta ibrname BRIDGE accept, or: iifname BRIDGE oifname BRIDGE accept"
            );
            add(fail("drops what it does not accept, bridged packets as well", &fix));
        } else if !is_ip && drops_by_policy {
            add(note("drops bridged frames that it does not accept"));
        }
        if sets_mark && (!is_ip || is_called) {
            add(note(
                "sets the mark: if it overwrites bits 8-31 of bridged packets, they are not translated",
            ));
        }
    }
    if is_clear {
        let detail = "none drops or marks bridged packets".to_string();
        out.add("other firewalls", "chains at our hooks", Ok(detail));
    }
}

fn examine_daemon(out: &mut Findings, status: &Status) {
    out.add("nfqd", "running", Ok(format!("pid {}", status.pid)));
    let own = env!("CARGO_PKG_VERSION");
    let version = if status.version == own {
        Ok(own.to_string())
    } else {
        let detail = format!("the daemon is {}, this program {own}", status.version);
        Err(warn(detail, "systemctl restart nfqd"))
    };
    out.add("nfqd", "version", version);
    let problems = status.problems();
    if problems.is_empty() {
        out.add("nfqd", "status", Ok("OK".to_string()));
    }
    for problem in problems {
        let (what, detail) = problem.split_once(": ").unwrap_or((&problem, ""));
        let (grade, fix) = remedy(what);
        let fault = Fault { grade, detail: detail.to_string(), fix: fix.map(str::to_string) };
        out.add("nfqd", what, Err(fault));
    }
    for channel in &status.channels {
        if channel.error.is_none() {
            let result = match channel.connected {
                None => examine_region(Path::new(&channel.path)),
                Some(true) => Ok("a VM is connected".to_string()),
                Some(false) => Ok("no VM is connected".to_string()),
            };
            out.add("channels", channel.path.clone(), result);
        }
        if channel.macs.is_empty() {
            let fix = "add mac=MAC to its option";
            let fault = warn("its guest may speak for every middlebox", fix);
            out.add("channels", channel.path.clone(), Err(fault));
        }
    }
    let state = Path::new(&status.state);
    let result = match fs::metadata(state) {
        Ok(about) => Ok(format!("{} bytes", about.len())),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(warn(error.to_string(), "sudo nfqd doctor"))
        }
        Err(error) => Err(fail(error.to_string(), "sudo systemctl restart nfqd")),
    };
    out.add("nfqd", format!("registrations in {}", status.state), result);
}

/// Returns the grade of a problem of the status, and the command that mends it.
fn remedy(what: &str) -> (Grade, Option<&'static str>) {
    match what {
        "NOT ENFORCED" => (Grade::Fail, Some("journalctl -u nfqd; sudo systemctl restart nfqd")),
        "NOT STEERED" => (Grade::Fail, Some("sudo br-netfilter.sh up")),
        "NOT SERVED" => (Grade::Fail, Some("sudo systemctl restart nfqd")),
        "NOT READ" => (
            Grade::Fail,
            Some("ls -l PATH; start the VM, or add owner=USER to its --shm; modprobe vhost_vsock"),
        ),
        "NOT SAVED" => (Grade::Fail, Some("df DIR; ls -ld DIR")),
        "NOT RESTORED" => {
            (Grade::Warn, Some("look at the file, register what is missing, and remove it"))
        }
        "NO BACKEND" | "DEAD" => (Grade::Fail, Some("start the backend, or: B MAC - BACKEND")),
        "FAILING" | "CHECKS DOUBTED" => {
            (Grade::Warn, Some("ping and connect to the backend from the host"))
        }
        "MAC UNKNOWN" => (Grade::Fail, Some("start the backend, or name its MAC: BACKEND@MAC")),
        "NETWORK" => (Grade::Warn, Some("bind the channel with bridge= and vlan=")),
        "FLOW TABLE FULL" | "KERNEL MAP FULL" | "FLOOD" => {
            (Grade::Warn, Some("nfqd status; look for a flood"))
        }
        _ => (Grade::Warn, None),
    }
}

/// Whether a region is mapped by a process other than nfqd.
fn examine_region(path: &Path) -> Result<String, Fault> {
    let about = fs::metadata(path).map_err(|error| warn(error.to_string(), "sudo nfqd doctor"))?;
    let text =
        format!("owner {}, mode {:o}, {} bytes", about.uid(), about.mode() & 0o7777, about.size());
    let users = mappers(path);
    match users.first() {
        Some(user) => Ok(format!("{text}, mapped by {user}")),
        None => Err(warn(
            format!("{text}; no process maps it: its VM does not run, or has another mem-path"),
            "start the VM with '-object memory-backend-file,id=nfqd,share=on,mem-path=PATH,size=1M -device ivshmem-plain,memdev=nfqd'",
        )),
    }
}

/// Returns the processes that map a file, by name and id.
fn mappers(path: &Path) -> Vec<String> {
    let canonical = fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
    let wanted = canonical.to_string_lossy().into_owned();
    let mut out = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let maps = fs::read_to_string(entry.path().join("maps")).unwrap_or_default();
        if pid != std::process::id() && maps.lines().any(|line| line.ends_with(&wanted)) {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            out.insert(format!("{} (pid {pid})", name.trim()));
        }
    }
    out.into_iter().collect()
}

/// Returns the findings as text: a line each, by area, and the command that mends it.
pub fn text(findings: &[Finding]) -> String {
    let mut areas: Vec<&str> = Vec::new();
    let mut by_area: BTreeMap<&str, Vec<&Finding>> = BTreeMap::new();
    for finding in findings {
        if !areas.contains(&finding.area) {
            areas.push(finding.area);
        }
        by_area.entry(finding.area).or_default().push(finding);
    }
    let mut out = String::new();
    for area in areas {
        for Finding { check, grade, detail, fix, .. } in by_area.remove(area).unwrap_or_default() {
            out.push_str(&format!("{:<4} {area}: {check}: {detail}", grade.name()));
            if let Some(fix) = fix {
                out.push_str(&format!("; fix: {fix}"));
            }
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_problem_of_the_status_has_a_remedy() {
        for what in [
            "NOT ENFORCED",
            "NOT STEERED",
            "NOT SERVED",
            "NOT READ",
            "NOT SAVED",
            "NOT RESTORED",
            "NO BACKEND",
            "DEAD",
            "FAILING",
            "CHECKS DOUBTED",
            "MAC UNKNOWN",
            "NETWORK",
            "FLOW TABLE FULL",
            "KERNEL MAP FULL",
        ] {
            let (grade, fix) = remedy(what);
            assert!(grade != Grade::Pass && fix.is_some(), "{what}");
        }
    }

    #[test]
    fn findings_are_lines_with_the_command_that_mends_them() {
        let mut findings = Findings::default();
        findings.add("kernel", "nftables", Ok("answers".to_string()));
        findings.add("sysctls", "a", Err(fail("it is 0", "sysctl -w a=1")));
        assert_eq!(
            text(&findings.0),
            "PASS kernel: nftables: answers\nFAIL sysctls: a: it is 0; fix: sysctl -w a=1\n"
        );
    }

    #[test]
    fn who_maps_a_file_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("region");
        fs::write(&path, vec![0; 8192]).unwrap();
        assert_eq!(mappers(&path), Vec::<String>::new());
        assert_eq!(examine_region(&path).unwrap_err().grade, Grade::Warn);
    }
}
