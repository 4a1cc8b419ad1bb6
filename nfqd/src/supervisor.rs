//! The service manager that nfqd runs under, if there is one: systemd, or what speaks its protocol
//! (sd_notify(3), sd_listen_fds(3)).
//!
//! It is told when nfqd is ready and that it is alive, and keeps the sockets of the queues while nfqd is
//! not running: a queue lives as long as its socket, so packets wait instead of passing by.

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket,
};
use std::env;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// The connection to the service manager.
#[derive(Debug, Default)]
pub struct Supervisor {
    socket: Option<(OwnedFd, UnixAddr)>,
    /// Half the watchdog timeout; `None` if there is no watchdog.
    ping_interval: Option<Duration>,
    last_ping: Option<Instant>,
}

impl Supervisor {
    /// The service manager that the environment names.
    pub fn from_environment() -> Supervisor {
        let address = env::var("NOTIFY_SOCKET").ok().and_then(|path| address_of(&path));
        let connect = |address: UnixAddr| {
            let flags = SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None).ok()?;
            Some((socket, address))
        };
        let own = std::process::id().to_string();
        let is_ours = env::var("WATCHDOG_PID").map_or(true, |pid| pid == own);
        let watchdog = env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        let watchdog = watchdog.filter(|usec| is_ours && *usec > 0);
        Supervisor {
            socket: address.and_then(connect),
            ping_interval: watchdog.map(|usec: u64| Duration::from_micros(usec / 2)),
            last_ping: None,
        }
    }

    /// Sends the state, as `KEY=VALUE` lines.
    pub fn notify(&self, state: &str) {
        self.send(state, &[]);
    }

    /// Asks the service manager to store a descriptor under a name until the next start, in place of an
    /// earlier one.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) {
        // It would keep both.
        self.remove(name);
        // Lost messages show as an error of a netlink socket, which is no reason to close it.
        let state = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0");
        self.send(&state, &[descriptor.as_raw_fd()]);
    }

    /// Asks the service manager to close a descriptor that it stores.
    pub fn remove(&self, name: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[]);
    }

    /// Whether there is a service manager.
    pub fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    /// Pings the watchdog if a ping is due and `is_alive` returns true.
    pub fn keep_alive(&mut self, now: Instant, is_alive: impl FnOnce() -> bool) {
        let Some(interval) = self.ping_interval else { return };
        let is_due = self.last_ping.is_none_or(|last| now.duration_since(last) >= interval / 2);
        if is_due && is_alive() {
            self.notify("WATCHDOG=1");
            self.last_ping = Some(now);
        }
    }

    fn send(&self, state: &str, descriptors: &[i32]) {
        let Some((socket, address)) = &self.socket else { return };
        let rights = [ControlMessage::ScmRights(descriptors)];
        let rights: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
        let message = [IoSlice::new(state.as_bytes())];
        let sent =
            sendmsg(socket.as_raw_fd(), &message, rights, MsgFlags::MSG_NOSIGNAL, Some(address));
        if let Err(errno) = sent {
            log::warn!("service manager: {errno}");
        }
    }
}

/// Returns the address of a socket: a path, or an abstract name behind `@`.
fn address_of(path: &str) -> Option<UnixAddr> {
    match path.strip_prefix('@') {
        Some(name) => UnixAddr::new_abstract(name.as_bytes()).ok(),
        None if path.starts_with('/') => UnixAddr::new(path).ok(),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_abstract_names_are_addresses() {
        assert!(address_of("/run/systemd/notify").unwrap().path().is_some());
        assert!(address_of("@name").unwrap().as_abstract().is_some());
        assert!(address_of("nonsense").is_none());
    }

    #[test]
    fn without_a_service_manager_nothing_is_sent() {
        let mut supervisor = Supervisor::default();
        supervisor.notify("READY=1");
        supervisor.keep_alive(Instant::now(), || unreachable!("nobody asks"));
    }
}
