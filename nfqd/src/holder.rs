//! The holder: a small process that keeps descriptors while nfqd is not running, where no service manager
//! does.
//!
//! nfqd starts it when it first has something to keep, and finds it at a socket in `/run/nfqd` that is named by
//! the network namespace and that only root can connect to. It ends when it is told to, or a minute after nfqd if no VM
//! is connected any more.
//!
//! A message is a word and a name. `STORE NAME` comes with the descriptor, `REMOVE NAME` closes it,
//! `TAKE` is answered by a message for each descriptor and by `END`, `RELEASE` ends the holder.

use crate::descriptors::{Descriptors, accept, receive, send};
use crate::host_lock::path_of_namespace;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{ReceiveTimeout, SendTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen, recv,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;
use nix::unistd::close;
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The extension of the socket's path, with the version of the protocol.
const EXTENSION: &str = "holder1";
/// The time that either side may take for a message.
const TIMEOUT: TimeVal = TimeVal::new(2, 0);
/// The time that a holder without a VM waits for nfqd to come back.
const ABSENCE: Duration = Duration::from_secs(60);
/// The time that a holder takes to start, at most.
const START_TIME: Duration = Duration::from_secs(5);
/// The longest message, in bytes: the longest path, and some words.
const MAX_MESSAGE: usize = 256;
/// The start of the names of VMs' connections. What else belongs to a VM has the same name behind the `@`.
pub const VM: &str = "vm@";
/// The start of the names of sockets at which VMs connect.
pub const LISTENER: &str = "listener@";

/// The connection to the holder.
#[derive(Debug)]
pub struct Holder {
    connection: OwnedFd,
    /// The process, if this nfqd has started it.
    child: Option<Child>,
}

impl Holder {
    /// Connects to the holder of this network namespace, if there is one.
    ///
    /// # Errors
    /// If there is none.
    pub fn connect() -> io::Result<Holder> {
        Ok(Holder { connection: new_connection()?, child: None })
    }

    /// Starts a holder and connects to it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start() -> io::Result<Holder> {
        // One that is still there, and does not answer, must not be taken for the new one.
        let _ = fs::remove_file(path_of_namespace(EXTENSION)?);
        let mut command = Command::new("/proc/self/exe");
        command.arg("hold").current_dir("/").env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // What ends nfqd from a terminal must not end the holder.
        let mut child = command.process_group(0).spawn()?;
        let deadline = Instant::now() + START_TIME;
        loop {
            if let Ok(connection) = new_connection() {
                return Ok(Holder { connection, child: Some(child) });
            }
            if let Some(status) = child.try_wait()? {
                return Err(io::Error::other(format!("it has ended, {status}")));
            }
            if Instant::now() >= deadline {
                let _ = child.kill().and_then(|()| child.wait());
                return Err(io::Error::other("it has not started"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stores a descriptor under a name, in place of an earlier one.
    ///
    /// # Errors
    /// If the holder is gone.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) -> Result<(), Errno> {
        send(self.connection.as_fd(), &format!("STORE {name}"), Some(descriptor))
    }

    /// Closes a descriptor that is stored.
    ///
    /// # Errors
    /// If the holder is gone.
    pub fn remove(&self, name: &str) -> Result<(), Errno> {
        send(self.connection.as_fd(), &format!("REMOVE {name}"), None)
    }

    /// Returns copies of all descriptors that are stored.
    ///
    /// # Errors
    /// If the holder is gone.
    pub fn take(&self) -> Result<Descriptors, Errno> {
        send(self.connection.as_fd(), "TAKE", None)?;
        let mut out = Descriptors::new();
        loop {
            match message(self.connection.as_fd())? {
                Some((name, Some(descriptor))) => drop(out.insert(name, descriptor)),
                Some((text, None)) if text == "END" => return Ok(out),
                Some((name, None)) => log::warn!("holder of descriptors: {name} was lost"),
                None => return Err(Errno::EPIPE),
            }
        }
    }

    /// Checks that the holder has not ended.
    ///
    /// # Errors
    /// If it has.
    pub fn check(&self) -> Result<(), Errno> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
        match recv(self.connection.as_raw_fd(), &mut [0], flags) {
            Ok(0) => Err(Errno::EPIPE),
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Ends the holder.
    pub fn release(self) {
        let _ = send(self.connection.as_fd(), "RELEASE", None);
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // One that has ended leaves nothing behind.
        let _ = self.child.as_mut().map(Child::try_wait);
    }
}

fn address() -> io::Result<UnixAddr> {
    Ok(UnixAddr::new(&path_of_namespace(EXTENSION)?)?)
}

/// Connects to the holder.
fn new_connection() -> io::Result<OwnedFd> {
    let connection = new_socket()?;
    setsockopt(&connection, SendTimeout, &TIMEOUT)?;
    setsockopt(&connection, ReceiveTimeout, &TIMEOUT)?;
    connect(connection.as_raw_fd(), &address()?)?;
    Ok(connection)
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

/// Receives a message, and the descriptor that came with it; `None` if the other side is gone.
fn message(connection: BorrowedFd<'_>) -> Result<Option<(String, Option<OwnedFd>)>, Errno> {
    let mut bytes = [0; MAX_MESSAGE];
    let (length, descriptor) = receive(connection, &mut bytes)?;
    let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned();
    Ok(Some((text, descriptor)).filter(|_| length != 0))
}

/// Closes the descriptors that nfqd has passed on, because not every library says `O_CLOEXEC`: a queue, or
/// a table of nftables that belongs to its socket, must not outlive nfqd here.
fn close_inherited() -> io::Result<()> {
    let numbers = fs::read_dir("/proc/self/fd")?.flatten();
    let numbers: Vec<RawFd> =
        numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // That of the directory itself is closed already.
        let _ = close(number);
    }
    Ok(())
}

/// Makes nfqd's connection one that waits: nfqd reads while it is sent all descriptors.
fn set_blocking(connection: BorrowedFd<'_>) -> Result<(), Errno> {
    fcntl(connection, FcntlArg::F_SETFL(OFlag::empty())).map(drop)
}

/// The state of a running holder.
struct Kept {
    descriptors: Descriptors,
    daemon: Option<OwnedFd>,
    /// Since when nfqd is away.
    since: Instant,
}

/// Runs the holder until it is not needed any more.
///
/// # Errors
/// If its name is taken, or the system refuses.
pub fn run() -> io::Result<()> {
    close_inherited()?;
    let path = path_of_namespace(EXTENSION)?;
    // nfqd has found nobody there, and is the only one in this namespace.
    let _ = fs::remove_file(&path);
    let listener = new_socket()?;
    // Nobody can connect before it listens.
    bind(listener.as_raw_fd(), &address()?)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    listen(&listener, Backlog::new(4)?)?;
    let identity = |path: &Path| fs::metadata(path).map(|about| (about.dev(), about.ino())).ok();
    let own = identity(&path);
    let mut kept = Kept { descriptors: Descriptors::new(), daemon: None, since: Instant::now() };
    while kept.step(&listener)? {}
    // Another one may have taken its place.
    if identity(&path) == own { fs::remove_file(&path) } else { Ok(()) }
}

impl Kept {
    /// Waits for an event and handles it. Returns false if the holder is to end.
    fn step(&mut self, listener: &OwnedFd) -> io::Result<bool> {
        let is_vm = |name: &&String| name.starts_with(VM);
        let vms: Vec<String> = self.descriptors.keys().filter(is_vm).cloned().collect();
        if self.daemon.is_none() && vms.is_empty() && self.since.elapsed() >= ABSENCE {
            return Ok(false);
        }
        let watched = self.daemon.is_none().then_some(&vms).into_iter().flatten();
        let watched = watched.filter_map(|name| self.descriptors.get(name));
        let fds = [listener].into_iter().chain(&self.daemon).chain(watched);
        let mut fds: Vec<PollFd<'_>> =
            fds.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut fds, PollTimeout::from(1000_u16))?;
        let mut ready =
            fds.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<_>>().into_iter();
        let has_client = ready.next() == Some(true);
        if self.daemon.is_some() && ready.next() == Some(true) {
            return Ok(self.serve());
        }
        if has_client {
            self.accept(listener);
            return Ok(true);
        }
        if self.daemon.is_some() {
            return Ok(true);
        }
        // A VM sends nothing, so its connection is ready when it has ended.
        for (name, _) in vms.iter().zip(ready).filter(|(_, is_ready)| *is_ready) {
            let vm = name.trim_start_matches(VM).to_string();
            self.descriptors.retain(|name, _| {
                name.starts_with(LISTENER) || name.split_once('@').is_none_or(|(_, of)| of != vm)
            });
        }
        Ok(true)
    }

    fn accept(&mut self, listener: &OwnedFd) {
        // The lock of the namespace is nfqd's: who comes now has taken its place.
        if let Ok(connection) = accept(listener.as_fd())
            && set_blocking(connection.as_fd()).is_ok()
            && setsockopt(&connection, SendTimeout, &TIMEOUT).is_ok()
        {
            self.daemon = Some(connection);
        }
    }

    /// Handles a message of nfqd. Returns false if the holder is to end.
    fn serve(&mut self) -> bool {
        let Some(daemon) = &self.daemon else { return true };
        let Ok(Some((text, descriptor))) = message(daemon.as_fd()) else {
            (self.daemon, self.since) = (None, Instant::now());
            return true;
        };
        match (text.split_once(' '), descriptor) {
            (Some(("STORE", name)), Some(descriptor)) => {
                self.descriptors.insert(name.to_string(), descriptor);
            }
            (Some(("REMOVE", name)), _) => drop(self.descriptors.remove(name)),
            (None, _) if text == "TAKE" => {
                let mut all = self.descriptors.iter();
                let sent =
                    all.try_for_each(|(name, fd)| send(daemon.as_fd(), name, Some(fd.as_fd())));
                // If it is gone, the next step notices.
                let _ = sent.and_then(|()| send(daemon.as_fd(), "END", None));
            }
            (None, _) if text == "RELEASE" => return false,
            _ => {}
        }
        true
    }
}
