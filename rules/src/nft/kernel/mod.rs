//! The kernel's nf_tables: loads a ruleset or changes it, in one transaction each.
//!
//! Base chains are made once and stay until [`Kernel::remove`]: deleting one drops every packet
//! that waits in a queue.

mod counters;
mod difference;
mod neighbours;
mod own;
mod probe;
mod recover;
mod retired;

pub use counters::{BackendCounters, Counters};
pub use neighbours::Neighbour;
pub use recover::{CachedReply, RecoveredState};

use super::build::{Ruleset, tracked_maps, tracked_slots};
use super::delta::{Step, Transition};
use super::field::Value;
use super::lower::key_bytes;
use super::model::{
    Chain, Element, Family, Statement, TABLE_LAYOUT, TABLE_NAME, Table, layout_of_comment,
};
use super::names::{MIDDLEBOXES, layout_of_chain, middlebox_of_chain, split_prefix};
use super::sys::{Batch, DumpReply, DumpRequest, FoundElement, TableFlags, fd};
use crate::desired::Desired;
use crate::netlink::{NLMSG_DONE, messages};
use difference::{creations, difference};
use mnl::{Bus, Socket};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use retired::{Retired, translates_replies};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// The kernel's nf_tables, over one socket that stays open.
pub struct Kernel {
    socket: Socket,
    sequence: u32,
    /// Whether tables can be protected against other programs; `None` before it has been tried.
    can_own: Option<bool>,
    /// The slots that are gone, but for the maps that translate replies.
    retired: Retired,
}

/// The reason a request to the kernel failed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The socket cannot be opened.
    #[error("no netlink socket for nftables: {0}; is nf_tables in this kernel?")]
    Socket(io::Error),
    /// The user is not privileged.
    #[error(
        "the kernel does not let this user change nftables; run as root, or with CAP_NET_ADMIN"
    )]
    Denied,
    /// The kernel rejected a message of a transaction; nothing of the transaction took effect.
    #[error("the kernel refused to {what}: {errno}; this transaction had no effect")]
    Refused {
        /// The purpose of the first rejected message.
        what: String,
        /// The kernel's reason.
        errno: Errno,
    },
    /// The transaction cannot be sent, or its answer not received.
    #[error("netlink: {0}")]
    Io(io::Error),
    /// A table of our name was made by another program.
    #[error(
        "there is a table '{family} {TABLE_NAME}' that nfqd did not make; look at it with 'nft list \
         table {family} {TABLE_NAME}' and, if nobody needs it, remove it with 'nft delete table \
         {family} {TABLE_NAME}'"
    )]
    Foreign {
        /// The table's family.
        family: Family,
    },
    /// A table was made by a newer nfqd, whose layout this one does not know.
    #[error(
        "the table '{family} {TABLE_NAME}' was made by a newer nfqd (layout {layout}; this one knows \
         layouts up to {TABLE_LAYOUT}); run that version, or remove its tables with 'nfqd flush', \
         which ends cached flows"
    )]
    Newer {
        /// The table's family.
        family: Family,
        /// The layout that its comment names.
        layout: u32,
    },
}

impl KernelError {
    /// Returns the kernel's error code, if it rejected the request.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            KernelError::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// The extent to which a change has taken effect when the kernel rejects it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Progress {
    /// Nothing: everything is as before.
    Nothing,
    /// Some of its steps: the ruleset must be loaded anew.
    Partial,
}

/// Size of the socket's buffers in bytes: enough for transactions of some hundred thousand
/// elements.
const BUFFER: usize = 64 << 20;
/// Size of the buffer for one datagram in bytes; the kernel sends smaller ones.
const DATAGRAM: usize = 1 << 16;

impl Kernel {
    /// Opens the socket.
    ///
    /// # Errors
    /// If there is no nf_tables in this kernel.
    pub fn open() -> Result<Kernel, KernelError> {
        let socket = Socket::new(Bus::Netfilter).map_err(KernelError::Socket)?;
        // Without the privilege, the first transaction fails with a better message than this would.
        // Root of a user namespace gets what net.core.wmem_max and rmem_max allow.
        let _ = setsockopt(&fd(&socket), sockopt::SndBufForce, &BUFFER)
            .or_else(|_| setsockopt(&fd(&socket), sockopt::SndBuf, &BUFFER));
        let _ = setsockopt(&fd(&socket), sockopt::RcvBufForce, &BUFFER)
            .or_else(|_| setsockopt(&fd(&socket), sockopt::RcvBuf, &BUFFER));
        Ok(Kernel { socket, sequence: 1, can_own: None, retired: Retired::default() })
    }

