//! TCP checks: connections from the host to backends, closed again at once.

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockname, getsockopt, setsockopt, socket,
    sockopt,
};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// How often each backend is checked, and how long an answer may take.
const EVERY: Duration = Duration::from_secs(1);
/// Connections at a time. When there are more to check, all are checked less often.
const AT_A_TIME: usize = 512;

/// What is checked: an address and a port.
pub type Target = (IpAddr, u16);

/// What a check has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The backend has taken the connection.
    Answered,
    /// It, or somebody on the way, has refused it, or nobody has answered.
    Failed,
    /// The host itself cannot make the check, which says nothing about the backend.
    NoWay(Errno),
}

#[derive(Default)]
struct Desk {
    /// Each with the bridge that it is on; without one it cannot be checked.
    targets: BTreeMap<Target, Option<String>>,
    outcomes: BTreeMap<Target, Outcome>,
}

/// A thread that checks.
pub struct Checks {
    desk: Arc<Mutex<Desk>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn lock(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Checks {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there can be no more threads.
    pub fn start() -> std::io::Result<Checks> {
        let (desk, stop) = (Arc::new(Mutex::new(Desk::default())), Arc::new(AtomicBool::new(false)));
        let (its_desk, its_stop) = (Arc::clone(&desk), Arc::clone(&stop));
        let thread = Builder::new().name("checks".to_string()).spawn(move || {
            while !its_stop.load(Relaxed) {
                let start = Instant::now();
                let targets: Vec<_> = lock(&its_desk).targets.clone().into_iter().collect();
                for some in targets.chunks(AT_A_TIME).take_while(|_| !its_stop.load(Relaxed)) {
                    let outcomes = check(some, EVERY);
                    lock(&its_desk).outcomes.extend(outcomes);
                }
                // In short pieces, so that leaving does not take long.
                while start.elapsed() < EVERY && !its_stop.load(Relaxed) {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        })?;
        Ok(Checks { desk, stop, thread: Some(thread) })
    }

    /// Checks these from now on, each by way of its bridge and no other. What was found since the last time comes back.
    pub fn exchange(&self, targets: BTreeMap<Target, Option<String>>) -> BTreeMap<Target, Outcome> {
        let mut desk = lock(&self.desk);
        desk.targets = targets;
        std::mem::take(&mut desk.outcomes)
    }
}

impl Drop for Checks {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Connects to all at once.
fn check(targets: &[(Target, Option<String>)], patience: Duration) -> Vec<(Target, Outcome)> {
    let deadline = Instant::now() + patience;
    let mut out = Vec::new();
    let mut waiting: Vec<(Target, OwnedFd)> = Vec::new();
    let own = own_addresses();
    for (target, bridge) in targets {
        match bridge.as_deref().ok_or(Errno::ENODEV).and_then(|bridge| begin(*target, bridge, &own)) {
            Ok(None) => out.push((*target, Outcome::Answered)),
            Ok(Some(socket)) => waiting.push((*target, socket)),
            // What the kernel has heard before it tells at once.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH) => out.push((*target, Outcome::Failed)),
            Err(errno) => out.push((*target, Outcome::NoWay(errno))),
        }
    }
    while !waiting.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut polled: Vec<PollFd<'_>> =
            waiting.iter().map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLOUT)).collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let any = poll(&mut polled, timeout).unwrap_or(0);
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let mut ready = ready.into_iter();
        waiting.retain(|(target, socket)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            // Whatever ICMP says on the way, there is no connection.
            let error = getsockopt(socket, sockopt::SocketError).unwrap_or(0);
            out.push((*target, if error == 0 { Outcome::Answered } else { Outcome::Failed }));
            false
        });
        if any == 0 && Instant::now() >= deadline {
            out.extend(waiting.drain(..).map(|(target, _)| (target, Outcome::Failed)));
        }
    }
    out
}

/// The host's addresses, each with its interface.
fn own_addresses() -> BTreeSet<(String, IpAddr)> {
    let addresses = getifaddrs().into_iter().flatten();
    let named = addresses.filter_map(|one| Some((one.interface_name, ip_of(&one.address?)?)));
    // An IPv4 address may have a label instead, which begins with the name: br0:1.
    named.map(|(name, ip)| (name.split(':').next().unwrap_or_default().to_string(), ip)).collect()
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
}

/// A socket that knows no other way than the bridge: guests name these addresses, and the host's other networks are none of
/// theirs.
fn on_bridge(ip: IpAddr, kind: SockType, bridge: &str) -> Result<OwnedFd, Errno> {
    let family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, kind, flags, None)?;
    setsockopt(&socket, sockopt::BindToDevice, &OsString::from(bridge))?;
    Ok(socket)
}

/// Begins a connection; none when it is there already. An answer must find its way to the bridge: without an address there IPv4
/// would ask from another interface's, or from none (`inet_select_addr` in net/ipv4/devinet.c), and hear nothing.
fn begin(
    (ip, port): Target,
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
    // Closed with a reset: no connection is left waiting on either side.
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
    fn who_listens_is_told_from_who_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = (IpAddr::from([127, 0, 0, 1]), listener.local_addr().unwrap().port());
        let gone = TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = (open.0, gone.local_addr().unwrap().port());
        drop(gone);
        let lo = || Some("lo".to_string());
        let found: BTreeMap<_, _> = check(&[(open, lo()), (closed, lo())], EVERY).into_iter().collect();
        assert_eq!(found, BTreeMap::from([(open, Outcome::Answered), (closed, Outcome::Failed)]));
        let nowhere = check(&[(open, None), (closed, Some("none such".to_string()))], EVERY);
        assert!(nowhere.iter().all(|(_, outcome)| *outcome == Outcome::NoWay(Errno::ENODEV)), "{nowhere:?}");
    }

    #[test]
    fn the_thread_reports_what_it_was_given() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = (IpAddr::from([127, 0, 0, 1]), listener.local_addr().unwrap().port());
        let checks = Checks::start().unwrap();
        let targets = || BTreeMap::from([(open, Some("lo".to_string()))]);
        checks.exchange(targets());
        let deadline = Instant::now() + Duration::from_secs(10);
        while checks.exchange(targets()).get(&open) != Some(&Outcome::Answered) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
