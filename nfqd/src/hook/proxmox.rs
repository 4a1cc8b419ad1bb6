//! The hookscript of Proxmox VE: attaches the channel of a VM when QEMU has made its shared memory, and
//! detaches it when the VM has stopped. Proxmox calls it with the VM's number and a phase (qm(1),
//! "Hookscripts"); the VM's configuration is a file.

use super::{METADATA_KEYS, Moment, complain, follow, is_separator};
use nfqd_shmctl::MacAddr;
use std::collections::BTreeSet;
use std::path::Path;

/// The directory of the configurations of VMs.
const CONFIGURATIONS: &str = "/etc/pve/qemu-server";
/// The name prefix of shared memory that needs no line in the notes to be a channel.
const PREFIX: &str = "nfqd";
/// The prefix of a line of a VM's notes that binds its channel.
const NOTE: &str = "nfqd:";

/// The reason a VM has no channel that can be attached.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmError {
    /// The notes ask for a channel, and the VM has no shared memory.
    #[error(
        "the notes ask for a channel, but the VM has no ivshmem; qm set VMID --ivshmem size=1,name=NAME"
    )]
    NoMemory,
    /// The VM has no network interface on a bridge.
    #[error("the VM has no network interface whose MAC its channel could speak for")]
    NoInterface,
    /// A word of the notes is no key of a channel.
    #[error(
        "'{0}' in the notes is not a key of a channel; write ip=ADDRESS, to=ADDRESS, middleboxes=, services=, backends=, rules= or \
         rate=NUMBER after 'nfqd:'"
    )]
    Note(String),
    /// A value contains what separates values.
    #[error("'{0}' in the configuration contains a comma or a blank")]
    Value(String),
}

/// Returns the channel that a VM asks for, as `nfqd attach` takes it; `None` if it asks for none.
/// `is_vlan_aware` tells of a bridge whether it filters VLANs.
///
/// # Errors
/// See [`VmError`].
pub fn channel_of(
    vm: &str,
    configuration: &str,
    is_vlan_aware: impl Fn(&str) -> bool,
) -> Result<Option<String>, VmError> {
    // The lines behind a section's name are those of a snapshot.
    let lines = || configuration.lines().take_while(|line| !line.starts_with('['));
    let values = |wanted: fn(&str) -> bool| {
        let split = lines().filter_map(|line| line.split_once(':'));
        split.filter(move |(key, _)| wanted(key)).map(|(_, value)| value.trim())
    };
    let notes: Vec<String> = lines()
        .filter_map(|line| line.strip_prefix('#'))
        .map(decoded)
        .filter_map(|line| line.trim().strip_prefix(NOTE).map(str::to_string))
        .collect();
    let Some(memory) = values(|key| key == "ivshmem").next() else {
        return if notes.is_empty() { Ok(None) } else { Err(VmError::NoMemory) };
    };
    let name = option(memory, "name").unwrap_or(vm);
    if notes.is_empty() && !name.starts_with(PREFIX) {
        return Ok(None);
    }
    let mut keys = vec![format!("pve-shm-{name}")];
    let mut networks = BTreeSet::new();
    let is_interface =
        |key: &str| key.strip_prefix("net").is_some_and(|number| number.parse::<u8>().is_ok());
    for interface in values(is_interface) {
        // The first key is the model, and its value the MAC.
        let macs = interface.split(',').filter_map(|part| part.split_once('='));
        let mac = macs.filter_map(|(_, value)| value.parse::<MacAddr>().ok()).next();
        let (Some(mac), Some(bridge)) = (mac, option(interface, "bridge")) else { continue };
        keys.push(format!("mac={mac}"));
        networks.insert(match option(interface, "tag") {
            Some(tag) if is_vlan_aware(bridge) => format!("bridge={bridge},vlan={tag}"),
            // Proxmox makes a bridge of its own for a VLAN of a bridge that does not filter them.
            Some(tag) => format!("bridge={bridge}v{tag}"),
            None => format!("bridge={bridge}"),
        });
    }
    if keys.len() == 1 {
        return Err(VmError::NoInterface);
    }
    for word in notes.iter().flat_map(|note| note.split_whitespace()) {
        let key = word.split_once('=').map(|(key, _)| key);
        if key.is_none_or(|key| !METADATA_KEYS.contains(&key)) {
            return Err(VmError::Note(word.to_string()));
        }
        keys.push(word.to_string());
    }
    if let Some(key) = keys.iter().find(|key| key.contains(is_separator)) {
        return Err(VmError::Value(key.clone()));
    }
    // With several networks, the channel is bound to none: its MACs show where it is.
    let mut networks = networks.into_iter();
    if let (Some(only), None) = (networks.next(), networks.next()) {
        keys.push(only);
    }
    Ok(Some(keys.join(",")))
}