    fn batch(&self) -> Batch {
        Batch::new(self.sequence)
    }

    /// Sends a transaction. The kernel answers before `send` returns.
    fn commit(&mut self, batch: Batch) -> Result<(), KernelError> {
        if batch.len() == 0 {
            return Ok(());
        }
        let (bytes, awaited, batch) = batch.finish();
        self.sequence = awaited.wrapping_add(2);
        self.socket.send(&bytes).map_err(KernelError::Io)?;
        let mut acknowledged = false;
        let mut first_error = None;
        let mut buffer = vec![0; DATAGRAM];
        loop {
            let len = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => len,
                Err(Errno::EAGAIN) => break,
                // At ENOBUFS the receive buffer overran with errors; it holds the first ones.
                Err(Errno::EINTR | Errno::ENOBUFS) => continue,
                Err(errno) => return Err(KernelError::Io(errno.into())),
            };
            for message in messages(buffer.get(..len).unwrap_or_default()) {
                match message.result() {
                    Some(Ok(())) => acknowledged |= message.sequence == awaited,
                    Some(Err(errno)) => {
                        let what = || batch.label(message.sequence).to_string();
                        first_error.get_or_insert_with(|| (what(), errno));
                    }
                    None => {}
                }
            }
        }
        match first_error {
            Some((_, Errno::EPERM)) => Err(KernelError::Denied),
            Some((what, errno)) => Err(KernelError::Refused { what, errno }),
            None if acknowledged => Ok(()),
            None => {
                let error = io::Error::other("the kernel did not acknowledge a transaction");
                Err(KernelError::Io(error))
            }
        }
    }

    fn dump(&mut self, request: &DumpRequest) -> Result<DumpReply, KernelError> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&request.message(self.sequence)).map_err(KernelError::Io)?;
        let is_single = matches!(request, DumpRequest::Table(_));
        let mut reply = DumpReply::default();
        let mut bytes = vec![0; DATAGRAM];
        loop {
            let len = match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other.map_err(|errno| KernelError::Io(errno.into()))?,
            };
            for message in messages(bytes.get(..len).unwrap_or_default()) {
                if message.kind == NLMSG_DONE {
                    return Ok(reply);
                }
                match message.result() {
                    // A kernel without tables of this family has none of ours.
                    Some(Ok(()) | Err(Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP)) => {
                        return Ok(reply);
                    }
                    Some(Err(Errno::EPERM)) => return Err(KernelError::Denied),
                    Some(Err(errno)) => {
                        let what = "list the ruleset".to_string();
                        return Err(KernelError::Refused { what, errno });
                    }
                    None => request.read(message.bytes, &mut reply),
                }
            }
            if is_single {
                return Ok(reply);
            }
        }
    }

    /// Whether our table exists.
    ///
    /// # Errors
    /// If there is one that another program or a newer nfqd made.
    fn owns_table(&mut self, family: Family) -> Result<bool, KernelError> {
        match self.table_layout(family)? {
            Some(layout) if layout > TABLE_LAYOUT => Err(KernelError::Newer { family, layout }),
            layout => Ok(layout.is_some()),
        }
    }

    /// Returns the layout of our table by its comment: that of the nfqd that made it.
    ///
    /// # Errors
    /// If another program made it.
    fn table_layout(&mut self, family: Family) -> Result<Option<u32>, KernelError> {
        let Some(comment) = self.dump(&DumpRequest::Table(family))?.table_comment else {
            return Ok(None);
        };
        match comment.as_deref().and_then(layout_of_comment) {
            Some(layout) => Ok(Some(layout)),
            None => Err(KernelError::Foreign { family }),
        }
    }

    /// Checks that no newer nfqd has taken our table over, which its comment does not tell.
    ///
    /// # Errors
    /// If one has.
    fn check_layout(&mut self, family: Family) -> Result<(), KernelError> {
        let chains = self.dump(&DumpRequest::Chains(family))?.chains;
        match chains.keys().filter_map(|name| layout_of_chain(name)).max() {
            Some(layout) if layout > TABLE_LAYOUT => Err(KernelError::Newer { family, layout }),
            _ => Ok(()),
        }
    }

    /// Returns the port by which the kernel's notifications name the changes of this socket.
    pub fn port(&self) -> u32 {
        self.socket.portid()
    }

    /// Whether `ruleset`, which has been loaded, is intact as far as a quick look shows: its chains
    /// and sets, and the rules of its base chains.
    ///
    /// # Errors
    /// If the kernel cannot be asked, or a table of our name belongs to another program.
    pub fn is_intact(&mut self, ruleset: &Ruleset) -> Result<bool, KernelError> {
        for (&family, table) in ruleset {
            if !self.owns_table(family)? {
                return Ok(false);
            }
            let chains = self.dump(&DumpRequest::Chains(family))?.chains;
            let sets = self.dump(&DumpRequest::Sets(family))?.sets;
            if !chains.keys().eq(table.chains.keys()) || !sets.keys().eq(table.sets.keys()) {
                return Ok(false);
            }
            for (name, chain) in table.chains.iter().filter(|(_, chain)| chain.base.is_some()) {
                let rules = self.dump(&DumpRequest::Rules(family, Some(name.clone())))?.rules;
                if rules.iter().filter(|rule| rule.chain == *name).count() != chain.rules.len() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Returns the elements of one of our sets; none if there is no such set.
    ///
    /// # Errors
    /// If the kernel cannot be asked.
    pub fn elements(
        &mut self,
        family: Family,
        set: &str,
    ) -> Result<Vec<FoundElement>, KernelError> {
        let mut elements = self.dump(&DumpRequest::Elements(family, set.to_string()))?.elements;
        // A commit during the dump may have shown one twice. The end of a range has no counter, and may
        // have the key of the next range.
        let mut seen = BTreeSet::new();
        elements.retain(|element| element.counter.is_none() || seen.insert(element.key.clone()));
        Ok(elements)
    }

    /// Makes the kernel's tables equal to `wanted`, whatever an earlier nfqd left. Flow caches and
    /// base chains stay.
    ///
    /// # Errors
    /// If the kernel rejects it, or a table of our name belongs to another program; nothing is
    /// changed then.
    pub fn load(&mut self, wanted: &Ruleset) -> Result<(), KernelError> {
        let mut batch = self.batch();
        for family in Family::ALL {
            let exists = self.owns_table(family)?;
            if exists {
                self.check_layout(family)?;
            }
            match (wanted.get(&family), exists) {
                (Some(table), exists) => {
                    let flags = self.table_flags(family, exists)?;
                    self.replace(&mut batch, table, exists, flags)?;
                }
                // The packets that wait there came by the path that is no longer used.
                (None, true) => batch.delete_table(family),
                (None, false) => {}
            }
        }
        // The dumps have used sequence numbers; the batch has its own.
        self.commit(batch)?;
        self.retired = Retired::default();
        Ok(())
    }

    fn replace(
        &mut self,
        batch: &mut Batch,
        table: &Table,
        exists: bool,
        flags: TableFlags,
    ) -> Result<(), KernelError> {
        let family = table.family;
        batch.add_table(family, flags);
        if exists {
            let chains = self.dump(&DumpRequest::Chains(family))?.chains;
            let sets = self.dump(&DumpRequest::Sets(family))?.sets;
            batch.flush_rules(family, None);
            // Verdict maps keep chains in use.
            for name in sets.keys() {
                let is_cache = table.sets.get(name).is_some_and(|set| set.dynamic.is_some());
                if !is_cache {
                    batch.flush_set(family, name);
                }
            }
            for (name, found) in &sets {
                if !table.sets.get(name).is_some_and(|set| found.is_compatible(set)) {
                    batch.delete_set(family, name);
                }
            }
            for name in chains.keys().filter(|name| !table.chains.contains_key(*name)) {
                batch.delete_chain(family, name);
            }
        }
        for (name, chain) in &table.chains {
            batch.add_chain(family, name, chain);
        }
        for (name, set) in &table.sets {
            batch.add_set(family, name, set);
            batch.add_elements(family, name, &set.elements);
        }
        for (name, chain) in &table.chains {
            chain.rules.iter().for_each(|rule| batch.add_rule(family, name, rule));
        }
        Ok(())
    }

    /// Changes the kernel's ruleset: only the difference is sent. Slots that are removed stay until
    /// [`Kernel::finish`], because the engine may just have sent packets to them. Returns the
    /// counters of the rules that are replaced; `before` is what the kernel enforces now.
    ///
    /// # Errors
    /// If the kernel rejects it, with what has taken effect by then. `ENOENT` and `EEXIST` mean
    /// that another program has changed our tables, which [`Kernel::load`] repairs.
    pub fn change(
        &mut self,
        change: &Transition,
        before: &Desired,
    ) -> Result<Counters, (KernelError, Progress)> {
        let (mut replaced, mut progress) = (Counters::default(), Progress::Nothing);
        for step in &change.steps {
            self.step(step, change.queueing, before, &mut replaced, &mut progress)
                .map_err(|error| (error, progress))?;
        }
        Ok(replaced)
    }

    fn step(
        &mut self,
        Step { old, new }: &Step,
        queueing: &[Family],
        before: &Desired,
        replaced: &mut Counters,
        progress: &mut Progress,
    ) -> Result<(), KernelError> {
        let has_counter = |chain: &Chain| {
            chain.rules.iter().any(|rule| rule.statements.contains(&Statement::Counter))
        };
        for (name, chain) in old.chains.iter().filter(|(_, chain)| has_counter(chain)) {
            if middlebox_of_chain(name).is_some() && new.chains.get(name) != Some(chain) {
                self.add_chain_counters(Some(name), before, replaced)?;
            }
        }
        for (name, set) in &old.sets {
            let (prefix, kind) = split_prefix(name);
            let Some(new) = new.sets.get(name).filter(|_| kind == MIDDLEBOXES) else { continue };
            let is_replaced = |(key, element): &(&Vec<Value>, &Element)| {
                new.elements.get(*key).is_some_and(|now| now != *element)
            };
            // The element of a middlebox that becomes one of another kind counts anew.
            let keys = set.elements.iter().filter(is_replaced).map(|(key, _)| key_bytes(key));
            let keys: BTreeSet<Vec<u8>> = keys.collect();
            if !keys.is_empty() {
                self.add_middlebox_counters(prefix, |key| keys.contains(key), before, replaced)?;
            }
        }
        // A packet that traverses the ruleset when a transaction takes effect continues with the
        // old rules but looks up the new elements: the chains that these lead to must already be
        // filled.
        let mut batch = self.batch();
        creations(&mut batch, old, new);
        self.commit_part(batch, progress)?;
        let mut batch = self.batch();
        difference(&mut batch, old, new);
        for &family in queueing {
            let slots = |of| Table { sets: tracked_slots(of, family), ..Table::new(family) };
            difference(&mut batch, &slots(old), &slots(new));
        }
        self.commit_part(batch, progress)
    }

    fn commit_part(&mut self, batch: Batch, progress: &mut Progress) -> Result<(), KernelError> {
        let is_empty = batch.len() == 0;
        let result = self.commit(batch);
        // Messages that were sent and not acknowledged may have taken effect.
        let is_refused = matches!(result, Err(KernelError::Refused { .. } | KernelError::Denied));
        if !is_empty && !is_refused {
            *progress = Progress::Partial;
        }
        result
    }

    /// Removes the slots that a change has left. The maps that translate replies keep them until
    /// [`Kernel::remove_retired`].
    ///
    /// # Errors
    /// If the kernel rejects it; nothing is changed then.
    pub fn finish(&mut self, change: &Transition) -> Result<(), KernelError> {
        let mut batch = self.batch();
        let mut retired = Vec::new();
        for (name, gone) in change.leftovers() {
            for &family in change.queueing {
                if tracked_maps(family).contains(name) {
                    batch.delete_elements(family, name, gone.clone());
                }
            }
            if translates_replies(name) {
                retired.push((name.clone(), gone.into_keys().cloned().collect()));
            } else {
                batch.delete_elements(Family::Bridge, name, gone);
            }
        }
        self.commit(batch)?;
        self.retired.add(retired);
        Ok(())
    }

    /// Removes the slots that have been kept for this long for replies on their way through the bridge.
    ///
    /// # Errors
    /// If the kernel rejects it; nothing is changed then.
    pub fn remove_retired(&mut self, kept: Duration) -> Result<(), KernelError> {
        let mut batch = self.batch();
        let due = self.retired.take_due(kept);
        for (name, keys) in &due {
            let element = Element::default();
            let gone = keys.iter().map(|key| (key, &element));
            batch.delete_elements(Family::Bridge, name, gone);
        }
        self.commit(batch)
    }

    /// Removes our tables, whatever their layout. Returns whether there were any.
    ///
    /// # Errors
    /// If the kernel rejects it, or a table of our name belongs to another program.
    pub fn remove(&mut self) -> Result<bool, KernelError> {
        let mut batch = self.batch();
        for family in Family::ALL {
            if self.table_layout(family)?.is_some() {
                batch.delete_table(family);
            }
        }
        let any = batch.len() != 0;
        self.commit(batch).map(|()| any)
    }
}
