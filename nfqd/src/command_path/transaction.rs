//! Transactions: commands are applied, enforced, saved and answered, or roll back.

use super::authorise::authorise;
use super::channel::{Channel, Message};
use super::quotas::check_quotas;
use super::{ControlPlane, has_services};
use crate::backends::HostView;
use crate::bindings::Bindings;
use nfqd_rules::{Desired, MiddleboxKey, NetworkId, Policy};
use nfqd_shmctl::{BackendChange, Command, ErrorCode, ParsedCommand, Reply};
use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// The reason a batch of commands does not take effect.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The kernel refuses.
    #[error("the command cannot be enforced: {0}")]
    Kernel(#[from] nfqd_rules::nft::kernel::KernelError),
    /// There are no slots left for the middlebox.
    #[error(
        "no slot is left for this middlebox: its services changed too often (identifiers are free two \
         hours and five minutes after each change; try again later), or its network has too many \
         backends (delete some)"
    )]
    NoIds,
}

impl From<&CommitError> for Reply {
    fn from(error: &CommitError) -> Reply {
        let code = match error {
            CommitError::Kernel(_) => ErrorCode::Internal,
            CommitError::NoIds => ErrorCode::Quota,
        };
        Reply::error(code, &error.to_string())
    }
}

impl ControlPlane {
    /// Polls the channels that are due, executes their commands and writes the replies.
    pub fn poll_channels(&mut self, now: Instant) {
        for at in 0..self.channels.len() {
            let Some(channel) = self.channels.get_mut(at) else { continue };
            if channel.next_poll().is_none_or(|next| next > now) {
                continue;
            }
            let messages = channel.poll(Instant::now());
            if !messages.is_empty() {
                self.execute_messages(at, messages);
            }
        }
    }

    fn execute_messages(&mut self, channel: usize, messages: Vec<Message>) {
        let start = cpu_time();
        let replies = match self.execute_batch(channel, &messages) {
            Ok(replies) => replies,
            Err(error) if messages.len() == 1 => vec![Reply::from(&error)],
            // One command that cannot take effect must not take the others with it.
            Err(_) => {
                let mut replies = Vec::new();
                for message in messages.chunks(1) {
                    let result = self.execute_batch(channel, message);
                    replies.extend(result.unwrap_or_else(|error| vec![Reply::from(&error)]));
                }
                replies
            }
        };
        let answered: Vec<(Message, Reply)> = messages.into_iter().zip(replies).collect();
        let Some(channel) = self.channels.get_mut(channel) else { return };
        channel.log(&answered);
        channel.charge(answered.len(), cpu_time().saturating_sub(start));
        channel.reply(answered);
    }

    /// Applies a batch of commands atomically and returns one reply per command. On error, none of
    /// them takes effect.
    fn execute_batch(
        &mut self,
        channel: usize,
        messages: &[Message],
    ) -> Result<Vec<Reply>, CommitError> {
        let before = self.desired.clone();
        let network = self.network_of_channel(channel);
        let (mut replies, mut applied) = (Vec::new(), Vec::new());
        for message in messages {
            replies.push(match self.apply_message(channel, network, message) {
                Ok(Command::Query { mac }) => {
                    self.query_reply(channel, network, mac, message.reply_limit())
                }
                Ok(command) => {
                    let reply = Reply::ok(&command.to_string());
                    applied.push(command);
                    reply
                }
                Err(reply) => reply,
            });
        }
        if !applied.is_empty() {
            self.commit(before)?;
            for command in &applied {
                let Command::ChangeBackends { mac, change, .. } = command else { continue };
                if let BackendChange::Drain(names, _) | BackendChange::Up(names) = change {
                    self.backends.restart_drains(MiddleboxKey { network, mac: *mac }, names);
                }
            }
            let result = self.journal.append(network, &applied, &self.desired);
            self.record_saved(result);
        }
        Ok(replies)
    }

