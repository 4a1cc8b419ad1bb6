//! Checks of ports: TCP connections from the host to backends, which are ended again at once, and UDP
//! datagrams.

use super::health::{Probe, ProbeKind};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, SockaddrStorage, connect, getsockname,
    getsockopt, recv, send, setsockopt, shutdown, socket, sockopt,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// The shortest time between two checks of a backend.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// The time that an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// The time that a backend has for ending a connection of a check.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The time by which a check may come too early, so that none comes an interval late.
const CLOCK_GRAIN: Duration = Duration::from_millis(100);
/// The most connections at a time. If there are more backends, all are checked less often.
const MAX_CONNECTIONS: usize = 512;

/// The result of a check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// The backend has accepted the connection, or has not refused the datagram.
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
    targets: BTreeMap<Probe, Option<String>>,
    outcomes: BTreeMap<Probe, Outcome>,
    stop: bool,
}

/// A thread that checks backends.
pub(super) struct PortChecks {
    exchange: Arc<(Mutex<CheckExchange>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

fn lock(exchange: &Mutex<CheckExchange>) -> MutexGuard<'_, CheckExchange> {
    exchange.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PortChecks {
    /// Starts the thread, which sleeps while there is nothing to check.
    ///
    /// # Errors
    /// If there are no more threads.
    pub(super) fn start() -> std::io::Result<PortChecks> {
        let exchange = Arc::new((Mutex::new(CheckExchange::default()), Condvar::new()));
        let its_exchange = Arc::clone(&exchange);
        let thread = Builder::new()
            .name("checks".to_string())
            .spawn(move || check_until_stopped(&its_exchange))?;
        Ok(PortChecks { exchange, thread: Some(thread) })
    }

    /// Has these backends checked from now on, each through its device and no other. Returns the
    /// results since the last call.
    pub(super) fn exchange(
        &self,
        targets: BTreeMap<Probe, Option<String>>,
    ) -> BTreeMap<Probe, Outcome> {
        let (mutex, changed) = &*self.exchange;
        let mut exchange = lock(mutex);
        if exchange.targets.is_empty() && !targets.is_empty() {
            changed.notify_one();
        }
        exchange.targets = targets;
        std::mem::take(&mut exchange.outcomes)
    }
}

impl Drop for PortChecks {
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
    let mut next: BTreeMap<Probe, Instant> = BTreeMap::new();
    let mut closing = Closing::default();
    loop {
        let start = Instant::now();
        let idle = |exchange: &mut CheckExchange| exchange.targets.is_empty() && !exchange.stop;
        let exchange =
            changed.wait_while(lock(mutex), idle).unwrap_or_else(PoisonError::into_inner);
        next.retain(|probe, _| exchange.targets.contains_key(probe));
        let is_due = |probe: &Probe| next.get(probe).is_none_or(|due| *due <= start + CLOCK_GRAIN);
        let targets: Vec<(Probe, Option<String>)> = exchange
            .targets
            .iter()
            .filter(|(probe, _)| is_due(probe))
            .map(|(probe, bridge)| (*probe, bridge.clone()))
            .collect();
        drop(exchange);
        for (probe, _) in &targets {
            next.insert(*probe, start + Duration::from_secs(u64::from(probe.pace.interval)));
        }
        for some in targets.chunks(MAX_CONNECTIONS) {
            if lock(mutex).stop {
                return;
            }
            let outcomes = check(some, ANSWER_TIMEOUT, &mut closing);
            lock(mutex).outcomes.extend(outcomes);
        }
        closing.proceed(Instant::now());
        let pause = MIN_INTERVAL.saturating_sub(start.elapsed());
        let running = |exchange: &mut CheckExchange| !exchange.stop;
        let (exchange, _) = changed
            .wait_timeout_while(lock(mutex), pause, running)
            .unwrap_or_else(PoisonError::into_inner);
        if exchange.stop {
            return;
        }
    }
}

/// Connections that have been ended from this side and wait for the backend to do the same, so that it
/// sees an orderly end: some servers lock out a host that resets its connections.
#[derive(Default)]
struct Closing {
    sockets: VecDeque<(OwnedFd, Instant)>,
}

impl Closing {
    fn add(&mut self, socket: OwnedFd, now: Instant) {
        // The end is orderly only with a backend that still listens.
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Write);
        if self.sockets.len() >= MAX_CONNECTIONS {
            self.sockets.pop_front();
        }
        self.sockets.push_back((socket, now + CLOSE_TIMEOUT));
    }

    /// Reads what backends still send, because a socket that is closed with unread data resets the
    /// connection, and closes the sockets of those that have ended too.
    fn proceed(&mut self, now: Instant) {
        const READS: usize = 16;
        let mut buffer = [0; 4096];
        self.sockets.retain(|(socket, until)| {
            for _ in 0..READS {
                match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                    Ok(1..) => {}
                    Err(Errno::EAGAIN) => return now < *until,
                    Ok(0) | Err(_) => return false,
                }
            }
            now < *until
        });
    }
}

