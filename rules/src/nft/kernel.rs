//! Loads rulesets into the kernel: all of one, or the difference between two, in one transaction.
//!
//! Base chains are made once and stay until [`Kernel::remove`]: deleting one drops every packet that waits in a queue.

use super::delta::{Change, SLOT_MAPS, Step};
use super::field::Value;
use super::filters::mac_of_chain;
use super::model::{Chain, Family, Rule, Set, Statement, TABLE_COMMENT, TABLE_NAME, Table};
use super::ruleset::{CLOSE_TIMEOUT, FULL, Ruleset};
use super::sys::{Answers, Batch, FoundElement, Question, fd};
use crate::mark;
use crate::packet::Ports;
use crate::slots::{Edition, SlotKey, Slots, own_slot};
use mnl::{Bus, Socket};
use nfqd_shmctl::{MacAddr, Protocol, RuleId};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Instant;

/// The kernel's nf_tables, over one socket that stays open.
pub struct Kernel {
    socket: Socket,
    sequence: u32,
}

/// Why the kernel did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The socket cannot be made.
    #[error("no netlink socket for nftables: {0}; is nf_tables in this kernel?")]
    Socket(io::Error),
    /// Not privileged.
    #[error("the kernel does not let this user change nftables; run as root, or with CAP_NET_ADMIN")]
    Denied,
    /// A message of a transaction was refused; nothing of it was done.
    #[error("the kernel refused to {what}: {errno}; nothing was changed")]
    Refused {
        /// What the first message that was refused should do.
        what: String,
        /// The kernel's reason.
        errno: Errno,
    },
    /// The transaction cannot be sent or its answer not received.
    #[error("netlink: {0}")]
    Io(io::Error),
    /// A table of our name that somebody else made.
    #[error(
        "there is a table '{family} {TABLE_NAME}' that nfqd did not make; look at it with 'nft list table {family} \
         {TABLE_NAME}' and, if nobody needs it, remove it with 'nft delete table {family} {TABLE_NAME}'"
    )]
    Foreign {
        /// Its family.
        family: Family,
    },
}

impl KernelError {
    /// The kernel's reason, when it refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            KernelError::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

/// What an nfqd that ran before has left in the kernel.
#[derive(Debug, Default)]
pub struct Heritage {
    /// Its numbers.
    pub slots: Slots,
    /// The MACs of its backends, whether it had found them or a command had said them.
    pub macs: BTreeMap<SlotKey, MacAddr>,
    /// The ways back that the kernel remembers.
    pub replies: Vec<Reply>,
    by_index: BTreeMap<u32, SlotKey>,
}

/// A way back that the kernel remembers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    /// From the backend.
    pub source: IpAddr,
    /// To the client.
    pub destination: IpAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// As in packets from the backend.
    pub ports: Ports,
    /// Its slot's number.
    pub index: u32,
    /// Its slot.
    pub slot: SlotKey,
    /// Whether it is at its end.
    pub ends: bool,
}

/// The maps of flows: what their names end in, and their protocols.
const FLOW_MAPS: [(&str, Protocol); 8] = [
    ("tcp4", Protocol::TCP),
    ("tcp6", Protocol::TCP),
    ("udp4", Protocol::UDP),
    ("udp6", Protocol::UDP),
    ("port_tcp4", Protocol::TCP),
    ("port_tcp6", Protocol::TCP),
    ("port_udp4", Protocol::UDP),
    ("port_udp6", Protocol::UDP),
];

/// Reads the key of a map of replies: two addresses, two ports of two bytes padded to four.
fn reply(key: &[u8], protocol: Protocol, index: u32, slot: SlotKey) -> Option<Reply> {
    let address = |bytes: &[u8]| match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    let (addresses, ports) = key.split_at_checked(key.len().checked_sub(8)?)?;
    let (source, destination) = addresses.split_at(addresses.len() / 2);
    let &[a, b, _, _, c, d, _, _] = ports else { return None };
    let ports = Ports { source: u16::from_be_bytes([a, b]), destination: u16::from_be_bytes([c, d]) };
    Some(Reply {
        source: address(source)?,
        destination: address(destination)?,
        protocol,
        ports,
        index,
        slot,
        ends: false,
    })
}

