//! Makes the kernel and the engine hold what is to hold, and counts what they see.
//!
//! The kernel's tables are changed by the difference; what another program has done to them is noticed and repaired.

use crate::engine::flows::Flows;
use crate::engine::{Filters, Snapshot};
use crate::queue::Queue;
use crate::watch::Watch;
use crate::worker::{Shared, Worker};
use nfqd_rules::nft::delta::{Desired, Standing};
use nfqd_rules::nft::kernel::{Count, Counters, Kernel, KernelError, Made};
use nfqd_rules::nft::ruleset::{FastPath, Options, Steer};
use nfqd_rules::pool::Pools;
use nfqd_rules::slots::SlotKey;
use nfqd_rules::{Middlebox, Policy};
use nfqd_shmctl::{Action, MacAddr, RuleId};
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long packets that are being judged are waited for before old slots go.
const SETTLE: Duration = Duration::from_secs(1);
/// How often the kernel is asked for its counters at most.
const COUNTING: Duration = Duration::from_secs(1);
/// Why tables are broken that another program has changed.
const CHANGED: &str = "our tables were changed by another program";

/// The kernel, the workers, and what both hold.
pub struct Enforcer {
    kernel: Kernel,
    options: Options,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// None while the ruleset is loaded whole: the kernel would tell us of every element.
    watch: Option<Watch>,
    /// What the engine has.
    published: Desired,
    pools: Pools,
    /// What the kernel has, unless its tables are broken.
    loaded: Desired,
    standing: Standing,
    /// The kernel has not what it should have; tried again every second.
    stale: bool,
    /// The kernel's tables are not as we left them, whoever did it: they must be loaded whole. Why, for people.
    broken: Option<String>,
    repairs: u64,
    /// What was counted before the ruleset that stands was loaded, and in rules that were made anew since.
    kept: Counters,
    counters: Counters,
    /// When the kernel was asked for its counters, and for how long it is not asked again.
    counted: Option<(Instant, Duration)>,
}

impl Enforcer {
    /// Takes over a kernel that may have what an nfqd before has left.
    ///
    /// # Errors
    /// When the kernel cannot be asked what its rules have counted.
    pub fn new(mut kernel: Kernel, options: Options, shared: Arc<Shared>) -> Result<Enforcer, KernelError> {
        let kept = kernel.counters()?;
        Ok(Enforcer {
            kernel,
            options,
            shared,
            workers: Vec::new(),
            watch: None,
            published: Desired::default(),
            pools: Pools::default(),
            loaded: Desired::default(),
            standing: Standing::new(&Desired::default(), &options).0,
            stale: false,
            broken: None,
            repairs: 0,
            kept,
            counters: Counters::default(),
            counted: None,
        })
    }

    /// Makes `desired` hold for the first time.
    ///
    /// # Errors
    /// When the kernel refuses; it is as it was before.
    pub fn begin(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let policy = &desired.policy;
        self.kept.middleboxes.retain(|mac, _| policy.get(*mac).is_some());
        self.kept
            .rules
            .retain(|(mac, rule), _| policy.get(*mac).is_some_and(|middlebox| has(middlebox, *rule)));
        self.kept.backends.retain(|key, _| has_backend(policy, key));
        self.publish(desired);
        self.load(desired)
    }

