//! The resources that the links of all channels share: the reactor that their descriptors wake, the store of
//! descriptors that outlive the daemon, and the socket at which VMs connect by vsock.

use crate::descriptor_store::DescriptorStore;
use crate::reactor::{Reactor, Readiness};
use nfqd_shmctl::vsock::PORT;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket,
};
use std::cell::{Cell, RefCell, RefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// The number of a channel, which no other one has while the daemon runs; 0 stands for the socket at which VMs
/// connect by vsock.
pub(super) type ChannelId = u32;

/// The resources that the links of all channels share.
pub struct ChannelResources {
    reactor: Reactor,
    store: RefCell<DescriptorStore>,
    last_id: Cell<ChannelId>,
    /// The socket at which VMs connect by vsock, or why there is none.
    vsock: RefCell<Result<OwnedFd, Errno>>,
}

/// An event of a channel: a descriptor is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChannelEvent {
    /// The channel.
    pub(super) channel: ChannelId,
    /// The descriptor that is ready, as the link has numbered it.
    pub(super) source: u32,
}

/// The event of the socket at which VMs connect by vsock.
const LISTENER: ChannelEvent = ChannelEvent { channel: 0, source: 0 };

impl ChannelResources {
    /// The resources of a daemon that has no channels yet.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn new(store: DescriptorStore) -> Result<ChannelResources, Errno> {
        Ok(ChannelResources {
            reactor: Reactor::new()?,
            store: RefCell::new(store),
            last_id: Cell::new(0),
            // A placeholder, until a channel asks for it.
            vsock: RefCell::new(Err(Errno::EAGAIN)),
        })
    }

    /// Returns a number for a channel.
    pub(super) fn next_id(&self) -> ChannelId {
        self.last_id.set(self.last_id.get() + 1);
        self.last_id.get()
    }

    /// Has a descriptor wake a channel, as soon as it is ready and whenever it is rearmed.
    ///
    /// # Errors
    /// If there is no memory left.
    pub(super) fn add(
        &self,
        fd: BorrowedFd<'_>,
        readiness: Readiness,
        event: ChannelEvent,
    ) -> Result<(), Errno> {
        self.reactor.add(fd, readiness, event.token())
    }

    /// Waits for a descriptor no more, before it is closed here: it may stay open in the store, or in a VM.
    pub(super) fn remove(&self, fd: BorrowedFd<'_>) {
        self.reactor.remove(fd);
    }

    /// Changes what a descriptor is waited for.
    ///
    /// # Errors
    /// If it was not added.
    pub(super) fn modify(
        &self,
        fd: BorrowedFd<'_>,
        readiness: Readiness,
        event: ChannelEvent,
    ) -> Result<(), Errno> {
        self.reactor.modify(fd, readiness, event.token())
    }

    /// Returns the events that have happened.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn events(&self) -> Result<Vec<ChannelEvent>, Errno> {
        let tokens = self.reactor.ready()?;
        Ok(tokens.into_iter().map(ChannelEvent::from_token).collect())
    }

    /// Returns the store of descriptors.
    pub fn store(&self) -> RefMut<'_, DescriptorStore> {
        self.store.borrow_mut()
    }

    /// Listens for VMs that connect by vsock, unless that is so already.
    pub(super) fn listen_by_vsock(&self) {
        let mut vsock = self.vsock.borrow_mut();
        if let Ok(listener) = &*vsock {
            // Without descriptors, `accept` has paused the listener.
            let _ = self.modify(listener.as_fd(), Readiness::Readable, LISTENER);
            return;
        }
        let before = vsock.as_ref().err().copied();
        *vsock = listen_at(PORT).and_then(|listener| {
            self.add(listener.as_fd(), Readiness::Readable, LISTENER)?;
            Ok(listener)
        });
        if let Err(errno) = *vsock
            && before != Some(errno)
        {
            log::error!("{}", vsock_advice(errno));
        }
    }

    /// Returns why there is no socket at which VMs connect by vsock.
    pub(super) fn vsock_error(&self) -> Option<Errno> {
        self.vsock.borrow().as_ref().err().copied()
    }

    /// Accepts a VM that has connected by vsock; returns the connection.
    pub fn accept_by_vsock(&self) -> Option<OwnedFd> {
        let vsock = self.vsock.borrow();
        self.accept(vsock.as_ref().ok()?.as_fd(), LISTENER)
    }

    /// Accepts a connection. Without descriptors, the listener pauses until it is rearmed.
    pub(super) fn accept(&self, listener: BorrowedFd<'_>, event: ChannelEvent) -> Option<OwnedFd> {
        use Errno::{EMFILE, ENFILE, ENOBUFS, ENOMEM};
        let accepted = crate::descriptors::accept(listener);
        if let Err(errno @ (EMFILE | ENFILE | ENOBUFS | ENOMEM)) = accepted {
            log::warn!("a VM cannot connect: {errno}; it waits");
            let _ = self.modify(listener, Readiness::Paused, event);
        }
        accepted.ok()
    }
}

impl AsFd for ChannelResources {
    /// The descriptor that is ready when an event has happened.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reactor.as_fd()
    }
}

impl ChannelEvent {
    fn token(self) -> u64 {
        u64::from(self.channel) << 32 | u64::from(self.source)
    }

    fn from_token(token: u64) -> ChannelEvent {
        ChannelEvent { channel: (token >> 32) as u32, source: token as u32 }
    }

    /// Whether a VM connects by vsock.
    pub fn is_vsock_connection(self) -> bool {
        self.channel == 0
    }
}

/// Returns what a failure to listen by vsock means, and what to do about it.
pub(super) fn vsock_advice(errno: Errno) -> String {
    let advice = match errno {
        Errno::EAFNOSUPPORT | Errno::ENODEV => "load the module vhost_vsock",
        Errno::EADDRINUSE => {
            "another program already listens on its port; only one nfqd per host can"
        }
        _ => "nfqd may not listen by vsock; look at its sandbox, such as RestrictAddressFamilies=",
    };
    format!("vsock: {errno}; {advice}")
}

fn listen_at(port: u32) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    // VMADDR_CID_ANY
    bind(listener.as_raw_fd(), &VsockAddr::new(u32::MAX, port))?;
    listen(&listener, Backlog::new(4096)?)?;
    Ok(listener)
}
