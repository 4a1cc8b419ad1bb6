//! The link of an ivshmem-doorbell device: nfqd is its server, gives each VM that connects a memory of
//! its own, and both sides ring.
//!
//! A VM's QEMU connects once. What it was given, its connection and the listening socket are kept by the
//! store of descriptors, so that the next nfqd goes on with them.

use super::resources::{ChannelEvent, ChannelId, ChannelResources};
use super::shared_memory::SharedMemory;
use crate::holder::{LISTENER, VM};
use crate::rate_limiter::RateLimiter;
use crate::reactor::Readiness;
use nfqd_shmctl::doorbell::{Bell, RING, welcome};
use nfqd_shmctl::{Ownership, RegionError, RegionFile};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket,
};
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The sources of events.
mod source {
    pub(super) const LISTENER: u32 = 0;
    pub(super) const CONNECTION: u32 = 1;
    pub(super) const BELL: u32 = 2;
}

/// The starts of the names of what a VM was given, beside [`VM`] and [`LISTENER`].
const MEMORY: &str = "memory@";
const HOST_BELL: &str = "host-bell@";
const GUEST_BELL: &str = "guest-bell@";
/// Refused clients that are logged in a second.
const LOGGED_PER_SECOND: u32 = 1;
/// Clients that are given a memory in a second.
const WELCOMED_PER_SECOND: u32 = 3;

