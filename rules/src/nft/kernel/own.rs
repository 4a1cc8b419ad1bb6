//! The conversations that middleboxes have begun themselves, as the kernel remembers them.

use super::super::field::Value;
use super::super::lower::key_bytes;
use super::super::model::Family;
use super::{Kernel, KernelError};
use crate::packet::Packet;
use nfqd_shmctl::Protocol;

impl Kernel {
    /// Whether a packet to a middlebox answers a conversation that the middlebox has begun. `prefix` is
    /// that of the names of its network's sets.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn has_begun(&mut self, prefix: &str, packet: &Packet) -> Result<bool, KernelError> {
        let Some((ip, ports)) = packet.ip.and_then(|ip| Some((ip, ip.ports?))) else {
            return Ok(false);
        };
        let family = if ip.source.is_ipv4() { '4' } else { '6' };
        let sets = match ip.protocol {
            Protocol::TCP => vec![format!("own_tcp{family}"), format!("own_closing_tcp{family}")],
            Protocol::UDP => vec![format!("own_udp{family}")],
            _ => return Ok(false),
        };
        let key = key_bytes(&[
            Value::Mac(packet.link.destination),
            Value::Ip(ip.source),
            Value::Ip(ip.destination),
            Value::Port(ports.source),
            Value::Port(ports.destination),
        ]);
        for set in sets {
            let elements = self.elements(Family::Bridge, &format!("{prefix}{set}"))?;
            if elements.iter().any(|element| element.key == key) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