    /// Starts a worker for a queue.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn serve(&mut self, queue: Queue) -> io::Result<()> {
        self.workers.push(Worker::start(queue, Arc::clone(&self.shared))?);
        Ok(())
    }

    /// The workers.
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Ends the workers. The ruleset stays.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.workers.drain(..).for_each(Worker::join);
    }

    /// How frames get into the queues, and how much the kernel does alone.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The flows that the engine remembers.
    pub fn flows(&self) -> &Flows {
        &self.shared.memory.flows
    }

    /// Forgets flows that have not been seen for too long.
    pub fn expire(&self) {
        self.shared.memory.flows.expire(self.shared.now());
    }

    /// Times that our tables were found changed by somebody else, and repaired.
    pub fn repairs(&self) -> u64 {
        self.repairs
    }

    /// Why our tables are not as they should be at the moment.
    pub fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Goes back to `desired`, which held before something that was refused: the next [`Enforcer::look_around`] makes sure
    /// of the kernel.
    pub fn take_back(&mut self, desired: &Desired) {
        self.publish(desired);
        self.stale = true;
    }

    /// Says that something but the policy has changed: the next [`Enforcer::look_around`] brings it to the kernel.
    pub fn refresh(&mut self) {
        self.stale = true;
    }

    /// What is done once a second: repairs, and what did not succeed before.
    pub fn look_around(&mut self, desired: &Desired) {
        if self.watch.is_none() {
            self.open_watch();
        }
        self.listen();
        if self.broken.as_deref() == Some(CHANGED) {
            log::warn!("{CHANGED}; loading them again");
        }
        if self.broken.is_some() {
            // Said by itself.
            let _ = self.repair_and_publish(desired);
        } else if self.stale
            && let Err(error) = self.enforce(desired)
        {
            log::error!("{error}; trying again");
        }
    }

    /// Gives the engine what is to hold now.
    fn publish(&mut self, desired: &Desired) {
        let changed = desired.changed(&self.published);
        for mac in &changed {
            self.pools.update(*mac, desired.policy.get(*mac), &desired.slots);
            // Here, where it is charged to the guest that asked for it, not to the queue that meets it first.
            self.pools.prepare(*mac);
        }
        let mut snapshot = Snapshot::new(desired.clone(), self.pools.clone());
        snapshot.learn = self.options.fast_path == FastPath::Full;
        snapshot.filters = match (self.options.fast_path, self.options.steer) {
            (FastPath::Full, _) => Filters::None,
            (FastPath::Off, Steer::BrNetfilter) => Filters::WithoutTags,
            (FastPath::Off, Steer::Native) => Filters::All,
        };
        if snapshot.filters != Filters::None {
            for mac in changed {
                let firewall = desired.policy.get(mac).and_then(Middlebox::firewall);
                firewall.into_iter().for_each(|firewall| firewall.prepare(mac));
            }
        }
        self.published = desired.clone();
        self.shared.snapshot.store(Arc::new(snapshot));
    }

    /// Makes the kernel's tables what they should be, whatever they are.
    fn load(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let (standing, ruleset) = Standing::new(desired, &self.options);
        self.watch = None;
        let loaded = self.kernel.load(&ruleset);
        self.open_watch();
        loaded?;
        self.standing = standing;
        self.loaded = desired.clone();
        self.stale = false;
        // What another program did before we listened again.
        self.broken = if self.kernel.stands(&ruleset)? { None } else { Some(CHANGED.to_string()) };
        Ok(())
    }

    fn open_watch(&mut self) {
        match Watch::open(self.kernel.port()) {
            Ok(watch) => self.watch = Some(watch),
            Err(errno) => log::error!("notifications: {errno}; changes by other programs are not noticed"),
        }
    }

    /// The same for tables that are not as we left them. What they have counted is kept. Tried again every second until it
    /// succeeds.
    fn repair(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let counted = self.kernel.counters();
        let loaded = counted.and_then(|counted| self.load(desired).map(|()| counted));
        match loaded {
            Ok(counted) => {
                self.repairs += 1;
                self.kept.add(&counted);
                (self.counters, self.counted) = (Counters::default(), None);
                Ok(())
            }
            Err(error) => {
                let why = error.to_string();
                if self.broken.as_ref() != Some(&why) {
                    log::error!("our tables cannot be loaded: {why}; tried again every second");
                }
                self.broken = Some(why);
                Err(error)
            }
        }
    }

    /// Looks whether another program has changed our tables.
    pub fn listen(&mut self) {
        if self.watch.as_mut().is_some_and(Watch::changed) && self.broken.is_none() {
            self.broken = Some(CHANGED.to_string());
        }
    }

    /// Brings what is to hold to the kernel, then to the engine. In between the engine still sends packets to slots of
    /// before; so these stay in the kernel until no such packet is on its way.
    ///
    /// # Errors
    /// When the kernel refuses; it is as before then, or broken and repaired as soon as that succeeds.
    pub fn enforce(&mut self, desired: &Desired) -> Result<(), KernelError> {
        if self.broken.is_some() {
            let repaired = self.repair_and_publish(desired);
            self.stale = repaired.is_err();
            return repaired;
        }
        let change = self.standing.change(&self.loaded, desired);
        let result = match self.kernel.change(&change) {
            Ok(lost) => {
                // What is kept now must not count twice, as long as the kernel is not asked again.
                self.counters.rules.retain(|rule, _| !lost.rules.contains_key(rule));
                self.kept.add(&lost);
                self.publish(desired);
                let finished = if change.has_leftovers() {
                    let deadline = Instant::now() + SETTLE;
                    self.workers.iter().for_each(|worker| worker.settle(deadline));
                    self.keep_counts_of_backends(desired);
                    self.kernel.finish(&change)
                } else {
                    Ok(())
                };
                self.standing.done(change);
                let before = std::mem::replace(&mut self.loaded, desired.clone());
                self.forget_counts(&before.policy, &desired.policy);
                // What holds now is right but for slots too many.
                finished.or_else(|error| {
                    log::warn!("old backends are not removed ({error}); loading the ruleset again");
                    self.repair(desired)
                })
            }
            // Somebody else has changed our tables: what is there is replaced whole.
            Err((error, _))
                if matches!(error.errno(), Some(Errno::ENOENT | Errno::EEXIST | Errno::EBUSY)) =>
            {
                log::warn!("our tables were changed by another program ({error}); repairing them");
                self.repair_and_publish(desired)
            }
            Err((error, Made::Nothing)) => Err(error),
            // Back to before in one transaction.
            Err((error, Made::Part)) => {
                let before = self.loaded.clone();
                Err(self.repair(&before).err().unwrap_or(error))
            }
        };
        // Our own notifications, of which a large change makes many.
        self.listen();
        self.stale = result.is_err();
        result
    }

    /// Keeps what backends had counted last whose numbers go: a new one begins at 0. The kernel is not asked for this, because
    /// it can only be asked for all.
    fn keep_counts_of_backends(&mut self, desired: &Desired) {
        for mac in desired.changed(&self.loaded) {
            for (key, old) in self.loaded.slots.of(mac) {
                let goes = desired.slots.get(&key).is_none_or(|new| new.index != old.index);
                if goes && let Some((to, from)) = self.counters.backends.remove(&key) {
                    self.kept.add_backend(key, to, from);
                }
            }
        }
    }

    fn repair_and_publish(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let before = self.loaded.policy.clone();
        let repaired = self.repair(desired);
        self.forget_counts(&before, &desired.policy);
        self.publish(desired);
        repaired
    }

    /// Forgets what rules have counted that are gone.
    fn forget_counts(&mut self, before: &Policy, now: &Policy) {
        for mac in now.changed(before) {
            let (Some(old), new) = (before.get(mac), now.get(mac)) else { continue };
            if new.is_none() {
                self.kept.middleboxes.remove(&mac);
                self.counters.middleboxes.remove(&mac);
            }
            for counters in [&mut self.kept, &mut self.counters] {
                counters.backends.retain(|key, _| key.middlebox != mac || has_backend(now, key));
            }
            for rule in rules(old).filter(|rule| new.is_none_or(|new| !has(new, *rule))) {
                self.kept.rules.remove(&(mac, rule));
                self.counters.rules.remove(&(mac, rule));
                for worker in &self.workers {
                    worker.counts.rules.lock().unwrap_or_else(PoisonError::into_inner).remove(&(mac, rule));
                }
            }
        }
    }

    /// Asks the kernel what it has counted: at most once a second, and seldom enough that it takes no more than a twentieth
    /// of the time. Guests may ask, and the answer is as long as the ruleset.
    pub fn count(&mut self) {
        if self.counted.is_none_or(|(counted, pause)| counted.elapsed() >= pause) {
            let start = Instant::now();
            match self.kernel.counters() {
                Ok(counters) => self.counters = counters,
                Err(error) => log::warn!("counters: {error}"),
            }
            self.counted = Some((Instant::now(), COUNTING.max(start.elapsed() * 20)));
        }
    }

    /// What has gone to a middlebox, as of the last [`Enforcer::count`].
    pub fn to_middlebox(&self, mac: MacAddr) -> Count {
        sum([&self.counters, &self.kept]
            .into_iter()
            .filter_map(|counters| counters.middleboxes.get(&mac).copied()))
    }

    /// What has gone to a backend of a service and come from it, as of the last [`Enforcer::count`].
    pub fn of_backend(&self, key: &SlotKey) -> (Count, Count) {
        let all = [&self.counters, &self.kept].map(|counters| counters.backends.get(key).copied());
        let all = || all.iter().copied().flatten();
        (sum(all().map(|(to, _)| to)), sum(all().map(|(_, from)| from)))
    }

    /// Packets whose flows the kernel could not remember, by the maps that were full, as of the last [`Enforcer::count`].
    pub fn full_maps(&self) -> &BTreeMap<String, u64> {
        &self.counters.full
    }

    /// What a rule has matched, in the kernel as of the last [`Enforcer::count`], in the engine until now; none stands for
    /// the default.
    pub fn by_rule(&self, mac: MacAddr, rule: Option<RuleId>) -> Count {
        let key = (mac, rule);
        let kernel =
            [&self.counters, &self.kept].into_iter().filter_map(|counters| counters.rules.get(&key).copied());
        let engine = self.workers.iter().filter_map(|worker| {
            worker.counts.rules.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied()
        });
        sum(kernel.chain(engine))
    }
}

fn sum(counts: impl Iterator<Item = Count>) -> Count {
    counts.fold((0, 0), |sum, count| (sum.0 + count.0, sum.1 + count.1))
}

/// The rules of a middlebox in the order they are looked at; none for its default, when that denies.
pub fn rules(middlebox: &Middlebox) -> impl Iterator<Item = Option<RuleId>> {
    let rules =
        middlebox.firewall().into_iter().flat_map(|firewall| firewall.rules().keys().copied().map(Some));
    rules.chain(has(middlebox, None).then_some(None))
}

fn has_backend(policy: &Policy, key: &SlotKey) -> bool {
    let service = policy.get(key.middlebox).and_then(|middlebox| middlebox.services().get(&key.vip));
    service.is_some_and(|service| service.backends().contains_key(&key.backend))
}

fn has(middlebox: &Middlebox, rule: Option<RuleId>) -> bool {
    middlebox.firewall().is_some_and(|firewall| match rule {
        Some(rule) => firewall.rules().contains_key(&rule),
        None => firewall.default_action() == Action::Deny,
    })
}
