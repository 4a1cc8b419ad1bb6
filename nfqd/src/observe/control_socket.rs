//! The server of the control protocol.
//!
//! No call blocks: sockets are non-blocking, requests and the number of clients are bounded, and
//! a client that makes no progress is dropped. The reactor reports which descriptors are ready.

use crate::api::{Answer, ErrorCode, MAX_REQUEST, Request, RequestError};
use crate::config::SocketPaths;
use nix::errno::Errno;
use nix::unistd::{Group, chown};
use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most clients of one socket.
const MAX_CLIENTS: usize = 16;
/// The time in which a client must complete its request, and read its answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes that a client gets before others have their turn.
const MAX_WRITE: usize = 256 << 10;
/// The group whose members may connect to the observation socket.
const OBSERVER_GROUP: &str = "nfqd";

/// One of the daemon's sockets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Socket {
    /// Every request, for root.
    Control,
    /// Requests that change nothing, for members of a group.
    Observe,
    /// The socket of earlier versions, in their protocol: it sends the status without being asked.
    /// Understood for one version.
    Legacy,
}

impl Socket {
    /// Every socket.
    pub const ALL: [Socket; 3] = [Socket::Control, Socket::Observe, Socket::Legacy];

    fn mode(self) -> u32 {
        match self {
            Socket::Control | Socket::Legacy => 0o600,
            Socket::Observe => 0o660,
        }
    }
}

/// The number of a client.
pub type ClientId = u32;

/// The sockets and their clients.
pub struct ControlSocket {
    listeners: BTreeMap<Socket, Listener>,
    clients: BTreeMap<ClientId, Client>,
    next_client: ClientId,
    /// Whether there were no descriptors left for the last client that connected.
    is_exhausted: bool,
}

struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

struct Client {
    stream: UnixStream,
    socket: Socket,
    input: Vec<u8>,
    output: Arc<Vec<u8>>,
    /// Bytes of the output that have been sent.
    sent: usize,
    /// Whether nothing more is read: it is closed when its output has been sent.
    is_closing: bool,
    deadline: Instant,
}

/// The event to wait for on a client's descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interest {
    /// More of a request.
    Read,
    /// Room for more of an answer.
    Write,
}

/// The outcome of a step of a client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The client asks; the answer is passed to [`ControlSocket::answer`].
    Asks(Request),
    /// The daemon sends its status without being asked.
    WantsStatus,
    /// The client is to be waited for.
    Waits(Interest),
    /// The client is gone.
    Gone,
}

impl ControlSocket {
    /// Opens the sockets. A socket that nobody listens at is replaced.
    ///
    /// # Errors
    /// If a daemon answers at a path, or a path cannot be used; the text names it.
    pub fn open(paths: &SocketPaths) -> io::Result<ControlSocket> {
        if let Some(directory) = &paths.directory {
            let named = |error: io::Error| {
                io::Error::new(error.kind(), format!("{}: {error}", directory.display()))
            };
            fs::create_dir_all(directory).map_err(named)?;
        }
        let mut listeners = BTreeMap::new();
        for socket in Socket::ALL {
            let path = match socket {
                Socket::Control => Some(&paths.control),
                Socket::Observe => Some(&paths.observe),
                Socket::Legacy => paths.legacy.as_ref(),
            };
            let Some(path) = path else { continue };
            let named = |error: io::Error| {
                io::Error::new(error.kind(), format!("{}: {error}", path.display()))
            };
            listeners.insert(socket, listen(path, socket).map_err(named)?);
        }
        Ok(ControlSocket {
            listeners,
            clients: BTreeMap::new(),
            next_client: 0,
            is_exhausted: false,
        })
    }

    /// Returns the descriptors at which clients connect.
    pub fn listeners(&self) -> impl Iterator<Item = (Socket, BorrowedFd<'_>)> {
        self.listeners.iter().map(|(socket, listener)| (*socket, listener.listener.as_fd()))
    }