    /// Applies one command to the policy; a rejection is the reply.
    fn apply_message(
        &mut self,
        channel: usize,
        network: NetworkId,
        message: &Message,
    ) -> Result<Command, Reply> {
        let line = message.text();
        let line = line.map_err(|error| Reply::error(ErrorCode::Syntax, &error.to_string()))?;
        let parsed = ParsedCommand::parse(line)?;
        authorise(&self.channels, channel, &self.desired, network, &parsed)?;
        let before = self.desired.policy.clone();
        self.desired
            .policy
            .apply(network, &parsed.command)
            .map_err(|error| error.locate(&parsed))?;
        if let Some(spec) = self.channels.get(channel).map(Channel::spec) {
            let policy = &mut self.desired.policy;
            let checked = check_quotas(spec, network, (&before, policy), &parsed);
            checked.inspect_err(|_| *policy = before)?;
        }
        Ok(parsed.command)
    }

    /// Has a changed policy enforced, or restores the state before it, slots included.
    ///
    /// # Errors
    /// If it cannot be enforced.
    pub fn commit(&mut self, before: Desired) -> Result<(), CommitError> {
        let has_ids = self.sync_slots(&before.policy);
        let changed = self.desired.changed(&before);
        // An unchanged policy needs no transaction, unless the kernel tables are known to be
        // broken.
        if changed.is_empty() && self.enforcer.broken().is_none() {
            return Ok(());
        }
        let result = if has_ids {
            self.enforcer.enforce(&self.desired).map_err(CommitError::from)
        } else {
            Err(CommitError::NoIds)
        };
        match &result {
            Ok(()) => {
                let mut slots = changed.iter().flat_map(|key| self.desired.slots.of(*key));
                self.has_new_backend |= slots.any(|(_, slot)| slot.mac.is_none());
            }
            Err(error) => {
                // A guest that has used up its identifiers must not be able to fill the disk.
                let level = if has_ids { log::Level::Error } else { log::Level::Debug };
                log::log!(level, "{error}");
                self.desired.policy = before.policy;
                self.desired.slots.restore(before.slots, Instant::now());
                self.place(&changed);
                self.desired.networks.restore_vm_ports(&before.networks);
                self.enforcer.roll_back(&self.desired);
            }
        }
        result
    }

    /// Places those of the middleboxes that are registered, and notes their ports.
    fn place<'a>(&mut self, middleboxes: impl IntoIterator<Item = &'a MiddleboxKey>) {
        let Desired { policy, networks, .. } = &mut self.desired;
        for key in middleboxes {
            if is_registered(policy, key) {
                self.host.place_one(*key, networks);
                self.host.note_port(*key, has_services(policy, *key), networks);
            } else {
                self.host.forget(*key, networks);
            }
        }
    }

    /// Gives the middleboxes that differ from `before` their slots. Returns false if there are not
    /// enough identifiers.
    fn sync_slots(&mut self, before: &Policy) -> bool {
        let changed = self.desired.policy.changed(before);
        self.place(&changed);
        let Desired { policy, slots, networks } = &mut self.desired;
        let bindings = Bindings::new(self.channels.iter().map(Channel::spec));
        let (backends, host) = (&self.backends, &self.host);
        let view = HostView { backends, host, networks, bindings: &bindings };
        let now = Instant::now();
        let mut is_enough = true;
        for key in &changed {
            is_enough &= slots.sync(*key, policy.get(*key), &view, now);
        }
        // One of several with the same MAC on a network takes the place of another, or leaves it.
        for key in
            changed.iter().filter(|key| is_registered(before, key) != is_registered(policy, key))
        {
            let networks = networks.names().map(|(network, _)| network).chain([NetworkId::ANY]);
            let namesakes = networks.map(|network| MiddleboxKey { network, mac: key.mac });
            for other in namesakes.filter(|other| other != key && is_registered(policy, other)) {
                slots.sync(other, policy.get(other), &view, now);
            }
        }
        is_enough
    }
}

fn is_registered(policy: &Policy, key: &MiddleboxKey) -> bool {
    policy.get(*key).is_some()
}

/// Returns the CPU time that this thread has used.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    time.map(Duration::from).unwrap_or_default()
}
