//! TCP checks: connections from the host to backends, which are closed again at once.

use nfqd_rules::NetworkId;
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockname, getsockopt,
    setsockopt, socket, sockopt,
};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The time between two checks of a backend, and the time that an answer may take.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The most connections at a time. If there are more backends, all are checked less often.
const MAX_CONNECTIONS: usize = 512;

/// The network, the address and the port of a backend.
pub(super) type Target = (NetworkId, IpAddr, u16);

/// The result of a check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// The backend has accepted the connection.
    Answered,
    /// The backend, or a router on the way, has refused the connection, or nobody has answered.
    Failed,
    /// The host itself cannot make the check, which says nothing about the backend.
    Impossible(Errno),
}

/// The state that the checking thread shares with its owner.
#[derive(Default)]
struct CheckExchange {
    /// The backends to check, each with the device by which the host is on its network; without one
    /// it cannot be checked.
    targets: BTreeMap<Target, Option<String>>,
    outcomes: BTreeMap<Target, Outcome>,
    stop: bool,
}

/// A thread that checks backends.
pub(super) struct TcpChecks {
    exchange: Arc<(Mutex<CheckExchange>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

fn lock(exchange: &Mutex<CheckExchange>) -> MutexGuard<'_, CheckExchange> {
    exchange.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TcpChecks {
    /// Starts the thread, which sleeps while there is nothing to check.
    ///
    /// # Errors
    /// If there are no more threads.
    pub(super) fn start() -> std::io::Result<TcpChecks> {
        let exchange = Arc::new((Mutex::new(CheckExchange::default()), Condvar::new()));
        let its_exchange = Arc::clone(&exchange);
        let thread = Builder::new()
            .name("checks".to_string())
            .spawn(move || check_until_stopped(&its_exchange))?;
        Ok(TcpChecks { exchange, thread: Some(thread) })
    }

    /// Has these backends checked from now on, each through its device and no other. Returns the
    /// results since the last call.
    pub(super) fn exchange(
        &self,
        targets: BTreeMap<Target, Option<String>>,
    ) -> BTreeMap<Target, Outcome> {
        let (mutex, changed) = &*self.exchange;
        let mut exchange = lock(mutex);
        if exchange.targets.is_empty() && !targets.is_empty() {
            changed.notify_one();
        }
        exchange.targets = targets;
        std::mem::take(&mut exchange.outcomes)
    }
}

impl Drop for TcpChecks {
    fn drop(&mut self) {
        let (mutex, changed) = &*self.exchange;
        lock(mutex).stop = true;
        changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn check_until_stopped((mutex, changed): &(Mutex<CheckExchange>, Condvar)) {
    loop {
        let start = Instant::now();
        let idle = |exchange: &mut CheckExchange| exchange.targets.is_empty() && !exchange.stop;
        let exchange =
            changed.wait_while(lock(mutex), idle).unwrap_or_else(PoisonError::into_inner);
        let targets: Vec<_> =
            exchange.targets.iter().map(|(target, bridge)| (*target, bridge.clone())).collect();
        drop(exchange);
        for some in targets.chunks(MAX_CONNECTIONS) {
            if lock(mutex).stop {
                return;
            }
            let outcomes = check(some, CHECK_INTERVAL);
            lock(mutex).outcomes.extend(outcomes);
        }
        let pause = CHECK_INTERVAL.saturating_sub(start.elapsed());
        let running = |exchange: &mut CheckExchange| !exchange.stop;
        let (exchange, _) = changed
            .wait_timeout_while(lock(mutex), pause, running)
            .unwrap_or_else(PoisonError::into_inner);
        if exchange.stop {
            return;
        }
    }
}

/// Connects to all targets at once.
fn check(targets: &[(Target, Option<String>)], timeout: Duration) -> Vec<(Target, Outcome)> {
    let deadline = Instant::now() + timeout;
    let mut outcomes = Vec::new();
    let mut pending: Vec<(Target, OwnedFd)> = Vec::new();
    let own = own_addresses();
    for (target, bridge) in targets {
        let bridge = bridge.as_deref().ok_or(Errno::ENODEV);
        match bridge.and_then(|bridge| begin(*target, bridge, &own)) {
            Ok(None) => outcomes.push((*target, Outcome::Answered)),
            Ok(Some(socket)) => pending.push((*target, socket)),
            // The kernel reports at once what it has been told before.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH) => {
                outcomes.push((*target, Outcome::Failed));
            }
            Err(errno) => outcomes.push((*target, Outcome::Impossible(errno))),
        }
    }
    while !pending.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut polled: Vec<PollFd<'_>> = pending
            .iter()
            .map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLOUT))
            .collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let any = poll(&mut polled, timeout).unwrap_or(0);
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let mut ready = ready.into_iter();
        pending.retain(|(target, socket)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            // There is no connection, whatever error ICMP reported.
            let error = getsockopt(socket, sockopt::SocketError).unwrap_or(0);
            let outcome = if error == 0 { Outcome::Answered } else { Outcome::Failed };
            outcomes.push((*target, outcome));
            false
        });
        if any == 0 && Instant::now() >= deadline {
            outcomes.extend(pending.drain(..).map(|(target, _)| (target, Outcome::Failed)));
        }
    }
    outcomes
}

