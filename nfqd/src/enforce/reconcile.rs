//! Reconciliation: the kernel and the engine are brought to the desired state here, and the tables
//! are repaired.

use super::Enforcer;
use super::queue_path::restore_calls;
use crate::engine::{FilterScope, Snapshot};
use nfqd_rules::nft::delta::Installed;
use nfqd_rules::nft::kernel::{KernelError, Progress};
use nfqd_rules::nft::options::{FastPath, QueuePath};
use nfqd_rules::{Desired, Middlebox};
use nix::errno::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The longest wait for packets that are being decided, before old slots are removed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// The time for which a slot that is gone still translates replies: longer than these take through the
/// bridge, even if another program queues them.
const RETIREMENT: Duration = Duration::from_secs(5);
/// The pauses between two repairs at the first changes by another program, and while it goes on.
const MIN_REPAIR_PAUSE: Duration = Duration::from_millis(10);
const MAX_REPAIR_PAUSE: Duration = Duration::from_secs(1);
/// The time without a change after which the pauses begin anew.
const PEACE: Duration = Duration::from_secs(10);
/// The reason reported when another program has modified our tables.
const CHANGED: &str = "nfqd's tables were changed by another program";

impl Enforcer {
    /// Does what is due once a second: repairs, and retries of what failed before.
    pub fn tick(&mut self, desired: &Desired) {
        self.resume_monitor();
        self.check_steering();
        if let Err(error) = self.kernel.remove_retired(RETIREMENT) {
            log::warn!(
                "old slots could not be removed from the kernel ({error}); loading the ruleset again"
            );
            self.broken.get_or_insert_with(|| CHANGED.to_string());
        }
        let _ = self.repair_changes(desired);
        if self.broken.as_deref().is_some_and(|reason| reason != CHANGED) {
            // The failure is logged where it happens.
            let _ = self.repair_and_publish(desired);
        } else if self.is_stale
            && let Err(error) = self.enforce(desired)
        {
            log::error!("{error}; retrying every second");
        }
    }

    /// Makes sure that frames reach the queues.
    fn check_steering(&mut self) {
        if self.options.queue_path != QueuePath::BrNetfilter {
            return;
        }
        let before = std::mem::replace(&mut self.steering_error, restore_calls(self.calls_tagged));
        if self.steering_error != before
            && let Some(error) = &self.steering_error
        {
            log::error!("{error}");
        }
    }

    /// Loads the tables again at once if another program has changed them. While it keeps doing that,
    /// two programs do not fight at full speed: returns how long the next repair has to wait.
    pub fn repair_changes(&mut self, desired: &Desired) -> Option<Duration> {
        self.check_tables();
        if self.broken.as_deref() != Some(CHANGED) {
            return None;
        }
        let now = Instant::now();
        if now < self.next_repair {
            return Some(self.next_repair - now);
        }
        log::warn!("{CHANGED}; loading them again");
        // The failure is logged where it happens.
        let _ = self.repair_and_publish(desired);
        let is_fight = now < self.next_repair + PEACE;
        let longer = (self.repair_pause * 2).clamp(MIN_REPAIR_PAUSE, MAX_REPAIR_PAUSE);
        self.repair_pause = if is_fight { longer } else { MIN_REPAIR_PAUSE };
        self.next_repair = Instant::now() + self.repair_pause;
        None
    }

    /// Notices changes of our tables by other programs.
    pub fn check_tables(&mut self) {
        if self.monitor.has_foreign_change() && self.broken.is_none() {
            self.broken = Some(CHANGED.to_string());
        }
    }

    /// Rolls back to `desired`, which was enforced before something that was refused. The next
    /// [`Enforcer::tick`] makes sure of the kernel.
    pub fn roll_back(&mut self, desired: &Desired) {
        self.publish(desired);
        self.is_stale = true;
    }

    /// Announces that slots have changed: the next [`Enforcer::tick`] brings them to the kernel.
    pub fn mark_stale(&mut self) {
        self.is_stale = true;
    }

    /// Brings the desired state to the kernel, then to the engine. In between, the engine still
    /// sends packets to the old slots, so these stay in the kernel until no such packet is on its
    /// way.
    ///
    /// # Errors
    /// If the kernel refuses. It is as before then, or broken and repaired as soon as possible.
    pub fn enforce(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let result = if self.broken.is_some() {
            self.repair_and_publish(desired)
        } else {
            let result = self.change(desired);
            // A large change makes many notifications of our own.
            self.check_tables();
            result
        };
        self.is_stale = result.is_err();
        result
    }

