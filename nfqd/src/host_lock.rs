//! The lock of a network namespace: one nfqd has its tables and queues at a time.
//!
//! It is an abstract Unix socket, which belongs to the network namespace (net/unix/af_unix.c) and
//! vanishes with its process.

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

/// The name of the socket.
const NAME: &[u8] = b"nfqd";

/// The reason this nfqd may not have the network namespace.
#[derive(Debug, thiserror::Error)]
pub enum HostLockError {
    /// Another one has it.
    #[error(
        "another nfqd (pid {pid}) serves this network namespace; stop it first, or ask it by 'nfqd status'"
    )]
    Taken {
        /// The process.
        pid: i32,
    },
    /// The socket cannot be made.
    #[error("lock of the network namespace: {0}")]
    Io(#[from] io::Error),
}

/// The lock, until it is dropped or the process ends.
#[derive(Debug)]
pub struct HostLock {
    _socket: Option<UnixListener>,
}

impl HostLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// If another nfqd has it. A process of an unprivileged user that uses the name cannot keep nfqd
    /// from starting.
    pub fn take() -> Result<HostLock, HostLockError> {
        let address = SocketAddr::from_abstract_name(NAME)?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(HostLock { _socket: Some(listener) }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let holder = UnixStream::connect_addr(&address)
                    .and_then(|peer| Ok(getsockopt(&peer, sockopt::PeerCredentials)?));
                match holder {
                    Ok(holder) if [0, geteuid().as_raw()].contains(&holder.uid()) => {
                        Err(HostLockError::Taken { pid: holder.pid() })
                    }
                    _ => {
                        log::warn!(
                            "an unprivileged process has the abstract socket 'nfqd', the lock"
                        );
                        Ok(HostLock { _socket: None })
                    }
                }
            }
            Err(error) => Err(error.into()),
        }
    }
}
