//! A thread that reads the kernel's counters when they are many, so that commands need not wait for it.

use nfqd_rules::Desired;
use nfqd_rules::nft::kernel::{Counters, Kernel, KernelError};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A finished reading, and the time that it took.
pub(super) type Reading = (Result<Counters, KernelError>, Duration);

/// Work for the thread.
enum Job {
    /// Read the counters of this state.
    Read(Box<Desired>),
    /// Free counters, which takes a while when they are many.
    Free(Counters),
}

/// The thread, which ends when this is dropped.
pub(super) struct CounterReader {
    jobs: Sender<Job>,
    readings: Receiver<Reading>,
    finished: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl CounterReader {
    /// Starts the thread, which has a netlink socket of its own for each reading.
    ///
    /// # Errors
    /// If there are no more threads.
    pub(super) fn start(finished: &Arc<EventFd>) -> io::Result<CounterReader> {
        let (jobs, received) = channel();
        let (sender, readings) = channel();
        let signal = Arc::clone(finished);
        let run = move || {
            for job in received {
                let desired = match job {
                    Job::Read(desired) => desired,
                    Job::Free(counters) => {
                        drop(counters);
                        continue;
                    }
                };
                let start = Instant::now();
                let counters = Kernel::open().and_then(|mut kernel| kernel.counters(&desired));
                if sender.send((counters, start.elapsed())).is_err() {
                    return;
                }
                // The counter of the descriptor cannot overflow: there is one reading at a time.
                let _ = signal.write(1);
            }
        };
        let thread = std::thread::Builder::new().name("counters".to_string()).spawn(run)?;
        Ok(CounterReader { jobs, readings, finished: Arc::clone(finished), thread })
    }

    /// Begins a reading. Returns whether the thread is there.
    pub(super) fn begin(&self, desired: Desired) -> bool {
        self.jobs.send(Job::Read(Box::new(desired))).is_ok()
    }

    /// Whether the thread has ended, which it does by a panic only.
    pub(super) fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Takes a finished reading.
    pub(super) fn take(&self) -> Option<Reading> {
        let _ = self.finished.read();
        self.readings.try_recv().ok()
    }

    /// Frees counters that are no longer needed.
    pub(super) fn free(&self, counters: Counters) {
        // Without the thread, they are freed here.
        let _ = self.jobs.send(Job::Free(counters));
    }
}

/// Returns the descriptor that is readable when a reading has finished.
pub(super) fn finished_event() -> io::Result<Arc<EventFd>> {
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    Ok(Arc::new(event))
}