/// Packets and bytes, from the IP header on.
pub type Count = (u64, u64);

/// What the fast path has counted.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    /// To each middlebox.
    pub middleboxes: BTreeMap<MacAddr, Count>,
    /// By each rule of a middlebox; by none, for what its default has dropped.
    pub rules: BTreeMap<(MacAddr, Option<RuleId>), Count>,
    /// To each backend of a service, and from it.
    pub backends: BTreeMap<SlotKey, (Count, Count)>,
    /// Packets whose flows could not be remembered, by the maps that were full.
    pub full: BTreeMap<String, u64>,
}

impl Counters {
    /// Adds to what has gone to a backend, and come from it.
    pub fn add_backend(&mut self, key: SlotKey, to: Count, from: Count) {
        let sums = self.backends.entry(key).or_default();
        add(&mut sums.0, to);
        add(&mut sums.1, from);
    }

    /// Adds to what has gone to a middlebox.
    pub fn add_middlebox(&mut self, mac: MacAddr, counted: Count) {
        add(self.middleboxes.entry(mac).or_default(), counted);
    }

    /// Adds to what a rule, or the default, has matched.
    pub fn add_rule(&mut self, mac: MacAddr, rule: Option<RuleId>, counted: Count) {
        add(self.rules.entry((mac, rule)).or_default(), counted);
    }

    /// Adds all of another's.
    pub fn add(&mut self, other: &Counters) {
        other.middleboxes.iter().for_each(|(mac, counted)| self.add_middlebox(*mac, *counted));
        other.rules.iter().for_each(|((mac, rule), counted)| self.add_rule(*mac, *rule, *counted));
        other.backends.iter().for_each(|(key, (to, from))| self.add_backend(*key, *to, *from));
        for (map, packets) in &other.full {
            *self.full.entry(map.clone()).or_default() += packets;
        }
    }

    /// Adds what an element or a rule has counted that names a rule of the policy in its comment.
    fn add_commented(&mut self, mac: MacAddr, comment: Option<&str>, counted: Count) {
        match comment.and_then(|text| text.strip_prefix("rule ")) {
            Some("default") => self.add_rule(mac, None, counted),
            Some(name) => name.parse().into_iter().for_each(|rule| self.add_rule(mac, Some(rule), counted)),
            None => {}
        }
    }
}

fn add(sum: &mut Count, more: Count) {
    *sum = (sum.0 + more.0, sum.1 + more.1);
}

/// What of a change has been made when the kernel refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Made {
    /// Nothing: all is as before.
    Nothing,
    /// Some steps: the ruleset must be loaded whole.
    Part,
}

/// Enough for transactions of some hundred thousand elements.
const BUFFER: usize = 64 << 20;