/// A check that waits for its answer.
struct Pending {
    probe: Probe,
    socket: OwnedFd,
}

impl Pending {
    /// Returns the outcome without an answer: a UDP server may have nothing to say.
    fn unanswered(&self) -> Outcome {
        match self.probe.kind {
            ProbeKind::Udp(_) => Outcome::Answered,
            ProbeKind::Tcp(_) | ProbeKind::Neighbour => Outcome::Failed,
        }
    }
}

/// Makes all checks at once.
fn check(
    targets: &[(Probe, Option<String>)],
    timeout: Duration,
    closing: &mut Closing,
) -> Vec<(Probe, Outcome)> {
    let deadline = Instant::now() + timeout;
    let mut outcomes = Vec::new();
    let mut pending: Vec<Pending> = Vec::new();
    let own = own_addresses();
    for (probe, bridge) in targets {
        let bridge = bridge.as_deref().ok_or(Errno::ENODEV);
        match bridge.and_then(|bridge| begin(probe, bridge, &own)) {
            Ok(socket) => pending.push(Pending { probe: *probe, socket }),
            // Errors that the kernel has already received are returned at once.
            Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH) => {
                outcomes.push((*probe, Outcome::Failed));
            }
            Err(errno) => outcomes.push((*probe, Outcome::Impossible(errno))),
        }
    }
    while !pending.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let polled = pending.iter().map(|one| {
            let awaited = match one.probe.kind {
                ProbeKind::Udp(_) => PollFlags::POLLIN,
                ProbeKind::Tcp(_) | ProbeKind::Neighbour => PollFlags::POLLOUT,
            };
            PollFd::new(one.socket.as_fd(), awaited)
        });
        let mut polled: Vec<PollFd<'_>> = polled.collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let any = poll(&mut polled, timeout).unwrap_or(0);
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let (mut waiting, now) = (Vec::new(), Instant::now());
        for (one, is_ready) in pending.into_iter().zip(ready) {
            if !is_ready {
                waiting.push(one);
                continue;
            }
            // An error, whatever ICMP reported, means that nobody serves the port.
            let error = getsockopt(&one.socket, sockopt::SocketError).unwrap_or(0);
            if error != 0 {
                outcomes.push((one.probe, Outcome::Failed));
                continue;
            }
            outcomes.push((one.probe, Outcome::Answered));
            if matches!(one.probe.kind, ProbeKind::Tcp(_)) {
                closing.add(one.socket, now);
            }
        }
        pending = waiting;
        if any == 0 && now >= deadline {
            outcomes.extend(pending.drain(..).map(|one| (one.probe, one.unanswered())));
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

/// Begins a check. The host needs an address on the bridge: without one, IPv4 would send from the
/// address of another interface, or from none (`inet_select_addr` in net/ipv4/devinet.c), and
/// never receive the answer.
fn begin(probe: &Probe, bridge: &str, own: &BTreeSet<(String, IpAddr)>) -> Result<OwnedFd, Errno> {
    let (ProbeKind::Tcp(port) | ProbeKind::Udp(port)) = probe.kind else {
        return Err(Errno::EINVAL);
    };
    let to = SockaddrStorage::from(SocketAddr::new(probe.ip, port));
    let datagram = on_bridge(probe.ip, SockType::Datagram, bridge)?;
    connect(datagram.as_raw_fd(), &to)?;
    let from = ip_of(&getsockname::<SockaddrStorage>(datagram.as_raw_fd())?);
    if !from.is_some_and(|from| own.contains(&(bridge.to_string(), from))) {
        return Err(Errno::EADDRNOTAVAIL);
    }
    if matches!(probe.kind, ProbeKind::Udp(_)) {
        send(datagram.as_raw_fd(), &[], MsgFlags::empty())?;
        return Ok(datagram);
    }
    let socket = on_bridge(probe.ip, SockType::Stream, bridge)?;
    match connect(socket.as_raw_fd(), &to) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfqd_rules::NetworkId;
    use nfqd_shmctl::CheckPace;
    use std::io::{Read, Write};
    use std::net::{TcpListener, UdpSocket};

    fn local(kind: ProbeKind) -> Probe {
        let pace = CheckPace::default();
        Probe { network: NetworkId::ANY, ip: IpAddr::from([127, 0, 0, 1]), kind, pace }
    }

    fn check_on(device: Option<&str>, probes: &[Probe]) -> BTreeMap<Probe, Outcome> {
        let targets: Vec<_> =
            probes.iter().map(|probe| (*probe, device.map(str::to_string))).collect();
        check(&targets, Duration::from_millis(300), &mut Closing::default()).into_iter().collect()
    }

    #[test]
    fn a_listener_differs_from_a_closed_port() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let open = [
            local(ProbeKind::Tcp(tcp.local_addr().unwrap().port())),
            local(ProbeKind::Udp(udp.local_addr().unwrap().port())),
        ];
        let closed = {
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            [
                local(ProbeKind::Tcp(tcp.local_addr().unwrap().port())),
                local(ProbeKind::Udp(udp.local_addr().unwrap().port())),
            ]
        };
        let expected: BTreeMap<_, _> = open
            .map(|probe| (probe, Outcome::Answered))
            .into_iter()
            .chain(closed.map(|probe| (probe, Outcome::Failed)))
            .collect();
        assert_eq!(check_on(Some("lo"), &[open, closed].concat()), expected);
        for device in [None, Some("none such")] {
            let found = check_on(device, &[open, closed].concat());
            let impossible = Outcome::Impossible(Errno::ENODEV);
            assert!(found.values().all(|outcome| *outcome == impossible), "{found:?}");
        }
    }

    /// The server reads the end of the stream, not a reset, even if it has sent something.
    #[test]
    fn a_check_ends_its_connection_in_order() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let probe = local(ProbeKind::Tcp(listener.local_addr().unwrap().port()));
        let mut closing = Closing::default();
        let target = [(probe, Some("lo".to_string()))];
        let found = check(&target, ANSWER_TIMEOUT, &mut closing);
        assert_eq!(found, [(probe, Outcome::Answered)]);
        let (mut server, _) = listener.accept().unwrap();
        server.write_all(b"a banner").unwrap();
        closing.proceed(Instant::now());
        assert_eq!(closing.sockets.len(), 1, "the server has not ended it");
        assert_eq!(server.read(&mut [0; 8]).unwrap(), 0);
        drop(server);
        closing.proceed(Instant::now());
        assert!(closing.sockets.is_empty());
        // A server that never ends a connection does not keep it for ever.
        check(&target, ANSWER_TIMEOUT, &mut closing);
        closing.proceed(Instant::now() + CLOSE_TIMEOUT);
        assert!(closing.sockets.is_empty());
    }

    #[test]
    fn the_thread_checks_its_targets() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = local(ProbeKind::Tcp(listener.local_addr().unwrap().port()));
        let checks = PortChecks::start().unwrap();
        let targets = || BTreeMap::from([(open, Some("lo".to_string()))]);
        checks.exchange(targets());
        let deadline = Instant::now() + Duration::from_secs(10);
        while checks.exchange(targets()).get(&open) != Some(&Outcome::Answered) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
