//! Load of many connections: a server that answers each request of a connection with its name and
//! the number of requests so far, and clients that check it.

use crate::daemon::program;
use crate::netns::Host;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Stdio};
use std::time::Duration;

/// Raises this process' limit of open files to the maximum.
///
/// # Panics
/// If it is not allowed.
pub fn allow_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("limit of open files");
}

/// A server for many connections: the program `load`, because a process has a limit of open files.
pub struct LoadServer {
    server: Child,
}

impl LoadServer {
    /// Starts one on a host; it answers by `name`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(host: &Host, name: u8, port: u16) -> LoadServer {
        let path = program("load");
        let mut command = host.command(path.to_str().expect("path"));
        let mut server = command
            .args([name.to_string(), port.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .expect("load");
        let mut ready = [0];
        server
            .stdout
            .as_mut()
            .expect("stdout")
            .read_exact(&mut ready)
            .expect("a server that listens");
        LoadServer { server }
    }
}

impl Drop for LoadServer {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Serves in this namespace until it is killed; writes a byte when it listens.
///
/// # Panics
/// If the port is taken.
pub fn run(name: u8, port: u16) {
    allow_files();
    let listener = listen(port);
    std::io::stdout().write_all(b"!").and_then(|()| std::io::stdout().flush()).expect("ready");
    serve(&listener, name);
}

fn listen(port: u16) -> TcpListener {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("bind");
    listener.set_nonblocking(true).expect("nonblocking");
    // std listens with a backlog of 128; the same socket may be told another.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(4096).expect("backlog"))
        .expect("listen");
    listener
}

fn serve(listener: &TcpListener, name: u8) {
    const LISTENER: u64 = u64::MAX;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER)).expect("epoll");
    let mut connections: HashMap<u64, (TcpStream, u8)> = HashMap::new();
    let mut events = vec![EpollEvent::empty(); 256];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or(0);
        for event in &events[..ready] {
            if event.data() == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).expect("nonblocking");
                    stream.set_nodelay(true).expect("nodelay");
                    let id = stream.as_raw_fd() as u64;
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, id)).expect("epoll");
                    connections.insert(id, (stream, 0));
                }
                continue;
            }
            let Some((stream, requests)) = connections.get_mut(&event.data()) else { continue };
            let mut request = [0; 64];
            let answered = match stream.read(&mut request) {
                Ok(0) => false,
                Ok(_) => {
                    *requests = requests.wrapping_add(1);
                    stream.write_all(&[name, *requests]).is_ok()
                }
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            };
            if !answered {
                // Closing it takes it out of the epoll set.
                connections.remove(&event.data());
            }
        }
    }
}

/// A connection of a client.
pub struct Member {
    stream: TcpStream,
    requests: u8,
    /// The server that answered first.
    pub server: u8,
}

/// Connects from a host, which it enters, some times, and asks each connection once.
///
/// # Errors
/// If one is refused or not answered.
pub fn connect_all(
    host: &Host,
    to: IpAddr,
    port: u16,
    count: usize,
) -> std::io::Result<Vec<Member>> {
    let one = |at: usize| {
        connect(to, port)
            .map_err(|error| std::io::Error::new(error.kind(), format!("connection {at}: {error}")))
    };
    host.enter(|| (0..count).map(one).collect())
}

fn connect(to: IpAddr, port: u16) -> std::io::Result<Member> {
    let stream = TcpStream::connect_timeout(&SocketAddr::new(to, port), Duration::from_secs(5))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut member = Member { stream, requests: 0, server: 0 };
    member.server = member.ask()?;
    Ok(member)
}

impl Member {
    /// Sets the time that an answer may take.
    ///
    /// # Panics
    /// If it is zero.
    pub fn set_patience(&self, patience: Duration) {
        self.stream.set_read_timeout(Some(patience)).expect("a timeout");
    }

    /// Sends another request; returns the server that answers.
    ///
    /// # Errors
    /// If the connection is gone, or nobody answers.
    pub fn ask(&mut self) -> std::io::Result<u8> {
        self.stream.write_all(b"?")?;
        let mut answer = [0; 2];
        self.stream.read_exact(&mut answer)?;
        self.requests = self.requests.wrapping_add(1);
        if answer[1] != self.requests {
            let text = format!("request {} is answered as request {}", self.requests, answer[1]);
            return Err(std::io::Error::other(text));
        }
        Ok(answer[0])
    }
}

/// Sends another request on all connections: each must be answered by the server that it began
/// with.
///
/// # Panics
/// If one is not.
pub fn ask_all(members: &mut [Member], when: &str) {
    for (at, member) in members.iter_mut().enumerate() {
        let answer = member.ask().unwrap_or_else(|error| {
            panic!("{when}: connection {at} with {}: {error}", char::from(member.server))
        });
        assert_eq!(answer, member.server, "{when}: connection {at} has moved");
    }
}

/// The number of members of each server.
pub fn shares(members: &[Member]) -> HashMap<u8, usize> {
    let mut out = HashMap::new();
    members.iter().for_each(|member| *out.entry(member.server).or_default() += 1);
    out
}