    fn change(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let change = self.installed.change(&self.desired_in_kernel, desired);
        let replaced = match self.kernel.change(&change, &self.desired_in_kernel) {
            Ok(replaced) => replaced,
            Err((error, _)) if is_foreign_change(&error) => {
                log::warn!(
                    "nfqd's tables were changed by another program ({error}); repairing them"
                );
                return self.repair_and_publish(desired);
            }
            Err((error, Progress::Nothing)) => return Err(error),
            Err((error, Progress::Partial)) => {
                let before = self.desired_in_kernel.clone();
                return Err(self.repair(&before).err().unwrap_or(error));
            }
        };
        self.counters.carry_replaced(&replaced);
        self.publish(desired);
        let mut finished = Ok(());
        if change.has_leftovers() {
            let deadline = Instant::now() + DRAIN_TIMEOUT;
            for worker in &self.workers {
                worker.wait_for_batch(deadline);
            }
            self.counters.carry_removed_slots(&self.desired_in_kernel, desired);
            finished = self.kernel.finish(&change);
        }
        self.installed.done(change);
        let before = std::mem::replace(&mut self.desired_in_kernel, desired.clone());
        self.counters.forget_removed(&before.policy, &desired.policy, &self.workers);
        // The ruleset is right but for slots that should be gone.
        finished.or_else(|error| {
            log::warn!("old slots could not be removed from the kernel ({error}); loading the ruleset again");
            self.repair(desired)
        })
    }

    /// Gives the engine the desired state.
    pub(super) fn publish(&mut self, desired: &Desired) {
        let changed = desired.changed(&self.desired_in_engine);
        for key in &changed {
            self.pools.update(*key, desired.policy.get(*key), &desired.slots);
            // Prepared here, where it counts against the budget of the guest that asked for it, and
            // not by the worker that first needs it.
            self.pools.prepare(*key);
        }
        let mut snapshot = Snapshot::new(desired.clone(), self.pools.clone());
        snapshot.cache_flows = self.options.fast_path == FastPath::Full;
        snapshot.tracked_first = self.options.queue_path == QueuePath::BrNetfilter;
        snapshot.filter_scope = match (self.options.fast_path, self.options.queue_path) {
            (FastPath::Full, _) => FilterScope::None,
            (FastPath::Off, QueuePath::BrNetfilter) => FilterScope::Untagged,
            (FastPath::Off, QueuePath::Native) => FilterScope::All,
        };
        if snapshot.filter_scope != FilterScope::None {
            for key in changed {
                let middlebox = desired.policy.get(key);
                if let Some(firewall) = middlebox.and_then(Middlebox::firewall) {
                    firewall.prepare(key.mac);
                }
            }
        }
        self.desired_in_engine = desired.clone();
        self.shared.snapshot.store(Arc::new(snapshot));
    }

    /// Makes the kernel's tables what they should be, whatever they are.
    pub(super) fn load(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let (installed, ruleset) = Installed::new(desired, &self.options);
        // The kernel would notify us of every element.
        self.monitor.pause();
        let loaded = self.kernel.load(&ruleset);
        self.resume_monitor();
        loaded?;
        self.installed = installed;
        self.desired_in_kernel = desired.clone();
        self.is_stale = false;
        // Another program may have changed something while the monitor was paused.
        let is_intact = self.kernel.is_intact(&ruleset)?;
        self.broken = if is_intact { None } else { Some(CHANGED.to_string()) };
        Ok(())
    }

    fn resume_monitor(&mut self) {
        if let Err(errno) = self.monitor.resume() {
            log::error!(
                "cannot subscribe to nftables notifications: {errno}; changes by other programs are not detected"
            );
        }
    }

    /// Loads tables that are not as we left them, and carries over what they have counted.
    fn repair(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let counters = self.kernel.counters(&self.desired_in_kernel);
        let loaded = counters.and_then(|counters| self.load(desired).map(|()| counters));
        match loaded {
            Ok(counters) => {
                self.repairs += 1;
                self.counters.carry_all(&counters);
                Ok(())
            }
            Err(error) => {
                let reason = error.to_string();
                if self.broken.as_ref() != Some(&reason) {
                    log::error!("nfqd's tables cannot be loaded: {reason}; retrying every second");
                }
                self.broken = Some(reason);
                Err(error)
            }
        }
    }

    fn repair_and_publish(&mut self, desired: &Desired) -> Result<(), KernelError> {
        let before = self.desired_in_kernel.policy.clone();
        let repaired = self.repair(desired);
        self.counters.forget_removed(&before, &desired.policy, &self.workers);
        self.publish(desired);
        repaired
    }
}

/// Whether an error shows that another program has changed our tables.
fn is_foreign_change(error: &KernelError) -> bool {
    matches!(error.errno(), Some(Errno::ENOENT | Errno::EEXIST | Errno::EBUSY))
}
