//! The libvirt hook: attaches the channel of a domain before QEMU starts, and detaches it when the domain
//! has gone. libvirt calls it with the domain's name, an operation and a sub-operation, and writes the
//! domain's XML to its standard input (<https://libvirt.org/hooks.html>). libvirt would not start the
//! domain if it failed.

use super::{METADATA_KEYS, Moment, follow, is_separator};
use nix::unistd::User;
use roxmltree::{Document, Node};
use std::collections::BTreeSet;
use std::path::Path;

/// The namespace of nfqd's metadata in a domain.
pub const NAMESPACE: &str = "https://github.com/nfqd/nfqd";
/// The name prefix of shared memory that needs no metadata to be a channel.
const PREFIX: &str = "nfqd";
/// The users as which libvirt's QEMU runs, on Debian and on Fedora.
const QEMU_USERS: [&str; 2] = ["libvirt-qemu", "qemu"];

/// The reason a domain has no channel, or none that can be attached.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DomainError {
    /// The XML cannot be parsed.
    #[error("the domain's XML: {0}")]
    Xml(String),
    /// The metadata name shared memory that the domain does not have.
    #[error(
        "the metadata refers to shmem '{0}', but the domain has no such ivshmem-plain device, nor an \
         ivshmem-doorbell device with the path of its server"
    )]
    NoSuchMemory(String),
    /// The metadata ask for a channel, and the domain has no device for one.
    #[error(
        "the metadata ask for a channel, but the domain has no shmem device of the model ivshmem-plain or \
         ivshmem-doorbell, and no vsock device with a CID"
    )]
    NoMemory,
    /// The domain has several shared memories, and the metadata name none.
    #[error("the domain has several shmem devices; name one with shmem= in the metadata")]
    Several,
    /// A value contains what separates values.
    #[error("'{0}' in the domain's XML contains a comma, a blank, or a colon in a name")]
    Value(String),
    /// The domain has no network interface on a bridge.
    #[error("the domain has no network interface whose MAC its channel could speak for")]
    NoInterface,
}

/// Returns the channel that a domain asks for, as `nfqd attach` takes it; `None` if it asks for none. The
/// region is made for `group`, in which QEMU runs.
///
/// # Errors
/// See [`DomainError`].
pub fn channel_of(xml: &str, group: Option<u32>) -> Result<Option<String>, DomainError> {
    let document = Document::parse(xml).map_err(|error| DomainError::Xml(error.to_string()))?;
    let all = || document.descendants();
    let metadata = all().find(|node| node.has_tag_name((NAMESPACE, "channel")));
    let memories: Vec<(&str, String)> =
        all().filter(|node| node.has_tag_name("shmem")).filter_map(memory).collect();
    let by_vsock = || {
        let cid = all().find(|node| node.has_tag_name("vsock")).and_then(|v| child(v, "cid"));
        cid.and_then(|cid| cid.attribute("address")).map(|cid| format!("vsock:{cid}"))
    };
    let named = |wanted: &str| memories.iter().find(|(name, _)| *name == wanted);
    let channel = match (metadata.map(|node| node.attribute("shmem")), memories.as_slice()) {
        (Some(Some(name)), _) => match named(name) {
            Some((_, channel)) => channel.clone(),
            None => return Err(DomainError::NoSuchMemory(name.to_string())),
        },
        (Some(None), [(_, channel)]) => channel.clone(),
        (Some(None), []) => by_vsock().ok_or(DomainError::NoMemory)?,
        (Some(None), _) => return Err(DomainError::Several),
        (None, _) => match memories.iter().find(|(name, _)| name.starts_with(PREFIX)) {
            Some((_, channel)) => channel.clone(),
            None => return Ok(None),
        },
    };
    let has_file = !channel.starts_with("vsock:");
    // A name with a colon would be another kind of channel.
    if let Some((name, _)) = memories.iter().find(|(name, _)| name.contains(':')) {
        return Err(DomainError::Value((*name).to_string()));
    }
    let mut keys = vec![channel];
    let mut networks = BTreeSet::new();
    for interface in all().filter(|node| node.has_tag_name("interface")) {
        let mac = child(interface, "mac").and_then(|mac| mac.attribute("address"));
        let bridge = child(interface, "source").and_then(|source| source.attribute("bridge"));
        let (Some(mac), Some(bridge)) = (mac, bridge) else { continue };
        keys.push(format!("mac={mac}"));
        let tags: Vec<&str> = child(interface, "vlan")
            .into_iter()
            .flat_map(|vlan| vlan.children())
            .filter_map(|tag| tag.attribute("id"))
            .collect();
        networks.insert((bridge, if let [tag] = tags.as_slice() { Some(*tag) } else { None }));
    }
    if keys.len() == 1 {
        return Err(DomainError::NoInterface);
    }
    // With several networks, the channel is bound to none: its MACs show where it is.
    let mut networks = networks.into_iter();
    if let (Some((bridge, vlan)), None) = (networks.next(), networks.next()) {
        keys.push(format!("bridge={bridge}"));
        keys.extend(vlan.map(|vlan| format!("vlan={vlan}")));
    }
    for binding in metadata.into_iter().flat_map(|node| node.children()) {
        let name = binding.tag_name();
        if name.namespace() == Some(NAMESPACE) && METADATA_KEYS.contains(&name.name()) {
            let value = binding.text().unwrap_or_default().trim();
            keys.push(format!("{}={value}", name.name()));
        }
    }
    if let Some(key) = keys.iter().find(|key| key.contains(is_separator)) {
        return Err(DomainError::Value(key.clone()));
    }
    keys.extend(group.filter(|_| has_file).map(|group| format!("group={group},mode=0660")));
    Ok(Some(keys.join(",")))
}