impl Kernel {
    /// Opens the socket.
    ///
    /// # Errors
    /// When there is no nf_tables in this kernel.
    pub fn open() -> Result<Kernel, KernelError> {
        let socket = Socket::new(Bus::Netfilter).map_err(KernelError::Socket)?;
        // Without the privilege, the first transaction says so better than a buffer size would.
        let _ = setsockopt(&fd(&socket), sockopt::SndBufForce, &BUFFER);
        let _ = setsockopt(&fd(&socket), sockopt::RcvBufForce, &BUFFER);
        Ok(Kernel { socket, sequence: 1 })
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
        let mut buffer = vec![0; 1 << 16];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => {
                    for (kind, sequence, body) in messages(buffer.get(..len).unwrap_or_default()) {
                        let answer =
                            body.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
                        match answer {
                            Some(0) if i32::from(kind) == libc::NLMSG_ERROR => {
                                acknowledged |= sequence == awaited
                            }
                            Some(errno) if i32::from(kind) == libc::NLMSG_ERROR => {
                                let errno = Errno::from_raw(-errno);
                                first_error.get_or_insert((batch.label(sequence).to_string(), errno));
                            }
                            _ => {}
                        }
                    }
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                // The receive buffer overran with errors; the first ones are there.
                Err(Errno::ENOBUFS) => {}
                Err(errno) => return Err(KernelError::Io(errno.into())),
            }
        }
        match first_error {
            Some((_, Errno::EPERM)) => Err(KernelError::Denied),
            Some((what, errno)) => Err(KernelError::Refused { what, errno }),
            None if acknowledged => Ok(()),
            None => Err(KernelError::Io(io::Error::other("the kernel did not acknowledge a transaction"))),
        }
    }

    fn ask(&mut self, question: &Question) -> Result<Answers, KernelError> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&question.message(self.sequence)).map_err(KernelError::Io)?;
        let single = matches!(question, Question::Table(_));
        let mut answers = Answers::default();
        let mut bytes = vec![0; 1 << 16];
        loop {
            let len = match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Err(Errno::EINTR) => continue,
                other => other.map_err(|errno| KernelError::Io(errno.into()))?,
            };
            for (kind, _, message) in messages(bytes.get(..len).unwrap_or_default()) {
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(answers),
                    libc::NLMSG_ERROR => {
                        let code =
                            message.get(16..20).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
                        return match Errno::from_raw(-code) {
                            _ if code == 0 => Ok(answers),
                            // A kernel without tables of this family has none of ours.
                            Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP => Ok(answers),
                            Errno::EPERM => Err(KernelError::Denied),
                            errno => {
                                Err(KernelError::Refused { what: "list the ruleset".to_string(), errno })
                            }
                        };
                    }
                    _ => question.read(message, &mut answers),
                }
            }
            if single {
                return Ok(answers);
            }
        }
    }

    /// Whether our table is there.
    ///
    /// # Errors
    /// When there is one that somebody else made.
    fn ours(&mut self, family: Family) -> Result<bool, KernelError> {
        match self.ask(&Question::Table(family))?.table_comment {
            None => Ok(false),
            Some(Some(comment)) if comment == TABLE_COMMENT => Ok(true),
            Some(_) => Err(KernelError::Foreign { family }),
        }
    }

    /// What an nfqd that ran before has left in the kernel; nothing, when there is no table of ours.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or a table of our name is somebody else's.
    pub fn heritage(&mut self) -> Result<Heritage, KernelError> {
        let (mut out, now) = (Heritage::default(), Instant::now());
        if !self.ours(Family::Bridge)? {
            return Ok(out);
        }
        let index = |bytes: &[u8]| bytes.try_into().map(u32::from_ne_bytes).map(mark::index).ok();
        for (map, of) in [("backend_vip4", 4), ("backend_vip6", 16)] {
            for element in
                self.elements(Family::Bridge, map)?.iter().filter(|element| element.data.len() == of)
            {
                let edition: Option<Edition> = element.comment.as_ref().and_then(|text| text.parse().ok());
                if let (Some(index), Some(edition)) = (index(&element.key), edition) {
                    out.slots.adopt([(index, edition)], now);
                    out.by_index.insert(index, edition.key());
                }
            }
        }
        for element in self.elements(Family::Bridge, "backend_mac")? {
            let key = index(&element.key).and_then(|index| out.by_index.get(&index));
            let key = key.filter(|key| **key != own_slot(key.middlebox, key.vip));
            let mac: Option<[u8; 6]> = element.data.try_into().ok();
            out.macs.extend(key.copied().zip(mac.map(MacAddr)));
        }
        let found = self.elements(Family::Bridge, "ask")?.into_iter().filter_map(|element| {
            let mac = MacAddr(element.key.try_into().ok()?);
            Some((element.comment?.parse().ok()?, mac))
        });
        out.slots.adopt_middleboxes(found, now);
        for (name, protocol) in FLOW_MAPS {
            for element in self.elements(Family::Bridge, &format!("flows_{name}"))? {
                index(&element.data).into_iter().for_each(|index| out.slots.seen(index, now));
            }
            for element in self.elements(Family::Bridge, &format!("replies_{name}"))? {
                let Some(index) = index(&element.data) else { continue };
                out.slots.seen(index, now);
                let key = out.by_index.get(&index).copied();
                // What is at its end is remembered for that long only.
                let ends = element.timeout.is_some_and(|given| given <= u64::from(CLOSE_TIMEOUT) * 1000);
                let found = key.and_then(|key| reply(&element.key, protocol, index, key));
                out.replies.extend(found.map(|reply| Reply { ends, ..reply }));
            }
        }
        Ok(out)
    }

    /// What our ruleset has counted, whoever loaded it.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn counters(&mut self) -> Result<Counters, KernelError> {
        let mut out = Counters::default();
        if !self.ours(Family::Bridge)? {
            return Ok(out);
        }
        let sets = self.ask(&Question::Sets(Family::Bridge))?.sets;
        let counts = |name: &str| {
            ["middleboxes", "closed"].contains(&name) || name.starts_with("deny") || name.starts_with("allow")
        };
        for name in sets.keys().filter(|name| counts(name)) {
            for element in self.elements(Family::Bridge, name)? {
                let mac = element.key.first_chunk().copied().map(MacAddr);
                match (mac, element.counted) {
                    (Some(mac), Some(counted)) if name == "middleboxes" => out.add_middlebox(mac, counted),
                    (Some(mac), Some(counted)) => out.add_commented(mac, element.comment.as_deref(), counted),
                    _ => {}
                }
            }
        }
        for (name, is_to) in [("backend_mac", true), ("backend_vip4", false), ("backend_vip6", false)] {
            for element in self.elements(Family::Bridge, name)? {
                let edition: Option<Edition> = element.comment.as_ref().and_then(|text| text.parse().ok());
                let Some((edition, counted)) = edition.zip(element.counted) else { continue };
                let (to, from) = if is_to { (counted, (0, 0)) } else { ((0, 0), counted) };
                out.add_backend(edition.key(), to, from);
            }
        }
        self.add_chain_counters(None, &mut out)?;
        Ok(out)
    }

    /// The number by which the kernel's notifications name what this socket did.
    pub fn port(&self) -> u32 {
        self.socket.portid()
    }

    /// Whether `ruleset`, which has been loaded, still stands as far as can be seen at a glance: its chains and sets, and the
    /// rules of its base chains.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or a table of our name is somebody else's.
    pub fn stands(&mut self, ruleset: &Ruleset) -> Result<bool, KernelError> {
        for (&family, table) in ruleset {
            if !self.ours(family)? {
                return Ok(false);
            }
            let chains = self.ask(&Question::Chains(family))?.chains;
            let sets = self.ask(&Question::Sets(family))?.sets;
            if !chains.keys().eq(table.chains.keys()) || !sets.keys().eq(table.sets.keys()) {
                return Ok(false);
            }
            for (name, chain) in table.chains.iter().filter(|(_, chain)| chain.priority.is_some()) {
                let rules = self.ask(&Question::Rules(family, Some(name.clone())))?.rules;
                if rules.iter().filter(|rule| rule.chain == *name).count() != chain.rules.len() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// The elements of one of our sets; none when there is no such set.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn elements(&mut self, family: Family, set: &str) -> Result<Vec<FoundElement>, KernelError> {
        Ok(self.ask(&Question::Elements(family, set.to_string()))?.elements)
    }

    /// Whether this kernel takes a rule of these statements in a chain of this family: it is tried in a table of its
    /// own, which is gone before anything else sees it.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than not knowing the statement.
    pub fn knows(&mut self, family: Family, statement: &Statement) -> Result<bool, KernelError> {
        let had_table = self.ours(family)?;
        let mut batch = self.batch();
        batch.add_table(family);
        batch.add_chain(family, "probe", &Chain::default());
        let rule = Rule { statements: vec![statement.clone()], comment: None };
        batch.add_rule(family, "probe", &rule);
        batch.flush_rules(family, Some("probe"));
        batch.delete_chain(family, "probe");
        if !had_table {
            batch.delete_table(family);
        }
        match self.commit(batch) {
            Ok(()) => Ok(true),
            Err(KernelError::Refused {
                errno: Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT,
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes the kernel's tables what `wanted` says, whatever an earlier nfqd left. Flow caches and base chains stay.
    ///
    /// # Errors
    /// When the kernel refuses, or a table of our name is somebody else's; nothing is changed then.
    pub fn load(&mut self, wanted: &Ruleset) -> Result<(), KernelError> {
        let mut batch = self.batch();
        for family in [Family::Bridge, Family::Ip, Family::Ip6] {
            let found = self.ours(family)?;
            match (wanted.get(&family), found) {
                (Some(table), found) => self.replace(&mut batch, table, found)?,
                // The packets that wait there came by a way that is not used any more.
                (None, true) => batch.delete_table(family),
                (None, false) => {}
            }
        }
        // The questions have used up sequence numbers; the batch has its own.
        self.commit(batch)
    }

    fn replace(&mut self, batch: &mut Batch, table: &Table, found: bool) -> Result<(), KernelError> {
        let family = table.family;
        let (chains, sets) = if found {
            (self.ask(&Question::Chains(family))?.chains, self.ask(&Question::Sets(family))?.sets)
        } else {
            Default::default()
        };
        batch.add_table(family);
        if found {
            batch.flush_rules(family, None);
        }
        // Maps of verdicts keep chains in use.
        for name in sets.keys() {
            let cache = table.sets.get(name).is_some_and(|set| set.dynamic.is_some());
            if !cache {
                batch.flush_set(family, name);
            }
        }
        for (name, found) in &sets {
            if !table.sets.get(name).is_some_and(|set| found.serves(set)) {
                batch.delete_set(family, name);
            }
        }
        for (name, _) in chains.iter().filter(|(name, _)| !table.chains.contains_key(*name)) {
            batch.delete_chain(family, name);
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

    /// Changes the kernel's ruleset: only the difference is sent. Slots that go stay until [`Kernel::finish`], so that
    /// packets which the engine has just sent to them find them. What the rules that are made anew had counted comes back.
    ///
    /// # Errors
    /// When the kernel refuses, with what has been done by then. `ENOENT` and `EEXIST` mean that somebody else has changed
    /// our tables: [`Kernel::load`] repairs them.
    pub fn change(&mut self, change: &Change) -> Result<Counters, (KernelError, Made)> {
        let (mut lost, mut made) = (Counters::default(), Made::Nothing);
        for Step { old, new } in &change.steps {
            self.step(old, new, &mut lost, &mut made).map_err(|error| (error, made))?;
        }
        Ok(lost)
    }

    fn step(
        &mut self,
        old: &Table,
        new: &Table,
        lost: &mut Counters,
        made: &mut Made,
    ) -> Result<(), KernelError> {
        let counting =
            |chain: &Chain| chain.rules.iter().any(|rule| rule.statements.contains(&Statement::Counter));
        for (name, chain) in old.chains.iter().filter(|(_, chain)| counting(chain)) {
            if mac_of_chain(name).is_some() && new.chains.get(name) != Some(chain) {
                self.add_chain_counters(Some(name), lost)?;
            }
        }
        // A packet that is in the ruleset when a transaction comes true goes on with the rules of before, but looks up
        // elements of now: it must find the chains filled that these lead to.
        let mut batch = self.batch();
        creations(&mut batch, old, new);
        self.commit_part(batch, made)?;
        let mut batch = self.batch();
        difference(&mut batch, old, new);
        self.commit_part(batch, made)
    }

    fn commit_part(&mut self, batch: Batch, made: &mut Made) -> Result<(), KernelError> {
        let any = batch.len() != 0;
        let result = self.commit(batch);
        // What was sent and not acknowledged may have been done.
        if any && !matches!(result, Err(KernelError::Refused { .. } | KernelError::Denied)) {
            *made = Made::Part;
        }
        result
    }

    /// Removes the slots that a change has left.
    ///
    /// # Errors
    /// When the kernel refuses; nothing is changed then.
    pub fn finish(&mut self, change: &Change) -> Result<(), KernelError> {
        let mut batch = self.batch();
        for (name, gone) in change.leftovers() {
            batch.delete_elements(Family::Bridge, name, gone);
        }
        self.commit(batch)
    }

    fn add_chain_counters(&mut self, chain: Option<&str>, out: &mut Counters) -> Result<(), KernelError> {
        for rule in self.ask(&Question::Rules(Family::Bridge, chain.map(str::to_string)))?.rules {
            let Some(counted) = rule.counted else { continue };
            let full = rule.comment.as_deref().and_then(|text| text.strip_prefix(FULL));
            if let Some(mac) = mac_of_chain(&rule.chain) {
                out.add_commented(mac, rule.comment.as_deref(), counted);
            } else if let Some(map) = full.filter(|_| counted.0 != 0) {
                *out.full.entry(map.to_string()).or_default() += counted.0;
            }
        }
        Ok(())
    }

    /// Removes our tables.
    ///
    /// # Errors
    /// When the kernel refuses, or a table of our name is somebody else's.
    pub fn remove(&mut self) -> Result<bool, KernelError> {
        let mut batch = self.batch();
        for family in [Family::Bridge, Family::Ip, Family::Ip6] {
            if self.ours(family)? {
                batch.delete_table(family);
            }
        }
        let any = batch.len() != 0;
        self.commit(batch).map(|()| any)
    }
}

/// The messages of a datagram: type, sequence number, and all bytes.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let word = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
        let (len, kind, sequence) = (word(0)? as usize, word(4)? as u16, word(8)?);
        if len < 16 {
            return None;
        }
        let message = bytes.get(..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, sequence, message))
    })
}

/// Adds chains with their rules, and the sets that come with them.
fn creations(batch: &mut Batch, old: &Table, new: &Table) {
    let family = new.family;
    let chains: Vec<_> = new.chains.iter().filter(|(name, _)| !old.chains.contains_key(*name)).collect();
    if chains.is_empty() {
        return;
    }
    for (name, chain) in &chains {
        batch.add_chain(family, name, chain);
    }
    for (name, set) in new.sets.iter().filter(|(name, _)| !old.sets.contains_key(*name)) {
        batch.add_set(family, name, set);
        batch.add_elements(family, name, &set.elements);
    }
    for (name, chain) in chains {
        chain.rules.iter().for_each(|rule| batch.add_rule(family, name, rule));
    }
}

/// What is left to do behind [`creations`]. What a chain's rules name must be there before them; what nothing names any
/// more goes last.
fn difference(batch: &mut Batch, old: &Table, new: &Table) {
    let family = new.family;
    let created = new.chains.keys().any(|name| !old.chains.contains_key(name));
    for (name, set) in &new.sets {
        if let Some(before) = old.sets.get(name) {
            elements_difference(batch, family, name, before, set);
        } else if !created {
            batch.add_set(family, name, set);
            batch.add_elements(family, name, &set.elements);
        }
    }
    for (name, chain) in &new.chains {
        if let Some(before) = old.chains.get(name)
            && before.rules != chain.rules
        {
            batch.flush_rules(family, Some(name));
            chain.rules.iter().for_each(|rule| batch.add_rule(family, name, rule));
        }
    }
    let gone = old.chains.iter().filter(|(name, _)| !new.chains.contains_key(*name));
    let gone: Vec<&String> = gone.map(|(name, _)| name).collect();
    gone.iter().for_each(|name| batch.flush_rules(family, Some(name)));
    for name in old.sets.keys().filter(|name| !new.sets.contains_key(*name)) {
        batch.delete_set(family, name);
    }
    gone.iter().for_each(|name| batch.delete_chain(family, name));
}

fn elements_difference(batch: &mut Batch, family: Family, name: &str, old: &Set, new: &Set) {
    let old = &old.elements;
    let same = |key: &Vec<Value>| old.get(key) == new.elements.get(key);
    let waits = |key: &Vec<Value>| name.starts_with(SLOT_MAPS) && !new.elements.contains_key(key);
    batch.delete_elements(family, name, old.iter().filter(|(key, _)| !same(key) && !waits(key)));
    batch.add_elements(family, name, new.elements.iter().filter(|(key, _)| !same(key)));
}
