//! Commands through vsock (vsock(7)), for VMs without shared memory: a line of ASCII text is a command, and
//! a line is its reply, in the order of the commands. The host knows a VM by its CID.

use crate::language::reply::Reply;
use crate::region::RegionLock;
use crate::sender::{GaveUp, Patience, SendError, check_lengths, lock_by, parse_reply};
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
                let waited = connection.wait_for(PollFlags::POLLOUT, patience, deadline);
                waited.map_err(|reason| reason.error(patience.timeout))?;
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
    ) -> Result<(), GaveUp> {
        loop {
            // In pieces, because a signal may come just before the call. An error shows at the next call.
            let mut fds = [PollFd::new(self.stream.as_fd(), flags)];
            if poll(&mut fds, PollTimeout::from(50_u8)) != Ok(0) {
                return Ok(());
            }
            if patience.interrupted.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                return Err(GaveUp::Interrupted);
            }
            if Instant::now() >= deadline {
                return Err(GaveUp::Timeout);
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
        check_lengths(commands)?;
        let patience = patience.into();
        for command in commands {
            let deadline = Instant::now() + patience.timeout;
            let text = self.exchange(command, patience, deadline)?;
            let reply = parse_reply(&text)?;
            let is_ok = reply.is_ok();
            replies.push(reply);
            if !is_ok {
                break;
            }
        }
        Ok(())
    }

    /// Sends a command and returns the line that answers it. From the first byte on, the host may carry it out.
    fn exchange(
        &self,
        command: &str,
        patience: Patience<'_>,
        deadline: Instant,
    ) -> Result<String, SendError> {
        let unconfirmed = |reason: String| SendError::Unconfirmed(reason);
        let gave_up = |reason: GaveUp| match reason {
            GaveUp::Timeout => {
                format!("no reply from the host within {} s", patience.timeout.as_secs_f32())
            }
            GaveUp::Interrupted => "interrupted".to_string(),
        };
        let line = format!("{command}\n");
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match send(self.stream.as_raw_fd(), rest, MsgFlags::MSG_NOSIGNAL) {
                Ok(length) => rest = rest.get(length..).unwrap_or_default(),
                Err(Errno::EAGAIN) => {
                    let waited = self.wait_for(PollFlags::POLLOUT, patience, deadline);
                    waited.map_err(|reason| unconfirmed(gave_up(reason)))?;
                }
                Err(Errno::EINTR) => {}
                // A host that has refused the connection has said why.
                Err(Errno::EPIPE | Errno::ECONNRESET) => break,
                Err(errno) => return Err(unconfirmed(format!("vsock: {errno}"))),
            }
        }
        loop {
            let mut input = self.input.borrow_mut();
            if let Some(end) = input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = input.drain(..=end).take(end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            let mut bytes = [0; 4096];
            match recv(self.stream.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(0) | Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => {
                    return Err(unconfirmed("the host has ended the connection".to_string()));
                }
                Ok(length) if input.len() + length <= MAX_REPLY => {
                    input.extend(bytes.get(..length).unwrap_or_default());
                }
                Ok(_) => return Err(SendError::NotAReply("a line without an end".to_string())),
                Err(Errno::EAGAIN) => {
                    drop(input);
                    let waited = self.wait_for(PollFlags::POLLIN, patience, deadline);
                    waited.map_err(|reason| unconfirmed(gave_up(reason)))?;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(unconfirmed(format!("vsock: {errno}"))),
            }
        }
    }
}