/// Returns the value of a key in `KEY=VALUE,…`.
fn option<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let pairs = line.split(',').filter_map(|part| part.split_once('='));
    pairs.filter(|(name, _)| *name == key).map(|(_, value)| value.trim()).next()
}

/// Returns a line of the notes, in which Proxmox writes some characters as %XX.
fn decoded(line: &str) -> String {
    let mut parts = line.split('%');
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let byte = part.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (byte.filter(u8::is_ascii), part.get(2..)) {
            (Some(byte), Some(rest)) => {
                out.push(char::from(byte));
                out.push_str(rest);
            }
            _ => {
                out.push('%');
                out.push_str(part);
            }
        }
    }
    out
}

/// Attaches the VM's channel in phase `post-start`, detaches it in `post-stop`, and ignores every other
/// phase. QEMU creates the memory, so the channel is attached after the start.
pub fn run(socket: &Path, vm: &str, phase: &str) {
    run_in(Path::new(CONFIGURATIONS), socket, vm, phase);
}

/// Does as [`run`], with the configurations in another directory.
pub fn run_in(configurations: &Path, socket: &Path, vm: &str, phase: &str) {
    let moment = match phase {
        "post-start" => Moment::Start,
        "post-stop" => Moment::End,
        _ => return,
    };
    let path = configurations.join(format!("{vm}.conf"));
    let configuration = match std::fs::read_to_string(&path) {
        Ok(configuration) => configuration,
        Err(error) => return complain(vm, &format!("{}: {error}", path.display())),
    };
    let is_vlan_aware = |bridge: &str| {
        let setting = format!("/sys/class/net/{bridge}/bridge/vlan_filtering");
        std::fs::read_to_string(setting).is_ok_and(|text| text.trim() == "1")
    };
    follow(socket, vm, moment, channel_of(vm, &configuration, is_vlan_aware));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of /etc/pve/qemu-server, shortened.
    const VM: &str = "#Firewall of the office\n#nfqd%3A ip=10.129.126.15 to=10.129.126.0/24\nboot: order=scsi0\n\
        cores: 2\nivshmem: size=1,name=fw1\nmemory: 2048\n\
        net0: virtio=BC:24:11:12:34:56,bridge=vmbr0,firewall=1,tag=100\nscsi0: local-lvm:vm-101-disk-0,size=8G\n\n\
        [before]\nnet1: virtio=BC:24:11:00:00:01,bridge=vmbr9\n";

    fn channel(configuration: &str) -> Result<Option<String>, VmError> {
        channel_of("101", configuration, |bridge| bridge == "vmbr0")
    }

    #[test]
    fn a_vms_channel_is_bound_to_what_its_configuration_says() {
        let expected = "pve-shm-fw1,mac=bc:24:11:12:34:56,ip=10.129.126.15,to=10.129.126.0/24,\
            bridge=vmbr0,vlan=100";
        assert_eq!(channel(VM), Ok(Some(expected.to_string())));
        let plain = channel_of("101", VM, |_| false).unwrap().unwrap();
        assert!(plain.ends_with(",bridge=vmbr0v100"), "{plain}");
        let two = VM.replace("scsi0: ", "net1: e1000=2:0:0:0:0:1,bridge=vmbr1\nscsi0: ");
        let two = channel(&two).unwrap().unwrap();
        assert!(two.contains(",mac=02:00:00:00:00:01,") && !two.contains("bridge"), "{two}");
    }

    #[test]
    fn a_vm_without_notes_has_one_if_its_memory_is_named_so() {
        let silent = VM.replace("nfqd%3A", "nothing");
        assert_eq!(channel(&silent), Ok(None));
        let named = channel(&silent.replace("name=fw1", "name=nfqd-101")).unwrap().unwrap();
        assert!(named.starts_with("pve-shm-nfqd-101,mac=bc:24:11:12:34:56,"), "{named}");
        let unnamed = channel(&VM.replace(",name=fw1", "")).unwrap().unwrap();
        assert!(unnamed.starts_with("pve-shm-101,"), "{unnamed}");
    }

    #[test]
    fn what_cannot_be_attached_is_named() {
        assert_eq!(channel(&VM.replace("ivshmem:", "ivshmen:")), Err(VmError::NoMemory));
        assert_eq!(channel(&VM.replace("bridge=vmbr0,", "")), Err(VmError::NoInterface));
        let other = VM.replace("to=10", "mac=10");
        assert!(matches!(channel(&other), Err(VmError::Note(_))));
        let more = VM.replace("ip=10.129.126.15", "ip=10.129.126.15,mac=any");
        assert!(matches!(channel(&more), Err(VmError::Value(_))));
        assert_eq!(decoded("a%3Ab%zz%c3%"), "a:b%zz%c3%");
    }
}