/// Returns the host's addresses, each with its interface.
pub(crate) fn own_addresses() -> BTreeSet<(String, IpAddr)> {
    let addresses = getifaddrs().into_iter().flatten();
    let named = addresses.filter_map(|one| Some((one.interface_name, ip_of(&one.address?)?)));
    // An IPv4 address may have a label instead, which begins with the name: br0:1.
    named.map(|(name, ip)| (name.split(':').next().unwrap_or_default().to_string(), ip)).collect()
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

/// Opens a socket that is bound to the bridge: guests name the addresses, and must not reach the
/// host's other networks by it.
fn on_bridge(ip: IpAddr, kind: SockType, bridge: &str) -> Result<OwnedFd, Errno> {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, kind, flags, None)?;
    setsockopt(&socket, sockopt::BindToDevice, &OsString::from(bridge))?;
    Ok(socket)
}

/// Begins a connection; `None` if it is established at once. The answer must find its way to the
/// bridge: without an address there, IPv4 would ask from the address of another interface, or from
/// none (`inet_select_addr` in net/ipv4/devinet.c), and hear nothing.
fn begin(
    (_, ip, port): Target,
    bridge: &str,
    own: &BTreeSet<(String, IpAddr)>,
) -> Result<Option<OwnedFd>, Errno> {
    let to = SockaddrStorage::from(SocketAddr::new(ip, port));
    let probe = on_bridge(ip, SockType::Datagram, bridge)?;
    connect(probe.as_raw_fd(), &to)?;
    let from = ip_of(&getsockname::<SockaddrStorage>(probe.as_raw_fd())?);
    if !from.is_some_and(|from| own.contains(&(bridge.to_string(), from))) {
        return Err(Errno::EADDRNOTAVAIL);
    }
    let socket = on_bridge(ip, SockType::Stream, bridge)?;
    // Closed with a reset, so that neither side keeps state.
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&socket, sockopt::Linger, &linger)?;
    match connect(socket.as_raw_fd(), &to) {
        Ok(()) => Ok(None),
        Err(Errno::EINPROGRESS) => Ok(Some(socket)),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_listener_differs_from_a_closed_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open =
            (NetworkId::ANY, IpAddr::from([127, 0, 0, 1]), listener.local_addr().unwrap().port());
        let gone = TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = (open.0, open.1, gone.local_addr().unwrap().port());
        drop(gone);
        let lo = || Some("lo".to_string());
        let found: BTreeMap<_, _> =
            check(&[(open, lo()), (closed, lo())], CHECK_INTERVAL).into_iter().collect();
        let expected = BTreeMap::from([(open, Outcome::Answered), (closed, Outcome::Failed)]);
        assert_eq!(found, expected);
        let nowhere =
            check(&[(open, None), (closed, Some("none such".to_string()))], CHECK_INTERVAL);
        let impossible = Outcome::Impossible(Errno::ENODEV);
        assert!(nowhere.iter().all(|(_, outcome)| *outcome == impossible), "{nowhere:?}");
    }

    #[test]
    fn the_thread_checks_its_targets() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open =
            (NetworkId::ANY, IpAddr::from([127, 0, 0, 1]), listener.local_addr().unwrap().port());
        let checks = TcpChecks::start().unwrap();
        let targets = || BTreeMap::from([(open, Some("lo".to_string()))]);
        checks.exchange(targets());
        let deadline = Instant::now() + Duration::from_secs(10);
        while checks.exchange(targets()).get(&open) != Some(&Outcome::Answered) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
