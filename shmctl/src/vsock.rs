//! Commands through vsock (vsock(7)), for VMs without shared memory: a line of ASCII text is a command, and
//! a line is its reply, in the order of the commands. The host knows a VM by its CID.

use crate::language::parse::MAX_COMMAND;
use crate::language::reply::Reply;
use crate::region::RegionLock;
use crate::sender::{Patience, SendError, lock_by};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::SocketError;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, VsockAddr, bind, connect, getsockopt, recv, send,
    socket,
};
use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The port at which the host listens.
pub const PORT: u32 = 9477;
/// The device file, which is there if the kernel has vsock.
pub const DEVICE: &str = "/dev/vsock";
/// The CID of the host (`VMADDR_CID_HOST`).
pub const HOST: u32 = 2;
/// The ports that only root of a VM may connect from (vsock's `LAST_RESERVED_PORT`).
const RESERVED_PORTS: std::ops::RangeInclusive<u32> = 512..=1023;
/// The longest reply, in bytes.
const MAX_REPLY: usize = 2 << 20;

/// A connection of a guest.
#[derive(Debug)]
pub struct Connection {
    stream: OwnedFd,
    input: RefCell<Vec<u8>>,
}

impl Connection {
    /// Connects to a host, [`HOST`] but for tests, from a port that is root's.
    ///
    /// # Errors
    /// The system's reason, with what is missing.
    pub fn open<'a>(cid: u32, patience: impl Into<Patience<'a>>) -> Result<Connection, SendError> {
        let failed = SendError::Vsock;
        let patience = patience.into();
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let stream = socket(AddressFamily::Vsock, SockType::Stream, flags, None).map_err(failed)?;
        let own = RESERVED_PORTS.rev().map(|port| {
            // VMADDR_CID_ANY
            bind(stream.as_raw_fd(), &VsockAddr::new(u32::MAX, port))
        });
        let bound = own.take_while(|bound| *bound != Err(Errno::EACCES)).any(|bound| bound.is_ok());
        if !bound {
            return Err(failed(Errno::EACCES));
        }
        let connection = Connection { stream, input: RefCell::new(Vec::new()) };
        let deadline = Instant::now() + patience.timeout;
        match connect(connection.stream.as_raw_fd(), &VsockAddr::new(cid, PORT)) {
            Ok(()) => {}
            Err(Errno::EINPROGRESS | Errno::EAGAIN) => {
                connection.wait_for(PollFlags::POLLOUT, patience, deadline)?;
                match getsockopt(&connection.stream, SocketError) {
                    Ok(0) => {}
                    Ok(number) => return Err(failed(Errno::from_raw(number))),
                    Err(errno) => return Err(failed(errno)),
                }
            }
            Err(errno) => return Err(failed(errno)),
        }
        Ok(connection)
    }

    /// Waits until the connection is ready.
    fn wait_for(
        &self,
        flags: PollFlags,
        patience: Patience<'_>,
        deadline: Instant,
    ) -> Result<(), SendError> {
        loop {
            // In pieces, because a signal may come just before the call.
            let mut fds = [PollFd::new(self.stream.as_fd(), flags)];
            match poll(&mut fds, PollTimeout::from(50_u8)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(SendError::Vsock(errno)),
            }
            if patience.interrupted.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(SendError::Abandoned);
            }
            if Instant::now() >= deadline {
                return Err(SendError::Unanswered);
            }
        }
    }

    /// Locks the channel against other senders of this VM, for commands that belong together.
    ///
    /// # Errors
    /// If it cannot be locked in time.
    pub fn lock<'a>(patience: impl Into<Patience<'a>>) -> Result<RegionLock, SendError> {
        lock_by(|| RegionLock::try_new(Path::new(DEVICE)), patience.into())
    }

    /// Sends commands and adds their replies to `replies`, in the order of the commands; stops after one that is
    /// rejected.
    ///
    /// # Errors
    /// See [`SendError`]; `replies` contains those received so far.
    pub fn send<'a>(
        &self,
        commands: &[String],
        patience: impl Into<Patience<'a>>,
        replies: &mut Vec<Reply>,
    ) -> Result<(), SendError> {
        if let Some(long) = commands.iter().find(|command| command.len() > MAX_COMMAND) {
            return Err(SendError::TooLong(long.len()));
        }
        let patience = patience.into();
        for command in commands {
            let deadline = Instant::now() + patience.timeout;
            self.write(&format!("{command}\n"), patience, deadline)?;
            let text = self.read_line(patience, deadline)?;
            let start = || text.chars().take(80).flat_map(char::escape_default).collect();
            let reply: Reply = text.parse().map_err(|_| SendError::NotAReply(start()))?;
            let is_ok = reply.is_ok();
            replies.push(reply);
            if !is_ok {
                break;
            }
        }
        Ok(())
    }

    fn write(
        &self,
        text: &str,
        patience: Patience<'_>,
        deadline: Instant,
    ) -> Result<(), SendError> {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match send(self.stream.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                Ok(length) => rest = rest.get(length..).unwrap_or_default(),
                Err(Errno::EAGAIN) => self.wait_for(PollFlags::POLLOUT, patience, deadline)?,
                Err(errno) => return Err(SendError::Vsock(errno)),
            }
        }
        Ok(())
    }

    fn read_line(&self, patience: Patience<'_>, deadline: Instant) -> Result<String, SendError> {
        loop {
            let mut input = self.input.borrow_mut();
            if let Some(end) = input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = input.drain(..=end).take(end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            let mut bytes = [0; 4096];
            match recv(self.stream.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(0) => return Err(SendError::Reset),
                Ok(length) if input.len() + length <= MAX_REPLY => {
                    input.extend(bytes.get(..length).unwrap_or_default());
                }
                Ok(_) => return Err(SendError::NotAReply("a line without an end".to_string())),
                Err(Errno::EAGAIN) => {
                    drop(input);
                    self.wait_for(PollFlags::POLLIN, patience, deadline)?;
                }
                Err(errno) => return Err(SendError::Vsock(errno)),
            }
        }
    }
}
