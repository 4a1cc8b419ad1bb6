//! The backends' MACs, which packets tell the kernel.

use super::super::model::Family;
use super::{Kernel, KernelError};
use crate::timeouts::NEIGHBOUR_TIMEOUT;
use nfqd_shmctl::MacAddr;
use std::net::IpAddr;
use std::time::Duration;

/// The last ARP packet or neighbour advertisement of a backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// The backend's address.
    pub ip: IpAddr,
    /// The MAC that it had.
    pub mac: MacAddr,
    /// The time since then.
    pub age: Duration,
}

impl Kernel {
    /// Returns what packets have told about the backends of the network with this prefix.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn neighbours(&mut self, prefix: &str) -> Result<Vec<Neighbour>, KernelError> {
        let mut out = Vec::new();
        for set in ["neighbours4", "neighbours6"] {
            for element in self.elements(Family::Bridge, &format!("{prefix}{set}"))? {
                let ip = match element.key.len() {
                    4 => <[u8; 4]>::try_from(element.key).ok().map(IpAddr::from),
                    _ => <[u8; 16]>::try_from(element.key).ok().map(IpAddr::from),
                };
                let mac = <[u8; 6]>::try_from(element.data).ok().map(MacAddr);
                let Some((ip, mac)) = ip.zip(mac.filter(|mac| mac.is_station())) else { continue };
                let rest = Duration::from_millis(element.expires_ms.unwrap_or(0));
                let lifetime = Duration::from_secs(u64::from(NEIGHBOUR_TIMEOUT));
                out.push(Neighbour { ip, mac, age: lifetime.saturating_sub(rest) });
            }
        }
        Ok(out)
    }
}