    /// Returns the descriptor of a client.
    pub fn client_fd(&self, id: ClientId) -> Option<BorrowedFd<'_>> {
        self.clients.get(&id).map(|client| client.stream.as_fd())
    }

    /// Accepts a client that has connected. A client over the limit gets an error and is closed.
    pub fn accept(&mut self, socket: Socket, now: Instant) -> Option<ClientId> {
        let listener = self.listeners.get(&socket)?;
        let accepted = listener.listener.accept();
        let was_exhausted = self.is_exhausted;
        self.is_exhausted = accepted.as_ref().is_err_and(is_exhaustion);
        let (mut stream, _) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if self.is_exhausted && !was_exhausted {
                    log::warn!("control socket: {error}; clients wait");
                }
                return None;
            }
        };
        if let Err(error) = stream.set_nonblocking(true) {
            log::debug!("control socket: {error}");
            return None;
        }
        let clients = self.clients.values().filter(|client| client.socket == socket).count();
        if clients >= MAX_CLIENTS {
            let message = format!("{MAX_CLIENTS} clients are connected; try again later");
            let answer = Answer::Error(RequestError::new(ErrorCode::Busy, message));
            // A client that does not take it is closed all the same.
            let _ = stream.write_all(answer.to_line().as_bytes());
            return None;
        }
        let id = self.next_client;
        self.next_client = self.next_client.wrapping_add(1);
        let client = Client {
            stream,
            socket,
            input: Vec::new(),
            output: Arc::default(),
            sent: 0,
            is_closing: socket == Socket::Legacy,
            deadline: now + CLIENT_TIMEOUT,
        };
        self.clients.insert(id, client);
        Some(id)
    }

    /// Whether the last client could not be accepted and still waits, so that its listener stays
    /// readable and should be left alone for a while.
    pub fn is_exhausted(&self) -> bool {
        self.is_exhausted
    }

    /// Goes on with a client whose descriptor is ready, or that has just been accepted or answered.
    pub fn proceed(&mut self, id: ClientId, now: Instant) -> Progress {
        let Some(client) = self.clients.get_mut(&id) else { return Progress::Gone };
        let progress = client.proceed(now);
        if progress == Progress::Gone {
            self.clients.remove(&id);
        }
        progress
    }

    /// Answers the request of a client with a line of the protocol.
    pub fn answer(&mut self, id: ClientId, line: Arc<Vec<u8>>, now: Instant) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.send(line, now);
        }
    }

    /// Gives a client more time, because its answer is still being made.
    pub fn grant_time(&mut self, id: ClientId, now: Instant) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.deadline = now + CLIENT_TIMEOUT;
        }
    }

    /// Returns the socket of a client.
    pub fn socket_of(&self, id: ClientId) -> Option<Socket> {
        self.clients.get(&id).map(|client| client.socket)
    }

    /// Drops the clients that have taken too long.
    pub fn drop_stalled(&mut self, now: Instant) {
        self.clients.retain(|_, client| client.deadline > now);
    }
}

impl Client {
    fn proceed(&mut self, now: Instant) -> Progress {
        match self.flush() {
            Ok(true) => {}
            Ok(false) => return Progress::Waits(Interest::Write),
            Err(_) => return Progress::Gone,
        }
        if self.is_closing {
            // A legacy client has got nothing yet; any other one has got its last answer.
            let is_new_legacy = self.socket == Socket::Legacy && self.sent == 0;
            return if is_new_legacy { Progress::WantsStatus } else { Progress::Gone };
        }
        loop {
            if let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return self.request(&line, now);
            }
            if self.input.len() >= MAX_REQUEST {
                let message = format!("a request has at most {MAX_REQUEST} bytes");
                return self.reject(RequestError::new(ErrorCode::Syntax, message), now);
            }
            let mut chunk = [0; 1024];
            let room = (MAX_REQUEST - self.input.len()).min(chunk.len());
            match self.stream.read(&mut chunk[..room]) {
                Ok(0) => return Progress::Gone,
                Ok(len) => self.input.extend(&chunk[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Progress::Waits(Interest::Read);
                }
                Err(_) => return Progress::Gone,
            }
        }
    }

    fn request(&mut self, line: &[u8], now: Instant) -> Progress {
        match Request::parse(line) {
            Ok(request) if request.is_change() && self.socket != Socket::Control => {
                let message = "this socket is for reading; use the control socket";
                self.reject(RequestError::new(ErrorCode::Denied, message), now)
            }
            Ok(request) => {
                self.deadline = now + CLIENT_TIMEOUT;
                Progress::Asks(request)
            }
            Err(error) => self.reject(error, now),
        }
    }

    /// Answers a bad request, and closes the connection behind it.
    fn reject(&mut self, error: RequestError, now: Instant) -> Progress {
        self.is_closing = true;
        self.send(Arc::new(Answer::Error(error).to_line().into_bytes()), now);
        self.proceed(now)
    }