/// The reason no VM can connect, or the one that has is not served.
#[derive(Debug, thiserror::Error)]
pub enum DoorbellError {
    /// The socket.
    #[error("{path}: {source}; VMs cannot connect to their doorbell server there")]
    Listen {
        /// The path of the socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A VM that cannot be given what it needs.
    #[error("{path}: a VM cannot be served: {source}")]
    Welcome {
        /// The path of the socket.
        path: PathBuf,
        /// The system's reason.
        source: Errno,
    },
    /// The memory.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// The server of one VM's device.
pub(super) struct DoorbellLink {
    id: ChannelId,
    path: PathBuf,
    ownership: Ownership,
    resources: Rc<ChannelResources>,
    listener: Option<Listener>,
    vm: Option<ConnectedVm>,
    error: Option<DoorbellError>,
    log_limiter: RateLimiter,
    welcome_limiter: RateLimiter,
    /// The store's losses as of when all that is there was stored; `None` if it is not.
    stored: Option<u32>,
}

struct Listener {
    socket: UnixListener,
    /// Device and inode of the path.
    identity: (u64, u64),
}

/// A VM that has connected, and what it was given.
struct ConnectedVm {
    connection: OwnedFd,
    memory: SharedMemory,
    host_bell: Bell,
    guest_bell: Bell,
    /// The memory's version as of the last ring.
    version: u64,
    /// Whether the next ring wakes the channel.
    is_armed: bool,
}

impl DoorbellLink {
    /// Listens at a path, or goes on with what an earlier nfqd has left.
    pub(super) fn open(
        id: ChannelId,
        path: &Path,
        ownership: Ownership,
        resources: Rc<ChannelResources>,
    ) -> DoorbellLink {
        let mut link = DoorbellLink {
            id,
            path: path.to_path_buf(),
            ownership,
            resources,
            listener: None,
            vm: None,
            error: None,
            log_limiter: RateLimiter::new(LOGGED_PER_SECOND),
            welcome_limiter: RateLimiter::new(WELCOMED_PER_SECOND),
            stored: None,
        };
        link.adopt_listener();
        link.adopt_vm();
        link.listen();
        link
    }

    fn name(&self, start: &str) -> String {
        format!("{start}{}", self.path.display())
    }

    fn event(&self, source: u32) -> ChannelEvent {
        ChannelEvent { channel: self.id, source }
    }

    fn adopt_listener(&mut self) {
        let taken = self.resources.store().take(&self.name(LISTENER));
        let Some((socket, identity)) = taken.zip(identity_of(&self.path)) else { return };
        // The owner may have been changed while nfqd was away.
        self.set_listener(Listener { socket: UnixListener::from(socket), identity });
        self.set_ownership(self.ownership);
    }

    fn set_listener(&mut self, listener: Listener) {
        let fd = listener.socket.as_fd();
        let added = self.resources.add(fd, Readiness::Readable, self.event(source::LISTENER));
        match added {
            Ok(()) => (self.listener, self.error, self.stored) = (Some(listener), None, None),
            Err(errno) => self.fail_to_listen(errno.into()),
        }
    }

    fn adopt_vm(&mut self) {
        let names = [VM, MEMORY, HOST_BELL, GUEST_BELL].map(|start| self.name(start));
        let taken = names.map(|name| self.resources.store().take(&name));
        let [Some(connection), Some(memory), Some(host_bell), Some(guest_bell)] = taken else {
            // An incomplete set is of no use.
            self.forget_vm();
            return;
        };
        let memory = RegionFile::adopt(&self.path, memory)
            .and_then(|region| SharedMemory::open(region, RING));
        let adopted = memory.map_err(DoorbellError::from).and_then(|memory| {
            self.serve(ConnectedVm {
                connection,
                memory,
                host_bell: host_bell.into(),
                guest_bell: guest_bell.into(),
                version: 0,
                is_armed: true,
            })
        });
        match adopted {
            Ok(()) => log::info!("{}: its VM is served again", self.path.display()),
            Err(error) => {
                log::error!("{error}");
                self.error = Some(error);
                self.forget_vm();
            }
        }
    }

    /// Waits for the VM's rings, and for its end.
    fn serve(&mut self, vm: ConnectedVm) -> Result<(), DoorbellError> {
        let resources = &self.resources;
        let (bell, connection) = (vm.host_bell.as_fd(), vm.connection.as_fd());
        let added =
            resources.add(bell, Readiness::ReadableOnce, self.event(source::BELL)).and_then(|()| {
                resources.add(connection, Readiness::Readable, self.event(source::CONNECTION))
            });
        added.map_err(|source| DoorbellError::Welcome { path: self.path.clone(), source })?;
        (self.vm, self.stored) = (Some(vm), None);
        Ok(())
    }

    /// Listens, unless that is so already and the path still names the socket.
    fn listen(&mut self) {
        if let Some(listener) = &self.listener {
            if identity_of(&self.path) == Some(listener.identity) {
                return;
            }
            log::warn!("{}: its socket was removed; listening anew", self.path.display());
            self.resources.remove(listener.socket.as_fd());
            self.resources.store().remove(&self.name(LISTENER));
            self.listener = None;
        }
        match listen_at(&self.path, self.ownership) {
            Ok(socket) => {
                let Some(identity) = identity_of(&self.path) else { return };
                self.set_listener(Listener { socket, identity });
            }
            Err(error) => self.fail_to_listen(error),
        }
    }

    fn fail_to_listen(&mut self, source: io::Error) {
        let error = DoorbellError::Listen { path: self.path.clone(), source };
        let is_new = self.error.as_ref().is_none_or(|its| its.to_string() != error.to_string());
        if is_new {
            log::error!("{error}");
        }
        self.error = Some(error);
    }

    /// Does what is due once a second.
    pub(super) fn follow(&mut self) {
        self.listen();
        if let Some(listener) = &self.listener {
            // Without descriptors, `accept` has paused the listener.
            let (fd, event) = (listener.socket.as_fd(), self.event(source::LISTENER));
            let _ = self.resources.modify(fd, Readiness::Readable, event);
        }
        let repaired = self.vm.as_ref().map_or(Ok(()), |vm| vm.memory.repair());
        if let Err(error) = repaired {
            self.close(error);
        }
        self.store();
    }

    /// Has what is there kept, unless that is so already.
    fn store(&mut self) {
        let mut store = self.resources.store();
        let losses = store.losses();
        if self.stored == Some(losses) {
            return;
        }
        let mut all = Vec::new();
        all.extend(self.listener.iter().map(|listener| (LISTENER, listener.socket.as_fd())));
        if let Some(vm) = &self.vm {
            all.push((MEMORY, vm.memory.region().as_fd()));
            all.push((HOST_BELL, vm.host_bell.as_fd()));
            all.push((GUEST_BELL, vm.guest_bell.as_fd()));
            // The connection last: without it, the rest is not taken over.
            all.push((VM, vm.connection.as_fd()));
        }
        let is_stored = all.into_iter().all(|(start, fd)| store.store(&self.name(start), fd));
        self.stored = is_stored.then_some(losses);
    }

    /// Gives the socket another owner and mode.
    pub(super) fn set_ownership(&mut self, ownership: Ownership) {
        self.ownership = ownership;
        if self.listener.is_some()
            && let Err(error) = give(&self.path, ownership)
        {
            log::error!("{}: {error}; the socket keeps its owner and mode", self.path.display());
        }
    }

    /// Handles an event. Returns whether the guest has rung.
    pub(super) fn handle(&mut self, event: ChannelEvent, second: u32) -> bool {
        match event.source {
            source::LISTENER => self.accept(second),
            source::CONNECTION => self.check_vm(),
            _ => {
                let Some(vm) = &mut self.vm else { return false };
                vm.is_armed = false;
                let rung = vm.host_bell.take_ring();
                return rung.unwrap_or_else(|errno| {
                    self.break_with_vm(errno);
                    false
                });
            }
        }
        false
    }

    fn check_vm(&mut self) {
        if self.vm.as_ref().is_some_and(|vm| has_ended(&vm.connection)) {
            log::info!("{}: its VM has gone", self.path.display());
            self.forget_vm();
        }
    }

    /// Ends the connection to a VM that does not keep to the protocol.
    fn break_with_vm(&mut self, errno: Errno) {
        let path = self.path.display();
        log::error!(
            "{path}: its VM's doorbell could block nfqd ({errno}); the VM is no longer served, restart it"
        );
        self.forget_vm();
    }

    fn forget_vm(&mut self) {
        if let Some(vm) = self.vm.take() {
            // Both stay open elsewhere: in the store, and in QEMU.
            self.resources.remove(vm.connection.as_fd());
            self.resources.remove(vm.host_bell.as_fd());
        }
        for start in [VM, MEMORY, HOST_BELL, GUEST_BELL] {
            self.resources.store().remove(&self.name(start));
        }
    }

    fn accept(&mut self, second: u32) {
        let Some(listener) = &self.listener else { return };
        let (fd, event) = (listener.socket.as_fd(), self.event(source::LISTENER));
        let Some(connection) = self.resources.accept(fd, event) else { return };
        self.check_vm();
        let refusal = if self.vm.is_some() {
            Some("another VM is already connected; give each VM its own --doorbell")
        } else if !self.welcome_limiter.has_room(second) {
            Some("VMs connect too often")
        } else {
            None
        };
        if let Some(reason) = refusal {
            if self.log_limiter.has_room(second) {
                self.log_limiter.count();
                log::warn!("{}: a VM was refused: {reason}", self.path.display());
            }
            return;
        }
        self.welcome_limiter.count();
        match self.welcome(connection) {
            Ok(()) => {
                log::info!("{}: its VM has connected", self.path.display());
                self.error = None;
                self.store();
            }
            Err(error) => {
                log::error!("{error}");
                self.error = Some(error);
            }
        }
    }

    /// Gives a VM a memory of its own, which has nothing of those before it.
    fn welcome(&mut self, connection: OwnedFd) -> Result<(), DoorbellError> {
        let failed = |source| DoorbellError::Welcome { path: self.path.clone(), source };
        let bell = || {
            Bell::new().map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(0))))
        };
        let region = RegionFile::unnamed(&self.path)?;
        let (host_bell, guest_bell) = (bell()?, bell()?);
        let memory = SharedMemory::open(region, RING)?;
        welcome(connection.as_fd(), memory.region().as_fd(), &host_bell, &guest_bell)
            .map_err(failed)?;
        let version = memory.version();
        self.serve(ConnectedVm {
            connection,
            memory,
            host_bell,
            guest_bell,
            version,
            is_armed: true,
        })
    }

    /// Waits for the next ring. Returns whether there is a VM that can ring.
    pub(super) fn arm(&mut self) -> bool {
        let event = self.event(source::BELL);
        let Some(vm) = &mut self.vm else { return false };
        if !vm.is_armed {
            let bell = vm.host_bell.as_fd();
            vm.is_armed = self.resources.modify(bell, Readiness::ReadableOnce, event).is_ok();
        }
        vm.is_armed
    }

    /// Rings the guest if there is something new in its memory.
    pub(super) fn ring_guest(&mut self) {
        if let Some(vm) = &mut self.vm {
            let version = vm.memory.version();
            let is_new = std::mem::replace(&mut vm.version, version) != version;
            if let Some(Err(errno)) = is_new.then(|| vm.guest_bell.ring()) {
                self.break_with_vm(errno);
            }
        }
    }

    /// Returns the memory of the VM that has connected.
    pub(super) fn memory(&self) -> Option<&SharedMemory> {
        self.vm.as_ref().map(|vm| &vm.memory)
    }

    /// Returns the memory of the VM that has connected.
    pub(super) fn memory_mut(&mut self) -> Option<&mut SharedMemory> {
        self.vm.as_mut().map(|vm| &mut vm.memory)
    }

    /// Returns why VMs cannot connect, or the one that has is not served.
    pub(super) fn error(&self) -> Option<&DoorbellError> {
        self.error.as_ref()
    }

    /// Gives up the VM.
    pub(super) fn close(&mut self, error: RegionError) {
        log::error!("{error}; its VM has to be started anew");
        self.forget_vm();
        self.error = Some(error.into());
    }

    /// Ends the service of a daemon that exits, unless a VM is connected or a service manager starts nfqd
    /// again.
    pub(super) fn suspend(&mut self) {
        let is_managed = self.resources.store().is_managed();
        if self.vm.is_none() && !is_managed {
            self.end();
        }
    }

    /// Ends the service: nobody can connect any more, and nothing is kept.
    pub(super) fn end(&mut self) {
        self.forget_vm();
        self.resources.store().remove(&self.name(LISTENER));
        self.listener.iter().for_each(|listener| self.resources.remove(listener.socket.as_fd()));
        if let Some(listener) = self.listener.take()
            && identity_of(&self.path) == Some(listener.identity)
        {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether a VM's connection has ended. A VM never sends anything, so one that does has not kept to the
/// protocol.
fn has_ended(connection: &OwnedFd) -> bool {
    let flags = MsgFlags::MSG_DONTWAIT;
    !matches!(recv(connection.as_raw_fd(), &mut [0], flags), Err(Errno::EAGAIN | Errno::EINTR))
}

/// Returns device and inode of a path that names a socket.
fn identity_of(path: &Path) -> Option<(u64, u64)> {
    let about = fs::symlink_metadata(path).ok().filter(|about| about.file_type().is_socket());
    about.map(|about| (about.dev(), about.ino()))
}

/// Listens at a path. A socket that nobody listens at is replaced; a missing directory is made.
fn listen_at(path: &Path, ownership: Ownership) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(about) if about.file_type().is_socket() => {
            if is_listened_at(path)? {
                return Err(io::Error::other("another program listens there"));
            }
            fs::remove_file(path)?;
        }
        Ok(_) => return Err(io::Error::other("there is a file that is not a socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(directory) = path.parent().filter(|its| !its.exists()) {
                DirBuilder::new().mode(0o755).create(directory)?;
                // A mask of the process may have been in the way: QEMU has another user.
                fs::set_permissions(directory, Permissions::from_mode(0o755))?;
            }
        }
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    let made = listener.set_nonblocking(true).and_then(|()| give(path, ownership));
    if let Err(error) = made {
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(listener)
}

/// Gives a socket its owner and mode.
fn give(path: &Path, ownership: Ownership) -> io::Result<()> {
    lchown(path, ownership.owner, ownership.group)?;
    fs::set_permissions(path, Permissions::from_mode(ownership.mode))
}

/// Whether a program listens at a socket. It is not waited for.
fn is_listened_at(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        _ => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Channel, Link, Message};
    use super::*;
    use crate::config::ChannelSpec;
    use crate::descriptor_store::DescriptorStore;
    use crate::descriptors::receive;
    use nfqd_shmctl::{Region, Reply};
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    struct Fixture {
        _dir: tempfile::TempDir,
        path: PathBuf,
        resources: Rc<ChannelResources>,
        channel: Channel,
    }

    /// A QEMU that has connected: the connection, the memory, the host's bell and its own.
    struct Vm {
        _connection: UnixStream,
        memory: Region,
        host: Bell,
        own: Bell,
    }

    impl Fixture {
        fn new() -> Fixture {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("made/vm.sock");
            let resources = Rc::new(ChannelResources::new(DescriptorStore::none()).unwrap());
            let spec = ChannelSpec::doorbell(&format!("{},mode=0660", path.display())).unwrap();
            let channel = Channel::open(&spec, &resources);
            assert_eq!(channel.error(), None);
            Fixture { _dir: dir, path, resources, channel }
        }

        /// Handles what has happened; returns the commands.
        fn step(&mut self, now: Instant) -> Vec<String> {
            for event in self.resources.events().unwrap() {
                assert!(self.channel.has(event));
                self.channel.handle(event, now);
            }
            if self.channel.next_poll().is_none_or(|next| next > now) {
                return Vec::new();
            }
            let messages = self.channel.poll(now);
            let texts =
                messages.iter().map(|message| message.text().unwrap().to_string()).collect();
            let answer = |message: Message| (message, Reply::ok("done"));
            self.channel.reply(messages.into_iter().map(answer).collect());
            texts
        }

        fn vm(&self) -> &ConnectedVm {
            let Link::Doorbell(link) = &self.channel.link else { unreachable!("a doorbell") };
            link.vm.as_ref().unwrap()
        }

        fn connect(&mut self) -> Vm {
            let connection = UnixStream::connect(&self.path).unwrap();
            self.step(Instant::now());
            let next = || {
                let mut bytes = [0; 8];
                let (length, descriptor) = receive(connection.as_fd(), &mut bytes).unwrap();
                assert_eq!(length, 8);
                (i64::from_le_bytes(bytes), descriptor)
            };
            assert_eq!((next().0, next().0), (0, 0), "the version, and the first peer");
            let (mark, memory) = next();
            let (peer, host) = next();
            let (id, own) = next();
            assert_eq!((mark, peer, id), (-1, 1, 0));
            let path = format!("/proc/self/fd/{}", memory.as_ref().unwrap().as_raw_fd());
            let memory = Region::open(Path::new(&path)).unwrap();
            let (host, own) = (host.unwrap().into(), own.unwrap().into());
            Vm { _connection: connection, memory, host, own }
        }
    }

    #[test]
    fn a_ring_is_answered_at_once_and_answered_by_a_ring() {
        let mut fixture = Fixture::new();
        assert_eq!(fixture.channel.is_connected(), Some(false));
        let mode = fs::metadata(&fixture.path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o660);
        let vm = fixture.connect();
        assert_eq!(fixture.channel.is_connected(), Some(true));
        let (start, mut looks) = (Instant::now(), 0);
        for step in 1..=1000 {
            let before = fixture.channel.next_poll();
            fixture.step(start + Duration::from_millis(step));
            looks += u32::from(fixture.channel.next_poll() != before);
        }
        assert!(looks <= 5, "{looks} looks in a second");
        let later = start + Duration::from_millis(1000);
        vm.memory.write(1, b"Q@");
        vm.memory.store(0, b'@');
        vm.host.ring().unwrap();
        assert_eq!(
            (fixture.step(later), vm.own.take_ring().unwrap()),
            (vec!["Q".to_string()], true)
        );
        // Without a ring, it is found all the same.
        vm.memory.store(0, b'@');
        vm.memory.store(2, b'@');
        let found = later + Duration::from_secs(1);
        assert_eq!(
            (fixture.step(found), vm.own.take_ring().unwrap()),
            (vec!["Q".to_string()], true)
        );
    }

    #[test]
    fn a_storm_of_rings_costs_a_look_a_millisecond() {
        let mut fixture = Fixture::new();
        let vm = fixture.connect();
        let start = Instant::now() + Duration::from_secs(1);
        let mut looks = 0;
        for step in 0..10_000_u32 {
            vm.host.ring().unwrap();
            let now = start + step * Duration::from_micros(10);
            let before = fixture.channel.next_poll();
            fixture.step(now);
            looks += u32::from(fixture.channel.next_poll() != before);
        }
        assert!(looks <= 200, "{looks} looks in a tenth of a second");
        let bell = &fixture.resources;
        assert!(bell.events().unwrap().len() <= 1);
    }

    #[test]
    fn each_vm_has_a_memory_of_its_own_and_only_one_is_connected() {
        let mut fixture = Fixture::new();
        let vm = fixture.connect();
        vm.memory.write(100_000, b"secret");
        let second = UnixStream::connect(&fixture.path).unwrap();
        fixture.step(Instant::now());
        let mut byte = [0];
        assert_eq!(receive(second.as_fd(), &mut byte).unwrap().0, 0, "refused");
        assert!(!has_ended(&fixture.vm().connection));
        drop(vm);
        fixture.step(Instant::now());
        assert_eq!(fixture.channel.is_connected(), Some(false));
        assert_eq!(fixture.channel.next_poll(), None);
        let vm = fixture.connect();
        let mut found = [1; 6];
        vm.memory.read(100_000, &mut found);
        assert_eq!(found, [0; 6]);
        // The next VM is not kept out by one that is gone, even if nobody has noticed.
        drop(vm);
        fixture.connect();
        assert_eq!(fixture.channel.is_connected(), Some(true));
    }

    #[test]
    fn a_client_that_sends_is_no_vm() {
        let mut fixture = Fixture::new();
        let mut stranger = UnixStream::connect(&fixture.path).unwrap();
        fixture.step(Instant::now());
        stranger.write_all(b"GET / HTTP/1.1\r\n").unwrap();
        fixture.step(Instant::now());
        assert_eq!(fixture.channel.is_connected(), Some(false));
    }

    #[test]
    fn what_is_in_the_way_is_said_and_a_removed_socket_is_made_again() {
        let mut fixture = Fixture::new();
        fs::remove_file(&fixture.path).unwrap();
        fs::write(&fixture.path, "precious").unwrap();
        fixture.channel.follow();
        let error = fixture.channel.error().unwrap();
        assert!(error.contains("there is a file that is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&fixture.path).unwrap(), "precious");
        fs::remove_file(&fixture.path).unwrap();
        let other = UnixListener::bind(&fixture.path).unwrap();
        fixture.channel.follow();
        assert!(fixture.channel.error().unwrap().contains("another program listens there"));
        // A socket that nobody listens at is replaced.
        drop(other);
        fixture.channel.follow();
        assert_eq!(fixture.channel.error(), None);
        fixture.connect();
        fixture.channel.end();
        assert!(!fixture.path.exists() && fixture.channel.is_connected() == Some(false));
    }
}
