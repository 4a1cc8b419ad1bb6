//! The reactor: waits for descriptors with epoll. Timers and signals are descriptors too.

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The most events that one call of [`Reactor::wait`] returns.
const MAX_EVENTS: usize = 32;

/// A set of descriptors, each with a token that is returned when it is ready.
pub struct Reactor {
    epoll: Epoll,
}

/// The kind of readiness to wait for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Readiness {
    /// Data to read.
    Readable,
    /// Room to write.
    Writable,
    /// Data to read; then it pauses.
    ReadableOnce,
    /// Room to write; then it pauses.
    WritableOnce,
    /// Nothing: the descriptor is left alone.
    Paused,
}

impl Readiness {
    fn flags(self) -> EpollFlags {
        match self {
            Readiness::Readable => EpollFlags::EPOLLIN,
            Readiness::Writable => EpollFlags::EPOLLOUT,
            Readiness::ReadableOnce => EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT,
            Readiness::WritableOnce => EpollFlags::EPOLLOUT | EpollFlags::EPOLLONESHOT,
            Readiness::Paused => EpollFlags::empty(),
        }
    }
}

impl Reactor {
    /// An empty reactor.
    ///
    /// # Errors
    /// If there are no more file descriptors.
    pub fn new() -> Result<Reactor, Errno> {
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(|epoll| Reactor { epoll })
    }

    /// Adds a descriptor. It is removed when it is closed.
    ///
    /// # Errors
    /// If the kernel refuses it.
    pub fn add(&self, fd: impl AsFd, readiness: Readiness, token: u64) -> Result<(), Errno> {
        self.epoll.add(fd, EpollEvent::new(readiness.flags(), token))
    }

    /// Removes a descriptor, which may stay open elsewhere: in another process, or as a duplicate.
    pub fn remove(&self, fd: impl AsFd) {
        // One that was not added is not there.
        let _ = self.epoll.delete(fd);
    }

    /// Changes what a descriptor is waited for.
    ///
    /// # Errors
    /// If the descriptor was not added.
    pub fn modify(&self, fd: impl AsFd, readiness: Readiness, token: u64) -> Result<(), Errno> {
        self.epoll.modify(fd, &mut EpollEvent::new(readiness.flags(), token))
    }

    /// Waits until a descriptor is ready, and returns the tokens of those that are.
    ///
    /// # Errors
    /// If the kernel refuses to wait.
    pub fn wait(&self) -> Result<Vec<u64>, Errno> {
        self.wait_for(EpollTimeout::NONE)
    }

    /// Returns the tokens of the descriptors that are ready, without waiting.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn ready(&self) -> Result<Vec<u64>, Errno> {
        self.wait_for(EpollTimeout::ZERO)
    }

    fn wait_for(&self, timeout: EpollTimeout) -> Result<Vec<u64>, Errno> {
        let mut events = [EpollEvent::empty(); MAX_EVENTS];
        match self.epoll.wait(&mut events, timeout) {
            Ok(count) => Ok(events.iter().take(count).map(EpollEvent::data).collect()),
            Err(Errno::EINTR) => Ok(Vec::new()),
            Err(errno) => Err(errno),
        }
    }
}

impl AsFd for Reactor {
    /// The descriptor that is ready when one of the set is.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

/// A timer that fires once at a time that is set again and again.
pub struct Timer {
    fd: TimerFd,
    /// The time at which it fires; `None` if it is not set.
    at: Option<Instant>,
    /// Whether it has fired, so that its descriptor is ready until it is set anew.
    has_fired: bool,
}

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// If there are no more file descriptors.
    pub fn new() -> Result<Timer, Errno> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let fd = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        Ok(Timer { fd, at: None, has_fired: false })
    }

    /// Sets the time at which the timer fires; `None` stops it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set(&mut self, at: Option<Instant>) -> Result<(), Errno> {
        if self.at == at && !self.has_fired {
            return Ok(());
        }
        (self.at, self.has_fired) = (at, false);
        match at {
            None => self.fd.unset(),
            Some(at) => {
                // A time of zero would stop the timer.
                let left = at.saturating_duration_since(Instant::now());
                let left = TimeSpec::from(left.max(Duration::from_nanos(1)));
                self.fd.set(Expiration::OneShot(left), TimerSetTimeFlags::empty())
            }
        }
    }

    /// Notes that the timer has fired. Its descriptor stays ready until the timer is set.
    pub fn acknowledge(&mut self) {
        (self.at, self.has_fired) = (None, true);
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Signals, as a descriptor.
pub struct SignalFd {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
}

impl SignalFd {
    /// Catches these signals from now on.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn new(signals: &[i32]) -> io::Result<SignalFd> {
        let (read, write) = UnixStream::pair()?;
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, signals)?;
        Ok(SignalFd { delivery })
    }

    /// Returns the signals that have arrived.
    pub fn pending(&mut self) -> Vec<i32> {
        self.delivery.pending().collect()
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn timers_and_sockets_and_signals_wake_the_reactor() {
        let reactor = Reactor::new().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        reactor.add(&far, Readiness::Readable, 7).unwrap();
        let mut timer = Timer::new().unwrap();
        reactor.add(&timer, Readiness::Readable, 8).unwrap();
        let start = Instant::now();
        timer.set(Some(start + Duration::from_millis(30))).unwrap();
        assert_eq!(reactor.wait().unwrap(), [8]);
        assert!(start.elapsed() >= Duration::from_millis(30));
        timer.acknowledge();
        timer.set(Some(start)).unwrap();
        assert_eq!(reactor.wait().unwrap(), [8], "a time that has passed fires at once");
        timer.set(None).unwrap();
        near.write_all(b"x").unwrap();
        assert_eq!(reactor.wait().unwrap(), [7]);
        reactor.modify(&far, Readiness::Writable, 9).unwrap();
        assert_eq!(reactor.wait().unwrap(), [9]);
        reactor.modify(&far, Readiness::WritableOnce, 9).unwrap();
        let outer = Reactor::new().unwrap();
        outer.add(&reactor, Readiness::Readable, 1).unwrap();
        assert_eq!(outer.wait().unwrap(), [1], "a reactor is a descriptor as well");
        assert_eq!((reactor.ready().unwrap(), reactor.ready().unwrap()), (vec![9], vec![]));
        drop(far);
        let mut signals = SignalFd::new(&[signal_hook::consts::SIGUSR1]).unwrap();
        reactor.add(&signals, Readiness::Readable, 10).unwrap();
        signal_hook::low_level::raise(signal_hook::consts::SIGUSR1).unwrap();
        assert_eq!(reactor.wait().unwrap(), [10]);
        assert_eq!(signals.pending(), [signal_hook::consts::SIGUSR1]);
    }
}