    fn send(&mut self, output: Arc<Vec<u8>>, now: Instant) {
        (self.output, self.sent) = (output, 0);
        self.deadline = now + CLIENT_TIMEOUT;
    }

    /// Sends as much of the output as there is room for, up to [`MAX_WRITE`]. Returns whether all of it has
    /// been sent.
    fn flush(&mut self) -> io::Result<bool> {
        let most = self.sent.saturating_add(MAX_WRITE);
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let room = most.saturating_sub(self.sent).min(rest.len());
            if room == 0 {
                return Ok(false);
            }
            match self.stream.write(rest.get(..room).unwrap_or(rest)) {
                Ok(len) => self.sent += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        // `sent` stays: it tells that an answer was sent.
        self.output = Arc::default();
        Ok(true)
    }
}

/// Whether a client could not be accepted for want of descriptors or memory, so that it still waits.
fn is_exhaustion(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM))
}

fn listen(path: &Path, socket: Socket) -> io::Result<Listener> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            ErrorKind::AddrInUse,
            "another nfqd uses this socket; stop it, or choose another path with --control",
        ));
    }
    let is_socket = fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket());
    if is_socket {
        fs::remove_file(path)?;
    }
    // Between here and the change of mode, the umask keeps others from connecting: that needs the
    // right to write.
    let listener = UnixListener::bind(path)?;
    let listener = Listener { listener, path: path.to_path_buf() };
    if socket == Socket::Observe
        && let Ok(Some(group)) = Group::from_name(OBSERVER_GROUP)
    {
        chown(path, None, Some(group.gid))?;
    }
    fs::set_permissions(path, Permissions::from_mode(socket.mode()))?;
    listener.listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Status;
    use std::io::{BufRead, BufReader};

    struct Fixture {
        directory: tempfile::TempDir,
        server: ControlSocket,
        now: Instant,
    }

    impl Fixture {
        fn new() -> Fixture {
            let directory = tempfile::tempdir().unwrap();
            let server = ControlSocket::open(&paths(&directory)).unwrap();
            Fixture { directory, server, now: Instant::now() }
        }

        fn connect(&mut self, socket: Socket) -> (UnixStream, Option<ClientId>) {
            let name = match socket {
                Socket::Control => "run/control",
                Socket::Observe => "run/observe",
                Socket::Legacy => "old.sock",
            };
            let stream = UnixStream::connect(self.directory.path().join(name)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            (stream, self.server.accept(socket, self.now))
        }

        fn proceed(&mut self, id: ClientId) -> Progress {
            self.server.proceed(id, self.now)
        }
    }

    fn paths(directory: &tempfile::TempDir) -> SocketPaths {
        SocketPaths {
            directory: Some(directory.path().join("run")),
            control: directory.path().join("run/control"),
            observe: directory.path().join("run/observe"),
            legacy: Some(directory.path().join("old.sock")),
        }
    }

    fn read_line(stream: &UnixStream) -> String {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn a_request_in_pieces_is_answered_and_the_next_one_too() {
        let mut f = Fixture::new();
        let (mut stream, id) = f.connect(Socket::Observe);
        let id = id.unwrap();
        assert_eq!(f.proceed(id), Progress::Waits(Interest::Read));
        stream.write_all(b"{\"v\":1,\"as").unwrap();
        assert_eq!(f.proceed(id), Progress::Waits(Interest::Read));
        stream.write_all(b"k\":\"status\"}\n{\"v\":1,\"ask\":\"status\"}\n").unwrap();
        for pid in [7, 8] {
            assert_eq!(f.proceed(id), Progress::Asks(Request::Status));
            let status = Answer::Status(Box::new(Status { pid, ..Status::default() }));
            f.server.answer(id, Arc::new(status.to_line().into_bytes()), f.now);
        }
        assert_eq!(f.proceed(id), Progress::Waits(Interest::Read));
        let mut reader = BufReader::new(&stream);
        for pid in [7, 8] {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Ok(Answer::Status(status)) = Answer::parse(&line) else { panic!("{line}") };
            assert_eq!(status.pid, pid);
        }
        drop(stream);
        assert_eq!(f.proceed(id), Progress::Gone);
    }

    #[test]
    fn the_observation_socket_changes_nothing_and_bad_requests_end_the_connection() {
        let reload = Request::Reload.to_line();
        let long = "x".repeat(MAX_REQUEST);
        for (socket, line, code) in [
            (Socket::Observe, reload.as_str(), "denied"),
            (Socket::Control, "status\n", "syntax"),
            (Socket::Control, long.as_str(), "syntax"),
            (Socket::Control, "{\"v\":9,\"ask\":\"status\"}\n", "version"),
        ] {
            let mut f = Fixture::new();
            let (mut stream, id) = f.connect(socket);
            stream.write_all(line.as_bytes()).unwrap();
            assert_eq!(f.proceed(id.unwrap()), Progress::Gone, "{line}");
            let answer = read_line(&stream);
            assert!(answer.contains(&format!("\"code\":\"{code}\"")), "{answer}");
        }
        let mut f = Fixture::new();
        let (mut stream, id) = f.connect(Socket::Control);
        stream.write_all(reload.as_bytes()).unwrap();
        assert_eq!(f.proceed(id.unwrap()), Progress::Asks(Request::Reload));
    }

    #[test]
    fn a_client_that_does_not_read_blocks_no_other_and_is_dropped() {
        let mut f = Fixture::new();
        let (mut slow, id) = f.connect(Socket::Control);
        let id = id.unwrap();
        slow.write_all(Request::Status.to_line().as_bytes()).unwrap();
        assert_eq!(f.proceed(id), Progress::Asks(Request::Status));
        let state = "x".repeat(4 << 20);
        let answer = Answer::Status(Box::new(Status { state, ..Status::default() }));
        f.server.answer(id, Arc::new(answer.to_line().into_bytes()), f.now);
        assert_eq!(f.proceed(id), Progress::Waits(Interest::Write));
        let (mut other, other_id) = f.connect(Socket::Control);
        other.write_all(Request::Status.to_line().as_bytes()).unwrap();
        assert_eq!(f.proceed(other_id.unwrap()), Progress::Asks(Request::Status));
        f.server.drop_stalled(f.now + CLIENT_TIMEOUT / 2);
        assert!(f.server.client_fd(id).is_some());
        f.server.drop_stalled(f.now + CLIENT_TIMEOUT);
        assert_eq!((f.server.client_fd(id).is_none(), f.proceed(id)), (true, Progress::Gone));
    }

    #[test]
    fn only_a_want_of_descriptors_or_memory_pauses_the_listeners() {
        let of = |errno: Errno| is_exhaustion(&io::Error::from(errno));
        assert!(of(Errno::EMFILE) && of(Errno::ENFILE) && of(Errno::ENOMEM));
        assert!(!of(Errno::EAGAIN) && !of(Errno::ECONNABORTED) && !of(Errno::EINTR));
    }

    #[test]
    fn clients_are_bounded_for_each_socket() {
        let mut f = Fixture::new();
        let _silent: Vec<_> = (0..MAX_CLIENTS).map(|_| f.connect(Socket::Observe)).collect();
        let (stream, id) = f.connect(Socket::Observe);
        assert_eq!(id, None);
        assert!(read_line(&stream).contains("\"code\":\"busy\""));
        assert!(f.connect(Socket::Control).1.is_some(), "observers do not lock out root");
    }

    #[test]
    fn the_old_socket_sends_the_status_without_being_asked() {
        let mut f = Fixture::new();
        let (mut stream, id) = f.connect(Socket::Legacy);
        let id = id.unwrap();
        assert_eq!(f.proceed(id), Progress::WantsStatus);
        f.server.answer(id, Arc::new(b"{}".to_vec()), f.now);
        assert_eq!(f.proceed(id), Progress::Gone);
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "{}");
    }

    #[test]
    fn sockets_have_their_modes_and_a_stale_one_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths(&directory);
        fs::create_dir(directory.path().join("run")).unwrap();
        drop(UnixListener::bind(&paths.control).unwrap());
        let server = ControlSocket::open(&paths).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&paths.control), mode(&paths.observe)), (0o600, 0o660));
        let error = ControlSocket::open(&paths).err().unwrap();
        assert!(
            error.to_string().contains(
                "another nfqd uses this socket; stop it, or choose another path with --control"
            ),
            "{error}"
        );
        drop(server);
        assert!(!paths.control.exists() && !paths.observe.exists());
    }

    #[test]
    fn a_file_at_the_sockets_path_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let paths = paths(&directory);
        fs::create_dir(directory.path().join("run")).unwrap();
        fs::write(&paths.control, "data").unwrap();
        assert!(ControlSocket::open(&paths).is_err());
        assert_eq!(fs::read_to_string(&paths.control).unwrap(), "data");
    }
}
