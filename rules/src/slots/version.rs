//! Versions of slots: a slot under one configuration of its service.

use super::SlotKey;
use crate::network::NetworkId;
use crate::policy::Middlebox;
use crate::service::Service;
use nfqd_shmctl::{Frontend, MacAddr, ParseValueError};
use std::fmt;
use std::str::FromStr;

/// A slot under one configuration of its middlebox' services. A configuration that may send a flow
/// elsewhere makes a new version, which gets a new identifier: what the kernel has cached misses,
/// and the packet reaches the engine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct SlotVersion {
    pub(super) key: SlotKey,
    pub(super) fingerprint: u32,
}

impl SlotVersion {
    /// Returns the backend that the slot stands for.
    pub fn key(&self) -> SlotKey {
        self.key
    }
}

/// Writes the comment of a kernel map's element, by which it is recognized after a restart.
impl fmt::Display for SlotVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} version {:08x}", self.key, self.fingerprint)
    }
}

/// Parses a comment; `edition` is the word in comments of layout 1.
impl FromStr for SlotVersion {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<SlotVersion, ParseValueError> {
        let parts = text.split_once(" version ").or_else(|| text.split_once(" edition "));
        let (key, fingerprint) = parts.ok_or(ParseValueError)?;
        let fingerprint = u32::from_str_radix(fingerprint, 16).map_err(|_| ParseValueError)?;
        Ok(SlotVersion { key: key.parse()?, fingerprint })
    }
}

/// FNV-1a over a text: the same after a restart.
fn fnv(text: &str) -> u32 {
    let step = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    text.bytes().fold(0x811c_9dc5, step)
}

/// Returns a fingerprint of everything besides the key that decides which packets reach the slots
/// of a service, whose middlebox is on `network`. For a service with one backend, these are all
/// services of the middlebox. Flows of a pool keep their backend whatever other pools there are, but
/// not what a single-backend service that takes precedence takes over.
pub(super) fn fingerprint(
    network: NetworkId,
    mac: MacAddr,
    middlebox: &Middlebox,
    frontend: &Frontend,
    service: &Service,
) -> u32 {
    let is_pool = service.method().is_pool();
    let counts = |(other, its): &(&Frontend, &Service)| {
        !is_pool || !its.method().is_pool() && other.takes_precedence_over(frontend)
    };
    let relevant = middlebox.services().iter().filter(counts);
    let commands = relevant.flat_map(|(frontend, its)| its.commands(mac, *frontend));
    let text = commands.map(|command| command.to_string()).collect::<Vec<_>>().join("\n");
    let kind = if is_pool && service.options().dsr { "dsr" } else { "nat" };
    let network = match network {
        NetworkId::ANY => String::new(),
        network => format!("%{} ", network.get()),
    };
    fnv(&format!("{network}{kind} {text}"))
}
