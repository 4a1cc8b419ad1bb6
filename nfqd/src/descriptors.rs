//! Descriptors that come from other processes: from the service manager at the start
//! (sd_listen_fds(3)), and in messages of Unix sockets (unix(7), `SCM_RIGHTS`).
//!
//! This is the only module of the daemon, beside the packet socket, with `unsafe`.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, UnixAddr, accept4, recvmsg, sendmsg,
};
use std::collections::BTreeMap;
use std::env;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

/// Descriptors by the names that they are kept under.
pub type Descriptors = BTreeMap<String, OwnedFd>;

/// The first descriptor that a service manager passes (`SD_LISTEN_FDS_START`).
const FIRST_DESCRIPTOR: RawFd = 3;
/// The most descriptors taken from a service manager.
const MAX_INHERITED: RawFd = 1 << 16;

/// Takes the descriptors that the service manager has kept. They are taken once.
pub fn take_inherited() -> Descriptors {
    static TAKEN: std::sync::Once = std::sync::Once::new();
    let mut out = BTreeMap::new();
    TAKEN.call_once(|| {
        let own = std::process::id().to_string();
        if env::var("LISTEN_PID").is_ok_and(|pid| pid == own) {
            let count = env::var("LISTEN_FDS").ok().and_then(|text| text.parse::<RawFd>().ok());
            let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
            let count = count.unwrap_or(0).clamp(0, MAX_INHERITED);
            for (number, name) in (FIRST_DESCRIPTOR..FIRST_DESCRIPTOR + count).zip(names.split(':'))
            {
                // SAFETY: needed to own what the service manager has passed; `call_once` sees to it that
                // no two owners are made, and nothing else in this process refers to the number. One
                // that is not open fails below, and is forgotten without being closed.
                let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
                match fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
                    // Of several, the last one that was stored comes first.
                    Ok(_) => drop(out.entry(name.to_string()).or_insert(descriptor)),
                    Err(errno) => {
                        log::warn!("descriptor {number} of the service manager: {errno}");
                        let _ = descriptor.into_raw_fd();
                    }
                }
            }
        }
    });
    out
}

/// Accepts a connection, which does not block.
///
/// # Errors
/// If there is none, or there are no more descriptors.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let number = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: needed to own what the kernel has just made for this process alone (accept(2)).
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends a message with at most one descriptor over a connected socket that keeps messages apart.
///
/// # Errors
/// If the other side is gone.
pub fn send(
    socket: BorrowedFd<'_>,
    text: &str,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let descriptors = descriptor.map(|descriptor| [descriptor.as_raw_fd()]);
    let rights = descriptors.as_ref().map(|these| ControlMessage::ScmRights(these));
    let text = [IoSlice::new(text.as_bytes())];
    let flags = MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &text, rights.as_slice(), flags, None) {
            Err(Errno::EINTR) => {}
            result => return result.map(drop),
        }
    }
}

/// Receives a message into `bytes`, and the descriptor that came with it. Returns the length, which is 0 if
/// the other side is gone.
///
/// # Errors
/// If nothing can be received.
pub fn receive(
    socket: BorrowedFd<'_>,
    bytes: &mut [u8],
) -> Result<(usize, Option<OwnedFd>), Errno> {
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut parts = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut owned = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: needed to own what the kernel has just installed for this process alone
            // (unix(7)); each number is turned into an owner once.
            owned.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    Ok((message.bytes, owned.into_iter().next()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_travels_with_its_message() {
        let (one, other) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"here").unwrap();
        send(one.as_fd(), "with", Some(file.as_fd())).unwrap();
        send(one.as_fd(), "without", None).unwrap();
        let mut text = [0; 16];
        let (length, descriptor) = receive(other.as_fd(), &mut text).unwrap();
        let mut copy = File::from(descriptor.unwrap());
        let mut content = String::new();
        copy.rewind().unwrap();
        copy.read_to_string(&mut content).unwrap();
        assert_eq!((&text[..length], content.as_str()), (b"with".as_slice(), "here"));
        let (length, descriptor) = receive(other.as_fd(), &mut text).unwrap();
        assert_eq!((&text[..length], descriptor.is_none()), (b"without".as_slice(), true));
        drop(one);
        assert_eq!(receive(other.as_fd(), &mut text).unwrap().0, 0);
    }
}
