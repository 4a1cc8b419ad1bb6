//! The reply to `Q`.

use super::ControlPlane;
use super::channel::Channel;
use crate::api::{BackendStatus, MiddleboxStatus};
use crate::bindings::Bindings;
use crate::observe::status::{StatusSource, host_devices};
use nfqd_rules::{MiddleboxKey, NetworkId};
use nfqd_shmctl::{MacAddr, Reply};

impl ControlPlane {
    /// Returns the reply to a query: each registration as a command, with its counters, in one
    /// line of at most `limit` bytes and a note. Without a MAC it is about all middleboxes that the channel
    /// may speak for.
    pub(super) fn query_reply(
        &mut self,
        channel: usize,
        network: NetworkId,
        mac: Option<MacAddr>,
        limit: usize,
    ) -> Reply {
        self.enforcer.read_counters();
        let bound = self.channels.get(channel).map(|channel| channel.spec().macs.clone());
        let here = |mac: MacAddr| MiddleboxKey { network, mac };
        let wanted: Vec<MiddleboxKey> = match (mac, bound) {
            (Some(mac), _) => vec![here(mac)],
            (None, Some(bound)) if !bound.is_empty() => bound.into_iter().map(here).collect(),
            // More than fit into the reply. A channel that is bound to a network sees no other.
            _ => {
                let all = self.desired.policy.middleboxes().keys().copied();
                let own = all.filter(|key| network == NetworkId::ANY || key.network == network);
                own.take(limit).collect()
            }
        };
        let bindings = Bindings::new(self.channels.iter().map(Channel::spec));
        let devices = host_devices();
        let source =
            StatusSource::new(&self.desired, &self.enforcer, self.view(&bindings), &devices);
        let mut text = String::new();
        for key in wanted {
            let Some(status) = source.middlebox(key) else { continue };
            for part in parts(&status) {
                if !text.is_empty() {
                    text.push_str("; ");
                }
                text.push_str(&part);
            }
            if text.len() > limit {
                let end = text.get(..limit).and_then(|text| text.rfind("; "));
                text.truncate(end.unwrap_or(limit));
                text.push_str("; and more, ask for one middlebox");
                return Reply::ok(&text);
            }
        }
        Reply::ok(if text.is_empty() { "nothing registered" } else { &text })
    }
}

fn parts(status: &MiddleboxStatus) -> Vec<String> {
    let MiddleboxStatus { mac, packets, bytes, .. } = status;
    let mut parts = vec![format!("{mac} packets {packets} bytes {bytes}")];
    parts.extend(status.commands.iter().cloned());
    for rule in &status.rules {
        parts.push(format!("{} packets {} bytes {}", rule.rule, rule.packets, rule.bytes));
    }
    for service in &status.services {
        parts.extend(service.backends.iter().map(|backend| backend_part(&service.vip, backend)));
    }
    parts
}

fn backend_part(frontend: &str, backend: &BackendStatus) -> String {
    format!(
        "{frontend} -> {} {} weight {} flows {} packets {} bytes {}",
        backend.backend,
        backend.state.name(),
        backend.weight,
        backend.flows,
        backend.packets + backend.reply_packets,
        backend.bytes + backend.reply_bytes
    )
}