/// Returns the name of a shared memory, and its channel as `nfqd attach` names it; `None` for a model that
/// is no channel.
fn memory<'a>(shmem: Node<'a, '_>) -> Option<(&'a str, String)> {
    let name = shmem.attribute("name")?;
    match child(shmem, "model")?.attribute("type")? {
        "ivshmem-plain" => Some((name, name.to_string())),
        "ivshmem-doorbell" => {
            let path = child(shmem, "server")?.attribute("path")?;
            Some((name, format!("doorbell:{path}")))
        }
        _ => None,
    }
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// Does what libvirt's hook is called for: `operation` is `prepare`, `release` or another one.
pub fn run(socket: &Path, domain: &str, operation: &str, xml: &str) {
    let moment = match operation {
        "prepare" => Moment::Start,
        "release" => Moment::End,
        _ => return,
    };
    let found = QEMU_USERS.iter().find_map(|name| User::from_name(name).ok().flatten());
    let group = found.map(|user| user.gid.as_raw());
    follow(socket, domain, moment, channel_of(xml, group));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A domain as `virsh dumpxml` prints it, shortened.
    const DOMAIN: &str = r#"<domain type='kvm' id='3'>
  <name>fw1</name>
  <metadata>
    <nfqd:channel xmlns:nfqd="https://github.com/nfqd/nfqd" shmem="vm1">
      <nfqd:ip>10.129.126.15</nfqd:ip>
      <nfqd:to>10.129.126.0/24</nfqd:to>
    </nfqd:channel>
  </metadata>
  <devices>
    <interface type='bridge'>
      <mac address='12:13:14:15:16:17'/>
      <source bridge='kvmbr0'/>
      <vlan><tag id='100'/></vlan>
      <model type='virtio'/>
    </interface>
    <interface type='user'><mac address='52:54:00:00:00:01'/></interface>
    <shmem name='vm1'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>
    <shmem name='other'><model type='ivshmem-doorbell'/></shmem>
  </devices>
</domain>"#;

    #[test]
    fn a_domains_channel_is_bound_to_what_its_xml_says() {
        assert_eq!(
            channel_of(DOMAIN, Some(107)).unwrap().unwrap(),
            "vm1,mac=12:13:14:15:16:17,bridge=kvmbr0,vlan=100,ip=10.129.126.15,to=10.129.126.0/24,group=107,mode=0660"
        );
        let two = DOMAIN.replace("type='user'>", "type='bridge'><source bridge='br1'/>");
        assert_eq!(
            channel_of(&two, None).unwrap().unwrap(),
            "vm1,mac=12:13:14:15:16:17,mac=52:54:00:00:00:01,ip=10.129.126.15,to=10.129.126.0/24"
        );
    }

    #[test]
    fn a_doorbell_and_vsock_are_channels_as_well() {
        let doorbell = DOMAIN.replace(
            "<model type='ivshmem-plain'/><size unit='M'>1</size>",
            "<model type='ivshmem-doorbell'/><server path='/run/nfqd/doorbell/vm1.sock'/>",
        );
        let channel = channel_of(&doorbell, Some(107)).unwrap().unwrap();
        assert!(channel.starts_with("doorbell:/run/nfqd/doorbell/vm1.sock,mac="), "{channel}");
        assert!(channel.ends_with(",group=107,mode=0660"), "{channel}");
        let vsock = DOMAIN
            .replace(" shmem=\"vm1\"", "")
            .replace("<shmem name='vm1'>", "<vsock><cid address='42'/></vsock><shmem name='a'>")
            .replace("ivshmem-plain", "ivshmem")
            .replace("<nfqd:ip>10.129.126.15</nfqd:ip>", "<nfqd:rules>9</nfqd:rules>");
        assert_eq!(
            channel_of(&vsock, Some(107)).unwrap().unwrap(),
            "vsock:42,mac=12:13:14:15:16:17,bridge=kvmbr0,vlan=100,rules=9,to=10.129.126.0/24"
        );
        let colon = DOMAIN.replace(
            "name='other'><model type='ivshmem-doorbell'",
            "name='vsock:7'><model type='ivshmem-plain'",
        );
        assert_eq!(channel_of(&colon, None), Err(DomainError::Value("vsock:7".to_string())));
    }

    #[test]
    fn a_domain_without_metadata_has_one_if_its_memory_is_named_so() {
        let start = DOMAIN.find("  <metadata>").unwrap();
        let end = DOMAIN.find("  <devices>").unwrap();
        let plain = format!("{}{}", &DOMAIN[..start], &DOMAIN[end..]);
        assert_eq!(channel_of(&plain, None), Ok(None));
        let named = plain.replace("'vm1'", "'nfqd-vm1'");
        let channel = channel_of(&named, None).unwrap().unwrap();
        assert!(channel.starts_with("nfqd-vm1,mac=12:13:14:15:16:17,"), "{channel}");
    }

    #[test]
    fn what_cannot_be_attached_is_named() {
        let missing = DOMAIN.replace("shmem=\"vm1\"", "shmem=\"vm2\"");
        assert_eq!(channel_of(&missing, None), Err(DomainError::NoSuchMemory("vm2".to_string())));
        let detached = DOMAIN.replace("<source bridge='kvmbr0'/>", "");
        assert_eq!(channel_of(&detached, None), Err(DomainError::NoInterface));
        assert!(matches!(channel_of("<domain", None), Err(DomainError::Xml(_))));
        let more = DOMAIN.replace("10.129.126.15<", "10.129.126.15,mac=2:0:0:0:0:1<");
        assert!(matches!(channel_of(&more, None), Err(DomainError::Value(_))));
    }
}
